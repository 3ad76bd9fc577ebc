"""An update's operations recorded once and replayed on fixed memory: a CPU's counterpart of a CUDA graph.

A minibatch of a small network takes some two hundred small tensor operations, whose dispatch costs several times their
arithmetic. All minibatches of one shape take the same ones, on arrays of the same sizes. :class:`Recorder` watches them
once, the compiled kernels among them, and writes down a list of calls of compiled functions
(``blpo_rllib/core/native/``) on one block of memory; :class:`Replay` runs the list, in a single call. The mathematics
is written once, in the code that is recorded.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blpo_rllib.core.lowering import LOWERINGS, VIEWS, CannotRecordError
from blpo_rllib.core.native import DTYPES, Argument, Kernels, Net, pack

# Runs by which the number of threads is chosen.
_NUM_TRIALS = 12
# What buffers are aligned to, in bytes: a cache line, and any vector.
_ALIGNMENT = 64


@dataclass
class _Buffer:
    """An array of the recorded run.

    Attributes:
        item_size: Bytes of a number when replayed; truth values are stored as numbers.
        size: Bytes in all when replayed.
        address: Where it stands, if that is fixed.
        first: The first call that touches it.
        last: The last one.
        offset: Where it stands in the block of memory.
    """

    item_size: int
    size: int
    address: int | None = None
    first: int = -1
    last: int = -1
    offset: int = 0


@dataclass(frozen=True)
class Call:
    """A call of a compiled function, with arrays of the recorded run in place of the replay's."""

    name: str
    args: tuple[Argument, ...]

    @property
    def tensors(self) -> list[Tensor]:
        found = [x for x in self.args if isinstance(x, Tensor)]
        for net in self.args:
            found += net.parameters if isinstance(net, Net) else ()
        return found


class Recorder(TorchDispatchMode):
    """While active, writes down the operations that run.

    Args:
        kernels: The compiled functions.
        dtype: Type of all real numbers.
        inputs: Arrays that are other ones in each replay.
        fixed: Arrays that stay where they are, and whose contents may change.

    Attributes:
        round: Will hold the number of the repetition while a replay runs, int64 [1].
    """

    def __init__(self, kernels: Kernels, dtype: torch.dtype, inputs: Sequence[Tensor], fixed: Sequence[Tensor]):
        super().__init__()
        self._kernels, self._dtype, self._inputs = kernels, dtype, inputs
        self._calls: list[Call] = []
        self._num_repeated: int | None = None
        self.round = torch.zeros(1, dtype=torch.int64)
        self._buffers: dict[int, _Buffer] = {}
        # Keeps every array of the recorded run in memory, so that an address means one array only.
        self._arrays: list[Tensor] = []
        for tensor in inputs:
            self._own(tensor)
        for tensor in (self.round, *fixed):
            self._buffers[_address(tensor)] = _Buffer(tensor.element_size(), 0, _address(tensor))

    def __enter__(self) -> Recorder:
        self._kernels.listener = self._hear
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._kernels.listener = None

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = operation(*args, **kwargs)
        if operation in VIEWS:
            self._arrays += [out] if isinstance(out, Tensor) else out
            return out
        lowering = LOWERINGS.get(operation)
        if lowering is None:
            raise CannotRecordError(f"{operation} has no compiled counterpart")
        result = out[0] if isinstance(out, tuple) else out
        if _address(result) not in self._buffers:
            self._own(result)
        if result.numel():
            lowering(self, result, *args, **kwargs)
        return out

    def _hear(self, name: str, args: Sequence[Argument]) -> None:
        self.call(name, *args)

    def _own(self, tensor: Tensor) -> None:
        """Makes a buffer for an array that the recorded run has made."""
        if not tensor.numel():
            return
        item_size = 8 if tensor.dtype == torch.int64 else DTYPES[self._dtype]
        storage = tensor.untyped_storage()
        self._buffers[storage.data_ptr()] = _Buffer(item_size, storage.nbytes() // tensor.element_size() * item_size)
        self._arrays.append(tensor)

    def end_repetition(self) -> None:
        """What follows is not repeated: :meth:`Replay.run_rest` runs it, if it is asked for."""
        self._num_repeated = len(self._calls)

    def call(self, name: str, *args: Argument) -> None:
        """Writes down a call of a compiled function."""
        call = Call(name, args)
        for tensor in call.tensors:
            buffer = self._buffers.get(_address(tensor))
            if buffer is None:
                raise CannotRecordError(f"{name} reads an array {tuple(tensor.shape)} that is not known to stay")
            buffer.first = len(self._calls) if buffer.first < 0 else buffer.first
            buffer.last = len(self._calls)
        self._calls.append(call)

    def finish(self, outputs: Sequence[Tensor], filling: Sequence[Call] = ()) -> Replay:
        """The list of calls as one that can be replayed.

        Args:
            outputs: What it has results for.
            filling: Calls that each fill the input that is their first argument; due before all others, in reverse, if
                the input is used.
        """
        for tensor in outputs:
            if tensor.numel():
                self._buffers[_address(tensor)].last = len(self._calls)
        due: list[Call] = []
        for call in filling:
            if self._buffers[_address(call.args[0])].last >= 0:
                due.insert(0, call)
                for tensor in call.tensors:
                    self._buffers[_address(tensor)].last = max(0, self._buffers[_address(tensor)].last)
        for tensor in self._inputs:
            self._buffers[_address(tensor)].first = -1
        used = [x for x in self._buffers.values() if x.address is None and x.last >= 0]
        memory = torch.zeros(_place(used) + _ALIGNMENT, dtype=torch.uint8)
        start = -(-memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT - memory.data_ptr()

        def buffer_of(tensor: Tensor) -> _Buffer:
            return self._buffers[_address(tensor)]

        def address(tensor: Tensor) -> int:
            buffer = buffer_of(tensor)
            base = memory.data_ptr() + start + buffer.offset if buffer.address is None else buffer.address
            return int(base + tensor.storage_offset() * buffer.item_size)

        def view(tensor: Tensor) -> Tensor:
            if not tensor.numel():
                return torch.empty(tensor.shape, dtype=self._dtype)
            if buffer_of(tensor).address is not None:
                return tensor
            begin, buffer = start + buffer_of(tensor).offset, buffer_of(tensor)
            dtype = torch.int64 if tensor.dtype == torch.int64 else self._dtype
            numbers = memory[begin : begin + buffer.size].view(dtype)
            return numbers[tensor.storage_offset() :].as_strided(tensor.shape, tensor.stride())

        calls, alive = [], []
        for call in (*due, *self._calls):
            words, more = pack(call.args, address)
            calls.append((self._kernels.address(call.name, self._dtype), ctypes.addressof(words)))
            alive.append((words, more))
        taken = [view(x) if buffer_of(x).last >= 0 else None for x in self._inputs]
        repeated = len(due) + (len(self._calls) if self._num_repeated is None else self._num_repeated)
        return Replay(self._kernels, memory, calls, repeated, alive, taken, [view(x) for x in outputs], self.round)


class Replay:
    """A recorded list of calls with its memory; :meth:`Recorder.finish` makes it.

    Attributes:
        inputs: To be filled before each run; None where the value is not used.
        outputs: Hold the results until the next run.
    """

    def __init__(
        self,
        kernels: Kernels,
        memory: Tensor,
        calls: Sequence[tuple[int, int]],
        num_repeated: int,
        alive: Any,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        round_: Tensor,
    ):
        self._kernels, self._alive = kernels, (memory, alive, round_)
        self._num_calls, self._num_repeated = len(calls), num_repeated
        self._round = round_.data_ptr()
        self._calls = (ctypes.c_int64 * (2 * len(calls)))(*(word for call in calls for word in call))
        self._start = ctypes.addressof(self._calls)
        self._rest = self._start + num_repeated * ctypes.sizeof(ctypes.c_int64) * 2
        self.inputs, self.outputs = inputs, outputs
        # The quickest run so far by number of threads, where there is a choice.
        self._quickest: dict[int, float] = {}
        self._num_trials = 0

    def run(self, repetitions: int = 1) -> None:
        """Runs all calls, as often as is asked for.

        On one thread or on all: whichever was quicker in the first runs, for waking a thread may cost more than it
        saves. Results do not depend on it.
        """
        num_threads = torch.get_num_threads()
        if num_threads == 1:
            self._run(1, repetitions)
        elif self._num_trials < _NUM_TRIALS:
            self._try((1, num_threads)[self._num_trials % 2], repetitions)
        else:
            self._run(min(self._quickest, key=self._quickest.__getitem__), repetitions)

    def run_rest(self) -> None:
        """Runs what follows the repetitions, on what the last of them left behind."""
        count = self._num_calls - self._num_repeated
        self._kernels.run(self._rest, count, torch.get_num_threads(), self._round, 1)

    def _run(self, num_threads: int, repetitions: int) -> None:
        self._kernels.run(self._start, self._num_repeated, num_threads, self._round, repetitions)

    def _try(self, num_threads: int, repetitions: int) -> None:
        started = time.perf_counter()
        self._run(num_threads, repetitions)
        elapsed = (time.perf_counter() - started) / repetitions
        self._quickest[num_threads] = min(elapsed, self._quickest.get(num_threads, elapsed))
        self._num_trials += 1


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _place(buffers: Sequence[_Buffer]) -> int:
    """Gives each buffer a place of its own from its first to its last call; returns the bytes that takes."""
    placed: list[_Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=lambda x: -x.size):
        neighbours = sorted(
            ((x.offset, x.size) for x in placed if x.first <= buffer.last and buffer.first <= x.last),
        )
        offset = 0
        for begin, size in neighbours:
            if offset + buffer.size <= begin:
                break
            offset = max(offset, -(-(begin + size) // _ALIGNMENT) * _ALIGNMENT)
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + buffer.size)
    return total
