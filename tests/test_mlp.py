"""Derivatives of perceptrons by hand against automatic differentiation."""

import copy

import numpy as np
import pytest
import torch
from problems import FLOAT64, NUM_ACTIONS, SmallPlayers, compiled_kernels, flat_obs, random_batch
from torch import nn

from blpo_rllib.core.mlp import MLP
from blpo_rllib.core.mlp_native import NativeCriticPass, critic_pass

HIDDEN = [(), (4,), (5, 4), (6, 5, 4), (17, 33, 15, 8)]


@pytest.fixture(params=[False, True], ids=["torch", "kernels"])
def kernels(request):
    return compiled_kernels() if request.param else None


@pytest.fixture(params=[(h, a) for h in HIDDEN for a in (nn.Tanh, nn.ReLU)], ids=str)
def players_and_obs(request, kernels):
    hidden, activation = request.param
    players, obs = SmallPlayers(hidden=hidden, activation=activation), flat_obs(random_batch(width=11))
    by_hand = SmallPlayers()
    by_hand.__dict__.update(players.__dict__, by_hand=True, kernels=kernels)
    return players, by_hand, obs


def check(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def check_critic_products(by_hand, players, obs):
    """The critic's products by hand against those by automatic differentiation, in all coordinates."""
    automatic, manual = players.critic(obs), by_hand.critic(obs)
    n, p = len(obs), automatic.num_parameters
    assert manual.num_parameters == p
    u, a, x = torch.randn(n, dtype=FLOAT64), torch.rand(n, dtype=FLOAT64), torch.randn(p, dtype=FLOAT64)
    check(manual.values, automatic.values)
    check(manual.gradient(u), automatic.gradient(u))
    check(manual.vjp(u), automatic.vjp(u))
    check(manual.vjp(torch.stack([u, a])), automatic.vjp(torch.stack([u, a])))
    check(manual.jvp(x), automatic.jvp(x))
    check(manual.second_order_product(x, u, a), automatic.second_order_product(x, u, a))
    everything = np.random.default_rng(0).permutation(p)
    mine, theirs = by_hand.coordinates(everything), players.coordinates(everything)
    check(manual.second_order_rows(mine, u, a), automatic.second_order_rows(theirs, u, a))
    check(manual.jacobian_columns(mine), automatic.jacobian_columns(theirs))


def test_critic_products(players_and_obs):
    players, by_hand, obs = players_and_obs
    check_critic_products(by_hand, players, obs)


def test_actor_gradient(players_and_obs):
    players, by_hand, obs = players_and_obs
    actions, old = torch.randn(2, len(obs), NUM_ACTIONS, dtype=FLOAT64)
    automatic, manual = players.actor(obs, actions, old), by_hand.actor(obs, actions, old)
    weights = torch.randn(3, len(obs), dtype=FLOAT64)
    check(manual.logp, automatic.logp)
    check(manual.gradient(weights[0]), automatic.gradient(weights[0]))
    check(manual.gradient(*weights), automatic.gradient(*weights))


@pytest.mark.parametrize(
    "modules",
    [
        [nn.Linear(2, 3), nn.Tanh()],
        [nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 1)],
        [nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, 1)],
        [nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1)],
        [nn.Bilinear(2, 2, 3), nn.Tanh(), nn.Linear(3, 1)],
    ],
    ids=str,
)
def test_other_networks_are_not_taken_for_perceptrons(modules):
    assert MLP.of(modules) is None


def single_precision_critic(hidden, num_inputs):
    sizes, modules = (num_inputs, *hidden, 1), []
    for inputs, outputs in zip(sizes, sizes[1:]):
        modules += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize(("hidden", "num_inputs", "n"), [((64, 64), 11, 641), ((256, 130), 376, 1500), ((64,), 4, 1)])
def test_kernels_in_float32_at_real_sizes(hidden, num_inputs, n, num_threads):
    """Against torch in float64, on strided inputs; results do not depend on the number of threads."""
    network = single_precision_critic(hidden, num_inputs)
    obs = torch.randn(num_inputs, n).T
    single, double = MLP.of([network]), MLP.of([copy.deepcopy(network).double()])
    u, a, x = torch.randn(n), torch.rand(n), torch.randn(single.num_parameters)
    index = np.random.default_rng(0).permutation(single.num_parameters)[:7]

    def products(critic, mlp, dtype):
        u_, a_, x_ = (t.to(dtype) for t in (u, a, x))
        rows = critic.second_order_rows(mlp.coordinates(index), u_, a_)
        return [critic.values, critic.gradient(u_), critic.vjp(torch.stack([u_, a_])), critic.jvp(x_), rows]

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        critic = critic_pass(single, obs, compiled_kernels())
        assert isinstance(critic, NativeCriticPass)
        actual = products(critic, single, torch.float32)
        torch.set_num_threads(1)
        alone = products(critic_pass(single, obs, compiled_kernels()), single, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(actual, alone))
    expected = products(critic_pass(double, obs.double(), None), double, FLOAT64)
    for x, y in zip(actual, expected):
        assert (x - y).norm() <= 1e-5 * y.norm()


def test_kernels_pass_on_what_is_not_finite():
    network = single_precision_critic((16,), 3)
    obs = torch.randn(20, 3)
    for bad in (float("nan"), float("inf")):
        weights = torch.rand(20)
        weights[3] = bad
        critic = critic_pass(MLP.of([network]), obs, compiled_kernels())
        assert not torch.isfinite(critic.gradient(weights)).all()
        assert not torch.isfinite(critic.vjp(weights)).all()
    obs[7, 1] = float("nan")
    values = critic_pass(MLP.of([network]), obs, compiled_kernels()).values
    assert torch.isnan(values[7])
    assert torch.isfinite(values).sum() == 19


def test_saturated_units_are_exactly_one():
    network = single_precision_critic((2,), 1)
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        network[0].bias.zero_()
    z = torch.tensor([[-1e30], [-100.0], [-0.5], [0.0], [1e-3], [3.0], [50.0], [1e30]])
    critic = critic_pass(MLP.of([network]), z, compiled_kernels())
    torch.testing.assert_close(critic._pass.hidden(1), torch.tanh(torch.cat([z, -z], 1)).T, rtol=0, atol=2e-7)
