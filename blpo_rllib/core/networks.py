"""The two players on one minibatch: values, log-probabilities and products with their derivatives.

The parameters of a player are one flat vector: w in R^p for the critic, θ in R^q for the actor. The abstract classes
state which quantities the mathematics needs. The others obtain them from any module by automatic differentiation;
:mod:`blpo_rllib.core.mlp` has them by hand for multi-layer perceptrons.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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
        places: The same parameters as int64 [k, 3]: layer (from 1), unit, and input or −1 for a bias. None where the
            critic's pass does not need them.
        on_host: ``index`` on the host; None where the critic's pass does not need it.
    """

    index: Tensor
    places: Tensor | None = None
    on_host: np.ndarray | None = None

    @classmethod
    def of(cls, indices: np.ndarray, device: torch.device) -> Coordinates:
        """Coordinates for a critic's pass that looks them up on the host, from ``indices`` int64 [k]."""
        return cls(torch.as_tensor(indices, device=device), on_host=indices)

    def copy(self) -> Coordinates:
        """The same in device memory of its own."""
        return replace(self, index=self.index.clone(), places=None if self.places is None else self.places.clone())

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, some: slice) -> Coordinates:
        return Coordinates(
            self.index[some],
            None if self.places is None else self.places[some],
            None if self.on_host is None else self.on_host[some],
        )

    def picked(self, numbers: Sequence[int]) -> Coordinates:
        """Those of these numbers on the host, one or more, without a copy to the device."""
        assert self.on_host is not None
        index = torch.cat([self.index[number : number + 1] for number in numbers])
        return Coordinates(index, on_host=self.on_host[list(numbers)])


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
        """Jᵀ u [p] for a cotangent u [n]; for k of them, [k, n], the k products [k, p]."""

    def gradient(self, cotangent: Tensor) -> Tensor:
        """Jᵀ u [p] for a cotangent u [n], where this is the only product of the pass, as in a nested step."""
        return self.vjp(cotangent)

    @abstractmethod
    def jvp(self, tangent: Tensor) -> Tensor:
        """J x [n] for a direction x [p]."""

    @abstractmethod
    def jacobian_columns(self, coordinates: Coordinates) -> Tensor:
        """∂V/∂w_i for each i in ``coordinates``, [k, n]."""

    @abstractmethod
    def second_order_rows(self, coordinates: Coordinates, first: Tensor, second: Tensor) -> Tensor:
        r"""Rows K of :math:`J^\top \mathrm{diag}(a) J + \sum_t u_t \nabla^2 V_t`.

        Args:
            coordinates: K, k of them.
            first: u [n], multiplies the second derivatives of V.
            second: a [n], multiplies the outer products of its first derivatives.

        Returns:
            The rows, [k, p].
        """

    def vjp_blocks(self, cotangent: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`vjp` of ``cotangent`` [k, n] by some columns at a time: which columns, and those, [k, .]."""
        yield slice(0, self.num_parameters), self.vjp(cotangent)

    def second_order_blocks(
        self, coordinates: Coordinates, first: Tensor, second: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`second_order_rows` by some columns at a time: which columns, and those, [k, .]."""
        yield slice(0, self.num_parameters), self.second_order_rows(coordinates, first, second)

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
        """The gradient [q] of a weighted sum over slots, Σ_t c_t log π(a_t|s_t) + d_t entropy_t + e_t KL_t.

        Args:
            logp: Weights c [n].
            entropy: Weights d [n], or None to leave the term out.
            kl: Weights e [n], or None likewise.
        """


def _gradient(outputs: Tensor, parameters: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False) -> Tensor:
    gradients = torch.autograd.grad(
        outputs, parameters, cotangent, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return flatten(gradients)


def _derivative(entry: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The derivatives of a single number [1] in all ``inputs``, flat."""
    return _gradient(entry, inputs, torch.ones_like(entry))


class AutogradCriticPass(CriticPass):
    """A critic's pass by automatic differentiation, for any twice differentiable module.

    For a row of the Hessian, only the gradient of the parameter tensor that holds its entry is differentiated again.
    Layers below that tensor are then not differentiated twice; in a large network most parameters are near the output.

    Args:
        values: V [n], with its autograd graph.
        parameters: The critic's parameters, p numbers in all.
        batched: Take several products of one kind in a single vectorised backward pass. Quicker where operations are
            many and small, as through a recurrence; slower for convolutions.
    """

    def __init__(self, values: Tensor, parameters: Sequence[Tensor], batched: bool = False):
        self._graph, self._parameters, self._batched = values, list(parameters), batched
        self.values = values.detach()
        self._ends = np.cumsum([x.numel() for x in self._parameters])
        self.num_parameters = int(self._ends[-1])
        # A cotangent u of V, and Jᵀ u with its graph as a function of u.
        self._transposed: tuple[Tensor, Tensor] | None = None

    def gradient(self, cotangent: Tensor) -> Tensor:
        return _gradient(self._graph, self._parameters, cotangent)

    def vjp(self, cotangent: Tensor) -> Tensor:
        if cotangent.dim() > 1:
            return self._gradients(self._graph, cotangent)
        if self._transposed is not None:
            return self.gradient(cotangent)
        # With a graph, because the JVP that follows uses it too.
        return self._transpose(cotangent)[1].detach()

    def jvp(self, tangent: Tensor) -> Tensor:
        """J x as the derivative of u ↦ (Jᵀ u) · x, which needs no forward-mode rules of the module's operations."""
        # The function is linear in u, so any u serves.
        probe, transposed = self._transposed or self._transpose(torch.zeros_like(self.values))
        return torch.autograd.grad(transposed, probe, tangent, retain_graph=True, materialize_grads=True)[0]

    def _transpose(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        probe = cotangent.detach().requires_grad_()
        self._transposed = probe, _gradient(self._graph, self._parameters, probe, create_graph=True)
        return self._transposed

    def jacobian_columns(self, coordinates: Coordinates) -> Tensor:
        probe = torch.zeros_like(self.values, requires_grad=True)
        return torch.stack([_derivative(entry, [probe]) for entry in self._entries(coordinates, probe)])

    def second_order_rows(self, coordinates: Coordinates, first: Tensor, second: Tensor) -> Tensor:
        entries = list(self._entries(coordinates, self._cotangent(first, second)))
        if not self._batched:
            return torch.stack([_derivative(entry, self._parameters) for entry in entries])
        return self._gradients(torch.cat(entries), torch.eye(len(entries), dtype=first.dtype, device=first.device))

    def second_order_product(self, tangent: Tensor, first: Tensor, second: Tensor) -> Tensor:
        gradient = _gradient(self._graph, self._parameters, self._cotangent(first, second), create_graph=True)
        return _gradient(gradient, self._parameters, tangent)

    def vjp_blocks(self, cotangent: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for block, parameter in self._by_parameter():
            yield block, torch.stack([_gradient(self._graph, [parameter], u) for u in cotangent])

    def second_order_blocks(
        self, coordinates: Coordinates, first: Tensor, second: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        of_parameter = self.second_order_columns(coordinates, first, second)
        for number, (block, _) in enumerate(self._by_parameter()):
            yield block, of_parameter(number)

    def second_order_columns(self, coordinates: Coordinates, first: Tensor, second: Tensor) -> Callable[[int], Tensor]:
        """The columns of :meth:`second_order_rows` that belong to a parameter, [k, .], as a function of its number."""
        entries = list(self._entries(coordinates, self._cotangent(first, second)))
        return lambda number: torch.stack([_derivative(entry, [self._parameters[number]]) for entry in entries])

    def _by_parameter(self) -> Iterator[tuple[slice, Tensor]]:
        """Each parameter, and its place in the flat vector."""
        for end, parameter in zip(self._ends.tolist(), self._parameters, strict=True):
            yield slice(end - parameter.numel(), end), parameter

    def _gradients(self, outputs: Tensor, cotangents: Tensor) -> Tensor:
        """The gradient of ``outputs`` [m] for each of the cotangents [k, m], [k, p]."""
        if not self._batched:
            return torch.stack([_gradient(outputs, self._parameters, u) for u in cotangents])
        rows = torch.autograd.grad(
            outputs, self._parameters, cotangents, retain_graph=True, is_grads_batched=True, materialize_grads=True
        )
        return torch.cat([x.flatten(1) for x in rows], 1)

    def _cotangent(self, first: Tensor, second: Tensor) -> Tensor:
        """The cotangent u_t + a_t (V_t − V_t(w)), whose value is u and whose derivative in w is diag(a) J.

        Jᵀ of it is the gradient of Σ_t u_t V_t + a_t (V_t − V_t(w))²/2 in w, which can be differentiated once more.
        """
        return first + second * (self._graph - self.values)

    def _entries(self, coordinates: Coordinates, cotangent: Tensor) -> Iterator[Tensor]:
        """The entries K of Jᵀ u, [1] each, with their graphs."""
        assert coordinates.on_host is not None
        owners = np.searchsorted(self._ends, coordinates.on_host, side="right")
        wanted = np.unique(owners).tolist()
        gradients = torch.autograd.grad(
            self._graph,
            [self._parameters[owner] for owner in wanted],
            cotangent,
            create_graph=True,
            materialize_grads=True,
        )
        by_owner = dict(zip(wanted, gradients, strict=True))
        for number, owner in enumerate(owners.tolist()):
            begin = int(self._ends[owner]) - self._parameters[owner].numel()
            yield by_owner[owner].reshape(-1).index_select(0, coordinates.index[number : number + 1] - begin)


class AutogradActorPass(ActorPass):
    """An actor's pass by automatic differentiation, for any differentiable module.

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
        given = [
            (graph, weights)
            for graph, weights in zip(self._graphs, (logp, entropy, kl), strict=True)
            if graph is not None and weights is not None
        ]
        # Together, so that there is one pass through the network.
        graphs, cotangents = zip(*given, strict=True)
        return flatten(
            torch.autograd.grad(graphs, self._parameters, cotangents, retain_graph=True, materialize_grads=True)
        )
