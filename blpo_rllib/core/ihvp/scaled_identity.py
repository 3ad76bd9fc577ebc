"""The inverse-Hessian-vector product without a Hessian."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from blpo_rllib.core.curvature import Curvature
from blpo_rllib.core.ihvp.base import IHVPSolver, check_damping
from blpo_rllib.core.networks import Coordinates


class ScaledIdentity(IHVPSolver, replayable=True):
    """x = v/ρ: what (H + ρI)⁻¹ v tends to for ρ far above the eigenvalues of H, and Nyström's formula at rank 0.

    It says how much of a result is owed to curvature, at no cost.

    Args:
        damping: ρ > 0.

    Raises:
        ValueError: If ``damping`` is out of range.
    """

    def __init__(self, damping: float = 50.0):
        check_damping(damping, "ScaledIdentity.damping", positive=True)
        self.damping = damping

    def solve(
        self, curvature: Curvature, v: Tensor, coordinates: Coordinates | None, terms: Sequence[Tensor]
    ) -> Tensor:
        return v / self.damping
