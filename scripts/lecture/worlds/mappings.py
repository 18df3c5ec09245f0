"""Documents with a rule that no other document has: it can be learned from the context only.

    c 3 a 7 c 3 b 1 ..          a symbol and its label, repeated

Each document draws its own bijection from SYMBOLS symbols to as many labels. A label can be known only if its symbol
occurred before in the document. One bijection in five is held out of training, so a test uses mappings that were never
seen. Pair k has k demonstrations before it.
Tests: tests/test_mappings.py.
"""

import numpy as np

from minilm import checks
from minilm.model import Transformer
from minilm.tensor import no_grad

SYMBOLS = 8                         # tokens 0 to 7; their labels are tokens 8 to 15
VOCABULARY = 2 * SYMBOLS
PAIRS = 17                          # of a training document


def is_held_out(mapping: np.ndarray) -> np.ndarray:
    """Whether bijections (..,SYMBOLS), labels counted from 0, are kept for tests: (..)."""
    return mapping @ np.arange(SYMBOLS) % 5 == 0


def bijections(rng: np.random.Generator, count: int, held_out: bool = False) -> np.ndarray:
    """(count,SYMBOLS): the label of every symbol, counted from 0; all held out, or all for training."""
    mapping = rng.permuted(np.tile(np.arange(SYMBOLS), (count, 1)), axis=1)
    while (wrong := is_held_out(mapping) != held_out).any():
        mapping[wrong] = rng.permuted(mapping[wrong], axis=1)
    return mapping


def document(symbols: np.ndarray, mapping: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols (B,K), each followed by its label: tokens (B,2K), and a mask of the same shape, 1 on labels."""
    tokens = np.stack([symbols, SYMBOLS + np.take_along_axis(mapping, symbols, axis=1)], axis=2)
    return tokens.reshape(len(symbols), -1), np.tile([0.0, 1.0], (len(symbols), symbols.shape[1]))


def draw(rng: np.random.Generator, count: int, pairs: int = PAIRS, in_use: int = SYMBOLS, held_out: bool = False
         ) -> tuple[np.ndarray, np.ndarray]:
    """Documents of random pairs, each with its own choice of `in_use` symbols: tokens, mask (count, 2 pairs)."""
    checks.integer("mappings.draw", "in_use", in_use, at_least=1, below=SYMBOLS + 1)
    own = rng.permuted(np.tile(np.arange(SYMBOLS), (count, 1)), axis=1)[:, :in_use]
    symbols = np.take_along_axis(own, rng.integers(in_use, size=(count, pairs)), axis=1)
    return document(symbols, bijections(rng, count, held_out))


def draw_in_rounds(rng: np.random.Generator, count: int, shown: int, held_out: bool = True) -> np.ndarray:
    """`shown` demonstrations and a query: tokens (count, 2 shown + 2).

    The demonstrations repeat one random order of all symbols. The query is any symbol.
    """
    order = rng.permuted(np.tile(np.arange(SYMBOLS), (count, 1)), axis=1)
    query = rng.integers(SYMBOLS, size=(count, 1))
    symbols = np.concatenate([order[:, np.arange(shown) % SYMBOLS], query], axis=1)
    return document(symbols, bijections(rng, count, held_out))[0]


def right(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    """(B,K): whether the most likely token after each symbol is its label."""
    with no_grad():
        return model(tokens[:, :-1]).data[:, ::2].argmax(axis=-1) == tokens[:, 1::2]


def shown_before(tokens: np.ndarray) -> np.ndarray:
    """(B,K): whether the symbol of pair k occurred in an earlier pair."""
    symbols = tokens[:, ::2]
    return (symbols[:, :, None] == symbols[:, None, :]).argmax(axis=2) < np.arange(symbols.shape[1])


def copy_bound(tokens: np.ndarray) -> np.ndarray:
    """(B,K): the probability that the best guess of each label is correct, with all bijections equally likely.

    A label that was shown can be copied. Any other label is one of the labels that were not shown.
    """
    before = shown_before(tokens)
    distinct = np.cumsum(~before, axis=1) - ~before         # symbols in the pairs before
    return np.where(before, 1.0, 1 / np.maximum(1, SYMBOLS - distinct))


class Curriculum:
    """Few symbols in a document at first; one more each time the model knows them.

    With all eight from the start, a symbol repeats too seldom for copying to be learned soon. draw is for
    pretrain_on_documents; call examine(model, rng) from time to time between its steps.
    """

    def __init__(self, in_use: int = 2, enough: float = 0.9):
        self.in_use = in_use
        self.enough = enough

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Training documents with the symbols in use: tokens, mask."""
        return draw(rng, count, in_use=self.in_use)

    def examine(self, model: Transformer, rng: np.random.Generator, count: int = 32) -> float:
        """The accuracy on labels that can be copied. If it exceeds `enough`, one more symbol is used from now on."""
        tokens, _ = self.draw(rng, count)
        known = right(model, tokens)[shown_before(tokens)].mean()
        self.in_use = min(SYMBOLS, self.in_use + int(known > self.enough))
        return float(known)
