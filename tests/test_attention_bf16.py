"""kernels/attention_bf16.cu: within the rounding of bf16 of the plain formula, no fault, the planted bugs are found."""
import numpy as np
import pytest

import kernel_mutants
from emulator_launches import SCHEDULES
from minilm.kernels import attention, attention_bf16, emulator
from minilm.kernels.attention import Operand
from minilm.kernels.bf16 import from_bf16, to_bf16
from test_attention_kernel import LENGTHS, NAMES, RESPONSES, by_segment, inputs, rectangle

# Errors by norm, and the largest one of the largest number. A bf16 has 8 significant bits: rounding changes a number by
# up to 2^-8 = 3.9e-3 of it, and 1.7e-3 by norm. P, O and dS are rounded before the products of the gradients too.
TOLERANCES = {"o": 3e-3, "lse": 1e-6, "dq": 5e-3, "dk": 5e-3, "dv": 4e-3}
LARGEST = 2e-2


def rounded(*arguments):
    """Inputs that are numbers of bf16, as float32."""
    return [from_bf16(to_bf16(a)) for a in inputs(*arguments, np.float32)]


def run(xp, segments, q, k, v, do, scale, before=0.0):
    """o, the log-sum-exp, dq, dk, dv by the kernels, of token-major arrays; what no kernel writes is as before."""
    N, H, K = q.shape
    G = k.shape[1]
    plan = attention.Plan(xp, segments)
    device = {"q": q, "k": k, "v": v, "do": do,
              **{name: np.full_like(like, before) for name, like in (("o", q), ("dq", q), ("dk", k), ("dv", v))}}
    operands = {name: Operand(xp.asarray(to_bf16(a)), 0, a.shape[1] * K, K) for name, a in device.items()}
    q, k, v, o = (operands[name] for name in "qkvo")
    lse = xp.asarray(np.full((H, N), -np.inf, np.float32))
    attention_bf16.forward(q, k, v, o, lse, plan, H, G, K, N, scale)
    attention_bf16.backward(q, k, v, o, operands["do"], lse, *(operands[n] for n in NAMES), plan, H, G, K, N, scale)
    return from_bf16(o.array.get()), lse.get(), *(from_bf16(operands[name].array.get()) for name in NAMES)


def agree(actual, expected, names=TOLERANCES):
    for (name, tolerance), a, b in zip(TOLERANCES.items(), actual, expected):
        seen = np.isfinite(b)
        assert (np.isfinite(a) == seen).all(), name
        error, size = np.linalg.norm(a[seen] - b[seen]), np.linalg.norm(b[seen])
        assert name not in names or error <= tolerance * size + 1e-6, (name, error, size)
        largest = np.abs(a[seen] - b[seen]).max(initial=0)
        assert name not in names or largest <= LARGEST * np.abs(b[seen]).max(initial=0) + 1e-6, (name, largest)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_any_length_gives_the_plain_formula(T, causal, xp, rng):
    segments, arrays = rectangle(2, T, T, causal), rounded(rng, 2 * T, 2 * T, 2, 1, 32)
    agree(run(xp, segments, *arrays, 0.2), by_segment(segments, *arrays, 0.2))


@pytest.mark.parametrize("K", attention_bf16.WIDTHS)
@pytest.mark.parametrize("H, G", [(1, 1), (3, 1), (8, 1), (8, 8), (6, 2)])
def test_any_head_width_and_grouping_gives_the_plain_formula(K, H, G, xp, rng):
    segments, arrays = rectangle(1, 40, 40, True), rounded(rng, 40, 40, H, G, K)
    agree(run(xp, segments, *arrays, K ** -0.5), by_segment(segments, *arrays, K ** -0.5))


@pytest.mark.parametrize("T, S", [(1, 70), (5, 70), (33, 34), (130, 200)])
def test_queries_may_be_the_last_of_more_keys(T, S, xp, rng):
    segments, arrays = rectangle(2, T, S, True), rounded(rng, 2 * T, 2 * S, 2, 1, 32)
    arrays[0], arrays[3] = (a[:2 * T] for a in (arrays[0], arrays[3]))
    agree(run(xp, segments, *arrays, 0.2), by_segment(segments, *arrays, 0.2))


@pytest.mark.parametrize("K", attention_bf16.WIDTHS)
def test_responses_see_their_prompt_and_it_gets_the_gradients_of_all_of_them(K, xp, rng):
    arrays = rounded(rng, 101, 101, 4, 2, K)
    agree(run(xp, RESPONSES, *arrays, 0.2), by_segment(RESPONSES, *arrays, 0.2))


LONG = [(0, 150, 0, 150, 0, 0, 0), (150, 70, 150, 70, 0, 0, 150), (220, 130, 220, 130, 0, 0, 150)]
"""A prompt of 150 tokens and two responses: prefixes and segments of several tiles, none of them a whole number."""


@pytest.mark.parametrize("K", attention_bf16.WIDTHS)
def test_prefixes_and_segments_of_several_tiles_give_the_plain_formula(K, xp, rng):
    arrays = rounded(rng, 350, 350, 2, 1, K)
    agree(run(xp, LONG, *arrays, 0.2), by_segment(LONG, *arrays, 0.2))


def test_tokens_of_no_segment_are_neither_read_nor_written(xp, rng):
    """Padding on either side, and queries that see no key. NaN in the padding has no effect."""
    segments = [(0, 9, 3, 6, -3, 0, 0), (9, 9, 9, 5, 0, 0, 0), (18, 9, 18, 0, 0, 0, 0), (27, 1, 27, 1, 0, 0, 0)]
    padding = [0, 1, 2, 14, 15, 16, 17, *range(18, 27)]
    arrays = rounded(rng, 28, 28, 2, 1, 32)
    expected = by_segment(segments, *arrays, 0.2)
    for gradient in expected[3:]:
        gradient[padding] = 7.0
    for a in arrays[1:3]:
        a[padding] = np.nan
    agree(run(xp, segments, *arrays, 0.2, before=7.0), expected)


def test_operands_may_be_parts_of_one_array(xp, rng):
    """As layers.segment_attention has them: q, k, v side by side for each token, and their gradients too."""
    N, H, G, K = 40, 4, 2, 32
    q, k, v, do = rounded(rng, N, N, H, G, K)
    segments = rectangle(1, N, N, True)
    qkv, dqkv = (xp.asarray(to_bf16(a)) for a in (np.concatenate([q, k, v], axis=1), np.zeros((N, H + 2 * G, K))))
    o, on_device = (Operand(xp.asarray(to_bf16(a)), 0, H * K, K) for a in (np.zeros_like(q), do))
    lse, plan = xp.zeros((H, N), np.float32), attention.Plan(xp, segments)
    shape = {"plan": plan, "heads": H, "kv_heads": G, "width": K, "lse_head": N, "scale": 0.2}
    operands, gradients = ([Operand(array, first * K, (H + 2 * G) * K, K) for first in (0, H, H + G)]
                           for array in (qkv, dqkv))
    attention_bf16.forward(*operands, o, lse, **shape)
    attention_bf16.backward(*operands, o, on_device, lse, *gradients, **shape)
    found = np.split(from_bf16(dqkv.get()), [H, H + G], axis=1)
    agree((from_bf16(o.array.get()), lse.get(), *found), by_segment(segments, q, k, v, do, 0.2))


@pytest.mark.parametrize("case", ["large", "equal", "one far above"])
def test_scores_of_1e4_equal_scores_and_one_far_above_are_right(case, xp, rng):
    """Over 12 tiles of keys, the largest score in the first: an error of each tile would be 12 errors."""
    T = 700
    q, k, v, do = rounded(rng, T, T, 1, 1, 32)
    segments = [(0, 70, 0, T, T, 0, 0)]
    if case == "large":
        q *= 64
        k *= 64
    elif case == "equal":
        k[:] = k[0]
    else:
        k[17] *= 1024
        k[17] = np.abs(k[17]) * np.sign(q[0])
    # dS = P (dP - D) is a small difference here, and D has the rounding of o.
    agree(run(xp, segments, q, k, v, do, 0.25), by_segment(segments, q, k, v, do, 0.25), names=("o", "lse", "dv"))


def large_and_equal(rng):
    """(segments, arrays): 2000 keys with scores of 7168, which float32 has exactly."""
    T = 2000
    q, k, v, do = rounded(rng, T, T, 1, 1, 32)
    q[:] = k[:] = np.r_[np.full(28, 16.0), np.zeros(4)]
    return [(0, 20, 0, T, T, 0, 0)], (q, k, v, do)


def test_large_equal_scores_have_equal_weights_over_many_tiles(xp, rng):
    """The factor of the running sums is exactly 1 when the maximum stays."""
    segments, arrays = large_and_equal(rng)
    agree(run(xp, segments, *arrays, 1.0), by_segment(segments, *arrays, 1.0), names=("o", "lse", "dv"))


def test_contracted_products_change_results_by_rounding_alone(emulated, rng):
    """As compilers for a GPU make them. A factor exp2(m c - shift) with a rounded shift is not 1 then; it is found."""
    segments, arrays = large_and_equal(rng)
    expected = by_segment(segments, *arrays, 1.0)
    with emulator.contracted():
        agree(run(emulated, segments, *arrays, 1.0), expected, names=("o", "lse", "dv"))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
            kernel_mutants.plant(patch, attention_bf16, ("", "exp2f((m[p][half] - highest) * (scale * LOG2E))",
                                                         "exp2f(m[p][half] * (scale * LOG2E) - shift)", ""))
            agree(run(emulated, segments, *arrays, 1.0), expected, names=("o", "lse", "dv"))


def test_a_batch_of_sequences_gives_the_results_of_layers_attention(xp, rng):
    from minilm.layers import attention as layer
    shapes = (3, 4, 9, 32), (3, 2, 12, 32), (3, 2, 12, 32), (3, 4, 9, 32)
    q, k, v, do = (from_bf16(to_bf16(rng.normal(size=shape))).astype(np.float64) for shape in shapes)
    first, stop = np.array([0, 4, 2]), np.array([12, 12, 11])
    mask = (np.arange(12) >= first[:, None]) & (np.arange(12) < stop[:, None])
    expected, vjp = layer.__wrapped__(q, k, v, True, mask)
    plan = attention.batch_plan(xp, q.shape, k.shape, True, first, stop)
    on_device = [xp.asarray(to_bf16(a)) for a in (q, k, v)]
    o, lse = attention_bf16.batch_forward(*on_device, plan, 32 ** -0.5)
    gradients = attention_bf16.batch_backward(*on_device, o, xp.asarray(to_bf16(do)), lse, plan, 32 ** -0.5)
    for actual, wanted in zip((o, *gradients), (expected, *vjp(do))):
        assert np.linalg.norm(from_bf16(actual.get()) - wanted) < 5e-3 * np.linalg.norm(wanted)


def test_without_queries_nothing_is_written(xp, rng):
    for segments in [], [(0, 0, 0, 0, 0, 0, 0)], rectangle(0, 5, 5, True):
        results = run(xp, segments, *rounded(rng, 3, 3, 1, 1, 32), 1.0)
        assert not any(np.nan_to_num(a, neginf=0).any() for i, a in enumerate(results) if i != 1)


def test_the_results_have_the_same_bits_every_time(xp, rng):
    arrays = rounded(rng, 101, 101, 4, 2, 32)
    one, other = (run(xp, RESPONSES, *arrays, 0.2) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other))


# Errors.

@pytest.mark.parametrize("what, operand, message", [
    ("q", lambda xp: Operand(xp.zeros((9, 32), np.float32), 0, 32, 32), "q is float32; it takes bf16 as uint16"),
    ("k", lambda xp: Operand(xp.zeros((9, 36), np.uint16), 0, 36, 32), "k begins at 0, with steps of 36 and 32; each"),
    ("v", lambda xp: Operand(xp.zeros((9, 40), np.uint16), 4, 40, 32), "v begins at 4, .* multiple of 8 numbers"),
    ("v", lambda xp: Operand(xp.zeros(292, np.uint16)[4:], 0, 32, 32), "memory of v begins at no multiple of 16 bytes"),
    ("o", lambda xp: Operand(xp.zeros((8, 32), np.uint16), 0, 32, 32), "reach to number 288 of o, which has 256")])
def test_arrays_that_the_kernel_would_read_wrongly_raise_before_the_launch(what, operand, message, xp):
    operands = {name: Operand(xp.zeros((9, 32), np.uint16), 0, 32, 32) for name in "qkvo"}
    operands[what] = operand(xp)
    with pytest.raises((TypeError, ValueError), match=message):
        attention_bf16.forward(**operands, lse=xp.zeros((1, 9), np.float32), lse_head=9, heads=1, kv_heads=1, width=32,
                               plan=attention.Plan(xp, rectangle(1, 9, 9, True)), scale=1.0)


@pytest.mark.parametrize("change, message", [
    ({"width": 16}, "attention_bf16: head width 16; this kernel supports 32, 64, 128"),
    ({"heads": 3, "kv_heads": 2}, "2 key/value heads do not divide 3"),
    ({"scale": 0.0}, "scale is 0.0; it must be above 0"), ({"scale": 1e-60}, "scale is 1e-60"),
    ({"scale": float("nan")}, "scale is nan")])
def test_unsupported_shapes_and_scales_raise_with_what_is_supported(change, message, xp):
    operands = {name: Operand(xp.zeros((9, 32), np.uint16), 0, 32, 32) for name in "qkvo"}
    given = {"heads": 1, "kv_heads": 1, "width": 32, "scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        attention_bf16.forward(**operands, lse=xp.zeros((1, 9), np.float32), lse_head=9,
                               plan=attention.Plan(xp, rectangle(1, 9, 9, True)), **given)


def test_a_log_sum_exp_in_float64_raises(xp):
    operands = [Operand(xp.zeros((9, 32), np.uint16), 0, 32, 32) for _ in "qkvo"]
    plan = attention.Plan(xp, rectangle(1, 9, 9, True))
    with pytest.raises(TypeError, match="lse is float64; it takes float32"):
        attention_bf16.forward(*operands, xp.zeros((1, 9)), plan, 1, 1, 32, 9, 1.0)


# Under the checkers.

@pytest.mark.parametrize("K", attention_bf16.WIDTHS)
def test_no_checker_finds_a_fault(K, emulated, rng):
    segments = [*RESPONSES, (101, 70, 101, 70, 0, 0, 40), (171, 3, 171, 2, -2, 0, 0)]
    arrays = rounded(rng, 174, 174, 2, 1, K)
    with emulator.checked():
        results = run(emulated, segments, *arrays, 0.2)
    agree(results, by_segment(segments, *arrays, 0.2))


@pytest.mark.slow
def test_the_bits_do_not_depend_on_the_order_of_threads_and_blocks(emulated, rng):
    arrays = rounded(rng, 101, 101, 2, 1, 64)
    results = []
    for schedule in SCHEDULES:
        with emulator.checked(schedule):
            results.append(b"".join(a.tobytes() for a in run(emulated, RESPONSES, *arrays, 0.2)))
    with emulator.fast():
        results.append(b"".join(a.tobytes() for a in run(emulated, RESPONSES, *arrays, 0.2)))
    assert len(set(results)) == 1


# Bugs, each detected.

MUTANTS = [
    # Copies and barriers.
    ("scores are computed before the copy of K has arrived",
     "copies_wait<1>();                               // K is there, and Q; V may be on its way\n", "\n", "checker"),
    ("scores are computed while other threads' copies of K are on their way",
     "V may be on its way\n        __syncthreads();\n", "V may be on its way\n", "checker"),
    ("P V is computed before the copy of V has arrived",
     "copies_wait<1>();                               // V is there; the next K may be on its way\n", "\n", "checker"),
    ("P V is computed while other threads' copies of V are on their way",
     "the next K may be on its way\n        __syncthreads();\n", "the next K may be on its way\n", "checker"),
    ("the wait leaves one group too many in flight",
     "copies_wait<1>();                               // K is there", "copies_wait<2>();        // K is there",
     "checker"),
    ("K has one tile in shared memory for two", "sK + (tile + 1) % 2 * COLS * HEAD", "sK + tile % 2 * COLS * HEAD",
     "checker"),
    ("V has one tile in shared memory for two", "*V_now = sV + tile % 2 * COLS * HEAD;", "*V_now = sV;", "checker"),
    ("the copies of a block without keys are in flight at its end",
     "copies_wait<0>();                                   // Q of a block whose queries see no key\n", "\n", "checker"),
    ("dQ's tile of keys is overwritten while other warps read it",
     "        __syncthreads();                                // all warps have read K; the next copies overwrite it\n",
     "", "checker"),
    ("a tile of queries is overwritten while other warps read it",
     "        __syncthreads();                                // all warps have read this tile; the next copies "
     "overwrite it\n", "", "checker"),
    ("two tiles of queries share one place", "sQdO + stage * 2 * COLS * HEAD;\n        copy_rows",
     "sQdO;\n        copy_rows", "checker"),
    ("L and D of two tiles share one place", "sLD[stage * 2 * COLS + i] = x;", "sLD[i] = x;", "checker"),
    # Places and fragments.
    ("a row is copied to another place than it is read from", "copy16(tile + place(row, chunk),",
     "copy16(tile + 8 * (row * CHUNKS + chunk),", "numbers"),
    ("the rows of a left factor are those of the next warp", "ldmatrix4(left, tile + place(row + lane % 16,",
     "ldmatrix4(left, tile + place((row + 16) % 64 + lane % 16,", "numbers"),
    ("the halves of a left factor are swapped", "columns / 8 + lane / 16)", "columns / 8 + 1 - lane / 16)", "numbers"),
    ("the two right factors of scores are swapped", "mma(product[m][n], left[m], right[0], right[1]);",
     "mma(product[m][n], left[m], right[2], right[3]);", "numbers"),
    ("right factors of scores have their halves swapped", "d / 8 + lane / 8 % 2", "d / 8 + 1 - lane / 8 % 2",
     "numbers"),
    ("V is read without being transposed", "ldmatrix4_trans(right, tile", "ldmatrix4(right, tile", "numbers"),
    ("the registers of P are in the order of its columns", "scores[m][n + i / 2][i % 2 * 2],",
     "scores[m][n + i % 2][i / 2 * 2],", "numbers"),
    ("the second half of a head's columns is left out", "d < CHUNKS; d += 2", "d < CHUNKS / 2; d += 2", "numbers"),
    ("a lane stores its numbers in the columns of its neighbour", "(to + 8 * d + threadIdx.x % 4 * 2) =",
     "(to + 8 * d + (threadIdx.x + 1) % 4 * 2) =", "numbers"),
    ("the maximum is that of 2 of the 4 lanes of a row", "return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));",
     "return x;", "numbers"),
    ("the sum is that of 2 of the 4 lanes of a row", "return x + __shfl_xor_sync(ALL_LANES, x, 2);", "return x;",
     "numbers"),
    # The formulas.
    ("the accumulator is not rescaled to the new maximum", "acc[p][d][2 * half + 1] *= rescale;", ";", "numbers"),
    ("the sum is not rescaled to the new maximum", "l[p][half] = rescale * l[p][half] + sum;", "l[p][half] += sum;",
     "numbers"),
    ("a row that sees no key is NaN", "const bool none = highest == NEGATIVE_INFINITY;", "const bool none = false;",
     "numbers"),
    ("the factor of what was summed before has a rounding error when the maximum stays",
     "exp2f((m[p][half] - highest) * (scale * LOG2E))", "exp2f(fmaf(m[p][half], scale * LOG2E, -shift))", "numbers"),
    ("the log-sum-exp has its maximum without the scale", "m[p][half] * scale + logf(sum)", "m[p][half] + logf(sum)",
     "numbers"),
    ("a query sees the key after it", "col > row + keys.diagonal)) S", "col > row + 1 + keys.diagonal)) S", "numbers"),
    ("the mask is left out for a warp whose first row does not see the last key", "row0 + keys.diagonal >= COLS - 1",
     "row0 + 31 + keys.diagonal >= COLS - 1", "numbers"),
    ("keys past the last one of a prefix have a score of 0", "keys.count == COLS && row0", "row0", "numbers"),
    ("the tiles of a prefix are those of the segment", "if (tile < of_prefix) return", "if (false) return", "checker"),
    ("the last tile of a prefix is not counted", "(s.prefix_keys + COLS - 1) / COLS + (own",
     "s.prefix_keys / COLS + (own", "numbers"),
    ("heads read the keys of the wrong group", "K, next.token, head / group,",
     "K, next.token, head % (gridDim.y / group),", "numbers"),
    ("dS without D", "S[0][n][e] = p * (dP[0][n][e] - D[e / 2]);", "S[0][n][e] = p * dP[0][n][e];", "numbers"),
    ("dQ without the scale", "acc[0], half, scale);", "acc[0], half, 1);", "numbers"),
    ("dV of dS", "add_scores_by_tile(of_dv, P, sdO);", "add_scores_by_tile(of_dv, dS, sdO);", "numbers"),
    ("dV of the first query head of a group alone", "head < first_head + group; ++head",
     "head < first_head + 1; ++head", "numbers"),
    ("a prompt gets the gradient of its own queries alone", "tile[3], tile[4], key_head * group,",
     "tile[3], tile[3] + 1, key_head * group,", "numbers"),
    ("keys miss the first query that sees them", "own ? max(0, j0 - s.diagonal) : 0",
     "own ? max(0, j0 - s.diagonal + 1) : 0", "numbers"),
    ("L and D of a query that is not there are those of the next one", "if (i % COLS < queries.count) x =", "x =",
     "checker"),
    ("rows past the last query are written", "if (row >= queries) continue;\n", "\n", "checker"),
    ("rows past the last key are written", "if (row >= count) continue;\n", "\n", "checker"),
    ("D of the first half of a head's numbers", "d < HEAD; d += 32", "d < HEAD / 2; d += 32", "numbers"),
]


@pytest.mark.slow
@kernel_mutants.each(MUTANTS)
def test_a_bug_is_found_by_a_checker_or_by_the_numbers(mutant, emulated, rng, monkeypatch):
    kernel_mutants.plant(monkeypatch, attention_bf16, mutant)
    segments = [*LONG, (350, 3, 350, 2, -2, 0, 0), (353, 3, 353, 0, 0, 0, 0)]
    arrays = rounded(rng, 356, 356, 4, 2, 32)
    large, others = large_and_equal(rng)

    def check():
        agree(run(emulated, segments, *arrays, 0.2), by_segment(segments, *arrays, 0.2))
        agree(run(emulated, large, *others, 1.0), by_segment(large, *others, 1.0), names=("o", "lse", "dv"))
        return True
    assert kernel_mutants.detected_by(check, attention_bf16) == mutant[-1]
