"""One minibatch of BLPO (paper, algorithm 1): nested critic steps, hypergradient, actor step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blpo_rllib.core.adam import AdamSteps
from blpo_rllib.core.added_losses import AddedCurvature, AddedLosses, AddedTerms
from blpo_rllib.core.advantages import AdvantageRule
from blpo_rllib.core.curvature import CriticLoss, Curvature
from blpo_rllib.core.hypergradient import Correction, Hypergradient, LeaderLoss, hypergradient
from blpo_rllib.core.ihvp import IHVPSolver
from blpo_rllib.core.networks import ActorPass, Coordinates
from blpo_rllib.core.players import Minibatch, Players
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentBatch


@dataclass(frozen=True)
class UpdateSettings:
    """What one update phase does; ranges are checked by ``BLPOConfig.validate()``.

    Attributes:
        num_epochs: Passes over the batch, >= 1.
        num_critic_updates: N, nested critic steps per minibatch, >= 1.
        leader: The leader's objective.
        grad_clip: Largest global norm of a player's gradient; None for no clipping.
        correction: Clip, bound and sample of the cross term.
        advantages: Which critic the advantages are a function of.
        max_kl: The KL divergence from the old policy, averaged over an epoch, at which that is the last; None for none.
        target_kl: What the actor's learning rate is steered to, as an average over the update phase; None for a rate
            that follows its schedule alone.
    """

    num_epochs: int
    num_critic_updates: int
    leader: LeaderLoss
    grad_clip: float | None
    correction: Correction
    advantages: AdvantageRule = AdvantageRule()
    max_kl: float | None = None
    target_kl: float | None = None


class StepMeans(NamedTuple):
    """Means over the steps of a minibatch.

    Every field is one number per slot, [n]. The mean is their sum weighted by m; each process has the terms of its own
    steps, which are summed over processes once per update phase.

    Attributes:
        vf_loss_before_nesting: (y − V)² before the first nested step.
        policy_loss: −s, the surrogate's loss without its penalties.
        vf_loss_after_nesting: (y − V)² after the last nested step, as all that follows.
        vf_residual: y − V.
        entropy: Entropy of π(·|s).
        mean_kl_loss: KL(π_old(·|s) ‖ π(·|s)); 0 where no penalty asks for it.
        approx_kl: r − 1 − log r, an estimate of KL(π_old ‖ π) that is never negative.
        clip_fraction: 1 where |r − 1| exceeds the clip width ε.
    """

    vf_loss_before_nesting: Tensor
    policy_loss: Tensor
    vf_loss_after_nesting: Tensor
    vf_residual: Tensor
    entropy: Tensor
    mean_kl_loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


class MinibatchMeans(NamedTuple):
    """Scalars of a whole minibatch, the same on every process; their means over minibatches are reported.

    Attributes:
        actor_grad_norm: ‖g_θ‖.
        mixed_norm_unbounded: ‖∇²_θw L · x‖.
        mixed_norm: The norm of the correction applied.
        hypergradient_norm: The norm of g_θ − the correction.
        mixed_grad_cosine: The cosine of ∇²_θw L · x and g_θ.
        bound_active_fraction: 1 where the bound scales the correction down.
    """

    actor_grad_norm: Tensor
    mixed_norm_unbounded: Tensor
    mixed_norm: Tensor
    hypergradient_norm: Tensor
    mixed_grad_cosine: Tensor
    bound_active_fraction: Tensor


class Counts(NamedTuple):
    """How often non-finite numbers were left out, the same on every process.

    Attributes:
        hypergradient_fallbacks: Minibatches whose correction was left out.
        skipped_actor_updates: The actor's steps that were left out.
        skipped_critic_updates: The critic's nested steps that were left out.
    """

    hypergradient_fallbacks: Tensor
    skipped_actor_updates: Tensor
    skipped_critic_updates: Tensor


@dataclass(frozen=True)
class MinibatchMetrics:
    """What minibatches report, as three tensors, so that adding up minibatches takes three operations.

    Attributes:
        step_means: The means of :class:`StepMeans`, in the order of its fields.
        minibatch_means: The same of :class:`MinibatchMeans`.
        counts: The same of :class:`Counts`.
    """

    step_means: Tensor
    minibatch_means: Tensor
    counts: Tensor

    @classmethod
    def of(
        cls, step_means: StepMeans, weights: Tensor, minibatch_means: MinibatchMeans, counts: Counts
    ) -> MinibatchMetrics:
        """The metrics of one minibatch.

        Means that are not finite become 0: ``counts`` has the minibatch whose steps were skipped for that.

        Args:
            step_means: Numbers per slot, [n] each.
            weights: m [n], with which they are summed.
            minibatch_means: Scalars.
            counts: Scalars.
        """
        return cls(
            step_means=(torch.stack(step_means) @ weights).nan_to_num(0.0, 0.0, 0.0),
            minibatch_means=torch.stack(minibatch_means).nan_to_num(0.0, 0.0, 0.0),
            counts=torch.stack(counts),
        )

    def __add__(self, other: MinibatchMetrics) -> MinibatchMetrics:
        return MinibatchMetrics(
            self.step_means + other.step_means,
            self.minibatch_means + other.minibatch_means,
            self.counts + other.counts,
        )


@dataclass(frozen=True)
class Step:
    """What one minibatch consists of, and what is done with it.

    Attributes:
        batch: The segments it is taken from.
        targets: Their value targets [M, S].
        rows: Which of them, int64.
        num_steps: Its steps on all processes, a scalar.
        coordinates: Those that the solver drew for it, if it draws any.
        settings: What to do.
        shared: Whose correction to go by; None for one of its own.
    """

    batch: SegmentBatch
    targets: Tensor
    rows: Tensor
    num_steps: Tensor
    coordinates: Coordinates | None
    settings: UpdateSettings
    shared: Hypergradient | None

    def minibatch(self) -> Minibatch:
        """The segments of the minibatch."""
        return Minibatch.of(self.batch.permuted(self.rows), self.targets[self.rows], self.num_steps)


@dataclass(frozen=True)
class Epoch:
    """One pass over a batch: as :class:`Step`, with a row for each minibatch.

    Attributes:
        batch: The segments.
        targets: Value targets [M, S].
        rows: The segments of each minibatch, int64 [number of minibatches, segments of each].
        num_steps: The steps of each minibatch on all processes, [number of minibatches].
        coordinates: What the solver drew for each minibatch; none where it drew nothing.
        settings: What to do.
        shared: Whose correction all minibatches go by; None where each has its own.
    """

    batch: SegmentBatch
    targets: Tensor
    rows: Tensor
    num_steps: Tensor
    coordinates: Sequence[Coordinates]
    settings: UpdateSettings
    shared: Hypergradient | None

    def __len__(self) -> int:
        return len(self.rows)

    def step(self, place: int) -> Step:
        """One of the minibatches."""
        drawn = self.coordinates[place] if self.coordinates else None
        own = self.rows[place], self.num_steps[place], drawn
        return Step(self.batch, self.targets, *own, self.settings, self.shared)


class MinibatchResult(NamedTuple):
    """What the update of one minibatch reports.

    Attributes:
        metrics: Its metrics, or those of several minibatches added up.
        grad_critic: v = ∇_w J, [p]; empty without a solver.
        ihvp: x ≈ (∇²_ww L + ρI)⁻¹ v, [p]; empty without a solver.
    """

    metrics: MinibatchMetrics
    grad_critic: Tensor
    ihvp: Tensor


Postprocess = Callable[[str, Tensor], Tensor]


class MinibatchUpdate:
    """Takes the players through one minibatch.

    Args:
        players: Actor and critic.
        actor_adam: Steps of the actor's optimizer.
        critic_adam: Steps of the critic's optimizer.
        curvature: Class of the follower's curvature.
        solver: The inverse-Hessian-vector product; None for nested PPO, which follows g_θ alone.
        reduction: Sums over the processes that share the minibatch.
        added: Terms of the objectives besides J and L.
        postprocess: Maps "actor" or "critic" and the direction of its step, [q] or [p], to another direction.
    """

    def __init__(
        self,
        players: Players,
        actor_adam: AdamSteps,
        critic_adam: AdamSteps,
        curvature: type[Curvature],
        solver: IHVPSolver | None,
        reduction: Reduction,
        added: AddedLosses | None = None,
        postprocess: Postprocess | None = None,
    ):
        self._players, self._actor_adam, self._critic_adam = players, actor_adam, critic_adam
        self._added, self._postprocess = added, postprocess
        self._curvature, self._solver, self._reduction = curvature, solver, reduction

    def __call__(
        self,
        batch: Minibatch,
        coordinates: Coordinates | None,
        settings: UpdateSettings,
        shared: Hypergradient | None = None,
    ) -> MinibatchResult:
        """Updates the players in place.

        Args:
            batch: The minibatch.
            coordinates: The coordinates that the solver drew; None if it draws none.
            settings: Numbers of steps, and the objectives.
            shared: What :meth:`hypergradient` found on a larger sample, whose correction is applied; None to compute
                the correction on this minibatch.

        Returns:
            Metrics, v and x.
        """
        loss_before, critic_skips = self._nested_critic_updates(batch, settings)
        loss, actor = self.critic_loss(batch), self._actor(batch, settings)
        if shared is None:
            result = self._hypergradient(batch, loss, actor, self._solver, coordinates, settings)
        else:
            result = self._hypergradient(batch, loss, actor, None, None, settings).with_correction_of(shared)
        counts = Counts(
            hypergradient_fallbacks=~torch.isfinite(result.mixed_norm),
            skipped_actor_updates=self._actor_adam.step(self._direction("actor", result.direction), settings.grad_clip),
            skipped_critic_updates=critic_skips,
        )
        step_means = _step_means(loss, actor, result, loss_before, settings.leader.clip)
        metrics = MinibatchMetrics.of(step_means, loss.weights, _minibatch_means(result), counts)
        return MinibatchResult(metrics, grad_critic=result.grad_critic, ihvp=result.ihvp)

    def hypergradient(
        self, batch: Minibatch, coordinates: Coordinates | None, settings: UpdateSettings
    ) -> Hypergradient:
        """The hypergradient at the players' present parameters, which are not changed."""
        loss, actor = self.critic_loss(batch), self._actor(batch, settings)
        return self._hypergradient(batch, loss, actor, self._solver, coordinates, settings)

    def _hypergradient(
        self,
        batch: Minibatch,
        loss: CriticLoss,
        actor: ActorPass,
        solver: IHVPSolver | None,
        coordinates: Coordinates | None,
        settings: UpdateSettings,
    ) -> Hypergradient:
        terms = self._added_terms(batch)
        return hypergradient(
            actor=actor,
            loss=loss,
            batch=batch.segments,
            leader=settings.leader,
            correction=settings.correction,
            solver=solver,
            curvature=self._curvature_at(loss, terms),
            coordinates=coordinates,
            reduction=self._reduction,
            added=terms,
        )

    def relative_residual(self, batch: Minibatch, result: MinibatchResult) -> Tensor:
        """How well the solver's x solves the system on ``batch`` at the present players; needs a solver."""
        assert self._solver is not None
        curvature = self._curvature_at(self.critic_loss(batch), self._added_terms(batch))
        return self._solver.relative_residual(curvature, result.grad_critic, result.ihvp)

    def _curvature_at(self, loss: CriticLoss, terms: AddedTerms | None) -> Curvature:
        curvature = self._curvature(loss, self._reduction)
        return curvature if terms is None else AddedCurvature(curvature, terms, self._reduction)

    def _added_terms(self, batch: Minibatch) -> AddedTerms | None:
        return None if self._added is None else AddedTerms.of(self._added, batch, self._players)

    def _direction(self, player: str, gradient: Tensor) -> Tensor:
        return gradient if self._postprocess is None else self._postprocess(player, gradient)

    def _actor(self, batch: Minibatch, settings: UpdateSettings) -> ActorPass:
        old_dist_inputs = None if settings.leader.kl_coeff is None else batch.old_dist_inputs
        return self._players.actor(batch.obs, batch.actions, old_dist_inputs)

    def critic_loss(self, batch: Minibatch) -> CriticLoss:
        """The follower's objective at the present w."""
        return CriticLoss(self._players.critic(batch.obs), batch.targets.flatten(), batch.weights.flatten())

    def _nested_critic_updates(self, batch: Minibatch, settings: UpdateSettings) -> tuple[Tensor, Tensor]:
        """N optimizer steps on L(θ, ·); returns (y − V)² [n] before the first and how many steps were skipped."""
        first, skips = None, torch.zeros((), device=batch.weights.device)
        for _ in range(settings.num_critic_updates):
            loss = self.critic_loss(batch)
            first = loss.residual.square() if first is None else first
            own_gradient = loss.critic.gradient(loss.cotangent)
            if (terms := self._added_terms(batch)) is not None:
                own_gradient = own_gradient + terms.follower_gradient()
            gradient = self._direction("critic", self._reduction.sum(own_gradient))
            skips = skips + self._critic_adam.step(gradient, settings.grad_clip)
        assert first is not None
        return first, skips


def _step_means(
    loss: CriticLoss, actor: ActorPass, result: Hypergradient, loss_before: Tensor, clip: float
) -> StepMeans:
    surrogate, residual = result.surrogate, loss.residual
    ratio = surrogate.ratio.flatten()
    change = ratio - 1
    return StepMeans(
        vf_loss_before_nesting=loss_before,
        policy_loss=(surrogate.slope * result.adv).flatten().neg(),
        vf_loss_after_nesting=residual.square(),
        vf_residual=residual,
        entropy=actor.entropy,
        mean_kl_loss=torch.zeros_like(ratio) if actor.kl is None else actor.kl,
        approx_kl=change - surrogate.log_ratio.flatten(),
        clip_fraction=change.abs() > clip,
    )


def _minibatch_means(result: Hypergradient) -> MinibatchMeans:
    scale, unbounded = result.scale, result.mixed_norm
    cosine = (result.mixed_product @ result.grad_actor) / (unbounded * result.actor_norm)
    return MinibatchMeans(
        actor_grad_norm=result.actor_norm,
        mixed_norm_unbounded=unbounded,
        mixed_norm=scale * unbounded,
        hypergradient_norm=torch.linalg.vector_norm(result.direction),
        mixed_grad_cosine=torch.where(scale > 0, cosine, 0.0),
        bound_active_fraction=(scale < 1) & (scale > 0),
    )
