"""Documents of symbols and labels: the mappings, the held-out split, and the best possible accuracy."""
import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, rngs
from minilm.model import Config, Transformer
from minilm.tensor import Tensor
from worlds import mappings
from worlds.mappings import PAIRS, SYMBOLS, VOCABULARY, Curriculum


@pytest.fixture(scope="module")
def everything():
    return np.array(list(itertools.permutations(range(SYMBOLS))))


def test_one_bijection_in_five_is_held_out(everything):
    assert abs(mappings.is_held_out(everything).mean() - 0.2) < 0.002


@pytest.mark.parametrize("held_out", [False, True])
def test_bijections_are_uniform_on_their_side(held_out):
    drawn = mappings.bijections(np.random.default_rng(0), 20_000, held_out)
    assert (np.sort(drawn, axis=1) == np.arange(SYMBOLS)).all() and (mappings.is_held_out(drawn) == held_out).all()
    assert len(np.unique(drawn, axis=0)) > (5000 if held_out else 14_000)          # of 8,000 and 32,000
    for symbol in range(SYMBOLS):
        assert np.abs(np.bincount(drawn[:, symbol]) / 20_000 - 1 / SYMBOLS).max() < 0.03


@given(rngs, st.integers(1, SYMBOLS), st.integers(1, 20), st.booleans())
def test_a_document_keeps_to_one_bijection_and_to_its_own_symbols(rng, in_use, pairs, held_out):
    tokens, mask = mappings.draw(rng, 5, pairs, in_use, held_out)
    assert tokens.shape == mask.shape == (5, 2 * pairs) and tokens.max() < VOCABULARY
    assert (tokens[mask == 1] >= SYMBOLS).all() and (tokens[mask == 0] < SYMBOLS).all()
    for row in tokens:
        pairs_read = set(zip(row[::2].tolist(), row[1::2].tolist()))
        assert len({x for x, _ in pairs_read}) == len({y for _, y in pairs_read}) == len(pairs_read) <= in_use


def test_training_documents_use_no_held_out_mapping():
    tokens, _ = mappings.draw(np.random.default_rng(0), 3000, pairs=40)
    complete = [row for row in tokens if len(set(row[::2])) == SYMBOLS]
    assert len(complete) > 2000
    labels = np.array([[row[1::2][list(row[::2]).index(x)] - SYMBOLS for x in range(SYMBOLS)] for row in complete])
    assert not mappings.is_held_out(labels).any()
    held_out = mappings.draw_in_rounds(np.random.default_rng(0), 200, SYMBOLS)
    order = held_out[:, :2 * SYMBOLS:2].argsort(axis=1)
    assert mappings.is_held_out(np.take_along_axis(held_out[:, 1:2 * SYMBOLS:2], order, axis=1) - SYMBOLS).all()


@given(rngs, st.integers(0, 20))
def test_any_eight_demonstrations_in_a_row_show_every_symbol(rng, shown):
    tokens = mappings.draw_in_rounds(rng, 4, shown)
    assert tokens.shape == (4, 2 * shown + 2)
    for row in tokens[:, :2 * shown:2]:
        for start in range(shown):
            part = row[start:start + SYMBOLS]
            assert len(set(part)) == len(part)


def test_the_query_is_uniform_over_the_symbols():
    tokens = mappings.draw_in_rounds(np.random.default_rng(0), 4000, 3)
    assert np.abs(np.bincount(tokens[:, -2]) / 4000 - 1 / SYMBOLS).max() < 0.02
    assert abs(mappings.shown_before(tokens)[:, -1].mean() - 3 / SYMBOLS) < 0.03
    assert_close(mappings.copy_bound(tokens)[:, -1].mean(), (3 + 1) / SYMBOLS, 0.05)


@given(rngs, st.integers(1, 12))
def test_the_copy_bound_is_the_share_of_all_bijections_that_agree_with_the_best_guess(everything, rng, pairs):
    tokens, _ = mappings.draw(rng, 3, pairs)
    bound, before = mappings.copy_bound(tokens), mappings.shown_before(tokens)
    for row, bounds, seen in zip(tokens, bound, before):
        possible = everything
        for k in range(pairs):
            x, y = row[2 * k], row[2 * k + 1] - SYMBOLS
            assert seen[k] == (x in row[:2 * k:2])
            assert_close(bounds[k], np.bincount(possible[:, x]).max() / len(possible), 1e-12)
            possible = possible[possible[:, x] == y]


class Copier:
    """Predicts the label after the last copy of the symbol, or the symbol itself if there is no copy."""

    def __call__(self, tokens):
        logits = np.zeros((*tokens.shape, VOCABULARY))
        for b, row in enumerate(tokens):
            for t in range(len(row)):
                labels = [row[s + 1] for s in range(t) if row[s] == row[t]]
                logits[b, t, labels[-1] if labels else row[t]] = 1
        return Tensor(logits)


def test_a_copier_is_correct_exactly_where_the_symbol_occurred_before():
    tokens, _ = mappings.draw(np.random.default_rng(0), 50)
    assert (mappings.right(Copier(), tokens) == mappings.shown_before(tokens)).all()


def test_the_curriculum_grows_for_a_copier_and_not_for_an_untrained_model():
    rng, course = np.random.default_rng(0), Curriculum()
    untrained = Transformer(Config(vocab_size=VOCABULARY, width=8, layers=1, heads=1), rng)
    assert course.examine(untrained, rng) < 0.9 and course.in_use == 2
    for expected in (3, 4, 5, 6, 7, 8, 8):
        assert course.examine(Copier(), rng) == 1 and course.in_use == expected
    tokens, _ = Curriculum(3).draw(rng, 10)
    assert tokens.shape == (10, 2 * PAIRS) and max(len(set(row[::2])) for row in tokens) == 3
