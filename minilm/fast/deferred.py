"""Gradients that a vjp describes instead of computing.

The gradient of a weight is as large as the weight, however few the tokens. A vjp may return, in place of an array,
an object with `shape`, `dtype`, `write(out=None)` and `add_to(array)`. Tensor.backward then computes the gradient of
a leaf directly in its storage, AdamW's flat gradient, instead of computing it elsewhere and copying or adding it.
The values are the same. Tests: tests/test_tensor.py.
"""

import numpy as np

from minilm.backend import array_module, is_cupy


class DeferredMatmul:
    """The gradient x @ y, of a weight matrix."""

    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x = x
        self.y = y

    shape = property(lambda self: (self.x.shape[0], self.y.shape[1]))
    dtype = property(lambda self: self.x.dtype)

    def write(self, out=None):
        return array_module(self.x).matmul(self.x, self.y, out=out)

    def add_to(self, array):
        array += self.write()


class SparseRows:
    """The gradient of an embedding: zero but for the rows of the tokens that occurred.

    like: an array of the gradient's shape and dtype; rows (N,): distinct row numbers; values (N,D).
    """

    __slots__ = ("shape", "dtype", "rows", "values")

    def __init__(self, like, rows, values):
        self.shape = like.shape
        self.dtype = like.dtype
        self.rows = rows
        self.values = values

    def write(self, out=None):
        if out is None:
            out = array_module(self.values).empty(self.shape, self.dtype)
        out.fill(0)
        self.add_to(out)
        return out

    def add_to(self, array):
        array[self.rows] += self.values


def segment_sum(indices, values) -> tuple[np.ndarray, np.ndarray]:
    """The distinct indices of indices (n,), ascending, and for each the sum of its values, out of values (n,..).

    Sorted first, so that the order of summation, and with it the last bits, are the same in every run: np.add.at
    visits the elements one by one, and CuPy's add.at in an order that changes from run to run.
    """
    if not len(indices):
        return indices, values
    xp = array_module(values)
    # CuPy computes a row's sum as a difference of two running sums: in float32 a small sum would lose its digits.
    wide = "float64" if is_cupy(values) else None
    rows = values.reshape(len(indices), -1)
    order = xp.argsort(indices, kind="stable")
    distinct, starts = xp.unique(indices[order], return_index=True)
    sums = xp.add.reduceat(rows[order], starts, axis=0, dtype=wide).astype(values.dtype, copy=False)
    return distinct, sums.reshape(-1, *values.shape[1:])
