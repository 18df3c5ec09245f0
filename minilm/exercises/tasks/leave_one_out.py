"""The leave-one-out baseline (RLOO): advantages of K responses to each prompt.

A response is compared with the other responses to the same prompt:

    A[p, k] = R[p, k] - mean of R[p, j] over j other than k

The mean of the others does not depend on response k. So the policy gradient with A has the same expectation as with R
(it is unbiased), and less variance if the rewards of a prompt have a mean far from 0 compared with their spread. If all
rewards of a prompt are equal, A is 0.

    rewards    R, (P, K), K at least 2
    returns    A, (P, K)

Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740.
"""

from collections.abc import Callable, Iterator

import numpy as np

from minilm.exact import enumerable, expectations
from minilm.exercises.task import Mistake, Property, Task, forms
from minilm.objectives import policy_gradient


def leave_one_out(rewards) -> np.ndarray:
    """Each reward minus the mean of the prompt's other rewards."""
    K = rewards.shape[1]
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / (K - 1)
    return rewards - others


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"one prompt": (np.array([[1.0, 0.0, 0.0]]),), "two prompts": (rng.normal(size=(2, 4)),),
            "as many prompts as samples": (rng.normal(size=(3, 3)),), "two samples": (rng.normal(size=(3, 2)),)}


def expected(rewards) -> np.ndarray:
    return policy_gradient.advantages(rewards, np.zeros_like(rewards), 0.0, "leave_one_out")


def properties(function: Callable) -> Iterator[Property]:
    """All 4^3 outcomes of three draws from four responses, each with its probability."""
    rng = np.random.default_rng(0)
    log_pi, rewards = np.log(rng.dirichlet(np.ones(4), size=1)), rng.normal(size=(1, 4))

    def loss(log_probs, drawn):
        A = function(np.take_along_axis(rewards, drawn, axis=1))
        return policy_gradient.policy_gradient_loss(log_probs, A.reshape(-1), np.ones(log_probs.shape))

    def in_the_logits(gradient):
        return gradient - np.exp(log_pi) * gradient.sum()

    found = expectations.gradient_over_samples(loss, log_pi[..., None], np.ones((1, 4, 1)), samples=3)[..., 0]
    exact = enumerable.objective_gradient(log_pi, log_pi, rewards, 0.0)
    yield Property("the expected policy gradient, a sum over all samples, is the gradient of the expected reward",
                   -in_the_logits(found), in_the_logits(exact))


TASK = Task(
    solution=leave_one_out, returns=("A",), cases=cases, expected=expected, properties=properties,
    read="minilm/objectives/policy_gradient.py, advantages",
    hints=("The sum of the others is the sum of all minus one's own. How many others are there?",
           "(sum over the row - R) / (K - 1) is the mean of the others; subtract it from R."),
    mistakes=(
        Mistake("The mean of all K rewards is subtracted. It contains the response's own reward, and the expected "
                "gradient is (1 - 1/K) of the true one.", "rewards - others",
                "rewards - rewards.mean(axis=1, keepdims=True)"),
        Mistake("The mean of all K is subtracted, and the axis of the mean is dropped.", "rewards - others",
                "rewards - rewards.mean(axis=1)"),
        Mistake("The sum of the others is divided by K; there are K - 1 of them.", "/ (K - 1)", "/ K"),
        Mistake("The mean runs over the prompts. Rewards of different prompts are not comparable.",
                "K = rewards.shape[1]\n    others = (rewards.sum(axis=1, keepdims=True)",
                "K = len(rewards)\n    others = (rewards.sum(axis=0, keepdims=True)"),
        Mistake("The sum runs over the first axis, the prompts. The other responses to a prompt are in its row.",
                "rewards.sum(axis=1, keepdims=True)", "rewards.sum(axis=0, keepdims=True)"),
        Mistake("This is the baseline, not the advantage: it must be subtracted from the reward.", "rewards - others",
                "others"),
        Mistake("The sign is reversed: good responses would become less likely.", "rewards - others",
                "others - rewards"),
        Mistake("The sum of the others is subtracted, not their mean.", " / (K - 1)", ""),
        *forms("The advantages are divided by the standard deviation of the group, as in GRPO. That is biased.",
               "rewards - others", *(f"({minus}) / (rewards.std(axis=1, ddof={ddof}, keepdims=True) + {eps})"
                                     for minus in ("rewards - rewards.mean(axis=1, keepdims=True)", "rewards - others")
                                     for ddof in (0, 1) for eps in (0, 1e-8, 1e-6, 1e-4))),
        Mistake("The mean of the whole batch is subtracted. Rewards of different prompts are not comparable, and it "
                "contains the response's own reward.", "rewards - others", "rewards - rewards.mean()"),
        Mistake("The response's own reward is not removed from the sum: K rewards are added, and divided by K - 1.",
                "(rewards.sum(axis=1, keepdims=True) - rewards)", "rewards.sum(axis=1, keepdims=True)"),
        Mistake("One baseline for the whole batch: all other responses, whatever their prompt.",
                "(rewards.sum(axis=1, keepdims=True) - rewards) / (K - 1)",
                "(rewards.sum() - rewards) / (rewards.size - 1)")))
