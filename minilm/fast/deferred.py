"""The gradient of a weight matrix, described instead of computed.

It is as large as the matrix, however few the tokens. A vjp may return a DeferredMatmul(x, y) in place of the array
x @ y. Tensor.backward then computes the product of a leaf directly in its storage, AdamW's flat gradient, instead of
computing it elsewhere and copying it. The values are the same. Measured gain, mostly the memory of the largest
gradient, the unembedding's: scripts/bench/tricks.py. Tests: tests/test_tensor.py.
"""

from minilm.backend import array_module


class DeferredMatmul:
    """The gradient x @ y, of a weight matrix."""

    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x = x
        self.y = y

    shape = property(lambda self: (self.x.shape[0], self.y.shape[1]))
    dtype = property(lambda self: self.x.dtype)

    def write(self, out=None):
        """The product, in the array `out` if one is given."""
        return array_module(self.x).matmul(self.x, self.y, out=out)
