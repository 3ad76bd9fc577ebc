"""Sums over the processes that share a minibatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Reduction:
    """One process holds the whole minibatch: nothing to sum.

    Attributes:
        rank: Number of this process among those that share the minibatch.
    """

    rank = 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all processes, the same on each."""
        return self.sum_all([x])[0]

    def sum_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of several tensors of one type, in a single exchange."""
        return list(tensors)

    def gather(self, x: Any) -> list[Any]:
        """Every process's ``x``, a small object on the host, in the same order everywhere."""
        return [x]


class AllReduce(Reduction):
    """N processes hold a share each and meet in the default process group of ``torch.distributed``.

    DistributedDataParallel hooks into ``backward()`` and does not see ``torch.autograd.grad``, hence explicit sums.

    Attributes:
        rank: Number of this process.
        calls: Number of sums exchanged so far.
        bytes: How many bytes each process put into them.
    """

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.calls = self.bytes = 0

    def sum_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        flat = torch.cat([x.reshape(-1) for x in tensors])
        torch.distributed.all_reduce(flat)
        self.calls, self.bytes = self.calls + 1, self.bytes + flat.numel() * flat.element_size()
        pieces = flat.split([x.numel() for x in tensors])
        return [piece.view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]

    def gather(self, x: Any) -> list[Any]:
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, x)
        return everyone
