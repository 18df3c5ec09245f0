"""The KL penalty as a term of the loss: the forms that trainers use, and the gradient that each has in expectation.

Symbols, and how to read the code: objectives/__init__.py. k1, k2, k3, and the two parts of grad KL: kl.py.

Samples y are drawn from pi_old, an older policy, or pi itself. c = (x, y_<t) is the context of token t, and KL_t(c) the
divergence KL(pi(.|c) || pi_ref(.|c)) of the two distributions of the next token. With a ratio
rho_t = pi(y_t|c) / pi_old(y_t|c) of each token, and k1_t, k2_t, k3_t computed from single tokens, the terms are

            term, summed over tokens                 its users                        expected gradient
    (1)     rho(y) k3(y), of the whole response      minilm                           grad KL(pi || pi_ref)
    (2)     rho_t k3_t                               DeepSeek-V3.2, TRL, slime        E_old[ sum_t grad KL_t ]
    (3)     rho_t k1_t grad log pi(y_t)              OpenRLHF (unbiased_gradient)     E_old[ sum_t grad KL_t ]
    (4)     k2_t, on policy                          OpenRLHF, REINFORCE++            E_pi[ sum_t grad KL_t ]
    (5)     k3_t, on policy                          GRPO, TRL before July 2026       E_pi[ sum_t grad KL'_t ]
    (6)     (geometric mean of the rho_s) k3_t       TRL, at the level of sequences   none of these

(3) is a gradient; a loss with this gradient is policy_gradient_loss with advantages -rho_t k1_t of the tokens, or k2_t
times rho_t as a constant. KL'_t is KL_t with pi_ref first.

Proofs. In a given context, the expectation over y_t ~ pi_old of rho_t f(y_t) is the sum over the vocabulary
sum_v pi(v|c) f(v), because pi_old rho_t = pi.

    (1)  E_old[rho(y) k3(y)] = sum_y pi k3 = KL(pi || pi_ref), for all parameters, so the gradients are equal too.
    (2)  The expectation of rho_t k3_t given c is KL_t(c), by (1) for one token. So the expected loss is
         E_old[ sum_t KL_t ]. The parameters are in KL_t, and not in the contexts, which are drawn from pi_old.
    (3)  sum_v pi k1 grad log pi = grad KL_t(c), by (b) of kl.py.
    (4)  grad k2_t = k1_t grad log pi(y_t): this is (3) with rho_t = 1.
    (5)  (a) - (c) of kl.py, for one token.

By the chain rule (kl.py), grad KL(pi || pi_ref) has a second part, the effect of a token on the contexts of later ones:

    grad KL(pi || pi_ref) = E_pi[ sum_t grad KL_t ] + E_pi[ sum_t grad log pi(y_t) sum_{s > t} KL_s ]

(2) to (5) lack it: as an advantage of token t, -k1_t takes the place of -sum_{s >= t} k1_s, which is reward_to_go, and
unbiased. (6) has, on policy, the gradient of (5) plus (1/|y|) grad log pi(y|x) sum_s k3_s. If all responses have n
tokens, the expectation of this term is 1/n of what (5) lacks, because E_pi[sum_s k3_s] = KL(pi || pi_ref) for all
parameters; if lengths differ it is not, because 1/|y| depends on the tokens.
So "unbiased" is true of (2), (3) and (4) for the KL of each next token in contexts held fixed. For the KL of responses
it is true on policy, and near the reference, to first order: at distance d of pi from pi_ref, grad KL_t is of the order
d, and KL_s, in the second part, of d^2. grad KL_t and grad KL'_t also agree to first order (KL_t and KL'_t to second),
so (5) is near for the same reason.
Off policy the error does not vanish near the reference, because the contexts are still those of pi_old.

The relative error |g - e| / |e| of the expected gradient g from e = grad KL(pi || pi_ref), on policy, by enumeration
(V = 3, up to 4 tokens; median and largest of 8 pairs of random Transformers, whose policies are far from uniform):

    median KL, in nats    0.003           0.03            0.24            0.91
    (1)                   below 1e-13     below 1e-13     below 1e-13     below 1e-13
    (2) (3) (4)           0.014 0.022     0.045 0.073     0.13 0.21       0.49 1.2
    (5)                   0.032 0.049     0.11 0.13       0.27 0.37       0.64 2.7
    (6)                   0.021 0.036     0.068 0.098     0.18 0.28       0.49 1.7

In one of the 8 pairs, 0.75 nats apart, the expected gradient of (2) has the cosine -0.37 with e: a small step down it
increases the KL.

GRPO: Shao et al. 2024, arXiv:2402.03300, (4). DeepSeek-V3.2: arXiv:2512.02556, (7). The forms of TRL 1.16:
tests/test_trl_parity.py. The table and the proofs, exactly, by enumeration: tests/test_exact_kl_in_the_loss.py.
"""

import numpy as np

from minilm import checks
from minilm.backend import array_module
from minilm.objectives.policy_gradient import policy_gradient_loss
from minilm.tensor import Tensor, primitive

# At k1 below this, k3 is exp(-k1) to rounding: the rest is less than 1e-20 of it. Its product with a ratio is computed
# as the exp of a sum, because alone the ratio may be 0 and exp(-k1) infinite.
FAR = -50.0


@primitive
def k3_times_ratio(policy: Tensor, old: np.ndarray, reference: np.ndarray):
    """rho k3, rho = pi / pi_old: of log-probs of responses (N,), form (1); of their tokens (N,T), form (2).

    Gradient: d(rho k3) / d log pi = rho k3 + rho (1 - exp(-k1)) = rho k1. The result has the shape of the arguments.
    At policy = old its value is that of k3, and its gradient is k1, not that of k3. Raises ValueError for arguments of
    different shapes.
    """
    checks.same_shape("k3_times_ratio", policy=policy, old=old, reference=reference)
    xp = array_module(policy)
    ratio = xp.exp(policy - xp.asarray(old))
    k1 = policy - xp.asarray(reference)
    def vjp(dy):
        return dy * ratio * k1
    far = k1 < FAR
    product = xp.exp(xp.where(far, xp.asarray(reference) - xp.asarray(old), 0))         # rho exp(-k1)
    near = ratio * (xp.expm1(-xp.where(far, 0, k1)) + k1)                               # expm1: kl.py
    return xp.where(far, product, near), vjp


@primitive
def k3_times_mean_ratio(policy: Tensor, old: np.ndarray, reference: np.ndarray, mask: np.ndarray):
    """Form (6): the k3 of each token times g, the geometric mean of the ratios of its response; all arrays (N,T).

    g depends on all |y| tokens of the response, d g / d log pi(y_t) = g / |y|, so for one response

        d( sum_s g k3_s ) / d log pi(y_t) = g (1 - exp(-k1_t)) + (g / |y|) sum_s k3_s

    Outside the mask log-probs may be NaN, and the result is 0. Raises ValueError for arguments of different shapes, and
    for a mask of other values than 0 and 1.
    """
    checks.same_shape("k3_times_mean_ratio", axes="NT", policy=policy, old=old, reference=reference, mask=mask)
    xp = array_module(policy)
    selected = xp.asarray(checks.mask("k3_times_mean_ratio", mask))
    lengths = selected.sum(axis=-1, keepdims=True).clip(1).astype(policy.dtype)         # (N,1)
    log_ratio = xp.where(selected, policy - xp.asarray(old), 0)                         # (N,T)
    mean_log_ratio = log_ratio.sum(axis=-1, keepdims=True) / lengths                    # (N,1)
    g = xp.exp(mean_log_ratio)
    k1 = xp.where(selected, policy - xp.asarray(reference), 0)                          # (N,T)
    far = k1 < FAR
    product = xp.exp(xp.where(far, mean_log_ratio - k1, 0))                             # g exp(-k1)
    expm1 = xp.expm1(-xp.where(far, 0, k1))
    output = xp.where(far, product, g * (expm1 + k1))
    def vjp(dy):
        through_g = (dy * output).sum(axis=-1, keepdims=True) / lengths                 # (N,1)
        return xp.where(selected, through_g - dy * xp.where(far, product, g * expm1), 0)
    return output, vjp


def token_kl_loss(terms: Tensor, mask: np.ndarray, token_mean: str | float | None = None) -> Tensor:
    """The sum of the terms (N,T) of N responses within the mask (N,T), averaged as in policy_gradient_loss: a scalar,
    to add to that loss with the factor beta.

        (1/N) sum over responses of s sum_t m_t term_t

    terms       k2, k3 or one of the functions above, of the tokens; may be NaN outside the mask. (Where log-probs are
                NaN, so is the gradient of terms in them: select the log-probs first, ops.where(mask, log_probs, 0.0).)
    token_mean  as in policy_gradient_loss
    Gradient: m_t s / N for each term. Raises ValueError as policy_gradient_loss does.
    """
    checks.same_shape("token_kl_loss", axes="NT", terms=terms, mask=mask)
    return policy_gradient_loss(terms, np.full(len(terms), -1.0), mask, token_mean)
