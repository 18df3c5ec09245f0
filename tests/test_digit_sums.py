"""Digit sums: every document is parsed as text and its sums computed again by a loop."""

import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import rngs
from minilm.world.tasks import is_held_out
from worlds import digit_sums
from worlds.digit_sums import CORPUS, CURRICULUM, DIGITS, DIRECT, END, LONGEST, PHRASES, TOKENS

EXAMPLE = re.compile(r"(\d(?: \+\d)+) \?((?: [a-z']+(?:-[a-z]+)+)*) ((?:(?:\d|\+\d|…) )*)so (\d) \.")


def read(text):
    """(digits, phrase, tokens before "so", final digit) of every example in a text made of examples only."""
    assert EXAMPLE.sub("", text).strip() == "", text
    return [([int(d) for d in re.findall(r"\d", asked)], phrase.split(), before.split(), int(final))
            for asked, phrase, before, final in EXAMPLE.findall(text)]


def steps_of(digits):
    """A worked answer, by a loop."""
    written, total = [str(digits[0])], digits[0]
    for d in digits[1:]:
        total = (total + d) % 10
        written += [f"+{d}", str(total)]
    return written


@given(rngs, st.sampled_from(sorted(CORPUS)), st.integers(1, 5))
def test_a_document_holds_correct_sums_all_answered_in_its_style(rng, kind, examples):
    style, phrase = kind
    tokens, mask = digit_sums.document(rng, style, phrase, examples, 60)
    assert len(tokens) == len(mask) == 60
    end = 60 - np.argmax(np.array(tokens[::-1]) != END) + 1      # the last example's full stop
    found = read(digit_sums.text(tokens[:end]))
    assert 1 <= len(found) <= examples and set(tokens[end:]) <= {END} and not any(mask[end:])
    for digits, words, before, final in found:
        assert final == sum(digits) % 10 and len(digits) in DIGITS
        assert words == [TOKENS[token] for token in PHRASES[phrase]]
        steps = steps_of(digits)
        assert before == {"direct": [], "worked": steps, "dots": ["…"] * len(steps)}[style]
        assert not any(is_held_out(" + ".join(map(str, digits[:n]))) for n in range(3, len(digits) + 1))
    answers = sum(len(before) + 3 for _, _, before, _ in found)
    assert sum(mask) == answers and all(m == 0 for m, token in zip(mask, tokens) if TOKENS[token] == "?")


def test_a_document_of_one_example_is_as_long_as_the_longest_example():
    digits = [9] * max(DIGITS)
    worked = [*digit_sums.question(digits), *PHRASES["trigger"], *digit_sums.answer(digits, "worked")]
    assert len(worked) == LONGEST == CURRICULUM[0]["length"]


@pytest.mark.parametrize("corpus", [CORPUS, DIRECT])
def test_documents_come_in_the_shares_of_the_corpus(corpus):
    tokens, mask = digit_sums.documents(np.random.default_rng(0), 3000, 1, LONGEST, corpus)
    assert tokens.shape == mask.shape and mask[:, -1].any()
    counted = dict.fromkeys(corpus, 0)
    for row, length in zip(tokens, mask.shape[1] - mask[:, ::-1].argmax(axis=1)):
        [(_, words, before, _)] = read(digit_sums.text(row[:length]))
        phrase = next(name for name, tokens_of in PHRASES.items() if [TOKENS[token] for token in tokens_of] == words)
        counted["direct" if not before else "dots" if "…" in before else "worked", phrase] += 1
    total = sum(corpus.values())
    assert abs(sum(CORPUS.values()) - 1) < 1e-12
    after = {phrase: np.array([CORPUS[style, phrase] for style in ("direct", "worked", "dots")])
             for phrase in ("none", "filler")}
    np.testing.assert_allclose(*(shares / shares.sum() for shares in after.values()))
    assert all(abs(counted[kind] / 3000 - share / total) < 0.04 for kind, share in corpus.items())


@given(rngs, st.sampled_from(DIGITS), st.integers(0, 4), st.sampled_from(["direct", "worked", "dots"]))
def test_prompts_show_the_given_number_of_examples_and_a_held_out_question(rng, digits, shots, style):
    asked, right = digit_sums.prompts(rng, 3, digits, shots, style, phrase="filler", beginning=[digit_sums.SO])
    for prompt, answer in zip(asked, right):
        *shown, (summed, words, before, final) = read(digit_sums.text([*prompt, answer, END]))
        assert len(shown) == shots and words == ["well-then", "here-we-go"] and before == []
        assert final == sum(summed) % 10 and len(summed) == digits
        assert digits == 2 or is_held_out(" + ".join(map(str, summed)))
        assert all(example[3] == sum(example[0]) % 10 and not example[1] for example in shown)


@pytest.mark.parametrize("count", DIGITS)
def test_training_digits_begin_with_no_held_out_sum_and_held_out_digits_are_held_out(count, rng):
    def hidden(digits, n):
        return n > 2 and is_held_out(" + ".join(map(str, digits[:n])))

    trained, asked = ([digit_sums.draw_digits(rng, count, held_out) for _ in range(300)] for held_out in (False, True))
    assert not any(hidden(digits, n) for digits in trained for n in range(1, count + 1))
    assert all(hidden(digits, count) == (count > 2) for digits in asked)
    assert len({tuple(digits) for digits in trained}) > 50 < len({tuple(digits) for digits in asked})


def test_wrong_examples_have_the_form_of_correct_ones_and_are_correct_at_chance_level():
    asked, _ = digit_sums.prompts(np.random.default_rng(0), 200, 3, 4, wrong=True)
    shown = [example for prompt in asked for example in read(digit_sums.text([*prompt, digit_sums.SO, 0, END]))[:-1]]
    for digits, _, before, final in shown:
        assert before[0] == str(digits[0]) and before[1::2] == [f"+{d}" for d in digits[1:]]
        assert before[-1] == str(final)
    right = [s == r for digits, _, before, _ in shown for s, r in zip(before[2::2], steps_of(digits)[2::2])]
    assert len(shown) == 800 and abs(np.mean(right) - 0.1) < 0.03


def test_the_final_digit_is_read_from_a_finished_reply_and_only_running_sums_make_it_worked():
    worked, direct, dots = (digit_sums.answer([3, 5, 7], style) for style in ("worked", "direct", "dots"))
    assert digit_sums.text(worked) == "3 +5 8 +7 5 so 5 ."
    replies = worked, direct, dots, worked[:-1], [END]
    assert [digit_sums.final_digit(reply) for reply in replies] == [5, 5, 5, None, None]
    assert [digit_sums.is_worked(reply) for reply in (worked, direct, dots)] == [True, False, False]
    assert digit_sums.final_digit(digit_sums.answer([3, 5, 7], "worked", [1, 2])) == 2


@pytest.mark.parametrize("sums", [[1], [1, 2, 3], []])
def test_an_answer_has_one_running_sum_for_each_digit_after_the_first(sums):
    with pytest.raises(ValueError, match="answer: . running sums for 3 digits"):
        digit_sums.answer(np.array([3, 5, 7]), "worked", sums)
