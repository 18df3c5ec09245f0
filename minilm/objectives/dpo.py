"""Direct preference optimisation: the policy is its own reward model.

The policy that maximises E[r] - beta KL(pi || pi_ref) is pi*(y) = pi_ref(y) exp(r(y)/beta) / Z, for
that objective is beta log Z - beta KL(pi || pi*), and a KL divergence is least, 0, at pi = pi*.
Solved for the reward, r(y) = beta log( pi*(y) / pi_ref(y) ) + beta log Z; Z depends on the prompt
alone and cancels between two responses to it. Put into the Bradley-Terry loss of reward.py:

    Delta = (l_c - l_c^ref) - (l_r - l_r^ref),        l = log pi(y), summed over the tokens of y

    L = mean[ -log sigma(beta Delta) ]

    dL/dl_c = -beta sigma(-beta Delta) / B,           dL/dl_r = -dL/dl_c

since d/dz -log sigma(z) = -sigma(-z) at z = beta Delta, dDelta/dl_c = 1 and dDelta/dl_r = -1. So the
chosen response is pushed up and the rejected one down, by beta times the probability that the implied
rewards give to the wrong order. Only the difference counts: both log-probs may fall while the loss
does too. A small step of gradient descent on one pair moves l_c by learning_rate beta sigma(-beta Delta)
( |grad l_c|^2 - <grad l_c, grad l_r> ): down, where the two share more of their gradient than the
chosen one has itself.
Rafailov et al. 2023, arXiv:2305.18290: pi* is (4), r is (5), L is (7). L starts at log 2, bitwise
when policy and reference log-probs are the same array. log sigma is computed by softplus: finite at
any finite Delta.
Tests: tests/test_dpo.py; by enumeration: tests/test_exact_optimum.py, tests/test_exact_dpo_gradient.py.
"""

import numpy as np

from minilm.backend import array_module, to_numpy
from minilm.ops import stable_sigmoid
from minilm.tensor import primitive


@primitive
def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1, label_smoothing=0.0):
    """Summed log-probs (B,), policy's as Tensors and reference's as arrays -> a scalar.

    label_smoothing eps in [0, 1/2): cDPO (Mitchell 2023, "A note on DPO with noisy
    preferences"), the loss for labels that are wrong with
    probability eps:  (1 - eps) L(c,r) + eps L(r,c). It keeps Delta finite, at
    beta Delta = log((1 - eps)/eps); it does not undo the flips, robust_dpo_loss does. (TRL 1.16 has the
    option and ignores it here.)
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing {label_smoothing} must be at least 0 and below 1/2")
    xp, B, delta = _delta(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    z, eps = beta * delta, label_smoothing
    losses = (1 - eps) * xp.logaddexp(-z, 0) + eps * xp.logaddexp(z, 0)
    def vjp(dloss):
        dz = dloss * (eps * stable_sigmoid(z) - (1 - eps) * stable_sigmoid(-z)) / B
        return beta * dz, -beta * dz
    return _mean(losses), vjp


@primitive
def robust_dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1, flip_rate=0.1):
    """[ (1 - eps) L(c,r) - eps L(r,c) ] / (1 - 2 eps): Chowdhury et al. 2024, arXiv:2403.00409.

    If labels are flipped with probability eps = flip_rate < 1/2, its expectation over the flips is
    the loss on clean labels. It is unbounded below: a pair that is fitted far enough pays forever.
    """
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"flip_rate {flip_rate} must be at least 0 and below 1/2")
    xp, B, delta = _delta(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    z, eps = beta * delta, flip_rate
    losses = ((1 - eps) * xp.logaddexp(-z, 0) - eps * xp.logaddexp(z, 0)) / (1 - 2 * eps)
    def vjp(dloss):
        dz = -dloss * ((1 - eps) * stable_sigmoid(-z) + eps * stable_sigmoid(z)) / (1 - 2 * eps) / B
        return beta * dz, -beta * dz
    return _mean(losses), vjp


@primitive
def ipo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1):
    """mean[ (Delta - 1/(2 beta))^2 ]: Azar et al. 2023, arXiv:2310.12036, (17) (their tau is beta).

    A target for Delta instead of a push without end. On summed log-probs, as in the paper (TRL
    averages over tokens first). It starts at 1/(4 beta^2), and its optimum is another than pi*.
    """
    xp, B, delta = _delta(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    short = delta - 1 / (2 * beta)
    def vjp(dloss):
        d = 2 * dloss * short / B
        return d, -d
    return (short * short).mean(), vjp


def length_normalised_dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected,
                               chosen_lengths, rejected_lengths, beta=0.1):
    """DPO on log-probs per token (Lambert et al. 2024, arXiv:2411.15124, (6)): lengths (B,), in tokens.

    A response cannot win or lose by its length alone. beta then weighs a mean and not a sum: it is
    larger, by about the number of tokens, for the same pull.
    """
    if min(map(np.min, (chosen_lengths, rejected_lengths))) < 1:
        raise ValueError("length_normalised_dpo_loss: a response of length 0 has no mean; "
                         "every length must be at least 1")
    xp = array_module(policy_chosen.data)
    c, r = (xp.asarray((1 / np.asarray(n)).astype(policy_chosen.dtype)) for n in (chosen_lengths, rejected_lengths))
    reference_chosen, reference_rejected = xp.asarray(reference_chosen), xp.asarray(reference_rejected)
    return dpo_loss(policy_chosen * c, policy_rejected * r, reference_chosen * c, reference_rejected * r, beta=beta)


def dpo_metrics(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1):
    """Floats under TRL's names, from arrays (B,).

    rewards/... are the implied rewards beta (l - l^ref); rewards/accuracies counts strictly
    greater ones, so it is 0 at the first step, when all are equal; `rewards/ties` is ours.
    """
    policy_chosen, policy_rejected = to_numpy(policy_chosen), to_numpy(policy_rejected)
    reference_chosen, reference_rejected = to_numpy(reference_chosen), to_numpy(reference_rejected)
    chosen, rejected = beta * (policy_chosen - reference_chosen), beta * (policy_rejected - reference_rejected)
    return {"rewards/chosen": float(chosen.mean()),
            "rewards/rejected": float(rejected.mean()),
            "rewards/margins": float((chosen - rejected).mean()),
            "rewards/accuracies": float((chosen > rejected).mean()),
            "rewards/ties": float((chosen == rejected).mean()),
            "logps/chosen": float(np.mean(policy_chosen)),
            "logps/rejected": float(np.mean(policy_rejected))}


def _delta(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    xp = array_module(policy_chosen, policy_rejected)
    shapes = {xp.asarray(a).shape for a in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)}
    if len(shapes) > 1 or policy_chosen.ndim != 1 or not policy_chosen.size:
        raise ValueError("expected four arrays of summed log-probs, each (B,), B at least 1")
    delta = (policy_chosen - xp.asarray(reference_chosen)) - (policy_rejected - xp.asarray(reference_rejected))
    return xp, policy_chosen.size, delta


def _mean(losses):
    # Of equal numbers, exactly that number: the loss starts at log 2 to the last bit.
    lowest = losses.min()
    return lowest + (losses - lowest).mean()
