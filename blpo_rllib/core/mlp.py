r"""Values, log-probabilities and their derivatives by hand, for players that are multi-layer perceptrons.

Activations are stored unit by unit, [d, n] for n slots, so that a unit is a contiguous row. With inputs
:math:`h_0 = x`,

.. math::  z_l = W_l h_{l-1} + b_l, \quad h_l = \varphi(z_l) \; (l < L), \quad \text{output } z_L.

Backward, the cotangent :math:`g_l` of :math:`z_l` obeys :math:`g_{l-1} = \varphi'_{l-1} \odot W_l^\top g_l`, and the
gradient in :math:`W_l` is :math:`g_l h_{l-1}^\top`. The critic has a single output. One backward pass with
:math:`g_L = 1` therefore gives :math:`G_l = \partial V/\partial z_l`, and every product with the Jacobian J, or its
transpose, follows from G without another pass: the cotangents for u on V are :math:`g_l = u \odot G_l`, and the column
of J for the weight in row r and column c of layer l is :math:`G_l[r] \odot h_{l-1}[c]`. Only second derivatives of V
need another pass through the layers (Pearlmutter 1994), which for a row of the Hessian starts at a single unit of one
layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from blpo_rllib.core.networks import ActorPass, Coordinates, CriticPass, unflatten
from blpo_rllib.core.policy_heads import ENTROPY, KL, LOGP, PolicyHead


@dataclass(frozen=True)
class Activation:
    """An activation function φ.

    Attributes:
        function: φ.
        slope: φ'(z) as a function of h = φ(z).
        curvature_ratio: φ''(z)/φ'(z) as a function of h; None where it is 0 everywhere.
    """

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature_ratio: Callable[[Tensor], Tensor] | None


def _tanh(z: Tensor) -> Tensor:
    """tanh z = 2σ(2z) − 1: on CPU a third of torch.tanh's time, to within rounding of 1."""
    return z.mul(2).sigmoid_().mul_(2).sub_(1)


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: Activation(_tanh, lambda h: 1 - h * h, lambda h: -2 * h),
    nn.ReLU: Activation(torch.relu, lambda h: (h > 0).to(h.dtype), None),
}


# Rows of second derivatives are computed in parts. The arrays of a part, which hold all units at its slots for each of
# its rows, take about this many bytes together.
BLOCK_BYTES = 2**28
# How many such arrays exist at the same time.
_ARRAYS = 4


@dataclass(frozen=True)
class LayerPlaces:
    """Where k single parameters are in layer l. Those of other layers have masks of 0, so that they add nothing.

    Attributes:
        units: Row r of each in W_l or b_l, int64 [k].
        inputs: Column c of each in W_l, int64 [k]; 0 for biases.
        is_weight: 1 for weights of layer l, else 0, [k, 1].
        is_bias: 1 for biases of layer l, else 0, [k, 1].
    """

    units: Tensor
    inputs: Tensor
    is_weight: Tensor
    is_bias: Tensor

    @classmethod
    def of(cls, places: Tensor, layer: int, dtype: torch.dtype) -> LayerPlaces:
        """For the parameters at ``places`` int64 [k, 3], in the form of :class:`Coordinates`."""
        here = places[:, 0] == layer
        is_weight, is_bias = here & (places[:, 2] >= 0), here & (places[:, 2] < 0)
        return cls(
            places[:, 1] * here,
            places[:, 2] * is_weight,
            *(mask[:, None].to(dtype) for mask in (is_weight, is_bias)),
        )

    def drive(self, hidden: Tensor) -> Tensor:
        """How each parameter moves z_l of its unit, [k, n]: by h_{l-1}[c], or 1 for a bias; h_{l-1} is ``hidden``."""
        return hidden[self.inputs] * self.is_weight + self.is_bias


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

    def coordinates(self, indices: np.ndarray) -> Coordinates:
        """The parameters at ``indices`` (int64 [k]) of the flat vector, found in their layers on the host."""
        ends = np.cumsum([layer.weight.numel() + layer.bias.numel() for layer in self.layers])
        layer = np.searchsorted(ends, indices, side="right")
        num_weights, num_inputs = (
            np.array([f(x) for x in self.layers])[layer] for f in (lambda x: x.weight.numel(), lambda x: x.in_features)
        )
        position = indices - np.concatenate(([0], ends))[layer]
        is_bias = position >= num_weights
        unit = np.where(is_bias, position - num_weights, position // num_inputs)
        places = np.stack([layer + 1, unit, np.where(is_bias, -1, position % num_inputs)], 1)
        device = self.layers[0].weight.device
        return Coordinates(torch.as_tensor(indices, device=device), torch.as_tensor(places, device=device))

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
        # φ' of layers 1 ... L-1, computed on first use.
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

    def cotangent_slope(self, layer: int, cotangent: Tensor) -> Tensor | None:
        """∂g_l/∂z_l = φ''(z_l) ⊙ W_{l+1}ᵀ g_{l+1} = (φ''/φ') ⊙ g_l for g_l = ``cotangent`` [d_l, n]; None where 0."""
        ratio = self._activations[layer - 1].curvature_ratio
        return None if ratio is None else ratio(self.hidden(layer)) * cotangent

    def cotangents(self, output: Tensor) -> dict[int, Tensor]:
        """g_l by layer l, for the output cotangent g_L [d_L, n]."""
        cotangents = {self.depth: output}
        for layer in range(self.depth, 1, -1):
            weight = self.weight(layer)
            back = weight.T * cotangents[layer] if len(weight) == 1 else weight.T @ cotangents[layer]
            cotangents[layer - 1] = back * self.slope(layer - 1)
        return cotangents

    def layer_gradient(self, layer: int, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """g_l h_{l-1}ᵀ and Σ g_l for g_l [d_l, n]: the gradients in W_l and b_l, both flat."""
        return (cotangent @ self.hidden(layer - 1).T).flatten(), cotangent.sum(-1)

    def backward(self, output: Tensor) -> Tensor:
        """The gradients of all layers, [p], for the output cotangent g_L [d_L, n]."""
        return self.gradient(self.cotangents(output))

    def gradient(self, cotangents: dict[int, Tensor]) -> Tensor:
        """The gradients of all layers, [p], for g_l [d_l, n] by layer l."""
        pieces = [self.layer_gradient(layer, cotangents[layer]) for layer in range(1, self.depth + 1)]
        return torch.cat([piece for pair in pieces for piece in pair])


@dataclass(frozen=True)
class LayerRows:
    """What k products or rows of second derivatives are in the parameters of layer l, as sums over slots.

    Attributes:
        change: Cotangents of V, [k, n].
        g_change: What the cotangents of z_l are beside ``change`` ⊙ G_l, [k, d_l, n]; None for nothing.
        unit_cotangent: G_l [d_l, n].
        hidden: h_{l-1} [d_{l-1}, n].
        g: The cotangent of z_l before any change, [d_l, n]; None where h_{l-1} does not move.
        moved: How h_{l-1} moves, [k, d_{l-1}, n]; or [k, 1, n] where it does in one unit each; None if it does not.
        unit: Which unit that is, int64 [k]; None where all move.
    """

    change: Tensor
    g_change: Tensor | None
    unit_cotangent: Tensor
    hidden: Tensor
    g: Tensor | None = None
    moved: Tensor | None = None
    unit: Tensor | None = None

    def add_to_weight(self, weight: Tensor, outputs: slice) -> None:
        """Adds the part in some rows of W_l to ``weight`` [k, ., d_{l-1}]."""
        cotangent = self._cotangent(outputs)
        weight.baddbmm_(cotangent, self.hidden.T.expand(len(cotangent), -1, -1))
        if self.moved is None or self.g is None:
            return
        if self.unit is None:
            weight.baddbmm_(self.g[outputs].expand(len(cotangent), -1, -1), self.moved.mT)
        else:
            _add_to_unit(weight.mT, self.unit, self.moved[:, 0] @ self.g[outputs].T)

    def bias(self) -> Tensor:
        """The part in b_l, [k, d_l]."""
        return self._cotangent(slice(None)).sum(-1)

    def _cotangent(self, outputs: slice) -> Tensor:
        cotangent = self.change[:, None] * self.unit_cotangent[outputs]
        return cotangent if self.g_change is None else cotangent.add_(self.g_change[:, outputs])


# The rows of some layers, from the last to the first.
Walk = Iterator[LayerRows]


class MLPCriticPass(CriticPass):
    """The critic as a perceptron with a single output.

    Args:
        mlp: Its layers.
        forward: Their pass over the observations.
        unit_cotangents: G_l by layer l where they are known; None to compute them on first use.
    """

    def __init__(self, mlp: MLP, forward: MLPPass, unit_cotangents: dict[int, Tensor] | None = None):
        self._mlp, self._pass = mlp, forward
        self.values = self._pass.output[0]
        self.num_parameters = self._pass.num_parameters
        self._unit_cotangents = unit_cotangents

    @property
    def _g(self) -> dict[int, Tensor]:
        """G_l by layer l."""
        if self._unit_cotangents is None:
            self._unit_cotangents = self._pass.cotangents(torch.ones_like(self._pass.output))
        return self._unit_cotangents

    def gradient(self, cotangent: Tensor) -> Tensor:
        return self._pass.backward(cotangent[None])

    def gradients(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Those of :meth:`gradient` in the inputs, [n, d_0], and in the parameters, [p]."""
        cotangents = self._pass.cotangents(cotangent[None])
        return cotangents[1].T @ self.first_weight, self._pass.gradient(cotangents)

    def vjp(self, cotangent: Tensor) -> Tensor:
        if cotangent.dim() == 1:
            return self._pass.gradient({layer: cotangent * g for layer, g in self._g.items()})
        products = self.values.new_zeros(len(cotangent), self.num_parameters)
        self.add_products(products, cotangent)
        return products

    def add_products(self, products: Tensor, cotangent: Tensor) -> None:
        """Adds Jᵀ u to a row of ``products`` [k, p] for each u of ``cotangent`` [k, n]."""
        for some, slots in self.parts(*cotangent.shape):
            part = self.at(slots)
            part._add(products[some], part._products(cotangent[some, slots]))

    def vjp_blocks(self, cotangent: Tensor) -> Iterator[tuple[slice, Tensor]]:
        return self._blocks(len(cotangent), lambda some, slots: self.at(slots)._products(cotangent[some, slots]))

    def jvp(self, tangent: Tensor) -> Tensor:
        total = torch.zeros_like(self.values)
        for layer, (weight, bias) in enumerate(self._direction(tangent), start=1):
            moved = torch.addmm(bias[:, None], weight, self._pass.hidden(layer - 1))
            total = total + (self._g[layer] * moved).sum(0)
        return total

    def jacobian_columns(self, coordinates: Coordinates) -> Tensor:
        total = self.values.new_zeros(len(coordinates), len(self.values))
        for layer, at in self._places(coordinates).items():
            total.addcmul_(self._g[layer][at.units], at.drive(self._pass.hidden(layer - 1)))
        return total

    def second_order_rows(self, coordinates: Coordinates, first: Tensor, second: Tensor) -> Tensor:
        rows = self.values.new_zeros(len(coordinates), self.num_parameters)
        for some, slots in self.parts(len(coordinates), len(self.values)):
            self.at(slots).add_second_order_rows(rows[some], coordinates[some], first[slots], second[slots])
        return rows

    def second_order_blocks(
        self, coordinates: Coordinates, first: Tensor, second: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        def walk(some: slice, slots: slice) -> Walk:
            return self.at(slots)._second_order(coordinates[some], first[slots], second[slots])

        return self._blocks(len(coordinates), walk)

    def _blocks(self, count: int, walk: Callable[[slice, slice], Walk]) -> Iterator[tuple[slice, Tensor]]:
        """k = ``count`` rows by some columns at a time, which columns and [k, .], within :data:`BLOCK_BYTES`.

        Args:
            count: k.
            walk: The layers of some rows at some slots. Where there are several such parts it starts anew for each
                block: that takes time instead of memory.
        """
        parts = list(self.parts(count, len(self.values)))
        single = walk(*parts[0])
        for layer in range(self._pass.depth, 0, -1):
            kept = next(single) if len(parts) == 1 else None
            outputs, inputs = self._pass.weight(layer).shape
            begin, most = self._begin(layer), max(1, BLOCK_BYTES // (count * inputs * self.values.element_size()))
            for some_outputs in (slice(o, min(o + most, outputs)) for o in range(0, outputs, most)):
                weight = self.values.new_zeros(count, some_outputs.stop - some_outputs.start, inputs)
                for some, slots in parts:
                    rows = kept or _skip(walk(some, slots), self._pass.depth - layer)
                    rows.add_to_weight(weight[some], some_outputs)
                yield slice(begin + some_outputs.start * inputs, begin + some_outputs.stop * inputs), weight.flatten(1)
            bias = self.values.new_zeros(count, outputs)
            for some, slots in parts:
                bias[some] += (kept or _skip(walk(some, slots), self._pass.depth - layer)).bias()
            yield slice(begin + outputs * inputs, begin + outputs * inputs + outputs), bias

    def _begin(self, layer: int) -> int:
        """Where W_l begins in the flat vector."""
        return sum(x.numel() for x in self._mlp.parameters[: 2 * layer - 2])

    def parts(self, count: int, num_slots: int) -> Iterator[tuple[slice, slice]]:
        """Cuts ``count`` rows, and the slots if need be, so that a part's arrays stay within :data:`BLOCK_BYTES`."""
        rows, slots = max(1, min(count, self.most_slots // num_slots)), min(num_slots, self.most_slots)
        for row in range(0, count, rows):
            for slot in range(0, num_slots, slots):
                yield slice(row, row + rows), slice(slot, slot + slots)

    @property
    def most_slots(self) -> int:
        """How many slots a part may have, of one row each."""
        return max(1, BLOCK_BYTES // (_ARRAYS * sum(self._mlp.sizes) * self.values.element_size()))

    def at(self, slots: slice) -> MLPCriticPass:
        """This pass on some of the slots."""
        hidden = [self._pass.hidden(layer)[:, slots] for layer in range(self._pass.depth)]
        forward = MLPPass(self._mlp, hidden, self._pass.output[:, slots])
        return MLPCriticPass(self._mlp, forward, {layer: g[:, slots] for layer, g in self._g.items()})

    def _places(self, coordinates: Coordinates) -> dict[int, LayerPlaces]:
        assert coordinates.places is not None
        layers = range(1, self._pass.depth + 1)
        return {layer: LayerPlaces.of(coordinates.places, layer, self.values.dtype) for layer in layers}

    def _products(self, cotangent: Tensor) -> Walk:
        """Jᵀ u for each u of ``cotangent`` [k, n], layer by layer."""
        for layer in range(self._pass.depth, 0, -1):
            yield LayerRows(cotangent, None, self._g[layer], self._pass.hidden(layer - 1))

    def _add(self, rows: Tensor, walk: Walk) -> LayerRows:
        """Adds all layers to ``rows`` [k, p]; returns the first one."""
        for layer in range(self._pass.depth, 0, -1):
            found, (weight, bias) = next(walk), self._of_layer(rows, layer)
            found.add_to_weight(weight, slice(None))
            bias.add_(found.bias())
        return found

    def _of_layer(self, rows: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The parts of ``rows`` [k, p] that belong to W_l and b_l, [k, d_l, d_{l-1}] and [k, d_l]."""
        outputs, inputs = self._pass.weight(layer).shape
        begin = self._begin(layer)
        end = begin + outputs * inputs
        return rows[:, begin:end].view(-1, outputs, inputs), rows[:, end : end + outputs]

    @property
    def first_weight(self) -> Tensor:
        """W_1 [d_1, d_0]."""
        return self._pass.weight(1)

    def input_cotangents(self) -> Tensor:
        """∂V/∂x [n, d_0]."""
        return self._g[1].T @ self.first_weight

    def input_changes(self, coordinates: Coordinates, first: Tensor) -> Tensor:
        """How weights on inputs change the cotangents of those, [k, n]; 0 for other parameters."""
        at = self._places(coordinates)[1]
        return first * self._g[1][at.units] * at.is_weight

    def add_second_order_rows(
        self, rows: Tensor, coordinates: Coordinates, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Adds to ``rows`` [k, p] what :meth:`second_order_product` gives for k directions of one parameter each.

        A weight of layer l moves z_l of a single unit, and passes that unit's cotangent on to a single input.

        Returns:
            :meth:`second_order_changes`.
        """
        first_layer = self._add(rows, self._second_order(coordinates, first, second))
        return first_layer.change, first_layer.g_change

    def second_order_changes(
        self, coordinates: Coordinates, first: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """How the parameters change the cotangents of V, [k, n], and beside that those of z_1, [k, d_1, n] or None."""
        first_layer = _skip(self._second_order(coordinates, first, second), self._pass.depth - 1)
        return first_layer.change, first_layer.g_change

    def _second_order(self, coordinates: Coordinates, first: Tensor, second: Tensor) -> Walk:
        """The rows of second derivatives, layer by layer."""
        critic, places = self._pass, self._places(coordinates)
        drives = {layer: at.drive(critic.hidden(layer - 1)) for layer, at in places.items()}
        tangents = self._tangents_of_places(places, drives)
        change, g_change = second * (tangents[critic.depth][:, 0] if critic.depth > 1 else drives[1]), None
        for layer in range(critic.depth, 0, -1):
            below, g, moved, unit = layer - 1, first * self._g[layer], None, None
            if below > 1:
                moved = tangents[below] * critic.slope(below)
            elif below == 1:
                unit = places[1].units
                moved = (drives[1] * critic.slope(1)[unit])[:, None]
            yield LayerRows(change, g_change, self._g[layer], critic.hidden(below), g, moved, unit)
            if below == 0:
                return
            g_change = self._passed_on(layer, g, places[layer], g_change).mul_(critic.slope(below))
            cotangent_slope = critic.cotangent_slope(below, first * self._g[below])
            if cotangent_slope is not None and below > 1:
                g_change.addcmul_(cotangent_slope, tangents[below])
            elif cotangent_slope is not None:
                _add_to_unit(g_change, places[1].units, cotangent_slope[places[1].units] * drives[1])

    def _tangents_of_places(self, places: dict[int, LayerPlaces], drives: dict[int, Tensor]) -> dict[int, Tensor]:
        """Tangents of z_2 ... z_L, [k, d, n]; that of z_1 is the drive of a single unit."""
        critic, tangents = self._pass, dict[int, Tensor]()
        for layer in range(2, critic.depth + 1):
            weight, below = critic.weight(layer), layer - 1
            if below == 1:
                unit = places[1].units
                tangent = weight.T[unit][:, :, None] * (drives[1] * critic.slope(1)[unit])[:, None]
            else:
                tangent = weight @ (tangents[below] * critic.slope(below))
            _add_to_unit(tangent, places[layer].units, drives[layer])
            tangents[layer] = tangent
        return tangents

    def _passed_on(self, layer: int, g: Tensor, at: LayerPlaces, g_change: Tensor | None) -> Tensor:
        """The change of the cotangent of h_{l-1}, [k, d_{l-1}, n], by ``g_change`` of g_l and by a moved weight."""
        weight = self._pass.weight(layer)
        passed = g.new_zeros(len(at.units), weight.shape[1], g.shape[1]) if g_change is None else weight.T @ g_change
        _add_to_unit(passed, at.inputs, g[at.units] * at.is_weight)
        return passed

    def second_order_product(self, tangent: Tensor, first: Tensor, second: Tensor) -> Tensor:
        critic, direction = self._pass, self._direction(tangent)
        tangents = self._tangents(direction)
        change, g_change = second * tangents[critic.depth][0], torch.zeros_like(critic.output)
        pieces: list[Tensor] = []
        for layer in range(critic.depth, 0, -1):
            g, cotangent = first * self._g[layer], change * self._g[layer] + g_change
            weight = cotangent @ critic.hidden(layer - 1).T
            if layer > 1:
                below = layer - 1
                weight = torch.addmm(weight, g, (tangents[below] * critic.slope(below)).T)
                g_change = (critic.weight(layer).T @ g_change + direction[below][0].T @ g) * critic.slope(below)
                cotangent_slope = critic.cotangent_slope(below, first * self._g[below])
                g_change = g_change if cotangent_slope is None else g_change + cotangent_slope * tangents[below]
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


def _skip(walk: Walk, count: int) -> LayerRows:
    """What comes after ``count`` layers."""
    return next(itertools.islice(walk, count, None))


def _add_to_unit(x: Tensor, units: Tensor, values: Tensor) -> None:
    """Adds ``values`` [k, n] to one unit of each of ``x`` [k, d, n]."""
    x.scatter_add_(1, units[:, None, None].expand(-1, 1, x.shape[2]), values[:, None])


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
