"""Imperfect preference: two groups of people, and one model for both

Claim. Human preference is itself imperfect: it differs between groups and criteria, and one model trained on
everybody's comparisons cannot serve all of them.

Test. Two groups judge replies to 9 questions: the majority likes courtesy, the minority wants few words; both want the
correct answer. A transformer of 25,632 parameters is finetuned on 4,000 demonstrations (the SFT model). Of 2,000 pairs
of its replies a share is judged by the minority (Bradley-Terry in each group); all labels are pooled, and DPO (beta
0.3, 200 steps) trains on them, for five shares. The gain of a group is its expected utility, over all 781 replies, on a
scale from 0 (the SFT model) to 1 (pi* of this group alone, beta 0.3: the best possible at its cost in KL). A baseline
without labels is the SFT model at a lower temperature (1 to 0.1), at the KL of each DPO policy. Without sampling noise,
for three of the questions and eleven shares, three policies are compared: pi* of the reward that unlimited pooled
comparisons have under Bradley-Terry (solved for), pi* of the mean utility of all people, and pi* of the larger group.
This shows whether pooling acts like a mean or like a majority vote. All of this is repeated with a minority whose
utilities are four times as large.

Rule. Each group gains more from DPO on its own comparisons than from DPO on the comparisons of the other group, and at
no share of the minority does the Bradley-Terry reward of pooled comparisons give both groups a gain of 0.9, on the
scale from 0 (the SFT model) to 1 (pi* of the group's own utility). Effects of a seed: the two differences, margin 0;
the largest gain of the group with the smaller gain, over the shares, which must be below 0.9.

Limits. The groups are constructed, and they differ in style only. They share the wish for a correct answer, so no gain
falls to 0. Every person here is certain and consistent; the only imperfection is that people differ. The gain of a
group does not measure the labels alone: the SFT model at a lower temperature serves both groups better than DPO on
labels pooled half and half (dpo.py shows where the probability goes under DPO); the rule compares DPO with DPO. "Four
times as large" supposes utilities that can be compared between people.

Source. Casper et al. 2023, arXiv:2307.15217 (section 3.2); Siththaranjan et al. 2023, arXiv:2312.08358 (pooled
comparisons learn Borda counts, not mean utility).

Figure. Gain of each of two groups against the share of the minority among the judges, in three panels: trained on 2,000
comparisons, unlimited comparisons, and unlimited comparisons with minority utilities four times as large; one colour
for each group, one style of line for each policy; dotted: the SFT model (0) and the optimum of the group (1).
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread
from common.recipes import finetune_by_dpo, sft_model

# isort: split
import numpy as np

from minilm.exact.enumerable import divergence, expectation, optimum, preference
from minilm.world.annotators import Annotator
from worlds.replies import ReplyWorld

BETA, PAIRS = 0.3, 2000
GROUPS = ("majority", "minority")
TEMPERATURES = tuple(np.linspace(1, 0.1, 19))       # of the SFT model: no labels
INTENSITIES = (1, 4)                    # factors of the minority's utilities
POLICIES = ("pooled comparisons", "mean utility", "larger group")
BOTH = 0.9                              # a gain of this much for both groups would refute the claim
SIZES = {"quick": {"seeds": 3, "tuning": 6, "steps": 2, "shares": [0.0, 1.0], "exact": [0.0, 0.3, 1.0], "solving": 1},
         "default": {"seeds": 6, "tuning": 300, "steps": 200, "shares": [0.0, 0.25, 0.5, 0.75, 1.0],
                     "exact": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], "solving": 12}}


def measure(experiment, seed, tuning, steps, shares, exact, solving):
    rng = np.random.default_rng(seed)
    world = ReplyWorld(words=2)
    model = sft_model(world, rng, tuning, experiment.dtype)
    reference = world.log_distributions(model)
    utilities = [world.table(Annotator(0, 1, 0, brief).utility) for brief in (False, True)]

    results = {"DPO": [], "KL": [], "lower temperature": []}
    for temperature in TEMPERATURES:
        log_pi = world.log_distributions(model, temperature)
        kl = divergence(log_pi, reference).mean()
        results["lower temperature"].append([kl, *gains(log_pi, reference, utilities)])
    for share in shares:
        pairs = pooled(world, reference, utilities, share, rng)
        policy = model.copy()
        finetune_by_dpo(world, policy, reference, pairs, rng, steps, BETA)
        log_pi = world.log_distributions(policy)
        results["DPO"].append(gains(log_pi, reference, utilities))
        results["KL"].append(divergence(log_pi, reference).mean())
    experiment.say(f"seed {seed}, gains of majority and minority: {np.round(results['DPO'], 2).tolist()}")

    # Without noise, for one question of each answer.
    answers = np.unique([question.answer for question in world.questions], return_index=True)[1]
    for intensity in INTENSITIES:
        groups = [utilities[0][answers], intensity * utilities[1][answers]]
        results[f"exact, {intensity}"] = exact_gains(reference[answers], groups, exact, solving)
    return results


def gains(log_pi, reference, utilities):
    """The gain of each group by a policy: 0 for the reference, 1 for pi* of that group alone."""
    def gain(policy, utility):
        return (expectation(policy, utility) - expectation(reference, utility)).mean()
    return [gain(log_pi, utility) / gain(optimum(reference, utility, BETA)[0], utility) for utility in utilities]


def exact_gains(reference, utilities, shares, solving):
    """The gains of both groups by each of POLICIES, for every share of the minority."""
    preferences = [preference(utility) for utility in utilities]
    rewards = utilities[0]
    results = {"error": [], **{name: [] for name in POLICIES}}
    for share in shares:
        mean_utility = (1 - share) * utilities[0] + share * utilities[1]
        mixed = (1 - share) * preferences[0] + share * preferences[1]
        rewards, error = bradley_terry_rewards(reference, mixed, rewards, solving)
        results["error"].append(error)
        larger = utilities[0] if share < 0.5 else utilities[1] if share > 0.5 else mean_utility
        for name, r in zip(POLICIES, (rewards, mean_utility, larger)):
            results[name].append(gains(optimum(reference, r, BETA)[0], reference, utilities))
    return results


def pooled(world, reference, utilities, share, rng):
    """Comparisons, each judged by the minority with probability `share`."""
    counts = rng.multinomial(PAIRS, [1 - share, share])
    parts = [world.comparisons(reference, utility, rng, count) for utility, count in zip(utilities, counts) if count]
    return [np.concatenate(columns) for columns in zip(*parts)]


def bradley_terry_rewards(log_pi, preferences, rewards, steps):
    """The rewards (P,Y) that unlimited comparisons have under Bradley-Terry, and their remaining error.

    Replies are drawn from pi (P,Y), and i is preferred to j with any probability preferences (P,Y,N). The error is the
    mean difference of two probabilities. The loss is convex. Its gradient in r(i) is -pi(i) (w(i) - w_r(i)), where
    w(i) is the probability that i is preferred to a reply drawn from pi, and w_r(i) the same under the rewards. Each
    iteration is a diagonal Newton step of at most 1 from the given rewards. w is the Borda count of a reply. Pooling
    keeps the Borda count; it does not keep utilities.
    """
    pi = np.exp(log_pi)
    borda = np.einsum("pij,pj->pi", preferences, pi)
    for _ in range(steps):
        predicted = preference(rewards)
        difference = borda - np.einsum("pij,pj->pi", predicted, pi)
        rewards = rewards + np.clip(difference / np.einsum("pij,pj->pi", predicted * (1 - predicted), pi), -1, 1)
    error = np.abs(borda - np.einsum("pij,pj->pi", preference(rewards), pi))
    return rewards, (pi * error).sum(axis=-1).max()


def at_lower_temperature(seeds):
    """The gain of each group by the SFT model at a lower temperature, at the KL of DPO: (seeds, shares, 2)."""
    values = []
    for s in seeds:
        kl, *by_group = np.transpose(s["lower temperature"])
        values.append(np.transpose([np.interp(s["KL"], kl, gain) for gain in by_group]))
    return np.array(values)


def conclude(seeds, size):
    shares = size["shares"]
    dpo = np.array([s["DPO"] for s in seeds])                                   # (seeds, shares, 2)
    exact = {(name, k): np.array([s[f"exact, {k}"][name] for s in seeds]) for name in POLICIES for k in INTENSITIES}
    own = dpo[:, 0, 0], dpo[:, -1, 1]                       # of each group, from its own comparisons alone
    other = dpo[:, -1, 0], dpo[:, 0, 1]                     # and from those of the other group alone
    free = at_lower_temperature(seeds)
    half = np.abs(np.array(shares) - 0.5).argmin()
    both = exact[POLICIES[0], 1].min(axis=-1).max(axis=-1)
    distance = {(name, k): np.abs(exact[POLICIES[0], k] - exact[name, k]).mean(axis=(1, 2))
                for name in POLICIES[1:] for k in INTENSITIES}
    strong = INTENSITIES[1]
    third = size["exact"].index(0.3)
    rule = [Comparison(f"gain of the {group} from DPO on its own comparisons, minus that from the other group's",
                       a - b, above=0) for group, a, b in zip(GROUPS, own, other)]
    rule.append(Comparison("largest gain, over the shares, of the group that gains less from pooled comparisons", both,
                           below=BOTH))
    findings = [Comparison(f"gain of the {group} from DPO on labels pooled half and half, minus the SFT model at a "
                           "lower temperature (no labels)", dpo[:, half, j] - free[:, half, j], above=0)
                for j, group in enumerate(GROUPS)]
    findings += [Comparison("distance of pooled comparisons to the larger group's policy, minus that to mean utility",
                            distance[POLICIES[2], 1] - distance[POLICIES[1], 1], above=0),
                 Comparison(f"gain of a minority of 0.3 with utilities {strong} times as large, mean utility minus "
                            "pooled comparisons",
                            exact[POLICIES[1], strong][:, third, 1] - exact[POLICIES[0], strong][:, third, 1], above=0)]
    words = (f"On the scale from 0 (SFT model) to 1 (the group's own pi*), the majority gains {mean(own[0])} from "
             f"DPO on its own comparisons and {mean(other[0])} from those of "
             f"the minority; the minority gains {mean(own[1])} and {mean(other[1])}. With pooled comparisons the group "
             f"that gains less gains at most {mean(both)}.")
    numbers = _numbers(seeds, size, dpo, free, exact, distance, both)
    return Conclusion(rule, words, numbers, _table(seeds, size, dpo, free, exact), findings=findings)


def _numbers(seeds, size, dpo, free, exact, distance, both):
    shares = size["shares"]
    numbers = {f"gain of the {group} by DPO, share of the minority {share}": spread(dpo[:, i, j])
               for i, share in enumerate(shares) for j, group in enumerate(GROUPS)}
    numbers |= {f"gain of the {group} by the SFT model at a lower temperature, at the KL of share {share}":
                spread(free[:, i, j]) for i, share in enumerate(shares) for j, group in enumerate(GROUPS)}
    numbers |= {f"KL of DPO (nats), share of the minority {share}": spread(s["KL"][i] for s in seeds)
                for i, share in enumerate(shares)}
    numbers |= {f"gain of the {group} by {name}, minority {k} times as intense, share {share}": spread(values[:, i, j])
                for (name, k), values in exact.items()
                for i, share in enumerate(size["exact"]) for j, group in enumerate(GROUPS)}
    numbers |= {f"distance from pooled comparisons to {name}, minority {k} times as intense": spread(values)
                for (name, k), values in distance.items()}
    numbers |= {f"remaining error of the Bradley-Terry equations, {k}":
                spread(max(s[f"exact, {k}"]["error"]) for s in seeds) for k in INTENSITIES}
    numbers["largest gain of the group that gains less from pooled comparisons"] = spread(both)
    return numbers


def _table(seeds, size, dpo, free, exact):
    shares = size["shares"]
    strong = INTENSITIES[1]
    columns = {**{name: exact[name, 1] for name in POLICIES},
               **{f"{name}, minority {strong}x": exact[name, strong] for name in POLICIES[:2]}}
    table = [["share of the minority (gain of majority / minority)", "DPO", "its KL (nats)", "no labels, that KL",
              *columns]]
    for share in sorted({*size["exact"], *shares}):
        cells = [""] * (3 + len(columns))
        if share in shares:
            i = shares.index(share)
            dpo_gains, free_gains = (" / ".join(mean_range(gain[:, i, j]) for j in (0, 1)) for gain in (dpo, free))
            cells[:3] = dpo_gains, mean_range([s["KL"][i] for s in seeds]), free_gains
        if share in size["exact"]:
            means = [values[:, size["exact"].index(share)].mean(axis=0) for values in columns.values()]
            cells[3:] = [f"{majority:.2f} / {minority:.2f}" for majority, minority in means]
        table.append([f"{share}", *cells])
    return table


def draw(figure, seeds, size):
    axes = figure.subplots(1, 3, sharey=True)
    for axis, k in zip(axes, (None, *INTENSITIES)):
        for j, (group, colour) in enumerate(zip(GROUPS, COLOURS)):
            if k is None:
                curve(axis, size["shares"], [np.array(s["DPO"])[:, j] for s in seeds], f"{group}: DPO", colour)
                free = at_lower_temperature(seeds)[..., j]
                curve(axis, size["shares"], free, f"{group}: no labels, at the KL of DPO", colour, marker="",
                      linestyle="--")
                continue
            for name, style in zip(POLICIES, ("-", "--", ":")):
                by_seed = [np.array(s[f"exact, {k}"][name])[:, j] for s in seeds]
                curve(axis, size["exact"], by_seed, f"{group}: {name}", colour, marker="", linestyle=style)
        level(axis, 1, "its own optimum")
        level(axis, 0, "the SFT model", below=True)
        axis.set(xlabel="share of the minority among judges", title="Trained, 2,000 comparisons" if k is None else
                 "Unlimited comparisons" if k == 1 else f"Minority utilities {k} times as large", ylim=(-0.08, 1.12))
    # The third panel has the lines of the second.
    handles, labels = (sum(both, []) for both in zip(*(axis.get_legend_handles_labels() for axis in axes[:2])))
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    axes[0].set(ylabel="gain of a group (1: its own optimum)")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(9, 5.4)))
