r"""Generalised advantage estimation as two linear maps (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

.. math::  \mathrm{adv} = A\,(r + D V), \quad (D V)_t = \gamma (1 - d_t) V_{t+1} - V_t, \quad
           (A \delta)_t = \delta_t + \gamma\lambda\, c_t\, (A \delta)_{t+1}

with :math:`d_t` = 1 where step t terminated and :math:`c_t` = 1 where step t + 1 belongs to the same piece of the same
episode. Both maps and their transposes are needed to differentiate through the advantages in closed form.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from blpo_rllib.core.native import Kernels


class AdvantageOperator(ABC):
    """The maps D and A and their transposes for a batch of segments [B, S]; results are 0 outside steps."""

    @abstractmethod
    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        """GAE, A (r + D V) [B, S], for rewards r and values V [B, S]."""

    @abstractmethod
    def tangent(self, values: Tensor) -> Tensor:
        """A D δV [B, S]: the change of the advantages where the values change by δV = ``values`` [B, S]."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Dᵀ Aᵀ y [B, S], for y [B, S] that is 0 outside steps."""

    @abstractmethod
    def inverse(self, advantages: Tensor) -> Tensor:
        """A⁻¹ adv: the temporal differences [B, S] that give these advantages [B, S], which are 0 outside steps."""

    @abstractmethod
    def scaled(self, factor: Tensor) -> Self:
        """The operators times ``factor``, a scalar: GAE becomes ``factor`` · A (r + D V)."""

    @property
    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The tensors that the operator is made of, each [B, ...]."""

    @abstractmethod
    def of_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The operator that is made of these in place of :attr:`tensors`."""

    @property
    def structure(self) -> tuple[type, ...]:
        """Distinguishes operators that have tensors of the same shapes but apply other maps."""
        return (type(self),)

    def permuted(self, order: Tensor) -> Self:
        """The operators of these segments in another order (int64)."""
        return self.of_tensors([x[order] for x in self.tensors])

    def to(self, dtype: torch.dtype) -> Self:
        """The operators in another precision."""
        return self.of_tensors([x.to(dtype) for x in self.tensors])

    def split(self, size: int) -> list[Self]:
        """The operators of consecutive batches of ``size`` segments each."""
        return [self.of_tensors(part) for part in zip(*(x.split(size) for x in self.tensors), strict=True)]


@dataclass(frozen=True)
class Masks:
    """What determines D and A of a batch of segments, [B, S] each.

    Attributes:
        step: 1 where the slot is a step, else 0.
        terminated: 1 where the environment terminated after the step.
        continues: 1 where the next slot is the next step of the same piece.
    """

    step: Tensor
    terminated: Tensor
    continues: Tensor

    def next(self, gamma: float) -> Tensor:
        """What D multiplies V_{t+1} by: γ (1 − d)."""
        return gamma * (1 - self.terminated) * self.step


@dataclass(frozen=True)
class BlockwiseAdvantage(AdvantageOperator):
    r"""The operators as products with matrices, for any device.

    Unrolled, :math:`A_{ij} = (\gamma\lambda)^{j-i}` for :math:`j \ge i` in the same piece, else 0. A is applied in
    blocks of about :math:`\sqrt S` slots: one product sums within all blocks, one sums over their first slots, and one
    carries those sums back into the blocks before. That takes no loop over time and O(S^{3/2}) numbers. Make it with
    :meth:`of`.
    """

    _step: Tensor
    _next: Tensor
    _decay: Tensor
    _within: Tensor
    _across: Tensor
    _carry: Tensor

    @classmethod
    def of(cls, masks: Masks, gamma: float, lambda_: float) -> BlockwiseAdvantage:
        """The operators of given segments, with discount ``gamma`` and GAE's ``lambda_`` in [0, 1]."""
        step = masks.step
        num_segments, width = step.shape
        block = math.isqrt(width - 1) + 1
        num_blocks = -(-width // block)
        # Slots of one piece share a number.
        breaks = 1 - torch.nn.functional.pad(masks.continues, (0, num_blocks * block - width))
        piece = (breaks.cumsum(1) - breaks).view(num_segments, num_blocks, block)
        first = piece[:, :, 0]
        following = torch.nn.functional.pad(first[:, 1:], (0, 1), value=-1)

        decay = torch.full((), gamma * lambda_, dtype=step.dtype, device=step.device)
        return cls(
            _step=step,
            _next=masks.next(gamma),
            _decay=decay * masks.continues,
            _within=_powers(decay, block) * (piece[..., None] == piece[..., None, :]),
            _across=_powers(decay**block, num_blocks) * (first[..., None] == first[..., None, :]),
            _carry=decay ** torch.arange(block, 0, -1, device=step.device) * (piece == following[..., None]),
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def of_tensors(self, tensors: Sequence[Tensor]) -> BlockwiseAdvantage:
        return BlockwiseAdvantage(*tensors)

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        return self._accumulate(self._step * rewards + self._td(values))

    def tangent(self, values: Tensor) -> Tensor:
        return self._accumulate(self._td(values))

    def adjoint(self, y: Tensor) -> Tensor:
        z = self._accumulate_adjoint(y)
        return _behind(self._next * z) - self._step * z

    def inverse(self, advantages: Tensor) -> Tensor:
        return advantages - self._decay * _ahead(advantages)

    def scaled(self, factor: Tensor) -> BlockwiseAdvantage:
        return replace(self, _step=factor * self._step, _next=factor * self._next)

    def _td(self, values: Tensor) -> Tensor:
        """D V."""
        return self._next * _ahead(values) - self._step * values

    def _accumulate(self, delta: Tensor) -> Tensor:
        """A δ, for δ that is 0 outside steps."""
        local = (self._within @ self._blocks(delta))[..., 0]
        starts = (self._across @ local[:, :, :1])[..., 0]
        return self._slots(local + self._carry * _ahead(starts)[..., None], delta)

    def _accumulate_adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        blocks = self._blocks(y)[..., 0]
        starts = _behind((self._carry * blocks).sum(-1))
        first = blocks[:, :, :1] + self._across.mT @ starts[..., None]
        blocks = torch.cat([first, blocks[:, :, 1:]], -1)
        return self._slots((self._within.mT @ blocks[..., None])[..., 0], y)

    def _blocks(self, x: Tensor) -> Tensor:
        """[B, S] to [B, number of blocks, block, 1]."""
        num_segments, num_blocks, block = self._carry.shape
        return torch.nn.functional.pad(x, (0, num_blocks * block - x.shape[1])).view(num_segments, num_blocks, block, 1)

    def _slots(self, blocks: Tensor, like: Tensor) -> Tensor:
        return blocks.flatten(1)[:, : like.shape[1]]


@dataclass(frozen=True)
class RecurrentAdvantage(AdvantageOperator):
    """The operators as recurrences over time, in compiled kernels, on the CPU. Make it with :meth:`of`."""

    _kernels: Kernels
    _step: Tensor
    _next: Tensor
    _decay: Tensor

    @classmethod
    def of(cls, masks: Masks, gamma: float, lambda_: float, kernels: Kernels) -> RecurrentAdvantage:
        """The operators of given segments, with discount ``gamma`` and GAE's ``lambda_`` in [0, 1]."""
        decay = gamma * lambda_ * masks.continues
        return cls(kernels, *(x.contiguous() for x in (masks.step, masks.next(gamma), decay)))

    @property
    def tensors(self) -> list[Tensor]:
        return [self._step, self._next, self._decay]

    def of_tensors(self, tensors: Sequence[Tensor]) -> RecurrentAdvantage:
        return RecurrentAdvantage(self._kernels, *tensors)

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        return self._run("advantages", rewards, values)

    def tangent(self, values: Tensor) -> Tensor:
        return self._run("advantages", None, values)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._run("adjoint", y)

    def inverse(self, advantages: Tensor) -> Tensor:
        return advantages - self._decay * _ahead(advantages)

    def scaled(self, factor: Tensor) -> RecurrentAdvantage:
        return replace(self, _step=factor * self._step, _next=factor * self._next)

    def _run(self, name: str, *inputs: Tensor | None) -> Tensor:
        out = torch.empty_like(self._step)
        arrays = (None if x is None else x.contiguous() for x in (*inputs, *self.tensors))
        self._kernels(name, out.dtype, *arrays, *out.shape, out)
        return out


@dataclass(frozen=True)
class FixedAdvantage(AdvantageOperator):
    """Advantages that keep the values they had under an earlier critic, with the derivatives of ``_operator`` in w.

    They are passed in place of the rewards: ``advantages(adv, values)`` is adv.
    """

    _operator: AdvantageOperator

    @property
    def tensors(self) -> list[Tensor]:
        return self._operator.tensors

    def of_tensors(self, tensors: Sequence[Tensor]) -> FixedAdvantage:
        return FixedAdvantage(self._operator.of_tensors(tensors))

    @property
    def structure(self) -> tuple[type, ...]:
        return (FixedAdvantage, *self._operator.structure)

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        return rewards

    def tangent(self, values: Tensor) -> Tensor:
        return self._operator.tangent(values)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._operator.adjoint(y)

    def inverse(self, advantages: Tensor) -> Tensor:
        return self._operator.inverse(advantages)

    def scaled(self, factor: Tensor) -> FixedAdvantage:
        return FixedAdvantage(self._operator.scaled(factor))


@dataclass(frozen=True)
class ConstantAdvantage(AdvantageOperator):
    """Advantages that do not depend on the critic at all, passed in place of the rewards, of these steps [B, S]."""

    _step: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [self._step]

    def of_tensors(self, tensors: Sequence[Tensor]) -> ConstantAdvantage:
        return ConstantAdvantage(*tensors)

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        return rewards

    def tangent(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values)

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    def inverse(self, advantages: Tensor) -> Tensor:
        return advantages

    def scaled(self, factor: Tensor) -> ConstantAdvantage:
        return self


def advantage_operator(masks: Masks, gamma: float, lambda_: float, kernels: Kernels | None) -> AdvantageOperator:
    """The operators of given segments, by ``kernels`` where there are any."""
    if kernels is None:
        return BlockwiseAdvantage.of(masks, gamma, lambda_)
    return RecurrentAdvantage.of(masks, gamma, lambda_, kernels)


def _powers(base: Tensor, size: int) -> Tensor:
    """The upper triangle of base^(j − i), [size, size]."""
    exponent = torch.arange(size, device=base.device) - torch.arange(size, device=base.device)[:, None]
    return (base ** exponent.clamp(min=0)).triu()


def _ahead(x: Tensor) -> Tensor:
    """x_{t + 1}, 0 past the end."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1))


def _behind(x: Tensor) -> Tensor:
    """x_{t − 1}, 0 before the start: the transpose of :func:`_ahead`."""
    return torch.nn.functional.pad(x[:, :-1], (1, 0))
