"""Takes players through minibatches by replaying recordings of them: see :mod:`blpo_rllib.core.recording`."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blpo_rllib.core.adam import AdamSteps
from blpo_rllib.core.hypergradient import Hypergradient
from blpo_rllib.core.minibatch import MinibatchMetrics, MinibatchResult, MinibatchUpdate, UpdateSettings
from blpo_rllib.core.native import Kernels, pack
from blpo_rllib.core.networks import Coordinates
from blpo_rllib.core.players import Minibatch
from blpo_rllib.core.recording import Recorder, Replay
from blpo_rllib.core.segments import SegmentBatch

# Recordings kept: one for each shape of minibatch and each setting met lately.
MAX_PLANS = 16


class ReplayedUpdate:
    """Takes the players through minibatches by replaying what one minibatch of each shape did.

    Args:
        update: What is recorded.
        adams: The optimizers' steps, whose memory ``update`` changes.
        kernels: The compiled functions.
    """

    def __init__(self, update: MinibatchUpdate, adams: Sequence[AdamSteps], kernels: Kernels):
        self._update, self._adams, self._kernels = update, adams, kernels
        self._plans: OrderedDict[Any, _Plan] = OrderedDict()
        self._source: tuple[SegmentBatch, Tensor, list[Tensor]] | None = None

    def __call__(
        self,
        batch: SegmentBatch,
        targets: Tensor,
        rows: Tensor,
        num_steps: Tensor,
        coordinates: Coordinates | None,
        settings: UpdateSettings,
        shared: Hypergradient | None,
    ) -> MinibatchResult:
        """Updates the players by the segments ``rows`` (int64) of a batch; see :class:`MinibatchUpdate`.

        Returns:
            What it reports; its tensors are overwritten by the next call.

        Raises:
            CannotRecordError: If some operation cannot be recorded; nothing has changed then.
        """
        source = self._arrays(batch, targets)
        memory = [x for adam in self._adams for x in adam.memory]
        shapes = tuple(x.shape[1:] for x in source), len(rows), None if coordinates is None else len(coordinates)
        kind = batch.advantage.structure, shared is None
        key = kind, shapes, settings, tuple(x.data_ptr() for x in memory)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._record(
                batch, targets, rows, num_steps, coordinates, settings, shared, memory
            )
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return plan.run(source, rows, num_steps, _others(coordinates, shared))

    def _arrays(self, batch: SegmentBatch, targets: Tensor) -> list[Tensor]:
        """All that a batch consists of, in the form in which rows are copied: contiguous, integers of one type."""
        if self._source is None or self._source[0] is not batch or self._source[1] is not targets:
            arrays = [_plain(x) for x in (*batch.rows(), targets)]
            self._source = batch, targets, arrays
        return self._source[2]

    def _record(
        self,
        batch: SegmentBatch,
        targets: Tensor,
        rows: Tensor,
        num_steps: Tensor,
        coordinates: Coordinates | None,
        settings: UpdateSettings,
        shared: Hypergradient | None,
        memory: Sequence[Tensor],
    ) -> _Plan:
        source = self._arrays(batch, targets)
        *own, own_targets = (x[rows] for x in source)
        own_num_steps = num_steps.clone()
        own_coordinates = None if coordinates is None else coordinates.copy()
        own_shared = None if shared is None else shared.copy_of_correction()
        inputs = [*own, own_targets, own_num_steps, *_others(own_coordinates, own_shared)]
        saved = [x.clone() for x in memory]
        recorder = Recorder(self._kernels, own_targets.dtype, inputs, memory)
        try:
            with torch.no_grad(), recorder:
                minibatch = Minibatch.of(batch.with_rows(own), own_targets, own_num_steps)
                result = self._update(minibatch, own_coordinates, settings, own_shared)
        finally:
            for x, before in zip(memory, saved, strict=True):
                x.copy_(before)
        return _Plan(
            self._kernels,
            recorder.finish([*_tensors(result.metrics), result.grad_critic, result.ihvp]),
            source,
            len(rows),
        )


class _Plan:
    """The recording of one minibatch, with the calls that copy a minibatch's rows to where it reads them.

    Args:
        kernels: The compiled functions.
        replay: What was recorded; its inputs are the rows, their number of steps, and coordinates if there are any.
        arrays: What the rows are taken from.
        num_rows: Rows of a minibatch.
    """

    def __init__(self, kernels: Kernels, replay: Replay, arrays: Sequence[Tensor], num_rows: int):
        self._replay = replay
        rows, (self._num_steps, *self._others) = replay.inputs[: len(arrays)], replay.inputs[len(arrays) :]
        self._index = torch.zeros(num_rows, dtype=torch.int64)
        # Where the arrays stand, which are others for each batch.
        self._sources = (ctypes.c_void_p * len(arrays))()
        self._arrays: Sequence[Tensor] | None = None
        calls, alive = [], []
        for place, x in enumerate(rows):
            if x is None:
                continue
            source = ctypes.addressof(self._sources) + place * ctypes.sizeof(ctypes.c_void_p)
            num_bytes = x[0].numel() * x.element_size()
            words, more = pack((x, source, self._index, num_rows, num_bytes), Tensor.data_ptr)
            calls.append((kernels.address("take_rows", torch.float32), ctypes.addressof(words)))
            alive.append((words, more))
        self._take_rows = Replay(kernels, self._index, calls, alive, (), ())
        step_means, minibatch_means, counts, grad_critic, ihvp = replay.outputs
        self._result = MinibatchResult(MinibatchMetrics(step_means, minibatch_means, counts), grad_critic, ihvp)

    def run(
        self, arrays: Sequence[Tensor], rows: Tensor, num_steps: Tensor, others: Sequence[Tensor]
    ) -> MinibatchResult:
        """Replays the minibatch made of these rows of ``arrays``, with ``others`` of :func:`_others`."""
        if self._arrays is not arrays:
            self._arrays = arrays
            self._sources[:] = [x.data_ptr() for x in arrays]
        self._index.copy_(rows)
        for own, x in zip((self._num_steps, *self._others), (num_steps, *others), strict=True):
            if own is not None:
                own.copy_(x)
        self._take_rows.run()
        self._replay.run()
        return self._result


def _others(coordinates: Coordinates | None, shared: Hypergradient | None) -> list[Tensor]:
    """What a minibatch depends on besides its rows."""
    drawn = () if coordinates is None else (coordinates.index, coordinates.places)
    return [x for x in (*drawn, *(() if shared is None else shared.correction)) if x is not None]


def _tensors(metrics: MinibatchMetrics) -> list[Tensor]:
    return [metrics.step_means, metrics.minibatch_means, metrics.counts]


def _plain(x: Tensor) -> Tensor:
    """As rows are copied: contiguous, and integers of one type."""
    x = x.contiguous()
    return x if x.is_floating_point() or x.dtype == torch.int64 else x.long()
