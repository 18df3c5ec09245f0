"""The gradient of the reward model's loss.

    z = r_w - r_l - margin
    L = mean[ -log sigmoid(z) ] + centering mean[ (r_w + r_l)^2 ]              means over B pairs

    chosen, rejected    r_w and r_l, (B,)
    margin              (B,)
    centering           a number, at least 0
    returns             dchosen and drejected, dL/dr_w and dL/dr_l, (B,) each
"""

import numpy as np

from minilm import Tensor
from minilm.exercises.task import Mistake, Task
from minilm.objectives import reward


def reward_gradient(chosen, rejected, margin, centering) -> tuple:
    """dL/dchosen and dL/drejected."""
    push = np.exp(-np.logaddexp(0, chosen - rejected - margin))         # sigmoid(-z)
    pull = 2 * centering * (chosen + rejected)
    B = len(chosen)
    return (pull - push) / B, (pull + push) / B


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"equal rewards": (np.array([1.0]), np.array([1.0]), np.zeros(1), 0.0),
            "four pairs": (*rng.normal(size=(2, 4)), np.zeros(4), 0.0),
            "margin and centering": (*rng.normal(size=(2, 3)), rng.uniform(size=3), 0.2),
            "differences of 1000": (np.array([0.0, 1000.0]), np.array([1000.0, 0.0]), np.zeros(2), 0.0)}


def expected(chosen, rejected, margin, centering) -> tuple:
    leaves = Tensor(chosen, requires_grad=True), Tensor(rejected, requires_grad=True)
    reward.reward_loss(*leaves, margin, centering).backward()
    return leaves[0].grad, leaves[1].grad


def loss(chosen, rejected, margin, centering) -> float:
    """L, for finite differences."""
    return np.logaddexp(0, rejected + margin - chosen).mean() + centering * ((chosen + rejected) ** 2).mean()


TASK = Task(
    solution=reward_gradient, returns=("dchosen", "drejected"), cases=cases, expected=expected,
    read="minilm/objectives/reward.py", scalar=loss, wrt=("chosen", "rejected"),
    golden=("reward_loss_margin_centering", {"chosen": "chosen_rewards", "rejected": "rejected_rewards"},
            ("dchosen_rewards", "drejected_rewards")),
    hints=("d/dz[-log sigmoid(z)] = -(1 - sigmoid(z)). The two terms act on r_l with different signs.",
           "dr_w = (-sigmoid(-z) + 2 centering (r_w + r_l)) / B, dr_l = (+sigmoid(-z) + 2 centering (r_w + r_l)) / B."),
    mistakes=(
        Mistake("The weight is sigmoid(z). It must be large for a pair in the wrong order: sigmoid(-z).",
                "np.logaddexp(0, chosen - rejected - margin)", "np.logaddexp(0, rejected + margin - chosen)"),
        Mistake("The derivative of sigmoid instead of that of its logarithm: sigmoid' = sigmoid (1 - sigmoid), and the "
                "logarithm divides by sigmoid.", "(pull - push) / B, (pull + push) / B",
                "(pull - push * (1 - push)) / B, (pull + push * (1 - push)) / B"),
        Mistake("The two results are in the wrong order: dchosen comes first.",
                "(pull - push) / B, (pull + push) / B", "(pull + push) / B, (pull - push) / B"),
        Mistake("The centering acts on the difference of the rewards. It squares their sum.",
                "2 * centering * (chosen + rejected)\n    B = len(chosen)\n    return (pull - push) / B, (pull + push)",
                "2 * centering * (chosen - rejected)\n    B = len(chosen)\n    "
                "return (pull - push) / B, (push - pull)"),
        Mistake("Not divided by the number of pairs.",
                "(pull - push) / B, (pull + push) / B", "pull - push, pull + push"),
        Mistake("The centering has opposite signs for the two rewards, as the comparison has. Its derivative is the "
                "same for both.", "(pull + push) / B", "(push - pull) / B"),
        Mistake("Both rewards are pushed down by the comparison.", "(pull - push) / B, (pull + push) / B",
                "(pull - push) / B, (pull - push) / B"),
        Mistake("The factor 2 of the square is missing in the centering.", "2 * centering", "centering"),
        Mistake("The centering is not divided by the number of pairs.", "2 * centering * (chosen + rejected)",
                "2 * centering * (chosen + rejected) * len(chosen)"),
        Mistake("The centering is left out.", "2 * centering * (chosen + rejected)", "0.0"),
        Mistake("The margin is left out.", " - margin", ""),
        Mistake("The margin has the wrong sign.", "- margin", "+ margin"),
        Mistake("The sign is reversed: descent on this lowers the chosen reward.",
                "(pull - push) / B, (pull + push) / B",
                "(push - pull) / B, -(pull + push) / B"),
        Mistake("exp overflows where the pair is in the right order by 1000.",
                "np.exp(-np.logaddexp(0, chosen - rejected - margin))",
                "1 - np.exp(chosen - rejected - margin) / (1 + np.exp(chosen - rejected - margin))")))
