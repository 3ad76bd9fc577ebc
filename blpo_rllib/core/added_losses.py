r"""Terms that a user adds to the players' objectives, with their derivatives by automatic differentiation.

With :math:`\ell_J` added to the leader's objective J and :math:`\ell_L` to the follower's L, the hypergradient is that
of :math:`J + \ell_J` and :math:`L + \ell_L`: both enter wherever J and L do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blpo_rllib.core.curvature import Curvature
from blpo_rllib.core.networks import Coordinates, flatten
from blpo_rllib.core.players import Minibatch, Players
from blpo_rllib.core.reduction import Reduction


class AddedLosses(ABC):
    """What is added to the objectives: each method gives a scalar of (θ, w) on a minibatch with its graph, or None.

    A process's scalar counts by its share of the minibatch's steps, so that of a mean over steps, or of the parameters
    alone, N processes make what one would. That of a process without a step does not count, whatever it is.
    """

    @abstractmethod
    def leader(self, batch: Minibatch) -> Tensor | None:
        """ℓ_J(θ, w), added to J."""

    @abstractmethod
    def follower(self, batch: Minibatch) -> Tensor | None:
        """ℓ_L(θ, w), added to L."""

    @abstractmethod
    def both(self, batch: Minibatch) -> Tensor | None:
        """ℓ(θ, w), added to J with w held fixed, and to L: as PPO's single loss gives each network its own gradient."""


@dataclass(frozen=True)
class AddedTerms:
    """The added terms at one (θ, w) on one process's share of a minibatch.

    Attributes:
        leader: ℓ_J.
        follower: ℓ_L.
        both: ℓ.
        players: Whose parameters θ and w are.
        share: This process's share of the minibatch's steps.
        num_steps: The number of its steps.
    """

    leader: Tensor | None
    follower: Tensor | None
    both: Tensor | None
    players: Players
    share: Tensor
    num_steps: Tensor

    @classmethod
    def of(cls, losses: AddedLosses, batch: Minibatch, players: Players) -> AddedTerms:
        """All of them."""
        terms = losses.leader(batch), losses.follower(batch), losses.both(batch)
        return cls(*terms, players, batch.weights.sum(), batch.segments.step.sum())

    def leader_gradient(self) -> Tensor:
        """∇_θ (ℓ_J + ℓ), [q]."""
        return _weighted(self.share, _gradients([self.leader, self.both], self.players.actor_parameters))

    def leader_critic_gradient(self) -> Tensor:
        """∇_w ℓ_J, [p]."""
        return _weighted(self.share, _gradients([self.leader], self.players.critic_parameters))

    def follower_gradient(self) -> Tensor:
        """∇_w (ℓ_L + ℓ), [p]."""
        return _weighted(self.share, self._differentiable().detach())

    def follower_product(self, x: Tensor) -> Tensor:
        """∇²_ww (ℓ_L + ℓ) x, [p]."""
        return _weighted(self.share, _gradients([self._differentiable() @ x], self.players.critic_parameters))

    def follower_rows(self, coordinates: Coordinates) -> Tensor:
        """Rows K of ∇²_ww (ℓ_L + ℓ), [k, p]."""
        entries = self._differentiable()[coordinates.index]
        rows = [_gradients([entry], self.players.critic_parameters) for entry in entries]
        return _weighted(self.share, torch.stack(rows))

    def mixed_product(self, x: Tensor, cross_reduction: str) -> Tensor:
        """∇²_θw (ℓ_L + ℓ) x, [q]; with as many times the weight as the cross term's sum over steps gives to L."""
        weight = self.num_steps if cross_reduction == "sum" else self.share
        return _weighted(weight, _gradients([self._differentiable() @ x], self.players.actor_parameters))

    def _differentiable(self) -> Tensor:
        """∇_w (ℓ_L + ℓ) with its graph, [p]."""
        return _gradients([self.follower, self.both], self.players.critic_parameters, create_graph=True)


class AddedCurvature(Curvature):
    """The follower's curvature with that of the added terms.

    Args:
        curvature: Without them.
        terms: The added terms at the same w.
        reduction: Sums over the processes that share the minibatch.
    """

    def __init__(self, curvature: Curvature, terms: AddedTerms, reduction: Reduction):
        super().__init__(curvature._loss, reduction)
        self._curvature, self._terms = curvature, terms

    def _local_matvec(self, x: Tensor) -> Tensor:
        return self._curvature._local_matvec(x) + self._terms.follower_product(x)

    def local_rows(self, coordinates: Coordinates) -> Tensor:
        return self._curvature.local_rows(coordinates) + self._terms.follower_rows(coordinates)


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """``weight`` times ``x``; 0 where the weight is, because a mean over no step is NaN."""
    return torch.where(weight > 0, weight * x, 0.0)


def _gradients(values: Sequence[Tensor | None], parameters: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """The gradient of a sum of scalars, [n]; 0 where they do not depend on the parameters."""
    terms = [value for value in values if value is not None and value.requires_grad]
    if not terms:
        return flatten([torch.zeros_like(p, requires_grad=False) for p in parameters])
    gradients = torch.autograd.grad(
        torch.stack(terms).sum(), parameters, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return flatten(gradients)
