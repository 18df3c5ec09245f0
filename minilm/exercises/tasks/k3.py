"""k3, an estimator of a KL divergence from one sample.

y is drawn from the policy pi, and u = log pi(y) - log pi_ref(y). The simple estimator u (called k1) is often negative,
although the divergence never is. k3 is at least 0 and has the same expectation, KL(pi || pi_ref):

    k3 = pi_ref(y)/pi(y) - 1 - log( pi_ref(y)/pi(y) ) = exp(-u) - 1 + u

Near u = 0, k3 is about u^2 / 2. For u = 1e-8 this is 5e-17, less than the spacing of numbers near 1, and no digit is
left of exp(-u) - 1 + u as it stands; for u = 1e-4 about eight are. Compute nine digits for u of order 1e-4 as well.

    policy, reference    log pi(y) and log pi_ref(y), float64 arrays of one shape
    returns              k3, of the same shape

Schulman 2020, "Approximating KL divergence".
"""

from collections.abc import Callable, Iterator

import numpy as np

from minilm.exact import enumerable
from minilm.exercises.task import Mistake, Property, Task
from minilm.objectives import kl


def k3(policy, reference) -> np.ndarray:
    """exp(-u) - 1 + u, with u = policy - reference."""
    u = policy - reference
    return np.expm1(-u) + u


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    log_probs = -rng.uniform(0, 3, size=(2, 3))
    return {"three samples": (np.array([-1.0, -2.0, -3.0]), np.array([-1.0, -3.0, -1.0])),
            "a matrix": (log_probs, -rng.uniform(0, 3, size=(2, 3))),
            "almost equal": (np.array([-1.0, -2.0]), np.array([-1.0, -2.0]) + np.array([1e-4, -3e-4]))}


def properties(function: Callable) -> Iterator[Property]:
    log_pi, log_ref = np.log(np.random.default_rng(0).dirichlet(np.ones(6), size=(2, 3)))
    yield Property("its expectation under the policy, a sum over all samples, is KL(pi || pi_ref)",
                   enumerable.expectation(log_pi, function(log_pi, log_ref)), enumerable.divergence(log_pi, log_ref))


TASK = Task(
    solution=k3, returns=("k3",), cases=cases, expected=lambda policy, reference: kl.k3(policy, reference).data,
    read="minilm/objectives/kl.py", properties=properties, smallest=0.0,
    hints=("Which way does the ratio go? y comes from pi, and the ratio is pi_ref/pi.",
           "np.expm1(x) is exp(x) - 1 without the loss of digits: expm1(-u) + u."),
    mistakes=(
        Mistake("This is k1, the log-ratio itself: it can be negative.", "np.expm1(-u) + u", "u"),
        Mistake("This is k2, u^2 / 2: its expectation is another number than the KL.", "np.expm1(-u) + u",
                "u ** 2 / 2"),
        Mistake("The ratio is pi/pi_ref: exp(u) - 1 - u. Its expectation under pi is another number than the KL.",
                "np.expm1(-u) + u", "np.expm1(u) - u"),
        Mistake("The last term has the wrong sign: exp(-u) - 1 - u can be negative.", "np.expm1(-u) + u",
                "np.expm1(-u) - u"),
        Mistake("1 is subtracted after exp has rounded: near u = 0 the digits are lost. NumPy has a function for this.",
                "np.expm1(-u) + u", "np.exp(-u) - 1 + u"),
        Mistake("The 1 is not subtracted: at u = 0 this is 1, and k3 is 0.", "np.expm1(-u)", "np.exp(-u)"),
        Mistake("The samples are averaged. The estimator has one number for each sample.", "np.expm1(-u) + u",
                "(np.expm1(-u) + u).mean()"),
        Mistake("Negative samples of k1 are set to 0. That makes it biased.", "np.expm1(-u) + u",
                "u.clip(min=0)")))
