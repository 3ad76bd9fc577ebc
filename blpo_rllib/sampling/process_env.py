"""A vector of gymnasium environments that is shared out among as many processes as there are cores.

gymnasium's AsyncVectorEnv has a process for each environment and a message for each step of it, which costs more than a
step of most environments. Here a process steps its share of the vector one environment after the other, and gets one
message for all of them. :class:`~blpo_rllib.sampling.env_runner.BatchedEnvRunner` takes it in RLlib's mode
``gym_env_vectorize_mode="async"``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import numpy as np
import tree
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from ray.rllib.utils.typing import EnvCreator

# Under this name gymnasium's registry has RLlib's environment function, with its context bound to it.
_RLLIBS_NAME = "rllib-single-agent-env-v0"
# How long a process polls for its next message before it sleeps: about a step of the other side.
_AWAKE_SECONDS = 2e-3
# How long a process may take to close its environments.
_CLOSING_SECONDS = 5.0


class ProcessVectorEnv(VectorEnv):
    """n environments in this process and others; the same numbers as :class:`gymnasium.vector.SyncVectorEnv`.

    Autoreset is of the NEXT_STEP kind. Environments other than the first ones are out of this process's reach; use
    ``call``, ``get_attr`` and ``set_attr``.

    Args:
        env_fns: Make the environments.
        num_processes: Among how many processes they are shared out, this one included, >= 1. None: one for each core
            this process may use.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], num_processes: int | None = None):
        self.num_envs = len(env_fns)
        num_processes = min(num_processes or len(os.sched_getaffinity(0)), self.num_envs)
        bounds = np.linspace(0, self.num_envs, num_processes + 1).astype(int).tolist()
        self._shares = [slice(*pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]
        # First the others: a process that has started threads, as some simulators do, must not be forked.
        self._others = [_Process(env_fns[share]) for share in self._shares[1:]]
        self._own = SyncVectorEnv(env_fns[self._shares[0]])
        for other in self._others:
            other.result()
        self.metadata = self._own.metadata
        self.render_mode = self._own.render_mode
        self.single_observation_space = self._own.single_observation_space
        self.single_action_space = self._own.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts new episodes everywhere.

        Args:
            seed: ``seed + i`` for the i-th environment, or a list of n seeds, or None.
            options: For each environment.

        Returns:
            Observations [n, ...] and infos.

        Raises:
            ValueError: If ``options`` asks for some of the environments only.
        """
        if options and "reset_mask" in options:
            raise ValueError(
                "options['reset_mask'] is not supported: ProcessVectorEnv resets all environments, leave it out"
            )
        seeds = [None] * self.num_envs if seed is None else seed
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else list(seeds)
        results = self._everywhere("reset", [{"seed": seeds[share], "options": options} for share in self._shares])
        observations, infos = zip(*results, strict=True)
        return self._joined(observations), self._merged(infos)

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps all environments; those whose episode is over are reset instead.

        Args:
            actions: [n, ...].

        Returns:
            Observations [n, ...], rewards float64 [n], terminated and truncated bool [n], infos.

        Raises:
            Exception: What an environment raises, in whatever process.
            EOFError: If another process has died.
        """
        results = self._everywhere("step", [{"actions": _part(actions, share)} for share in self._shares])
        observations, rewards, terminated, truncated, infos = zip(*results, strict=True)
        return (
            self._joined(observations),
            np.concatenate(rewards),
            np.concatenate(terminated),
            np.concatenate(truncated),
            self._merged(infos),
        )

    def render(self) -> tuple[Any, ...]:
        """The environments' pictures."""
        return self._in_order("render", [{}] * len(self._shares))

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What a method of each environment returns, or what an attribute of it is."""
        return self._in_order("call", [{"name": name, **kwargs}] * len(self._shares), *args)

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of each environment."""
        return self.call(name)

    def set_attr(self, name: str, values: Any) -> None:
        """Sets an attribute of each environment: to the i-th of a list or tuple of n values, or all to one value."""
        if not isinstance(values, (list, tuple)):
            values = [values] * self.num_envs
        if len(values) != self.num_envs:
            raise ValueError(
                f"set_attr({name!r}) got {len(values)} values for {self.num_envs} environments: give one for each, or "
                "a single value for all"
            )
        self._everywhere("set_attr", [{"name": name, "values": values[share]} for share in self._shares])

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the environments and ends the processes."""
        # All pipes first: a process holds copies of those made before it, whose far ends would not see them closed.
        for other in self._others:
            other.hang_up()
        for other in self._others:
            other.join()
        self._own.close()

    def _everywhere(self, method: str, arguments: list[dict[str, Any]], *args: Any) -> list[Any]:
        """The results of a method of all processes' vectors; an error only after all have answered."""
        for other, own in zip(self._others, arguments[1:], strict=True):
            other.send(method, args, own)
        try:
            mine = getattr(self._own, method)(*args, **arguments[0])
        finally:
            answers = [other.answer() for other in self._others]
        return [mine, *(_value(answer) for answer in answers)]

    def _in_order(self, method: str, arguments: list[dict[str, Any]], *args: Any) -> tuple[Any, ...]:
        return tuple(result for results in self._everywhere(method, arguments, *args) for result in results)

    def _joined(self, observations: Sequence[Any]) -> Any:
        each = [
            item
            for share, batch in zip(self._shares, observations, strict=True)
            for item in iterate(batch_space(self.single_observation_space, share.stop - share.start), batch)
        ]
        empty = create_empty_array(self.single_observation_space, self.num_envs)
        return concatenate(self.single_observation_space, each, empty)

    def _merged(self, infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Infos of n environments in gymnasium's form, of infos of shares: a mask ``_key`` says who has a ``key``."""
        merged: dict[str, Any] = {}
        for key in dict.fromkeys(key for info in infos for key in info):
            values = [info.get(key) for info in infos]
            known = next(value for value in values if value is not None)
            if isinstance(known, dict):
                merged[key] = self._merged([value or {} for value in values])
            else:
                merged[key] = np.concatenate([self._or_blank(i, value, known) for i, value in enumerate(values)])
        return merged

    def _or_blank(self, share: int, value: np.ndarray | None, like: np.ndarray) -> np.ndarray:
        size = self._shares[share].stop - self._shares[share].start
        blank = None if like.dtype == object else 0
        return np.full((size, *like.shape[1:]), blank, like.dtype) if value is None else value


class ProcessEnvCreator:
    """Makes :class:`ProcessVectorEnv` where RLlib takes an environment function.

    RLlib registers that function in gymnasium's registry for both, a vector of environments and a single one, and calls
    it with ``num_envs`` beside its ``env_config``, or without (ray/rllib/env/single_agent_env_runner.py, make_env).

    Args:
        env: A name in gymnasium's registry, or RLlib's function that makes one environment.
        num_processes: As in :class:`ProcessVectorEnv`.
    """

    def __init__(self, env: str | EnvCreator, num_processes: int | None = None):
        self._env, self._num_processes = env, num_processes

    def __call__(self, env_config: dict[str, Any]) -> VectorEnv | gym.Env:
        """The vector environment; without ``num_envs`` one environment."""
        if "num_envs" not in env_config:
            return gym.make(self._env, **env_config) if isinstance(self._env, str) else self._env(env_config)
        options = {name: value for name, value in env_config.items() if name != "num_envs"}
        name, options = (self._env, options) if isinstance(self._env, str) else (_RLLIBS_NAME, {})
        return ProcessVectorEnv([lambda: gym.make(name, **options)] * env_config["num_envs"], self._num_processes)


class _Process:
    """Another process with some of the environments, and the pipe to it."""

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]):
        # Forked, as by gymnasium's AsyncVectorEnv: environment functions need not be picklable, and a script not
        # guarded against being imported again.
        context = multiprocessing.get_context("fork")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(env_fns, far_end, self._pipe), daemon=True)
        self._process.start()
        far_end.close()

    def send(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pipe.send((method, args, kwargs))

    def answer(self) -> tuple[bool, Any]:
        """Whether the call went well, and its result, or else its exception."""
        try:
            return _receive(self._pipe)
        except (EOFError, ConnectionError):
            self._process.join(_CLOSING_SECONDS)
            message = f"a process with environments has died (exit code {self._process.exitcode})"
            return False, EOFError(message)

    def result(self) -> Any:
        return _value(self.answer())

    def hang_up(self) -> None:
        self._pipe.close()

    def join(self) -> None:
        self._process.join(_CLOSING_SECONDS)
        if self._process.is_alive():
            self._process.kill()


def _receive(pipe: Connection) -> Any:
    """The next message; a process that expects it soon stays awake, since waking up may take longer than a step."""
    deadline = time.perf_counter() + _AWAKE_SECONDS
    while not pipe.poll() and time.perf_counter() < deadline:
        pass
    return pipe.recv()


def _value(answer: tuple[bool, Any]) -> Any:
    went_well, value = answer
    if not went_well:
        raise value
    return value


def _serve(env_fns: Sequence[Callable[[], gym.Env]], pipe: Connection, far_end: Connection) -> None:
    """Answers calls until the pipe is closed, by ``close`` or by the other side's death."""
    far_end.close()
    # Ctrl-C reaches all processes of a terminal; what to do about it is the main process's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    envs: SyncVectorEnv | None = None

    def make() -> None:
        nonlocal envs
        envs = SyncVectorEnv(env_fns)

    _answer(pipe, make)
    while True:
        try:
            method, args, kwargs = _receive(pipe)
        except (EOFError, ConnectionError):
            break
        _answer(pipe, getattr(envs, method), *args, **kwargs)
    if envs is not None:
        envs.close()


def _answer(pipe: Connection, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        answer = True, function(*args, **kwargs)
    except Exception as error:
        error.add_note(f"in another process:\n{traceback.format_exc()}")
        answer = False, error
    try:
        pipe.send(answer)
    except (TypeError, AttributeError, ValueError) as error:
        # An exception or a result that cannot be pickled still has to be told of.
        pipe.send((False, RuntimeError(f"{answer[1]!r} of an environment cannot be sent between processes: {error}")))


def _part(actions: Any, share: slice) -> Any:
    if isinstance(actions, (np.ndarray, list)):
        return actions[share]
    return tree.map_structure(lambda column: column[share], actions)
