"""The studies of what BLPO's parts do: their identities, and that each measures what it says."""

import numpy as np
import pytest
import ray
import torch
from problems import SmallPlayers, random_batch

from blpo_rllib import BLPOConfig
from blpo_rllib.core.curvature import GaussNewton, Hessian
from blpo_rllib.core.exact_hypergradient import Oracle
from blpo_rllib.core.hypergradient import Correction, LeaderLoss
from blpo_rllib.core.ihvp import Nystrom
from blpo_rllib.core.minibatch import UpdateSettings
from blpo_rllib.sweep.records import TrialFiles
from studies.convergence.convergence import NUM_STATES, Game, finite_differences
from studies.understanding import understanding, variants
from studies.understanding.cross_term import ExpectedAdvantage, exact_mixed_product, expected_hypergradient
from studies.understanding.variants import DIRECTIONS, redirected

# The published cross term, in expectation.


@pytest.fixture
def theta():
    return torch.as_tensor(np.random.default_rng(0).normal(size=NUM_STATES))


def test_expected_advantages_are_linear_and_invertible_in_the_rewards(theta):
    game = Game.random(NUM_STATES, seed=2)
    operator = ExpectedAdvantage(game, theta, 0.95)
    rewards, nothing = game.rewards.view(1, -1), torch.zeros_like(game.rewards.view(1, -1))
    adv = operator.scaled(torch.tensor(3.0)).advantages(rewards, nothing)
    torch.testing.assert_close(adv, 3 * operator.advantages(rewards, nothing))
    torch.testing.assert_close(operator.inverse(adv), 3 * rewards)


def corrections(game, theta, lambda_):
    """g_θ, the published correction and the exact one where the critic is the best response."""
    w = game.best_response(theta)
    found = expected_hypergradient(game, theta, w, lambda_)
    return found.grad_actor, found.mixed_product, exact_mixed_product(game, theta, w, found.ihvp)


@pytest.mark.parametrize("lambda_", [0.0, 0.95, 1.0])
def test_surrogates_gradient_is_the_policy_gradient_where_the_critic_is_right(theta, lambda_):
    game = Game.random(NUM_STATES, seed=1)
    g, *_ = corrections(game, theta, lambda_)
    policy_gradient = finite_differences(lambda t: game.start @ game.values(t), theta)
    torch.testing.assert_close(-g, (1 - game.gamma) * policy_gradient, rtol=1e-6, atol=1e-8)


def test_exact_correction_cancels_the_gradient_of_a_one_step_advantage(theta):
    """Under a right critic Σ_a π A = 0 at every state and for every θ: the surrogate's total derivative is 0."""
    g, _, exact = corrections(Game.random(NUM_STATES, seed=1), theta, lambda_=0.0)
    torch.testing.assert_close(exact, g, rtol=1e-8, atol=1e-10)


def test_published_correction_is_minus_the_gradient_of_a_monte_carlo_advantage(theta):
    """x is then constant over states, ½; the published cross term has the sign opposite to the exact one's."""
    g, published, exact = corrections(Game.random(NUM_STATES, seed=1), theta, lambda_=1.0)
    torch.testing.assert_close(published, -g, rtol=1e-8, atol=1e-10)
    assert exact @ published < 0


# Other directions.


def small_oracle(curvature=Hessian, bound=1.0):
    torch.manual_seed(0)
    settings = UpdateSettings(1, 1, LeaderLoss(0.2), None, Correction(None, bound))
    return Oracle(SmallPlayers(by_hand=True), random_batch(), settings, curvature)


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("bound", [None, 0.5])
def test_other_directions_have_the_same_norm(monkeypatch, name, bound):
    plain = small_oracle(bound=bound).at(Nystrom(3), np.random.default_rng(0))
    monkeypatch.setattr("blpo_rllib.core.exact_hypergradient.hypergradient", redirected(DIRECTIONS[name], seed=0))
    other = small_oracle(bound=bound).at(Nystrom(3), np.random.default_rng(0))
    applied, before = (x.grad_actor - x.direction for x in (other, plain))
    torch.testing.assert_close(applied.norm(), before.norm())
    cosine = {"of g": applied @ plain.grad_actor, "of c": applied @ before}
    size = applied.norm() * plain.grad_actor.norm(), applied.norm() * before.norm()
    if name == "against g":
        torch.testing.assert_close(cosine["of g"], -size[0])
    elif name == "orthogonal":
        assert abs(cosine["of g"]) < 1e-10 * size[0]
    elif name == "reversed":
        torch.testing.assert_close(cosine["of c"], -size[1])
    else:
        assert abs(cosine["of c"]) < 0.9 * size[1]


# Nyström beside the exact solution.


@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
def test_judged_solvers(curvature):
    oracle = small_oracle(curvature)
    size, dampings = len(oracle.matrix), (1.0, 0.1)
    found = understanding.judge(oracle, (1, size), dampings, draws=2, generator=np.random.default_rng(0))
    assert found["nystrom"]["δ=0"][str(size)]["0.1"]["correction_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert found["nystrom"]["δ=0"]["1"]["0.1"]["correction_cosine"] < 1 - 1e-6
    assert found["exact"]["0.1"]["hypergradient_cosine_to_least_damping"] == pytest.approx(1.0)
    assert list(found["cg"]) == ["1", "0.1", "0"]


def small_config():
    return (
        BLPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2)
        .training(train_batch_size_per_learner=128, minibatch_size=64, num_epochs=1, hypergradient_bound=1.0)
        .rl_module(model_config={"fcnet_hiddens": [10]})
        .debugging(log_level="ERROR", seed=0)
    )


def test_a_point_of_a_run_is_measured_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(understanding, "NUM_EIGENVALUES", 10)
    understanding.train(small_config(), (128,), tmp_path)
    found = understanding.measure(tmp_path / "128", (1, 5), (1.0, 0.1), draws=1)
    assert 60 <= found["steps_of_minibatch"] <= 68
    assert found["eigenvalues"]["size"] == 61
    assert found["eigenvalues"]["positive"][0] > 0
    found["return"] = 20.0
    assert understanding.tables("small", found, {understanding.ENV_STEPS: 128.0})
    understanding.draw("small", {128: found}, "δ=1", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


# Training runs.


@pytest.mark.slow
def test_runs_leave_records_and_do_not_run_twice(tmp_path, monkeypatch, capsys):
    names = [variants.BASELINE, "published, random"]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    # Run as a script its functions travel by value as well.
    ray.cloudpickle.register_pickle_by_value(variants)
    for _ in range(2):
        variants.run_all("cartpole", names, 1, 1024, tmp_path)
    assert capsys.readouterr().out.count("/2 ") == 2
    found = variants.statistics(variants.collected(tmp_path, 1024))
    assert list(found) == names
    assert found[variants.BASELINE]["difference"] == 0
    assert np.isfinite(found[names[1]]["difference"])
    assert abs(found[names[1]]["mixed_grad_cosine"]) < 0.2
    assert len(TrialFiles(tmp_path).rows(variants.file_name(names[1], 0))) == 2
    variants.draw("cartpole", 1024, found, tmp_path / "figure.png")
    assert variants.table_of("", found).row_count == 2


def test_an_empty_bin_has_its_predecessors_return():
    rows = [
        {"throughput/env_steps": steps, "returns/episode_return_mean": value, "returns/episodes": 1.0}
        for steps, value in ((100, 1.0), (5000, 7.0))
    ]
    found = variants.curve(rows, 5000)
    assert found == [1.0] * (variants.NUM_BINS - 1) + [7.0]
