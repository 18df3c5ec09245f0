"""Sampling from a language model, one token at a time, with a cache of keys and values."""

import dataclasses
import math

import numpy as np

from minilm import layers, ops
from minilm.fast.workers import parallel_map
from minilm.backend import array_module, is_cupy, to_numpy
from minilm.kernels import sampling


# Rows that have ended leave the batch once no more than this share of it is still going: what stays must be copied.
GOING = 0.75
# With fewer, a product takes hardly less time than with twice as many.
ROWS_A_WORKER = 4


class Cache:
    """The keys and values of every position so far: two arrays (L,B,G,S,K), filled from the left."""

    def __init__(self, config, batch, capacity, xp=np, dtype=np.float32):
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_width)
        self.keys, self.values = xp.empty(shape, dtype), xp.empty(shape, dtype)
        self.last_keys = xp.zeros((config.layers, batch, config.kv_heads, config.head_width), dtype)
        self.length = 0

    def extend(self, layer, k, v):
        """Append k, v (B,G,T,K) of one layer; return all of that layer's, (B,G,length+T,K)."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        if layer == len(self.keys) - 1:
            self.length = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def previous_key(self, layer, k):
        """The last key (B,G,K) of the call before, zeros at the start; remembers the last of k (B,G,T,K)."""
        before = self.last_keys[layer].copy()
        self.last_keys[layer] = k[:, :, -1]
        return before

    def select(self, rows):
        """Drop the batch rows that are not listed."""
        self.keys, self.values, self.last_keys = self.keys[:, rows], self.values[:, rows], self.last_keys[:, rows]

    def repeat(self, rows, capacity):
        """A Cache of `capacity` positions that begins with these rows, some of them more than once."""
        xp, (layers, _, kv_heads, _, width) = array_module(self.keys), self.keys.shape
        other = object.__new__(type(self))
        other.keys, other.values = (xp.empty((layers, len(rows), kv_heads, capacity, width), self.keys.dtype)
                                    for _ in range(2))
        other.keys[:, :, :, :self.length] = self.keys[:, rows, :, :self.length]
        other.values[:, :, :, :self.length] = self.values[:, rows, :, :self.length]
        other.last_keys, other.length = self.last_keys[:, rows], self.length
        return other


@dataclasses.dataclass
class Samples:
    """What was drawn for B prompts, R tokens at most, padded on the right.

    tokens     (B,R) integers; the EOS, where one was drawn, is the last real token
    mask       (B,R) 1 on what was drawn, EOS included, 0 on padding
    log_probs  (B,R) of each token under the distribution it was drawn from (temperature,
               top-k and top-p applied; 0 on padding). Greedy decoding is not a draw from the
               model: there they are the model's own log-probs at temperature 1.
    entropies  (B,R) of that same distribution, in nats; 0 on padding
    """

    tokens: np.ndarray
    mask: np.ndarray
    log_probs: np.ndarray
    entropies: np.ndarray

    def arrays(self):
        return self.tokens, self.mask, self.log_probs, self.entropies

    @classmethod
    def concatenate(cls, pieces, order):
        """The rows of several Samples' arrays(), one after the other, then in this order (B,)."""
        width = max(tokens.shape[1] for tokens, *_ in pieces)
        padded = [[np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in arrays] for arrays in pieces]
        return cls(*(np.concatenate(arrays)[order] for arrays in zip(*padded)))

    def responses(self):
        """A list of token lists, without padding."""
        return [row[m > 0].tolist() for row, m in zip(self.tokens, self.mask)]


def forward_cached(model, tokens, first, cache):
    """The final hidden state (B,D) of the last of tokens (B,T), which go on from what the cache holds.

    first (B,): the position of each row's first real token, after padding; None without any. What Transformer.hidden
    computes, and with the same layers, but on plain arrays and with nothing for a backward: where each row
    adds one token, the tape would take longer than the arithmetic.
    """
    c, (B, T) = model.config, tokens.shape
    p = {name: parameter.data for name, parameter in model.parameters().items()}
    xp, H, HG, start = array_module(p["embedding"]), c.heads, c.heads + c.kv_heads, cache.length
    cos, sin = layers.rope_tables(xp.arange(start, start + T), c.head_width, c.rope_base, model.dtype)
    turn = cos + 1j * sin
    real = None if first is None or T == 1 else xp.arange(start + T) >= first[:, None]

    def norm(x, name):
        return layers.rms_norm.__wrapped__(x, p[name], c.norm_eps)[0]

    x = ops.embed.__wrapped__(p["embedding"], tokens.reshape(-1))[0]        # which refuses what is no token
    for i in range(c.layers):
        block = f"blocks.{i}."
        heads = (norm(x, block + "attention_norm") @ p[block + "qkv"]).reshape(B, T, HG + c.kv_heads, -1).swapaxes(1, 2)
        if c.key_smear:
            k = heads[:, H:HG]                  # (B,G,T,K)
            if real is not None:                # padding is no predecessor: as if nothing stood there
                k = xp.where(real[:, None, start:, None], k, 0)
            heads[:, H:HG] = layers.smear.__wrapped__(k, p[block + "key_smear"], cache.previous_key(i, k))[0]
        q_and_k = layers.rotate(heads[:, :HG], turn, c.rope_pairing)
        q, (keys, values) = q_and_k[:, :H], cache.extend(i, q_and_k[:, H:], heads[:, HG:])
        if T == 1:
            mixed = layers.decode_attention(q[:, :, 0], cache.keys[i], cache.values[i], start + 1, first)
        else:
            mixed = layers.attention.__wrapped__(q, keys, values, True, real)[0].swapaxes(1, 2)
        x += mixed.reshape(B * T, -1) @ p[block + "attention_out"]
        hidden = norm(x, block + "ffn_norm") @ p[block + "gate_up"]
        x += layers.swiglu.__wrapped__(hidden)[0] @ p[block + "ffn_out"]
    return norm(x.reshape(B, T, -1)[:, -1], "final_norm")


def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """log-probs (B,V) of the distribution to draw from, -inf on what is cut off.

    The logits are divided by the temperature; then only the top_k most likely tokens are
    kept; of these the smallest set whose probability reaches top_p (Holtzman et al. 2020,
    arXiv:1904.09751; the token that crosses the line is kept); then renormalised.
    """
    xp = array_module(logits)
    z = logits - logits.max(axis=-1, keepdims=True)
    if temperature != 1:
        z /= temperature
    if top_k is not None and top_k < z.shape[-1]:
        kth = xp.partition(z, -top_k, axis=-1)[:, -top_k, None]
        z = xp.where(z >= kth, z, -xp.inf)
    z -= xp.log(xp.exp(z).sum(axis=-1, keepdims=True))
    if top_p is not None and top_p < 1:
        order = xp.argsort(-z, axis=-1, kind="stable")
        p = xp.exp(xp.take_along_axis(z, order, axis=-1))
        cumulative = p.cumsum(axis=-1, dtype="float64")
        keep = xp.empty(z.shape, bool)
        xp.put_along_axis(keep, order, cumulative - p < top_p * cumulative[:, -1:], axis=-1)
        z = _log_softmax(xp.where(keep, z, -xp.inf))
    return z


def _log_softmax(z):
    xp = array_module(z)
    z = z - z.max(axis=-1, keepdims=True)
    return z - xp.log(xp.exp(z).sum(axis=-1, keepdims=True))


def entropy(p, log_probs):
    """- sum p log p of probabilities (..,V), whose logarithms may be -inf: (..), between 0 and log V."""
    xp = array_module(p)
    return -xp.einsum("...v,...v->...", p, xp.maximum(log_probs, xp.finfo(p.dtype).min)).clip(max=0)


def categorical(p, uniforms):
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u.  p (B,V), u (B,) -> (B,)"""
    cumulative = p.cumsum(axis=-1, dtype="float64")
    # Scaled by the total, which rounding leaves a little off 1: u < 1 always finds a token.
    return (cumulative > uniforms[:, None] * cumulative[:, -1:]).argmax(axis=-1)


def sample(logits, uniforms, temperature=1.0, top_k=None, top_p=None, kernel=True):
    """A token for each row of logits (B,V) and uniform numbers (B,), its log-prob, and the entropy of what it is from.

    Temperature 0 takes the most likely token, and gives the model's own log-prob of it.
    """
    xp = array_module(logits)
    if kernel and is_cupy(logits):
        return sampling.sample(logits, uniforms, temperature, top_k, top_p)
    if temperature == 0:
        scores = _log_softmax(logits)
        p, drawn = xp.exp(scores), logits.argmax(axis=-1)
    else:
        scores = distribution(logits, temperature, top_k, top_p)
        p = xp.exp(scores)
        drawn = categorical(p, uniforms)
    return drawn, scores[xp.arange(len(drawn)), drawn], entropy(p, scores)


def generate(model, prompts, max_new_tokens, rng, eos, temperature=1.0, top_k=None, top_p=None, workers=1):
    """Draw a response to each prompt, until EOS or max_new_tokens.

    prompts      list of B token lists, of any lengths (at least 1)
    rng          numpy Generator, from which one uniform number per row and position is drawn up
                 front, or those numbers themselves, (B,max_new_tokens). So a row's response does
                 not depend on when the others stop, nor on the device
    eos          token id that ends a response; None never ends
    temperature  0 is greedy decoding
    workers      processes that share the rows (fast/workers.py), as far as there are ROWS_A_WORKER for each; it
                 pays where BLAS itself is held to one thread
    Returns Samples. Raises ValueError for an empty prompt, one that does not fit the context
    with its response, or settings out of range.
    """
    if not 0 <= temperature < math.inf or (temperature > 0 and model.dtype.type(temperature) == 0):
        raise ValueError(f"temperature {temperature} must be at least 0, finite, and not vanish in {model.dtype}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"top_k {top_k} must be at least 1, top_p {top_p} in (0, 1]")
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("every prompt needs at least one token (a BOS, say)")
    c = model.config
    if not c.causal:
        raise ValueError("only a causal model generates: what a bidirectional one computed changes with every token")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > c.context:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context "
                         f"of {c.context}; shorten one of them")
    if workers > 1 and is_cupy(model.unembedding.data):
        raise ValueError(f"{workers} workers are processes that share a CPU's memory; on a GPU, ask for 1")
    B = len(prompts)
    uniforms = rng.random((B, max_new_tokens)) if isinstance(rng, np.random.Generator) else to_numpy(rng)
    if uniforms.shape != (B, max_new_tokens):
        raise ValueError(f"uniform numbers of shape {uniforms.shape} for {B} prompts and {max_new_tokens} new tokens")

    def rows_of(part):
        return _generate(model, [prompts[i] for i in part], uniforms[part], eos, temperature, top_k, top_p)

    parts = np.array_split(np.arange(B), max(1, min(workers, B // ROWS_A_WORKER)))
    if len(parts) == 1:
        return rows_of(parts[0])
    return Samples.concatenate(parallel_map(lambda part: rows_of(part).arrays(), parts, workers), np.arange(B))


def _generate(model, prompts, uniforms, eos, temperature, top_k, top_p):
    c, xp, B, max_new_tokens = model.config, array_module(model.unembedding.data), *uniforms.shape
    longest = max(map(len, prompts))
    # Each prompt is read once, however many responses to it are drawn. Padded on the left, so that every
    # row's next token goes into the same column of the cache.
    distinct = {}
    of = [distinct.setdefault(tuple(prompt), len(distinct)) for prompt in prompts]
    padded, first = np.zeros((len(distinct), longest), np.int64), np.zeros(len(distinct), np.int32)
    for i, prompt in enumerate(distinct):
        first[i] = longest - len(prompt)
        padded[i, first[i]:] = prompt
    tokens, mask = np.zeros((B, max_new_tokens), np.int64), np.zeros((B, max_new_tokens))
    log_probs, entropies = (np.zeros((B, max_new_tokens), model.dtype) for _ in range(2))

    first, of = xp.asarray(first) if first.any() else None, xp.asarray(of)
    cache = Cache(c, len(distinct), longest, xp, model.dtype)
    hidden = forward_cached(model, padded, first, cache)[of]
    cache, first = cache.repeat(of, longest + max_new_tokens), None if first is None else first[of]
    rows, going = np.arange(B), np.ones(B, bool)        # those computed, and which of them have not ended
    for t in range(max_new_tokens):
        if t:
            hidden = forward_cached(model, drawn[:, None], first, cache)
        # In this order, and then copied: for a few rows BLAS takes half the time of hidden @ U^T.
        logits = xp.ascontiguousarray((model.unembedding.data @ hidden.T).T)
        draws = sample(logits, xp.asarray(uniforms[rows, t]), temperature, top_k, top_p)
        drawn, of_drawn, of_entropy = map(to_numpy, draws)
        for kept, new in (tokens, drawn), (mask, going), (log_probs, of_drawn), (entropies, of_entropy):
            kept[rows[going], t] = new[going]
        going &= drawn != eos
        if not going.any():
            break
        if going.sum() <= GOING * len(going):
            stay = xp.asarray(np.flatnonzero(going))
            cache.select(stay)
            first = None if first is None else first[stay]
            rows, drawn, going = rows[going], drawn[going], going[going]
    used = t + 1 if max_new_tokens else 0
    return Samples(tokens[:, :used], mask[:, :used], log_probs[:, :used], entropies[:, :used])
