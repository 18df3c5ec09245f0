"""Temperature, and the variety of answers

Claim. Answers to compare are sampled from the model at a temperature; a higher temperature gives more varied answers.

Test. A transformer of 25,632 parameters is finetuned on 4,000 demonstrations of short replies (300 steps). All 781
possible replies to each of 9 questions are listed. So these are exact sums at each of 7 temperatures from 0.25 to 3:
the entropy, the expected number of different replies in 16 samples, sum_y 1 - (1 - pi(y))^16, and the expected gold
reward of a sample and of the best of n samples. The best of n is selected by the gold reward itself, the best possible
judge. The levels for comparison are greedy decoding and the best possible reply.

Rule. The entropy of a reply and the expected number of different replies in 16 samples both rise at every step of
temperature from 0.25 to 3. Effect of a seed: the smallest rise between two neighbouring temperatures; margin 0.

Limits. The entropy of one token must rise with temperature (its derivative is a variance). For whole replies the rise
is a measurement. The temperature with the best "best of n" depends on n, on the reward and on the quality of the model.
There are 781 replies and one kind of question.

Source. Ackley, Hinton and Sejnowski 1985 (temperature of a softmax); Stiennon et al. 2020, arXiv:2009.01325 (best of
n).

Figure. Three panels against the temperature: the entropy of a reply, the number of different replies among 16, and the
expected gold reward of one sample, of the best of 4 and of the best of 16; dotted: the largest possible values, and
greedy decoding.
"""

import sys

from common.experiment import (
    COLOURS,
    Comparison,
    Conclusion,
    curve,
    level,
    mean,
    mean_range,
    run,
    smallest_step,
    spread,
)
from common.recipes import sft_model

# isort: split
import numpy as np

from minilm.exact.enumerable import best_of_n, entropy, expectation
from minilm.generate import generate
from worlds.replies import EOS, LONGEST, ReplyWorld

TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
BEST_OF = (1, 4, 16)
DRAWS = 16
SIZES = {"quick": {"seeds": 3, "steps": 10}, "default": {"seeds": 6, "steps": 300}}


def measure(experiment, seed, steps):
    rng = np.random.default_rng(seed)
    world = ReplyWorld(words=2)
    model = sft_model(world, rng, steps, experiment.dtype)
    results = {"entropy": [], "distinct": [], **{f"best of {n}": [] for n in BEST_OF}}
    for temperature in TEMPERATURES:
        log_pi = world.log_distributions(model, temperature)
        results["entropy"].append(entropy(log_pi).mean())
        results["distinct"].append((1 - (1 - np.exp(log_pi)) ** DRAWS).sum(axis=1).mean())
        for n in BEST_OF:
            results[f"best of {n}"].append(expectation(best_of_n(log_pi, world.gold, n), world.gold).mean())
    greedy = generate(model, world.prompts, LONGEST, rng, EOS, temperature=0).responses()
    return {**results, "greedy": world.gold[world.index(world.prompts, greedy)].mean(),
            "best possible": world.gold.max(axis=1).mean()}


def conclude(seeds, size):
    columns = {"entropy": "entropy (nats)", "distinct": f"distinct of {DRAWS}",
               **{f"best of {n}": f"gold, best of {n}" for n in BEST_OF}}
    results = {name: np.array([s[name] for s in seeds]) for name in columns}           # (seeds, temperatures)
    greedy = np.array([s["greedy"] for s in seeds])
    rule = [Comparison("smallest rise of the entropy from one temperature to the next (nats)",
                       [smallest_step(s["entropy"]) for s in seeds], above=0),
            Comparison(f"smallest rise of the expected number of different replies in {DRAWS}",
                       [smallest_step(s["distinct"]) for s in seeds], above=0)]
    most = BEST_OF[-1]
    best_at = {n: np.array(TEMPERATURES)[results[f"best of {n}"].argmax(axis=1)] for n in BEST_OF}   # of each seed
    findings = [Comparison(f"temperature at which the best of {most} is highest, minus that of a single sample",
                           best_at[most] - best_at[1], above=0),
                Comparison("gold reward of greedy decoding minus that of a single sample at its best temperature",
                           greedy - results["best of 1"].max(axis=1), above=0)]
    numbers = {f"{label}, temperature {t}": spread(results[name][:, i])
               for name, label in columns.items() for i, t in enumerate(TEMPERATURES)}
    numbers |= {"gold, greedy": spread(greedy)}
    table = [["temperature", *columns.values()],
             ["0 (greedy)", "0", "1", *[mean_range(greedy)] * len(BEST_OF)]]
    for i, t in enumerate(TEMPERATURES):
        table.append([f"{t}", *(mean_range(results[name][:, i]) for name in columns)])
    words = (f"From temperature {TEMPERATURES[0]} to {TEMPERATURES[-1]:g} the entropy of a reply rises from "
             f"{mean(results['entropy'][:, 0], 1)} to {mean(results['entropy'][:, -1], 1)} nats. Of {DRAWS} samples "
             f"{mean(results['distinct'][:, 0], 0)} differ at the lowest and {mean(results['distinct'][:, -1], 0)} at "
             "the highest temperature.")
    return Conclusion(rule, words, numbers, table, findings=findings)


def draw(figure, seeds, size):
    surprise, variety, reward = figure.subplots(1, 3)
    curve(surprise, TEMPERATURES, [s["entropy"] for s in seeds], None, COLOURS[0])
    level(surprise, np.log(781), "all 781 equally likely")
    surprise.set(title="Entropy of a reply", xlabel="temperature", ylabel="nats", ylim=(0, 7.3))
    curve(variety, TEMPERATURES, [s["distinct"] for s in seeds], None, COLOURS[1])
    level(variety, DRAWS, "all different")
    variety.set(title=f"Different replies among {DRAWS}", xlabel="temperature", ylabel="replies", ylim=(0, 17.5))
    for n, colour in zip(BEST_OF, COLOURS[2:]):
        label = "one sample" if n == 1 else f"best of {n}"
        curve(reward, TEMPERATURES, [s[f"best of {n}"] for s in seeds], label, colour)
    level(reward, np.mean([s["best possible"] for s in seeds]), "the best possible reply")
    level(reward, np.mean([s["greedy"] for s in seeds]), "greedy", below=True)
    reward.set(title="Gold reward", xlabel="temperature", ylabel="expected gold reward")
    low, high = reward.get_ylim()
    reward.set_ylim(low - 0.35 * (high - low), high + 0.08 * (high - low))          # space for the legend and a label
    reward.legend(loc="lower left", fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(9.6, 3.6)))
