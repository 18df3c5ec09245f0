"""A few judgements train a model that predicts the reward

Claim. Asking people about every output is too expensive; a few judgements train a model that predicts the reward.

Test. 27 questions with 781 possible replies each are 21,087 outputs. People compare pairs drawn from an instructed
transformer of 25,632 parameters, on 18 of the questions; they choose by the Bradley-Terry law of the gold reward, and
in a second run a quarter of their choices is turned round. A reward model starts from the instructed one and takes 8
sqrt(n) steps on n comparisons (30 to 3,000), less a fifth that chooses where to stop. Measured: the share of fresh
pairs of different gold that it orders as gold does (gold itself: 1, chance: 0.5), on the questions compared and on the
9 others; and whether what it predicts, sigma(r1 - r2), is how often people prefer the first: reliability diagram, and
expected calibration error over ten bins of equal width. To compare with: how often a person's own choice is as gold,
and a Bradley-Terry model linear in counts of tokens, alone and with each word of the question.

Refuted. If, with any seed, the model of 1,000 clean comparisons, which show people fewer than a tenth of the outputs,
orders pairs of the 9 other questions less often as gold does than a single choice of a person would.

Limits. The instructed model knows all 27 questions, only comparisons are missing for 9 of them. The questions differ
in content and not in kind: nothing is said about another kind of task. The seed that fails orders 0.88 of the pairs of
the questions compared and 0.67 of the others: it has learned by heart which answer goes with which question. Slower
learning (5e-4, 800 steps) in a trial with its reference model got to 0.74, no further. People here err independently
of each other; errors that they share would be learned. The linear model is told the place of each word, and gold is
nearly linear in what it counts: it needs fewer.

Source. Bradley and Terry 1952; Stiennon et al. 2020, arXiv:2009.01325; Ouyang et al. 2022, arXiv:2203.02155;
calibration: Guo et al. 2017, arXiv:1706.04599.
"""

import sys

from common.experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict
from common.recipes import early_stopped_reward_model, finetune_on_replies

import numpy as np

from minilm.evaluate import predicted_rewards
from minilm.ops import stable_sigmoid
from common.linear import bradley_terry, counts
from worlds.replies import MODEL, ReplyWorld

COMPARISONS = (30, 100, 300, 1000, 3000)
FEW = 1000                              # the number that the rule is about
FLIPS = {"": 0.0, ", 25% flipped": 0.25}
BINS = 10
ASKED, WHOLE = 18, 27                   # questions with comparisons, and all
SIZES = {"quick": {"seeds": 3, "instruct": 10, "most": 2, "fresh": 200},
         "default": {"seeds": 4, "instruct": 300, "most": 10**6, "fresh": 3000}}


def measure(row, seed, instruct, most, fresh):
    world, rng = ReplyWorld(words=3), np.random.default_rng(seed)
    model, _ = row.trained("replies", seed, MODEL, finetune_on_replies, words=3, steps=instruct)
    l, x = world.log_distributions(model), counts(world)
    order = rng.permutation(WHOLE)
    compared, new = order[:ASKED], order[ASKED:]
    # The pairs to be judged: which one comes first says nothing. d is how much better the first one is.
    tests = []
    for prompts in (compared, new):
        p, first, second = world.comparisons(l, world.gold, rng, fresh, prompts, flip_rate=0.5)
        tests.append((p, first, second, world.gold[p, first] - world.gold[p, second]))

    def agreement(margin, d):
        return ((margin > 0) == (d > 0))[d != 0].mean()

    found = {"people": np.mean([stable_sigmoid(np.abs(d[d != 0])).mean() for *_, d in tests])}
    for label, flip_rate in FLIPS.items():
        pairs = world.comparisons(l, world.gold, rng, max(COMPARISONS), compared, flip_rate)
        for n in COMPARISONS:
            few = [part[:n] for part in pairs]
            steps = min(most, round(8 * len(few[0]) ** 0.5))
            reward_model = early_stopped_reward_model(world, model, rng, few, steps)
            p, chosen, rejected = few
            differences = x[p, chosen] - x[p, rejected]
            linear = {"counts alone": differences * (np.arange(x.shape[-1]) < world.vocab_size), "linear": differences}
            weights = {name: bradley_terry(rows) for name, rows in linear.items()}
            for (p, first, second, d), where in zip(tests, ("compared", "new")):
                r = predicted_rewards(reward_model, *world.tokens_of(np.tile(p, 2), np.concatenate([first, second])))
                margin = r[:fresh] - r[fresh:]
                found.setdefault(f"model, {where}{label}", []).append(agreement(margin, d))
                for name, w in weights.items():
                    by_counts = agreement((x[p, first] - x[p, second]) @ w, d)
                    found.setdefault(f"{name}, {where}{label}", []).append(by_counts)
            # Calibration, on the new questions: what is predicted against how often people prefer, who flip as before.
            says, do = stable_sigmoid(margin), flip_rate + (1 - 2 * flip_rate) * stable_sigmoid(d)
            place = np.minimum((says * BINS).astype(int), BINS - 1)
            size = np.bincount(place, minlength=BINS)
            mean = [np.bincount(place, values, BINS) / np.maximum(size, 1) for values in (says, do)]
            found.setdefault(f"calibration error{label}", []).append((size * np.abs(mean[0] - mean[1])).sum() / len(p))
            found.setdefault(f"error of a probability{label}", []).append(np.abs(says - do).mean())
            found[f"diagram{label}"] = [size, *mean]                # the last one stays: of the most comparisons
        found[f"ignorance{label}"] = np.abs(0.5 - do).mean()
        row.say(f"seed {seed}{label}: {np.round(found['model, new' + label], 3)}")
    return found


def conclude(seeds, size):
    at = COMPARISONS.index(FEW)
    holds = all(s["model, new"][at] >= s["people"] for s in seeds)
    as_good = [all(s["model, new"][i] >= s["people"] for s in seeds) for i in range(len(COMPARISONS))]
    reached = [n for i, n in enumerate(COMPARISONS) if all(as_good[i:])]        # and so are all larger numbers
    names = ("model, compared", "model, new", "linear, new", "counts alone, new", "calibration error",
             "error of a probability")
    numbers = {"a person's choice is as gold": spread(s["people"] for s in seeds)}
    numbers |= {f"{name}{label}, {n} comparisons": spread(s[name + label][i] for s in seeds)
                for label in FLIPS for name in names for i, n in enumerate(COMPARISONS)}
    numbers |= {f"error of always saying 0.5{label}": spread(s[f"ignorance{label}"] for s in seeds) for label in FLIPS}
    table = [["comparisons", *names]]
    for label in FLIPS:
        table += [[f"{n}{label}", *(shown([s[name + label][i] for s in seeds]) for name in names)]
                  for i, n in enumerate(COMPARISONS)]

    def now(name, i=at):
        return shown([s[name][i] for s in seeds])

    sentence = (f"On questions that nobody compared, {FEW:,} comparisons order {now('model, new')} of the pairs as "
                f"gold does, and 3,000 {now('model, new', -1)} (with 25% flips {now('model, new, 25% flipped')} and "
                f"{now('model, new, 25% flipped', -1)}); a person's own choice is right in "
                f"{shown([s['people'] for s in seeds])}. "
                + (f"Every seed is as good as a person from {reached[0]:,} comparisons on. " if reached else
                   "The most comparisons do not make every seed as good as a person. ")
                + f"The linear model with the words of the question has {now('linear, new')} from {FEW:,}, counts "
                f"alone {now('counts alone, new')}. The calibration error is {now('calibration error')} after {FEW:,} "
                f"and {now('calibration error', -1)} after 3,000 comparisons "
                f"(flipped: {now('calibration error, 25% flipped')}, {now('calibration error, 25% flipped', -1)}).")
    return Conclusion(verdict(holds), sentence, numbers, table)


def draw(figure, seeds, size):
    accuracy, diagram = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for name, label, colour, style in (("model, compared", "reward model, questions compared", 0, "-"),
                                       ("model, new", "reward model, other questions", 1, "-"),
                                       ("linear, new", "linear in counts with the question's words", 2, "--"),
                                       ("counts alone, new", "linear in counts alone", 3, "--"),
                                       ("model, new, 25% flipped", "reward model, 25% of labels flipped", 4, "-")):
        curve(accuracy, COMPARISONS, [s[name] for s in seeds], label, COLOURS[colour], linestyle=style)
    level(accuracy, 0.5, "chance")
    level(accuracy, 1.0, "gold itself")
    level(accuracy, np.mean([s["people"] for s in seeds]), "one choice of a person")
    accuracy.set(title="Does it order pairs as gold does?", xscale="log", xlabel="comparisons",
                 ylabel="share of pairs ordered as gold", ylim=(0.35, 1.04))
    accuracy.set_xticks(COMPARISONS, [f"{n:,}" for n in COMPARISONS])
    accuracy.minorticks_off()
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    diagram.plot((0, 1), (0, 1), linestyle=":", linewidth=1.2, color=COLOURS[5])
    diagram.annotate("calibrated", (0.2, 0.12), fontsize=8, alpha=0.75)
    for label, colour in zip(FLIPS, (COLOURS[1], COLOURS[4])):
        for s in seeds:
            n, says, do = map(np.array, s[f"diagram{label}"])
            diagram.plot(says[n > 0], do[n > 0], color=colour, linewidth=0.8, alpha=0.35)
        n, says, do = (np.array([s[f"diagram{label}"][i] for s in seeds]) for i in range(3))
        met = n.sum(axis=0) > 0
        means = [(n * x).sum(axis=0)[met] / n.sum(axis=0)[met] for x in (says, do)]
        diagram.plot(*means, color=colour, marker="o", markersize=4, linewidth=1.8,
                     label=f"{COMPARISONS[-1]:,} comparisons{label}")
    diagram.set(title="Is it as sure as it should be?", xlabel="predicted: the first is preferred",
                ylabel="how often people prefer the first", xlim=(0, 1), ylim=(0, 1))
    diagram.legend(loc="upper left", fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(10, 4.4)))
