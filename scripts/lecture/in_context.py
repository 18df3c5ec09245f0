"""Demonstrations in the prompt, without any gradient step

Claim. Without any gradient step, demonstrations in the prompt raise accuracy on a task (few-shot).

Test. (a) New mappings, the strict test: two layers, width 64, no key smearing. Documents have 17 pairs of a
symbol and its label, under a mapping of 8 symbols to 8 labels that is drawn anew for every document; one
mapping in five is held out for the test. An adaptive curriculum goes from 2 symbols to 8, and training ends
when the model copies them. The query comes after k demonstrations that do not repeat, so at k = 8 it is
among them. Bound: copying, or else a guess among the labels not shown; chance is 1/8. (b) Known tasks,
recognised: three layers with key smearing (an addition to Llama, Config(key_smear=True)); documents
jab>ija;ijc>hib;.. of one of eight string tasks that is never named, with a curriculum from 2 tasks to 8;
exact match on words held out of training. Bound: Bayes, all tasks equally likely.

Rule. On mappings never seen in training, and on known string tasks that are never named, 8 demonstrations
bring accuracy more than half of the way from no demonstration to the bound, the best accuracy possible.

Limits. (b) shows that a prompt picks out one of eight tasks of pretraining, on new words. It does not show
that a prompt teaches a task (it does not: needs_gradient). Only (a) has a rule that was never seen, and the
skill that is learned there is to copy a label: induction. The head in the figure is the one with most
attention on the token after an earlier copy of the queried symbol; it rises together with accuracy, which
is a correlation. Without the curriculum the same model learned nothing in 900 steps of a trial.

Source. Brown et al. 2020, arXiv:2005.14165 (few-shot learning); Olsson et al. 2022, arXiv:2209.11895
(induction heads, and smeared keys); Xie et al. 2022, arXiv:2111.02080 (as recognition of a task, Bayes).

Figure. Top: accuracy against the number of demonstrations in the prompt, on a mapping never seen in training and on a
known string task, dashed the best possible; bottom left: accuracy and the induction score of an attention head against
the step of training, every seed; bottom right: the attention of that head in one document, as a grid of tokens.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread
from common.recipes import recognise_strings

# isort: split
import numpy as np

from common.attention_maps import attention_weights, induction_scores
from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.train_state import TrainState
from worlds import mappings, strings

MAPPINGS = {"vocab_size": mappings.VOCABULARY, "width": 64, "layers": 2, "heads": 4}
STRINGS = {"vocab_size": strings.VOCABULARY, "width": 64, "layers": 3, "heads": 4, "context": 72,
           "key_smear": True}
SIDES = (("new mappings", "copy bound"), ("known strings", "Bayes bound"))
SHOTS = (0, 1, 2, 4, 8)
ENOUGH = 0.98                           # of the labels that can be copied: training on mappings ends
SIZES = {"quick": {"seeds": 3, "mapping_steps": 20, "string_steps": 5, "documents": 50},
         "default": {"seeds": 6, "mapping_steps": 800, "string_steps": 900, "documents": 500}}


def learn_to_copy(model, rng, steps, enough):
    """Every 20 steps, on held-out mappings: [step, accuracy after 8 demonstrations, induction scores]."""
    course = mappings.Curriculum()
    exam = mappings.draw_in_rounds(rng, 200, mappings.SYMBOLS)
    history = []
    for step, _ in enumerate(pretrain_on_documents(TrainState(model, rng), course.draw, steps, 32), 1):
        over = step % 10 == 0 and course.examine(model, rng) > enough and course.in_use == mappings.SYMBOLS
        if step % 20 == 0 or over:
            few = exam[:50]
            scores = induction_scores(attention_weights(model, few), few, few < mappings.SYMBOLS)
            history.append([step, float(mappings.right(model, exam)[:, -1].mean()), scores.tolist()])
        if over:
            break
    return history


def measure(experiment, seed, mapping_steps, string_steps, documents):
    rng = np.random.default_rng(seed)
    results = {"new mappings": [], "copy bound": []}
    model, results["copying"] = experiment.trained("mappings", seed, MAPPINGS, learn_to_copy,
                                                   steps=mapping_steps, enough=ENOUGH)
    for k in SHOTS:
        tokens = mappings.draw_in_rounds(rng, documents, k)
        results["new mappings"].append(mappings.right(model, tokens)[:, -1].mean())
        results["copy bound"].append(mappings.copy_bound(tokens)[:, -1].mean())
    tokens, _ = mappings.draw(rng, 200, pairs=10, in_use=4, held_out=True)
    weights = attention_weights(model, tokens)
    queries = tokens < mappings.SYMBOLS
    scores = induction_scores(weights, tokens, queries)
    layer, head = np.unravel_index(scores.argmax(), scores.shape)
    results |= {"layer": layer, "head": head, "score": scores.max(), "document": tokens[0],
                "picture": weights[layer, head, 0].round(3)}
    even = np.tri(tokens.shape[1]) / np.arange(1, tokens.shape[1] + 1)[:, None]
    even = np.broadcast_to(even, weights[:1, :1].shape)
    results["score if even"] = induction_scores(even, tokens, queries).item()

    model, results["recognising"] = experiment.trained("strings", seed, STRINGS, recognise_strings,
                                                       steps=string_steps)
    tokens, _ = strings.draw(rng, documents, held_out=True)
    results["known strings"] = strings.right(model, tokens).mean(axis=0)[list(SHOTS)]
    results["Bayes bound"] = strings.bayes_bound(tokens).mean(axis=0)[list(SHOTS)]
    return results | {"a prompt": strings.text(tokens[0, :3 * strings.PAIR])}


def way_to_the_bound(seeds, side, bound):
    """Of the way from no demonstration to the bound, the share that 8 demonstrations bring."""
    return [(s[side][-1] - s[side][0]) / (s[bound][-1] - s[side][0]) for s in seeds]


def conclude(seeds, size):
    names = [name for side in SIDES for name in side]
    at = {name: [[s[name][i] for s in seeds] for i in range(len(SHOTS))] for name in names}
    numbers = {f"{name}, {k} demonstrations": spread(at[name][i])
               for name in names for i, k in enumerate(SHOTS)}
    numbers |= {"induction score of the best head": spread(s["score"] for s in seeds),
                "induction score of even attention": spread(s["score if even"] for s in seeds),
                "layer of the best head": spread(s["layer"] + 1 for s in seeds)}
    halves = {"new mappings": [_half(s["copying"], 1) for s in seeds],
              "strings": [_half(s["recognising"], -1) for s in seeds]}
    numbers |= {f"first step with 0.5 on {name}": spread(steps)
                for name, steps in halves.items() if None not in steps}
    table = [["demonstrations", *names]]
    table += [[f"{k}", *(mean_range(at[name][i]) for name in names)] for i, k in enumerate(SHOTS)]
    words = (f"On mappings never seen in training, 8 demonstrations raise accuracy from "
             f"{mean(at['new mappings'][0])} to {mean(at['new mappings'][-1])}; on known string tasks, never "
             f"named, to {mean(at['known strings'][-1])}.")
    comparisons = [Comparison(f"{side}: share of the way from no demonstration to the bound",
                              way_to_the_bound(seeds, side, bound), above=0.5) for side, bound in SIDES]
    return Conclusion(comparisons, words, numbers, table)


def _half(history, column):
    """The first step at which accuracy was above one half; None if it never was."""
    return next((line[0] for line in history if line[column] > 0.5), None)


def draw(figure, seeds, size):
    (few, known), (moment, picture) = figure.subplots(2, 2)
    place = np.arange(len(SHOTS))
    for axis, (name, bound), colour in zip((few, known), SIDES, COLOURS):
        curve(axis, place, [s[name] for s in seeds], "the model", colour)
        best = np.mean([s[bound] for s in seeds], axis=0)
        axis.plot(place, best, color=COLOURS[-1], linestyle="--", label="best possible")
        axis.set(xlabel="demonstrations in the prompt", xticks=place, xticklabels=SHOTS, ylabel="accuracy",
                 ylim=(0, 1.04))
        axis.legend(loc="upper left" if axis is few else "lower right")
    few.set_title("(a) A mapping never seen in training")
    level(few, 1 / mappings.SYMBOLS, "chance")
    known.set_title("(b) A known string task, never named; new words")

    for s, labelled in zip(seeds, [True] + [False] * len(seeds)):
        step, accuracy, scores = zip(*s["copying"])
        score = [of_heads[s["layer"]][s["head"]] for of_heads in scores]
        along = np.array(s["recognising"]).reshape(-1, strings.PAIRS + 1)
        for x, y, colour, style, label in (
                (step, accuracy, COLOURS[0], "-", "(a) accuracy, 8 demonstrations"),
                (step, score, COLOURS[2], "--", "(a) induction score of the head shown"),
                (along[:, 0], along[:, -1], COLOURS[1], "-", "(b) accuracy, 8 demonstrations")):
            moment.plot(x, y, color=colour, linestyle=style, linewidth=1.2, label=label if labelled else None)
    moment.set(title="Along training (every seed)", xlabel="step of training",
               ylabel="accuracy; share of attention", ylim=(0, 1.35), yticks=np.linspace(0, 1, 6))
    moment.legend(loc="upper left", fontsize=8)
    _attention(picture, seeds[0])


def _attention(axis, s):
    """One document: where the head looks from each token, and frames where an induction head should."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle
    shade = LinearSegmentedColormap.from_list("attention", [axis.figure.get_facecolor(), COLOURS[2]])
    tokens = np.array(s["document"])[:-1]
    names = ["abcdefgh12345678"[token] for token in tokens]
    axis.imshow(np.array(s["picture"])[:-1, :-1], cmap=shade, vmin=0, vmax=1)
    for query in range(0, len(tokens), 2):
        for label in range(1, query, 2):
            if tokens[label - 1] == tokens[query]:
                corner = (label - 0.5, query - 0.5)
                axis.add_patch(Rectangle(corner, 1, 1, fill=False, color=COLOURS[4], linewidth=1))
    axis.set(title=f"Layer {s['layer'] + 1}, head {s['head'] + 1} (red: the label of the earlier copy)",
             ylabel="token",
             xlabel="looks at (framed: the label of the same symbol)", xticks=range(len(tokens)),
             yticks=range(len(tokens)), xlim=(-0.6, len(tokens) - 0.4), ylim=(len(tokens) - 0.4, -0.6))
    axis.set_xticklabels(names, fontsize=7)
    axis.set_yticklabels(names, fontsize=7)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, (10.0, 8.0)))
