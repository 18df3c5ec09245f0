"""kernels/decode.cu: attention of one token to a cache, split over its keys; no fault, bytes counted, bugs found."""
import numpy as np
import pytest

import kernel_mutants
from helpers import assert_close
from minilm.kernels import decode as module, emulator
from minilm.kernels.bf16 import from_bf16, to_bf16
from minilm.kernels.decode import CHUNK, WIDTHS, decode


def plain(q, keys, values, length, first, dtype=np.float64):
    """One row and head at a time."""
    q, keys, values = (a.astype(dtype) for a in (q, keys, values))
    out, group = np.zeros_like(q), q.shape[1] // keys.shape[1]
    for b, h in np.ndindex(*q.shape[:2]):
        k, v = (a[b, h // group, first[b]:length] for a in (keys, values))
        if len(k):
            E = k @ q[b, h] * dtype(q.shape[2] ** -0.5)
            E = np.exp(E - E.max())
            out[b, h] = E @ v / E.sum()
    return out


def inputs(rng, B, H, G, K, capacity, dtype=np.float64):
    return [rng.normal(size=shape).astype(dtype) for shape in ((B, H, K), (B, G, capacity, K), (B, G, capacity, K))]


def run(xp, q, keys, values, length, first):
    return decode(*map(xp.asarray, (q, keys, values)), length, xp.asarray(np.asarray(first, np.int32))).get()


@pytest.mark.parametrize("length", [1, 7, 31, 33, 127, CHUNK, 129, 300])
@pytest.mark.parametrize("H, G", [(1, 1), (4, 2), (8, 1)])
def test_any_length_and_grouping_gives_the_plain_formula(length, H, G, xp, rng):
    arrays, first = inputs(rng, 3, H, G, 16, 310), [0, length // 2, length]
    assert_close(run(xp, *arrays, length, first), plain(*arrays, length, first))


@pytest.mark.parametrize("K", WIDTHS)
def test_any_head_width_gives_the_plain_formula_in_either_precision(K, xp, rng):
    arrays, first = inputs(rng, 2, 4, 2, K, 150), [0, 140]
    expected = plain(*arrays, 150, first)
    assert_close(run(xp, *arrays, 150, first), expected)
    in_float32 = [a.astype(np.float32) for a in arrays]
    exact, naive = plain(*in_float32, 150, first), plain(*in_float32, 150, first, np.float32)
    result = run(xp, *in_float32, 150, first)
    assert result.dtype == np.float32
    assert np.abs(result - exact).max() <= 2 * np.abs(naive - exact).max() + 8 * np.finfo(np.float32).eps


@pytest.mark.parametrize("K", WIDTHS)
@pytest.mark.parametrize("H, G", [(4, 2), (8, 1)])
def test_a_cache_of_bf16_has_float32_sums_and_one_rounding_at_the_end(K, H, G, xp, rng):
    arrays, first = [to_bf16(a) for a in inputs(rng, 2, H, G, K, 310)], [0, 140]
    expected = plain(*map(from_bf16, arrays), 300, first)
    found = run(xp, *arrays, 300, first)
    assert found.dtype == np.uint16
    assert (np.abs(from_bf16(found) - expected) <= 1.001 * 2 ** -8 * np.abs(expected) + 1e-6).all()


def test_a_mean_of_4096_values_of_bf16_is_rounded_once(xp, rng):
    q, keys, values = (to_bf16(a) for a in inputs(rng, 1, 1, 1, 32, 4096))
    q[:] = 0
    expected = from_bf16(values).astype(np.float64).mean(axis=2)
    found = from_bf16(run(xp, q, keys, values, 4096, [0]))
    assert (np.abs(found - expected) <= 1.001 * 2 ** -8 * np.abs(expected) + 1e-7).all()


def test_it_equals_the_decode_attention_of_the_library(xp, rng):
    from minilm.fast.cached_decoding import decode_attention
    (q, keys, values), first = inputs(rng, 3, 4, 2, 16, 20), np.array([0, 3, 11])
    assert_close(run(xp, q, keys, values, 17, first), decode_attention(q, keys, values, 17, first))


@pytest.mark.parametrize("scale", [1e4, 0.0])
def test_scores_of_1e4_and_equal_scores_are_right(scale, xp, rng):
    q, keys, values = inputs(rng, 1, 1, 1, 16, 200)
    keys *= scale
    assert_close(run(xp, q, keys, values, 200, [0]), plain(q, keys, values, 200, [0]))


def test_unfilled_positions_are_not_read(xp, rng):
    q, keys, values = inputs(rng, 2, 2, 1, 16, 140)
    expected = plain(q, keys, values, 130, [0, 9])
    keys[:, :, 130:] = values[:, :, 130:] = keys[1, :, :9] = values[1, :, :9] = np.nan
    assert_close(run(xp, q, keys, values, 130, [0, 9]), expected)


def test_a_row_has_the_same_bits_alone_and_in_a_batch(xp, rng):
    q, keys, values = inputs(rng, 5, 4, 2, 16, 300, np.float32)
    together = run(xp, q, keys, values, 290, range(5))
    for b in range(5):
        one = slice(b, b + 1)
        assert run(xp, q[one], keys[one], values[one], 290, [b]).tobytes() == together[one].tobytes()


@pytest.mark.parametrize("B, length", [(0, 5), (2, 0)])
def test_no_rows_and_no_keys_give_zeros(B, length, xp, rng):
    arrays = inputs(rng, B, 2, 1, 16, 5)
    assert not run(xp, *arrays, length, [0] * B).any()


@pytest.mark.parametrize("change, message", [
    (lambda a, xp: {**a, "keys": a["keys"].astype(np.float32)}, "keys is float32; this kernel takes float64"),
    (lambda a, xp: {**a, "q": a["q"].astype(np.uint16)}, "keys is float64; this kernel takes uint16"),
    (lambda a, xp: {**a, "q": a["q"].astype(np.int32)}, "the kernels compute in float32 or float64, not in int32"),
    (lambda a, xp: {**a, "values": a["values"][:, :, 1:]}, "values has shape"),
    (lambda a, xp: {**a, "keys": a["keys"][:, :, ::2], "values": a["values"][:, :, ::2]}, "keys is not contiguous"),
    (lambda a, xp: {**a, "q": a["q"][:, :, :8], "keys": a["keys"][..., :8]}, "supports widths 16, 32, 64, 128"),
    (lambda a, xp: {**a, "first": xp.asarray(np.zeros(2))}, "first is float64; this kernel takes int32"),
    (lambda a, xp: {**a, "length": 21}, "21 positions of a cache of 20")])
def test_unsupported_arrays_raise_with_what_is_supported(change, message, xp, rng):
    q, keys, values = map(xp.asarray, inputs(rng, 2, 2, 1, 16, 20))
    arguments = change({"q": q, "keys": keys, "values": values, "length": 20}, xp)
    with pytest.raises((TypeError, ValueError), match=message):
        decode(**arguments)


@pytest.mark.parametrize("K, dtype", [(16, np.float32), (64, np.float64), (64, np.uint16)])
def test_no_checker_finds_a_fault_and_bytes_equal_the_formula(K, dtype, emulated, rng, monkeypatch):
    arrays, first, length = inputs(rng, 2, 4, 2, K, 150), [0, 40], 140
    arrays = [to_bf16(a) if dtype is np.uint16 else a.astype(dtype) for a in arrays]
    counted, launch = {}, module.launch

    def launch_and_note(kernel, *arguments, **options):
        launch(kernel, *arguments, **options)
        counted[kernel.name] = emulator.traffic()
    monkeypatch.setattr(module, "launch", launch_and_note)
    with emulator.checked():
        run(emulated, *arrays, length, first)
    expected = module.decode_bytes(2, 4, 2, K, [140, 100], length, dtype)
    for kernel, names in (("decode_split", ("q", "keys", "values", None, "o", "m", "l")),
                          ("decode_combine", ("o", "m", "l", "out"))):
        for i, name in enumerate(names):
            if name:
                assert counted[kernel][i] == expected[kernel][name], (kernel, name)


MUTANTS = [
    ("no barrier before the next head's partial results",
     "__syncthreads();                                // the last head has been read\n", "\n", "checker"),
    ("no barrier before the warps are combined", "        __syncthreads();\n        real largest",
     "        real largest", "checker"),
    ("warps are added up as if their maxima were equal", "total += exp(of_warps[w][HEAD] - shift) * of_warps[w][d];",
     "total += of_warps[w][d];", "numbers"),
    ("splits are added up as if their maxima were equal", "const real weight = exp(m[from] - shift);",
     "const real weight = 1;", "numbers"),
    ("padding on the left is attended to", "max(first[row], split * chunk)", "split * chunk", "numbers"),
    ("the last position is left out", "min(length, (split + 1) * chunk)", "min(length - 1, (split + 1) * chunk)",
     "numbers"),
    ("the value is not rescaled", "acc[g][i] = rescale * acc[g][i] + p * value[i];", "acc[g][i] += p * value[i];",
     "numbers"),
    ("the query is not scaled", "d < HEAD ? scale * real(q[", "d < HEAD ? real(q[", "numbers"),
    ("the division is left out", "sum == 0 ? real(0) : total / sum", "total", "numbers"),
    ("a warp takes one key alone", "j < stop; j += WARPS", "j < stop; j = stop", "numbers"),
    ("the sums of a head as wide as a block are not written", "d < HEAD + 2; d += THREADS",
     "d < HEAD + 2; d = HEAD + 2", "checker"),
    ("the first warp's sum alone", "w < WARPS; ++w) total", "w < 1; ++w) total", "numbers"),
    ("the first split alone", "s < splits; ++s) {", "s < 1; ++s) {", "numbers"),
    ("one warp does not write its part", "if (lane + 32 * i < HEAD) of_warps",
     "if (warp && lane + 32 * i < HEAD) of_warps", "checker"),
]


@pytest.mark.slow
@kernel_mutants.each(MUTANTS)
def test_a_bug_is_found_by_a_checker_or_by_the_numbers(mutant, emulated, rng, monkeypatch):
    kernel_mutants.plant(monkeypatch, module, mutant)

    def check():
        for K in (16, 128):                             # narrower and wider than a block's sums
            arrays = inputs(rng, 2, 4, 2, K, 150)
            result = run(emulated, *arrays, 140, [0, 30])
            assert np.abs(np.nan_to_num(result - plain(*arrays, 140, [0, 30]), nan=np.inf)).max() <= 1e-8
        return True
    assert kernel_mutants.detected_by(check, module) == mutant[-1]


OF_BF16 = [
    *(mutant for mutant in MUTANTS if mutant[0] in ("the value is not rescaled", "the query is not scaled",
                                                    "one warp does not write its part")),
    ("sums are rounded", "sum[g] = rescale * sum[g] + p;", "sum[g] = real(stored(rescale * sum[g] + p));", "numbers"),
    ("the output is rounded for each value", "acc[g][i] = rescale * acc[g][i] + p * value[i];",
     "acc[g][i] = real(stored(rescale * acc[g][i] + p * value[i]));", "numbers"),
    ("the cache is read as bits", "? real(values[cache + (size_t)j * HEAD + d])",
     "? real(values[cache + (size_t)j * HEAD + d].bits)", "numbers"),
]


@pytest.mark.slow
@kernel_mutants.each(OF_BF16)
def test_a_bug_is_found_with_a_cache_of_bf16(mutant, emulated, rng, monkeypatch):
    kernel_mutants.plant(monkeypatch, module, mutant)

    def check():
        for K in (16, 128):
            arrays = [to_bf16(a) for a in inputs(rng, 2, 4, 2, K, 1000)]
            result = from_bf16(run(emulated, *arrays, 900, [0, 30]))
            expected = plain(*map(from_bf16, arrays), 900, [0, 30])
            assert (np.abs(result - expected) <= 1.001 * 2 ** -8 * np.abs(expected) + 1e-6).all()
        return True
    assert kernel_mutants.detected_by(check, module) == mutant[-1]
