"""Perceptrons on the CPU by compiled kernels: what :mod:`blpo_rllib.core.mlp` computes, in few large calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from blpo_rllib.core.mlp import ACTIVATIONS, MLP, MLPCriticPass, MLPPass
from blpo_rllib.core.native import DTYPES, SLOT_MULTIPLE, Argument, Kernels, Net
from blpo_rllib.core.networks import Coordinates, unflatten

# The kernels' numbers of the activations they know.
_KINDS = {ACTIVATIONS[nn.Tanh]: 0, ACTIVATIONS[nn.ReLU]: 1}


def forward_pass(mlp: MLP, x: Tensor, kernels: Kernels | None) -> MLPPass:
    """Inputs [n, d_0] through all layers, by ``kernels`` where there are any and they apply."""
    if kernels is None or not _is_supported(mlp, x):
        return mlp.forward(x)
    return NativePass(mlp, x, kernels)


def critic_pass(mlp: MLP, obs: Tensor, kernels: Kernels | None) -> MLPCriticPass:
    """The critic at observations [n, d_0], by ``kernels`` where there are any and they apply."""
    forward = forward_pass(mlp, obs, kernels)
    return NativeCriticPass(mlp, forward) if isinstance(forward, NativePass) else MLPCriticPass(mlp, forward)


def _is_supported(mlp: MLP, x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in DTYPES and x.dtype == mlp.parameters[0].dtype


class _Shape:
    """What the kernels need to know of a perceptron, but for its parameters and the number of slots."""

    def __init__(self, mlp: MLP):
        self._sizes = (ctypes.c_int64 * len(mlp.sizes))(*mlp.sizes)
        self._kinds = (ctypes.c_int64 * len(mlp.activations))(*(_KINDS[a] for a in mlp.activations))

    def net(self, parameters: Sequence[Tensor], num_slots: int) -> Net:
        """The perceptron with these W_1, b_1, ..., or directions in their place."""
        return Net(self._sizes, self._kinds, parameters, num_slots)


_shapes: WeakKeyDictionary[MLP, _Shape] = WeakKeyDictionary()


def _shape_of(mlp: MLP) -> _Shape:
    if mlp not in _shapes:
        _shapes[mlp] = _Shape(mlp)
    return _shapes[mlp]


class NativePass(MLPPass):
    """A perceptron at one point on n inputs; its arrays are padded to N slots.

    Args:
        mlp: The layers, on the CPU.
        x: Inputs [n, d_0], float32 or float64 as the layers.
        kernels: The compiled functions.
    """

    def __init__(self, mlp: MLP, x: Tensor, kernels: Kernels):
        self._kernels, num_inputs = kernels, x.shape[0]
        self._num_inputs = num_inputs
        self._num_slots = -(-num_inputs // SLOT_MULTIPLE) * SLOT_MULTIPLE
        # h_0 ... h_{L-1} and z_L, one below the other.
        self._all_hidden = x.new_empty(sum(mlp.sizes), self._num_slots)
        # What gradients take slot by slot, units padded to whole vectors.
        widths = sum(-(-size // SLOT_MULTIPLE) * SLOT_MULTIPLE for size in mlp.sizes[:-1])
        self._by_slot = x.new_empty(widths, self._num_slots)
        super().__init__(mlp, (), self._all_hidden[-mlp.sizes[-1] :, :num_inputs])
        self._net = self._net_with(mlp.parameters)
        self._call("forward", self._net, x, *x.stride(), num_inputs, self._all_hidden, self._by_slot)

    def hidden(self, layer: int) -> Tensor:
        begin = sum(self._mlp.sizes[:layer])
        return self._all_hidden[begin : begin + self._mlp.sizes[layer], : self._num_inputs]

    def _net_with(self, parameters: Sequence[Tensor]) -> Net:
        """The perceptron of this shape that has these parameters, or directions in their place."""
        return _shape_of(self._mlp).net(parameters, self._num_slots)

    def _call(self, name: str, net: Net, *args: Argument) -> None:
        self._kernels(name, self._all_hidden.dtype, net, *args)

    def padded(self, x: Tensor) -> Tensor:
        """[..., n] to [..., N], with zeros."""
        return nn.functional.pad(x, (0, self._num_slots - self._num_inputs)).contiguous()

    def _run_backward(self, output: Tensor, gradient: Tensor | None) -> Tensor:
        """g_1 ... g_L for g_L = ``output`` [d_L, n], one below the other [., N]; fills ``gradient`` [p] if given."""
        cotangents = output.new_empty(self._all_hidden.shape[0] - self._mlp.sizes[0], self._num_slots)
        output = output.contiguous()
        self._call(
            "backward",
            self._net,
            self._all_hidden,
            self._by_slot,
            output,
            self._num_inputs,
            cotangents,
            gradient,
        )
        return cotangents

    def backward(self, output: Tensor) -> Tensor:
        gradient = output.new_empty(self.num_parameters)
        self._run_backward(output, gradient)
        return gradient

    def unit_cotangents(self) -> Tensor:
        """G_1 ... G_L, one below the other [., N]."""
        return self._run_backward(self.output.new_ones(self.output.shape), None)

    def by_layer(self, cotangents: Tensor) -> dict[int, Tensor]:
        """Views [d_l, n] by layer l of arrays that stand one below the other."""
        return dict(enumerate(cotangents[:, : self._num_inputs].split(self._mlp.sizes[1:]), start=1))

    def scaled_gradients(self, cotangents: Tensor, scale: Tensor) -> Tensor:
        """The gradients of all layers, [k, p], for g_l = ``cotangents`` times each of ``scale`` [k, n]."""
        gradients, scale = scale.new_empty(scale.shape[0], self.num_parameters), self.padded(scale)
        arrays = self._all_hidden, self._by_slot, cotangents, scale
        self._call("scaled_gradients", self._net, *arrays, scale.shape[0], gradients)
        return gradients

    def jvp(self, cotangents: Tensor, direction: Sequence[Tensor]) -> Tensor:
        """Σ_l Σ_units g_l ⊙ (δW_l h_{l-1} + δb_l), [n], for contiguous δW_1, δb_1, ... in ``direction``."""
        product = cotangents.new_empty(self._num_slots)
        self._call("jvp", self._net_with(direction), self._all_hidden, cotangents, product)
        return product[: self._num_inputs]

    def jacobian_columns(self, places: Tensor, cotangents: Tensor) -> Tensor:
        """:meth:`CriticPass.jacobian_columns` for the parameters at ``places``: see :class:`Coordinates`."""
        coordinates = cotangents.new_empty(len(places), self._num_slots)
        self._call("jacobian_columns", self._net, self._all_hidden, cotangents, places, len(places), coordinates)
        return coordinates[:, : self._num_inputs]

    def second_order_rows(self, places: Tensor, cotangents: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """:meth:`CriticPass.second_order_rows` for the parameters at ``places``: see :class:`Coordinates`."""
        rows = first.new_empty(len(places), self.num_parameters)
        inputs = self._second_order_inputs(cotangents, first, second)
        self._call("second_order_rows", self._net, *inputs, places, len(places), self._workspace(cotangents), rows)
        return rows

    def second_order_product(
        self, direction: Sequence[Tensor], cotangents: Tensor, first: Tensor, second: Tensor
    ) -> Tensor:
        """:meth:`CriticPass.second_order_product` for contiguous δW_1, δb_1, ... in ``direction``."""
        product = first.new_empty(self.num_parameters)
        inputs = self._second_order_inputs(cotangents, first, second)
        nets = self._net, self._net_with(direction)
        self._call("second_order_product", *nets, *inputs, self._workspace(cotangents), product)
        return product

    def _second_order_inputs(self, cotangents: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        return self._all_hidden, self._by_slot, cotangents, self.padded(first), self.padded(second)

    def _workspace(self, cotangents: Tensor) -> Tensor:
        return cotangents.new_empty(3 * cotangents.numel() + self._by_slot.numel())


class NativeCriticPass(MLPCriticPass):
    """The critic as a perceptron with a single output.

    Args:
        mlp: Its layers.
        forward: Their pass over the observations.
    """

    def __init__(self, mlp: MLP, forward: NativePass):
        super().__init__(mlp, forward)
        self._native = forward
        self._stacked: Tensor | None = None

    @property
    def _all_g(self) -> Tensor:
        """G_1 ... G_L, one below the other."""
        if self._stacked is None:
            self._stacked = self._native.unit_cotangents()
        return self._stacked

    @property
    def _g(self) -> dict[int, Tensor]:
        return self._native.by_layer(self._all_g)

    def vjp(self, cotangent: Tensor) -> Tensor:
        gradients = self._native.scaled_gradients(self._all_g, cotangent.view(-1, cotangent.shape[-1]))
        return gradients.view(*cotangent.shape[:-1], -1)

    def jvp(self, tangent: Tensor) -> Tensor:
        return self._native.jvp(self._all_g, unflatten(tangent.contiguous(), self._mlp.parameters))

    def second_order_product(self, tangent: Tensor, first: Tensor, second: Tensor) -> Tensor:
        direction = unflatten(tangent.contiguous(), self._mlp.parameters)
        return self._native.second_order_product(direction, self._all_g, first, second)

    def jacobian_columns(self, coordinates: Coordinates) -> Tensor:
        assert coordinates.places is not None
        return self._native.jacobian_columns(coordinates.places, self._all_g)

    def second_order_rows(self, coordinates: Coordinates, first: Tensor, second: Tensor) -> Tensor:
        assert coordinates.places is not None
        return self._native.second_order_rows(coordinates.places, self._all_g, first, second)
