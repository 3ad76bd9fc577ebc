"""One minibatch of BLPO (paper, algorithm 1): nested critic steps, hypergradient, actor step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tree
from torch import Tensor

from blpo_rllib.core.adam import AdamSteps
from blpo_rllib.core.curvature import CriticLoss, Curvature
from blpo_rllib.core.hypergradient import (
    Correction,
    Hypergradient,
    LeaderLoss,
    hypergradient,
    leader_gradient,
)
from blpo_rllib.core.ihvp import IHVPSolver
from blpo_rllib.core.networks import ActorPass, Coordinates, CriticPass
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

    def columns(self, indices: np.ndarray) -> Coordinates:
        """Coordinates of the critic's flat vector, int64 [k], in the form in which its passes take them."""
        return Coordinates.of(indices, self.critic_parameters[0].device)


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


@dataclass(frozen=True)
class Minibatch:
    """B segments of S slots, n = B·S slots in all.

    Attributes:
        segments: The segments [B, S, ...].
        targets: Value targets [B, S].
        weights: m [B, S]: 1 over the number of steps in the minibatch, on all processes, on steps; 0 elsewhere.
        obs: Observations slot by slot, [n, ...].
        actions: Actions slot by slot, [n, ...].
        old_dist_inputs: Inputs of the old policy's distribution slot by slot, [n, d].
    """

    segments: SegmentBatch
    targets: Tensor
    weights: Tensor
    obs: Any
    actions: Any
    old_dist_inputs: Tensor

    @classmethod
    def of(cls, segments: SegmentBatch, targets: Tensor, num_steps: Tensor) -> Minibatch:
        """The minibatch made of these segments; ``num_steps`` (a scalar) counts those of all processes."""
        weights = segments.step / num_steps
        return cls(
            segments, targets, weights, slots(segments.obs), slots(segments.actions), slots(segments.old_dist_inputs)
        )


def slots(nested: Any) -> Any:
    """Merges the two leading axes [B, S] of every tensor."""
    if isinstance(nested, Tensor):
        return nested.flatten(0, 1)
    return tree.map_structure(slots, nested)


class MinibatchUpdate:
    """Takes the players through one minibatch.

    Args:
        players: Actor and critic.
        actor_adam: Steps of the actor's optimizer.
        critic_adam: Steps of the critic's optimizer.
        curvature: Class of the follower's curvature.
        solver: The inverse-Hessian-vector product; None for nested PPO, which follows g_θ alone.
        reduction: Sums over the processes that share the minibatch.
    """

    def __init__(
        self,
        players: Players,
        actor_adam: AdamSteps,
        critic_adam: AdamSteps,
        curvature: type[Curvature],
        solver: IHVPSolver | None,
        reduction: Reduction,
    ):
        self._players, self._actor_adam, self._critic_adam = players, actor_adam, critic_adam
        self._curvature, self._solver, self._reduction = curvature, solver, reduction

    def __call__(
        self, batch: Minibatch, columns: Coordinates | None, settings: UpdateSettings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Updates the players in place.

        Args:
            batch: The minibatch.
            columns: The coordinates that the solver drew, if it draws any.
            settings: What to do.

        Returns:
            The values of :data:`STEP_MEANS`, :data:`MINIBATCH_MEANS` and :data:`COUNTS`; v and x.
        """
        loss_before, critic_skips = self._nested_critic_updates(batch, settings)
        loss = self.critic_loss(batch)
        old_dist_inputs = None if settings.leader.kl_coeff is None else batch.old_dist_inputs
        actor = self._players.actor(batch.obs, batch.actions, old_dist_inputs)
        result = self._hypergradient(actor, loss, batch.segments, columns, settings)
        actor_skip = self._actor_adam.step(result.direction, settings.grad_clip)
        metrics = torch.cat(
            [
                _step_means(loss, actor, result, loss_before, settings.leader.clip),
                _minibatch_means(result),
                torch.stack([actor_skip, critic_skips]),
            ]
        )
        # A minibatch that was skipped for non-finite numbers is counted, and left out of the means.
        return metrics.nan_to_num(0.0, 0.0, 0.0), result.grad_critic, result.ihvp

    def critic_loss(self, batch: Minibatch) -> CriticLoss:
        """The follower's objective at the present w."""
        return CriticLoss(self._players.critic(batch.obs), batch.targets.flatten(), batch.weights.flatten())

    def _nested_critic_updates(self, batch: Minibatch, settings: UpdateSettings) -> tuple[Tensor, Tensor]:
        """N optimizer steps on L(θ, ·); returns L before the first and how many were skipped."""
        first, skips = None, torch.zeros((), device=batch.weights.device)
        for _ in range(settings.num_critic_updates):
            loss = self.critic_loss(batch)
            first = loss.value if first is None else first
            gradient = self._reduction.sum(loss.critic.gradient(loss.cotangent))
            skips = skips + self._critic_adam.step(gradient, settings.grad_clip)
        assert first is not None
        return first, skips

    def _hypergradient(
        self,
        actor: ActorPass,
        loss: CriticLoss,
        segments: SegmentBatch,
        columns: Coordinates | None,
        settings: UpdateSettings,
    ) -> Hypergradient:
        if self._solver is None:
            adv = segments.advantage.advantages(segments.rewards, loss.critic.values.view_as(segments.step))
            weights = loss.weights.view_as(segments.step)
            surrogate, own_gradient = leader_gradient(actor, segments, adv, weights, settings.leader)
            gradient = self._reduction.sum(own_gradient)
            none, zero = gradient.new_zeros(0), torch.zeros_like(gradient)
            norm = torch.linalg.vector_norm(gradient)
            return Hypergradient(adv, surrogate, gradient, none, none, zero, zero[0], norm, zero[0], gradient)
        return hypergradient(
            actor,
            loss,
            segments,
            settings.leader,
            settings.correction,
            self._solver,
            self._curvature(loss, self._reduction),
            columns,
            self._reduction,
        )


def _step_means(
    loss: CriticLoss,
    actor: ActorPass,
    result: Hypergradient,
    loss_before: Tensor,
    clip: float,
) -> Tensor:
    """The values of :data:`STEP_MEANS`."""
    surrogate, residual = result.surrogate, loss.targets - loss.critic.values
    ratio = surrogate.ratio.flatten()
    change = ratio - 1
    per_step = torch.stack(
        [
            (surrogate.slope * result.adv).flatten().neg(),
            residual.square(),
            actor.entropy,
            torch.zeros_like(ratio) if actor.kl is None else actor.kl,
            change - surrogate.log_ratio.flatten(),
            change.abs() > clip,
            residual,
        ]
    )
    return torch.cat([loss_before[None], per_step @ loss.weights])


def _minibatch_means(result: Hypergradient) -> Tensor:
    """The values of :data:`MINIBATCH_MEANS`, and of the first of :data:`COUNTS`."""
    scale, unbounded = result.scale, result.mixed_norm
    cosine = (result.mixed_product @ result.grad_actor) / (unbounded * result.actor_norm)
    return torch.stack(
        [
            result.actor_norm,
            unbounded,
            scale * unbounded,
            torch.linalg.vector_norm(result.direction),
            torch.where(scale > 0, cosine, 0.0),
            (scale < 1) & (scale > 0),
            ~torch.isfinite(unbounded),
        ]
    )
