"""In-context learning, and the length of the context

Claim. The length of the context bounds learning from a prompt: demonstrations beyond it change nothing.

Test. A transformer of two layers and width 64 (no key smearing) learns, as in in_context, from documents of
17 pairs, each under a mapping of 8 symbols to 8 labels of its own. Then 0 to 32 demonstrations of a mapping
held out of training are offered, going round all symbols in a random order, and a query; the model is given
the last C of these tokens, for C = 5, 9 and 17, which is 2, 4 and 8 demonstrations and the query. Accuracy
of the label of the query, 1,000 documents per point. Bound: the labels that can be copied from the C
tokens, or else a guess among the labels not shown there; chance is 1/8.

Rule. With 32 demonstrations offered, accuracy is at the bound (the best possible from the tokens in the
context; at most 0.1 below it, and at most 0.02 above it, by sampling error), and it rises as the context
grows from 5 tokens to 9 to 17. Two standard errors of 8,000 documents (8 seeds) are at most 0.012. The
seeds that learned to copy count: accuracy above 0.9 with 8 demonstrations in 17 tokens. If fewer than two
seeds did, the outcome is undecided.

Limits. Attention cannot read tokens that it is not given, which is no discovery, and the last 8 of 32
demonstrations are as good as 8 because of how they are drawn. The measurement is that the model uses nearly
all of its window, so that the window is the limit (before a review the rule was about the former). Where a
label must be guessed the model stays below the bound: it hardly rules out the labels of other symbols.
Whether accuracy falls within a context longer than the documents of training is not tested.

Source. Brown et al. 2020, arXiv:2005.14165 (as many demonstrations as the context window holds).

Figure. Accuracy on the query against the number of demonstrations offered, one line for each context of 5, 9 and 17
tokens; dashed: the best possible accuracy for that context; dotted: chance.
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

# isort: split
import numpy as np

from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.train_state import TrainState
from worlds.mappings import SYMBOLS, VOCABULARY, Curriculum, copy_bound, draw_in_rounds, right

CONFIG = {"vocab_size": VOCABULARY, "width": 64, "layers": 2, "heads": 4, "context": 33}
WINDOWS = (5, 9, 17)                    # tokens
OFFERED = (0, 1, 2, 4, 8, 12, 16, 32)
ENOUGH = 0.98                           # of the labels that can be copied: training ends
SIZES = {"quick": {"seeds": 3, "steps": 20, "documents": 50},
         "default": {"seeds": 8, "steps": 800, "documents": 1000}}


def measure(experiment, seed, steps, documents):
    rng = np.random.default_rng(seed)
    course = Curriculum()
    model = experiment.transformer(rng, **CONFIG)
    for step, _ in enumerate(pretrain_on_documents(TrainState(model, rng), course.draw, steps, 32), 1):
        if step % 10 == 0 and course.examine(model, rng) > ENOUGH and course.in_use == SYMBOLS:
            break
    results = {"steps": step, **{f"{kind} {C}": [] for kind in ("accuracy", "bound") for C in WINDOWS}}
    for offered in OFFERED:
        tokens = draw_in_rounds(rng, documents, offered)
        for C in WINDOWS:
            seen = tokens[:, -(C + 1):]                             # C tokens, and the label to predict
            results[f"accuracy {C}"].append(right(model, seen)[:, -1].mean())
            results[f"bound {C}"].append(copy_bound(seen)[:, -1].mean())
    return results


def conclude(seeds, size):
    learned = [s for s in seeds if s["accuracy 17"][OFFERED.index(8)] > 0.9]
    below = {C: [s[f"bound {C}"][-1] - s[f"accuracy {C}"][-1] for s in learned] for C in WINDOWS}
    rises = [smallest_step([s[f"accuracy {C}"][-1] for C in WINDOWS]) for s in learned]
    comparisons = [Comparison(f"window of {C} tokens: accuracy below the bound, 32 offered", below[C],
                              above=-0.02, below=0.1) for C in WINDOWS]
    comparisons.append(Comparison("smallest rise of accuracy from one window to the next, 32 offered", rises,
                                  above=0))
    last = {C: [s[f"accuracy {C}"][-1] for s in seeds] for C in WINDOWS}
    as_many_as_fit = {C: OFFERED.index((C - 1) // 2) for C in WINDOWS}
    gain = {C: [s[f"accuracy {C}"][-1] - s[f"accuracy {C}"][as_many_as_fit[C]] for s in seeds]
            for C in WINDOWS}
    numbers = {f"accuracy, 32 offered, window of {C} tokens": spread(last[C]) for C in WINDOWS}
    numbers |= {f"bound, 32 offered, window of {C} tokens": spread(s[f"bound {C}"][-1] for s in seeds)
                for C in WINDOWS}
    numbers |= {f"gain from what does not fit {C} tokens": spread(gain[C]) for C in WINDOWS}
    numbers["steps of training"] = spread(s["steps"] for s in seeds)
    table = [["offered", *(f"{C} tokens (bound)" for C in WINDOWS)]]
    for i, offered in enumerate(OFFERED):
        bounds = [np.mean([s[f"bound {C}"][i] for s in seeds]) for C in WINDOWS]
        table.append([f"{offered}", *(f"{mean_range([s[f'accuracy {C}'][i] for s in seeds])} ({bound:.2f})"
                                      for C, bound in zip(WINDOWS, bounds))])
    bounds = [mean([s[f"bound {C}"][-1] for s in seeds]) for C in WINDOWS]
    words = (f"With 32 demonstrations offered, accuracy is {', '.join(mean(last[C]) for C in WINDOWS)} in windows of "
             f"{', '.join(map(str, WINDOWS))} tokens, where the bound is {', '.join(bounds)}; {len(learned)} of "
             f"{len(seeds)} models learned to copy, and only these are compared.")
    return Conclusion(comparisons, words, numbers, table)


def draw(figure, seeds, size):
    axis = figure.subplots()
    place = np.arange(len(OFFERED))
    for C, colour, marker in zip(WINDOWS, COLOURS, "osD"):
        label = f"{C} tokens: {(C - 1) // 2} demonstrations fit"
        curve(axis, place, [s[f"accuracy {C}"] for s in seeds], label, colour, marker)
        bound = np.mean([s[f"bound {C}"] for s in seeds], axis=0)
        axis.plot(place, bound, color=colour, linestyle="--", linewidth=1, zorder=0)
    axis.plot([], [], color=COLOURS[-1], linestyle="--", linewidth=1, label="best possible for that window")
    level(axis, 1 / SYMBOLS, "chance")
    axis.set(title="Accuracy, by the length of the context",
             xlabel="demonstrations offered (of a mapping never trained on)", ylabel="accuracy on the query",
             xticks=place, xticklabels=OFFERED, ylim=(0, 1.04))
    axis.legend(loc="upper left", title="the model is given the last")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES))
