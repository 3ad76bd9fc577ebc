"""RLlib's modules as players: by hand against automatically, and what is recognised."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from problems import compiled_kernels, random_batch
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from test_update import SETTINGS

from blpo_rllib.core.curvature import Hessian
from blpo_rllib.core.ihvp import Nystrom
from blpo_rllib.core.mlp import MLPActorPass, MLPCriticPass
from blpo_rllib.core.networks import AutogradActorPass, AutogradCriticPass
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.update import BilevelUpdate
from blpo_rllib.learning.players import RLModulePlayers
from blpo_rllib.learning.rl_module import REFERENCE_MODEL_CONFIG, BLPOTorchRLModule

N, OBS_SIZE = 30, 5
ACTION_SPACES = {
    "discrete": gym.spaces.Discrete(3),
    "multi-discrete": gym.spaces.MultiDiscrete([2, 4]),
    "box": gym.spaces.Box(-1, 1, (2,), np.float32),
}


def module(action_space, **model_config):
    torch.manual_seed(0)
    return RLModuleSpec(
        module_class=BLPOTorchRLModule,
        observation_space=gym.spaces.Box(-1, 1, (OBS_SIZE,), np.float32),
        action_space=action_space,
        model_config=REFERENCE_MODEL_CONFIG | {"fcnet_hiddens": [8, 6], "policy_head_gain": 1.0} | model_config,
    ).build()


class AutomaticPlayers(RLModulePlayers):
    """Players whose perceptrons are not recognised, so that all derivatives are automatic."""

    def _find_networks(self):
        pass


def twins(action_space, **model_config):
    built = module(action_space, **model_config).double()
    return RLModulePlayers(built, "m"), AutomaticPlayers(built, "m")


def sample(action_space, old_size):
    actions = torch.as_tensor(np.stack([action_space.sample() for _ in range(N)]))
    actions = actions.double() if actions.is_floating_point() else actions
    return torch.randn(N, OBS_SIZE).double(), actions, 0.3 * torch.randn(N, old_size).double()


CASES = [
    ("discrete", {}, 3),
    ("multi-discrete", {}, 6),
    ("box", {}, 4),
    ("box", {"free_log_std": False}, 4),
    ("box", {"free_log_std": False, "log_std_clip_param": 0.05}, 4),
    ("box", {"log_std_clip_param": 0.05}, 4),
    ("discrete", {"fcnet_activation": "relu", "head_fcnet_hiddens": [7], "head_fcnet_activation": "tanh"}, 3),
]


@pytest.mark.parametrize("with_kl", [False, True])
@pytest.mark.parametrize(("space", "model_config", "old_size"), CASES)
def test_actor_and_critic_by_hand(space, model_config, old_size, with_kl):
    by_hand, automatic = twins(ACTION_SPACES[space], **model_config)
    if by_hand._log_std is not None:
        by_hand._log_std.data += torch.tensor([0.04, 0.3])
    obs, actions, old = sample(ACTION_SPACES[space], old_size)
    passes = [p.actor(obs, actions, old if with_kl else None) for p in (by_hand, automatic)]
    assert isinstance(passes[0], MLPActorPass)
    assert isinstance(passes[1], AutogradActorPass)
    weights = torch.randn(3, N).double()
    gradients = [a.gradient(weights[0], weights[1], weights[2] if with_kl else None) for a in passes]
    torch.testing.assert_close(passes[0].logp, passes[1].logp)
    torch.testing.assert_close(passes[0].entropy, passes[1].entropy)
    torch.testing.assert_close(passes[0].kl, passes[1].kl)
    assert_same_gradient(gradients, by_hand.actor_parameters, automatic.actor_parameters)

    critics = [p.critic(obs) for p in (by_hand, automatic)]
    assert isinstance(critics[0], MLPCriticPass)
    assert isinstance(critics[1], AutogradCriticPass)
    torch.testing.assert_close(critics[0].values, critics[1].values)
    gradients = [c.vjp(weights[0]) for c in critics]
    assert_same_gradient(gradients, by_hand.critic_parameters, automatic.critic_parameters)


def assert_same_gradient(gradients, parameters, other_parameters):
    """Equal whatever the order of the parameters."""
    pieces = [
        dict(zip(map(id, p), g.split([x.numel() for x in p])))
        for g, p in zip(gradients, (parameters, other_parameters))
    ]
    assert pieces[0].keys() == pieces[1].keys()
    for key, piece in pieces[0].items():
        torch.testing.assert_close(piece, pieces[1][key])


def test_initialisation_is_the_references():
    built = module(ACTION_SPACES["box"], policy_head_gain=0.01)
    for encoder in (built.encoder.actor_encoder, built.encoder.critic_encoder):
        first = encoder.net.mlp[0]
        torch.testing.assert_close(first.weight.T @ first.weight, 2 * torch.eye(OBS_SIZE), atol=1e-5, rtol=0)
        assert (first.bias == 0).all()
    assert float(torch.linalg.matrix_norm(built.pi.net.mlp[-1].weight, 2)) == pytest.approx(0.01, rel=1e-4)
    assert float(built.vf.net.mlp[-1].weight.norm()) == pytest.approx(1.0, rel=1e-4)
    assert (built.pi.log_std == 0).all()


class OddCritic(BLPOTorchRLModule):
    """A value function of the user's own."""

    def compute_values(self, batch, embeddings=None):
        return 2 * super().compute_values(batch, embeddings)


class OddPolicy(BLPOTorchRLModule):
    """A training pass of the user's own."""

    def _forward_train(self, batch, **kwargs):
        outputs = super()._forward_train(batch, **kwargs)
        return {k: 0.5 * v for k, v in outputs.items()}


@pytest.mark.parametrize(("cls", "odd"), [(OddCritic, "critic"), (OddPolicy, "actor")])
def test_overridden_modules_are_differentiated_as_they_are(cls, odd):
    built = module(ACTION_SPACES["discrete"])
    own = cls(
        observation_space=built.observation_space, action_space=built.action_space, model_config=built.model_config
    )
    players = RLModulePlayers(own, "m")
    obs, actions, _ = sample(ACTION_SPACES["discrete"], 3)
    kinds = {"critic": players.critic(obs.float()), "actor": players.actor(obs.float(), actions, None)}
    automatic = {"critic": AutogradCriticPass, "actor": AutogradActorPass}
    assert isinstance(kinds.pop(odd), automatic[odd])
    assert not isinstance(next(iter(kinds.values())), tuple(automatic.values()))


def test_the_log_std_starts_where_the_model_config_says():
    built = module(ACTION_SPACES["box"], initial_log_std=-1.5)
    assert (built.pi.log_std == -1.5).all()
    assert (module(ACTION_SPACES["box"]).pi.log_std == 0.0).all()


@pytest.mark.parametrize(("space", "model_config"), [("multi-discrete", {}), ("box", {"free_log_std": False})])
def test_distributions_without_a_closed_form_train_with_compiled_kernels(space, model_config):
    """Their derivatives are automatic, so that no minibatch can be replayed."""
    kernels = compiled_kernels()
    built = module(ACTION_SPACES[space], **model_config).double()
    players = RLModulePlayers(built, "m", kernels=kernels)
    batch = random_batch(4, 9, kernels=kernels)
    actions = np.stack([ACTION_SPACES[space].sample() for _ in range(36)]).reshape(4, 9, 2)
    batch = replace(
        batch, obs=torch.randn(4, 9, OBS_SIZE, dtype=torch.float64), actions=torch.as_tensor(actions).to(torch.float64)
    )
    before = [p.detach().clone() for p in built.parameters()]
    optimizers = [torch.optim.Adam(p, fused=True) for p in (players.actor_parameters, players.critic_parameters)]
    update = BilevelUpdate(players, *optimizers, Hessian, Nystrom(3), 0, Reduction(), None, kernels)
    update.run(batch, 2, SETTINGS)
    for p, old in zip(built.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert (p != old).any()
