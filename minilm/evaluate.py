"""Measure a policy: its divergence from a reference, its rewards, its wins. Plain arrays throughout.

The N responses are independent draws, one for each of N prompts; mean_and_error gives the mean of N numbers
with its standard error.
Tests: tests/test_evaluate.py.
"""

import math

import numpy as np

from minilm import checks
from minilm.backend import concatenate
from minilm.fast.workers import parallel_map
from minilm.packing import packs
from minilm.tensor import no_grad


def mean_and_error(values: np.ndarray | list[float]) -> tuple[float, float]:
    """The mean of N numbers, and its standard error (ddof 1; NaN for a single number).

    Raises ValueError for other shapes than (N,), for none, and for numbers that are not finite.
    """
    values = checks.numbers("mean_and_error", "N", values=values)[0].astype(float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def sequence_kl(policy, reference, prompts: list[list[int]], responses: list[list[int]],
                batch_size: int = 128, temperature: float = 1.0, workers: int = 1) -> np.ndarray:
    """k1 = log pi(y|x) - log pi_ref(y|x) of each response, in nats: (N,). pi is the policy at that temperature.

    If the responses are drawn from pi, the mean is an unbiased estimate of KL(pi || pi_ref) of whole responses, with
    the reference at temperature 1. Single values may be negative. workers: processes that share the batches. Raises
    ValueError as packing.packs does.
    """
    def of_batch(part):
        ratio = policy.response_log_probs(part, temperature).data - reference.response_log_probs(part).data
        return ratio.sum(axis=1)

    checks.integer("sequence_kl", "workers", workers, at_least=1)
    with no_grad():
        return concatenate(parallel_map(of_batch, list(packs(prompts, responses, batch_size)), workers))


def predicted_rewards(reward_model, prompts: list[list[int]], responses: list[list[int]],
                      batch_size: int = 128, workers: int = 1) -> np.ndarray:
    """The reward that a RewardModel gives each response: (N,). Raises ValueError as packing.packs does.

    workers: processes that share the batches.
    """
    checks.integer("predicted_rewards", "workers", workers, at_least=1)
    with no_grad():
        return concatenate(parallel_map(lambda part: reward_model.packed_rewards(part).data,
                                        list(packs(prompts, responses, batch_size, last=True)), workers))


def wins(rewards: np.ndarray, others: np.ndarray) -> np.ndarray:
    """1 where a response has a higher reward than the other one to its prompt, 0 where lower, 1/2 if equal: (N,).

    Raises ValueError for other shapes, and for rewards that are not finite.
    """
    rewards, others = checks.numbers("wins", "N", rewards=rewards, others=others)
    return (rewards > others) + 0.5 * (rewards == others)


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n: an upper bound of KL(best of n draws || the policy that draws), in nats.

    Beirami et al. 2024, arXiv:2401.01879, theorem 3.1. It is the divergence itself only if no two draws ever
    have the same reward or text. minilm.exact.enumerable.best_of_n has the exact distribution.
    """
    checks.integer("best_of_n_kl", "n", n, at_least=1)
    return math.log(n) - (n - 1) / n
