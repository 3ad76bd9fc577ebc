"""Sampling with arrays over all environments instead of Python objects for each."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.connectors.common import (
    AddObservationsFromEpisodesToBatch,
    AddStatesFromEpisodesToBatch,
    AddTimeDimToBatchAndZeroPad,
    BatchIndividualItems,
    NumpyToTensor,
    TensorToNumpy,
)
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.connectors.module_to_env import (
    GetActions,
    ListifyDataForVectorEnv,
    NormalizeAndClipActions,
    RemoveSingleTsTimeRankFromBatch,
    UnBatchToIndividualItems,
)
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.env_runner import ENV_STEP_FAILURE, ENV_STEP_TIMER, EnvRunner
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import (
    CONNECTOR_PIPELINE_TIMER,
    ENV_TO_MODULE_CONNECTOR,
    ENV_TO_MODULE_SUM_EPISODES_LENGTH_IN,
    ENV_TO_MODULE_SUM_EPISODES_LENGTH_OUT,
    MODULE_TO_ENV_CONNECTOR,
    RLMODULE_INFERENCE_TIMER,
    WEIGHTS_SEQ_NO,
)
from ray.rllib.utils.numpy import convert_to_numpy
from ray.rllib.utils.spaces.space_utils import batch, unbatch
from ray.rllib.utils.torch_utils import convert_to_torch_tensor
from ray.rllib.utils.typing import EnvCreator

from blpo_rllib.core import native
from blpo_rllib.core.native import Kernels
from blpo_rllib.rllib_private import is_multi_agent, note_steps, registered_env, steps_as_rllib
from blpo_rllib.sampling.acting import Actor, Normalizer, bound_actions, make_actor
from blpo_rllib.sampling.envpool import EnvPoolCreator, envpool_task
from blpo_rllib.sampling.process_env import ProcessEnvCreator
from blpo_rllib.sampling.sync_steps import SyncSteps

logger = logging.getLogger(__name__)

# RLlib's default pipelines: what can be done for all environments at once without calling them.
_ENV_TO_MODULE = [
    AddObservationsFromEpisodesToBatch,
    AddTimeDimToBatchAndZeroPad,
    AddStatesFromEpisodesToBatch,
    BatchIndividualItems,
    NumpyToTensor,
]
_MODULE_TO_ENV = [
    GetActions,
    TensorToNumpy,
    UnBatchToIndividualItems,
    RemoveSingleTsTimeRankFromBatch,
    NormalizeAndClipActions,
    ListifyDataForVectorEnv,
]
# Of a vector step's parts, in their order.
_TIMERS = (
    RLMODULE_INFERENCE_TIMER,
    (MODULE_TO_ENV_CONNECTOR, CONNECTOR_PIPELINE_TIMER),
    ENV_STEP_TIMER,
    (ENV_TO_MODULE_CONNECTOR, CONNECTOR_PIPELINE_TIMER),
)
_ACTION_SPACES = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)


class BatchedEnvRunner(SingleAgentEnvRunner):
    """RLlib's single-agent EnvRunner with the same results in less time; BLPO's default.

    Observations, actions, rewards and module outputs stay arrays [n, ...] over the n environments from one step to the
    next; episodes are cut out of them where they end. Episodes, metrics, callbacks, connector and module states are
    those of RLlib's EnvRunner, random numbers included. Only the per-connector timers are missing, and timers count
    the mean of a ``sample()`` call once.

    What cannot be done so is left to RLlib's own loop, see :meth:`obstacle`. RLlib's EnvRunner itself comes back with
    ``config.env_runners(env_runner_cls=SingleAgentEnvRunner)``.

    An environment named ``"EnvPool/<task>"`` is made by EnvPool, with ``env_config`` as its options, and stepped by as
    many threads as this process has cores, or as ``num_cpus_per_env_runner`` allows a remote EnvRunner;
    ``env_config={"num_threads": ...}`` overrides. With ``gym_env_vectorize_mode="async"`` the environments are shared
    out among as many processes (:class:`~blpo_rllib.sampling.process_env.ProcessVectorEnv`).
    """

    env: Any
    _needs_initial_reset: bool
    _seed: int | None

    @override(SingleAgentEnvRunner)
    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any):
        self._probed: Any = None
        # Recorded operations outlive a `sample()` call.
        self._actor: Any = None
        self._nested_outputs: list[str] = []
        self._logged_obstacles: set[str] = set()
        super().__init__(config=config, **kwargs)

    @override(EnvRunner)
    def make_env(self) -> None:
        creator = self._vector_creator()
        if creator is None:
            super().make_env()
            vector = self.env and self.env.unwrapped
            if SyncSteps.apply(vector):
                vector.step = SyncSteps(vector)
            return
        # RLlib makes vector environments of an environment's own only in this mode, and from callables.
        named = self.config.env, self.config.gym_env_vectorize_mode
        self.config.env, self.config.gym_env_vectorize_mode = creator, gym.VectorizeMode.VECTOR_ENTRY_POINT
        try:
            super().make_env()
        finally:
            self.config.env, self.config.gym_env_vectorize_mode = named

    def _vector_creator(self) -> EnvCreator | None:
        """What makes the vector of environments, with as many threads or processes as cores; None: RLlib does."""
        env = self.config.env
        task = envpool_task(env)
        cores = max(1, int(self.config.num_cpus_per_env_runner)) if self.worker_index else None
        if task is not None:
            return EnvPoolCreator(task, cores)
        if env is None or gym.VectorizeMode(self.config.gym_env_vectorize_mode) is not gym.VectorizeMode.ASYNC:
            return None
        return ProcessEnvCreator(registered_env(env) or env, cores)

    def obstacle(self, random_actions: bool = False) -> str | None:
        """Why ``sample()`` goes environment by environment, through RLlib's own loop; None if it does not."""
        if random_actions:
            return "random_actions=True"
        if not self.episodes_to_numpy:
            return "episodes_to_numpy=False"
        return self._space_obstacle() or self._module_obstacle() or self._pipeline_obstacle()

    def _space_obstacle(self) -> str | None:
        observations, actions = self.env.single_observation_space, self.env.single_action_space
        if not isinstance(observations, gym.spaces.Box):
            return f"the observation space {observations} is not a Box"
        if not isinstance(actions, _ACTION_SPACES):
            return f"the action space {actions} is not Box, Discrete, MultiDiscrete or MultiBinary"
        return None

    def _module_obstacle(self) -> str | None:
        if not isinstance(self.module, TorchRLModule):
            return f"the module is {type(self.module).__name__}, not a TorchRLModule"
        if self._probed is not self.module:
            self._probed, self._nested_outputs = self.module, self._find_nested_outputs()
        if self._nested_outputs:
            return (
                f"{type(self.module).__name__} returns {', '.join(self._nested_outputs)}, which are not plain tensors"
            )
        return None

    def _find_nested_outputs(self) -> list[str]:
        """The module's outputs that are not one row per environment; states may be nested."""
        space = self._env_to_module.observation_space
        obs = np.zeros((self.num_envs, *space.shape), space.dtype)
        # Whoever asks for an obstacle must not change what is sampled next.
        devices = [self._device] if torch.device(self._device).type == "cuda" else []
        with torch.random.fork_rng(devices):
            columns = self._make_actor(True)(obs, 0, self._initial_states())
        leaves = {name: tree.flatten(x) if name == Columns.STATE_OUT else [x] for name, x in columns.items()}
        return [name for name, xs in leaves.items() if any(np.shape(x)[:1] != (self.num_envs,) for x in xs)]

    @property
    def _kernels(self) -> Kernels | None:
        return native.load() if getattr(self.config, "native_kernels", True) else None

    def _make_actor(self, explore: bool) -> Actor:
        actor = make_actor(self.module, self._device, explore, self._kernels, self.num_envs, self._actor)
        if explore:
            self._actor = actor
        return actor

    def _step_envs(self, actions: Any) -> Any:
        """What ``_try_env_step`` does, but for its metrics, which :meth:`_Rollout.log` logs once for all steps."""
        if not steps_as_rllib(self):
            return self._try_env_step(actions)
        try:
            return self.env.step(actions)
        except Exception as error:
            return self._after_failure(error)

    def _after_failure(self, error: Exception) -> Any:
        """RLlib's way to go on after environments raised an error."""
        env, self.env = self.env, _Failed(self.env, error)
        try:
            return self._try_env_step(None)
        finally:
            if isinstance(self.env, _Failed):
                self.env = env

    def _initial_states(self) -> Any:
        """The states of a recurrent module at the starts of episodes, [n, ...]; None if it is not recurrent."""
        if not self.module.is_stateful():
            return None
        state = convert_to_numpy(self.module.get_initial_state())
        return tree.map_structure(lambda x: np.stack([x] * self.num_envs), state)

    def _pipeline_obstacle(self) -> str | None:
        env_to_module, module_to_env = self._env_to_module.connectors, self._module_to_env.connectors
        first = [env_to_module[0]] if env_to_module and _is_filter(env_to_module[0]) else []
        for pipeline, connectors, expected in (
            ("env-to-module", env_to_module[len(first) :], _ENV_TO_MODULE),
            ("module-to-env", module_to_env, _MODULE_TO_ENV),
        ):
            if [type(connector) for connector in connectors] != expected:
                custom = [type(c).__name__ for c in connectors if type(c) not in expected]
                return (
                    f"the {pipeline} pipeline is not RLlib's default: {', '.join(custom) or 'connectors are missing'}"
                )
        if self._overrides("on_episode_step"):
            return "there is a callback on_episode_step"
        return None

    def _overrides(self, callback: str) -> bool:
        """Whether the user has a callback of this name, as a function or as a method."""
        return bool(getattr(self.config, f"callbacks_{callback}")) or any(
            getattr(type(callbacks), callback) is not getattr(RLlibCallback, callback) for callbacks in self._callbacks
        )

    @override(SingleAgentEnvRunner)
    def _sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[SingleAgentEpisode]:
        obstacle = self.obstacle(random_actions) or ("nothing to sample" if num_timesteps == 0 else None)
        if obstacle is not None:
            self._log_once(obstacle)
            return super()._sample(
                num_timesteps=num_timesteps,
                num_episodes=num_episodes,
                explore=explore,
                random_actions=random_actions,
                force_reset=force_reset,
            )
        if force_reset or num_episodes is not None or self._needs_initial_reset:
            self._reset_envs_and_episodes(explore)
        if num_episodes is not None:
            self._needs_initial_reset = True
        rollout = _Rollout(self, explore)
        while rollout.wants_more(num_timesteps, num_episodes):
            rollout.step(num_episodes)
        rollout.flush()
        self._done_episodes_for_metrics.extend(rollout.done)
        ongoing = rollout.cut() if num_timesteps is not None else []
        for episode in ongoing:
            self._ongoing_episodes_for_metrics[episode.id_].append(episode)
        rollout.log()
        self._log_env_steps(metric=self._metrics_num_env_steps_sampled, num_steps=rollout.num_steps)
        self._increase_sampled_metrics(rollout.num_steps, len(rollout.done))
        return rollout.done + ongoing

    def sample_one_each(self, seed: int, explore: bool = False) -> list[SingleAgentEpisode]:
        """One whole episode of each environment, from the same starts whenever the seed is the same.

        ``sample(num_episodes=...)`` returns the episodes that end first, among which short ones are too many.

        Args:
            seed: Of the environments; the i-th takes ``seed + i``.
            explore: Whether actions are drawn, or the most likely ones.

        Raises:
            ValueError: If something stands in the way of batched sampling, see :meth:`obstacle`.
        """
        obstacle = self.obstacle()
        if obstacle is not None:
            raise ValueError(
                f"evaluation_one_episode_per_env=True needs batched sampling, but {obstacle}: set evaluation_duration "
                "instead"
            )
        own_seed, self._seed, self._needs_initial_reset = self._seed, seed, True
        try:
            self._reset_envs_and_episodes(explore)
        finally:
            self._seed = own_seed
        wanted = {episode.id_ for episode in self._ongoing_episodes}
        rollout = _Rollout(self, explore)
        while wanted - {episode.id_ for episode in rollout.done}:
            rollout.step(None)
        self._needs_initial_reset = True
        return [episode for episode in rollout.done if episode.id_ in wanted]

    def _log_once(self, obstacle: str) -> None:
        if obstacle not in self._logged_obstacles:
            self._logged_obstacles.add(obstacle)
            logger.info("sampling goes environment by environment (slower), because %s", obstacle)


class _Failed:
    """Environments whose step raises what it has raised already."""

    def __init__(self, env: Any, error: Exception):
        self._env, self._error = env, error

    def step(self, actions: Any) -> Any:
        raise self._error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)


def _is_filter(connector: Any) -> bool:
    return type(connector) is MeanStdFilter and not is_multi_agent(connector)


class _Rows:
    """An array [t, ...] that grows by rows."""

    def __init__(self, row: np.ndarray, capacity: int):
        self._array = np.empty((capacity, *row.shape), row.dtype)
        self._length = 0

    def append(self, row: np.ndarray) -> None:
        if self._length == len(self._array):
            self._array = np.concatenate([self._array, np.empty_like(self._array)])
        self._array[self._length] = row
        self._length += 1

    def cut(self, start: int, stop: int, column: int) -> np.ndarray:
        """A copy, so that a long episode does not keep all the others' steps in memory."""
        return self._array[start:stop, column].copy()


class _NestedRows:
    """A nested structure of such arrays."""

    def __init__(self, row: Any, capacity: int):
        self._like = row
        self._leaves = [_Rows(x, capacity) for x in tree.flatten(row)]

    def append(self, row: Any) -> None:
        for leaf, x in zip(self._leaves, tree.flatten(row), strict=True):
            leaf.append(x)

    def cut(self, start: int, stop: int, column: int) -> Any:
        return tree.unflatten_as(self._like, [leaf.cut(start, stop, column) for leaf in self._leaves])


class _Rollout:
    """One ``sample()`` call: steps all environments, and cuts their steps into episodes.

    Attributes:
        done: Finished episodes, in the order of their ends.
        num_steps: Environment steps taken; resets do not count.
    """

    def __init__(self, runner: BatchedEnvRunner, explore: bool):
        self.done: list[SingleAgentEpisode] = []
        self._runner, self._explore = runner, explore
        self._actor = runner._make_actor(explore)
        self._initial_states = runner._initial_states()
        first = runner._env_to_module.connectors[0]
        self._filter: MeanStdFilter | None = first if _is_filter(first) else None
        share = runner.config.num_env_runners if runner.worker_index else 1
        self._normalizer = None
        if self._filter is not None:
            self._normalizer = Normalizer(self._filter, max(1, share), runner._kernels)
        self._bounds = runner._module_to_env.connectors[_MODULE_TO_ENV.index(NormalizeAndClipActions)]
        self._keep_lists = runner._overrides("on_episode_end")
        # Of the actor, the bounds, the environments and the filter.
        self._seconds = [0.0, 0.0, 0.0, 0.0]
        self._total_length = 0
        self._begin()

    def _begin(self) -> None:
        """Starts from what the runner's last ``sample()`` call, or its reset of the environments, has left."""
        runner = self._runner
        self._episodes = runner._ongoing_episodes
        self._obs: np.ndarray = runner._cached_to_module[Columns.OBS].cpu().numpy()
        self._states: Any = None
        if self._initial_states is not None:
            # RLlib's batches for recurrent modules have a time axis.
            self._obs = self._obs[:, 0]
            self._states = convert_to_numpy(runner._cached_to_module[Columns.STATE_IN])
        # With gymnasium's next-step autoreset an episode that is over waits for its environment's next step.
        self._over = np.array([not episode.is_reset for episode in self._episodes])
        self._num_over = int(np.count_nonzero(self._over))
        # Where in the rows each environment's present episode starts.
        self._start = [0] * runner.num_envs
        self._rows: dict[str, _Rows | _NestedRows] = {}
        self._infos: list[list[dict[str, Any]]] = []
        self._times: list[float] = []
        self.num_steps = 0

    def wants_more(self, num_timesteps: int | None, num_episodes: int | None) -> bool:
        """Whether one of the two targets, that which is not None, is yet to be reached."""
        if num_timesteps is not None:
            return self.num_steps < num_timesteps
        return num_episodes is not None and len(self.done) < num_episodes

    def step(self, max_episodes: int | None) -> None:
        """Steps each environment once.

        Args:
            max_episodes: Once so many episodes are done, the environments that are left are not looked at, as in RLlib;
                None for no limit.
        """
        runner = self._runner
        started = time.perf_counter()
        columns = self._actor(self._obs, self._timestep(), self._states)
        acted = time.perf_counter()
        actions = columns.pop(Columns.ACTIONS)
        for_env = columns.pop(Columns.ACTIONS_FOR_ENV, None)
        if for_env is None:
            for_env = bound_actions(self._bounds, actions, runner.env.single_action_space)
        bounded = time.perf_counter()
        results = runner._step_envs(for_env)
        if results is ENV_STEP_FAILURE:
            runner._reset_envs_and_episodes(self._explore)
            self._begin()
            return
        obs, rewards, terminated, truncated, infos = results
        stepped = time.perf_counter()
        self._obs = obs if self._normalizer is None else self._normalizer(obs)
        filtered = time.perf_counter()
        seconds = self._seconds
        seconds[0] += acted - started
        seconds[1] += bounded - acted
        seconds[2] += stepped - bounded
        seconds[3] += filtered - stepped
        if self._states is not None:
            self._states = columns[Columns.STATE_OUT]
        self._append(
            {Columns.OBS: self._obs, Columns.ACTIONS: actions, Columns.REWARDS: rewards, **columns}, infos, filtered
        )
        self._follow_episodes(terminated, truncated, max_episodes)

    def flush(self) -> None:
        """Brings the filter's state up to date, once no more steps follow."""
        if self._normalizer is not None:
            self._normalizer.flush()

    def _timestep(self) -> int:
        """RLlib's estimate of the environment steps that all EnvRunners together have taken."""
        num_runners = self._runner.config.num_env_runners or 1
        return (self._runner.num_env_steps_sampled_lifetime // num_runners + self.num_steps) * num_runners

    def _append(self, columns: dict[str, np.ndarray], infos: list[dict[str, Any]], now: float) -> None:
        """Keeps a step of all environments, which ended at the time ``now``."""
        if not self._rows:
            capacity = self._runner.config.get_rollout_fragment_length(self._runner.worker_index or 0) + 32
            self._rows = {
                name: _Rows(row, capacity) if isinstance(row, np.ndarray) else _NestedRows(row, capacity)
                for name, row in columns.items()
            }
        for name, rows in self._rows.items():
            rows.append(columns[name])
        self._infos.append(infos)
        self._times.append(now)

    def _follow_episodes(self, terminated: np.ndarray, truncated: np.ndarray, max_episodes: int | None) -> None:
        """Counts steps, begins episodes where environments were reset, and ends those that are over."""
        ends, was_over, num_over = terminated | truncated, self._over, self._num_over
        self.num_steps += len(was_over) - num_over
        # Numpy's other ways to find that there is nothing to do take several times as long.
        if not num_over and not np.count_nonzero(ends):
            self._total_length += len(was_over) * len(self._times) - sum(self._start)
            return
        self._over = ends & ~was_over
        self._num_over = int(np.count_nonzero(self._over))
        if num_over:
            for env_index in np.flatnonzero(was_over).tolist():
                self._add_reset(env_index)
            self._begin_states(was_over)
        self._total_length += len(was_over) * len(self._times) - sum(self._start)
        for env_index in np.flatnonzero(self._over | was_over).tolist():
            if was_over[env_index]:
                self._runner._make_on_episode_callback("on_episode_start", env_index, self._episodes)
                continue
            self._finish(env_index, bool(terminated[env_index]), bool(truncated[env_index]))
            if max_episodes is not None and len(self.done) >= max_episodes:
                return

    def _add_reset(self, env_index: int) -> None:
        """Begins an environment's episode with the observation of its reset."""
        self._episodes[env_index].add_env_reset(self._obs[env_index].copy(), self._infos[-1][env_index])
        self._observed(self._episodes[env_index])
        self._start[env_index] = len(self._times)

    def _begin_states(self, reset: np.ndarray) -> None:
        """Takes a recurrent module back to its initial state where an episode begins."""
        if self._states is not None:
            self._states = tree.map_structure(
                lambda x, first: np.where(reset.reshape(-1, *[1] * (x.ndim - 1)), first, x),
                self._states,
                self._initial_states,
            )

    def _finish(self, env_index: int, terminated: bool, truncated: bool) -> None:
        """Ends an environment's episode, and makes the next one, which begins with the environment's reset."""
        episode = self._episodes[env_index]
        self._fill(env_index)
        episode.is_terminated, episode.is_truncated = terminated, truncated
        if self._keep_lists:
            # What callbacks find in RLlib's own loop; `to_numpy()` makes it arrays afterwards.
            _to_lists(episode)
        self._runner._make_on_episode_callback("on_episode_end", env_index, self._episodes)
        self.done.append(episode.to_numpy())
        self._runner._new_episode(env_index, self._episodes)
        self._start[env_index] = len(self._times)

    def _fill(self, env_index: int) -> None:
        """Adds an environment's steps since the start of its present episode, or of this rollout, to the episode."""
        episode, start, stop = self._episodes[env_index], self._start[env_index], len(self._times)
        if start == stop:
            return
        for name, rows in self._rows.items():
            _extend(_buffer(episode, name), rows.cut(start, stop, env_index))
        sequence_numbers = np.full(stop - start, self._runner._weights_seq_no)
        _extend(_buffer(episode, WEIGHTS_SEQ_NO), sequence_numbers)
        episode.infos.data.extend(infos[env_index] or {} for infos in self._infos[start:stop])
        self._observed(episode)
        episode.t += stop - start
        note_steps(episode, self._times[start], self._times[-1])

    def _observed(self, episode: SingleAgentEpisode) -> None:
        """Gives an episode the space of its observations, which the filter has changed."""
        if self._filter is not None:
            episode.observation_space = self._filter.observation_space

    def cut(self) -> list[SingleAgentEpisode]:
        """Ends the fragments of all episodes that go on, and leaves the runner ready to continue them.

        Returns:
            The fragments, without those of episodes that have not stepped yet.
        """
        runner = self._runner
        for env_index in range(runner.num_envs):
            self._fill(env_index)
        fragments = [episode.to_numpy() for episode in self._episodes if episode.t > 0]
        horizon = runner.config.episode_lookback_horizon
        runner._ongoing_episodes = [_continuation(episode, horizon) for episode in self._episodes]
        columns = {Columns.OBS: self._obs}
        if self._states is not None:
            columns = {Columns.OBS: self._obs[:, None], Columns.STATE_IN: self._states}
        runner._cached_to_module = convert_to_torch_tensor(columns, device=runner._device)
        runner._shared_data["memorized_map_structure"] = [episode.id_ for episode in runner._ongoing_episodes]
        return fragments

    def log(self) -> None:
        """Logs what RLlib's loop logs at each step: here, once, the mean over the steps."""
        metrics, num_steps = self._runner.metrics, max(1, len(self._times))
        for key, seconds in zip(_TIMERS, self._seconds, strict=True):
            metrics.log_value(key, seconds / num_steps)
        self._runner._log_env_steps(metric=self._runner._metrics_num_try_env_step, num_steps=num_steps)
        for key in (ENV_TO_MODULE_SUM_EPISODES_LENGTH_IN, ENV_TO_MODULE_SUM_EPISODES_LENGTH_OUT):
            metrics.log_value(key, self._total_length / num_steps)


def _buffer(episode: SingleAgentEpisode, name: str) -> InfiniteLookbackBuffer:
    """Where an episode keeps a column; module outputs are created on demand."""
    if name in (Columns.OBS, Columns.ACTIONS, Columns.REWARDS):
        return {
            Columns.OBS: episode.observations,
            Columns.ACTIONS: episode.actions,
            Columns.REWARDS: episode.rewards,
        }[name]
    return episode.extra_model_outputs.setdefault(name, InfiniteLookbackBuffer())


def _extend(buffer: InfiniteLookbackBuffer, data: Any) -> None:
    """Adds rows to a list of items, and makes it an array; of nested items, a nested structure of arrays."""
    if len(buffer.data) and isinstance(data, np.ndarray):
        data = np.concatenate([np.asarray(buffer.data, data.dtype), data])
    elif len(buffer.data):
        before = buffer.data if buffer.finalized else batch(buffer.data)
        data = tree.map_structure(lambda x, y: np.concatenate([x, y]), before, data)
    buffer.data, buffer.finalized = data, True


def _continuation(episode: SingleAgentEpisode, horizon: int) -> SingleAgentEpisode:
    """An episode's successor, ``episode.cut(horizon)``, as lists.

    Nested states are cut here: ``cut`` takes the number of a nested structure's parts for its length.
    """
    states = episode.extra_model_outputs.pop(Columns.STATE_OUT, None)
    successor = _to_lists(episode.cut(horizon))
    if states is not None:
        episode.extra_model_outputs[Columns.STATE_OUT] = states
        count = len(successor.rewards.data)
        kept = unbatch(tree.map_structure(lambda x: x[-count:], states.data)) if count else []
        successor.extra_model_outputs[Columns.STATE_OUT] = InfiniteLookbackBuffer(kept, lookback=count)
    return successor


def _to_lists(episode: SingleAgentEpisode) -> SingleAgentEpisode:
    """Undoes ``to_numpy()``, in place."""
    buffers: Sequence[InfiniteLookbackBuffer] = (
        episode.observations,
        episode.actions,
        episode.rewards,
        *episode.extra_model_outputs.values(),
    )
    for buffer in buffers:
        if buffer.finalized:
            nested = not isinstance(buffer.data, np.ndarray)
            buffer.data, buffer.finalized = unbatch(buffer.data) if nested else list(buffer.data.copy()), False
    return episode
