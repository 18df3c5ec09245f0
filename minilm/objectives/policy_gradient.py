"""RLHF by policy gradient: maximise the reward while the policy stays close to the reference.

Symbols, and how to read the code (@primitive, vjp, xp): objectives/__init__.py.

x is a prompt, y a response, r(x,y) its reward, beta the weight of the KL penalty. For each prompt:

    J(pi) = E_{y ~ pi}[ r(x,y) ] - beta KL(pi || pi_ref)
          = E_{y ~ pi}[ R(x,y) ],           R(x,y) = r(x,y) - beta ( log pi(y|x) - log pi_ref(y|x) )

Gradient, for any number b (the baseline) that does not depend on y, although it may depend on x:

    grad J = E_{y ~ pi}[ (R(x,y) - b) grad log pi(y|x) ]

Proof. J = sum_y pi R, so grad J = sum_y R grad pi + sum_y pi grad R.
    First sum:   grad pi = pi grad log pi (the log-derivative trick), so it is E[R grad log pi].
    Second sum:  r and pi_ref do not depend on theta, so grad R = -beta grad log pi, and the sum is
                 -beta sum_y grad pi = -beta grad 1 = 0. Here the responses must be complete: y includes its EOS,
                 or ends at the limit of its length.
    Baseline:    E[b grad log pi] = b sum_y grad pi = b grad 1 = 0.

So R and b are treated as constants (detached, stop-gradient). With N responses y drawn from pi, and m_t = 1 on
the tokens of a response, 0 elsewhere:

    L = -(1/N) sum over responses of A log pi(y|x),                 A = R - b
    log pi(y|x) = sum_t m_t log pi(y_t)

    dL / d log pi(y_t) = -m_t A / N,            grad L = sum_{n,t} (dL / d log pi(y_t)) grad log pi(y_t)

where n runs over the responses. grad L is an estimate. With K responses to each prompt, and J averaged
over the prompts, its expectation over the draws depends on the baseline (`advantages`):

    none             -grad J
    leave_one_out    -grad J. b is computed from the other samples, which are independent of y. For any fixed values
                     of them, b is a number that does not depend on y, so the expectation is -grad J
    mean             -(1 - 1/K) grad J, because R_k - mean = (1 - 1/K) (R_k - mean of the others), where R_k is
                     the R of response k to the prompt
    group            biased. If R takes only two values, the expected gradient of each prompt is multiplied by a
                     positive factor, which differs between prompts. If R takes more values, the direction of each
                     prompt's gradient generally changes too

The value of L does not measure progress; the mean of R does, because it estimates J. (The mean of r does not:
it can rise while J falls, if the KL grows.)

Means over tokens. log pi(y|x) is a sum over the |y| tokens of y. Many libraries divide it by a number of tokens. Each
such mean is the loss L with advantages s A, where s > 0 depends on lengths alone (`token_mean`):

    None             s = 1                 the sum over tokens
    "response"       s = 1 / |y|           the mean over the tokens of each response: GRPO, arXiv:2402.03300, (3)
    "batch"          s = N / sum of |y|    the mean over all tokens of the batch: DAPO, arXiv:2503.14476
    a number C       s = 1 / C             a constant, as the limit of the length: Dr. GRPO, arXiv:2503.20783

    dL / d log pi(y_t) = -m_t s A / N

A constant C only scales the gradient. "response" is biased. Its expected gradient without a baseline is

    -E[ (R / |y|) grad log pi ] = -grad E[R / |y|],     R a constant in grad

because R / |y| takes the place of R in the proof: it maximises the reward per token. With the leave-one-out baseline,
whose expectation is J, the expected gradient is -grad E[(R - J) / |y|], R and J constants: a response that is worse
than the average loses less if it is longer, one that is better gains less. Where all R are equal, grad J = 0, and the
gradient without a baseline still makes responses longer if R < 0, shorter if R > 0 (the length bias). "batch" is biased
too, because s depends on y through the sum of the lengths: with N = 1 it is "response", and as N grows, s tends to the
constant 1 / E|y|, and its bias to 0.

Williams 1992 (REINFORCE). K responses for each prompt with the leave-one-out baseline: Kool et al. 2019;
Ahmadian et al. 2024, arXiv:2402.14740 (RLOO). The lecture regularises toward the pretrained model. Here,
as in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, (2)), pi_ref is the SFT model from which the
policy starts.
Tests: tests/test_policy_gradient.py; the expectations, exactly, by enumeration:
tests/test_exact_policy_gradient.py.
"""

import numpy as np

from minilm import checks
from minilm.backend import array_module
from minilm.tensor import Tensor, primitive


@primitive
def policy_gradient_loss(log_probs: Tensor, advantages: np.ndarray, mask: np.ndarray,
                         token_mean: str | float | None = None):
    """The loss L above, for N responses: a scalar.

    log_probs   (N,T), under the policy, of T predicted tokens a row (prompt positions may be among them); may be
                NaN outside the mask
    advantages  A, (N,), or one for each token (N,T) from reward_to_go; no gradient goes through it
    mask        (N,T), 1 on response tokens, 0 elsewhere
    token_mean  None, "response", "batch" or a number above 0: the mean over tokens, as above
    Raises ValueError for shapes and means other than these, for a mask with values other than 0 and 1, and for N = 0.
    """
    xp = array_module(log_probs)
    N = len(log_probs)
    weights, selected = _weights_and_mask("policy_gradient_loss", log_probs, advantages, mask, token_mean)
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
              "mean"           b = mean R of all K: (1 - 1/K) of the true gradient, in expectation. Needs K >= 2
              "group"          another form, A = (R - mean R) / (standard deviation of the K values + 1e-4).
                               Biased: prompts with little spread weigh more, and the standard deviation is
                               computed from the same samples that it normalises. Needs K >= 2
    "group" is the advantage of GRPO (Shao et al. 2024, arXiv:2402.03300), with ddof 1 and 1e-4 as in TRL; "mean" is
    that of Dr. GRPO, without the standard deviation (TRL: scale_rewards="none").
    TRL's GRPO has no KL in the reward; its advantages are the ones for beta = 0 here.
    Raises ValueError for shapes or names other than these, rewards or kl that are not finite, beta below 0, and too
    small a K.
    """
    rewards, kl = checks.numbers("advantages", "PK", hint="use samples.reshape(P, K)", rewards=rewards, kl=kl)
    checks.number("advantages", "beta", beta, at_least=0)
    checks.choice("advantages", "baseline", baseline, ("none", "mean", "leave_one_out", "group"))
    R = _shifted("advantages", rewards, baseline) - beta * _shifted("advantages", kl, baseline)
    if baseline == "group":
        return (R - R.mean(axis=1, keepdims=True)) / (R.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    return R - _baseline(R, baseline)


def reward_to_go(rewards: np.ndarray, token_kl: np.ndarray, mask: np.ndarray, beta: float,
                 baseline: str = "leave_one_out") -> np.ndarray:
    """Advantages of tokens, with the same expected gradient as `advantages`: a float64 array (P,K,T).

        A_t = r(x,y) - beta sum_{s >= t} k1_s - b,          k1_s = log pi(y_s) - log pi_ref(y_s)

    k1_s is the k1 of token s; their sum over a response is its k1. The terms k1_s of tokens before t are fixed
    by y_<t, and E[grad log pi(y_t) | y_<t] = sum_v grad pi(v | x, y_<t) = grad 1 = 0, where v runs over the
    vocabulary. So their product with grad log pi(y_t) has expectation 0; A of `advantages` contains them as noise.

    rewards   (P,K)
    token_kl  k1_t of each token, (P,K,T); may be NaN outside the mask
    mask      (P,K,T), 1 on response tokens; T is the number of columns, as in policy_gradient_loss
    baseline  "none", "leave_one_out" or "mean", of whole responses, as in `advantages`
    Raises ValueError as advantages does, for a mask of other values than 0 and 1, and for baseline "group", which has
    a standard deviation of whole responses, not of tokens.
    """
    P, K, _ = checks.same_shape("reward_to_go", axes="PKT", token_kl=token_kl, mask=mask)
    if np.shape(rewards) != (P, K):
        raise ValueError(f"reward_to_go: rewards {np.shape(rewards)} must be (P,K), which is {P, K} for this token_kl")
    checks.number("reward_to_go", "beta", beta, at_least=0)
    checks.choice("reward_to_go", "baseline", baseline, ("none", "mean", "leave_one_out"))
    rewards = _shifted("reward_to_go", rewards, baseline)
    k1 = np.where(checks.mask("reward_to_go", mask), np.asarray(token_kl, np.float64), 0.0)
    checks.finite("reward_to_go", "token_kl", k1, "token")
    remaining = np.flip(np.cumsum(np.flip(k1, axis=-1), axis=-1), axis=-1)
    b = _baseline(rewards - beta * k1.sum(axis=-1), baseline)
    return rewards[..., None] - beta * remaining - b[..., None]


@primitive
def ppo_clip_loss(log_probs: Tensor, old_log_probs: np.ndarray, advantages: np.ndarray, mask: np.ndarray,
                  epsilon: float = 0.2, level: str = "token", epsilon_high: float | None = None,
                  token_mean: str | float | None = None):
    """PPO's clipped loss, for several steps on the same samples, drawn from an older policy pi_old: a scalar.

        clip(rho) = rho, but at least 1 - epsilon and at most 1 + epsilon_high

    level "token": a ratio rho_t for each token; advantages (N,) or, with A_t in place of A, (N,T)

        L = -(1/N) sum over responses of s sum_t m_t min( rho_t A, clip(rho_t) A )
        rho_t = pi(y_t) / pi_old(y_t),                dL / d log pi(y_t) = -m_t s rho_t A / N, or 0

    level "sequence": one ratio rho for each response, as in TRL's RLOO; advantages (N,)

        L = -(1/N) sum over responses of min( rho A, clip(rho) A )
        rho = pi(y|x) / pi_old(y|x),                  dL / d log pi(y_t) = -m_t rho A / N, or 0

    level "geometric_mean": the same with the geometric mean of the rho_t, as in GSPO; advantages (N,)

        rho = (pi(y|x) / pi_old(y|x))^(1/|y|),        dL / d log pi(y_t) = -m_t (1/|y|) rho A / N, or 0

    The gradient follows from d rho = rho d log rho. It is 0 where the clipped side is the smaller one: the
    clip stops a step that has already moved the ratio by epsilon in the direction of the advantage. At a
    ratio of 1 it is the gradient of policy_gradient_loss; with the geometric mean, of token_mean "response".

    Off policy, without a clip, only the sequence ratio is unbiased: E_old[rho R grad log pi] = E[R grad log pi],
    because pi_old rho = pi. The token ratio corrects for the token itself, but not for the contexts before it, which
    were drawn from pi_old, nor for the tokens after it, on which R depends. The geometric mean corrects for neither,
    and has the length bias of "response" besides.
    R is that of pi. If its KL term is computed with pi_old, as in stages/rlhf.py after the first update, the sequence
    ratio gives the gradient of E_pi[r - beta log(pi_old/pi_ref)] = J + beta KL(pi || pi_old). It lacks
    -beta grad KL(pi || pi_old), which is 0 at pi = pi_old.

    log_probs, old_log_probs, mask  (N,T), as in policy_gradient_loss; log-probs may be NaN outside the mask
    epsilon_high  of the upper clip, where it is not epsilon: a larger one ("clip-higher", DAPO) lets tokens of small
                  probability gain more in one batch
    token_mean    s, as in policy_gradient_loss, for level "token": the others have no sum over tokens
    Raises ValueError for shapes, levels and means other than these, a mask with values other than 0 and 1,
    old_log_probs that are not finite within the mask, an epsilon not above 0 and finite, and for N = 0.
    Schulman et al. 2017, arXiv:1707.06347, (7). DAPO: Yu et al. 2025, arXiv:2503.14476. GSPO: Zheng et al. 2025,
    arXiv:2507.18071, (5), and in TRL importance_sampling_level "sequence".
    """
    checks.same_shape("ppo_clip_loss", log_probs=log_probs, old_log_probs=old_log_probs)
    checks.number("ppo_clip_loss", "epsilon", epsilon, above=0)
    high = epsilon if epsilon_high is None else checks.number("ppo_clip_loss", "epsilon_high", epsilon_high, above=0)
    checks.choice("ppo_clip_loss", "level", level, ("token", "sequence", "geometric_mean"))
    xp = array_module(log_probs)
    N = len(log_probs)
    A, selected = _weights_and_mask("ppo_clip_loss", log_probs, advantages, mask, token_mean)
    # A token that pi_old gave probability 0 was not drawn. Its ratio would be infinite, and the clip would hide it.
    checks.finite("ppo_clip_loss", "old_log_probs", xp.where(selected, xp.asarray(old_log_probs), 0), "token")
    log_ratio = xp.where(selected, log_probs - xp.asarray(old_log_probs), 0)            # (N,T)
    share = 1                                               # d log rho / d log pi(y_t)
    if level != "token":
        A = _of_responses(level, advantages, token_mean, log_probs)                     # (N,1)
        log_ratio = log_ratio.sum(axis=-1, keepdims=True)                               # (N,1)
    if level == "geometric_mean":
        share = 1 / _lengths(selected).astype(log_probs.dtype)                          # (N,1)
        log_ratio = log_ratio * share
    ratio = xp.exp(log_ratio)
    # An advantage of 0 has loss 0, even where the ratio has overflowed to infinity.
    unclipped = xp.where(A != 0, ratio, 1) * A
    clipped = xp.clip(ratio, 1 - epsilon, 1 + high) * A
    def vjp(dloss):
        return -dloss * xp.where(selected & (unclipped <= clipped), unclipped * share, 0) / N
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
    Raises ValueError for shapes other than these, rewards or kl that are not finite, and for a mask of other values
    than 0 and 1.
    """
    rewards, kl = checks.numbers("policy_gradient_metrics", "PK", rewards=rewards, kl=kl)
    checks.same_shape("policy_gradient_metrics", mask=mask, entropies=entropies)
    selected = checks.mask("policy_gradient_metrics", mask)
    if selected.ndim != 2 or len(selected) != rewards.size:
        raise ValueError(f"policy_gradient_metrics: mask {selected.shape} must be (N,T), N = P K = {rewards.size}")
    metrics = {"reward": float(rewards.mean()),
               "reward_std": float(rewards.std(ddof=1)) if rewards.size > 1 else 0.0,
               "frac_reward_zero_std": float(np.isclose(rewards.max(axis=1) - rewards.min(axis=1), 0).mean()),
               "kl_sequence": float(kl.mean()),
               "kl_token": float(kl.sum() / max(1, selected.sum())),
               "completions/mean_length": float(selected.sum(axis=-1).mean())}
    if entropies is not None:
        metrics["entropy"] = float(np.where(selected, entropies, 0).sum() / max(1, selected.sum()))
    return metrics


def _shifted(function, rewards, baseline):
    """Rewards or KLs (P,K) as float64. With a baseline, minus those of the prompt's first sample: A does not change,
    and is exactly 0 if all are equal, however large."""
    # float64: differences between the samples of a prompt may be small next to the rewards themselves.
    rewards = checks.finite(function, "rewards", np.asarray(rewards, np.float64), "sample")
    if baseline == "none":
        return rewards
    if rewards.shape[1] < 2:
        raise ValueError(f"{function}: baseline {baseline!r} compares the samples of a prompt: with K = 1 each A is 0 "
                         "or undefined. Draw at least 2 samples for each prompt, or take baseline 'none'")
    return rewards - rewards[:, :1]


def _baseline(R, baseline):
    """b, to subtract from R (P,K): zeros (P,K), the mean of each row (P,1), or the mean of the others (P,K)."""
    if baseline == "none":
        return np.zeros_like(R)
    if baseline == "mean":
        return R.mean(axis=1, keepdims=True)
    return (R.sum(axis=1, keepdims=True) - R) / (R.shape[1] - 1)


def _weights_and_mask(function, log_probs, advantages, mask, token_mean):
    """s A of each token, (N,T): exactly 0 outside the mask, even where the advantage there is NaN; the mask as bool."""
    checks.same_shape(function, axes="NT", log_probs=log_probs, mask=mask)
    xp = array_module(log_probs)
    selected = xp.asarray(checks.mask(function, mask))
    A = xp.asarray(advantages)
    if A.shape not in (log_probs.shape[:1], log_probs.shape):
        raise ValueError(f"{function}: advantages {A.shape} for log_probs {log_probs.shape}; give (N,) or (N,T)")
    A = A[:, None] if A.ndim == 1 else A
    if token_mean is not None:
        A = A * _scale(function, token_mean, selected)
    return xp.where(selected, A, 0).astype(log_probs.dtype), selected


def _scale(function, token_mean, selected):
    """s of a mean over tokens: a number, or one for each response (N,1)."""
    if not isinstance(token_mean, str):
        return 1 / checks.number(function, "token_mean", token_mean, above=0)
    checks.choice(function, "token_mean", token_mean, ("response", "batch"))
    lengths = _lengths(selected)
    return 1 / lengths if token_mean == "response" else len(selected) / selected.sum().clip(1)


def _lengths(selected):
    """|y| of each response, (N,1); 1 for an empty one, whose sum over tokens is 0."""
    return selected.sum(axis=-1, keepdims=True).clip(1)


def _of_responses(level, advantages, token_mean, log_probs):
    """A of each response, (N,1), for a level with one ratio for a response."""
    checks.same_shape("ppo_clip_loss", axes="N", hint=f"level {level!r} has one ratio for a response, and one "
                      "advantage; use level='token' for advantages (N,T)", advantages=advantages)
    if token_mean is not None:
        raise ValueError(f"ppo_clip_loss: token_mean is {token_mean!r}, but level {level!r} has one term for a "
                         "response and no sum over its tokens; leave token_mean out, or use level='token'")
    return array_module(log_probs).asarray(advantages)[:, None].astype(log_probs.dtype)
