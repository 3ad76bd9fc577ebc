"""Dampings that follow the curvature, against dense linear algebra in float64."""

import copy

import pytest
import scipy.stats
import torch
from problems import FLOAT64, SmallPlayers, critic_loss, random_batch
from test_data_parallel import error, train
from test_ihvp import DenseCurvature, all_coordinates, check, generator, solve
from test_update import SETTINGS

from blpo_rllib.core.curvature import Hessian
from blpo_rllib.core.ihvp import Nystrom
from blpo_rllib.core.reduction import Reduction
from studies.sweeps.auto_damping import Estimate, judge
from studies.sweeps.damping_rules import LEAST_DAMPING, LevenbergMarquardtNystrom, SpectralNystrom

RULES = pytest.mark.parametrize("rule", [SpectralNystrom(4), LevenbergMarquardtNystrom(4, 2.0)], ids=["spectral", "lm"])


def problem():
    """A critic's Hessian, the same dense, and v."""
    hessian = Hessian(critic_loss(SmallPlayers(), random_batch()), Reduction())
    return hessian, hessian.rows(all_coordinates(hessian)), torch.randn(hessian.size, dtype=FLOAT64)


def model(matrix, solver):
    """Ĥ, dense."""
    c = matrix[solver.coordinates]
    core = c[:, solver.coordinates] + solver.core_shift * torch.eye(solver.rank, dtype=FLOAT64)
    return c.T @ torch.linalg.solve(core, c)


def damped(matrix, damping):
    return matrix + damping * torch.eye(len(matrix), dtype=FLOAT64)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("multiple", [0.1, 1.0])
def test_spectral_damping_is_the_norm_of_the_dense_model(rank, multiple):
    hessian, dense, v = problem()
    solver = SpectralNystrom(rank, multiple)
    x = solve(solver, hessian, v, generator())
    expected = model(dense, solver)
    torch.testing.assert_close(solver.damping, multiple * torch.linalg.matrix_norm(expected))
    check(x, torch.linalg.solve(damped(expected, float(solver.damping)), v), rtol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_spectral_damping_leaves_no_negative_eigenvalue(seed):
    matrix = torch.randn(40, 40, dtype=FLOAT64)
    matrix, solver = matrix + matrix.T, SpectralNystrom(6)
    solve(solver, DenseCurvature(matrix), matrix[0], generator(seed))
    assert torch.linalg.eigvalsh(model(matrix, solver))[0] < 0
    assert torch.linalg.eigvalsh(damped(model(matrix, solver), float(solver.damping)))[0] >= -1e-9 * solver.damping


def test_spectral_direction_does_not_depend_on_scale():
    _, dense, v = problem()
    small, large = SpectralNystrom(4, core_shift=0.0), SpectralNystrom(4, core_shift=0.0)
    x = solve(small, DenseCurvature(dense), v, generator())
    check(solve(large, DenseCurvature(1e3 * dense), v, generator()), x / 1e3)
    torch.testing.assert_close(large.damping, 1e3 * small.damping)


def test_levenberg_marquardt_follows_the_dense_error():
    hessian, dense, v = problem()
    solver, expected, errors = LevenbergMarquardtNystrom(4, 1e-3), 1e-3, []
    for _ in range(40):
        x = solve(solver, hessian, v, generator())
        assert float(solver.damping) == pytest.approx(expected)
        check(x, torch.linalg.solve(damped(model(dense, solver), expected), v), rtol=1e-6)
        errors.append(float((damped(dense, expected) @ x - v).norm() / v.norm()))
        expected *= 1.5 if errors[-1] > 0.75 else 2 / 3 if errors[-1] < 0.25 else 1.0
    assert errors[0] > 0.75
    assert 0.25 <= errors[-1] <= 0.75
    assert errors[-1] == errors[-2]


def test_levenberg_marquardt_state_restores_damping():
    hessian, _, v = problem()
    solver, restored = LevenbergMarquardtNystrom(4, 1e-3), LevenbergMarquardtNystrom(4)
    for _ in range(3):
        solve(solver, hessian, v, generator())
    restored.set_state(solver.get_state())
    check(solve(restored, hessian, v, generator(1)), solve(solver, hessian, v, generator()))
    assert float(restored.damping) == float(solver.damping) != 1e-3


@RULES
def test_without_curvature_nothing_breaks(rule):
    rule, flat, v = copy.deepcopy(rule), DenseCurvature(torch.zeros(40, 40, dtype=FLOAT64)), problem()[2][:40]
    for _ in range(60):
        x = solve(rule, flat, v, generator())
    assert float(rule.damping) == pytest.approx(LEAST_DAMPING)
    check(x, v / LEAST_DAMPING)


@RULES
def test_unequal_shards_change_nothing(rule):
    alone, metrics, _ = train(rule, Hessian, SETTINGS, (), FLOAT64)
    shared, shared_metrics, _ = train(rule, Hessian, SETTINGS, (1, 3), FLOAT64)
    assert error(shared, alone) < 1e-10
    assert shared_metrics["damping"] == pytest.approx(metrics["damping"])
    other, *_ = train(Nystrom(4, 1e3), Hessian, SETTINGS, (), FLOAT64)
    assert error(other, alone) > 1e-6


def test_intervals_are_welchs():
    a, b = [1.0, 2.0, 4.0, 4.5], [3.0, 3.5, 7.0]
    found, expected = Estimate.of_difference(a, b), scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert found.value - found.half_width == pytest.approx(expected.low)
    assert found.value + found.half_width == pytest.approx(expected.high)
    assert Estimate.of_difference([2.0, 2.0], [1.0, 1.0]) == Estimate(1.0, 0.0)
    alone = Estimate.of_difference(a)
    assert alone.half_width == pytest.approx(scipy.stats.t.ppf(0.975, 3) * scipy.stats.sem(a))


def test_a_rule_is_judged_by_the_best_fixed_damping():
    def records(*returns):
        return [{"final_return": r, "mean_return": r / 2, "bilevel/damping": 1.0} for r in returns]

    arms = {
        "damping 1": records(10, 12, 14),
        "damping 50": records(100, 101, 102),
        "spectral": records(99, 101, 102),
        "levenberg_marquardt": records(50, 52, 54),
    }
    found = judge(arms)["against_the_best_fixed"]
    assert {e["best"] for by_measure in found.values() for e in by_measure.values()} == {"damping 50"}
    assert [e["passes"] for e in found["spectral"].values()] == [True, True]
    assert [e["passes"] for e in found["levenberg_marquardt"].values()] == [False, False]
