"""The two players, and the minibatch of segments on which both are evaluated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import tree
from torch import Tensor

from blpo_rllib.core.networks import ActorPass, Coordinates, CriticPass
from blpo_rllib.core.segments import SegmentBatch


class Players(ABC):
    """A leader and a follower with no parameter in common.

    Attributes:
        replayable: Whether every pass performs the same tensor operations, whatever the numbers, and keeps no state. A
            recording of one minibatch then serves for all others of its shape (:mod:`blpo_rllib.core.replay`).
        recurrent: Whether what a slot gives depends on the slots before it.
        actor_rate_factors: The learning rate of each of ``actor_parameters`` in units of the actor's; None for 1
            throughout.
    """

    replayable: bool = False
    recurrent: bool = False
    actor_parameters: list[Tensor]
    critic_parameters: list[Tensor]
    actor_rate_factors: list[float] | None = None

    def prepared(self, obs: Any) -> Any:
        """What :meth:`critic` and :meth:`actor` may get in place of the observations [n, ...] throughout an update.

        With frozen networks below, what these make of the observations.
        """
        return obs

    @abstractmethod
    def critic(self, obs: Any) -> CriticPass:
        """The critic at observations [n, ...]."""

    @abstractmethod
    def actor(self, obs: Any, actions: Any, old_dist_inputs: Tensor | None) -> ActorPass:
        """The actor at observations [n, ...]; with the KL divergence if ``old_dist_inputs`` [n, d] are given."""

    def coordinates(self, indices: np.ndarray) -> Coordinates:
        """Coordinates of the critic's flat vector, int64 [k], in the form in which its passes take them."""
        return Coordinates.of(indices, self.critic_parameters[0].device)


@dataclass(frozen=True)
class Minibatch:
    """B segments of S slots, n = B·S slots in all.

    Attributes:
        segments: The segments [B, S, ...].
        targets: Value targets [B, S].
        weights: m [B, S]: 1 over the number of steps in the minibatch, on all processes, on steps; 0 elsewhere.
    """

    segments: SegmentBatch
    targets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, segments: SegmentBatch, targets: Tensor, num_steps: Tensor) -> Minibatch:
        """The minibatch made of these segments; ``num_steps`` (a scalar) counts those of all processes."""
        return cls(segments, targets, segments.step / num_steps)

    @property
    def obs(self) -> Any:
        """Observations slot by slot, [n, ...]."""
        return slots(self.segments.obs)

    @property
    def actions(self) -> Any:
        """Actions slot by slot, [n, ...]."""
        return slots(self.segments.actions)

    @property
    def old_dist_inputs(self) -> Tensor:
        """Inputs of the old policy's distribution slot by slot, [n, d]."""
        return slots(self.segments.old_dist_inputs)


def slots(nested: Any) -> Any:
    """Merges the two leading axes [B, S] of every tensor."""
    if isinstance(nested, Tensor):
        return nested.flatten(0, 1)
    return tree.map_structure(slots, nested)
