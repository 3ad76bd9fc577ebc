"""The generalised Gauss–Newton matrix of the critic's loss (Schraudolph 2002)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from blpo_rllib.core.curvature.base import Curvature
from blpo_rllib.core.networks import Coordinates


class GaussNewton(Curvature, replayable=True):
    r""":math:`J^\top \mathrm{diag}(2m) J`: the Hessian without the residuals' second derivatives.

    Positive semi-definite, so the damped system is well posed at any damping; equal to the Hessian where the critic is
    linear in w or fits its targets.
    """

    def _local_matvec(self, x: Tensor) -> Tensor:
        return self._loss.critic.vjp(2 * self._loss.weights * self._loss.critic.jvp(x))

    def local_rows(self, coordinates: Coordinates) -> Tensor:
        return self._loss.critic.vjp(2 * self._loss.weights * self._loss.critic.jacobian_columns(coordinates))

    def _local_row_blocks(self, coordinates: Coordinates) -> Iterator[tuple[slice, Tensor]]:
        columns = self._loss.critic.jacobian_columns(coordinates)
        return self._loss.critic.vjp_blocks(2 * self._loss.weights * columns)
