"""Activation functions of other models than ours, for experiments with the same automatic differentiation.

The transformer of minilm has SwiGLU (layers.py).
Tests: tests/test_ops.py.
"""

from __future__ import annotations

import math

import numpy as np

from minilm import ops
from minilm.backend import array_module
from minilm.tensor import Tensor, primitive


@primitive
def relu(x):
    """max(x, 0).   d/dx = 1 above 0, 0 elsewhere, also at 0"""
    xp = array_module(x)
    def vjp(dy):
        return xp.where(x > 0, dy, 0)
    return xp.maximum(x, 0), vjp


def gelu(x: Tensor | np.ndarray) -> Tensor:
    """x times the normal distribution function of x, by GPT-2's formula with tanh (Hendrycks and Gimpel 2016,
    arXiv:1606.08415, section 2). PyTorch's default is the exact function: the two differ by less than 5e-4."""
    return 0.5 * x * (1 + ops.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
