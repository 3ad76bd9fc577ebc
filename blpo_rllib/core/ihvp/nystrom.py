"""The Nyström inverse-Hessian-vector product (Hataya & Yamada, AISTATS 2023; BLPO paper, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blpo_rllib.core.curvature import Curvature
from blpo_rllib.core.ihvp.base import IHVPSolver, check_damping
from blpo_rllib.core.networks import Coordinates

# Rows of the Hessian of more numbers than this, 1 GiB in float32, are streamed.
KEPT_NUMBERS = 2**28


class Nystrom(IHVPSolver, replayable=True):
    r"""Inverts a rank-k model of H, :math:`\hat H = C^\top (M + \delta I)^{-1} C`, by Woodbury's identity:

    .. math::  x = (\hat H + \rho I)^{-1} v = (v - C^\top (C C^\top + \rho (M + \delta I))^{-1} C v) / \rho

    with C = H[K, :] (k×p) for k random coordinates K, and M = C[:, K] (k×k). With k = p and δ = 0 it is exact.

    C is kept up to :data:`KEPT_NUMBERS` numbers. A larger one is made twice, by some columns at a time: for C Cᵀ, C v
    and M, and for x (the space-efficient form of Hataya & Yamada). That takes twice the time of the rows.

    Args:
        rank: k >= 1, the number of coordinates drawn.
        damping: ρ > 0.
        core_shift: δ, added to the core's diagonal, which is a principal block of an indefinite matrix and can be
            singular. 0 is the textbook formula, 1 the published implementation's.
        redraw: Draw new coordinates for every product; otherwise those of the first product are kept.

    Raises:
        ValueError: If ``rank``, ``damping`` or ``core_shift`` is out of range.
    """

    def __init__(self, rank: int = 5, damping: float = 50.0, core_shift: float = 1.0, redraw: bool = False):
        if not isinstance(rank, (int, np.integer)) or rank < 1:
            raise ValueError(f"nystrom_rank={rank!r} must be an integer >= 1")
        check_damping(damping, "nystrom_damping", positive=True)
        if not np.isfinite(core_shift):
            raise ValueError(f"Nystrom.core_shift={core_shift!r} must be a finite number (1 as published, 0 for none)")
        self.rank, self.damping, self.core_shift, self.redraw = rank, damping, core_shift, redraw
        self.coordinates: np.ndarray | None = None

    def check_size(self, size: int) -> None:
        if self.rank > size:
            raise ValueError(
                f"nystrom_rank={self.rank} exceeds the critic's {size} parameters: use a rank between 1 and {size}"
            )

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray:
        if self.coordinates is None or self.redraw:
            self.coordinates = generator.choice(size, self.rank, replace=False, shuffle=False)
        return self.coordinates

    def local_terms(self, curvature: Curvature, coordinates: Coordinates | None) -> Sequence[Tensor]:
        assert coordinates is not None
        return [] if self._streams(curvature) else [curvature.local_rows(coordinates)]

    def _streams(self, curvature: Curvature) -> bool:
        return self.rank * curvature.size > KEPT_NUMBERS

    def solve(
        self, curvature: Curvature, v: Tensor, coordinates: Coordinates | None, terms: Sequence[Tensor]
    ) -> Tensor:
        assert coordinates is not None
        if not terms:
            return self._solve_by_blocks(curvature, v, coordinates)
        (c,) = terms
        # solve_ex: a singular matrix gives non-finite numbers, which the caller catches, instead of a device sync.
        y, _ = torch.linalg.solve_ex(torch.addmm(self.damping * self._core(c, coordinates), c, c.T), c @ v)
        # In place of the first row, which is not needed any more: x is as large as a row.
        return c[0].mul_(-y[0]).addmv_(c[1:].T, y[1:], alpha=-1).add_(v).div_(self.damping)

    def _solve_by_blocks(self, curvature: Curvature, v: Tensor, coordinates: Coordinates) -> Tensor:
        """The same without all of C in memory."""
        k = len(coordinates)
        squares, core, product = v.new_zeros(k, k), v.new_zeros(k, k), v.new_zeros(k)
        for block, c in curvature.row_blocks(coordinates):
            squares.addmm_(c, c.T)
            product.addmv_(c, v[block])
            here = (coordinates.index >= block.start) & (coordinates.index < block.stop)
            core += c.index_select(1, (coordinates.index - block.start) * here) * here
        core.diagonal().add_(self.core_shift)
        y, _ = torch.linalg.solve_ex(squares + self.damping * core, product)
        x = torch.empty_like(v)
        for block, c in curvature.row_blocks(coordinates):
            torch.addmv(v[block], c.T, y, alpha=-1, out=x[block])
        return x.div_(self.damping)

    def _core(self, c: Tensor, coordinates: Coordinates) -> Tensor:
        """M + δI, [k, k]."""
        core = c.index_select(1, coordinates.index)
        core.diagonal().add_(self.core_shift)
        return core

    def get_state(self) -> dict[str, Any]:
        return {"columns": self.coordinates}

    def set_state(self, state: dict[str, Any]) -> None:
        self.coordinates = state["columns"]
