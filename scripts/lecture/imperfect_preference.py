"""Human preference is itself imperfect: whose preference does the model serve?

Claim. Human preference is itself imperfect: it differs between groups and criteria, and one model trained on
everybody's comparisons cannot serve all of them.

Test. Two groups judge replies to 9 questions: the majority likes courtesy, the minority wants few words; both want the
right answer. A transformer of 25,632 parameters is instructed with 4,000 demonstrations; of 2,000 pairs of its replies
a share is judged by the minority (Bradley-Terry in each group), all labels are pooled, and DPO (beta 0.3, 200 steps)
trains on them, for five shares. What a policy is to a group: its expected worth to that group, all 781 replies being
listed, from 0 (the instructed model) to 1 (pi* of that group alone, beta 0.3: the best possible at its cost in KL);
DPO's KL is measured too, and what the instructed model is to each group at that KL without any label, sampled colder
(temperatures from 1 to 0.1). Beside it, without any noise, for three of the questions and eleven shares: pi* of the
reward that endless pooled comparisons have under Bradley-Terry (solved for), pi* of the average worth of all people,
and pi* of whoever has more people: is pooling a mean, or winner takes all? The same once more when the minority cares
four times as much.

Refuted. If, with any seed, DPO on the majority's comparisons alone serves the minority as well as DPO on the
minority's own, or the other way round; or if for some share the Bradley-Terry reward serves both groups to 0.9 or
more.

Limits. Who the groups are, and that they differ in manner only, is how this world was made; so is what they have in
common (the right answer), which is why no one falls to 0. Every person here is sure and consistent: what is imperfect
is only that people differ. How well one is served says little of the labels alone: the instructed model sampled
colder serves both groups better than DPO does on labels pooled half and half (dpo.py shows where DPO's probability
goes); the rule compares DPO with DPO. "Four times as much" supposes worths that can be compared between people.

Source. Casper et al. 2023, arXiv:2307.15217 (section 3.2); Siththaranjan et al. 2023, arXiv:2312.08358 (pooled
comparisons learn Borda counts, not mean worth).
"""

import sys

from common.experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict
from common.recipes import finetune_by_dpo, sft_model

import numpy as np

from minilm.world.annotators import Annotator
from minilm.exact.enumerable import divergence, expectation, optimum, preference
from worlds.replies import ReplyWorld

BETA, PAIRS = 0.3, 2000
GROUPS = ("majority", "minority")
TEMPERATURES = tuple(np.linspace(1, 0.1, 19))       # of the instructed model: no labels
INTENSITIES = (1, 4)                    # how much more the minority cares
RULES = ("pooled comparisons", "average worth", "winner takes all")
SIZES = {"quick": {"seeds": 3, "tuning": 6, "steps": 2, "shares": [0.0, 1.0], "exact": [0.0, 0.3, 1.0], "solving": 1},
         "default": {"seeds": 4, "tuning": 300, "steps": 200, "shares": [0.0, 0.25, 0.5, 0.75, 1.0],
                     "exact": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], "solving": 12}}


def measure(row, seed, tuning, steps, shares, exact, solving):
    rng, world = np.random.default_rng(seed), ReplyWorld(words=2)
    model = sft_model(world, rng, tuning)
    reference = world.log_distributions(model)
    worths = [world.table(Annotator(0, 1, 0, brief).utility) for brief in (False, True)]

    found = {"DPO": [], "KL": [], "colder": []}
    for temperature in TEMPERATURES:
        l = world.log_distributions(model, temperature)
        found["colder"].append([divergence(l, reference).mean(), *served(l, reference, worths)])
    for share in shares:
        pairs = pooled(world, reference, worths, share, rng)
        policy = model.copy()
        finetune_by_dpo(world, policy, reference, pairs, rng, steps, BETA)
        l = world.log_distributions(policy)
        found["DPO"].append(served(l, reference, worths))
        found["KL"].append(divergence(l, reference).mean())
    row.say(f"seed {seed}, majority and minority served: {np.round(found['DPO'], 2).tolist()}")

    # Without noise, for one question of each answer.
    answers = np.unique([question.answer for question in world.questions], return_index=True)[1]
    law = reference[answers]
    for intensity in INTENSITIES:
        groups = [worths[0][answers], intensity * worths[1][answers]]
        wins = [preference(worth) for worth in groups]
        rewards, results = groups[0], {"error": [], **{rule: [] for rule in RULES}}
        for share in exact:
            mean = (1 - share) * groups[0] + share * groups[1]
            rewards, error = bradley_terry(law, (1 - share) * wins[0] + share * wins[1], rewards, solving)
            results["error"].append(error)
            winner = groups[0] if share < 0.5 else groups[1] if share > 0.5 else mean
            for rule, r in zip(RULES, (rewards, mean, winner)):
                results[rule].append(served(optimum(law, r, BETA)[0], law, groups))
        found[f"exact, {intensity}"] = results
    return found


def served(l, reference, worths):
    """What a policy is to each group: 0 if no more than the reference, 1 if as much as pi* of that group alone."""
    def gain(law, worth):
        return (expectation(law, worth) - expectation(reference, worth)).mean()
    return [gain(l, worth) / gain(optimum(reference, worth, BETA)[0], worth) for worth in worths]


def pooled(world, reference, worths, share, rng):
    """Comparisons of which each is judged by the minority with probability `share`."""
    counts = rng.multinomial(PAIRS, [1 - share, share])
    parts = [world.comparisons(reference, worth, rng, count) for worth, count in zip(worths, counts) if count]
    return [np.concatenate(of) for of in zip(*parts)]


def bradley_terry(law, wins, rewards, steps):
    """The rewards (P,N) that endless comparisons of replies drawn from exp(law) have, where i beats j with
    probability wins (P,N,N) of any kind, and how far they are from them: the mean difference of two probabilities.

    The loss is convex; its gradient in r(i) is -pi(i) times how much less often i wins by the rewards than it does,
    against a reply drawn from pi. Each step is Newton's by the diagonal, by 1 at most, from the rewards given.
    How often a reply wins is its Borda count: that, and not how much it is worth to whom, is what pooling keeps.
    """
    pi = np.exp(law)
    often = np.einsum("pij,pj->pi", wins, pi)
    for _ in range(steps):
        said = preference(rewards)
        short = often - np.einsum("pij,pj->pi", said, pi)
        rewards = rewards + np.clip(short / np.einsum("pij,pj->pi", said * (1 - said), pi), -1, 1)
    return rewards, (pi * np.abs(often - np.einsum("pij,pj->pi", preference(rewards), pi))).sum(axis=-1).max()


def colder(seeds):
    """What the instructed model is to each group at the KL of each of DPO's policies: (seeds, shares, 2)."""
    paths = [np.transpose(s["colder"]) for s in seeds]
    return np.array([np.transpose([np.interp(s["KL"], kl, gain) for gain in gains])
                     for s, (kl, *gains) in zip(seeds, paths)])


def conclude(seeds, size):
    shares, dpo = size["shares"], np.array([s["DPO"] for s in seeds])           # (seeds, shares, 2)
    exact = {(rule, k): np.array([s[f"exact, {k}"][rule] for s in seeds]) for rule in RULES for k in INTENSITIES}
    own, theirs = (dpo[:, 0, 0], dpo[:, -1, 1]), (dpo[:, -1, 0], dpo[:, 0, 1])  # by whose comparisons alone
    free, half = colder(seeds), np.abs(np.array(shares) - 0.5).argmin()
    both = exact[RULES[0], 1].min(axis=-1).max(axis=-1)
    holds = all((a < b).all() for a, b in zip(theirs, own)) and both.max() < 0.9
    apart = {(rule, k): np.abs(exact[RULES[0], k] - exact[rule, k]).mean(axis=(1, 2))
             for rule in RULES[1:] for k in INTENSITIES}
    numbers = {f"{group} served by DPO, share of the minority {share}": spread(dpo[:, i, j])
               for i, share in enumerate(shares) for j, group in enumerate(GROUPS)}
    numbers |= {f"{group} served by the instructed model, colder, at the KL of share {share}": spread(free[:, i, j])
                for i, share in enumerate(shares) for j, group in enumerate(GROUPS)}
    numbers |= {f"KL of DPO (nats), share of the minority {share}": spread(s["KL"][i] for s in seeds)
                for i, share in enumerate(shares)}
    numbers |= {f"{group} served by {rule}, minority {k} times as intense, share {share}": spread(law[:, i, j])
                for (rule, k), law in exact.items()
                for i, share in enumerate(size["exact"]) for j, group in enumerate(GROUPS)}
    numbers |= {f"distance from pooled comparisons to {rule}, minority {k} times as intense": spread(a)
                for (rule, k), a in apart.items()}
    numbers |= {f"left of the Bradley-Terry equations, {k}": spread(max(s[f"exact, {k}"]["error"]) for s in seeds)
                for k in INTENSITIES}
    numbers |= {"best that one Bradley-Terry reward does for the worse served": spread(both)}

    strong, third = INTENSITIES[1], size["exact"].index(0.3)
    columns = {**{rule: exact[rule, 1] for rule in RULES},
               **{f"{rule}, minority cares {strong}x": exact[rule, strong] for rule in RULES[:2]}}
    table = [["majority / minority served, by minority's share", "DPO", "its KL (nats)", "no labels, that KL",
              *columns]]
    for share in sorted({*size["exact"], *shares}):
        trained, without = (" / ".join(shown(of[:, shares.index(share), j]) for j in (0, 1)) if share in shares else ""
                            for of in (dpo, free))
        kl = shown([s["KL"][shares.index(share)] for s in seeds]) if share in shares else ""
        cells = [""] * len(columns)
        if share in size["exact"]:
            means = [law[:, size["exact"].index(share)].mean(axis=0) for law in columns.values()]
            cells = [f"{majority:.2f} / {minority:.2f}" for majority, minority in means]
        table.append([f"{share}", trained, kl, without, *cells])
    near, far = (apart[rule, 1] for rule in RULES[1:])
    kind = "a mean rather than winner takes all" if (near < far).all() else "not nearer a mean than winner takes all"
    by_worth, by_pairs = (exact[rule, strong][:, third, 1] for rule in (RULES[1], RULES[0]))
    stakes = ("But a comparison does not say how much is at stake" if (by_worth > by_pairs).all() else
              "A comparison does not say how much is at stake; with not every seed is anything lost by it")
    sentence = (f"Of what it could gain, the majority gets {shown(own[0])} from DPO on its own comparisons and "
                f"{shown(theirs[0])} from the minority's; the minority {shown(own[1])} and {shown(theirs[1])}; labels "
                f"pooled half and half give them {' and '.join(shown(dpo[:, half, j]) for j in (0, 1))}, and the "
                f"instructed model at that KL, merely colder and without a label, "
                f"{' and '.join(shown(free[:, half, j]) for j in (0, 1))}. One reward of "
                f"endless pooled comparisons serves the worse served to {shown(both)} at best. Pooling is "
                f"{kind}: {shown(near, 3)} from the average worth, {shown(far, 3)} from the winner's. "
                f"{stakes}: a minority of 0.3 that cares {strong} times as much is served to {shown(by_worth)} by "
                f"average worth and to {shown(by_pairs)} by pooled comparisons.")
    return Conclusion(verdict(holds), sentence, numbers, table)


def draw(figure, seeds, size):
    axes = figure.subplots(1, 3, sharey=True)
    for axis, k in zip(axes, (None, *INTENSITIES)):
        for j, (group, colour) in enumerate(zip(GROUPS, COLOURS)):
            if k is None:
                curve(axis, size["shares"], [np.array(s["DPO"])[:, j] for s in seeds], f"{group}: DPO", colour)
                curve(axis, size["shares"], colder(seeds)[..., j], f"{group}: no labels, colder, at DPO's KL", colour,
                      marker="", linestyle="--")
                continue
            for rule, style in zip(RULES, ("-", "--", ":")):
                by_seed = [np.array(s[f"exact, {k}"][rule])[:, j] for s in seeds]
                curve(axis, size["exact"], by_seed, f"{group}: {rule}", colour, marker="", linestyle=style)
        level(axis, 1, "its own optimum")
        level(axis, 0, "the instructed model")
        axis.set(xlabel="share of the minority among the judges", title="Trained, 2,000 comparisons" if k is None else
                 "Endless comparisons" if k == 1 else f"... the minority cares {k} times as much", ylim=(-0.02, 1.12))
        if k != INTENSITIES[1]:                             # there the lines are those of the panel before
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 0.06), fontsize=7.5)
    axes[0].set(ylabel="share of a group's possible gain in worth")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(11.5, 4.6)))
