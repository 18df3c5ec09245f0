"""One response, token by token, to a text that grows: for a conversation.

generate draws many responses and returns when all have ended. Here each token is given as soon as it is drawn, and the
keys and values of the text stay in memory: of the next prompt, which continues it, only the new tokens are computed.
Tests: tests/test_stream.py, against generate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from minilm import checks
from minilm.backend import array_module, to_numpy
from minilm.diverged import Diverged, first_bad_parameter
from minilm.fast.cached_decoding import Decoder, forward_cached
from minilm.generate import sample
from minilm.model import Transformer

FIRST_CAPACITY = 256        # tokens


class Text:
    """A text of a model, as tokens, with the cache of their keys and values."""

    def __init__(self, model: Transformer):
        if not model.config.causal:
            raise ValueError("Text: only a causal model generates; this one is bidirectional")
        self.model = model
        self._decoder = Decoder(model)
        self.tokens: list[int] = []
        self._cache = self._empty(FIRST_CAPACITY)

    def become(self, tokens: Sequence[int]) -> np.ndarray:
        """Make this the text, and return the logits (V,) of its next token. Tokens that the new text and the one before
        both begin with are not computed again.

        Raises ValueError for an empty text or one that is longer than the context, IndexError for a token outside the
        vocabulary.
        """
        if not len(tokens):
            raise ValueError("Text.become: a text needs at least one token")
        self.model.checked_tokens(np.reshape(tokens, (1, -1)))
        tokens = list(map(int, tokens))
        same = next((i for i, (old, new) in enumerate(zip(self.tokens, tokens)) if old != new),
                    min(len(self.tokens), len(tokens)))
        self._go_back_to(min(same, len(tokens) - 1))        # the last token is computed in any case
        return self._append(tokens[len(self.tokens):])

    def respond(self, prompt: Sequence[int], max_new_tokens: int, rng: np.random.Generator,
                eos: int | Collection[int] | None, temperature: float = 1.0, top_k: int | None = None,
                top_p: float | None = None) -> Iterator[int]:
        """Draw a response to a prompt, token by token: those of generate(model, [prompt], ...).

        The text becomes prompt and response. A caller may stop early: the text then ends there.
        Raises as generate does, before the first token.
        """
        uniforms = checks.uniforms("respond", rng, (1, max_new_tokens))[0]
        checks.sampling("respond", temperature, top_k, top_p)
        ends = checks.end_tokens("respond", eos, self.model.config.vocab_size)
        context = self.model.config.context
        if len(prompt) + max_new_tokens > context:
            raise ValueError(f"respond: a prompt of {len(prompt)} tokens and {max_new_tokens} new ones do not fit the "
                             f"context of {context}; shorten one of them")
        logits = self.become(prompt)
        return self._respond(logits, uniforms, ends, temperature, top_k, top_p)

    def _respond(self, logits, uniforms, ends, temperature, top_k, top_p):
        xp = array_module(logits)
        token = None
        for i, u in enumerate(uniforms):
            if token is not None:
                logits = self._append([token])
            if not np.isfinite(to_numpy(logits).max()):
                bad = first_bad_parameter(self.model.parameters(), "data") or "the logits themselves"
                raise Diverged(f"respond, token {i + 1}: the logits are NaN or infinite; first bad tensor: {bad}")
            drawn, _, _ = sample(logits[None], xp.asarray([u]), temperature, top_k, top_p)
            token = int(drawn[0])
            yield token
            if ends[token]:
                return

    def _append(self, tokens):
        """The logits (V,) after some more tokens."""
        length = len(self.tokens) + len(tokens)
        if length > self._cache.keys.shape[3]:
            self._cache = self._cache.repeat(np.array([0]), min(2 * length, self.model.config.context))
        hidden = forward_cached(self._decoder, np.array([tokens]), None, self._cache)
        self.tokens += tokens
        return self._decoder.logits(hidden)[0]

    def _go_back_to(self, length):
        """Forget the tokens from this place on. The key before rotation, which key_smear mixes, is not in the cache:
        such a model computes its text again."""
        if length < len(self.tokens) and self.model.config.key_smear:
            length = 0
        self.tokens = self.tokens[:length]
        self._cache.length = length
        if length == 0:
            self._cache = self._empty(self._cache.keys.shape[3])

    def _empty(self, capacity):
        return self._decoder.cache(1, min(capacity, self.model.config.context))
