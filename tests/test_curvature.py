"""Curvatures against the dense second derivative of the critic's loss."""

import numpy as np
import pytest
import torch
from problems import FLOAT64, SmallPlayers, critic_loss, flat_obs, random_batch

from blpo_rllib.core import mlp
from blpo_rllib.core.curvature import CURVATURES, GaussNewton, Hessian
from blpo_rllib.core.networks import flatten, unflatten
from blpo_rllib.core.reduction import Reduction


def dense_derivatives(players, batch, loss):
    """The Hessian of L by torch.func on a functional copy of the critic, and the Jacobian of V."""
    obs, parameters = flat_obs(batch), players.critic_parameters
    names = [name for name, _ in players.critic_network.named_parameters()]

    def values(vector):
        state = dict(zip(names, unflatten(vector, parameters), strict=True))
        return torch.func.functional_call(players.critic_network, state, (obs,))[:, 0]

    w = flatten([p.detach() for p in parameters])
    hessian = torch.func.hessian(lambda w: (loss.weights * (loss.targets - values(w)) ** 2).sum())(w)
    return hessian, torch.func.jacrev(values)(w)


@pytest.fixture(params=[False, True], ids=["automatic", "by hand"])
def problem(request):
    players, batch = SmallPlayers(by_hand=request.param), random_batch()
    loss = critic_loss(players, batch)
    return players, batch, loss, *dense_derivatives(players, batch, loss)


def check(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_hessian_rows_and_products(problem):
    players, _, loss, hessian, _ = problem
    curvature = Hessian(loss, Reduction())
    x, coordinates = torch.randn(curvature.size, dtype=FLOAT64), np.array([0, 3, 11, 17, curvature.size - 1])
    assert torch.linalg.eigvalsh(hessian).min() < 0, "an indefinite Hessian is the case of interest"
    check(curvature.matvec(x), hessian @ x)
    check(curvature.rows(players.coordinates(coordinates)), hessian[coordinates])


def test_gauss_newton_is_the_semidefinite_part(problem):
    players, _, loss, _, jacobian = problem
    dense = jacobian.T @ (2 * loss.weights[:, None] * jacobian)
    curvature = GaussNewton(loss, Reduction())
    x, coordinates = torch.randn(curvature.size, dtype=FLOAT64), np.array([2, 5, 19])
    check(curvature.matvec(x), dense @ x)
    check(curvature.rows(players.coordinates(coordinates)), dense[coordinates])
    assert torch.linalg.eigvalsh(dense).min() > -1e-12


@pytest.mark.parametrize("block_bytes", [2**28, 700, 200], ids=["whole layers", "parts of layers", "parts of slots"])
@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
def test_blocks_of_columns_are_the_rows(problem, curvature, block_bytes, monkeypatch):
    monkeypatch.setattr(mlp, "BLOCK_BYTES", block_bytes)
    players, _, loss, _, _ = problem
    curvature = curvature(loss, Reduction())
    coordinates = players.coordinates(np.random.default_rng(0).permutation(curvature.size)[:20])
    rows = torch.full((20, curvature.size), torch.nan, dtype=FLOAT64)
    for block, some in curvature.row_blocks(coordinates):
        assert some.numel() < rows.numel() / 2
        rows[:, block] = some
    check(rows, curvature.rows(coordinates))


def test_gauss_newton_is_the_hessian_where_the_critic_fits(problem):
    players, batch, loss, _, _ = problem
    fitted = critic_loss(players, batch, targets=loss.critic.values)
    coordinates = players.coordinates(np.arange(7))
    check(GaussNewton(fitted, Reduction()).rows(coordinates), Hessian(fitted, Reduction()).rows(coordinates))


@pytest.mark.parametrize("name", CURVATURES)
def test_padding_does_not_count(problem, name):
    players, batch, loss, *_ = problem
    coordinates = players.coordinates(np.arange(5))
    changed = loss.targets + 1e3 * (loss.weights == 0)
    expected = CURVATURES[name](loss, Reduction()).rows(coordinates)
    check(CURVATURES[name](critic_loss(players, batch, changed), Reduction()).rows(coordinates), expected)
