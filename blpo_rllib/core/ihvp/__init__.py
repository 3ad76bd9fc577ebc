"""Inverse-Hessian-vector products: one solver a file, all used through :class:`IHVPSolver`."""

from blpo_rllib.core.ihvp.base import IHVPSolver
from blpo_rllib.core.ihvp.conjugate_gradient import ConjugateGradient
from blpo_rllib.core.ihvp.exact import Exact
from blpo_rllib.core.ihvp.nystrom import Nystrom
from blpo_rllib.core.ihvp.scaled_identity import ScaledIdentity

IHVP_SOLVERS: dict[str, type[IHVPSolver]] = {
    "nystrom": Nystrom,
    "cg": ConjugateGradient,
    "exact": Exact,
    "scaled_identity": ScaledIdentity,
}

__all__ = ["IHVP_SOLVERS", "ConjugateGradient", "Exact", "IHVPSolver", "Nystrom", "ScaledIdentity"]
