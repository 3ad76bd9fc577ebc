"""Maps torch's operations to the compiled functions that do the same: ``blpo_rllib/core/native/operations.cpp``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

aten = torch.ops.aten


class CannotRecordError(Exception):
    """An operation has no compiled counterpart, or reads memory that is not known to stay."""


class Recorder(Protocol):
    """What writes down calls of compiled functions: :class:`blpo_rllib.core.recording.Recorder`."""

    def call(self, name: str, *args: Any) -> None:
        """Writes down a call of the function ``name``."""


def _pointwise(recorder: Recorder, name: str, out: Tensor, *operands: Tensor, s: Any = 0.0, t: Any = 0.0) -> None:
    """Writes down ``out = f(operands, s, t)`` element by element."""
    if any(x.dtype == torch.int64 for x in (out, *operands)):
        raise CannotRecordError(f"{name} on integers")
    missing = (None,) * (3 - len(operands))
    recorder.call(name, out, *operands, *missing, _layout(out.shape, [out, *operands]), float(s), float(t))


def _layout(shape: Sequence[int], operands: Sequence[Tensor]) -> np.ndarray:
    """Sizes of three axes and the strides along them of four operands: ``Layout`` in ``operations.cpp``."""
    return _packed(shape, [x.expand(shape).stride() for x in operands])


def _packed(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> np.ndarray:
    axes: list[tuple[int, list[int]]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if axes and all(outer == inner * size for outer, inner in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = axes[-1][0] * size, steps
        else:
            axes.append((size, steps))
    if len(axes) > 3:
        raise CannotRecordError(f"an array of shape {tuple(shape)} has more than three axes that cannot be joined")
    layout = np.zeros((5, 3), np.int64)
    layout[0] = 1
    for axis, (size, steps) in zip(range(3 - len(axes), 3), axes, strict=True):
        layout[0, axis] = size
        layout[1 : 1 + len(steps), axis] = steps
    return layout


_Lowering = Callable[..., None]
# What writes down each operation; it takes the recorder, the operation's result and its arguments.
LOWERINGS: dict[Any, _Lowering] = {}
# Operations that look at an array in another way.
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
    aten.detach.default,
    aten.alias.default,
    aten.diagonal.default,
    aten.split_with_sizes.default,
    aten.split.Tensor,
    aten.as_strided.default,
    aten.unbind.int,
}


def _lowers(*operations: Any) -> Callable[[_Lowering], _Lowering]:
    def register(lowering: _Lowering) -> _Lowering:
        LOWERINGS.update(dict.fromkeys(operations, lowering))
        return lowering

    return register


@_lowers(aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.new_empty_strided.default)
def _empty(recorder: Recorder, out: Tensor, *args: Any, **kwargs: Any) -> None:
    """Nothing to do."""


def _filled(value: float) -> _Lowering:
    def lowering(recorder: Recorder, out: Tensor, *args: Any, **kwargs: Any) -> None:
        _fill(recorder, out, value)

    return lowering


def _fill(recorder: Recorder, out: Tensor, value: float) -> None:
    _pointwise(recorder, "fill", out, s=value)


for _operations, _value in (
    ((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.zero_.default), 0.0),
    ((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1.0),
):
    _lowers(*_operations)(_filled(_value))


@_lowers(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(recorder: Recorder, out: Tensor, _: Any, value: float, **kwargs: Any) -> None:
    _fill(recorder, out, value)


@_lowers(aten.scalar_tensor.default)
def _scalar(recorder: Recorder, out: Tensor, value: float, **kwargs: Any) -> None:
    _fill(recorder, out, value)


@_lowers(aten.fill_.Scalar)
def _fill_in_place(recorder: Recorder, out: Tensor, _: Tensor, value: float) -> None:
    _fill(recorder, out, value)


@_lowers(aten.clone.default, aten._to_copy.default, aten.lift_fresh.default)
def _copy(recorder: Recorder, out: Tensor, x: Tensor, **kwargs: Any) -> None:
    _pointwise(recorder, "copy", out, x)


@_lowers(aten.copy_.default)
def _copy_in_place(recorder: Recorder, out: Tensor, _: Tensor, x: Tensor, **kwargs: Any) -> None:
    _copy(recorder, out, x)


# Names for arrays, and for an array and a number.
_BINARY: dict[Any, tuple[str, str | None]] = {
    aten.mul: ("multiply", "multiply_number"),
    aten.div: ("divide", "divide_number"),
    aten.gt: ("greater_than", "greater_than_number"),
    aten.lt: ("less_than", "less_than_number"),
    aten.le: ("at_most", "at_most_number"),
    aten.eq: ("equals", "equals_number"),
    aten.ge: ("", "at_least_number"),
    aten.ne: ("", "differs_from_number"),
    # Of truth values.
    aten.bitwise_and: ("multiply", None),
    aten.logical_and: ("multiply", None),
}
_UNARY = {
    aten.neg: "negate",
    aten.exp: "exponential",
    aten.log: "logarithm",
    aten.abs: "absolute",
    aten.sqrt: "square_root",
    aten.reciprocal: "reciprocal",
    aten.bitwise_not: "negation",
    aten.logical_not: "negation",
}


def _binary(with_array: str, with_number: str | None) -> _Lowering:
    def lowering(recorder: Recorder, out: Tensor, a: Tensor, b: Any) -> None:
        name = with_number if isinstance(b, Number) else with_array
        if not name:
            raise CannotRecordError(f"{with_array or with_number} does not take {type(b).__name__}")
        if isinstance(b, Number):
            _pointwise(recorder, name, out, a, s=b)
        else:
            _pointwise(recorder, name, out, a, b)

    return lowering


def _unary(name: str) -> _Lowering:
    return lambda recorder, out, x: _pointwise(recorder, name, out, x)


def _overloads(packet: Any) -> list[Any]:
    """All forms of an operation, in-place ones included."""
    in_place = getattr(aten, f"{packet._qualified_op_name.split('::')[1]}_", None)
    return [
        getattr(x, name) for x in (packet, in_place) if x is not None for name in x.overloads() if "out" not in name
    ]


for _packet, _names in _BINARY.items():
    _lowers(*_overloads(_packet))(_binary(*_names))
for _packet, _name in _UNARY.items():
    _lowers(*_overloads(_packet))(_unary(_name))


@_lowers(*_overloads(aten.add))
def _add(recorder: Recorder, out: Tensor, a: Tensor, b: Any, *, alpha: float = 1) -> None:
    if isinstance(b, Number):
        _pointwise(recorder, "add_number", out, a, s=alpha * b)  # type: ignore[operator]
    else:
        _pointwise(recorder, "add", out, a, b, s=alpha)


@_lowers(*_overloads(aten.sub))
def _subtract(recorder: Recorder, out: Tensor, a: Tensor, b: Any, *, alpha: float = 1) -> None:
    _add(recorder, out, a, b, alpha=-alpha)


@_lowers(aten.rsub.Scalar)
def _subtract_from(recorder: Recorder, out: Tensor, x: Tensor, number: float, alpha: float = 1) -> None:
    if alpha != 1:
        raise CannotRecordError("rsub with a factor")
    _pointwise(recorder, "subtract_from_number", out, x, s=number)


@_lowers(aten.pow.Tensor_Scalar)
def _power(recorder: Recorder, out: Tensor, x: Tensor, exponent: float) -> None:
    if exponent != 2:
        raise CannotRecordError(f"power {exponent}")
    _pointwise(recorder, "square", out, x)


@_lowers(aten.clamp.default, aten.clamp_.default)
def _clamp(recorder: Recorder, out: Tensor, x: Tensor, low: float | None = None, high: float | None = None) -> None:
    _pointwise(recorder, "clamp", out, x, s=-math.inf if low is None else low, t=math.inf if high is None else high)


@_lowers(aten.where.self)
def _where(recorder: Recorder, out: Tensor, condition: Tensor, a: Tensor, b: Tensor) -> None:
    _pointwise(recorder, "where", out, condition, a, b)


@_lowers(aten.masked_fill.Scalar, aten.masked_fill_.Scalar)
def _masked_fill(recorder: Recorder, out: Tensor, x: Tensor, mask: Tensor, value: float) -> None:
    _pointwise(recorder, "fill_where", out, x, mask, s=value)


@_lowers(aten.addcmul.default, aten.addcmul_.default)
def _addcmul(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor, c: Tensor, *, value: float = 1) -> None:
    _pointwise(recorder, "add_product", out, a, b, c, s=value)


@_lowers(aten.nan_to_num.default)
def _nan_to_num(recorder: Recorder, out: Tensor, x: Tensor, *values: float | None) -> None:
    if values != (0.0, 0.0, 0.0):
        raise CannotRecordError(f"nan_to_num with {values}")
    _pointwise(recorder, "zero_if_not_finite", out, x)


@_lowers(aten.stack.default)
def _stack(recorder: Recorder, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    for part, x in zip(out.unbind(dim), tensors, strict=True):
        _pointwise(recorder, "copy", part, x)


@_lowers(aten.cat.default)
def _cat(recorder: Recorder, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    parts = [x for x in tensors if x.numel()]
    for part, x in zip(out.split([x.shape[dim] for x in parts], dim), parts, strict=True):
        _pointwise(recorder, "copy", part, x)


@_lowers(aten.constant_pad_nd.default)
def _pad(recorder: Recorder, out: Tensor, x: Tensor, padding: Sequence[int], value: float = 0.0) -> None:
    inside = out
    for axis, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True), start=1):
        if before < 0 or after < 0:
            raise CannotRecordError("negative padding")
        inside = inside.narrow(-axis, before, inside.shape[-axis] - before - after)
    if out.numel() > x.numel():
        _fill(recorder, out, value)
    _pointwise(recorder, "copy", inside, x)


@_lowers(aten.sum.default)
def _sum(recorder: Recorder, out: Tensor, x: Tensor, **kwargs: Any) -> None:
    _sum_along(recorder, out, x, list(range(x.dim())))


@_lowers(aten.sum.dim_IntList)
def _sum_along(recorder: Recorder, out: Tensor, x: Tensor, dims: Any, keepdim: bool = False, **kwargs: Any) -> None:
    summed = {dim % x.dim() for dim in (range(x.dim()) if dims is None else dims)} if x.dim() else set()
    result = out if keepdim or not summed else out[tuple(None if d in summed else slice(None) for d in range(x.dim()))]
    strides = result.expand([1 if d in summed else n for d, n in enumerate(x.shape)]).stride()
    groups = []
    for chosen in (lambda d: d not in summed, lambda d: d in summed):
        axes = [d for d in range(x.dim()) if chosen(d)]
        operands = [[x.stride(d) for d in axes], [strides[d] for d in axes]]
        layout = _packed([x.shape[d] for d in axes], operands)
        if layout[0, 0] != 1:
            raise CannotRecordError("a sum with more than two axes that cannot be joined")
        groups.append(layout[:, 1:])
    kept, along = groups
    recorder.call("sum", out, x, np.ascontiguousarray(np.concatenate([kept[0], kept[2], kept[1], along[0], along[1]])))


@_lowers(aten.dot.default)
def _dot(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor) -> None:
    if not (a.is_contiguous() and b.is_contiguous()):
        raise CannotRecordError("a product of vectors with strides")
    recorder.call("dot", out, a, b, len(a))


@_lowers(aten.linalg_vector_norm.default)
def _norm(recorder: Recorder, out: Tensor, x: Tensor, order: float = 2, dim: Any = None, *args: Any, **_: Any) -> None:
    if order != 2 or dim is not None or not x.is_contiguous():
        raise CannotRecordError("a norm other than the Euclidean one of a whole array")
    recorder.call("norm", out, x, x.numel())


# Products with more terms than this go through a BLAS, hence are not recorded, unless they are of contiguous rows.
_LARGE_PRODUCT = 1 << 22


def _add_product(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """out [m, n] += alpha a b."""
    (m, depth), n = a.shape, b.shape[1]
    rows_of_b = b.stride(0) == 1 or depth == 1
    if (a.stride(1) == 1 or depth == 1) and rows_of_b and (out.stride(1) == 1 or n == 1):
        sizes = m, n, depth, float(alpha)
        recorder.call("add_product_of_rows", out, out.stride(0), a, a.stride(0), b, b.stride(1), *sizes)
    elif n == 1 and out.stride(0) == 1 and a.stride(0) == 1:
        recorder.call("add_rows", out, a, a.stride(1), b, b.stride(0), depth, m, float(alpha))
    elif b.stride(1) == 1 and out.stride(1) == 1 and m * n * depth <= _LARGE_PRODUCT:
        for to, weights in zip(out, a, strict=True):
            recorder.call("add_rows", to, b, b.stride(0), weights, weights.stride(0), depth, n, float(alpha))
    else:
        raise CannotRecordError(f"a product of strides {a.stride()} and {b.stride()}")


@_lowers(aten.mm.default)
def _mm(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor) -> None:
    _fill(recorder, out, 0.0)
    _add_product(recorder, out, a, b, 1.0)


@_lowers(aten.mv.default)
def _mv(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor) -> None:
    _mm(recorder, out[:, None], a, b[:, None])


@_lowers(aten.addmm.default)
def _addmm(
    recorder: Recorder, out: Tensor, x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
) -> None:
    _pointwise(recorder, "multiply_number", out, x, s=beta)
    _add_product(recorder, out, a, b, alpha)


@_lowers(aten.addmv_.default)
def _addmv(
    recorder: Recorder, out: Tensor, _: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
) -> None:
    if beta != 1:
        raise CannotRecordError("addmv_ with a factor of the sum")
    _add_product(recorder, out[:, None], a, b[:, None], alpha)


@_lowers(aten._linalg_solve_ex.default)
def _solve(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> None:
    if a.dim() != 2 or b.dim() != 1:
        raise CannotRecordError("several systems of equations at once")
    recorder.call("solve", out, a, a.stride(0), a.stride(1), b, b.stride(0), len(b))


@_lowers(aten._log_softmax.default)
def _log_softmax(recorder: Recorder, out: Tensor, x: Tensor, dim: int, half: bool) -> None:
    if x.dim() != 2:
        raise CannotRecordError("log_softmax of an array without two axes")
    other = 1 - dim % 2
    recorder.call(
        *("log_softmax", out, x, x.shape[dim], x.stride(dim), x.shape[other], x.stride(other)),
        *(out.stride(dim), out.stride(other)),
    )


def _beside_index(array: Tensor, index: Tensor, x: Tensor, dim: int) -> np.ndarray:
    """The layout of ``pick`` and ``put``: an array of the index's shape, the index, x without its axis ``dim``."""
    others = [0 if d == dim % x.dim() else step for d, step in enumerate(x.stride())]
    return _packed(index.shape, [array.stride(), index.stride(), others])


@_lowers(aten.argmax.default)
def _argmax(recorder: Recorder, out: Tensor, x: Tensor, dim: int | None = None, keepdim: bool = False) -> None:
    if x.dim() != 2 or dim is None or keepdim:
        raise CannotRecordError("argmax other than along one of two axes")
    other = 1 - dim % 2
    recorder.call("argmax", out, out.stride(0), x, x.shape[dim], x.stride(dim), x.shape[other], x.stride(other))


@_lowers(aten.gather.default)
def _gather(recorder: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor, **kwargs: Any) -> None:
    recorder.call("pick", out, index, x, x.stride(dim), _beside_index(out, index, x, dim))


@_lowers(aten.index_select.default)
def _index_select(recorder: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor) -> None:
    shape = [len(index) if d == dim % x.dim() else 1 for d in range(x.dim())]
    recorder.call("pick", out, index, x, x.stride(dim), _beside_index(out, index.view(shape).expand_as(out), x, dim))


@_lowers(aten.scatter_.value, aten.scatter.value)
def _scatter(recorder: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor, value: float) -> None:
    if out.data_ptr() != x.data_ptr():
        _pointwise(recorder, "copy", out, x)
    recorder.call("put", out, index, float(value), out.stride(dim), _beside_index(index, index, out, dim))
