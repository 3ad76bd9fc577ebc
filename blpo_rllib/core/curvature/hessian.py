"""The exact Hessian of the critic's loss."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from blpo_rllib.core.curvature.base import Curvature
from blpo_rllib.core.networks import Coordinates


class Hessian(Curvature, replayable=True):
    r""":math:`\nabla^2_{ww} L = J^\top \mathrm{diag}(2m) J - \sum_t 2 m_t (y_t - V_t) \nabla^2 V_t`; indefinite.

    This is the curvature of the hypergradient's definition (paper, section 3).
    """

    def _local_matvec(self, x: Tensor) -> Tensor:
        return self._loss.critic.second_order_product(x, self._loss.cotangent, 2 * self._loss.weights)

    def local_rows(self, coordinates: Coordinates) -> Tensor:
        return self._loss.critic.second_order_rows(coordinates, self._loss.cotangent, 2 * self._loss.weights)

    def _local_row_blocks(self, coordinates: Coordinates) -> Iterator[tuple[slice, Tensor]]:
        return self._loss.critic.second_order_blocks(coordinates, self._loss.cotangent, 2 * self._loss.weights)
