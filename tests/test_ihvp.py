"""Inverse-Hessian-vector products against dense linear algebra in float64."""

import numpy as np
import pytest
import torch
from problems import FLOAT64, SmallPlayers, critic_loss, random_batch

from blpo_rllib.core.curvature import Curvature, GaussNewton, Hessian
from blpo_rllib.core.ihvp import ConjugateGradient, Exact, Nystrom, ScaledIdentity, nystrom
from blpo_rllib.core.networks import Coordinates
from blpo_rllib.core.reduction import Reduction


class DenseCurvature(Curvature):
    """A given symmetric matrix."""

    def __init__(self, matrix):
        self._matrix = matrix
        self._reduction = Reduction()

    @property
    def size(self):
        return len(self._matrix)

    def _local_matvec(self, x):
        return self._matrix @ x

    def local_rows(self, coordinates):
        return self._matrix[coordinates.index]


@pytest.fixture
def hessian():
    return Hessian(critic_loss(SmallPlayers(), random_batch()), Reduction())


@pytest.fixture
def dense(hessian):
    return hessian.rows(all_coordinates(hessian))


@pytest.fixture
def v(hessian):
    return torch.randn(hessian.size, dtype=FLOAT64)


def generator(seed=0):
    return np.random.default_rng(seed)


def all_coordinates(curvature):
    return Coordinates.of(np.arange(curvature.size), torch.device("cpu"))


def solve(solver, curvature, v, rng):
    """Draw and solve, as the update does."""
    drawn = solver.draw(curvature.size, rng)
    coordinates = None if drawn is None else Coordinates.of(drawn, v.device)
    return solver.solve(curvature, v, coordinates, solver.local_terms(curvature, coordinates))


def check(actual, expected, rtol=1e-8):
    assert (actual - expected).norm() <= rtol * expected.norm()


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("damping", [0.05, 1.0, 50.0])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_nystrom_is_its_dense_formula(hessian, dense, v, rank, damping, shift):
    solver = Nystrom(rank, damping, shift)
    x = solve(solver, hessian, v, generator())
    c = dense[solver.coordinates]
    core = c[:, solver.coordinates] + shift * torch.eye(rank, dtype=FLOAT64)
    model = c.T @ torch.linalg.solve(core, c)
    check(x, torch.linalg.solve(model + damping * torch.eye(len(v), dtype=FLOAT64), v), rtol=1e-6)


def test_nystrom_of_full_rank_is_exact(hessian, dense, v):
    damped = dense + 0.3 * torch.eye(len(v), dtype=FLOAT64)
    x = solve(Nystrom(len(v), 0.3, core_shift=0.0), hessian, v, generator())
    check(x, torch.linalg.solve(damped, v), rtol=1e-6)


def test_nystrom_coordinates_are_kept_or_redrawn(hessian, v):
    fixed, redrawn, rng = Nystrom(3), Nystrom(3, redraw=True), generator()
    solve(fixed, hessian, v, rng)
    first = fixed.coordinates.copy()
    solve(fixed, hessian, v, rng)
    assert (fixed.coordinates == first).all()
    draws = set()
    for _ in range(5):
        solve(redrawn, hessian, v, rng)
        assert len(set(redrawn.coordinates)) == 3
        draws.add(tuple(redrawn.coordinates))
    assert len(draws) > 1


def test_nystrom_state_restores_coordinates(hessian, v):
    solver, restored = Nystrom(4), Nystrom(4)
    x = solve(solver, hessian, v, generator(1))
    restored.set_state(solver.get_state())
    assert torch.equal(solve(restored, hessian, v, generator(2)), x)


def test_exact(hessian, dense, v):
    x = solve(Exact(damping=0.1), hessian, v, generator())
    check(x, torch.linalg.solve(dense + 0.1 * torch.eye(len(v), dtype=FLOAT64), v))


def test_scaled_identity_is_the_limit_of_large_damping(hessian, v):
    x = solve(ScaledIdentity(1e6), hessian, v, generator())
    check(x, solve(Exact(1e6), hessian, v, generator()), rtol=1e-4)
    assert torch.equal(x, v / 1e6)


def test_conjugate_gradient_on_gauss_newton(v):
    curvature = GaussNewton(critic_loss(SmallPlayers(), random_batch()), Reduction())
    dense = curvature.rows(all_coordinates(curvature)) + 0.5 * torch.eye(len(v), dtype=FLOAT64)
    x = solve(ConjugateGradient(iterations=curvature.size, damping=0.5), curvature, v, generator())
    check(x, torch.linalg.solve(dense, v))


def test_conjugate_gradient_stops_at_the_solution():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=FLOAT64))
    v = torch.tensor([1.0, 1.0, 1.0], dtype=FLOAT64)
    x = solve(ConjugateGradient(iterations=50), DenseCurvature(matrix), v, generator())
    check(x, v / matrix.diagonal())
    zero = solve(ConjugateGradient(), DenseCurvature(matrix), torch.zeros_like(v), generator())
    assert torch.equal(zero, torch.zeros_like(v))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nystrom(rank=0), "nystrom_rank=0 must be an integer >= 1"),
        (lambda: Nystrom(damping=0), "nystrom_damping=0 must be a finite number > 0"),
        (lambda: Nystrom(core_shift=float("nan")), "Nystrom.core_shift=nan"),
        (lambda: ConjugateGradient(iterations=0), "ConjugateGradient.iterations=0"),
        (lambda: ConjugateGradient(damping=-1), "ConjugateGradient.damping=-1 must be a finite number >= 0"),
        (lambda: Exact(damping=-1), "Exact.damping=-1"),
        (lambda: ScaledIdentity(damping=0), "ScaledIdentity.damping=0 must be a finite number > 0"),
        (lambda: Nystrom(rank=10).check_size(9), "nystrom_rank=10 exceeds the critic's 9 parameters"),
        (lambda: Exact(max_size=5).check_size(9), "the critic has 9 parameters, but Exact"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("by_hand", [True, False])
def test_streamed_rows_give_the_same_product(v, by_hand, monkeypatch):
    hessian = Hessian(critic_loss(players := SmallPlayers(by_hand=by_hand), random_batch()), Reduction())
    solver, products = Nystrom(7, damping=0.3, core_shift=0.2), []
    for kept in (nystrom.KEPT_NUMBERS, 0):
        monkeypatch.setattr(nystrom, "KEPT_NUMBERS", kept)
        coordinates = players.coordinates(solver.draw(hessian.size, generator()))
        terms = solver.local_terms(hessian, coordinates)
        assert len(terms) == (kept > 0)
        products.append(solver.solve(hessian, v, coordinates, terms))
    check(products[1], products[0])
