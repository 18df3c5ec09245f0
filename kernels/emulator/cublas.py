"""The functions of cupy.cuda.cublas that minilm calls: gemmEx, for bf16 and TF32 with float32 sums, and its mode.

Factors of float32 are rounded to the 10 bits of mantissa of TF32: to the nearest, ties to even. How cuBLAS rounds them
is not documented; a tensor core by itself reads the upper 19 bits of a float32, and so cuts the others off.
It takes addresses, as cuBLAS does. Each must lie in an array of the mock whose address was asked for, and the whole
matrix in the same array. Tests: tests/test_gemm.py.
"""

import ctypes
import types

import numpy as np

from minilm.kernels.bf16 import from_bf16, to_bf16
from minilm.kernels.emulator import arrays
from minilm.kernels.emulator.work import ask

DTYPES = {14: np.dtype(np.uint16), 0: np.dtype(np.float32)}         # CUDA_R_16BF, CUDA_R_32F
COMPUTE_32F = 68
COMPUTE_32F_FAST_TF32 = 77
FACTORS = {14: COMPUTE_32F, 0: COMPUTE_32F_FAST_TF32}
HANDLE = 1
FULL_SUMS = 16                  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
_mode = 0


def gemmEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, computeType,
           algo):
    """C = alpha op(A) op(B) + beta C, of C (m,n), op(A) (m,k), op(B) (k,n), whose columns follow each other."""
    if _mode != FULL_SUMS:
        raise ValueError("without CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION parts of a product may be added in "
                         "bf16")
    if (handle != HANDLE or Atype != Btype or FACTORS.get(Atype) != computeType or Ctype not in DTYPES
            or Atype == 0 != Ctype):
        raise ValueError("the mock of gemmEx multiplies bf16 matrices, with float32 sums (CUBLAS_COMPUTE_32F), to bf16 "
                         "or float32, and float32 ones to float32 (CUBLAS_COMPUTE_32F_FAST_TF32)")
    if min(m, n) == 0:
        return
    ask("products")
    first = _columns(A, Atype, lda, *((k, m) if transa else (m, k)))
    second = _columns(B, Btype, ldb, *((n, k) if transb else (k, n)))
    out = _columns(C, Ctype, ldc, m, n)
    a, b = (from_bf16(x) if Atype == 14 else to_tf32(x) for x in (first, second))
    found = _number(alpha) * ((a.T if transa else a) @ (b.T if transb else b))
    if _number(beta):
        found += _number(beta) * (from_bf16(out) if Ctype == 14 else out)
    out[...] = to_bf16(found) if Ctype == 14 else found


def to_tf32(x):
    """float32, rounded to 10 bits of mantissa: to the nearest, ties to even; infinities and NaN stay."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = bits + np.uint32(0xFFF) + (bits >> 13 & 1) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


def getMathMode(handle):
    return _mode


def setMathMode(handle, mode):
    global _mode
    _mode = mode


def _number(address):
    return np.float32(ctypes.c_float.from_address(address).value)


def _columns(address, kind, leading, rows, columns):
    """The matrix (rows, columns) whose columns begin at address, address + leading, .."""
    dtype = DTYPES[kind]
    if leading < rows:
        raise ValueError(f"the leading dimension {leading} of a matrix is less than its {rows} rows")
    if address % dtype.itemsize:
        raise ValueError("a matrix begins at no multiple of the size of its numbers")
    last = address + dtype.itemsize * (leading * (columns - 1) + rows) if rows and columns else address
    for start, owner in arrays.ADDRESSES.items():
        if start <= address and last <= start + owner.nbytes and owner.dtype == dtype:
            flat = np.lib.stride_tricks.as_strided(owner, (owner.size,), (dtype.itemsize,))     # in any order of axes
            begin = (address - start) // dtype.itemsize
            return np.lib.stride_tricks.as_strided(flat[begin:], (rows, columns), (dtype.itemsize,
                                                                                   leading * dtype.itemsize))
    raise ValueError(f"a matrix ({rows}, {columns}) of {dtype} lies in no array of that type")


cublas = types.ModuleType("cupy.cuda.cublas", __doc__)
vars(cublas).update(gemmEx=gemmEx, getMathMode=getMathMode, setMathMode=setMathMode)
device = types.ModuleType("cupy.cuda.device", __doc__)
device.get_cublas_handle = lambda: HANDLE
