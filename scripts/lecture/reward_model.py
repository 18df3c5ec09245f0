"""A reward model from few judgements

Claim. Asking people about every output is too expensive; a few judgements train a model that predicts the reward.

Test. 27 questions with 781 possible replies each are 21,087 outputs. Pairs of replies, sampled from an SFT model of
25,632 parameters, are compared for 18 of the questions. The preferences follow the Bradley-Terry model of the gold
reward; in a second run a quarter of them is flipped. A reward model starts from the SFT model and is trained for
8 sqrt(n) steps on n comparisons (30 to 3,000), except a fifth that decides when to stop. Measured: the share of new
pairs of different gold reward that it orders as the gold reward does (gold itself: 1, chance: 0.5), on the questions
compared and on the 9 others. Also whether its prediction sigma(r1 - r2) equals the probability that people prefer the
first reply: a reliability diagram and the expected calibration error over ten bins of equal width. Baselines: the
share of a person's own choices that agree with gold, and a Bradley-Terry model linear in token counts, alone or
together with each word of the question.

Rule. On questions without comparisons, a reward model trained on 1,000 comparisons agrees with the gold reward about a
pair of replies more often than a single choice by a person does. The comparisons show people fewer than a tenth of the
outputs.
Effect of a seed: its accuracy minus that of a person; margin 0.

Limits. The rule uses the questions never compared, because most replies that the model samples for a compared question
have been judged. The SFT model knows all 27 questions; only comparisons are missing for 9 of them. The questions differ
in content and are of one kind, so nothing follows for another kind of task. On some seeds the reward model memorises
the answers to the questions compared: it orders 0.88 of their pairs and 0.67 of the others. Slower training (5e-4, 800
steps) in a trial with such a seed reached 0.74. The errors of people are independent here; shared errors would be
learned. The linear model receives the position of each word, and the gold reward is nearly linear in its features, so
it needs fewer comparisons.

Source. Bradley and Terry 1952; Stiennon et al. 2020, arXiv:2009.01325; Ouyang et al. 2022, arXiv:2203.02155;
calibration: Guo et al. 2017, arXiv:1706.04599.

Figure. Left: share of pairs ordered as gold orders them against the number of comparisons (log axis), one line for each
reward model; dotted: chance, one choice of a person, and gold itself; right: the probability that people prefer the
first reply against the predicted probability, with and without flipped labels; dotted: perfect calibration.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread
from common.recipes import early_stopped_reward_model, finetune_on_replies

# isort: split
import numpy as np

from common.linear import bradley_terry, counts
from minilm.evaluate import predicted_rewards
from minilm.ops import stable_sigmoid
from worlds.replies import MODEL, ReplyWorld

COMPARISONS = (30, 100, 300, 1000, 3000)
FEW = 1000                              # the number of the rule
FLIPS = {"": 0.0, ", 25% flipped": 0.25}
BINS = 10
COMPARED, WHOLE = 18, 27                # questions with comparisons, and all
SIZES = {"quick": {"seeds": 3, "tuning": 10, "most": 2, "fresh": 200},
         "default": {"seeds": 12, "tuning": 300, "most": 10**6, "fresh": 3000}}


def agreement(margin, difference):
    """The share of pairs of different gold reward whose margin has the sign of the gold difference."""
    return ((margin > 0) == (difference > 0))[difference != 0].mean()


def calibration(predicted, actual):
    """The reliability diagram: number, mean prediction and mean preference in each bin, (BINS,) each."""
    place = np.minimum((predicted * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    return [count, *(np.bincount(place, values, BINS) / np.maximum(count, 1) for values in (predicted, actual))]


def measure(experiment, seed, tuning, most, fresh):
    world = ReplyWorld(words=3)
    rng = np.random.default_rng(seed)
    model, _ = experiment.trained("replies", seed, MODEL, finetune_on_replies, words=3, steps=tuning)
    log_pi = world.log_distributions(model)
    x = counts(world)
    order = rng.permutation(WHOLE)
    compared, new = order[:COMPARED], order[COMPARED:]
    # The pairs to be judged, in random order (flip_rate 0.5). difference: gold of the first minus gold of the second.
    tests = {}
    for where, prompts in (("compared", compared), ("new", new)):
        p, first, second = world.comparisons(log_pi, world.gold, rng, fresh, prompts, flip_rate=0.5)
        tests[where] = p, first, second, world.gold[p, first] - world.gold[p, second]
    people = [stable_sigmoid(np.abs(d[d != 0])).mean() for *_, d in tests.values()]
    results = {"people": np.mean(people)}

    def append(name, value):
        results.setdefault(name, []).append(value)

    for label, flip_rate in FLIPS.items():
        pairs = world.comparisons(log_pi, world.gold, rng, max(COMPARISONS), compared, flip_rate)
        for n in COMPARISONS:
            few = [part[:n] for part in pairs]
            steps = min(most, round(8 * len(few[0]) ** 0.5))
            reward_model = early_stopped_reward_model(world, model, rng, few, steps)
            p, chosen, rejected = few
            differences = x[p, chosen] - x[p, rejected]
            linear = {"counts alone": differences * (np.arange(x.shape[-1]) < world.vocab_size), "linear": differences}
            weights = {name: bradley_terry(rows) for name, rows in linear.items()}
            for where, (p, first, second, difference) in tests.items():
                r = predicted_rewards(reward_model, *world.tokens_of(np.tile(p, 2), np.concatenate([first, second])))
                margin = r[:fresh] - r[fresh:]
                append(f"model, {where}{label}", agreement(margin, difference))
                for name, w in weights.items():
                    append(f"{name}, {where}{label}", agreement((x[p, first] - x[p, second]) @ w, difference))
            # Calibration, on the new questions: the prediction against the probability that people prefer the first.
            predicted = stable_sigmoid(margin)
            actual = flip_rate + (1 - 2 * flip_rate) * stable_sigmoid(difference)
            diagram = calibration(predicted, actual)
            count, *means = diagram
            append(f"calibration error{label}", (count * np.abs(means[0] - means[1])).sum() / len(p))
            append(f"error of a probability{label}", np.abs(predicted - actual).mean())
            results[f"diagram{label}"] = diagram                # the last one remains: of the most comparisons
        results[f"error of 0.5{label}"] = np.abs(0.5 - actual).mean()
        experiment.say(f"seed {seed}{label}: {np.round(results['model, new' + label], 3)}")
    return results


def conclude(seeds, size):
    at = COMPARISONS.index(FEW)
    people = np.array([s["people"] for s in seeds])

    def accuracy(name, i=at):
        return np.array([s[name][i] for s in seeds])

    def lead(name, i=at):
        return accuracy(name, i) - people

    rule = [Comparison(f"lead over a person's choice (share of pairs), other questions, {FEW:,} comparisons",
                       lead("model, new"), above=0)]
    findings = [Comparison(f"lead over a person's choice, questions compared, {FEW:,} comparisons",
                           lead("model, compared"), above=0),
                Comparison("lead over a person's choice, other questions, 3,000 comparisons",
                           lead("model, new", -1), above=0),
                Comparison("lead over a person's choice, other questions, 3,000 comparisons, 25% flipped",
                           lead("model, new, 25% flipped", -1), above=0),
                Comparison(f"lead over the linear model, other questions, {FEW:,} comparisons",
                           accuracy("model, new") - accuracy("linear, new"), above=0)]
    names = ("model, compared", "model, new", "linear, new", "counts alone, new", "calibration error",
             "error of a probability")
    numbers = {"a person's choice agrees with gold": spread(people)}
    numbers |= {f"{name}{label}, {n} comparisons": spread(s[name + label][i] for s in seeds)
                for label in FLIPS for name in names for i, n in enumerate(COMPARISONS)}
    numbers |= {f"error of always predicting 0.5{label}": spread(s[f"error of 0.5{label}"] for s in seeds)
                for label in FLIPS}
    table = [["comparisons", *names]]
    for label in FLIPS:
        table += [[f"{n}{label}", *(mean_range([s[name + label][i] for s in seeds]) for name in names)]
                  for i, n in enumerate(COMPARISONS)]
    words = (f"On questions that were never compared, a reward model of {FEW:,} comparisons orders "
             f"{mean(accuracy('model, new'))} of the pairs as the gold reward does, and one of 3,000 "
             f"{mean(accuracy('model, new', -1))}. A person's own choice agrees with gold in {mean(people)} of the "
             "pairs.")
    return Conclusion(rule, words, numbers, table, findings=findings)


def draw(figure, seeds, size):
    accuracy, diagram = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for name, label, colour, style in (("model, compared", "reward model, questions compared", 0, "-"),
                                       ("model, new", "reward model, other questions", 1, "-"),
                                       ("linear, new", "linear in counts, with the words of the question", 2, "--"),
                                       ("counts alone, new", "linear in counts alone", 3, "--"),
                                       ("model, new, 25% flipped", "reward model, 25% of labels flipped", 4, "-")):
        curve(accuracy, COMPARISONS, [s[name] for s in seeds], label, COLOURS[colour], linestyle=style)
    level(accuracy, 0.5, "chance", side="outside")
    level(accuracy, 1.0, "gold itself", side="outside")
    level(accuracy, np.mean([s["people"] for s in seeds]), "one choice\nof a person", side="outside")
    accuracy.set(title="Pairs ordered as gold orders them", xscale="log", xlabel="comparisons",
                 ylabel="share of pairs", ylim=(0.35, 1.06))
    accuracy.set_xticks(COMPARISONS, [f"{n:,}" for n in COMPARISONS])
    accuracy.minorticks_off()
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    diagram.plot((0, 1), (0, 1), linestyle=":", linewidth=1.2, color=COLOURS[5])
    diagram.annotate("calibrated", (0.32, 0.24), fontsize=8, alpha=0.75)
    for label, colour in zip(FLIPS, (COLOURS[1], COLOURS[4])):
        for s in seeds:
            n, predicted, actual = map(np.array, s[f"diagram{label}"])
            diagram.plot(predicted[n > 0], actual[n > 0], color=colour, linewidth=0.8, alpha=0.35)
        n, predicted, actual = (np.array([s[f"diagram{label}"][i] for s in seeds]) for i in range(3))
        used = n.sum(axis=0) > 0
        means = [(n * x).sum(axis=0)[used] / n.sum(axis=0)[used] for x in (predicted, actual)]
        diagram.plot(*means, color=colour, marker="o", markersize=4, linewidth=1.8,
                     label=f"{COMPARISONS[-1]:,} comparisons{label}")
    diagram.set(title="Calibration on other questions", xlabel="predicted probability of the first",
                ylabel="probability that people prefer the first", xlim=(0, 1), ylim=(0, 1))
    diagram.legend(loc="upper left", fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(9.6, 4.4)))
