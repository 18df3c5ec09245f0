"""minilm/stream.py: tokens drawn one by one are those of generate, whatever the text was before."""
import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import rngs, small_transformer
from minilm import stream
from minilm.diverged import Diverged
from minilm.fast.cached_decoding import forward_cached
from minilm.generate import generate
from minilm.stream import Text

TOKENS = st.lists(st.integers(0, 6), min_size=1, max_size=9)


@given(rngs, st.lists(TOKENS, min_size=1, max_size=4), st.sampled_from([0, 0.7, 1.0]), st.sampled_from([None, 3]),
       st.sampled_from([None, 0.8]), st.booleans())
def test_every_response_is_that_of_generate_whatever_came_before(rng, prompts, temperature, top_k, top_p, key_smear):
    model = small_transformer(rng, key_smear=key_smear, kv_heads=1)
    text = Text(model)
    for seed, prompt in enumerate(prompts):
        given = text.tokens[:5] + prompt                # it may continue the text before
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        expected = generate(model, [given], 2, np.random.default_rng(seed), [1], **options).responses()[0]
        drawn = list(text.respond(given, 2, np.random.default_rng(seed), [1], **options))
        assert drawn == expected
        assert text.tokens == [*given, *drawn[:-1]]     # the last token is computed when something follows it


@given(rngs, TOKENS, TOKENS, st.booleans())
def test_the_logits_are_those_of_the_whole_text(rng, before, tokens, key_smear):
    model = small_transformer(rng, layers=2, key_smear=key_smear)
    tokens = before[:2] + tokens
    text = Text(model)
    text.become(before)
    np.testing.assert_allclose(text.become(tokens), model(np.array([tokens])).data[0, -1], rtol=1e-10, atol=1e-10)


def test_only_new_tokens_are_computed_and_the_memory_grows_with_the_text(rng, monkeypatch):
    computed = []

    def counting(model, tokens, first, cache):
        computed.append(tokens.shape[1])
        return forward_cached(model, tokens, first, cache)
    monkeypatch.setattr(stream, "forward_cached", counting)
    monkeypatch.setattr(stream, "FIRST_CAPACITY", 4)
    text = Text(small_transformer(rng, context=200))
    for length in (3, 10, 10, 4, 100):
        text.become([1, 2, 3, 4, 5] * (length // 5) + [1, 2, 3, 4][:length % 5])
    assert computed == [3, 7, 1, 1, 96]
    assert text._cache.keys.shape[3] == 200
    computed.clear()
    list(text.respond(text.tokens + [1], 3, rng, None))
    assert computed == [1, 1, 1]


def test_a_response_that_is_not_taken_to_its_end_leaves_a_text_that_goes_on(rng):
    model = small_transformer(rng)
    text = Text(model)
    first = next(text.respond([1, 2], 6, np.random.default_rng(0), None))
    expected = generate(model, [[1, 2, first, 3]], 3, np.random.default_rng(1), None).responses()[0]
    assert list(text.respond([1, 2, first, 3], 3, np.random.default_rng(1), None)) == expected


@pytest.mark.parametrize("arguments, error, message", [
    (([], 3), ValueError, "at least one token"), (([7], 3), IndexError, "7"),
    (([1] * 10, 7), ValueError, "10 tokens and 7 new ones do not fit the context of 16")])
def test_bad_arguments_raise_before_the_first_token(rng, arguments, error, message):
    text = Text(small_transformer(rng))
    text.become([1, 2])
    with pytest.raises(error, match=message):
        text.respond(*arguments, rng, None)
    with pytest.raises(ValueError, match="temperature"):
        text.respond([1], 3, rng, None, temperature=-1)
    assert list(text.respond([1, 2], 0, rng, None)) == []


def test_logits_that_are_nan_raise_with_the_tensor(rng):
    model = small_transformer(rng)
    model.parameters()["final_norm"].data[0] = np.nan
    with pytest.raises(Diverged, match="token 1: the logits are NaN .* final_norm"):
        list(Text(model).respond([1, 2], 3, rng, None))


def test_a_bidirectional_model_has_no_text(rng):
    with pytest.raises(ValueError, match="bidirectional"):
        Text(small_transformer(rng, causal=False))
