"""kernels/sampling.cu: the same tokens as NumPy, the bytes, the errors, and planted bugs that are found."""
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings as hypothesis_settings, strategies as st

import kernel_mutants
from helpers import assert_close
from minilm.generate import categorical, distribution, entropy, sample as checked_sample
from minilm.kernels import emulator, sampling

VOCABULARIES = [1, 7, 31, 32, 33, 65, 128, 200, 1000, 5000]
BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64])
# temperature, top_k, top_p
SETTINGS = [(1, None, None), (0.3, None, None), (2.5, None, 1.0), (1, 1, None), (0.7, 5, None), (1, 10_000, None),
            (1, None, 1e-9), (1, None, 0.5), (1.3, None, 0.95), (0.7, 20, 0.8), (3.0, 40, 0.99), (0, None, None),
            (0, 3, 0.5)]


def sample(xp, logits, uniforms, *settings):
    return [a.get() for a in sampling.sample(xp.asarray(logits), xp.asarray(uniforms), *settings)]


def numpy_sample(logits, uniforms, temperature=1, top_k=None, top_p=None):
    """The functions of minilm/generate.py with the same logits and uniforms."""
    if temperature == 0:
        scores, tokens = distribution(logits), logits.argmax(axis=-1)
    else:
        scores = distribution(logits, temperature, top_k, top_p)
        tokens = categorical(np.exp(scores), uniforms)
    return tokens, scores[np.arange(len(logits)), tokens], entropy(np.exp(scores), scores)


def sorted_sample(logits, uniforms, temperature=1, top_k=None, top_p=None):
    """The same from sorted gaps, row by row, in float64 after the division by the temperature."""
    rows = []
    for row, u in zip(logits, uniforms):
        g = ((row.max() - row) / row.dtype.type(temperature)).astype(np.float64)
        if top_k is not None and top_k < len(g):
            g[np.argsort(g, kind="stable")[top_k:]] = np.inf
        w, order = np.exp(-g), np.argsort(g, kind="stable")
        if top_p is not None and top_p < 1:
            summed = np.concatenate([[0], w[order].cumsum()])
            w[order[summed[:-1] >= row.dtype.type(top_p) * summed[-1]]] = 0
        total = w.cumsum()
        token = int((total > u * total[-1]).argmax())
        p = w[w > 0] / w.sum()
        rows.append((token, np.log(w[token] / w.sum()), -(p * np.log(p)).sum()))
    return tuple(map(np.array, zip(*rows)))


# The same token from the same logits and the same uniform.

@BOTH
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("V, B", [(1, 3), (7, 100), (33, 100), (65, 100), (200, 100)])
def test_the_drawn_tokens_equal_those_of_generate(V, B, settings, dtype, xp, rng):
    logits, uniforms = (rng.normal(size=(B, V)) * 2).astype(dtype), rng.random(B)
    assert_same_draws(sample(xp, logits, uniforms, *settings), numpy_sample(logits, uniforms, *settings))


@BOTH
@pytest.mark.parametrize("settings", SETTINGS[:-2], ids=str)
@pytest.mark.parametrize("V, B", [(31, 30), (32, 30), (128, 30), (1000, 20), (5000, 6)])
def test_the_drawn_tokens_equal_those_of_sorting_and_summing_in_float64(V, B, settings, dtype, xp, rng):
    logits, uniforms = (rng.normal(size=(B, V)) * 2).astype(dtype), rng.random(B)
    assert_same_draws(sample(xp, logits, uniforms, *settings), sorted_sample(logits, uniforms, *settings))


def assert_same_draws(actual, expected):
    (tokens, log_probs, entropies), dtype = actual, actual[1].dtype
    assert tokens.dtype == np.int64 and entropies.dtype == dtype
    assert np.array_equal(tokens, expected[0])
    tolerance = 1e-10 if dtype == np.float64 else 1e-5
    assert np.abs(log_probs - expected[1]).max() <= tolerance and np.abs(entropies - expected[2]).max() <= tolerance


@BOTH
@pytest.mark.parametrize("settings", [(1, None, None), (0.5, 50, None), (1, None, 0.9), (2, 50, 0.9)], ids=str)
def test_a_thousand_draws_from_one_row_equal_the_inverse_of_its_distribution(settings, dtype, xp, rng):
    logits = np.repeat((rng.normal(size=(1, 200)) * 2).astype(dtype), 1000, axis=0)
    uniforms = (np.arange(1000) + 0.5) / 1000
    tokens = sample(xp, logits, uniforms, *settings)[0]
    assert np.array_equal(tokens, numpy_sample(logits, uniforms, *settings)[0])
    assert (np.diff(tokens) >= 0).all() and len(np.unique(tokens)) > 20


def test_log_probs_and_entropies_are_as_good_as_the_plain_formula(xp, rng):
    """float32: within twice the error of generate's arithmetic in float32."""
    logits, uniforms = rng.normal(size=(50, 200)).astype(np.float32) * 3, rng.random(50)
    exact = sorted_sample(logits, uniforms, 1.5, 60, 0.9)
    for actual, naive, right in list(zip(sample(xp, logits, uniforms, 1.5, 60, 0.9),
                                         numpy_sample(logits, uniforms, 1.5, 60, 0.9), exact))[1:]:
        allowed = 2 * np.abs(naive - right).max() + 4 * np.finfo(np.float32).eps * np.abs(right).max()
        assert np.abs(actual - right).max() <= allowed


@BOTH
def test_a_vocabulary_of_200_000_gives_the_right_draws(dtype, xp, rng):
    logits, uniforms = (rng.normal(size=(1, 200_000)) * 2).astype(dtype), rng.random(1)
    for settings in (1, None, None), (0.7, 5000, 0.9):
        assert_same_draws(sample(xp, logits, uniforms, *settings), sorted_sample(logits, uniforms, *settings))


# Ties, and the ends of the unit interval.

def tied(dtype):
    """Many equal logits; weights that are powers of 2, so that every sum is exact."""
    return np.log(np.array([[1, 2, 4, 4, 2, 1, 4, 2, 4, 8], [4, 4, 4, 4, 4, 4, 4, 4, 2, 2]])).astype(dtype)


@BOTH
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 8, 9])
def test_top_k_keeps_exactly_k_tokens_of_equals_the_first(top_k, dtype, xp):
    logits, uniforms = tied(dtype).repeat(50, axis=0), np.tile((np.arange(50) + 0.37) / 50, 2)
    tokens = sample(xp, logits, uniforms, 1, top_k)[0].reshape(2, 50)
    assert np.array_equal(tokens.reshape(-1), numpy_sample(logits, uniforms, 1, top_k)[0])
    for row, drawn in zip(tied(dtype), tokens):
        assert set(drawn) == set(np.argsort(-row, kind="stable")[:top_k])


@BOTH
@pytest.mark.parametrize("V", [2, 5, 70])
def test_ties_and_signed_zeros_leave_the_draws_of_numpy(V, dtype, xp, rng):
    """A highest logit of -0 beside 0 once gave the gap -0, whose bits sort last. Top-p may cut ties that top-k left."""
    logits = rng.choice(np.array([0.0, -0.0, -1.0, -np.inf, -3.0], dtype), size=(60, V))
    logits[:, 0] = [0.0, -0.0] * 30
    for settings in itertools.product((0.5, 1), (None, 1, 2, 4, V - 1), (None, 0.3, 0.85)):
        tokens, log_probs, entropies = sample(xp, logits, rng.random(60), *settings)
        scores = distribution(logits, *settings)
        assert np.abs(entropies - entropy(np.exp(scores), scores)).max() < 1e-5, "another set of tokens is kept"
        assert np.abs(log_probs - scores[np.arange(60), tokens]).max() < 1e-5


@BOTH
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.0, 1 + 1e-7, 1 - 1e-7, -np.inf]), min_size=1,
                       max_size=40),
       temperature=st.sampled_from([1e-3, 1, 1e6]), top_k=st.sampled_from([None, 1, 2, 10 ** 9]),
       top_p=st.sampled_from([None, 1e-30, 0.25, 0.6875]), u=st.floats(0, 1, exclude_max=True))
@example(values=[1 - 1e-7, 1 + 1e-7], temperature=1e6, top_k=None, top_p=1e-30, u=0.5)     # the most likely token alone
@example(values=[-0.0, 1e-45], temperature=1, top_k=5, top_p=0.25, u=0.0)
def test_nearly_equal_logits_keep_the_tokens_that_numpy_keeps(values, temperature, top_k, top_p, u, dtype, xp):
    logits = np.array([values], dtype)
    if np.isneginf(logits).all():
        logits[0, 0] = 0
    settings = temperature, top_k, top_p
    tokens, log_probs, entropies = sample(xp, logits, np.array([u]), *settings)
    scores = distribution(logits, *settings)
    assert np.isfinite(scores[0, tokens[0]]), "a token that NumPy cuts off"
    assert abs(log_probs[0] - scores[0, tokens[0]]) < 1e-5
    assert abs(entropies[0] - entropy(np.exp(scores), scores)[0]) < 1e-4


@BOTH
def test_ties_of_top_k_in_a_later_segment_are_cut_too_and_cost_one_more_pass_and_walk(dtype, emulated):
    V = 5000
    logits, uniforms = np.zeros((1, V), dtype), np.array([1 - 2.0 ** -53])
    logits[:, 4000] = -1
    with emulator.checked():
        tokens = sample(emulated, logits, uniforms, 1, 4500)[0]
        read, written = sampling.sample_bytes(V, dtype, tokens.tolist(), 1, 4500)
        assert tokens.tolist() == [4500] and moved()[1] == written
        assert V <= (moved()[0] - read) / np.dtype(dtype).itemsize < 2 * V


@BOTH
@pytest.mark.parametrize("top_p, kept", [(0.1, {9}), (0.2, {9}), (0.3, {9, 2}), (0.4, {9, 2, 3}), (0.55, {9, 2, 3, 6}),
                                         (0.7, {9, 2, 3, 6, 8}), (0.85, {9, 2, 3, 6, 8, 1, 4}),
                                         (0.92, {9, 2, 3, 6, 8, 1, 4, 7}), (0.95, {9, 2, 3, 6, 8, 1, 4, 7, 0}),
                                         (0.99, set(range(10)))])
def test_top_p_keeps_the_first_of_equals_as_many_as_it_needs(top_p, kept, dtype, xp):
    logits, uniforms = tied(dtype)[:1].repeat(64, axis=0), (np.arange(64) + 0.5) / 64
    actual = sample(xp, logits, uniforms, 1, None, top_p)
    assert set(actual[0]) == kept
    assert_same_draws(actual, sorted_sample(logits, uniforms, 1, None, top_p))


@BOTH
def test_top_p_keeps_the_token_that_crosses_the_line_and_none_beyond(dtype, xp):
    """Sixteen equal tokens: 1/2 is reached by exactly eight."""
    logits, uniforms = np.zeros((64, 16), dtype), (np.arange(64) + 0.5) / 64
    for top_p, count in (0.5, 8), (0.5 + 1e-6, 9), (1 / 16, 1), (1e-9, 1), (15 / 16, 15):
        assert set(sample(xp, logits, uniforms, 1, None, top_p)[0]) == set(range(count))


@BOTH
def test_ties_are_cut_in_a_later_segment_too(dtype, xp):
    """5,000 tokens, all but one equal: the last one that top_p needs lies in another warp's segment than the first."""
    logits = np.zeros((4, 5000), dtype)
    logits[:, 4000] = 1
    uniforms = np.array([0, 0.3, 0.999, 1 - 2.0 ** -53])
    actual = sample(xp, logits, uniforms, 1, None, 0.7)
    assert_same_draws(actual, sorted_sample(logits, uniforms, 1, None, 0.7))
    assert actual[0][3] == 4000 and 3400 < actual[0][2] < 3600


@BOTH
def test_a_uniform_of_0_draws_the_first_token_with_weight_and_one_just_below_1_the_last(dtype, xp, rng):
    logits = rng.normal(size=(2, 100)).astype(dtype)
    logits[:, :10] = logits[:, 90:] = -np.inf
    tokens, log_probs, _ = sample(xp, logits, np.array([0, 1 - 2.0 ** -53]))
    assert tokens.tolist() == [10, 89] and np.isfinite(log_probs).all()


@BOTH
def test_temperature_0_draws_the_first_of_equal_highest_tokens(dtype, xp):
    logits = np.array([[1, 3, 2, 3, 3], [5, 5, 5, 5, 5], [-np.inf, -np.inf, 2, -np.inf, 2]]).astype(dtype)
    tokens, log_probs, entropies = sample(xp, logits, np.full(3, 0.99), 0)
    assert tokens.tolist() == [1, 0, 2]
    assert_close(np.exp(log_probs[1:]), [0.2, 0.5], 1e-6)
    assert_close(np.exp(entropies[1:]), [5, 2], 1e-6)


@BOTH
@pytest.mark.parametrize("settings", [(1, None, None), (2, 3, None), (1, None, 0.9), (1, 30, 0.9), (0, None, None)],
                         ids=str)
def test_hard_logits_are_right(settings, dtype, xp, rng):
    V, u = 65, rng.random(6)
    logits = np.array([rng.normal(size=V) * 1e4, 1e4 + rng.normal(size=V), np.full(V, -7.5), np.zeros(V),
                       rng.normal(size=V), np.full(V, -np.inf)])
    logits[4, ::2] = np.finfo(dtype).min
    logits[5, 40] = 3
    logits = logits.astype(dtype)
    expected = (sorted_sample if settings[0] else numpy_sample)(logits, u, *settings)
    assert_same_draws(sample(xp, logits, u, *settings), expected)


@BOTH
@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("settings", [(1, None, None), (1, 3, 0.9), (0, None, None)], ids=str)
def test_a_row_without_a_distribution_gives_token_0_and_nan_as_numpy_does(settings, dtype, xp, rng):
    """The log-prob is NaN in NumPy's formula too; generate.sample raises. An error here would wait for the GPU."""
    logits = rng.normal(size=(5, 40)).astype(dtype)
    logits[0, 7], logits[1], logits[2, 9], logits[3, :3] = np.nan, -np.inf, np.inf, np.nan
    tokens, log_probs, entropies = sample(xp, logits, np.full(5, 0.5), *settings)
    assert tokens[:4].tolist() == [0] * 4 and np.isnan(log_probs[:4]).all() and np.isnan(entropies[:4]).all()
    with np.errstate(invalid="ignore"):
        assert np.isnan(distribution(logits, settings[0] or 1, *settings[1:])[:4]).all()
    assert np.isfinite([log_probs[4], entropies[4]]).all()
    for row in logits[:4]:
        with pytest.raises(ValueError, match="sample: the largest logit, row 0, is "):
            checked_sample(row[None], np.array([0.5]), *settings)


@BOTH
def test_a_uniform_outside_0_to_1_gives_a_log_prob_of_nan(dtype, xp, rng):
    logits = rng.normal(size=(5, 40)).astype(dtype)
    logits[1] = 0                           # the sum of its weights is exact in float64
    tokens, log_probs, entropies = sample(xp, logits, np.array([-0.1, 1.0, 7e300, np.nan, 0.5]))
    assert np.isnan(log_probs).tolist() == [True] * 4 + [False]
    assert np.isfinite(entropies).all() and ((0 <= tokens) & (tokens < 40)).all()


@BOTH
def test_no_rows_need_no_launch(dtype, xp):
    tokens, log_probs, entropies = sample(xp, np.zeros((0, 7), dtype), np.zeros(0))
    assert tokens.shape == log_probs.shape == entropies.shape == (0,) and log_probs.dtype == dtype


# Errors, before anything is launched.

ERRORS = {
    "half precision": ({"logits": np.zeros((2, 5), np.float16)},
                       "the kernels compute in float32 or float64, not in float16"),
    "one axis": ({"logits": np.zeros(5)}, "logits has shape (5,); this kernel takes (any, any)"),
    "transposed": ({"logits": np.zeros((5, 2)).T}, "logits is not contiguous; pass a contiguous copy"),
    "no vocabulary": ({"logits": np.zeros((2, 0))},
                      "logits (B,V) has V = 0; V must be at least 1"),
    "uniforms in float32": ({"uniforms": np.zeros(2, np.float32)}, "uniforms is float32; this kernel takes float64"),
    "a uniform too many": ({"uniforms": np.zeros(3)}, "uniforms has shape (3,); this kernel takes (2)"),
    "strided uniforms": ({"uniforms": np.zeros(4)[::2]}, "uniforms is not contiguous; pass a contiguous copy"),
    "negative temperature": ({"temperature": -1},
                             "sample: temperature is -1; it must be a finite number at least 0.001 and at most "
                             "1000000.0, or 0 for greedy decoding"),
    "infinite temperature": ({"temperature": np.inf},
                             "sample: temperature is inf; it must be a finite number at least 0.001 and at most "
                             "1000000.0, or 0 for greedy decoding"),
    "vanishing temperature": ({"logits": np.zeros((2, 5), np.float32), "temperature": 1e-50},
                              "sample: temperature is 1e-50; it must be a finite number at least 0.001 and at most "
                              "1000000.0, or 0 for greedy decoding"),
    "no token": ({"top_k": 0}, "sample: top_k is 0; it must be at least 1"),
    "no probability": ({"top_p": 0}, "sample: top_p is 0; it must be a finite number above 0 and at most 1"),
    "too much probability": ({"top_p": 1.5}, "sample: top_p is 1.5; it must be a finite number above 0 and at most 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_unsupported_arrays_and_settings_raise_with_what_is_supported(case, emulated, monkeypatch):
    change, message = ERRORS[case]
    arguments = {"logits": np.zeros((2, 5)), "uniforms": np.zeros(2), **change}
    for name in "logits", "uniforms":
        device = emulated.empty(1)
        device._backing = arguments[name]                   # with its strides
        arguments[name] = device
    monkeypatch.setattr(sampling, "launch", lambda *_: pytest.fail("launched"))
    with pytest.raises((TypeError, ValueError)) as error:
        sampling.sample(**arguments)
    assert str(error.value) == message


# Under the checkers: no fault, bytes counted, the same in every order of threads and blocks.

@BOTH
@pytest.mark.parametrize("V", VOCABULARIES)
def test_no_checker_finds_a_fault_and_the_bytes_equal_the_formula(V, dtype, emulated, rng):
    logits, uniforms = rng.normal(size=(2, V)).astype(dtype), rng.random(2)
    for settings in (1, None, None), (0.7, 5, 0.8), (0, None, None):
        with emulator.checked():
            tokens = sample(emulated, logits, uniforms, *settings)[0]
            assert moved() == sampling.sample_bytes(V, dtype, tokens.tolist(), *settings)


def moved():
    """Bytes that the last launch read and wrote."""
    return tuple(map(sum, zip(*emulator.traffic().values())))


@BOTH
def test_every_order_of_threads_and_blocks_gives_the_same_bits(dtype, emulated, rng):
    logits, uniforms = rng.normal(size=(5, 600)).astype(dtype), rng.random(5)
    def run():
        return sample(emulated, logits, uniforms, 1.2, 100, 0.9)
    once = run()
    for schedule in "forward", "reversed", 1, 2:
        for running in emulator.checked, emulator.fast:
            with running(schedule):
                assert all(np.array_equal(a, b) for a, b in zip(run(), once))


@BOTH
def test_the_number_of_threads_does_not_change_the_tokens(dtype, emulated, rng, monkeypatch):
    logits, uniforms = rng.normal(size=(20, 700)).astype(dtype), rng.random(20)
    tokens = []
    for threads in 32, 96, 512:
        monkeypatch.setattr(sampling, "_threads", lambda V: threads)
        tokens.append(sample(emulated, logits, uniforms, 1.2, 100, 0.9)[0].tolist())
    assert tokens[0] == tokens[1] == tokens[2]


# Bugs, each detected.

MUTANTS = [
    ("the temperature is ignored", "(highest - logits[j]) / temperature", "(highest - logits[j])", "numbers"),
    ("all tokens that equal the last one of top-p are kept", "(bits == limit && j > last)", "false", "numbers"),
    ("one tied token too many is kept", "segments, needed - 1) : V", "segments, needed) : V", "numbers"),
    ("the number of tied tokens that top-p needs is rounded down", "(target - below + each - 1) / each",
     "(target - below) / each", "checker"),
    ("top-k counts to one beyond", "below + of_digit[digit] < target", "below + of_digit[digit] <= target", "checker"),
    ("top-k keeps all tokens that equal the k-th", "if (needed < equal)", "if (false)", "numbers"),
    ("the last tied token of top-k cuts the ties of top-p too", "segments, needed - 1) : V;",
     "segments, needed - 1) : kept.last;", "checker"),
    ("a highest logit of -0 stays -0", "block_max(row.highest, scratch) + real(0)", "block_max(row.highest, scratch)",
     "numbers"),
    ("top-k holds at temperature 0 too", "top_k > 0 && !greedy", "top_k > 0", "numbers"),
    ("a scan that adds lanes beyond the first", "if (lane >= other) sum += lower;", "sum += lower;", "numbers"),
    ("a token without weight is drawn by a uniform of 0", "before + sum > target", "before + sum >= target",
     "numbers"),
    ("the last segment runs beyond the row", "return min(V, (steps + warps - 1) / warps * 32 * warp);",
     "return (steps + warps - 1) / warps * 32 * warp;", "checker"),
    ("NaN is ignored, and becomes a whole number", "isnan(x) ? -NEGATIVE_INFINITY : fmax(row.highest, x)",
     "fmax(row.highest, x)", "checker"),
    ("a uniform of 1 finds no token", "min(Mass(u * double(total)), total - 1)", "Mass(u * double(total))", "checker"),
    ("a search adds up the warps before all have counted",
     "        __syncthreads();\n        if (threadIdx.x < DIGITS)", "        if (threadIdx.x < DIGITS)", "checker"),
    ("a segment's sum is written while others still read the last one",
     "    __syncthreads();                                        // until", "    // until", "checker"),
    ("the token is read before it is found", "    __syncthreads();\n    return found;", "    return found;",
     "checker"),
    ("every block draws for the first row", "const size_t b = blockIdx.x;", "const size_t b = 0;", "checker"),
    ("every thread reads the uniform from memory", "fmin(fmax(uniform, 0.0), 1.0)",
     "fmin(fmax(uniforms[b], 0.0), 1.0)", "bytes"),
]
NAMES = ("bits_of", "Row", "CountOfEqual", "Count", "Weight", "Kept", "search", "segment_begin", "add_segments",
         "crossing", "sample", "warp_sum", "Mass", "Bits", "DIGIT_BITS", "DIGITS", "WARPS")


@pytest.fixture(scope="module")
def mutated():
    return kernel_mutants.all_in_one(sampling, MUTANTS, NAMES)


@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[words for words, *_ in MUTANTS])
def test_a_bug_is_found_by_a_checker_the_numbers_or_the_bytes(i, mutated, emulated, monkeypatch):
    kernel_mutants.use(monkeypatch, sampling, mutated, i)
    assert kernel_mutants.detected_by(lambda: check(emulated), sampling) == MUTANTS[i][-1]


def check(xp):
    """Asserts that the draws are right, in float64. Returns whether the bytes are."""
    rng, bytes_right = np.random.default_rng(5), True
    logits, uniforms = rng.normal(size=(4, 300)) * 2, rng.random(4)
    logits[:, :3], uniforms[0] = -np.inf, 0
    for settings in (1, None, None), (1.5, 3, None), (0.7, 40, 0.8), (0, 3, 0.5):
        actual = sample(xp, logits, uniforms, *settings)
        bytes_right &= moved() == sampling.sample_bytes(300, np.float64, actual[0].tolist(), *settings)
        assert_same_draws(actual, (sorted_sample if settings[0] else numpy_sample)(logits, uniforms, *settings))
    test_top_k_keeps_exactly_k_tokens_of_equals_the_first(3, np.float64, xp)
    for values, settings in ([0, -0.0, -5, -6], (1, 2, None)), ([0, 1, 1, 1, 0], (1, 4, 0.85)):
        row, u = np.array([values], float), np.array([0.3])
        assert_same_draws(sample(xp, row, u, *settings), numpy_sample(row, u, *settings))
    test_top_p_keeps_the_first_of_equals_as_many_as_it_needs(0.55, {9, 2, 3, 6}, np.float64, xp)
    test_a_uniform_outside_0_to_1_gives_a_log_prob_of_nan(np.float64, xp, rng)
    test_a_row_without_a_distribution_gives_token_0_and_nan_as_numpy_does((1, None, None), np.float64, xp, rng)
    return bytes_right


def test_nothing_is_found_without_a_bug(emulated):
    assert kernel_mutants.detected_by(lambda: check(emulated), sampling) is None
