"""The phrase "Let's think step by step" alone raises accuracy on sums of several steps

Claim. Without any demonstration, the phrase "Let's think step by step" after a question raises a model's accuracy on
problems that take several steps.

Test. The model of cot_few_shot.py: in its corpus the phrase, two tokens, is followed by worked sums only; after
another phrase of two tokens, and after none, a quarter of the documents are worked, half are direct, a quarter dots.
Held-out sums of 2 to 4 digits (of two: the same ones), 150 a point, greedy, nothing before the question: it must
answer at once, may answer as it likes, after the phrase, after the other phrase, or with dots: after a first dot, the
model writes the others itself. Then one running sum is replaced by a wrong one and the model goes on from there: does
the answer follow? Chance is 0.1; 1 is possible.

Refuted. If, with any seed, over sums of three and four digits, the phrase is not ahead of answering at once, of no
phrase, of the other phrase and of dots by 0.3.

Limits. The phrase works because the corpus contains it: 40% of the documents are worked sums after it. Here any
two tokens would do as well; what it shows is that a phrase can call a way of answering that the model has, and that
the way matters. Nothing here says why texts that people write have this effect. Keys are smeared (Config.key_smear,
not in Llama).

Source. Kojima et al. 2022, arXiv:2205.11916; dots and wrong steps: Lanham et al. 2023, arXiv:2307.13702.
"""

import sys

from common.experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict
from common.recipes import add_digits

import numpy as np

from minilm.generate import generate
from worlds import digit_sums

WAYS = {"the phrase": {"phrase": "trigger"}, "another phrase": {"phrase": "filler"}, "no phrase": {},
        "at once": {"beginning": [digit_sums.SO]}, "dots": {"beginning": [digit_sums.DOT]}}
SIZES = {"quick": {"seeds": 3, "steps": [6, 3], "questions": 5},
         "default": {"seeds": 4, "steps": [240, 320], "questions": 150}}


def measure(row, seed, steps, questions):
    model, losses = row.trained("digit-sums", seed, digit_sums.MODEL, add_digits, steps=steps, corpus="CORPUS")
    row.say(f"seed {seed}: trained, loss {np.mean(losses[-10:]):.2f}")
    rng = np.random.default_rng([seed, 2])

    def replies(asked):
        return generate(model, asked, digit_sums.LONGEST, rng, digit_sums.END, temperature=0).responses()

    found = {"worked": {}, "follows": [], "right all the same": []}
    for way, how in WAYS.items():
        found[way], found["worked"][way] = [], []
        for n in digit_sums.DIGITS:
            asked, right = digit_sums.prompts(rng, questions, n, **how)
            said = replies(asked)
            found[way].append(np.mean([digit_sums.final_digit(reply) == answer for reply, answer in zip(said, right)]))
            found["worked"][way].append(np.mean([digit_sums.is_worked(reply) for reply in said]))
    for n in digit_sums.DIGITS:
        asked, right = digit_sums.prompts(rng, questions, n, phrase="trigger")
        error = rng.integers(1, 10, size=questions)
        sums = [int(prompt[0] + prompt[1] - digit_sums.PLUS + e) % 10 for prompt, e in zip(asked, error)]
        begun = [[*prompt, *prompt[:2], wrong] for prompt, wrong in zip(asked, sums)]
        said = [digit_sums.final_digit(reply) for reply in replies(begun)]
        found["follows"].append(np.mean([answer == (a + e) % 10 for answer, a, e in zip(said, right, error)]))
        found["right all the same"].append(np.mean([answer == a for answer, a in zip(said, right)]))
    return found


def conclude(seeds, size):
    def several(values):
        return np.mean([v for v, n in zip(values, digit_sums.DIGITS) if n > 2])

    over = {name: [several(s[name]) for s in seeds] for name in (*WAYS, "follows", "right all the same")}
    holds = all(over["the phrase"][i] - max(over[way][i] for way in list(WAYS)[1:]) >= 0.3 for i in range(len(seeds)))
    sizes = range(len(digit_sums.DIGITS))
    numbers = {f"{name}, {digit_sums.DIGITS[i]} digits": spread(s[name][i] for s in seeds)
               for name in over for i in sizes}
    numbers |= {f"{name}, three and four digits": spread(values) for name, values in over.items()}
    numbers |= {f"worked out after {way}": spread(np.mean(s["worked"][way]) for s in seeds) for way in WAYS}
    after = {name: shown(values) for name, values in over.items()}
    table = [["asked", *(f"{n} digits" for n in digit_sums.DIGITS), "3 and 4 digits", "worked out"]]
    table += [[way, *(shown([s[way][i] for s in seeds]) for i in sizes), after[way],
               shown([np.mean(s["worked"][way]) for s in seeds])] for way in WAYS]
    table += [[f"first sum wrong: {name}", *(shown([s[name][i] for s in seeds]) for i in sizes), after[name], ""]
              for name in ("follows", "right all the same")]
    sentence = (f"After the phrase, sums of three and four digits are right {after['the phrase']}; after another "
                f"phrase {after['another phrase']}, after none {after['no phrase']}, at once {after['at once']}, "
                f"after dots {after['dots']} (chance 0.10). With a wrong running sum put in, "
                f"{after['follows']} of the answers follow the error; {after['right all the same']} are right all the "
                f"same.")
    return Conclusion(verdict(holds), sentence, numbers, table)


def draw(figure, seeds, size):
    asked, broken = figure.subplots(1, 2)
    for way, colour, marker in zip(WAYS, COLOURS, "osD^v"):
        curve(asked, digit_sums.DIGITS, [s[way] for s in seeds], way, colour, marker)
    asked.set(title="No example in the prompt", ylabel="right answers (share)")
    curve(broken, digit_sums.DIGITS, [s["follows"] for s in seeds], "follow the error", COLOURS[0])
    curve(broken, digit_sums.DIGITS, [s["right all the same"] for s in seeds], "right all the same", COLOURS[4], "s")
    broken.set(title="With a wrong first running sum", ylabel="share of the answers")
    for axis in (asked, broken):
        axis.set(xlabel="digits to add", xticks=digit_sums.DIGITS, xlim=(1.9, 4.7), ylim=(-0.03, 1.1))
        level(axis, 0.1, "chance")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8)
    level(asked, 1.0, "best")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, (8.4, 4.4)))
