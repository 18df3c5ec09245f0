"""How far is the policy from the reference? Three estimators of a KL divergence, and their gradients.

Symbols, and how to read the code (@primitive, vjp, xp): objectives/__init__.py.

x is a prompt, y a response drawn from the policy pi. One sample gives

    k1 = log pi(y|x) - log pi_ref(y|x)
    k2 = k1^2 / 2
    k3 = exp(-k1) - 1 + k1

            expected value                       expected gradient, as a loss
    k1      KL(pi || pi_ref)                     0
    k2      close to it if pi is near pi_ref     grad KL(pi || pi_ref)
    k3      KL(pi || pi_ref)                     grad KL(pi_ref || pi)

"As a loss" means: the samples are fixed, and the estimator is differentiated. A single k1 may be negative; k2 and
k3 never are (exp(u) >= 1 + u). With finitely many responses the variance of k3 is finite, but very large if pi is
far below pi_ref for some of them. With infinitely many responses it is infinite if E[(pi_ref / pi)^2] or E[k1^2]
is infinite.

Values. E[k1] = sum_y pi log(pi / pi_ref) is the definition of KL(pi || pi_ref). E[k3] = E[k1], because
exp(-k1) = pi_ref / pi and E[pi_ref / pi] = sum_y pi_ref = 1.

Gradients. Only log pi depends on the parameters, so for one sample

    grad k1 = grad log pi
    grad k2 = k1 grad log pi
    grad k3 = (1 - exp(-k1)) grad log pi

Their expectations follow with pi grad log pi = grad pi and pi exp(-k1) = pi_ref:

    (a)  E[grad log pi]           = sum_y grad pi = grad 1 = 0
    (b)  E[k1 grad log pi]        = sum_y k1 grad pi
                                  = grad KL(pi || pi_ref), because grad sum_y pi k1 has one more term,
                                    sum_y pi grad k1, which is 0 by (a)
    (c)  E[exp(-k1) grad log pi]  = sum_y pi_ref grad log pi
                                  = -grad KL(pi_ref || pi), because KL(pi_ref || pi) is
                                    sum_y pi_ref (log pi_ref - log pi)

So E[grad k1] is (a), E[grad k2] is (b), and E[grad k3] is (a) - (c). k2 has the gradient of the KL that
RLHF penalises; k3, whose expected value is this KL, has the gradient of the KL in the other direction.

Other uses:
    In the reward r - beta kl, kl is a constant. Ascent then follows E[(r - beta kl) grad log pi], so the penalty
    contributes -beta E[kl grad log pi]. policy_gradient.py takes kl = k1: this is -beta (b). With
    kl = k3 = k1 + exp(-k1) - 1 it would be, term by term, -beta ((b) + (c) - (a)), which is
    -beta grad KL(pi || pi_ref) + beta grad KL(pi_ref || pi).
    The loss may be rho k3, with rho = pi / pi_old, where pi_old is the policy that drew the samples. By the
    product rule grad(rho k3) = k3 grad rho + rho grad k3. At pi = pi_old, rho is 1 and grad rho is grad log pi, so the
    expected gradient is E[k3 grad log pi] + E[grad k3] = (b) + (c) - (a) + (a) - (c) = grad KL(pi || pi_ref).

All of this holds for whole responses. Per token, k1, k2, k3 are computed from log pi(y_t) and log pi_ref(y_t),
and summed over the tokens of a response. With KL_t(y_<t) = KL( pi(.|x,y_<t) || pi_ref(.|x,y_<t) ), the
divergence of the two distributions of the next token, the chain rule of the KL divergence and its gradient are

    KL(pi || pi_ref)      = E_{y ~ pi}[ sum_t KL_t(y_<t) ]
    grad KL(pi || pi_ref) = E_{y ~ pi}[ sum_t grad KL_t(y_<t) ]
                          + E_{y ~ pi}[ sum_t grad log pi(y_t) sum_{s > t} KL_s(y_<s) ]

The second term is the effect of a token on the contexts of later tokens. Summed over tokens, k1 does not
change, and k3 keeps its expected value. The expected gradient of k2 is the first term alone, by (b) for every
KL_t; the second term is missing. The expected gradient of k3 is E_{y ~ pi}[ sum_t grad KL'_t(y_<t) ], where
KL'_t has pi_ref first; grad KL(pi_ref || pi) is the same with y ~ pi_ref in place of y ~ pi.
The forms of libraries, with ratios of tokens, and samples from an older policy: kl_in_the_loss.py.

Schulman 2020, "Approximating KL divergence", draws from q and writes r = p/q. His q is our pi and his p
our pi_ref, so r = exp(-k1) and log r = -k1: his -log r, (log r)^2 / 2 and (r - 1) - log r are k1, k2, k3.
Inserting r = pi / pi_ref there reverses the sign of k1.
Tests: tests/test_kl.py; both columns of the table, exactly, by enumeration: tests/test_exact_kl.py.
"""

import numpy as np

from minilm import checks, ops
from minilm.backend import array_module, to_numpy
from minilm.tensor import Tensor, primitive


def k1(policy: Tensor | np.ndarray, reference: np.ndarray) -> Tensor:
    """log pi(y|x) - log pi_ref(y|x), in nats, from log-probs of N responses (N,), or of their tokens (N,T).

    The result has the same shape. Raises ValueError for arguments of different shapes, as k2 and k3 do.
    """
    checks.same_shape("k1", policy=policy, reference=reference)
    return ops.subtract(policy, reference)


def k2(policy: Tensor | np.ndarray, reference: np.ndarray) -> Tensor:
    """k1^2 / 2, (N,), of the same log-probs: as a loss it has the expected gradient of KL(pi || pi_ref)."""
    log_ratio = k1(policy, reference)
    return log_ratio * log_ratio * 0.5


def k3(policy: Tensor | np.ndarray, reference: np.ndarray) -> Tensor:
    """exp(-k1) - 1 + k1, (N,): an unbiased and never negative estimate of KL(pi || pi_ref).

    It overflows to infinity where the policy gives the sample far less probability than the reference
    does: k1 < -709 in float64, -88 in float32.
    """
    return _k3_of_log_ratio(k1(policy, reference))


def kl_metrics(policy: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Estimates of KL(pi || pi_ref) from N samples of the policy: log-probs of T predicted tokens each, and the mask
    that selects those of the responses, plain arrays (N,T).

    kl_sequence  mean over responses of the summed k1, in nats per response
    kl_token     the same sum divided by the number of tokens, in nats per token (the `kl` of TRL's RLOO)
    An estimate from few samples may be negative; the divergence never is.
    Raises ValueError for shapes other than these, and for a mask of other values than 0 and 1.
    """
    checks.same_shape("kl_metrics", axes="NT", policy=policy, reference=reference, mask=mask)
    selected = checks.mask("kl_metrics", to_numpy(mask))
    token_k1 = np.where(selected, to_numpy(policy) - to_numpy(reference), 0.0)
    return {"kl_sequence": float(token_k1.sum(axis=-1).mean()),
            "kl_token": float(token_k1.sum() / max(1, selected.sum()))}


@primitive
def _k3_of_log_ratio(log_ratio):
    """exp(-u) - 1 + u.   d/du = 1 - exp(-u)

    Near u = 0, k3 is about u^2 / 2, the small difference of exp(-u) - 1 and -u. Rounding exp(-u) before 1
    is subtracted would leave no correct digit of it, and could make it negative; expm1 computes
    exp(-u) - 1 without this error. k1 and k2 need no such function: k2 only multiplies.
    """
    exp_minus_1 = array_module(log_ratio).expm1(-log_ratio)
    def vjp(dy):
        return -dy * exp_minus_1
    return exp_minus_1 + log_ratio, vjp
