"""EnvPool's environments against gymnasium's: spaces, ends of episodes, rewards, seeds; errors for users."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import ray
from gymnasium.vector import AutoresetMode
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from blpo_rllib import BLPOConfig
from blpo_rllib.sampling.env_runner import BatchedEnvRunner
from blpo_rllib.sampling.envpool import EnvPoolCreator, EnvPoolVectorEnv

TASKS = ["CartPole-v1", "Acrobot-v1", "Hopper-v5"]


@pytest.fixture(scope="module", autouse=True)
def _ray():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config(env="EnvPool/CartPole-v1", **env_config):
    return (
        BLPOConfig()
        .environment(env, env_config=env_config)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
        .training(train_batch_size_per_learner=128, minibatch_size=32, num_epochs=1, nystrom_rank=2)
        .debugging(seed=0, log_level="ERROR")
    )


def play(env, num_steps, seed=0):
    """Observations [t + 1, n, ...], rewards, terminations and truncations [t, n] under random actions."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    rows = [(obs, None, None, None)]
    for _ in range(num_steps):
        space = env.single_action_space
        if isinstance(space, gym.spaces.Discrete):
            actions = rng.integers(space.n, size=env.num_envs)
        else:
            actions = rng.uniform(space.low, space.high, (env.num_envs, *space.shape)).astype(np.float32)
        rows.append(env.step(actions)[:4])
    env.close()
    obs, rewards, terminated, truncated = zip(*rows, strict=True)
    return np.stack(obs), np.stack(rewards[1:]), np.stack(terminated[1:]), np.stack(truncated[1:])


@pytest.mark.parametrize("task", TASKS)
def test_spaces_are_gymnasiums(task):
    ours, theirs = EnvPoolVectorEnv(task, 3), gym.make_vec(task, 3, "sync")
    for name in ("single_observation_space", "single_action_space", "observation_space", "action_space"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    obs, rewards, terminated, truncated = play(ours, 5)
    expected = play(theirs, 5)
    for x, y in zip((obs, rewards, terminated, truncated), expected, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)


def episodes(rewards, over):
    """Returns and lengths of all whole episodes; the step after each end is a reset."""
    found = []
    for env_rewards, env_over in zip(rewards.T, over.T, strict=True):
        start = 0
        for end in np.flatnonzero(env_over):
            found.append((env_rewards[start : end + 1].sum(), end + 1 - start))
            start = end + 2
    return np.array(found).T


@pytest.mark.parametrize(("task", "num_steps"), [("CartPole-v1", 500), ("Hopper-v5", 200)])
def test_returns_and_lengths_under_random_actions_are_distributed_as_gymnasiums(task, num_steps):
    samples = []
    for env in (EnvPoolVectorEnv(task, 16), gym.make_vec(task, 16, "sync")):
        _, rewards, terminated, truncated = play(env, num_steps)
        samples.append(episodes(rewards, terminated | truncated))
        assert terminated.any()
        assert not truncated.any()
    for ours, theirs in zip(*samples, strict=True):
        assert min(len(ours), len(theirs)) > 80
        error = np.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
        assert abs(ours.mean() - theirs.mean()) < 4 * error
        np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.4)


@pytest.mark.parametrize(
    ("task", "limit", "options"),
    [
        ("Acrobot-v1", 500, {}),
        ("Pendulum-v1", 200, {}),
        ("Hopper-v5", 30, {"terminate_when_unhealthy": False, "max_episode_steps": 30}),
    ],
)
def test_time_limits_truncate_at_the_same_step(task, limit, options):
    for env in (EnvPoolVectorEnv(task, 2, **options), gym.make_vec(task, 2, "sync", **options)):
        _, rewards, terminated, truncated = play(env, limit + 1)
        assert truncated[limit - 1].all()
        assert truncated.sum() == 2
        assert not terminated.any()
        # The step after is a reset.
        assert (rewards[limit] == 0).all()
        assert not truncated[limit].any()


def test_the_step_after_the_last_is_a_reset_that_ignores_the_action():
    env = EnvPoolVectorEnv("CartPole-v1", 5)
    obs, rewards, terminated, truncated = play(env, 200)
    over = (terminated | truncated)[:-1]
    reset = over & (rewards[1:] == 0)
    np.testing.assert_array_equal(over, reset)
    starts = obs[2:][over]
    assert len(starts) > 10
    # CartPole begins within ±0.05 everywhere and ends far from there.
    assert (np.abs(starts) <= 0.05).all()
    assert (np.abs(obs[1:-1][over]).max(1) > 0.05).all()


def test_environments_stay_in_their_columns():
    # CartPole's dynamics are deterministic: the same seed and actions give the same rows for any number of threads.
    one, two = (play(EnvPoolVectorEnv("CartPole-v1", 7, num_threads=k), 60, seed=3) for k in (1, 2))
    for x, y in zip(one, two, strict=True):
        np.testing.assert_array_equal(x, y)


def test_seeds():
    first = [EnvPoolVectorEnv("CartPole-v1", 4).reset(seed=seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(first[0], first[1])
    # As in gymnasium, the i-th environment's seed is the first one's plus i.
    np.testing.assert_array_equal(first[0][1:], first[2][:-1])
    assert len(np.unique(first[0], axis=0)) == 4
    env, other = EnvPoolVectorEnv("CartPole-v1", 4), EnvPoolVectorEnv("CartPole-v1", 4)
    env.reset(seed=0)
    np.testing.assert_array_equal(env.reset(seed=0)[0], first[0])
    # Later resets go on, and unseeded environments differ from each other.
    assert (env.reset()[0] != first[0]).all()
    assert (env.reset()[0] != other.reset()[0]).any()
    env.close()
    other.close()


def test_step_before_reset():
    with pytest.raises(gym.error.ResetNeeded):
        EnvPoolVectorEnv("CartPole-v1", 2).step(np.zeros(2, np.int64))


def test_trains_evaluates_and_normalises():
    c = (
        config("EnvPool/Hopper-v5", max_episode_steps=20)
        .env_runners(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
        .evaluation(evaluation_interval=1, evaluation_num_env_runners=0, evaluation_duration=4)
    )
    algo = c.build_algo()
    assert algo.env_runner.obstacle() is None
    assert isinstance(algo.env_runner.env.unwrapped, EnvPoolVectorEnv)
    assert algo.env_runner.config.env == "EnvPool/Hopper-v5"
    for _ in range(2):
        results = algo.train()
    assert results["evaluation"]["env_runners"]["num_episodes"] == 4
    for episode in algo.env_runner.sample():
        assert {"x_position", "x_velocity"} == episode.get_infos(-1).keys()
        assert episode.is_truncated == (episode.t == 20)
        assert episode.t <= 20
    algo.stop()


def test_evaluation_may_run_elsewhere():
    c = config().evaluation(
        evaluation_interval=1, evaluation_num_env_runners=0, evaluation_config={"env": "CartPole-v1"}
    )
    algo = c.build_algo()
    assert isinstance(algo.eval_env_runner.env.unwrapped, gym.vector.SyncVectorEnv)
    algo.train()
    algo.stop()


def test_threads_follow_the_runners_cores():
    def threads(c, worker_index):
        runner = BatchedEnvRunner(config=c, worker_index=worker_index)
        return runner.env.unwrapped._options["num_threads"]

    assert threads(config().env_runners(num_env_runners=2), 1) == 1
    assert threads(config().env_runners(num_env_runners=2, num_cpus_per_env_runner=3), 1) == 3
    assert threads(config(num_threads=2).env_runners(num_env_runners=2), 1) == 2


def test_other_algorithms_and_rllibs_own_runner_can_use_it():
    c = (
        PPOConfig()
        .environment(EnvPoolCreator("CartPole-v1"))
        .env_runners(num_env_runners=0, num_envs_per_env_runner=3, gym_env_vectorize_mode="vector_entry_point")
    )
    runner = SingleAgentEnvRunner(config=c, worker_index=0)
    assert isinstance(runner.env.unwrapped, EnvPoolVectorEnv)
    assert sum(len(episode) for episode in runner.sample(num_timesteps=60)) >= 60


@pytest.mark.parametrize(
    ("c", "message"),
    [
        (config("EnvPool/CartPole-v7"), "EnvPool .* has no task 'CartPole-v7'; it has CartPole-v0, CartPole-v1."),
        (config("EnvPool/CartPoel-v1"), "has no task 'CartPoel-v1'; did you mean CartPole-v1.*go without 'EnvPool/'"),
        (config("envpool/CartPole-v1"), "env='envpool/CartPole-v1': did you mean 'EnvPool/CartPole-v1'"),
        (config("EnvPool/Nowhere-v0"), "list_all_envs.*Tasks of gymnasium's go without 'EnvPool/'"),
        (config(gravity=3), r"env_config\['gravity'\]=3 is not an option.*max_episode_steps"),
        (config(seed=3), r"env_config\['seed'\]=3 is not an option"),
        (config().env_runners(env_runner_cls=SingleAgentEnvRunner), "SingleAgentEnvRunner: leave env_runner_cls"),
    ],
)
def test_errors_name_the_remedy(c, message):
    with pytest.raises(ValueError, match=message):
        c.validate()


def test_without_envpool(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r'pip install "blpo_rllib\[envpool\]"'):
        config().validate()
    config("CartPole-v1").validate()
