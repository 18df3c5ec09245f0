"""A source of text whose entropy is known: a random Markov chain of any order.

    H = - sum_c pi(c) sum_x p(x | c) log p(x | c)      nats a token, the entropy rate

over the contexts c of `order` tokens; pi is their stationary law, pi(c) = sum_c' pi(c') P(c' -> c). No predictor's
expected loss on the source's text is lower, and the source itself reaches it: what a model loses beyond that is its
KL divergence from the source, per token (Shannon 1948, "A Mathematical Theory of Communication", section 7).
Tests: tests/test_markov.py.
"""

import numpy as np


class MarkovSource:
    """law (V^order,V): p(x | c), each row drawn from a symmetric Dirichlet of this concentration.

    A small concentration makes text that is easy to predict. Row c is that of the context whose tokens are the
    digits of c in base V, the latest token last.
    """

    def __init__(self, rng, vocab_size, order=2, concentration=0.3):
        if vocab_size < 2 or order < 1:
            raise ValueError(f"a source of {vocab_size} tokens and order {order}; expected at least 2 and 1")
        self.vocab_size, self.order = vocab_size, order
        # A floor keeps every token possible, and so every context reachable.
        law = rng.dirichlet(np.full(vocab_size, concentration), size=vocab_size ** order) + 1e-4
        self.law = law / law.sum(axis=1, keepdims=True)
        self._cumulative = self.law.cumsum(axis=1)
        self._cumulative[:, -1] = 1.0

    def stationary(self):
        """pi (V^order,): the share of each context in an endless text."""
        V, N = self.vocab_size, len(self.law)
        step = np.zeros((N, N))
        for x in range(V):
            step[np.arange(N), self._after(np.arange(N), x)] = self.law[:, x]
        # pi (step - 1) = 0, one equation of which is implied by the others; sum pi = 1 takes its place.
        equations = step.T - np.eye(N)
        equations[-1] = 1.0
        return np.linalg.solve(equations, np.eye(N)[-1])

    def entropy_rate(self):
        """H, in nats a token."""
        return float(-(self.stationary() * (self.law * np.log(self.law)).sum(axis=1)).sum())

    def sample(self, rng, count, length):
        """`count` stretches of an endless text: (count, length) tokens."""
        V, order = self.vocab_size, self.order
        context = rng.choice(len(self.law), size=count, p=self.stationary())
        tokens = np.empty((count, max(length, order)), np.int64)
        tokens[:, :order] = context[:, None] // V ** np.arange(order)[::-1] % V
        for t, u in enumerate(rng.random((max(0, length - order), count, 1)), start=order):
            tokens[:, t] = (u >= self._cumulative[context]).sum(axis=1)
            context = self._after(context, tokens[:, t])
        return tokens[:, :length]

    def log_probs(self, tokens):
        """log p of every token that has a whole context before it: (B,T) -> (B,T-order)."""
        T = tokens.shape[1]
        context = 0
        for i in range(self.order):
            context = context * self.vocab_size + tokens[:, i:T - self.order + i]
        return np.log(self.law[context, tokens[:, self.order:]])

    def _after(self, context, token):
        """The context that follows: the oldest token leaves, this one comes."""
        return context * self.vocab_size % len(self.law) + token
