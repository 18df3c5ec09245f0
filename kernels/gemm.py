"""Products on tensor cores with float32 sums, by cuBLAS: of bf16 matrices, or of float32 ones rounded to TF32.

CuPy's own product of bf16 matrices gives bf16. gemmEx of cuBLAS also gives float32, and adds to what is there: a
gradient needs no pass of its own to be added. Arrays of bf16 are uint16 (bf16.py). TF32 has 8 bits of exponent, as
float32, and 10 of mantissa: tensor cores read so many of each factor. CuPy's own products do so only for a whole
process, with CUPY_TF32=1 in its environment before the first of them. How cuBLAS rounds the factors is not documented;
at most each is cut off, with an error below 2^-10 of it, and rounded to the nearest the error is half of that.
Tests: tests/test_gemm.py.
"""

from typing import Any

import numpy as np

from minilm.backend import array_module
from minilm.kernels.launch import Array

BF16, FLOAT32 = 14, 0           # CUDA_R_16BF, CUDA_R_32F of cudaDataType_t
SUMS, SUMS_OF_TF32 = 68, 77     # CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32
DEFAULT_ALGORITHM = -1          # CUBLAS_GEMM_DEFAULT
FULL_SUMS = 16                  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
ONE, ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)
KINDS = {np.dtype(np.uint16): BF16, np.dtype(np.float32): FLOAT32}


def product(a: Array, b: Array, out: Array, a_transposed: bool = False, b_transposed: bool = False,
            add: bool = False) -> Array:
    """out = A B, or out += A B. Returns out.  A (M,K), B (K,N), out (M,N)

    a is A (M,K), or with a_transposed its transpose (K,M); b likewise. a and b are bf16, and out is bf16 or float32; or
    all are float32, and a and b are rounded to TF32. The sums are float32, also those of parts of a product, which
    cuBLAS may otherwise add in bf16. Raises TypeError for another dtype, ValueError for other shapes and for an array
    that is not contiguous.
    """
    M, inner = a.shape[::-1] if a_transposed else a.shape
    K, N = b.shape[::-1] if b_transposed else b.shape
    if inner != K or out.shape != (M, N):
        raise ValueError(f"product: a {a.shape}{' transposed' if a_transposed else ''}, b {b.shape}"
                         f"{' transposed' if b_transposed else ''} and out {out.shape} do not fit")
    for name, array in (("a", a), ("b", b), ("out", out)):
        if array.dtype not in KINDS or a.dtype != b.dtype or (a.dtype == np.float32 != out.dtype):
            raise TypeError(f"product: {name} is {array.dtype}; a and b are bf16 (uint16), and out is bf16 or float32; "
                            "or all three are float32, for TF32")
        if not array.flags.c_contiguous:
            raise ValueError(f"product: {name} is not contiguous; pass a contiguous copy")
    kind, sums = KINDS[a.dtype], SUMS if a.dtype == np.uint16 else SUMS_OF_TF32
    cuda: Any = array_module(a, b, out).cuda
    handle = cuda.device.get_cublas_handle()
    before = cuda.cublas.getMathMode(handle)
    cuda.cublas.setMathMode(handle, FULL_SUMS)
    try:
        # cuBLAS counts along columns: a matrix (M,N) of rows is its matrix (N,M), and (A B)^T = B^T A^T.
        cuda.cublas.gemmEx(
            handle, int(b_transposed), int(a_transposed), N, M, K, ONE.ctypes.data,
            b.data.ptr, kind, b.shape[1], a.data.ptr, kind, a.shape[1], (ONE if add else ZERO).ctypes.data,
            out.data.ptr, KINDS[out.dtype], N, sums, DEFAULT_ALGORITHM)
    finally:
        cuda.cublas.setMathMode(handle, before)
    return out
