"""Products of bf16 matrices by cuBLAS: the numbers, and what is refused."""
import numpy as np
import pytest

from minilm.kernels import gemm
from minilm.kernels.bf16 import from_bf16, to_bf16
from minilm.kernels.emulator import cublas


def bf16(rng, *shape):
    return to_bf16(rng.normal(size=shape))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("kind", [np.float32, np.uint16])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("M, K, N", [(1, 1, 1), (3, 5, 7), (16, 8, 24)])
def test_a_product_equals_numpys(M, K, N, a_transposed, b_transposed, kind, add, rng, xp):
    a, b = bf16(rng, M, K), bf16(rng, K, N)
    before = rng.normal(size=(M, N)).astype(np.float32)
    before = to_bf16(before) if kind is np.uint16 else before
    out = xp.asarray(before)
    given = [xp.asarray(np.ascontiguousarray(x.T if transposed else x))
             for x, transposed in ((a, a_transposed), (b, b_transposed))]
    assert gemm.product(*given, out, a_transposed, b_transposed, add) is out
    found, expected = out.get(), from_bf16(a).astype(np.float64) @ from_bf16(b)
    if add:
        expected += from_bf16(before) if kind is np.uint16 else before
    found = from_bf16(found) if kind is np.uint16 else found
    assert np.abs(found - expected).max() <= (4e-3 if kind is np.uint16 else 1e-6) * np.abs(expected).max() + 1e-6


def test_a_view_is_read_and_written_where_it_lies(rng, xp):
    whole, out = xp.asarray(bf16(rng, 6, 4)), xp.zeros((3, 2, 4), np.float32)
    gemm.product(whole[2:4], whole[1:5], out[1])
    found, x = out.get(), from_bf16(whole.get())
    assert np.abs(found[1] - x[2:4] @ x[1:5]).max() < 1e-6 and not found[[0, 2]].any()


WRONG = [
    (lambda xp, a, b, out: gemm.product(a, b[:3], out), ValueError, r"a \(2, 4\), b \(3, 3\) and out \(2, 3\)"),
    (lambda xp, a, b, out: gemm.product(a, b, out, b_transposed=True), ValueError, r"b \(4, 3\) transposed"),
    (lambda xp, a, b, out: gemm.product(a, b, out[:1]), ValueError, "do not fit"),
    (lambda xp, a, b, out: gemm.product(a.astype(np.float32), b, out), TypeError, "a is float32; a and b are bf16"),
    (lambda xp, a, b, out: gemm.product(a, b, out.astype(np.float64)), TypeError, "out is float64"),
    (lambda xp, a, b, out: gemm.product(a.T, a, xp.zeros((4, 4), np.float32), b_transposed=False), ValueError,
     "a is not contiguous")]


@pytest.mark.parametrize("call, error, message", WRONG, ids=range(len(WRONG)))
def test_other_arrays_are_refused(call, error, message, xp):
    a, b, out = xp.zeros((2, 4), np.uint16), xp.zeros((4, 3), np.uint16), xp.zeros((2, 3), np.float32)
    with pytest.raises(error, match=message):
        call(xp, a, b, out)


def test_the_mock_refuses_a_matrix_that_reaches_beyond_its_array(emulated, monkeypatch):
    a = emulated.zeros((2, 4), np.uint16)
    out = emulated.zeros((4, 4), np.float32)
    arguments = [1, 0, 0, 4, 2, 4, gemm.ONE.ctypes.data, a.data.ptr, 14, 4, a.data.ptr, 14, 4, gemm.ZERO.ctypes.data,
                 out.data.ptr, 0, 4, 68, -1]
    with pytest.raises(ValueError, match="DISALLOW_REDUCED_PRECISION_REDUCTION"):
        emulated.cuda.cublas.gemmEx(*arguments)
    monkeypatch.setattr(cublas, "_mode", gemm.FULL_SUMS)
    for place, value, message in ((5, 5, "lies in no array"), (9, 3, "leading dimension 3"), (17, 64, "float32 sums"),
                                  (8, 0, "bf16 matrices"), (7, a.data.ptr + 1, "no multiple")):
        with pytest.raises(ValueError, match=message):
            emulated.cuda.cublas.gemmEx(*arguments[:place], value, *arguments[place + 1:])
