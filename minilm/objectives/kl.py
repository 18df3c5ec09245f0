"""How far has the policy moved? Three estimators of a KL divergence, and what their gradients are.

For a whole response y drawn from pi, with x = log pi(y) - log pi_ref(y):

    k1 = x                   E[k1] = KL(pi || pi_ref)     a single sample may be negative
    k2 = x^2 / 2             biased: E[k2] is not the KL, close to it when pi is close to pi_ref
    k3 = exp(-x) - 1 + x     E[k3] = KL(pi || pi_ref)     never negative; infinite variance is possible

(Schulman 2020, "Approximating KL divergence".) Their values and their gradients are two things.
Differentiated as a loss at samples that are held fixed, in expectation under pi:

    grad k1 = grad log pi                -> E = 0: no pull at all
    grad k2 = x grad log pi              -> grad KL(pi || pi_ref): the one that is wanted
    grad k3 = (1 - exp(-x)) grad log pi  -> grad KL(pi_ref || pi): the other direction

because E[grad log pi] = 0; grad KL(pi || pi_ref) = sum (x + 1) grad pi = E[x grad log pi]; and
E[exp(-x) grad log pi] = sum pi_ref grad log pi = -grad KL(pi_ref || pi).
k1 inside the reward, without gradient, as policy_gradient.py has it, gives grad KL(pi || pi_ref)
too; k3 there does not (it gives grad KL(pi || pi_ref) - grad KL(pi_ref || pi)). Times the ratio
pi / pi_old, which is 1 in value at fresh samples, k3 as a loss has the gradient of its value again.
All of this holds for whole responses. Per token and then summed, k3 keeps its value and neither k2
nor k3 its gradient: k2 because what earlier tokens do to the context is not differentiated, k3
because KL(pi_ref || pi) is over the contexts that pi_ref reaches, and the samples are pi's.
k3 is the exponential of a log-ratio: it overflows where the policy gives the sample far less
probability than the reference does (x < -709 in float64, -88 in float32). Of all the objectives
only it and PPO's ratio may.
Tests: tests/test_kl.py; the table, proved by enumeration: tests/test_exact_kl.py.
"""

import numpy as np

from minilm import ops
from minilm.backend import array_module, to_numpy
from minilm.tensor import primitive


def k1(policy, reference):
    """Log-probs of whole responses, each (B,); policy a Tensor or an array, reference an array."""
    return ops.subtract(policy, reference)


def k2(policy, reference):
    x = ops.subtract(policy, reference)
    return x * x * 0.5


def k3(policy, reference):
    return _k3(ops.subtract(policy, reference))


@primitive
def _k3(x):
    """exp(-x) - 1 + x, whose first two terms by themselves would round to below -x."""
    difference = array_module(x).expm1(-x)
    def vjp(dy):
        return -dy * difference
    return difference + x, vjp


def kl_metrics(policy, reference, mask):
    """Estimates from log-probs (B,T) of samples drawn from the policy (plain arrays).

    kl_sequence  mean over responses of the summed k1, in nats per response
    kl_token     the same sum divided by the number of tokens, in nats per token (the `kl` of TRL's RLOO)
    Either may come out negative from few samples; the divergence itself never is.
    """
    policy, reference, selected = to_numpy(policy), to_numpy(reference), to_numpy(mask).astype(bool)
    x = np.where(selected, policy - reference, 0.0)
    return {"kl_sequence": float(x.sum(axis=-1).mean()),
            "kl_token": float(x.sum() / max(1, selected.sum()))}
