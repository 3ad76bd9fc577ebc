r"""Advantages under another critic than the present one, over whole rollouts, or standardised.

As published, the advantages of a minibatch are :math:`A (r + D V_w)` over its own segments under the present critic w.
The choices here leave that formula as it is; they change its rewards r, and the scale of A. GAE is linear in V, so over
whole rollouts

.. math::  \mathrm{adv}(w) = \mathrm{adv}(w_0) + A D\,(V_w - V_{w_0}),

where :math:`w_0` is an earlier critic, the *anchor*. adv(w₀) is computed once over whole rollouts. Only the change
since then is computed within the segment; changes of V beyond its end, which count with weight (γλ)^distance, are left
out. In the formula of the minibatch, r becomes :math:`A^{-1} \mathrm{adv}(w_0) - D V_{w_0}`. That is the reward, plus
γλ times the next step's advantage under w₀ where the rollout goes on after the segment's last step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blpo_rllib.core.gae import AdvantageOperator, FixedAdvantage, Masks
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentBatch

REFRESHES = ("minibatch", "epoch", "iteration")


@dataclass(frozen=True)
class AdvantageRule:
    """Which critic the advantages are a function of.

    Attributes:
        refresh: "minibatch": the present critic, as published. "epoch" or "iteration": the critic at the start of
            those; the hypergradient still goes by the advantages' derivative in the critic.
        standardize: Subtract their mean over the batch and divide by their deviation, both under the critic at the
            start of the epoch (of the iteration, if they are refreshed no more often) and constant in w.
    """

    refresh: str = "minibatch"
    standardize: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether advantages keep their values while the critic moves."""
        return self.refresh != "minibatch"

    def is_anchored_at(self, epoch: int, whole_rollouts: bool) -> bool:
        """Whether :func:`anchored` is due at the start of this epoch of an iteration."""
        if self.refresh == "iteration":
            return epoch == 0
        return whole_rollouts or self.standardize or self.refresh == "epoch"


@dataclass(frozen=True)
class Rollouts:
    """The uncut rollouts that a batch of segments was made of. Make it with :meth:`of`.

    Attributes:
        index: int64 [M, S]: the item of each slot in the flat batch, in which an extra item ends each episode.
        slot: int64 [n]: a slot among the M·S that holds the item, for each that some slot holds.
        advantage: D and A of the flat batch, a single row.
    """

    index: Tensor
    slot: Tensor
    advantage: AdvantageOperator

    @classmethod
    def of(
        cls,
        index: Tensor,
        step: Tensor,
        terminated: Tensor,
        num_items: int,
        operator: Callable[[Masks], AdvantageOperator],
    ) -> Rollouts:
        """From the items, of n = ``num_items``, and the steps and terminations [M, S] of all segments.

        ``operator`` makes D and A of masks.
        """
        # Where a slot is no step, its item's place is behind the last item.
        place = torch.where(step > 0, index, num_items)
        is_step, is_terminated = (_flat(place, x, num_items + 1)[:, :-1] for x in (step, terminated))
        following = torch.nn.functional.pad(is_step[:, 1:], (0, 1))
        slots = torch.arange(index.numel(), device=index.device).view_as(index)
        advantage = operator(Masks(is_step, is_terminated, is_step * following * (1 - is_terminated)))
        return cls(index, _flat(index, slots, num_items)[0], advantage)

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        """GAE over whole rollouts at each slot, [M, S], from rewards and values [M, S]."""
        flat = self.advantage.advantages(*(_flat(self.index, x, len(self.slot)) for x in (rewards, values)))
        return flat[0][self.index]


def _flat(index: Tensor, x: Tensor, size: int) -> Tensor:
    """The flat batch as one row [1, size], from the slots of ``x`` [M, S]; 0 where there is none."""
    flat = x.new_zeros(1, size)
    flat[0, index] = x
    return flat


def full_advantages(batch: SegmentBatch, values: Tensor, rollouts: Rollouts | None) -> Tensor:
    """GAE [M, S] at the critic that gives ``values``: over whole rollouts, or without them over each segment."""
    if rollouts is None:
        return batch.advantage.advantages(batch.rewards, values)
    return rollouts.advantages(batch.rewards, values) * batch.step


def anchored(
    batch: SegmentBatch, values: Tensor, adv: Tensor, rule: AdvantageRule, reduction: Reduction
) -> SegmentBatch:
    """The segments with rewards, and a scale of A, that make their advantages the function of w that ``rule`` names.

    Args:
        batch: The segments, with the environment's rewards.
        values: V [M, S] under the anchor.
        adv: :func:`full_advantages` at ``values``.
        rule: Which critic counts. With the default rule, and without whole rollouts, the advantages stay the same.
        reduction: Sums over the processes that share the batch.
    """
    operator = batch.advantage
    if rule.standardize:
        mean, deviation = _mean_and_deviation(adv, batch.step, reduction)
        adv, operator = (adv - mean) * batch.step, operator.scaled(1 / deviation)
    if rule.is_kept:
        fixed = adv / deviation if rule.standardize else adv
        return replace(batch, rewards=fixed, advantage=FixedAdvantage(operator))
    rewards = batch.advantage.inverse(adv - batch.advantage.tangent(values))
    return replace(batch, rewards=rewards, advantage=operator)


def _mean_and_deviation(x: Tensor, step: Tensor, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the steps of all processes; non-finite numbers count as 0, the deviation is >= 1e-4."""
    x = x.nan_to_num(0.0, 0.0, 0.0)
    count, total = reduction.sum(torch.stack([step.sum(), (step * x).sum()]))
    mean = total / count
    squares = reduction.sum((step * (x - mean).square()).sum())
    return mean, (squares / count).sqrt().clamp(min=1e-4)
