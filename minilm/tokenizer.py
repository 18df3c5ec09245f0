"""Text to token ids and back: byte-pair encoding over bytes.

    ids 0 .. 255         the bytes, so that any text has ids
    256 .. 255 + M       the M merges, each a pair of earlier ids, in the order in which they were learned
    the next ids         the special tokens: <pad>, <bos>, <eos>, and others if requested

`split` cuts text into words, `Row` joins two ids inside a word, `learn_merges` finds the pairs that become an id,
`join_pairs` applies them to a word, and `Tokenizer` combines these.

Sources: Sennrich, Haddow & Birch 2016, arXiv:1508.07909 (byte-pair encoding for text); Radford et al.
2019, "Language Models are Unsupervised Multitask Learners" (GPT-2: over bytes, inside words that a regular
expression cuts, with the leading space as part of the word).
Differences from GPT-2: each digit is a token; a newline is never merged; an apostrophe is ordinary punctuation.
Checked by tests/test_tokenizer.py against a trainer that recounts every pair at every step.
"""
import json
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice, pairwise
from operator import index
from typing import Any

from minilm.checks import distinct

SPECIALS = ("<pad>", "<bos>", "<eos>")
# The ids depend on `split` too: if WORD changes, this version must change.
FORMAT = "minilm-tokenizer-1"
LARGEST = 2 ** 24       # bytes of all tokens together. Each merge may double the longest token: fifty would fill a disk

# encode keeps the ids of at most so many words, of at most so many letters each.
CACHED_WORDS = 100_000
CACHED_LETTERS = 50

SEPARATOR = -1          # the id between two words, in training
GONE = -1               # of a position whose id was joined to the one before it

WORD = re.compile(r"""
      [\r\n]                   # a newline, always alone
    | [ ]? \d                  # one digit
    | [ ]? [^\W\d_]+           # letters
    | [ ]? (?: [^\w\s] | _ )+  # punctuation, symbols, combining marks
    | [^\S\r\n]+ (?!\S)        # blanks, without the last one, which belongs to the next word
    | [^\S\r\n]                # a blank that belongs to no word, such as a tab before a letter
""", re.VERBOSE)


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of a string. Raises ValueError for a lone surrogate, which has no bytes, TypeError for no str."""
    if not isinstance(text, str):
        hint = "; decode bytes first" if isinstance(text, bytes) else ""
        raise TypeError(f"a text is a str, not {type(text).__name__}{hint}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start]!r}, at index {error.start} of the text, is a lone surrogate: "
                         "it is not a character, and has no UTF-8 bytes; remove it") from None


def split(text: str) -> list[str]:
    """Cuts text into words: "a cat, 42" is "a", " cat", ",", " 4", "2". No merge crosses a word's boundary.

    The joined words are the text. A newline is a word, so the tokens of a prompt that ends in a newline are a
    prefix of the tokens of prompt + response. Raises ValueError for a lone surrogate.
    """
    utf8(text)   # raises the error
    return WORD.findall(text)


class Row:
    """Ids in a row, in which two neighbours can be joined in constant time: a doubly linked list.

    A position is the place of an id at the start. The joined id keeps the left one's position; the right one's is gone.
    """

    def __init__(self, ids: Iterable[int]):
        self.ids = list(ids)
        self.before = list(range(-1, len(self.ids) - 1))
        self.after = list(range(1, len(self.ids) + 1))

    def pair(self, i: int) -> tuple[int, int] | None:
        """The id at position i and the next one. None at the last id, outside the row, and where i is gone."""
        if i < 0 or self.after[i] in (GONE, len(self.ids)):
            return None
        return self.ids[i], self.ids[self.after[i]]

    def join(self, i: int, new_id: int) -> None:
        """Replaces the pair at position i by new_id."""
        right = self.after[i]
        following = self.after[right]
        self.ids[i] = new_id
        self.after[i] = following
        if following < len(self.ids):
            self.before[following] = i
        self.after[right] = GONE

    def __iter__(self) -> Iterator[int]:
        return (i for i, following in zip(self.ids, self.after) if following != GONE)


def learn_merges(word_counts: Mapping[str, int]) -> Iterator[tuple[tuple[int, int], int]]:
    """Yields (pair, count), the most frequent adjacent pair each time, until every word is one id.

    word_counts: {word: number of occurrences}. Among equally frequent pairs the smallest comes first, so that the
    order of the words does not matter. Occurrences may overlap: "aaa" has two of ("a", "a"), and one is joined, the
    left one.

    A merge visits only the positions of its pair, and counts only their neighbours again. So its time does not depend
    on the lengths of the words.
    """
    row = Row(i for word in word_counts for i in (*utf8(word), SEPARATOR))
    frequency = [count for word, count in word_counts.items() for _ in range(len(utf8(word)) + 1)]
    counts: Counter[tuple[int, int]] = Counter()
    positions = defaultdict(set)   # pair -> where it is, or was before

    def count(i, sign):
        pair = row.pair(i)
        if pair is not None and SEPARATOR not in pair:
            counts[pair] += sign * frequency[i]
            positions[pair].add(i)
            if counts[pair] == 0:
                del counts[pair]

    for i in range(len(row.ids)):
        count(i, +1)
    new_id = 256
    while counts:
        largest = max(counts.values())
        best = min(pair for pair, frequent in counts.items() if frequent == largest)
        yield best, largest
        for i in sorted(positions.pop(best)):
            if row.pair(i) == best:
                for changed in (row.before[i], i, row.after[i]):
                    count(changed, -1)
                row.join(i, new_id)
                for changed in (row.before[i], i):
                    count(changed, +1)
        new_id += 1


def join_pairs(ids: Iterable[int], merges: Mapping[Any, int]) -> list[int]:
    """The ids of a word after all merges, {(id, id): joined id} with the smallest joined id learned first: as in
    training, the pair that was learned first is joined first, from the left."""
    row = Row(ids)
    # A heap of (id of a pair, its position). The pair may be gone when its turn comes.
    waiting = [(merges[pair], i) for i, pair in enumerate(pairwise(row.ids)) if pair in merges]
    heapify(waiting)
    while waiting:
        new_id, i = heappop(waiting)
        if merges.get(row.pair(i)) == new_id:
            row.join(i, new_id)
            for changed in (row.before[i], i):
                if (pair := row.pair(changed)) in merges:
                    heappush(waiting, (merges[pair], changed))
    return list(row)


class Tokenizer:
    """Bytes, merges, special tokens. `Tokenizer()` has no merges: one id for each byte.

    merges: pairs of ids; pair i becomes id 256 + i. specials: names, in the order of their ids; <pad>, <bos> and
    <eos> must be among them. Raises ValueError for a merge that is not a pair of earlier ids, or comes twice, for
    tokens of more than LARGEST bytes in all, and for a special name that is missing, empty, or comes twice.

    vocab_size       number of ids
    pad, bos, eos    three different ids. If pad and eos were the same, a mask over the padding would hide the end
                     of the response, and the model would never learn to stop
    merges           {pair: id}, in the order of the ids
    specials         {name: id}, in the order of the ids
    tokens           the bytes of ids 0 .. 255 + M, a list
    """

    def __init__(self, merges: Iterable[tuple[int, int]] = (), specials: Iterable[str] = SPECIALS):
        self.tokens = [bytes([i]) for i in range(256)]
        self.merges: dict[tuple[int, int], int] = {}
        size = 256
        for new_id, pair in enumerate(merges, start=256):
            if not isinstance(pair, (tuple, list)) or [type(part) for part in pair] != [int, int]:
                raise ValueError(f"merge {new_id - 256} must be a pair of ids, not {reprlib.repr(pair)}")
            left, right = pair
            if not (0 <= left < new_id and 0 <= right < new_id):
                raise ValueError(f"merge {new_id - 256}, {left, right}, can only join ids from 0 to {new_id - 1}")
            if (left, right) in self.merges:
                raise ValueError(f"merge {new_id - 256}, {left, right}, comes twice")
            size += len(self.tokens[left]) + len(self.tokens[right])
            if size > LARGEST:
                raise ValueError(f"the tokens of merges 0 to {new_id - 256} have {size:,} bytes in all; a tokenizer "
                                 f"holds at most {LARGEST:,}")
            self.merges[left, right] = new_id
            self.tokens.append(self.tokens[left] + self.tokens[right])

        names = list(specials)
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise ValueError(f"special tokens must have distinct names, none of them empty: {reprlib.repr(names)}")
        if missing := [name for name in SPECIALS if name not in names]:
            raise ValueError(f"special tokens {reprlib.repr(names)} lack {missing}")
        self.specials = {name: len(self.tokens) + i for i, name in enumerate(names)}
        self.pad, self.bos, self.eos = (self.specials[name] for name in SPECIALS)
        self.vocab_size = len(self.tokens) + len(self.specials)
        self._special_bytes = [utf8(name) for name in names]
        self._ids_of_word: dict[str, list[int]] = {}    # filled by encode, because words repeat in a text

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int, specials: Sequence[str] = SPECIALS) -> "Tokenizer":
        """Learns the merges from a text, or from an iterable of texts.

        vocab_size counts bytes, merges and special tokens. The vocab_size of the result is smaller if the texts have
        too few pairs. Raises ValueError if vocab_size is too small for bytes and special tokens, TypeError if it is no
        integer or a text is no string.
        """
        if isinstance(vocab_size, bool) or not hasattr(vocab_size, "__index__"):
            raise TypeError(f"vocab_size is {vocab_size!r}; it must be an integer")
        max_merges = vocab_size - 256 - len(specials)
        if max_merges < 0:
            raise ValueError(f"vocab_size {vocab_size} is less than 256 bytes and {len(specials)} special tokens")
        word_counts: Counter[str] = Counter()
        for text in [texts] if isinstance(texts, str) else texts:
            word_counts.update(split(text))
        merges = [pair for pair, _ in islice(learn_merges(word_counts), max_merges)]
        return cls(merges, specials)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, as a list. Raises ValueError for a lone surrogate, TypeError for a text that is no str.

        There is no special token among them: no <bos> at the start, and the text "<eos>" is five characters. The
        caller adds special tokens where they belong (data.py).
        """
        ids: list[int] = []
        for word in split(text):
            known = self._ids_of_word.get(word)
            if known is None:
                known = join_pairs(utf8(word), self.merges)
                if len(word) <= CACHED_LETTERS:
                    if len(self._ids_of_word) == CACHED_WORDS:
                        self._ids_of_word.clear()
                    self._ids_of_word[word] = known
            ids += known
        return ids

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """The text of some ids. Special tokens are left out, or written as their names if specials is True.

        Bytes that are not UTF-8 (a model may sample half a character) become U+FFFD. Raises ValueError for an id
        outside the vocabulary, TypeError for ids that are no integers.
        """
        try:
            ids = [index(i) for i in ids]
        except TypeError:
            raise TypeError(f"decode takes the token ids of one text, integers in a list or an array (T,); got "
                            f"{reprlib.repr(ids)}") from None
        parts = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"unknown token: id {i} is outside the vocabulary of {self.vocab_size}")
            if i < len(self.tokens):
                parts.append(self.tokens[i])
            elif specials:
                parts.append(self._special_bytes[i - len(self.tokens)])
        return b"".join(parts).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """The tokenizer as a line of JSON: format, special names, merges as pairs."""
        return json.dumps({"format": FORMAT, "specials": list(self.specials), "merges": list(self.merges)})

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokenizer that to_json wrote. Raises ValueError, with the fault, for any other text."""
        try:
            saved = json.loads(text, object_pairs_hook=distinct)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a saved tokenizer is JSON, and this is not: {error}") from None
        found = saved.get("format") if isinstance(saved, dict) else None
        if found != FORMAT:
            raise ValueError(f"a saved tokenizer has format {FORMAT!r}, not {reprlib.repr(found)}")
        for key in ("specials", "merges"):
            if not isinstance(saved.get(key), list):
                raise ValueError(f"a saved tokenizer has a list of {key}, not {reprlib.repr(saved.get(key))}")
        return cls(saved["merges"], saved["specials"])
