"""Products of bf16 matrices on tensor cores with float32 sums, by cuBLAS.

CuPy's own product of bf16 matrices gives bf16. gemmEx of cuBLAS also gives float32, and adds to what is there: a
gradient needs no pass of its own to be added. Arrays of bf16 are uint16 (bf16.py).
Tests: tests/test_gemm.py.
"""

from typing import Any

import numpy as np

from minilm.backend import array_module
from minilm.kernels.launch import Array

BF16, FLOAT32 = 14, 0           # CUDA_R_16BF, CUDA_R_32F of cudaDataType_t
SUMS = 68                       # CUBLAS_COMPUTE_32F
DEFAULT_ALGORITHM = -1          # CUBLAS_GEMM_DEFAULT
FULL_SUMS = 16                  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
ONE, ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)
KINDS = {np.dtype(np.uint16): BF16, np.dtype(np.float32): FLOAT32}


def product(a: Array, b: Array, out: Array, a_transposed: bool = False, b_transposed: bool = False,
            add: bool = False) -> Array:
    """out = A B, or out += A B. Returns out.  A (M,K), B (K,N), out (M,N)

    a is A (M,K), or with a_transposed its transpose (K,M); b likewise. a and b are bf16; out is bf16 or float32. The
    sums are float32, also those of parts of a product, which cuBLAS may otherwise add in bf16. Raises TypeError for
    another dtype, ValueError for other shapes and for an array that is not contiguous.
    """
    M, inner = a.shape[::-1] if a_transposed else a.shape
    K, N = b.shape[::-1] if b_transposed else b.shape
    if inner != K or out.shape != (M, N):
        raise ValueError(f"product: a {a.shape}{' transposed' if a_transposed else ''}, b {b.shape}"
                         f"{' transposed' if b_transposed else ''} and out {out.shape} do not fit")
    for name, array in (("a", a), ("b", b), ("out", out)):
        if array.dtype not in KINDS or (name != "out" and array.dtype != np.uint16):
            raise TypeError(f"product: {name} is {array.dtype}; a and b are bf16 (uint16), out is bf16 or float32")
        if not array.flags.c_contiguous:
            raise ValueError(f"product: {name} is not contiguous; pass a contiguous copy")
    cuda: Any = array_module(a, b, out).cuda
    handle = cuda.device.get_cublas_handle()
    before = cuda.cublas.getMathMode(handle)
    cuda.cublas.setMathMode(handle, FULL_SUMS)
    try:
        # cuBLAS counts along columns: a matrix (M,N) of rows is its matrix (N,M), and (A B)^T = B^T A^T.
        cuda.cublas.gemmEx(
            handle, int(b_transposed), int(a_transposed), N, M, K, ONE.ctypes.data,
            b.data.ptr, BF16, b.shape[1], a.data.ptr, BF16, a.shape[1], (ONE if add else ZERO).ctypes.data,
            out.data.ptr, KINDS[out.dtype], N, SUMS, DEFAULT_ALGORITHM)
    finally:
        cuda.cublas.setMathMode(handle, before)
    return out
