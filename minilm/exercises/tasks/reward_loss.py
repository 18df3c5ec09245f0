"""The loss of a reward model (Bradley-Terry).

A person has preferred y_w to y_l. The model gives them the rewards r_w and r_l:

    z = r_w - r_l - margin
    L = mean[ -log sigmoid(z) ] + centering mean[ (r_w + r_l)^2 ]              means over B pairs

The second term is needed because comparisons determine the rewards only up to a constant for each prompt.

    chosen, rejected    r_w and r_l, (B,), as far apart as 1000
    margin              (B,), by how much r_w should exceed r_l
    centering           a number, at least 0
    returns             L, one number, finite

Ouyang et al. 2022, arXiv:2203.02155, (1); margin: arXiv:2307.09288, (2); centering: arXiv:2312.09244.
"""

import numpy as np

from minilm.exercises.task import Mistake, Task, forms
from minilm.objectives import reward


def reward_loss(chosen, rejected, margin, centering) -> float:
    """The mean over pairs."""
    z = chosen - rejected - margin
    return np.logaddexp(0, -z).mean() + centering * ((chosen + rejected) ** 2).mean()


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"equal rewards": (np.array([1.0]), np.array([1.0]), np.zeros(1), 0.0),
            "four pairs": (*rng.normal(size=(2, 4)), np.zeros(4), 0.0),
            "margin and centering": (*rng.normal(size=(2, 3)), rng.uniform(size=3), 0.2),
            "differences of 1000": (np.array([0.0, 1000.0]), np.array([1000.0, 0.0]), np.zeros(2), 0.0)}


def expected(chosen, rejected, margin, centering) -> float:
    return reward.reward_loss(chosen, rejected, margin, centering).item()


TASK = Task(
    solution=reward_loss, returns=("loss",), cases=cases, expected=expected, read="minilm/objectives/reward.py",
    golden=("reward_loss_margin_centering", {"chosen": "chosen_rewards", "rejected": "rejected_rewards"}, ("loss",)),
    hints=("You have written log sigmoid for every number: log_sigmoid. At equal rewards the loss is log 2.",
           "-log sigmoid(z) = log(1 + exp(-z)) = np.logaddexp(0, -z)."),
    mistakes=(
        *forms("A small number is added within the logarithm. It avoids -inf, and gives a value and a gradient that "
               "are wrong.", "np.logaddexp(0, -z)",
               *(f"-np.log(np.exp(-np.logaddexp(0, -z)) + {eps})" for eps in (1e-12, 1e-10, 1e-8))),
        Mistake("exp(-z) overflows at z = -1000: sigmoid(z) rounds to 0, and its logarithm is -inf.",
                "np.logaddexp(0, -z)",
                "-np.log(1 / (1 + np.exp(-z)))"),
        Mistake("chosen and rejected have changed places: the model would learn the reverse of the comparisons.",
                "chosen - rejected - margin", "rejected - chosen - margin"),
        Mistake("The margin has the wrong sign: r_w would be allowed to lie below r_l.", "- margin", "+ margin"),
        Mistake("The margin is left out.", " - margin", ""),
        Mistake("The centering acts on the difference of the rewards. The constant that it should fix is in their sum.",
                "(chosen + rejected) ** 2", "(chosen - rejected) ** 2"),
        Mistake("The centering is left out.", " + centering * ((chosen + rejected) ** 2).mean()", ""),
        Mistake("A sum over the pairs in place of the mean.", "np.logaddexp(0, -z).mean()",
                "np.logaddexp(0, -z).sum()"),
        Mistake("The sign is reversed: this is the mean of log sigmoid, which is at most 0.",
                "np.logaddexp(0, -z).mean()", "-np.logaddexp(0, -z).mean()"),
        Mistake("The logarithm of the mean probability; the loss is the mean of the logarithms.",
                "np.logaddexp(0, -z).mean()", "-np.log(np.exp(-np.logaddexp(0, -z)).mean())"),
        Mistake("The centering is summed over the pairs; it is a mean.", "((chosen + rejected) ** 2).mean()",
                "((chosen + rejected) ** 2).sum()"),
        Mistake("The centering squares the mean; it is the mean of squares.", "((chosen + rejected) ** 2).mean()",
                "(chosen + rejected).mean() ** 2")))
