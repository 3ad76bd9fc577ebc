r"""The two players by hand where they are multi-layer perceptrons.

Activations are stored unit by unit, [d, n] for n slots, so that a unit is a contiguous row. With :math:`h_0 = x`,

.. math::  z_l = W_l h_{l-1} + b_l, \quad h_l = \varphi(z_l) \; (l < L), \quad \text{output } z_L.

Backward, :math:`g_l` is the cotangent of :math:`z_l`: :math:`g_{l-1} = \varphi'_{l-1} \odot W_l^\top g_l`. A second
derivative is the directional derivative of that pass (Pearlmutter 1994). For a row of the Hessian the direction is a
single weight, whose forward tangent touches one unit of one layer: below that layer the pass has no tangent at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from blpo_rllib.core.networks import ActorPass, CriticPass, unflatten


@dataclass(frozen=True)
class Activation:
    """φ, with φ' as a function of h = φ(z), and φ''/φ' as a function of h (None where it is 0)."""

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    bend: Callable[[Tensor], Tensor] | None


def _tanh(z: Tensor) -> Tensor:
    """tanh z = 2σ(2z) − 1: on CPU a third of torch.tanh's time, to within rounding of 1."""
    return z.mul(2).sigmoid_().mul_(2).sub_(1)


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: Activation(_tanh, lambda h: 1 - h * h, lambda h: -2 * h),
    nn.ReLU: Activation(torch.relu, lambda h: (h > 0).to(h.dtype), None),
}


@dataclass(frozen=True)
class UnitGroup:
    """Single parameters of one layer l, found by their positions in the flat vector.

    Attributes:
        layer: l.
        rows: Where they stand among all positions asked for, int64 [m].
        units: Row r of each, int64 [m].
        inputs: Column c of each, int64 [m]; 0 for biases.
        is_bias: bool [m, 1].
        batch: 0 ... m − 1.
        weights: Those that are not biases, int64.
    """

    layer: int
    rows: Tensor
    units: Tensor
    inputs: Tensor
    is_bias: Tensor
    batch: Tensor
    weights: Tensor


class MLP:
    """The layers of a perceptron, linear at the output.

    Args:
        layers: L linear layers with biases.
        activations: The L − 1 activations between them.
    """

    def __init__(self, layers: Sequence[nn.Linear], activations: Sequence[Activation]):
        self.layers, self.activations = list(layers), list(activations)
        self.parameters: list[Tensor] = [p for layer in self.layers for p in (layer.weight, layer.bias)]
        self._located: tuple[bytes, list[UnitGroup]] = (b"", [])

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> MLP | None:
        """The perceptron that applying ``modules`` in turn amounts to, or None if it is not one."""
        leaves = [leaf for module in modules for leaf in module.modules() if not list(leaf.children())]
        layers, activations = leaves[::2], [ACTIVATIONS.get(type(leaf)) for leaf in leaves[1::2]]
        if len(layers) != len(activations) + 1 or None in activations:
            return None
        if not all(type(layer) is nn.Linear and layer.bias is not None for layer in layers):
            return None
        return cls(layers, activations)  # type: ignore[arg-type]

    def locate(self, columns: np.ndarray) -> list[UnitGroup]:
        """The parameters at ``columns`` (int64 [k]) of the flat vector, layer by layer; computed on the host, once."""
        key = columns.tobytes()
        if self._located[0] != key:
            self._located = key, self._locate(columns)
        return self._located[1]

    def _locate(self, columns: np.ndarray) -> list[UnitGroup]:
        device, groups, offset = self.layers[0].weight.device, [], 0
        for number, layer in enumerate(self.layers, start=1):
            num_weights, num_units = layer.weight.numel(), layer.out_features
            rows = np.flatnonzero((columns >= offset) & (columns < offset + num_weights + num_units))
            position = columns[rows] - offset
            is_bias = position >= num_weights
            units = np.where(is_bias, position - num_weights, position // layer.in_features)
            inputs = np.where(is_bias, 0, position % layer.in_features)
            arrays = rows, units, inputs, is_bias[:, None], np.arange(len(rows)), np.flatnonzero(~is_bias)
            if len(rows):
                groups.append(UnitGroup(number, *(torch.as_tensor(x, device=device) for x in arrays)))
            offset += num_weights + num_units
        return groups

    def forward(self, x: Tensor) -> MLPPass:
        """Inputs [n, d_0] through all layers."""
        hidden = [x.T]
        with torch.no_grad():
            for layer, activation in zip(self.layers, self.activations, strict=False):
                hidden.append(activation.function(torch.addmm(layer.bias[:, None], layer.weight, hidden[-1])))
            output = torch.addmm(self.layers[-1].bias[:, None], self.layers[-1].weight, hidden[-1])
        return MLPPass(self, hidden, output)


class MLPPass:
    """A perceptron at one point on n inputs.

    Attributes:
        output: z_L [d_L, n].
    """

    def __init__(self, mlp: MLP, hidden: list[Tensor], output: Tensor):
        self._weights = [layer.weight.detach() for layer in mlp.layers]
        self._activations = mlp.activations
        # Indexed by layer: h_0 ... h_{L-1}; φ' and φ''/φ' of layers 1 ... L-1.
        self._hidden = hidden
        self._slopes: list[Tensor | None] = [None] * len(hidden)
        self.output = output
        self.num_parameters = sum(p.numel() for p in mlp.parameters)

    @property
    def depth(self) -> int:
        """L."""
        return len(self._weights)

    def _weight(self, layer: int) -> Tensor:
        return self._weights[layer - 1]

    def _slope(self, layer: int) -> Tensor:
        """φ'(z_l) [d_l, n]."""
        slope = self._slopes[layer]
        if slope is None:
            slope = self._slopes[layer] = self._activations[layer - 1].slope(self._hidden[layer])
        return slope

    def _bend(self, layer: int, cotangent: Tensor) -> Tensor | None:
        """φ''(z_l) ⊙ W_{l+1}ᵀ g_{l+1} = (φ''/φ') ⊙ g_l, what a tangent of z_l is multiplied with on the way back."""
        bend = self._activations[layer - 1].bend
        return None if bend is None else bend(self._hidden[layer]) * cotangent

    def cotangents(self, output: Tensor) -> list[Tensor]:
        """g_1 ... g_L (at index 1 ... L) for the output cotangent g_L [..., d_L, n]."""
        cotangents = [output] * (self.depth + 1)
        for layer in range(self.depth, 1, -1):
            cotangents[layer - 1] = self._back(layer, cotangents[layer]) * self._slope(layer - 1)
        return cotangents

    def _back(self, layer: int, cotangent: Tensor) -> Tensor:
        """W_lᵀ g, [..., d_l, n] to [..., d_{l-1}, n]."""
        weight = self._weight(layer)
        return weight.T * cotangent if len(weight) == 1 else weight.T @ cotangent

    def gradient(self, cotangents: list[Tensor]) -> Tensor:
        """[..., p]: each layer's weight gradient g_l h_{l-1}ᵀ and bias gradient Σ g_l."""
        pieces = []
        for layer in range(1, self.depth + 1):
            g, h = cotangents[layer], self._hidden[layer - 1]
            batch = g.shape[:-2]
            pieces.append((g.reshape(-1, g.shape[-1]) @ h.T).view(*batch, -1))
            pieces.append(g.sum(-1))
        return torch.cat(pieces, -1)

    def tangents(self, direction: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Tangents of z_1 ... z_L (at index 1 ... L) for (δW_l, δb_l) in ``direction``."""
        tangents: list[Tensor] = [self.output] * (self.depth + 1)
        below = None
        for layer, (weight, bias) in enumerate(direction, start=1):
            tangent = torch.addmm(bias[:, None], weight, self._hidden[layer - 1])
            if below is not None:
                tangent = torch.addmm(tangent, self._weight(layer), below)
            tangents[layer] = tangent
            below = tangent * self._slope(layer) if layer < self.depth else None
        return tangents

    def directional_gradient(
        self,
        direction: Sequence[tuple[Tensor, Tensor]],
        tangents: list[Tensor],
        cotangents: list[Tensor],
        output: Tensor,
    ) -> Tensor:
        """The derivative of :meth:`gradient` along ``direction``, where g_L changes by ``output`` [d_L, n]."""
        change, pieces = output, []
        for layer in range(self.depth, 0, -1):
            g = cotangents[layer]
            weight = change @ self._hidden[layer - 1].T
            if layer > 1:
                weight = torch.addmm(weight, g, (tangents[layer - 1] * self._slope(layer - 1)).T)
            pieces += [change.sum(-1), weight.reshape(-1)]
            if layer > 1:
                below = self._weight(layer).T @ change + direction[layer - 1][0].T @ g
                change = below * self._slope(layer - 1)
                bend = self._bend(layer - 1, cotangents[layer - 1])
                change = change if bend is None else change + bend * tangents[layer - 1]
        return torch.cat(pieces[::-1])

    def unit_tangents(self, group: UnitGroup) -> list[Tensor]:
        """How each parameter of ``group`` moves z_l of its unit ([m, n], index l) and the layers above ([m, d, n])."""
        layer, units = group.layer, group.units
        drive = torch.where(group.is_bias, 1.0, self._hidden[layer - 1][group.inputs])
        tangents = [drive] * (self.depth + 1)
        if layer == self.depth:
            return tangents
        moved = self._slope(layer)[units] * drive
        tangents[layer + 1] = self._weight(layer + 1).T[units][:, :, None] * moved[:, None]
        for above in range(layer + 2, self.depth + 1):
            tangents[above] = self._weight(above) @ (tangents[above - 1] * self._slope(above - 1))
        return tangents

    def output_tangent(self, group: UnitGroup, tangents: list[Tensor]) -> Tensor:
        """The last of :meth:`unit_tangents` for a single output, [m, n]."""
        return tangents[self.depth] if group.layer == self.depth else tangents[self.depth][:, 0]

    def unit_directional_gradients(self, group: UnitGroup, cotangents: list[Tensor], output_scale: Tensor) -> Tensor:
        """:meth:`directional_gradient` for several single parameters of one layer at once.

        Args:
            group: The parameters.
            cotangents: g_1 ... g_L.
            output_scale: a [n]: g_L changes by a times the change of the (single) output.

        Returns:
            The rows, [m, p].
        """
        layer, units, batch = group.layer, group.units, group.batch
        tangents = self.unit_tangents(group)
        drive = tangents[layer]
        change = (output_scale * self.output_tangent(group, tangents))[:, None]
        pieces = []
        for above in range(self.depth, 0, -1):
            weight = self._outer(change, self._hidden[above - 1])
            if above - 1 > layer:
                weight += cotangents[above] @ (tangents[above - 1] * self._slope(above - 1)).transpose(-1, -2)
            elif above - 1 == layer:
                weight[batch, :, units] += (self._slope(layer)[units] * drive) @ cotangents[above].T
            pieces += [change.sum(-1), weight.flatten(1)]
            if above > 1:
                change = self._unit_change(group, above, change, tangents, cotangents)
        return torch.cat(pieces[::-1], -1)

    def _unit_change(
        self, group: UnitGroup, above: int, change: Tensor, tangents: list[Tensor], cotangents: list[Tensor]
    ) -> Tensor:
        """From the change of g at layer ``above`` to its change one layer below."""
        layer, below = group.layer, above - 1
        change = self._back(above, change)
        if above == layer:
            weights = group.weights
            change[weights, group.inputs[weights]] += cotangents[layer][group.units[weights]]
        change = change * self._slope(below)
        bend = self._bend(below, cotangents[below]) if below >= layer else None
        if bend is None:
            return change
        if below > layer:
            return change + bend * tangents[below]
        change[group.batch, group.units] += bend[group.units] * tangents[layer]
        return change

    def _outer(self, change: Tensor, hidden: Tensor) -> Tensor:
        """change hᵀ, [m, d, n] and [e, n] to [m, d, e], as one product."""
        return (change.reshape(-1, change.shape[-1]) @ hidden.T).view(*change.shape[:2], len(hidden))


class MLPCriticPass(CriticPass):
    """The critic as a perceptron with a single output.

    Args:
        mlp: Its layers.
        obs: Inputs [n, d_0].
    """

    def __init__(self, mlp: MLP, obs: Tensor):
        self._mlp, self._pass = mlp, mlp.forward(obs)
        self.values = self._pass.output[0]
        self.num_parameters = self._pass.num_parameters

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self._pass.gradient(self._pass.cotangents(cotangent[..., None, :]))

    def jvp(self, tangent: Tensor) -> Tensor:
        return self._pass.tangents(self._direction(tangent))[-1][0]

    def jacobian_columns(self, columns: np.ndarray) -> Tensor:
        rows = self.values.new_empty(len(columns), len(self.values))
        for group in self._mlp.locate(columns):
            rows[group.rows] = self._pass.output_tangent(group, self._pass.unit_tangents(group))
        return rows

    def second_order_rows(self, columns: np.ndarray, first: Tensor, second: Tensor) -> Tensor:
        cotangents = self._pass.cotangents(first[None])
        rows = self.values.new_empty(len(columns), self.num_parameters)
        for group in self._mlp.locate(columns):
            rows[group.rows] = self._pass.unit_directional_gradients(group, cotangents, second)
        return rows

    def second_order_product(self, tangent: Tensor, first: Tensor, second: Tensor) -> Tensor:
        direction = self._direction(tangent)
        tangents = self._pass.tangents(direction)
        cotangents = self._pass.cotangents(first[None])
        return self._pass.directional_gradient(direction, tangents, cotangents, second * tangents[-1])

    def _direction(self, tangent: Tensor) -> list[tuple[Tensor, Tensor]]:
        pieces = unflatten(tangent, self._mlp.parameters)
        return list(zip(pieces[::2], pieces[1::2], strict=True))


class MLPActorPass(ActorPass):
    """The actor as a perceptron under an action distribution that treats slots independently.

    The distribution is differentiated automatically, per slot, with respect to the perceptron's outputs (and a
    state-independent log-std); the perceptron by hand.

    Args:
        mlp: The layers.
        log_std: A parameter [d] that is the same in all slots, or None.
        obs: Inputs [n, d_0].
        terms: Maps the outputs [n, d_L] and the log-std [n, d] (or None) to logp, entropy and KL (or None), each [n].
    """

    def __init__(
        self,
        mlp: MLP,
        log_std: Tensor | None,
        obs: Tensor,
        terms: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]],
    ):
        self._pass = mlp.forward(obs)
        outputs = self._pass.output.T.detach().requires_grad_()
        expanded = None if log_std is None else log_std.detach().expand(len(outputs), -1).clone().requires_grad_()
        self._leaves = [leaf for leaf in (outputs, expanded) if leaf is not None]
        self._graphs = terms(outputs, expanded)
        self._scores: dict[int, tuple[Tensor, ...]] = {}
        self.logp, self.entropy = self._graphs[0].detach(), self._graphs[1].detach()
        self.kl = None if self._graphs[2] is None else self._graphs[2].detach()

    def gradient(self, logp: Tensor, entropy: Tensor | None = None, kl: Tensor | None = None) -> Tensor:
        cotangents = [
            [weights[:, None] * score for score in self._score(term)]
            for term, weights in enumerate((logp, entropy, kl))
            if weights is not None
        ]
        leaves = [sum(parts[1:], start=parts[0]) for parts in zip(*cotangents, strict=True)]
        gradient = self._pass.gradient(self._pass.cotangents(leaves[0].T))
        return gradient if len(leaves) == 1 else torch.cat([gradient, leaves[1].sum(0)])

    def _score(self, term: int) -> tuple[Tensor, ...]:
        """The derivative of each slot's term in its own outputs."""
        if term not in self._scores:
            graph = self._graphs[term]
            assert graph is not None
            self._scores[term] = torch.autograd.grad(
                graph.sum(), self._leaves, retain_graph=True, materialize_grads=True
            )
        return self._scores[term]
