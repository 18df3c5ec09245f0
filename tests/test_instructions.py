"""scripts/lecture/worlds/instructions.py: two operations in turn, held-out tasks and words, the mask."""
import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import rngs
from worlds import instructions
from worlds.instructions import (
    FIRST_OPERATION,
    LETTERS,
    MAPS,
    OPERATIONS,
    PLACES,
    PROMPT,
    TASKS,
    WORD,
    carry_out,
    coverage,
    documents,
    draw_words,
    is_held_out,
    nearest,
    single_operations,
    split_tasks,
    text,
)

SMALL, LARGE = "abcdefghij", "ABCDEFGHIJ"
# The operations, once more: on strings.
ON_PLACES = {"keep": lambda w: w, "reverse": lambda w: w[::-1], "left": lambda w: w[1:] + w[0],
             "right": lambda w: w[-1] + w[:-1], "first": lambda w: w[0] * 3, "swap": lambda w: w[1] + w[0] + w[2]}
ON_LETTERS = {"same": lambda c: c, "next": lambda c: (SMALL + "a")[SMALL.index(c) + 1],
              "previous": lambda c: SMALL[SMALL.index(c) - 1], "upper": str.upper,
              "upper next": lambda c: (LARGE + "A")[SMALL.index(c) + 1],
              "upper second": lambda c: (LARGE + "AB")[SMALL.index(c) + 2]}


def every_word():
    return np.array(list(np.ndindex((LETTERS,) * WORD)))


@given(rng=rngs, held_out=st.booleans(), steps=st.booleans())
def test_a_document_read_as_text_applies_the_two_operations_to_the_word(rng, held_out, steps):
    tokens, _ = documents(rng, 20, TASKS, held_out, steps)
    for row in tokens:
        instruction, word, *moved, end = text(row).replace("=", ":").replace(";", ":").split(":")
        place, letter = instruction[1:-1].split("][")
        between = ON_PLACES[place](word)
        assert moved == [between] * steps + ["".join(map(ON_LETTERS[letter], between))] and end == ""


def test_every_operation_is_correct_on_every_letter_and_every_position():
    for (i, place), (j, letter) in itertools.product(enumerate(PLACES), enumerate(MAPS)):
        words = every_word()[::7]
        moved, answers = carry_out([(i, len(PLACES) + j)] * len(words), words)
        for word, between, answer in zip(words, moved, answers):
            assert text(between) == ON_PLACES[place](text(word))
            assert text(answer) == "".join(map(ON_LETTERS[letter], text(between)))


@given(rng=rngs)
def test_a_document_of_a_single_operation_applies_it_to_the_word(rng):
    tokens, mask = single_operations(rng, 30)
    for row, m in zip(tokens, mask):
        operation, word, answer = text(row)[1:-1].replace("]:", "=").split("=")
        does = ON_PLACES.get(operation) or (lambda w: "".join(map(ON_LETTERS[operation], w)))
        assert answer == does(word) and text(row[m > 0]) == answer + ";"
    assert not is_held_out(tokens[:, 2:2 + WORD]).any()


@given(rng=rngs, steps=st.booleans())
def test_the_mask_is_one_after_the_equals_sign_and_zero_before(rng, steps):
    tokens, mask = documents(rng, 5, TASKS, steps=steps)
    for row, m in zip(tokens, mask):
        assert text(row[m > 0]) == text(row).partition("=")[2] and text(row[:PROMPT]).endswith("=")
        assert m.shape == row.shape and set(m) == {0, 1}


def test_no_two_tasks_are_the_same():
    answers = [carry_out([task] * 1000, every_word())[1] for task in TASKS]
    assert len({a.tobytes() for a in answers}) == len(TASKS) == 36


@given(rng=rngs, held_out=st.booleans())
def test_words_and_all_their_rearrangements_are_held_out_or_not_as_requested(rng, held_out):
    words = draw_words(rng, 50, held_out)
    assert words.shape == (50, WORD)
    for order in itertools.permutations(range(WORD)):
        assert (is_held_out(words[:, order]) == held_out).all()


def test_one_word_in_five_is_held_out_and_all_others_are_drawn():
    held = is_held_out(every_word())
    assert held.sum() == 200
    drawn = {tuple(word) for word in draw_words(np.random.default_rng(0), 20_000).tolist()}
    assert drawn == {tuple(word) for word in every_word()[~held].tolist()}


@given(rng=rngs)
def test_held_out_tasks_and_training_tasks_are_disjoint_and_complete(rng):
    training, held = split_tasks(rng)
    assert len(training) == 27 and len(held) == 9
    assert sorted(training + held) == sorted(TASKS)


@given(rng=rngs)
def test_a_held_out_task_is_two_operations_that_each_change_something(rng):
    for i, j in split_tasks(rng)[1]:
        words = every_word()
        moved, answers = carry_out([(i, j)] * len(words), words)
        assert (moved != words).any() and (answers != moved).any()


def test_every_task_of_two_operations_that_change_something_is_held_out_by_some_seed():
    held = {task for seed in range(40) for task in split_tasks(np.random.default_rng(seed))[1]}
    assert len(held) == 25


@given(rng=rngs)
def test_the_next_training_task_is_one_whose_operations_occurred_least(rng):
    training, _ = split_tasks(rng)
    for n, task in enumerate(training):
        counts = np.bincount(np.reshape(training[:n], -1).astype(int), minlength=len(OPERATIONS))
        assert counts[[*task]].sum() == min(counts[[*other]].sum() for other in training[n:])


def test_the_split_of_tasks_depends_on_the_seed_only():
    first, again, other = (split_tasks(np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_coverage_is_the_share_of_operations():
    assert coverage([]) == 0
    assert coverage([(0, 6), (0, 7), (0, 6)]) == pytest.approx(3 / 12)
    assert coverage(TASKS) == 1


def test_documents_use_the_given_tasks_only():
    tokens, _ = documents(np.random.default_rng(0), 200, [TASKS[3], TASKS[17]])
    assert {tuple(row) for row in (tokens[:, :2] - FIRST_OPERATION).tolist()} == {TASKS[3], TASKS[17]}


def test_the_accuracy_of_the_nearest_task_equals_the_value_counted_by_hand():
    def task(place, letter):
        return [*PLACES].index(place), len(PLACES) + [*MAPS].index(letter)
    words = every_word()
    # Reversed is as it was when the first letter is the last; all three are the first: when all three are the same.
    assert nearest([], task("reverse", "next"), words) == pytest.approx(0.1)            # "next" alone
    assert nearest([task("left", "next")], task("first", "next"), words) == pytest.approx(0.01)
    assert nearest([task("first", "upper")], task("first", "next"), words) == pytest.approx(0.01)   # no map agrees
    # Left and right of a word are the same when all letters are; swapped and left: when the last is the first, aba.
    assert nearest([task("left", "next")], task("swap", "next"), words) == pytest.approx(0.1)
    assert nearest([task("swap", "upper")], task("swap", "upper"), words) == 1
    assert nearest([task("swap", "upper")], task("right", "next"), words) == pytest.approx(0.01)    # nothing shared
    # A pair with an operation that changes nothing is a single operation.
    assert nearest([], task("keep", "next"), words) == nearest([], task("left", "same"), words) == 1


def test_every_token_is_in_the_vocabulary_and_the_longest_document_fits_the_context():
    tokens, _ = documents(np.random.default_rng(0), 500, TASKS, steps=True)
    assert tokens.max() == instructions.VOCABULARY - 1 and tokens.shape[1] <= instructions.MODEL["context"]
