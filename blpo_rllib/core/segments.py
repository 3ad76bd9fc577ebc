"""Trajectory segments: how episodes of any length become equal rows of a batch.

A *segment* is a row of time slots filled with one or several pieces of episodes, in order. A slot is either a *step*
(an observation with its action, reward and log-probability) or a *bootstrap slot*: the observation after the last step
of a piece that did not terminate, present only so that V of it can enter that step's temporal difference.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import tree
from torch import Tensor

from blpo_rllib.core.gae import AdvantageOperator, ConstantAdvantage

# Rows may exceed their fair share of steps by this fraction if that keeps an episode in one piece.
_ROW_SLACK = 0.05


@dataclass(frozen=True)
class Piece:
    """Steps ``start .. start + length - 1`` of episode number ``episode``."""

    episode: int
    start: int
    length: int


def pack_segments(lengths: Sequence[int], num_segments: int) -> list[list[Piece]]:
    """Distributes episodes over segments of nearly equal length, cutting as few of them as possible.

    Longest pieces go first, each onto the emptiest segment; a piece is cut only where it fits nowhere whole. All
    episodes are used and every segment gets at least one step.

    Args:
        lengths: Number of steps of each episode, >= 0 (an episode without steps is left out).
        num_segments: Number of segments, between 1 and ``sum(lengths)``.

    Returns:
        The pieces of each segment, in the order in which they fill it.

    Raises:
        ValueError: If there are fewer steps than segments.
    """
    total = sum(lengths)
    if not 1 <= num_segments <= total:
        raise ValueError(f"cannot fill {num_segments} segments with {total} steps: use between 1 and {total}")
    fair = total / num_segments
    rows = _pack(lengths, [int(fair * (1 + _ROW_SLACK)) + 1] * num_segments)
    if min(sum(piece.length for piece in row) for row in rows) >= fair * (1 - 2 * _ROW_SLACK):
        return rows
    extra = total % num_segments
    return _pack(lengths, [total // num_segments + (row < extra) for row in range(num_segments)])


def _pack(lengths: Sequence[int], capacities: Sequence[int]) -> list[list[Piece]]:
    rows: list[list[Piece]] = [[] for _ in capacities]
    space = [(-capacity, row) for row, capacity in enumerate(capacities)]
    waiting = [(-length, episode, 0) for episode, length in enumerate(lengths) if length]
    heapq.heapify(space)
    heapq.heapify(waiting)
    while waiting:
        length, episode, start = heapq.heappop(waiting)
        free, row = heapq.heappop(space)
        taken = min(-length, -free)
        rows[row].append(Piece(episode, start, taken))
        heapq.heappush(space, (free + taken, row))
        if taken < -length:
            heapq.heappush(waiting, (length + taken, episode, start + taken))
    return rows


@dataclass(frozen=True)
class SegmentPlan:
    """Into how many segments a process cuts its share of a batch, and into how many minibatches these go.

    Attributes:
        num_minibatches: Minibatches per epoch, the same on all processes; >= 1.
        num_segments: Segments made of the process's steps; 0 if it has none.
    """

    num_minibatches: int
    num_segments: int

    @classmethod
    def of(cls, counts: Sequence[int], rank: int, minibatch_size: int | None, length: int) -> SegmentPlan:
        """The plan of process ``rank``, which agrees with the others' in the number of minibatches.

        Args:
            counts: Steps of each process, >= 0 and not all 0.
            rank: Which of them is this one.
            minibatch_size: Steps per minibatch and process on average; None for a single minibatch.
            length: Steps per segment, as near as whole minibatches allow.
        """
        own, num_minibatches = counts[rank], 1
        if minibatch_size is not None:
            num_minibatches = max(1, round(sum(counts) / len(counts) / minibatch_size))
        # At least one process fills all its minibatches.
        num_minibatches = min(num_minibatches, max(counts))
        size = -(-own // num_minibatches)
        # Single steps: a row of two of them would make all rows as long. No minibatch must consist of blank rows.
        if length == 1 and size * num_minibatches - own < size:
            return cls(num_minibatches, own)
        per_minibatch = min(max(1, round(own / num_minibatches / length)), max(1, own // num_minibatches))
        return cls(num_minibatches, min(num_minibatches * per_minibatch, own))

    @property
    def num_rows(self) -> int:
        """Rows of the batch: its segments, and blank ones where it has too few for each minibatch to get one."""
        return -(-max(1, self.num_segments) // self.num_minibatches) * self.num_minibatches


@dataclass(frozen=True)
class SegmentLayout:
    """Where each slot of each segment comes from.

    Attributes:
        index: int64 [M, S], position of the slot's data in the flat batch (0 in padding).
        step: bool [M, S], whether the slot is a step; bootstrap slots and padding are not.
        continues: bool [M, S], whether the next slot is the next step of the same piece.
        age: int64 [M, S], the slot's distance from the first of its piece; −1 in padding.
    """

    index: np.ndarray
    step: np.ndarray
    continues: np.ndarray
    age: np.ndarray


def layout_segments(
    is_step: np.ndarray, terminated: np.ndarray, num_segments: int, width_multiple: int = 1, num_rows: int = 0
) -> SegmentLayout:
    """Lays out a flat batch of episodes, each of which ends in one extra item, as segments.

    Args:
        is_step: bool [n], False on the extra item (the observation after the last step) that ends each episode.
        terminated: bool [n], True on steps after which the environment terminated.
        num_segments: Number of rows to fill.
        width_multiple: S is rounded up, so that batches of about the same size have one shape: to a multiple of the
            largest power of two that is at most this, and at most an eighth of S.
        num_rows: Number of rows in all, if more: the others stay blank, without a step.

    Returns:
        The layout with S slots a row, S being at least the longest row's.
    """
    ends = np.flatnonzero(~is_step)
    begins = np.concatenate(([0], ends[:-1] + 1))
    rows: list[list[np.ndarray]] = []
    for pieces in pack_segments((ends - begins).tolist(), num_segments) if num_segments else []:
        parts = []
        for piece in pieces:
            first = begins[piece.episode] + piece.start
            bootstrap = not terminated[first + piece.length - 1]
            age = np.arange(piece.length + bootstrap)
            parts.append((first + age, age < piece.length, age < piece.length - 1, age))
        rows.append([np.concatenate(columns) for columns in zip(*parts, strict=True)])
    width = rounded_width(max((len(index) for index, *_ in rows), default=1), width_multiple)
    shape = max(num_segments, num_rows), width
    layout = SegmentLayout(
        index=np.zeros(shape, np.int64),
        step=np.zeros(shape, bool),
        continues=np.zeros(shape, bool),
        age=np.full(shape, -1, np.int64),
    )
    for row, columns in enumerate(rows):
        for filled, column in zip((layout.index, layout.step, layout.continues, layout.age), columns, strict=True):
            filled[row, : len(column)] = column
    return layout


def rounded_width(width: int, multiple: int) -> int:
    """A width rounded up to a multiple of the largest power of two that is at most ``multiple`` and an eighth of it."""
    multiple = 1 << (max(1, min(multiple, width // 8)).bit_length() - 1)
    return -(-width // multiple) * multiple


@dataclass(frozen=True)
class SegmentBatch:
    """M segments of S slots on one device. ``obs`` may be a nested structure of tensors; all start with [M, S].

    Attributes:
        obs: Observations [M, S, ...].
        actions: Actions [M, S, ...].
        old_logp: Log-probability [M, S] of the actions under the policy that took them.
        old_dist_inputs: Inputs [M, S, d] of that policy's action distribution.
        rewards: Rewards [M, S] of the steps.
        step: 1.0 where the slot is a step, else 0.0, [M, S].
        advantage: The operators D and A of these segments.
    """

    obs: Any
    actions: Any
    old_logp: Tensor
    old_dist_inputs: Tensor
    rewards: Tensor
    step: Tensor
    advantage: AdvantageOperator

    def __len__(self) -> int:
        return len(self.step)

    @property
    def _tensors(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "advantage"}

    def permuted(self, order: Tensor) -> SegmentBatch:
        """These segments in another order (int64 [M])."""
        tensors = tree.map_structure(lambda x: x[order], self._tensors)
        return SegmentBatch(**tensors, advantage=self.advantage.permuted(order))

    def without_bootstrap(self, targets: Tensor) -> tuple[SegmentBatch, Tensor]:
        """The steps of these segments and of their value targets [M, S], where advantages are constants.

        Only V of a bootstrap slot counts, for the advantage before it, which is given in place of the rewards.
        """
        width = rounded_width(int(self.step.sum(1).max()), self.step.shape[1])
        if width >= self.step.shape[1]:
            return self, targets
        rows = torch.arange(len(self), device=self.step.device)[:, None]
        slots = self.step.argsort(dim=1, descending=True, stable=True)[:, :width]
        tensors = tree.map_structure(lambda x: x[rows, slots], self._tensors)
        return SegmentBatch(**tensors, advantage=ConstantAdvantage(tensors["step"])), targets[rows, slots]

    def to(self, dtype: torch.dtype) -> SegmentBatch:
        """These segments with their floating-point numbers in another precision."""
        tensors = tree.map_structure(lambda x: x.to(dtype) if x.is_floating_point() else x, self._tensors)
        return SegmentBatch(**tensors, advantage=self.advantage.to(dtype))

    def rows(self) -> list[Tensor]:
        """All tensors that the batch is made of, each [M, ...]."""
        return [*tree.flatten(self._tensors), *self.advantage.tensors]

    def with_rows(self, rows: Sequence[Tensor]) -> SegmentBatch:
        """The batch that is made of these tensors in place of :meth:`rows`."""
        size = len(rows) - len(self.advantage.tensors)
        return SegmentBatch(
            **tree.unflatten_as(self._tensors, rows[:size]), advantage=self.advantage.of_tensors(rows[size:])
        )

    def split(self, size: int) -> list[SegmentBatch]:
        """Consecutive batches of ``size`` segments each, as views; the last may be smaller."""
        if size >= len(self):
            return [self]
        tensors = self._tensors
        parts = zip(*(x.split(size) for x in tree.flatten(tensors)), strict=True)
        return [
            SegmentBatch(**tree.unflatten_as(tensors, part), advantage=advantage)
            for part, advantage in zip(parts, self.advantage.split(size), strict=True)
        ]
