"""Sampling from a language model: the distribution of the next token, one draw from it, and whole responses.

plain.generate has the same tokens without a cache. The cache of keys and values: fast/cached_decoding.py.
Tests: tests/test_generate.py, tests/test_plain.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from minilm import checks
from minilm.backend import array_module, concatenate, is_cupy, to_numpy
from minilm.diverged import Diverged, first_bad_parameter, first_nonfinite
from minilm.fast.cached_decoding import Decoder, forward_cached
from minilm.fast.workers import parallel_map
from minilm.model import Transformer

# Compact the batch when at most this fraction of its rows is unfinished. Compaction copies the cache.
UNFINISHED = 0.75
# The smallest sum c of probabilities. Below it numbers have fewer bits, and u c may round to c although u < 1.
SMALLEST = 2 * float(np.finfo(float).tiny)
# The host waits for so many tokens of a GPU at a time. Rows that end before the last of them are computed on.
TOKENS_A_READ = 8
# With fewer rows, a product takes hardly less time than with twice as many.
ROWS_PER_WORKER = 4


def distribution(logits: np.ndarray, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None) -> np.ndarray:
    """log-probs (B,V) of the distribution to draw from, -inf on tokens that are cut off.

    The logits are divided by the temperature. Then only the top_k most likely tokens are kept. Of these, the smallest
    set whose probability reaches top_p is kept: the token that crosses top_p belongs to it. Then the probabilities
    are normalised again. Of equally likely tokens those with the smallest ids are kept, so that top_k keeps exactly
    top_k tokens. (Hugging Face's top_k keeps every token that ties with the last one; torch.topk promises no order.)
    Raises TypeError and ValueError for settings out of range (checks.sampling), and for temperature 0.
    Holtzman et al. 2020, arXiv:1904.09751 (top-p).
    """
    xp = array_module(checks.rows("distribution", "logits", logits))
    z = logits - logits.max(axis=-1, keepdims=True)
    if temperature != 1:
        z /= checks.temperature("distribution", temperature)
    if top_k is not None and checks.integer("distribution", "top_k", top_k, at_least=1) < z.shape[-1]:
        z = xp.where(_largest(z, top_k), z, -xp.inf)
    if top_p is not None and checks.number("distribution", "top_p", top_p, above=0, at_most=1) < 1:
        z = xp.where(_nucleus(z, top_p), z, -xp.inf)
    return z - xp.log(xp.exp(z).sum(axis=-1, keepdims=True))


def _nucleus(z, top_p):
    """True on the smallest set of each row of (B,V) that has the probability top_p: of equally likely tokens the first.

    Tokens below (1 - top_p)/V have less than 1 - top_p together, so none of them is in the set: only the others are
    sorted. The factor 1/2 is more than rounding can be.
    """
    xp = array_module(z)
    keep = xp.zeros(z.shape, bool)
    for row, (row_z, p) in enumerate(zip(z, xp.exp(z))):            # p: in proportion to the probabilities
        total = p.sum(dtype="float64")
        likely = xp.flatnonzero(p >= 0.5 * (1 - top_p) / len(p) * total)
        order = likely[xp.argsort(-row_z[likely], kind="stable")]   # not of normalised ones: rounding would tie some
        cumulative = p[order].cumsum(dtype="float64")
        keep[row, order[cumulative - p[order] < top_p * total]] = True
    return keep


def _largest(z, count):
    """True on the `count` largest numbers of each row of (B,V), of equal ones on the first: (B,V)."""
    xp = array_module(z)
    smallest = xp.partition(z, -count, axis=-1)[:, -count, None]
    above = z > smallest
    equal = z == smallest
    return above | (equal & (equal.cumsum(axis=-1) <= count - above.sum(axis=-1, keepdims=True)))


def categorical(p: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds u.  p (B,V), u (B,) -> (B,)

    Raises TypeError for other arrays, ValueError for uniform numbers outside [0,1), and for a row with a probability
    below 0 or NaN, or with a sum that is 0, infinite, or so small that its multiples are not exact.
    """
    total = checks.rows("categorical", "p", p).sum(axis=-1)
    right = (p >= 0).all(axis=-1) & (total.astype("float64") >= SMALLEST) & (total < math.inf)
    if not right.all():
        row = int(right.argmin())
        raise ValueError(f"categorical: row {row} holds {p[row].min()} and sums to {total[row]}; probabilities are at "
                         f"least 0, and their sum is finite and at least {SMALLEST}")
    return _inverse_cdf(p, checks.uniforms("categorical", uniforms, total.shape))


def _inverse_cdf(p, uniforms):
    """categorical without its checks."""
    cumulative = p.cumsum(axis=-1, dtype="float64")
    # Scaled by the total, which rounding leaves a little off 1: u < 1 always finds a token.
    return (cumulative > uniforms[:, None] * cumulative[:, -1:]).argmax(axis=-1)


def entropy(p: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
    """- sum p log p of probabilities (..,V), whose logarithms may be -inf: (..), between 0 and log V."""
    if p.shape != log_probs.shape:
        checks.same_shape("entropy", p=p, log_probs=log_probs)
    xp = array_module(p)
    return -xp.einsum("...v,...v->...", p, xp.maximum(log_probs, xp.finfo(p.dtype).min)).clip(max=0)


def sample(logits: np.ndarray, uniforms: np.ndarray, temperature: float = 1.0, top_k: int | None = None,
           top_p: float | None = None, kernel: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One token for each row of logits (B,V) and uniform numbers (B,): tokens, their log-probs, entropies, each (B,).

    Temperature 0 takes the most likely token, and gives the model's own log-prob of it. Raises TypeError and ValueError
    for settings out of range (checks.sampling), uniform numbers outside [0,1), and a row whose logits hold NaN, +inf or
    only -inf. The kernel gives log-prob NaN for such a row or number, because an error would wait for the GPU.
    """
    if not (kernel and is_cupy(logits)):
        uniforms = checks.draws("sample", logits, uniforms, temperature, top_k, top_p)
    return _draw(logits, uniforms, temperature, top_k, top_p, kernel)


def _draw(logits, uniforms, temperature, top_k, top_p, kernel=True):
    """sample without its checks."""
    xp = array_module(logits)
    if kernel and is_cupy(logits):
        from minilm.kernels import sampling
        return sampling.sample(logits, uniforms, temperature, top_k, top_p)
    scores = distribution(logits, temperature, top_k, top_p) if temperature else distribution(logits)
    p = xp.exp(scores)
    drawn = _inverse_cdf(p, uniforms) if temperature else logits.argmax(axis=-1)
    return drawn, scores[xp.arange(len(drawn)), drawn], entropy(p, scores)


def _on_host(draws):
    """Tokens, log-probs and entropies of several calls of _draw, each (n,B). From a GPU they come in one array, so that
    the host waits once."""
    if not is_cupy(draws[0][0]):
        return [np.stack(x) for x in zip(*draws)]
    xp = array_module(draws[0][0])
    found = concatenate(xp.concatenate(x).astype(np.float64) for x in zip(*draws)).reshape(3, len(draws), -1)
    return found[0].astype(np.int64), found[1], found[2]


@dataclasses.dataclass
class Samples:
    """The responses drawn for B prompts, of R tokens at most, padded on the right.

    tokens     (B,R) integers; the EOS, where one was drawn, is the last real token
    mask       (B,R) 1 on drawn tokens, EOS included, 0 on padding
    log_probs  (B,R) of each token under the distribution it was drawn from (temperature, top-k and top-p applied;
               0 on padding). Greedy decoding is not a draw: there they are the model's log-probs at temperature 1
    entropies  (B,R) of that same distribution, in nats; 0 on padding
    """

    tokens: np.ndarray
    mask: np.ndarray
    log_probs: np.ndarray
    entropies: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.tokens, self.mask, self.log_probs, self.entropies

    def record(self, t: int, rows: np.ndarray, unfinished: np.ndarray, drawn: Sequence[np.ndarray]) -> None:
        """Write token t of the unfinished ones of n rows. drawn: tokens, log-probs and entropies, each (n,)."""
        now = rows[unfinished]
        self.mask[now, t] = 1
        for array, values in zip((self.tokens, self.log_probs, self.entropies), drawn):
            array[now, t] = values[unfinished]

    def until(self, t: int) -> Samples:
        """The first t tokens."""
        return Samples(*(array[:, :t] for array in self.arrays()))

    @classmethod
    def concatenate(cls, pieces: Sequence[tuple[np.ndarray, ...]], order: np.ndarray) -> Samples:
        """The rows of several Samples' arrays(), one after the other, then in this order (B,)."""
        width = max(tokens.shape[1] for tokens, *_ in pieces)
        padded = [[np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in arrays] for arrays in pieces]
        return cls(*(np.concatenate(arrays)[order] for arrays in zip(*padded)))

    def responses(self) -> list[list[int]]:
        """Token lists, without padding."""
        return [row[m > 0].tolist() for row, m in zip(self.tokens, self.mask)]


def generate(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, rng: np.random.Generator,
             eos: int | Collection[int] | None, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, workers: int = 1) -> Samples:
    """Draw a response to each prompt, until EOS or max_new_tokens.

    prompts      B token lists, of any lengths (at least 1), or an array (B,T)
    rng          numpy Generator, from which one uniform number per row and position is drawn up front; or those
                 numbers themselves, (B,max_new_tokens). So a row's response depends neither on when the others end
                 nor on the device
    eos          token id that ends a response, or several of them (a list, tuple, set or array); None: every response
                 has max_new_tokens
    temperature  0 is greedy decoding
    workers      processes that share the rows (fast/workers.py), at most one for each ROWS_PER_WORKER rows; faster
                 where BLAS itself is held to one thread
    Raises TypeError, ValueError or IndexError for an empty prompt, a token or an EOS outside the vocabulary, a prompt
    that does not fit the context with its response, or settings and uniform numbers out of range. Raises Diverged,
    with step, row and tensor, when logits become NaN or infinite.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"generate: model is {checks.shown(model)}; it must be a Transformer")
    checks.sampling("generate", temperature, top_k, top_p)
    ends = checks.end_tokens("generate", eos, model.config.vocab_size)
    prompts = _token_arrays(prompts, model.config.vocab_size)
    _check_settings(model, prompts, max_new_tokens, workers)
    B = len(prompts)
    uniforms = checks.uniforms("generate", to_numpy(rng) if is_cupy(rng) else rng, (B, max_new_tokens))
    decoder = Decoder(model)

    def rows_of(part):
        return _generate(decoder, [prompts[i] for i in part], uniforms[part], ends, temperature, top_k, top_p, part)

    parts = np.array_split(np.arange(B), max(1, min(workers, B // ROWS_PER_WORKER)))
    if len(parts) == 1:
        return rows_of(parts[0])
    return Samples.concatenate(parallel_map(lambda part: rows_of(part).arrays(), parts, workers), np.arange(B))


def _token_arrays(prompts, vocab_size):
    """Token lists, or the rows of an array (B,T), as a list of arrays of integers. Raises as generate does."""
    if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__len__"):
        raise TypeError(f"generate: prompts is {prompts!r}; it must be a list of token lists")
    arrays = [checks.token_ids("generate", f"prompt {i}", to_numpy(prompt) if is_cupy(prompt) else prompt, vocab_size)
              for i, prompt in enumerate(prompts)]
    for i, array in enumerate(arrays):
        if array.ndim != 1:
            raise TypeError(f"generate: prompt {i} has shape {array.shape}; it must be a list of tokens. One prompt "
                            "stands in a list too: [prompt]")
    if not arrays or min(map(len, arrays)) == 0:
        raise ValueError("generate: every prompt needs at least one token (a BOS, say)")
    return [array.astype(np.int64, copy=False) for array in arrays]


def _check_settings(model, prompts, max_new_tokens, workers):
    checks.integer("generate", "max_new_tokens", max_new_tokens, at_least=0)
    checks.integer("generate", "workers", workers, at_least=1)
    if not model.config.causal:
        raise ValueError("generate: only a causal model generates: the hidden states of a bidirectional model change "
                         "with every new token")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > model.config.context:
        raise ValueError(f"generate: a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the context "
                         f"of {model.config.context}; shorten one of them")
    if workers > 1 and is_cupy(next(iter(model.parameters().values())).data):
        raise ValueError(f"generate: {workers} workers are processes that share a CPU's memory; on a GPU, ask for 1")


def _generate(decoder, prompts, uniforms, ends, temperature, top_k, top_p, numbers):
    """generate in one process: prefill each distinct prompt once, then one token per row and step.

    ends (V,): True on the tokens that end a response. numbers (B,): of the rows, for errors.
    """
    xp = decoder.xp
    B, max_new_tokens = uniforms.shape
    at_a_time = 1 if xp is np else TOKENS_A_READ
    hidden, cache, first = _prefill(decoder, prompts, max_new_tokens)
    made = Samples(np.zeros((B, max_new_tokens), np.int64), np.zeros((B, max_new_tokens)),
                   *(np.zeros((B, max_new_tokens), decoder.model.dtype) for _ in range(2)))
    rows = np.arange(B)                     # the rows that are computed,
    unfinished = np.ones(B, bool)           # and which of these have not ended
    last: Any = None                        # their last tokens, on the device of the model
    start = 0
    while start < max_new_tokens and unfinished.any():
        columns = xp.asarray(np.ascontiguousarray(uniforms[rows, start:start + at_a_time].T))
        draws: list = []
        for column in columns:
            if start or draws:
                hidden = forward_cached(decoder, last[:, None], first, cache)
            logits = decoder.logits(hidden)
            draws.append(_draw(logits, column, temperature, top_k, top_p))
            last = draws[-1][0]
        for drawn in zip(*_on_host(draws)):
            wrong = ~np.isfinite(drawn[1]) & unfinished
            if wrong.any():
                row = rows[wrong][0]
                raise _diverged(decoder.model, [*prompts[row], *made.tokens[row, :start]], start, numbers[row])
            made.record(start, rows, unfinished, drawn)
            start += unfinished.any()
            unfinished &= ~ends[drawn[0]]
        if unfinished.any() and unfinished.sum() <= UNFINISHED * len(unfinished):
            stay = xp.asarray(np.flatnonzero(unfinished))
            cache.select(stay)
            first = None if first is None else first[stay]
            last = last[stay]
            rows = rows[unfinished]
            unfinished = unfinished[unfinished]
    return made.until(start)


def _diverged(model, text, t, row):
    """The error of logits that are NaN or infinite after these tokens."""
    bad = first_bad_parameter(model.parameters(), "data") or first_nonfinite(lambda: model(np.array([text])))
    return Diverged(f"generate, step {t + 1}, row {row}: the logits are NaN or infinite; first bad tensor: {bad}")


def _prefill(decoder, prompts, max_new_tokens):
    """The last hidden states (B,D) of the prompts, a cache with capacity for the responses, and the first columns.

    Each distinct prompt is computed once, however many responses to it are drawn. Prompts are padded on the left, so
    that the next token of every row goes to the same column of the cache.
    """
    xp = decoder.xp
    longest = max(map(len, prompts))
    number = {}                                                             # prompt -> its row in `padded`
    places = [number.setdefault(tuple(prompt.tolist()), len(number)) for prompt in prompts]
    padded = np.zeros((len(number), longest), np.int64)
    first = np.zeros(len(number), np.int32)
    for i, prompt in enumerate(number):
        first[i] = longest - len(prompt)
        padded[i, first[i]:] = prompt
    padding = first if first.any() else None
    cache = decoder.cache(len(number), longest)
    hidden = forward_cached(decoder, padded, padding, cache)[xp.asarray(places)]
    cache = cache.repeat(xp.asarray(places), longest + max_new_tokens)
    return hidden, cache, None if padding is None else xp.asarray(first[places])
