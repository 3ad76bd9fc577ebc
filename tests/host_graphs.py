"""Recordings on the host, which hold what CUDA graphs hold: operations and where operands are, nothing of Python."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blpo_rllib.core.graphs import GraphMaker


def _tensors(nested):
    return [x for x in tree_leaves(nested) if isinstance(x, torch.Tensor)]


class _Tape(TorchDispatchMode):
    """Keeps the operations that run under it, and can take back what they did to tensors from outside."""

    def __init__(self):
        super().__init__()
        self.calls, self._own, self._before = [], set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number was read on the host")
        written = zip(function._schema.arguments, args, strict=False)
        for x in _tensors([x for argument, x in written if argument.alias_info and argument.alias_info.is_write]):
            self._keep(x.untyped_storage())
        before = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        made = [x for x in _tensors(result) if x.untyped_storage().data_ptr() not in before]
        self._own |= {x.untyped_storage().data_ptr() for x in made}
        self.calls.append((function, args, kwargs, result if made else None))
        return result

    def _keep(self, storage):
        if storage.data_ptr() not in self._own | self._before.keys():
            self._before[storage.data_ptr()] = storage, storage.clone()

    def take_back(self):
        for storage, before in self._before.values():
            storage.copy_(before)

    def run(self):
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                if result is not None:
                    for old, new in zip(_tensors(result), _tensors(again), strict=True):
                        old.copy_(new)


class HostGraphs(GraphMaker):
    """Records by listening, and replays into the same memory."""

    def __init__(self):
        self.warm_ups = self.recordings = 0

    def warm_up(self, function):
        self.warm_ups += 1
        return function()

    def record(self, function):
        tape = _Tape()
        try:
            with tape:
                result = function()
        finally:
            tape.take_back()
        self.recordings += 1
        return tape.run, result
