"""Expected losses in the enumerable world: their gradients, and training on them without any randomness.

Say what dL/dl is, an array (P,N) (or dL/dr, or one entry per token), and call backward with it: the
model does the rest. For J that array is one line, enumerable.objective_gradient. For a loss over pairs
that do not depend on the policy it is the sum, over all pairs, of the gradient of the loss of the pair
times its probability: the gradient of an expectation. For a loss over samples of the policy itself the
same sum is what an estimator gives on average: the probabilities are held fixed, as automatic
differentiation holds them. Whether that is the gradient of anything is another question, and
tests/test_exact_policy_gradient.py and tests/test_exact_kl.py answer it.
Tests: tests/test_expectations.py, tests/test_exact_*.py.
"""

import itertools

import numpy as np

from minilm.optim import AdamW, warmup_cosine
from minilm.tensor import Tensor
from minilm.exact.enumerable import preference


def comparisons(written_by, rewards, flip_rate=0.0):
    """Probability (P,N,N) that responses i and j are compared, and i is preferred.

    Both are drawn from exp(written_by); people prefer as preference(rewards) has it, and err in a
    share flip_rate of cases. Each prompt's probabilities add up to 1.
    """
    if not 0 <= flip_rate <= 1:
        raise ValueError(f"flip_rate {flip_rate} must be between 0 and 1")
    wins = preference(rewards)
    seen = (1 - flip_rate) * wins + flip_rate * (1 - wins)
    drawn = np.exp(written_by)
    return 2 * drawn[:, :, None] * drawn[:, None, :] * seen         # twice: i may be the first or the second drawn


def gradient_over_comparisons(loss, probabilities, values, *others):
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
    gradient = np.zeros(np.shape(values))
    for leaf, y in zip(leaves, (chosen, rejected)):
        np.add.at(gradient, (p, y), weights * leaf.grad)
    return gradient


def gradient_over_samples(loss, log_probs, mask, samples, drawn_from=None):
    """E[ d loss(log_probs (P*K,S), drawn (P,K)) / dlog_probs ] (P,N,S) over K = samples draws a prompt.

    What an estimator gives on average: the probabilities of the draws are held fixed.

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

    A small step of gradient descent on a loss L moves every log-prob, to first order, by

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
