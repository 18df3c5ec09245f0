"""String tasks as demonstrations: documents read back as text, and the Bayes bound computed by counting."""
import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, rngs
from minilm.generate import generate
from minilm.model import Config, Transformer
from minilm.tensor import Tensor
from worlds import strings
from worlds.strings import (
    ALPHABET,
    ARROW,
    CHARACTERS,
    END,
    LENGTH,
    NEW_TASKS,
    PAIR,
    PAIRS,
    TASKS,
    VOCABULARY,
    Curriculum,
)

# Every task once more, on text.
BY_HAND = {"copy": lambda w: w, "reverse": lambda w: w[::-1], "rotate": lambda w: w[1:] + w[0],
           "swap first two": lambda w: w[1] + w[0] + w[2],
           "repeat first": lambda w: 3 * w[0], "repeat last": lambda w: 3 * w[-1],
           "next letter": lambda w: "".join("bcdefghija"[ord(c) - 97] for c in w),
           "previous letter": lambda w: "".join("jabcdefghi"[ord(c) - 97] for c in w),
           "swap last two": lambda w: w[0] + w[2] + w[1], "repeat middle": lambda w: 3 * w[1],
           "three letters on": lambda w: "".join("defghijabc"[ord(c) - 97] for c in w)}
EVERY_WORD = np.array(list(itertools.product(range(len(ALPHABET)), repeat=LENGTH)))


@pytest.mark.parametrize("name", [*TASKS, *NEW_TASKS])
def test_a_task_on_tokens_equals_the_task_on_text_for_every_word(name):
    answers = (TASKS | NEW_TASKS)[name](EVERY_WORD)
    assert [strings.text(w) for w in answers] == [BY_HAND[name](strings.text(w)) for w in EVERY_WORD]


def test_new_tasks_differ_from_training_tasks_and_one_word_in_five_is_held_out():
    answers = [f(EVERY_WORD).tobytes() for f in (*TASKS.values(), *NEW_TASKS.values())]
    assert len(set(answers)) == len(answers) == 11
    assert strings.is_held_out(EVERY_WORD).mean() == 0.2


@given(rngs, st.booleans(), st.integers(1, 10))
def test_a_document_reads_as_one_task_on_words_of_one_side(rng, held_out, pairs):
    tokens, mask = strings.draw(rng, 6, pairs=pairs, held_out=held_out)
    assert tokens.shape == mask.shape == (6, pairs * PAIR)
    for row, counted in zip(tokens, mask):
        pairs_read = [pair.split(">") for pair in strings.text(row).removesuffix(";").split(";")]
        assert len(pairs_read) == pairs and all(len(word) == LENGTH for pair in pairs_read for word in pair)
        assert any(all(BY_HAND[name](x) == y for x, y in pairs_read) for name in TASKS)
        assert all(strings.is_held_out(np.array([ALPHABET.index(c) for c in x])) == held_out for x, _ in pairs_read)
        assert "".join(CHARACTERS[t] for t, m in zip(row, counted) if m) == "".join(y for _, y in pairs_read)


def test_all_given_tasks_are_drawn_and_no_others():
    tokens, _ = strings.draw(np.random.default_rng(0), 4000)
    inputs, answers = strings.parts(tokens)
    fits = np.array([(f(inputs) == answers).all(axis=(1, 2)) for f in TASKS.values()])
    assert (fits.sum(axis=0) == 1).all() and np.abs(fits.mean(axis=1) - 1 / 8).max() < 0.03
    inputs, answers = strings.parts(strings.draw(np.random.default_rng(0), 50, [NEW_TASKS["swap last two"]])[0])
    assert (answers == inputs[..., [0, 2, 1]]).all()


def test_parts_is_the_inverse_of_document():
    rng = np.random.default_rng(0)
    inputs, answers = strings.words(rng, 3, 4), strings.words(rng, 3, 4, held_out=True)
    for found, expected in zip(strings.parts(strings.document(inputs, answers)[0]), (inputs, answers)):
        assert (found == expected).all()


@given(rngs, st.booleans())
def test_the_bayes_bound_equals_counting_the_tasks_that_still_fit(rng, held_out):
    tokens, _ = strings.draw(rng, 8, pairs=4, held_out=held_out)
    inputs, _ = strings.parts(tokens)
    inputs[:, 0] = inputs[:, 0, :1]                                     # "aaa" leaves many tasks open
    names = list(TASKS)
    answers = np.stack([TASKS[name](inputs[row]) for row, name in enumerate(names)])
    tokens, _ = strings.document(inputs, answers)
    bound = strings.bayes_bound(tokens)
    for row in range(8):
        pairs_read = [pair.split(">") for pair in strings.text(tokens[row]).removesuffix(";").split(";")]
        for k, (x, _) in enumerate(pairs_read):
            fit = [name for name in names if all(BY_HAND[name](a) == b for a, b in pairs_read[:k])]
            guesses = [BY_HAND[name](x) for name in fit]
            assert_close(bound[row, k], max(map(guesses.count, guesses)) / len(fit), 1e-12)
    assert_close(bound[:, 0], np.full(8, 6 / 8))                        # all but the two that change letters say "aaa"


class Recogniser:
    """Predicts the answer of the majority of the tasks that agree with all demonstrations before."""

    def __call__(self, tokens):
        inputs, answers = strings.parts(np.concatenate([tokens, np.full((len(tokens), 1), END)], axis=1))
        logits = np.zeros((*tokens.shape, VOCABULARY))
        for row, (xs, ys) in enumerate(zip(inputs, answers)):
            fit = list(TASKS.values())
            for k, (x, y) in enumerate(zip(xs, ys)):
                guesses = [tuple(f(x)) for f in fit]
                for place, letter in enumerate(max(guesses, key=guesses.count)):
                    logits[row, k * PAIR + LENGTH + place, letter] = 1
                fit = [f for f in fit if (f(x) == y).all()]
        return Tensor(logits)


def test_the_bayes_optimal_predictor_reaches_the_bound():
    tokens, _ = strings.draw(np.random.default_rng(0), 1000, pairs=3, held_out=True)
    bound, found = strings.bayes_bound(tokens).mean(axis=0), strings.right(Recogniser(), tokens).mean(axis=0)
    assert np.abs(found - bound).max() < 0.04 and bound[0] < 0.2 and bound[1] > 0.9


def test_the_curriculum_grows_for_a_recogniser_and_not_for_an_untrained_model():
    rng, course = np.random.default_rng(0), Curriculum()
    untrained = Transformer(Config(vocab_size=VOCABULARY, width=8, layers=1, heads=1), rng)
    assert course.examine(untrained, rng) < 0.1 and course.in_use == 2
    tokens, _ = course.draw(rng, 30)
    inputs, answers = strings.parts(tokens)
    copies, follows = ((TASKS[name](inputs) == answers).all(axis=(1, 2)) for name in ("copy", "next letter"))
    assert tokens.shape == (30, PAIRS * PAIR) and (copies ^ follows).all() and 0 < copies.sum() < 30
    for expected in (3, 4, 5, 6, 7, 8, 8):
        assert course.examine(Recogniser(), rng) > 0.9 and course.in_use == expected


def test_following_the_curriculum_returns_the_accuracy_every_50_steps():
    course, done = Curriculum(), []
    history = course.follow((done.append(course.in_use) for _ in range(110)), Recogniser(), np.random.default_rng(0))
    assert done == [2] * 10 + [3] * 10 + [4] * 10 + [5] * 10 + [6] * 10 + [7] * 10 + [8] * 50
    assert [line[0] for line in history] == [50, 100] and all(len(line) == 1 + PAIRS for line in history)
    assert history[0][1:] == history[1][1:] and history[0][1] < 0.3 and history[0][-1] > 0.97


def test_a_model_with_the_answers_is_correct_and_one_wrong_letter_makes_an_answer_wrong():
    tokens, _ = strings.draw(np.random.default_rng(0), 4, pairs=3)
    # Row and place; the last two are no part of an answer.
    slips = [(0, LENGTH + 1), (1, PAIR + LENGTH + 3), (2, 2 * PAIR), (3, LENGTH)]

    def knowing(given):
        logits = np.zeros((*given.shape, VOCABULARY))
        for row, place in np.ndindex(given.shape):
            logits[row, place, tokens[row, place + 1]] = 1
            if (row, place + 1) in slips:
                logits[row, place, (tokens[row, place + 1] + 1) % 10] = 2
        return Tensor(logits)

    expected = [[False, True, True], [True, False, True], [True] * 3, [True] * 3]
    assert strings.right(knowing, tokens).tolist() == expected


def test_right_equals_greedy_decoding():
    rng = np.random.default_rng(3)
    model = Transformer(Config(vocab_size=VOCABULARY, width=16, layers=1, heads=2), rng)
    tokens, _ = strings.draw(rng, 40, [TASKS["copy"]], pairs=2)
    prompts = tokens[:, :-LENGTH - 1]
    greedy = generate(model, prompts.tolist(), LENGTH, rng, END, temperature=0).responses()
    # Every second answer becomes what the model says.
    tokens[::2, -LENGTH - 1:-1] = [(row + [0] * LENGTH)[:LENGTH] for row in greedy[::2]]
    found = strings.right(model, tokens)[:, -1]
    assert found.tolist() == [row == list(answer) for row, answer in zip(greedy, tokens[:, -LENGTH - 1:-1])]
    assert found[::2].sum() > 10 and prompts[0, -1] == ARROW and PAIRS > 2


def test_words_are_held_out_or_not():
    for wrong in (None, 2, "no"):
        with pytest.raises(TypeError, match="words: held_out is "):
            strings.words(np.random.default_rng(0), 2, held_out=wrong)
