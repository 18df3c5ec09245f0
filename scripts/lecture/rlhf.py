"""RLHF climbs to the policy that the formula names

Claim. The policy is optimised for the learned reward minus beta times the KL divergence from the model it starts
from.

Test. A transformer of 25,632 parameters is instructed with 4,000 demonstrations; a reward model learns from 1,000
comparisons of its replies. There are 3 questions and 781 possible replies to each, all listed: for four beta the
best policy pi* and its objective J* = beta log Z are known, and so are reward, KL and J of any policy. Two ways lead
from the instructed model towards pi*: gradient ascent on J itself, a sum over all replies, and the policy gradient
with leave-one-out baseline from 64 sampled replies a step. Beside them the best of n replies by the learned reward,
its law and its KL exact. Rewards are counted from the instructed model's mean, so that its J is 0; total variation
is 0 at pi* and at most 1.

Refuted. If, with any seed and any beta, exact ascent ends below 99 % of J*, or the sampled policy gradient below 80
%.

Limits. A policy of this size can be any law of these few replies; a large model's can not. Here J is known to be
what is climbed; whether the learned reward is worth climbing is the question of kl_penalty. Best of n has no beta:
it is a point for each n, and close to the frontier without being made for it.

Source. Ouyang et al. 2022, arXiv:2203.02155; the optimum: Rafailov et al. 2023, arXiv:2305.18290; leave-one-out:
Ahmadian et al. 2024, arXiv:2402.14740; best of n: Beirami et al. 2024, arXiv:2401.01879.
"""

import sys

from common.experiment import COLOURS, Conclusion, curve, run, shown, spread, verdict
from common.recipes import proxy_rewards, sft_model

import numpy as np

from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from minilm.exact.enumerable import (best_of_n, divergence, expectation, objective, objective_gradient, optimum,
                                     total_variation)
from minilm.exact.expectations import descend
from worlds.replies import EOS, LONGEST, ReplyWorld

BETAS, WATCHED = (1.0, 0.5, 0.2, 0.1), 0.2              # WATCHED: the beta whose way to pi* is drawn
FRONTIER = tuple(np.geomspace(3, 0.05, 40))
DRAWS = tuple(2 ** k for k in range(8))
EVERY = 10                      # steps between two points of a way
WAYS = ("exact ascent", "policy gradient")
SIZES = {"quick": {"seeds": 3, "tuning": 6, "exact_steps": 2, "sampled_steps": 10},
         "default": {"seeds": 4, "tuning": 300, "exact_steps": 150, "sampled_steps": 300}}


def measure(row, seed, tuning, exact_steps, sampled_steps):
    rng, world = np.random.default_rng(seed), ReplyWorld(words=1)
    model = sft_model(world, rng, tuning)
    reference = world.log_distributions(model)
    learned = proxy_rewards(world, model, rng, 1000, tuning // 2)
    learned -= expectation(reference, learned)[:, None]

    def place(l):
        return [divergence(l, reference).mean(), expectation(l, learned).mean()]

    found = {"frontier": [place(optimum(reference, learned, beta)[0]) for beta in FRONTIER],
             "best of n": [place(best_of_n(reference, learned, n)) for n in DRAWS],
             "pi*": [], **{way: {"place": [], "share": [], "distance": []} for way in WAYS}}
    for beta in BETAS:
        best, log_Z = optimum(reference, learned, beta)
        found["pi*"].append(place(best))

        def gradient(l):
            return -objective_gradient(l, reference, learned, beta)

        def exact():
            return descend(model.copy(), world, gradient, exact_steps, 3e-3)

        def sampled():
            policy = model.copy()
            yield world.log_distributions(policy)
            stage = train_rlhf(TrainState(policy, rng, weight_decay=0.0), model, world.reward(learned), world.prompts,
                         sampled_steps, 16, 4, LONGEST, EOS, beta, 2e-3)
            for step, _ in enumerate(stage, 1):
                if step == sampled_steps or beta == WATCHED and step % EVERY == 0:
                    yield world.log_distributions(policy)

        for way, climb in zip(WAYS, (exact, sampled)):
            laws = [l.astype(np.float64) for l in climb()]
            found[way]["place"].append(place(laws[-1]))
            found[way]["share"].append((objective(laws[-1], reference, learned, beta) / (beta * log_Z)).mean())
            if beta == WATCHED:
                found[way]["distance"] = [total_variation(l, best).mean() for l in laws]
        shares = [f"{way} {found[way]['share'][-1]:.3f}" for way in WAYS]
        row.say(f"seed {seed}, beta {beta}, of J*: {', '.join(shares)}")
    return found


def conclude(seeds, size):
    least = {way: min(min(s[way]["share"]) for s in seeds) for way in WAYS}
    ends = {way: [s[way]["distance"][-1] for s in seeds] for way in WAYS}
    numbers = {f"share of J*, {way}, beta {beta}": spread(s[way]["share"][i] for s in seeds)
               for way in WAYS for i, beta in enumerate(BETAS)}
    numbers |= {f"total variation to pi* at the end, {way}, beta {WATCHED}": spread(ends[way]) for way in WAYS}
    table = [["beta", "KL of pi*", "reward of pi*",
              *(f"{name}, {way}" for way in WAYS for name in ("KL", "reward", "share of J*"))]]
    for i, beta in enumerate(BETAS):
        cells = [shown([s["pi*"][i][j] for s in seeds]) for j in (0, 1)]
        for way in WAYS:
            cells += [shown([s[way]["place"][i][j] for s in seeds]) for j in (0, 1)]
            cells.append(shown([s[way]["share"][i] for s in seeds], 3))
        table.append([f"{beta}", *cells])
    reached, distances = ([f"{100 * least[way]:.1f} %" for way in WAYS], [shown(ends[way], 3) for way in WAYS])
    sentence = (f"Over {len(BETAS)} beta and {len(seeds)} seeds, exact ascent reaches at least {reached[0]} of "
                f"J* = beta log Z in {size['exact_steps']} steps, the policy gradient at least {reached[1]} in "
                f"{size['sampled_steps']} steps of 64 replies; at beta {WATCHED} they end {distances[0]} and "
                f"{distances[1]} from pi* in total variation.")
    return Conclusion(verdict(least[WAYS[0]] >= 0.99 and least[WAYS[1]] >= 0.8), sentence, numbers, table)


def draw(figure, seeds, size):
    frontier, distance = figure.subplots(1, 2)
    for s in seeds:             # no mean: every seed has a reward model of its own
        for name, label, colour, style in (("frontier", "pi*, every beta", COLOURS[5], "-"),
                                           ("best of n", f"best of n, 1 to {DRAWS[-1]}", COLOURS[2], ":")):
            frontier.plot(*np.transpose(s[name]), style, color=colour, linewidth=1.5,
                          label=label if s is seeds[0] else None)
    for way, colour, marker in zip(WAYS, COLOURS, "ox"):
        for s in seeds:
            frontier.plot(*np.transpose(s[way]["place"]), marker, color=colour, alpha=0.8, markersize=5, zorder=3,
                          label=f"{way}, {len(BETAS)} beta" if s is seeds[0] else None)
    frontier.set(title="Where they end (one line a seed)", xlabel="KL to the instructed model (nats per reply)",
                 ylabel="learned reward, gained")
    frontier.legend(loc="lower right", fontsize=8)
    for way, colour, every, steps in zip(WAYS, COLOURS, (1, EVERY), (size["exact_steps"], size["sampled_steps"])):
        curve(distance, np.arange(0, steps + 1, every), [s[way]["distance"] for s in seeds], way, colour, marker="")
    distance.set(title=f"The way to pi*, beta = {WATCHED}", xlabel="step", ylabel="total variation to pi*",
                 yscale="log")
    distance.legend(loc="lower right", fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES))
