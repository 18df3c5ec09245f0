"""The phrase "Let's think step by step", on sums of several steps

Claim. Without any demonstration, the phrase "Let's think step by step" after a question raises a model's
accuracy on problems that take several steps.

Test. The model of cot_few_shot.py. In its corpus the phrase, two tokens, is followed by worked sums only;
after another phrase of two tokens, and after none, a quarter of the documents are worked, half are direct,
a quarter have dots. Held-out sums of 2 to 4 digits (of two: the same ones), 150 per point, greedy, with no
example before the question, in five ways: the model must answer at once; may answer as it likes; after the
phrase; after the other phrase; or with dots: after a first dot, the model writes the others itself. Then
one running sum is replaced by a wrong one and the model continues: does the answer follow the error? Chance
is 0.1; 1 is possible.

Rule. On sums of three and four digits, the model is more accurate after the phrase, by at least 0.3, than
when it must answer at once, than after no phrase, than after another phrase, and than with dots in place of
the steps.

Limits. The phrase works because the corpus contains it: 40% of the documents are worked sums after it. Here
any two tokens would do as well; the experiment shows that a phrase can call a way of answering that the
model has, and that the way matters. It does not explain why human texts have this effect. Keys are smeared
(Config.key_smear, not in Llama).

Source. Kojima et al. 2022, arXiv:2205.11916; dots and wrong steps: Lanham et al. 2023, arXiv:2307.13702.

Figure. Left: accuracy without examples against the number of digits to add, one line for each wording; right: the
shares of answers that follow a wrong first running sum and that are right nevertheless; dotted: chance and the best
accuracy.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread
from common.recipes import add_digits

# isort: split
import numpy as np

from minilm.generate import generate
from worlds import digit_sums

WAYS = {"the phrase": {"phrase": "trigger"}, "another phrase": {"phrase": "filler"}, "no phrase": {},
        "at once": {"beginning": [digit_sums.SO]}, "dots": {"beginning": [digit_sums.DOT]}}
SIZES = {"quick": {"seeds": 3, "steps": [6, 3], "questions": 5},
         "default": {"seeds": 6, "steps": [240, 320], "questions": 150}}


def measure(experiment, seed, steps, questions):
    model, losses = experiment.trained("digit-sums", seed, digit_sums.MODEL, add_digits, steps=steps,
                                       corpus="CORPUS")
    experiment.say(f"seed {seed}: trained, loss {np.mean(losses[-10:]):.2f}")
    rng = np.random.default_rng([seed, 2])

    def replies(prompts):
        return generate(model, prompts, digit_sums.LONGEST, rng, digit_sums.END, temperature=0).responses()

    results = {"worked": {}, "follows": [], "right all the same": []}
    for way, how in WAYS.items():
        results[way] = []
        results["worked"][way] = []
        for n in digit_sums.DIGITS:
            prompts, right = digit_sums.prompts(rng, questions, n, **how)
            written = replies(prompts)
            answers = [digit_sums.final_digit(reply) for reply in written]
            results[way].append(np.mean([answer == a for answer, a in zip(answers, right)]))
            results["worked"][way].append(np.mean([digit_sums.is_worked(reply) for reply in written]))
    for n in digit_sums.DIGITS:
        prompts, right = digit_sums.prompts(rng, questions, n, phrase="trigger")
        error = rng.integers(1, 10, size=questions)
        sums = [int(prompt[0] + prompt[1] - digit_sums.PLUS + e) % 10 for prompt, e in zip(prompts, error)]
        begun = [[*prompt, *prompt[:2], wrong] for prompt, wrong in zip(prompts, sums)]
        answers = [digit_sums.final_digit(reply) for reply in replies(begun)]
        wrong = [(a + e) % 10 for a, e in zip(right, error)]
        results["follows"].append(np.mean([answer == w for answer, w in zip(answers, wrong)]))
        results["right all the same"].append(np.mean([answer == a for answer, a in zip(answers, right)]))
    return results


def conclude(seeds, size):
    def several(values):
        return np.mean([v for v, n in zip(values, digit_sums.DIGITS) if n > 2])

    over = {name: [several(s[name]) for s in seeds] for name in (*WAYS, "follows", "right all the same")}
    rivals = list(WAYS)[1:]
    comparisons = [Comparison(f"lead of the phrase over {way} (accuracy)",
                              np.subtract(over["the phrase"], over[way]), above=0.3) for way in rivals]
    sizes = range(len(digit_sums.DIGITS))
    numbers = {f"{name}, {digit_sums.DIGITS[i]} digits": spread(s[name][i] for s in seeds)
               for name in over for i in sizes}
    numbers |= {f"{name}, three and four digits": spread(values) for name, values in over.items()}
    numbers |= {f"worked out after {way}": spread(np.mean(s["worked"][way]) for s in seeds) for way in WAYS}
    after = {name: mean_range(values) for name, values in over.items()}
    table = [["way", *(f"{n} digits" for n in digit_sums.DIGITS), "3 and 4 digits", "worked out"]]
    table += [[way, *(mean_range([s[way][i] for s in seeds]) for i in sizes), after[way],
               mean_range([np.mean(s["worked"][way]) for s in seeds])] for way in WAYS]
    table += [[f"first sum wrong: {name}", *(mean_range([s[name][i] for s in seeds]) for i in sizes),
               after[name], ""]
              for name in ("follows", "right all the same")]
    words = (f"After the phrase accuracy on sums of three and four digits is {mean(over['the phrase'])}, "
             f"after another phrase {mean(over['another phrase'])} (chance 0.10). With a wrong running sum put "
             f"in, {mean(over['follows'])} of the answers follow the error.")
    return Conclusion(comparisons, words, numbers, table)


def draw(figure, seeds, size):
    plain, broken = figure.subplots(1, 2)
    for way, colour, marker in zip(WAYS, COLOURS, "osD^v"):
        curve(plain, digit_sums.DIGITS, [s[way] for s in seeds], way, colour, marker)
    plain.set(title="No example in the prompt", ylabel="accuracy")
    curve(broken, digit_sums.DIGITS, [s["follows"] for s in seeds], "follow the error", COLOURS[0])
    curve(broken, digit_sums.DIGITS, [s["right all the same"] for s in seeds], "right all the same",
          COLOURS[4], "s")
    broken.set(title="With a wrong first running sum", ylabel="share of the answers")
    for axis in (plain, broken):
        axis.set(xlabel="digits to add", xticks=digit_sums.DIGITS, xlim=(1.9, 4.7), ylim=(-0.03, 1.1))
        level(axis, 0.1, "chance")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8)
    level(plain, 1.0, "best")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, (8.4, 4.4)))
