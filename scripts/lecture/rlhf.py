"""RLHF beside the optimal policy in closed form

Claim. The policy is optimised for the proxy reward minus beta times the KL divergence from the model it starts from.

Test. A transformer of 25,632 parameters is finetuned on 4,000 demonstrations (the SFT model); a reward model (the proxy
reward) is trained on 1,000 comparisons of its replies. There are 3 questions with 781 possible replies each, all
listed. So for each of four beta the optimal policy pi* and its objective J* = beta log Z are known, and the reward, the
KL and J of every policy are exact. Two methods start at the SFT model: gradient ascent on J itself, a sum over all
replies, and the policy gradient with leave-one-out baseline on 64 sampled replies per step. Best of n by the proxy
reward is shown beside them, with its exact distribution. Rewards are measured from the mean reward of the SFT model, so
its J is 0. Total variation is 0 at pi* and at most 1.

Rule. At every beta, gradient ascent on the exact J of the proxy reward ends above 99 % of J*, and the sampled policy
gradient above 80 % of J*. Effect of a seed: the smallest share of J* over the four beta.

Limits. A policy of this size can represent any distribution over these few replies; a large model over all texts
cannot. This experiment shows that J is the quantity that is maximised. Whether the proxy reward is worth maximising is
the question of kl_penalty. Best of n has no beta: it is one point per n. It lies close to the frontier although it does
not maximise J.

Source. Ouyang et al. 2022, arXiv:2203.02155; the optimum: Rafailov et al. 2023, arXiv:2305.18290; leave-one-out:
Ahmadian et al. 2024, arXiv:2402.14740; best of n: Beirami et al. 2024, arXiv:2401.01879.

Figure. Left: gain in proxy reward against KL to the SFT model, one line per seed for pi* at every beta and for best of
n, marks for the end points of exact ascent and of the policy gradient; right: total variation to pi* (log axis) against
the step, for both methods.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, mean, mean_range, run, spread
from common.recipes import proxy_rewards, sft_model

# isort: split
import numpy as np

from minilm.exact.enumerable import (
    best_of_n,
    divergence,
    expectation,
    objective,
    objective_gradient,
    optimum,
    total_variation,
)
from minilm.exact.expectations import descend
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from worlds.replies import EOS, LONGEST, ReplyWorld

BETAS, WATCHED = (1.0, 0.5, 0.2, 0.1), 0.2              # WATCHED: the beta whose path to pi* is drawn
FRONTIER = tuple(np.geomspace(3, 0.05, 40))
DRAWS = tuple(2 ** k for k in range(8))
EVERY = 10                      # steps between two points of a path
# The methods, and the share of J* that the rule asks for.
SHARES = {"exact ascent": 0.99, "policy gradient": 0.8}
SIZES = {"quick": {"seeds": 3, "tuning": 6, "exact_steps": 2, "sampled_steps": 10},
         "default": {"seeds": 6, "tuning": 300, "exact_steps": 200, "sampled_steps": 300}}


def measure(experiment, seed, tuning, exact_steps, sampled_steps):
    rng = np.random.default_rng(seed)
    world = ReplyWorld(words=1)
    model = sft_model(world, rng, tuning, experiment.dtype)
    reference = world.log_distributions(model)
    proxy = proxy_rewards(world, model, rng, 1000, tuning // 2)
    proxy -= expectation(reference, proxy)[:, None]

    def point(log_pi):
        return [divergence(log_pi, reference).mean(), expectation(log_pi, proxy).mean()]

    results = {"frontier": [point(optimum(reference, proxy, beta)[0]) for beta in FRONTIER],
               "best of n": [point(best_of_n(reference, proxy, n)) for n in DRAWS],
               "pi*": [], **{method: {"point": [], "share": [], "distance": []} for method in SHARES}}
    for beta in BETAS:
        best, log_Z = optimum(reference, proxy, beta)
        results["pi*"].append(point(best))

        def gradient(log_pi):
            return -objective_gradient(log_pi, reference, proxy, beta)

        def exact():
            return descend(model.copy(), world, gradient, exact_steps, 3e-3)

        def sampled():
            policy = model.copy()
            yield world.log_distributions(policy)
            stage = train_rlhf(TrainState(policy, rng, weight_decay=0.0), model, world.reward(proxy), world.prompts,
                               sampled_steps, 16, 4, LONGEST, EOS, beta, 2e-3)
            for step, _ in enumerate(stage, 1):
                if step == sampled_steps or beta == WATCHED and step % EVERY == 0:
                    yield world.log_distributions(policy)

        for method, ascent in zip(SHARES, (exact, sampled)):
            path = list(ascent())
            results[method]["point"].append(point(path[-1]))
            share = (objective(path[-1], reference, proxy, beta) / (beta * log_Z)).mean()
            results[method]["share"].append(share)
            if beta == WATCHED:
                results[method]["distance"] = [total_variation(log_pi, best).mean() for log_pi in path]
        shares = [f"{method} {results[method]['share'][-1]:.3f}" for method in SHARES]
        experiment.say(f"seed {seed}, beta {beta}, share of J*: {', '.join(shares)}")
    return results


def conclude(seeds, size):
    smallest = {method: [min(s[method]["share"]) for s in seeds] for method in SHARES}
    distance = {method: [s[method]["distance"][-1] for s in seeds] for method in SHARES}
    exact, sampled = SHARES
    name_of = {exact: "gradient ascent on the exact J", sampled: sampled}
    rule = [Comparison(f"smallest share of J* over {len(BETAS)} beta, "
                       f"{name_of[method]}", smallest[method], above=margin)
            for method, margin in SHARES.items()]
    numbers = {f"share of J*, {method}, beta {beta}": spread(s[method]["share"][i] for s in seeds)
               for method in SHARES for i, beta in enumerate(BETAS)}
    numbers |= {f"total variation to pi* at the end, {method}, beta {WATCHED}": spread(distance[method])
                for method in SHARES}
    table = [["beta", "KL of pi*", "reward of pi*",
              *(f"{name}, {method}" for method in SHARES for name in ("KL", "reward", "share of J*"))]]
    for i, beta in enumerate(BETAS):
        cells = [mean_range([s["pi*"][i][j] for s in seeds]) for j in (0, 1)]
        for method in SHARES:
            cells += [mean_range([s[method]["point"][i][j] for s in seeds]) for j in (0, 1)]
            cells.append(mean_range([s[method]["share"][i] for s in seeds], 3))
        table.append([f"{beta}", *cells])
    words = (f"Over {len(BETAS)} beta, gradient ascent on the exact J of the proxy reward reaches at least "
             f"{100 * np.mean(smallest[exact]):.1f} % of "
             f"J* = beta log Z and the policy gradient at least {100 * np.mean(smallest[sampled]):.1f} %. At beta "
             f"{WATCHED} the policy gradient ends at a total variation of {mean(distance[sampled])} from pi*.")
    return Conclusion(rule, words, numbers, table)


def draw(figure, seeds, size):
    frontier, distance = figure.subplots(1, 2)
    for s in seeds:             # no mean: every seed has its own reward model
        for name, label, colour, style in (("frontier", "pi*, every beta", COLOURS[5], "-"),
                                           ("best of n", f"best of n, 1 to {DRAWS[-1]}", COLOURS[2], ":")):
            frontier.plot(*np.transpose(s[name]), style, color=colour, linewidth=1.5,
                          label=label if s is seeds[0] else None)
    for method, colour, marker in zip(SHARES, COLOURS, "ox"):
        for s in seeds:
            frontier.plot(*np.transpose(s[method]["point"]), marker, color=colour, alpha=0.8, markersize=5, zorder=3,
                          label=f"{method}, {len(BETAS)} beta" if s is seeds[0] else None)
    frontier.set(title="End points (one line per seed)", xlabel="KL to the SFT model (nats per reply)",
                 ylabel="gain in proxy reward")
    frontier.legend(loc="lower right", fontsize=8)
    steps = {"exact ascent": np.arange(size["exact_steps"] + 1),
             "policy gradient": np.arange(0, size["sampled_steps"] + 1, EVERY)}
    for (method, x), colour in zip(steps.items(), COLOURS):
        curve(distance, x, [s[method]["distance"] for s in seeds], method, colour, marker="")
    distance.set(title=f"The path to pi*, beta = {WATCHED}", xlabel="step", ylabel="total variation to pi*",
                 yscale="log")
    distance.legend(loc="upper right", fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES))
