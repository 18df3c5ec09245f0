"""Expected losses in the enumerable world: their gradients, and training on them without any randomness.

An expected loss is a function of log_pi (P,Y), of log-probs of tokens (P,Y,T), or of rewards (P,Y). Each
function here returns its gradient with respect to that array. Calling backward of the model's output with
this array as its argument gives the gradient of every parameter:

    log_pi = world.log_probs(model)
    log_pi.backward(gradient)

For J the array is one line, enumerable.objective_gradient. For a loss over pairs that are drawn from
another policy it is a sum over all pairs: the probability of a pair, times the gradient of its loss. This
is the gradient of the expected loss. For a loss over samples of the policy itself, the same sum is the
expected gradient of an estimator: automatic differentiation holds the probabilities of the samples fixed.
An expected gradient need not be the gradient of the quantity that the estimator estimates:
gradients.compare_with_exact_gradient compares the two.
Tests: tests/test_expectations.py, tests/test_exact_*.py.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from minilm import checks
from minilm.exact.enumerable import EnumerableWorld, preference
from minilm.optim import AdamW, warmup_cosine
from minilm.tensor import Tensor

# The most outcomes that gradient_over_samples visits; each is one forward and backward of the loss, about 0.2 ms.
MOST_OUTCOMES = 100_000


def comparisons(log_mu: np.ndarray, rewards: np.ndarray, flip_rate: float = 0.0) -> np.ndarray:
    """The probability (P,Y,Y) that responses i and j are compared and i is preferred.

    Both responses are drawn from the behaviour policy mu, and log_mu is log mu(y|x), (P,Y). They are
    judged by preference(rewards), and a fraction flip_rate of the judgements is reversed. The
    probabilities of each prompt add up to 1. Raises ValueError for a flip_rate outside [0, 1].
    """
    checks.number("comparisons", "flip_rate", flip_rate, at_least=0, at_most=1)
    checks.same_shape("comparisons", axes="PY", log_mu=log_mu, rewards=rewards)
    preferred = preference(rewards)
    labelled = (1 - flip_rate) * preferred + flip_rate * (1 - preferred)
    mu = np.exp(log_mu)
    return 2 * mu[:, :, None] * mu[:, None, :] * labelled       # 2: i may be the first or the second draw


def gradient_over_comparisons(loss: Callable[..., Tensor], probabilities: np.ndarray, values: np.ndarray,
                              *others) -> np.ndarray:
    """d/dvalues (P,Y) of the sum over prompts of E[ loss(chosen, rejected, ...) ].

    loss           a mean over pairs: dpo_loss(chosen, rejected, reference_chosen, reference_rejected) for
                   values = log_pi and others = (log pi_ref,); reward_loss(chosen, rejected) for values =
                   rewards
    probabilities  (P,Y,Y), probabilities[p, i, j] of the pair in which i is preferred to j: from
                   comparisons(), or counted
    values, others arrays (P,Y); the loss gets their entries for chosen and for rejected
    """
    P, Y = checks.same_shape("gradient_over_comparisons", axes="PY", values=values,
                             **{f"others[{i}]": array for i, array in enumerate(others)})
    if np.shape(probabilities) != (P, Y, Y):
        raise ValueError(f"gradient_over_comparisons: probabilities {np.shape(probabilities)} must be {P, Y, Y}")
    p, chosen, rejected = np.nonzero(probabilities)
    leaves = [Tensor(values[p, y], requires_grad=True) for y in (chosen, rejected)]
    loss(*leaves, *(other[p, y] for other in others for y in (chosen, rejected))).backward()
    weights = probabilities[p, chosen, rejected] * len(p)       # the loss is a mean over len(p) pairs
    gradient = np.zeros(np.shape(values))
    for leaf, y in zip(leaves, (chosen, rejected)):
        np.add.at(gradient, (p, y), 0 if leaf.grad is None else weights * leaf.grad)    # None: not used by the loss
    return gradient


def gradient_over_samples(loss: Callable[[Tensor, np.ndarray], Tensor], log_probs: np.ndarray, mask: np.ndarray,
                          samples: int, drawn_from: np.ndarray | None = None,
                          most_outcomes: int = MOST_OUTCOMES) -> np.ndarray:
    """E[ d loss(log_probs (P*K,T), drawn (P,K)) / dlog_probs ], (P,Y,T), over K = samples draws for each prompt.

    This is the expected gradient of an estimator. The probabilities of the draws are held fixed.

    log_probs   of the tokens, an array (P,Y,T); mask as in EnumerableWorld
    loss        of the token log-probs of the responses drawn (a Tensor) and of their indices; other values of
                these responses: world.take(values, drawn)
    drawn_from  log-probs (P,Y) of the policy that draws the samples, if it is another one
    Every outcome of the draws is visited, with its probability. There are Y^(P K); raises ValueError
    if this is more than most_outcomes.
    """
    P, Y, T = checks.same_shape("gradient_over_samples", axes="PYT", log_probs=log_probs, mask=mask)
    K = checks.integer("gradient_over_samples", "samples", samples, at_least=1)
    mask = checks.mask("gradient_over_samples", mask)
    outcomes = Y ** (P * K)
    if not outcomes <= most_outcomes:
        raise ValueError(f"gradient_over_samples: {K} draws for each of {P} prompts with {Y} responses have "
                         f"Y^(P K) = {outcomes:,} outcomes; the limit is {most_outcomes:,}, at about 0.2 ms each. Take "
                         "one prompt, fewer samples, or a world with fewer responses; or pass most_outcomes")
    log_pi = np.where(mask, log_probs, 0).sum(axis=-1) if drawn_from is None else drawn_from
    checks.same_shape("gradient_over_samples", drawn_from=log_pi, log_probs=log_probs[..., 0])
    prompts = np.arange(P)[:, None]
    gradient = np.zeros(log_probs.shape)
    for outcome in itertools.product(range(Y), repeat=P * K):
        drawn = np.reshape(outcome, (P, K))
        leaf = Tensor(log_probs[prompts, drawn].reshape(P * K, T), requires_grad=True)
        loss(leaf, drawn.copy()).backward()
        probability = np.exp(log_pi[prompts, drawn].sum())
        np.add.at(gradient, (prompts, drawn), probability * leaf.grad.reshape(P, K, T))
    return gradient


def descend(model, world: EnumerableWorld, gradient: Callable[[np.ndarray], np.ndarray], steps: int,
            learning_rate: float) -> Iterator[np.ndarray]:
    """Train the model on an exact gradient: AdamW without randomness.

    gradient  a function of log_pi (P,Y) that returns dL/dlog_pi (P,Y)
    Yields log_pi before each step, and after the last.
    """
    checks.integer("descend", "steps", steps, at_least=0)
    optimizer = AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    for step in range(steps):
        log_pi = world.log_probs(model)
        yield log_pi.data
        optimizer.zero_grad()
        log_pi.backward(gradient(log_pi.data))
        optimizer.step(warmup_cosine(step, steps, learning_rate, warmup=10, floor=0.0))
    yield world.log_probs(model).data


def tangent_kernel(model, world: EnumerableWorld) -> np.ndarray:
    """The inner products of grad log pi(y) and grad log pi(y') over all parameters, (P*Y,P*Y).

    A small step of gradient descent on a loss L changes every log-prob, to first order, by

        d log pi(y) = -learning_rate sum_y' kernel(y,y') dL/dlog pi(y')

    so the kernel determines the effect of each response on every other one (Jacot et al. 2018,
    arXiv:1806.07572). Probability is conserved: sum_y pi(y) kernel(y,y') = 0 over the responses to a prompt.
    """
    jacobian = []
    for p, y in np.ndindex(world.shape):
        twins = {name: Tensor(weight.data, requires_grad=True) for name, weight in model.parameters().items()}
        world.log_probs(model.over(twins))[p, y].backward()
        jacobian.append(np.concatenate([twin.grad.reshape(-1) for twin in twins.values()]))
    return np.array(jacobian) @ np.transpose(jacobian)
