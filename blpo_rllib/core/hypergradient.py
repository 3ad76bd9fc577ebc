r"""The BLPO hypergradient of one minibatch in closed form (Prakash et al. 2025, arXiv:2505.11714, sections 3 and 4).

The leader θ minimises :math:`J(\theta, w^*(\theta))`, the follower w minimises L(θ, w). With the implicit function
theorem

.. math::  \frac{dJ}{d\theta} = \nabla_\theta J - \nabla^2_{\theta w} L\,(\nabla^2_{ww} L)^{-1} \nabla_w J.

GAE is linear in V (:mod:`blpo_rllib.core.gae`), so every factor is a product with the Jacobian of the critic's values
or of the actor's log-probabilities, with weights written out below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blpo_rllib.core.added_losses import AddedTerms
from blpo_rllib.core.curvature import CriticLoss, Curvature
from blpo_rllib.core.ihvp import IHVPSolver
from blpo_rllib.core.networks import ActorPass, Coordinates
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentBatch


@dataclass(frozen=True)
class Surrogate:
    """PPO's clipped objective s = min(r·adv, clip(r, 1 ± ε)·adv) per step (Schulman et al. 2017, eq. 7).

    Attributes:
        log_ratio: log r.
        ratio: r = π(a|s) / π_old(a|s).
        slope: ∂s/∂adv: r or clip(r), whichever branch the minimum takes.
        active: 1 where s depends on r, else 0.
    """

    log_ratio: Tensor
    ratio: Tensor
    slope: Tensor
    active: Tensor

    @classmethod
    def clipped(cls, log_ratio: Tensor, adv: Tensor, clip: float) -> Surrogate:
        """The objective at log-ratios and advantages [B, S] with clip width ε = ``clip`` >= 0."""
        ratio = log_ratio.exp()
        return cls(log_ratio, ratio, ratio, ratio).with_clip(adv, clip)

    def with_clip(self, adv: Tensor, clip: float) -> Surrogate:
        """The objective at the same ratios and advantages under another clip width."""
        clipped = self.ratio.clamp(1 - clip, 1 + clip)
        active = self.ratio * adv <= clipped * adv
        slope = torch.where(active, self.ratio, clipped)
        return Surrogate(self.log_ratio, self.ratio, slope, active.to(self.ratio.dtype))


@dataclass(frozen=True)
class LeaderLoss:
    """J(θ, w) = −Σ_t m_t (s_t + c_H·entropy_t − c_KL·KL_t).

    Attributes:
        clip: ε, the clip width of the surrogate s.
        entropy_coeff: c_H, a number or a scalar on the device; None to leave the entropy out.
        kl_coeff: c_KL likewise; None to leave the KL divergence from the old policy out.
    """

    clip: float
    entropy_coeff: float | Tensor | None = None
    kl_coeff: float | Tensor | None = None

    @property
    def coefficients(self) -> dict[str, float | Tensor]:
        """Those that are not left out."""
        named = {"entropy_coeff": self.entropy_coeff, "kl_coeff": self.kl_coeff}
        return {name: x for name, x in named.items() if x is not None}

    def with_coefficients(self, values: Mapping[str, float | Tensor]) -> LeaderLoss:
        """The same loss with other values of :attr:`coefficients`."""
        return LeaderLoss(self.clip, values.get("entropy_coeff"), values.get("kl_coeff"))


@dataclass(frozen=True)
class Correction:
    """How the cross term enters the hypergradient.

    Attributes:
        cross_clip: ε_F, the clip width inside the cross term; None for no clip, as for discrete actions.
        bound: b: the correction is scaled down to ‖mixed‖ <= b ‖g_θ‖; None for no bound.
        cross_reduction: "sum" over steps, as published, or "mean", as in the losses J and L.
        sample: The sample on which it is computed: each "minibatch", as published, or the "batch", once at the start of
            each epoch and for all of its actor steps. The bound then refers to g_θ of the batch.
    """

    cross_clip: float | None
    bound: float | None
    cross_reduction: str = "sum"
    sample: str = "minibatch"


CROSS_REDUCTIONS = ("sum", "mean")
CORRECTION_SAMPLES = ("minibatch", "batch")


@dataclass(frozen=True)
class Hypergradient:
    """The quantities of one minibatch; all but ``surrogate`` and ``adv`` are summed over processes.

    Attributes:
        adv: GAE under the current critic [B, S].
        surrogate: The leader's surrogate at ``adv``.
        grad_actor: g_θ = ∇_θ J, [q].
        grad_critic: v = ∇_w J, [p].
        ihvp: x ≈ (∇²_ww L + ρI)⁻¹ v, [p].
        mixed_product: ∇²_θw L · x before the bound, [q].
        mixed_norm: ‖mixed_product‖.
        actor_norm: ‖g_θ‖.
        scale: The factor by which the bound shortens it, <= 1: the correction applied is scale · mixed_product. It is 0
            where mixed_product is not finite.
        direction: g_θ − the correction, the hypergradient, [q].
    """

    adv: Tensor
    surrogate: Surrogate
    grad_actor: Tensor
    grad_critic: Tensor
    ihvp: Tensor
    mixed_product: Tensor
    mixed_norm: Tensor
    actor_norm: Tensor
    scale: Tensor
    direction: Tensor

    @classmethod
    def uncorrected(cls, adv: Tensor, surrogate: Surrogate, grad_actor: Tensor) -> Hypergradient:
        """Nested PPO's direction: g_θ alone. v and x are empty and the correction is 0."""
        zero, none = torch.zeros_like(grad_actor), grad_actor.new_zeros(0)
        return cls(
            adv=adv,
            surrogate=surrogate,
            grad_actor=grad_actor,
            grad_critic=none,
            ihvp=none,
            mixed_product=zero,
            mixed_norm=zero[0],
            actor_norm=torch.linalg.vector_norm(grad_actor),
            scale=zero[0],
            direction=grad_actor,
        )

    @property
    def correction(self) -> list[Tensor]:
        """The tensors that :meth:`with_correction_of` takes over."""
        return [self.grad_critic, self.ihvp, self.mixed_product, self.mixed_norm, self.scale]

    def copy_of_correction(self) -> Hypergradient:
        """The same quantities, with :attr:`correction` copied to memory of its own."""
        return replace(
            self,
            grad_critic=self.grad_critic.clone(),
            ihvp=self.ihvp.clone(),
            mixed_product=self.mixed_product.clone(),
            mixed_norm=self.mixed_norm.clone(),
            scale=self.scale.clone(),
        )

    def with_correction_of(self, other: Hypergradient) -> Hypergradient:
        """g_θ of this minibatch minus the correction that was found on a larger sample."""
        return replace(
            other,
            adv=self.adv,
            surrogate=self.surrogate,
            grad_actor=self.grad_actor,
            actor_norm=self.actor_norm,
            direction=corrected(self.grad_actor, other.mixed_product, other.scale),
        )


def log_probability_ratio(batch: SegmentBatch, logp: Tensor) -> Tensor:
    """log r [B, S]; 0 outside steps, where the log-probabilities mean nothing."""
    return (logp.view_as(batch.step) - batch.old_logp).masked_fill(batch.step == 0, 0.0)


def leader_gradient(
    actor: ActorPass, batch: SegmentBatch, adv: Tensor, weights: Tensor, leader: LeaderLoss
) -> tuple[Surrogate, Tensor]:
    """The surrogate, and this process's term of g_θ = ∇_θ J [q], for advantages and weights m [B, S]."""
    surrogate = Surrogate.clipped(log_probability_ratio(batch, actor.logp), adv, leader.clip)
    m = weights.flatten()
    gradient = actor.gradient(
        logp=(-weights * surrogate.ratio * surrogate.active * adv).flatten(),
        entropy=None if leader.entropy_coeff is None else -leader.entropy_coeff * m,
        kl=None if leader.kl_coeff is None else leader.kl_coeff * m,
    )
    return surrogate, gradient


def leader_critic_gradient(loss: CriticLoss, batch: SegmentBatch, surrogate: Surrogate, weights: Tensor) -> Tensor:
    """This process's term of v = ∇_w J [p], which goes through the advantages.

    It is the critic's vjp with the cotangent Dᵀ Aᵀ (−m · slope), for weights m [B, S].
    """
    cotangent = batch.advantage.adjoint(-weights * surrogate.slope)
    return loss.critic.vjp(cotangent.flatten())


def mixed_product(
    actor: ActorPass,
    loss: CriticLoss,
    batch: SegmentBatch,
    adv: Tensor,
    surrogate: Surrogate,
    ihvp: Tensor,
    correction: Correction,
) -> Tensor:
    r"""This process's term of ∇²_θw L · x = d/dw [∇_θ S] · x, [q], for x = ``ihvp`` [p].

    L depends on θ through the states that the policy visits. S(θ, w) = −2 Σ_t c_t s_t(θ, adv(w)) (y_t − V_t(w)) is the
    score-function estimate of that dependence. As published c_t = 1 on steps, so that S is a sum over them; with
    ``cross_reduction="mean"`` c_t is m_t.
    """
    weights = batch.step if correction.cross_reduction == "sum" else loss.weights.view_as(batch.step)
    score = -2 * weights * surrogate.ratio
    if correction.cross_clip is not None:
        score = score * surrogate.with_clip(adv, correction.cross_clip).active
    delta_values = loss.critic.jvp(ihvp).view_as(adv)
    delta_adv = batch.advantage.tangent(delta_values)
    slope = delta_adv * loss.residual.view_as(adv) - adv * delta_values
    return actor.gradient((score * slope).flatten())


def bound_scale(mixed_norm: Tensor, gradient_norm: Tensor, bound: float | None) -> Tensor:
    """The factor <= 1 that brings ‖mixed‖ down to ``bound`` times ‖g_θ‖; 0 if ‖mixed‖ is not finite, or is 0."""
    scale = torch.ones_like(mixed_norm) if bound is None else (bound * gradient_norm / mixed_norm).clamp(max=1.0)
    # 0 < x < inf is false for NaN too.
    return torch.where((mixed_norm > 0) & (mixed_norm < torch.inf), scale, 0.0)


def corrected(grad_actor: Tensor, product: Tensor, scale: Tensor) -> Tensor:
    """g_θ − scale · mixed, [q]; g_θ where ``scale`` is 0, whatever ``product`` holds."""
    # 0 · ∞ would not be 0.
    return torch.addcmul(grad_actor, scale, product.nan_to_num(0.0, 0.0, 0.0), value=-1)


def hypergradient(
    *,
    actor: ActorPass,
    loss: CriticLoss,
    batch: SegmentBatch,
    leader: LeaderLoss,
    correction: Correction,
    solver: IHVPSolver | None,
    curvature: Curvature,
    coordinates: Coordinates | None,
    reduction: Reduction,
    added: AddedTerms | None = None,
) -> Hypergradient:
    """The hypergradient at (θ, w) on one minibatch.

    Args:
        actor: The actor at θ on the minibatch's slots.
        loss: The follower's objective at w, after its nested steps.
        batch: The minibatch, B segments of S slots.
        leader: The leader's objective.
        correction: Clip and bound of the cross term.
        solver: The inverse-Hessian-vector product; None for nested PPO, which follows g_θ alone.
        curvature: The follower's curvature at ``loss``, that of added terms included.
        coordinates: The coordinates that the solver drew; None if it draws none.
        reduction: Sums over the processes that share the minibatch.
        added: Terms of the objectives besides J and L.

    Returns:
        All quantities of the computation.
    """
    weights = loss.weights.view_as(batch.step)
    adv = batch.advantage.advantages(batch.rewards, loss.critic.values.view_as(batch.step))
    surrogate, own_grad_actor = leader_gradient(actor, batch, adv, weights, leader)
    if added is not None:
        own_grad_actor = own_grad_actor + added.leader_gradient()
    if solver is None:
        return Hypergradient.uncorrected(adv, surrogate, reduction.sum(own_grad_actor))
    own_grad_critic = leader_critic_gradient(loss, batch, surrogate, weights)
    if added is not None:
        own_grad_critic = own_grad_critic + added.leader_critic_gradient()
    own_terms = solver.local_terms(curvature, coordinates)
    grad_actor, grad_critic, *terms = reduction.sum_all([own_grad_actor, own_grad_critic, *own_terms])
    ihvp = solver.solve(curvature, grad_critic, coordinates, terms)
    own_product = mixed_product(actor, loss, batch, adv, surrogate, ihvp, correction)
    if added is not None:
        own_product = own_product + added.mixed_product(ihvp, correction.cross_reduction)
    product = reduction.sum(own_product)
    mixed_norm, actor_norm = torch.linalg.vector_norm(product), torch.linalg.vector_norm(grad_actor)
    scale = bound_scale(mixed_norm, actor_norm, correction.bound)
    return Hypergradient(
        adv=adv,
        surrogate=surrogate,
        grad_actor=grad_actor,
        grad_critic=grad_critic,
        ihvp=ihvp,
        mixed_product=product,
        mixed_norm=mixed_norm,
        actor_norm=actor_norm,
        scale=scale,
        direction=corrected(grad_actor, product, scale),
    )
