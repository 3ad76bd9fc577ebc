"""Records the work of a minibatch once and replays it for all others of its shape, as CUDA graphs.

With small networks a GPU spends most of an update waiting for the host, which launches some hundred kernels per
minibatch one by one. A recording launches all of them at once. It holds addresses and sizes, not values of Python:
whatever differs from call to call is passed in tensors that stay at their addresses.
"""

from __future__ import annotations

import copy
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blpo_rllib.core.reduction import Reduction

logger = logging.getLogger(__name__)

# Recordings kept, each with memory of its own; the one that was not used for longest goes first.
MOST_GRAPHS = 8


class GraphMaker(ABC):
    """Records what a function asks of a device."""

    @abstractmethod
    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Runs ``function`` and returns its result; what libraries set up on first use is there afterwards."""

    @abstractmethod
    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Records ``function`` without running it.

        Returns:
            What runs the recording, and the function's result, whose tensors each run fills anew.
        """


class CudaGraphs(GraphMaker):
    """CUDA graphs on one device."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process, such as NCCL's watchdog, may go on with what a capture forbids.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


class _Graph:
    """One recording: what it reads, how to run it, and what it fills."""

    def __init__(self, arguments: Any, replay: Callable[[], None], result: Any):
        self._own, self._replay, self._result = list(tensors(arguments)), replay, result
        self._given: list[weakref.ref[Tensor] | None] = []
        self.forget()

    def forget(self) -> None:
        """Lets the next run copy all arguments, due where those of the last one may have changed in place."""
        self._given = [None] * len(self._own)

    def run(self, arguments: Any) -> Any:
        """Replays with these arguments; those that are the same tensors as last time are not copied again."""
        changed = [
            (own, x)
            for own, x, last in zip(self._own, tensors(arguments), self._given, strict=True)
            if last is None or last() is not x
        ]
        if changed:
            torch._foreach_copy_([own for own, _ in changed], [x for _, x in changed])
        self._given = [weakref.ref(x) for x in tensors(arguments)]
        self._replay()
        return with_tensors(self._result, iter([x.clone() for x in tensors(self._result)]))


class Graphed:
    """A function of tensors that runs by recordings, one for each layout of its arguments.

    The first call with a layout runs as it is, the second is recorded, and all others replay that. If recording fails,
    the function runs as it is from there on, with one warning.

    Args:
        function: Takes dataclasses, dicts, tuples and tensors. It must not read a tensor on the host.
        maker: How to record.
        reduction: The processes that sum something inside the function: they record and replay the same calls.
    """

    def __init__(self, function: Callable[..., Any], maker: GraphMaker, reduction: Reduction):
        self._function, self._reduction = function, reduction
        self._maker: GraphMaker | None = maker
        self._graphs: dict[Hashable, _Graph | None] = {}
        # This process's layout and those of all processes, since the last `start_phase`.
        self._agreed: tuple[int, Hashable] | None = None

    def start_phase(self) -> None:
        """Begins a phase of calls between which no argument changes in place.

        Within a phase layouts change on all processes or on none.
        """
        self._agreed = None
        for graph in self._graphs.values():
            if graph is not None:
                graph.forget()

    def __call__(self, *arguments: Any) -> Any:
        if self._maker is None:
            return self._function(*arguments)
        key = self._key(arguments)
        if key not in self._graphs:
            while len(self._graphs) >= MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = None
            return self._maker.warm_up(lambda: self._function(*arguments))
        graph = self._graphs.pop(key) or self._record(self._maker, arguments)
        if graph is None:
            return self._function(*arguments)
        self._graphs[key] = graph
        return graph.run(arguments)

    def _key(self, arguments: Any) -> Hashable:
        """The layouts on all processes: a sum in one process's recording must be in the same recording on all."""
        own = hash(layout(arguments))
        if self._agreed is None or self._agreed[0] != own:
            self._agreed = own, tuple(self._reduction.gather(own))
        return self._agreed[1]

    def _record(self, maker: GraphMaker, arguments: Any) -> _Graph | None:
        own = with_tensors(arguments, iter([x.clone() for x in tensors(arguments)]))
        graph, obstacle = None, None
        try:
            graph = _Graph(own, *maker.record(lambda: self._function(*own)))
        except RuntimeError as error:
            obstacle = error
        if any(self._reduction.gather(obstacle is not None)):
            logger.warning("the update cannot be recorded as a graph and runs kernel by kernel: %s", obstacle)
            self._maker, graph = None, None
            self._graphs.clear()
        return graph


def tensors(nested: Any) -> Iterator[Tensor]:
    """The tensors in dataclasses, dicts and tuples, in a fixed order."""
    if isinstance(nested, Tensor):
        yield nested
    for part in _parts(nested).values():
        yield from tensors(part)


def with_tensors(nested: Any, replacements: Iterator[Tensor]) -> Any:
    """The same structure with other tensors, in the order of :func:`tensors`."""
    if isinstance(nested, Tensor):
        return next(replacements)
    parts = {name: with_tensors(part, replacements) for name, part in _parts(nested).items()}
    if is_dataclass(nested):
        # Not its constructor, which may compute something.
        made = copy.copy(nested)
        vars(made).update(parts)
        return made
    if isinstance(nested, tuple):
        return type(nested)(*parts.values()) if hasattr(nested, "_fields") else tuple(parts.values())
    return type(nested)(parts) if isinstance(nested, dict) else nested


def layout(nested: Any) -> Hashable:
    """All but the numbers in the tensors: structure, shapes, types, and what is on the host."""
    if isinstance(nested, Tensor):
        return tuple(nested.shape), nested.dtype
    if isinstance(nested, np.ndarray):
        return nested.tobytes()
    parts = _parts(nested)
    if parts:
        return type(nested), tuple((name, layout(part)) for name, part in parts.items())
    return nested


def _parts(nested: Any) -> dict[Any, Any]:
    if is_dataclass(nested):
        return {field.name: getattr(nested, field.name) for field in fields(nested)}
    if isinstance(nested, tuple):
        return dict(enumerate(nested))
    return nested if isinstance(nested, dict) else {}
