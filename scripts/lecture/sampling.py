"""A higher temperature gives more varied answers

Claim. Answers to compare are sampled from the model at a temperature; a higher temperature gives more varied answers.

Test. A transformer of 25,632 parameters is instructed with 4,000 demonstrations of short replies (300 steps), in a
world whose 781 possible replies to each of 9 questions are all listed. So entropy, expected gold reward and the
expected best of n at each temperature are sums, not estimates; distinct replies are counted among 16 draws a
question. The best of n is chosen by gold itself: no judge who sees less can choose better. Greedy decoding and the
best reply there is are the levels to compare with.

Refuted. If, with any seed, the entropy or the number of distinct replies does not rise with every step of
temperature.

Limits. Entropy must rise with temperature for one token (its derivative is a variance); for whole replies it is
found, not forced. At which temperature the best of n peaks depends on n, on the reward and on how good the model is:
781 replies to one kind of question.

Source. Ackley, Hinton and Sejnowski 1985 (temperature of a softmax); Stiennon et al. 2020, arXiv:2009.01325 (best of
n).
"""

import sys

from common.experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict
from common.recipes import sft_model

import numpy as np

from minilm.generate import generate
from minilm.exact.enumerable import best_of_n, entropy, expectation
from worlds.replies import EOS, LONGEST, ReplyWorld

TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
BEST_OF = (1, 4, 16)
DRAWS = 16
SIZES = {"quick": {"seeds": 3, "steps": 10}, "default": {"seeds": 4, "steps": 300}}


def measure(row, seed, steps):
    rng, world = np.random.default_rng(seed), ReplyWorld(words=2)
    model = sft_model(world, rng, steps)
    found = {"entropy": [], "distinct": [], **{f"best of {n}": [] for n in BEST_OF}}
    for temperature in TEMPERATURES:
        l = world.log_distributions(model, temperature)
        samples = generate(model, world.prompts * DRAWS, LONGEST, rng, EOS, temperature).responses()
        asked = len(world.prompts)
        found["entropy"].append(entropy(l).mean())
        found["distinct"].append(np.mean([len(set(map(tuple, samples[p::asked]))) for p in range(asked)]))
        for n in BEST_OF:
            found[f"best of {n}"].append(expectation(best_of_n(l, world.gold, n), world.gold).mean())
    greedy = generate(model, world.prompts, LONGEST, rng, EOS, temperature=0).responses()
    return {**found, "greedy": world.gold[world.index(world.prompts, greedy)].mean(),
            "best possible": world.gold.max(axis=1).mean()}


def conclude(seeds, size):
    by_name = {"entropy": "entropy (nats)", "distinct": f"distinct of {DRAWS}",
               **{f"best of {n}": f"gold, best of {n}" for n in BEST_OF}}
    found = {name: np.array([s[name] for s in seeds]) for name in by_name}
    rises = all((np.diff(found[name], axis=1) > 0).all() for name in ("entropy", "distinct"))
    greedy, most = [s["greedy"] for s in seeds], BEST_OF[-1]
    peaks = {n: found[f"best of {n}"].argmax(axis=1) for n in BEST_OF}          # of each seed
    numbers = {f"{label}, temperature {t}": spread(found[name][:, i])
               for name, label in by_name.items() for i, t in enumerate(TEMPERATURES)}
    numbers |= {"gold, greedy": spread(greedy)}
    table = [["temperature", *by_name.values()], ["0 (greedy)", "0", "1", *[shown(greedy)] * len(BEST_OF)]]
    for i, t in enumerate(TEMPERATURES):
        table.append([f"{t}", *(shown(found[name][:, i]) for name in by_name)])

    def best_at(n):
        i = int(found[f"best of {n}"].mean(axis=0).argmax())
        edge = {0: ", the lowest tried,", len(TEMPERATURES) - 1: ", the highest tried,"}.get(i, "")
        return f"{TEMPERATURES[i]}{edge} with gold reward {shown(found[f'best of {n}'][:, i])}"

    sentence = (f"From temperature 0.25 to 3 the entropy of a reply goes from {shown(found['entropy'][:, 0])} to "
                f"{shown(found['entropy'][:, -1])} nats, and of {DRAWS} draws {shown(found['distinct'][:, 0], 1)} to "
                f"{shown(found['distinct'][:, -1], 1)} differ. Of the temperatures, a single draw is best at "
                f"{best_at(1)}; greedy decoding has {shown(greedy)}. The best of {most}, as gold chooses, is best at "
                f"{best_at(most)}: variety "
                + ("pays where somebody chooses." if (peaks[most] > peaks[1]).all() else
                   "does not pay with every seed, even where somebody chooses."))
    return Conclusion(verdict(rises), sentence, numbers, table)


def draw(figure, seeds, size):
    surprise, variety, reward = figure.subplots(1, 3)
    curve(surprise, TEMPERATURES, [s["entropy"] for s in seeds], None, COLOURS[0])
    level(surprise, np.log(781), "all 781 equally likely")
    surprise.set(title="Entropy of a reply", xlabel="temperature", ylabel="nats", ylim=(0, None))
    curve(variety, TEMPERATURES, [s["distinct"] for s in seeds], None, COLOURS[1])
    level(variety, DRAWS, "all different")
    variety.set(title=f"Distinct replies among {DRAWS}", xlabel="temperature", ylabel="replies", ylim=(0, None))
    for n, colour in zip(BEST_OF, COLOURS[2:]):
        label = "one draw" if n == 1 else f"best of {n}"
        curve(reward, TEMPERATURES, [s[f"best of {n}"] for s in seeds], label, colour)
    level(reward, np.mean([s["best possible"] for s in seeds]), "the best reply there is")
    level(reward, np.mean([s["greedy"] for s in seeds]), "greedy", below=True)
    reward.set(title="What it is good for", xlabel="temperature", ylabel="expected gold reward")
    reward.set_ylim(bottom=min(0, reward.get_ylim()[0]))
    reward.legend(loc="lower left")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(9.0, 3.6)))
