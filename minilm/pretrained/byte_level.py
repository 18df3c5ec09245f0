"""The tokenizer of SmolLM2: byte-pair encoding over bytes, with the tokens and merges of a file.

It is the one of GPT-2 (Radford et al. 2019), with each digit alone. In the file each byte is written as one printable
character; a token is a string of these. Text is cut at digits, then into words by GPT-2's regular expression; inside a
word the pair that was learned first is joined first (tokenizer.join_pairs).
Standard library alone. Tests: tests/test_byte_level.py, against the package `tokenizers`.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from minilm.tokenizer import join_pairs, utf8

# The parts of a tokenizer.json (of the package tokenizers) that say how text is cut and joined; as in SmolLM2's.
KIND = {"normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}
MODEL = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
         "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
CACHED_WORDS = 100_000
# What \s is in the regular expressions of `tokenizers`. Python's has four control characters more.
SPACE = r" \t\n\r\x0b\x0c\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def byte_characters() -> dict[int, str]:
    """{byte: the character that stands for it}: the byte's own if that can be printed, or the next one from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@functools.cache
def words_and_digits() -> tuple[re.Pattern, re.Pattern]:
    """GPT-2's regular expression for words, and one for a digit, in which L and N are Unicode's letters and numbers."""
    classes: dict[str, list[str]] = {"L": [], "N": []}
    for major, run in groupby(range(sys.maxunicode + 1), key=lambda i: unicodedata.category(chr(i))[0]):
        if major in classes:
            first, *_, last = [*run] * 2
            classes[major].append(f"{re.escape(chr(first))}-{re.escape(chr(last))}")
    L, N = ("".join(classes[major]) for major in "LN")
    words = f"'(?:s|t|re|ve|m|ll|d)| ?[{L}]+| ?[{N}]+| ?[^{SPACE}{L}{N}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
    return re.compile(words), re.compile(f"([{N}])")


class ByteLevelTokenizer:
    """tokens: the strings of ids 0, 1, ...; merges: pairs of tokens, in the order in which they were learned; specials:
    tokens that stand for no text.

    Raises ValueError for a merge without a token, or whose ids are not in the order of the merges.
    A byte without a token is left out, as `tokenizers` does (21 control characters have none in SmolLM2).
    """

    def __init__(self, tokens: Sequence[str], merges: Iterable[Sequence[str]], specials: Iterable[str]):
        ids = {token: i for i, token in enumerate(tokens)}
        characters = byte_characters()
        byte_of = {character: byte for byte, character in characters.items()}
        self.specials = {name: ids[name] for name in specials}
        self.vocab_size = len(tokens)
        self.names = list(tokens)
        self.merges: dict[tuple[int, int], int] = {}
        for left, right in merges:
            if not {left, right, left + right} <= ids.keys():
                raise ValueError(f"the merge of {left!r} and {right!r} lacks a token")
            self.merges[ids[left], ids[right]] = ids[left + right]
        if list(self.merges.values()) != sorted(set(self.merges.values())):
            raise ValueError("the ids of the merged tokens are not in the order of the merges")
        self._byte_ids = [ids.get(characters[byte]) for byte in range(256)]
        if unknown := set("".join(name for name in tokens if name not in self.specials)) - byte_of.keys():
            raise ValueError(f"a token holds {min(unknown)!r}, which stands for no byte")
        self._bytes = [b"" if name in self.specials else bytes(byte_of[c] for c in name) for name in tokens]
        self._ids_of_word: dict[str, list[int]] = {}
        self._special = re.compile("|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """The ids of a text. The name of a special token in it is text. Raises as Tokenizer.encode."""
        words, digits = words_and_digits()
        utf8(text)              # raises for a lone surrogate
        ids: list[int] = []
        for piece in digits.split(text):
            for word in words.findall(piece):
                known = self._ids_of_word.get(word)
                if known is None:
                    if len(self._ids_of_word) == CACHED_WORDS:
                        self._ids_of_word.clear()
                    known = self._ids_of_word[word] = self._encode_word(word)
                ids += known
        return ids

    def encode_with_specials(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens are these tokens."""
        ids: list[int] = []
        start = 0
        for found in self._special.finditer(text):
            ids += [*self.encode(text[start:found.start()]), self.specials[found[0]]]
            start = found.end()
        return ids + self.encode(text[start:])

    def _encode_word(self, word):
        found = (self._byte_ids[byte] for byte in utf8(word))
        return join_pairs([i for i in found if i is not None], self.merges)

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """The text of some ids. Special tokens are left out, or written as their names if specials is True. Ids from
        vocab_size on, with which some models pad their vocabulary, have no text."""
        known = [i for i in ids if 0 <= i < self.vocab_size]
        parts = [utf8(self.names[i]) if specials and self.names[i] in self.specials else self._bytes[i] for i in known]
        return b"".join(parts).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json of the package tokenizers."""
        ids = {name: i for i, name in enumerate(self.names)}
        merges = [f"{self.names[left]} {self.names[right]}" for left, right in self.merges]
        return json.dumps({"version": "1.0", "truncation": None, "padding": None,
                           "added_tokens": [{"id": i, "content": name, **ADDED} for name, i in self.specials.items()],
                           **KIND, "post_processor": None, "model": {**MODEL, "vocab": ids, "merges": merges}})

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> ByteLevelTokenizer | None:
        """The tokenizer in the contents of a tokenizer.json; None if it is of another kind. Raises ValueError,
        KeyError, TypeError or AttributeError for a damaged one."""
        model, added = saved["model"], saved["added_tokens"]
        vocabulary = model["vocab"]
        same = all(saved[key] == value for key, value in KIND.items()) and all(
            model.get(key) == value for key, value in MODEL.items()) and all(
            {**token, **ADDED} == token and vocabulary.get(token["content"]) == token["id"] for token in added)
        if not same:
            return None
        tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        joined = [vocabulary["".join(merge)] for merge in merges]
        if [vocabulary[token] for token in tokens] != list(range(len(tokens))) or joined != sorted(set(joined)):
            return None
        return cls(tokens, merges, [token["content"] for token in added])
