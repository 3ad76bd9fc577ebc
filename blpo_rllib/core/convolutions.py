r"""The critic by hand where it is a stack of convolutions under a perceptron.

The convolutions :math:`z_l = W_l * h_{l-1} + b_l, \; h_l = \varphi(z_l)` make the features h, on which the perceptron
of :mod:`blpo_rllib.core.mlp` stands. Weights are shared by all places of an image, so that the gradient
:math:`\nabla_w V_t` in the convolutions is small, some ten thousand numbers a slot, while the perceptron above has
millions of weights. With the matrix S of these gradients, a slot a row, every product with J and its transpose is a
matrix product.

A coordinate of the perceptron moves no convolution's output, so that its row of second derivatives goes through the
convolutions like a first derivative: by S, where it changes the cotangent of V, and by one more backward pass, where it
changes the cotangent of the features. A weight on a feature changes the cotangent of that feature alone; the pass then
visits its receptive field and nothing else. Nearly all coordinates are such weights.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from blpo_rllib.core import mlp
from blpo_rllib.core.mlp import ACTIVATIONS, MLP, Activation, MLPCriticPass
from blpo_rllib.core.networks import AutogradCriticPass, Coordinates, CriticPass, unflatten


@dataclass(frozen=True)
class Convolution:
    """One layer.

    Attributes:
        weight: W [d, c, height, width].
        bias: b [d].
        stride: Steps down and to the right.
        padding: Zeros to the left, to the right, above and below.
        activation: φ.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    activation: Activation

    def patches(self, x: Tensor) -> Tensor:
        """What each place of the output sees of the padded input x, [n, places, height · width · c]."""
        (height, width), (down, right) = self.weight.shape[2:], self.stride
        # The channels of a place, and places side by side, are next to each other in memory.
        seen = x.permute(0, 2, 3, 1).unfold(1, height, down).unfold(2, width, right)
        return seen.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)

    def backward(self, x: Tensor, cotangent: Tensor, to_input: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The cotangents of the padded input x, if wanted, and of W and b, for that of z."""
        return self._backward(x, cotangent, (to_input, True, True))

    def input_cotangent(self, x: Tensor, cotangent: Tensor) -> Tensor:
        """That of the padded input x alone."""
        return self._backward(x, cotangent, (True, False, False))[0]

    def _backward(self, x: Tensor, cotangent: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
        # No padding, dilation, transposition or groups.
        return torch.ops.aten.convolution_backward(
            cotangent, x, self.weight.detach(), [len(self.bias)], self.stride, (0, 0), (1, 1), False, (0, 0), 1, wanted
        )


@dataclass(frozen=True)
class Window:
    """A part of an image: rows from ``top`` to before ``bottom``, columns from ``left`` to before ``right``."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, image: Tensor) -> Tensor:
        """The part of [n, c, height, width]."""
        return image[:, :, self.top : self.bottom, self.left : self.right]

    def below(self, layer: Convolution) -> Window:
        """What this part of a layer's output depends on, a part of its padded input."""
        (height, width), (down, right) = layer.weight.shape[2:], layer.stride
        return Window(
            self.top * down,
            (self.bottom - 1) * down + height,
            self.left * right,
            (self.right - 1) * right + width,
        )

    def inside(self, layer: Convolution, shape: Sequence[int]) -> tuple[Window, Window]:
        """Without the padding: in the coordinates of the input, of that shape, and in those of this part itself."""
        before, _, above, _ = layer.padding
        height, width = shape[-2:]
        found = Window(
            max(self.top - above, 0),
            min(self.bottom - above, height),
            max(self.left - before, 0),
            min(self.right - before, width),
        )
        down, right = above - self.top, before - self.left
        return found, Window(found.top + down, found.bottom + down, found.left + right, found.right + right)


class ConvolutionalCritic:
    """Convolutions under a perceptron with one output.

    Args:
        layers: The convolutions, at least one.
        head: The perceptron on their outputs, which it takes place by place, the channels of each.
    """

    def __init__(self, layers: Sequence[Convolution], head: MLP):
        self.layers, self.head = list(layers), head
        self.convolutions: list[Tensor] = [p for layer in self.layers for p in (layer.weight, layer.bias)]
        self.parameters = self.convolutions + head.parameters
        self.num_below = sum(p.numel() for p in self.convolutions)

    @classmethod
    def of(cls, modules: Sequence[nn.Module], head: MLP | None) -> ConvolutionalCritic | None:
        """What applying ``modules`` in turn and the perceptron amount to, or None if they are something else."""
        leaves = [leaf for module in modules for leaf in module.modules() if not list(leaf.children())]
        layers, padding = [], (0, 0, 0, 0)
        if leaves and type(leaves[-1]) is nn.Flatten:
            leaves.pop()
        while leaves:
            leaf = leaves.pop(0)
            if type(leaf) is nn.ZeroPad2d:
                padding = leaf.padding
                continue
            if type(leaf) is not nn.Conv2d or not _is_plain(leaf) or not leaves or type(leaves[0]) not in ACTIVATIONS:
                return None
            activation, (down, right) = ACTIVATIONS[type(leaves.pop(0))], leaf.stride
            assert leaf.bias is not None
            layers.append(Convolution(leaf.weight, leaf.bias, (down, right), padding, activation))
            padding = (0, 0, 0, 0)
        return cls(layers, head) if layers and head is not None else None

    def coordinates(self, indices: np.ndarray) -> Coordinates:
        """The parameters at ``indices`` (int64 [k]) of the flat vector; places of convolutions are in layer 0."""
        above = indices >= self.num_below
        found = self.head.coordinates(np.where(above, indices - self.num_below, 0))
        assert found.places is not None
        device = found.index.device
        places = torch.where(torch.as_tensor(above, device=device)[:, None], found.places, 0)
        return Coordinates(torch.as_tensor(indices, device=device), places, indices)

    def forward(self, images: Tensor, automatic: Callable[[], AutogradCriticPass]) -> ConvolutionalCriticPass:
        """Images [n, height, width, c] through all layers; ``automatic`` makes the same pass automatically."""
        h, inputs, hidden = images.permute(0, 3, 1, 2), [], []
        with torch.no_grad():
            for layer in self.layers:
                inputs.append(nn.functional.pad(h, layer.padding) if any(layer.padding) else h)
                h = layer.activation.function(torch.conv2d(inputs[-1], layer.weight, layer.bias, layer.stride))
                hidden.append(h)
            features = h.permute(0, 2, 3, 1).flatten(1)
            return ConvolutionalCriticPass(
                self, inputs, hidden, MLPCriticPass(self.head, self.head.forward(features)), automatic
            )


def _channels_last(gradients: Tensor) -> Tensor:
    """Of weights [n, d, c, height, width] as [n, d, height, width, c]; of biases [n, d] as they are."""
    return gradients.movedim(2, -1) if gradients.dim() > 2 else gradients


def _channels_first(gradients: Tensor) -> Tensor:
    """The inverse of :func:`_channels_last`."""
    return gradients.movedim(-1, 2) if gradients.dim() > 2 else gradients


def _is_plain(layer: nn.Conv2d) -> bool:
    """Whether it has a bias and neither groups nor dilation nor padding of its own."""
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding == (0, 0)
    return plain and layer.bias is not None


class ConvolutionalCriticPass(CriticPass):
    """The critic at one w on n images.

    Args:
        network: Its layers.
        inputs: Padded inputs of the convolutions, each [n, c, height, width].
        hidden: h_1 ... h_L, their outputs after the activation.
        head: The perceptron's pass over the features.
        automatic: Makes the pass by automatic differentiation, for second derivatives in the convolutions themselves.
    """

    def __init__(
        self,
        network: ConvolutionalCritic,
        inputs: Sequence[Tensor],
        hidden: Sequence[Tensor],
        head: MLPCriticPass,
        automatic: Callable[[], AutogradCriticPass],
    ):
        self._network, self._inputs, self._hidden, self._head = network, inputs, hidden, head
        self._make_automatic = automatic
        self._num_below, self._sizes = network.num_below, [p.numel() for p in network.convolutions]
        self._kept: list[Tensor] | None = None
        self.values = head.values
        self.num_parameters = network.num_below + head.num_parameters

    def gradient(self, cotangent: Tensor) -> Tensor:
        features, above = self._head.gradients(cotangent)
        return torch.cat([*self._gradients(features, self._everything), above])

    def vjp(self, cotangent: Tensor) -> Tensor:
        if cotangent.dim() == 1:
            return self.vjp(cotangent[None])[0]
        products = self.values.new_zeros(len(cotangent), self.num_parameters)
        self._head.add_products(products[:, self._num_below :], cotangent)
        for slots, part in self._parts():
            part._add_products(products, cotangent[:, slots])
        return products

    def jvp(self, tangent: Tensor) -> Tensor:
        below, above = tangent.split([self._num_below, self._head.num_parameters])
        total = self._head.jvp(above)
        for slots, part in self._parts():
            for gradient, piece in zip(part._slot_gradients, unflatten(below, self._network.convolutions), strict=True):
                total[slots] += gradient.flatten(1) @ _channels_last(piece[None]).flatten()
        return total

    def jacobian_columns(self, coordinates: Coordinates) -> Tensor:
        columns = self._head.jacobian_columns(coordinates)
        for slots, part in self._parts():
            for number, index in self._below(coordinates):
                owner = int(np.searchsorted(np.cumsum(self._sizes), index, side="right"))
                gradient = _channels_first(part._slot_gradients[owner]).flatten(1)
                columns[number, slots] = gradient[:, index - sum(self._sizes[:owner])]
        return columns

    def second_order_rows(self, coordinates: Coordinates, first: Tensor, second: Tensor) -> Tensor:
        rows = self.values.new_zeros(len(coordinates), self.num_parameters)
        for slots, part in self._parts():
            for some, _ in part._head.parts(len(coordinates), len(part.values)):
                part._add_second_order_rows(rows[some], coordinates[some], first[slots], second[slots])
        below = [number for number, _ in self._below(coordinates)]
        found = self._make_automatic().second_order_rows(coordinates.picked(below), first, second) if below else ()
        for number, row in zip(below, found, strict=True):
            rows[number] = row
        return rows

    def vjp_blocks(self, cotangent: Tensor) -> Iterator[tuple[slice, Tensor]]:
        products = self.values.new_zeros(len(cotangent), self._num_below)
        for slots, part in self._parts():
            part._add_products(products, cotangent[:, slots])
        yield slice(0, self._num_below), products
        yield from self._above(self._head.vjp_blocks(cotangent))

    def second_order_blocks(
        self, coordinates: Coordinates, first: Tensor, second: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        rows = self.values.new_zeros(len(coordinates), self._num_below)
        for slots, part in self._parts():
            for some, _ in part._head.parts(len(coordinates), len(part.values)):
                own = coordinates[some], first[slots], second[slots]
                part._add_below(rows[some], *own[:2], *part._head.second_order_changes(*own))
        blocks = itertools.chain(
            [(slice(0, self._num_below), rows)], self._above(self._head.second_order_blocks(coordinates, first, second))
        )
        below = [number for number, _ in self._below(coordinates)]
        if not below:
            yield from blocks
            return
        of_parameter = functools.lru_cache(1)(
            self._make_automatic().second_order_columns(coordinates.picked(below), first, second)
        )
        ends = np.cumsum([p.numel() for p in self._network.parameters]).tolist()
        for block, columns in blocks:
            for number, end in enumerate(ends):
                begin = end - self._network.parameters[number].numel()
                start, stop = max(begin, block.start), min(end, block.stop)
                if start < stop:
                    found = of_parameter(number)[:, start - begin : stop - begin]
                    columns[below, start - block.start : stop - block.start] = found
            yield block, columns

    def _above(self, blocks: Iterator[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the perceptron's columns, at their places among all."""
        for block, columns in blocks:
            yield slice(self._num_below + block.start, self._num_below + block.stop), columns

    def second_order_product(self, tangent: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return self._make_automatic().second_order_product(tangent, first, second)

    def _below(self, coordinates: Coordinates) -> list[tuple[int, int]]:
        """Number and index of those coordinates that belong to convolutions."""
        assert coordinates.on_host is not None
        return [(number, int(i)) for number, i in enumerate(coordinates.on_host) if i < self._num_below]

    def _parts(self) -> Iterator[tuple[slice, ConvolutionalCriticPass]]:
        """Cuts the slots so that a part's arrays stay within :data:`~blpo_rllib.core.mlp.BLOCK_BYTES`."""
        patches = max(
            layer.weight[0].numel() * h[0, 0].numel() for layer, h in zip(self._layers, self._hidden, strict=True)
        )
        per_slot = (self._num_below + patches) * self.values.element_size()
        most = max(1, min(mlp.BLOCK_BYTES // per_slot, self._head.most_slots))
        for start in range(0, len(self.values), most):
            slots = slice(start, start + most)
            yield slots, self if most >= len(self.values) else self._at(slots)

    def _at(self, slots: slice) -> ConvolutionalCriticPass:
        """This pass on some of the slots."""
        inputs, hidden = ([x[slots] for x in images] for images in (self._inputs, self._hidden))
        return ConvolutionalCriticPass(self._network, inputs, hidden, self._head.at(slots), self._make_automatic)

    @property
    def _layers(self) -> list[Convolution]:
        return self._network.layers

    @property
    def _everything(self) -> Window:
        """The whole of the last convolution's output."""
        return Window(0, self._hidden[-1].shape[2], 0, self._hidden[-1].shape[3])

    def _image(self, features: Tensor) -> Tensor:
        """Features [n, .] as an image [n, c, height, width]."""
        channels, height, width = self._hidden[-1].shape[1:]
        return features.view(-1, height, width, channels).permute(0, 3, 1, 2)

    def _slope(self, number: int, window: Window) -> Tensor:
        """φ' of a layer in a part of its output."""
        return self._layers[number].activation.slope(window.of(self._hidden[number]))

    @property
    def _slot_gradients(self) -> list[Tensor]:
        """The gradients of V in the convolutions, weights [n, d, height, width, c] and biases [n, d]: S by columns."""
        if self._kept is None:
            self._kept, window = [], self._everything
            g = self._image(self._head.input_cotangents()) * self._slope(-1, window)
            for number in reversed(range(len(self._layers))):
                layer, x = self._layers[number], self._inputs[number]
                places = g.flatten(2)
                weight = torch.bmm(places, layer.patches(x)).unflatten(2, (*layer.weight.shape[2:], -1))
                self._kept[:0] = [weight, places.sum(2)]
                if number:
                    g, window = self._passed_on(number, layer.input_cotangent(x, g), window)
        return self._kept

    def _passed_on(self, number: int, x_cotangent: Tensor, window: Window) -> tuple[Tensor, Window]:
        """From a part of a layer's output to the z of the layer before, and which part of that it is."""
        layer = self._layers[number]
        window, inside = window.below(layer).inside(layer, self._hidden[number - 1].shape)
        return inside.of(x_cotangent) * self._slope(number - 1, window), window

    def _gradients(self, cotangent: Tensor, window: Window) -> list[Tensor]:
        """Those of the convolutions, each flat, for a cotangent [n, .] of the features in a part of the last output."""
        image = cotangent.view(len(cotangent), window.bottom - window.top, window.right - window.left, -1)
        g, gradients = image.permute(0, 3, 1, 2) * self._slope(-1, window), list[Tensor]()
        for number in reversed(range(len(self._layers))):
            layer = self._layers[number]
            x_cotangent, weight, bias = layer.backward(window.below(layer).of(self._inputs[number]), g, number > 0)
            gradients[:0] = [weight.flatten(), bias]
            if number:
                g, window = self._passed_on(number, x_cotangent, window)
        return gradients

    def _add_products(self, products: Tensor, cotangent: Tensor) -> None:
        """Adds to the convolutions' part of ``products`` [k, p] those of S with ``cotangent`` [k, n]."""
        pieces = products[:, : self._num_below].split(self._sizes, 1)
        for piece, gradient in zip(pieces, self._slot_gradients, strict=True):
            product = (cotangent @ gradient.flatten(1)).unflatten(1, gradient.shape[1:])
            piece.add_(_channels_first(product).flatten(1))

    def _add_second_order_rows(self, rows: Tensor, coordinates: Coordinates, first: Tensor, second: Tensor) -> None:
        """Adds the rows of the perceptron's coordinates to ``rows`` [k, p]."""
        changes = self._head.add_second_order_rows(rows[:, self._num_below :], coordinates, first, second)
        self._add_below(rows, coordinates, first, *changes)

    def _add_below(
        self, rows: Tensor, coordinates: Coordinates, first: Tensor, change: Tensor, g_change: Tensor | None
    ) -> None:
        """Adds the convolutions' part of them to ``rows`` [k, .]; see :meth:`MLPCriticPass.second_order_changes`."""
        head, num_weights = self._head, self._network.head.layers[0].weight.numel()
        self._add_products(rows, change)
        of_feature = head.input_changes(coordinates, first)
        assert coordinates.on_host is not None
        for number, index in enumerate(coordinates.on_host - self._num_below):
            if 0 <= index < num_weights:
                self._add_of_feature(rows[number], int(index) % self._num_features, of_feature[number])
            if g_change is not None and index >= 0 and (self._is_curved or index >= num_weights):
                cotangent = g_change[number].T @ head.first_weight
                self._add(rows[number], self._gradients(cotangent, self._everything))

    def _add_of_feature(self, row: Tensor, feature: int, cotangent: Tensor) -> None:
        """Adds to ``row`` [p] the gradient of a feature with cotangent [n]; it has one place in the last output."""
        channels, _, width = self._hidden[-1].shape[1:]
        (top, left), channel = divmod(feature // channels, width), feature % channels
        g = cotangent.new_zeros(len(cotangent), channels)
        g[:, channel] = cotangent
        self._add(row, self._gradients(g, Window(top, top + 1, left, left + 1)))

    def _add(self, row: Tensor, gradients: Sequence[Tensor]) -> None:
        for piece, gradient in zip(row[: self._num_below].split(self._sizes), gradients, strict=True):
            piece.add_(gradient)

    @property
    def _num_features(self) -> int:
        return self._hidden[-1][0].numel()

    @property
    def _is_curved(self) -> bool:
        """Whether a coordinate of the perceptron may change the cotangents below through a second derivative of φ."""
        return any(activation.curvature_ratio is not None for activation in self._network.head.activations)
