"""Text to token ids and back: byte-pair encoding over bytes.

    ids 0 .. 255         the bytes, so that no text is ever unknown
    256 .. 255 + M       the M merges, each a pair of earlier ids, in the order in which they were learnt
    then                 the special tokens: <pad>, <bos>, <eos>, and whichever others were asked for

Read downwards: `split` cuts text into words, `replace_pair` joins two ids inside a word, `learn_merges`
finds which pairs deserve an id, and `Tokenizer` puts them together.

Sources: Sennrich, Haddow & Birch 2016, arXiv:1508.07909 (byte-pair encoding for text); Radford et al.
2019, "Language Models are Unsupervised Multitask Learners" (GPT-2: over bytes, within words cut out by
a regular expression, the leading space part of the word).
Where we deviate from GPT-2: a number is as many tokens as it has digits; a newline is never merged; an
apostrophe is punctuation like any other.
Checked by tests/test_tokenizer.py against a trainer that recounts every pair at every step.
"""
import json
import re
from collections import Counter, defaultdict
from itertools import islice, pairwise

SPECIALS = ("<pad>", "<bos>", "<eos>")
# `split` decides the ids as much as the merges do: when WORD changes, so must the version here.
FORMAT = "minilm-tokenizer-1"

WORD = re.compile(r"""
      [\r\n]                   # a newline, always alone
    | [ ]? \d                  # one digit
    | [ ]? [^\W\d_]+           # letters
    | [ ]? (?: [^\w\s] | _ )+  # punctuation, symbols, combining marks
    | [^\S\r\n]+ (?!\S)        # blanks, less the one that the next word will carry
    | [^\S\r\n]                # a blank that no word can carry: a tab before a letter
""", re.VERBOSE)


def utf8(text):
    """The bytes of a string. Raises ValueError at a lone surrogate, which has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start]!r}, at index {error.start} of the text, is a lone surrogate: "
                         "it is no character, and has no UTF-8 bytes") from None


def split(text):
    """Cut text into words, inside which merges stay: "a cat, 42" is "a", " cat", ",", " 4", "2".

    The words joined are the text, whatever it holds. A newline is a word, so text may be cut there
    without changing a token: the tokens of a prompt that ends in one are a prefix of the tokens of
    prompt + response. Raises ValueError at a lone surrogate.
    """
    utf8(text)   # for its error
    return WORD.findall(text)


def replace_pair(ids, pair, new_id):
    """Replace each occurrence of the pair by new_id, from the left: (1, 1) in [1, 1, 1] leaves [new_id, 1]."""
    left, right = pair
    replaced = []
    for i in ids:
        if i == right and replaced and replaced[-1] == left:
            replaced[-1] = new_id
        else:
            replaced.append(i)
    return replaced


def learn_merges(word_counts):
    """Yield (pair, count), the most frequent adjacent pair each time, until every word is one id.

    word_counts: {word: how often it occurs}. Of equally frequent pairs the smallest comes first, so
    that the order of the words does not matter. Occurrences may overlap: "aaa" holds two of ("a", "a").

    A merge changes few words, and only their pairs are counted again: that is what makes this fast.
    """
    words = [list(utf8(word)) for word in word_counts]
    frequency = list(word_counts.values())
    counts = Counter()
    words_with = defaultdict(set)   # pair -> indices of the words that hold it, or once did

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
        most = max(counts.values())
        best = min(pair for pair, n in counts.items() if n == most)
        yield best, most
        for w in words_with.pop(best):
            count_out(w)
            words[w] = replace_pair(words[w], best, new_id)
            count_in(w)
        new_id += 1


class Tokenizer:
    """Bytes, merges, special tokens. `Tokenizer()` has no merges: one id a byte.

    merges: pairs of ids, the i-th of which becomes id 256 + i. specials: names, in the order of their
    ids; <pad>, <bos> and <eos> must be among them. Raises ValueError if a merge is not a pair of ids
    that exist by then, or comes twice, and if a special name is missing, empty or comes twice.

    vocab_size       number of ids
    pad, bos, eos    three ids: were pad and eos the same, a mask over the padding would hide the end
                     of the response, and the model would never learn to stop
    merges           {pair: id}, in the order of the ids
    specials         {name: id}, likewise
    tokens           the bytes of ids 0 .. 255 + M, a list
    """

    def __init__(self, merges=(), specials=SPECIALS):
        self.tokens = [bytes([i]) for i in range(256)]
        self.merges = {}
        for new_id, pair in enumerate(merges, start=256):
            if not isinstance(pair, (tuple, list)) or [type(part) for part in pair] != [int, int]:
                raise ValueError(f"merge {new_id - 256} must be a pair of ids, not {pair!r}")
            left, right = pair
            if not (0 <= left < new_id and 0 <= right < new_id):
                raise ValueError(f"merge {new_id - 256}, {left, right}, can only join ids from 0 to {new_id - 1}")
            if (left, right) in self.merges:
                raise ValueError(f"merge {new_id - 256}, {left, right}, comes twice")
            self.merges[left, right] = new_id
            self.tokens.append(self.tokens[left] + self.tokens[right])

        names = list(specials)
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise ValueError(f"special tokens must have distinct names, none of them empty: {names!r}")
        if missing := [name for name in SPECIALS if name not in names]:
            raise ValueError(f"special tokens {names} lack {missing}")
        self.specials = {name: len(self.tokens) + i for i, name in enumerate(names)}
        self.pad, self.bos, self.eos = (self.specials[name] for name in SPECIALS)
        self.vocab_size = len(self.tokens) + len(self.specials)
        self._special_bytes = [utf8(name) for name in names]
        self._ids_of_word = {}   # filled by encode: text repeats its words

    @classmethod
    def train(cls, texts, vocab_size, specials=SPECIALS):
        """Learn the merges from a text, or from an iterable of texts.

        vocab_size counts bytes, merges and special tokens. The tokenizer's own vocab_size is smaller
        when the texts run out of pairs. Raises ValueError if it is too small for bytes and specials.
        """
        room = vocab_size - 256 - len(specials)
        if room < 0:
            raise ValueError(f"vocab_size {vocab_size} is less than 256 bytes and {len(specials)} special tokens")
        word_counts = Counter()
        for text in [texts] if isinstance(texts, str) else texts:
            word_counts.update(split(text))
        merges = [pair for pair, _ in islice(learn_merges(word_counts), room)]
        return cls(merges, specials)

    def encode(self, text):
        """The ids of a text, as a list. Raises ValueError at a lone surrogate.

        Never a special token: no <bos> is put in front, and the text "<eos>" is five characters.
        Whoever assembles a sequence adds the special ids, once, on purpose.
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
            # As in training, the pair learnt first is merged first: the one with the smallest id.
            first = min(known, key=self.merges.get)
            ids = replace_pair(ids, first, self.merges[first])

    def decode(self, ids, specials=False):
        """The text of some ids. Special tokens are left out, or written by name if specials is True.

        Bytes that are not UTF-8 (a model may sample half a character) become U+FFFD.
        Raises ValueError at an id outside the vocabulary.
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

    def to_json(self):
        """The tokenizer as a line of JSON: format, special names, merges as pairs."""
        return json.dumps({"format": FORMAT, "specials": list(self.specials), "merges": list(self.merges)})

    @classmethod
    def from_json(cls, text):
        """The tokenizer that to_json wrote. Raises ValueError, saying what is wrong, if it did not."""
        try:
            saved = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a saved tokenizer is JSON, and this is not: {error}") from None
        found = saved.get("format") if isinstance(saved, dict) else None
        if found != FORMAT:
            raise ValueError(f"a saved tokenizer has format {FORMAT!r}, not {found!r}")
        for key in ("specials", "merges"):
            if not isinstance(saved.get(key), list):
                raise ValueError(f"a saved tokenizer has a list of {key}, not {saved.get(key)!r}")
        return cls(saved["merges"], saved["specials"])
