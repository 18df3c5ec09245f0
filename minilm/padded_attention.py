"""Attention of a padded rectangle of sequences, by the layers of layers.py one by one: padding, encoders.

Tests: tests/test_model.py, tests/test_plain.py.
"""

from __future__ import annotations

from collections.abc import Callable

from minilm import layers, ops, rotary
from minilm.backend import array_module


def attend_to_padded(config, parameters, T: int, key_mask) -> Callable:
    """attend(i, qkv) for model.hidden_states, of B sequences of T tokens: qkv (B,T,(H+2G)K) -> (B,T,H K)

    key_mask (B,T): 0 on padding, or None; NumPy's, so that no kernel waits for it.
    """
    c = config
    xp = array_module(parameters["embedding"].data)
    cos, sin = rotary.rope_tables(xp.arange(T), c.head_width, c.rope_base, parameters["embedding"].dtype)

    def attend(i, qkv):
        B = len(qkv)
        heads = ops.transpose(qkv.reshape(B, T, c.heads + 2 * c.kv_heads, c.head_width), axes=(0, 2, 1, 3))
        q = heads[:, :c.heads]                                                                      # (B,H,T,K)
        k = heads[:, c.heads:c.heads + c.kv_heads]                                                  # (B,G,T,K)
        v = heads[:, c.heads + c.kv_heads:]
        if c.key_smear:
            k = _smeared(k, parameters[f"blocks.{i}.key_smear"], key_mask)
        q = rotary.rope(q, cos, sin, pairing=c.rope_pairing)
        k = rotary.rope(k, cos, sin, pairing=c.rope_pairing)
        mixed = layers.attention(q, k, v, causal=c.causal, key_mask=key_mask)                       # (B,H,T,K)
        return ops.transpose(mixed, axes=(0, 2, 1, 3)).reshape(B, T, c.heads * c.head_width)
    return attend


def _smeared(k, amount, key_mask):
    xp = array_module(k.data)
    B, G, _, K = k.shape
    if key_mask is not None:              # a padding token is no predecessor: its key counts as zero
        k = ops.where(xp.asarray(key_mask)[:, None, :, None].astype(bool), k, 0.0)
    return rotary.smear(k, amount, xp.zeros((B, G, K), k.dtype))
