"""An encoder finetuned on labelled examples, a decoder with a few of them in its prompt

Claim. A BERT-like bidirectional encoder finetuned on very many labelled examples, and a GPT-like decoder with a few
in its prompt, reach similar accuracy.

Test. Both (width 48, 3 layers, key smear) are pretrained on the same kind and number of documents: 9 lines word >
label. The label says of which quarter of its alphabet one of three letters is; which of them is the hidden rule of
the document. The decoder predicts each label from what is before it, until 97% of the last ones are right (at most
600 steps of 32 documents); the encoder, for as many steps, has half of the labels hidden and predicts them from the
rest. The decoder then labels held-out words after 0 to 8 lines in its prompt, without a gradient step. The encoder
gets a new head for the four labels and is finetuned on N single lines of one rule, in 60 steps of 32: all of them in
random order, and again; N = 4 to 1,024, mean over the three rules. Baselines that could beat
it: the decoder finetuned likewise; the encoder that keeps the labels of its pretraining and fills its mask; an
encoder never pretrained. Chance is 0.25; the best from k examples is computed by listing the rules.

Refuted. If the encoder with 1,024 labels and the decoder with 8 demonstrations, means over the seeds, are more than
0.05 apart, or the encoder is level with the decoder at 8 labels or fewer (then many were not needed). Cannot be
shown if 8 demonstrations bring a decoder less than 0.1 over none, with any seed.

Limits. The decoder's accuracy with 8 demonstrations is where its training was stopped, 0.97, and the encoder's with
1,024 labels is at its ceiling: that they come within 0.05 of each other is nearly built in; what could come out
otherwise is at how many labels. "Very many" are not needed here. The three rules are all in the pretraining text: the
prompt only tells which, and finetuning on one of them is easy too. So the N at which the two meet says nothing of real
tasks, and differs between seeds; what is shown is the order of the two. An encoder never pretrained stands beside it
because this task is learned from scratch too: nothing is shown here about what pretraining brings an encoder. One
learning rate each; real finetuning also picks steps and seeds. Key smear speeds up learning in context; it is no part
of BERT or GPT. Only labels are hidden or predicted, for the letters are drawn at random. How many steps the decoder
needs differs by a factor of two and more between seeds, hence the stop on accuracy. Other recipes learned in context
more slowly or only with some seeds: 2 layers, two labels, one alphabet for all places, tied embeddings, a smaller
learning rate; with 6 or 12 rules nothing was seen within 300 steps.

Source. Devlin et al. 2018, arXiv:1810.04805 (BERT); Brown et al. 2020, arXiv:2005.14165 (GPT-3, few-shot); Schick
and Schuetze 2020, arXiv:2001.07676 (finetuning through the mask needs fewer labels).
"""

import itertools
import sys

from common.experiment import COLOURS, OUTCOMES, Conclusion, curve, level, run, shown, spread, verdict

import numpy as np

from minilm.model import Config, Transformer
from common.masked_pretraining import masked_pretraining
from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.train_state import TrainState
from minilm.tensor import no_grad
from worlds import rules

SHOTS = 8
SAID = slice(rules.LABEL, rules.LABEL + rules.LABELS)       # the tokens that are labels
LABELLED = (4, 8, 16, 64, 256, 1024)
# What is finetuned: which model, and whether it gets a new head.
FINETUNED = {"encoder": ("encoder", True), "decoder": ("decoder", True),
             "encoder through its mask": ("encoder", False), "encoder, not pretrained": ("fresh", True)}
SHAPE = {"vocab_size": rules.VOCABULARY, "width": 48, "layers": 3, "context": (SHOTS + 1) * rules.LINE,
         "key_smear": True}
SIZES = {"quick": {"seeds": 3, "steps": 4, "finetuning": 1, "test": 100},
         "default": {"seeds": 4, "steps": 600, "finetuning": 60, "test": 1000}}


def documents(rng, count):
    return rules.document(*rules.draw(rng, count, SHOTS + 1))


def train(model, rng, draw, steps, rate, share, enough=lambda step: False):
    """How many steps were taken: at most so many, fewer if enough(step).

    A decoder predicts what the mask of draw selects, from what is before it; an encoder a share of it, from the rest.
    """
    training = TrainState(model, rng)
    stage = (pretrain_on_documents(training, draw, steps, 32, rate) if model.config.causal else
             masked_pretraining(training, draw, steps, 32, rules.MASK, share, rate))
    for _ in stage:
        if enough(training.step):
            break
    return training.step


def accuracy(model, words, answers):
    """Of each label in lines (B,n), given what a decoder sees; an encoder is asked for all labels at once: (n,)."""
    tokens, mask = rules.document(words, answers)
    at = rules.LINE - 2 if model.config.causal else rules.LINE - 1      # where the label is scored
    if not model.config.causal:
        tokens = np.where(mask > 0, rules.MASK, tokens)
    with no_grad():
        logits = model(tokens).data[:, at::rules.LINE, SAID]
    return (logits.argmax(axis=-1) == answers).mean(axis=0)


def finetuned(model, rng, new_head, rule, words, steps):
    """Accuracy on the held-out words of a copy that is trained on single lines of one rule."""
    model = model.copy()
    if new_head:
        head = model.unembedding.data
        head[SAID] = rng.normal(size=head[SAID].shape) * 0.1 * head.shape[1] ** -0.5

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


def measure(row, seed, steps, finetuning, test):
    rng = np.random.default_rng(seed)
    models = {name: Transformer(Config(**SHAPE, causal=name == "decoder"), rng)
              for name in ("encoder", "decoder", "fresh")}

    def learned(step):
        return step % 20 == 0 and accuracy(models["decoder"], *rules.draw(rng, 400, SHOTS + 1))[-1] >= 0.97

    taken = train(models["decoder"], rng, documents, steps, 1e-2, 1.0, learned)
    train(models["encoder"], rng, documents, steps, 1e-2, 0.5, lambda step: step == taken)
    words, answers = rules.draw(rng, test, SHOTS + 1, held_out=True)
    results = {"steps": taken, "prompted": accuracy(models["decoder"], words, answers),
               "best": rules.best_accuracy(words, answers)}
    row.say(f"seed {seed}: pretrained in {taken} steps; with {SHOTS} demonstrations {results['prompted'][-1]:.3f}")
    pool = rng.permutation(rules.all_words(held_out=False))
    for name, (model, new_head) in FINETUNED.items():
        results[name] = [np.mean([finetuned(models[model], rng, new_head, rule, pool[:n], finetuning)
                                  for rule in range(rules.WORD)]) for n in LABELLED]
        row.say(f"seed {seed}: {name} with {LABELLED[-1]} labels {results[name][-1]:.3f}")
    return results


def meeting(accuracies, goal):
    """How many labels reach the goal first, interpolated on a logarithmic axis; None if it is never reached."""
    for i, accuracy in enumerate(accuracies):
        if accuracy >= goal:
            if i == 0:
                return float(LABELLED[0])
            share = (goal - accuracies[i - 1]) / (accuracy - accuracies[i - 1])
            return float(LABELLED[i - 1] * (LABELLED[i] / LABELLED[i - 1]) ** share)
    return None


def conclude(seeds, size):
    few, none = (np.array([s["prompted"][k] for s in seeds]) for k in (SHOTS, 0))
    mean = {name: np.mean([s[name] for s in seeds], axis=0) for name in FINETUNED}
    met, gap = meeting(mean["encoder"], few.mean()), mean["encoder"][-1] - few.mean()
    holds = abs(gap) <= 0.05 and (met is None or met > SHOTS)
    outcome = verdict(holds) if (few - none >= 0.1).all() else OUTCOMES[2]
    numbers = {f"decoder, {k} demonstrations": spread(s["prompted"][k] for s in seeds) for k in (0, 1, 2, 4, SHOTS)}
    numbers |= {f"best from {k}": spread(s["best"][k] for s in seeds) for k in (0, SHOTS)}
    numbers |= {f"{name}, finetuned on {n}": spread(s[name][i] for s in seeds)
                for name in FINETUNED for i, n in enumerate(LABELLED)}
    by_seed = {name: [meeting(s[name], s["prompted"][SHOTS]) for s in seeds] for name in FINETUNED}
    reached = {name: [labels for labels in found if labels is not None] for name, found in by_seed.items()}
    numbers |= {f"labels with which the finetuned {name} meets the prompted decoder, {len(found)} of {len(seeds)} "
                "seeds": spread(found) for name, found in reached.items() if found}
    numbers["pretraining steps"] = spread(s["steps"] for s in seeds)
    table = [["labels", "best possible", "decoder, prompted", *(f"{name}, finetuned" for name in FINETUNED)]]

    def cell(name, n, counts):
        return shown([s[name][counts.index(n)] for s in seeds]) if n in counts else ""

    for n in sorted({*range(SHOTS + 1), *LABELLED}):
        table.append([f"{n:,}", *(cell(name, n, range(SHOTS + 1)) for name in ("best", "prompted")),
                      *(cell(name, n, LABELLED) for name in FINETUNED)])

    def where(name):
        found, never = reached[name], len(seeds) - len(reached[name])
        at = f"at {min(found):.0f} to {max(found):.0f} labels" if found else ""
        return ", ".join([f"with {len(found)} of {len(seeds)} seeds {at}"] * (found != [])
                         + [f"with {never} never by {LABELLED[-1]:,}"] * (never > 0))

    sentence = (f"With {SHOTS} demonstrations in its prompt the decoder is right in {shown(few)} of cases (none: "
                f"{shown(none)}; best possible {shown([s['best'][SHOTS] for s in seeds])}); the encoder finetuned on "
                f"{LABELLED[-1]:,} labels in {shown([s['encoder'][-1] for s in seeds])}. They meet "
                f"{where('encoder')}. The finetuned decoder is there {where('decoder')}; the encoder that keeps its "
                f"labels {where('encoder through its mask')}; one never pretrained "
                f"{where('encoder, not pretrained')}.")
    return Conclusion(outcome, sentence, numbers, table)


def draw(figure, seeds, size):
    axis = figure.subplots()
    shots = np.arange(SHOTS + 1)
    curve(axis, shots, [s["prompted"] for s in seeds], "decoder, in its prompt, no gradient step", COLOURS[1])
    best = np.mean([s["best"] for s in seeds], axis=0)
    axis.plot(shots, best, color=COLOURS[5], linestyle="--", label="best possible from so many")
    for name, colour, marker in zip(FINETUNED, (COLOURS[0], COLOURS[4], COLOURS[2], COLOURS[3]), "sv^D"):
        curve(axis, LABELLED, [s[name] for s in seeds], f"{name}, finetuned", colour, marker)
    level(axis, 1 / rules.LABELS, "chance")
    few = np.mean([s["prompted"][SHOTS] for s in seeds])
    axis.plot([SHOTS, LABELLED[-1]], [few, few], color=COLOURS[1], linewidth=0.8, linestyle=":")
    axis.set_xscale("symlog", linthresh=1, linscale=0.5)
    ticks = (0, 1, 2, 4, 8, 16, 64, 256, 1024)
    axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axis.set_xticks([], minor=True)
    axis.set(title="Held-out words labelled rightly", xlabel="labelled examples, in the prompt or finetuned on",
             ylabel="accuracy", ylim=(0.2, 1.02))
    axis.legend(loc="lower right", fontsize=8, bbox_to_anchor=(1, 0.08))


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES))
