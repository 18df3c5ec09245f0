"""The loss of the policy gradient.

N responses were drawn from the policy, and each has an advantage A, a constant:

    L = -(1/N) sum over responses of A log pi(y|x),         log pi(y|x) = sum of log_probs where mask is 1

The gradient of L is an estimate of minus the gradient of the expected reward. Its value says nothing about progress.

    log_probs     (N, T), log pi of each token; NaN is possible outside the mask
    advantages    (N,)
    mask          (N, T), bool, True on response tokens
    returns       L, one number

Williams 1992 (REINFORCE).
"""

import numpy as np

from minilm.exercises.task import Mistake, Task
from minilm.objectives import policy_gradient


def policy_gradient_loss(log_probs, advantages, mask) -> float:
    """-mean of A log pi(y|x) over the responses."""
    of_responses = np.where(mask, log_probs, 0.0).sum(axis=1)
    return -(advantages * of_responses).mean()


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    log_probs = -rng.uniform(0.1, 3, size=(3, 4))
    mask = np.array([[True, True, True, False], [True, False, False, False], [False, True, True, False]])
    return {"one response": (np.array([[-1.0, -2.0]]), np.array([0.5]), np.array([[True, True]])),
            "responses of unequal length": (log_probs, rng.normal(size=3), mask),
            "as many responses as columns": (log_probs[:, :3], rng.normal(size=3), mask[:, :3]),
            "NaN outside the mask": (np.where(mask, log_probs, np.nan), rng.normal(size=3), mask)}


def expected(log_probs, advantages, mask) -> float:
    return policy_gradient.policy_gradient_loss(log_probs, advantages, mask).item()


TASK = Task(
    solution=policy_gradient_loss, returns=("loss",), cases=cases, expected=expected,
    read="minilm/objectives/policy_gradient.py", golden=("policy_gradient_loss_masked_nan", {}, ("loss",)),
    hints=("First log pi(y|x) of each response, (N,), then its product with A.",
           "np.where(mask, log_probs, 0).sum(axis=1) is log pi(y|x); L is minus the mean of A log pi(y|x)."),
    mistakes=(
        Mistake("The log-prob of a response is the sum over its tokens, not the mean: a mean weighs a response by the "
                "inverse of its length.", "np.where(mask, log_probs, 0.0).sum(axis=1)",
                "np.where(mask, log_probs, 0.0).sum(axis=1) / mask.sum(axis=1)"),
        Mistake("Divided by the number of tokens instead of the number of responses.", ".mean()",
                ".sum() / mask.sum()"),
        Mistake("The sign is missing: descent on this makes good responses less likely.",
                "-(advantages", "(advantages"),
        Mistake("The masked log-probs are multiplied by 0, and 0 times NaN is NaN.", "np.where(mask, log_probs, 0.0)",
                "(mask * log_probs)"),
        Mistake("A mean over all columns of the array, padding included. Divide by the number of responses.", ".mean()",
                ".sum() / mask.size"),
        Mistake("A sum over the responses in place of the mean.", ".mean()", ".sum()"),
        Mistake("The advantages are left out: this is the SFT loss of the responses.", "(advantages * of_responses)",
                "of_responses"),
        Mistake("The mask is reversed: prompt and padding count, and the response does not.",
                "np.where(mask, log_probs, 0.0)", "np.where(mask, 0.0, log_probs)"),
        Mistake("The mask is left out: prompt and padding count.", "np.where(mask, log_probs, 0.0)", "log_probs"),
        Mistake("The advantages are broadcast along the wrong axis: A[t] instead of A[n] for the tokens of response n.",
                "of_responses = np.where(mask, log_probs, 0.0).sum(axis=1)\n    return -(advantages * "
                "of_responses).mean()",
                "return -(advantages * np.where(mask, log_probs, 0.0)).sum() / len(log_probs)"),
        Mistake("The sum runs over the responses (axis 0). log pi(y|x) is the sum over the tokens of one response.",
                ".sum(axis=1)", ".sum(axis=0)"),
        Mistake("The probability of the response in place of its logarithm.", "(advantages * of_responses)",
                "(advantages * np.exp(of_responses))"),
        Mistake("The mean of A times the mean of log pi; the mean of the products is needed.",
                "(advantages * of_responses).mean()", "advantages.mean() * of_responses.mean()")))
