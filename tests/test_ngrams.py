"""scripts/lecture/worlds/ngrams.py: probabilities from counts in dictionaries, properties of a language model."""
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from helpers import assert_close, rngs
from worlds.markov import MarkovSource
from worlds.ngrams import NGram


def grams(stream, n):
    return [tuple(stream[i:i + n]) for i in range(len(stream) - n + 1)]


def by_hand(stream, vocab_size, order):
    """p(history, x), by the recursion as it is written, from counts in dictionaries."""
    def counts(n):
        return Counter(grams(stream, n)) if n == order else Counter(gram[1:] for gram in counts(n + 1))

    def discount(n):
        sizes = Counter(counts(n).values())
        return sizes[1] / (sizes[1] + 2 * sizes[2]) if sizes[1] and sizes[2] else 0.5

    tables = {n: (counts(n), discount(n)) for n in range(1, order + 1)}

    def p(history, x):
        n = len(history) + 1
        table, d = tables[n]
        following = {gram[-1]: c for gram, c in table.items() if gram[:-1] == history}
        shorter = p(history[1:], x) if n > 1 else 1 / vocab_size
        if not following:
            return shorter
        return (max(following.get(x, 0) - d, 0) + d * len(following) * shorter) / sum(following.values())
    return p


@given(rngs, st.integers(1, 4), st.integers(2, 4))
@example(np.random.default_rng(0), 3, 3)
def test_log_probs_equal_the_recursion_from_counts_in_dictionaries(rng, order, vocab_size):
    stream, text = rng.integers(vocab_size, size=40), rng.integers(vocab_size, size=12)
    p = by_hand(stream.tolist(), vocab_size, order)
    expected = [math.log(p(tuple(text[max(0, t - order + 1):t].tolist()), text[t])) for t in range(len(text))]
    assert_close(NGram(stream, vocab_size, order).log_probs(text), expected)


@given(rngs, st.integers(1, 3))
def test_the_probabilities_of_the_next_token_add_up_to_one_after_every_history(rng, order):
    model = NGram(rng.integers(3, size=15), 4, order)       # token 3 never occurs
    for history in itertools.product(range(4), repeat=order - 1):
        assert_close(sum(math.exp(model.log_probs([*history, x])[-1]) for x in range(4)), 1.0)


def test_on_text_of_a_chain_of_order_two_a_trigram_model_is_close_to_the_entropy_and_a_bigram_model_is_not():
    chain, rng = MarkovSource(np.random.default_rng(0), 5, order=2), np.random.default_rng(1)
    stream, held_out = (chain.sample(rng, 1, n)[0] for n in (30_000, 4000))
    entropy = -chain.log_probs(held_out[None])[0].mean()
    excess = {order: -NGram(stream, 5, order).log_probs(held_out)[2:].mean() - entropy for order in (1, 2, 3)}
    assert 0 < excess[3] < 0.01 and 10 * excess[3] < excess[2] < excess[1]


def test_an_order_that_cannot_be_counted_raises():
    for stream, vocab_size, order in (([0, 1], 2, 3), ([0, 1], 2, 0), ([0] * 20, 512, 7)):
        with pytest.raises(ValueError, match="need a text"):
            NGram(stream, vocab_size, order)
