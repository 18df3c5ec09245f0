"""Is your loss of sampled responses unbiased? Its exact expected gradient, beside that of the objective of RLHF.

    import numpy as np
    from minilm.exact.bias import bias
    from minilm.exact.enumerable import EnumerableWorld
    from minilm.exact.gradients import redraw_weights
    from minilm.model import Config, Transformer
    from minilm.objectives.policy_gradient import advantages, policy_gradient_loss

    world = EnumerableWorld([[0, 2]], vocab_size=3, max_new_tokens=3)
    config, rng = Config(vocab_size=3, width=8, layers=1, heads=2, context=8), np.random.default_rng(0)
    policy, reference = (redraw_weights(Transformer(config, rng, np.float64), rng) for _ in range(2))
    rewards = np.array([[len(response) for response in world.responses]])            # (P,Y)

    def rloo(log_probs, drawn):
        A = advantages(drawn.rewards, drawn.kl, beta=0.5)
        return policy_gradient_loss(log_probs, A.reshape(-1), drawn.mask)

    def grpo(log_probs, drawn):
        A = advantages(drawn.rewards, drawn.kl, beta=0.5, baseline="group")
        return policy_gradient_loss(log_probs, A.reshape(-1), drawn.mask, token_mean="response")

    found = bias(rloo, world, policy, reference, rewards, beta=0.5, samples=2)
    print(found.cosine, found.ratio)                                                 # 1.000 1.000: unbiased
    found = bias(grpo, world, policy, reference, rewards, beta=0.5, samples=2)
    print(found.cosine, found.ratio)                                                 # 0.951 0.382: another direction

A loss in PyTorch, JAX or anything else that takes arrays returns the loss and its gradient in the log-probs:

    import torch

    def in_torch(log_probs, drawn):
        leaf = torch.tensor(log_probs, requires_grad=True)
        weights = torch.tensor(drawn.rewards.reshape(-1, 1) - 0.5 * drawn.kl.reshape(-1, 1))
        loss = -(leaf.where(torch.tensor(drawn.mask), 0.0) * weights).sum() / len(leaf)
        loss.backward()
        return loss.item(), leaf.grad.numpy()

    found = bias(in_torch, world, policy, reference, rewards, beta=0.5, arrays=True)
    print(found.cosine, found.ratio)                                                 # 1.000 1.000

The expectation is the sum over all outcomes of the draws, with their probabilities: Y^(P K) of them for K samples of Y
listed responses to each of P prompts. The true gradient is that of -J, the mean over the prompts of
beta KL(pi || pi_ref) - E[r]; for rewards of 0 and beta = 1, of the KL divergence.
Tests: tests/test_bias.py; tests/test_exact_examples.py runs these lines, and holds the printed numbers against the
comments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from minilm import checks
from minilm.exact.enumerable import EnumerableWorld, objective_gradient
from minilm.exact.expectations import MOST_OUTCOMES, gradient_over_samples
from minilm.exact.gradients import GradientComparison, compare_gradients, parameter_gradients, warn_if_near_uniform
from minilm.tensor import Tensor, primitive


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One outcome: K responses drawn for each of P prompts, N = P K rows, prompt by prompt. Arrays without gradient.

    indices    (P,K) of the responses, in world.responses
    mask       (N,T) True on response tokens
    old        (N,T) log-probs of the tokens under the policy that drew them, at the start of the update
    reference  (N,T) log-probs of the tokens under pi_ref
    rewards    (P,K)
    kl         (P,K) k1 of each response under the policy that drew it: the sum of old - reference
    """

    indices: np.ndarray
    mask: np.ndarray
    old: np.ndarray
    reference: np.ndarray
    rewards: np.ndarray
    kl: np.ndarray


def bias(loss: Callable[[Any, Drawn], Any], world: EnumerableWorld, policy, reference,
         rewards: np.ndarray | None = None, beta: float = 1.0, samples: int = 1, drawn_from: Any = None,
         arrays: bool = False, temperature: float = 1.0, most_outcomes: int = MOST_OUTCOMES) -> GradientComparison:
    """The exact expected gradient of a loss over samples, compared with the gradient of -J: cosine, ratio of lengths,
    relative error. An unbiased loss has 1, 1 and 0, up to rounding.

    loss         of the token log-probs (N,T) of the responses drawn, and of a Drawn: a scalar Tensor; with arrays=True
                 it gets an array, and returns the loss and its gradient (N,T)
    policy, reference    models over the vocabulary of the world, in float64, with weights of order 1 (redraw_weights)
    rewards      (P,Y) of the responses listed; None: 0 for all, so that -J is beta KL(pi || pi_ref)
    samples      K, drawn for each prompt
    drawn_from   the model that draws the samples, if it is an older one
    temperature  at which the samples are drawn, and all models scored
    Raises ValueError for more than most_outcomes outcomes (it says how many there are, and what to reduce), for rewards
    of another shape or not finite, for a loss that returns something else, and for a gradient that is not finite or of
    another shape than the log-probs. Warns of a policy that is
    near uniform, as gradients.compare_with_exact_gradient does.
    """
    rewards = np.zeros(world.shape) if rewards is None else checks.finite("bias", "rewards", rewards)
    if rewards.shape != world.shape:
        raise ValueError(f"bias: rewards {rewards.shape} must be (P,Y) = {world.shape}, one for each response")
    checks.number("bias", "beta", beta, at_least=0)
    token_log_probs = world.token_log_probs(policy, temperature)
    log_pi = world.log_probs(policy, temperature)
    warn_if_near_uniform(world, log_pi.data)
    old = token_log_probs.data if drawn_from is None else world.token_log_probs(drawn_from, temperature).data
    log_ref = world.token_log_probs(reference, temperature).data
    log_old, summed_ref = (np.where(world.mask > 0, a, 0).sum(axis=-1) for a in (old, log_ref))

    def of_outcome(log_probs, indices):
        shape = indices.shape
        rows = Drawn(indices, world.take(world.mask, indices) > 0, world.take(old, indices),
                     world.take(log_ref, indices), world.take(rewards, indices).reshape(shape),
                     world.take(log_old - summed_ref, indices).reshape(shape))
        returned = _checked(loss(log_probs.data if arrays else log_probs, rows), arrays)
        return _given_gradient(log_probs, *returned) if arrays else returned

    expected = gradient_over_samples(of_outcome, token_log_probs.data, world.mask, samples, log_old, most_outcomes)
    checks.finite("bias", "the expected gradient in the log-probs (P,Y,T)", expected)
    actual = parameter_gradients(policy, token_log_probs, expected)
    d = objective_gradient(log_pi.data, summed_ref, rewards, beta)
    return compare_gradients(actual, parameter_gradients(policy, log_pi, -d / len(d)))


def _checked(returned, arrays):
    """What a loss returned, a Tensor or a pair. Raises ValueError for anything else."""
    right = (isinstance(returned, (tuple, list)) and len(returned) == 2 and np.shape(returned[0]) == () if arrays else
             isinstance(returned, Tensor) and returned.shape == () and returned.node is not None)
    if not right:
        raise ValueError(f"bias: the loss returned {checks.shown(returned)}; it must be a scalar Tensor that depends "
                         "on the log-probs (with arrays=True: a pair, loss and gradient)")
    return returned


@primitive
def _given_gradient(log_probs, value, gradient):
    """The value, a number, with this gradient (N,T) in log_probs."""
    if np.shape(gradient) != log_probs.shape:
        raise ValueError(f"bias: the gradient has shape {np.shape(gradient)}; the log-probs have {log_probs.shape}")
    def vjp(dloss):
        return dloss * np.asarray(gradient)
    return np.asarray(value, log_probs.dtype), vjp
