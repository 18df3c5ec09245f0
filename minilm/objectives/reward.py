"""The Bradley-Terry reward model: learn a reward from comparisons of two responses.

Symbols, and how to read the code (@primitive, vjp, xp): objectives/__init__.py.

x is a prompt. The model gives each response y a number r(x,y), and predicts the comparison of two responses
y and y' from the difference of their rewards:

    P(y is preferred to y' | x) = sigmoid( r(x,y) - r(x,y') )

After the comparison, y_w is the name of the preferred response (chosen), y_l of the other one (rejected),
and r_w = r(x, y_w), r_l = r(x, y_l). The loss is the negative log-likelihood of the comparisons plus a term
that centres the rewards (c >= 0):

    z = r_w - r_l - margin
    L = mean[ -log sigmoid(z) ] + c mean[ (r_w + r_l)^2 ]                    mean over B pairs

margin: by how much r_w should exceed r_l (0 by default).

Gradient, for one of the B pairs:

    dL / dr_w = ( -sigmoid(-z) + 2c (r_w + r_l) ) / B
    dL / dr_l = ( +sigmoid(-z) + 2c (r_w + r_l) ) / B

because sigmoid' = sigmoid (1 - sigmoid) gives d/dz[-log sigmoid(z)] = -(1 - sigmoid(z)) = -sigmoid(-z),
and dz/dr_w = 1, dz/dr_l = -1. Without a margin, sigmoid(-z) is the probability, under the
model, that y_l is preferred to y_w. The loss pushes r_w up and r_l down; the push is large where the model is
wrong, and near 0 where it is right with confidence.

Comparisons determine the rewards only up to one constant for each prompt: adding it to the rewards of all
responses to this prompt does not change r_w - r_l. The centring term selects the constant. If r_w
and r_l themselves were the parameters, a gradient step of this term on one pair would not change r_w - r_l, because
its two derivatives are equal. A step in the parameters of a model can change it. In expectation over many pairs the
term also shrinks the differences a little: for two responses y, y' drawn independently for the same prompt x,
with rewards r and r', and with mean and variance over y for this fixed x,

    E[ (r + r')^2 ] = Var[r + r'] + E[r + r']^2 = 2 Var[r] + 4 E[r]^2

(the sum r + r' does not depend on which of the two is preferred).

-log sigmoid(z) is computed as softplus(-z) = log(1 + exp(-z)), which is finite at every finite z; the
logarithm of a sigmoid that has been rounded to 0 is not.
Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, (1); the margin: Touvron et al. 2023,
arXiv:2307.09288, (2); the centring: Eisenstein et al. 2023, arXiv:2312.09244.
Tests: tests/test_reward.py; the statements about expectations, exactly: tests/test_exact_rewards.py.
"""

import numpy as np

from minilm import checks
from minilm.backend import array_module
from minilm.ops import stable_sigmoid, stable_softplus
from minilm.tensor import Tensor, primitive


@primitive
def reward_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin: float | np.ndarray = 0.0,
                centering: float = 0.0):
    """The loss L above: a scalar.

    chosen_rewards, rejected_rewards  r_w and r_l, (B,)
    margin     by how much r_w should exceed r_l: a number, or one for each pair (B,)
    centering  the coefficient c; 0, no centring, is the default here and in TRL
    Raises ValueError for shapes other than these, B = 0, a margin that is not finite, and c below 0.
    """
    checks.same_shape("reward_loss", axes="B", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    checks.number("reward_loss", "centering", centering, at_least=0)
    xp = array_module(chosen_rewards, rejected_rewards)
    B = chosen_rewards.size
    margin = xp.asarray(checks.finite("reward_loss", "margin", margin, "pair"), dtype=chosen_rewards.dtype)
    if margin.shape not in ((), chosen_rewards.shape):
        raise ValueError(f"a margin of shape {margin.shape} for rewards {chosen_rewards.shape}; pass a number, or (B,)")
    z = chosen_rewards - rejected_rewards - margin
    reward_sum = chosen_rewards + rejected_rewards
    loss = stable_softplus(-z).mean() + centering * (reward_sum * reward_sum).mean()
    def vjp(dloss):
        push = stable_sigmoid(-z)                   # from the comparison: opposite signs
        pull = 2 * centering * reward_sum           # from the centring: the same sign
        return dloss * (pull - push) / B, dloss * (pull + push) / B
    return loss, vjp


def reward_metrics(chosen_rewards: np.ndarray, rejected_rewards: np.ndarray) -> dict[str, float]:
    """Metrics of B pairs under TRL's names, from arrays (B,).

    accuracy  fraction of pairs with r_w > r_l; equal rewards count as wrong
    ties      fraction of pairs with r_w = r_l (TRL does not have it)
    margin    mean of the reward difference r_w - r_l (TRL's name; it is unrelated to the option `margin`)
    min_reward, mean_reward, max_reward   over the 2B rewards
    Raises ValueError for shapes other than these, B = 0, and rewards that are not finite.
    """
    chosen_rewards, rejected_rewards = checks.numbers("reward_metrics", "B", chosen_rewards=chosen_rewards,
                                                      rejected_rewards=rejected_rewards)
    both = np.concatenate([chosen_rewards, rejected_rewards])
    return {"accuracy": float((chosen_rewards > rejected_rewards).mean()),
            "ties": float((chosen_rewards == rejected_rewards).mean()),
            "margin": float((chosen_rewards - rejected_rewards).mean()),
            "min_reward": float(both.min()),
            "mean_reward": float(both.mean()),
            "max_reward": float(both.max())}
