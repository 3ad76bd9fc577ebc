"""The interface of an inverse-Hessian-vector product."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from blpo_rllib.core.curvature import Curvature
from blpo_rllib.core.networks import Coordinates


class IHVPSolver(ABC):
    """Computes x ≈ (H + ρI)⁻¹ v.

    Attributes:
        damping: ρ >= 0, the multiple of the identity added to H; for a solver that chooses it, that of the latest
            :meth:`solve`.
        replayable: Whether every product performs the same tensor operations, whatever the numbers, and keeps no state.
            One recording then serves for all (:mod:`blpo_rllib.core.replay`). Subclasses do not inherit it and declare
            it anew: ``class Mine(IHVPSolver, replayable=True)``.
    """

    damping: float | Tensor
    replayable: ClassVar[bool] = False

    def __init_subclass__(cls, replayable: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.replayable = replayable

    def __repr__(self) -> str:
        """The call that makes this solver, as far as its arguments are kept under their names."""
        names = inspect.signature(type(self).__init__).parameters
        arguments = ", ".join(f"{name}={getattr(self, name)!r}" for name in names if name in vars(self))
        return f"{type(self).__name__}({arguments})"

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray | None:
        """The coordinates whose rows of H the next :meth:`solve` takes, distinct int64 in [0, size), or None for none.

        Args:
            size: p.
            generator: The only source of randomness a solver may use; its state is kept in checkpoints.
        """
        return None

    def local_terms(self, curvature: Curvature, coordinates: Coordinates | None) -> Sequence[Tensor]:
        """What :meth:`solve` needs and what does not depend on v: this process's terms, which are summed along with v.

        Args:
            curvature: H.
            coordinates: What :meth:`draw` returned.
        """
        return ()

    @abstractmethod
    def solve(
        self, curvature: Curvature, v: Tensor, coordinates: Coordinates | None, terms: Sequence[Tensor]
    ) -> Tensor:
        """Returns x [p]; only tensor operations, without a device sync.

        Args:
            curvature: H.
            v: The vector [p].
            coordinates: What :meth:`draw` returned.
            terms: What :meth:`local_terms` returned, summed over processes; they may be overwritten.
        """

    def relative_residual(self, curvature: Curvature, v: Tensor, x: Tensor) -> Tensor:
        """‖(H + ρI) x − v‖ / ‖v‖: how well x solves the system, at the price of one product with H; a scalar."""
        residual = curvature.matvec(x) + self.damping * x - v
        return residual.norm() / v.norm()

    def check_size(self, size: int) -> None:  # noqa: B027
        """Raises ValueError if a critic of p = ``size`` parameters does not suit this solver."""

    def get_state(self) -> dict[str, Any]:
        """What the next :meth:`solve` depends on besides its arguments."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restores what :meth:`get_state` returned."""


def check_damping(damping: float, name: str, positive: bool) -> None:
    """Raises ValueError unless ``damping`` is finite and > 0 (>= 0 if not ``positive``)."""
    if not (0 < damping < float("inf") or (damping == 0 and not positive)):
        raise ValueError(f"{name}={damping!r} must be a finite number {'> 0' if positive else '>= 0'}")
