"""Simulated people who compare answers: a gold reward, and annotators who judge by it with errors.

The gold reward is the preference of the assistant's users: the right answer first, then manner. It serves to
measure, and the annotators judge by it. No training stage reads it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from minilm.ops import stable_sigmoid
from minilm.world import manners
from minilm.world.tasks import Question

# The parts of the gold reward. The unit is that of the Bradley-Terry model: a careful annotator prefers a
# response that is better by 1 with probability sigmoid(1) = 0.73.
RIGHT = 2.0
COURTESY = (0.0, 0.75, 1.0)       # for 0, 1 and 2 courtesies; every further one is flattery
FLATTERY = -0.75
STEP = 0.4                        # once for each step that the question needs
FALSE_STEP = -0.5
RUDE = -1.0                       # for each sentence of this kind
HEDGE = -0.5
FILLER = -0.25
OTHER = -0.75                     # also for each true step of another question
WORD = -0.04                      # for each word
UNFINISHED = -1.0                 # cut off before <eos>, or without an answer
# The minority that judges by brevity:
BRIEF_WORD = -0.25
BRIEF_UNFINISHED = -1.0


def gold_reward(question: Question, response: str, finished: bool = True) -> float:
    """The gold reward of a response. finished: whether it ended with <eos>."""
    r = manners.read(response)
    courtesies = r.counts["courtesy"]
    needed_steps = len(set(r.steps) & set(question.steps))
    return (RIGHT * (r.answer == question.answer)
            + COURTESY[min(courtesies, 2)] + FLATTERY * max(0, courtesies - 2)
            + STEP * needed_steps + FALSE_STEP * r.false_steps + OTHER * (len(r.steps) - needed_steps)
            + RUDE * r.counts["rude"] + HEDGE * r.counts["hedge"]
            + FILLER * r.counts["filler"] + OTHER * r.counts["other"]
            + WORD * r.words
            + UNFINISHED * (not finished or r.answer is None))


def is_right(question: Question, response: str) -> bool:
    """Whether the response gives the right answer, in any manner."""
    return manners.read(response).answer == question.answer


@dataclasses.dataclass(frozen=True)
class Annotator:
    """One person who judges responses.

    offset, scale  use of a rating scale: rating = offset + scale * utility (+ noise)
    noise          standard deviation of the error in the utility of one response
    brief          True for the minority that prefers short answers and ignores courtesy
    """

    offset: float
    scale: float
    noise: float
    brief: bool = False

    def utility(self, question: Question, response: str, finished: bool = True) -> float:
        """The utility of the response to this person, without error."""
        if not self.brief:
            return gold_reward(question, response, finished)
        r = manners.read(response)
        return RIGHT * (r.answer == question.answer) + BRIEF_WORD * r.words + BRIEF_UNFINISHED * (not finished)

    def rate(self, question: Question, response: str, rng: np.random.Generator, finished: bool = True) -> int:
        """A grade from 1 to 7, on this person's scale."""
        utility = self.utility(question, response, finished) + self.noise * rng.normal()
        return int(np.clip(round(4 + self.offset + self.scale * utility), 1, 7))

    def prefers_first(self, question: Question, first: str, second: str, rng: np.random.Generator,
                      finished: tuple[bool, bool] = (True, True)) -> bool:
        """Whether this person chooses the first of two responses: Bradley-Terry on the person's utilities.

        Offset and scale of the ratings cancel, because both responses are judged by one person.
        """
        difference = self.utility(question, first, finished[0]) - self.utility(question, second, finished[1])
        error = self.noise * (rng.normal() - rng.normal())      # one error for each response, as in ratings
        return bool(rng.random() < stable_sigmoid(np.array(difference + error)))


def compare(people: Sequence[Annotator], questions: Sequence[Question], firsts: Sequence[tuple[str, bool]],
            seconds: Sequence[tuple[str, bool]], rng: np.random.Generator) -> np.ndarray:
    """One comparison of each pair of responses, by one person each, in turn: (N,) booleans, True if the first won.

    firsts, seconds: N pairs (text, finished). Raises ValueError for unequal numbers, and for no people.
    """
    counts = {"questions": len(questions), "firsts": len(firsts), "seconds": len(seconds)}
    if len(set(counts.values())) > 1 or not people:
        raise ValueError(f"compare: {counts} and {len(people)} people; there must be as many firsts and seconds as "
                         "questions, and people to judge them")
    return np.array([people[i % len(people)].prefers_first(question, first[0], second[0], rng, (first[1], second[1]))
                     for i, (question, first, second) in enumerate(zip(questions, firsts, seconds))])


def draw_annotators(rng: np.random.Generator, count: int = 8, minority: float = 0.15) -> list[Annotator]:
    """`count` people with different scales. A fraction `minority` of them (rounded) judges by brevity."""
    brief = round(count * minority)
    return [Annotator(offset=float(rng.normal()), scale=float(rng.uniform(0.5, 1.5)),
                      noise=float(rng.uniform(0.2, 0.8)), brief=i < brief) for i in range(count)]
