"""Next-token prediction: held-out loss falls with tokens, and further in wider models

Claim. A language model is trained on plain text by next-token prediction.

Test. Transformers of 2 layers and width 16, 32, 64 read windows of 128 tokens, 8 a step, 500 steps. Two texts: an
endless random Markov chain of order 2 over 10 tokens, whose entropy is known; and real English (the help texts of
Python, 370 kB after removing repeated paragraphs; 400 byte-pair tokens; a tenth held out in stretches of ten
paragraphs). Loss is on held-out text, each token seen with 64 to 127 before it; on the chain, less the loss of the
chain itself on that same text. The baseline that could beat us counts instead: interpolated Kneser-Ney n-grams of
orders 1 to 5 of as many tokens, or of all there are, the best order chosen on the held-out text itself, to its
advantage. On the chain models and n-grams read different draws of it; the English stream has about 185,000 tokens,
which the models read almost three times and the n-grams once.

Refuted. If, with any seed and on either text, the final loss does not fall with the width, some width does not end
below the unigrams, or the widest not below the bigrams; or if on the chain the widest leaves more than 5% of the
distance from uniform to the entropy.

Limits. Trained is not best: on both texts the n-grams, counted in a second, end lower than the widest model here; on
the chain they must, for its law is a table of triples. With --full (12 times the tokens) the models get more time and
the n-grams no more English. 350 steps missed the 5% on the chain with one seed of four (5.6%); the steps were raised
to 500, and the rule left as it was. One schedule and one learning rate, the better of two tried, for all widths; a
point inside a curve is not where a run that ended there would be. The English is of one kind: held-out paragraphs
share phrases with those read. Three sizes are no scaling law.

Source. Shannon 1948 (entropy as the floor of prediction); Radford et al. 2018, "Improving Language Understanding by
Generative Pre-Training"; Chen and Goodman 1998 (n-gram models); Kaplan et al. 2020, arXiv:2001.08361 (loss against
size and tokens).
"""

import sys

from common.experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict

import numpy as np

from minilm.data import make_stream
from minilm.model import Config, Transformer
from minilm.stages.pretraining import pretrain_on_documents, pretraining
from minilm.stages.train_state import TrainState
from minilm.tensor import no_grad
from minilm.tokenizer import Tokenizer
from minilm.world.corpus import english
from worlds.markov import MarkovSource
from worlds.ngrams import NGram

WIDTHS = (16, 32, 64)
LENGTH, BATCH, RATE = 128, 8, 1e-2      # tokens of a window, windows of a step, learning rate
HALF = LENGTH // 2
ORDERS = (1, 2, 3, 4, 5)                # of the n-grams
STRETCHES = 64                          # of the chain that the n-grams count: few, for every junction is false
UNITS = {"chain": "nats a token", "English": "bits a byte"}
SIZES = {"quick": {"seeds": 3, "steps": 4, "held_out": 1024},
         "default": {"seeds": 4, "steps": 500, "held_out": 12288},
         "full": {"seeds": 4, "steps": 6000, "held_out": 12288}}


def chain(rng, steps, held_out):
    """A text to learn: its stage, a stream to count, held-out tokens, and reported(nats a token)."""
    source = MarkovSource(rng, 10, order=2)

    def draw(rng, count):
        tokens = source.sample(rng, count, LENGTH + 1)
        return tokens, np.ones(tokens.shape)

    stream = source.sample(rng, STRETCHES, BATCH * steps * LENGTH // STRETCHES).reshape(-1)
    tokens = source.sample(rng, 1, held_out)
    floor = -source.log_probs(tokens)[0, HALF - source.order:].mean()
    return (10, lambda training: pretrain_on_documents(training, draw, steps, BATCH, RATE), stream, tokens[0],
            lambda loss: loss - floor, source.entropy_rate())


def prose(rng, steps, held_out):
    """The same of the English; its entropy is unknown."""
    paragraphs = list(dict.fromkeys(english()[0].split("\n\n")))
    stretches = ["\n\n".join(paragraphs[i:i + 10]) for i in range(0, len(paragraphs), 10)]
    order = rng.permutation(len(stretches))
    unseen, read = ([stretches[i] for i in part] for part in np.split(order, [len(order) // 10]))
    tokenizer = Tokenizer.train(read, 400)
    stream, tokens = make_stream(tokenizer, read), make_stream(tokenizer, unseen)[:held_out]
    tokens = tokens[:len(tokens) // HALF * HALF]
    size = len(tokenizer.decode(tokens).encode())
    return (tokenizer.vocab_size, lambda training: pretrain(training, stream, steps, BATCH, LENGTH, RATE), stream,
            tokens, lambda loss: loss * len(tokens) / size / np.log(2), None)


def held_out_loss(model, stream):
    """Nats a token of a stream of a multiple of HALF tokens, less its first HALF."""
    starts = np.arange(0, len(stream) - HALF, HALF)
    with no_grad():
        log_probs = [model.log_probs(stream[part[:, None] + np.arange(LENGTH)]).data[:, HALF - 1:]
                     for part in np.array_split(starts, len(starts) // 32 + 1)]
    return -float(np.concatenate(log_probs).mean())


def measure(row, seed, steps, held_out):
    checks = sorted({max(1, round(steps / 2 ** i)) for i in range(6)})
    results = {"tokens": [step * BATCH * LENGTH for step in checks]}
    for name, text in (("chain", chain), ("English", prose)):
        rng = np.random.default_rng([seed, len(name)])
        vocabulary, stage, stream, tokens, reported, entropy = text(rng, steps, held_out)
        found = results[name] = {"uniform": reported(np.log(vocabulary)), "entropy": entropy,
                                 "counted": [min(count, len(stream)) for count in results["tokens"]]}
        for width in WIDTHS:
            model = Transformer(Config(vocab_size=vocabulary, width=width, layers=2, context=LENGTH), rng)
            losses = found[f"width {width}"] = []
            for step, _ in enumerate(stage(TrainState(model, rng)), start=1):
                if step in checks:
                    losses.append(reported(held_out_loss(model, tokens)))
            row.say(f"seed {seed}, {name}, width {width}: {losses[-1]:.3f} {UNITS[name]}")
        for n in ORDERS:
            counted = (NGram(stream[:count], vocabulary, n) for count in found["counted"])
            found[f"order {n}"] = [reported(-model.log_probs(tokens)[HALF:].mean()) for model in counted]
    return results


def best_order(seeds, name):
    """Of the n-grams of all tokens, by the mean over the seeds."""
    return min(ORDERS, key=lambda n: np.mean([s[name][f"order {n}"][-1] for s in seeds]))


def conclude(seeds, size):
    def last(name, model):
        return np.array([s[name][model][-1] for s in seeds])

    widths = [f"width {w}" for w in WIDTHS]
    left = last("chain", widths[-1]) / [s["chain"]["uniform"] for s in seeds]
    falls = all((np.diff([last(name, w) for w in widths], axis=0) < 0).all() for name in UNITS)
    beats = all((last(name, w) < last(name, "order 1")).all() for name in UNITS for w in widths)
    beats &= all((last(name, widths[-1]) < last(name, "order 2")).all() for name in UNITS)
    best = {name: f"order {best_order(seeds, name)}" for name in UNITS}
    numbers = {f"{name}, {model} ({unit})": spread(last(name, model))
               for name, unit in UNITS.items() for model in (*widths, "order 1", "order 2", best[name])}
    numbers |= {"entropy rate of the chain (nats a token)": spread(s["chain"]["entropy"] for s in seeds),
                "share of the distance to the entropy that is left": spread(left),
                "tokens of the English": spread(s["English"]["counted"][-1] for s in seeds)}
    columns = [(name, model) for name in UNITS for model in (*widths, best[name])]
    table = [["tokens read", *(f"{name}, {model.replace('order', 'n-grams, order')} ({UNITS[name]})"
                               for name, model in columns)]]
    for i, count in enumerate(seeds[0]["tokens"]):
        table.append([f"{count:,}", *(shown([s[name][model][i] for s in seeds], 3) for name, model in columns)])
    sentence = (f"After {seeds[0]['tokens'][-1]:,} tokens widths {', '.join(map(str, WIDTHS))} are "
                f"{', '.join(shown(last('chain', w), 3) for w in widths)} nats above the entropy of the chain "
                f"({shown([s['chain']['entropy'] for s in seeds])}), the widest with {shown(left, 3)} of the distance "
                f"from uniform left, the best n-grams {shown(last('chain', best['chain']), 4)} nats. On English they "
                f"lose {', '.join(shown(last('English', w)) for w in widths)} bits a byte, unigrams "
                f"{shown(last('English', 'order 1'))}, bigrams {shown(last('English', 'order 2'))}, the best n-grams "
                f"({best['English']}) {shown(last('English', best['English']))}.")
    return Conclusion(verdict(falls and beats and (left <= 0.05).all()), sentence, numbers, table)


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
    left.set(title="Markov chain: how far above its entropy", yscale="log", ylim=(3e-4, None),
             ylabel="held-out loss less entropy (nats a token)")
    right.set(title="English", ylabel="held-out loss (bits a byte)", ylim=(1, None))
    left.legend(loc="lower left", fontsize=8)
    right.legend(handles=right.get_legend_handles_labels()[0][len(WIDTHS):], loc="lower left", fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(8.4, 4.2)))
