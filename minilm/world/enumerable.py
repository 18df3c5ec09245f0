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
2023, arXiv:2305.18290, (4)).

How the exact gradient of any loss is had. A loss depends on the parameters through l alone. So let
`gradient` say what dL/dl is, an array (P,N), and call l.backward(gradient): the model does the rest.
For L = -J that array is written in one line (objective_gradient); for the expectation of a loss over
random pairs (over_comparisons) or over groups of samples (over_samples) it is the sum, over all that
could be drawn, of the gradient of the loss of the draw times its probability, for an expectation is a
sum, and the gradient of a sum is the sum of the gradients.
Tests: tests/test_enumerable.py, and the proofs in tests/test_exact_*.py.
"""

import itertools

import numpy as np

from minilm import layers
from minilm.data import make_batch
from minilm.ops import stable_sigmoid
from minilm.optim import AdamW, warmup_cosine
from minilm.tensor import Tensor

# Refuse to list more than this many responses for one prompt.
MOST = 100_000


class EnumerableWorld:
    """Some prompts, and all N responses to each, of at most max_new_tokens tokens out of vocab_size.

    prompts    list of P token lists
    eos        ends a response; a response of max_new_tokens without one ends there, as in generate()
    responses  list of N token lists, the same for every prompt
    tokens     (P*N,S) prompt and response, padded; row p*N + y is response y to prompt p
    mask       (P,N,S-1) 1 where model.log_probs(tokens) scores a token of the response
    Raises ValueError for a prompt outside the vocabulary, or more responses than anybody would list.
    """

    def __init__(self, prompts, vocab_size, max_new_tokens, eos=0):
        if max_new_tokens < 1 or not 0 <= eos < vocab_size:
            raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1, and eos {eos} one of the "
                             f"{vocab_size} tokens")
        if not prompts or any(not 0 <= token < vocab_size for prompt in prompts for token in prompt):
            raise ValueError(f"expected at least one prompt, of tokens from 0 to {vocab_size - 1}")
        count = sum((vocab_size - 1) ** n for n in range(max_new_tokens)) + (vocab_size - 1) ** max_new_tokens
        if count > MOST:
            raise ValueError(f"{count} responses of up to {max_new_tokens} out of {vocab_size} tokens are too many "
                             f"to list (more than {MOST}); take fewer or shorter ones")
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


def ipo_optimum(reference, drawn_from, rewards, beta):
    """Where IPO leads: pi_ref exp(w/beta) / Z, w(y) the probability that y is preferred to a response
    drawn from `drawn_from` (Azar et al. 2023, arXiv:2310.12036, (9)). It knows no reward, only who wins."""
    wins = stable_sigmoid(rewards[:, :, None] - rewards[:, None, :])
    return optimum(reference, (wins * np.exp(drawn_from)[:, None, :]).sum(axis=-1), beta)[0]


def best_of_n(l, scores, n):
    """log-probs of the best of n responses drawn from pi; among equally good ones, of the first drawn.

    The best has score s if all n are at most s, and not all below: with F the cumulative
    distribution of the scores, probability F(s)^n - F(s-)^n, shared by the responses of that score
    in proportion to pi. Its divergence from pi is at most log n - (n-1)/n: Beirami et al. 2024,
    arXiv:2401.01879, theorem 3.1.
    """
    law = np.empty_like(l)
    for p, (row, score) in enumerate(zip(l, scores)):
        levels, level = np.unique(score, return_inverse=True)
        mass = np.bincount(level, np.exp(row), minlength=len(levels))
        F = np.cumsum(mass) / mass.sum()
        below = np.concatenate([[0.0], F[:-1]])
        with np.errstate(divide="ignore"):                  # -inf: never the best, to rounding
            law[p] = row + np.log((F ** n - below ** n) / mass)[level]
    return law


# Expectations over what may be drawn.

def comparisons(drawn_from, rewards, flip_rate=0.0):
    """Probability (P,N,N) that responses i and j are compared, and i is preferred.

    Both are drawn from exp(drawn_from); people prefer i with sigma(r_i - r_j), Bradley and Terry's
    law, and err in a share flip_rate of cases. Each row p adds up to 1.
    """
    wins = stable_sigmoid(rewards[:, :, None] - rewards[:, None, :])
    seen = (1 - flip_rate) * wins + flip_rate * (1 - wins)
    drawn = np.exp(drawn_from)
    return 2 * drawn[:, :, None] * drawn[:, None, :] * seen         # twice: i may be the first or the second drawn


def over_comparisons(loss, probabilities, values, *others):
    """d/dvalues (P,N) of the sum over prompts of E[ loss(chosen, rejected, ...) ], one comparison at a time.

    loss           a mean over pairs: dpo_loss(l_c, l_r, ref_c, ref_r) for values l and others (ref,),
                   reward_loss(r_c, r_r) for values r
    probabilities  (P,N,N) from comparisons(), or counted
    values, others arrays (P,N), from which chosen and rejected are picked
    """
    p, chosen, rejected = np.nonzero(probabilities)
    leaves = [Tensor(values[p, y], requires_grad=True) for y in (chosen, rejected)]
    loss(*leaves, *(other[p, y] for other in others for y in (chosen, rejected))).backward()
    weights = probabilities[p, chosen, rejected] * len(p)       # the loss has divided by len(p)
    gradient = np.zeros_like(values)
    for leaf, y in zip(leaves, (chosen, rejected)):
        np.add.at(gradient, (p, y), weights * leaf.grad)
    return gradient


def over_samples(loss, log_probs, mask, samples, drawn_from=None):
    """d/dlog_probs (P,N,S) of E[ loss(log_probs (P*K,S), drawn (P,K)) ] over K = samples draws a prompt.

    log_probs   of the tokens, an array (P,N,S); mask as in EnumerableWorld
    loss        of the log-probs of the responses drawn (a Tensor), and of which ones these are
    drawn_from  log-probs (P,N) to draw from, if not from the policy itself
    All N^(P*K) outcomes are visited, each by its probability: for small N, P and K.
    """
    (P, N, S), K = log_probs.shape, samples
    l = np.where(mask > 0, log_probs, 0).sum(axis=-1) if drawn_from is None else drawn_from
    prompts, gradient = np.arange(P)[:, None], np.zeros_like(log_probs)
    for outcome in itertools.product(range(N), repeat=P * K):
        drawn = np.reshape(outcome, (P, K))
        leaf = Tensor(log_probs[prompts, drawn].reshape(P * K, S), requires_grad=True)
        loss(leaf, drawn).backward()
        np.add.at(gradient, (prompts, drawn), np.exp(l[prompts, drawn].sum()) * leaf.grad.reshape(P, K, S))
    return gradient


# Training, without any randomness.

def descend(model, world, gradient, steps, learning_rate):
    """Train the model on an exact gradient; yields its log-probs (P,N) before each step, and at the end.

    gradient  of log-probs (P,N), to dL/dl (P,N)
    """
    optimizer = AdamW(model.parameters(), weight_decay=0.0)
    for step in range(steps):
        l = world.log_probs(model)
        yield l.data
        optimizer.zero_grad()
        l.backward(gradient(l.data))
        optimizer.step(warmup_cosine(step, steps, learning_rate, warmup=10, floor=0.0))
    yield world.log_probs(model).data


def tangent_kernel(model, world):
    """K (P*N,P*N): the inner products of grad l(y) and grad l(y') over all parameters.

    A small step of gradient descent on a loss L moves every log-prob by

        d l(y) = - learning_rate * sum_y' K(y,y') dL/dl(y')

    so K is all there is to say about what pushing one response does to another (Jacot et al. 2018,
    arXiv:1806.07572). Probability is conserved: sum_y pi(y) K(y,y') = 0 over the responses of a prompt.
    """
    jacobian = []
    for p, y in np.ndindex(world.shape):
        twins = {name: Tensor(weight.data, requires_grad=True) for name, weight in model.parameters().items()}
        world.log_probs(model.over(twins))[p, y].backward()
        jacobian.append(np.concatenate([twin.grad.reshape(-1) for twin in twins.values()]))
    return np.array(jacobian) @ np.transpose(jacobian)
