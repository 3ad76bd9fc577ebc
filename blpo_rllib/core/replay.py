"""Takes players through minibatches by replaying recordings of them: see :mod:`blpo_rllib.core.recording`."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blpo_rllib.core.adam import AdamSteps
from blpo_rllib.core.lowering import CannotRecordError
from blpo_rllib.core.minibatch import (
    Counts,
    Epoch,
    MinibatchMeans,
    MinibatchMetrics,
    MinibatchResult,
    MinibatchUpdate,
    StepMeans,
    UpdateSettings,
)
from blpo_rllib.core.native import Kernels
from blpo_rllib.core.networks import Coordinates
from blpo_rllib.core.players import Minibatch
from blpo_rllib.core.recording import Call, Recorder
from blpo_rllib.core.segments import SegmentBatch

# Recordings kept: one for each shape of minibatch and each setting met lately.
MAX_PLANS = 16


class ReplayedUpdate:
    """Takes the players through epochs by replaying what one minibatch of each shape did.

    Args:
        update: What is recorded.
        adams: The optimizers' steps, whose memory ``update`` changes.
        kernels: The compiled functions.
    """

    def __init__(self, update: MinibatchUpdate, adams: Sequence[AdamSteps], kernels: Kernels):
        self._update, self._adams, self._kernels = update, adams, kernels
        self._plans: OrderedDict[Any, _Plan] = OrderedDict()
        self._source: tuple[SegmentBatch, Tensor, list[Tensor]] | None = None
        self._latest: tuple[MinibatchResult, _Plan] | None = None

    def __call__(self, epoch: Epoch) -> MinibatchResult:
        """Updates the players by all minibatches of an epoch; see :class:`MinibatchUpdate`.

        Returns:
            What the last one reports, with the sum of all metrics; its other tensors are overwritten by the next call.

        Raises:
            CannotRecordError: If some operation cannot be recorded; nothing has changed then.
        """
        segments, rows = self._segments(epoch), _by_minibatch(epoch)
        memory = [x for adam in self._adams for x in adam.memory]
        shapes = tuple(x.shape[1:] for x in (*segments, *rows)), epoch.batch.advantage.structure
        key = shapes, epoch.shared is None, _kind(epoch.settings), tuple(x.data_ptr() for x in memory)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = _Plan(self._update, epoch, segments, rows, memory, self._kernels)
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        result = plan.run(epoch, [*segments, *rows])
        self._latest = result, plan
        return result

    def relative_residual(self, result: MinibatchResult) -> Tensor | None:
        """:meth:`MinibatchUpdate.relative_residual` of the minibatch that was replayed last, overwritten by the next.

        None if ``result`` is not what the latest call returned, or where that minibatch has no solver of its own, or
        one that cannot be recorded.
        """
        if self._latest is None or self._latest[0] is not result:
            return None
        return self._latest[1].relative_residual()

    def _segments(self, epoch: Epoch) -> list[Tensor]:
        """All that a batch consists of, in the form in which rows are copied: contiguous, integers of one type."""
        batch, targets = epoch.batch, epoch.targets
        if self._source is None or self._source[0] is not batch or self._source[1] is not targets:
            self._source = batch, targets, [_plain(x) for x in (*batch.rows(), targets)]
        return self._source[2]


class _Plan:
    """The recording of one minibatch, which begins by copying its own rows of all arrays.

    Args:
        update: What is recorded.
        epoch: Its first minibatch is recorded; the players are afterwards as before.
        segments: The arrays from which each minibatch takes several rows.
        by_minibatch: Those from which it takes one: which rows that are, and what else :func:`_by_minibatch` says.
        memory: What the update changes.
        kernels: The compiled functions.
    """

    def __init__(
        self,
        update: MinibatchUpdate,
        epoch: Epoch,
        segments: Sequence[Tensor],
        by_minibatch: Sequence[Tensor],
        memory: Sequence[Tensor],
        kernels: Kernels,
    ):
        rows, num_steps, *drawn = (x[0].clone() for x in by_minibatch)
        own_coordinates = Coordinates(drawn[0], drawn[1] if len(drawn) > 1 else None) if drawn else None
        *own, targets = (x[rows] for x in segments)
        inputs = [*own, targets, rows, num_steps, *drawn]
        # Where the arrays stand, which are others in each epoch.
        self._sources = (ctypes.c_void_p * len(inputs))()
        leader = epoch.settings.leader
        # What is the same in all minibatches of an epoch, but not in all epochs.
        self._coefficients = {name: torch.tensor(float(x)).to(targets) for name, x in leader.coefficients.items()}
        self._shared = None if epoch.shared is None else epoch.shared.copy_of_correction()
        same = [*self._coefficients.values(), *(() if self._shared is None else self._shared.correction)]
        self._sums = MinibatchMetrics(*(targets.new_zeros(len(x._fields)) for x in (StepMeans, MinibatchMeans, Counts)))

        recorder = Recorder(kernels, targets.dtype, inputs, [*memory, *same, *_tensors(self._sums)])
        saved = [x.clone() for x in memory]
        try:
            with torch.no_grad(), recorder:
                minibatch = Minibatch.of(epoch.batch.with_rows(own), targets, num_steps)
                result = update(
                    minibatch,
                    own_coordinates,
                    replace(epoch.settings, leader=leader.with_coefficients(self._coefficients)),
                    self._shared,
                )
                for total, x in zip(_tensors(self._sums), _tensors(result.metrics), strict=True):
                    total.add_(x)
                recorder.end_repetition()
                residual = None
                # x is empty without a solver, and shared x is none of this minibatch.
                if epoch.shared is None and result.ihvp.numel():
                    with suppress(CannotRecordError):
                        residual = update.relative_residual(minibatch, result)
        finally:
            for x, before in zip(memory, saved, strict=True):
                x.copy_(before)
        filling = []
        for place, x in enumerate(inputs):
            source = ctypes.addressof(self._sources) + place * ctypes.sizeof(ctypes.c_void_p)
            index = (rows, len(rows)) if place < len(segments) else (recorder.round, 1)
            filling.append(Call("take_rows", (x, source, *index, x.nbytes // index[1])))
        outputs = [result.grad_critic, result.ihvp] + ([] if residual is None else [residual])
        self._replay = recorder.finish(outputs, filling)

    def run(self, epoch: Epoch, arrays: Sequence[Tensor]) -> MinibatchResult:
        """Replays it for all minibatches of an epoch, which consists of ``arrays``."""
        self._sources[:] = [x.data_ptr() for x in arrays]
        for name, coefficient in self._coefficients.items():
            coefficient.fill_(epoch.settings.leader.coefficients[name])
        if self._shared is not None and epoch.shared is not None:
            for own, x in zip(self._shared.correction, epoch.shared.correction, strict=True):
                own.copy_(x)
        for total in _tensors(self._sums):
            total.zero_()
        self._replay.run(len(epoch))
        sums = MinibatchMetrics(*(x.clone() for x in _tensors(self._sums)))
        return MinibatchResult(sums, *self._replay.outputs[:2])

    def relative_residual(self) -> Tensor | None:
        """That of the minibatch which ran last; None if it is not recorded."""
        if len(self._replay.outputs) < 3:
            return None
        self._replay.run_rest()
        return self._replay.outputs[2]


def _by_minibatch(epoch: Epoch) -> list[Tensor]:
    """What differs between minibatches, [number of minibatches, ...]: rows, numbers of steps, coordinates if any."""
    own = [epoch.rows.contiguous(), epoch.num_steps.contiguous()]
    if epoch.coordinates:
        own.append(torch.stack([x.index for x in epoch.coordinates]))
    if places := [x.places for x in epoch.coordinates if x.places is not None]:
        own.append(torch.stack(places))
    return own


def _kind(settings: UpdateSettings) -> UpdateSettings:
    """All that a recording holds of them: not the values of coefficients."""
    leader = settings.leader
    return replace(settings, leader=leader.with_coefficients(dict.fromkeys(leader.coefficients, 0.0)))


def _tensors(metrics: MinibatchMetrics) -> list[Tensor]:
    return [metrics.step_means, metrics.minibatch_means, metrics.counts]


def _plain(x: Tensor) -> Tensor:
    """As rows are copied: contiguous, and integers of one type."""
    x = x.contiguous()
    return x if x.is_floating_point() or x.dtype == torch.int64 else x.long()
