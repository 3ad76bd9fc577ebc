"""Sums over the processes that share a minibatch."""

from __future__ import annotations

import torch
from torch import Tensor


class Reduction:
    """One process holds the whole minibatch: nothing to sum."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all processes, the same on each."""
        return x

    def maximum(self, x: int) -> int:
        """The largest ``x`` of all processes."""
        return x


class AllReduce(Reduction):
    """N processes hold a share each and meet in the default process group of ``torch.distributed``.

    DistributedDataParallel hooks into ``backward()`` and does not see ``torch.autograd.grad``, hence explicit sums.
    """

    def __init__(self, device: torch.device):
        self._device = device

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        torch.distributed.all_reduce(x)
        return x

    def maximum(self, x: int) -> int:
        value = torch.tensor(x, device=self._device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value)
