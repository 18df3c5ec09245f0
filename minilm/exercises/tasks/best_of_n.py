"""The distribution of best-of-n.

Draw n responses from pi, independently, and keep the one with the highest score; among equal scores the first drawn.
With what probability is response y kept?

    F(s)  = probability that one draw has a score of at most s,      F(s-) = that it has a score below s
    P(the best score is s) = F(s)^n - F(s-)^n

because the best score is at most s exactly if all n scores are. Responses of equal score share this probability in
proportion to pi.

    pi         (Y,), probabilities of all responses, above 0
    scores     (Y,); several responses may have the same score
    n          an integer from 1 on
    returns    the probability of each response to be kept, (Y,)

Beirami et al. 2024, arXiv:2401.01879.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from minilm.exact import enumerable
from minilm.exercises.task import Mistake, Property, Task


def best_of_n(pi, scores, n) -> np.ndarray:
    """The probability that each response is the best of n."""
    below = (pi * (scores[None, :] < scores[:, None])).sum(axis=1)
    equal = (pi * (scores[None, :] == scores[:, None])).sum(axis=1)
    return ((below + equal) ** n - below ** n) * pi / equal


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"three responses, n = 2": (np.array([0.5, 0.3, 0.2]), np.array([1.0, 3.0, 2.0]), 2),
            "equal scores": (np.array([0.4, 0.3, 0.1, 0.2]), np.array([1.0, 2.0, 2.0, 0.0]), 3),
            "n = 1": (rng.dirichlet(np.ones(4)), rng.normal(size=4), 1),
            "n = 8": (rng.dirichlet(np.ones(5)), rng.integers(3, size=5).astype(float), 8)}


def expected(pi, scores, n) -> np.ndarray:
    return np.exp(enumerable.best_of_n(np.log(pi)[None], scores[None], n)[0])


def properties(function: Callable) -> Iterator[Property]:
    pi, scores = np.array([0.1, 0.4, 0.2, 0.3]), np.array([2.0, 1.0, 2.0, 0.0])
    listed = np.zeros(4)
    for draws in itertools.product(range(4), repeat=3):
        listed[draws[int(np.argmax(scores[list(draws)]))]] += pi[list(draws)].prod()
    yield Property("for n = 3 it is the sum over all 64 outcomes of three draws", function(pi, scores, 3), listed)


TASK = Task(
    solution=best_of_n, returns=("probabilities",), cases=cases, expected=expected, properties=properties,
    read="minilm/exact/enumerable.py, best_of_n",
    hints=("For each response: how probable is a score below its own, how probable an equal one? Compare all pairs of "
           "scores.",
           "((below + equal)^n - below^n) pi / equal, where equal includes the response itself."),
    mistakes=(
        Mistake("The other responses of equal score are counted as better: a response loses its share of the draws in "
                "which they tie with it.",
                "((below + equal) ** n - below ** n) * pi / equal", "(below + pi) ** n - below ** n"),
        Mistake("The other responses of equal score are counted as worse: in a tie each of them is taken as kept, so "
                "the sum is above 1.",
                "((below + equal) ** n - below ** n) * pi / equal", "(below + equal) ** n - (below + equal - pi) ** n"),
        Mistake("pi^n is the probability that all n draws are this response.",
                "((below + equal) ** n - below ** n) * pi / equal", "pi ** n"),
        Mistake("Sorted cumulative sums rank responses of equal score by their place in the array: each must get its "
                "share of the whole tie.", "return ((below + equal) ** n - below ** n) * pi / equal",
                "ranks = np.argsort(np.argsort(scores, kind='stable'))\n    "
                "F = pi[np.argsort(scores, kind='stable')].cumsum()[ranks]\n    return F ** n - (F - pi) ** n"),
        Mistake("The exponent is n - 1. All n scores must be at most s.",
                "((below + equal) ** n - below ** n)", "((below + equal) ** (n - 1) - below ** (n - 1))"),
        Mistake("F(s)^n is the probability that the best score is at most s. Subtract that it is below s.",
                "((below + equal) ** n - below ** n)", "((below + equal) ** n)"),
        Mistake("n pi F^(n-1) is the density of a continuous score. With discrete responses, ties and repeated draws "
                "count.",
                "((below + equal) ** n - below ** n) * pi / equal", "n * pi * (below + equal) ** (n - 1)"),
        Mistake("This is the worst of n: F counts from the wrong end.", "scores[None, :] < scores[:, None]",
                "scores[None, :] > scores[:, None]"),
        Mistake("Both sums run over the first axis: each is then y's own probability times a number of responses. Sum "
                "over the responses that y is compared with.",
                "(scores[None, :] < scores[:, None])).sum(axis=1)\n    equal = (pi * (scores[None, :] == scores[:, "
                "None])).sum(axis=1)",
                "(scores[None, :] < scores[:, None])).sum(axis=0)\n    equal = (pi * (scores[None, :] == scores[:, "
                "None])).sum(axis=0)"),
        Mistake("Responses of equal score share the probability equally. The first drawn of them is kept, so they "
                "share in proportion to pi.", "* pi / equal", "/ (scores[None, :] == scores[:, None]).sum(axis=1)"),
        Mistake("The probability of the score is given to each response that has it: the sum is above 1.",
                " * pi / equal", ""),
        Mistake("1 - (1 - pi)^n is the probability that the response is drawn at least once.",
                "((below + equal) ** n - below ** n) * pi / equal", "1 - (1 - pi) ** n"),
        Mistake("All probability is on the best response. It must be drawn first.",
                "((below + equal) ** n - below ** n) * pi / equal", "(scores == scores.max()) * pi / pi[scores == "
                "scores.max()].sum()")))
