"""The gradient of causal attention.

    E = q k^T / sqrt(K),      P = softmax(E) over the keys that are seen,      o = P v

    q, k, v     (T, K); query t sees the keys up to t
    do          (T, K), dL/do
    returns     dq, dk and dv, (T, K) each

attention_weights computes P, which is 0 where a key is not seen.
"""

import numpy as np

from minilm import Tensor, layers
from minilm.exercises.task import Mistake, Task, forms


def attention_weights(q, k) -> np.ndarray:
    """P, (T, T)"""
    E = np.where(np.tri(len(q), dtype=bool), q @ k.T / np.sqrt(q.shape[1]), -np.inf)
    e = np.exp(E - E.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention_backward(q, k, v, do) -> tuple:
    """dL/dq, dL/dk and dL/dv, from dL/do."""
    scale = q.shape[1] ** -0.5
    P = attention_weights(q, k)
    dv = P.T @ do
    dP = do @ v.T
    dE = P * (dP - (dP * P).sum(axis=-1, keepdims=True))
    dq = scale * dE @ k
    dk = scale * dE.T @ q
    return dq, dk, dv


def cases(rng: np.random.Generator) -> dict[str, tuple]:
    return {"four positions": tuple(rng.normal(size=(4, 4, 2))), "three positions": tuple(rng.normal(size=(4, 3, 3)))}


def expected(q, k, v, do) -> tuple:
    leaves = [Tensor(x[None, None], requires_grad=True) for x in (q, k, v)]
    layers.attention(*leaves).backward(do[None, None])
    return tuple(leaf.grad[0, 0] for leaf in leaves)


TASK = Task(
    solution=attention_backward, returns=("dq", "dk", "dv"), cases=cases, expected=expected,
    read="minilm/layers.py, attention and attention_without_tiles", given=(attention_weights,),
    scalar=lambda q, k, v, do: (attention_weights(q, k) @ v * do).sum(), wrt=("q", "k", "v"),
    hints=("Go backwards through three steps: the product with v, the softmax, the product of q and k. You have "
           "written each of these vjps.",
           "dv = P^T do, dP = do v^T, dE = P * (dP - rowsum(dP * P)), dq = dE k / sqrt(K), dk = dE^T q / sqrt(K)."),
    mistakes=(
        Mistake("The row sum is missing in the softmax's gradient.", "(dP - (dP * P).sum(axis=-1, keepdims=True))",
                "dP"),
        Mistake("1/sqrt(K) is missing in dq and in dk.", "q.shape[1] ** -0.5", "1.0"),
        Mistake("1/sqrt(K) is missing in dq.", "scale * dE @ k", "dE @ k"),
        Mistake("1/sqrt(K) is missing in dk.", "scale * dE.T @ q", "dE.T @ q"),
        *forms("The results are in the wrong order: dq, dk, dv.", "return dq, dk, dv", "return dk, dq, dv",
               "return dv, dk, dq", "return dv, dq, dk"),
        Mistake("dq needs the keys, and dk the queries: q and k have changed places.",
                "dE @ k\n    dk = scale * dE.T @ q", "dE @ q\n    dk = scale * dE.T @ k"),
        Mistake("P is not transposed in dv: value s is read by the queries from s on.", "P.T @ do", "P @ do"),
        Mistake("dE is not transposed in dk.", "dE.T @ q", "dE @ q"),
        Mistake("The row sum has the wrong sign.", "(dP - (dP", "(dP + (dP"),
        Mistake("A mean in place of the row sum.", "(dP * P).sum(axis=-1, keepdims=True)",
                "(dP * P).mean(axis=-1, keepdims=True)"),
        Mistake("The sum runs over the whole array. Each row is a softmax of its own.",
                "(dP * P).sum(axis=-1, keepdims=True)", "(dP * P).sum()"),
        Mistake("P is missing in the row sum.", "(dP * P).sum(axis=-1, keepdims=True)",
                "dP.sum(axis=-1, keepdims=True)"),
        Mistake("The factor P in front of dE is missing. A key that is not seen then gets a gradient.",
                "P * (dP - ", "(dP - "),
        Mistake("The scores are divided by K, not by sqrt(K), on the way back.", "q.shape[1] ** -0.5",
                "q.shape[1] ** -1.0"),
        Mistake("The axis of the row sum is dropped, so the sum of row j is subtracted from column j.",
                "(dP * P).sum(axis=-1, keepdims=True)", "(dP * P).sum(axis=-1)"),
        Mistake("The row sum runs over the queries. The softmax runs over the keys, the last axis.",
                "(dP * P).sum(axis=-1, keepdims=True)", "(dP * P).sum(axis=0, keepdims=True)")))
