"""One BLPO update phase: epochs and minibatches over a batch of segments, on one device (paper, algorithm 1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tree
from torch import Tensor

from blpo_rllib.core.adam import adam_step
from blpo_rllib.core.curvature import CriticLoss, Curvature
from blpo_rllib.core.hypergradient import (
    Correction,
    Hypergradient,
    LeaderLoss,
    hypergradient,
    leader_gradient,
    step_weights,
)
from blpo_rllib.core.ihvp import IHVPSolver
from blpo_rllib.core.networks import ActorPass, CriticPass
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentBatch


class Players(ABC):
    """A leader and a follower with no parameter in common."""

    actor_parameters: list[Tensor]
    critic_parameters: list[Tensor]

    @abstractmethod
    def critic(self, obs: Any) -> CriticPass:
        """The critic at observations [n, ...]."""

    @abstractmethod
    def actor(self, obs: Any, actions: Any, old_dist_inputs: Tensor | None) -> ActorPass:
        """The actor at observations [n, ...]; with the KL divergence if ``old_dist_inputs`` [n, d] are given."""


@dataclass(frozen=True)
class UpdateSettings:
    """What one update phase does; ranges are checked by ``BLPOConfig.validate()``.

    Attributes:
        num_epochs: Passes over the batch, >= 1.
        num_critic_updates: N, nested critic steps per minibatch, >= 1.
        leader: The leader's objective.
        grad_clip: Largest global norm of a player's gradient; None for no clipping.
        correction: Clip and bound of the cross term.
    """

    num_epochs: int
    num_critic_updates: int
    leader: LeaderLoss
    grad_clip: float | None
    correction: Correction


# Means over the steps of a minibatch: computed on each process's share, summed over processes once per update phase.
STEP_MEANS = (
    "vf_loss_before_nesting",
    "policy_loss",
    "vf_loss_after_nesting",
    "entropy",
    "mean_kl_loss",
    "approx_kl",
    "clip_fraction",
    "_target",
    "_target_squared",
    "_residual",
)
# The same on every process.
MINIBATCH_MEANS = (
    "actor_grad_norm",
    "mixed_norm_unbounded",
    "mixed_norm",
    "hypergradient_norm",
    "mixed_grad_cosine",
    "bound_active_fraction",
)
COUNTS = ("hypergradient_fallbacks", "skipped_actor_updates", "skipped_critic_updates")


class BilevelUpdate:
    """Trains two players on batches of segments.

    Args:
        players: Actor and critic.
        actor_optimizer: Adam of ``players.actor_parameters``.
        critic_optimizer: The same for ``players.critic_parameters``.
        curvature: Class of the follower's curvature.
        solver: The inverse-Hessian-vector product; None for nested PPO, which follows g_θ alone.
        generator: Source of the segments' order and of the solver's coordinates.
        reduction: Sums over the processes that share each minibatch.
    """

    def __init__(
        self,
        players: Players,
        actor_optimizer: torch.optim.Adam,
        critic_optimizer: torch.optim.Adam,
        curvature: type[Curvature],
        solver: IHVPSolver | None,
        generator: np.random.Generator,
        reduction: Reduction,
    ):
        self._players = players
        self._actor_optimizer, self._critic_optimizer = actor_optimizer, critic_optimizer
        self._curvature, self._solver = curvature, solver
        self._generator, self._reduction = generator, reduction

    def run(self, batch: SegmentBatch, num_minibatches: int, settings: UpdateSettings) -> dict[str, float]:
        """Runs all epochs and returns the metrics, averaged over minibatches.

        Args:
            batch: M segments, ``num_minibatches`` dividing M.
            num_minibatches: Minibatches per epoch.
            settings: What to do.

        Returns:
            :data:`STEP_MEANS`, :data:`MINIBATCH_MEANS` and :data:`COUNTS` by name, the explained variance of the value
            targets, and the relative residual of the last inverse-Hessian-vector product.
        """
        size = len(batch) // num_minibatches
        targets = self._value_targets(batch, size)
        sums = torch.zeros(len(STEP_MEANS + MINIBATCH_MEANS + COUNTS), dtype=targets.dtype, device=targets.device)
        for minibatch, minibatch_targets in self._minibatches(batch, targets, size, settings.num_epochs):
            loss, result, metrics = self._minibatch_update(minibatch, minibatch_targets, settings)
            # A minibatch that was skipped for non-finite numbers is counted, and left out of the means.
            sums = sums + metrics.nan_to_num(0.0, 0.0, 0.0)
        return self._metrics(sums, settings.num_epochs * num_minibatches) | self._ihvp_residual(loss, result)

    def get_state(self) -> dict[str, Any]:
        """What the next :meth:`run` depends on besides weights and optimizers: the generator and the solver's state."""
        solver = None if self._solver is None else self._solver.get_state()
        return {"generator": self._generator.bit_generator.state, "solver": solver}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`get_state` returned."""
        self._generator.bit_generator.state = state["generator"]
        if self._solver is not None and state["solver"] is not None:
            self._solver.set_state(state["solver"])

    def _value_targets(self, batch: SegmentBatch, size: int) -> Tensor:
        """GAE + V under the critic at the start of the phase, [M, S]."""
        with torch.no_grad():
            parts = [batch.rows(i, i + size) for i in range(0, len(batch), size)]
            values = torch.cat([self._players.critic(_slots(part.obs)).values.view_as(part.step) for part in parts])
        return values + batch.advantage.advantages(batch.rewards, values)

    def _minibatches(
        self, batch: SegmentBatch, targets: Tensor, size: int, num_epochs: int
    ) -> Iterator[tuple[SegmentBatch, Tensor]]:
        for _ in range(num_epochs):
            order = torch.as_tensor(self._generator.permutation(len(batch)), device=targets.device)
            shuffled, shuffled_targets = batch.permuted(order), targets[order]
            for start in range(0, len(batch), size):
                yield shuffled.rows(start, start + size), shuffled_targets[start : start + size]

    def _minibatch_update(
        self, batch: SegmentBatch, targets: Tensor, settings: UpdateSettings
    ) -> tuple[CriticLoss, Hypergradient, Tensor]:
        weights = step_weights(batch, self._reduction)
        loss_before, critic_skips = self._nested_critic_updates(batch, targets, weights, settings)
        loss = self._critic_loss(batch, targets, weights)
        old_dist_inputs = None if settings.leader.kl_coeff is None else _slots(batch.old_dist_inputs)
        actor = self._players.actor(_slots(batch.obs), _slots(batch.actions), old_dist_inputs)
        result = self._hypergradient(actor, loss, batch, settings)
        actor_skip = self._step(self._actor_optimizer, self._players.actor_parameters, result.direction, settings)
        metrics = torch.cat(
            [
                _step_means(loss, actor, result, loss_before, settings.leader.clip),
                _minibatch_means(result),
                torch.stack([actor_skip, critic_skips]),
            ]
        )
        return loss, result, metrics

    def _critic_loss(self, batch: SegmentBatch, targets: Tensor, weights: Tensor) -> CriticLoss:
        return CriticLoss(self._players.critic(_slots(batch.obs)), targets.flatten(), weights.flatten())

    def _nested_critic_updates(
        self, batch: SegmentBatch, targets: Tensor, weights: Tensor, settings: UpdateSettings
    ) -> tuple[Tensor, Tensor]:
        """N optimizer steps on L(θ, ·); returns L before the first and how many were skipped."""
        first, skips = None, torch.zeros((), device=weights.device)
        for _ in range(settings.num_critic_updates):
            loss = self._critic_loss(batch, targets, weights)
            first = loss.value if first is None else first
            gradient = self._reduction.sum(loss.critic.vjp(loss.cotangent))
            skips = skips + self._step(self._critic_optimizer, self._players.critic_parameters, gradient, settings)
        assert first is not None
        return first, skips

    def _hypergradient(
        self, actor: ActorPass, loss: CriticLoss, batch: SegmentBatch, settings: UpdateSettings
    ) -> Hypergradient:
        if self._solver is None:
            adv = batch.advantage.advantages(batch.rewards, loss.critic.values.view_as(batch.step))
            weights = loss.weights.view_as(batch.step)
            surrogate, gradient = leader_gradient(actor, batch, adv, weights, settings.leader, self._reduction)
            none, zero = gradient.new_zeros(0), torch.zeros_like(gradient)
            return Hypergradient(adv, surrogate, gradient, none, none, zero, zero[0], gradient)
        solver, curvature = self._solver, self._curvature(loss, self._reduction)
        return hypergradient(
            actor,
            loss,
            batch,
            settings.leader,
            settings.correction,
            lambda v: solver.solve(curvature, v, self._generator),
            self._reduction,
        )

    def _step(
        self, optimizer: torch.optim.Adam, parameters: list[Tensor], gradient: Tensor, settings: UpdateSettings
    ) -> Tensor:
        """One optimizer step; a non-finite gradient leaves weights and optimizer state as they are and returns 1."""
        norm = gradient.norm()
        skip = torch.isfinite(norm).logical_not().to(torch.float32)
        if settings.grad_clip is not None:
            gradient = gradient * (settings.grad_clip / norm).clamp(max=1.0)
        adam_step(optimizer, parameters, gradient, skip)
        return skip

    def _metrics(self, sums: Tensor, num_updates: int) -> dict[str, float]:
        local = self._reduction.sum(sums[: len(STEP_MEANS)])
        values = torch.cat([local, sums[len(STEP_MEANS) :]]).tolist()
        metrics = dict(zip(STEP_MEANS + MINIBATCH_MEANS + COUNTS, values, strict=True))
        for name in STEP_MEANS + MINIBATCH_MEANS:
            metrics[name] /= num_updates
        target_variance = metrics.pop("_target_squared") - metrics.pop("_target") ** 2
        residual_variance = metrics["vf_loss_after_nesting"] - metrics.pop("_residual") ** 2
        metrics["vf_explained_var"] = 1 - residual_variance / target_variance if target_variance > 0 else float("nan")
        metrics["vf_loss"] = metrics["vf_loss_after_nesting"]
        return metrics

    def _ihvp_residual(self, loss: CriticLoss, result: Hypergradient) -> dict[str, float]:
        """‖(H + ρI) x − v‖ / ‖v‖: how well the solver solved its system, on the last minibatch only (one HVP)."""
        if self._solver is None:
            return {}
        x, v = result.ihvp, result.grad_critic
        residual = self._curvature(loss, self._reduction).matvec(x) + self._solver.damping * x - v
        return {"ihvp_relative_residual": float(residual.norm() / v.norm())}


def _slots(nested: Any) -> Any:
    """Merges the two leading axes [B, S] of every tensor."""
    return tree.map_structure(lambda x: x.flatten(0, 1), nested)


def _step_means(
    loss: CriticLoss,
    actor: ActorPass,
    result: Hypergradient,
    loss_before: Tensor,
    clip: float,
) -> Tensor:
    """The values of :data:`STEP_MEANS`."""
    ratio = result.surrogate.ratio.flatten()
    residual = loss.targets - loss.critic.values
    per_step = torch.stack(
        [
            -(result.surrogate.slope * result.adv).flatten(),
            residual.square(),
            actor.entropy,
            torch.zeros_like(ratio) if actor.kl is None else actor.kl,
            ratio - 1 - ratio.log(),
            ((ratio - 1).abs() > clip).to(ratio.dtype),
            loss.targets,
            loss.targets.square(),
            residual,
        ]
    )
    means = (per_step * loss.weights).sum(1)
    return torch.cat([loss_before[None], means])


def _minibatch_means(result: Hypergradient) -> Tensor:
    """The values of :data:`MINIBATCH_MEANS`."""
    grad_norm, unbounded = result.grad_actor.norm(), result.mixed_product.norm()
    applied = result.scale * unbounded
    cosine = (result.mixed_product @ result.grad_actor) / (unbounded * grad_norm)
    bounded = (result.scale < 1) & (result.scale > 0)
    return torch.stack(
        [
            grad_norm,
            unbounded,
            applied,
            result.direction.norm(),
            cosine.masked_fill(result.scale == 0, 0.0),
            bounded.to(applied.dtype),
            torch.isfinite(unbounded).logical_not().to(applied.dtype),
        ]
    )
