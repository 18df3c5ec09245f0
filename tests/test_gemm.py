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


def tf32(x):
    """Rounded to 10 bits of mantissa by its definition: to the nearest, ties to even."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(mantissa * 2 ** 11), exponent - 11)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("M, K, N", [(1, 1, 1), (3, 5, 7), (16, 64, 24)])
def test_a_product_of_float32_is_as_near_to_numpys_as_tf32_allows(M, K, N, a_transposed, b_transposed, add, rng, xp):
    """Each factor may be cut off to 10 bits of mantissa."""
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((M, K), (K, N)))
    before = rng.normal(size=(M, N)).astype(np.float32)
    out = xp.asarray(before)
    given = [xp.asarray(np.ascontiguousarray(x.T if transposed else x))
             for x, transposed in ((a, a_transposed), (b, b_transposed))]
    found = gemm.product(*given, out, a_transposed, b_transposed, add).get() - (before if add else 0)
    exact = a.astype(np.float64) @ b
    assert (np.abs(found - exact) <= 2.001 * 2 ** -10 * (np.abs(a) @ np.abs(b)) + 1e-5).all()


def test_the_mock_multiplies_factors_that_are_rounded_to_the_nearest(rng, emulated):
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 64), (64, 24)))
    found = gemm.product(emulated.asarray(a), emulated.asarray(b), emulated.zeros((16, 24), np.float32)).get()
    assert np.abs(found - tf32(a) @ tf32(b)).max() < 1e-5
    assert np.abs(found - a.astype(np.float64) @ b).max() > 1e-4


def test_the_mock_rounds_to_tf32_by_its_definition(rng):
    x = np.concatenate([rng.normal(size=2000), 2.0 ** rng.uniform(-120, 120, 2000), [0, -0.0, 1 + 2 ** -11,
                        1 + 3 * 2 ** -11, -1 - 2 ** -11, 2 - 2 ** -12]]).astype(np.float32)
    assert (cublas.to_tf32(x) == tf32(x)).all()
    assert cublas.to_tf32(np.float32([np.inf, -np.inf])).tolist() == [np.inf, -np.inf]
    assert np.isnan(cublas.to_tf32(np.float32([np.nan]))).all()


def test_a_view_is_read_and_written_where_it_lies(rng, xp):
    whole, out = xp.asarray(bf16(rng, 6, 4)), xp.zeros((3, 2, 4), np.float32)
    gemm.product(whole[2:4], whole[1:5], out[1])
    found, x = out.get(), from_bf16(whole.get())
    assert np.abs(found[1] - x[2:4] @ x[1:5]).max() < 1e-6 and not found[[0, 2]].any()


def test_a_contiguous_view_of_an_array_with_other_axes_is_read_and_written_where_it_lies(rng, xp):
    """As of zeros_like of a transposed array: its memory has the order of the other's axes."""
    turned = xp.zeros((2, 3, 4, 5), np.float32).transpose(0, 2, 1, 3)
    a, out = xp.zeros_like(turned), xp.zeros_like(turned)
    a[...] = xp.asarray(rng.normal(size=a.shape).astype(np.float32))
    a, out = (x.transpose(0, 2, 1, 3).reshape(6, 20) for x in (a, out))
    b = xp.asarray(rng.normal(size=(20, 20)).astype(np.float32))
    gemm.product(a, b, out)
    assert np.abs(out.get() - a.get() @ b.get()).max() < 0.02


WRONG = [
    (lambda xp, a, b, out: gemm.product(a, b[:3], out), ValueError, r"a \(2, 4\), b \(3, 3\) and out \(2, 3\)"),
    (lambda xp, a, b, out: gemm.product(a, b, out, b_transposed=True), ValueError, r"b \(4, 3\) transposed"),
    (lambda xp, a, b, out: gemm.product(a, b, out[:1]), ValueError, "do not fit"),
    (lambda xp, a, b, out: gemm.product(a.astype(np.float32), b, out), TypeError, "a is float32; a and b are bf16"),
    (lambda xp, a, b, out: gemm.product(a.astype(np.float32), b.astype(np.float32), out.astype(np.uint16)), TypeError,
     "a is float32; .*; or all three are float32"),
    (lambda xp, a, b, out: gemm.product(a.astype(np.float64), b.astype(np.float64), out), TypeError, "a is float64"),
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
                                  (17, 77, "bf16 matrices"),
                                  (8, 0, "bf16 matrices"), (7, a.data.ptr + 1, "no multiple")):
        with pytest.raises(ValueError, match=message):
            emulated.cuda.cublas.gemmEx(*arguments[:place], value, *arguments[place + 1:])
