"""minilm/tokenizer.py: encoding and decoding, special tokens, and merges equal to those of a naive trainer."""
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minilm import tokenizer as module
from minilm.tokenizer import FORMAT, SPECIALS, Row, Tokenizer, learn_merges, split

TEXT = """The cat sat on the mat; the other cat, she said, didn't.
    3 + 14 = 17, and 1999 is a year.\tFin.

Café naïve, 猫が好き, emoji 👩‍🚀, snake_case.
"""


def naive_merges(word_counts):
    """(every (pair, count) until no pair is left, the words at the end). All pairs are recounted at every step."""
    words = {word: list(word.encode()) for word in word_counts}
    steps = []
    while True:
        counts = Counter()
        for word, ids in words.items():
            for pair in zip(ids, ids[1:]):
                counts[pair] += word_counts[word]
        if not counts:
            return steps, words
        best = sorted(counts, key=lambda pair: (-counts[pair], pair))[0]
        new_id = 256 + len(steps)
        steps.append((best, counts[best]))
        for word, ids in words.items():
            words[word] = replace_pair(ids, best, new_id)


def replace_pair(ids, pair, new_id):
    """Each occurrence of the pair becomes new_id, from the left."""
    i, joined = 0, []
    while i < len(ids):
        match = tuple(ids[i:i + 2]) == pair
        joined.append(new_id if match else ids[i])
        i += 2 if match else 1
    return joined


def naive_ids(tokenizer, word):
    """Of the pairs that are merges, the one that was learned first is replaced everywhere, until none is left."""
    ids = list(word.encode())
    while known := [pair for pair in zip(ids, ids[1:]) if pair in tokenizer.merges]:
        first = min(known, key=tokenizer.merges.get)
        ids = replace_pair(ids, first, tokenizer.merges[first])
    return ids


# From the naive trainer, so that a wrong learn_merges fails only its own tests.
TRAINED = Tokenizer([pair for pair, _ in naive_merges(Counter(split(TEXT)))[0]][:80])

any_text = st.text()
# Arbitrary Unicode seldom has the characters that the rules for cutting are about, so these are drawn more often.
awkward_text = st.text(st.sampled_from("ab1 2\n\r\t_.'<>é\u0301猫٣²\u00a0\u3000\u2028\x1c\x00"), max_size=40)
texts = any_text | awkward_text
# Two letters make repeated pairs ("aaa") and ties.
small_corpora = st.lists(st.text("ab ", max_size=12), max_size=6)


# --- cutting text into words ---

@given(texts)
def test_words_joined_are_the_text(text):
    assert "".join(split(text)) == text


@pytest.mark.parametrize("text, words", [
    ("a cat, 42", ["a", " cat", ",", " 4", "2"]),
    ("3x3=9", ["3", "x", "3", "=", "9"]),
    ("two  spaces", ["two", " ", " spaces"]),
    ("end   ", ["end", "   "]),
    ("a \n  b", ["a", " ", "\n", " ", " b"]),
    ("a\n\nb\r\n", ["a", "\n", "\n", "b", "\r", "\n"]),
    ("\t\tx", ["\t", "\t", "x"]),
    (" ... (yes)", [" ...", " (", "yes", ")"]),
    ("snake_case", ["snake", "_", "case"]),
    ("don't", ["don", "'", "t"]),
    ("", []),
])
def test_words_are_cut_where_documented(text, words):
    assert split(text) == words


@given(texts)
def test_a_digit_is_a_word_with_at_most_a_space_before_it(text):
    for word in split(text):
        if re.search(r"\d", word):
            assert re.fullmatch(r" ?\d", word)


@given(texts)
def test_a_newline_is_a_word_alone(text):
    for word in split(text):
        assert word in ("\n", "\r") or not set(word) & {"\n", "\r"}


# --- encode and decode ---

@given(texts)
def test_decode_undoes_encode(text):
    for tokenizer in (Tokenizer(), TRAINED):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts)
def test_encode_gives_the_same_ids_from_a_warm_cache_as_from_a_cold_one(text):
    cold = Tokenizer(TRAINED.merges)
    assert cold.encode(text) == cold.encode(text) == TRAINED.encode(text)


def test_changing_the_ids_that_encode_returned_does_not_change_the_next_call():
    first = TRAINED.encode("cat")
    expected = list(first)
    first.append(0)
    assert TRAINED.encode("cat") == expected


def test_without_merges_the_ids_are_the_bytes():
    assert Tokenizer().encode("é1\n") == list("é1\n".encode())


@given(texts, texts)
def test_a_prompt_that_ends_in_a_newline_is_a_prefix_of_prompt_and_response(prompt, response):
    prompt += "\n"
    assert TRAINED.encode(prompt + response) == TRAINED.encode(prompt) + TRAINED.encode(response)


def test_merges_never_hold_a_newline_or_a_second_digit():
    tokenizer = Tokenizer.train("12 12 12\n\n\n\n7\n 7\r\n\r\n" * 5, 400)
    assert tokenizer.tokens[256:] == [b" 1", b" 7"]
    assert tokenizer.encode("\n\n") == [10, 10]


@given(st.lists(st.sampled_from(SPECIALS) | awkward_text).map("".join))
def test_encode_never_emits_a_special_token(text):
    tokenizer = Tokenizer.train(["<pad><bos><eos>" * 9], 400)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.specials.values())
    assert tokenizer.decode(ids) == text


def test_encode_adds_no_bos():
    assert Tokenizer().encode("") == []
    assert Tokenizer().encode("a") == [97]


def test_decode_leaves_specials_out_or_names_them():
    t = TRAINED
    ids = [t.bos, *t.encode("cat"), t.eos, t.pad, t.pad]
    assert t.decode(ids) == "cat"
    assert t.decode(ids, specials=True) == "<bos>cat<eos><pad><pad>"


def test_decode_takes_an_array():
    assert TRAINED.decode(np.array(TRAINED.encode(TEXT), dtype=np.int32)) == TEXT


@given(st.lists(st.integers(0, TRAINED.vocab_size - 1)))
def test_decode_accepts_whatever_ids_a_model_samples(ids):
    TRAINED.decode(ids).encode("utf-8")


def test_decode_replaces_bytes_that_are_not_utf8():
    assert Tokenizer().decode([97, 0xC3, 98]) == "a\ufffdb"


@pytest.mark.parametrize("bad", [-1, TRAINED.vocab_size, 10**9])
def test_decode_names_the_id_outside_the_vocabulary(bad):
    with pytest.raises(ValueError, match=rf"id {bad} .* vocabulary of {TRAINED.vocab_size}"):
        TRAINED.decode([97, bad])


@pytest.mark.parametrize("ids", [[[1, 2], [3, 4]], np.array([[1, 2]]), [1.0], np.array([1.5]), ["a"], "abc", 5, None,
                                 [None], [np.array([1])]], ids=str)
def test_decode_refuses_ids_that_are_no_integers_in_words(ids):
    with pytest.raises(TypeError, match=r"decode takes the token ids of one text, integers in a list or an array"):
        TRAINED.decode(ids)


@pytest.mark.parametrize("text", [b"abc", None, 5, ["a"], np.array([1])], ids=str)
@pytest.mark.parametrize("use", [split, TRAINED.encode, lambda text: Tokenizer.train([text], 300)])
def test_a_text_that_is_no_string_is_refused_in_words(use, text):
    with pytest.raises(TypeError, match=f"a text is a str, not {type(text).__name__}"):
        use(text)


def test_a_bytes_text_is_not_read_as_numbers():
    with pytest.raises(TypeError, match="a text is a str, not"):
        Tokenizer.train(b"abc", 300)


@pytest.mark.parametrize("size", [300.0, "300", None, True, np.float64(300)])
def test_a_vocabulary_size_that_is_no_integer_is_refused_in_words(size):
    with pytest.raises(TypeError, match="vocab_size is .*; it must be an integer"):
        Tokenizer.train(TEXT, size)


@pytest.mark.parametrize("use", [split, TRAINED.encode, lambda text: Tokenizer.train([text], 300)])
def test_a_lone_surrogate_is_a_clear_error(use):
    with pytest.raises(ValueError, match=r"'\\ud800', at index 3 of the text, is a lone surrogate"):
        use("ab \ud800c")


# --- ids ---

def test_ids_are_bytes_then_merges_then_specials():
    t = Tokenizer.train(TEXT, 300, specials=(*SPECIALS, "<user>"))
    assert t.vocab_size == 300 and len(t.tokens) == 296
    assert t.tokens[:256] == [bytes([i]) for i in range(256)]
    assert list(t.merges.values()) == list(range(256, 296))
    assert t.specials == {"<pad>": 296, "<bos>": 297, "<eos>": 298, "<user>": 299}
    assert (t.pad, t.bos, t.eos) == (296, 297, 298)


def test_pad_and_eos_are_different_ids():
    assert len({TRAINED.pad, TRAINED.bos, TRAINED.eos}) == 3


# --- training ---

@given(small_corpora | st.lists(texts, max_size=4))
def test_incremental_counts_equal_a_naive_recount(corpus):
    word_counts = Counter(word for text in corpus for word in split(text))
    steps, _ = naive_merges(word_counts)
    assert list(learn_merges(word_counts)) == steps


@given(small_corpora, st.integers(0, 12))
def test_encode_gives_a_training_word_the_ids_that_training_ended_with(corpus, n_merges):
    word_counts = Counter(word for text in corpus for word in split(text))
    tokenizer = Tokenizer.train(corpus, 256 + len(SPECIALS) + n_merges)
    for word in word_counts:
        ids = list(word.encode())
        for pair, new_id in tokenizer.merges.items():
            ids = replace_pair(ids, pair, new_id)
        assert tokenizer.encode(word) == ids
    if len(tokenizer.merges) < n_merges:   # ran out of pairs
        steps, words = naive_merges(word_counts)
        assert list(tokenizer.merges) == [pair for pair, _ in steps]
        assert all(tokenizer.encode(word) == ids for word, ids in words.items())


# Runs of few letters: long words in which pairs overlap and are joined next to each other.
long_words = st.lists(st.text("ab", min_size=1, max_size=60) | st.integers(1, 40).map("ab".__mul__)
                      | st.integers(1, 70).map("a".__mul__), min_size=1, max_size=4)


@given(long_words, st.integers(1, 5))
def test_long_words_are_merged_as_by_a_naive_recount_and_encoded_as_by_replacing_everywhere(words, times):
    word_counts = {word: times + i for i, word in enumerate(words)}
    steps, words_at_the_end = naive_merges(word_counts)
    assert list(learn_merges(word_counts)) == steps
    for count in (0, len(steps) // 2, len(steps)):
        tokenizer = Tokenizer([pair for pair, _ in steps][:count])
        assert all(tokenizer.encode(word) == naive_ids(tokenizer, word) for word in words)
    assert words_at_the_end == {word: tokenizer.encode(word) for word in words}


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 11), max_size=20))
def test_a_row_of_ids_is_the_list_in_which_the_same_neighbours_are_joined(ids, joins):
    row, expected = Row(ids), [[i, id] for i, id in enumerate(ids)]         # position, id
    for step, i in enumerate(joins):
        places = [position for position, _ in expected]
        k = places.index(i) if i in places else None
        right = None if k is None or k + 1 == len(expected) else (expected[k][1], expected[k + 1][1])
        if i < len(ids):
            assert row.pair(i) == right
        if right:
            row.join(i, 10 + step)
            expected[k:k + 2] = [[i, 10 + step]]
    assert list(row) == [id for _, id in expected]
    assert row.pair(-1) is None


def test_the_time_of_training_and_encoding_does_not_depend_on_the_lengths_of_words():
    """Steps counted, not seconds: lines of tokenizer.py, for one word of 4,000 letters and for words of 10 letters."""
    letters = "".join(np.random.default_rng(0).choice(list("acgt"), 4000))
    work = {}
    for name, text in ("one word", letters), ("words", " ".join(letters[i:i + 10] for i in range(0, 4000, 10))):
        lines = Counter()

        def trace(frame, event, _):
            lines["here"] += frame.f_code.co_filename == module.__file__
            return trace
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            Tokenizer.train(text, 256 + 3 + 60).encode(text)
        finally:
            sys.settrace(before)
        work[name] = lines["here"]
    assert work["one word"] < 1.5 * work["words"], work


@pytest.mark.parametrize("text", ["".join(map(chr, range(0x4e00, 0x4e00 + 3000))), "one two three four five " * 5])
def test_the_cache_of_encode_is_bounded_whatever_the_texts(text, monkeypatch):
    monkeypatch.setattr(module, "CACHED_WORDS", 7)
    tokenizer = Tokenizer(TRAINED.merges)
    rng = np.random.default_rng(0)
    for _ in range(50):
        piece = text[:rng.integers(1, len(text))] + str(rng.integers(1000))
        assert tokenizer.encode(piece) == [i for word in split(piece) for i in naive_ids(tokenizer, word)]
        assert len(tokenizer._ids_of_word) <= 7
        assert max(map(len, tokenizer._ids_of_word)) <= module.CACHED_LETTERS


def test_ties_go_to_the_smallest_pair_of_ids():
    assert [pair for pair, _ in learn_merges({"zy": 2, "ba": 2, "bc": 2})] == [(98, 97), (98, 99), (122, 121)]


def test_overlapping_pairs_are_merged_from_the_left():
    assert list(learn_merges({"aaa": 1})) == [((97, 97), 2), ((256, 97), 1)]


@given(st.permutations(TEXT.split("\n")))
def test_training_does_not_depend_on_the_order_of_the_texts(lines):
    assert Tokenizer.train(lines, 300).to_json() == Tokenizer.train(TEXT.split("\n"), 300).to_json()


def test_a_text_and_an_iterable_of_it_train_the_same():
    assert Tokenizer.train(TEXT, 300).to_json() == Tokenizer.train(iter([TEXT]), 300).to_json()


def test_training_stops_early_when_the_texts_run_out_of_pairs():
    tokenizer = Tokenizer.train("ab ab", 1000)
    assert tokenizer.tokens[256:] == [b"ab", b" ab"]
    assert tokenizer.vocab_size == 256 + 2 + 3
    assert Tokenizer.train([], 1000).vocab_size == 256 + 3


def test_a_vocabulary_smaller_than_bytes_and_specials_is_an_error():
    assert Tokenizer.train(TEXT, 259).merges == {}
    with pytest.raises(ValueError, match="vocab_size 258 is less than 256 bytes and 3 special"):
        Tokenizer.train(TEXT, 258)


# --- saving ---

@given(small_corpora, texts, st.lists(st.text(min_size=1).filter(lambda name: name not in SPECIALS), unique=True))
def test_a_tokenizer_read_back_encodes_and_decodes_the_same(corpus, text, names):
    saved = Tokenizer.train(corpus, 300, specials=(*names, *SPECIALS))
    read = Tokenizer.from_json(saved.to_json())
    assert read.to_json() == saved.to_json()
    assert (read.pad, read.bos, read.eos, read.specials) == (saved.pad, saved.bos, saved.eos, saved.specials)
    ids = [read.bos, *read.encode(text), read.eos]
    assert ids == [saved.bos, *saved.encode(text), saved.eos]
    assert read.decode(ids, specials=True) == saved.decode(ids, specials=True) == f"<bos>{text}<eos>"


def saved_with(**changes):
    return json.dumps(json.loads(Tokenizer([(97, 98)]).to_json()) | changes)


@pytest.mark.parametrize("text, complaint", [
    ("<merges>", "JSON, and this is not"),
    pytest.param("[" * 100_000, "JSON, and this is not", id="nested too deeply"),
    ("[]", "format"),
    ("{}", "format 'minilm-tokenizer-1', not None"),
    (saved_with(format="minilm-tokenizer-2"), "not 'minilm-tokenizer-2'"),
    (saved_with(specials="<pad>"), "list of specials, not '<pad>'"),
    (saved_with(specials=[*SPECIALS, 1]), "must have distinct names"),
    (saved_with(specials=["<pad>", "<bos>"]), "lack ['<eos>']"),
    (saved_with(specials=[*SPECIALS, "<eos>"]), "distinct"),
    (saved_with(specials=[*SPECIALS, ""]), "empty"),
    (saved_with(specials=[*SPECIALS, "\ud800"]), "lone surrogate"),
    (saved_with(merges=None), "list of merges, not None"),
    (saved_with(merges=[7]), "merge 0 must be a pair of ids, not 7"),
    (saved_with(merges=[[1, 2, 3]]), "merge 0 must be a pair of ids"),
    (saved_with(merges=[[97, 98], [97, 98.0]]), "merge 1 must be a pair of ids"),
    (saved_with(merges=[[97, True]]), "merge 0 must be a pair of ids"),
    (saved_with(merges=[[97, 98], [97, 257]]), "merge 1, (97, 257), can only join ids from 0 to 256"),
    (saved_with(merges=[[-1, 98]]), "can only join ids from 0 to 255"),
    (saved_with(merges=[[97, 98], [97, 98]]), "merge 1, (97, 98), comes twice"),
    (json.dumps({"format": FORMAT, "specials": list(SPECIALS)}), "list of merges, not None"),
])
def test_from_json_names_the_fault(text, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        Tokenizer.from_json(text)


json_values = st.recursive(st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=3),
                           lambda inner: st.lists(inner, max_size=3), max_leaves=6)


@given(json_values, json_values)
def test_from_json_raises_only_value_errors(specials, merges):
    for text in (saved_with(specials=specials), saved_with(merges=merges), json.dumps(specials)):
        try:
            Tokenizer.from_json(text)
        except ValueError:
            pass
