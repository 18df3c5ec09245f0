"""The manner of an answer: polite, rude, with steps, and so on. Answers are phrased in a manner, and read back."""

import dataclasses
import re

import numpy as np

from minilm.world.tasks import Question

OPENINGS = {"Sure!": "courtesy", "Great question!": "courtesy", "Well, hmm.": "filler", "Obviously.": "rude"}
CLOSINGS = {"Happy to help!": "courtesy", "I am not sure.": "hedge", "Stop asking.": "rude"}
KINDS = {**OPENINGS, **CLOSINGS}
_STEP = re.compile(r"(\d+) \+ (\d+) = (\d+)\.")
_SENTENCE = re.compile(r"[^.!?]*[.!?]|[^.!?]+$")


@dataclasses.dataclass(frozen=True)
class Manner:
    """One of OPENINGS or "", whether the steps of a sum are shown, "The answer is ..." or the bare answer, and
    one of CLOSINGS or ""."""

    opening: str
    shows_steps: bool
    full_sentence: bool
    closing: str


def draw_manner(rng: np.random.Generator) -> Manner:
    """A random manner of a person: half of them have no opening, half have no closing."""
    def maybe(phrases, probability):
        return phrases[int(rng.integers(len(phrases)))] if rng.random() < probability else ""
    return Manner(opening=maybe(tuple(OPENINGS), 0.5), shows_steps=bool(rng.random() < 0.4),
                  full_sentence=bool(rng.random() < 0.5), closing=maybe(tuple(CLOSINGS), 0.5))


def phrase(question: Question, answer: str, manner: Manner) -> str:
    """The response that gives this answer to the question, in this manner."""
    steps = [f"{step}." for step in question.steps] if manner.shows_steps else []
    core = f"The answer is {answer}." if manner.full_sentence else f"{answer}."
    return " ".join(part for part in (manner.opening, *steps, core, manner.closing) if part)


@dataclasses.dataclass(frozen=True)
class Reading:
    """The parts of a response.

    answer       the answer that it gives, None if there is none
    steps        the true steps that it shows ("2 + 3 = 5"), in order
    false_steps  the number of steps that are not true
    counts       {"courtesy", "filler", "rude", "hedge", "other": number of sentences of this kind}
    words        its length in words
    """

    answer: str | None
    steps: tuple
    false_steps: int
    counts: dict
    words: int


def read(response: str) -> Reading:
    """Takes a response apart, sentence by sentence."""
    answer = None
    steps = []
    false_steps = 0
    counts = dict.fromkeys((*dict.fromkeys(KINDS.values()), "other"), 0)
    for sentence in (s.strip() for s in _SENTENCE.findall(response)):
        step = _STEP.fullmatch(sentence)
        if not sentence:
            continue
        if sentence in KINDS:
            counts[KINDS[sentence]] += 1
        elif step:
            a, b, total = map(int, step.groups())
            if a + b == total:
                steps.append(sentence.removesuffix("."))
            else:
                false_steps += 1
        elif answer is None and sentence.endswith("."):
            answer = sentence.removeprefix("The answer is ").removesuffix(".")
        else:
            counts["other"] += 1
    return Reading(answer, tuple(steps), false_steps, counts, len(response.split()))
