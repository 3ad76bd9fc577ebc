"""The conjugate-gradient inverse-Hessian-vector product (Hestenes & Stiefel 1952)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blpo_rllib.core.curvature import Curvature
from blpo_rllib.core.ihvp.base import IHVPSolver, check_damping
from blpo_rllib.core.networks import Coordinates


class ConjugateGradient(IHVPSolver, replayable=True):
    """A fixed number of conjugate-gradient steps on (H + ρI) x = v, from x = 0.

    The method is derived for positive definite systems. On the indefinite Hessian of a critic with ρ = 0, which is the
    published comparison, it may diverge; with Gauss–Newton curvature and ρ > 0 it converges.

    Args:
        iterations: Number of steps, >= 1; each takes one product with H.
        damping: ρ >= 0.

    Raises:
        ValueError: If ``iterations`` or ``damping`` is out of range.
    """

    def __init__(self, iterations: int = 20, damping: float = 0.0):
        if not isinstance(iterations, (int, np.integer)) or iterations < 1:
            raise ValueError(f"ConjugateGradient.iterations={iterations!r} must be an integer >= 1")
        check_damping(damping, "ConjugateGradient.damping", positive=False)
        self.iterations, self.damping = iterations, damping

    def solve(
        self, curvature: Curvature, v: Tensor, coordinates: Coordinates | None, terms: Sequence[Tensor]
    ) -> Tensor:
        x, residual, direction = torch.zeros_like(v), v, v
        squared = v @ v
        for _ in range(self.iterations):
            product = curvature.matvec(direction) + self.damping * direction
            # Once the residual vanishes the remaining steps are 0/0: they count as steps of length zero.
            step = _ratio(squared, direction @ product)
            x = x + step * direction
            residual = residual - step * product
            previous, squared = squared, residual @ residual
            direction = residual + _ratio(squared, previous) * direction
        return x


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(numerator == 0, numerator, numerator / denominator)
