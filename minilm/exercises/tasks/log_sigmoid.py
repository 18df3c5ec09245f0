"""log sigmoid, for every number.

    log sigmoid(z) = log( 1 / (1 + exp(-z)) )

The losses of the reward model and of DPO are -log sigmoid(z). z may be -1000, where sigmoid(z) rounds to 0 and its
logarithm to -inf; the true value is -1000.

    z          float64 array, any shape
    returns    log sigmoid(z), elementwise, finite for every finite z
"""

import numpy as np

from minilm import ops
from minilm.exercises.task import Mistake, Task, forms


def log_sigmoid(z) -> np.ndarray:
    """log sigmoid(z), without overflow and without a rounding to -inf."""
    return -np.logaddexp(0, -z)


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"around 0": (np.array([0.0, 1.0, -1.0, 2.5]),), "a matrix": (rng.normal(size=(2, 3)),),
            "differences of 1000": (np.array([-1000.0, 1000.0]),),
            "z = 40, where sigmoid rounds to 1": (np.array([40.0, 38.0]),)}


TASK = Task(
    solution=log_sigmoid, returns=("log sigmoid",), cases=cases, expected=lambda z: ops.log_sigmoid(z).data,
    read="minilm/ops.py, log_sigmoid and stable_softplus", smallest=0.0,
    hints=("log sigmoid(z) = -log(1 + exp(-z)). For which z does exp(-z) overflow? What is the answer there?",
           "np.logaddexp(a, b) is log(exp(a) + exp(b)) without overflow, and 1 is exp(0)."),
    mistakes=(
        Mistake("sigmoid(z) is computed first. At z = -1000 exp(-z) overflows, sigmoid is 0 and its logarithm -inf.",
                "-np.logaddexp(0, -z)", "np.log(1 / (1 + np.exp(-z)))"),
        Mistake("exp(-z) overflows at z = -1000. log1p helps where exp(-z) is small, not where it is large.",
                "-np.logaddexp(0, -z)", "-np.log1p(np.exp(-z))"),
        Mistake("1 + exp(-40) rounds to 1, and its logarithm to 0. log1p(x) is log(1 + x) without this rounding.",
                "-np.logaddexp(0, -z)", "np.minimum(z, 0) - np.log(1 + np.exp(-np.abs(z)))"),
        Mistake("This is log sigmoid(-z): exp(z) stands where exp(-z) belongs.", "np.logaddexp(0, -z)",
                "np.logaddexp(0, z)"),
        Mistake("The sign is reversed: this is the loss, -log sigmoid(z). A log-probability is at most 0.",
                "-np.logaddexp(0, -z)", "np.logaddexp(0, -z)"),
        Mistake("This is softplus(z), which is -log sigmoid(-z).", "-np.logaddexp(0, -z)", "np.logaddexp(0, z)"),
        Mistake("This is sigmoid(z), without the logarithm.", "-np.logaddexp(0, -z)",
                "np.exp(-np.logaddexp(0, -z))"),
        *forms("A small number is added within the logarithm. It avoids -inf, and gives a value and a gradient that "
               "are wrong: log(1e-12) is -27.6 where -1000 is right.", "-np.logaddexp(0, -z)",
               *(f"np.log(np.exp(-np.logaddexp(0, -z)) + {eps})" for eps in (1e-12, 1e-10, 1e-8))),
        Mistake("z is cut to a range, so that exp does not overflow. Beyond it the value is wrong and the gradient 0.",
                "-np.logaddexp(0, -z)", "-np.logaddexp(0, -z.clip(-30, 30))")))
