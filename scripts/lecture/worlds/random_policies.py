"""Random policies, and the gradient of every token: the moments of an estimator are sums over all responses.

A gradient that is estimated from one response y is a sum over its tokens of weights w_t times grad log pi(y_t). With
all Y responses listed (minilm/exact/enumerable.py) and g(y) this sum, samples from pi_old have

    mean        E_old[g] = sum_y pi_old(y) g(y)
    variance    E_old[ |g - E_old[g]|^2 ], over all parameters together; the mean of N samples has 1/N of it

Models are in float64, whatever the option --dtype says, because rounding would hide what is exact.
Tests: tests/test_random_policies.py.
"""

from collections.abc import Callable

import numpy as np

from minilm import checks
from minilm.exact.enumerable import EnumerableWorld
from minilm.exact.gradients import parameter_gradients
from minilm.model import Config, Transformer
from minilm.tensor import Tensor

VOCABULARY, PROMPT = 3, [0, 2]
SHARPER = 10                    # times the logits of fresh weights, which are almost uniform


def world_of(longest: int) -> EnumerableWorld:
    """One prompt, and all responses of at most `longest` out of 3 tokens; 0 ends a response."""
    return EnumerableWorld([PROMPT], VOCABULARY, longest)


def random_policies(rng: np.random.Generator, count: int) -> list[Transformer]:
    """`count` policies that differ from each other and, most of them, from the uniform one.

    With seeds 0 to 7, 3 policies each, and responses of at most 3 tokens, the total variation from uniform has the
    median 0.33 and the least value 0.10; between two policies of a seed, 0.52 and 0.25.
    """
    config = Config(vocab_size=VOCABULARY, width=8, layers=1, heads=2, context=8)
    policies = [Transformer(config, rng, np.float64) for _ in range(count)]
    for policy in policies:
        policy.parameters()["unembedding"].data *= SHARPER
    return policies


def between(start: Transformer, end: Transformer, distance: float) -> Transformer:
    """A model with the weights start + distance (end - start)."""
    model = start.copy()
    there = end.parameters()
    for name, p in model.parameters().items():
        p.data[...] += distance * (there[name].data - p.data)
    return model


def log_distribution(world: EnumerableWorld, model: Transformer) -> np.ndarray:
    """log pi(y) of every response, (Y,)."""
    return world.log_probs(model).data[0]


def as_vector(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """The gradients of all parameters, one after the other: (n,)."""
    return np.concatenate([gradient.reshape(-1) for gradient in gradients.values()])


def token_gradients(world: EnumerableWorld, model: Transformer) -> np.ndarray:
    """grad log pi(y_t) of every token of every response, over all n parameters: (Y,T,n), 0 outside the mask.

    Responses with a common beginning share its gradients, so each is computed once, from its own row alone.
    """
    mask = world.mask[0] > 0
    found = {}
    gradients = np.zeros((*mask.shape, sum(p.size for p in model.parameters().values())))
    for y, t in zip(*np.nonzero(mask)):
        beginning = world.tokens[y:y + 1, :t + 2]           # column t scores token t + 1
        key = beginning.tobytes()
        if key not in found:
            found[key] = as_vector(parameter_gradients(model, model.log_probs(beginning)[0, t]))
        gradients[y, t] = found[key]
    return gradients


def gradients_of_samples(loss: Callable[[Tensor], Tensor], log_probs: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """g(y) of every response, (Y,n), as if it were the only sample.

    loss    of the token log-probs (Y,T), a Tensor: the sum over responses of the loss of each
    tokens  token_gradients at these log-probs
    Raises ValueError for log_probs and tokens of different responses.
    """
    checks.same_shape("gradients_of_samples", axes="YT", log_probs=log_probs, tokens=tokens[..., 0])
    leaf = Tensor(log_probs, requires_grad=True)
    loss(leaf).backward()
    return np.einsum("yt,ytn->yn", leaf.grad, tokens)


def moments(samples: np.ndarray, log_old: np.ndarray) -> tuple[np.ndarray, float]:
    """(mean (n,), root of the variance) of the gradients (Y,n) of one response drawn from pi_old, log_old (Y,)."""
    checks.same_shape("moments", axes="Y", samples=samples[..., 0], log_old=log_old)
    probability = np.exp(log_old)
    average = probability @ samples
    return average, float(np.sqrt(probability @ ((samples - average) ** 2).sum(axis=1)))


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """|a - e| / |e|."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def cosine(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(actual @ expected / (np.linalg.norm(actual) * np.linalg.norm(expected)))
