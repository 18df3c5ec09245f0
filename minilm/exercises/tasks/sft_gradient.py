"""The gradient of the SFT loss in the logits.

    L = -(1/M) sum over b, t with mask[b, t] = 1 of log softmax(logits[b, t])[targets[b, t]],       M = mask.sum()

    logits     (B, T, V), float64
    targets    (B, T), integers
    mask       (B, T), bool
    returns    dlogits = dL/dlogits, (B, T, V)

The result is the reason why cross-entropy trains well: it is a difference of two distributions.
"""

import numpy as np

from minilm import Tensor, ops
from minilm.exercises.task import Mistake, Task, forms
from minilm.objectives import sft


def sft_gradient(logits, targets, mask) -> np.ndarray:
    """dL/dlogits."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    onehot = np.eye(logits.shape[-1])[targets]
    return (p - onehot) * mask[..., None] / mask.sum()


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    mask = np.array([[False, True, True], [False, False, True]])
    return {"one token": (np.array([[[0.0, 1.0, 2.0]]]), np.array([[1]]), np.array([[True]])),
            "two rows": (rng.normal(size=(2, 3, 4)), np.array([[0, 3, 2], [1, 1, 0]]), mask),
            "logits of order 1000": (1000 * rng.normal(size=(2, 3, 4)), np.array([[0, 3, 2], [1, 1, 0]]), mask)}


def expected(logits, targets, mask) -> np.ndarray:
    leaf = Tensor(logits, requires_grad=True)
    sft.sft_loss(ops.gather(ops.log_softmax(leaf), targets), mask).backward()
    return leaf.grad


def loss(logits, targets, mask) -> float:
    """L, for finite differences."""
    return sft.sft_loss(ops.gather(ops.log_softmax(logits), targets), mask).item()


TASK = Task(
    solution=sft_gradient, returns=("dlogits",), cases=cases, expected=expected, read="minilm/objectives/sft.py",
    scalar=loss, wrt=("logits",),
    hints=("For one token, log softmax(z)_y = z_y - log sum_j exp(z_j). What is its derivative in z_i?",
           "d/dz_i = 1[i = y] - p_i. The loss is the negative mean of it: (p - onehot(y)) mask / M."),
    mistakes=(
        Mistake("The onehot of the target is missing: with p alone, every logit is pushed down.", "(p - onehot)", "p"),
        Mistake("The softmax runs over the positions (axis 1). The vocabulary is the last axis.",
                "logits.max(axis=-1, keepdims=True))\n    p = e / e.sum(axis=-1, keepdims=True)",
                "logits.max(axis=1, keepdims=True))\n    p = e / e.sum(axis=1, keepdims=True)"),
        Mistake("The sign is reversed: descent on this would make the target less likely.", "(p - onehot)",
                "(onehot - p)"),
        Mistake("The mask is missing: prompt and padding get a gradient.", " * mask[..., None]", ""),
        Mistake("Divided by all B T columns. L is a mean over the tokens of the mask.", "mask.sum()", "mask.size"),
        Mistake("Divided by the number of rows: long responses then have a larger gradient.", "mask.sum()",
                "len(mask)"),
        Mistake("The mask is reversed: prompt and padding get a gradient, and the response none.", "mask[..., None]",
                "~mask[..., None]"),
        Mistake("Not divided: this is the gradient of a sum of losses.", " / mask.sum()", ""),
        *forms("Each row is divided by its own number of tokens. M counts the tokens of the whole batch.",
               "/ mask.sum()", "/ mask.sum(axis=1)[:, None, None]", "/ mask.sum(axis=1)[:, None, None] / len(mask)"),
        Mistake("The probabilities are missing: log softmax also depends on the other logits.", "(p - onehot)",
                "(-onehot)"),
        Mistake("Only the logit of the target has a gradient here. The others change the denominator.",
                "(p - onehot)", "(p - 1) * onehot"),
        Mistake("The derivative of -p instead of -log p: a token that is almost impossible would get almost no "
                "gradient.", "(p - onehot)", "(p - onehot) * (p * onehot).sum(axis=-1, keepdims=True)"),
        Mistake("exp overflows: subtract the largest logit of each row first.",
                "logits - logits.max(axis=-1, keepdims=True)", "logits")))
