"""Recurrent modules: from the slots of segments to the sequences that such a module takes, and back.

What a recurrent module makes of an observation depends on those before it. A slot of a segment therefore holds, in
place of the bare observation, three things: the observation, the state in which the module met it while sampling, and
its place in a *sequence*. A sequence is a run of consecutive slots, through which the recurrence goes from the state
recorded at the first; no derivative is taken with respect to that state, so sequences are what backpropagation through
time is truncated to. A sequence never spans two episodes, has at most ``max_seq_len`` steps (RLlib's entry in the model
config), and ends in one slot more where the observation after its last step is bootstrapped from. The segment adds
which slots its sequences consist of, as many and as long ones in all segments, so that the host knows the shapes of a
minibatch and never waits for a device to tell them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tree
from ray.rllib.core.columns import Columns
from torch import Tensor

from blpo_rllib.core.segments import rounded_width

# Where a slot stands in its sequence, int64: 0 starts one, −1 is padding.
PLACE = "place"
# The slots of a segment's sequences.
SEQUENCES = "sequences"


def recurrent_observation(obs: Any, state_in: Any, place: Tensor, sequences: Tensor) -> dict[str, Any]:
    """What stands for the observations [M, S, ...] of a recurrent module; see :func:`places` and :func:`sequences`."""
    return {Columns.OBS: obs, Columns.STATE_IN: state_in, PLACE: place, SEQUENCES: sequences}


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


def sequences(place: np.ndarray, width_multiple: int = 1) -> np.ndarray:
    """The slots of each segment's sequences, int64 [M, 1, P, L], from the slots' places [M, S]; −1 behind their ends.

    The second axis stands where that of the slots does in other arrays, so that segments and minibatches are cut alike.
    P and L, the most sequences of a segment and the slots of the longest, are rounded up as
    :func:`~blpo_rllib.core.segments.rounded_width` says.
    """
    number = (place == 0).cumsum(1) - 1
    shape = (rounded_width(int(x.max()) + 1, width_multiple) for x in (number, place))
    found = np.full((len(place), *shape), -1)
    rows, slots = (place >= 0).nonzero()
    found[rows, number[rows, slots], place[rows, slots]] = slots
    return found[:, None]


@dataclass(frozen=True)
class Sequences:
    """The n slots of B segments as B·P sequences of L slots each, of which some are blank, and others end earlier.

    Attributes:
        slots: int64 [B·P, L], the slots of each; any slot behind their ends.
        used: bool [B·P, L], whether they are not behind it.
        index: int64 [n], where each slot stands among the B·P·L; anywhere in padding.
    """

    slots: Tensor
    used: Tensor
    index: Tensor

    @classmethod
    def of(cls, place: Tensor, slots: Tensor) -> Sequences:
        """From the places [n] and the slots [B, P, L] of each segment's sequences."""
        num_segments, num_sequences, length = slots.shape
        place = place.view(num_segments, -1)
        segment = torch.arange(num_segments, device=place.device)
        number = segment[:, None] * num_sequences + (place == 0).cumsum(1) - 1
        first_slot = segment[:, None, None] * place.shape[1]
        return cls(
            slots=(first_slot + slots.clamp(min=0)).flatten(0, 1),
            used=(slots >= 0).flatten(0, 1),
            index=(number * length + place.clamp(min=0)).flatten(),
        )

    @property
    def lengths(self) -> Tensor:
        """Slots of each sequence, int64 [B·P]; 1 of a blank one, since modules may not take what is empty."""
        return self.used.sum(1).clamp(min=1)

    @property
    def starts(self) -> Tensor:
        """The slots where sequences start, int64 [B·P]."""
        return self.slots[:, 0]

    def pad(self, x: Tensor) -> Tensor:
        """[n, ...] slot by slot to [B·P, L, ...], 0 behind the end of a sequence."""
        behind = ~self.used.view(*self.used.shape, *[1] * (x.dim() - 1))
        return x[self.slots].masked_fill(behind, 0)

    def unpad(self, y: Tensor) -> Tensor:
        """[B·P, L, ...] to [n, ...] slot by slot; what padding slots get means nothing."""
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
        sequences = Sequences.of(batch[Columns.OBS][PLACE], batch[Columns.OBS][SEQUENCES])
        # cuDNN's recurrences have no second derivatives; torch's own kernels have.
        with torch.backends.cudnn.flags(enabled=False):
            return sequences.unpad(self._module.compute_values(self._columns(batch, sequences)))

    def forward_train(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The action distribution's inputs, [n, d]."""
        sequences = Sequences.of(batch[Columns.OBS][PLACE], batch[Columns.OBS][SEQUENCES])
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
