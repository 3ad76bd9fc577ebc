r"""Generalised advantage estimation as two linear maps (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

.. math::  \mathrm{adv} = A\,(r + D V), \quad (D V)_t = \gamma (1 - d_t) V_{t+1} - V_t, \quad
           (A \delta)_t = \delta_t + \gamma\lambda\, c_t\, (A \delta)_{t+1}

with :math:`d_t` = 1 where step t terminated and :math:`c_t` = 1 where step t + 1 belongs to the same piece of the same
episode. Both maps and their transposes are needed to differentiate through the advantages in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdvantageOperator:
    r"""D, A and their transposes for a batch of segments [B, S]; results are 0 outside steps.

    Unrolled, :math:`A_{ij} = (\gamma\lambda)^{j-i}` for :math:`j \ge i` in the same piece, else 0. A is applied in
    blocks of about :math:`\sqrt S` slots: one product within all blocks, one across their first slots, one to carry
    those back into the blocks before them. No loop over time, O(S^{3/2}) numbers. Make it with :meth:`of`.
    """

    _step: Tensor
    _next: Tensor
    _within: Tensor
    _across: Tensor
    _carry: Tensor

    @classmethod
    def of(cls, step: Tensor, terminated: Tensor, continues: Tensor, gamma: float, lambda_: float) -> AdvantageOperator:
        """The operators of given segments.

        Args:
            step: [B, S], 1 where the slot is a step, else 0.
            terminated: [B, S], 1 where the environment terminated after the step.
            continues: [B, S], 1 where the next slot is the next step of the same piece.
            gamma: Discount in [0, 1].
            lambda_: GAE's lambda in [0, 1].
        """
        num_segments, width = step.shape
        block = math.isqrt(width - 1) + 1
        num_blocks = -(-width // block)
        # Slots of one piece share a number.
        breaks = 1 - torch.nn.functional.pad(continues, (0, num_blocks * block - width))
        piece = (breaks.cumsum(1) - breaks).view(num_segments, num_blocks, block)
        first = piece[:, :, 0]
        following = torch.nn.functional.pad(first[:, 1:], (0, 1), value=-1)

        decay = torch.as_tensor(gamma * lambda_, dtype=step.dtype, device=step.device)
        return cls(
            _step=step,
            _next=gamma * (1 - terminated) * step,
            _within=_powers(decay, block) * (piece[..., None] == piece[..., None, :]),
            _across=_powers(decay**block, num_blocks) * (first[..., None] == first[..., None, :]),
            _carry=decay ** torch.arange(block, 0, -1, device=step.device) * (piece == following[..., None]),
        )

    @property
    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def permuted(self, order: Tensor) -> AdvantageOperator:
        """The operators of these segments in another order (int64)."""
        return AdvantageOperator(*(x[order] for x in self._tensors))

    def split(self, size: int) -> list[AdvantageOperator]:
        """The operators of consecutive batches of ``size`` segments each."""
        return [AdvantageOperator(*part) for part in zip(*(x.split(size) for x in self._tensors), strict=True)]

    def td(self, values: Tensor) -> Tensor:
        """D V, [B, S] to [B, S]."""
        return self._next * _ahead(values) - self._step * values

    def td_adjoint(self, y: Tensor) -> Tensor:
        """Dᵀ y, [B, S] to [B, S]."""
        return _behind(self._next * y) - self._step * y

    def accumulate(self, delta: Tensor) -> Tensor:
        """A δ, [B, S] to [B, S], for δ that is 0 outside steps."""
        local = (self._within @ self._blocks(delta))[..., 0]
        starts = (self._across @ local[:, :, :1])[..., 0]
        return self._slots(local + self._carry * _ahead(starts)[..., None], delta)

    def accumulate_adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y, [B, S] to [B, S]."""
        blocks = self._blocks(y)[..., 0]
        starts = _behind((self._carry * blocks).sum(-1))
        first = blocks[:, :, :1] + self._across.mT @ starts[..., None]
        blocks = torch.cat([first, blocks[:, :, 1:]], -1)
        return self._slots((self._within.mT @ blocks[..., None])[..., 0], y)

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        """GAE(w) = A (r + D V), [B, S]; 0 outside steps."""
        return self.accumulate(self._step * rewards + self.td(values))

    def _blocks(self, x: Tensor) -> Tensor:
        """[B, S] to [B, number of blocks, block, 1]."""
        num_segments, num_blocks, block = self._carry.shape
        return torch.nn.functional.pad(x, (0, num_blocks * block - x.shape[1])).view(num_segments, num_blocks, block, 1)

    def _slots(self, blocks: Tensor, like: Tensor) -> Tensor:
        return blocks.flatten(1)[:, : like.shape[1]]


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
