"""Recurrent modules: from the slots of segments to the sequences that such a module takes, and back.

What a recurrent module makes of an observation depends on those before it. A slot of a segment therefore holds, in
place of the bare observation, three things: the observation, the state in which the module met it while sampling, and
its place in a *sequence*. A sequence is a run of consecutive slots, through which the recurrence goes from the state
recorded at the first; no derivative is taken with respect to that state, so sequences are what backpropagation through
time is truncated to. A sequence never spans two episodes, has at most ``max_seq_len`` steps (RLlib's entry in the model
config), and ends in one slot more where the observation after its last step is bootstrapped from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tree
from ray.rllib.core.columns import Columns
from torch import Tensor

# Where a slot stands in its sequence, int64: 0 starts one, −1 is padding.
PLACE = "place"


def recurrent_observation(obs: Any, state_in: Any, place: Tensor) -> dict[str, Any]:
    """What stands for the observation in the slots of a recurrent module."""
    return {Columns.OBS: obs, Columns.STATE_IN: state_in, PLACE: place}


def max_sequence_length(module: Any) -> int:
    """RLlib's ``max_seq_len`` of a recurrent module.

    Raises:
        ValueError: If its model config has none, or one that is no length.
    """
    length = module.model_config.get("max_seq_len")
    if not isinstance(length, int) or length < 1:
        raise ValueError(
            f"max_seq_len={length!r} in the model config of the recurrent module {type(module).__name__} must be an "
            'integer >= 1, the steps of a sequence: set it with rl_module(model_config={"max_seq_len": 20, ...})'
        )
    return length


def places(age: np.ndarray, step: np.ndarray, max_length: int) -> np.ndarray:
    """The place of each slot in its sequence, int64 [M, S]; a row without a step is a sequence of one slot.

    Args:
        age: int64 [M, S], the slot's distance from the start of its piece; −1 in padding.
        step: bool [M, S], whether the slot is a step; a bootstrap slot belongs to the last step's sequence.
        max_length: Steps of the longest sequence, >= 1.
    """
    bootstrap = ~step & (age > 0)
    place = np.where(age < 0, -1, (age - bootstrap) % max_length + bootstrap)
    place[:, 0] = 0
    return place


@dataclass(frozen=True)
class Sequences:
    """n slots as P sequences of at most L slots each, padded at their ends to [P, L].

    Attributes:
        starts: int64 [P], the slots where sequences start.
        lengths: int64 [P], slots of each sequence.
        slots: int64 [m], the slots that belong to a sequence.
        index: int64 [n], where each slot stands among the P·L; 0 in padding.
    """

    starts: Tensor
    lengths: Tensor
    slots: Tensor
    index: Tensor

    @classmethod
    def of(cls, place: Tensor) -> Sequences:
        """The sequences of slots [n] with these places; there must be one at least."""
        used = place >= 0
        number = (place == 0).cumsum(0) - 1
        lengths = torch.bincount(number[used])
        longest = int(lengths.max())
        return cls(
            starts=(place == 0).nonzero()[:, 0],
            lengths=lengths,
            slots=used.nonzero()[:, 0],
            index=torch.where(used, number * longest + place, 0),
        )

    def pad(self, x: Tensor) -> Tensor:
        """[n, ...] slot by slot to [P, L, ...], 0 behind the end of a sequence."""
        shape = len(self.lengths), int(self.lengths.max())
        padded = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
        padded[self.index[self.slots]] = x[self.slots]
        return padded.view(*shape, *x.shape[1:])

    def unpad(self, y: Tensor) -> Tensor:
        """[P, L, ...] to [n, ...] slot by slot; what padding slots get means nothing."""
        return y.flatten(0, 1)[self.index]


class SlotwiseModule:
    """A recurrent RLModule that takes slots [n, ...] as a feed-forward one does.

    Its observations are :func:`recurrent_observation`; the module itself gets them as RLlib's learners give them to it:
    sequences [P, L, ...] under "obs" and "actions", their initial states [P, ...] under "state_in", their lengths under
    "seq_lens".

    Args:
        module: A torch RLModule with a value function and an initial state.
    """

    def __init__(self, module: Any):
        self._module = module

    def compute_values(self, batch: dict[str, Any]) -> Tensor:
        """V, [n]."""
        sequences = Sequences.of(batch[Columns.OBS][PLACE])
        # cuDNN's recurrences have no second derivatives; torch's own kernels have.
        with torch.backends.cudnn.flags(enabled=False):
            return sequences.unpad(self._module.compute_values(self._columns(batch, sequences)))

    def forward_train(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The action distribution's inputs, [n, d]."""
        sequences = Sequences.of(batch[Columns.OBS][PLACE])
        outputs = self._module.forward_train(self._columns(batch, sequences))
        return {Columns.ACTION_DIST_INPUTS: sequences.unpad(outputs[Columns.ACTION_DIST_INPUTS])}

    def _columns(self, batch: dict[str, Any], sequences: Sequences) -> dict[str, Any]:
        slots = batch[Columns.OBS]
        columns = {
            Columns.OBS: tree.map_structure(sequences.pad, slots[Columns.OBS]),
            Columns.STATE_IN: tree.map_structure(lambda x: x[sequences.starts], slots[Columns.STATE_IN]),
            Columns.SEQ_LENS: sequences.lengths,
        }
        if Columns.ACTIONS in batch:
            columns[Columns.ACTIONS] = tree.map_structure(sequences.pad, batch[Columns.ACTIONS])
        return columns


def slotwise(module: Any) -> Any:
    """The module, or a view of it that takes slots if it is recurrent."""
    return SlotwiseModule(module) if module.is_stateful() else module
