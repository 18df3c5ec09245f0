"""Linear rewards: the counts against counts by hand, and the fits against the conditions of a minimum."""
import numpy as np
from hypothesis import given, strategies as st

from common.linear import bradley_terry, counts, least_squares
from helpers import assert_close, rngs
from worlds.replies import ReplyWorld


def test_counts_are_of_tokens_and_of_tokens_with_each_word_of_the_question():
    world = ReplyWorld(words=2)
    x, V, words = counts(world), world.vocab_size, range(3, 6)
    assert x.shape == (*world.shape, V + 2 * 3 * V)
    for p, y in ((0, 0), (4, 700), (8, 400)):
        prompt, response = world.prompts[p], world.responses[y]
        by_hand = [response.count(token) for token in range(V)]
        by_hand += [response.count(token) * (prompt[place] == word)
                    for place in (1, 2) for word in words for token in range(V)]
        assert x[p, y].tolist() == by_hand


@given(rngs, st.integers(1, 40), st.floats(0.1, 10), st.floats(0.1, 30))
def test_bradley_terry_ends_where_the_gradient_is_zero(rng, B, ridge, size):
    d = rng.normal(size=(B, 5)) * size
    w = bradley_terry(d, ridge)

    def loss(w):
        return np.logaddexp(0, -d @ w).sum() + ridge * w @ w / 2

    by_differences = [(loss(w + e) - loss(w - e)) / 2e-5 for e in 1e-5 * np.eye(5)]
    assert np.abs(by_differences).max() < 1e-4 * (1 + np.abs(d).sum())


def test_bradley_terry_recovers_the_weights_that_generated_the_choices():
    rng, truth = np.random.default_rng(0), np.array([1.0, -0.5, 2.0])
    d = rng.normal(size=(20_000, 3))
    d *= np.where(rng.random(20_000) < 1 / (1 + np.exp(-d @ truth)), 1, -1)[:, None]
    assert np.abs(bradley_terry(d) - truth).max() < 0.1


@given(rngs, st.floats(0.01, 10))
def test_least_squares_equals_a_fit_with_extra_rows_for_the_ridge(rng, ridge):
    x, ratings = rng.normal(size=(12, 4)), rng.normal(size=12)
    more_x, more_ratings = np.vstack([x, ridge ** 0.5 * np.eye(4)]), np.concatenate([ratings, np.zeros(4)])
    expected, *_ = np.linalg.lstsq(more_x, more_ratings, rcond=None)
    assert_close(least_squares(x, ratings, ridge), expected, 1e-10)
