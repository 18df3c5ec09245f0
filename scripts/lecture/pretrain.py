"""Next-token prediction: held-out loss by tokens read and by width

Claim. A language model is trained on plain text by next-token prediction.

Test. Transformers with 2 layers and width 16, 32 or 64 read windows of 128 tokens, 8 per step, 500 steps.
There are two texts. One is an endless random Markov chain of order 2 over 10 tokens, whose entropy is
known. The other is real English: the help texts of Python, 370 kB after removing repeated paragraphs, 400
byte-pair tokens; a tenth is held out, in stretches of ten paragraphs. The loss is on held-out text, and
each token has 64 to 127 tokens before it. On the chain, the loss of the chain itself on the same text is
subtracted. The baseline counts: interpolated Kneser-Ney n-grams of orders 1 to 5 of as many tokens, or of
all there are; the best order is chosen on the held-out text itself, in favour of the n-grams. On the chain,
models and n-grams read different draws. The English stream has about 185,000 tokens; the models read it
almost three times, the n-grams once.

Rule. On both texts, a Markov chain and English, the held-out loss falls with the width, every width ends below unigrams
and the widest below bigrams; and on the Markov chain the widest closes at least 95% of the gap between the loss of a
uniform guess and the entropy. On the chain the loss above the entropy falls with the width on a logarithmic scale,
because it ends near 0.

Limits. On both texts the n-grams, counted in a second, end lower than the widest model. On the chain they
must, because its distribution is a table of triples. With --full (12 times the tokens) the models get more
time and the n-grams no more English. With 350 steps, one seed of four kept 5.6% on the chain; the steps
were raised to 500 and the rule was not changed. All widths have one schedule and one learning rate, the
better of two that were tried. A point inside a curve is not the end of a shorter run. The English is of one
kind: held-out paragraphs share phrases with those that are read. Three sizes are no scaling law.

Source. Shannon 1948 (entropy as the lower bound of the loss); Radford et al. 2018, "Improving Language
Understanding by Generative Pre-Training"; Chen and Goodman 1998 (n-gram models); Kaplan et al. 2020,
arXiv:2001.08361 (loss against size and tokens).

Figure. Held-out loss against the number of tokens read (log axis), left on a Markov chain as the loss above the entropy
(log axis), right on English in bits per byte; one line for each width of the model; dashed and dotted grey: counted
n-grams and bigrams, and a uniform guess.
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

from minilm.data import make_stream
from minilm.stages.pretraining import pretrain, pretrain_on_documents
from minilm.stages.train_state import TrainState
from minilm.tensor import no_grad
from minilm.tokenizer import Tokenizer
from minilm.world.corpus import english
from worlds.markov import MarkovSource
from worlds.ngrams import NGram

WIDTHS = (16, 32, 64)
LENGTH = 128                            # tokens of a window
BATCH = 8                               # windows of a step
RATE = 1e-2                             # learning rate
HALF = LENGTH // 2
ORDERS = (1, 2, 3, 4, 5)                # of the n-grams
STRETCHES = 64                          # of the chain for the n-grams: few, because junctions are false
UNITS = {"chain": "nats per token", "English": "bits per byte"}
SIZES = {"quick": {"seeds": 3, "steps": 4, "held_out": 1024},
         "default": {"seeds": 6, "steps": 500, "held_out": 12288},
         "full": {"seeds": 6, "steps": 6000, "held_out": 12288}}


def chain(rng, steps, held_out):
    """A text to learn: its stage, a stream to count, held-out tokens, and reported(nats per token)."""
    source = MarkovSource(rng, 10, order=2)

    def draw(rng, count):
        tokens = source.sample(rng, count, LENGTH + 1)
        return tokens, np.ones(tokens.shape)

    stream = source.sample(rng, STRETCHES, BATCH * steps * LENGTH // STRETCHES).reshape(-1)
    tokens = source.sample(rng, 1, held_out)
    loss_of_the_chain = -source.log_probs(tokens)[0, HALF - source.order:].mean()
    return (10, lambda state: pretrain_on_documents(state, draw, steps, BATCH, RATE), stream, tokens[0],
            lambda loss: loss - loss_of_the_chain, source.entropy_rate())


def prose(rng, steps, held_out):
    """The same for the English; its entropy is unknown."""
    paragraphs = list(dict.fromkeys(english()[0].split("\n\n")))
    stretches = ["\n\n".join(paragraphs[i:i + 10]) for i in range(0, len(paragraphs), 10)]
    order = rng.permutation(len(stretches))
    unseen, read = ([stretches[i] for i in part] for part in np.split(order, [len(order) // 10]))
    tokenizer = Tokenizer.train(read, 400)
    stream = make_stream(tokenizer, read)
    tokens = make_stream(tokenizer, unseen)[:held_out]
    tokens = tokens[:len(tokens) // HALF * HALF]
    size = len(tokenizer.decode(tokens).encode())
    return (tokenizer.vocab_size, lambda state: pretrain(state, stream, steps, BATCH, LENGTH, RATE), stream,
            tokens, lambda loss: loss * len(tokens) / size / np.log(2), None)


def held_out_loss(model, stream):
    """Nats per token of a stream whose length is a multiple of HALF, without its first HALF."""
    starts = np.arange(0, len(stream) - HALF, HALF)
    with no_grad():
        log_probs = [model.log_probs(stream[part[:, None] + np.arange(LENGTH)]).data[:, HALF - 1:]
                     for part in np.array_split(starts, len(starts) // 32 + 1)]
    return -float(np.concatenate(log_probs).mean())


def measure(experiment, seed, steps, held_out):
    checks = sorted({max(1, round(steps / 2 ** i)) for i in range(6)})
    results = {"tokens": [step * BATCH * LENGTH for step in checks]}
    for name, text in (("chain", chain), ("English", prose)):
        rng = np.random.default_rng([seed, len(name)])
        vocabulary, stage, stream, tokens, reported, entropy = text(rng, steps, held_out)
        measured = results[name] = {"uniform": reported(np.log(vocabulary)), "entropy": entropy,
                                 "counted": [min(count, len(stream)) for count in results["tokens"]]}
        for width in WIDTHS:
            model = experiment.transformer(rng, vocab_size=vocabulary, width=width, layers=2, context=LENGTH)
            losses = measured[f"width {width}"] = []
            for step, _ in enumerate(stage(TrainState(model, rng)), start=1):
                if step in checks:
                    losses.append(reported(held_out_loss(model, tokens)))
            experiment.say(f"seed {seed}, {name}, width {width}: {losses[-1]:.3f} {UNITS[name]}")
        for n in ORDERS:
            counted = (NGram(stream[:count], vocabulary, n) for count in measured["counted"])
            measured[f"order {n}"] = [reported(-model.log_probs(tokens)[HALF:].mean()) for model in counted]
    return results


def best_order(seeds, name):
    """The order of the n-grams with the smallest mean loss over the seeds, after all tokens."""
    return min(ORDERS, key=lambda n: np.mean([s[name][f"order {n}"][-1] for s in seeds]))


def rule(last, left):
    """The comparisons, from last(text, model), the final losses of all seeds."""
    losses = {name: [last(name, f"width {w}") for w in WIDTHS] for name in UNITS}       # (widths, seeds)
    logarithms = np.log(np.maximum(np.transpose(losses["chain"]), 1e-4))
    comparisons = [
        Comparison("chain: smallest decrease of log(loss - entropy) from one width to the next",
                   [smallest_step(-ends) for ends in logarithms], above=0),
        Comparison("English: smallest decrease of the loss from one width to the next (bits per byte)",
                   [smallest_step(-ends) for ends in np.transpose(losses["English"])], above=0)]
    for name, unit in UNITS.items():
        worst = last(name, "order 1") - np.max(losses[name], axis=0)
        widest = last(name, "order 2") - losses[name][-1]
        comparisons += [Comparison(f"{name}: lead of the worst width over unigrams ({unit})", worst, above=0),
                        Comparison(f"{name}: lead of the widest over bigrams ({unit})", widest, above=0)]
    return [*comparisons,
            Comparison("chain: share of the gap, uniform guess to entropy, that the widest leaves "
                       "open", left, below=0.05)]


def conclude(seeds, size):
    def last(name, model):
        return np.array([s[name][model][-1] for s in seeds])

    widths = [f"width {w}" for w in WIDTHS]
    left = last("chain", widths[-1]) / [s["chain"]["uniform"] for s in seeds]
    best = {name: f"order {best_order(seeds, name)}" for name in UNITS}
    numbers = {f"{name}, {model} ({unit})": spread(last(name, model))
               for name, unit in UNITS.items() for model in (*widths, "order 1", "order 2", best[name])}
    numbers |= {"entropy rate of the chain (nats per token)": spread(s["chain"]["entropy"] for s in seeds),
                "share of the distance to the entropy that is left": spread(left),
                "tokens of the English": spread(s["English"]["counted"][-1] for s in seeds)}
    columns = [(name, model) for name in UNITS for model in (*widths, best[name])]
    table = [["tokens read", *(f"{name}, {model.replace('order', 'n-grams, order')} ({UNITS[name]})"
                               for name, model in columns)]]
    for i, count in enumerate(seeds[0]["tokens"]):
        table.append([f"{count:,}", *(mean_range([s[name][model][i] for s in seeds], 3)
                                      for name, model in columns)])
    chain, english = (", ".join(mean(last(name, w), digits) for w in widths)
                      for name, digits in (("chain", 3), ("English", 2)))
    words = (f"Widths {', '.join(map(str, WIDTHS))} end at {english} bits per byte on English, and at {chain} nats per "
             f"token above the entropy on the chain. There the widest closes "
             f"{100 * (1 - left.mean()):.1f}% of the gap between a uniform guess and the entropy.")
    return Conclusion(rule(last, left), words, numbers, table)


def draw(figure, seeds, size):
    tokens = seeds[0]["tokens"]
    for axis, name in zip(figure.subplots(1, 2), UNITS):
        for width, colour in zip(WIDTHS, COLOURS):
            curve(axis, tokens, [s[name][f"width {width}"] for s in seeds], f"width {width}", colour)
        best = best_order(seeds, name)
        for order, label, style in ((best, f"counted n-grams, the best order ({best})", "--"),
                                    (2, "counted bigrams", ":")):
            counted = np.mean([s[name]["counted"] for s in seeds], axis=0)
            curve(axis, counted, [s[name][f"order {order}"] for s in seeds], label, COLOURS[5], marker="",
                  linestyle=style)
        level(axis, np.mean([s[name]["uniform"] for s in seeds]), "uniform")
        axis.set(xscale="log", xlabel="thousand tokens read")
        axis.set_xticks(tokens, [f"{count / 1000:.0f}" for count in tokens])
        axis.set_xticks([], minor=True)
    left, right = figure.axes
    left.set(title="Markov chain", yscale="log", ylim=(3e-4, None),
             ylabel="held-out loss above the entropy (nats per token)")
    right.set(title="English", ylabel="held-out loss (bits per byte)", ylim=(1, None))
    left.legend(loc="lower left", fontsize=8)
    right.legend(handles=right.get_legend_handles_labels()[0][len(WIDTHS):], loc="lower left", fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(8.4, 4.2)))
