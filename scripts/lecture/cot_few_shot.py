"""Worked solutions among the demonstrations, on sums of several steps

Claim. Where a problem takes several steps, demonstrations that work out their solution (chain of thought)
raise a model's accuracy over demonstrations that give the answer alone.

Test. Sums of 2 to 4 digits mod 10. A transformer of 104,000 parameters reads documents of examples that are
all answered at once, all worked out, or all answered after as many dots. It then gets held-out sums (of two
digits: the same ones) after 0 to 4 examples of a style, 150 questions per point, decoded greedily; only the
examples tell it how to answer. Baselines: direct examples and dots, at the same number of examples; a model
that read the direct documents only, for as many steps. Control: worked examples whose running sums are
random digits. Chance is 0.1; 1 is possible.

Rule. On sums of three and four digits, a model is more accurate after four worked examples, by at least
0.3, than after four direct ones (the answer alone), than after four with dots in place of the steps, and
than a model trained on direct documents only.

Limits. The corpus contains worked sums: the examples in the prompt select one of several learned ways of
answering; they do not teach addition. Under this selection wrong running sums should serve as well, which
the control measures. That sums of three digits are not learned at once depends on size and training: no
limit of transformers is shown; the model that read direct documents only learned sums of two digits with
half of the seeds. Keys are smeared (Config.key_smear, not in Llama): copying digits is learned sooner.

Source. Wei et al. 2022, arXiv:2201.11903; wrong demonstrations: Wang et al. 2022, arXiv:2212.10001; dots:
Lanham et al. 2023, arXiv:2307.13702, and Pfau et al. 2024, arXiv:2404.15758.

Figure. Left: accuracy after four examples against the number of digits to add; right: accuracy on sums of four digits
against the number of examples; one line for each kind of examples; dotted: chance and the best accuracy.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread
from common.recipes import add_digits

# isort: split
import numpy as np

from minilm.generate import generate
from worlds import digit_sums

SHOTS = (0, 1, 2, 4)
STYLES = ("worked", "worked, wrong sums", "direct", "dots")
SIZES = {"quick": {"seeds": 3, "steps": [6, 3], "questions": 5},
         "default": {"seeds": 6, "steps": [240, 320], "questions": 150}}


def measure(experiment, seed, steps, questions):
    model, losses = experiment.trained("digit-sums", seed, digit_sums.MODEL, add_digits, steps=steps,
                                       corpus="CORPUS")
    direct, _ = experiment.trained("digit-sums-direct", seed, digit_sums.MODEL, add_digits, steps=steps,
                                  corpus="DIRECT")
    experiment.say(f"seed {seed}: trained, loss {np.mean(losses[-10:]):.2f}")
    rng = np.random.default_rng([seed, 1])

    def accuracy(model, digits, **examples):
        prompts, right = digit_sums.prompts(rng, questions, digits, **examples)
        replies = generate(model, prompts, digit_sums.LONGEST, rng, digit_sums.END, temperature=0).responses()
        return np.mean([digit_sums.final_digit(reply) == answer for reply, answer in zip(replies, right)])

    def by_shots(digits, style):
        written = style.partition(",")[0]
        return [accuracy(model, digits, shots=k, style=written, wrong="wrong" in style) for k in SHOTS]

    results = {style: [by_shots(n, style) for n in digit_sums.DIGITS] for style in STYLES}
    results["direct model"] = [accuracy(direct, n, shots=4, style="direct") for n in digit_sums.DIGITS]
    return results


def after_four(seeds):
    """{name: accuracy after four examples, an array (seeds, numbers of digits)}"""
    return {**{style: np.array([s[style] for s in seeds])[:, :, -1] for style in STYLES},
            "direct model": np.array([s["direct model"] for s in seeds])}


def conclude(seeds, size):
    curves = after_four(seeds)
    sizes = range(len(digit_sums.DIGITS))
    several = {name: by_seed[:, 1:].mean(axis=1) for name, by_seed in curves.items()}   # 3 and 4 digits
    rivals = {"direct": "direct examples", "dots": "examples with dots", "direct model": "the direct model"}
    comparisons = [Comparison(f"lead of worked examples over {label} (accuracy)",
                              several["worked"] - several[name], above=0.3) for name, label in rivals.items()]
    numbers = {f"{name}, {digit_sums.DIGITS[i]} digits": spread(by_seed[:, i])
               for name, by_seed in curves.items() for i in sizes}
    numbers |= {f"{name}, three and four digits": spread(values) for name, values in several.items()}
    table = [["examples", *(f"{n} digits" for n in digit_sums.DIGITS), "3 and 4 digits"]]
    for name, by_seed in curves.items():
        table.append([f"4 {name}", *(mean_range(by_seed[:, i]) for i in sizes), mean_range(several[name])])
    for j, k in enumerate(SHOTS[:-1]):
        by_seed = np.array([s["worked"] for s in seeds])[:, :, j]
        table.append([f"{k} worked", *(mean_range(by_seed[:, i]) for i in sizes),
                      mean_range(by_seed[:, 1:].mean(axis=1))])
    alike = abs(np.mean(several["worked"]) - np.mean(several["worked, wrong sums"])) < 0.05
    selected = ", so the examples select a learned format; they do not teach addition" if alike else ""
    words = (f"After four worked examples accuracy on sums of three and four digits is "
             f"{mean(several['worked'])}, after four direct ones {mean(several['direct'])} (chance 0.10); "
             f"with random running sums in the worked examples {mean(several['worked, wrong sums'])}{selected}.")
    return Conclusion(comparisons, words, numbers, table)


def draw(figure, seeds, size):
    left, right = figure.subplots(1, 2)
    markers = "osD^v"
    for (name, by_seed), colour, marker in zip(after_four(seeds).items(), COLOURS, markers):
        label = "direct, trained on direct only" if name == "direct model" else name
        curve(left, digit_sums.DIGITS, by_seed, label, colour, marker)
    for style, colour, marker in zip(STYLES, COLOURS, markers):
        curve(right, range(len(SHOTS)), np.array([s[style] for s in seeds])[:, -1], style, colour, marker)
    left.set(title="After four examples", xlabel="digits to add", ylabel="accuracy",
             xticks=digit_sums.DIGITS, xlim=(1.9, 4.7))
    right.set(title="Sums of four digits", xlabel="examples in the prompt", xlim=(-0.2, 3.9))
    right.set_xticks(range(len(SHOTS)), SHOTS)
    for axis in (left, right):
        axis.set_ylim(-0.03, 1.1)
        level(axis, 0.1, "chance")
        level(axis, 1.0, "best")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, (8.4, 4.2)))
