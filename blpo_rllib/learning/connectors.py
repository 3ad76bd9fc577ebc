"""Learner connectors: they turn RLlib episodes into trajectory segments and normalise rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tree
from ray.rllib.connectors.common import NumpyToTensor
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.learner import GeneralAdvantageEstimation, LearnerConnectorPipeline
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.utils.annotations import override
from ray.rllib.utils.numpy import convert_to_numpy
from ray.rllib.utils.torch_utils import convert_to_torch_tensor
from scipy.signal import lfilter

from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentPlan, layout_segments
from blpo_rllib.learning.recurrence import max_sequence_length, places, recurrent_observation, sequences

# What PackSegments adds to a module's columns: tensors [M, S], see core.segments.SegmentLayout.
SEGMENT_INDEX = "segment_index"
SEGMENT_STEP = "segment_step"
SEGMENT_CONTINUES = "segment_continues"

# Among the data that connectors share, PackSegments finds the steps per minibatch, None for a single minibatch, and
# leaves BatchSizes by module.
MINIBATCH_SIZE = "minibatch_size"
BATCH_SIZES = "batch_sizes"

_COLUMNS = (
    Columns.OBS,
    Columns.ACTIONS,
    Columns.ACTION_LOGP,
    Columns.ACTION_DIST_INPUTS,
    Columns.REWARDS,
    Columns.TERMINATEDS,
)


@dataclass(frozen=True)
class BatchSizes:
    """What of a module's batch the host knows.

    Attributes:
        num_minibatches: Minibatches per epoch, >= 1.
        num_steps: Steps in all.
        num_items: Items of the flat batch, in which an extra one ends each episode.
    """

    num_minibatches: int
    num_steps: int
    num_items: int


class AddStateOfEachStep(ConnectorV2):
    """Adds to each step of a recurrent module the state that the module had there while sampling, as ``STATE_IN``.

    Stands before RLlib's ``AddTimeDimToBatchAndZeroPad`` and ``AddStatesFromEpisodesToBatch``, which cut episodes into
    rows and keep one state of each; a batch with ``STATE_IN`` they leave as it is. So segments can be cut anywhere.
    """

    @override(ConnectorV2)
    def __call__(self, *, rl_module: Any, batch: dict[str, Any], episodes: list[Any], **kwargs: Any) -> Any:
        for episode in self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False):
            module_id = episode.module_id or DEFAULT_MODULE_ID
            if module_id in rl_module and rl_module[module_id].unwrapped().is_stateful():
                states = _states_in(episode, rl_module[module_id].unwrapped())
                self.add_n_batch_items(batch, Columns.STATE_IN, states, len(episode), episode)
        return batch


def _states_in(episode: Any, module: Any) -> Any:
    """The state of each step: the initial one, or where the last fragment ended; then what the step before returned."""
    first = convert_to_numpy(module.get_initial_state())
    if Columns.STATE_OUT not in episode.extra_model_outputs:
        # Sampled by a module without states.
        return tree.map_structure(lambda x: np.repeat(x[None], len(episode), axis=0), first)
    if episode.t_started > 0:
        first = episode.get_extra_model_outputs(Columns.STATE_OUT, -1, neg_index_as_lookback=True)
    left = episode.get_extra_model_outputs(Columns.STATE_OUT)
    if not episode.is_numpy:
        left = tree.map_structure(lambda *x: np.stack(x), *left)
    return tree.map_structure(lambda x, y: np.concatenate([x[None], y[:-1]]), first, left)


class PackSegments(ConnectorV2):
    """Turns a flat batch of episodes into trajectory segments, [n, ...] into [M, S, ...] per column and module.

    The connector ends the learner pipeline, or stands where :func:`pack_on_host` puts it. Segments are laid out on the
    host. It needs RLlib's ``AddOneTsToEpisodesAndTruncate`` before it, which appends
    to every episode or fragment its last observation and marks it False in the loss mask. The minibatch size reaches
    the connector under :data:`MINIBATCH_SIZE` in ``shared_data``. Observations of a recurrent
    module, which :class:`AddStateOfEachStep` gave states, become :func:`recurrent_observation`. Sizes that the host has
    to know are left under :data:`BATCH_SIZES`. Modules for which there is no plan keep their columns.

    Args:
        plan: Maps the number of steps by module ID and the minibatch size to a plan for each module that has steps on
            any learner.
        blank: Maps a module's ID to the columns of a single item that is no step, for a learner without a step of it.
        width_multiple: See :func:`~blpo_rllib.core.segments.layout_segments`.
        device: Where the segments are to be.
    """

    def __init__(
        self,
        plan: Callable[[dict[str, int], int | None], dict[str, SegmentPlan]],
        blank: Callable[[str], dict[str, Any]],
        width_multiple: int = 1,
        device: torch.device | None = None,
    ):
        super().__init__()
        self._plan, self._blank, self._width_multiple, self._device = plan, blank, width_multiple, device

    @override(ConnectorV2)
    def __call__(self, *, rl_module: Any, batch: dict[str, Any], shared_data: dict[str, Any], **kwargs: Any) -> Any:
        is_step = {
            module_id: _mask(columns[Columns.LOSS_MASK])
            for module_id, columns in batch.items()
            if Columns.LOSS_MASK in columns
        }
        num_steps = {module_id: int(x.sum()) for module_id, x in is_step.items()}
        packed, sizes = {}, shared_data.setdefault(BATCH_SIZES, {})
        for module_id, plan in self._plan(num_steps, shared_data[MINIBATCH_SIZE]).items():
            columns = batch[module_id] if plan.num_segments else self._blank(module_id)
            mask = is_step.get(module_id, np.zeros(1, bool))
            packed[module_id] = self._pack(columns, mask, plan, rl_module[module_id].unwrapped())
            sizes[module_id] = BatchSizes(plan.num_minibatches, int(mask.sum()), len(mask))
        # Modules without a plan keep their single steps, if they have any.
        for module_id in is_step.keys() - packed.keys():
            if not is_step[module_id].any():
                del batch[module_id]
        batch.update(packed)
        return batch

    def _pack(self, columns: dict[str, Any], is_step: np.ndarray, plan: SegmentPlan, module: Any) -> dict[str, Any]:
        layout = layout_segments(
            is_step, _mask(columns[Columns.TERMINATEDS]), plan.num_segments, self._width_multiple, plan.num_rows
        )
        index = self._send(layout.index)

        def pack(column: Any) -> Any:
            return tree.map_structure(lambda x: x[index], self._send(column))

        packed = {name: pack(columns[name]) for name in _COLUMNS if name in columns}
        packed[SEGMENT_INDEX] = index
        if Columns.STATE_IN in columns:
            place = places(layout.age, layout.step, max_sequence_length(module))
            packed[Columns.OBS] = recurrent_observation(
                packed[Columns.OBS],
                pack(columns[Columns.STATE_IN]),
                self._send(place),
                self._send(sequences(place, self._width_multiple)),
            )
        return packed | {SEGMENT_STEP: self._send(layout.step), SEGMENT_CONTINUES: self._send(layout.continues)}

    def _send(self, nested: Any) -> Any:
        """Arrays as tensors on the device; floating-point numbers in RLlib's connectors' precision, float32."""
        return convert_to_torch_tensor(nested, device=self._device)


def _mask(column: Any) -> np.ndarray:
    """A column of 0 and 1 on the host, [n]."""
    return convert_to_numpy(column).astype(bool)


def pack_on_host(pipeline: LearnerConnectorPipeline) -> None:
    """Lets :class:`PackSegments` have the data before ``NumpyToTensor`` sends them to the device.

    It then sends each column once, and none has to be read back. Where other connectors stand behind ``NumpyToTensor``,
    which take tensors of single items there, nothing changes.
    """
    connectors = pipeline.connectors
    types = [type(connector) for connector in connectors]
    if types.count(PackSegments) != 1 or NumpyToTensor not in types:
        return
    place, pack = types.index(NumpyToTensor), types.index(PackSegments)
    if pack > place and {*types[place + 1 :]} <= {DivideRewards, PackSegments}:
        connectors.insert(place, connectors.pop(pack))


@dataclass(frozen=True)
class _Fragment:
    """The discounted return R over the n steps of a fragment, as a function of its value before them.

    The numbers are those for a value of 0; for a value R, each R_t is larger by decay_t · R with decay_t = γ^{t+1}.

    Attributes:
        sums: n, Σ R_t and Σ R_t².
        decay_sums: Σ decay_t, Σ R_t decay_t and Σ decay_t².
        last: R_{n−1}.
        last_decay: decay_{n−1}.
    """

    episode: Any
    module_id: str
    start: int
    is_done: bool
    sums: np.ndarray
    decay_sums: np.ndarray
    last: float
    last_decay: float

    def moments_and_last(self, before: float) -> tuple[np.ndarray, float]:
        """Number, sum and sum of squares of R, and R at the end, for the value ``before`` the fragment."""
        decay, crossed, squared = self.decay_sums
        added = np.array([0.0, before * decay, 2 * before * crossed + before**2 * squared])
        return self.sums + added, self.last + before * self.last_decay


class RewardScale(ConnectorV2):
    r"""Measures the running standard deviation of the discounted return, for :class:`DivideRewards`.

    The statistic is that of :math:`R_t = \gamma R_{t-1} + r_t` over all steps seen by a module, R starting at 0 with
    each episode and going on across the fragments of one. The connector starts the learner pipeline, because RLlib's
    next one renames the episodes and marks fragments as truncated. It leaves episodes as they are, so the returns in
    the metrics stay those of the environment.

    Args:
        gamma: Discount of R, in [0, 1].
        reduction: Where the learners meet.
    """

    def __init__(self, gamma: float, reduction: Reduction):
        super().__init__()
        self._gamma, self._reduction = gamma, reduction
        # Per module: number of returns, their sum, and the sum of their squares.
        self._moments: dict[str, np.ndarray] = {}
        # R at the end of each episode that goes on in the next batch.
        self._open_returns: dict[Any, float] = {}

    def scale(self, module_id: str) -> float:
        """The present standard deviation; 1 before any step was seen, and where returns do not vary."""
        count, total, squares = self._moments.get(module_id, np.zeros(3))
        variance = squares / count - (total / count) ** 2 if count else 0.0
        return float(np.sqrt(variance)) if variance > 1e-8 else 1.0

    @override(ConnectorV2)
    def __call__(self, *, batch: dict[str, Any], episodes: list[Any], **kwargs: Any) -> Any:
        fragments = [
            self._fragment(episode)
            for episode in self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False)
            if len(episode)
        ]
        # An episode may be spread over learners, and go on elsewhere in the next batch: everyone sees all fragments.
        everyone = [fragment for part in self._reduction.gather(fragments) for fragment in part]
        open_returns: dict[Any, float] = {}
        for fragment in sorted(everyone, key=lambda f: f.start):
            value = open_returns.pop(fragment.episode, self._open_returns.get(fragment.episode, 0.0))
            moments, last = fragment.moments_and_last(value)
            self._moments[fragment.module_id] = self._moments.get(fragment.module_id, np.zeros(3)) + moments
            if not fragment.is_done:
                open_returns[fragment.episode] = last
        self._open_returns = open_returns
        return batch

    def _fragment(self, episode: Any) -> _Fragment:
        rewards = np.asarray(episode.get_rewards(), np.float64)
        returns = lfilter([1.0], [1.0, -self._gamma], rewards)
        decay = self._gamma ** np.arange(1, len(rewards) + 1)
        return _Fragment(
            episode=(episode.multi_agent_episode_id or episode.id_, episode.agent_id),
            module_id=episode.module_id or DEFAULT_MODULE_ID,
            start=episode.t_started,
            is_done=episode.is_done,
            sums=np.array([len(rewards), returns.sum(), (returns**2).sum()]),
            decay_sums=np.array([decay.sum(), (returns * decay).sum(), (decay**2).sum()]),
            last=float(returns[-1]),
            last_decay=float(decay[-1]),
        )

    @override(ConnectorV2)
    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"moments": {k: v.copy() for k, v in self._moments.items()}, "open_returns": dict(self._open_returns)}

    @override(ConnectorV2)
    def set_state(self, state: dict[str, Any]) -> None:
        self._moments = {k: np.array(v, np.float64) for k, v in state["moments"].items()}
        self._open_returns = dict(state["open_returns"])


class DivideRewards(ConnectorV2):
    """Divides the rewards of the train batch by what a :class:`RewardScale` measured.

    Args:
        scale: The connector that measures.
    """

    def __init__(self, scale: RewardScale):
        super().__init__()
        self._scale = scale

    @override(ConnectorV2)
    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> Any:
        for module_id, columns in batch.items():
            columns[Columns.REWARDS] = columns[Columns.REWARDS] / self._scale.scale(module_id)
        return batch


def normalize_rewards(pipeline: LearnerConnectorPipeline, gamma: float, reduction: Reduction) -> RewardScale:
    """Makes a PPO learner's pipeline divide rewards by the running standard deviation of the discounted return.

    Args:
        pipeline: The pipeline as PPO's learner builds it, ending in ``GeneralAdvantageEstimation``.
        gamma: Discount of the return, in [0, 1].
        reduction: Where the learners meet.

    Returns:
        The connector that measures.
    """
    scale = RewardScale(gamma, reduction)
    pipeline.prepend(scale)
    pipeline.insert_before(GeneralAdvantageEstimation, DivideRewards(scale))
    return scale
