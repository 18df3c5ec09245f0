"""A world small enough to list: every response of a policy is listed, so every expectation is a sum.

With V tokens and a low limit of length there are few responses y to a prompt x: Y = 40 for V = 4 and at most
3 tokens. A Transformer over these V tokens gives each response a probability, and the Y probabilities of a
prompt add up to 1. A training run can only estimate an expectation from samples; here it is computed to
the last digits, with the same model and the same log-probs. log_pi is log pi(y|x), (P,Y): P prompts, Y
responses to each. For each prompt:

    entropy        H(pi)         = -sum_y pi(y) log pi(y)
    divergence     KL(pi || q)   =  sum_y pi(y) (log pi(y) - log q(y))
    objective      J(pi)         =  sum_y pi(y) r(y) - beta KL(pi || pi_ref)

RLHF maximises J. Its maximum is the policy pi*(y) = pi_ref(y) exp(r(y)/beta) / Z, because solving for
the reward, r = beta log(pi* / pi_ref) + beta log Z, and inserting it into J gives

    J(pi) = beta log Z - beta KL(pi || pi*)

So the best value is J* = beta log Z (Rafailov et al. 2023, arXiv:2305.18290, (4)). Gradients of
expectations: expectations.py. Is an estimator's gradient the one that you think: gradients.py.
Tests: tests/test_enumerable.py, and tests/test_exact_*.py, which check the objectives in such worlds.
"""

import itertools

import numpy as np

from minilm import checks, layers
from minilm.data import make_batch
from minilm.ops import stable_sigmoid
from minilm.tensor import Tensor

# The largest list of responses, in tokens.
MOST_TOKENS = 1_000_000


class EnumerableWorld:
    """P prompts, and all Y responses to each: up to max_new_tokens tokens out of vocab_size.

    prompts    list of P token lists
    eos        ends a response; a response of max_new_tokens tokens may end without it, as in generate(). In a
               prompt, eos is a token like any other
    responses  list of Y token lists, the same for every prompt
    tokens     (P*Y,T) prompt and response, padded to T tokens; row p*Y + i is response i to prompt p
    real       (P*Y,T) 1 on every token that is not padding
    mask       (P,Y,T-1) 1 where log_probs(tokens), which score tokens[:, 1:], belong to the response
    shape      (P,Y)
    Raises ValueError for a prompt outside the vocabulary, for a list of more than MOST_TOKENS tokens, and
    for a model with another vocabulary, which could give responses that are not listed.
    """

    def __init__(self, prompts: list[list[int]], vocab_size: int, max_new_tokens: int, eos: int = 0):
        checks.integer("EnumerableWorld", "max_new_tokens", max_new_tokens, at_least=1)
        checks.integer("EnumerableWorld", "eos", eos, at_least=0, below=vocab_size)
        if len(prompts) == 0 or any(token not in range(vocab_size) for prompt in prompts for token in prompt):
            raise ValueError(f"prompts {prompts}: pass at least one prompt, of tokens from 0 to {vocab_size - 1}")
        listed = 0
        for length in range(1, max_new_tokens + 1):
            listed += length * vocab_size * (vocab_size - 1) ** (length - 1) * len(prompts)
            if listed > MOST_TOKENS:
                raise ValueError(f"the responses of up to {max_new_tokens} out of {vocab_size} tokens to "
                                 f"{len(prompts)} prompts are too many to list (more than {MOST_TOKENS} tokens); "
                                 "reduce vocab_size, max_new_tokens or the number of prompts")
        self.vocab_size = vocab_size
        others = [token for token in range(vocab_size) if token != eos]
        finished = [[*words, eos] for n in range(max_new_tokens) for words in itertools.product(others, repeat=n)]
        self.responses = finished + [[*words] for words in itertools.product(others, repeat=max_new_tokens)]
        self.prompts = [list(prompt) for prompt in prompts]
        self.shape = len(prompts), len(self.responses)
        batch = make_batch([p for p in self.prompts for _ in self.responses], self.responses * len(prompts), pad=eos)
        self.tokens = batch.tokens
        self.real = batch.real
        self.mask = batch.target_mask.reshape(*self.shape, -1)

    def token_log_probs(self, model, temperature: float = 1.0) -> Tensor:
        """log pi of every token of every response, (P,Y,T-1); entries outside the mask are not response tokens."""
        if model.config.vocab_size != self.vocab_size:
            raise ValueError(f"a model over {model.config.vocab_size} tokens can give responses that a world of "
                             f"{self.vocab_size} tokens does not list; make the two vocabularies equal")
        return model.log_probs(self.tokens, temperature).reshape(self.mask.shape)

    def log_probs(self, model, temperature: float = 1.0) -> Tensor:
        """log_pi: log pi(y|x) of every response, (P,Y); the exponentials of a row add up to 1."""
        return layers.sequence_log_probs(self.token_log_probs(model, temperature), self.mask)

    def rewards(self, reward_model) -> Tensor:
        """The reward that a RewardModel gives each response, (P,Y)."""
        return reward_model.rewards(self.tokens, self.real).reshape(self.shape)

    def take(self, values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """The values (P,Y,...) of the responses with the indices drawn (P,K), prompt by prompt: (P*K,...)."""
        drawn = checks.indices("take", "drawn", drawn, self.shape[1])
        if values.shape[:2] != self.shape or drawn.shape != (self.shape[0], drawn.size // self.shape[0]):
            raise ValueError(f"take: values {values.shape}, drawn {drawn.shape}; they must be {self.shape} and (P,K)")
        return np.concatenate([of_prompt[y] for of_prompt, y in zip(values, drawn)])


# Exact quantities, from log-probs (P,Y) to one number for each prompt, (P,).

def expectation(log_pi: np.ndarray, values: np.ndarray) -> np.ndarray:
    """sum_y pi(y) values(y). A response of probability 0 contributes 0, even if its value is infinite.

    Here and below: raises ValueError for arrays of two shapes, and for beta out of range.
    """
    checks.same_shape("expectation", log_pi=log_pi, values=values)
    pi = np.exp(log_pi)
    return (pi * np.where(pi > 0, values, 0)).sum(axis=-1)


def entropy(log_pi: np.ndarray) -> np.ndarray:
    """H(pi) in nats."""
    return -expectation(log_pi, log_pi)


def divergence(log_pi: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(pi || q) in nats."""
    checks.same_shape("divergence", log_pi=log_pi, log_q=log_q)
    return expectation(log_pi, log_pi - log_q)


def total_variation(log_pi: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Half the sum of |pi(y) - q(y)|: 0 for equal distributions, at most 1."""
    checks.same_shape("total_variation", log_pi=log_pi, log_q=log_q)
    return 0.5 * np.abs(np.exp(log_pi) - np.exp(log_q)).sum(axis=-1)


def objective(log_pi: np.ndarray, reference: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """J(pi) = E[r] - beta KL(pi || pi_ref), with reference = log pi_ref."""
    checks.same_shape("objective", log_pi=log_pi, reference=reference, rewards=rewards)
    checks.number("objective", "beta", beta, at_least=0)
    return expectation(log_pi, rewards) - beta * divergence(log_pi, reference)


def objective_gradient(log_pi: np.ndarray, reference: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """dJ / dlog_pi = pi (r - beta (log_pi - reference) - beta), (P,Y), of the sum of J over prompts.

    The last beta has no effect on the parameters of a model: sum_y pi(y) = 1 for all parameters, so
    sum_y pi(y) grad log pi(y) = 0. Without it, this is E[R grad log pi], the policy gradient, with
    R = r - beta (log_pi - reference). Because of the factor pi(y), the gradient at a response that the policy
    almost never gives is almost 0.
    """
    checks.same_shape("objective_gradient", log_pi=log_pi, reference=reference, rewards=rewards)
    checks.number("objective_gradient", "beta", beta, at_least=0)
    return np.exp(log_pi) * (rewards - beta * (log_pi - reference) - beta)


# The policies at which training ends.

def optimum(reference: np.ndarray, rewards: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """log pi* (P,Y), where pi* = pi_ref exp(r/beta) / Z has the largest J, and log Z (P,); J* = beta log Z."""
    checks.same_shape("optimum", axes="PY", reference=reference, rewards=rewards)
    tilted = reference + rewards / checks.number("optimum", "beta", beta, above=0)
    log_Z = np.logaddexp.reduce(tilted, axis=-1)
    return tilted - log_Z[:, None], log_Z


def preference(rewards: np.ndarray) -> np.ndarray:
    """P(i preferred to j) = sigmoid(r_i - r_j), the Bradley-Terry model: rewards (P,Y) to (P,Y,Y)."""
    return stable_sigmoid(rewards[:, :, None] - rewards[:, None, :])


def ipo_optimum(reference: np.ndarray, log_mu: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """The policy at which IPO ends: log of pi_ref exp(w/beta) / Z, (P,Y).

    w(y) is the probability that y is preferred to a response drawn from the behaviour policy mu, the
    policy that wrote the compared responses. log_mu is log mu(y|x), (P,Y). Unlike pi*, it depends on mu,
    and on the rewards only through the win probabilities w. Azar et al. 2023, arXiv:2310.12036, (9).
    """
    checks.same_shape("ipo_optimum", axes="PY", log_mu=log_mu, rewards=rewards)
    wins = (preference(rewards) * np.exp(log_mu)[:, None, :]).sum(axis=-1)
    return optimum(reference, wins, beta)[0]


def best_of_n(log_pi: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """Log-probs (P,Y) of the best of n responses drawn from pi; among equally good ones, the first drawn.

    The best response has score s if all n scores are at most s, and not all are below s. With F the
    cumulative distribution of the score of one draw, this has probability F(s)^n - F(s-)^n. Responses of
    equal score share it in proportion to pi. The divergence from pi is at most log n - (n-1)/n: Beirami
    et al. 2024, arXiv:2401.01879, theorem 3.1. Raises ValueError for n below 1 and
    for scores that are not finite: NaN would be the best.
    """
    checks.integer("best_of_n", "n", n, at_least=1)
    checks.same_shape("best_of_n", axes="PY", log_pi=log_pi, scores=checks.finite("best_of_n", "scores", scores))
    log_best = np.full(log_pi.shape, -np.inf)
    for p, (row, score) in enumerate(zip(log_pi, scores)):
        possible = np.exp(row) > 0
        _, level = np.unique(score[possible], return_inverse=True)
        mass = np.bincount(level, np.exp(row[possible]))
        F = np.cumsum(mass)
        # F^n - (F - mass)^n = F^n (1 - (1 - mass/F)^n), without the difference of two powers.
        with np.errstate(divide="ignore"):                  # at the lowest score, where log 0 = -inf is right
            best = n * np.log(F) + np.log(-np.expm1(n * np.log1p(-np.minimum(mass / F, 1))))
        log_best[p, possible] = row[possible] + (best - np.log(mass))[level]
    return log_best
