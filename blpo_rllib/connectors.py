"""Learner connectors: from RLlib episodes to trajectory segments, and the running scale of rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import tree
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.utils.annotations import override

from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import layout_segments

# Columns that PackSegments adds, bool [M, S]: see blpo_rllib.core.segments.SegmentLayout.
SEGMENT_STEP = "segment_step"
SEGMENT_CONTINUES = "segment_continues"

_COLUMNS = (
    Columns.OBS,
    Columns.ACTIONS,
    Columns.ACTION_LOGP,
    Columns.ACTION_DIST_INPUTS,
    Columns.REWARDS,
    Columns.TERMINATEDS,
)


class PackSegments(ConnectorV2):
    """Turns a flat batch of episodes into trajectory segments, [n, ...] into [M, S, ...] per column and module.

    Stands at the end of the learner pipeline, behind RLlib's ``AddOneTsToEpisodesAndTruncate``, which appends to every
    episode or fragment its last observation and marks it False in the loss mask.

    Args:
        num_segments: Maps a module's ID and its number of steps (>= 1) to M.
        width_multiple: S is rounded up to a multiple of this.
    """

    def __init__(self, num_segments: Callable[[str, int], int], width_multiple: int = 1):
        super().__init__()
        self._num_segments, self._width_multiple = num_segments, width_multiple

    @override(ConnectorV2)
    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> Any:
        for module_id, columns in list(batch.items()):
            is_step = columns[Columns.LOSS_MASK].cpu().numpy().astype(bool)
            if is_step.any():
                batch[module_id] = self._pack(columns, is_step, self._num_segments(module_id, int(is_step.sum())))
            else:
                del batch[module_id]
        return batch

    def _pack(self, columns: dict[str, Any], is_step: np.ndarray, num_segments: int) -> dict[str, Any]:
        terminated = columns[Columns.TERMINATEDS].cpu().numpy().astype(bool)
        layout = layout_segments(is_step, terminated, num_segments, self._width_multiple)
        device = columns[Columns.LOSS_MASK].device
        index = torch.as_tensor(layout.index, device=device)
        packed = {name: tree.map_structure(lambda x: x[index], columns[name]) for name in _COLUMNS if name in columns}
        packed[SEGMENT_STEP] = torch.as_tensor(layout.step, device=device)
        packed[SEGMENT_CONTINUES] = torch.as_tensor(layout.continues, device=device)
        return packed


class RewardScale(ConnectorV2):
    r"""Measures the running standard deviation of the discounted return, by which the learner divides rewards.

    The statistic is that of :math:`R_t = \gamma R_{t-1} + r_t` over all steps seen by a module, R starting at 0 with
    each episode and going on across the fragments of one. Episodes are left as they are, so the returns in the metrics
    stay those of the environment. Stands at the start of the learner pipeline.

    Args:
        gamma: Discount of R, in [0, 1].
        reduction: Sums over the learners.
    """

    def __init__(self, gamma: float, reduction: Reduction, device: torch.device):
        super().__init__()
        self._gamma, self._reduction, self._device = gamma, reduction, device
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
    def __call__(self, *, rl_module: Any, batch: dict[str, Any], episodes: list[Any], **kwargs: Any) -> Any:
        moments = {module_id: np.zeros(3) for module_id in sorted(rl_module.keys())}
        open_returns = {}
        for episode in self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False):
            key = (episode.multi_agent_episode_id or episode.id_, episode.agent_id)
            returns = self._discounted_returns(episode, self._open_returns.get(key, 0.0))
            moments[episode.module_id or DEFAULT_MODULE_ID] += [len(returns), returns.sum(), (returns**2).sum()]
            if len(returns) and not episode.is_done:
                open_returns[key] = float(returns[-1])
        self._open_returns = open_returns
        for module_id, new in moments.items():
            total = self._reduction.sum(torch.as_tensor(new, device=self._device)).cpu().numpy()
            self._moments[module_id] = self._moments.get(module_id, np.zeros(3)) + total
        return batch

    def _discounted_returns(self, episode: Any, start: float) -> np.ndarray:
        rewards = np.asarray(episode.get_rewards(), np.float64)
        returns, value = np.empty(len(rewards)), start
        for t, reward in enumerate(rewards):
            value = self._gamma * value + reward
            returns[t] = value
        return returns

    @override(ConnectorV2)
    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"moments": {k: v.copy() for k, v in self._moments.items()}, "open_returns": dict(self._open_returns)}

    @override(ConnectorV2)
    def set_state(self, state: dict[str, Any]) -> None:
        self._moments = {k: np.array(v, np.float64) for k, v in state["moments"].items()}
        self._open_returns = dict(state["open_returns"])
