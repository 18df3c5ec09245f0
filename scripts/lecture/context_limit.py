"""In-context learning ends where the context ends

Claim. What fits the context bounds what can be learned from a prompt: demonstrations beyond it change nothing.

Test. A transformer of two layers and width 64 (no key smear) learns, as in in_context, from documents of 17 pairs,
each under a mapping of 8 symbols to 8 labels of its own. Then it is offered 0 to 32 demonstrations of a mapping held
out of training, going round all symbols in a random order, and a query; of these tokens it is given the last C, for C
= 5, 9 and 17, which is 2, 4 and 8 demonstrations and the query. Accuracy of the label of the query, 1,000 documents a
point. Bound: what can be copied from the C tokens, and else a guess among the labels not shown there; chance is 1/8.

Refuted. If, on the mean of the seeds that learned to copy (accuracy above 0.9 with 8 demonstrations in 17 tokens),
accuracy with 32 demonstrations offered is above the bound of its window, or more than 0.1 below it (so that something
else binds), or it does not rise from 5 tokens to 9 to 17 with every such seed. If no seed learned to copy, the claim
cannot be shown here.

Limits. That attention cannot read what it is not given is no discovery, and that the last 8 of 32 demonstrations are
as good as 8 follows from how they are drawn; what is measured is that the model uses nearly all of what it is given,
so that the window is what binds (before a review the rule asked the former instead). Where a label must be guessed it
stays below the bound: it hardly rules out the labels that others have. Whether accuracy falls within a context longer
than the documents of training is not asked.

Source. Brown et al. 2020, arXiv:2005.14165 (as many demonstrations as the context window holds).
"""

import sys

from common.experiment import COLOURS, OUTCOMES, Conclusion, curve, level, run, shown, spread, verdict

import numpy as np

from minilm.model import Config, Transformer
from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.train_state import TrainState
from worlds.mappings import SYMBOLS, VOCABULARY, Curriculum, copy_bound, draw_in_rounds, right

CONFIG = {"vocab_size": VOCABULARY, "width": 64, "layers": 2, "heads": 4, "context": 33}
WINDOWS = (5, 9, 17)                    # tokens
OFFERED = (0, 1, 2, 4, 8, 12, 16, 32)
ENOUGH = 0.98                           # of the labels that can be copied: training ends
SIZES = {"quick": {"seeds": 3, "steps": 20, "documents": 50}, "default": {"seeds": 4, "steps": 800, "documents": 1000}}


def measure(row, seed, steps, documents):
    rng, course = np.random.default_rng(seed), Curriculum()
    model = Transformer(Config(**CONFIG), rng)
    for step, _ in enumerate(pretrain_on_documents(TrainState(model, rng), course.draw, steps, 32), 1):
        if step % 10 == 0 and course.examine(model, rng) > ENOUGH and course.in_use == SYMBOLS:
            break
    found = {"steps": step, **{f"{kind} {C}": [] for kind in ("accuracy", "bound") for C in WINDOWS}}
    for offered in OFFERED:
        tokens = draw_in_rounds(rng, documents, offered)
        for C in WINDOWS:
            seen = tokens[:, -(C + 1):]                             # C tokens, and the label to be guessed
            found[f"accuracy {C}"].append(right(model, seen)[:, -1].mean())
            found[f"bound {C}"].append(copy_bound(seen)[:, -1].mean())
    return found


def conclude(seeds, size):
    filled = {C: OFFERED.index((C - 1) // 2) for C in WINDOWS}
    last = {C: [s[f"accuracy {C}"][-1] for s in seeds] for C in WINDOWS}
    gain = {C: [s[f"accuracy {C}"][-1] - s[f"accuracy {C}"][filled[C]] for s in seeds] for C in WINDOWS}
    learned = [i for i, s in enumerate(seeds) if s["accuracy 17"][OFFERED.index(8)] > 0.9]
    said = learned or range(len(seeds))                             # the seeds that the sentence is about
    rises = all(last[C][i] < last[D][i] for i in learned for C, D in zip(WINDOWS, WINDOWS[1:]))

    def bound(C, i, of=range(len(seeds))):
        return np.mean([seeds[j][f"bound {C}"][i] for j in of])

    def near_the_bound(C):
        short = bound(C, -1, learned) - np.mean([last[C][i] for i in learned])
        return -0.02 <= short <= 0.1            # 0.02: two standard errors of 4,000 documents at most

    def kept(values):
        return shown([values[i] for i in said])

    numbers = {f"accuracy, 32 offered, window of {C} tokens": spread(last[C]) for C in WINDOWS}
    numbers |= {f"bound, 32 offered, window of {C} tokens": spread(s[f"bound {C}"][-1] for s in seeds)
                for C in WINDOWS}
    numbers |= {f"gain from what does not fit {C} tokens": spread(gain[C]) for C in WINDOWS}
    numbers["steps of training"] = spread(s["steps"] for s in seeds)
    table = [["offered", *(f"{C} tokens (bound)" for C in WINDOWS)]]
    for i, offered in enumerate(OFFERED):
        table.append([f"{offered}", *(f"{shown([s[f'accuracy {C}'][i] for s in seeds])} ({bound(C, i):.2f})"
                                      for C in WINDOWS)])
    best = ", ".join(f"{bound(C, -1, said):.2f}" for C in WINDOWS)
    sentence = (f"{len(learned)} of {len(seeds)} seeds learned to copy; with 32 demonstrations offered "
                f"{'their' if learned else 'the'} accuracy is {', '.join(kept(last[C]) for C in WINDOWS)} where 2, "
                f"4, 8 of them fit, and the best possible is {best}. With just as many offered as fit it differs by "
                f"{', '.join(kept(gain[C]) for C in WINDOWS)}.")
    used = learned and all(near_the_bound(C) for C in WINDOWS)
    return Conclusion(verdict(used and rises) if learned else OUTCOMES[2], sentence, numbers, table)


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
    axis.set(title="What does not fit the context cannot be learned from", ylabel="accuracy on the query",
             xlabel="demonstrations offered (of a mapping never trained on)", xticks=place, xticklabels=OFFERED,
             ylim=(0, 1.04))
    axis.legend(loc="upper left", title="the model is given the last")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES))
