"""Is the gradient of an estimator the gradient that you think? Its expectation, compared with the exact gradient.

    import numpy as np
    from minilm import ops
    from minilm.exact.enumerable import EnumerableWorld
    from minilm.exact.gradients import compare_with_exact_gradient, redraw_weights
    from minilm.model import Config, Transformer
    from minilm.objectives.kl import k3

    world = EnumerableWorld([[0, 2]], vocab_size=4, max_new_tokens=3)
    config, rng = Config(vocab_size=4, width=8, layers=1, heads=2, context=8), np.random.default_rng(0)
    policy = redraw_weights(Transformer(config, rng, np.float64), rng)
    reference = redraw_weights(Transformer(config, rng, np.float64), rng)
    token_log_ref, log_ref = world.token_log_probs(reference).data, world.log_probs(reference).data

    def loss(log_probs, drawn):                     # the estimator: k3 of each token, summed over a response
        mask = world.take(world.mask, drawn) > 0
        return ops.sum(ops.where(mask, k3(log_probs, world.take(token_log_ref, drawn)), 0.0))

    def kl(log_pi):                                 # the quantity whose gradient the loss should have
        return ops.sum(ops.exp(log_pi) * (log_pi - log_ref))

    found = compare_with_exact_gradient(loss, kl, world, policy)
    print(found.cosine, found.ratio)                # 0.899 0.671; right would be 1 and 1

The weights must be of order 1. A freshly made Transformer is close to uniform, and so close to every other
fresh one; there, many wrong gradients have almost the direction and length of the right one. The same loss
with four seeds:

    weights       cosine                    ratio of lengths
    fresh         0.999 0.998 0.993 0.998   1.02 1.03 1.01 1.03     looks right
    of order 1    0.604 0.989 0.145 0.731   3.72 1.01 0.31 1.17     is wrong

One seed may look right by chance (the second): try several. For a loss that should have the gradient of J or of the
KL divergence, bias.py has all of this in one call.
Tests: tests/test_exact_gradients.py, which asserts this table.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from minilm import checks
from minilm.exact.enumerable import EnumerableWorld, total_variation
from minilm.exact.expectations import gradient_over_samples
from minilm.tensor import Tensor

# A policy whose total variation from the uniform policy is below this for all prompts is near uniform.
NEAR_UNIFORM = 0.1


@dataclasses.dataclass(frozen=True)
class GradientComparison:
    """An actual and an expected gradient, a and e, each over all parameters as one vector.

    cosine          <a, e> / (|a| |e|): 1 for the same direction; 0 if a is 0
    ratio           |a| / |e|: 1 for the same length
    relative_error  max|a - e| / max|e|
    worst           the name of the parameter with the largest |a - e|
    Cosine 1 and another ratio: the gradient is right up to a factor, which a learning rate can absorb.
    """

    cosine: float
    ratio: float
    relative_error: float
    worst: str


def redraw_weights(model: Any, rng: np.random.Generator, scale: float = 0.7) -> Any:
    """Redraw every parameter of the model, norms included, from N(0, scale^2), in place. Returns the model.

    Weights of order 1 make the policy far from uniform and give every parameter a gradient of order 1.
    With fresh weights, terms of the gradient are small next to others, and an error in them is not seen.
    """
    checks.number("redraw_weights", "scale", scale, above=0)
    for p in model.parameters().values():
        p.assign(rng.normal(size=p.shape) * scale)
    return model


def parameter_gradients(model, output: Tensor, cotangent: np.ndarray | None = None) -> dict[str, np.ndarray | None]:
    """The gradient of every parameter by name, from output.backward(cotangent); earlier gradients are cleared.

    A parameter that does not reach the output has the gradient None.
    """
    for p in model.parameters().values():
        p.grad = None
    output.backward(cotangent)
    # Copies: an optimiser gives each parameter one buffer, which the next backward overwrites.
    return {name: None if p.grad is None else p.grad.copy() for name, p in model.parameters().items()}


def compare_gradients(actual: dict[str, Any], expected: dict[str, Any]) -> GradientComparison:
    """Two gradients by parameter name, as parameter_gradients returns them.

    To compare one parameter, pass dicts with its name alone. Raises ValueError for a parameter that has no
    gradient on one side, and if the expected gradient is 0.
    """
    if missing := [name for name in actual | expected if actual.get(name) is None or expected.get(name) is None]:
        raise ValueError(f"one side has no gradient for {', '.join(missing)}: both must depend on every parameter")
    for name in expected:
        checks.same_shape("compare_gradients", **{f"actual[{name!r}]": actual[name], "expected": expected[name]})
    a, e = (np.concatenate([side[name].reshape(-1) for name in expected]) for side in (actual, expected))
    if not e.any():
        raise ValueError("the expected gradient is 0 in every parameter, so it has no direction to compare with")
    lengths = np.linalg.norm(a) * np.linalg.norm(e)
    return GradientComparison(cosine=float(a @ e / lengths) if lengths else 0.0,
                              ratio=float(np.linalg.norm(a) / np.linalg.norm(e)),
                              relative_error=float(np.abs(a - e).max() / np.abs(e).max()),
                              worst=max(expected, key=lambda name: np.abs(actual[name] - expected[name]).max()))


def compare_with_exact_gradient(loss: Callable[[Tensor, np.ndarray], Tensor], quantity: Callable[[Tensor], Tensor],
                                world: EnumerableWorld, policy, samples: int = 1,
                                temperature: float = 1.0) -> GradientComparison:
    """The expected gradient of a loss over samples of the policy, and the exact gradient that it should have.

    loss      of the token log-probs (P*K,T) of K = samples responses drawn for each of P prompts, a Tensor,
              and of their indices drawn (P,K); see gradient_over_samples. world.take(values, drawn) picks
              other values of the same responses, such as world.mask or log-probs of the reference
    quantity  the scalar whose gradient is meant, in minilm.ops, as a function of log_pi (P,Y), a Tensor. The
              KL divergence is: lambda log_pi: ops.sum(ops.exp(log_pi) * (log_pi - reference))
    policy    a Transformer with weights of order 1 (redraw_weights), in float64
    Warns if the policy is near uniform, where a wrong gradient can look right. The same holds for a
    reference that is near the policy.
    """
    token_log_probs = world.token_log_probs(policy, temperature)
    log_pi = world.log_probs(policy, temperature)
    warn_if_near_uniform(world, log_pi.data)
    expected_over_samples = gradient_over_samples(loss, token_log_probs.data, world.mask, samples)
    actual = parameter_gradients(policy, token_log_probs, expected_over_samples)
    return compare_gradients(actual, parameter_gradients(policy, quantity(log_pi)))


def warn_if_near_uniform(world: EnumerableWorld, log_pi: np.ndarray) -> None:
    """Warn the caller's caller of a policy, by its log-probs (P,Y), near which a wrong gradient can look right."""
    uniform = -world.mask.sum(axis=-1) * np.log(world.vocab_size)
    distance = total_variation(log_pi, uniform).max()
    if distance < NEAR_UNIFORM:
        warnings.warn(f"the policy is near uniform (total variation {distance:.3f}, below {NEAR_UNIFORM}), as fresh "
                      "weights make it: a wrong gradient can look right here. Redraw the weights at order 1: "
                      "minilm.exact.gradients.redraw_weights(policy, rng)", stacklevel=3)
