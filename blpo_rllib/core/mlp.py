r"""The two players by hand where they are multi-layer perceptrons.

Activations are stored unit by unit, [d, n] for n slots, so that a unit is a contiguous row. With :math:`h_0 = x`,

.. math::  z_l = W_l h_{l-1} + b_l, \quad h_l = \varphi(z_l) \; (l < L), \quad \text{output } z_L.

Backward, the cotangent :math:`g_l` of :math:`z_l` obeys :math:`g_{l-1} = \varphi'_{l-1} \odot W_l^\top g_l`, and the
gradient in :math:`W_l` is :math:`g_l h_{l-1}^\top`. The critic has a single output, so one such pass with
:math:`g_L = 1` gives :math:`G_l = \partial V/\partial z_l`, and every product with J or its transpose follows from G
without another pass: a cotangent u of V is :math:`g_l = u \odot G_l`; a column of J is
:math:`G_l[r] \odot h_{l-1}[c]`. Only second derivatives of V need a chain through the layers (Pearlmutter 1994), and
for a row of the Hessian that chain starts from a single unit of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from blpo_rllib.core.networks import ActorPass, Coordinates, CriticPass, unflatten
from blpo_rllib.core.policy_heads import ENTROPY, KL, LOGP, PolicyHead


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
    """

    layer: int
    rows: Tensor
    units: Tensor
    inputs: Tensor
    is_bias: Tensor
    batch: Tensor


@dataclass(frozen=True)
class Sparse:
    """[m, d, n] that is zero but for one unit (int64 [m]) of each, whose row is in ``values`` [m, n]."""

    units: Tensor
    values: Tensor


class MLP:
    """The layers of a perceptron, linear at the output.

    Args:
        layers: L linear layers with biases.
        activations: The L − 1 activations between them.
    """

    def __init__(self, layers: Sequence[nn.Linear], activations: Sequence[Activation]):
        self.layers, self.activations = list(layers), list(activations)
        self.parameters: list[Tensor] = [p for layer in self.layers for p in (layer.weight, layer.bias)]
        self.num_parameters = sum(p.numel() for p in self.parameters)
        # d_0 ... d_L.
        self.sizes = [self.layers[0].in_features, *(layer.out_features for layer in self.layers)]

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> MLP | None:
        """The perceptron that applying ``modules`` in turn amounts to, or None if it is not one."""
        leaves = [leaf for module in modules for leaf in module.modules() if not list(leaf.children())]
        layers = [leaf for leaf in leaves[::2] if type(leaf) is nn.Linear and leaf.bias is not None]
        activations = [ACTIVATIONS[type(leaf)] for leaf in leaves[1::2] if type(leaf) in ACTIVATIONS]
        alternate = len(layers) + len(activations) == len(leaves) and len(layers) == len(activations) + 1
        return cls(layers, activations) if alternate else None

    def columns(self, indices: np.ndarray) -> Coordinates:
        """The parameters at ``indices`` (int64 [k]) of the flat vector, found layer by layer, on the host."""
        index = torch.as_tensor(indices, device=self.layers[0].weight.device)
        groups = self._locate(indices)
        places = torch.empty(len(indices), 3, dtype=torch.int64)
        for group in groups:
            inputs = group.inputs.masked_fill(group.is_bias[:, 0], -1)
            places[group.rows.cpu()] = torch.stack([torch.full_like(inputs, group.layer), group.units, inputs], 1).cpu()
        return Coordinates(index, groups, places)

    def _locate(self, indices: np.ndarray) -> list[UnitGroup]:
        device, groups, offset = self.layers[0].weight.device, [], 0
        for number, layer in enumerate(self.layers, start=1):
            num_weights, num_units = layer.weight.numel(), layer.out_features
            rows = np.flatnonzero((indices >= offset) & (indices < offset + num_weights + num_units))
            position = indices[rows] - offset
            is_bias = position >= num_weights
            units = np.where(is_bias, position - num_weights, position // layer.in_features)
            inputs = np.where(is_bias, 0, position % layer.in_features)
            arrays = rows, units, inputs, is_bias[:, None], np.arange(len(rows))
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

    Args:
        mlp: The layers.
        hidden: h_0 ... h_{L-1}, each [d_l, n].
        output: z_L [d_L, n].
    """

    def __init__(self, mlp: MLP, hidden: Sequence[Tensor], output: Tensor):
        self._mlp, self._hidden, self.output = mlp, hidden, output
        self._activations = mlp.activations
        self.num_parameters, self.depth = mlp.num_parameters, len(mlp.layers)
        # φ' of layers 1 ... L-1, made when first needed.
        self._slopes: list[Tensor | None] = [None] * self.depth

    def hidden(self, layer: int) -> Tensor:
        """h_l [d_l, n]."""
        return self._hidden[layer]

    def weight(self, layer: int) -> Tensor:
        """W_l [d_l, d_{l-1}]."""
        return self._mlp.layers[layer - 1].weight.detach()

    def slope(self, layer: int) -> Tensor:
        """φ'(z_l) [d_l, n]."""
        slope = self._slopes[layer]
        if slope is None:
            slope = self._slopes[layer] = self._activations[layer - 1].slope(self.hidden(layer))
        return slope

    def bend(self, layer: int, cotangent: Tensor) -> Tensor | None:
        """φ''(z_l) ⊙ W_{l+1}ᵀ g_{l+1} = (φ''/φ') ⊙ g_l, by which a tangent of z_l changes g_l; None where it is 0."""
        bend = self._activations[layer - 1].bend
        return None if bend is None else bend(self.hidden(layer)) * cotangent

    def cotangents(self, output: Tensor) -> dict[int, Tensor]:
        """g_l by layer l, for the output cotangent g_L [d_L, n]."""
        cotangents = {self.depth: output}
        for layer in range(self.depth, 1, -1):
            weight = self.weight(layer)
            back = weight.T * cotangents[layer] if len(weight) == 1 else weight.T @ cotangents[layer]
            cotangents[layer - 1] = back * self.slope(layer - 1)
        return cotangents

    def layer_gradient(self, layer: int, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """g_l h_{l-1}ᵀ and Σ g_l for g_l [..., d_l, n]: the gradients in W_l and b_l, each flat [..., d]."""
        if cotangent.dim() == 2:
            return (cotangent @ self.hidden(layer - 1).T).flatten(), cotangent.sum(-1)
        # Many at once: both in one product, with a row of ones under h.
        product = cotangent.flatten(0, -2) @ self._hidden_and_ones(layer - 1).T
        product = product.view(*cotangent.shape[:-1], -1)
        return product[..., :-1].flatten(-2), product[..., -1]

    def _hidden_and_ones(self, layer: int) -> Tensor:
        hidden = self.hidden(layer)
        return torch.cat([hidden, hidden.new_ones(1, hidden.shape[1])])

    def backward(self, output: Tensor) -> Tensor:
        """The gradients of all layers, [p], for the output cotangent g_L [d_L, n]."""
        return self.gradient(self.cotangents(output))

    def gradient(self, cotangents: dict[int, Tensor]) -> Tensor:
        """The gradients of all layers, [..., p], for g_l [..., d_l, n] by layer l."""
        pieces = [self.layer_gradient(layer, cotangents[layer]) for layer in range(1, self.depth + 1)]
        return torch.cat([piece for pair in pieces for piece in pair], -1)


class MLPCriticPass(CriticPass):
    """The critic as a perceptron with a single output.

    Args:
        mlp: Its layers.
        forward: Their pass over the observations.
    """

    def __init__(self, mlp: MLP, forward: MLPPass):
        self._mlp, self._pass = mlp, forward
        self.values = self._pass.output[0]
        self.num_parameters = self._pass.num_parameters
        self._unit_cotangents: dict[int, Tensor] | None = None

    @property
    def _g(self) -> dict[int, Tensor]:
        """G_l by layer l."""
        if self._unit_cotangents is None:
            self._unit_cotangents = self._pass.cotangents(torch.ones_like(self._pass.output))
        return self._unit_cotangents

    def gradient(self, cotangent: Tensor) -> Tensor:
        return self._pass.backward(cotangent[None])

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self._pass.gradient({layer: cotangent[..., None, :] * g for layer, g in self._g.items()})

    def jvp(self, tangent: Tensor) -> Tensor:
        total = torch.zeros_like(self.values)
        for layer, (weight, bias) in enumerate(self._direction(tangent), start=1):
            moved = torch.addmm(bias[:, None], weight, self._pass.hidden(layer - 1))
            total = total + (self._g[layer] * moved).sum(0)
        return total

    def jacobian_columns(self, columns: Coordinates) -> Tensor:
        rows = self.values.new_empty(len(columns), len(self.values))
        for group in columns.groups:
            rows[group.rows] = self._g[group.layer][group.units] * self._drive(group)
        return rows

    def _drive(self, group: UnitGroup) -> Tensor:
        """How each parameter of the group moves z_l of its unit: h_{l-1}[c], or 1 for a bias, [m, n]."""
        return self._pass.hidden(group.layer - 1)[group.inputs].masked_fill(group.is_bias, 1.0)

    def second_order_rows(self, columns: Coordinates, first: Tensor, second: Tensor) -> Tensor:
        rows = self.vjp(second * self.jacobian_columns(columns))
        for group in columns.groups:
            rows[group.rows] += self._second_derivative_rows(group, first)
        return rows

    def _second_derivative_rows(self, group: UnitGroup, first: Tensor) -> Tensor:
        """Rows of Σ_t u_t ∇²V_t for parameters of one layer: the change of u ⊙ G_l h_{l-1}ᵀ, layer by layer, [m, p]."""
        critic, layer = self._pass, group.layer
        drive = self._drive(group)
        tangents = self._tangents_above(group, drive)
        bent = self._bent(group, first, drive, tangents)
        pieces = []
        for at in range(1, critic.depth + 1):
            weight, bias = self._gradient_of(bent[at], at, len(drive))
            if at - 1 > layer:
                moved = tangents[at - 1] * critic.slope(at - 1)
                weight = weight + (first * self._g[at]) @ moved.transpose(-1, -2)
            elif at - 1 == layer:
                moved = critic.slope(layer)[group.units] * drive
                weight[group.batch, :, group.units] += moved @ (first * self._g[at]).T
            pieces += [weight.flatten(1), bias]
        return torch.cat(pieces, -1)

    def _gradient_of(self, cotangent: Tensor | Sparse | None, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """The gradients in W_l [m, d_l, d_{l-1}] and b_l [m, d_l] that belong to a change of g_l."""
        shape = count, *self._pass.weight(layer).shape
        if isinstance(cotangent, Tensor):
            weight, bias = self._pass.layer_gradient(layer, cotangent)
            return weight.view(shape), bias
        weight, bias = self.values.new_zeros(shape), self.values.new_zeros(shape[:2])
        if cotangent is not None:
            batch = torch.arange(count, device=bias.device)
            weight[batch, cotangent.units] = cotangent.values @ self._pass.hidden(layer - 1).T
            bias[batch, cotangent.units] = cotangent.values.sum(-1)
        return weight, bias

    def _tangents_above(self, group: UnitGroup, drive: Tensor) -> dict[int, Tensor]:
        """Tangents of z [m, d, n] in the hidden layers above that of the group."""
        critic, tangents = self._pass, {}
        for layer in range(group.layer + 1, critic.depth):
            if layer == group.layer + 1:
                moved = critic.slope(group.layer)[group.units] * drive
                tangents[layer] = critic.weight(layer).T[group.units][:, :, None] * moved[:, None]
            else:
                tangents[layer] = critic.weight(layer) @ (tangents[layer - 1] * critic.slope(layer - 1))
        return tangents

    def _bent(
        self, group: UnitGroup, first: Tensor, drive: Tensor, tangents: dict[int, Tensor]
    ) -> list[Tensor | Sparse | None]:
        """u ⊙ δG_l per layer: how G_l changes with the parameter, [m, d, n], or only in one unit, or not at all."""
        critic = self._pass
        bent: list[Tensor | Sparse | None] = [None] * (critic.depth + 1)
        for layer in range(critic.depth - 1, 0, -1):
            slope, above = critic.slope(layer), bent[layer + 1]
            if isinstance(above, Sparse):
                below: Tensor | None = critic.weight(layer + 1)[above.units][:, :, None] * above.values[:, None] * slope
            else:
                below = None if above is None else (critic.weight(layer + 1).T @ above) * slope
            sparse = None
            if layer + 1 == group.layer:
                # The parameter itself passes G on, from its unit r to its input c; a bias does not.
                passed = (first * self._g[group.layer][group.units]).masked_fill(group.is_bias, 0.0)
                sparse = Sparse(group.inputs, passed * slope[group.inputs])
            elif layer >= group.layer and (bend := critic.bend(layer, first * self._g[layer])) is not None:
                if layer == group.layer:
                    sparse = Sparse(group.units, bend[group.units] * drive)
                else:
                    moved = bend * tangents[layer]
                    below = moved if below is None else below + moved
            if sparse is not None and below is not None:
                below[group.batch, sparse.units] += sparse.values
            bent[layer] = sparse if below is None else below
        return bent

    def second_order_product(self, tangent: Tensor, first: Tensor, second: Tensor) -> Tensor:
        critic, direction = self._pass, self._direction(tangent)
        tangents = self._tangents(direction)
        change, bent = second * tangents[critic.depth][0], torch.zeros_like(critic.output)
        pieces: list[Tensor] = []
        for layer in range(critic.depth, 0, -1):
            g, cotangent = first * self._g[layer], change * self._g[layer] + bent
            weight = cotangent @ critic.hidden(layer - 1).T
            if layer > 1:
                below = layer - 1
                weight = torch.addmm(weight, g, (tangents[below] * critic.slope(below)).T)
                bent = (critic.weight(layer).T @ bent + direction[below][0].T @ g) * critic.slope(below)
                bend = critic.bend(below, first * self._g[below])
                bent = bent if bend is None else bent + bend * tangents[below]
            pieces += [cotangent.sum(-1), weight.flatten()]
        return torch.cat(pieces[::-1])

    def _tangents(self, direction: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Tangents of z_1 ... z_L (at index 1 ... L) for (δW_l, δb_l) in ``direction``."""
        critic = self._pass
        tangents = [critic.output]
        for layer, (weight, bias) in enumerate(direction, start=1):
            tangent = torch.addmm(bias[:, None], weight, critic.hidden(layer - 1))
            if layer > 1:
                tangent = torch.addmm(tangent, critic.weight(layer), tangents[-1] * critic.slope(layer - 1))
            tangents.append(tangent)
        return tangents

    def _direction(self, tangent: Tensor) -> list[tuple[Tensor, Tensor]]:
        pieces = unflatten(tangent, self._mlp.parameters)
        return list(zip(pieces[::2], pieces[1::2], strict=True))


class MLPActorPass(ActorPass):
    """The actor as a perceptron under a policy head.

    Args:
        forward: The layers' pass over the observations.
        log_std: A parameter [d] that is the same in all slots, or None.
        head: Makes the distribution's terms from the outputs and the log-std.
    """

    def __init__(self, forward: MLPPass, log_std: Tensor | None, head: PolicyHead):
        self._pass, output = forward, forward.output
        self._terms = head(output, None if log_std is None else log_std.detach()[:, None].expand(-1, output.shape[1]))
        self._scores: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.logp, self.entropy, self.kl = self._terms.logp, self._terms.entropy, self._terms.kl

    def gradient(self, logp: Tensor, entropy: Tensor | None = None, kl: Tensor | None = None) -> Tensor:
        output, log_std = self._cotangent(LOGP, logp)
        for term, weights in ((ENTROPY, entropy), (KL, kl)):
            if weights is not None:
                more_output, more_log_std = self._cotangent(term, weights)
                output = output + more_output
                log_std = None if log_std is None or more_log_std is None else log_std + more_log_std
        gradient = self._pass.backward(output)
        return gradient if log_std is None else torch.cat([gradient, log_std.sum(1)])

    def _cotangent(self, term: int, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cotangents of outputs and log-std, [d, n], for weights [n] of one term."""
        if term not in self._scores:
            self._scores[term] = self._terms.scores(term)
        output, log_std = self._scores[term]
        return weights * output, None if log_std is None else weights * log_std
