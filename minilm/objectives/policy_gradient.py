"""RLHF by policy gradient: maximise the reward while the policy stays close to the reference.

x is a prompt, y a response, r(x,y) its reward, beta the weight of the KL penalty. For each prompt:

    J(pi) = E_{y ~ pi}[ r(x,y) ] - beta KL(pi || pi_ref)
          = E_{y ~ pi}[ R(x,y) ],           R(x,y) = r(x,y) - beta ( log pi(y|x) - log pi_ref(y|x) )

Gradient, for any number b (the baseline) that does not depend on y, although it may depend on x:

    grad J = E_{y ~ pi}[ (R(x,y) - b) grad log pi(y|x) ]

Proof. J = sum_y pi R, so grad J = sum_y R grad pi + sum_y pi grad R.
    First sum:   grad pi = pi grad log pi (the log-derivative trick), so it is E[R grad log pi].
    Second sum:  grad R = -beta grad log pi, so it is -beta sum_y grad pi = -beta grad 1 = 0. Here the
                 responses must be complete: y includes its EOS, or ends at the limit of its length.
    Baseline:    E[b grad log pi] = b sum_y grad pi = b grad 1 = 0.

So R and b are treated as constants (detached, stop-gradient). With N responses y drawn from pi, and m_t = 1 on
the tokens of a response and its EOS, 0 elsewhere:

    L = -(1/N) sum over responses of A log pi(y|x),                 A = R - b
    log pi(y|x) = sum_t m_t log pi(y_t)

    dL / d log pi(y_t) = -m_t A / N,            grad L = sum (dL / d log pi(y_t)) grad log pi(y_t)

with the sum over t and over responses. grad L is an estimate. With K responses to each prompt, and J averaged
over the prompts, its expectation over the draws depends on the baseline (`advantages`):

    none             -grad J
    leave_one_out    -grad J. The other samples are independent of y, so given them b is a number that does not
                     depend on y: the expectation is -grad J for all values of the others
    mean             -(1 - 1/K) grad J, because R_k - mean = (1 - 1/K) (R_k - mean of the others), where R_k is
                     the R of response k to the prompt
    group            biased. The gradient of each prompt has a factor of its own, and with more than two values of
                     R in general another direction too

The value of L does not measure progress; the mean of R does, because it estimates J. (The mean of r does not:
it can rise while J falls, if the KL grows.) log pi(y|x) is the sum over tokens. A mean over tokens would weigh a
response by the inverse of its length, and the result would not be the gradient of J.

Williams 1992 (REINFORCE). K responses for each prompt with the leave-one-out baseline: Kool et al. 2019;
Ahmadian et al. 2024, arXiv:2402.14740 (RLOO). The lecture regularises toward the pretrained model. Here,
as in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, (2)), pi_ref is the SFT model from which the
policy starts.
Tests: tests/test_policy_gradient.py; the expectations, exactly, by enumeration:
tests/test_exact_policy_gradient.py.
"""

import numpy as np

from minilm.backend import array_module
from minilm.tensor import Tensor, primitive


@primitive
def policy_gradient_loss(log_probs: Tensor, advantages: np.ndarray, mask: np.ndarray):
    """The loss L above, for N responses: a scalar.

    log_probs   (N,T), under the policy, of T predicted tokens a row (prompt positions may be among them); may be
                NaN outside the mask
    advantages  A, (N,), or one for each token (N,T) from reward_to_go; no gradient goes through it
    mask        (N,T), 1 on response tokens
    Raises ValueError for other shapes, and for N = 0.
    """
    xp = array_module(log_probs)
    N = len(log_probs)
    weights = _token_weights(log_probs, advantages, mask, xp)
    selected = xp.asarray(mask).astype(bool)
    loss = -(weights * xp.where(selected, log_probs, 0)).sum() / N
    def vjp(dloss):
        return -dloss * weights / N
    return loss, vjp


def advantages(rewards: np.ndarray, kl: np.ndarray, beta: float, baseline: str = "leave_one_out") -> np.ndarray:
    """A = R - b ("group": standardised R) for K responses to each of P prompts: a float64 array (P,K).

    R = rewards - beta kl

    rewards   r(x,y), (P,K)
    kl        k1 of each response, log pi(y|x) - log pi_ref(y|x) summed over its tokens, (P,K), in nats
    baseline  "none"           b = 0
              "leave_one_out"  b = mean R of the other K - 1 responses to the prompt, so it does not
                               depend on y: unbiased. Needs K >= 2
              "mean"           b = mean R of all K: (1 - 1/K) of the true gradient, in expectation
              "group"          another form, A = (R - mean R) / (standard deviation of the K values + 1e-4).
                               Biased: prompts with little spread weigh more, and the standard deviation is
                               computed from the same samples that it normalises. Needs K >= 2
    "group" is the advantage of GRPO (Shao et al. 2024, arXiv:2402.03300), with ddof 1 and 1e-4 as in TRL.
    TRL's GRPO has no KL in the reward: the same as here at beta = 0.
    Raises ValueError for other shapes or names, and for too small a K.
    """
    if np.ndim(rewards) != 2 or np.shape(rewards) != np.shape(kl):
        raise ValueError(f"advantages: rewards {np.shape(rewards)} and kl {np.shape(kl)} must have the same shape "
                         "(P,K), a row for each prompt; reshape N = P K samples with .reshape(P, K)")
    # float64: differences between the samples of a prompt may be small next to the rewards themselves.
    R = np.asarray(rewards, np.float64) - beta * np.asarray(kl, np.float64)
    return _standardised(R) if baseline == "group" else R - _baseline(R, baseline)


def reward_to_go(rewards: np.ndarray, token_kl: np.ndarray, mask: np.ndarray, beta: float,
                 baseline: str = "leave_one_out") -> np.ndarray:
    """Advantages of tokens, with the same expected gradient and usually less variance: a float64 array (P,K,T).

        A_t = r(x,y) - beta sum_{s >= t} k1_s - b,          k1_s = log pi(y_s) - log pi_ref(y_s)

    k1_s is the k1 of token s; their sum over a response is its k1. The terms k1_s of tokens before t are fixed
    by y_<t, and E[grad log pi(y_t) | y_<t] = sum_v grad pi(v | x, y_<t) = grad 1 = 0, where v runs over the
    vocabulary. So their product with grad log pi(y_t) has expectation 0; A of `advantages` contains them as noise.

    rewards   (P,K)
    token_kl  k1_t of each token, (P,K,T); may be NaN outside the mask
    mask      (P,K,T), 1 on response tokens; T is the number of columns, as in policy_gradient_loss
    baseline  "none", "leave_one_out" or "mean", of whole responses, as in `advantages`
    Raises ValueError for other shapes or names, and for too small a K.
    """
    if baseline == "group":
        raise ValueError("reward_to_go: baseline 'group' has a standard deviation of whole responses, not of tokens; "
                         "use 'none', 'mean' or 'leave_one_out'")
    if np.ndim(token_kl) != 3 or np.shape(rewards) != np.shape(token_kl)[:2] or np.shape(mask) != np.shape(token_kl):
        raise ValueError(f"reward_to_go: expected rewards (P,K), token_kl and mask (P,K,T); "
                         f"got {np.shape(rewards)}, {np.shape(token_kl)} and {np.shape(mask)}")
    rewards = np.asarray(rewards, np.float64)           # float64 as in advantages
    token_kl = np.asarray(token_kl, np.float64)
    k1 = np.where(np.asarray(mask).astype(bool), token_kl, 0.0)
    remaining = np.flip(np.cumsum(np.flip(k1, axis=-1), axis=-1), axis=-1)
    b = _baseline(rewards - beta * k1.sum(axis=-1), baseline)
    return rewards[..., None] - beta * remaining - b[..., None]


@primitive
def ppo_clip_loss(log_probs: Tensor, old_log_probs: np.ndarray, advantages: np.ndarray, mask: np.ndarray,
                  epsilon: float = 0.2, level: str = "token"):
    """PPO's clipped loss, for several steps on the same samples, drawn from an older policy pi_old: a scalar.

    level "token": a ratio rho_t for each token; advantages (N,) or, with A_t in place of A, (N,T)

        L = -(1/N) sum over responses of sum_t m_t min( rho_t A, clip(rho_t, 1 - epsilon, 1 + epsilon) A )
        rho_t = pi(y_t) / pi_old(y_t),              dL / d log pi(y_t) = -m_t rho_t A / N, or 0

    level "sequence": one ratio rho for each response, as in TRL's RLOO; advantages (N,)

        L = -(1/N) sum over responses of min( rho A, clip(rho, 1 - epsilon, 1 + epsilon) A )
        rho = pi(y|x) / pi_old(y|x),                dL / d log pi(y_t) = -m_t rho A / N, or 0

    The gradient follows from d rho = rho d log rho. It is 0 where the clipped side is the smaller one: the
    clip stops a step that has already moved the ratio by epsilon in the direction of the advantage. At a
    ratio of 1 it is the gradient of policy_gradient_loss.

    log_probs, old_log_probs, mask  (N,T), as in policy_gradient_loss; log-probs may be NaN outside the mask
    Raises ValueError for other shapes, another level, and for N = 0.
    Schulman et al. 2017, arXiv:1707.06347, (7).
    """
    xp = array_module(log_probs)
    N = len(log_probs)
    A = _token_weights(log_probs, advantages, mask, xp)
    selected = xp.asarray(mask).astype(bool)
    log_ratio = xp.where(selected, log_probs - xp.asarray(old_log_probs), 0)            # (N,T)
    if level == "sequence":
        A = xp.asarray(advantages)
        if A.ndim != 1:
            raise ValueError(f"level 'sequence' has one ratio for a response and needs one advantage for it, "
                             f"advantages (N,); got {A.shape}. Use level='token' for advantages (N,T)")
        A = A[:, None].astype(log_probs.dtype)                                          # (N,1)
        log_ratio = log_ratio.sum(axis=-1, keepdims=True)                               # (N,1)
    elif level != "token":
        raise ValueError(f"level is {level!r}; it must be 'token' or 'sequence'")
    ratio = xp.exp(log_ratio)
    # An advantage of 0 has loss 0, even where the ratio has overflowed to infinity.
    unclipped = xp.where(A != 0, ratio, 1) * A
    clipped = xp.clip(ratio, 1 - epsilon, 1 + epsilon) * A
    def vjp(dloss):
        return -dloss * xp.where(selected & (unclipped <= clipped), unclipped, 0) / N
    return -xp.minimum(unclipped, clipped).sum() / N, vjp


def policy_gradient_metrics(rewards: np.ndarray, kl: np.ndarray, mask: np.ndarray,
                            entropies: np.ndarray | None = None) -> dict[str, float]:
    """Metrics of N = P K samples under TRL's names, for rewards and kl (P,K), mask and entropies (N,T).

    reward, reward_std       mean, and standard deviation over all samples (ddof 1)
    frac_reward_zero_std     fraction of prompts whose samples all have the same reward (as TRL's GRPO;
                             TRL's RLOO subtracts the KL first)
    kl_sequence, kl_token    KL(pi || pi_ref) in nats per response, and per token (the `kl` of TRL's RLOO)
    completions/mean_length  tokens per response
    entropy                  of the next-token distributions, in nats per token, if entropies are given
    """
    rewards = np.asarray(rewards)
    kl = np.asarray(kl)
    selected = np.asarray(mask).astype(bool)
    metrics = {"reward": float(rewards.mean()),
               "reward_std": float(rewards.std(ddof=1)) if rewards.size > 1 else 0.0,
               "frac_reward_zero_std": float(np.isclose(rewards.std(axis=1), 0).mean()),
               "kl_sequence": float(kl.mean()),
               "kl_token": float(kl.sum() / max(1, selected.sum())),
               "completions/mean_length": float(selected.sum(axis=-1).mean())}
    if entropies is not None:
        metrics["entropy"] = float(np.where(selected, entropies, 0).sum() / max(1, selected.sum()))
    return metrics


def _baseline(R, baseline):
    """b, to subtract from R (P,K): zeros (P,K), the mean of each row (P,1), or the mean of the others (P,K)."""
    K = R.shape[1]
    if baseline == "none":
        return np.zeros_like(R)
    if baseline == "mean":
        return R.mean(axis=1, keepdims=True)
    if baseline == "leave_one_out":
        if K < 2:
            raise ValueError("advantages: baseline 'leave_one_out' is the mean of the other samples of a prompt; "
                             f"it needs at least 2 samples for each prompt, got K = {K}")
        return (R.sum(axis=1, keepdims=True) - R) / (K - 1)
    raise ValueError(f"baseline is {baseline!r}; it must be 'none', 'mean', 'leave_one_out' or, in advantages, 'group'")


def _standardised(R):
    """Each row of R (P,K), minus its mean, divided by its standard deviation + 1e-4."""
    if R.shape[1] < 2:
        raise ValueError("advantages: baseline 'group' has a standard deviation; "
                         f"it needs at least 2 samples for each prompt, got K = {R.shape[1]}")
    return (R - R.mean(axis=1, keepdims=True)) / (R.std(axis=1, ddof=1, keepdims=True) + 1e-4)


def _token_weights(log_probs, advantages, mask, xp):
    """A of each token, (N,T): exactly 0 outside the mask, even where the advantage there is NaN."""
    A = xp.asarray(advantages)
    selected = xp.asarray(mask).astype(bool)
    fits = log_probs.ndim == 2 and A.shape in (log_probs.shape[:1], log_probs.shape)
    if not fits or selected.shape != log_probs.shape or not len(A):
        raise ValueError(f"got log_probs {log_probs.shape}, advantages {A.shape}, mask {selected.shape}; "
                         "expected (N,T), (N,) or (N,T), and (N,T), N at least 1")
    A = A[:, None] if A.ndim == 1 else A
    return xp.where(selected, A, 0).astype(log_probs.dtype)
