"""The two players as functions of their parameters: derivatives of V(s) and of log π(a|s) on one minibatch.

Parameters of a player are seen as one flat vector: w in R^p for the critic, θ in R^q for the actor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flatten(tensors: Sequence[Tensor], batch_dims: int = 0) -> Tensor:
    """Concatenates tensors into one vector [..., n], keeping ``batch_dims`` leading axes."""
    return torch.cat([x.flatten(batch_dims) for x in tensors], -1)


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cuts a vector [n] into views shaped ``like`` the given tensors: the inverse of :func:`flatten`."""
    pieces = vector.split([x.numel() for x in like])
    return [piece.view_as(x) for piece, x in zip(pieces, like, strict=True)]


def assign_gradient(parameters: Sequence[Tensor], gradient: Tensor) -> None:
    """Makes the flat ``gradient`` the ``.grad`` of ``parameters``."""
    for parameter, piece in zip(parameters, unflatten(gradient, parameters), strict=True):
        parameter.grad = piece


def _gradient(outputs: Tensor, parameters: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False) -> Tensor:
    gradients = torch.autograd.grad(
        outputs, parameters, cotangent, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return flatten(gradients)


class CriticPass:
    r"""The critic at one w on one minibatch: values V [n] and products with its first and second derivatives.

    J = ∂V/∂w is the Jacobian [n, p]. Any differentiable module serves: nothing here knows its layers.

    Args:
        values: V [n], with its autograd graph.
        parameters: The critic's parameters, p numbers in all.
    """

    def __init__(self, values: Tensor, parameters: Sequence[Tensor]):
        self.parameters = list(parameters)
        self._graph = values
        self.values = values.detach()

    @property
    def num_parameters(self) -> int:
        """p."""
        return sum(x.numel() for x in self.parameters)

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Jᵀ u, [n] to [p]; or one product a row, [k, n] to [k, p]."""
        if cotangent.dim() == 1:
            return _gradient(self._graph, self.parameters, cotangent)
        return torch.stack([_gradient(self._graph, self.parameters, u) for u in cotangent])

    def jvp(self, tangent: Tensor) -> Tensor:
        """J x, [p] to [n]; or one product a row, [k, p] to [k, n]."""
        probe = torch.zeros_like(self.values, requires_grad=True)
        transposed = _gradient(self._graph, self.parameters, probe, create_graph=True)
        rows = [
            torch.autograd.grad(transposed, probe, x, retain_graph=True, materialize_grads=True)[0]
            for x in torch.atleast_2d(tangent)
        ]
        return rows[0] if tangent.dim() == 1 else torch.stack(rows)

    def jacobian_columns(self, columns: Tensor) -> Tensor:
        """Jᵀ[K, :], i.e. ∂V/∂w_i for each i in ``columns``: int64 [k] to [k, n]."""
        units = self.values.new_zeros(len(columns), self.num_parameters)
        return self.jvp(units.scatter_(1, columns[:, None], 1.0))

    def second_order_rows(self, columns: Tensor, first: Tensor, second: Tensor) -> Tensor:
        r"""Rows K of :math:`J^\top \mathrm{diag}(a) J + \sum_t u_t \nabla^2 V_t`.

        Args:
            columns: K, int64 [k].
            first: u [n], multiplies the second derivatives of V.
            second: a [n], multiplies the outer products of its first derivatives.

        Returns:
            The rows, [k, p].
        """
        gradient = self._loss_gradient(first, second)
        return torch.stack([_gradient(entry, self.parameters, torch.ones_like(entry)) for entry in gradient[columns]])

    def second_order_product(self, tangent: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The matrix of :meth:`second_order_rows` times ``tangent`` [p]."""
        return _gradient(self._loss_gradient(first, second), self.parameters, tangent)

    def _loss_gradient(self, first: Tensor, second: Tensor) -> Tensor:
        """The gradient of Σ_t u_t V_t + a_t (V_t − V_t(w))²/2 in w, differentiable once more."""
        cotangent = first + second * (self._graph - self.values)
        return _gradient(self._graph, self.parameters, cotangent, create_graph=True)


class ActorPass:
    """The actor at one θ on one minibatch.

    Args:
        logp: log π(a|s) [n] of the actions taken, with its autograd graph.
        penalty: A scalar function of θ to be added to the leader's loss (entropy bonus, KL penalty), or None.
        parameters: The actor's parameters, q numbers in all.
    """

    def __init__(self, logp: Tensor, penalty: Tensor | None, parameters: Sequence[Tensor]):
        self.parameters = list(parameters)
        self._graph, self._penalty = logp, penalty
        self.logp = logp.detach()

    def score_product(self, weights: Tensor) -> Tensor:
        """Σ_t c_t ∇ log π(a_t|s_t), [n] to [q]."""
        return _gradient(self._graph, self.parameters, weights)

    def loss_gradient(self, weights: Tensor) -> Tensor:
        """:meth:`score_product` plus the gradient of the penalty."""
        product = self.score_product(weights)
        if self._penalty is None:
            return product
        return product + _gradient(self._penalty, self.parameters, torch.ones_like(self._penalty))
