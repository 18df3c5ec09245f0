"""The functions of minilm.layers, with the same arguments, made of the functions of minilm.plain."""
import numpy as np

from minilm import ops, plain
from minilm.backend import array_module, to_numpy
from minilm.plain import rms_norm, rope, sequence_log_probs, swiglu  # noqa: F401
from minilm.tensor import Tensor


def smear(k, amount, before):
    """With a key before the first: put in front, smeared with the others, and taken away."""
    before = array_module(k.data).asarray(before.data if isinstance(before, Tensor) else before)[:, :, None]
    return plain.smear(ops.concatenate([before, k], axis=2), amount)[:, :, 1:]


def attention(q, k, v, causal=True, key_mask=None):
    """Query t stands at position S - T + t, and sees the keys up to there that are not masked."""
    T, S = q.shape[2], k.shape[2]
    visible = np.tri(T, S, S - T, dtype=bool) if causal else np.ones((T, S), bool)
    if key_mask is not None:
        visible = visible & to_numpy(key_mask).astype(bool)[:, None, None, :]
    return plain.attention(q, k, v, visible)


def token_log_probs(hidden, unembedding, targets):
    return ops.gather(ops.log_softmax(hidden @ unembedding.T), targets)
