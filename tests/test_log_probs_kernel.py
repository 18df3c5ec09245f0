"""kernels/log_probs.cu: the numbers, the bytes, the errors, and planted bugs that are found."""
import numpy as np
import pytest

import kernel_mutants
from helpers import assert_close, peak_memory
from minilm import layers
from minilm.kernels import emulator, log_probs

VOCABULARIES = [1, 7, 31, 32, 33, 65, 128, 200, 1000, 5000]
BOTH = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def plain(logits, targets, dy):
    """log_probs, lse, entropies and dlogits by the formulas, in the precision of the logits."""
    highest = logits.max(axis=-1, keepdims=True)
    E = np.exp(logits - highest)
    total = E.sum(axis=-1, keepdims=True)
    log_p = logits - highest - np.log(total)
    p = E / total
    rows = np.arange(len(logits))
    dlogits = -dy[:, None] * p
    dlogits[rows, targets] += dy
    entropies = -np.where(p > 0, p * np.where(p > 0, log_p, 0), p * 0).sum(axis=-1)
    return log_p[rows, targets], (highest + np.log(total))[:, 0], entropies, dlogits


def batch(rng, N, V, dtype=np.float64, scale=1.0):
    """logits (N,V), targets (N,), dy (N,)"""
    return (rng.normal(size=(N, V)) * scale).astype(dtype), rng.integers(0, V, N), rng.normal(size=N).astype(dtype)


def kernel(xp, logits, targets, dy):
    """The results of plain(), from the kernels."""
    logits, targets, dy = map(xp.asarray, (logits, targets, dy))
    log_probs_, lse, entropies = log_probs.forward(logits, targets, entropy=True)
    return [a.get() for a in (log_probs_, lse, entropies, log_probs.backward(logits, targets, lse, dy))]


def assert_as_good(actual, inputs):
    """float32: at most twice the error of the plain formulas in float32 (the gradient three times)."""
    exact = plain(*(a.astype(np.float64) if a.dtype == np.float32 else a for a in inputs))
    for a, naive, b, factor in zip(actual, plain(*inputs), exact, (2, 2, 2, 3)):
        assert np.array_equal(np.isinf(a), np.isinf(b))
        a, naive, b = map(finite, (a, naive, b))
        allowed = factor * np.abs(naive - b).max() + 4 * np.finfo(np.float32).eps * np.abs(b).max()
        assert np.abs(a - b).max() <= allowed, (np.abs(a - b).max(), allowed)


def finite(a):
    return np.where(np.isinf(a), 0, a)


# The numbers.

@pytest.mark.parametrize("V", VOCABULARIES)
def test_log_probs_entropies_and_gradients_equal_the_formulas(V, xp, rng):
    for N in 1, 3, 8:
        inputs = batch(rng, N, V)
        for actual, expected in zip(kernel(xp, *inputs), plain(*inputs)):
            assert_close(actual, expected)
        inputs = batch(rng, N, V, np.float32)
        assert_as_good(kernel(xp, *inputs), inputs)


def hard(dtype):
    """Rows that break formulas: {name: (logits (V,), target)}"""
    rng, V = np.random.default_rng(1), 65
    huge, masked, alone, lowest = rng.normal(size=V) * 1e4, rng.normal(size=V), np.full(V, -np.inf), rng.normal(size=V)
    masked[::3], alone[7], lowest[:40] = -np.inf, 3, np.finfo(dtype).min
    return {"of 1e4": (huge, 3), "their highest": (huge, huge.argmax()), "around 1e4": (1e4 + lowest.clip(-3), 5),
            "all equal": (np.full(V, 2.5), 64), "zero": (np.zeros(V), 0), "growing": (np.arange(V) * 20.0, 64),
            "falling": (np.arange(V) * -20.0, 64), "masked, the target not": (masked, 1), "masked too": (masked, 0),
            "alone": (alone, 7), "another is alone": (alone, 8), "masked with the lowest number": (lowest, 50),
            "all masked but the last": (np.r_[[-np.inf] * 64, 0.0], 64)}


@BOTH
def test_hard_logits_are_right(dtype, xp):
    rows, targets = zip(*hard(dtype).values())
    inputs = np.array(rows).astype(dtype), np.array(targets), np.linspace(-1, 1, len(rows)).astype(dtype)
    results = kernel(xp, *inputs)
    for i, name in enumerate(hard(dtype)):
        actual, row = [a[i:i + 1] for a in results], [a[i:i + 1] for a in inputs]
        if dtype == np.float32:
            assert_as_good(actual, row)
            continue
        for a, b in zip(actual, plain(*row)):
            assert np.array_equal(np.isinf(a), np.isinf(b)), name
            assert_close(finite(a), finite(b), name=name)


@BOTH
@pytest.mark.filterwarnings("ignore:overflow")
def test_log_probs_and_entropies_are_right_where_the_difference_of_two_logits_overflows(dtype, xp):
    largest = np.finfo(dtype).max
    for V in (2, 33, 300):
        logits = np.where(np.arange(3 * V).reshape(3, V) % 3, dtype(-1), dtype(1)) * largest
        targets = logits.argmax(axis=1)
        actual, _, entropies = log_probs.forward(xp.asarray(logits), xp.asarray(targets), entropy=True)
        expected, _, right, _ = plain(logits, targets, np.ones(3, dtype))
        assert_close(actual.get(), expected, 1e-6)
        assert_close(entropies.get(), right, 1e-6)


@BOTH
def test_rows_without_a_log_prob_are_nan_and_no_others(dtype, xp, rng):
    logits, targets, dy = batch(rng, 9, 40, dtype)
    expected = plain(logits, targets, dy)
    logits[1, 30], logits[2, 5] = np.nan, np.inf
    logits[3] = -np.inf
    logits[4, :] = np.nan
    targets[5:8] = -1, 40, 2 ** 40
    for actual, right in zip(kernel(xp, logits, targets, dy), expected):
        lost = np.isnan(actual).reshape(9, -1)
        assert not lost[[0, 8]].any()
        assert_close(actual[[0, 8]], right[[0, 8]], 1e-5)
        if right is expected[0] or right is expected[3]:
            assert lost[1:8].all()
        else:                               # lse and entropy know nothing of the target
            assert lost[[1, 2, 4]].all() or right is expected[1]
            assert_close(actual[5:8], right[5:8], 1e-5)


def test_the_gradient_equals_finite_differences(xp, rng):
    N, V, step = 3, 33, 1e-5
    logits, targets, dy = batch(rng, N, V)
    analytic = kernel(xp, logits, targets, dy)[3]
    steps = np.eye(V) * step                # one launch: a row for every logit that is moved
    def moved(sign):
        rows = (logits[:, None] + sign * steps).reshape(N * V, V)
        return log_probs.forward(*map(xp.asarray, (rows, targets.repeat(V))))[0].get().reshape(N, V)
    assert_close(analytic, dy[:, None] * (moved(1) - moved(-1)) / (2 * step), 1e-6)


@BOTH
def test_the_gradient_can_be_written_over_the_logits(dtype, emulated, rng):
    logits, targets, dy = map(emulated.asarray, batch(rng, 3, 200, dtype))
    lse = log_probs.forward(logits, targets)[1]
    apart = log_probs.backward(logits, targets, lse, dy).get()
    with emulator.checked():
        assert log_probs.backward(logits, targets, lse, dy, out=logits) is logits
    assert np.array_equal(logits.get(), apart)


def test_targets_of_32_bits_give_the_same(xp, rng):
    logits, targets, dy = batch(rng, 3, 7)
    for a, b in zip(kernel(xp, logits, targets.astype(np.int32), dy), kernel(xp, logits, targets, dy)):
        assert np.array_equal(a, b)


@BOTH
def test_no_rows_need_no_launch(dtype, xp, rng):
    log_probs_, lse, entropies, dlogits = kernel(xp, *batch(rng, 0, 7, dtype))
    assert log_probs_.shape == lse.shape == entropies.shape == (0,) and dlogits.shape == (0, 7)
    assert (log_probs_.dtype, lse.dtype, entropies.dtype, dlogits.dtype) == (dtype, np.float64, dtype, dtype)


# From hidden states, a chunk at a time.

def linear_batch(rng, N=11, V=33, D=5, dtype=np.float64):
    return ((rng.normal(size=(N, D))).astype(dtype), rng.normal(size=(V, D)).astype(dtype), rng.integers(0, V, N),
            rng.normal(size=N).astype(dtype))


@pytest.mark.parametrize("N", [1, 8, 11])
@pytest.mark.parametrize("chunk", [None, 1, 4, 8, 50])
def test_log_probs_from_hidden_states_equal_the_layer(N, chunk, xp, rng):
    hidden, unembedding, targets, dy = linear_batch(rng, N)
    expected, vjp = layers.token_log_probs.__wrapped__(hidden, unembedding, targets)
    dhidden, dunembedding = vjp(dy)
    arrays = list(map(xp.asarray, (hidden, unembedding, targets)))
    actual, lse, entropies, logits = log_probs.linear_forward(*arrays, chunk=chunk, entropy=True)
    assert_close(actual.get(), expected)
    assert_close(entropies.get(), plain(hidden @ unembedding.T, targets, dy)[2])
    assert (logits is None) == (chunk is not None and chunk < N)
    for kept in {id(a): a for a in (None, logits)}.values():        # computed again, and then, if kept, overwritten
        gradients = log_probs.linear_backward(*arrays, lse, xp.asarray(dy), logits=kept, chunk=chunk)
        for gradient, right in zip(gradients, (dhidden, dunembedding.write())):
            assert_close(gradient.get(), right)


def test_no_hidden_states_give_no_log_probs_and_a_gradient_of_zero(xp, rng):
    hidden, unembedding, targets, dy = map(xp.asarray, linear_batch(rng, 0))
    actual, lse, entropies, logits = log_probs.linear_forward(hidden, unembedding, targets)
    assert actual.shape == lse.shape == (0,) and entropies is None and logits is None
    dhidden, dunembedding = log_probs.linear_backward(hidden, unembedding, targets, lse, dy)
    assert dhidden.shape == (0, 5) and dunembedding.shape == (33, 5) and not dunembedding.get().any()


def test_only_one_chunk_of_logits_is_in_memory(emulated, rng):
    N, V, chunk = 256, 1000, 16
    hidden, unembedding, targets, dy = map(emulated.asarray, linear_batch(rng, N, V, 4))
    log_probs.linear_forward(hidden[:1], unembedding, targets[:1])                  # compiled
    def both():
        lse = log_probs.linear_forward(hidden, unembedding, targets, chunk)[1]
        log_probs.linear_backward(hidden, unembedding, targets, lse, dy, chunk=chunk)
    chunk_bytes, gradient_bytes = chunk * V * 8, (N + 2 * V) * 4 * 8                # dU, and one product added to it
    assert peak_memory(both) < chunk_bytes + gradient_bytes + 100_000 < N * V * 8 / 5


def test_a_chunk_has_as_many_rows_as_fit_the_logits_held(emulated, rng, monkeypatch):
    hidden, unembedding, targets, _ = map(emulated.asarray, linear_batch(rng, 11, 33))
    rows, forward = [], log_probs._forward
    def counted(xp, logits, *rest):
        rows.append(len(logits))
        forward(xp, logits, *rest)
    monkeypatch.setattr(log_probs, "_forward", counted)
    monkeypatch.setattr(log_probs, "SHARE_HELD", 0)
    monkeypatch.setattr(log_probs, "LOGITS_HELD", 4 * 33 + 5)
    log_probs.linear_forward(hidden, unembedding, targets)
    monkeypatch.setattr(log_probs, "LOGITS_HELD", 5)
    log_probs.linear_forward(hidden[:2], unembedding, targets[:2])
    monkeypatch.setattr(log_probs, "SHARE_HELD", 7.5 * 33 * 8 / log_probs._memory(emulated))
    log_probs.linear_forward(hidden, unembedding, targets)
    assert rows == [4, 4, 3, 1, 1, 7, 4]


# Errors, before anything is launched.

def contiguous(name):
    return f"{name} is not contiguous; pass a contiguous copy"


# (the change, the message); the first seven concern the arguments of forward too.
ERRORS = {
    "half precision": (lambda a: {"logits": a["logits"].astype(np.float16)},
                       "the kernels compute in float32 or float64, not in float16"),
    "one axis": (lambda a: {"logits": a["logits"].reshape(-1)},
                 "logits has shape (21,); this kernel takes (any, any)"),
    "transposed logits": (lambda a: {"logits": a["logits"].T.copy().T}, contiguous("logits")),
    "no vocabulary": (lambda a: {"logits": a["logits"][:, :0].copy()},
                      "logits (N,V) has V = 0; V must be at least 1"),
    "real targets": (lambda a: {"targets": a["dy"]}, "targets is float64; this kernel takes int64"),
    "strided targets": (lambda a: {"targets": a["targets"].repeat(2)[::2]}, contiguous("targets")),
    "a target too many": (lambda a: {"targets": np.zeros(4, int)}, "targets has shape (4,); this kernel takes (3)"),
    "lse in float32": (lambda a: {"lse": a["lse"].astype(np.float32)}, "lse is float32; this kernel takes float64"),
    "dy in float32": (lambda a: {"dy": a["dy"].astype(np.float32)}, "dy is float32; this kernel takes float64"),
    "dy of another shape": (lambda a: {"dy": a["dy"][:, None]}, "dy has shape (3, 1); this kernel takes (3)"),
    "out transposed": (lambda a: {"out": a["logits"].T.copy()}, "out has shape (7, 3); this kernel takes (3, 7)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_unsupported_arrays_raise_with_what_is_supported(case, emulated, rng, monkeypatch):
    logits, targets, dy = batch(rng, 3, 7)
    change, message = ERRORS[case]
    arguments = {"logits": logits, "targets": targets, "lse": np.zeros(3), "dy": dy, "out": np.zeros((3, 7))}
    arguments = {name: on_device(emulated, a) for name, a in (arguments | change(arguments)).items()}
    monkeypatch.setattr(log_probs, "launch", lambda *_: pytest.fail("launched"))
    with pytest.raises((TypeError, ValueError)) as error:
        log_probs.backward(**arguments)
    assert str(error.value) == message
    if case in list(ERRORS)[:7]:
        with pytest.raises((TypeError, ValueError)) as error:
            log_probs.forward(arguments["logits"], arguments["targets"])
        assert str(error.value) == message


def on_device(emulated, array):
    """The same array with its strides."""
    device = emulated.empty(1)
    device._backing = array
    return device


def test_hidden_states_and_unembedding_must_fit(xp, rng):
    hidden, unembedding, targets, dy = map(xp.asarray, linear_batch(rng))
    for arguments, message in [
            ((hidden, unembedding[:, :4].copy(), targets),
             "unembedding has shape (33, 4); this kernel takes (any, 5)"),
            ((hidden.astype(np.float32), unembedding, targets), "unembedding is float64; this kernel takes float32"),
            ((hidden.reshape(11, 5, 1), unembedding, targets),
             "hidden has shape (11, 5, 1); this kernel takes (any, any)"),
            ((hidden, unembedding[:0], targets),
             "unembedding (V,D) has V = 0; V must be at least 1"),
            ((hidden, unembedding, targets[1:]), "targets has shape (10,); this kernel takes (11)"),
            ((hidden, unembedding, targets, 0), "chunk is 0; it must be at least 1")]:
        with pytest.raises((TypeError, ValueError)) as error:
            log_probs.linear_forward(*arguments)
        assert str(error.value) == message


def test_arrays_of_two_devices_raise(xp, rng):
    logits, targets, _ = batch(rng, 3, 7)
    with pytest.raises(TypeError, match="mixed"):
        log_probs.forward(xp.asarray(logits), targets)


# Under the checkers: no fault, bytes counted, the same in every order of threads and blocks.

@BOTH
@pytest.mark.parametrize("V", VOCABULARIES)
def test_no_checker_finds_a_fault_and_the_bytes_equal_the_formula(V, dtype, emulated, rng):
    for N in 1, 3:
        logits, targets, dy = map(emulated.asarray, batch(rng, N, V, dtype))
        with emulator.checked():
            for entropy in False, True:
                lse = log_probs.forward(logits, targets, entropy)[1]
                assert moved() == log_probs.forward_bytes(N, V, dtype, entropy)
            log_probs.backward(logits, targets, lse, dy)
            assert moved() == log_probs.backward_bytes(N, V, dtype)
            log_probs.backward(logits, targets, lse, dy, out=logits)
            assert moved() == log_probs.backward_bytes(N, V, dtype)


@BOTH
def test_every_order_of_threads_and_blocks_gives_the_same_bits(dtype, emulated, rng):
    inputs = batch(rng, 8, 700, dtype)
    once = kernel(emulated, *inputs)
    for schedule in "forward", "reversed", 1, 2:
        for running in emulator.checked, emulator.fast:
            with running(schedule):
                assert all(np.array_equal(a, b) for a, b in zip(kernel(emulated, *inputs), once))


def moved():
    """Bytes that the last launch read and wrote."""
    return tuple(map(sum, zip(*emulator.traffic().values())))


def test_a_row_is_read_once_and_its_gradient_written_once(xp):
    """The minimum, except for a few numbers for each row."""
    N, V, size = 1000, 50_000, 4
    assert log_probs.forward_bytes(N, V, np.float32) == (N * V * size + 8 * N, 12 * N)
    assert log_probs.backward_bytes(N, V, np.float32) == (N * V * size + 20 * N, N * V * size)


# Bugs, each detected.

MUTANTS = [
    ("the sum is not scaled down when the maximum grows", "a.sum *= factor;", ";", "numbers"),
    ("the sum for the entropy is scaled, but still relative to the old maximum",
     "factor * a.weighted + factor * shift * a.sum", "factor * a.weighted", "numbers"),
    ("a masked logit takes part in the arithmetic of infinities", "if (x == NEGATIVE_INFINITY) return a;", "",
     "numbers"),
    ("a masked start of a row is used as numbers", "factor > 0 ? factor * a.weighted + factor * shift * a.sum : 0",
     "factor * a.weighted + factor * shift * a.sum", "numbers"),
    ("the entropy's second term has the wrong sign", "log_sum - weighted / sum", "log_sum + weighted / sum",
     "numbers"),
    ("the maximum of a warp is taken for that of the block", "block_max(sums.highest, scratch)",
     "lanes_max<32>(sums.highest)", "numbers"),
    ("the log-prob is a difference of two large numbers", "(picked - highest) - log_sum",
     "picked - (highest + log_sum)", "numbers"),
    ("the log-sum-exp is rounded to the precision of the logits", "double(highest) + double(log_sum)",
     "highest + log_sum", "numbers"),
    ("backward leaves out the rounding error of the log-sum-exp", "exp((x[e] - high) - low)", "exp(x[e] - high)",
     "numbers"),
    ("the gradient has the wrong sign", "drow[j] = slope", "drow[j] = -slope", "numbers"),
    ("a target outside the vocabulary gets a gradient", "0 <= target && target < V ? dy[n]", "true ? dy[n]",
     "numbers"),
    ("forward reads one logit too far", "j < V ? row[j] : NEGATIVE", "j <= V ? row[j] : NEGATIVE", "checker"),
    ("backward writes one gradient too far", "if (j < V) drow[j]", "if (j <= V) drow[j]", "checker"),
    ("a logit beyond the row counts as 0", "row[j] : NEGATIVE_INFINITY; ", "row[j] : real(0); ", "numbers"),
    ("a target behind the last token is found", "if (j < V && j == target)", "if (j == target)", "numbers"),
    ("a thread takes four logits alone", "first += IN_FLIGHT * blockDim.x) {\n        real x[IN_FLIGHT];\n"
     "        #pragma unroll\n        for (int e = 0; e < IN_FLIGHT; ++e) {\n"
     "            const int j = first + e * blockDim.x;\n            x[e] = j < V ? row[j] : NEGATIVE",
     "first = V) {\n        real x[IN_FLIGHT];\n"
     "        #pragma unroll\n        for (int e = 0; e < IN_FLIGHT; ++e) {\n"
     "            const int j = first + e * blockDim.x;\n            x[e] = j < V ? row[j] : NEGATIVE", "numbers"),
    ("a thread steps over the logits of another round", "e * blockDim.x;\n            x[e] = j < V ? row[j] : NEGATIVE",
     "2 * e * blockDim.x;\n            x[e] = j < V ? row[j] : NEGATIVE", "numbers"),
    ("each logit gets the gradient of its neighbour", "x[e] - high", "x[e ^ 1] - high", "numbers"),
    ("every block works on the first row",
     "const size_t n = blockIdx.x;\n    const real* row = logits + n * V;\n    if",
     "const size_t n = 0;\n    const real* row = logits + n * V;\n    if", "checker"),
    ("threads do not wait for the one that reads the target", "    __syncthreads();\n\n    Sums", "\n    Sums",
     "checker"),
    ("backward does not wait for the thread that reads lse and dy", "    __syncthreads();\n\n    for",
     "\n    for", "checker"),
    ("a target outside the vocabulary is used as an address",
     "picked = NEGATIVE_INFINITY - NEGATIVE_INFINITY; ", "picked = row[target]; ", "checker"),
    ("every thread reads the target from memory", "j == target) picked", "j == targets[n]) picked", "bytes"),
    ("the row is read a second time for the maximum", "j < V ? row[j] : NEGATIVE",
     "j < V ? fmax(row[j], row[j]) : NEGATIVE", "bytes"),
]
NAMES = ("IN_FLIGHT", "Sums", "relative_to", "with", "log_probs_forward", "log_probs_backward")


@pytest.fixture(scope="module")
def mutated():
    return kernel_mutants.all_in_one(log_probs, MUTANTS, NAMES)


@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[words for words, *_ in MUTANTS])
def test_a_bug_is_found_by_a_checker_the_numbers_or_the_bytes(i, mutated, emulated, monkeypatch):
    kernel_mutants.use(monkeypatch, log_probs, mutated, i)
    assert kernel_mutants.detected_by(lambda: check(emulated), log_probs) == MUTANTS[i][-1]


def check(xp):
    """Asserts that the numbers are right, in float32. Returns whether the bytes are."""
    inputs = batch(np.random.default_rng(2), 3, 300, np.float32)
    assert_as_good(kernel(xp, *inputs), inputs)
    test_hard_logits_are_right(np.float32, xp)
    test_rows_without_a_log_prob_are_nan_and_no_others(np.float32, xp, np.random.default_rng(3))
    log_probs.forward(*map(xp.asarray, inputs[:2]))
    return moved() == log_probs.forward_bytes(3, 300, np.float32)


def test_nothing_is_found_without_a_bug(emulated):
    assert kernel_mutants.detected_by(lambda: check(emulated), log_probs) is None
