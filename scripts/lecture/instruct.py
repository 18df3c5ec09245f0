"""A few thousand demonstrations of many tasks make one model that follows instructions

Claim. Instruction finetuning: train a pretrained model on demonstrations (instruction, answer) of many tasks, with the
loss on the answer.

Test. A transformer of 105,152 parameters is pretrained on lines about one operation each, [reverse]:abc=cba;, 400
steps of 64 lines; its instructions will be pairs of operations, [reverse][upper]:abc=CBA;, of which there are 36
(minilm/world/instructions.py). Copies of that base are finetuned on 12,800 demonstrations of all 36: with the loss on
the answer; with the loss on everything; and one model per task, with a 36th of the demonstrations each. The rivals:
the base itself, and the same finetuning from random weights. For scale, three tasks with a model of their own and all
12,800 demonstrations each. Measured along the way: exact answers on words held out from everything, averaged over the
tasks. Chance is 1 in 1,000, the best possible 1.

Refuted. If, with any seed, the one instructed model does not end above the base, above the one from random weights,
and above the models of one task each at the same number of demonstrations in all.

Limits. The outcome depends on the base, which was chosen after others had failed. In trials, one seed each: a base
that had read the same lines with the loss on all of them, random words included, knew the single operations to 0.37
after 500 steps, and one model then had 0.32 after 19,200 demonstrations, models of one task 0.59, random weights 0.62;
after 300 steps, one model 0.15 and models of one task 0.32 (12,800 demonstrations); a base of lines of all 36 tasks
that named none, one model 0.16 and models of one task 0.35. Of these bases, one model won only on the one that knew
the parts. Pretraining is counted as paid for: from random weights, 25,600 demonstrations of 27 tasks did as well in
three trials of four. What the mask saves is small, and depends on how much of a line can be predicted at all. The
curves are read off along one schedule of the learning rate, made for the last point.

Source. Wei et al. 2021, arXiv:2109.01652 (FLAN); Sanh et al. 2021, arXiv:2110.08207 (T0); Ouyang et al. 2022,
arXiv:2203.02155.
"""

import sys

from experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict

import numpy as np

from minilm.generate import generate
from minilm.model import Config, Transformer
from minilm.stages.pretraining import document_pretraining
from minilm.stages.training import Training
from minilm.world.instructions import LETTERS, MODEL, TASKS, WORD, documents, single_operations

BATCH, OWN_BATCH, CHANCE = 64, 16, LETTERS ** -WORD
CURVES = ("one model, loss on the answer", "one model, loss on everything", "one model, from random weights",
          "a model per task")
SIZES = {"quick": {"seeds": 3, "pretraining": 2, "demonstrations": 320, "every": 160, "asked": 18},
         "default": {"seeds": 4, "pretraining": 400, "demonstrations": 12_800, "every": 640, "asked": 720}}


def pretrain(model, rng, steps):
    """On lines about one operation each; returns the loss of every step."""
    training = Training(model, rng, weight_decay=0.01)
    return [metrics["loss"] for metrics in document_pretraining(training, single_operations, steps, BATCH, 3e-3)]


def finetuned(base, rng, tasks, demonstrations, batch=BATCH, everything=False):
    """A copy of the base after every step of training on demonstrations of these tasks, and how many it has seen."""
    def draw(rng, count):
        tokens, mask = documents(rng, count, tasks)
        return tokens, np.ones_like(mask) if everything else mask
    model, steps = base.copy(), max(1, demonstrations // batch)
    training = Training(model, rng, weight_decay=0.01)
    for _ in document_pretraining(training, draw, steps, batch, 3e-3):
        yield model, training.step * batch


def accuracy(model, rng, tokens, mask):
    """Exact answers, decoded greedily."""
    prompt = int((mask[0] == 0).sum())
    said = generate(model, tokens[:, :prompt].tolist(), tokens.shape[1] - prompt, rng, eos=None, temperature=0).tokens
    return (said == tokens[:, prompt:]).all(axis=1).mean()


def measure(row, seed, pretraining, demonstrations, every, asked):
    rng = np.random.default_rng(seed)
    base, _ = row.trained("single-operations", seed, MODEL, pretrain, steps=pretraining)

    def exam(model, tasks=TASKS, count=asked):
        return accuracy(model, rng, *documents(rng, count, tasks, held_out=True))
    found = {"base": exam(base),
             "base, one operation": accuracy(base, rng, *single_operations(rng, asked, held_out=True))}
    starts = base, base, Transformer(Config(**MODEL), rng)
    for name, start in zip(CURVES, starts):
        found[name] = [exam(start)]
        for model, seen in finetuned(start, rng, TASKS, demonstrations, everything="everything" in name):
            if seen % every == 0:
                found[name].append(exam(model))
        row.say(f"seed {seed}, {name}: {found[name][-1]:.2f}")
    share, few = demonstrations // len(TASKS), max(1, asked // 12)
    own = [[(seen * len(TASKS), exam(model, [task], few))
            for model, seen in finetuned(base, rng, [task], share, OWN_BATCH)
            if seen // OWN_BATCH % 4 == 0 or seen + OWN_BATCH > share] for task in TASKS]
    own = np.mean(own, axis=0)                  # after so many demonstrations of all tasks together, so good
    found["own demonstrations"], found[CURVES[3]] = [0, *own[:, 0]], [found["base"], *own[:, 1]]
    all_on_one = []
    for i in rng.choice(len(TASKS), size=3, replace=False):
        *_, (model, _) = finetuned(base, rng, [TASKS[i]], demonstrations)
        all_on_one.append(exam(model, [TASKS[i]]))
    return {**found, "a model per task, all demonstrations each": np.mean(all_on_one)}


def reached(curve, share=0.9):
    """How many demonstrations a curve (x, y) took to reach that accuracy; infinity if it did not."""
    return min((x for x, y in zip(*curve) if y >= share), default=np.inf)


def conclude(seeds, size):
    one, everything, scratch, own = CURVES
    last = {name: [s[name][-1] for s in seeds] for name in CURVES}
    last |= {name: [s[name] for s in seeds]
             for name in ("base", "base, one operation", "a model per task, all demonstrations each")}
    holds = all(best > max(rivals) for best, *rivals in zip(last[one], last["base"], last[scratch], last[own]))
    x = [size["every"] * i for i in range(len(seeds[0][CURVES[0]]))]
    to_90 = {name: np.mean([reached((x, s[name])) for s in seeds]) for name in (one, everything)}
    table = [["", "exact answers, held-out words"], *([name, shown(values)] for name, values in last.items())]
    total = f"{size['demonstrations']:,}"
    told = {name: f"{number:,.0f}" if np.isfinite(number) else f"more than {total}" for name, number in to_90.items()}
    sentence = (f"The base, exact on {shown(last['base, one operation'])} of the single operations, gets "
                f"{shown(last['base'])} of the 36 tasks; after {total} demonstrations of all of them "
                f"{shown(last[one])}, where a model from random weights has {shown(last[scratch])} and 36 models "
                f"with a 36th of the demonstrations each {shown(last[own])}. Tasks with a model and {total} "
                f"demonstrations of their own: {shown(last['a model per task, all demonstrations each'])}. To 0.9 "
                f"it takes {told[one]} demonstrations with the loss on the answer, {told[everything]} with the loss "
                "on everything.")
    return Conclusion(verdict(holds), sentence, {name: spread(values) for name, values in last.items()}, table)


def draw(figure, seeds, size):
    axis = figure.subplots()
    x = [size["every"] * i for i in range(len(seeds[0][CURVES[0]]))]
    for i, name in enumerate(CURVES[:3]):
        curve(axis, x, [s[name] for s in seeds], name, COLOURS[i], ("o", "s", "^")[i])
    curve(axis, seeds[0]["own demonstrations"], [s[CURVES[3]] for s in seeds],
          f"{CURVES[3]}, the demonstrations shared out", COLOURS[3], "D")
    level(axis, np.mean([s["base"] for s in seeds]), "base, before any")
    level(axis, 1, "all exact")
    level(axis, CHANCE, "chance, 1 in 1,000")
    axis.set(xlabel="demonstrations of all 36 tasks together", ylabel="exact answers on held-out words",
             ylim=(-0.04, 1.08), title="One model learns to follow 36 instructions")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(7.2, 4.8)))
