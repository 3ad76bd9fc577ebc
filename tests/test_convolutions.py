"""Convolutional players in float64 against finite differences, and images of bytes and bits."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from problems import FLOAT64, NUM_ACTIONS, SmallPlayers, compiled_kernels, critic_loss, random_batch
from ray.rllib.algorithms.ppo.ppo_catalog import PPOCatalog
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns
from ray.rllib.core.models.base import ENCODER_OUT
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from test_hypergradient import LEADER, NONE, actor_of, check, surrogate_sum, vectors
from test_mlp import check_critic_products
from test_update import SETTINGS
from torch import nn

from blpo_rllib.core import mlp
from blpo_rllib.core.convolutions import ConvolutionalCriticPass
from blpo_rllib.core.curvature import GaussNewton, Hessian
from blpo_rllib.core.hypergradient import Correction, hypergradient
from blpo_rllib.core.ihvp import Exact, Nystrom
from blpo_rllib.core.networks import AutogradCriticPass, flatten, unflatten
from blpo_rllib.core.update import BilevelUpdate
from blpo_rllib.learning.players import RLModulePlayers
from blpo_rllib.learning.rl_module import REFERENCE_MODEL_CONFIG, BLPOTorchRLModule

STEP = 1e-5


def network(outputs):
    layers = [nn.Unflatten(1, (2, 5, 5)), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(4, outputs)).double()


class ConvolutionalPlayers(SmallPlayers):
    def __init__(self):
        super().__init__()
        self.critic_network, self.actor_network = network(1), network(NUM_ACTIONS)
        self.critic_parameters = list(self.critic_network.parameters())
        self.actor_parameters = [*self.actor_network.parameters(), self.log_std]


def differences(function, at):
    """The derivative of a vector-valued function at ``at`` [n], by central differences, [n, ...]."""
    units = STEP * torch.eye(len(at), dtype=FLOAT64)
    return torch.stack([(function(at + unit) - function(at - unit)) / (2 * STEP) for unit in units])


@pytest.fixture
def problem():
    players, batch = ConvolutionalPlayers(), random_batch()
    batch = replace(batch, obs=torch.randn(*batch.step.shape, 50, dtype=FLOAT64))
    return players, batch, critic_loss(players, batch)


def loss_gradient(players, batch, loss, w):
    """∇_w of the critic's loss at any w, by autograd."""
    w = w.detach().requires_grad_()
    names = [name for name, _ in players.critic_network.named_parameters()]
    state = dict(zip(names, unflatten(w, players.critic_parameters), strict=True))
    values = torch.func.functional_call(players.critic_network, state, (batch.obs.flatten(0, 1),))[:, 0]
    return torch.autograd.grad((loss.weights * (loss.targets - values).square()).sum(), w)[0]


def test_hypergradient_is_that_of_finite_differences(problem):
    players, batch, loss = problem
    w, theta = (x.detach() for x in vectors(players))
    m, correction, damping = loss.weights.view_as(batch.step), Correction(0.4, None), 0.5
    solver = Exact(damping)
    result = hypergradient(
        actor=actor_of(players, batch),
        loss=loss,
        batch=batch,
        leader=LEADER,
        correction=correction,
        solver=solver,
        curvature=Hessian(loss, NONE),
        coordinates=players.coordinates(solver.draw(len(w), np.random.default_rng(0))),
        reduction=NONE,
    )

    def objective(w, theta):
        return -surrogate_sum(players, batch, w, theta, None, LEADER.clip, m)

    with torch.no_grad():
        g = differences(lambda theta: objective(w, theta), theta)
        v = differences(lambda w: objective(w, theta), w)
    hessian = differences(lambda w: loss_gradient(players, batch, loss, w), w)
    x = torch.linalg.solve(hessian + damping * torch.eye(len(w), dtype=FLOAT64), v)

    def cross_gradient(w):
        leaf = theta.clone().requires_grad_()
        value = surrogate_sum(players, batch, w, leaf, loss.targets, correction.cross_clip, -2 * batch.step)
        return torch.autograd.grad(value, leaf)[0]

    h = STEP / float(x.abs().max())
    mixed = (cross_gradient(w + h * x) - cross_gradient(w - h * x)) / (2 * h)
    check(result.grad_critic, v, rtol=1e-6)
    check(result.ihvp, x, rtol=1e-6)
    check(result.direction, g - mixed, rtol=1e-5)


@pytest.mark.parametrize("batched", [False, True])
def test_rows_of_all_layers(problem, batched):
    """Of which some are asked for, out of order."""
    players, batch, loss = problem
    loss.critic._batched = batched
    w, _ = (x.detach() for x in vectors(players))
    hessian = differences(lambda w: loss_gradient(players, batch, loss, w), w)
    size = loss.critic.num_parameters
    picked = np.random.default_rng(1).permutation(size)[:20]
    coordinates = players.coordinates(picked)
    check(Hessian(loss, NONE).rows(coordinates), hessian[picked], rtol=1e-6)
    everything = players.coordinates(np.arange(size))
    jacobian = loss.critic.jacobian_columns(everything).T
    dense = jacobian.T @ (2 * loss.weights[:, None] * jacobian)
    check(GaussNewton(loss, NONE).rows(coordinates), dense[picked])
    x = torch.randn(size, dtype=FLOAT64)
    check(loss.critic.jvp(x), jacobian @ x)
    check(loss.critic.vjp(loss.weights), jacobian.T @ loss.weights)


def images_module(space, **model):
    torch.manual_seed(0)
    model = REFERENCE_MODEL_CONFIG | {"conv_filters": [[4, 3, 2]], "head_fcnet_hiddens": [8]} | model
    return RLModuleSpec(BLPOTorchRLModule, space, gym.spaces.Discrete(3), model_config=model).build()


class AutomaticPlayers(RLModulePlayers):
    """Players whose networks are not recognised, so that all derivatives are automatic."""

    def _find_networks(self):
        pass


# Paddings of both sides and of one, windows that overlap and that leave gaps, heads of one to three layers.
NETWORKS = {
    "relu": {"conv_filters": [[4, 4, 2], [3, 3, 1]], "head_fcnet_activation": "relu"},
    "tanh": {"conv_filters": [[3, 3, 1], [4, 4, 2]], "conv_activation": "tanh", "head_fcnet_activation": "tanh"},
    "no padding": {"conv_filters": [[4, 3, 1, "valid"], [3, [2, 3], [1, 2], "valid"]], "head_fcnet_activation": "relu"},
    "gaps": {"conv_filters": [[3, 2, 3], [4, 2, 1]], "head_fcnet_hiddens": [], "head_fcnet_activation": "relu"},
    "two layers": {"conv_filters": [[4, 4, 3]], "head_fcnet_hiddens": [6, 5], "head_fcnet_activation": "relu"},
}


@pytest.mark.parametrize("block_bytes", [mlp.BLOCK_BYTES, 30_000], ids=["at once", "in parts"])
@pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)
def test_convolutions_by_hand(model, block_bytes, monkeypatch):
    """Against automatic differentiation, in all coordinates."""
    monkeypatch.setattr(mlp, "BLOCK_BYTES", block_bytes)
    module = images_module(gym.spaces.Box(-1, 1, (7, 9, 2), np.float32), **{"conv_activation": "relu"} | model).double()
    players, automatic_players = RLModulePlayers(module, "m"), AutomaticPlayers(module, "m")
    assert [*map(id, players.critic_parameters)] == [*map(id, automatic_players.critic_parameters)]
    obs = torch.randn(11, 7, 9, 2, dtype=FLOAT64)
    assert isinstance(players.critic(obs), ConvolutionalCriticPass)
    assert isinstance(automatic_players.critic(obs), AutogradCriticPass)
    check_critic_products(players, automatic_players, obs)
    # The same by some columns at a time, of all coordinates and of the perceptron's alone.
    critic, n, p = players.critic(obs), len(obs), sum(x.numel() for x in players.critic_parameters)
    first, second, cotangents = torch.randn(n, dtype=FLOAT64), torch.rand(n, dtype=FLOAT64), torch.randn(3, n).double()
    check(assembled(critic.vjp_blocks(cotangents), 3, p), critic.vjp(cotangents))
    for least in (0, p - 60):
        picked = players.coordinates(np.random.default_rng(1).permutation(np.arange(least, p))[:40])
        rows = assembled(critic.second_order_blocks(picked, first, second), len(picked), p)
        check(rows, critic.second_order_rows(picked, first, second))


def assembled(blocks, k, p):
    """Rows from their blocks of columns, each of which must come once."""
    rows = torch.full((k, p), float("nan"), dtype=FLOAT64)
    for block, columns in blocks:
        assert rows[:, block].isnan().all()
        rows[:, block] = columns
    return rows


@pytest.mark.parametrize(
    "model",
    [
        {"conv_activation": "silu"},
        {"head_fcnet_activation": "silu"},
    ],
    ids=str,
)
def test_other_networks_are_differentiated_automatically(model):
    module = images_module(gym.spaces.Box(-1, 1, (8, 8, 2), np.float32), **model)
    assert isinstance(RLModulePlayers(module, "m").critic(torch.randn(3, 8, 8, 2)), AutogradCriticPass)


@pytest.mark.parametrize(("dtype", "high", "scale"), [(np.uint8, 255, 255.0), (np.bool_, 1, 1.0)])
def test_images_of_bytes_and_bits(dtype, high, scale):
    """As their numbers in [0, 1], in training and in acting."""
    modules = []
    for space in (gym.spaces.Box(0, high, (8, 8, 2), dtype), gym.spaces.Box(0, 1, (8, 8, 2), np.float32)):
        modules.append(images_module(space))
    image = torch.as_tensor(np.random.default_rng(0).integers(0, high + 1, (5, 8, 8, 2)).astype(dtype))
    for name in ("compute_values", "forward_train", "forward_inference"):
        found, expected = (
            getattr(module, name)({Columns.OBS: obs})
            for module, obs in zip(modules, (image, image.float() / scale), strict=True)
        )
        if name != "compute_values":
            found, expected = found[Columns.ACTION_DIST_INPUTS], expected[Columns.ACTION_DIST_INPUTS]
        torch.testing.assert_close(found, expected)
    values = [
        RLModulePlayers(module, "m").critic(obs).values
        for module, obs in zip(modules, (image, image.float() / scale), strict=True)
    ]
    torch.testing.assert_close(*values)


def frozen_module(which, model):
    """With encoders of the actor, the critic or both that are not trained, or with one of both."""
    space = gym.spaces.Box(-1, 1, (7, 9, 2), np.float32)
    if which != "shared":
        module = images_module(space, **{"conv_activation": "relu"} | model).double()
        names = [which] if which in ("actor", "critic") else ["actor", "critic"]
        trunks = [getattr(module.encoder, f"{name}_encoder") for name in names]
    else:
        torch.manual_seed(0)
        model = {"conv_filters": [[4, 3, 2]], "conv_activation": "relu", "head_fcnet_hiddens": [8]} | model
        config = model | {"vf_share_layers": True, "head_fcnet_activation": "tanh"}
        actions = gym.spaces.Discrete(3)
        module = RLModuleSpec(DefaultPPOTorchRLModule, space, actions, model_config=config, catalog_class=PPOCatalog)
        module = module.build().double()
        trunks = [module.encoder.encoder]
    for trunk in trunks:
        trunk.requires_grad_(False)
    return module, trunks


@pytest.mark.parametrize("by_kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("model", [{}, {"head_fcnet_hiddens": []}], ids=["one hidden layer", "linear heads"])
@pytest.mark.parametrize("which", ["actor", "critic", "both", "shared"])
def test_frozen_trunks_are_applied_once_an_update(which, model, by_kernels):
    """The update is that of networks which are differentiated automatically, from the images on."""
    results, kernels = [], compiled_kernels() if by_kernels else None
    batch = random_batch(num_segments=4, kernels=kernels)
    batch = replace(
        batch,
        obs=torch.randn(*batch.step.shape, 7, 9, 2, dtype=FLOAT64),
        actions=torch.randint(3, batch.step.shape),
        old_dist_inputs=torch.randn(*batch.step.shape, 3, dtype=FLOAT64),
    )
    for cls in (RLModulePlayers, AutomaticPlayers):
        module, trunks = frozen_module(which, model)
        players, rows = cls(module, "m", kernels=kernels), []
        optimizers = [torch.optim.Adam(p, lr=1e-2, fused=True) for p in (players.actor_members, players.critic_members)]
        update = BilevelUpdate(players, *optimizers, Hessian, Nystrom(3, 0.5, 1.0), 0, NONE, None, kernels)
        for trunk in trunks:
            trunk.register_forward_hook(lambda _, inputs, outputs, rows=rows: rows.append(len(outputs[ENCODER_OUT])))
        before = flatten([p.detach().clone() for p in module.parameters()])
        metrics = [update.run(batch, 2, SETTINGS) for _ in range(2)]
        after = flatten([p.detach() for p in module.parameters()])
        trainable = flatten([torch.full_like(p, p.requires_grad) for p in module.parameters()]).bool()
        assert not (before != after)[~trainable].any()
        assert (before != after)[trainable].double().mean() > 0.9
        if cls is RLModulePlayers:
            assert sum(rows) == 2 * len(trunks) * batch.step.numel()
        results.append((after, metrics[1]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-7, atol=1e-9)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5, abs=1e-8)
