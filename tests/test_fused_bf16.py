"""kernels/fused_bf16.cu: the numbers, the bytes, the errors, and planted bugs that are found."""
import numpy as np
import pytest

import kernel_mutants
from minilm.kernels import emulator, fused_bf16, launch
from minilm.kernels.bf16 import from_bf16, to_bf16

SCHEDULES = "forward", "reversed", 1, 2
CALLS = ("to_bf16", "rms_norm", "swiglu_forward", "swiglu_backward", "rope half", "rope interleaved", "rope backward")
SIZES = {"small": (3, 8, 16), "not whole": (13, 40, 48), "wide": (9, 328, 64), "many rows": (300, 8, 32)}     # N, D, K


def inputs(rng, N, D, K):
    """x, weight, gate_up, dy, heads, cos, sin; bf16 as float32 numbers."""
    def bf16(*shape):
        return from_bf16(to_bf16(rng.normal(size=shape)))
    angles = rng.normal(size=(N, K // 2))
    return (rng.normal(size=(N, D)).astype(np.float32), rng.normal(size=D).astype(np.float32), bf16(N, 2 * D),
            bf16(N, D), bf16(N, 4, K), np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def formula(call, x, weight, gate_up, dy, heads, cos, sin):
    """The results in float64."""
    x, weight, gate_up, dy, heads, cos, sin = (a.astype(np.float64) for a in (x, weight, gate_up, dy, heads, cos, sin))
    gate, up = np.split(gate_up, 2, axis=1)
    s = 1 / (1 + np.exp(-gate))
    if call == "to_bf16":
        return [x]
    if call == "rms_norm":
        r = 1 / np.sqrt((x ** 2).mean(axis=1) + 1e-5)
        return [x * r[:, None] * weight, r]
    if call == "swiglu_forward":
        return [gate * s * up]
    if call == "swiglu_backward":
        return [np.concatenate([dy * up * s * (1 + gate * (1 - s)), dy * gate * s], axis=1)]
    K = heads.shape[2]
    first, second = ((slice(0, K, 2), slice(1, K, 2)) if call == "rope interleaved" else
                     (slice(K // 2), slice(K // 2, K)))
    turned = heads.copy()
    a, b = heads[:, :3, first], heads[:, :3, second]
    c, sine = cos[:, None], sin[:, None] * (-1 if call == "rope backward" else 1)
    turned[:, :3, first], turned[:, :3, second] = a * c - b * sine, b * c + a * sine
    return [turned]


def results(xp, call, x, weight, gate_up, dy, heads, cos, sin):
    """The same by the kernels, as float32."""
    low = {name: xp.asarray(to_bf16(a)) for name, a in (("gate_up", gate_up), ("dy", dy), ("heads", heads))}
    x, weight, cos, sin = map(xp.asarray, (x, weight, cos, sin))
    if call == "rms_norm":
        y, r = fused_bf16.rms_norm(x, weight, 1e-5)
        return [from_bf16(y.get()), r.get()]
    if call.startswith("rope"):
        fused_bf16.rope(low["heads"], cos, sin, 3, "interleaved" if "inter" in call else "half", "backward" in call)
        return [from_bf16(low["heads"].get())]
    made = {"to_bf16": lambda: fused_bf16.to_bf16(x),
            "swiglu_forward": lambda: fused_bf16.swiglu_forward(low["gate_up"]),
            "swiglu_backward": lambda: fused_bf16.swiglu_backward(low["dy"], low["gate_up"])}[call]()
    return [from_bf16(made.get())]


def agree(found, expected):
    """Each number within the rounding of bf16, 2^-8 at most, and a little for the float32 arithmetic before it."""
    for a, b in zip(found, expected, strict=True):
        tolerance = 1.001 * 2 ** -8 if a.ndim > 1 else 1e-6
        assert (np.abs(a - b) <= tolerance * np.abs(b) + 1e-6).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("call", CALLS)
def test_results_are_those_of_the_formula_rounded_to_bf16(call, size, rng, xp):
    arrays = inputs(rng, *SIZES[size])
    agree(results(xp, call, *arrays), formula(call, *arrays))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 4099])
def test_any_number_of_numbers_is_rounded_as_on_the_host(n, rng, xp):
    x = rng.normal(size=n).astype(np.float32)
    x[0] = np.nan
    assert (fused_bf16.to_bf16(xp.asarray(x)).get() == to_bf16(x)).all()
    assert (fused_bf16.to_float32(xp.asarray(to_bf16(x))).get()[1:] == from_bf16(to_bf16(x))[1:]).all()


@pytest.mark.parametrize("call", CALLS)
def test_no_checker_finds_a_fault_and_the_bits_are_the_same_in_any_order(call, rng, emulated, monkeypatch):
    monkeypatch.setattr(fused_bf16, "ROW_BLOCKS", 2)
    monkeypatch.setattr(fused_bf16, "FLAT_BLOCKS", 1)
    arrays, found = inputs(rng, 13, 328, 48), []
    for schedule in SCHEDULES:
        with emulator.checked(schedule):
            found.append([a.tobytes() for a in results(emulated, call, *arrays)])
    agree(results(emulated, call, *arrays), formula(call, *arrays))
    assert all(one == found[0] for one in found)


BYTES = {"to_bf16": lambda N, D, K: fused_bf16.to_bf16_bytes(N * D), "rms_norm": lambda N, D, K:
         fused_bf16.rms_norm_bytes(N, D), "swiglu_forward": lambda N, D, K: fused_bf16.swiglu_forward_bytes(N, D),
         "swiglu_backward": lambda N, D, K: fused_bf16.swiglu_backward_bytes(N, D),
         "rope half": lambda N, D, K: fused_bf16.rope_bytes(N, 3, K)}


@pytest.mark.parametrize("size", ["small", "not whole", "wide"])
@pytest.mark.parametrize("call", BYTES)
def test_bytes_equal_the_formulas(call, size, rng, emulated):
    with emulator.checked() as launches:
        results(emulated, call, *inputs(rng, *SIZES[size]))
    moved = {launches[-1].kernel: {launches[-1].parameters[i]: pair for i, pair in launches[-1].traffic.items()}}
    assert moved == BYTES[call](*SIZES[size])


def mistakes(xp):
    x, low = xp.zeros((4, 16), np.float32), xp.zeros((4, 16), np.uint16)
    table, heads = xp.zeros((4, 16), np.float32), xp.zeros((4, 2, 32), np.uint16)
    return [
        (lambda: fused_bf16.to_bf16(low), TypeError, "x is uint16; .* float32"),
        (lambda: fused_bf16.to_bf16(x.reshape(-1)[1:]), ValueError, "the memory of x begins at no multiple of 16"),
        (lambda: fused_bf16.rms_norm(x[:, :12].copy(), x[0, :12].copy(), 1e-5), ValueError, "x has rows of 12 numbers"),
        (lambda: fused_bf16.rms_norm(xp.zeros((1, 4104), np.float32), xp.zeros(4104, np.float32), 1e-5), ValueError,
         "rows of 4104 numbers; this kernel takes at most 4096"),
        (lambda: fused_bf16.rms_norm(x, x[0, :8], 1e-5), ValueError, r"weight has shape \(8\)|weight has shape \(8,\)"),
        (lambda: fused_bf16.swiglu_forward(low[:, :15].copy()), ValueError, r"gate_up has shape \(4, 15\); .*\(N,2F\)"),
        (lambda: fused_bf16.swiglu_forward(low[:, :8].copy()), ValueError, "gate_up has rows of 4 numbers"),
        (lambda: fused_bf16.swiglu_backward(low, low), ValueError, r"dy has shape \(4, 16\)"),
        (lambda: fused_bf16.rope(heads[:, :, :24].copy(), table, table, 2), ValueError, "K a multiple of 16"),
        (lambda: fused_bf16.rope(heads, table, table, 3), ValueError, "3 heads"),
        (lambda: fused_bf16.rope(heads, table, table, 2, "other"), ValueError, "pairing 'other'"),
        (lambda: fused_bf16.rope(heads, table[:2], table, 2), ValueError, r"cos has shape \(2, 16\)")]


@pytest.mark.parametrize("i", range(12))
def test_other_arrays_raise_before_a_launch(i, xp):
    call, error, message = mistakes(xp)[i]
    with pytest.raises(error, match=message):
        call()


# Bugs, each detected.

MUTANTS = [
    ("a pair of registers is exchanged", "unpack(x[0], x[1], pairs.x);", "unpack(x[1], x[0], pairs.x);", "numbers"),
    ("the high half keeps the bits of the low one", "pair & 0xffff0000u", "pair", "numbers"),
    ("the second four numbers are the first", "(from + 4);", "(from);", "numbers"),
    ("numbers are cut off instead of rounded", "bf16_pair(x[0], x[1])",
     "(__float_as_uint(x[0]) >> 16 | (__float_as_uint(x[1]) & 0xffff0000u))", "numbers"),
    ("the last numbers of an array stay as they were", "if (thread < n % 8) y[8", "if (false) y[8", "numbers"),
    ("one number beyond the last is read", "if (thread < n % 8) y[8", "if (thread <= n % 8) y[8", "checker"),
    ("a thread converts 8 numbers alone", "i < whole; i += threads", "i < whole; i = whole", "numbers"),
    ("numbers beyond the end of a row are read", "row < rows && j < width", "row < rows", "checker"),
    ("rows beyond the last are read", "row < rows && j < width", "j < width", "checker"),
    ("the weight of a thread beyond the row is read", "if (j < width) load8(w", "load8(w", "checker"),
    ("the mean is of the threads' numbers", "row_sum(squares) / width", "row_sum(squares) / (8 * blockDim.x)",
     "numbers"),
    ("eps is left out", "/ width + eps)", "/ width)", "numbers"),
    ("the squares of other rows are added", "row_sum(squares)", "lanes_sum<32>(squares)", "numbers"),
    ("every thread of a row writes its root", "threadIdx.x == 0 && row < rows", "row < rows", "checker"),
    ("the first rows alone are normalised", "first < rows; first += step", "first < rows; first = rows", "numbers"),
    ("rows beyond the last are activated", "    if (row >= rows) return;\n    gate_up +=", "    gate_up +=", "checker"),
    ("the gate is not multiplied by its sigmoid", "gate[e] *= sigmoid(gate[e]) * up[e]",
     "gate[e] = sigmoid(gate[e]) * up[e]", "numbers"),
    ("the slope of silu without its second term", "(1 + gate[e] * (1 - s))", "1", "numbers"),
    ("the gradients of gate and up are exchanged",
     "store8(dgate_up + j, dgate);\n        store8(dgate_up + width + j, up);",
     "store8(dgate_up + j, up);\n        store8(dgate_up + width + j, dgate);", "numbers"),
    ("one warp goes a step along a row", "j < width; j += step) {\n        float gate[8], up[8];\n",
     "j < width; j = width) {\n        float gate[8], up[8];\n", "numbers"),
    ("tokens beyond the last are rotated", "if (token >= tokens) return;", "if (token > tokens) return;", "checker"),
    ("backward rotates forward", "a * c[e] - sign * b", "a * c[e] - b", "numbers"),
    ("the pairs of interleaved numbers are those of half", "interleaved ? 8 : K / 2", "K / 2", "numbers"),
    ("interleaved numbers begin at their pair", "interleaved ? 2 * pair : pair", "pair", "checker"),
    ("the heads after the first are not rotated", "head < heads; ++head", "head < 1; ++head", "numbers"),
    ("values are rotated too", "head < heads; ++head", "head < x_heads; ++head", "numbers"),
    ("every token has the angles of the first", "load8(c, cos + 8 * i);", "load8(c, cos + pair);", "numbers"),
]
NAMES = ("load8", "unpack", "store8", "to_bf16", "rms_norm_bf16", "swiglu_bf16_forward", "swiglu_bf16_backward",
         "rope_bf16")


@pytest.fixture(scope="module")
def mutated():
    return kernel_mutants.all_in_one(fused_bf16, MUTANTS, NAMES)


@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[words for words, *_ in MUTANTS])
def test_a_bug_is_found_by_a_checker_or_by_the_numbers(i, mutated, rng, emulated, monkeypatch):
    kernel_mutants.use(monkeypatch, fused_bf16, mutated, i)
    monkeypatch.setattr(fused_bf16, "ROW_BLOCKS", 2)
    monkeypatch.setattr(fused_bf16, "FLAT_BLOCKS", 1)
    monkeypatch.setattr(launch, "MOST_BLOCKS", (2 ** 31 - 1, 1, 1))
    arrays = inputs(rng, 13, 328, 48)
    odd = rng.normal(size=8 * 300 + 5).astype(np.float32)

    def check():
        for call in CALLS:
            agree(results(emulated, call, *arrays), formula(call, *arrays))
        assert (fused_bf16.to_bf16(emulated.asarray(odd)).get() == to_bf16(odd)).all()
        return True
    assert kernel_mutants.detected_by(check, fused_bf16) == MUTANTS[i][3]
