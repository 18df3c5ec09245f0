"""The Bradley-Terry reward model: of two responses, the one with the higher reward wins more often.

    P(chosen beats rejected) = sigma(r_c - r_r)

    L = mean[ -log sigma(z) ] + c mean[ (r_c + r_r)^2 ],       z = r_c - r_r - margin

    dL/dr_c = ( -sigma(-z) + 2c (r_c + r_r) ) / B
    dL/dr_r = ( +sigma(-z) + 2c (r_c + r_r) ) / B

since d/dz -log sigma(z) = -(1 - sigma(z)) = -sigma(-z): the winner is pushed up and the loser
down, by the probability the model gave to the wrong outcome. Comparisons fix rewards up to a
constant per prompt only (both shifted alike, the first term does not change); the centring
term, c > 0, picks the constant that makes them small (and, being 2 Var + 4 mean^2 of the rewards
compared, pulls their differences in a little too).
Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, (1); the margin: Touvron et al. 2023,
arXiv:2307.09288, (2); the centring: Eisenstein et al. 2023, arXiv:2312.09244.
Stable: -log sigma(z) is computed as softplus(-z), never as the log of a sigmoid.
Tests: tests/test_reward.py; what comparisons can recover: tests/test_exact_rewards.py.
"""

import numpy as np

from minilm.backend import array_module, to_numpy
from minilm.ops import stable_sigmoid
from minilm.tensor import primitive


@primitive
def reward_loss(chosen_rewards, rejected_rewards, margin=0.0, centering=0.0):
    """chosen_rewards, rejected_rewards (B,) -> a scalar.

    margin: how much better the chosen one was judged, a number or (B,); centering: the c above.
    """
    xp = array_module(chosen_rewards, rejected_rewards)
    if chosen_rewards.shape != rejected_rewards.shape or not chosen_rewards.size:
        raise ValueError("expected chosen and rejected rewards of one shape (B,), B at least 1")
    B = chosen_rewards.size
    margin = xp.asarray(margin, dtype=chosen_rewards.dtype)
    if margin.shape not in ((), chosen_rewards.shape):
        raise ValueError(f"a margin of shape {margin.shape}; expected a number, or one for each pair (B,)")
    z = chosen_rewards - rejected_rewards - margin
    total = chosen_rewards + rejected_rewards
    loss = xp.logaddexp(-z, 0).mean() + centering * (total * total).mean()
    def vjp(dloss):
        push, pull = stable_sigmoid(-z), 2 * centering * total
        return dloss * (pull - push) / B, dloss * (pull + push) / B
    return loss, vjp


def reward_metrics(chosen_rewards, rejected_rewards):
    """Floats under TRL's names. `accuracy` counts strictly greater rewards, so two equal ones
    count as wrong; `ties`, the share of those, is ours."""
    chosen_rewards, rejected_rewards = to_numpy(chosen_rewards), to_numpy(rejected_rewards)
    both = np.concatenate([chosen_rewards, rejected_rewards])
    return {"accuracy": float((chosen_rewards > rejected_rewards).mean()),
            "ties": float((chosen_rewards == rejected_rewards).mean()),
            "margin": float((chosen_rewards - rejected_rewards).mean()),
            "min_reward": float(both.min()),
            "mean_reward": float(both.mean()),
            "max_reward": float(both.max())}
