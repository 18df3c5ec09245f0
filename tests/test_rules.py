"""scripts/lecture/worlds/rules.py: labels, documents and the best accuracy, by loops over words, rules and answers."""
import itertools

import numpy as np
from hypothesis import given, strategies as st

from helpers import assert_close, rngs
from worlds import rules
from worlds.rules import ARROW, LABEL, LABELS, LETTERS, LINE, WORD


def label(word, rule):
    return [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3][word[rule]]


def test_a_fifth_of_all_words_is_held_out_and_no_word_is_on_both_sides():
    held_out, others = ({tuple(word) for word in rules.all_words(side).tolist()} for side in (True, False))
    assert held_out.isdisjoint(others)
    assert held_out | others == set(itertools.product(range(LETTERS), repeat=WORD))
    assert 0.19 < len(held_out) / LETTERS ** WORD < 0.21


def test_all_labels_are_equally_frequent_under_every_rule_on_both_sides():
    for rule, side in itertools.product(range(WORD), (True, False)):
        shares = np.bincount(rules.labels(rules.all_words(side), rule), minlength=LABELS) / len(rules.all_words(side))
        assert len(shares) == LABELS and abs(shares - 1 / LABELS).max() < 0.01


@given(rngs, st.booleans())
def test_the_labels_of_a_row_follow_one_rule_and_its_words_are_of_one_side(rng, held_out):
    words, labels = rules.draw(rng, 20, 6, held_out)
    side = {tuple(word) for word in rules.all_words(held_out).tolist()}
    for row, given_labels in zip(words.tolist(), labels.tolist()):
        assert all(tuple(word) in side for word in row)
        assert any([label(word, rule) for word in row] == given_labels for rule in range(WORD))


def test_every_rule_is_drawn():
    words, labels = rules.draw(np.random.default_rng(0), 200, 12)
    agree = np.array([(rules.labels(words, rule) == labels).all(axis=1) for rule in range(WORD)])
    assert (agree.sum(axis=1) > 40).all()


def test_a_document_is_words_arrows_and_labels_with_the_mask_on_labels():
    tokens, mask = rules.document(np.array([[[1, 7, 3], [9, 0, 2]]]), np.array([[0, 3]]))
    assert tokens.tolist() == [[1, 12 + 7, 24 + 3, ARROW, LABEL, 9, 12, 24 + 2, ARROW, LABEL + 3]]
    assert mask.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 0, 1]] and LINE == 5


@given(rngs)
def test_the_best_accuracy_equals_counting_the_rules_that_remain_possible(rng):
    words, answers = rules.draw(rng, 5, 6)
    expected = np.zeros(6)
    for row, given_labels in zip(words.tolist(), answers.tolist()):
        for k in range(6):
            left = [rule for rule in range(WORD) if all(label(row[i], rule) == given_labels[i] for i in range(k))]
            votes = [label(row[k], rule) for rule in left]
            expected[k] += max(votes.count(answer) for answer in range(LABELS)) / len(left) / 5
    assert_close(rules.best_accuracy(words, answers), expected)


def test_no_predictor_from_the_lines_before_exceeds_the_best_accuracy():
    """Two predictors on many documents: a random possible rule, and the majority of the possible rules."""
    rng = np.random.default_rng(1)
    words, answers = rules.draw(rng, 4000, 4)
    best = rules.best_accuracy(words, answers)
    for k in range(4):
        given_labels = np.array([rules.labels(words, rule) for rule in range(WORD)])
        left = (given_labels[:, :, :k] == answers[:, :k]).all(axis=2)
        pick = np.array([rng.choice(np.flatnonzero(row)) for row in left.T])
        guessed = given_labels[pick, np.arange(len(words)), k] == answers[:, k]
        votes = [np.where(left, given_labels[:, :, k] == answer, False).sum(axis=0) for answer in range(LABELS)]
        majority = np.argmax(votes, axis=0) == answers[:, k]
        assert guessed.mean() < best[k] + 0.02 and abs(majority.mean() - best[k]) < 0.03
    # Three letters of one quarter, two, or none: 1, 2/3 or 1/3 of the rules agree.
    assert abs(best[0] - (1 / 16 + 9 / 16 * 2 / 3 + 6 / 16 / 3)) < 0.01 and best[3] > 0.9
