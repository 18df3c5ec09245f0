"""Elementary primitives: each forward with its vjp beside it.

A primitive takes Tensors or arrays and returns a Tensor; arithmetic and elementwise functions also take Python
scalars. The helpers (unbroadcast, stable_sigmoid, stable_softplus) work on arrays. `dy`, or `dz` if the inputs are
called x and y, is the gradient of the loss with respect to the output; a vjp returns dy times the Jacobian, one array
per differentiable argument. The operators of Tensor (x + y, x @ y, x[i]) call the functions of these names.
Tests: tests/test_ops.py.
"""

from __future__ import annotations

import math
import sys

import numpy as np

from minilm import checks, tensor
from minilm.backend import array_module, to_numpy
from minilm.fast.deferred import DeferredMatmul
from minilm.segment_sum import segment_sum
from minilm.tensor import Tensor, primitive


def unbroadcast(gradient, shape) -> np.ndarray | None:
    """Sum a gradient over the axes along which an input of this shape was broadcast. shape None (a scalar): None."""
    if shape is None or gradient.shape == shape:
        return None if shape is None else gradient
    extra = gradient.ndim - len(shape)
    stretched = tuple(range(extra)) + tuple(
        extra + i for i, n in enumerate(shape) if n == 1 and gradient.shape[extra + i] != 1)
    return gradient.sum(axis=stretched).reshape(shape)


def _shapes(*inputs):
    """The shapes of arrays, None for Python scalars. Many vjps need no more of an input than its shape."""
    return [getattr(x, "shape", None) for x in inputs]


# Arithmetic, with broadcasting.

@primitive
def add(x, y):
    x_shape, y_shape = _shapes(x, y)
    def vjp(dz):
        return unbroadcast(dz, x_shape), unbroadcast(dz, y_shape)
    return x + y, vjp


@primitive
def subtract(x, y):
    x_shape, y_shape = _shapes(x, y)
    def vjp(dz):
        return unbroadcast(dz, x_shape), unbroadcast(-dz, y_shape)
    return x - y, vjp


@primitive
def multiply(x, y):
    x_shape, y_shape = _shapes(x, y)
    def vjp(dz):
        return unbroadcast(dz * y, x_shape), unbroadcast(dz * x, y_shape)
    return x * y, vjp


@primitive
def divide(x, y):
    x_shape, y_shape = _shapes(x, y)
    z = x / y
    def vjp(dz):
        return unbroadcast(dz / y, x_shape), unbroadcast(-dz * z / y, y_shape)
    return z, vjp


@primitive
def negative(x):
    def vjp(dy):
        return -dy
    return -x, vjp


@primitive
def power(x, y):
    """z = x^y.   dx = dz y x^(y-1),   dy = dz z log x: at x = 0 it is 0 for y >= 0, -inf for y < 0; below, NaN"""
    x_shape, y_shape = _shapes(x, y)
    z = x ** y
    def vjp(dz):
        dx = dz * y * x ** (y - (y != 0))                       # 0 * 0^-1 is NaN
        if y_shape is None:
            return dx, None
        xp = array_module(z)
        base = xp.asarray(x, dtype=z.dtype)
        log_x = xp.where(base < 0, xp.nan, xp.log(xp.where(base > 0, base, 1)))
        log_x = xp.where((base == 0) & (y < 0), -xp.inf, log_x)
        return unbroadcast(dx, x_shape), unbroadcast(dz * z * log_x, y_shape)
    return z, vjp


# Elementwise functions.

@primitive
def exp(x):
    y = array_module(x).exp(x)
    def vjp(dy):
        return dy * y
    return y, vjp


@primitive
def log(x):
    def vjp(dy):
        return dy / x
    return array_module(x).log(x), vjp


@primitive
def sqrt(x):
    y = array_module(x).sqrt(x)
    def vjp(dy):
        return dy / (2 * y)
    return y, vjp


@primitive
def tanh(x):
    y = array_module(x).tanh(x)
    def vjp(dy):
        return dy * (1 - y * y)
    return y, vjp


def stable_sigmoid(x) -> np.ndarray:
    """1 / (1 + exp -x) of an array, without overflow at either end."""
    xp = array_module(x)
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1 / (1 + e), e / (1 + e))


def stable_softplus(x) -> np.ndarray:
    """log(1 + exp x) of an array, without overflow.  -log sigmoid(z) = stable_softplus(-z)"""
    return array_module(x).logaddexp(x, 0)


@primitive
def sigmoid(x):
    y = stable_sigmoid(x)
    def vjp(dy):
        return dy * y * (1 - y)
    return y, vjp


@primitive
def softplus(x):
    """log(1 + exp x).   d/dx = sigmoid(x)"""
    def vjp(dy):
        return dy * stable_sigmoid(x)
    return stable_softplus(x), vjp


def log_sigmoid(x) -> Tensor:
    """log(1 / (1 + exp -x)) = -softplus(-x), finite at any finite x.   d/dx = sigmoid(-x)"""
    return negative(softplus(negative(x)))


@primitive
def clip(x, low, high):
    """x limited to [low, high]; no gradient where it is limited."""
    if not low <= high:
        raise ValueError(f"clip: low is {low} and high is {high}; low must be at most high")
    def vjp(dy):
        return dy * ((x >= low) & (x <= high))
    return array_module(x).clip(x, low, high), vjp


@primitive
def minimum(x, y):
    """The smaller of the two; where they are equal, each gets half of the gradient."""
    xp = array_module(x, y)
    x_shape, y_shape = _shapes(x, y)
    def vjp(dz):
        share = ((x < y) + 0.5 * (x == y)).astype(dz.dtype)
        return unbroadcast(dz * share, x_shape), unbroadcast(dz * (1 - share), y_shape)
    return xp.minimum(x, y), vjp


def maximum(x, y) -> Tensor:
    """The larger of the two; where they are equal, each gets half of the gradient."""
    return negative(minimum(negative(x), negative(y)))


def absolute(x) -> Tensor:
    """|x|.   d/dx = sign(x), 0 at 0"""
    return maximum(x, negative(x))


@primitive
def where(condition, x, y):
    """x where condition holds, y elsewhere. The gradient of an element that is not selected is 0, even if it is NaN."""
    xp = array_module(x, y)
    x_shape, y_shape = _shapes(x, y)
    condition = xp.asarray(checks.mask("where", condition, name="condition"))
    def vjp(dz):
        return None, unbroadcast(xp.where(condition, dz, 0), x_shape), unbroadcast(xp.where(condition, 0, dz), y_shape)
    return xp.where(condition, x, y), vjp


# Reductions.

def _expand(reduced, x, axis, keepdims):
    """A reduced array, shaped so that it broadcasts against x again."""
    if axis is None or keepdims:
        return reduced if keepdims else reduced.reshape((1,) * x.ndim)
    return array_module(x).expand_dims(reduced, axis)


@primitive
def sum(x, axis=None, keepdims=False):
    xp = array_module(x)
    def vjp(dy):
        return xp.broadcast_to(_expand(dy, x, axis, keepdims), x.shape)
    return x.sum(axis=axis, keepdims=keepdims), vjp


def mean(x, axis=None, keepdims=False) -> Tensor:
    total = sum(x, axis=axis, keepdims=keepdims)
    return total * (total.size / x.size if x.size else float("nan"))


@primitive
def logsumexp(x, axis=-1, keepdims=False):
    """log sum exp x.   d/dx = softmax(x)"""
    xp = array_module(x)
    highest = x.max(axis=axis, keepdims=True)
    shift = xp.where(xp.isfinite(highest), highest, 0)          # -inf - -inf is NaN
    y = xp.log(xp.exp(x - shift).sum(axis=axis, keepdims=True)) + shift
    def vjp(dy):
        return _expand(dy, x, axis, keepdims) * xp.exp(x - y)
    return (y if keepdims else y.squeeze(axis)), vjp


@primitive
def softmax(x, axis=-1):
    """y = exp x / sum exp x.   dx = y (dy - sum dy y), with the sums along the axis"""
    xp = array_module(x)
    y = xp.exp(x - x.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)
    def vjp(dy):
        return y * (dy - (dy * y).sum(axis=axis, keepdims=True))
    return y, vjp


@primitive
def log_softmax(x, axis=-1):
    """log of softmax.   dx = dy - softmax(x) sum dy"""
    xp = array_module(x)
    y = x - x.max(axis=axis, keepdims=True)         # subtracted first: log(sum) + max would round away small logs
    y = y - xp.log(xp.exp(y).sum(axis=axis, keepdims=True))
    def vjp(dy):
        return dy - xp.exp(y) * dy.sum(axis=axis, keepdims=True)
    return y, vjp


# Shapes.

@primitive
def reshape(x, shape):
    def vjp(dy):
        return dy.reshape(x.shape)
    return x.reshape(shape), vjp


@primitive
def transpose(x, axes=None):
    """Axes in a new order; reversed if none is given. The vjp applies the inverse permutation."""
    inverse = None if axes is None else sorted(range(x.ndim), key=lambda i: axes[i] % x.ndim)
    def vjp(dy):
        return dy.transpose(inverse)
    return x.transpose(axes), vjp


def swapaxes(x, i: int, j: int) -> Tensor:
    axes = list(range(x.ndim))
    axes[i], axes[j] = axes[j], axes[i]
    return transpose(x, axes=tuple(axes))


@primitive
def broadcast_to(x, shape):
    x_shape, = _shapes(x)
    def vjp(dy):
        return unbroadcast(dy, x_shape)
    return array_module(x).broadcast_to(x, shape), vjp


@primitive
def _concatenate(*arrays, axis):
    xp = array_module(*arrays)
    ends = [0]
    for a in arrays:
        ends.append(ends[-1] + a.shape[axis])
    def vjp(dy):
        return tuple(dy.take(xp.arange(i, j), axis=axis) for i, j in zip(ends, ends[1:]))
    return xp.concatenate(arrays, axis=axis), vjp


def concatenate(tensors, axis: int = 0) -> Tensor:
    return _concatenate(*tensors, axis=axis)


@primitive
def getitem(x, index):
    """x[index] for slices, integers, integer arrays or masks. An element that is picked twice gets both gradients."""
    xp = array_module(x)
    def vjp(dy):
        if _is_basic(index):
            dx = xp.zeros_like(x)
            dx[index] = dy
            return dx
        picked = to_numpy(xp.arange(x.size).reshape(x.shape)[index]).reshape(-1)
        return _rows_added(x.reshape(-1), picked, dy.reshape(-1)).reshape(x.shape)
    return x[index], vjp


def _rows_added(x, rows, values):
    """Zeros like x, with each value added in its row: the gradient of x[rows]; rows are NumPy's."""
    xp = array_module(x)
    distinct, sums = segment_sum(rows, values)
    dx = xp.zeros_like(x)
    dx[xp.asarray(distinct)] = sums
    return dx


def _is_basic(index):
    parts = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in parts)


@primitive
def embed(table, indices):
    """Rows of a table (V,D) for integer indices (...), giving (...,D)."""
    rows = to_numpy(checks.indices("embed", "indices", indices, len(table)))
    def vjp(dy):
        return _rows_added(table, rows.reshape(-1), dy.reshape(-1, table.shape[1]))
    return table[array_module(table).asarray(rows)], vjp


@primitive
def gather(x, indices):
    """One entry of the last axis of x (...,V) for each index (...): take_along_axis, without its last axis."""
    xp = array_module(x)
    at = xp.expand_dims(xp.asarray(checks.indices("gather", "indices", indices, x.shape[-1])), -1)
    if at.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"gather: indices {at.shape[:-1]} for x {x.shape}; pass one for each row of x")
    def vjp(dy):
        dx = xp.zeros_like(x)
        xp.put_along_axis(dx, at, xp.expand_dims(dy, -1), axis=-1)
        return dx
    return xp.take_along_axis(x, at, axis=-1)[..., 0], vjp


# Products.

def matmul(x, y) -> Tensor:
    """x (...,M,K) @ y (...,K,N), leading axes broadcast; a vector (K,) on either side contracts."""
    if y.ndim == 1:
        z = _matmul(x, reshape(y, shape=(-1, 1)))
        return reshape(z, shape=z.shape[:-1])
    if x.ndim == 1:
        z = _matmul(reshape(x, shape=(1, -1)), y)
        return reshape(z, shape=z.shape[:-2] + z.shape[-1:])
    return _matmul(x, y)


@primitive
def _matmul(x, y):
    """dx = dz y^T,   dy = x^T dz"""
    if y.ndim == 2:
        # One large product instead of one small product for each leading index.
        x_shape = x.shape
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        def vjp(dz):
            dz = dz.reshape(len(rows), y.shape[1])
            return (dz @ y.T).reshape(x_shape), DeferredMatmul(rows.T, dz)
        return (rows @ y).reshape(*x.shape[:-1], y.shape[1]), vjp

    def vjp(dz):
        return unbroadcast(dz @ y.swapaxes(-1, -2), x.shape), unbroadcast(x.swapaxes(-1, -2) @ dz, y.shape)
    return x @ y, vjp


tensor.operations = sys.modules[__name__]
