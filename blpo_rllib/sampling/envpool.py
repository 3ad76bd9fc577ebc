"""EnvPool's simulators as a gymnasium vector environment.

EnvPool (Weng et al. 2022, arXiv:2206.10558) steps all environments of a vector in C++ threads. Environments named
``"EnvPool/<task>"`` in a :class:`~blpo_rllib.blpo.BLPOConfig` come from here; needs ``pip install
"blpo_rllib[envpool]"``.
"""

from __future__ import annotations

import os
import warnings
from difflib import get_close_matches
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from blpo_rllib.extras import require

PREFIX = "EnvPool/"

# What EnvPool tells about its own bookkeeping, beside the task's infos.
_BOOKKEEPING = ("env_id", "players", "elapsed_step")
# Options that follow from RLlib's settings.
_SETTLED_OPTIONS = ("num_envs", "batch_size", "max_num_players", "seed", "env_seed", "gym_reset_return_info")


def envpool_task(env: Any) -> str | None:
    """The task in an environment name ``"EnvPool/<task>"``, e.g. "Hopper-v5"; None for any other environment."""
    return env.removeprefix(PREFIX) if isinstance(env, str) and env.startswith(PREFIX) else None


def check_task(task: str, options: dict[str, Any]) -> Any:
    """EnvPool's specification of a task.

    Args:
        task: One of EnvPool's task IDs.
        options: EnvPool's options for it, e.g. ``{"max_episode_steps": 500, "num_threads": 4}``.

    Raises:
        ImportError: If EnvPool is not installed.
        ValueError: If EnvPool has no such task, the task has no such option, or its spaces are not plain arrays.
    """
    envpool = _import_envpool()
    if task not in envpool.list_all_envs():
        tasks = envpool.list_all_envs()
        similar = sorted(t for t in tasks if t.split("-")[0].lower() == task.split("-")[0].lower())
        close = get_close_matches(task, tasks, n=3, cutoff=0.8)
        if similar:
            hint = f"it has {', '.join(similar)}."
        elif close:
            hint = f"did you mean {', '.join(close)}?"
        else:
            hint = "envpool.list_all_envs() names those it has."
        raise ValueError(
            f"env={PREFIX + task!r}: EnvPool {envpool.__version__} has no task {task!r}; {hint} "
            f"Tasks of gymnasium's go without {PREFIX!r}"
        )
    known = envpool.make_spec(task).config._asdict()
    for name in options:
        if name in _SETTLED_OPTIONS or name not in known:
            allowed = ", ".join(sorted(known.keys() - set(_SETTLED_OPTIONS)))
            raise ValueError(
                f"env_config[{name!r}]={options[name]!r} is not an option of env={PREFIX + task!r}: it takes {allowed}"
            )
    spec = envpool.make_spec(task, **options)
    for space in (spec.gymnasium_observation_space, spec.gymnasium_action_space):
        if not isinstance(space, (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
            raise ValueError(
                f"env={PREFIX + task!r} has the space {space}, but only Box, Discrete and MultiDiscrete are supported"
            )
    return spec


class EnvPoolVectorEnv(VectorEnv):
    """A pool of environments that behaves as gymnasium's vector environments do.

    Autoreset is of gymnasium's NEXT_STEP kind: the step after an episode's last one ignores the action and returns the
    next episode's first observation with reward 0. Observations have the task's own type; continuous actions are
    float32, as in gymnasium's tasks, whatever the simulator takes; rewards are float64.

    Args:
        task: One of EnvPool's task IDs, e.g. "Hopper-v5".
        num_envs: n >= 1.
        num_threads: Threads that step the environments, >= 1. None: one for each core this process may use.
        **options: Further options of the task; see :func:`check_task` for errors.
    """

    def __init__(self, task: str, num_envs: int, num_threads: int | None = None, **options: Any):
        spec = check_task(task, options)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}
        self.render_mode = None
        self.num_envs = num_envs
        self._task = task
        num_threads = num_threads or len(os.sched_getaffinity(0))
        self._options = {**options, "num_envs": num_envs, "num_threads": min(num_threads, num_envs)}
        self._pool: Any = None
        self._action_dtype = spec.gymnasium_action_space.dtype
        self.single_observation_space = spec.gymnasium_observation_space
        self.single_action_space = _float32(spec.gymnasium_action_space)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Starts new episodes everywhere.

        EnvPool seeds its environments when it makes them, so a seed makes them anew: ``seed + i`` for the i-th.

        Returns:
            Observations [n, ...] and infos.
        """
        if options:
            raise ValueError(f"options={options!r}: EnvPool's environments take no options on reset, leave them out")
        if seed is not None or self._pool is None:
            self._make_pool(np.random.SeedSequence().generate_state(1)[0] >> 2 if seed is None else seed)
        observations, infos = self._pool.reset()
        return observations, _task_infos(infos)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Steps all environments.

        Args:
            actions: [n, ...].

        Returns:
            Observations [n, ...], rewards float64 [n], terminated and truncated bool [n], infos.
        """
        if self._pool is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        observations, rewards, terminated, truncated, infos = self._pool.step(actions.astype(self._action_dtype))
        return observations, rewards.astype(np.float64), terminated, truncated, _task_infos(infos)

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _make_pool(self, seed: int) -> None:
        self.close_extras()
        self._pool = _import_envpool().make(self._task, env_type="gymnasium", seed=int(seed), **self._options)


class EnvPoolCreator:
    """Makes :class:`EnvPoolVectorEnv` where RLlib takes an environment class or function.

    With RLlib's own EnvRunner, or another algorithm's config:
    ``.environment(EnvPoolCreator("Hopper-v5")).env_runners(gym_env_vectorize_mode="vector_entry_point")``.

    Args:
        task: One of EnvPool's task IDs.
        num_threads: Threads, unless ``env_config`` has its own ``num_threads``. None: one for each core.
    """

    def __init__(self, task: str, num_threads: int | None = None):
        self._task, self._num_threads = task, num_threads

    def __call__(self, env_config: dict[str, Any]) -> EnvPoolVectorEnv:
        """The vector environment for RLlib's ``env_config`` and, therein, ``num_envs``."""
        return EnvPoolVectorEnv(self._task, **{"num_threads": self._num_threads, **env_config})


def _import_envpool() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require("envpool", "envpool", f"an environment named {PREFIX + '<task>'!r}")


def _float32(space: gym.Space) -> gym.Space:
    if isinstance(space, gym.spaces.Box) and space.dtype == np.float64:
        return gym.spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), space.shape, np.float32)
    return space


def _task_infos(infos: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in infos.items() if name not in _BOOKKEEPING}
