"""Decoding with a cache of keys and values: a new token costs one token's work instead of a whole forward.

forward_cached computes the last row of Transformer.hidden, with the same blocks (model.hidden_states), on plain
arrays: with few rows, one token each, records of the calls would take about as long as the arithmetic.
Measured gain over the whole forward for each token (plain.generate): scripts/bench/tricks.py.
Tests: tests/test_generate.py, tests/test_plain.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from minilm import layers, mixed_precision, rotary
from minilm.backend import array_module, is_cupy
from minilm.fast import few_rows
from minilm.model import Config, Transformer, after_blocks, block
from minilm.tensor import arrays_only


class Cache:
    """The keys and values of every position so far, two arrays (L,B,G,S,K) filled from the left.

    last_keys (L,B,G,K): the last key before rotation, for rotary.smear. dtype: uint16 for keys and values of bf16.
    """

    def __init__(self, config: Config, batch: int, capacity: int, xp=np, dtype=np.float32):
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_width)
        self.keys = xp.empty(shape, dtype)
        self.values = xp.empty(shape, dtype)
        self.last_keys = xp.zeros((config.layers, batch, config.kv_heads, config.head_width),
                                  np.float32 if dtype == np.uint16 else dtype)
        self.length = 0
        self._config: Any = config
        self._rotation: Any = None          # of every position, when the first is asked for

    def rotation(self, count: int):
        """exp(i angle) of the next `count` positions, (count,K/2)."""
        if self._rotation is None:
            capacity = array_module(self.keys).arange(self.keys.shape[3])
            cos, sin = rotary.rope_tables(capacity, self._config.head_width, self._config.rope_base,
                                          self.last_keys.dtype)
            self._rotation = cos + 1j * sin
        return self._rotation[self.length:self.length + count]

    def extend(self, layer: int, k, v):
        """Append k, v (B,G,T,K) of one layer; return all of that layer's keys and values, (B,G,length+T,K)."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        if layer == len(self.keys) - 1:
            self.length = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def previous_key(self, layer: int, k):
        """The last key (B,G,K) of the call before, zeros at the start; stores the last of k (B,G,T,K)."""
        before = self.last_keys[layer].copy()
        self.last_keys[layer] = k[:, :, -1]
        return before

    def select(self, rows) -> None:
        """Drop the batch rows that are not listed."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]
        self.last_keys = self.last_keys[:, rows]

    def repeat(self, rows, capacity: int) -> Cache:
        """A Cache of `capacity` positions that starts with these batch rows, some of them more than once."""
        xp = array_module(self.keys)
        L, _, G, _, K = self.keys.shape
        other = object.__new__(type(self))
        other.keys, other.values = (xp.empty((L, len(rows), G, capacity, K), self.keys.dtype) for _ in range(2))
        other.keys[:, :, :, :self.length] = self.keys[:, rows, :, :self.length]
        other.values[:, :, :, :self.length] = self.values[:, rows, :, :self.length]
        other.last_keys = self.last_keys[:, rows]
        other.length = self.length
        other._config = self._config
        other._rotation = None
        return other


class Decoder:
    """A model as it decodes: its weights, merged with their adapters, and rounded once if it computes in bf16.

    Make it when the weights have their values: rounded and merged copies do not change with them.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self.config: Any = model.config
        self.weights = model.decoding_weights()
        self.compute = model.compute
        self.xp = array_module(self.weights["embedding"])

    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty Cache: in mixed precision of bf16, half the bytes that attention reads for each token."""
        dtype = np.uint16 if self.compute == "bfloat16" else self.model.dtype
        return Cache(self.config, batch, capacity, self.xp, dtype)

    def logits(self, hidden) -> np.ndarray:
        """(B,V) of hidden states (B,D)."""
        if self.compute == "float32":
            return few_rows.logits(hidden, self.weights["unembedding"])
        with arrays_only():
            return mixed_precision.logits(hidden, self.weights["unembedding"], self.compute)


def forward_cached(decoder: Decoder, tokens, first, cache: Cache) -> np.ndarray:
    """The final hidden state (B,D) of the last of tokens (B,T), which continue the sequences in the cache.

    tokens: NumPy's, or on the device of the model, so that the host need not know them. They are not checked.
    first (B,): the position of each row's first real token, after padding on the left; None without padding. For one
    token it is on the device of the model, for several NumPy's.
    """
    weights, config = decoder.weights, decoder.config
    T = tokens.shape[1]
    embedded = weights["embedding"][decoder.xp.asarray(tokens.reshape(-1))]
    with arrays_only():             # one row per token: NumPy multiplies matrices faster than stacks of vectors
        if decoder.compute == "bfloat16":
            from minilm.kernels import mixed_decoding
            layer = mixed_decoding.layers_of_new_tokens(config, weights, T, first, cache)
        else:
            attend = attend_to_cache(config, weights, T, first, cache)
            prepared = (few_rows.prepared(weights, tokens.size) if decoder.compute == "float32" else
                        mixed_precision.with_tf32(weights))
            layer = functools.partial(block, prepared, attend=attend, eps=config.norm_eps)
        hidden = after_blocks(weights, config, embedded, layer)
    return hidden.reshape(*tokens.shape, -1)[:, -1]


def attend_to_cache(c, parameters, T: int, first, cache: Cache) -> Callable:
    """attend(layer, qkv) for model.hidden_states: T new tokens of each row attend to the cache and to each other.

    qkv (B T,(H+2G)K) -> (B T,H K); the new keys and values are appended to the cache.
    """
    xp = array_module(parameters["embedding"])
    H, HG = c.heads, c.heads + c.kv_heads
    start = cache.length
    rotation = cache.rotation(T)
    real = None if first is None or T == 1 else np.arange(start + T) >= first[:, None]

    def attend(layer, qkv):
        B = len(qkv) // T
        amount = parameters.get(f"blocks.{layer}.key_smear")
        heads = qkv.reshape(B, T, HG + c.kv_heads, c.head_width).swapaxes(1, 2)             # (B,H+2G,T,K)
        if amount is not None and T == 1 and is_cupy(qkv):
            from minilm.kernels import smear
            smear.smear_next(qkv.reshape(B, HG + c.kv_heads, c.head_width), H, amount, cache.last_keys[layer])
        elif amount is not None:
            k = heads[:, H:HG]
            if real is not None:            # a padding token is no predecessor: its key counts as zero
                k = xp.where(xp.asarray(real[:, None, start:, None]), k, 0)
            heads[:, H:HG] = rotary.smear(k, amount, cache.previous_key(layer, k))
        q_and_k = rotary.rotate(heads[:, :HG], rotation, c.rope_pairing)
        q = q_and_k[:, :H]
        keys, values = cache.extend(layer, q_and_k[:, H:], heads[:, HG:])
        if T == 1:
            mixed = decode_attention(q[:, :, 0], cache.keys[layer], cache.values[layer], start + 1, first)
        else:
            mixed = layers.attention(q, keys, values, causal=True, key_mask=real).swapaxes(1, 2)
        return mixed.reshape(B * T, H * c.head_width)
    return attend


def decode_attention(q, keys, values, length: int, first=None, kernel: bool = True) -> np.ndarray:
    """layers.attention for the last position alone, on arrays, without a gradient.  q (B,H,K) -> (B,H,K)

    keys, values (B,G,capacity,K), `length` positions filled; first (B,): where each row's keys begin, int32, or None.
    """
    xp = array_module(q)
    B, H, K = q.shape
    G = keys.shape[1]
    if kernel and is_cupy(q):
        from minilm.kernels import decode
        return decode.decode(xp.ascontiguousarray(q), keys, values, length, first)
    k, v = keys[:, :, :length], values[:, :, :length]
    E = (q * K ** -0.5).reshape(B, G, H // G, K) @ k.swapaxes(-1, -2)
    if first is not None:
        xp.copyto(E, -xp.inf, where=(xp.arange(length) < first[:, None])[:, None, None, :])
    E -= E.max(axis=-1, keepdims=True)
    xp.exp(E, out=E)
    mixed = E @ v
    mixed /= E.sum(axis=-1, keepdims=True)
    return mixed.reshape(B, H, K)
