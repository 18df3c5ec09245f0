"""Products of a few rows with large matrices, as in decoding: small products that read the weights where they are.

For a large product BLAS first copies both matrices into the order of its kernel. With few rows, the copy of the weights
takes longer than the arithmetic. OpenBLAS does not copy for a small product, on CPUs with AVX-512; on other CPUs the
small products take about the time of the large one.
Measured gain: scripts/bench/tricks.py (logits), scripts/bench/bandwidth.py (a whole token).
Tests: tests/test_generate.py.
"""

import functools
import os

import numpy as np

from minilm.backend import array_module, is_cupy

# With several threads, BLAS divides a large product among them; the small ones would be computed by one thread.
ONE_THREAD = os.environ.get("OPENBLAS_NUM_THREADS") == "1"
ROWS = range(2, 9)              # one row alone is a product with a vector, which copies nothing
MULTIPLICATIONS = 1 << 18       # of a small product for the logits, which has few columns
IN_A_BLOCK = 1 << 19            # multiplications of a small product with a block of rows of a weight
LARGE = 1 << 17                 # numbers of a weight: smaller ones stay in the cache, also as copies


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


def product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x @ weight.  x (B,D), weight (D,N) -> (B,N): a sum of products, each with a block of rows of the weight."""
    (B, D), N = x.shape, weight.shape[1]
    rows = IN_A_BLOCK // (B * N)
    if not 0 < rows < D:
        return x @ weight
    whole = D // rows * rows
    blocks = x[:, :whole].reshape(B, -1, rows).swapaxes(0, 1) @ weight[:whole].reshape(-1, rows, N)     # (D/rows,B,N)
    total = blocks.sum(axis=0)
    return total if whole == D else total + x[:, whole:] @ weight[whole:]


def prepared(weights: dict[str, np.ndarray], rows: int) -> dict:
    """{name: array}, with a function of x for each large matrix of a block, if products with `rows` rows gain by it."""
    if not ONE_THREAD or rows not in ROWS or is_cupy(weights["embedding"]):
        return weights
    return {name: functools.partial(product, weight=w) if w.ndim == 2 and w.size >= LARGE and name.startswith("blocks.")
            else w for name, w in weights.items()}
