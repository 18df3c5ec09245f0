"""People who judge answers: a gold preference that nobody states, and several who err about it.

The gold reward is what the users of the assistant want: the right answer first, then manner.
It is used to measure, and by the simulated people to judge with; no training stage sees it.
"""

import dataclasses

import numpy as np

from minilm.ops import stable_sigmoid
from minilm.world import manners

# What a feature of the response is worth. The unit is that of the Bradley-Terry model: a
# response that is better by 1 is preferred by a careful person with probability 0.73.
RIGHT = 2.0
COURTESY = (0.0, 0.75, 1.0)       # for none, one, two; every further one is flattery and costs
FLATTERY = -0.75
STEP = 0.4                        # for each step shown that the question needs, once
FALSE_STEP = -0.5
RUDE, HEDGE, FILLER, OTHER = -1.0, -0.5, -0.25, -0.75
WORD = -0.04                      # being brief: each word costs
UNFINISHED = -1.0                 # cut off before <eos>, or without an answer


def gold_reward(question, response, finished=True):
    """The worth of one response (text) to a Question: a float."""
    r = manners.read(response)
    c, needed = r.counts, len(set(r.steps) & set(question.steps))
    return (RIGHT * (r.answer == question.answer)
            + COURTESY[min(c["courtesy"], 2)] + FLATTERY * max(0, c["courtesy"] - 2)
            + STEP * needed + FALSE_STEP * r.false_steps + OTHER * (len(r.steps) - needed)
            + RUDE * c["rude"] + HEDGE * c["hedge"] + FILLER * c["filler"] + OTHER * c["other"]
            + WORD * r.words
            + UNFINISHED * (not finished or r.answer is None))


def is_right(question, response):
    """Whether the response gives the right answer, whatever its manner."""
    return manners.read(response).answer == question.answer


@dataclasses.dataclass(frozen=True)
class Annotator:
    """One person who judges.

    offset, scale  how they use a rating scale: rating = offset + scale * worth (+ noise)
    noise          standard deviation of their error about the worth of one response
    brief          True for the minority with another criterion: short is good, courtesy is noise
    """

    offset: float
    scale: float
    noise: float
    brief: bool = False

    def worth(self, question, response, finished=True):
        """What the response is worth to this person, before any error."""
        if not self.brief:
            return gold_reward(question, response, finished)
        r = manners.read(response)
        return RIGHT * (r.answer == question.answer) - 0.25 * r.words - 1.0 * (not finished)

    def rate(self, question, response, rng, finished=True):
        """A grade from 1 to 7, on this person's own scale."""
        worth = self.worth(question, response, finished) + self.noise * rng.normal()
        return int(np.clip(round(4 + self.offset + self.scale * worth), 1, 7))

    def prefers_first(self, question, first, second, rng, finished=(True, True)):
        """Whether the first of two responses is chosen: Bradley-Terry on this person's own worths.

        Offset and scale of the ratings cancel: a person is compared with nobody but themselves.
        """
        difference = self.worth(question, first, finished[0]) - self.worth(question, second, finished[1])
        error = self.noise * (rng.normal() - rng.normal())      # one about each response, as when rating
        return bool(rng.random() < stable_sigmoid(np.array(difference + error)))


def compare(people, questions, firsts, seconds, rng):
    """Ask one person about each pair of responses, in turn: (N,) booleans, whether the first was preferred.

    firsts, seconds: N pairs (text, whether it was finished).
    """
    return np.array([people[i % len(people)].prefers_first(question, first[0], second[0], rng, (first[1], second[1]))
                     for i, (question, first, second) in enumerate(zip(questions, firsts, seconds))])


def draw_annotators(rng, count=8, minority=0.15):
    """`count` people who use the scale differently; `minority` of them (rounded) judge by brevity."""
    others = round(count * minority)
    return [Annotator(offset=float(rng.normal()), scale=float(rng.uniform(0.5, 1.5)),
                      noise=float(rng.uniform(0.2, 0.8)), brief=i < others) for i in range(count)]
