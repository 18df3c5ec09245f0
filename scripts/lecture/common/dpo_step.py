"""One step of gradient descent on the DPO loss: its effect on the log-probs of the chosen replies, split into parts.

To first order, a step on the loss L of all pairs changes log pi(y) by -rate sum_j K(y, y_j) dL/d log pi(y_j), where y_j
runs over the chosen and rejected replies and K is the inner product of the gradients of two log-probs.
Every run compares it with central differences of the step itself (scripts/lecture/dpo.py reports the error).
Tests: tests/test_dpo_step.py.
"""

import numpy as np

from minilm.model import Transformer
from minilm.objectives.dpo import dpo_loss
from minilm.packing import pack
from minilm.stages.dpo import summed_log_probs
from minilm.tensor import Tensor
from worlds.replies import ReplyWorld

TERMS = ("all chosen replies", "all rejected replies", "one pair alone: its chosen", "one pair alone: its rejected")


def decomposition(policy: Transformer, world: ReplyWorld, reference: np.ndarray, pairs: tuple, beta: float, alone: int
                  ) -> tuple[list[float], float]:
    """The mean of d log pi(chosen) / d rate for one gradient step on the loss of these pairs, split into TERMS.

    Also returns the relative error of the first two terms against central differences of that step.
    """
    policy = policy.over({name: Tensor(w.data.astype(np.float64), requires_grad=True)
                          for name, w in policy.parameters().items()})
    p, chosen, rejected = pairs
    weights = list(policy.parameters().values())

    def gradient(cotangent):
        """The gradient of sum(cotangent * log_pi) as one flat vector; cotangent (P,Y) is mostly 0."""
        for w in weights:
            w.grad = None
        rows, y = np.nonzero(cotangent)
        summed_log_probs(policy, pack(*world.tokens_of(rows, y))).backward(cotangent[rows, y])
        return np.concatenate([w.grad.reshape(-1) for w in weights])

    def scattered(y, values):
        table = np.zeros(world.shape)
        np.add.at(table, (p, y), values)
        return table

    log_pi = world.log_distributions(policy)
    leaves = [Tensor(log_pi[p, y], requires_grad=True) for y in (chosen, rejected)]
    dpo_loss(*leaves, *(reference[p, y] for y in (chosen, rejected)), beta=beta).backward()
    downhill = [gradient(scattered(y, -leaf.grad)) for y, leaf in zip((chosen, rejected), leaves)]
    objective = gradient(scattered(chosen, np.full(len(p), 1 / len(p))))
    terms = [objective @ step for step in downhill]

    single = []
    for i in range(alone):
        of_chosen, of_rejected = (gradient(scattered(y, np.arange(len(p)) == i)) for y in (chosen, rejected))
        # The gradient of the loss is a mean over the pairs; for one pair alone, the factor 1/B is removed.
        single.append(-leaves[0].grad[i] * len(p) * np.array([of_chosen @ of_chosen, -of_chosen @ of_rejected]))

    sides = []
    rate = 1e-6
    for sign in (1, -2):                                    # forward, then twice as far back
        start = 0
        for w in weights:
            w.data += sign * rate * sum(downhill)[start:start + w.size].reshape(w.shape)
            start += w.size
        sides.append(world.log_distributions(policy)[p, chosen].mean())
    measured = (sides[0] - sides[1]) / (2 * rate)
    return [*terms, *np.mean(single, axis=0)], abs(sum(terms) - measured) / sum(map(abs, terms))


def in_a_pair(world: ReplyWorld, p: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Whether each reply is in a pair of its prompt, (P,Y)."""
    paired = np.zeros(world.shape, bool)
    paired[p, chosen] = paired[p, rejected] = True
    return paired


def as_table(terms: np.ndarray, moments: dict[str, int]) -> list[list[str]]:
    """The mean over the seeds of each of TERMS, from terms (seeds, times, TERMS) and {name: index of a time}."""
    return [["d log pi(chosen) / d rate, by", *TERMS],
            *([f"at {name}", *(f"{term:+.2f}" for term in terms[:, i].mean(axis=0))] for name, i in moments.items())]
