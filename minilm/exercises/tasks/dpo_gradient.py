"""The gradient of the DPO loss.

    delta = (log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))
    L     = mean over B pairs of -log sigmoid(beta delta)

    policy_chosen, policy_rejected           log pi(y_w|x) and log pi(y_l|x), summed over tokens, (B,)
    reference_chosen, reference_rejected     the same of pi_ref, (B,)
    beta                                     a number above 0
    returns    dpolicy_chosen and dpolicy_rejected, dL/d of the first two arguments, (B,) each

Rafailov et al. 2023, arXiv:2305.18290, (7).
"""

import numpy as np

from minilm import Tensor
from minilm.exercises.task import Mistake, Task
from minilm.objectives.dpo import dpo_loss


def dpo_gradient(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta) -> tuple:
    """dL/dpolicy_chosen and dL/dpolicy_rejected."""
    delta = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    weight = np.exp(-np.logaddexp(0, beta * delta))         # sigmoid(-beta delta)
    dchosen = -beta * weight / len(delta)
    return dchosen, -dchosen


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"the policy is the reference": (np.array([-3.0, -4.0]), np.array([-5.0, -2.0]), np.array([-3.0, -4.0]),
                                            np.array([-5.0, -2.0]), 0.1),
            "four pairs": (*rng.normal(size=(4, 4)), 0.5),
            "one pair": (*rng.normal(size=(4, 1)), 2.0),
            "differences of 1000": (np.array([-1000.0, -1.0]), np.array([-1.0, -1000.0]), *np.zeros((2, 2)), 1.0)}


def expected(chosen, rejected, *others) -> tuple:
    leaves = Tensor(chosen, requires_grad=True), Tensor(rejected, requires_grad=True)
    dpo_loss(*leaves, *others).backward()
    return leaves[0].grad, leaves[1].grad


def loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta) -> float:
    """L, for finite differences."""
    delta = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return np.logaddexp(0, -beta * delta).mean()


TASK = Task(
    solution=dpo_gradient, returns=("dpolicy_chosen", "dpolicy_rejected"), cases=cases, expected=expected,
    read="minilm/objectives/dpo.py", scalar=loss, wrt=("policy_chosen", "policy_rejected"),
    golden=("dpo_loss", {}, ("dpolicy_chosen", "dpolicy_rejected")),
    hints=("Let z = beta delta. What is d/dz[-log sigmoid(z)]? Then multiply by dz/d(each log-prob).",
           "d/dz[-log sigmoid(z)] = -sigmoid(-z). So dpolicy_chosen = -beta sigmoid(-beta delta) / B, and "
           "dpolicy_rejected is its negative."),
    mistakes=(
        Mistake("beta is missing in front: z = beta delta, so the chain rule brings it there.", "-beta * weight",
                "-1 * weight"),
        Mistake("beta is missing in the sigmoid: its argument is -beta delta.", "beta * delta))", "delta))"),
        Mistake("beta is left out in both places.",
                "beta * delta))         # sigmoid(-beta delta)\n    dchosen = -beta * weight",
                "delta))\n    dchosen = -weight"),
        Mistake("The factor in front is beta^2. The chain rule brings beta once.", "-beta * weight",
                "-beta ** 2 * weight"),
        Mistake("The loss is a mean over the pairs; this is the gradient of the sum.", " / len(delta)", ""),
        Mistake("The weight is sigmoid(beta delta), or delta has the wrong sign. The weight must be large where the "
                "policy has the order wrong: sigmoid(-beta delta).", "np.logaddexp(0, beta * delta)",
                "np.logaddexp(0, -beta * delta)"),
        Mistake("The reference is left out of delta.",
                "(policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)",
                "policy_chosen - policy_rejected"),
        Mistake("Both references are subtracted. In delta the one of the rejected response has a plus.",
                "(policy_rejected - reference_rejected)", "(policy_rejected + reference_rejected)"),
        Mistake("The references of chosen and rejected are swapped.",
                "(policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)",
                "(policy_chosen - reference_rejected) - (policy_rejected - reference_chosen)"),
        Mistake("Both log-probs get the same sign. The loss falls when the rejected one falls.", "dchosen, -dchosen",
                "dchosen, dchosen"),
        Mistake("The sign is reversed: a step of gradient descent must raise the chosen log-prob.", "-beta * weight",
                "beta * weight"),
        Mistake("The rejected response gets no gradient, as behind a stop-gradient.", "dchosen, -dchosen",
                "dchosen, 0 * dchosen"),
        Mistake("The derivative of sigmoid instead of that of its logarithm: sigmoid' = sigmoid (1 - sigmoid), and the "
                "logarithm divides by sigmoid.", "-beta * weight", "-beta * weight * (1 - weight)")))
