r"""Generalised advantage estimation as two linear maps (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

.. math::  \mathrm{adv} = A\,(r + D V), \quad (D V)_t = \gamma (1 - d_t) V_{t+1} - V_t, \quad
           (A \delta)_t = \delta_t + \gamma\lambda\, c_t\, (A \delta)_{t+1}

with :math:`d_t` = 1 where step t terminated and :math:`c_t` = 1 where step t + 1 belongs to the same piece of the same
episode. Both maps and their transposes are needed to differentiate through the advantages in closed form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class AdvantageOperator:
    r"""D, A and their transposes for a batch of segments [B, S].

    :math:`A = (I - N)^{-1}` with the shift :math:`(N x)_t = \gamma\lambda c_t x_{t+1}`, hence
    :math:`A = \prod_j (I + N^{2^j})`: the recurrence takes :math:`\lceil\log_2 S\rceil` vector operations and no loop
    over time.

    Args:
        step: [B, S], 1 where the slot is a step, else 0. Results are 0 outside steps.
        terminated: [B, S], 1 where the environment terminated after the step.
        continues: [B, S], 1 where the next slot is the next step of the same piece.
        gamma: Discount in [0, 1].
        lambda_: GAE's lambda in [0, 1].
    """

    def __init__(self, step: Tensor, terminated: Tensor, continues: Tensor, gamma: float, lambda_: float):
        self._step = step
        self._next = gamma * (1 - terminated) * step
        powers = []
        power, shift = gamma * lambda_ * continues, 1
        while shift < step.shape[1]:
            powers.append(power)
            power, shift = power * _ahead(power, shift), 2 * shift
        self._powers = torch.stack(powers, 1) if powers else step.new_zeros(len(step), 0, step.shape[1])

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> AdvantageOperator:
        """The operator of other rows: ``function`` selects along the first axis."""
        selected = object.__new__(AdvantageOperator)
        selected._step, selected._next = function(self._step), function(self._next)
        selected._powers = function(self._powers)
        return selected

    def td(self, values: Tensor) -> Tensor:
        """D V, [B, S] to [B, S]."""
        return self._next * _ahead(values, 1) - self._step * values

    def td_adjoint(self, y: Tensor) -> Tensor:
        """The transpose of :meth:`td`."""
        return _behind(self._next * y, 1) - self._step * y

    def accumulate(self, delta: Tensor) -> Tensor:
        """A δ, for δ that is 0 outside steps."""
        for j, power in enumerate(self._powers.unbind(1)):
            delta = delta + power * _ahead(delta, 1 << j)
        return delta

    def accumulate_adjoint(self, y: Tensor) -> Tensor:
        """The transpose of :meth:`accumulate`: the same recurrence, run forward in time."""
        for j, power in enumerate(self._powers.unbind(1)):
            y = y + _behind(power * y, 1 << j)
        return y

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        """GAE(w) = A (r + D V), [B, S]; 0 outside steps."""
        return self.accumulate(self._step * rewards + self.td(values))


def _ahead(x: Tensor, shift: int) -> Tensor:
    """x_{t + shift}, 0 past the end."""
    return torch.nn.functional.pad(x[:, shift:], (0, shift))


def _behind(x: Tensor, shift: int) -> Tensor:
    """x_{t - shift}, 0 before the start: the transpose of :func:`_ahead`."""
    return torch.nn.functional.pad(x[:, : x.shape[1] - shift], (shift, 0))
