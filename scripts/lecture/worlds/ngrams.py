"""Counting instead of training: an interpolated n-gram model, the baseline of language modelling.

    p_n(x | h) = (max(c(h x) - d_n, 0)  +  d_n N(h .) p_(n-1)(x | h')) / c(h .),      p_0 = 1/V

c(h x) is how often x followed the n-1 tokens h; N(h .) how many different tokens did; h' is h without its oldest
token. Every count gives up d_n, and what is given up goes to the shorter context. In the orders below the highest, c
counts the different tokens seen before h x, not its occurrences (Kneser and Ney 1995); d_n = n1 / (n1 + 2 n2) from
how many counts are 1 and 2; formulas as in Chen and Goodman 1998, section 2.7 and 2.8 (interpolated).
Tests: tests/test_ngrams.py.
"""

import numpy as np


class NGram:
    """Fitted to a stream of tokens (N,). order 1 is a unigram model, which knows no context."""

    def __init__(self, stream, vocab_size, order=3):
        if order < 1 or len(stream) < order or vocab_size ** order >= 2 ** 63:
            raise ValueError(f"order {order}, {len(stream)} tokens, vocabulary {vocab_size}: need a text of at least "
                             "`order` >= 1 tokens, and vocab_size^order below 2^63")
        self.vocab_size, self.levels = vocab_size, []
        grams, counts = np.unique(self._codes(stream, order), return_counts=True)
        for n in range(order, 0, -1):
            self.levels.insert(0, self._level(grams, counts))
            # The next order: a gram counts once for each different token before it.
            grams, counts = np.unique(grams % vocab_size ** (n - 1), return_counts=True)

    def _level(self, grams, counts):
        histories, at, distinct = np.unique(grams // self.vocab_size, return_inverse=True, return_counts=True)
        totals = np.bincount(at, weights=counts)
        once, twice = (np.sum(counts == c) for c in (1, 2))
        discount = once / (once + 2 * twice) if once * twice else 0.5
        return grams, counts, histories, totals, distinct, discount

    def _codes(self, tokens, n):
        """The n tokens that end at each place from n-1 on, as one number."""
        tokens, length = np.asarray(tokens, np.int64), len(tokens) - n + 1
        return sum(tokens[i:i + length] * self.vocab_size ** (n - 1 - i) for i in range(n))

    def log_probs(self, stream):
        """log p of every token of a text (N,); the first have a shorter context."""
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
    """The values of the codes among the sorted keys; 0 where there is no such key."""
    at = np.minimum(np.searchsorted(keys, codes), len(keys) - 1)
    return [np.where(keys[at] == codes, value[at], 0) for value in values]
