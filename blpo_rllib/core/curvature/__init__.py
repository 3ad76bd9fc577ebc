"""Curvatures of the follower's objective: one class a file, each a symmetric linear operator on R^p."""

from blpo_rllib.core.curvature.base import CriticLoss, Curvature
from blpo_rllib.core.curvature.gauss_newton import GaussNewton
from blpo_rllib.core.curvature.hessian import Hessian

CURVATURES: dict[str, type[Curvature]] = {"hessian": Hessian, "gauss_newton": GaussNewton}

__all__ = ["CURVATURES", "CriticLoss", "Curvature", "GaussNewton", "Hessian"]
