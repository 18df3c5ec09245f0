"""Documents that follow a rule which no other document has: what can be learned from the context alone.

    c 3 a 7 c 3 b 1 ..          a symbol and its label, again and again

Each document draws a bijection of its own, from SYMBOLS symbols to as many labels; a label can be known only if its
symbol stood there before. One bijection in five is held out of training, so that a test has mappings that were never
seen. Pair k has k demonstrations before it.
Tests: tests/test_mappings.py.
"""

import numpy as np

from minilm.tensor import no_grad

SYMBOLS = 8                         # tokens 0 to 7; their labels are tokens 8 to 15
VOCABULARY = 2 * SYMBOLS
PAIRS = 17                          # of a training document


def is_held_out(mapping):
    """Whether bijections (..,SYMBOLS), labels counted from 0, are kept for tests."""
    return mapping @ np.arange(SYMBOLS) % 5 == 0


def bijections(rng, count, held_out=False):
    """(count,SYMBOLS): the label of every symbol, counted from 0; all of them held out, or none."""
    mapping = rng.permuted(np.tile(np.arange(SYMBOLS), (count, 1)), axis=1)
    while (wrong := is_held_out(mapping) != held_out).any():
        mapping[wrong] = rng.permuted(mapping[wrong], axis=1)
    return mapping


def document(symbols, mapping):
    """Symbols (B,K), in that order, with their labels: tokens (B,2K), and a mask of the same shape, 1 on labels."""
    tokens = np.stack([symbols, SYMBOLS + np.take_along_axis(mapping, symbols, axis=1)], axis=2)
    return tokens.reshape(len(symbols), -1), np.tile([0.0, 1.0], (len(symbols), symbols.shape[1]))


def draw(rng, count, pairs=PAIRS, in_use=SYMBOLS, held_out=False):
    """Documents whose pairs repeat as chance will have it, each with `in_use` symbols of its own: tokens, mask."""
    own = rng.permuted(np.tile(np.arange(SYMBOLS), (count, 1)), axis=1)[:, :in_use]
    symbols = np.take_along_axis(own, rng.integers(in_use, size=(count, pairs)), axis=1)
    return document(symbols, bijections(rng, count, held_out))


def draw_in_rounds(rng, count, shown, held_out=True):
    """`shown` demonstrations and a query: tokens (count, 2 shown + 2).

    The demonstrations go round all symbols, in a random order, and round again; the query is any symbol.
    """
    order = rng.permuted(np.tile(np.arange(SYMBOLS), (count, 1)), axis=1)
    query = rng.integers(SYMBOLS, size=(count, 1))
    symbols = np.concatenate([order[:, np.arange(shown) % SYMBOLS], query], axis=1)
    return document(symbols, bijections(rng, count, held_out))[0]


def right(model, tokens):
    """(B,K): is the likeliest token after each symbol its label?"""
    with no_grad():
        return model(tokens[:, :-1]).data[:, ::2].argmax(axis=-1) == tokens[:, 1::2]


def shown_before(tokens):
    """(B,K): did the symbol of pair k stand in a pair before?"""
    symbols = tokens[:, ::2]
    return (symbols[:, :, None] == symbols[:, None, :]).argmax(axis=2) < np.arange(symbols.shape[1])


def copy_bound(tokens):
    """(B,K): how likely the best guess at each label is right, if all bijections are equally likely.

    A label that was shown can be copied; any other is one of those that were not shown.
    """
    before = shown_before(tokens)
    distinct = np.cumsum(~before, axis=1) - ~before         # symbols in the pairs before
    return np.where(before, 1.0, 1 / np.maximum(1, SYMBOLS - distinct))


class Curriculum:
    """Few symbols in a document at first, one more whenever the reader knows them.

    With all eight from the start, copying pays too seldom to be found soon. draw is for pretrain_on_documents;
    examine(model, rng) now and then between its steps.
    """

    def __init__(self, in_use=2, enough=0.9):
        self.in_use, self.enough = in_use, enough

    def draw(self, rng, count):
        return draw(rng, count, in_use=self.in_use)

    def examine(self, model, rng, count=32):
        """The share right of the labels that could be copied; above `enough`, there is one symbol more from now on."""
        tokens, _ = self.draw(rng, count)
        known = right(model, tokens)[shown_before(tokens)].mean()
        self.in_use = min(SYMBOLS, self.in_use + int(known > self.enough))
        return float(known)
