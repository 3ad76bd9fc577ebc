"""The two players on one minibatch: values, log-probabilities and products with their derivatives.

Parameters of a player are seen as one flat vector: w in R^p for the critic, θ in R^q for the actor. The classes here
state what the mathematics needs and obtain it by automatic differentiation from any module; :mod:`blpo_rllib.core.mlp`
gives the same by hand for multi-layer perceptrons.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates tensors into one vector [n]."""
    return torch.cat([x.reshape(-1) for x in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cuts a vector [n] into views shaped ``like`` the given tensors: the inverse of :func:`flatten`."""
    pieces = vector.split([x.numel() for x in like])
    return [piece.view_as(x) for piece, x in zip(pieces, like, strict=True)]


@dataclass(frozen=True)
class Coordinates:
    """Coordinates K of the critic's flat vector.

    Attributes:
        index: int64 [k], on the critic's device.
        groups: The same as positions in the critic's layers, where its pass needs that.
        places: The same once more, int64 [k, 3]: layer, unit, and input or −1 for a bias.
    """

    index: Tensor
    groups: Sequence[Any] = ()
    places: Tensor | None = None

    @classmethod
    def of(cls, indices: np.ndarray, device: torch.device) -> Coordinates:
        """From indices on the host."""
        return cls(torch.as_tensor(indices, device=device))

    def copy(self) -> Coordinates:
        """The same in memory of its own, but for ``groups``."""
        return replace(self, index=self.index.clone(), places=None if self.places is None else self.places.clone())

    def __len__(self) -> int:
        return len(self.index)


class CriticPass(ABC):
    r"""The critic at one w on one minibatch: values V [n] and products with its first and second derivatives.

    J = ∂V/∂w is the Jacobian [n, p].

    Attributes:
        values: V [n], without a graph.
        num_parameters: p.
    """

    values: Tensor
    num_parameters: int

    @abstractmethod
    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ u, [n] to [p]; or one product a row, [k, n] to [k, p]."""

    def gradient(self, cotangent: Tensor) -> Tensor:
        """Jᵀ u, [n] to [p], where nothing else is asked of this pass, as in a nested step."""
        return self.vjp(cotangent)

    @abstractmethod
    def jvp(self, tangent: Tensor) -> Tensor:
        """J x, [p] to [n]."""

    @abstractmethod
    def jacobian_columns(self, columns: Coordinates) -> Tensor:
        """∂V/∂w_i for each i in ``columns``, [k, n]."""

    @abstractmethod
    def second_order_rows(self, columns: Coordinates, first: Tensor, second: Tensor) -> Tensor:
        r"""Rows K of :math:`J^\top \mathrm{diag}(a) J + \sum_t u_t \nabla^2 V_t`.

        Args:
            columns: K, k of them.
            first: u [n], multiplies the second derivatives of V.
            second: a [n], multiplies the outer products of its first derivatives.

        Returns:
            The rows, [k, p].
        """

    @abstractmethod
    def second_order_product(self, tangent: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The matrix of :meth:`second_order_rows` times ``tangent`` [p]."""


class ActorPass(ABC):
    """The actor at one θ on one minibatch.

    Attributes:
        logp: log π(a|s) [n] of the actions taken, without a graph.
        entropy: Entropy [n] of π(·|s).
        kl: KL(π_old(·|s) ‖ π(·|s)) [n], or None where no penalty asks for it.
    """

    logp: Tensor
    entropy: Tensor
    kl: Tensor | None

    @abstractmethod
    def gradient(self, logp: Tensor, entropy: Tensor | None = None, kl: Tensor | None = None) -> Tensor:
        """Σ_t c_t ∇ log π(a_t|s_t) for weights c = ``logp`` [n], to [q]; plus the same for the other quantities."""


def _gradient(outputs: Tensor, parameters: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False) -> Tensor:
    gradients = torch.autograd.grad(
        outputs, parameters, cotangent, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return flatten(gradients)


class AutogradCriticPass(CriticPass):
    """By automatic differentiation, for any twice differentiable module.

    Args:
        values: V [n], with its autograd graph.
        parameters: The critic's parameters, p numbers in all.
        batched: Take several products of one kind in a single vectorised backward pass. Quicker where operations are
            many and small, as through a recurrence; slower for convolutions.
    """

    def __init__(self, values: Tensor, parameters: Sequence[Tensor], batched: bool = False):
        self._graph, self._parameters, self._batched = values, list(parameters), batched
        self.values = values.detach()
        self.num_parameters = sum(x.numel() for x in self._parameters)

    def vjp(self, cotangent: Tensor) -> Tensor:
        if cotangent.dim() == 1:
            return _gradient(self._graph, self._parameters, cotangent)
        return self._gradients(self._graph, cotangent)

    def jvp(self, tangent: Tensor) -> Tensor:
        return self._jvps(tangent[None])[0]

    def jacobian_columns(self, columns: Coordinates) -> Tensor:
        units = self.values.new_zeros(len(columns), self.num_parameters)
        return self._jvps(units.scatter_(1, columns.index[:, None], 1.0))

    def _jvps(self, tangents: Tensor) -> Tensor:
        """J x as the derivative of u ↦ (Jᵀ u) · x, which needs no forward-mode rules of the module's operations."""
        probe = torch.zeros_like(self.values, requires_grad=True)
        transposed = _gradient(self._graph, self._parameters, probe, create_graph=True)
        products = [
            torch.autograd.grad(transposed, probe, x, retain_graph=True, materialize_grads=True)[0] for x in tangents
        ]
        return torch.stack(products)

    def second_order_rows(self, columns: Coordinates, first: Tensor, second: Tensor) -> Tensor:
        picked = self._loss_gradient(first, second)[columns.index]
        return self._gradients(picked, torch.eye(len(picked), dtype=picked.dtype, device=picked.device))

    def second_order_product(self, tangent: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return _gradient(self._loss_gradient(first, second), self._parameters, tangent)

    def _gradients(self, outputs: Tensor, cotangents: Tensor) -> Tensor:
        """The gradient of ``outputs`` [m] for each of the cotangents [k, m], [k, p]."""
        if not self._batched:
            return torch.stack([_gradient(outputs, self._parameters, u) for u in cotangents])
        rows = torch.autograd.grad(
            outputs, self._parameters, cotangents, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )
        return torch.cat([x.flatten(1) for x in rows], 1)

    def _loss_gradient(self, first: Tensor, second: Tensor) -> Tensor:
        """The gradient of Σ_t u_t V_t + a_t (V_t − V_t(w))²/2 in w, differentiable once more."""
        cotangent = first + second * (self._graph - self.values)
        return _gradient(self._graph, self._parameters, cotangent, create_graph=True)


class AutogradActorPass(ActorPass):
    """By automatic differentiation, for any differentiable module.

    Args:
        logp: log π(a|s) [n] of the actions taken, with its autograd graph.
        entropy: Entropy [n] of the action distributions, with its autograd graph.
        kl: KL divergence [n] from the old distributions, with its autograd graph, or None.
        parameters: The actor's parameters, q numbers in all.
    """

    def __init__(self, logp: Tensor, entropy: Tensor, kl: Tensor | None, parameters: Sequence[Tensor]):
        self._graphs, self._parameters = (logp, entropy, kl), list(parameters)
        self.logp, self.entropy = logp.detach(), entropy.detach()
        self.kl = None if kl is None else kl.detach()

    def gradient(self, logp: Tensor, entropy: Tensor | None = None, kl: Tensor | None = None) -> Tensor:
        products = [
            _gradient(graph, self._parameters, weights)
            for graph, weights in zip(self._graphs, (logp, entropy, kl), strict=True)
            if graph is not None and weights is not None
        ]
        return products[0] if len(products) == 1 else torch.stack(products).sum(0)
