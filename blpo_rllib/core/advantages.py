r"""What the leader's advantages are a function of: the critic now or earlier, on segments or on whole rollouts.

Inside a minibatch the advantages are :math:`A (r + D V_w)` over its own segments, whatever stands here: other choices
only change r, and the scale of A. GAE is linear in V, so over whole rollouts

.. math::  \mathrm{adv}(w) = \mathrm{adv}(w_0) + A D\,(V_w - V_{w_0}),

where :math:`w_0` is an earlier critic, the *anchor*. adv(w₀) is computed once over whole rollouts, and only the change
since then ends where the segment does: what lies beyond is left out of it, with its weight of (γλ)^distance. In the
minibatch's terms r is :math:`A^{-1} \mathrm{adv}(w_0) - D V_{w_0}`: the reward, plus γλ·adv of the next step under w₀
where the rollout goes on behind the segment's last step.
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

    def is_anchored_at(self, epoch: int, whole_rollouts: bool) -> bool:
        """Whether :func:`anchored` is due at the start of this epoch of an iteration."""
        if self.refresh == "iteration":
            return epoch == 0
        return whole_rollouts or self.standardize or self.refresh == "epoch"


@dataclass(frozen=True)
class Rollouts:
    """The uncut rollouts that a batch of segments was made of. Make it with :meth:`of`.

    Attributes:
        index: int64 [M, S]: the item of each slot in the flat batch, where each episode ends in one item more.
        advantage: D and A of the flat batch, a single row.
    """

    index: Tensor
    advantage: AdvantageOperator

    @classmethod
    def of(
        cls, index: Tensor, step: Tensor, terminated: Tensor, operator: Callable[[Masks], AdvantageOperator]
    ) -> Rollouts:
        """From the items, steps and terminations [M, S] of all segments; ``operator`` makes D and A of masks."""
        is_step, is_terminated = (_flat(index, x, step > 0) for x in (step, terminated))
        following = torch.nn.functional.pad(is_step[:, 1:], (0, 1))
        return cls(index, operator(Masks(is_step, is_terminated, is_step * following * (1 - is_terminated))))

    def advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        """GAE over whole rollouts at each slot, [M, S], from rewards and values [M, S]."""
        every = torch.ones_like(self.index, dtype=torch.bool)
        flat = self.advantage.advantages(_flat(self.index, rewards, every), _flat(self.index, values, every))
        return flat[0][self.index]


def _flat(index: Tensor, x: Tensor, where: Tensor) -> Tensor:
    """The flat batch as one row [1, n], from the slots of ``x`` [M, S] that are True in ``where``; else 0."""
    flat = x.new_zeros(1, int(index.max()) + 2)
    flat[0, index[where]] = x[where]
    return flat


def full_advantages(batch: SegmentBatch, values: Tensor, rollouts: Rollouts | None) -> Tensor:
    """GAE [M, S] at the critic that gives ``values``: over whole rollouts, or without them over each segment."""
    if rollouts is None:
        return batch.advantage.advantages(batch.rewards, values)
    return rollouts.advantages(batch.rewards, values) * batch.step


def anchored(
    batch: SegmentBatch, values: Tensor, adv: Tensor, rule: AdvantageRule, reduction: Reduction
) -> SegmentBatch:
    """The segments with rewards under which their advantages are a function of the critic as ``rule`` says.

    Args:
        batch: The segments, with the environment's rewards.
        values: V [M, S] under the anchor.
        adv: :func:`full_advantages` at ``values``.
        rule: Which critic counts; one that is neither fixed nor standardised, on segments alone, changes nothing.
        reduction: Sums over the processes that share the batch.
    """
    operator = batch.advantage
    if rule.standardize:
        mean, deviation = _mean_and_deviation(adv, batch.step, reduction)
        adv, operator = (adv - mean) * batch.step, operator.scaled(1 / deviation)
    if rule.refresh != "minibatch":
        fixed = adv / deviation if rule.standardize else adv
        return replace(batch, rewards=fixed, advantage=FixedAdvantage(operator))
    rewards = batch.advantage.inverse(adv - batch.advantage.tangent(values))
    return replace(batch, rewards=rewards, advantage=operator)


def _mean_and_deviation(x: Tensor, step: Tensor, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Over the steps of all processes; numbers that are not finite count as 0, a deviation below 1e-4 as that."""
    x = x.nan_to_num(0.0, 0.0, 0.0)
    count, total = reduction.sum(torch.stack([step.sum(), (step * x).sum()]))
    mean = total / count
    squares = reduction.sum((step * (x - mean).square()).sum())
    return mean, (squares / count).sqrt().clamp(min=1e-4)
