"""kernels/smear.cu: keys, gradients and new tokens equal those of rotary.smear on each text alone; under the checkers:
no fault, bytes counted; errors; planted bugs that are found."""
import numpy as np
import pytest

from helpers import assert_close
from minilm import rotary
from minilm.fast.packed_attention import Segment
from minilm.kernels import emulator, launch, layers, smear as module
from minilm.kernels.bf16 import from_bf16, to_bf16
from minilm.kernels.smear import Neighbours, smear_backward, smear_bytes, smear_forward, smear_next

DTYPES = ("float32", "float64", "bfloat16")
TOLERANCE = {"float32": 1e-6, "float64": 1e-13, "bfloat16": 4e-3}         # bf16: half of the last of 8 bits
TEXTS = [Segment(0, 4), Segment(4, 4, 0, 4), Segment(4, 6, 0, 4), Segment(6, 9, 0, 4), Segment(9, 10), Segment(10, 17),
         Segment(17, 18, 10, 17), Segment(18, 18, 10, 17)]
of_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def on_device(xp, numbers, dtype):
    return xp.asarray(to_bf16(numbers) if dtype == "bfloat16" else numbers.astype(dtype))


def on_host(array):
    array = array.get()
    return from_bf16(array) if array.dtype == np.uint16 else array


def drawn(rng, *shape, dtype):
    """Random numbers that dtype holds exactly."""
    numbers = rng.normal(size=shape)
    return from_bf16(to_bf16(numbers)).astype(float) if dtype == "bfloat16" else numbers.astype(dtype).astype(float)


def expected_of(keys, amount, dy, segments):
    """The smeared keys (N,G,K) and both gradients, each text alone by rotary.smear in float64: a response after its
    prompt, whose own keys count once."""
    mixed, dk, damount = (np.zeros(x.shape) for x in (keys, keys, amount))
    for s in segments:
        if s.stop == s.start:
            continue
        rows = [*([s.prefix_stop - 1] if s.prefix_stop else []), *range(s.start, s.stop)]
        own = slice(len(rows) - (s.stop - s.start), None)
        before = np.zeros((1, *keys.shape[1:]))
        y, vjp = rotary.smear.__wrapped__(keys[rows].swapaxes(0, 1)[None], amount, before)
        mixed[s.start:s.stop] = y[0].swapaxes(0, 1)[own]
        given = np.zeros((len(rows), *keys.shape[1:]))
        given[own] = dy[s.start:s.stop]
        of_keys, of_amount = vjp(given.swapaxes(0, 1)[None])
        dk[rows] += of_keys[0].swapaxes(0, 1)
        damount += of_amount
    return mixed, dk, damount


@of_dtypes
@pytest.mark.parametrize("G, K", [(1, 16), (3, 32), (2, 5)])
def test_keys_and_gradients_of_a_pack_are_those_of_each_text_alone(G, K, dtype, rng, xp):
    N, H = 18, 2
    qkv, dqkv = (drawn(rng, N, H + 2 * G, K, dtype=dtype) for _ in range(2))
    amount = drawn(rng, G, K, dtype="float32")
    neighbours = Neighbours(xp, TEXTS)
    keys = slice(H, H + G)
    mixed, dk, damount = expected_of(qkv[:, keys], amount, dqkv[:, keys], TEXTS)
    array, gradient = (on_device(xp, numbers, dtype) for numbers in (qkv, dqkv))
    parameter = xp.asarray(amount.astype("float64" if dtype == "float64" else "float32"))
    kept = smear_forward(array, H, parameter, neighbours)
    of_amount = smear_backward(gradient, H, parameter, neighbours, kept)
    found = on_host(array)
    assert_close(found[:, keys], mixed, TOLERANCE[dtype])
    assert_close(on_host(gradient)[:, keys], dk, TOLERANCE[dtype])
    assert_close(of_amount.get(), damount, min(TOLERANCE[dtype], 1e-5))
    for array, before in ((found, qkv), (on_host(gradient), dqkv)):        # queries and values are left alone
        assert (array[:, :H] == before[:, :H]).all() and (array[:, H + G:] == before[:, H + G:]).all()
    assert (on_host(kept) == qkv[:, keys]).all()


def test_blocks_take_more_rows_than_there_are_blocks_for(rng, xp, monkeypatch):
    results = []
    for most in (module.ROW_BLOCKS, 2):
        monkeypatch.setattr(module, "ROW_BLOCKS", most)
        results.append(example(xp, N=70, dtype="float64"))
    for found, expected in zip(*results):
        assert_close(found, expected)


def test_what_a_layer_is_given_stays_as_it_is(rng, xp):
    """Other functions may use the same arrays: the layer's output, and the gradient that it gets."""
    qkv, dy = rng.normal(size=(18, 6 * 8)), rng.normal(size=(18, 6 * 8))
    given, gradient = xp.asarray(qkv), xp.asarray(dy)
    amount = xp.asarray(rng.normal(size=(2, 8)))
    y, vjp = layers.smear_keys(given, amount, 2, Neighbours(xp, TEXTS))
    before = y.get()
    dqkv, damount = vjp(gradient)
    mixed, dk, expected = expected_of(qkv.reshape(18, 6, 8)[:, 2:4], amount.get(), dy.reshape(18, 6, 8)[:, 2:4], TEXTS)
    assert (given.get() == qkv).all() and (gradient.get() == dy).all() and (y.get() == before).all()
    assert_close(before.reshape(18, 6, 8)[:, 2:4], mixed)
    assert_close(dqkv.get().reshape(18, 6, 8)[:, 2:4], dk)
    assert_close(damount.get(), expected)


def test_padding_is_neither_mixed_into_a_key_nor_given_a_gradient(rng, xp):
    real = np.array([0, 0, 1, 1, 1, 1, 0, 1, 1, 0])
    qkv, amount = rng.normal(size=(10, 3, 16)), xp.asarray(rng.normal(size=(1, 16)))
    dqkv = np.where(real[:, None, None], rng.normal(size=(10, 3, 16)), 0)
    padded, gradient = xp.asarray(qkv), xp.asarray(dqkv)
    neighbours = Neighbours(xp, [Segment(0, 5), Segment(5, 10)], real)
    kept = smear_forward(padded, 1, amount, neighbours)
    of_amount = smear_backward(gradient, 1, amount, neighbours, kept)
    texts = [Segment(2, 5), Segment(5, 6), Segment(7, 9)]
    mixed, dk, damount = expected_of(qkv[:, 1:2], amount.get(), dqkv[:, 1:2], texts)
    assert_close(padded.get()[real > 0, 1:2], mixed[real > 0])
    assert_close(gradient.get()[:, 1:2], dk)
    assert_close(of_amount.get(), damount)


@of_dtypes
def test_a_new_token_is_mixed_with_the_key_before_it_and_takes_its_place(dtype, rng, xp):
    B, H, G, K = 11, 2, 3, 16
    qkv, before = drawn(rng, B, H + 2 * G, K, dtype=dtype), drawn(rng, B, G, K, dtype="float32")
    amount = drawn(rng, G, K, dtype="float32")
    sums = "float64" if dtype == "float64" else "float32"
    array, last = on_device(xp, qkv, dtype), xp.asarray(before.astype(sums))
    smear_next(array, H, xp.asarray(amount.astype(sums)), last)
    new = qkv[:, H:H + G]
    mixed, _ = rotary.smear.__wrapped__(new[:, :, None], amount, before)
    expected = qkv.copy()
    expected[:, H:H + G] = mixed[:, :, 0]
    assert_close(on_host(array), expected, TOLERANCE[dtype])
    assert (last.get() == new.astype(sums)).all()


def test_a_pack_without_rows_and_texts_of_one_row(rng, xp):
    amount = xp.asarray(rng.normal(size=(2, 8)))
    empty = xp.zeros((0, 5, 8))
    kept = smear_forward(empty, 1, amount, Neighbours(xp, []))
    assert (smear_backward(empty, 1, amount, Neighbours(xp, []), kept).get() == 0).all()
    qkv = rng.normal(size=(3, 5, 8))
    neighbours = Neighbours(xp, [Segment(0, 1), Segment(1, 2), Segment(2, 3)])
    array = xp.asarray(qkv)
    smear_forward(array, 1, amount, neighbours)
    assert_close(array.get()[:, 1:3], qkv[:, 1:3] / (1 + np.exp(amount.get())))


def example(xp, **sizes):
    return [on_host(array) for array in module.example(xp, np.random.default_rng(0), **sizes)]


@of_dtypes
def test_no_checker_finds_a_fault_and_the_bits_are_the_same_in_any_order_of_blocks(dtype, emulated):
    found = []
    for schedule in ("forward", "reversed", 1, 2):
        with emulator.checked(schedule):
            found.append(example(emulated, dtype=dtype))
    assert all((x == y).all() for other in found[1:] for x, y in zip(found[0], other))


@of_dtypes
@pytest.mark.parametrize("N, G, K", [(6, 1, 16), (21, 3, 16), (40, 2, 33)])
def test_bytes_equal_the_formula(N, G, K, dtype, emulated):
    with emulator.checked() as launches:
        module.example(emulated, np.random.default_rng(0), N, G, K, dtype)
    expected = smear_bytes(N, G * K, N - 2, "uint16" if dtype == "bfloat16" else dtype)
    found = {one.kernel: {one.parameters[i]: moved for i, moved in one.traffic.items()} for one in launches}
    assert {name: found[name] for name in expected} == expected


def test_other_arrays_raise_before_the_launch(emulated):
    xp = emulated
    neighbours = Neighbours(xp, [Segment(0, 3)])
    amount = xp.zeros((2, 8))
    for qkv, heads, error, words in (
            (xp.zeros((3, 6, 8), np.int32), 1, TypeError, "not in int32"),
            (xp.zeros((3, 6, 8), np.float32), 1, TypeError, "amount is float64; this kernel takes float32"),
            (xp.zeros((4, 6, 8)), 1, ValueError, r"previous has shape \(3,\); .* \(4\)"),
            (xp.zeros((3, 6, 4)), 1, ValueError, r"amount has shape \(2, 8\); .* \(any, 4\)"),
            (xp.zeros((3, 6, 8)), 5, ValueError, "2 key heads from head 5 on, of 6 heads"),
            (xp.zeros((3, 6, 16))[:, :, ::2], 1, ValueError, "qkv is not contiguous")):
        with pytest.raises(error, match=words):
            smear_forward(qkv, heads, amount, neighbours)
    with pytest.raises(ValueError, match=r"last has shape \(3, 2, 8\)"):
        smear_next(xp.zeros((4, 6, 8)), 1, amount, xp.zeros((3, 2, 8)))


# Bugs: (right text, wrong text, words of the checker that finds the bug, or "numbers").
MUTANTS = [
    ("    if (j >= width) return;\n    const real a", "    const real a", "out of bounds"),
    ("row < rows; row += gridDim.x * 8) {\n        const int p = previous[row];",
     "row <= rows; row += gridDim.x * 8) {\n        const int p = previous[row];", "out of bounds"),
    ("before = p < 0 ? real(0) : real(keys[(size_t)p * width + j]);\n        y[",
     "before = real(keys[(size_t)(p < 0 ? 0 : p) * width + j]);\n        y[", "numbers"),
    ("stored(k + a * (before - k));\n    }\n}", "stored(k - a * (before - k));\n    }\n}", "numbers"),
    ("row < rows; row += gridDim.x * 8) {\n        const int p = previous[row];",
     "row < rows; row += rows) {\n        const int p = previous[row];", "numbers|uninitialised"),
    ("row < rows; row += gridDim.x * 8) {\n            const int p = previous[row], stop",
     "row < rows; row += rows) {\n            const int p = previous[row], stop", "numbers|uninitialised"),
    ("if (row >= rows || j >= width) return;", "if (j >= width) return;", "out of bounds"),
    ("if (row >= rows || j >= width) return;", "if (row >= rows) return;", "out of bounds|data race|numbers"),
    ("    last[(size_t)row * width + j] = k;\n", "", "numbers"),
    ("    last[(size_t)row * width + j] = k;\n", "    last[(size_t)row * width + j] = k + a * (before - k);\n",
     "numbers"),
    ("    if (j < width) {\n", "    {\n", "out of bounds"),
    ("stop = starts[row + 1]", "stop = starts[row] + 1", "numbers|out of bounds"),
    ("following[i] * width", "(row + 1) * width", "numbers|out of bounds"),
    ("stored(d + a * (after - d))", "stored(d + a * after)", "numbers"),
    ("stored(d + a * (after - d))", "stored(after + a * (d - after))", "numbers"),
    ("sum += d * (before - k)", "sum += d * before", "numbers"),
    ("    __syncthreads();\n", "", "uninitialised|data race"),
    ("threadIdx.y == 0 && j < width", "j < width", "data race|numbers"),
    ("other = 1; other < 8", "other = 1; other < 7", "numbers"),
    ("other = 1; other < 8", "other = 1; other <= 8", "index outside of its array"),
    ("= a * (1 - a) * sum", "= a * sum", "numbers"),
    ("partial[(size_t)blockIdx.x * width + j]", "partial[j]", "numbers|data race|uninitialised"),
    ("dk[(size_t)row * stride + j]", "dk[(size_t)row * width + j]", "numbers")]


@pytest.mark.parametrize("right, wrong, words", MUTANTS, ids=range(len(MUTANTS)))
def test_a_planted_bug_is_found(right, wrong, words, emulated, monkeypatch):
    monkeypatch.setattr(module, "ROW_BLOCKS", 2)
    expected = example(emulated)
    text = (launch.FOLDER / "smear.cu").read_text()
    assert text.count(right) == 1
    wrong = text.replace(right, wrong)
    monkeypatch.setattr(module, "function", lambda *names, **options: launch.function(*names, text=wrong, **options))
    try:
        with emulator.checked():
            found = example(emulated)
        assert "numbers" in words and not all(np.allclose(x, y) for x, y in zip(found, expected))
    except emulator.Fault as fault:
        assert any(word in str(fault) for word in words.split("|")), fault
