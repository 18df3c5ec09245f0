"""An encoder finetuned on labelled examples, a decoder with a few of them in its prompt

Claim. A BERT-like bidirectional encoder finetuned on very many labelled examples, and a GPT-like decoder
with a few in its prompt, reach similar accuracy.

Test. Both (width 48, 3 layers, key smearing) are pretrained on the same kind and number of documents: 9
lines word > label. The label says in which quarter of its alphabet one of three letters is; the place of
this letter is the hidden rule of the document. The decoder predicts each label from the tokens before it,
until 97% of the last labels are right (at most 600 steps of 32 documents). For the encoder, in as many
steps, half of the labels are hidden and predicted from the rest. The decoder then labels held-out words
after 0 to 8 lines in its prompt, without a gradient step. The encoder gets a new head for the four labels
and is finetuned on N single lines of one rule, in 60 steps of 32: all of them in random order, and again; N
= 4 to 1,024, mean over the three rules. Baselines: the decoder finetuned in the same way; the encoder that
keeps the labels of its pretraining and fills its mask; an encoder never pretrained. Chance is 0.25; the
best accuracy from k examples is computed by listing the rules.

Rule. The encoder finetuned on 1,024 labels and the decoder with 8 demonstrations are equally accurate
within 0.05, and the encoder needs more than 8 labels for it (at 8 or fewer it is behind the decoder).
Condition: 8 demonstrations bring the decoder at least 0.1 over none; otherwise the outcome is undecided.

Limits. The training of the decoder stops at accuracy 0.97 with 8 demonstrations, and the encoder with 1,024
labels is near 1: the difference within 0.05 is nearly built in; the number of labels at which they meet is
measured. "Very many" are not needed here. All three rules are in the pretraining text: the prompt only
tells which, and finetuning on one of them is easy too. So the N at which the two meet says nothing about
real tasks, and it differs between seeds; the order of the two is shown. This task is learned from scratch
too (the encoder never pretrained), so the experiment does not show what pretraining brings an encoder. One
learning rate each; real finetuning also selects steps and seeds. Key smearing speeds up learning in
context; BERT and GPT do not have it. Only labels are hidden or predicted, because the letters are drawn at
random. The number of steps that the decoder needs differs by a factor of two and more between seeds, hence
the stop at an accuracy. Other recipes learned in context more slowly or only with some seeds: 2 layers, two
labels, one alphabet for all places, tied embeddings, a smaller learning rate; with 6 or 12 rules nothing
was learned within 300 steps.

Source. Devlin et al. 2018, arXiv:1810.04805 (BERT); Brown et al. 2020, arXiv:2005.14165 (GPT-3, few-shot);
Schick and Schuetze 2020, arXiv:2001.07676 (finetuning through the mask needs fewer labels).

Figure. Accuracy on held-out words against the number of labelled examples (symlog axis), one line for the decoder with
the examples in its prompt and one for each of four models finetuned on them; dashed: the best possible accuracy;
dotted: chance.
"""

import itertools
import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread

# isort: split
import numpy as np

from common.masked_pretraining import masked_pretraining
from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.train_state import TrainState
from minilm.tensor import no_grad
from worlds import rules

SHOTS = 8
LABEL_TOKENS = slice(rules.LABEL, rules.LABEL + rules.LABELS)
LABELLED = (4, 8, 16, 64, 256, 1024)
# What is finetuned: which model, and whether it gets a new head.
FINETUNED = {"encoder": ("encoder", True), "decoder": ("decoder", True),
             "encoder through its mask": ("encoder", False), "encoder, not pretrained": ("fresh", True)}
SHAPE = {"vocab_size": rules.VOCABULARY, "width": 48, "layers": 3, "context": (SHOTS + 1) * rules.LINE,
         "key_smear": True}
SIZES = {"quick": {"seeds": 3, "steps": 4, "finetuning": 1, "test": 100},
         "default": {"seeds": 6, "steps": 600, "finetuning": 60, "test": 1000}}


def documents(rng, count):
    return rules.document(*rules.draw(rng, count, SHOTS + 1))


def train(model, rng, draw, steps, rate, share, enough=lambda step: False):
    """Returns the number of steps that were taken: `steps`, or fewer if enough(step).

    A decoder predicts the tokens that the mask of draw selects, from the tokens before them; an encoder
    predicts a share of them, from the rest.
    """
    state = TrainState(model, rng)
    stage = (pretrain_on_documents(state, draw, steps, 32, rate) if model.config.causal else
             masked_pretraining(state, draw, steps, 32, rules.MASK, share, rate))
    for _ in stage:
        if enough(state.step):
            break
    return state.step


def accuracy(model, words, answers):
    """Accuracy (n,) of each label in lines (B,n). A decoder sees the tokens before; an encoder no label."""
    tokens, mask = rules.document(words, answers)
    at = rules.LINE - 2 if model.config.causal else rules.LINE - 1      # the position that predicts the label
    if not model.config.causal:
        tokens = np.where(mask > 0, rules.MASK, tokens)
    with no_grad():
        logits = model(tokens).data[:, at::rules.LINE, LABEL_TOKENS]
    return (logits.argmax(axis=-1) == answers).mean(axis=0)


def finetuned(model, rng, new_head, rule, words, steps):
    """Accuracy on the held-out words of a copy that is trained on single lines of one rule."""
    model = model.copy()
    if new_head:
        head = model.unembedding.data
        head[LABEL_TOKENS] = rng.normal(size=head[LABEL_TOKENS].shape) * 0.1 * head.shape[1] ** -0.5

    def passes():
        while True:
            yield from rng.permutation(len(words))

    order = passes()

    def examples(rng, count):
        some = words[list(itertools.islice(order, count)), None]
        return rules.document(some, rules.labels(some, rule))

    train(model, rng, examples, steps, 3e-3, share=1.0)
    test = rules.all_words(held_out=True)[:, None]
    return float(accuracy(model, test, rules.labels(test, rule))[0])


def measure(experiment, seed, steps, finetuning, test):
    rng = np.random.default_rng(seed)
    models = {name: experiment.transformer(rng, **SHAPE, causal=name == "decoder")
              for name in ("encoder", "decoder", "fresh")}

    def learned(step):
        return step % 20 == 0 and accuracy(models["decoder"], *rules.draw(rng, 400, SHOTS + 1))[-1] >= 0.97

    taken = train(models["decoder"], rng, documents, steps, 1e-2, 1.0, learned)
    train(models["encoder"], rng, documents, steps, 1e-2, 0.5, lambda step: step == taken)
    words, answers = rules.draw(rng, test, SHOTS + 1, held_out=True)
    results = {"steps": taken, "prompted": accuracy(models["decoder"], words, answers),
               "best": rules.best_accuracy(words, answers)}
    experiment.say(f"seed {seed}: pretrained in {taken} steps; with {SHOTS} demonstrations "
                   f"{results['prompted'][-1]:.3f}")
    pool = rng.permutation(rules.all_words(held_out=False))
    for name, (model, new_head) in FINETUNED.items():
        results[name] = [np.mean([finetuned(models[model], rng, new_head, rule, pool[:n], finetuning)
                                  for rule in range(rules.WORD)]) for n in LABELLED]
        experiment.say(f"seed {seed}: {name} with {LABELLED[-1]} labels {results[name][-1]:.3f}")
    return results


def meeting(accuracies, goal):
    """The number of labels that reaches the goal first, interpolated on a logarithmic axis; None if never."""
    for i, accuracy in enumerate(accuracies):
        if accuracy >= goal:
            if i == 0:
                return float(LABELLED[0])
            share = (goal - accuracies[i - 1]) / (accuracy - accuracies[i - 1])
            return float(LABELLED[i - 1] * (LABELLED[i] / LABELLED[i - 1]) ** share)
    return None


def rule(seeds):
    """The comparisons and the condition."""
    prompted = [s["prompted"][SHOTS] for s in seeds]
    small = [i for i, n in enumerate(LABELLED) if n <= SHOTS]
    comparisons = [
        Comparison(f"encoder, {LABELLED[-1]:,} labels, minus decoder, {SHOTS} demonstrations (accuracy)",
                   [s["encoder"][-1] - p for s, p in zip(seeds, prompted)], above=-0.05, below=0.05),
        Comparison(f"decoder, {SHOTS} demonstrations, minus encoder, at most {SHOTS} labels (accuracy)",
                   [p - max(s["encoder"][i] for i in small) for s, p in zip(seeds, prompted)], above=0)]
    condition = Comparison(f"accuracy that {SHOTS} demonstrations bring the decoder",
                           [p - s["prompted"][0] for s, p in zip(seeds, prompted)], above=0.1)
    return comparisons, condition


def conclude(seeds, size):
    numbers = {f"decoder, {k} demonstrations": spread(s["prompted"][k] for s in seeds)
               for k in (0, 1, 2, 4, SHOTS)}
    numbers |= {f"best from {k}": spread(s["best"][k] for s in seeds) for k in (0, SHOTS)}
    numbers |= {f"{name}, finetuned on {n}": spread(s[name][i] for s in seeds)
                for name in FINETUNED for i, n in enumerate(LABELLED)}
    by_seed = {name: [meeting(s[name], s["prompted"][SHOTS]) for s in seeds] for name in FINETUNED}
    reached = {name: [n for n in meetings if n is not None] for name, meetings in by_seed.items()}
    numbers |= {f"labels where the finetuned {name} meets the prompted decoder ({len(met)} seeds)": spread(met)
                for name, met in reached.items() if met}
    numbers["pretraining steps"] = spread(s["steps"] for s in seeds)
    table = [["labels", "best possible", "decoder, prompted", *(f"{name}, finetuned" for name in FINETUNED)]]

    def cell(name, n, counts):
        return mean_range([s[name][counts.index(n)] for s in seeds]) if n in counts else ""

    for n in sorted({*range(SHOTS + 1), *LABELLED}):
        table.append([f"{n:,}", *(cell(name, n, range(SHOTS + 1)) for name in ("best", "prompted")),
                      *(cell(name, n, LABELLED) for name in FINETUNED)])
    met = reached["encoder"]
    where = f"between {min(met):.0f} and {max(met):.0f} labels" if met else "never"
    words = (f"With {SHOTS} demonstrations in its prompt the decoder has accuracy "
             f"{mean([s['prompted'][SHOTS] for s in seeds])}, the encoder finetuned on {LABELLED[-1]:,} "
             f"labels {mean([s['encoder'][-1] for s in seeds])}. They meet {where}, with {len(met)} of "
             f"{len(seeds)} seeds.")
    comparisons, condition = rule(seeds)
    return Conclusion(comparisons, words, numbers, table, conditions=[condition])


def draw(figure, seeds, size):
    axis = figure.subplots()
    shots = np.arange(SHOTS + 1)
    curve(axis, shots, [s["prompted"] for s in seeds], "decoder, in its prompt, no gradient step", COLOURS[1])
    best = np.mean([s["best"] for s in seeds], axis=0)
    axis.plot(shots, best, color=COLOURS[5], linestyle="--", label="best possible from k examples")
    for name, colour, marker in zip(FINETUNED, (COLOURS[0], COLOURS[4], COLOURS[2], COLOURS[3]), "sv^D"):
        curve(axis, LABELLED, [s[name] for s in seeds], f"{name}, finetuned", colour, marker)
    level(axis, 1 / rules.LABELS, "chance")
    few = np.mean([s["prompted"][SHOTS] for s in seeds])
    axis.plot([SHOTS, LABELLED[-1]], [few, few], color=COLOURS[1], linewidth=0.8, linestyle=":")
    axis.set_xscale("symlog", linthresh=1, linscale=0.5)
    ticks = (0, 1, 2, 4, 8, 16, 64, 256, 1024)
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.set_xticks([], minor=True)
    axis.set(title="Accuracy on held-out words", ylabel="accuracy",
             xlabel="labelled examples, in the prompt or finetuned on (symlog axis)", ylim=(0.2, 1.02))
    axis.legend(loc="lower right", fontsize=8, bbox_to_anchor=(1, 0.08))


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES))
