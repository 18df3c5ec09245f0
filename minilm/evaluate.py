"""Measuring a policy: what it answers, how far it moved, how often it wins. Plain arrays throughout.

Every mean comes with its standard error; the N responses behind it are independent draws, one for
each of N prompts.
"""

import numpy as np

from minilm.backend import concatenate
from minilm.packing import packs
from minilm.tensor import no_grad


def mean_and_error(values):
    """The mean of N numbers, and its standard error (ddof 1; nan for a single number)."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def sequence_kl(policy, reference, prompts, responses, batch_size=128):
    """log pi(y) - log pi_ref(y) of each response, at temperature 1: (N,).

    For responses drawn from the policy at temperature 1 the mean is an unbiased estimate of
    KL(pi || pi_ref) over whole responses; single values may be negative.
    """
    k1 = []
    with no_grad():
        for part in packs(prompts, responses, batch_size):
            ratio = policy.response_log_probs(part).data - reference.response_log_probs(part).data
            k1.append(ratio.sum(axis=1))
    return concatenate(k1)


def predicted_rewards(reward_model, prompts, responses, batch_size=128):
    """What a RewardModel gives each response: (N,)."""
    rewards = []
    with no_grad():
        for part in packs(prompts, responses, batch_size, last=True):
            rewards.append(reward_model.packed_rewards(part).data)
    return concatenate(rewards)


def wins(rewards, others):
    """1 where a response beats the other's on the same prompt, 0 where it loses, 1/2 for a tie: (N,)."""
    rewards, others = np.asarray(rewards), np.asarray(others)
    return (rewards > others) + 0.5 * (rewards == others)


def best_of_n_kl(n):
    """Upper bound of the KL divergence between best-of-n and the policy it picks from.

    log n - (n - 1)/n: Beirami et al. 2024, arXiv:2401.01879, theorem 3.1; equal to it only if no two
    responses ever have the same reward or text. Exactly, where the responses can be listed:
    minilm.exact.enumerable.best_of_n.
    """
    return float(np.log(n) - (n - 1) / n)
