"""Any tokenizer.json, by the package `tokenizers` (pip install tokenizers). SmolLM2's needs no package: byte_level.py.

Tests: tests/test_chat_tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from minilm.tokenizer import utf8


class PackageTokenizer:
    """The contents of a tokenizer.json as a tokenizer like ByteLevelTokenizer.

    named: tokens that the checkpoint names as its end and the like, which are special even if the file does not say so.
    Raises ValueError for contents that the package refuses, ImportError without the package.
    """

    def __init__(self, contents: str, named: Iterable[str] = ()):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("this tokenizer.json needs the package tokenizers: pip install tokenizers") from error
        self._reader: Any = _of_package(lambda: tokenizers.Tokenizer.from_str(contents))
        self._reader.no_truncation()
        self._reader.no_padding()
        self._reader.add_special_tokens([name for name in named if self._reader.token_to_id(name) is not None])
        added = self._reader.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.vocab_size = 1 + max(self._reader.get_vocab().values(), default=-1)

    def encode(self, text: str) -> list[int]:
        """As ByteLevelTokenizer.encode."""
        return self._ids(text, names_are_text=True)

    def encode_with_specials(self, text: str) -> list[int]:
        """As ByteLevelTokenizer.encode_with_specials."""
        return self._ids(text, names_are_text=False)

    def _ids(self, text, names_are_text):
        utf8(text)              # raises for a lone surrogate
        self._reader.encode_special_tokens = names_are_text
        return _of_package(lambda: self._reader.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """As ByteLevelTokenizer.decode."""
        known = [i for i in ids if 0 <= i < self.vocab_size]
        return _of_package(lambda: self._reader.decode(known, skip_special_tokens=not specials))

    def to_json(self) -> str:
        """The contents of a tokenizer.json."""
        return self._reader.to_str()


def _of_package(call: Callable) -> Any:
    """call(), whose errors become ValueErrors: the package raises Exception, and panics that are none."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"the package tokenizers: {error}") from error
