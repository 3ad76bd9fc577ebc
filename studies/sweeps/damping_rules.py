"""Nyström products whose damping follows the curvature, to be judged by :mod:`auto_damping`.

Passed as ``hypergradient=SpectralNystrom()``. They stand here, and not in the package, until one has proved itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blpo_rllib.core.curvature import Curvature
from blpo_rllib.core.ihvp import Nystrom
from blpo_rllib.core.networks import Coordinates

# Where there is no curvature to follow: x is divided by ρ.
LEAST_DAMPING = 1e-6


class SpectralNystrom(Nystrom):
    r"""Damps by the size of the rank-k model's spectrum, anew for each product: :math:`\rho = c\,\|\hat H\|_F` with

    .. math::  \|\hat H\|_F^2 = \sum_i \lambda_i(\hat H)^2 = \mathrm{tr}\,B^2, \qquad B = (M + \delta I)^{-1} C C^\top

    since :math:`\hat H = C^\top (M + \delta I)^{-1} C` and B have the same eigenvalues but for zeros. With c >= 1 no
    eigenvalue of :math:`\hat H + \rho I` is negative, however indefinite M is; as ρ grows with H (δ = 0), the direction
    of x does not depend on the scale of rewards. There is no state, and nothing is exchanged beyond the rows.

    Args:
        rank: k, as all other arguments but ``multiple`` those of :class:`~blpo_rllib.core.ihvp.Nystrom`.
        multiple: c > 0.
        **kwargs: ``core_shift`` and ``redraw``.
    """

    def __init__(self, rank: int = 5, multiple: float = 1.0, **kwargs: Any):
        super().__init__(rank, **kwargs)
        self.multiple = multiple

    def solve(
        self, curvature: Curvature, v: Tensor, coordinates: Coordinates | None, terms: Sequence[Tensor]
    ) -> Tensor:
        assert coordinates is not None
        (c,) = terms
        b, _ = torch.linalg.solve_ex(self._core(c, coordinates), c @ c.T)
        norm = (b * b.T).sum().clamp(min=0.0).sqrt()
        self.damping = (self.multiple * norm).clamp(min=LEAST_DAMPING)
        return super().solve(curvature, v, coordinates, terms)


class LevenbergMarquardtNystrom(Nystrom):
    r"""Changes the damping by how well the last product foretold the change of the critic's gradient.

    Along x the gradient of L changes by H x, where the rank-k model predicts :math:`\hat H x = v - \rho x`. With

    .. math::  e = \|H x - \hat H x\| / \|v\| = \|(H + \rho I) x - v\| / \|v\|

    ρ becomes 3/2 ρ where e > 3/4, 2/3 ρ where e < 1/4, and stays in between: Levenberg's and Marquardt's rule with the
    thresholds and factor of Martens (2010, section 4.1), there for the ratio of reductions, which needs H to be
    positive definite. e costs a product with H, whose sum over learners keeps ρ the same on all of them.

    Args:
        rank: k, as all other arguments those of :class:`~blpo_rllib.core.ihvp.Nystrom`.
        damping: ρ of the first product.
        **kwargs: ``core_shift`` and ``redraw``.
    """

    def __init__(self, rank: int = 5, damping: float = 50.0, **kwargs: Any):
        super().__init__(rank, damping, **kwargs)
        self._next: float | Tensor = damping

    def solve(
        self, curvature: Curvature, v: Tensor, coordinates: Coordinates | None, terms: Sequence[Tensor]
    ) -> Tensor:
        self.damping = self._next
        x = super().solve(curvature, v, coordinates, terms)
        error = self.relative_residual(curvature, v, x)
        # An error that is not a number changes nothing.
        factor = 1.0 + 0.5 * (error > 0.75) - (error < 0.25) / 3
        self._next = (factor * self.damping).clamp(min=LEAST_DAMPING)
        return x

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"damping": float(self._next)}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._next = state["damping"]
