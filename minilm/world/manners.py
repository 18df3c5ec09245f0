"""How an answer is put: the manners of the demonstrations, and reading them back from a response."""

import dataclasses
import re

OPENINGS = {"Sure!": "courtesy", "Great question!": "courtesy", "Well, hmm.": "filler", "Obviously.": "rude"}
CLOSINGS = {"Happy to help!": "courtesy", "I am not sure.": "hedge", "Stop asking.": "rude"}
KINDS = {**OPENINGS, **CLOSINGS}
_STEP = re.compile(r"(\d+) \+ (\d+) = (\d+)\.")
_SENTENCE = re.compile(r"[^.!?]*[.!?]|[^.!?]+$")


@dataclasses.dataclass(frozen=True)
class Manner:
    opening: str
    shows_steps: bool
    full_sentence: bool
    closing: str


def draw_manner(rng):
    """A manner as people have them: half plain, a few polite, some rude, unsure or rambling."""
    def maybe(phrases, share):
        return phrases[int(rng.integers(len(phrases)))] if rng.random() < share else ""
    return Manner(opening=maybe(tuple(OPENINGS), 0.5), shows_steps=bool(rng.random() < 0.4),
                  full_sentence=bool(rng.random() < 0.5), closing=maybe(tuple(CLOSINGS), 0.5))


def phrase(question, answer, manner):
    """The response to a Question in this manner."""
    steps = [f"{s}." for s in question.steps] if manner.shows_steps else []
    core = f"The answer is {answer}." if manner.full_sentence else f"{answer}."
    return " ".join(part for part in (manner.opening, *steps, core, manner.closing) if part)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a careful reader finds in a response.

    answer   the answer it gives, None if there is none
    steps    the true steps it shows ("2 + 3 = 5"), in order; false_steps: how many are not true
    counts   {"courtesy", "filler", "rude", "hedge", "other": how many sentences of each kind}
    words    its length in words
    """

    answer: str | None
    steps: tuple
    false_steps: int
    counts: dict
    words: int


def read(response):
    """Take a response apart into a Reading, sentence by sentence."""
    answer, steps, false_steps = None, [], 0
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
