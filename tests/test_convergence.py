"""The hypergradient reaches a local Stackelberg equilibrium where theory says so, and what keeps it from there."""

import numpy as np
import pytest
import torch

from blpo_rllib.core.ihvp import Nystrom
from studies.convergence.convergence import (
    NUM_STATES,
    Game,
    Rule,
    conditions,
    gradient_errors,
    play,
    rate,
    rules,
    undamped,
)

# One process with a critic that can be right everywhere, and with one that cannot.
GAMES = {p: Game.random(p, seed=2) for p in (NUM_STATES, 3)}


def full_rank(p, damping=1e-6):
    return lambda: Nystrom(p, damping, core_shift=0.0)


def end(game, rule, iterations):
    return conditions(game, *play(game, rule, iterations)[-1])


@pytest.mark.parametrize("game", GAMES.values(), ids=map(str, GAMES))
def test_hypergradient_is_the_total_derivative(game):
    errors = gradient_errors(game, np.random.default_rng(0))
    assert errors["exact"] < 1e-8
    assert max(errors.values()) < 1e-4


@pytest.mark.parametrize("p", GAMES)
def test_gradient_descent_at_the_rate_of_theory_to_a_strict_minimum(p):
    game = GAMES[p]
    path = play(game, Rule(undamped, None), 200)
    found, speed = conditions(game, *path[-1]), rate(game, path)
    # min ‖dF/dθ‖² <= 2 (F(θ_0) − F(θ_T)) / (α T), for every T.
    assert (np.array(speed["running_minimum"]) <= np.array(speed["bound"])).all()
    assert found["total_derivative"] < 1e-6
    assert found["follower_derivative"] < 1e-6
    assert found["follower_curvature_least_eigenvalue"] > 0.01
    assert found["total_hessian_least_eigenvalue"] > 0.05
    # The follower's answer matters: the leader's own gradient does not vanish there.
    assert found["leader_partial_derivative"] > 0.1


def test_nystrom_of_full_rank_with_nested_steps_ends_there_too():
    game = GAMES[3]
    reached, exact = play(game, Rule(full_rank(3), 10), 200)[-1], play(game, Rule(undamped, None), 200)[-1]
    assert conditions(game, *reached)["total_derivative"] < 1e-4
    torch.testing.assert_close(reached, exact, rtol=0, atol=1e-3)


def test_damping_leaves_a_distance_in_proportion_to_it():
    game = GAMES[3]
    small, large = (end(game, Rule(full_rank(3, damping), None), 200)["total_derivative"] for damping in (1e-4, 1e-3))
    assert small < 1e-3
    assert 8 < large / small < 12


def test_low_rank_ends_elsewhere_and_less_damping_makes_it_worse():
    """On what k rows do not see, x is v/ρ: with k < p no damping is small enough, and one can be too small."""
    game = GAMES[3]
    norms = [
        end(game, Rule(lambda d=damping: Nystrom(2, d, core_shift=0.0), None), 150)["total_derivative"]
        for damping in (1e-4, 0.1)
    ]
    assert norms[0] > norms[1] > 0.1


@pytest.mark.parametrize("name", ["simultaneous", "bound b = 0.8"])
def test_without_the_whole_correction_play_ends_where_the_leaders_own_gradient_vanishes(name):
    """With b < 1 the step g − correction has at least (1 − b) times the norm of g: it vanishes only where g does."""
    game = GAMES[3]
    found = end(game, rules(3)[name], 400)
    assert found["leader_partial_derivative"] < 2e-3
    assert found["total_derivative"] > 0.3
    assert found["return"] < end(game, Rule(undamped, None), 200)["return"] - 1


def test_a_bound_above_one_does_not_move_the_equilibrium():
    found = end(GAMES[3], rules(3)["bound b = 1.4"], 300)
    assert found["total_derivative"] < 1e-4
    assert found["total_hessian_least_eigenvalue"] > 0
