"""Predict, then run: questions whose answers are numbers that are computed when somebody asks for them.

A question names a small computation. The answer runs it, shows its numbers, and says why they are so. The statement
that the explanation relies on is checked on the numbers (Question.holds).
"""

import textwrap

from minilm.exercises.questions import QUESTIONS
from minilm.exercises.questions.question import Question

WIDTH = 100


def find(number: str) -> Question:
    """A question by its number. Raises LookupError."""
    if not number.isdecimal() or not 0 < int(number[:9]) <= len(QUESTIONS):
        raise LookupError(f"no question {number!r}; there are questions 1 to {len(QUESTIONS)}")
    return QUESTIONS[int(number) - 1]


def listed() -> str:
    """Every question in one line, and how to go on."""
    lines = [f"{i:3} {question.title}" for i, question in enumerate(QUESTIONS, start=1)]
    return "\n".join([*lines, "predict N shows a question; predict N --answer computes its numbers and explains them"])


def text(number: str, answer: bool) -> str:
    """A question; with its numbers and explanation, if answer."""
    question = find(number)
    lines = [textwrap.fill(" ".join(question.ask.split()), WIDTH)]
    if not answer:
        return "\n".join([*lines, f"Predict, then run: predict {number} --answer"])
    numbers = question.compute()
    width = max(map(len, numbers))
    lines += ["", *(f"    {words:{width}}  {value:.6g}" for words, value in numbers.items()), ""]
    if not question.holds(numbers):
        raise ValueError(f"question {number}: the explanation does not fit these numbers: {numbers}")
    return "\n".join([*lines, textwrap.fill(" ".join(question.because.split()), WIDTH), f"Read: {question.read}"])
