"""A world small enough to list: every response that a policy can give, so that every expectation is a sum.

With V tokens and at most R of them in a response there are few responses y to a prompt: 40 for V = 4,
R = 3. A Transformer over these V tokens gives each of them a probability, these add up to 1, and what
a run can only estimate from samples is computed here to the last digits, by the same model and the
same log-probs. Throughout, l = log pi(y) is (P,N): P prompts, N responses.

    entropy        H(pi)         = - sum_y pi(y) log pi(y)
    divergence     KL(pi || q)   =   sum_y pi(y) (log pi(y) - log q(y))
    objective      J(pi)         =   sum_y pi(y) r(y)  -  beta KL(pi || pi_ref)

RLHF maximises J. With pi*(y) = pi_ref(y) exp(r(y)/beta) / Z, the reward is r = beta log(pi*/pi_ref) +
beta log Z; put into J,

    J(pi) = beta log Z - beta KL(pi || pi*)

so pi* is where everything should end, and J* = beta log Z is how well it can be done (Rafailov et al.
2023, arXiv:2305.18290, (4)). Gradients of expectations, and training on them: expectations.py.
Tests: tests/test_enumerable.py, and the proofs in tests/test_exact_*.py.
"""

import itertools

import numpy as np

from minilm import layers
from minilm.data import make_batch
from minilm.ops import stable_sigmoid

# Refuse to list more than this many tokens.
MOST_TOKENS = 1_000_000


class EnumerableWorld:
    """Some prompts, and all N responses to each, of at most max_new_tokens tokens out of vocab_size.

    prompts    list of P token lists
    eos        ends a response; a response of max_new_tokens without one ends there, as in generate()
    responses  list of N token lists, the same for every prompt
    tokens     (P*N,S) prompt and response, padded; row p*N + y is response y to prompt p
    mask       (P,N,S-1) 1 where model.log_probs(tokens) scores a token of the response
    Raises ValueError for a prompt outside the vocabulary, for more than anybody would list, and for a
    model over another vocabulary, which could give other responses.
    """

    def __init__(self, prompts, vocab_size, max_new_tokens, eos=0):
        if max_new_tokens < 1 or not 0 <= eos < vocab_size:
            raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1, and eos {eos} one of the "
                             f"{vocab_size} tokens")
        if not prompts or any(not 0 <= token < vocab_size for prompt in prompts for token in prompt):
            raise ValueError(f"expected at least one prompt, of tokens from 0 to {vocab_size - 1}")
        listed = 0
        for length in range(1, max_new_tokens + 1):
            listed += length * vocab_size * (vocab_size - 1) ** (length - 1) * len(prompts)
            if listed > MOST_TOKENS:
                raise ValueError(f"the responses of up to {max_new_tokens} out of {vocab_size} tokens to {len(prompts)} "
                                 f"prompts are too many to list (more than {MOST_TOKENS} tokens); take fewer or "
                                 "shorter ones")
        self.vocab_size = vocab_size
        others = [token for token in range(vocab_size) if token != eos]
        finished = [[*words, eos] for n in range(max_new_tokens) for words in itertools.product(others, repeat=n)]
        self.responses = finished + [[*words] for words in itertools.product(others, repeat=max_new_tokens)]
        self.prompts = [list(prompt) for prompt in prompts]
        self.shape = len(prompts), len(self.responses)
        batch = make_batch([prompt for prompt in self.prompts for _ in self.responses],
                           self.responses * len(prompts), pad=eos)
        self.tokens, self.mask = batch.tokens, batch.target_mask.reshape(*self.shape, -1)

    def token_log_probs(self, model, temperature=1.0):
        """log pi of every token of every response: a Tensor (P,N,S-1); what the mask leaves out is no response."""
        if model.config.vocab_size != self.vocab_size:
            raise ValueError(f"a model over {model.config.vocab_size} tokens can give responses that a world of "
                             f"{self.vocab_size} does not list; make them equal")
        return model.log_probs(self.tokens, temperature).reshape(self.mask.shape)

    def log_probs(self, model, temperature=1.0):
        """log pi(y) of every response: a Tensor (P,N), whose exp adds up to 1 over each row."""
        return layers.sequence_log_probs(self.token_log_probs(model, temperature), self.mask)

    def rewards(self, reward_model):
        """What a RewardModel gives every response: a Tensor (P,N)."""
        lengths = [len(prompt) + len(response) for prompt in self.prompts for response in self.responses]
        real = np.arange(self.tokens.shape[1]) < np.array(lengths)[:, None]
        return reward_model.rewards(self.tokens, real).reshape(self.shape)


# Exact quantities, from log-probs (P,N): one number for each prompt, (P,).

def expectation(l, values):
    """sum_y pi(y) values(y); what has no probability does not count, whatever its value."""
    pi = np.exp(l)
    return (pi * np.where(pi > 0, values, 0)).sum(axis=-1)


def entropy(l):
    return -expectation(l, l)


def divergence(l, other):
    """KL(pi || q) in nats, from log pi and log q."""
    return expectation(l, l - other)


def total_variation(l, other):
    """Half the summed differences of probability: 0 for the same distribution, at most 1."""
    return 0.5 * np.abs(np.exp(l) - np.exp(other)).sum(axis=-1)


def objective(l, reference, rewards, beta):
    """J = E[r] - beta KL(pi || pi_ref)."""
    return expectation(l, rewards) - beta * divergence(l, reference)


def objective_gradient(l, reference, rewards, beta):
    """dJ/dl (P,N) = pi (r - beta (l - l_ref) - beta), of the sum of J over prompts.

    The last beta changes nothing: behind l is a model, sum_y pi(y) = 1 whatever its parameters, and
    sum_y pi(y) grad l(y) = 0. Without it this is E[R grad log pi], the policy gradient. The factor pi(y)
    is its weakness: what the policy never says it can hardly learn about.
    """
    return np.exp(l) * (rewards - beta * (l - reference) - beta)


# Where the objectives lead to.

def optimum(reference, rewards, beta):
    """log pi* (P,N), pi* = pi_ref exp(r/beta) / Z, and log Z (P,): the best policy, of J* = beta log Z."""
    tilted = reference + rewards / beta
    log_Z = np.logaddexp.reduce(tilted, axis=-1)
    return tilted - log_Z[:, None], log_Z


def preference(rewards):
    """P(i preferred to j) = sigma(r_i - r_j), Bradley and Terry's law: rewards (P,N) -> (P,N,N)."""
    return stable_sigmoid(rewards[:, :, None] - rewards[:, None, :])


def ipo_optimum(reference, written_by, rewards, beta):
    """Where IPO leads: log of pi_ref exp(w/beta) / Z, w(y) the probability that y is preferred to a response
    drawn from exp(written_by) (Azar et al. 2023, arXiv:2310.12036, (9)). It knows no reward, only who
    wins; and, unlike pi*, it depends on who wrote the responses that are compared."""
    return optimum(reference, (preference(rewards) * np.exp(written_by)[:, None, :]).sum(axis=-1), beta)[0]


def best_of_n(l, scores, n):
    """log-probs of the best of n responses drawn from pi; among equally good ones, of the first drawn.

    The best has score s if all n are at most s, and not all below: with F the cumulative
    distribution of the scores, probability F(s)^n - F(s-)^n, shared by the responses of that score
    in proportion to pi. Its divergence from pi is at most log n - (n-1)/n: Beirami et al. 2024,
    arXiv:2401.01879, theorem 3.1.
    """
    if n < 1:
        raise ValueError(f"best of {n}: at least one response must be drawn")
    log_law = np.full_like(l, -np.inf)
    for p, (row, score) in enumerate(zip(l, scores)):
        possible = np.exp(row) > 0
        _, level = np.unique(score[possible], return_inverse=True)
        mass = np.bincount(level, np.exp(row[possible]))
        F = np.cumsum(mass)
        # F^n - (F - mass)^n = F^n (1 - (1 - mass/F)^n), without the difference of two powers.
        with np.errstate(divide="ignore"):                  # of the lowest score: log 0 = -inf, as it should be
            best = n * np.log(F) + np.log(-np.expm1(n * np.log1p(-np.minimum(mass / F, 1))))
        log_law[p, possible] = row[possible] + (best - np.log(mass))[level]
    return log_law
