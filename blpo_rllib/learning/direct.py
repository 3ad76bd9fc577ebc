"""RLlib's per-item work between EnvRunner, learner and back, left out where nobody asked for it.

RLlib's learner pipeline takes episodes apart into items and joins these again, so that connectors can change any of
them, and weights go to EnvRunners through Ray's object store. With the default pipeline, and an EnvRunner in the
learner's own process, arrays go straight from one to the other; what they hold is the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ray.rllib.connectors.common import (
    AddObservationsFromEpisodesToBatch,
    AddStatesFromEpisodesToBatch,
    AddTimeDimToBatchAndZeroPad,
    BatchIndividualItems,
    NumpyToTensor,
)
from ray.rllib.connectors.learner import (
    AddColumnsFromEpisodesToTrainBatch,
    AddOneTsToEpisodesAndTruncate,
    LearnerConnectorPipeline,
)
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import (
    ALL_MODULES,
    CONNECTOR_PIPELINE_TIMER,
    LEARNER_CONNECTOR,
    LEARNER_CONNECTOR_SUM_EPISODES_LENGTH_IN,
    LEARNER_CONNECTOR_SUM_EPISODES_LENGTH_OUT,
)

from blpo_rllib.learning.connectors import AddStateOfEachStep, DivideRewards, PackSegments, RewardScale
from blpo_rllib.rllib_private import give_weights, local_learner

# Of the default pipeline, what goes item by item, and what may stand around it.
_PER_ITEM = [
    AddOneTsToEpisodesAndTruncate,
    AddObservationsFromEpisodesToBatch,
    AddColumnsFromEpisodesToTrainBatch,
    AddStateOfEachStep,
    AddTimeDimToBatchAndZeroPad,
    AddStatesFromEpisodesToBatch,
    BatchIndividualItems,
]
_BEFORE, _BEHIND = {RewardScale}, {NumpyToTensor, DivideRewards, PackSegments}
_OUTPUTS = (Columns.ACTION_LOGP, Columns.ACTION_DIST_INPUTS)


def run_pipeline(
    pipeline: LearnerConnectorPipeline, rl_module: Any, episodes: list[Any], shared_data: dict[str, Any], metrics: Any
) -> dict[str, Any]:
    """What a learner's pipeline makes of episodes, which it may extend by a step each, as RLlib's connectors do."""
    types = [type(connector) for connector in pipeline.connectors]
    start = types.index(_PER_ITEM[0]) if _PER_ITEM[0] in types else 0
    stop = start + len(_PER_ITEM)
    default = types[start:stop] == _PER_ITEM and {*types[:start]} <= _BEFORE and {*types[stop:]} <= _BEHIND
    if not default or type(pipeline) is not LearnerConnectorPipeline or not _are_plain(rl_module, episodes):
        return pipeline(rl_module=rl_module, batch={}, episodes=episodes, shared_data=shared_data, metrics=metrics)
    started = time.perf_counter()
    batch: dict[str, Any] = {}
    for connector in pipeline.connectors[:start]:
        batch = connector(rl_module=rl_module, batch=batch, episodes=episodes, shared_data=shared_data)
    batch = {DEFAULT_MODULE_ID: columns_of(episodes)}
    for connector in pipeline.connectors[stop:]:
        batch = connector(rl_module=rl_module, batch=batch, episodes=episodes, shared_data=shared_data)
    length = sum(map(len, episodes))
    for name, value in (
        ((ALL_MODULES, LEARNER_CONNECTOR_SUM_EPISODES_LENGTH_IN), length),
        ((ALL_MODULES, LEARNER_CONNECTOR_SUM_EPISODES_LENGTH_OUT), length),
        ((ALL_MODULES, LEARNER_CONNECTOR, CONNECTOR_PIPELINE_TIMER), time.perf_counter() - started),
    ):
        metrics.log_value(name, value)
    return batch


def _are_plain(rl_module: Any, episodes: list[Any]) -> bool:
    """Whether there is one module without states, and episodes that consist of arrays."""
    if type(rl_module) is not MultiRLModule or set(rl_module.keys()) != {DEFAULT_MODULE_ID}:
        return False
    return not rl_module[DEFAULT_MODULE_ID].unwrapped().is_stateful() and all(map(_is_plain, episodes))


def _is_plain(episode: Any) -> bool:
    if type(episode) is not SingleAgentEpisode or not episode.is_numpy or not len(episode):
        return False
    outputs = episode.extra_model_outputs
    buffers = episode.observations, episode.actions, *(outputs.get(name) for name in _OUTPUTS)
    return all(buffer is not None and isinstance(buffer.data, np.ndarray) for buffer in buffers)


def columns_of(episodes: list[SingleAgentEpisode]) -> dict[str, np.ndarray]:
    """The columns [n, ...] of plain episodes one after the other.

    Each ends in an item that is no step, as ``AddOneTsToEpisodesAndTruncate`` appends it: with its last observation,
    and the last step's action and outputs once more.
    """
    lengths = np.array([len(episode) for episode in episodes])
    last = np.cumsum(lengths + 1) - 1
    is_step = np.ones(lengths.sum() + len(episodes), bool)
    is_step[last] = False
    terminated = np.zeros_like(is_step)
    terminated[last - 1] = [episode.is_terminated for episode in episodes]

    def joined(buffers: list[Any], extra: int) -> np.ndarray:
        parts = []
        for buffer in buffers:
            own = buffer.data[buffer.lookback :]
            parts += [own, own[-1:]] if extra else [own]
        return np.concatenate(parts)

    columns = {
        Columns.OBS: joined([episode.observations for episode in episodes], 0),
        Columns.ACTIONS: joined([episode.actions for episode in episodes], 1),
        Columns.REWARDS: joined([episode.rewards for episode in episodes], 1),
        Columns.TERMINATEDS: terminated,
        Columns.LOSS_MASK: is_step,
    }
    columns[Columns.REWARDS][last] = 0.0
    for name in _OUTPUTS:
        columns[name] = joined([episode.extra_model_outputs[name] for episode in episodes], 1)
    return columns


@contextmanager
def direct_weights(group: EnvRunnerGroup, learners: LearnerGroup) -> Iterator[None]:
    """In it, ``group.sync_weights`` takes the short way wherever :func:`hand_over_weights` can."""
    if "sync_weights" in vars(group):
        # Somebody's own.
        yield
        return
    rllibs = group.sync_weights

    def sync_weights(*args: Any, **kwargs: Any) -> None:
        if not hand_over_weights(local_learner(learners), group):
            rllibs(*args, **kwargs)

    group.sync_weights = sync_weights
    try:
        yield
    finally:
        del group.sync_weights


def hand_over_weights(learner: Learner | None, group: EnvRunnerGroup) -> bool:
    """Copies a learner's weights to the EnvRunner of this process, if there is no other and both do it RLlib's way.

    Returns:
        Whether that was possible.
    """
    runner = group.local_env_runner
    if learner is None or group.num_remote_workers() or not isinstance(runner, SingleAgentEnvRunner):
        return False
    if type(learner.module) is not MultiRLModule or set(learner.module.keys()) != {DEFAULT_MODULE_ID}:
        return False
    source, target = learner.module[DEFAULT_MODULE_ID].unwrapped(), runner.module
    for name in ("get_state", "set_state"):
        if any(getattr(type(module), name) is not getattr(TorchRLModule, name) for module in (source, target)):
            return False
    weights, own = source.state_dict(), target.state_dict()
    if not own.keys() <= weights.keys():
        return False
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(weights[name])
    give_weights(learner, runner)
    return True
