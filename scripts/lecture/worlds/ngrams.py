"""Language modelling by counting: an interpolated n-gram model, the classical baseline.

    p_n(x | h) = (max(c(h x) - d_n, 0)  +  d_n N(h .) p_(n-1)(x | h')) / c(h .),      p_0 = 1/V

c(h x) is the number of times that x followed the n-1 tokens h; N(h .) is the number of different tokens that did; h'
is h without its oldest token. Each count is reduced by d_n, and the removed mass goes to the shorter context. Below
the highest order, c is the number of different tokens seen before h x instead of the number of occurrences (Kneser
and Ney 1995). d_n = n1 / (n1 + 2 n2), where n1 and n2 are the numbers of counts equal to 1 and 2. Formulas as in Chen
and Goodman 1998, sections 2.7 and 2.8 (interpolated).
Tests: tests/test_ngrams.py.
"""

import numpy as np

from minilm import checks


class NGram:
    """A model fitted to a stream of tokens (N,). order 1 is a unigram model, which uses no context.

    Raises ValueError for an order below 1, a stream shorter than the order, or V^order that overflows an int64, and
    IndexError for a token outside the vocabulary.
    """

    def __init__(self, stream: np.ndarray, vocab_size: int, order: int = 3):
        if order < 1 or len(stream) < order or vocab_size ** order >= 2 ** 63:
            raise ValueError(f"order {order}, {len(stream)} tokens, vocabulary {vocab_size}: need a text of at least "
                             "`order` >= 1 tokens, and vocab_size^order below 2^63")
        self.vocab_size = vocab_size
        self.levels = []
        grams, counts = np.unique(self._codes(stream, order), return_counts=True)
        for n in range(order, 0, -1):
            self.levels.insert(0, self._level(grams, counts))
            # The next lower order: a gram counts once for each different token before it.
            grams, counts = np.unique(grams % vocab_size ** (n - 1), return_counts=True)

    def _level(self, grams, counts):
        histories, index, distinct = np.unique(grams // self.vocab_size, return_inverse=True, return_counts=True)
        totals = np.bincount(index, weights=counts)
        once = np.sum(counts == 1)
        twice = np.sum(counts == 2)
        discount = once / (once + 2 * twice) if once * twice else 0.5
        return grams, counts, histories, totals, distinct, discount

    def _codes(self, tokens, n):
        """The n tokens that end at each position from n-1 on, encoded as one integer."""
        tokens = checks.token_ids("NGram", "the stream", tokens, self.vocab_size).astype(np.int64)
        length = len(tokens) - n + 1
        return sum(tokens[i:i + length] * self.vocab_size ** (n - 1 - i) for i in range(n))

    def log_probs(self, stream: np.ndarray) -> np.ndarray:
        """log p of every token of a text (N,); the first tokens have a shorter context."""
        p = np.full(len(stream), 1 / self.vocab_size)
        for n, (grams, counts, histories, totals, distinct, discount) in enumerate(self.levels, start=1):
            if len(stream) < n:
                break
            codes = self._codes(stream, n)
            count, = _look_up(codes, grams, counts)
            total, kinds = _look_up(codes // self.vocab_size, histories, totals, distinct)
            shorter = p[n - 1:]
            p[n - 1:] = np.where(total > 0, (np.maximum(count - discount, 0) + discount * kinds * shorter)
                                 / np.maximum(total, 1), shorter)
        return np.log(p)


def _look_up(codes, keys, *values):
    """The values of the codes among the sorted keys, and 0 for a code that is not a key."""
    index = np.minimum(np.searchsorted(keys, codes), len(keys) - 1)
    return [np.where(keys[index] == codes, value[index], 0) for value in values]
