"""The logits of a few rows in decoding, as small products that read the weights where they are.

For a large product BLAS first copies both matrices into the order of its kernel. With few rows, the copy of the
unembedding takes longer than the arithmetic. OpenBLAS does not copy for a small product, on CPUs with AVX-512; on other
CPUs the small products take about the time of the large one.
Measured gain: scripts/bench/tricks.py. Tests: tests/test_generate.py.
"""

import os

import numpy as np

from minilm.backend import array_module, is_cupy

# With several threads, BLAS divides a large product among them; the small ones would be computed by one thread.
ONE_THREAD = os.environ.get("OPENBLAS_NUM_THREADS") == "1"
ROWS = range(2, 9)              # one row alone is a product with a vector, which copies nothing
MULTIPLICATIONS = 1 << 18       # of a small product


def logits(hidden: np.ndarray, unembedding: np.ndarray) -> np.ndarray:
    """hidden @ unembedding^T.  hidden (B,D), unembedding (V,D) -> (B,V)

    Of a few rows: by products with as many rows of the unembedding as MULTIPLICATIONS allows, and one with the rest.
    """
    (B, D), V = hidden.shape, len(unembedding)
    if not ONE_THREAD or B not in ROWS or is_cupy(hidden):
        # In this order, and then copied: for a few rows BLAS takes half the time of hidden @ U^T.
        return array_module(hidden).ascontiguousarray((unembedding @ hidden.T).T)
    rows = max(1, MULTIPLICATIONS // (B * D))
    whole = V // rows * rows
    transposed = np.empty((V, B), hidden.dtype)
    np.matmul(unembedding[:whole].reshape(-1, rows, D), hidden.T, out=transposed[:whole].reshape(-1, rows, B))
    np.matmul(unembedding[whole:], hidden.T, out=transposed[whole:])
    return np.ascontiguousarray(transposed.T)
