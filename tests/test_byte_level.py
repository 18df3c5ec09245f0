"""minilm/pretrained/byte_level.py: SmolLM2's way of cutting text, against the package `tokenizers`."""
import json
import unicodedata

import pytest
from hypothesis import given, settings, strategies as st

from minilm.pretrained.byte_level import ByteLevelTokenizer, byte_characters
from minilm.pretrained.tokenizers_package import PackageTokenizer

MISSING = {chr(0x04), chr(0x06)}        # bytes without a token, as in SmolLM2


def small_tokenizer():
    """Two special tokens, all bytes but two, and merges, some of them across what looks like a word."""
    characters = byte_characters()
    words = ["Ġt", "he", "Ġthe", "in", "ing", "ĠĠ", "ĠĠĠ", "ll", "'ll", "ab", "aba", "abab", "Ċ", "ĊĊ", "íķ", "íķľ",
             "Ġa", "Ġab", "12", "Ġ1", "!!", "re", "'re"]
    tokens = ["<|endoftext|>", "<|im_end|>"] + [c for b, c in characters.items() if chr(b) not in MISSING]
    merges = []
    for word in words:
        if len(word) > 1:
            left, right = next((word[:i], word[i:]) for i in range(len(word) - 1, 0, -1)
                               if word[:i] in tokens and word[i:] in tokens)
            merges.append((left, right))
            tokens.append(word)
    return ByteLevelTokenizer(tokens, merges, tokens[:2])


TOKENIZER = small_tokenizer()
HARD = ["", " ", "  a", "a  b   c", "it's we'll they're I'M", "12 345 a1b2 ½ ² Ⅷ ٣ 一二",
        "tab\there\r\nnew\n\n\nlines  \n x",
        "한국어 텍스트 123", "👍🏽 e\u0301 नमस्ते", "def f(x):\n    return x**2  # why?", "<|im_end|>", "a\x04b\x06",
        "\x1c\x1d\x1e\x1f\x85\u00a0\u2003\u3000x", "ababab theinging !!!!", "___a_b", "'''", " 's"]


def test_hard_texts_come_back_and_the_name_of_a_special_token_is_text():
    for text in HARD:
        expected = "".join(c for c in text if c not in MISSING)
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == expected
    assert not set(TOKENIZER.encode("<|im_end|>")) & set(TOKENIZER.specials.values())


def test_special_tokens_are_left_out_or_written_and_ids_of_a_padded_vocabulary_have_no_text():
    ids = [0, *TOKENIZER.encode("ab"), 1, TOKENIZER.vocab_size + 5]
    assert TOKENIZER.decode(ids) == "ab"
    assert TOKENIZER.decode(ids, specials=True) == "<|endoftext|>ab<|im_end|>"


def test_half_a_character_is_a_replacement_character():
    assert TOKENIZER.decode(TOKENIZER.encode("é")[:1]) == "\ufffd"


def test_each_digit_is_a_token_and_takes_no_blank():
    names = [TOKENIZER.names[i] for i in TOKENIZER.encode("a 12")]
    assert names == ["a", "Ġ", "1", "2"]


KNOWN = st.characters(exclude_categories=["Cs", "Cn", "Co"])    # assigned ones: tables of Unicode differ in age
TEXTS = st.lists(st.sampled_from([*HARD, " ", "\n", "1", "ab", "'ll", "<|im_end|>"]) | KNOWN, max_size=12).map("".join)


@pytest.mark.parity
@settings(max_examples=300)
@given(TEXTS)
def test_ids_and_texts_are_those_of_the_package_tokenizers(text):
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install tokenizers")
    if any(unicodedata.category(c) == "Cn" for c in text):
        return
    package = PackageTokenizer(TOKENIZER.to_json())
    ids = TOKENIZER.encode(text)
    assert ids == package.encode(text)
    assert TOKENIZER.decode([0, *ids, 1]) == package.decode([0, *ids, 1])
    assert TOKENIZER.decode([0, *ids, 1], specials=True) == package.decode([0, *ids, 1], specials=True)
    assert (package.specials, package.vocab_size) == (TOKENIZER.specials, TOKENIZER.vocab_size)


def test_json_gives_the_tokenizer_back():
    again = ByteLevelTokenizer.from_json(json.loads(TOKENIZER.to_json()))
    assert again.to_json() == TOKENIZER.to_json()
    assert [again.encode(text) for text in HARD] == [TOKENIZER.encode(text) for text in HARD]


@pytest.mark.parametrize("change", [
    lambda saved: saved.update(normalizer={"type": "Lowercase"}),
    lambda saved: saved.update(pre_tokenizer={"type": "ByteLevel"}),
    lambda saved: saved["model"].update(ignore_merges=True),
    lambda saved: saved["added_tokens"][0].update(lstrip=True),
    lambda saved: saved["added_tokens"].append({**saved["added_tokens"][0], "id": 999, "content": "<more>"})])
def test_another_kind_of_tokenizer_is_not_taken_for_this_one(change):
    saved = json.loads(TOKENIZER.to_json())
    change(saved)
    assert ByteLevelTokenizer.from_json(saved) is None


@pytest.mark.parametrize("tokens, merges, specials, message", [
    (["a", "b"], [("a", "b")], [], "the merge of 'a' and 'b' lacks a token"),
    (["a", "b", "ba", "ab"], [("a", "b"), ("b", "a")], [], "not in the order of the merges"),
    (["a", "한"], [], [], "which stands for no byte")])
def test_a_damaged_tokenizer_is_an_error(tokens, merges, specials, message):
    with pytest.raises(ValueError, match=message):
        ByteLevelTokenizer(tokens, merges, specials)


def test_a_lone_surrogate_is_an_error():
    with pytest.raises(ValueError, match="lone surrogate"):
        TOKENIZER.encode("a\ud800")
