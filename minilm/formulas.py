"""The fused primitives of layers.py written plainly, as definitions.

No hand-written gradient here: these are compositions of the elementary operations, slow
and obvious. The tests hold layers.py (and, on a GPU, the kernels) to them, value and
gradient.
"""

import numpy as np

from minilm import ops
from minilm.backend import array_module, to_numpy


def rms_norm(x, weight, eps=1e-6):
    return x / ops.sqrt(ops.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def swiglu(gate_up):
    width = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :width], gate_up[..., width:]
    return gate * ops.sigmoid(gate) * up


def rope(x, cos, sin, pairing="half"):
    half = x.shape[-1] // 2
    if pairing == "half":
        a, b = x[..., :half], x[..., half:]
        return ops.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    pairs = [ops.reshape(y, shape=y.shape + (1,)) for y in (a * cos - b * sin, b * cos + a * sin)]
    return ops.reshape(ops.concatenate(pairs, axis=-1), shape=x.shape)


def smear(k, amount, before):
    a = ops.reshape(ops.sigmoid(amount), shape=(amount.shape[0], 1, amount.shape[1]))
    previous = ops.concatenate([before[:, :, None], k[:, :, :-1]], axis=2)
    return (1.0 - a) * k + a * previous


def attention(q, k, v, causal=True, key_mask=None):
    """Every key/value head repeated for the query heads that share it; one softmax."""
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    share = array_module(q.data).asarray(np.repeat(np.arange(G), H // G))
    scores = q @ ops.swapaxes(k[:, share], -1, -2) / K ** 0.5
    # Query t stands at position S - T + t, and sees the keys up to there that are not masked.
    allowed = np.tri(T, S, S - T, dtype=bool) if causal else np.ones((T, S), bool)
    allowed = np.broadcast_to(allowed, (B, 1, T, S))
    if key_mask is not None:
        allowed = allowed & to_numpy(key_mask).astype(bool)[:, None, None, :]
    weights = ops.softmax(ops.where(allowed, scores, -1e30))
    return ops.where(allowed.any(axis=-1, keepdims=True), weights @ v[:, share], 0.0)


def token_log_probs(hidden, unembedding, targets):
    return ops.gather(ops.log_softmax(hidden @ unembedding.T), targets)


def sequence_log_probs(log_probs, mask):
    return ops.sum(ops.where(mask, log_probs, 0.0), axis=-1)
