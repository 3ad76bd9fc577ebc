"""How close an approximate inverse-Hessian-vector product, and the hypergradient made of it, come to the exact ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blpo_rllib.core.curvature import CriticLoss, Curvature
from blpo_rllib.core.hypergradient import Hypergradient, hypergradient
from blpo_rllib.core.ihvp import Exact, IHVPSolver
from blpo_rllib.core.minibatch import UpdateSettings
from blpo_rllib.core.networks import Coordinates
from blpo_rllib.core.players import Minibatch, Players, slots
from blpo_rllib.core.reduction import Reduction
from blpo_rllib.core.segments import SegmentBatch


@dataclass(frozen=True)
class Fidelity:
    """Means over the solver's draws, on one batch, at one (θ, w).

    Attributes:
        ihvp_cosine: Cosine of x and the exact (H + ρI)⁻¹ v, at the solver's own ρ.
        ihvp_relative_residual: ‖(H + ρI) x − v‖ / ‖v‖.
        correction_cosine: Cosine of ∇²_θw L · x and the same with the exact x at ρ.
        hypergradient_cosine: Cosine of the hypergradients, bound included, at ρ: what the actor's step sees of the
            approximation.
        reference_cosine: Cosine of the hypergradient and the exact one at the reference damping: what it sees of the
            approximation and the damping together.
    """

    ihvp_cosine: float
    ihvp_relative_residual: float
    correction_cosine: float
    hypergradient_cosine: float
    reference_cosine: float


class _ExactForMatrix(Exact):
    """The exact solver with the matrix given, which it need not ask of a curvature."""

    def __init__(self, matrix: Tensor, damping: float):
        super().__init__(damping)
        self._matrix = matrix

    def draw(self, size: int, generator: np.random.Generator) -> None:  # type: ignore[override]
        return None

    def local_terms(self, curvature: Curvature, coordinates: Coordinates | None) -> Sequence[Tensor]:
        return [self._matrix.clone()]


class Oracle:
    """The hypergradient of one batch at one (θ, w) by any solver, the dense solution included.

    Nothing is changed: no optimizer, no generator but those given.

    Args:
        players: Actor and critic at θ and w.
        segments: The batch, as one minibatch.
        settings: Objective, clip and bound of the hypergradient.
        curvature: Class of the follower's curvature.

    Attributes:
        matrix: H in float64, [p, p].

    Raises:
        ValueError: If the critic is too large for a dense solution.
    """

    def __init__(self, players: Players, segments: SegmentBatch, settings: UpdateSettings, curvature: type[Curvature]):
        self._size = sum(p.numel() for p in players.critic_parameters)
        Exact().check_size(self._size)
        batch, leader = _minibatch(players, segments), settings.leader
        self._players, self._segments, self._settings = players, segments, settings
        self._loss = CriticLoss(players.critic(batch.obs), batch.targets.flatten(), batch.weights.flatten())
        self._actor = players.actor(
            batch.obs, batch.actions, None if leader.kl_coeff is None else batch.old_dist_inputs
        )
        self._reduction = Reduction()
        self._curvature = curvature(self._loss, self._reduction)
        self.matrix = self._curvature.rows(players.coordinates(np.arange(self._size))).double()
        self._exact: dict[float, Hypergradient] = {}

    def at(self, solver: IHVPSolver, generator: np.random.Generator) -> Hypergradient:
        """The hypergradient by ``solver``, which draws its coordinates from ``generator``."""
        indices = solver.draw(self._size, generator)
        coordinates = None if indices is None else self._players.coordinates(indices)
        return hypergradient(
            actor=self._actor,
            loss=self._loss,
            batch=self._segments,
            leader=self._settings.leader,
            correction=self._settings.correction,
            solver=solver,
            curvature=self._curvature,
            coordinates=coordinates,
            reduction=self._reduction,
        )

    def exact(self, damping: float) -> Hypergradient:
        """The hypergradient by the dense solution at ρ = ``damping``."""
        if damping not in self._exact:
            self._exact[damping] = self.at(_ExactForMatrix(self.matrix, damping), np.random.default_rng())
        return self._exact[damping]

    def compare(
        self, solver: IHVPSolver, reference_damping: float, generator: np.random.Generator, draws: int = 5
    ) -> Fidelity:
        """Compares a solver with the dense solution.

        Args:
            solver: What to judge, as it is before its first draw.
            reference_damping: ρ of the exact hypergradient that stands for the undamped one, which an indefinite H
                leaves undefined.
            generator: Draws the solver's coordinates.
            draws: How often to draw them.

        Returns:
            Means over the draws.
        """
        found, reference = [], self.exact(reference_damping)
        for _ in range(draws):
            # A copy each time: a solver may keep its first draw.
            own = copy.deepcopy(solver)
            result = self.at(own, generator)
            # At the damping of this draw, which a solver may choose.
            exact = self.exact(float(own.damping))
            found.append(
                [
                    cosine(result.ihvp, exact.ihvp),
                    float(own.relative_residual(self._curvature, result.grad_critic, result.ihvp)),
                    cosine(result.mixed_product, exact.mixed_product),
                    cosine(result.direction, exact.direction),
                    cosine(result.direction, reference.direction),
                ]
            )
        return Fidelity(*(float(x) for x in np.mean(found, axis=0)))


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors; NaN if one vanishes."""
    a, b = a.double(), b.double()
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def _minibatch(players: Players, segments: SegmentBatch) -> Minibatch:
    with torch.no_grad():
        values = players.critic(slots(segments.obs)).values.view_as(segments.step)
    targets = values + segments.advantage.advantages(segments.rewards, values)
    return Minibatch.of(segments, targets, segments.step.sum())
