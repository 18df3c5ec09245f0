"""Any tokenizer.json, by the package `tokenizers` (pip install tokenizers). SmolLM2's needs no package: byte_level.py.

Tests: tests/test_chat_tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minilm.tokenizer import utf8


class PackageTokenizer:
    """The contents of a tokenizer.json as a tokenizer like ByteLevelTokenizer.

    Raises ValueError for contents that the package refuses, ImportError without the package.
    """

    def __init__(self, contents: str):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("this tokenizer.json needs the package tokenizers: pip install tokenizers") from error
        try:
            self._reader: Any = tokenizers.Tokenizer.from_str(contents)
        except Exception as error:      # the package raises nothing more precise
            raise ValueError(str(error)) from error
        self._reader.encode_special_tokens = True       # their names are text
        added = self._reader.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.vocab_size = self._reader.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """As ByteLevelTokenizer.encode."""
        utf8(text)
        return self._reader.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """As ByteLevelTokenizer.decode."""
        return self._reader.decode([i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=not specials)

    def to_json(self) -> str:
        """The contents of a tokenizer.json."""
        return self._reader.to_str()
