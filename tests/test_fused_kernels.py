"""kernels/fused.cu: the formulas of minilm.layers and the step of minilm.optim at ragged sizes, in both precisions,
aligned and not; under the checkers: no fault, bytes counted; errors; planted bugs that are found."""
import contextlib
import re

import numpy as np
import pytest

from helpers import assert_close, assert_same, normal
from minilm import Tensor, layers, rotary
from minilm.gradcheck import gradcheck
from minilm.kernels import emulator, fused, launch
from minilm.optim import AdamW
from minilm.tensor import primitive

SIZES = [0, 1, 7, 31, 32, 33, 65, 200, 1000]
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
ALIGNED = pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "not aligned"])
PAIRINGS = "half", "interleaved"
EPS = 1e-6


@pytest.fixture(params=[None, 2], ids=["many blocks", "two blocks"])
def blocks(request, monkeypatch):
    """As many blocks as by default; or two, which loop over rows and over parts of a flat array."""
    if request.param:
        monkeypatch.setattr(fused, "ROW_BLOCKS", request.param)
        monkeypatch.setattr(fused, "FLAT_BLOCKS", request.param)


def device(xp, array, aligned=True):
    """On the device; not aligned: from the second number of an allocation on, so not at a multiple of 16 bytes."""
    if aligned:
        return xp.asarray(array)
    flat = xp.empty(array.size + 1, array.dtype)
    flat[1:] = xp.asarray(array.reshape(-1))
    return flat[1:].reshape(array.shape)


# For each operation: inputs of a size, the results of the kernels, the results of the plain formulas; gradients last.

def rms_norm_inputs(rng, n, m):
    return rng.normal(size=(n, m)), rng.normal(size=m), rng.normal(size=(n, m))


def rms_norm(x, weight, dy):
    y, r = fused.rms_norm_forward(x, weight, EPS)
    return y, *fused.rms_norm_backward(dy, x, weight, r)


def plain_rms_norm(x, weight, dy):
    y, vjp = layers.rms_norm.__wrapped__(x, weight, EPS)
    return y, *vjp(dy)


def swiglu_inputs(rng, n, m):
    return rng.normal(size=(n, 2 * m)), rng.normal(size=(n, m))


def swiglu(gate_up, dy):
    return fused.swiglu_forward(gate_up), fused.swiglu_backward(dy, gate_up)


def plain_swiglu(gate_up, dy):
    y, vjp = layers.swiglu.__wrapped__(gate_up)
    return y, vjp(dy)


H, G, SCALE = 3, 2, 0.3


def rope_inputs(rng, n, m):
    K = 2 * (m % 70)            # heads are narrower than rows
    cos, sin = layers.rope_tables(rng.integers(1000, size=n), K, dtype="float64") if K else np.zeros((2, n, 0))
    return rng.normal(size=(n, H + 2 * G, K)), cos, sin, rng.normal(size=(n, H + G, K))


def rope(pairing):
    def both(qkv, cos, sin, dy):
        return (fused.rope(qkv, cos, sin, H, G, pairing, SCALE),
                fused.rope(dy, cos, sin, H, G, pairing, SCALE, backward=True))
    return both


def plain_rope(pairing):
    def both(qkv, cos, sin, dy):
        scales = np.where(np.arange(H + G) < H, SCALE, 1)[:, None].astype(cos.dtype)
        turn = (cos + 1j * sin)[:, None] * scales
        return rotary.rotate(qkv[:, :H + G], turn, pairing), rotary.rotate(dy, turn.conj(), pairing)
    return both


CASES = {"rms_norm": (rms_norm_inputs, rms_norm, plain_rms_norm), "swiglu": (swiglu_inputs, swiglu, plain_swiglu),
         **{f"rope, {pairing}": (rope_inputs, rope(pairing), plain_rope(pairing)) for pairing in PAIRINGS}}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def both(case, rng, n, m, dtype, xp, aligned=True, size=1.0):
    """Inputs, the results of the kernels, the results of the formulas."""
    make, kernel, plain = case
    inputs = [(size * a).astype(dtype) for a in make(rng, n, m)]
    return inputs, [a.get() for a in kernel(*(device(xp, a, aligned) for a in inputs))], plain(*inputs)


@EACH
@ALIGNED
@pytest.mark.parametrize("n, m", [*zip(SIZES, SIZES[3:] + SIZES[:3]), (65, 64), (33, 32), (3, 2048)])
def test_values_and_gradients_in_float64_equal_the_formulas(case, n, m, aligned, blocks, rng, xp):
    if case[1] is rms_norm and not m:                                    # a row of no numbers has no mean
        with pytest.raises(ValueError, match="D from 1"):
            both(case, rng, n, m, np.float64, xp, aligned)
        return
    _, actual, expected = both(case, rng, n, m, np.float64, xp, aligned)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


@EACH
@pytest.mark.parametrize("n, m", [(7, 31), (33, 64), (65, 200), (1000, 65), (5, 1000), (2, 4096)])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_float32_is_as_good_as_the_formulas_in_float32(case, n, m, size, rng, xp):
    """Errors at most twice those of the formulas in float32, for gradients three times, and a few eps."""
    inputs, actual, naive = both(case, rng, n, m, np.float32, xp, size=size)
    exact = case[2](*(a.astype(np.float64) for a in inputs))
    for i, (a, b, c) in enumerate(zip(actual, naive, exact, strict=True)):
        allowed = (3 if i else 2) * np.abs(b - c).max() + 4 * np.finfo(np.float32).eps * np.abs(c).max()
        assert a.dtype == np.float32 and np.abs(a - c).max() <= allowed


@EACH
@DTYPES
def test_large_inputs_stay_finite(case, dtype, rng, xp):
    _, actual, _ = both(case, rng, 5, 33, dtype, xp, size=1e4)
    assert all(np.isfinite(a).all() for a in actual)


def test_a_gate_of_a_thousand_passes_or_closes(xp):
    gate_up = xp.asarray(np.array([[1000.0, -1000.0, 0.0, 3.0, 5.0, 7.0]], np.float32))
    assert fused.swiglu_forward(gate_up).get().tolist() == [[3000.0, 0.0, 0.0]]
    assert fused.swiglu_backward(xp.ones((1, 3), np.float32), gate_up).get().tolist() == [
        [3.0, 0.0, 3.5, 1000.0, 0.0, 0.0]]


# Gradients: the kernels as primitives on Tensors, by finite differences and against layers.

@primitive
def rms_norm_on_device(x, weight):
    import cupy
    x, weight = cupy.asarray(x), cupy.asarray(weight)
    y, r = fused.rms_norm_forward(x, weight, EPS)
    return y.get(), lambda dy: tuple(d.get() for d in fused.rms_norm_backward(cupy.asarray(dy), x, weight, r))


@primitive
def swiglu_on_device(gate_up):
    import cupy
    gate_up = cupy.asarray(gate_up)
    return fused.swiglu_forward(gate_up).get(), lambda dy: fused.swiglu_backward(cupy.asarray(dy), gate_up).get()


@primitive
def queries_on_device(q, cos, sin, pairing):
    """Queries alone: no key heads, so that all of the input is rotated."""
    import cupy
    q, cos, sin = map(cupy.asarray, (q, cos, sin))

    def vjp(dy):
        return fused.rope(cupy.asarray(dy), cos, sin, q.shape[1], 0, pairing, SCALE, backward=True).get()
    return fused.rope(q, cos, sin, q.shape[1], 0, pairing, SCALE).get(), vjp


def test_gradients_equal_finite_differences(rng, xp):
    gradcheck(rms_norm_on_device, normal(rng, 3, 5), normal(rng, 5))
    gradcheck(swiglu_on_device, normal(rng, 2, 6))
    cos, sin = layers.rope_tables(np.arange(3), 4, dtype="float64")
    for pairing in PAIRINGS:
        gradcheck(lambda q: queries_on_device(q, cos, sin, pairing), normal(rng, 3, 2, 4))


def test_as_primitives_they_equal_the_layers(rng, xp):
    assert_same(rms_norm_on_device, layers.rms_norm, normal(rng, 3, 5, 40), normal(rng, 40))
    assert_same(swiglu_on_device, layers.swiglu, normal(rng, 2, 3, 10))


# Rotary positions: the array to which they are written.

@pytest.mark.parametrize("pairing", PAIRINGS)
@ALIGNED
@DTYPES
def test_rope_in_place_and_into_a_wider_array_does_not_write_the_values(pairing, aligned, dtype, rng, xp):
    qkv, cos, sin, _ = (a.astype(dtype) for a in rope_inputs(rng, 7, 8))
    on_device = [device(xp, a, aligned) for a in (qkv, cos, sin)]
    wider = device(xp, np.full_like(qkv, 5), aligned)
    with emulator.checked():
        expected = fused.rope(*on_device, H, G, pairing, SCALE).get()
        assert fused.rope(*on_device, H, G, pairing, SCALE, out=wider) is wider
        fused.rope(*on_device, H, G, pairing, SCALE, out=on_device[0])
    assert np.array_equal(wider.get()[:, :H + G], expected) and (wider.get()[:, H + G:] == 5).all()
    assert np.array_equal(on_device[0].get()[:, :H + G], expected)
    assert np.array_equal(on_device[0].get()[:, H + G:], qkv[:, H + G:])


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_backward_of_rope_rotates_back_into_an_array_of_all_heads(pairing, rng, xp):
    qkv, cos, sin, _ = rope_inputs(rng, 5, 6)
    on_device = [xp.asarray(a) for a in (qkv, cos, sin)]
    turned = fused.rope(*on_device, H, G, pairing)
    back = fused.rope(turned, *on_device[1:], H, G, pairing, backward=True, out=xp.asarray(np.zeros_like(qkv)))
    assert_close(back.get()[:, :H + G], qkv[:, :H + G], 1e-14)
    assert not back.get()[:, H + G:].any()


# AdamW and norms: flat arrays.

def flat(rng, P, dtype=np.float64):
    return [a.astype(dtype) for a in rng.normal(size=(3, P))]


def optimizer_of(p, decayed):
    """AdamW of minilm.optim for the same flat array: a matrix that decays, a vector that does not."""
    tensors = {"matrix": Tensor(p[:decayed].reshape(-1, 1).copy(), requires_grad=True),
               "vector": Tensor(p[decayed:].copy(), requires_grad=True)}
    return AdamW(tensors, learning_rate=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)


@ALIGNED
@DTYPES
@pytest.mark.parametrize("P", [*SIZES, 2047, 5001])
def test_adamw_equals_the_step_of_optim(P, dtype, aligned, blocks, rng, xp):
    p, *gradients = flat(rng, P, dtype)
    decayed = P // 3
    optimizer = optimizer_of(p, decayed)
    on_device = [device(xp, a, aligned) for a in (p, np.zeros_like(p), np.zeros_like(p))]
    for step, g in enumerate(gradients, start=1):
        for tensor in optimizer.parameters.values():
            tensor.grad = tensor.grad_buffer
        optimizer.grad[...] = g
        norm = optimizer.step(0.1 * step)
        p_, m_, v_ = on_device
        g = device(xp, g, aligned)
        squares = fused.adamw_step(p_, g, m_, v_, decayed, 0.1 * step, (0.8, 0.95), 1e-3, 0.3, step)
        assert squares.shape == () and squares.dtype == dtype
        assert float(squares.get()) == pytest.approx(norm ** 2, rel=1e-12 if dtype is np.float64 else 1e-5)
        for actual, expected in zip(on_device, (optimizer.data, optimizer.m, optimizer.v)):
            assert_close(actual.get(), expected, 1e-12 if dtype is np.float64 else 1e-6)


@ALIGNED
@DTYPES
@pytest.mark.parametrize("P", [*SIZES, 3 * 1024 + 5])
def test_squared_norm_equals_the_dot_product(P, dtype, aligned, blocks, rng, xp):
    g = (100 * rng.normal(size=P)).astype(dtype)
    found = fused.squared_norm(device(xp, g, aligned))
    assert found.shape == () and found.dtype == dtype
    exact = g.astype(np.float64) @ g.astype(np.float64)
    assert abs(float(found.get()) - exact) <= (1e-12 if dtype is np.float64 else 1e-6) * exact


@DTYPES
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clip_scales_what_is_longer_alone(dtype, max_norm, rng, xp):
    g = rng.normal(size=1037).astype(dtype)
    there = xp.asarray(g)
    fused.clip(there, xp.sqrt(fused.squared_norm(there)), max_norm)
    assert_close(there.get(), g * min(1, max_norm / np.linalg.norm(g)), 1e-12 if dtype is np.float64 else 1e-6)
    fused.clip(there, xp.asarray(np.array(np.nan, dtype)), max_norm)
    assert np.isfinite(there.get()).all()


def test_adamw_leaves_everything_when_only_if_is_not_finite(rng, xp):
    p, g, m, v = (xp.asarray(rng.random(1037)) for _ in range(4))
    before = [a.get() for a in (p, m, v)]
    for number in (np.nan, np.inf, -np.inf):
        squares = fused.adamw_step(p, g, m, v, 10, 0.1, (0.9, 0.95), 1e-8, 0.1, 1, xp.asarray(np.array(number)))
        assert all((a.get() == b).all() for a, b in zip((p, m, v), before))
        assert float(squares) == pytest.approx(before[0] @ before[0], rel=1e-12)
    fused.adamw_step(p, g, m, v, 10, 0.1, (0.9, 0.95), 1e-8, 0.1, 1, xp.asarray(np.array(0.0)))
    assert not any((a.get() == b).all() for a, b in zip((p, m, v), before))


@DTYPES
def test_the_norm_of_an_array_with_more_blocks_than_a_block_has_threads(dtype, rng, xp):
    """Above 262,144 numbers the sums of the blocks are more than the threads that add them up."""
    P = fused.PER_BLOCK * (2 * fused.BLOCK + 5) + 3
    g = rng.normal(size=P).astype(dtype)
    exact = g.astype(np.float64) @ g.astype(np.float64)
    tolerance = 1e-12 if dtype is np.float64 else 1e-6
    assert float(fused.squared_norm(xp.asarray(g)).get()) == pytest.approx(exact, rel=tolerance)
    p, m, v = (xp.zeros(P, dtype) for _ in range(3))
    squares = fused.adamw_step(p, xp.asarray(g), m, v, P, 0.1, (0.9, 0.95), 1e-8, 0.0, 1)
    assert float(squares.get()) == pytest.approx(0.01 * P, rel=1e-5)             # the first step is 0.1 everywhere


# Checkers, schedules, bytes.

def everything(xp, seed=0, dtype="float32", **sizes):
    return [a.get() for a in fused.example(xp, np.random.default_rng(seed), dtype=dtype, **sizes)]


KERNELS = set(re.findall(r'extern "C" __global__ void[^\n]*\n(\w+)\(', launch.source("fused")))
NARROW, WIDE = dict(N=11, D=64, F=20, K=8), dict(N=3, D=300, F=33, K=6, P=2500)


@pytest.mark.parametrize("sizes", [NARROW, WIDE], ids=["narrow", "wide"])
@DTYPES
def test_no_checker_finds_a_fault_and_the_bits_are_the_same_in_any_order_of_blocks(sizes, dtype, emulated):
    found = []
    for schedule in ("forward", "reversed", 1, 2):
        with emulator.checked(schedule) as launches:
            found.append(everything(emulated, dtype=dtype, **sizes))
        assert {one.kernel for one in launches} == KERNELS
        assert all(np.array_equal(a, b) for a, b in zip(found[-1], found[0], strict=True))


def counted(launches):
    """{kernel: {parameter: (bytes read, bytes written)}}, of parameters that are arrays."""
    return {one.kernel: {one.parameters[i]: moved for i, moved in one.traffic.items()} for one in launches}


@ALIGNED
@DTYPES
@pytest.mark.parametrize("n, m", [(1, 1), (9, 33), (40, 64), (3, 520)])
def test_bytes_equal_the_formulas(n, m, dtype, aligned, rng, emulated):
    def on_device(*arrays):
        return [device(emulated, a.astype(dtype), aligned) for a in arrays]
    x, weight, dy = on_device(*rms_norm_inputs(rng, n, m))
    y, r = fused.rms_norm_forward(x, weight)
    gate_up, dsilu = on_device(*swiglu_inputs(rng, n, m))
    qkv, cos, sin, _ = on_device(*rope_inputs(rng, n, m))
    p, g, state = on_device(*flat(rng, n * m))
    one = emulated.ones((), dtype)
    calls = [
        (lambda: fused.rms_norm_forward(x, weight), fused.rms_norm_forward_bytes(n, m, dtype)),
        (lambda: fused.rms_norm_backward(dy, x, weight, r), fused.rms_norm_backward_bytes(n, m, dtype)),
        (lambda: fused.swiglu_forward(gate_up), fused.swiglu_forward_bytes(n, m, dtype)),
        (lambda: fused.swiglu_backward(dsilu, gate_up), fused.swiglu_backward_bytes(n, m, dtype)),
        (lambda: fused.rope(qkv, cos, sin, H, G), fused.rope_bytes(n, H, G, qkv.shape[2], dtype)),
        (lambda: fused.adamw_step(p, g, state, state.copy(), 1, 0.1, (0.9, 0.95), 1e-8, 0.1, 1),
         fused.adamw_step_bytes(n * m, dtype)),
        (lambda: fused.clip(g, one, 0.5), fused.clip_bytes(n * m, dtype)),
        (lambda: fused.clip(g, one, 1.0), fused.clip_bytes(n * m, dtype, clips=False)),
        (lambda: fused.squared_norm(g), fused.squared_norm_bytes(n * m, dtype))]
    for call, promised in calls:
        with emulator.checked() as launches:
            call()
        assert counted(launches) == promised


def test_bytes_are_the_minimum_except_for_the_weight_and_the_partial_sums():
    """At a size of training: within 5 % of reading each input and writing each output once."""
    N, D = 16384, 576
    for function, least in ((fused.rms_norm_forward_bytes, 2 * N * D + D),
                            (fused.rms_norm_backward_bytes, 3 * N * D + 2 * D)):
        moved = sum(sum(pair) for of_kernel in function(N, D, np.float32).values() for name, pair in of_kernel.items()
                    if name != "r")
        assert 4 * least <= moved <= 1.05 * 4 * least


# Errors.

def mistakes(xp):
    def zeros(*shape, dtype=np.float32):
        return xp.zeros(shape, dtype)
    x, weight, r, qkv, table = zeros(4, 6), zeros(6), zeros(4), zeros(4, 7, 8), zeros(4, 4)
    strided, whole = zeros(4, 12)[:, ::2], zeros(4, 6, dtype=np.int32)
    p = zeros(5)
    adamw = (0, 0.1, (0.9, 0.95), 1e-8, 0.1, 1)
    return [
        (lambda: fused.rms_norm_forward(whole, weight), TypeError, "float32 or float64, not in int32"),
        (lambda: fused.rms_norm_forward(x, zeros(6, dtype=np.float64)), TypeError, "weight is float64; .* float32"),
        (lambda: fused.rms_norm_forward(x, zeros(5)), ValueError, r"weight has shape \(5,\); .* takes \(6\)"),
        (lambda: fused.rms_norm_forward(strided, weight), ValueError, "x is not contiguous"),
        (lambda: fused.rms_norm_forward(zeros(4, 0), zeros(0)), ValueError, "D from 1 to 4096 in float32"),
        (lambda: fused.rms_norm_forward(zeros(1, 4097), zeros(4097)), ValueError, "D from 1 to 4096 in float32"),
        (lambda: fused.rms_norm_backward(zeros(4, 5), x, weight, r), ValueError, r"dy has shape \(4, 5\)"),
        (lambda: fused.rms_norm_backward(x, x, weight, zeros(3)), ValueError, r"r has shape \(3,\)"),
        (lambda: fused.swiglu_forward(zeros(4, 5)), ValueError, "gate and up side by side"),
        (lambda: fused.swiglu_forward(strided), ValueError, "gate_up is not contiguous"),
        (lambda: fused.swiglu_backward(x, x), ValueError, r"dy has shape \(4, 6\); .* takes \(4, 3\)"),
        (lambda: fused.rope(qkv, table, table, 3, 3), ValueError, r"\(N,H\+2G,K\) .* with H = 3 and G = 3"),
        (lambda: fused.rope(zeros(4, 7, 5), table, table, 3, 2), ValueError, "K even"),
        (lambda: fused.rope(qkv, table, zeros(4, 8), 3, 2), ValueError, r"sin has shape \(4, 8\); .* \(4, 4\)"),
        (lambda: fused.rope(qkv, table, table, 3, 2, pairing="both"), ValueError, "'half' or 'interleaved'"),
        (lambda: fused.rope(qkv, table, table, 3, 2, out=zeros(4, 6, 8)), ValueError, r"out has shape .* \(4, 5, 8\)"),
        (lambda: fused.adamw_step(p, zeros(4), p, p, *adamw), ValueError, r"g has shape \(4,\)"),
        (lambda: fused.adamw_step(p, p, p, p, 6, *adamw[1:]), ValueError, "decayed is 6 .* from 0 to 5"),
        (lambda: fused.adamw_step(p, p, p, p, *adamw[:-1], 0), ValueError, "steps is 0"),
        (lambda: fused.adamw_step(p, p, p, p, *adamw, p), ValueError, r"only_if has shape \(5,\)"),
        (lambda: fused.clip(x, p[0], 1.0), ValueError, r"g has shape \(4, 6\)"),
        (lambda: fused.clip(p, p, 1.0), ValueError, r"norm has shape \(5,\)"),
        (lambda: fused.clip(p, zeros(dtype=np.float64), 1.0), TypeError, "norm is float64; .* float32"),
        (lambda: fused.squared_norm(x), ValueError, r"g has shape \(4, 6\); .* takes \(24\)"),
        (lambda: fused.squared_norm(zeros(8)[::2]), ValueError, "g is not contiguous")]


def test_unsupported_arrays_raise_before_any_launch(emulated, monkeypatch):
    monkeypatch.setattr(fused, "launch", lambda *_, **__: pytest.fail("launched"))
    for call, error, words in mistakes(emulated):
        with pytest.raises(error, match=words):
            call()


# Bugs: (section of fused.cu, right text, wrong text, words of the checker that finds the bug, or "numbers").

ROWS, SILU, ROTARY, FLAT = "Rows", "SwiGLU", "Rotary", "Flat"
MUTANTS = [
    (ROWS, "if (j < width) part = load", "if (j <= width) part = load", "out of bounds"),
    (ROWS, "wide = row < rows ? width : 0;", "wide = width;", "out of bounds"),
    (ROWS, "    __syncthreads();\n    value = 0;", "    value = 0;", "uninitialised"),
    (ROWS, "    __syncthreads();                            // before", "    // before", "race"),
    (ROWS, "width);\n    __syncthreads();\n    for (int j", "width);\n    for (int j", "uninitialised"),
    (ROWS, "        const size_t start", "        if (row >= rows) return;\n        const size_t start", "exit"),
    (ROWS, "% sizeof(Vector<VECTOR>)) == 0", "% sizeof(real)) == 0", "align"),
    (ROWS, "/ width + eps)", "/ width)", "numbers"),
    (ROWS, "root * (dn[i] - n[i] * mean)", "root * dn[i]", "numbers"),
    (ROWS, "other = 1; other", "other = 2; other", "numbers"),
    (SILU, "    if (row >= rows) return;\n    dy +=", "    dy +=", "out of bounds"),
    (SILU, "(1 + g * (1 - s))", "(1 + g * s)", "numbers"),
    (ROTARY, "i < tokens * each", "i <= tokens * each", "out of bounds"),
    (ROTARY, "b = b * c.at[e] + a * s.at[e]", "b = b * c.at[e] - a * s.at[e]", "numbers"),
    (ROTARY, "heads * K, c, s, kv_heads", "heads * K, cq, sq, kv_heads", "numbers"),
    (FLAT, "i < n; i += threads", "i <= n; i += threads", "out of bounds"),
    (FLAT, "store<N>(p + i, pi)", "store<N>(const_cast<real*>(g) + i, pi)", "const"),
    (FLAT, "partial[blockIdx.x] = sum", "partial[0] = sum", "race"),
    (FLAT, "if (i + e < decayed)", "if (i < decayed)", "numbers"),
    (FLAT, "!isfinite(*only_if)", "isnan(*only_if)", "numbers"),
    (FLAT, "if (length > max_norm) sum_of", "sum_of", "numbers"),
    (FLAT, "max_norm / length", "max_norm", "numbers"),
    (FLAT, "store<N>(g + i, part)", "store<1>(g + i, load<1>(part.at))", "numbers"),
    # Loops that go round once, or for ever.
    (ROWS, "first < rows; first += step", "first < rows; first = rows", "numbers"),
    (ROWS, "j < width; j += blockDim.x * blockDim.y", "j < width; j = width", "uninitialised"),
    (ROWS, "row < rows; row += 8", "row < rows; row = rows", "numbers"),
    (ROWS, "warp < warps; ++warp", "warp < 1; ++warp", "numbers"),
    (ROWS, "y < blockDim.y; ++y", "y < 1; ++y", "numbers"),
    (SILU, "j < width; j += step", "j < width; j = width", "numbers"),
    (ROTARY, "head < count; ++head", "head < 1; ++head", "numbers"),
    (ROTARY, "i < tokens * each; i += threads", "i < tokens * each; i = tokens * each", "numbers"),
    (FLAT, "i < vectors; i += threads", "i < vectors; i = vectors", "numbers"),
    (FLAT, "i < n; i += blockDim.x", "i < n; i = n", "numbers"),
    (FLAT, "i < n; i += blockDim.x", "i < n; i = blockDim.x", "endless loop"),
]


def text_of(section, old, new):
    """The beginning of fused.cu and that section, edited."""
    text = (launch.FOLDER / "fused.cu").read_text()
    text = text.replace('#include "rows.cuh"', (launch.FOLDER / "rows.cuh").read_text())
    beginning, *sections = re.split("(?=\n// ---- )", text)
    if section == FLAT:
        text = beginning + sections[-1]
    else:
        text = beginning + next(part for part in sections if part.startswith(f"\n// ---- {section}"))
    assert text.count(old), f"no longer in the text: {old}"
    return text.replace(old, new)


def use(monkeypatch, text):
    monkeypatch.setattr(fused, "_kernel", lambda xp, name, dtype: launch.function(xp, "fused", name, dtype, text=text))
    monkeypatch.setattr(launch, "MOST_BLOCKS", (2 ** 31 - 1, 2, 2))


def of_section(section, xp, rng, monkeypatch):
    """(result, expected result) of the kernels of a section, under the checkers, in double precision.

    With two blocks each thread goes round the loops of its kernel; with many of one warp, the loops over their sums.
    """
    for blocks, threads, each in ((2, 256, 1024), (1024, 32, 64)):
        monkeypatch.setattr(fused, "ROW_BLOCKS", blocks)
        monkeypatch.setattr(fused, "FLAT_BLOCKS", blocks)
        monkeypatch.setattr(fused, "BLOCK", threads)
        monkeypatch.setattr(fused, "PER_BLOCK", each)
        yield from at_these_blocks(section, xp, rng)


def at_these_blocks(section, xp, rng):
    names = {ROWS: ["rms_norm"], SILU: ["swiglu"], ROTARY: [name for name in CASES if "rope" in name]}
    with emulator.checked(steps=1_000_000):
        for name in names.get(section, []):
            for n, m, aligned in ((13, 300, True), (13, 6, True), (13, 6, False), (100, 7, True)):
                _, actual, expected = both(CASES[name], rng, n, m, np.float64, xp, aligned)
                yield from zip(actual, expected)
        if section == FLAT:
            p, g, _ = flat(rng, 2500)
            optimizer = optimizer_of(p, 1001)
            for tensor in optimizer.parameters.values():
                tensor.grad = tensor.grad_buffer
            optimizer.grad[...] = g
            norm = optimizer.step(0.1)
            p, g, m, v = (xp.asarray(a) for a in (p, g, np.zeros_like(p), np.zeros_like(p)))
            squares = fused.adamw_step(p, g, m, v, 1001, 0.1, (0.8, 0.95), 1e-3, 0.3, 1)
            yield squares.get(), np.array(norm ** 2)
            fused.adamw_step(p, g, m, v, 1001, 0.1, (0.8, 0.95), 1e-3, 0.3, 1, xp.asarray(np.array(np.inf)))
            for a, b in zip((p, m, v), (optimizer.data, optimizer.m, optimizer.v)):
                yield a.get(), b
            before = g.get()
            for norm, scale in ((2.0, 0.5), (0.5, 0.5)):
                fused.clip(g, xp.asarray(np.array(norm)), 1.0)
                yield g.get(), before * scale


def caught_by(section, text, xp, monkeypatch):
    """The message of the checker that found the bug, "numbers" if a result is wrong, None if nothing was found."""
    use(monkeypatch, text)
    try:
        for actual, expected in of_section(section, xp, np.random.default_rng(0), monkeypatch):
            with contextlib.suppress(AssertionError):
                assert_close(actual, expected)
                continue
            return "numbers"
    except emulator.Fault as fault:
        return str(fault)


@pytest.mark.parametrize("section", [ROWS, SILU, ROTARY, FLAT])
def test_nothing_is_found_in_a_section_without_a_bug(section, emulated, monkeypatch):
    assert caught_by(section, text_of(section, "real", "real"), emulated, monkeypatch) is None


@pytest.mark.parametrize("section, old, new, by", MUTANTS, ids=[f"{m[0]}: {' '.join(m[1].split())}" for m in MUTANTS])
def test_a_bug_is_found_by_the_expected_checker_or_by_the_numbers(section, old, new, by, emulated, monkeypatch):
    caught = caught_by(section, text_of(section, old, new), emulated, monkeypatch)
    assert caught is not None and by in caught
    if by != "numbers":
        assert "fused.cu:" in caught
