"""A source of text with a known entropy: a random Markov chain of any order.

    H = - sum_c pi(c) sum_x p(x | c) log p(x | c)      nats per token, the entropy rate

c runs over the contexts of `order` tokens; pi is their stationary distribution, pi(c) = sum_c' pi(c') P(c' -> c).
No predictor has a lower expected loss on text of the source, and the source itself reaches H. The loss of a model
minus H is its KL divergence from the source, per token (Shannon 1948, "A Mathematical Theory of Communication",
section 7).
Tests: tests/test_markov.py.
"""

import numpy as np

from minilm import checks


class MarkovSource:
    """transitions (V^order,V): p(x | c), each row drawn from a symmetric Dirichlet distribution.

    A small concentration makes text that is easy to predict. Row c belongs to the context whose tokens are the
    digits of c in base V, latest token last.
    """

    def __init__(self, rng: np.random.Generator, vocab_size: int, order: int = 2, concentration: float = 0.3):
        checks.integer("MarkovSource", "vocab_size", vocab_size, at_least=2)
        checks.integer("MarkovSource", "order", order, at_least=1)
        checks.number("MarkovSource", "concentration", concentration, above=0)
        self.vocab_size = vocab_size
        self.order = order
        # The added 1e-4 keeps every token possible, and so every context reachable.
        rows = rng.dirichlet(np.full(vocab_size, concentration), size=vocab_size ** order) + 1e-4
        self.transitions = rows / rows.sum(axis=1, keepdims=True)
        self._cumulative = self.transitions.cumsum(axis=1)
        self._cumulative[:, -1] = 1.0

    def stationary(self) -> np.ndarray:
        """pi (V^order,): the frequency of each context in an endless text."""
        N = len(self.transitions)
        step = np.zeros((N, N))
        for x in range(self.vocab_size):
            step[np.arange(N), self._after(np.arange(N), x)] = self.transitions[:, x]
        # pi (step - 1) = 0. One of these equations follows from the others; sum pi = 1 replaces it.
        equations = step.T - np.eye(N)
        equations[-1] = 1.0
        return np.linalg.solve(equations, np.eye(N)[-1])

    def entropy_rate(self) -> float:
        """H, in nats per token."""
        return float(-(self.stationary() * (self.transitions * np.log(self.transitions)).sum(axis=1)).sum())

    def sample(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        """`count` pieces of an endless text: tokens (count,length)."""
        V = self.vocab_size
        order = self.order
        context = rng.choice(len(self.transitions), size=count, p=self.stationary())
        tokens = np.empty((count, max(length, order)), np.int64)
        tokens[:, :order] = context[:, None] // V ** np.arange(order)[::-1] % V
        for t, u in enumerate(rng.random((max(0, length - order), count, 1)), start=order):
            tokens[:, t] = (u >= self._cumulative[context]).sum(axis=1)
            context = self._after(context, tokens[:, t])
        return tokens[:, :length]

    def log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """log p of every token that has a whole context before it: (B,T) -> (B,T-order)."""
        tokens = checks.token_ids("MarkovSource.log_probs", "tokens", tokens, self.vocab_size)
        T = tokens.shape[1]
        context = 0
        for i in range(self.order):
            context = context * self.vocab_size + tokens[:, i:T - self.order + i]
        return np.log(self.transitions[context, tokens[:, self.order:]])

    def _after(self, context, token):
        """The next context: the oldest token is dropped, the new token is appended."""
        return context * self.vocab_size % len(self.transitions) + token
