"""Elementary primitives: each forward with its vjp beside it.

Every function takes Tensors, arrays or Python scalars and returns a Tensor. `dy` is the
gradient of the loss with respect to the output; a vjp returns dy times the Jacobian, one
array per differentiable argument. The operators of Tensor are bound at the end.
"""

import math

from minilm.backend import array_module, is_cupy
from minilm.tensor import DeferredMatmul, SparseRows, Tensor, primitive


def unbroadcast(gradient, shape):
    """Sum `gradient` over the axes along which something of `shape` was broadcast; None if that is None."""
    if shape is None or gradient.shape == shape:
        return None if shape is None else gradient
    extra = gradient.ndim - len(shape)
    stretched = tuple(range(extra)) + tuple(
        extra + i for i, n in enumerate(shape) if n == 1 and gradient.shape[extra + i] != 1)
    return gradient.sum(axis=stretched).reshape(shape)


def segment_sum(indices, values):
    """The distinct ones of indices (n,), ascending, and for each the sum of the values (n,..) that have it.

    Sorted, and then summed in that order on every device: np.add.at would visit every element one by one, and
    CuPy's in an order that changes from run to run, and the last bits with it.
    """
    if not len(indices):
        return indices, values
    # CuPy's row sum is the difference of two running sums: a small one would drown if they were not double.
    xp, wide, rows = array_module(values), "float64" if is_cupy(values) else None, values.reshape(len(indices), -1)
    order = xp.argsort(indices, kind="stable")
    distinct, starts = xp.unique(indices[order], return_index=True)
    sums = xp.add.reduceat(rows[order], starts, axis=0, dtype=wide).astype(values.dtype, copy=False)
    return distinct, sums.reshape(-1, *values.shape[1:])


def _shapes(*inputs):
    """Of arrays; None for Python scalars. What a vjp needs of an input may be no more than this."""
    return [getattr(x, "shape", None) for x in inputs]


# Arithmetic, with broadcasting.

@primitive
def add(x, y):
    of_x, of_y = _shapes(x, y)
    def vjp(dz):
        return unbroadcast(dz, of_x), unbroadcast(dz, of_y)
    return x + y, vjp


@primitive
def subtract(x, y):
    of_x, of_y = _shapes(x, y)
    def vjp(dz):
        return unbroadcast(dz, of_x), unbroadcast(-dz, of_y)
    return x - y, vjp


@primitive
def multiply(x, y):
    of_x, of_y = _shapes(x, y)
    def vjp(dz):
        return unbroadcast(dz * y, of_x), unbroadcast(dz * x, of_y)
    return x * y, vjp


@primitive
def divide(x, y):
    of_x, of_y = _shapes(x, y)
    z = x / y
    def vjp(dz):
        return unbroadcast(dz / y, of_x), unbroadcast(-dz * z / y, of_y)
    return z, vjp


@primitive
def negative(x):
    def vjp(dy):
        return -dy
    return -x, vjp


@primitive
def power(x, exponent):
    """x to a constant power (a Python number)."""
    if hasattr(exponent, "shape"):
        raise TypeError("the exponent must be a number; write exp(y * log(x)) for a variable one")
    def vjp(dy):
        return dy * exponent * x ** (exponent - 1 if exponent else 0)       # 0 * 0^-1 is NaN
    return x ** exponent, vjp


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


def stable_sigmoid(x):
    """1 / (1 + exp -x) of an array, without overflow at either end."""
    xp = array_module(x)
    e = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1 / (1 + e), e / (1 + e))


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
    return array_module(x).logaddexp(x, 0), vjp


@primitive
def log_sigmoid(x):
    """log(1 / (1 + exp -x)) = -softplus(-x), finite at any finite x.   d/dx = sigmoid(-x)"""
    def vjp(dy):
        return dy * stable_sigmoid(-x)
    return -array_module(x).logaddexp(-x, 0), vjp


@primitive
def clip(x, low, high):
    """x limited to [low, high]; no gradient where it is limited."""
    def vjp(dy):
        return dy * ((x >= low) & (x <= high))
    return array_module(x).clip(x, low, high), vjp


@primitive
def minimum(x, y):
    """The smaller of the two; where they are equal, each gets half of the gradient."""
    xp, (of_x, of_y) = array_module(x, y), _shapes(x, y)
    def vjp(dz):
        share = (x < y) + 0.5 * (x == y)
        return unbroadcast(dz * share.astype(dz.dtype), of_x), unbroadcast(dz * (1 - share).astype(dz.dtype), of_y)
    return xp.minimum(x, y), vjp


@primitive
def where(condition, x, y):
    """x where condition holds, y elsewhere. What is not selected gets a zero, even if it is NaN."""
    xp, (of_x, of_y) = array_module(x, y), _shapes(x, y)
    condition = xp.asarray(condition, dtype=bool)
    def vjp(dz):
        return None, unbroadcast(xp.where(condition, dz, 0), of_x), unbroadcast(xp.where(condition, 0, dz), of_y)
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


def mean(x, axis=None, keepdims=False):
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
    """exp x / sum exp x.   dx = y (dy - <dy, y>)"""
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
    y = x - x.max(axis=axis, keepdims=True)         # first: a small logarithm added to a large maximum loses its digits
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
    """Axes in a new order; reversed if none is given."""
    inverse = None if axes is None else sorted(range(x.ndim), key=lambda i: axes[i] % x.ndim)
    def vjp(dy):
        return dy.transpose(inverse)
    return x.transpose(axes), vjp


def swapaxes(x, i, j):
    axes = list(range(x.ndim))
    axes[i], axes[j] = axes[j], axes[i]
    return transpose(x, axes=tuple(axes))


@primitive
def broadcast_to(x, shape):
    of_x, = _shapes(x)
    def vjp(dy):
        return unbroadcast(dy, of_x)
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


def concatenate(tensors, axis=0):
    return _concatenate(*tensors, axis=axis)


@primitive
def getitem(x, index):
    """x[index] for slices, integers, integer arrays or masks; what is picked twice adds up."""
    xp = array_module(x)
    def vjp(dy):
        if _is_basic(index):
            dx = xp.zeros_like(x)
            dx[index] = dy
            return dx
        places, sums = segment_sum(xp.arange(x.size).reshape(x.shape)[index].reshape(-1), dy.reshape(-1))
        dx = xp.zeros(x.size, x.dtype)
        dx[places] = sums
        return dx.reshape(x.shape)
    return x[index], vjp


def _is_basic(index):
    parts = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in parts)


@primitive
def embed(table, indices):
    """Rows of a table (V,D) for integer indices (...), giving (...,D)."""
    xp = array_module(table)
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < len(table):
        raise IndexError(f"indices from {int(indices.min())} to {int(indices.max())} "
                         f"in a table of {len(table)} rows")
    at = xp.asarray(indices)
    def vjp(dy):
        return SparseRows(table, *segment_sum(at.reshape(-1), dy.reshape(-1, table.shape[1])))
    return table[at], vjp


@primitive
def gather(x, indices):
    """x[..., indices]: from the last axis of x (...,V), one entry for each index (...)."""
    xp = array_module(x)
    at = xp.expand_dims(xp.asarray(indices), -1)
    def vjp(dy):
        dx = xp.zeros_like(x)
        xp.put_along_axis(dx, at, xp.expand_dims(dy, -1), axis=-1)
        return dx
    return xp.take_along_axis(x, at, axis=-1)[..., 0], vjp


# Products.

def matmul(x, y):
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
        # One large product instead of one small one for each leading index.
        of_x, rows = x.shape, x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        def vjp(dz):
            dz = dz.reshape(len(rows), y.shape[1])
            return (dz @ y.T).reshape(of_x), DeferredMatmul(rows.T, dz)
        return (rows @ y).reshape(*x.shape[:-1], y.shape[1]), vjp

    def vjp(dz):
        return unbroadcast(dz @ y.swapaxes(-1, -2), x.shape), unbroadcast(x.swapaxes(-1, -2) @ dz, y.shape)
    return x @ y, vjp


def _reshape_method(x, *shape):
    return reshape(x, shape=shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape)


def _transpose_method(x, *axes):
    axes = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
    return transpose(x, axes=tuple(axes) or None)


Tensor.__add__, Tensor.__radd__ = add, lambda x, y: add(y, x)
Tensor.__sub__, Tensor.__rsub__ = subtract, lambda x, y: subtract(y, x)
Tensor.__mul__, Tensor.__rmul__ = multiply, lambda x, y: multiply(y, x)
Tensor.__truediv__, Tensor.__rtruediv__ = divide, lambda x, y: divide(y, x)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, lambda x, y: matmul(y, x)
Tensor.__neg__, Tensor.__pow__, Tensor.__getitem__ = negative, power, getitem
Tensor.sum, Tensor.mean = sum, mean
Tensor.reshape, Tensor.transpose = _reshape_method, _transpose_method
Tensor.T = property(transpose)
