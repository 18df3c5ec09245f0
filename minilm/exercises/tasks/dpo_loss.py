"""The DPO loss.

    delta = (log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))
    L     = mean over B pairs of -log sigmoid(beta delta)

It is the loss of a reward model whose reward is beta log(pi/pi_ref). Where policy and reference are equal it is log 2.

    policy_chosen, policy_rejected           log pi(y_w|x) and log pi(y_l|x), summed over tokens, (B,)
    reference_chosen, reference_rejected     the same of pi_ref, (B,)
    beta                                     a number above 0
    returns                                  L, one number, finite

Rafailov et al. 2023, arXiv:2305.18290, (7).
"""

import numpy as np

from minilm.exercises.task import Mistake, Task, forms
from minilm.objectives import dpo


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta) -> float:
    """The mean over pairs of -log sigmoid(beta delta)."""
    delta = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return np.logaddexp(0, -beta * delta).mean()


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    same = np.array([-3.0, -4.0]), np.array([-5.0, -2.0])
    return {"the policy is the reference": (*same, *same, 0.1),
            "four pairs": (*rng.normal(size=(4, 4)), 0.5), "one pair": (*rng.normal(size=(4, 1)), 2.0),
            "differences of 1000": (np.array([-1000.0, -1.0]), np.array([-1.0, -1000.0]), *np.zeros((2, 2)), 1.0)}


TASK = Task(
    solution=dpo_loss, returns=("loss",), cases=cases, expected=lambda *arguments: dpo.dpo_loss(*arguments).item(),
    read="minilm/objectives/dpo.py", golden=("dpo_loss_extreme", {}, ("loss",)),
    hints=("You have written this loss: reward_loss, with r = beta log(pi/pi_ref).",
           "np.logaddexp(0, -beta * delta) is -log sigmoid(beta delta)."),
    mistakes=(
        Mistake("The reference is left out: nothing then keeps the policy near it.",
                "(policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)",
                "policy_chosen - policy_rejected"),
        Mistake("Both references are subtracted. In delta the one of the rejected response has a plus.",
                "(policy_rejected - reference_rejected)", "(policy_rejected + reference_rejected)"),
        Mistake("The references of chosen and rejected are swapped.",
                "(policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)",
                "(policy_chosen - reference_rejected) - (policy_rejected - reference_chosen)"),
        Mistake("delta has the wrong sign: chosen and rejected, or policy and reference, have changed places.",
                "-beta * delta", "beta * delta"),
        Mistake("beta is left out.", "-beta * delta", "-delta"),
        Mistake("beta multiplies the loss; it belongs into the sigmoid.", "np.logaddexp(0, -beta * delta)",
                "beta * np.logaddexp(0, -delta)"),
        Mistake("A sum over the pairs in place of the mean.", ".mean()", ".sum()"),
        Mistake("The sign is reversed: this is the mean of log sigmoid, which is at most 0.",
                "np.logaddexp(0, -beta * delta)", "-np.logaddexp(0, -beta * delta)"),
        *forms("A small number is added within the logarithm. It avoids -inf, and gives a value and a gradient that "
               "are wrong.", "np.logaddexp(0, -beta * delta)",
               *(f"-np.log(np.exp(-np.logaddexp(0, -beta * delta)) + {eps})" for eps in (1e-12, 1e-10, 1e-8))),
        Mistake("exp overflows at differences of 1000: sigmoid rounds to 0, and its logarithm is -inf.",
                "np.logaddexp(0, -beta * delta)", "-np.log(1 / (1 + np.exp(-beta * delta)))"),
        Mistake("The mean of delta is taken before the logarithm: the loss of the mean is not the mean of the losses.",
                "np.logaddexp(0, -beta * delta).mean()", "np.logaddexp(0, -beta * delta.mean())"),
        Mistake("The logarithm of the mean probability; the loss is the mean of the logarithms.",
                "np.logaddexp(0, -beta * delta).mean()", "-np.log(np.exp(-np.logaddexp(0, -beta * delta)).mean())"),
        Mistake("This is the mean of sigmoid(-beta delta), without the logarithm.",
                "np.logaddexp(0, -beta * delta)", "np.exp(-np.logaddexp(0, beta * delta))"),
        Mistake("This is IPO's loss, (delta - 1/(2 beta))^2.", "np.logaddexp(0, -beta * delta)",
                "np.square(delta - 1 / (2 * beta))")))
