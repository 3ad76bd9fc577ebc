"""A device without hardware, which shows what an accelerator would be asked to do.

Tensors on it have a shape, a type and a device, but no numbers (torch's ``FakeTensorMode`` on torch's own Python-only
device, for which autograd works). Operations that mix devices raise, and so do those whose result has a size that only
the device knows. A dispatch mode keeps the books: kernels, copies between host and device, reads of numbers by the
host, and bytes in use. It cannot see what waits inside a kernel.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import ray.rllib.core.learner.torch.torch_learner as torch_learner
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from blpo_rllib.core import adam

NAME = "fakegpu"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

# Operations that compute nothing: views, and memory that nobody wrote to.
_FREE = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "lift_fresh", "permute", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_unsafe_view"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


class FakeDevice(TorchDispatchMode):
    """The books of one fake device; counters are by name of the operation or by line of the project's code.

    Attributes:
        kernels: Kernels by operation.
        reads: Numbers that the host read, by line.
        uploads: Copies from host to device, by line.
        sent: Their bytes, by line.
        downloads: Copies from device to host, by line.
        bytes: Bytes in use.
        peak: Most bytes in use since :meth:`reset`.
    """

    def __init__(self):
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.bytes = self.peak = 0
        self.reset()

    def reset(self):
        """Counts from zero; memory in use stays what it is."""
        self.kernels, self.reads, self.uploads, self.sent, self.downloads = (Counter() for _ in range(5))
        self.peak = self.bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, (namespace, name) = kwargs or {}, function._schema.name.split("::")
        if namespace == "prim":
            return function(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x for x in inputs if x.device.type == NAME]
        if name == "_local_scalar_dense" and on_device:
            self.reads[_line()] += 1
            return True if inputs[0].dtype == torch.bool else 1.0 if inputs[0].is_floating_point() else 1
        if name == "equal" and on_device:
            self.reads[_line()] += 1
            return True
        if name == "_fused_adam_" and len(on_device) == len(inputs):
            # torch has no rule for its shapes.
            self.kernels[name] += 1
            return None
        if name == "_to_copy" and isinstance(args[0], FakeTensor):
            # Else torch would make the copy for real.
            args[0].constant = None
        result = function(*args, **kwargs)
        self._enter(name, inputs, [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)])
        return result

    def _enter(self, name, inputs, outputs):
        on_device = [x.device.type == NAME for x in (*inputs, *outputs)]
        if not any(on_device):
            return
        copies = name in ("_to_copy", "copy_") and inputs[-1].device != outputs[0].device
        if copies and outputs[0].device.type == NAME:
            self.uploads[_line()] += 1
            self.sent[_line()] += outputs[0].nbytes
        elif copies:
            self.downloads[_line()] += 1
        if name not in _FREE:
            self.kernels[name] += 1
        for x in outputs:
            if x.device.type == NAME:
                self._allocate(x.untyped_storage())

    def _allocate(self, storage):
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key):
        self.bytes -= self._sizes.pop(key)


def _line():
    """The innermost line of the project's code on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if "blpo_rllib/" in frame.filename:
            return f"{frame.filename.split('blpo_rllib/')[-1]}:{frame.lineno} {frame.line}"
    return "elsewhere"


def _share_storage(tensors, others):
    """Stands in for a comparison of addresses, which fake tensors do not have."""
    return all(
        (x.untyped_storage()._cdata, x.storage_offset()) == (y.untyped_storage()._cdata, y.storage_offset())
        for x, y in zip(tensors, others, strict=True)
    )


def _move(module, device):
    """Stands in for ``Module.to``, which cannot change the device of a fake parameter in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
    return module


@contextmanager
def fake_device():
    """Inside, RLlib's learners are built on the fake device and run there; yields its books."""
    books = FakeDevice()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch_learner, "get_device", return_value=DEVICE))
        stack.enter_context(mock.patch.object(adam, "_share_memory", _share_storage))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", _move))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(books)
        yield books
