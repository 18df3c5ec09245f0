"""RLHF: maximise the reward while staying close to the reference.

    J(pi) = E_{y ~ pi}[ r(y) ] - beta KL(pi || pi_ref) = E_{y ~ pi}[ R(y) ],
    R(y) = r(y) - beta ( log pi(y) - log pi_ref(y) )

    grad J = E[ (R(y) - b) grad log pi(y) ]

by the log-derivative trick, grad pi = pi grad log pi: the gradient of sum_y pi R is
E[R grad log pi] + E[grad R], and the second term is -beta E[grad log pi] = -beta grad sum_y pi =
-beta grad 1 = 0. For the same reason any b that does not depend on y may be subtracted.
So R is a number, without gradient, and

    L = - mean over responses of A log pi(y),     A = R - b,     log pi(y) = sum_t m_t log pi_t

    dL / d log pi_t = - m_t A / N

has the gradient of -J. log pi is summed, not averaged, over the tokens: a mean per response
would weigh a token by the inverse of its response's length, which is not the gradient of J.
Williams 1992 (REINFORCE); the whole-response form with K samples a prompt and leave-one-out:
Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740 (RLOO).
The reference: the lecture regularises toward the pretrained model; in practice, InstructGPT's
(Ouyang et al. 2022, arXiv:2203.02155, (2)) included, it is the instructed one, from which the
policy starts. So it is here.
Tests: tests/test_policy_gradient.py; the expectations, by enumeration: tests/test_exact_policy_gradient.py.
"""

import numpy as np

from minilm.backend import array_module
from minilm.tensor import primitive


def advantages(rewards, kl, beta, baseline="leave_one_out"):
    """A = R - b for K samples of each of P prompts, plain arrays: (P,K), (P,K) -> (P,K).

    rewards   r(y); kl: the summed k1 of each response, log pi(y) - log pi_ref(y)
    baseline  "none": b = 0
              "leave_one_out": the mean R of the prompt's other samples; unbiased, needs K >= 2
              "mean": the mean R of all K, y's own included; the expected gradient shrinks to
                  (1 - 1/K) of the true one
              "group": the mean, and then divided by the standard deviation within the group,
                  as GRPO does (Shao et al. 2024, arXiv:2402.03300; ddof 1 and eps 1e-4 as TRL, whose
                  GRPO has no KL in the reward: the same at beta = 0);
                  biased: prompts with little spread weigh more, and within a prompt the deviation
                  is one of the same samples
    """
    if np.ndim(rewards) != 2 or np.shape(rewards) != np.shape(kl):
        raise ValueError(f"advantages: rewards {np.shape(rewards)} and kl {np.shape(kl)} must both be (P,K)")
    # In float64: differences within a group may be small next to the rewards themselves.
    R = np.asarray(rewards, np.float64) - beta * np.asarray(kl, np.float64)
    return R - _baseline(R, baseline) if baseline != "group" else _standardised(R)


def _baseline(R, baseline):
    P, K = R.shape
    if baseline == "none":
        return np.zeros_like(R)
    if baseline == "mean":
        return R.mean(axis=1, keepdims=True)
    if baseline == "leave_one_out":
        if K < 2:
            raise ValueError("advantages: leave_one_out compares a sample with the others of its prompt; "
                             f"it needs at least 2 samples a prompt, not {K}")
        return (R.sum(axis=1, keepdims=True) - R) / (K - 1)
    raise ValueError(f"baseline is {baseline!r}; it must be 'none', 'mean', 'leave_one_out' or, in advantages, 'group'")


def _standardised(R):
    if R.shape[1] < 2:
        raise ValueError("advantages: group needs at least 2 samples a prompt for a standard deviation")
    return (R - R.mean(axis=1, keepdims=True)) / (R.std(axis=1, ddof=1, keepdims=True) + 1e-4)


def reward_to_go(rewards, token_kl, mask, beta, baseline="leave_one_out"):
    """Advantages per token: (P,K), (P,K,T), (P,K,T) -> (P,K,T).

    The choice at token t cannot change the KL paid before t, so that part of R only adds noise:
    A_t = r - beta sum_{s >= t} k1_s - b, with the baseline (of whole responses) as above.
    """
    if baseline == "group":
        raise ValueError("reward_to_go: a group's standard deviation is one of whole responses; "
                         "use none, mean or leave_one_out")
    if np.ndim(token_kl) != 3 or np.shape(rewards) != np.shape(token_kl)[:2] or np.shape(mask) != np.shape(token_kl):
        raise ValueError(f"reward_to_go: expected rewards (P,K), token_kl and mask (P,K,T); "
                         f"got {np.shape(rewards)}, {np.shape(token_kl)} and {np.shape(mask)}")
    rewards, token_kl = np.asarray(rewards, np.float64), np.asarray(token_kl, np.float64)      # as in advantages
    k1 = np.where(np.asarray(mask).astype(bool), token_kl, 0.0)
    remaining = np.flip(np.cumsum(np.flip(k1, axis=-1), axis=-1), axis=-1)
    b = _baseline(rewards - beta * k1.sum(axis=-1), baseline)
    return rewards[..., None] - beta * remaining - b[..., None]


@primitive
def policy_gradient_loss(log_probs, advantages, mask):
    """Minus the mean over N responses of advantage times summed log-prob: a scalar.

    log_probs (N,T) of the tokens drawn; advantages (N,), or (N,T) from reward_to_go;
    mask (N,T) 1 on response tokens. The value is no measure of progress; its gradient is
    what matters. Log-probs outside the mask may be NaN.
    """
    xp = array_module(log_probs)
    weights = _token_weights(log_probs, advantages, mask, xp)
    selected = xp.asarray(mask).astype(bool)
    def vjp(dloss):
        return -dloss * weights / len(log_probs)
    return -(weights * xp.where(selected, log_probs, 0)).sum() / len(log_probs), vjp


@primitive
def ppo_clip_loss(log_probs, old_log_probs, advantages, mask, epsilon=0.2, level="token"):
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, (7)), for samples reused.

        L = - mean over responses of  sum_t min( rho_t A, clip(rho_t, 1 - eps, 1 + eps) A )

    level "token": rho_t = pi_t / pi_old_t, one per token; advantages (N,) or (N,T).
    level "sequence": no sum, but one ratio for the whole response, pi(y) / pi_old(y), as in TRL's
    RLOO; advantages (N,). d rho = rho d log pi, and nothing where the clipped side is the smaller.
    At rho = 1 both have the gradient of policy_gradient_loss.
    """
    xp = array_module(log_probs)
    weights = _token_weights(log_probs, advantages, mask, xp)
    selected = xp.asarray(mask).astype(bool)
    old_log_probs, advantages = xp.asarray(old_log_probs), xp.asarray(advantages)
    log_ratio = xp.where(selected, log_probs - old_log_probs, 0)
    if level == "sequence":
        if advantages.ndim != 1:
            raise ValueError("one ratio for a whole response needs one advantage for it: advantages (N,)")
        log_ratio, A = log_ratio.sum(axis=-1, keepdims=True), xp.asarray(advantages)[:, None]
    elif level == "token":
        A = weights
    else:
        raise ValueError(f"level is {level!r}; it must be 'token' or 'sequence'")
    A = A.astype(log_probs.dtype)
    ratio = xp.exp(log_ratio)
    # No advantage, no loss, even where the ratio has overflowed.
    free, clipped = xp.where(A != 0, ratio, 1) * A, xp.clip(ratio, 1 - epsilon, 1 + epsilon) * A
    def vjp(dloss):
        return -dloss * xp.where(selected & (free <= clipped), free, 0) / len(log_probs)
    return -xp.minimum(free, clipped).sum() / len(log_probs), vjp


def _token_weights(log_probs, advantages, mask, xp):
    """A_t m_t, (N,T); exactly 0 outside the mask whatever stands there."""
    A = xp.asarray(advantages)
    A = A[:, None] if A.ndim == 1 else A
    selected = xp.asarray(mask).astype(bool)
    if selected.shape != log_probs.shape or len(A) != len(log_probs) or not len(A):
        raise ValueError("expected log_probs (N,T), advantages (N,) or (N,T), mask (N,T), N at least 1")
    return xp.where(selected, A, 0).astype(log_probs.dtype)


def policy_gradient_metrics(rewards, kl, mask, entropies=None):
    """Floats for rewards and kl (P,K), mask (N,T), entropies (N,T) or None, under TRL's names.

    reward, reward_std (ddof 1 over all samples), frac_reward_zero_std (prompts whose samples all got
    the same reward, as GRPO counts them; TRL's RLOO takes the KL off first), completions/mean_length;
    kl_sequence and kl_token (the latter is the `kl` of TRL's RLOO); entropy per token.
    """
    rewards, kl, selected = np.asarray(rewards), np.asarray(kl), np.asarray(mask).astype(bool)
    metrics = {"reward": float(rewards.mean()),
               "reward_std": float(rewards.std(ddof=1)) if rewards.size > 1 else 0.0,
               "frac_reward_zero_std": float(np.isclose(rewards.std(axis=1), 0).mean()),
               "kl_sequence": float(kl.mean()),
               "kl_token": float(kl.sum() / max(1, selected.sum())),
               "completions/mean_length": float(selected.sum(axis=-1).mean())}
    if entropies is not None:
        metrics["entropy"] = float(np.where(selected, entropies, 0).sum() / max(1, selected.sum()))
    return metrics
