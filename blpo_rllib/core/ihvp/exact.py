"""The exact inverse-Hessian-vector product, by a dense solve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blpo_rllib.core.curvature import Curvature
from blpo_rllib.core.ihvp.base import IHVPSolver, check_damping
from blpo_rllib.core.networks import Coordinates


class Exact(IHVPSolver):
    """(H + ρI)⁻¹ v with all p rows of H in float64: O(p³), the oracle for small critics.

    Args:
        damping: ρ >= 0.
        max_size: Largest p accepted; p = 5,000 already takes 200 MB and several seconds a product.

    Raises:
        ValueError: If ``damping`` is out of range.
    """

    def __init__(self, damping: float = 50.0, max_size: int = 10_000):
        check_damping(damping, "Exact.damping", positive=False)
        self.damping, self.max_size = damping, max_size
        self._everything: np.ndarray | None = None

    def check_size(self, size: int) -> None:
        if size > self.max_size:
            raise ValueError(
                f"the critic has {size} parameters, but Exact(max_size={self.max_size}) is for smaller ones: set "
                'hypergradient="nystrom", or hypergradient=Exact(max_size=...) if memory allows'
            )

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray:
        if self._everything is None or len(self._everything) != size:
            self._everything = np.arange(size)
        return self._everything

    def local_terms(self, curvature: Curvature, coordinates: Coordinates | None) -> Sequence[Tensor]:
        assert coordinates is not None
        return [curvature.local_rows(coordinates)]

    def solve(
        self, curvature: Curvature, v: Tensor, coordinates: Coordinates | None, terms: Sequence[Tensor]
    ) -> Tensor:
        matrix = terms[0].double()
        matrix.diagonal().add_(self.damping)
        x, _ = torch.linalg.solve_ex(matrix, v.double())
        return x.to(v.dtype)
