"""Environments in several processes against gymnasium's own vector, through scripted ends, errors and deaths."""

import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import ray
from gymnasium.vector import SyncVectorEnv
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.tune.registry import register_env

from blpo_rllib import BLPOConfig
from blpo_rllib.sampling.env_runner import BatchedEnvRunner
from blpo_rllib.sampling.process_env import ProcessVectorEnv


class Scripted(gym.Env):
    """Ends after ``length`` steps; infos of several kinds, some only now and then."""

    observation_space = gym.spaces.Dict({"x": gym.spaces.Box(-1, 1, (3,)), "n": gym.spaces.Discrete(100)})
    action_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, length=5, fails_at=None, error=ZeroDivisionError):
        self.length, self.fails_at, self.error, self.t = length, fails_at, error, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._observation(), {"start": self.length}

    def step(self, action):
        self.t += 1
        if self.t == self.fails_at:
            raise self.error("as planned")
        info = {"t": self.t, "where": np.arange(2) * self.t, "deep": {"sum": float(action.sum())}}
        if self.t % 2:
            info["name"] = f"odd {self.t}"
        return self._observation(), float(action[0]), self.t == self.length, self.t == 4, info

    def _observation(self):
        return {"x": self.np_random.uniform(-1, 1, 3).astype(np.float32), "n": self.t}


def both(make, num_envs=5, num_processes=3):
    return SyncVectorEnv([make] * num_envs), ProcessVectorEnv([make] * num_envs, num_processes)


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", [7, [3, 1, 4, 1, 5]])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 5, 9])
def test_the_same_as_gymnasiums_vector(num_processes, seed):
    theirs, ours = both(Scripted, num_processes=num_processes)
    rng = np.random.default_rng(0)
    for a, b in zip(theirs.reset(seed=seed), ours.reset(seed=seed), strict=True):
        assert_same(a, b)
    for _ in range(12):
        actions = rng.uniform(-1, 1, (5, 2)).astype(np.float32)
        for a, b in zip(theirs.step(actions), ours.step(actions), strict=True):
            assert_same(a, b)
    ours.close()


def test_spaces_and_attributes():
    theirs, ours = both(Scripted)
    for name in ("single_observation_space", "single_action_space", "observation_space", "action_space", "metadata"):
        assert getattr(ours, name) == getattr(theirs, name), name
    ours.set_attr("length", [1, 2, 3, 4, 5])
    assert ours.get_attr("length") == (1, 2, 3, 4, 5)
    ours.set_attr("length", 8)
    assert ours.get_attr("length") == (8,) * 5
    with pytest.raises(ValueError, match="2 values for 5"):
        ours.set_attr("length", [1, 2])
    with pytest.raises(ValueError, match="reset_mask"):
        ours.reset(options={"reset_mask": np.ones(5, bool)})
    ours.close()


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = __import__("threading").Lock()


@pytest.mark.parametrize(("error", "raised"), [(ZeroDivisionError, ZeroDivisionError), (Unpicklable, RuntimeError)])
def test_an_error_in_another_process_is_raised_here_and_leaves_the_others_in_step(error, raised):
    makes = [Scripted] * 4 + [lambda: Scripted(fails_at=2, error=error)]
    env = ProcessVectorEnv(makes, 2)
    env.reset(seed=0)
    actions = np.zeros((5, 2), np.float32)
    env.step(actions)
    with pytest.raises(raised, match="as planned"):
        env.step(actions)
    assert env.get_attr("t") == (2, 2, 2, 2, 2)
    env.close()


def workers_of(env):
    return [other._process.pid for other in env._others]


def is_alive(pid):
    """Neither gone nor waiting for its parent to take note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_end_with_the_vector_and_with_a_kill():
    env = ProcessVectorEnv([Scripted] * 4, 3)
    workers = workers_of(env)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGINT)
    env.reset(seed=0)
    os.kill(workers[0], signal.SIGKILL)
    with pytest.raises(EOFError, match="exit code -9"):
        env.step(np.zeros((4, 2), np.float32))
    env.close()
    assert not any(map(is_alive, workers))


def test_processes_outlive_nobody():
    """Those of a process that is killed end by themselves."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        env = ProcessVectorEnv([Scripted] * 3, 3)
        os.write(write, ",".join(map(str, workers_of(env))).encode())
        time.sleep(60)
    workers = [int(pid) for pid in os.read(read, 100).decode().split(",")]
    assert len(workers) == 2
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))


@pytest.fixture(scope="module")
def _ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Configured(gym.Wrapper):
    def __init__(self, context):
        assert context.worker_index == 0
        super().__init__(gym.make("CartPole-v1", **context))


def sampled(mode, env_runner_cls, env="CartPole-v1", **options):
    config = (
        BLPOConfig()
        .environment(env, env_config=options)
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=4,
            gym_env_vectorize_mode=mode,
            env_runner_cls=env_runner_cls,
        )
        .training(train_batch_size_per_learner=128, minibatch_size=32)
        .debugging(seed=0, log_level="ERROR")
    )
    algo = config.build_algo()
    kind = type(algo.env_runner.env.unwrapped)
    result = algo.train()
    episodes = algo.env_runner.sample()
    algo.stop()
    return kind, [np.asarray(episode.get_observations()) for episode in episodes], result["env_runners"]


@pytest.mark.usefixtures("_ray")
@pytest.mark.parametrize("env", ["CartPole-v1", "registered", Configured])
def test_rllibs_async_mode_samples_the_same_episodes(env, monkeypatch):
    register_env("registered", Configured)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    kind, ours, metrics = sampled("async", BatchedEnvRunner, env, sutton_barto_reward=True)
    assert kind is ProcessVectorEnv
    stock, theirs, reference = sampled("sync", SingleAgentEnvRunner, env, sutton_barto_reward=True)
    assert stock is SyncVectorEnv
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    assert metrics["episode_return_mean"] == reference["episode_return_mean"]
