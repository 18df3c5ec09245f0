"""Text to token ids and back: byte-pair encoding over bytes.

    ids 0 .. 255         the bytes, so that any text has ids
    256 .. 255 + M       the M merges, each a pair of earlier ids, in the order in which they were learned
    the next ids         the special tokens: <pad>, <bos>, <eos>, and others if requested

`split` cuts text into words, `replace_pair` joins two ids inside a word, `learn_merges` finds the pairs that become
an id, and `Tokenizer` combines them.

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
from itertools import islice, pairwise

SPECIALS = ("<pad>", "<bos>", "<eos>")
# The ids depend on `split` too: if WORD changes, this version must change.
FORMAT = "minilm-tokenizer-1"
LARGEST = 2 ** 24       # bytes of all tokens together. Each merge may double the longest token: fifty would fill a disk

WORD = re.compile(r"""
      [\r\n]                   # a newline, always alone
    | [ ]? \d                  # one digit
    | [ ]? [^\W\d_]+           # letters
    | [ ]? (?: [^\w\s] | _ )+  # punctuation, symbols, combining marks
    | [^\S\r\n]+ (?!\S)        # blanks, without the last one, which belongs to the next word
    | [^\S\r\n]                # a blank that belongs to no word, such as a tab before a letter
""", re.VERBOSE)


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of a string. Raises ValueError for a lone surrogate, which has no bytes."""
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


def replace_pair(ids: Iterable[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replaces each occurrence of the pair by new_id, from the left: (1, 1) in [1, 1, 1] gives [new_id, 1]."""
    left, right = pair
    replaced = []
    for i in ids:
        if i == right and replaced and replaced[-1] == left:
            replaced[-1] = new_id
        else:
            replaced.append(i)
    return replaced


def learn_merges(word_counts: Mapping[str, int]) -> Iterator[tuple[tuple[int, int], int]]:
    """Yields (pair, count), the most frequent adjacent pair each time, until every word is one id.

    word_counts: {word: number of occurrences}. Among equally frequent pairs the smallest comes first, so that the
    order of the words does not matter. Occurrences may overlap: "aaa" has two of ("a", "a").

    A merge changes few words. Only the pairs of these words are counted again, which makes this fast.
    """
    words = [list(utf8(word)) for word in word_counts]
    frequency = list(word_counts.values())
    counts = Counter()
    words_with = defaultdict(set)   # pair -> indices of the words that have it, or had it before

    def count_in(w):
        for pair in pairwise(words[w]):
            counts[pair] += frequency[w]
            words_with[pair].add(w)

    def count_out(w):
        for pair in pairwise(words[w]):
            counts[pair] -= frequency[w]
            if counts[pair] == 0:
                del counts[pair]

    for w in range(len(words)):
        count_in(w)
    new_id = 256
    while counts:
        largest = max(counts.values())
        best = min(pair for pair, count in counts.items() if count == largest)
        yield best, largest
        for w in words_with.pop(best):
            count_out(w)
            words[w] = replace_pair(words[w], best, new_id)
            count_in(w)
        new_id += 1


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
        self.merges = {}
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
        self._ids_of_word = {}   # filled by encode, because words repeat in a text

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int, specials: Sequence[str] = SPECIALS) -> "Tokenizer":
        """Learns the merges from a text, or from an iterable of texts.

        vocab_size counts bytes, merges and special tokens. The vocab_size of the result is smaller if the texts have
        too few pairs. Raises ValueError if vocab_size is too small for bytes and special tokens.
        """
        max_merges = vocab_size - 256 - len(specials)
        if max_merges < 0:
            raise ValueError(f"vocab_size {vocab_size} is less than 256 bytes and {len(specials)} special tokens")
        word_counts = Counter()
        for text in [texts] if isinstance(texts, str) else texts:
            word_counts.update(split(text))
        merges = [pair for pair, _ in islice(learn_merges(word_counts), max_merges)]
        return cls(merges, specials)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, as a list. Raises ValueError for a lone surrogate.

        There is no special token among them: no <bos> at the start, and the text "<eos>" is five characters. The
        caller adds special tokens where they belong (data.py).
        """
        ids = []
        for word in split(text):
            if word not in self._ids_of_word:
                self._ids_of_word[word] = self._encode_word(word)
            ids += self._ids_of_word[word]
        return ids

    def _encode_word(self, word):
        ids = list(utf8(word))
        while True:
            known = [pair for pair in pairwise(ids) if pair in self.merges]
            if not known:
                return ids
            # As in training, the pair that was learned first is merged first: the pair with the smallest id.
            first = min(known, key=self.merges.get)
            ids = replace_pair(ids, first, self.merges[first])

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """The text of some ids. Special tokens are left out, or written as their names if specials is True.

        Bytes that are not UTF-8 (a model may sample half a character) become U+FFFD. Raises ValueError for an id
        outside the vocabulary.
        """
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
            saved = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a saved tokenizer is JSON, and this is not: {error}") from None
        found = saved.get("format") if isinstance(saved, dict) else None
        if found != FORMAT:
            raise ValueError(f"a saved tokenizer has format {FORMAT!r}, not {reprlib.repr(found)}")
        for key in ("specials", "merges"):
            if not isinstance(saved.get(key), list):
                raise ValueError(f"a saved tokenizer has a list of {key}, not {reprlib.repr(saved.get(key))}")
        return cls(saved["merges"], saved["specials"])
