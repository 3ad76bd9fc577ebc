"""RLlib's train batch with trajectory segments in place of single steps."""

from __future__ import annotations

from ray.rllib.policy.sample_batch import SampleBatch

from blpo_rllib.core.advantages import Rollouts
from blpo_rllib.core.segments import SegmentBatch
from blpo_rllib.learning.connectors import BatchSizes


class ModuleSegments(SampleBatch):
    """One module's part of a train batch: segments, and what to do with them.

    RLlib asks for nothing but the length, which its counters take for the number of steps trained.

    Args:
        segments: The segments [M, S, ...].
        rollouts: What the segments were cut from, for advantages over whole rollouts; None for advantages that end with
            the segment.
        sizes: Its minibatches, whose number divides M, and its steps.
        num_epochs: Passes over the segments, >= 1.
    """

    def __init__(self, segments: SegmentBatch, rollouts: Rollouts | None, sizes: BatchSizes, num_epochs: int):
        super().__init__()
        self.segments, self.rollouts = segments, rollouts
        self.num_minibatches, self.num_epochs = sizes.num_minibatches, num_epochs
        self.count = num_epochs * sizes.num_steps
