"""One model finetuned on demonstrations of many tasks

Claim. Instruction finetuning: train a pretrained model on demonstrations (instruction, answer) of many
tasks, with the loss on the answer; one model for many tasks replaces one model per task.

Test. A transformer of 105,152 parameters is pretrained on 25,600 lines about one operation each,
[reverse]:abc=cba;, 400 steps of 64 with the loss on the answer. Its instructions will be pairs of
operations, [reverse][upper]:abc=CBA;; there are 36 (scripts/lecture/worlds/instructions.py). For each, 355
demonstrations are drawn once, 12,780 in all. Copies of the base are finetuned on all of them, with the loss
on the answer or on everything, and one model per task on its 355; also on a ninth and a third of each
task's. The rivals: the base itself, the same finetuning from random weights, the models per task. All have
the same demonstrations and see each four times on average, in steps of 64, the models per task in steps of
16. Measured after the last step: exact answers on words held out from everything, 200 drawn for every task,
the same for all models. Chance is 1 in 1,000, the best possible 1.

Rule. After 12,780 demonstrations with four passes, one model has more exact answers, by more than 0.01,
than the base, than the same model from random weights, and than 36 models of one task each. The margin of
0.01 is there because all of them are near the ceiling.

Limits. A review results the first version unfair: there, 352 demonstrations of a task were seen once, in 22
steps, and the models per task had 0.78 (0.68 to 0.83 by seed), the one model 0.99. So several passes were
given to all, from random weights too, and the rule says so. Fewer demonstrations are also fewer steps, so
at a ninth and a third any model might do more with more passes. With a third of the demonstrations the
model from random weights is far behind; with all of them it is not. The outcome depends on the base. In
trials of one pass, one seed each, a base that had read the same lines with the loss on all of them, random
words included, knew the single operations to 0.37 after 500 steps; one model then had 0.32 after 19,200
demonstrations, models of one task 0.59, random weights 0.62. The cost of pretraining is not counted.

Source. Wei et al. 2021, arXiv:2109.01652 (FLAN); Sanh et al. 2021, arXiv:2110.08207 (T0); Ouyang et al.
2022, arXiv:2203.02155.

Figure. Share of exact answers on held-out words against the number of demonstrations of 36 tasks (log axis), one line
for each way of training: one model (loss on the answer, loss on everything, from random weights) and a model per task;
dotted: the base, chance and all exact.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread
from common.recipes import follow_single_operations

# isort: split
import numpy as np

from minilm.generate import generate
from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.train_state import TrainState
from worlds.instructions import LETTERS, MODEL, TASKS, WORD, documents, single_operations

BATCH = 64
OWN_BATCH = 16              # of a model per task
PASSES = 4
CHANCE = LETTERS ** -WORD
MODELS = ONE, EVERYTHING, SCRATCH, OWN = ("one model, loss on the answer", "one model, loss on everything",
                                          "one model, from random weights", "a model per task")
PARTS = (9, 3, 1)           # of the demonstrations, one in ...
SIZES = {"quick": {"seeds": 3, "pretraining": 2, "share": 9, "questions": 3},
         "default": {"seeds": 6, "pretraining": 400, "share": 355, "questions": 200}}


def finetuned(start, rng, tokens, mask, batch):
    """A copy of the model, trained on these demonstrations, each drawn PASSES times on average."""
    def draw(rng, count):
        drawn = rng.integers(len(tokens), size=count)
        return tokens[drawn], mask[drawn]
    state = TrainState(start.copy(), rng, weight_decay=0.01)
    for _ in pretrain_on_documents(state, draw, max(1, PASSES * len(tokens) // batch), batch, 3e-3):
        pass
    return state.model


def accuracy(model, rng, tokens, mask):
    """Exact answers, decoded greedily."""
    prompt = int((mask[0] == 0).sum())
    answers = generate(model, tokens[:, :prompt].tolist(), tokens.shape[1] - prompt, rng, eos=None,
                       temperature=0).tokens
    return (answers == tokens[:, prompt:]).all(axis=1).mean()


def concatenated(pools):
    return tuple(np.concatenate(arrays) for arrays in zip(*pools))


def measure(experiment, seed, pretraining, share, questions):
    rng = np.random.default_rng(seed)
    base, _ = experiment.trained("single-operations", seed, MODEL, follow_single_operations,
                                 steps=pretraining)
    pools, exams = ([documents(rng, count, [task], held_out) for task in TASKS]
                    for count, held_out in ((share, False), (questions, True)))
    exam = concatenated(exams)
    results = {"base": accuracy(base, rng, *exam)}
    results["base, one operation"] = accuracy(base, rng, *single_operations(rng, len(exam[0]), held_out=True))
    random = experiment.transformer(rng, **MODEL)
    for name in MODELS:
        results[name] = []
        for part in PARTS:
            given = [(tokens[:share // part], mask[:share // part]) for tokens, mask in pools]
            if name == OWN:
                scores = [accuracy(finetuned(base, rng, *own, OWN_BATCH), rng, *exam_of_task)
                          for own, exam_of_task in zip(given, exams)]
                results[name].append(np.mean(scores))
            else:
                tokens, mask = concatenated(given)
                model = finetuned(random if name == SCRATCH else base, rng, tokens,
                                  np.ones_like(mask) if name == EVERYTHING else mask, BATCH)
                results[name].append(accuracy(model, rng, *exam))
        experiment.say(f"seed {seed}, {name}: {np.round(results[name], 3)}")
    return results


def demonstrations(size, part):
    return size["share"] // part * len(TASKS)


def conclude(seeds, size):
    last = {name: [s[name][-1] for s in seeds] for name in MODELS}
    last |= {name: [s[name] for s in seeds] for name in ("base", "base, one operation")}
    one = np.array(last[ONE])
    rivals = {"base": "the base", SCRATCH: "the same from random weights", OWN: "a model per task"}
    comparisons = [Comparison(f"lead of one model over {label} (exact answers)", one - last[name], above=0.01)
                   for name, label in rivals.items()]
    counts = [f"{demonstrations(size, part):,}" for part in PARTS]
    at = {name: [[s[name][i] for s in seeds] for i in range(len(PARTS))] for name in MODELS}
    table = [["exact answers, held-out words", *(f"{count} demonstrations" for count in counts)]]
    table += [[name, *(mean_range(scores, 3) for scores in at[name])] for name in MODELS]
    table += [[name, "", "", mean_range(last[name], 3)] for name in ("base", "base, one operation")]
    ceiling = " (no lead of 0.01 is possible)" if np.mean(last[SCRATCH]) >= 0.99 else ""
    words = (f"After {counts[-1]} demonstrations of 36 tasks one model has {mean(last[ONE], 3)} of the "
             f"answers exact, the same model from random weights {mean(last[SCRATCH], 3)}{ceiling}, and 36 models "
             f"with a 36th of the demonstrations each {mean(last[OWN], 3)}.")
    numbers = {name: spread(values) for name, values in last.items()}
    numbers |= {f"{name}, {count} demonstrations": spread(values)
                for name in MODELS for count, values in zip(counts[:-1], at[name])}
    return Conclusion(comparisons, words, numbers, table)


def draw(figure, seeds, size):
    axis = figure.subplots()
    ticks = [demonstrations(size, part) for part in PARTS]
    for name, colour, marker in zip(MODELS, COLOURS, "os^D"):
        label = f"{name}, on a 36th of them each" if name == OWN else name
        curve(axis, ticks, [s[name] for s in seeds], label, colour, marker)
    level(axis, np.mean([s["base"] for s in seeds]), "base, before any")
    level(axis, 1, "all exact")
    level(axis, CHANCE, "chance, 1 in 1,000")
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="demonstrations of all 36 tasks together, four passes over each",
             ylabel="exact answers on held-out words", ylim=(-0.04, 1.08),
             title="36 instructions: one model, or 36")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(7.2, 4.8)))
