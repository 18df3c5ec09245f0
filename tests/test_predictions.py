"""Predict, then run: the twenty questions, their numbers, and the statements of the explanations."""
import dataclasses
import re
from unittest import mock

import pytest

from minilm.exercises import predict
from minilm.exercises.questions import QUESTIONS


@pytest.fixture(params=range(1, len(QUESTIONS) + 1))
def question(request):
    return QUESTIONS[request.param - 1]


def test_there_are_twenty_and_the_list_has_one_line_for_each():
    assert len(QUESTIONS) == 20
    lines = predict.listed().split("\n")
    assert len(lines) == 21 and lines[7].split(maxsplit=1) == ["8", QUESTIONS[7].title]


def test_the_statement_of_the_explanation_holds_on_the_numbers_and_not_on_others(question):
    numbers = question.compute()
    assert question.holds(numbers)
    changed = [words for words, value in numbers.items()
               if not all(question.holds({**numbers, words: other}) for other in (value + 0.3, value - 0.3, 0 * value))]
    assert len(changed) >= len(numbers) / 2, question.title


def test_an_explanation_has_two_to_four_sentences_and_a_question_asks(question):
    sentences = re.findall(r"[.:?](?:\s|$)", question.because)
    assert 2 <= len(sentences) <= 6 and "?" in question.ask
    assert question.read.startswith("minilm/")


def test_a_question_computes_nothing_before_the_answer_is_asked_for(question):
    number = str(1 + QUESTIONS.index(question))
    def forbidden():
        raise AssertionError("computed")
    silent = dataclasses.replace(question, compute=forbidden)
    with mock.patch.object(predict, "QUESTIONS", (*QUESTIONS[:int(number) - 1], silent, *QUESTIONS[int(number):])):
        shown = predict.text(number, answer=False)
    assert " ".join(shown.split()).startswith(" ".join(question.ask.split()))
    assert shown.endswith(f"Predict, then run: predict {number} --answer")
    assert " ".join(question.because.split())[:40] not in " ".join(shown.split())


def test_an_answer_shows_every_number_and_the_explanation(question):
    number = str(1 + QUESTIONS.index(question))
    shown = predict.text(number, answer=True)
    for words, value in question.compute().items():
        assert f"    {words}" in shown and f"  {value:.6g}\n" in shown
    assert " ".join(question.because.split()) in " ".join(shown.split())
    assert shown.endswith(f"Read: {question.read}")


def test_an_explanation_that_does_not_fit_is_not_shown():
    wrong = dataclasses.replace(QUESTIONS[0], holds=lambda numbers: False)
    with mock.patch.object(predict, "QUESTIONS", (wrong,)), pytest.raises(ValueError, match="does not fit these"):
        predict.text("1", answer=True)


@pytest.mark.parametrize("number", ["0", "21", "x", "-1", "", "1.0", "9" * 30])
def test_another_number_is_no_question(number):
    with pytest.raises(LookupError, match="there are questions 1 to 20"):
        predict.find(number)
