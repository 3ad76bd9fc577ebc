"""Derivatives of perceptrons by hand against automatic differentiation."""

import numpy as np
import pytest
import torch
from problems import FLOAT64, NUM_ACTIONS, SmallPlayers, flat_obs, random_batch
from torch import nn

from blpo_rllib.core.mlp import MLP

HIDDEN = [(), (4,), (5, 4), (6, 5, 4)]


@pytest.fixture(params=[(h, a) for h in HIDDEN for a in (nn.Tanh, nn.ReLU)], ids=str)
def players_and_obs(request):
    hidden, activation = request.param
    players, obs = SmallPlayers(hidden=hidden, activation=activation), flat_obs(random_batch())
    by_hand = SmallPlayers(by_hand=True)
    by_hand.__dict__.update(players.__dict__, by_hand=True)
    return players, by_hand, obs


def check(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_critic_products(players_and_obs):
    players, by_hand, obs = players_and_obs
    automatic, manual = players.critic(obs), by_hand.critic(obs)
    n, p = len(obs), automatic.num_parameters
    assert manual.num_parameters == p
    u, a, x = torch.randn(n, dtype=FLOAT64), torch.rand(n, dtype=FLOAT64), torch.randn(p, dtype=FLOAT64)
    check(manual.values, automatic.values)
    check(manual.vjp(u), automatic.vjp(u))
    check(manual.vjp(torch.stack([u, a])), automatic.vjp(torch.stack([u, a])))
    check(manual.jvp(x), automatic.jvp(x))
    check(manual.second_order_product(x, u, a), automatic.second_order_product(x, u, a))
    everything = np.random.default_rng(0).permutation(p)
    mine, theirs = by_hand.columns(everything), players.columns(everything)
    check(manual.second_order_rows(mine, u, a), automatic.second_order_rows(theirs, u, a))
    check(manual.jacobian_columns(mine), automatic.jacobian_columns(theirs))


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
