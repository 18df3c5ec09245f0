"""The policy gradient in the logits.

    L = -(1/N) sum over responses n of A[n] sum over t with mask[n, t] = 1 of log softmax(logits[n, t])[tokens[n, t]]

    logits        (N, T, V), float64: logits[n, t] score tokens[n, t]
    tokens        (N, T), integers: the tokens that were drawn
    advantages    A, (N,): constants. No gradient goes through them, although they are computed from log-probs
    mask          (N, T), bool
    returns       dlogits = dL/dlogits, (N, T, V)

Compare the result with sft_gradient: it is the SFT gradient of the drawn tokens, weighted by A.
"""

from collections.abc import Callable, Iterator

import numpy as np

from minilm import Tensor, ops
from minilm.exact import enumerable
from minilm.exercises.task import Mistake, Property, Task
from minilm.objectives import policy_gradient as objective


def policy_gradient(logits, tokens, advantages, mask) -> np.ndarray:
    """dL/dlogits."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    onehot = np.eye(logits.shape[-1])[tokens]
    weights = advantages[:, None] * mask / len(logits)
    return weights[..., None] * (p - onehot)


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    mask = np.array([[True, True, False], [True, False, False], [False, True, True]])
    tokens = np.array([[0, 3, 2], [1, 1, 0], [2, 2, 3]])
    return {"one token": (np.array([[[0.0, 1.0, 2.0]]]), np.array([[1]]), np.array([2.0]), np.array([[True]])),
            "two responses": (rng.normal(size=(2, 3, 4)), tokens[:2], np.array([1.5, -0.5]), mask[:2]),
            "as many responses as columns": (rng.normal(size=(3, 3, 4)), tokens, rng.normal(size=3), mask)}


def loss(logits, tokens, advantages, mask) -> Tensor:
    """L, of logits that are an array or a Tensor."""
    return objective.policy_gradient_loss(ops.gather(ops.log_softmax(logits), tokens), advantages, mask)


def expected(logits, tokens, advantages, mask) -> np.ndarray:
    leaf = Tensor(logits, requires_grad=True)
    loss(leaf, tokens, advantages, mask).backward()
    return leaf.grad


def properties(function: Callable) -> Iterator[Property]:
    """Responses of one token: the expectation is a sum over the V tokens."""
    rng = np.random.default_rng(0)
    logits, rewards = rng.normal(size=5), rng.normal(size=5)
    log_pi = logits - np.logaddexp.reduce(logits)
    mask = np.ones((1, 1), bool)
    found = sum(np.exp(log_pi[y]) * function(logits[None, None], np.array([[y]]), rewards[y:y + 1], mask)[0, 0]
                for y in range(5))
    gradient = enumerable.objective_gradient(log_pi[None], log_pi[None], rewards[None], 0.0)[0]
    yield Property("with A = reward, its expectation is minus the gradient of the expected reward", found,
                   np.exp(log_pi) * gradient.sum() - gradient)


TASK = Task(
    solution=policy_gradient, returns=("dlogits",), cases=cases, expected=expected, properties=properties,
    read="minilm/objectives/policy_gradient.py", scalar=lambda *arguments: loss(*arguments).item(), wrt=("logits",),
    hints=("d log softmax(z)_y / dz = onehot(y) - softmax(z). The rest are factors: A, the mask, 1/N, the sign.",
           "dlogits = (A / N) mask (p - onehot(token)), with A[:, None] and a last axis for the vocabulary."),
    mistakes=(
        Mistake("The softmax runs over the positions (axis 1). The vocabulary is the last axis.",
                "logits.max(axis=-1, keepdims=True))\n    p = e / e.sum(axis=-1, keepdims=True)",
                "logits.max(axis=1, keepdims=True))\n    p = e / e.sum(axis=1, keepdims=True)"),
        Mistake("The sign is reversed: a step of descent must make a token with A > 0 more likely.", "(p - onehot)",
                "(onehot - p)"),
        Mistake("The probabilities are missing: log softmax also depends on the other logits.", "(p - onehot)",
                "(-onehot)"),
        Mistake("Only the logit of the drawn token has a gradient here. The others change the denominator.",
                "(p - onehot)", "(p - 1) * onehot"),
        Mistake("The derivative of -p instead of -log p: a token that is almost impossible would get almost no "
                "gradient.", "(p - onehot)", "(p - onehot) * (p * onehot).sum(axis=-1, keepdims=True)"),
        Mistake("The onehot of the drawn token is missing.", "(p - onehot)", "p"),
        Mistake("The advantages are missing: this is SFT on the model's own samples.", "advantages[:, None] * mask",
                "mask"),
        Mistake("The mask is missing: prompt and padding get a gradient.", "advantages[:, None] * mask",
                "advantages[:, None] * np.ones(mask.shape)"),
        Mistake("Divided by the number of tokens instead of the number of responses N.", "/ len(logits)",
                "/ mask.sum()"),
        Mistake("Divided by all N T columns, padding included, instead of the number of responses N.", "/ len(logits)",
                "/ mask.size"),
        Mistake("The mask is reversed: prompt and padding get a gradient, and the response none.",
                "advantages[:, None] * mask", "advantages[:, None] * ~mask"),
        Mistake("Not divided by N.", " / len(logits)", ""),
        Mistake("The advantages are broadcast along the wrong axis: response n has A[n].", "advantages[:, None]",
                "advantages"),
        Mistake("Divided by the length of each response: the result is not the gradient of the expected reward.",
                "advantages[:, None] * mask", "advantages[:, None] * mask / mask.sum(axis=1, keepdims=True)")))
