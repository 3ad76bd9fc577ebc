"""Evaluations: by the training's filter statistics wherever they run, and by one episode of each environment."""

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.utils.numpy import SMALL_NUMBER

from blpo_rllib import BLPOConfig


@pytest.fixture(scope="module", autouse=True)
def _ray():
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config(**evaluation):
    return (
        BLPOConfig()
        .environment("CartPole-v1")
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=2,
            env_to_module_connector=lambda env, spaces, device: MeanStdFilter(),
        )
        .training(train_batch_size=128, num_epochs=1, hypergradient="none")
        .rl_module(model_config={"fcnet_hiddens": [8]})
        .evaluation(**{"evaluation_interval": 1, "evaluation_duration": 3} | evaluation)
        .debugging(seed=0, log_level="ERROR")
    )


def statistics(runner):
    """Number, mean and sum of squared deviations of the observations in a runner's filter."""
    (connector,) = (x for x in runner._env_to_module.connectors if isinstance(x, MeanStdFilter))
    stat = connector._filters[None].running_stats
    return stat.num_pushes, stat.mean.copy(), stat.sum_sq_diff_array.copy()


def assert_same(found, expected):
    assert found[0] == expected[0] > 128
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-9)


def returns(algo, seeds):
    """Of the most likely actions under the training's statistics, computed environment by environment."""
    count, mean, squares = statistics(algo.env_runner)
    deviation = np.sqrt((squares / (count - 1)).astype(np.float32)) + SMALL_NUMBER
    module, found = algo.env_runner.module, []
    for seed in seeds:
        env = gym.make("CartPole-v1")
        obs, _ = env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            x = np.clip((obs - mean) / deviation, -10, 10).astype(np.float32)
            with torch.no_grad():
                logits = module.forward_inference({Columns.OBS: torch.as_tensor(x[None])})[Columns.ACTION_DIST_INPUTS]
            obs, reward, terminated, truncated, _ = env.step(int(logits.argmax()))
            total, done = total + reward, terminated or truncated
        found.append(total)
    return found


def test_local_evaluation_and_returns():
    """RLlib's default; one episode of each environment has the return that its seed, statistics and weights give."""
    c = config(
        evaluation_one_episode_per_env=True,
        evaluation_seed=70,
        evaluation_config={"explore": False, "num_envs_per_env_runner": 4},
    )
    algo = c.build_algo()
    try:
        algo.train()
        results = algo.train()["evaluation"]["env_runners"]
        trained = statistics(algo.env_runner)
        assert_same(statistics(algo.eval_env_runner), trained)
        assert results["num_episodes"] == 4
        expected = returns(algo, range(70, 74))
        assert results["episode_return_mean"] == pytest.approx(np.mean(expected))
        assert results["episode_return_max"] == max(expected)
        again = algo.evaluate()["env_runners"]
        assert again["episode_return_mean"] == results["episode_return_mean"]
        assert_same(statistics(algo.env_runner), trained)
    finally:
        algo.stop()


@pytest.mark.parametrize("one_each", [False, True])
def test_remote_evaluation(one_each):
    """Right from the first iteration, whose observations the training's EnvRunner has not yet given away."""
    c = config(evaluation_num_env_runners=1, evaluation_one_episode_per_env=one_each).env_runners(num_env_runners=1)
    algo = c.build_algo()
    try:
        algo.train()
        trained = algo.env_runner_group.foreach_env_runner(statistics, local_env_runner=False)[0]
        for group in (algo.eval_env_runner_group, algo.env_runner_group):
            for found in group.foreach_env_runner(statistics):
                assert_same(found, trained)
        algo.train()
        after = algo.env_runner_group.foreach_env_runner(statistics)
        # What evaluations saw is not among it.
        steps = algo.metrics.peek(("env_runners", "num_env_steps_sampled_lifetime"))
        assert all(steps <= count <= 1.3 * steps for count, *_ in after)
    finally:
        algo.stop()


@pytest.mark.slow
@pytest.mark.parametrize("one_each", [False, True])
def test_evaluation_beside_training(one_each):
    """It goes by what the training's EnvRunners had seen when an iteration ended, and adds nothing to it."""
    c = config(
        evaluation_num_env_runners=1, evaluation_parallel_to_training=True, evaluation_one_episode_per_env=one_each
    ).env_runners(num_env_runners=1)
    algo = c.build_algo()
    try:
        seen = []
        for _ in range(3):
            results = algo.train()
            assert results["evaluation"]["env_runners"]["num_episodes"] == (2 if one_each else 3)
            seen.append(algo.env_runner_group.foreach_env_runner(statistics, local_env_runner=False)[0])
        (found,) = algo.eval_env_runner_group.foreach_env_runner(statistics, local_env_runner=False)
        (used,) = [each for each in seen if each[0] == found[0]]
        assert_same(found, used)
        steps = algo.metrics.peek(("env_runners", "num_env_steps_sampled_lifetime"))
        assert steps <= seen[-1][0] <= 1.3 * steps
    finally:
        algo.stop()


def test_evaluation_on_the_trainings_own_env_runner():
    algo = config(evaluation_interval=None).build_algo()
    try:
        algo.train()
        trained = statistics(algo.env_runner)
        assert algo.eval_env_runner_group is None
        algo.evaluate()
        assert_same(statistics(algo.env_runner), trained)
        algo.train()
        assert statistics(algo.env_runner)[0] > trained[0]
    finally:
        algo.stop()


def test_what_stands_in_the_way_is_said():
    with pytest.raises(ValueError, match="evaluation_one_episode_per_env=True needs a single-agent BatchedEnvRunner"):
        config(evaluation_one_episode_per_env=True).env_runners(env_runner_cls=SingleAgentEnvRunner).validate()
    with pytest.raises(ValueError, match="with custom_evaluation_function=.*: set one of them"):
        config(evaluation_one_episode_per_env=True, custom_evaluation_function=lambda algo, group: None).validate()
    c = config(evaluation_one_episode_per_env=True, evaluation_seed=7)
    c.validate()
    c.validate()
    assert c.custom_evaluation_function.seed == 7
    c.evaluation(evaluation_one_episode_per_env=False).validate()
    assert c.custom_evaluation_function is None
    assert BLPOConfig.from_dict({"evaluation_seed": 3}).evaluation_seed == 3
