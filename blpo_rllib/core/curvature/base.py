"""The follower's objective and the interface of its curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from blpo_rllib.core.networks import Coordinates, CriticPass
from blpo_rllib.core.reduction import Reduction


@dataclass(frozen=True)
class CriticLoss:
    r"""The follower's objective :math:`L(w) = \sum_t m_t (y_t - V_w(s_t))^2` at one w (paper, section 3).

    Attributes:
        critic: The critic at w on this minibatch.
        targets: y [n].
        weights: m [n]: 1 over the number of steps in the minibatch on steps, 0 elsewhere, so that L is a mean.
    """

    critic: CriticPass
    targets: Tensor
    weights: Tensor

    @property
    def cotangent(self) -> Tensor:
        """∂L/∂V = −2 m (y − V), [n]."""
        return (self.critic.values - self.targets).mul_(self.weights).mul_(2)

    @property
    def residual(self) -> Tensor:
        """y − V, [n]."""
        return self.targets - self.critic.values


class Curvature(ABC):
    """A symmetric matrix H [p, p] known through its products and its rows.

    Args:
        loss: The follower's objective at w on this process's share of the minibatch.
        reduction: Sums over the processes that share the minibatch.

    Attributes:
        replayable: Whether every product performs the same tensor operations, whatever the numbers, and keeps no state.
            Subclasses do not inherit it and declare it anew: ``class Mine(Curvature, replayable=True)``.
    """

    replayable: ClassVar[bool] = False

    def __init_subclass__(cls, replayable: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.replayable = replayable

    def __init__(self, loss: CriticLoss, reduction: Reduction):
        self._loss = loss
        self._reduction = reduction

    @property
    def size(self) -> int:
        """p."""
        return self._loss.critic.num_parameters

    def matvec(self, x: Tensor) -> Tensor:
        """H x, [p] to [p]."""
        return self._reduction.sum(self._local_matvec(x))

    def rows(self, coordinates: Coordinates) -> Tensor:
        """H[K, :], for k coordinates K, [k, p]; by symmetry also the columns K."""
        return self._reduction.sum(self.local_rows(coordinates))

    def row_blocks(self, coordinates: Coordinates) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`rows` by some columns at a time, in any order: which columns, and those, [k, .]."""
        for block, rows in self._local_row_blocks(coordinates):
            yield block, self._reduction.sum(rows)

    def _local_row_blocks(self, coordinates: Coordinates) -> Iterator[tuple[slice, Tensor]]:
        """This process's term of :meth:`row_blocks`; a subclass may make it without all rows in memory."""
        yield slice(0, self.size), self.local_rows(coordinates)

    @abstractmethod
    def _local_matvec(self, x: Tensor) -> Tensor:
        """This process's term of :meth:`matvec`."""

    @abstractmethod
    def local_rows(self, coordinates: Coordinates) -> Tensor:
        """This process's term of :meth:`rows`."""
