"""minilm.generate: the tokens drawn, their probabilities, and the log-probs returned with them."""
import re
import sys
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from helpers import assert_close, rngs, small_transformer
from minilm import checks, generate as module, plain
from minilm.diverged import Diverged
from minilm.fast import few_rows
from minilm.generate import categorical, distribution, entropy, generate, sample
from minilm.packing import pack
from minilm.tensor import Tensor

PROMPTS = [[1], [2, 3, 4], [5, 6]]
EOS = 0


def plain_distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities of one row, computed token by token in the order of probability."""
    p = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[:top_k]
    if top_p is not None:
        shares, n = p[kept] / p[kept].sum(), 0
        while n < len(kept) and shares[:n].sum() < top_p:
            n += 1
        kept = kept[:n]
    out = np.zeros(len(p))
    out[kept] = p[kept] / p[kept].sum()
    return out


def logits_before_each(model, prompt, response):
    """(R,V), computed over the whole sequence at once, without a cache or a batch."""
    return model(np.array([prompt + response])).data[0, len(prompt) - 1:-1]


def assert_drawn_with(samples, expected):
    """expected(prompt, response): the log-probs (R,) that each response was drawn with."""
    for i, (prompt, response) in enumerate(zip(PROMPTS, samples.responses())):
        assert_close(samples.log_probs[i, :len(response)], expected(prompt, response), 1e-12)


# The log-probs that come with a sample.

MODELS = {"untied": {}, "tied": {"tied": True}, "smeared keys": {"layers": 2, "kv_heads": 1, "key_smear": True},
          "grouped, deeper": {"layers": 2, "heads": 4, "kv_heads": 2, "head_width": 4, "rope_pairing": "interleaved",
                              "rope_base": 50.0, "norm_eps": 0.1}}


@pytest.mark.parametrize("kind", MODELS)
@given(rng=rngs)
def test_cached_and_padded_generation_has_the_log_probs_of_the_whole_forward(kind, rng):
    model = small_transformer(rng, **MODELS[kind])

    def expected(prompt, response):
        logits = logits_before_each(model, prompt, response)
        return np.log([plain_distribution(row)[token] for row, token in zip(logits, response)])
    assert_drawn_with(generate(model, PROMPTS, 8, rng, EOS), expected)


@given(rng=rngs, temperature=st.sampled_from([0.5, 1.7]), top_k=st.none() | st.integers(1, 8),
       top_p=st.none() | st.sampled_from([0.01, 0.5, 0.9, 1.0]))
def test_log_probs_belong_to_the_distribution_drawn_from(rng, temperature, top_k, top_p):
    model, settings = small_transformer(rng), {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    def expected(prompt, response):
        logits = logits_before_each(model, prompt, response)
        return np.log([plain_distribution(row, **settings)[token] for row, token in zip(logits, response)])
    assert_drawn_with(generate(model, PROMPTS, 8, rng, EOS, **settings), expected)


@given(rng=rngs, temperature=st.sampled_from([0.3, 1.0, 2.5]))
def test_log_probs_recomputed_at_the_same_temperature_equal_the_samples(rng, temperature):
    """The on-policy ratio is 1 at the temperature of sampling, and differs from 1 at another temperature."""
    model = small_transformer(rng)
    samples = generate(model, PROMPTS, 8, rng, EOS, temperature=temperature)

    def recomputed(prompt, response, temperature=temperature):
        return model.log_probs(np.array([prompt + response]), temperature=temperature).data[0, len(prompt) - 1:]
    assert_drawn_with(samples, recomputed)
    with pytest.raises(AssertionError):
        assert_drawn_with(samples, lambda *sample: recomputed(*sample, temperature=temperature + 1))


def test_float32_models_give_float32_log_probs(rng):
    assert generate(small_transformer(rng, np.float32), PROMPTS, 4, rng, EOS).log_probs.dtype == np.float32


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"top_p": 0.7},
                                      {"temperature": 0}], ids=str)
def test_entropies_belong_to_the_distributions_drawn_from_and_are_0_on_padding(settings, rng):
    model = small_transformer(rng)
    samples = generate(model, PROMPTS, 8, rng, EOS, **settings)
    drawn_from = {**settings, "temperature": settings.get("temperature", 1) or 1}
    expected = np.zeros(samples.mask.shape)
    for i, (prompt, response) in enumerate(zip(PROMPTS, samples.responses())):
        for t, row in enumerate(logits_before_each(model, prompt, response)):
            p = plain_distribution(row, **drawn_from)
            expected[i, t] = -sum(q * np.log(q) for q in p if q > 0)
    assert_close(samples.entropies, expected, 1e-12)


# Where a response ends, and independence of the other rows.

@given(rng=rngs)
def test_a_response_ends_with_its_eos_which_the_mask_includes(rng):
    samples = generate(small_transformer(rng), PROMPTS * 5, 10, rng, EOS)
    assert samples.tokens.shape == samples.mask.shape == samples.log_probs.shape
    assert samples.tokens.shape[1] == samples.mask.sum(axis=1).max()             # no column holds padding alone
    for row, mask, log_probs, response in zip(samples.tokens, samples.mask, samples.log_probs, samples.responses()):
        n = len(response)
        assert mask.tolist() == [1] * n + [0] * (len(row) - n) and not log_probs[n:].any()
        assert EOS not in response[:-1] and (response[-1] == EOS or n == 10)


@given(seed=st.integers(0, 2 ** 32 - 1))
def test_a_response_does_not_depend_on_when_the_others_end(seed):
    model = small_transformer(np.random.default_rng(seed))
    whole = generate(model, PROMPTS, 10, np.random.default_rng(1), eos=None)
    cut = generate(model, PROMPTS, 10, np.random.default_rng(1), EOS)
    assert whole.mask.all() and whole.tokens.shape == (3, 10)
    for long, short in zip(whole.tokens.tolist(), cut.responses()):
        assert short == (long[:long.index(EOS) + 1] if EOS in long else long)


@given(seed=st.integers(0, 2 ** 32 - 1))
def test_a_response_does_not_depend_on_the_other_prompts(seed):
    model = small_transformer(np.random.default_rng(seed))
    others = [[3, 3, 3, 3], PROMPTS[1], [1]]
    one, other = (generate(model, prompts, 10, np.random.default_rng(1), EOS) for prompts in (PROMPTS, others))
    assert one.responses()[1] == other.responses()[1]


def test_the_same_seed_draws_the_same_and_another_seed_does_not():
    model = small_transformer(np.random.default_rng(0))
    a, b, c = (generate(model, PROMPTS, 10, np.random.default_rng(seed), None).tokens for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


# Greedy decoding.

@given(rng=rngs)
def test_temperature_zero_takes_the_most_likely_token_with_the_models_own_log_prob(rng):
    model = small_transformer(rng)
    samples = generate(model, PROMPTS, 8, rng, EOS, temperature=0)
    for prompt, response in zip(PROMPTS, samples.responses()):
        assert response == logits_before_each(model, prompt, response).argmax(axis=-1).tolist()
    assert_drawn_with(samples, lambda prompt, response: np.log([
        plain_distribution(row).max() for row in logits_before_each(model, prompt, response)]))


# The distribution, and draws from it.

@given(rng=rngs, temperature=st.sampled_from([0.1, 1.0, 3.0]), top_k=st.none() | st.integers(1, 12),
       top_p=st.none() | st.floats(0.001, 1.0))
def test_the_distribution_equals_a_plain_loop(rng, temperature, top_k, top_p):
    logits = rng.normal(size=(3, 10))
    p = np.exp(distribution(logits, temperature, top_k, top_p))
    assert_close(p, np.array([plain_distribution(row, temperature, top_k, top_p) for row in logits]))


@given(weights=st.lists(st.sampled_from([0.0, 1.0, 2.0, 4.0]), min_size=1, max_size=8).filter(any),
       top_k=st.integers(1, 9), top_p=st.none() | st.sampled_from([0.31, 0.57, 0.83]))      # no share of at most 32
@example(weights=[4.0, 2.0, 2.0, 1.0], top_k=2, top_p=None)
@example(weights=[1.0, 1.0, 1.0], top_k=1, top_p=None)
def test_of_tied_tokens_those_with_the_smallest_ids_are_kept_as_many_as_needed(weights, top_k, top_p):
    with np.errstate(divide="ignore"):
        logits = np.log([weights])
    assert_close(np.exp(distribution(logits, 1, top_k, top_p))[0], plain_distribution(logits[0], 1, top_k, top_p))


def test_signed_zeros_tie():
    assert np.isfinite(distribution(np.array([[-0.0, 0.0, -0.0]]), top_k=2)).tolist() == [[True, True, False]]


@given(rngs, st.sampled_from([0.01, 0.5, 0.9, 0.999, 1 - 1e-9]), st.booleans())
def test_top_p_of_a_large_vocabulary_keeps_what_sorting_all_of_it_keeps(rng, top_p, ties):
    logits = rng.normal(size=(3, 5000)) * rng.choice([0.1, 3.0, 30.0])
    if ties:
        logits = logits.round(1)
    order = np.argsort(-logits, axis=-1, kind="stable")
    p = np.exp(np.take_along_axis(logits, order, axis=-1))
    cumulative = p.cumsum(axis=-1)
    keep = np.empty(logits.shape, bool)
    np.put_along_axis(keep, order, cumulative - p < top_p * cumulative[:, -1:], axis=-1)
    found = np.isfinite(distribution(logits, top_p=top_p))
    assert (found != keep).sum(axis=1).max() <= 1               # rounding of the two sums
    assert (found.sum(axis=1) > 0).all()


def test_the_token_that_crosses_top_p_is_kept():
    logits = np.log([[0.125, 0.5, 0.25, 0.125]])
    for top_p, kept in ((0.001, 1), (0.5, 1), (0.501, 2), (0.75, 2), (0.751, 3), (1.0, 4)):
        assert np.isfinite(distribution(logits, top_p=top_p)).sum() == kept


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_smallest_top_p_keeps_the_most_likely_token_however_near_the_others_are(dtype):
    logits = np.array([[1, np.nextafter(dtype(1), dtype(2)), 1]], dtype)
    for temperature in (1e-3, 1, 1e6):
        assert np.isfinite(distribution(logits, temperature, top_p=1e-30)).tolist() == [[False, True, False]]


@pytest.mark.parametrize("temperature, kept", [(0.5, 1), (1.0, 2), (2.0, 3)])
def test_top_p_is_applied_after_the_temperature(temperature, kept):
    """8:4:2:1 become 64:16:4:1 at temperature 1/2. The likeliest token has 0.75, 0.53 and 0.39; at 2 the two likeliest
    have 0.67."""
    p = np.exp(distribution(np.log([[1.0, 8.0, 2.0, 4.0]]), temperature, top_p=0.7))
    assert (p > 0).sum() == kept


@given(rng=rngs)
def test_at_evenly_spaced_uniforms_each_token_is_drawn_in_proportion_to_its_probability(rng):
    p, n = rng.dirichlet(np.ones(6)), 1000
    drawn = categorical(np.tile(p, (n, 1)), (np.arange(n) + 0.5) / n)
    assert np.abs(np.bincount(drawn, minlength=6) - n * p).max() <= 1
    assert (np.diff(drawn) >= 0).all()


def test_draws_from_a_large_vocabulary_are_exact_in_float32():
    V = 50_000
    u = (np.array([0, V // 2, V - 1]) + 0.5) / V
    drawn = categorical(np.full((3, V), 1 / V, np.float32), u)
    assert drawn.tolist() == [0, V // 2, V - 1]


@given(rng=rngs)
def test_each_token_is_drawn_with_the_number_of_its_row_and_position(rng):
    model, uniforms = small_transformer(rng), rng.random((3, 8))
    for prompt, response, u in zip(PROMPTS, generate(model, PROMPTS, 8, uniforms, EOS).responses(), uniforms):
        p = [plain_distribution(row) for row in logits_before_each(model, prompt, response)]
        assert response == [np.searchsorted(row.cumsum(), number, side="right") for row, number in zip(p, u)]


@given(rng=rngs)
def test_samples_are_drawn_in_proportion_to_their_probability(rng):
    """Chi-square over the first token: expected 6, with a standard deviation of 3.5; 60 is one in 10^10."""
    model, n = small_transformer(rng), 400
    first = generate(model, [PROMPTS[1]] * n, 1, rng, None, temperature=2.0).tokens[:, 0]
    p = plain_distribution(model(np.array([PROMPTS[1]])).data[0, -1], temperature=2.0)
    expected = n * p
    assert (((np.bincount(first, minlength=7) - expected) ** 2) / expected)[expected > 5].sum() < 60


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("u", [0.0, 0.3, 0.9999999, np.nextafter(1, 0)])
@given(rng=rngs, size=st.integers(1, 300))
@example(rng=np.random.default_rng(0), size=20)
def test_a_token_of_probability_zero_is_never_drawn_and_some_token_always_is(dtype, u, rng, size):
    with np.errstate(divide="ignore"):
        log_probs = np.log(rng.dirichlet(np.ones(size)) * (rng.permutation(size) <= size // 2)).astype(dtype)[None]
    token = categorical(np.exp(log_probs - 0.001), np.array([u]))[0]      # the sum is below 1
    assert token < size and np.isfinite(log_probs[0, token])


# Several end tokens.

@given(rng=rngs, eos=st.none() | st.integers(0, 6) | st.lists(st.integers(0, 6), min_size=1), kind=st.sampled_from(
    [list, tuple, set, frozenset, np.array]))
@example(rng=np.random.default_rng(0), eos=[0, 1, 2], kind=list)           # as many as there are prompts
def test_a_response_ends_with_the_first_of_its_end_tokens(rng, eos, kind):
    model, uniforms = small_transformer(rng), rng.random((3, 8))
    whole = generate(model, PROMPTS, 8, uniforms, None).tokens.tolist()
    ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
    expected = [row[:1 + min([*(row.index(token) for token in ends if token in row), 7])] for row in whole]
    samples = generate(model, PROMPTS, 8, uniforms, kind(eos) if isinstance(eos, list) else eos)
    assert samples.responses() == expected
    assert samples.tokens.shape[1] == max(map(len, expected))


@pytest.mark.parametrize("eos, error, words", [
    ("<eos>", TypeError, "eos is '<eos>' (str); it must be an integer"), ("4", TypeError, "eos is '4' (str)"),
    (True, TypeError, "eos is True (bool)"), (4.0, TypeError, "eos is 4.0 (float)"), ([4.0], TypeError, "eos is 4.0"),
    (np.ones(2), TypeError, "eos is np.float64(1.0)"), ([True], TypeError, "eos is True"),
    ({4: 1}, TypeError, "eos is {4: 1} (dict)"), (np.ones((2, 2), int), TypeError, "eos is ndarray of shape (2, 2)"),
    (-1, ValueError, "eos is -1; it must be at least 0 and below 7"), (7, ValueError, "eos is 7; it must be"),
    ([0, 7], ValueError, "eos is 7; it must be"), ([], ValueError, "eos is []; give None if no token ends a response"),
], ids=str)
def test_an_eos_that_is_no_token_is_refused_by_generate_and_by_its_definition(eos, error, words, rng):
    model = small_transformer(rng)
    with pytest.raises(error, match=re.escape(f"generate: {words}".replace("np.float64(1.0)", repr(np.float64(1))))):
        generate(model, PROMPTS, 4, rng, eos)
    with pytest.raises(error, match="plain.generate: eos is "):
        plain.generate(model.parameters(), PROMPTS, model.config, 4, rng, eos)


# Errors.

NOT_IN_RANGE = "it must be a finite number at least 0.001 and at most 1000000.0, or 0 for greedy decoding"


@pytest.mark.parametrize("prompts, settings, message", [
    ([], {}, "every prompt needs at least one token"),
    ([[1], []], {}, "every prompt needs at least one token"),
    (np.zeros((2, 0), int), {}, "every prompt needs at least one token"),
    ([[1] * 9], {}, "a prompt of 9 tokens and 8 new ones do not fit the context of 16"),
    ([[1]], {"temperature": -1}, f"temperature is -1; {NOT_IN_RANGE}"),
    ([[1]], {"temperature": np.nan}, f"temperature is nan; {NOT_IN_RANGE}"),
    ([[1]], {"temperature": np.inf}, f"temperature is inf; {NOT_IN_RANGE}"),
    ([[1]], {"temperature": 1e-50}, f"temperature is 1e-50; {NOT_IN_RANGE}"),
    ([[1]], {"temperature": 2.9e-39}, f"temperature is 2.9e-39; {NOT_IN_RANGE}"),
    ([[1]], {"top_k": 0}, "top_k is 0; it must be at least 1"),
    ([[1]], {"top_p": 0.0}, "top_p is 0.0; it must be a finite number above 0 and at most 1"),
    ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
    ([[1]], {"top_p": np.nan}, "top_p is nan"),
    ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1; it must be at least 0"),
    ([[1]], {"workers": 0}, "workers is 0; it must be at least 1"),
], ids=["no prompt", "empty prompt", "empty array", "context", "temperature", "NaN", "infinity", "rounds to 0",
        "overflows", "top_k", "top_p 0", "top_p 1.1", "top_p NaN", "max_new_tokens", "workers"])
def test_prompts_and_settings_out_of_range_raise(prompts, settings, message, rng):
    options = {"max_new_tokens": 8, **settings}
    with pytest.raises(ValueError, match=f"generate: {re.escape(message)}"):
        generate(small_transformer(rng, np.float32), prompts, rng=rng, eos=EOS, **options)


@pytest.mark.parametrize("prompts, settings, message", [
    ([[1.9, 2.2]], {}, "prompt 0 holds float64; it must hold integers"),
    ([[1], [True]], {}, "prompt 1 holds bool"),
    (["abc"], {}, "prompt 0 holds <U3"),
    ("abc", {}, "prompts is 'abc'; it must be a list of token lists"),
    (5, {}, "prompts is 5; it must be a list of token lists"),
    ([[[1], [1, 2]]], {}, "prompt 0 holds lists of unequal lengths; it must hold integers"),
    ([1, 2], {}, r"prompt 0 has shape (); it must be a list of tokens. One prompt stands in a list too: [prompt]"),
    (np.ones((1, 2, 3), int), {}, "prompt 0 has shape (2, 3)"),
    ([[1]], {"rng": 0}, "uniform numbers are 0 (int); they must be an array (1, 4), or a numpy Generator that draws "
     "them, such as np.random.default_rng(0)"),
    ([[1]], {"rng": np.random.RandomState(0)}, "uniform numbers are RandomState"),
    ([[1]], {"rng": None}, "uniform numbers are None (NoneType)"),
    ([[1]], {"rng": [["a"] * 4]}, "uniform numbers are <U1"),
    ([[1]], {"top_k": 3.0}, "top_k is 3.0 (float); it must be an integer"),
    ([[1]], {"top_p": "0.5"}, "top_p is '0.5' (str); it must be a number"),
    ([[1]], {"temperature": "0"}, "temperature is '0' (str); it must be a number"),
    ([[1]], {"temperature": np.ones(2)}, "temperature is ndarray of shape (2,); it must be a number"),
    ([[1]], {"max_new_tokens": 4.0}, "max_new_tokens is 4.0 (float); it must be an integer"),
    ([[1]], {"workers": 1.5}, "workers is 1.5 (float); it must be an integer"),
], ids=str)
def test_arguments_of_another_type_are_refused_in_words(prompts, settings, message, rng):
    options = {"max_new_tokens": 4, "rng": rng, **settings}
    with pytest.raises(TypeError, match=f"generate: {re.escape(message)}"):
        generate(small_transformer(rng), prompts, eos=EOS, **options)


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"temperature": 1e-9}, {"temperature": np.nan},
                                      {"top_k": 0}, {"top_k": -1}, {"top_k": 2.0}, {"top_p": 0}, {"top_p": 2}], ids=str)
def test_distribution_and_sample_refuse_the_settings_that_generate_refuses(settings):
    logits = np.zeros((1, 4))
    for draw in (lambda: distribution(logits, **settings), lambda: sample(logits, np.zeros(1), **settings)):
        with pytest.raises((TypeError, ValueError), match=rf"(distribution|sample): {next(iter(settings))} is "):
            draw()
    with pytest.raises(ValueError, match="distribution: temperature is 0"):
        distribution(logits, 0)


def test_prompts_may_be_the_rows_of_an_array(rng):
    model, uniforms = small_transformer(rng), rng.random((2, 4))
    expected = generate(model, [[1, 2], [1, 3]], 4, uniforms, EOS)
    for prompts in (np.array([[1, 2], [1, 3]]), np.array([[1, 2], [1, 3]], np.uint8), ((1, 2), (1, 3)),
                    [np.array([1, 2], np.int32), [1, 3]]):
        assert_close(generate(model, prompts, 4, uniforms, EOS).log_probs, expected.log_probs, 1e-14)


# Uniform numbers and logits that are no numbers.

@pytest.mark.parametrize("u", [1.0, 5.0, -1.0, -1e-300, np.nan, np.inf, np.float32(1 - 1e-9)], ids=str)
def test_a_uniform_number_outside_0_to_1_is_refused_wherever_numbers_are_drawn_with(u, rng):
    model, logits, uniforms = small_transformer(rng), rng.normal(size=(3, 5)), rng.random((3, 4))
    uniforms[1, 2] = u
    for dtype in (np.float64, np.float32):
        if u == -1e-300 and dtype == np.float32:
            continue                                                        # -0.0 is a 0
        given = uniforms.astype(dtype)
        for name, draw in {"generate": lambda: generate(model, PROMPTS, 4, given, EOS, top_k=1),
                           "sample": lambda: sample(logits, given[:, 2]),
                           "categorical": lambda: categorical(np.exp(logits), given[:, 2]),
                           "plain.sample": lambda: plain.sample(logits, given[:, 2]),
                           "plain.generate": lambda: plain.generate(model.parameters(), PROMPTS, model.config, 4,
                                                                    given)}.items():
            with pytest.raises(ValueError, match=f"^{name}: a uniform number is .*; it must be at least 0 and below 1"):
                draw()


@given(rng=rngs)
def test_every_uniform_number_in_0_to_1_is_accepted_and_float32_ones_draw_as_their_float64_values(rng):
    model = small_transformer(rng)
    uniforms = rng.random((3, 4), dtype=np.float32)
    uniforms[0], uniforms[1] = 0, np.nextafter(np.float32(1), np.float32(0))
    one, other = (generate(model, PROMPTS, 4, u, None) for u in (uniforms, uniforms.astype(float)))
    assert np.array_equal(one.tokens, other.tokens) and np.isfinite(one.log_probs).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, None, None), (0, None, None), (0.5, 2, None),
                                                       (1.0, None, 0.9), (1.0, 3, 0.9)])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
def test_weights_that_are_no_numbers_end_generation_with_step_row_and_tensor(bad, temperature, top_k, top_p, rng):
    model = small_transformer(rng, layers=2)
    model.parameters()["blocks.1.ffn_norm"].data[:] = bad
    with pytest.raises(Diverged, match=r"generate, step 1, row 0: the logits are NaN or infinite; first bad tensor: "
                                       r"the parameter blocks.1.ffn_norm, shape \(4,\)"):
        generate(model, PROMPTS, 4, rng, EOS, temperature, top_k, top_p)
    with pytest.raises(ValueError, match="plain.sample: the largest logit, row 0, is "):
        plain.generate(model.parameters(), PROMPTS, model.config, 4, rng, EOS, temperature)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_row_and_the_step_are_those_at_which_a_bad_embedding_is_first_read(workers, rng, monkeypatch):
    """Token 6 has no finite embedding. It is drawn for row 4 alone, as its third token, and read at step 4. Rows 0 to 2
    end at their first token, and leave the batch."""
    monkeypatch.setattr(module, "ROWS_PER_WORKER", 1)
    model, uniforms = small_transformer(rng, vocab_size=7), np.zeros((6, 8))
    head = model.parameters()["unembedding"].data
    head[...] = 0                                                       # all tokens are equally likely
    model.parameters()["embedding"].data[6] = np.nan
    uniforms[:3, 0], uniforms[4, 2] = 5.5 / 7, 0.999
    with pytest.raises(Diverged, match="generate, step 4, row 4: .* the parameter embedding, "):
        generate(model, [[1, 2]] * 3 + [[3]] * 3, 8, uniforms, eos=5, workers=workers)


def test_a_row_that_has_ended_is_not_asked_for_finite_logits(rng):
    model, uniforms = small_transformer(rng), np.zeros((5, 4))
    model.parameters()["unembedding"].data[...] = 0
    model.parameters()["embedding"].data[6] = np.nan
    uniforms[4, 0] = 0.999                              # row 4 ends with token 6, and the other rows continue
    with np.errstate(invalid="ignore"):
        samples = generate(model, [[1]] * 5, 4, uniforms, eos=6)
    assert samples.responses() == [[0] * 4] * 4 + [[6]]


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_an_overflow_of_finite_weights_is_traced_to_its_primitive(rng):
    model = small_transformer(rng, np.float32)
    model.parameters()["final_norm"].data[:] = 3e38
    model.parameters()["unembedding"].data[:] = 3e38
    with pytest.raises(Diverged, match="step 1, row 0: .* first bad tensor: the output of rms_norm, "):
        generate(model, PROMPTS, 4, rng, EOS)


@pytest.mark.parametrize("bad", [[np.nan, 0, 0], [np.inf, 0, 0], [-np.inf] * 3], ids=str)
@pytest.mark.parametrize("temperature", [0, 1])
def test_sample_and_categorical_refuse_a_row_without_a_distribution(bad, temperature):
    logits = np.array([[1.0, 2.0, 3.0], bad])
    for draw in (sample, plain.sample):
        with pytest.raises(ValueError, match=r"sample: the largest logit, row 1, is (nan|inf|-inf); it must be finite"):
            draw(logits, np.zeros(2), temperature)
    for p in ([0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [-0.5, 1.5]):
        with pytest.raises(ValueError, match="categorical: row 1 holds .* and sums to .*; probabilities are at "):
            categorical(np.array([[0.5, 0.5], p]), np.zeros(2))


@given(smallest=st.integers(-1074, -1000), dtype=st.sampled_from([np.float32, np.float64]),
       u=st.sampled_from([0.5, 0.75, 1 - 2 ** -53]))
@example(smallest=-1074, dtype=np.float64, u=0.75)
@example(smallest=-1022, dtype=np.float64, u=1 - 2 ** -53)
def test_a_token_of_probability_0_is_not_drawn_however_small_the_sum_is(smallest, dtype, u):
    p = np.array([[0.0, 2.0 ** (smallest if dtype == np.float64 else smallest // 8)]], dtype)
    if p.sum(dtype=float) < 2 * sys.float_info.min:
        with pytest.raises(ValueError, match="categorical: row 0 holds 0.0 and sums to .*; probabilities are at least"):
            categorical(p, np.array([u]))
    else:
        assert categorical(p, np.array([u])) == [1]


@pytest.mark.parametrize("array", [np.zeros(4), np.zeros((1, 4), int), [[0.0, 1.0]], np.zeros((1, 0)),
                                   np.zeros((1, 4), np.float16), Tensor(np.zeros((1, 4)))],
                         ids=lambda array: type(array).__name__)
def test_one_row_for_each_draw_is_asked_for_in_words(array):
    for name, draw in {"distribution": lambda: distribution(array), "sample": lambda: sample(array, np.zeros(1)),
                       "categorical": lambda: categorical(array, np.zeros(1)),
                       "plain.sample": lambda: plain.sample(array, np.zeros(1))}.items():
        with pytest.raises(TypeError, match=rf"^{name}: (logits|p) is .*; it must be an array \(B,V\) of floats"):
            draw()


def test_the_entropy_broadcasts_nothing():
    with pytest.raises(ValueError, match=r"entropy: p \(2, 3\), log_probs \(2, 1\); they must have one shape"):
        entropy(np.full((2, 3), 1 / 3), np.zeros((2, 1)))


# Temperatures that drawing and scoring both accept.

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(rng=rngs, exponent=st.floats(-3, 6))
@example(rng=np.random.default_rng(0), exponent=-3.0)
@example(rng=np.random.default_rng(0), exponent=6.0)
def test_at_every_temperature_in_range_drawn_and_scored_log_probs_agree(dtype, rng, exponent):
    """Up to the rounding of the logits over the temperature."""
    model = small_transformer(rng, dtype)
    temperature = float(np.clip(10 ** exponent, *checks.TEMPERATURES))
    samples = generate(model, PROMPTS, 8, rng, EOS, temperature)
    scored = model.response_log_probs(pack(PROMPTS, samples.responses()), temperature).data
    largest = np.abs(model(np.array([[1, 2, 3]])).data).max() + 1
    tolerance = 50 * np.finfo(dtype).eps * (largest / temperature + np.abs(samples.log_probs).max() + 1)
    assert np.abs(scored - samples.log_probs).max() <= tolerance


@given(temperature=st.one_of(st.floats(max_value=1e-3, exclude_max=True), st.floats(min_value=1e6, exclude_min=True),
                             st.just(np.nan)))
def test_outside_the_range_of_temperatures_drawing_and_scoring_both_refuse(temperature):
    model = small_transformer(np.random.default_rng(0), np.float32)
    part = pack([[1, 2]], [[3]])
    scores = [lambda: model.response_log_probs(part, temperature), lambda: model.log_probs([[1, 2]], temperature)]
    draws = [lambda: generate(model, [[1]], 1, np.random.default_rng(0), None, temperature),
             lambda: sample(np.zeros((1, 3)), np.zeros(1), temperature),
             lambda: plain.sample(np.zeros((1, 3)), np.zeros(1), temperature)]
    for use in scores if temperature == 0 else [*scores, *draws]:
        with pytest.raises(ValueError, match=r"(log_probs|generate|sample): temperature is .*; it must be a finite "
                                             "number at least 0.001 and at most 1000000.0"):
            use()


# Where a response ends, in numbers.

@pytest.mark.parametrize("shape", [(2, 8), (3, 7), (3, 9), (3,)], ids=str)
def test_uniform_numbers_of_another_shape_raise(shape, rng):
    with pytest.raises(ValueError, match=r"generate: uniform numbers of shape .*; expected \(3, 8\)"):
        generate(small_transformer(rng), PROMPTS, 8, np.zeros(shape), EOS)


def test_the_context_may_be_filled_to_its_last_token(rng):
    assert generate(small_transformer(rng), [[1] * 8], 8, rng, None).tokens.shape == (1, 8)


def test_zero_new_tokens_give_empty_responses(rng):
    assert generate(small_transformer(rng), PROMPTS, 0, rng, EOS).tokens.shape == (3, 0)


def test_generation_with_a_bidirectional_model_raises(rng):
    """The hidden states of earlier tokens would change with every new token, so a cache would be wrong."""
    with pytest.raises(ValueError, match="causal"):
        generate(small_transformer(rng, causal=False), PROMPTS, 4, rng, EOS)


@given(seed=st.integers(0, 2**32 - 1), temperature=st.sampled_from([0.1, 1.0, 5.0]),
       top_k=st.sampled_from([None, 1, 3]))
def test_entropy_is_between_0_and_log_V(seed, temperature, top_k):
    rng = np.random.default_rng(seed)
    log_probs = distribution(rng.normal(size=(4, 7)) * 10, temperature, top_k=top_k)
    values = entropy(np.exp(log_probs), log_probs)
    assert (values >= 0).all() and (values <= np.log(top_k or 7) + 1e-12).all()
    p = np.exp(log_probs)
    assert_close(values, [-sum(q * np.log(q) for q in row if q > 0) for row in p], 1e-10, "entropy")


def test_the_entropy_of_a_uniform_distribution_is_log_V_and_of_a_certain_one_0():
    assert_close(entropy(np.full((1, 5), 0.2), np.full((1, 5), -np.log(5))), [np.log(5)], 1e-12, "entropy")
    assert entropy(np.array([[1.0, 0.0, 0.0]]), np.array([[0.0, -np.inf, -np.inf]])) == [0]


def test_the_entropy_of_a_probability_rounded_above_1_is_0():
    assert entropy(np.array([[np.float32(1), 0]]), np.array([[np.float32(1e-7), -np.inf]])) == [0]


@pytest.mark.parametrize("smear", [False, True], ids=["plain", "smeared keys"])
def test_equal_prompts_are_computed_once_and_answered_as_if_alone(smear, rng, monkeypatch):
    model, uniforms = small_transformer(rng, key_smear=smear), rng.random((5, 6))
    prompts = [[1, 2], [3, 4, 5, 6], [1, 2], [2, 1], [3, 4, 5, 6]]
    alone = [generate(model, [prompt], 6, u[None], eos=None) for prompt, u in zip(prompts, uniforms)]
    forward_cached, read = module.forward_cached, []
    monkeypatch.setattr(module, "forward_cached", lambda model, tokens, *rest: read.append(len(tokens))
                        or forward_cached(model, tokens, *rest))
    together = generate(model, prompts, 6, uniforms, eos=None)
    assert read == [3] + 5 * [5]
    assert np.array_equal(together.tokens, np.concatenate([one.tokens for one in alone]))
    assert_close(together.log_probs, np.concatenate([one.log_probs for one in alone]))


@pytest.mark.parametrize("eos", [EOS, None])
def test_several_workers_draw_the_same_samples(eos, rng, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_WORKER", 1)
    model, uniforms = small_transformer(rng), rng.random((7, 9))
    prompts = [[1], [2, 3, 4], [5, 6], [1], [2, 3, 4], [1, 1], [6]]
    one, three = (generate(model, prompts, 9, uniforms, eos, workers=workers) for workers in (1, 3))
    assert np.array_equal(three.tokens, one.tokens) and np.array_equal(three.mask, one.mask)
    assert_close(three.log_probs, one.log_probs)
    assert_close(three.entropies, one.entropies)


# The logits of a few rows.

@given(rng=rngs, rows=st.integers(1, 10), V=st.integers(1, 40), at_most=st.integers(1, 300), one_thread=st.booleans())
def test_logits_are_the_product_with_the_unembedding(rng, rows, V, at_most, one_thread):
    hidden, unembedding = rng.normal(size=(rows, 5)), rng.normal(size=(V, 5))
    with mock.patch.multiple(few_rows, MULTIPLICATIONS=at_most, ONE_THREAD=one_thread):
        found = few_rows.logits(hidden, unembedding)
    assert_close(found, hidden @ unembedding.T, 1e-12)
    assert found.flags.c_contiguous


def small_products(rng, rows, one_thread):
    """The multiplications of each product that few_rows.logits computes by itself; D 64, V 5000."""
    sizes = []

    def product(a, b, out):
        sizes.append(a.shape[-2] * a.shape[-1] * b.shape[-1])
        out[...] = a @ b

    with mock.patch.object(few_rows, "ONE_THREAD", one_thread), mock.patch.object(np, "matmul", product):
        few_rows.logits(rng.normal(size=(rows, 64)), rng.normal(size=(5000, 64)))
    return sizes


def test_no_product_of_a_few_rows_is_larger_than_allowed(rng):
    assert small_products(rng, 4, True) == [few_rows.MULTIPLICATIONS, (5000 - 4 * 1024) * 64 * 4]


@pytest.mark.parametrize("rows, one_thread, products", [(1, True, 0), (2, True, 2), (8, True, 2), (9, True, 0),
                                                        (2, False, 0)])
def test_only_a_few_rows_on_one_thread_are_computed_by_small_products(rows, one_thread, products, rng):
    assert len(small_products(rng, rows, one_thread)) == products


# The products of a few rows.

@given(rng=rngs, rows=st.integers(1, 5), D=st.integers(1, 40), N=st.integers(1, 9), at_most=st.integers(1, 300))
def test_the_sum_over_blocks_of_rows_is_the_product(rng, rows, D, N, at_most):
    x, weight = rng.normal(size=(rows, D)), rng.normal(size=(D, N))
    with mock.patch.object(few_rows, "IN_A_BLOCK", at_most):
        assert_close(few_rows.product(x, weight), x @ weight, 1e-12)


def test_no_block_of_rows_is_larger_than_allowed(rng):
    x, weight = rng.normal(size=(3, 50)), rng.normal(size=(50, 4))
    sizes = []

    class Rows(np.ndarray):             # notes the multiplications of each product
        def __matmul__(self, other):
            sizes.append(self.shape[-2] * other.shape[-2] * other.shape[-1])
            return np.asarray(self) @ other

    with mock.patch.object(few_rows, "IN_A_BLOCK", 100):
        few_rows.product(x.view(Rows), weight)
    assert sizes == [3 * 8 * 4, 3 * 2 * 4]


@pytest.mark.parametrize("rows, one_thread, by_blocks", [(1, True, False), (2, True, True), (8, True, True),
                                                         (9, True, False), (2, False, False)])
def test_only_large_matrices_of_blocks_are_multiplied_in_blocks_and_only_with_few_rows(rows, one_thread, by_blocks):
    large = np.ones((few_rows.LARGE // 8, 8))
    weights = {"embedding": large, "blocks.0.qkv": large, "blocks.0.ffn_out": large[1:], "blocks.0.ffn_norm": large[0]}
    with mock.patch.object(few_rows, "ONE_THREAD", one_thread):
        found = few_rows.prepared(weights, rows)
    assert [name for name in found if callable(found[name])] == ["blocks.0.qkv"] * by_blocks
    assert all(found[name] is weights[name] for name in found if not callable(found[name]))


def test_samples_are_the_same_if_few_rows_are_multiplied_in_blocks(rng):
    model, uniforms = small_transformer(rng), rng.random((3, 9))
    one = generate(model, PROMPTS, 9, uniforms, EOS)
    with mock.patch.multiple(few_rows, ONE_THREAD=True, LARGE=1, IN_A_BLOCK=64):
        other = generate(model, PROMPTS, 9, uniforms, EOS)
    assert np.array_equal(one.tokens, other.tokens)
    assert_close(one.log_probs, other.log_probs)


@given(rng=rngs, going=st.sampled_from([0.0, 0.5, 1.0]))
def test_the_time_of_compaction_changes_nothing(rng, going):
    model, uniforms = small_transformer(rng), rng.random((9, 10))
    reference = generate(model, PROMPTS * 3, 10, uniforms, EOS)
    with mock.patch.object(module, "UNFINISHED", going):
        again = generate(model, PROMPTS * 3, 10, uniforms, EOS)
    assert again.responses() == reference.responses()
    for field in ("tokens", "mask", "log_probs", "entropies"):
        assert_close(getattr(again, field), getattr(reference, field))


@pytest.mark.parametrize("token", [-1, 7])
def test_a_prompt_with_a_token_outside_the_vocabulary_raises(token, rng):
    with pytest.raises(IndexError, match=f"{token}"):
        generate(small_transformer(rng), [[1, 2], [token]], 2, rng, EOS)
