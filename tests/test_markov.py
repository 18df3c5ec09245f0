"""scripts/lecture/worlds/markov.py: stationary distribution and entropy rate by brute force, frequencies of samples."""
import itertools
import math

import numpy as np
import pytest

from helpers import assert_close
from worlds.markov import MarkovSource

sources = pytest.mark.parametrize("vocab_size, order", [(2, 1), (5, 1), (3, 2), (2, 3)])


def source(vocab_size, order, seed=0):
    return MarkovSource(np.random.default_rng(seed), vocab_size, order, concentration=1.0)


def number(tokens, vocab_size):
    """The row of a context, digit by digit."""
    return sum(token * vocab_size ** i for i, token in enumerate(reversed(tokens)))


def texts(chain, length):
    """{text: probability} of every text of this length within an endless text, by the chain rule."""
    V, order, pi = chain.vocab_size, chain.order, chain.stationary()
    found = {}
    for text in itertools.product(range(V), repeat=length):
        p = pi[number(text[:order], V)]
        for t in range(order, length):
            p *= chain.transitions[number(text[t - order:t], V), text[t]]
        found[text] = p
    return found


@sources
def test_the_stationary_distribution_is_the_limit_of_a_walk_from_any_context(vocab_size, order):
    chain = source(vocab_size, order)
    for start in range(vocab_size ** order):
        share = {number(c, vocab_size): 0.0 for c in itertools.product(range(vocab_size), repeat=order)}
        share[start] = 1.0
        for _ in range(2000):
            after = dict.fromkeys(share, 0.0)
            for context, p in share.items():
                for x in range(vocab_size):
                    after[(context * vocab_size + x) % vocab_size ** order] += p * chain.transitions[context, x]
            settled, share = max(abs(after[c] - share[c]) for c in share) < 1e-13, after
            if settled:
                break
        assert_close([share[c] for c in range(vocab_size ** order)], chain.stationary())


@sources
def test_the_entropy_rate_is_the_entropy_added_by_one_more_token(vocab_size, order):
    chain = source(vocab_size, order)
    entropy = [-sum(p * math.log(p) for p in texts(chain, length).values()) for length in (order + 2, order + 3)]
    assert_close(entropy[1] - entropy[0], chain.entropy_rate())


@sources
def test_the_distribution_of_texts_is_the_same_at_every_position(vocab_size, order):
    """Without its first tokens, a text has the same distribution."""
    chain = source(vocab_size, order)
    shorter = dict.fromkeys(texts(chain, order), 0.0)
    for text, p in texts(chain, order + 2).items():
        shorter[text[2:]] += p
    assert_close(list(shorter.values()), list(texts(chain, order).values()))


@sources
def test_log_probs_are_read_from_the_row_of_each_context(vocab_size, order):
    chain = source(vocab_size, order)
    tokens = np.random.default_rng(1).integers(vocab_size, size=(3, 6))
    expected = [[math.log(chain.transitions[number(row[t - order:t], vocab_size), row[t]]) for t in range(order, 6)]
                for row in tokens.tolist()]
    assert_close(chain.log_probs(tokens), expected)


@sources
def test_the_frequency_of_samples_matches_their_probability(vocab_size, order):
    chain, count = source(vocab_size, order), 40_000
    tokens = chain.sample(np.random.default_rng(2), count, order + 2)
    seen = dict.fromkeys(texts(chain, order + 2), 0)
    for text in map(tuple, tokens.tolist()):
        seen[text] += 1
    for text, p in texts(chain, order + 2).items():
        assert abs(seen[text] - count * p) < 5 * math.sqrt(count * p) + 5, text


def test_the_loss_of_the_source_on_its_own_text_is_the_entropy_rate():
    chain = source(6, 2)
    losses = -chain.log_probs(chain.sample(np.random.default_rng(3), 400, 100)).mean(axis=1)
    assert abs(losses.mean() - chain.entropy_rate()) < 4 * losses.std() / 20
    assert chain.entropy_rate() < math.log(6) - 0.1


def test_texts_shorter_than_a_context_have_the_requested_length():
    tokens = source(3, 2).sample(np.random.default_rng(0), 5, 1)
    assert tokens.shape == (5, 1) and tokens.max() < 3


def test_a_source_of_one_token_or_of_order_zero_raises():
    for vocab_size, order in ((1, 1), (3, 0)):
        with pytest.raises(ValueError, match="it must be at least"):
            source(vocab_size, order)
