"""kernels/attention.cu: equal to the plain formula at ragged sizes, no fault, bytes counted, planted bugs found."""
import contextlib

import numpy as np
import pytest

import kernel_mutants
from helpers import assert_close
from minilm.kernels import attention, emulator

LENGTHS = [1, 7, 31, 32, 33, 65, 128, 200]
NAMES = ("dq", "dk", "dv")


def by_segment(segments, q, k, v, do, scale, dtype=np.float64):
    """softmax(scale q k^T) v and its gradients, one segment and head at a time.  q (N,H,K), k, v (M,G,K), token-major

    Returns o (N,H,K), the log-sum-exp (H,N), dq, dk, dv; zeros (-inf) where no segment has a token.
    """
    q, k, v, do = (a.astype(dtype) for a in (q, k, v, do))
    group, scale = q.shape[1] // k.shape[1], dtype(scale)
    o, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    lse = np.full(q.shape[1::-1], -np.inf, dtype)
    for first, count, key, keys, diagonal, prefix, prefix_keys in segments:
        rows, columns = np.arange(first, first + count), np.r_[prefix:prefix + prefix_keys, key:key + keys]
        hidden = np.arange(keys) > np.arange(count)[:, None] + diagonal
        hidden = np.concatenate([np.zeros((count, prefix_keys), bool), hidden], axis=1)
        seeing = ~hidden.all(axis=1)
        for h in range(q.shape[1]):
            S = np.where(hidden, -np.inf, scale * (q[rows, h] @ k[columns, h // group].T))[seeing]
            if not S.size:
                continue
            m = S.max(axis=1, keepdims=True)
            E = np.exp(S - m)
            P = E / E.sum(axis=1, keepdims=True)
            of_o, of_do = P @ v[columns, h // group], do[rows, h][seeing]
            dP = of_do @ v[columns, h // group].T
            dS = P * (dP - (of_do * of_o).sum(axis=1, keepdims=True))
            o[rows[seeing], h] = of_o
            lse[h, rows[seeing]] = (m + np.log(E.sum(axis=1, keepdims=True)))[:, 0]
            dq[rows[seeing], h] = scale * dS @ k[columns, h // group]
            np.add.at(dk[:, h // group], columns, scale * dS.T @ q[rows, h][seeing])
            np.add.at(dv[:, h // group], columns, P.T @ of_do)
    return o, lse, dq, dk, dv


def run(xp, segments, q, k, v, do, scale, plan=None):
    """The same by the kernels, of token-major arrays."""
    N, H, K = q.shape
    G = k.shape[1]
    plan = attention.Plan(xp, segments) if plan is None else plan
    device = {"q": q, "k": k, "v": v, "do": do, "o": np.zeros_like(q), "dq": np.zeros_like(q), "dk": np.zeros_like(k),
              "dv": np.zeros_like(v)}
    operands = {name: attention.Operand(xp.asarray(a), 0, a.shape[1] * K, K) for name, a in device.items()}
    q, k, v, o = (operands[name] for name in "qkvo")
    lse = xp.asarray(np.full((H, N), -np.inf, q.array.dtype))
    attention.forward(q, k, v, o, lse, plan, H, G, K, N, scale)
    attention.backward(q, k, v, o, operands["do"], lse, *(operands[name] for name in NAMES), plan, H, G, K, N, scale)
    return o.array.get(), lse.get(), *(operands[name].array.get() for name in NAMES)


def inputs(rng, N, M, H, G, K, dtype=np.float64, size=1.0):
    return [(size * rng.normal(size=shape)).astype(dtype) for shape in ((N, H, K), (M, G, K), (M, G, K), (N, H, K))]


def rectangle(B, T, S, causal):
    """Segments of B sequences side by side, T queries and S keys each."""
    return [(b * T, T, b * S, S, S - T if causal else S, 0, 0) for b in range(B)]


RESPONSES = [(0, 40, 0, 40, 0, 0, 0), (40, 33, 40, 33, 0, 0, 40), (73, 1, 73, 1, 0, 0, 40), (74, 7, 74, 7, 0, 0, 0),
             (81, 20, 81, 20, 0, 74, 7)]
"""Two prompts, of 40 and 7 tokens; two responses to the one, one to the other."""


def agree(actual, expected, tolerance=1e-10):
    for name, a, b in zip(("o", "lse", *NAMES), actual, expected):
        seen = np.isfinite(b)
        assert (np.isfinite(a) == seen).all(), name
        assert_close(np.where(seen, a, 0), np.where(seen, b, 0), tolerance, name)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_any_length_gives_the_plain_formula(T, causal, xp, rng):
    segments, arrays = rectangle(2, T, T, causal), inputs(rng, 2 * T, 2 * T, 2, 1, 16)
    agree(run(xp, segments, *arrays, 0.25), by_segment(segments, *arrays, 0.25))


@pytest.mark.parametrize("K", attention.WIDTHS)
@pytest.mark.parametrize("H, G", [(1, 1), (3, 1), (8, 1), (8, 8), (6, 2)])
def test_any_head_width_and_grouping_gives_the_plain_formula(K, H, G, xp, rng):
    segments, arrays = rectangle(1, 40, 40, True), inputs(rng, 40, 40, H, G, K)
    agree(run(xp, segments, *arrays, K ** -0.5), by_segment(segments, *arrays, K ** -0.5))


@pytest.mark.parametrize("T, S", [(1, 70), (5, 70), (33, 34)])
def test_queries_may_be_the_last_of_more_keys(T, S, xp, rng):
    segments, arrays = rectangle(2, T, S, True), inputs(rng, 2 * T, 2 * S, 2, 1, 16)
    agree(run(xp, segments, *arrays, 0.25), by_segment(segments, *arrays, 0.25))


@pytest.mark.parametrize("K", [16, 128])
def test_responses_see_their_prompt_and_it_gets_the_gradients_of_all_of_them(K, xp, rng):
    arrays = inputs(rng, 101, 101, 4, 2, K)
    agree(run(xp, RESPONSES, *arrays, 0.2), by_segment(RESPONSES, *arrays, 0.2))


@pytest.mark.parametrize("shared", [64 * 1024, attention.ROOMY])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("segments, tokens", [(RESPONSES, 101), (rectangle(1, 133, 133, True), 133)],
                         ids=["packed", "causal"])
def test_tiles_for_little_and_for_much_shared_memory_give_the_plain_formula(segments, tokens, K, shared, emulated, rng,
                                                                           monkeypatch):
    monkeypatch.setattr(attention, "shared_memory", lambda xp: shared)
    arrays = inputs(rng, tokens, tokens, 2, 1, K, np.float32)
    with emulator.checked() as launches:
        found = run(emulated, segments, *arrays, K ** -0.5)
    agree(found, by_segment(segments, *(a.astype(np.float64) for a in arrays), K ** -0.5), 2e-6)
    roomy = shared == attention.ROOMY
    assert [one.shared for one in launches] == [attention.shared_bytes(name, np.float32, K, roomy)
                                                for name in attention.KERNELS]
    assert all(one.shared <= shared for one in launches) and (max(one.shared for one in launches) > 64 * 1024) == roomy


def test_padding_on_either_side_and_rows_without_keys_have_no_effect(xp, rng):
    """Tokens of no segment are neither read nor written: NaN there has no effect, and zeros remain."""
    segments = [(0, 9, 3, 6, -3, 0, 0), (9, 9, 9, 5, 0, 0, 0), (18, 9, 18, 0, 0, 0, 0), (27, 1, 27, 1, 0, 0, 0)]
    arrays = inputs(rng, 28, 28, 2, 1, 16)
    expected = by_segment(segments, *arrays, 0.25)
    for a in arrays[1:3]:
        a[[0, 1, 2, 14, 15, 16, 17, *range(18, 27)]] = np.nan
    agree(run(xp, segments, *arrays, 0.25), expected)


@pytest.mark.parametrize("case", ["large", "equal", "one far above"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_scores_of_1e4_equal_scores_and_one_far_above_are_right(case, dtype, xp, rng):
    q, k, v, do = inputs(rng, 40, 40, 1, 1, 16, dtype)
    if case == "large":
        q *= 100
        k *= 100
    elif case == "equal":
        k[:] = k[0]
    else:
        k[17] *= 1000
    segments = rectangle(1, 40, 40, True)
    results, expected = run(xp, segments, q, k, v, do, 0.25), by_segment(segments, q, k, v, do, 0.25)
    assert all(np.isfinite(a).all() for a in results)
    if dtype == np.float64:
        agree(results, expected, 1e-9 if case == "large" else 1e-10)        # P changes by 1e4 eps there
    else:
        close_as_naive(results, expected, by_segment(segments, q, k, v, do, 0.25, np.float32))


def close_as_naive(results, exact, naive):
    """float32: at most twice the error of the naive formula in float32, gradients three times, and a few eps."""
    for i, (a, b, c) in enumerate(zip(results, exact, naive)):
        error, of_naive = (np.abs(x - b).max(initial=0) for x in (a, c))
        slack = 8 * np.finfo(np.float32).eps * np.abs(b).max(initial=0)
        assert error <= (2 if i < 2 else 3) * of_naive + slack, (("o", "lse", *NAMES)[i], error, of_naive)


@pytest.mark.parametrize("K", attention.WIDTHS)
def test_float32_is_as_good_as_the_naive_formula(K, xp, rng):
    arrays = inputs(rng, 101, 101, 4, 2, K, np.float32)
    results = run(xp, RESPONSES, *arrays, 0.2)
    assert all(a.dtype == np.float32 for a in results)
    close_as_naive(results, by_segment(RESPONSES, *arrays, 0.2), by_segment(RESPONSES, *arrays, 0.2, np.float32))


def test_the_gradients_equal_finite_differences(xp, rng):
    q, k, v, do = arrays = inputs(rng, 12, 12, 2, 1, 16)
    segments = [(0, 5, 0, 5, 0, 0, 0), (5, 7, 5, 7, 0, 0, 5)]
    gradients, h = run(xp, segments, *arrays, 0.25)[2:], 1e-5
    for a, gradient in zip((q, k, v), gradients):
        direction = rng.normal(size=a.shape)

        def loss(step):
            a[...] += step * direction
            value = (run(xp, segments, *arrays, 0.25)[0] * do).sum()
            a[...] -= step * direction
            return value
        assert_close((gradient * direction).sum(), (loss(h) - loss(-h)) / (2 * h), 1e-6)


def test_a_batch_of_sequences_gives_the_results_of_layers_attention(xp, rng):
    from minilm.layers import attention as layer
    q, k, v, do = (rng.normal(size=shape) for shape in ((3, 4, 9, 16), (3, 2, 12, 16), (3, 2, 12, 16), (3, 4, 9, 16)))
    first, stop = np.array([0, 4, 2]), np.array([12, 12, 11])
    mask = (np.arange(12) >= first[:, None]) & (np.arange(12) < stop[:, None])
    expected, vjp = layer.__wrapped__(q, k, v, True, mask)
    plan = attention.batch_plan(xp, q.shape, k.shape, True, first, stop)
    on_device = [xp.asarray(a) for a in (q, k, v)]
    o, lse = attention.batch_forward(*on_device, plan, 0.25)
    assert_close(o.get(), expected)
    gradients = attention.batch_backward(*on_device, o, xp.asarray(do), lse, plan, 0.25)
    for name, gradient, wanted in zip(NAMES, gradients, vjp(do)):
        assert_close(gradient.get(), wanted, name=name)


@pytest.mark.parametrize("segments", [[], [(0, 0, 0, 0, 0, 0, 0)], rectangle(0, 5, 5, True)],
                         ids=["none", "empty", "no batch"])
def test_without_queries_nothing_is_written(segments, xp, rng):
    results = run(xp, segments, *inputs(rng, 3, 3, 1, 1, 16), 1.0)
    assert not any(np.nan_to_num(a, neginf=0).any() for i, a in enumerate(results) if i != 1)


def test_the_results_have_the_same_bits_every_time(xp, rng):
    arrays = inputs(rng, 101, 101, 4, 2, 32, np.float32)
    one, other = (run(xp, RESPONSES, *arrays, 0.2) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other))


@pytest.mark.parametrize("where", range(3))
def test_nan_propagates_as_in_the_plain_formula(where, xp, rng):
    """NaN in a query, a key or a value gives NaN in the same places as in the plain formula."""
    arrays, segments = inputs(rng, 40, 40, 1, 1, 16), rectangle(1, 40, 40, True)
    arrays[where][7, 0, 3] = np.nan
    for a, b in zip(run(xp, segments, *arrays, 0.25)[:2], by_segment(segments, *arrays, 0.25)):
        assert (np.isnan(a) == np.isnan(b)).all() and (where == 2 or np.isnan(a).any())


# Errors.

@pytest.mark.parametrize("what, change, message", [
    ("q", lambda xp, a: a.astype(np.float32), "k is float64 but q is float32"),
    ("v", lambda xp, a: a.astype(np.float32), "v is float32 but q is float64"),
    ("k", lambda xp, a: a[:, :, ::2], "k is not contiguous"),
    ("k", lambda xp, a: a[:4], "reach to number .* of k, which has 64"),
    ("o", lambda xp, a: a[:-1], "reach to number .* of o")])
def test_arrays_that_the_kernel_would_read_wrongly_raise_before_the_launch(what, change, message, xp, rng):
    arrays = dict(zip("qkvo", map(xp.asarray, inputs(rng, 9, 9, 1, 1, 16))))
    arrays[what] = change(xp, arrays[what])
    operands = [attention.Operand(a, 0, 16, 16) for a in arrays.values()]
    with pytest.raises((TypeError, ValueError), match=message):
        attention.forward(*operands, xp.empty((1, 9)), attention.Plan(xp, rectangle(1, 9, 9, True)), 1, 1, 16, 9, 1.0)


@pytest.mark.parametrize("heads, kv_heads, K, dtype, message", [
    (1, 1, 24, np.float64, "head width 24; this kernel supports 16, 32, 64, 128"),
    (3, 2, 16, np.float64, "2 key/value heads do not divide 3"),
    (1, 1, 16, np.float16, "float32 or float64, not in float16")])
def test_unsupported_shapes_and_precisions_raise_with_what_is_supported(heads, kv_heads, K, dtype, message, xp, rng):
    arrays = inputs(rng, 4, 4, heads, kv_heads, K, dtype)
    operands = [attention.Operand(xp.asarray(a), 0, a.shape[1] * K, K) for a in (*arrays[:3], arrays[0])]
    with pytest.raises((TypeError, ValueError), match=message):
        attention.forward(*operands, xp.empty((heads, 4)), attention.Plan(xp, rectangle(1, 4, 4, True)), heads,
                          kv_heads, K, 4, 1.0)


@pytest.mark.parametrize("segments, message", [
    ([(0, 4, 0, 4, 0, 0, 0), (3, 2, 4, 2, 0, 0, 0)], "overlap: queries 0 to 4 and queries from 3"),
    ([(0, 4, 0, 4, 0, 0, 0), (4, 2, 4, 2, 0, 0, 3)], "overlap: keys 0 to 3 and keys from 0"),
    ([(0, 1, -1, 2, 0, 0, 0)], "begin before the first token: keys at -1")])
def test_segments_that_would_write_the_same_gradient_twice_raise(segments, message, xp):
    with pytest.raises(ValueError, match=message):
        attention.Plan(xp, segments)


# Under the checkers.

CHECKED = {"float32, width 16": (16, np.float32), "float64, width 64": (64, np.float64),
           "float64, width 128": (128, np.float64)}


@pytest.mark.parametrize("K, dtype", CHECKED.values(), ids=CHECKED)
def test_no_checker_finds_a_fault(K, dtype, emulated, rng):
    arrays = inputs(rng, 101, 101, 2, 1, K, dtype)
    with emulator.checked():
        results = run(emulated, RESPONSES, *arrays, 0.2)
    agree(results, by_segment(RESPONSES, *arrays, 0.2), 1e-10 if dtype == np.float64 else 1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("segments, tokens", [(RESPONSES, 101), (rectangle(2, 33, 65, True), 130),
                                              (rectangle(1, 40, 40, False), 40)],
                         ids=["packed", "causal", "bidirectional"])
def test_bytes_moved_equal_the_formula(segments, tokens, dtype, emulated, rng):
    arrays, counted = inputs(rng, tokens, tokens, 4, 2, 16, dtype), {}
    plan = attention.Plan(emulated, segments)
    with emulator.checked(), counting(counted):
        run(emulated, segments, *arrays, 0.2, plan)
    expected = {"attention_forward": attention.forward_bytes(plan, 4, 2, 16, dtype),
                **attention.backward_bytes(plan, 4, 2, 16, dtype)}
    for kernel, operands in expected.items():
        assert {name: counted[kernel][name] for name in operands} == operands, kernel


PARAMETERS = {"attention_forward": ("q", "k", "v", "o", "lse"), "attention_delta": ("o", "do", "delta"),
              "attention_dq": ("q", "k", "v", "do", "lse", "delta", "dq"),
              "attention_dk_dv": ("q", "k", "v", "do", "lse", "delta", "dk", "dv")}


@contextlib.contextmanager
def counting(counted):
    """Records the traffic of every launch of a kernel of attention.cu, by the names of its first parameters."""
    with pytest.MonkeyPatch.context() as patch:
        launch = attention.launch

        def launch_and_note(kernel, *arguments, **options):
            launch(kernel, *arguments, **options)
            traffic = emulator.traffic()
            counted[kernel.name] = {name: traffic[i] for i, name in enumerate(PARAMETERS[kernel.name])}
        patch.setattr(attention, "launch", launch_and_note)
        yield


# Bugs, each detected.

FIRST_TILE = "__syncthreads();                            // all threads are done with the last tile\n"
LOADED = "count, 1);\n            __syncthreads();\n\n"
MUTANTS = [
    ("no barrier before a tile is written over", FIRST_TILE, "\n", "checker"),
    ("no barrier between loading a tile and reading it", LOADED + "            real S",
     "count, 1);\n            real S", "checker"),
    ("no barrier between loading a tile of keys and reading it for dQ", LOADED + "            const int last",
     "count, 1);\n            const int last", "checker"),
    ("no barrier between the lanes that write P and those that read it",
     "__syncwarp();                               // one warp writes and reads a row of P\n", "\n", "checker"),
    ("only the lanes of a warp wait for columns that other warps write",
     "__syncthreads();                        // all warps read the columns of P and dS\n", "__syncwarp();\n",
     "checker"),
    ("a query sees the key after it", "(own && j0 + col > i0 + row + s.diagonal)",
     "(own && j0 + col > i0 + row + s.diagonal + 1)", "numbers"),
    ("a query gets a gradient from the key after it", "s.diagonal + i0 - j0 : COLS", "s.diagonal + i0 - j0 + 1 : COLS",
     "numbers"),
    ("a query does not see itself", "min(s.keys, i0 + queries + s.diagonal)",
     "min(s.keys, i0 + queries + s.diagonal - 1)", "numbers"),
    ("keys past the last one have a score of 0", "if (col >= count || (own", "if ((own", "numbers"),
    ("the accumulator is not rescaled to the new maximum", "acc[i][d] *= rescale;", ";", "numbers"),
    ("the sum is not rescaled to the new maximum", "l[i] = rescale * l[i] + lanes_sum<8>(sum);",
     "l[i] += lanes_sum<8>(sum);", "numbers"),
    ("a lane has the sum of its own columns alone", "l[i] = rescale * l[i] + lanes_sum<8>(sum);",
     "l[i] = rescale * l[i] + sum;", "numbers"),
    ("the maximum is that of 4 of the 8 lanes", "highest = lanes_max<8>(highest);", "highest = lanes_max<4>(highest);",
     "numbers"),
    ("a row that sees no key is NaN", "const real shift = highest == NEGATIVE_INFINITY ? real(0) : highest;",
     "const real shift = highest;", "numbers"),
    ("the log-sum-exp without the maximum", "= m[i] + log(l[i]);", "= log(l[i]);", "numbers"),
    ("heads read the keys of the wrong group", "head / group, count, 1)", "head % (gridDim.y / group), count, 1)",
     "numbers"),
    ("rows past the last query are written", "if (row >= queries) continue;\n        real* out = o +",
     "real* out = o +", "checker"),
    ("a tile is not filled up with zeros",
     "tile[row][d + e] = row < count ? scale * at_row[e] : real(0);",
     "if (row < count) tile[row][d + e] = scale * at_row[e];", "checker"),
    ("a token past the last is read", "[d + e] = row < count ? scale", "[d + e] = row <= count ? scale",
     "checker"),
    ("dQ without the scale", "out[tx + 8 * d] = scale * acc[i][d];", "out[tx + 8 * d] = acc[i][d];", "numbers"),
    ("dK with the scale twice", "to_dk[tx + 8 * d] = of_dk[c][d];", "to_dk[tx + 8 * d] = scale * of_dk[c][d];",
     "numbers"),
    ("dK and dV are swapped",
     "to_dk[tx + 8 * d] = of_dk[c][d];\n            to_dv[tx + 8 * d] = of_dv[c][d];",
     "to_dk[tx + 8 * d] = of_dv[c][d];\n            to_dv[tx + 8 * d] = of_dk[c][d];", "numbers"),
    ("dS without D", "sdS[row][col] = p * (dP[i][j] - sD[row]);", "sdS[row][col] = p * dP[i][j];", "numbers"),
    ("dV of the first query head of a group alone",
     "for (int head = key_head * group; head < (key_head + 1) * group; ++head) {",
     "for (int head = key_head * group; head < key_head * group + 1; ++head) {", "numbers"),
    ("a prompt gets the gradient of its own queries alone", "for (int user = tile[3]; user < users_end; ++user) {",
     "for (int user = tile[3]; user < min(users_end, tile[3] + 1); ++user) {", "numbers"),
    ("keys miss the first query that sees them", "own ? max(0, j0 - s.diagonal) : 0",
     "own ? max(0, j0 - s.diagonal + 1) : 0", "numbers"),
    ("keys of a prefix are hidden like a segment's own", "const bool own = users[2 * user + 1];",
     "const bool own = true;", "numbers"),
    ("the first tile of keys alone", "j0 < keys; j0 += COLS", "j0 < keys; j0 = keys", "numbers"),
    ("the first tile of queries alone", "i0 < s.queries; i0 += ROWS", "i0 < s.queries; i0 = s.queries", "numbers"),
    ("a thread loads one number alone", "row < MOST; row += TOGETHER", "row < MOST; row = MOST", "checker"),
    ("every row is the first of its thread", ", at_row += step)", ")", "numbers"),
    ("rows are read from the next thread's place", "token + first, head) + d", "token, head) + d", "numbers"),
    ("D of the first numbers of a head", "d < HEAD; d += 8", "d < HEAD; d = HEAD", "numbers"),
    ("D reaches one row too far", "if (row < queries && tx == 0) delta", "if (tx == 0) delta", "checker"),
]


@pytest.mark.slow
@kernel_mutants.each(MUTANTS)
def test_a_bug_is_found_by_a_checker_or_by_the_numbers(mutant, emulated, rng, monkeypatch):
    kernel_mutants.plant(monkeypatch, attention, mutant)
    segments = [*RESPONSES, (101, 3, 101, 2, -2, 0, 0)]
    arrays = inputs(rng, 104, 104, 4, 2, 16)

    def check():
        agree(run(emulated, segments, *arrays, 0.2), by_segment(segments, *arrays, 0.2), 1e-8)
        return True
    assert kernel_mutants.detected_by(check, attention) == mutant[-1]
