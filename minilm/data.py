"""From text to arrays: dialogues, batches, and windows of a stream of documents.

A dialogue in tokens is

    <bos> User: What is 2 + 3?\\nAssistant:  |  The answer is 5. <eos>
    prompt, mask 0                          |  response, mask 1

There is exactly one BOS. The EOS belongs to the response, and the model learns it like any other token. Padding is a
token of its own, so that no EOS is masked with the padding.

Checked by tests/test_data.py.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from minilm import checks
from minilm.tokenizer import Tokenizer

# A line that begins like this is a turn of the dialogue to a model.
TURN = re.compile(r"(?<=[\r\n])(?=(User|Assistant):)")
# The size of a vocabulary that is not known.
ANY_TOKEN = 2 ** 63


def prompt_text(question: str) -> str:
    """The text of a prompt: the question, and the start of the assistant's turn.

    Raises ValueError for a question with a line that begins with "User:" or "Assistant:". The model would read it as a
    turn of the dialogue, and take for its own answer what the user wrote. escape_turns(question) is accepted.
    """
    if found := TURN.search(check_text("question", question)):
        raise ValueError(f"the question has a line, at index {found.start()}, that begins with '{found[1]}:', which "
                         "the model would read as a turn of the dialogue; change it, or use data.escape_turns")
    return f"User: {question}\nAssistant:"


def escape_turns(text: str) -> str:
    """The text with a blank before each "User:" and "Assistant:" at the start of a line, where they begin a turn."""
    return TURN.sub(" ", check_text("text", text))


def check_text(name: str, text: str) -> str:
    """The text. Raises TypeError for anything but a string: an f-string would write b'..' or None into a prompt."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is {text!r} ({type(text).__name__}); it must be a string")
    return text


def encode_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """The prompt of a question as token ids: <bos> and prompt_text."""
    return [tokenizer.bos] + tokenizer.encode(prompt_text(question))


def encode_response(tokenizer: Tokenizer, response: str) -> list[int]:
    """A response as token ids: a leading space, the text, <eos>. decode_response undoes it.

    An empty response is a space and <eos>: a model trained on it learns to answer with nothing.
    """
    return tokenizer.encode(" " + check_text("response", response)) + [tokenizer.eos]


def decode_response(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text of a response, without special tokens and without the one space that encode_response puts before it."""
    return tokenizer.decode(tokens).removeprefix(" ")


def encode_dialogue(tokenizer: Tokenizer, question: str, response: str) -> tuple[list[int], list[int]]:
    """(prompt, response), two lists of token ids. Joined, they are the tokens of the joined text.

    Raises ValueError if they are not: a merge across the boundary would train the model on tokens that it
    never sees when it answers.
    """
    prompt = encode_prompt(tokenizer, question)
    answer = encode_response(tokenizer, response)
    whole = tokenizer.encode(prompt_text(question) + " " + response)
    if prompt[1:] + answer[:-1] != whole:
        raise ValueError(f"the tokens of the prompt {question!r} are no prefix of the tokens of prompt and response; "
                         "end the prompt where the tokenizer splits words")
    return prompt, answer


def check_dialogues(function: str, vocab_size: int, context: int | None, prompts: Sequence, *, new_tokens: int = 0,
                    **responses: Sequence) -> None:
    """Checks every example of a data set: prompts, and their responses, chosen and rejected responses, ... by name.

    All must be as many, at least one. Every prompt and response needs at least one token of the vocabulary, and a
    prompt with its response (or with new_tokens to sample) must fit the context. Raises ValueError, TypeError and
    IndexError that name the first bad example by its place in the data set, and say how many more are bad.
    """
    data = {"prompts": prompts, **responses}
    for name, side in data.items():
        if isinstance(side, (str, bytes)) or not hasattr(side, "__getitem__") or hasattr(side, "keys"):    # i: a label
            raise TypeError(f"{function}: {name} is {checks.shown(side)}; it must be a list of token lists")
    counts = [len(side) for side in data.values()]
    if len(set(counts)) > 1 or counts[0] == 0:
        raise ValueError(f"{function}: {', '.join(f'{n} {name}' for n, name in zip(counts, data))}; there must be as "
                         "many of each, and at least one")
    found = (_error_in(function, i, dict(zip(data, example)), vocab_size, context, new_tokens)
             for i, example in enumerate(zip(*data.values())))
    if errors := [error for error in found if error]:
        more = f" ({len(errors) - 1} more of the {counts[0]} dialogues are bad)" if len(errors) > 1 else ""
        raise type(errors[0])(f"{errors[0]}{more}")


def _error_in(function, i, example, vocab_size, context, new_tokens):
    """The first error of example i, {name: tokens}, or None."""
    try:
        for name, tokens in example.items():
            if type(tokens) is list and set(map(type, tokens)) == {int}:    # most examples: fast
                if 0 <= min(tokens) and max(tokens) < vocab_size:
                    continue
            where = f"dialogue {i}, {name}[{i}]"
            axes = checks.token_ids(function, where, tokens, vocab_size).ndim
            if axes != 1 or len(tokens) == 0:
                kind = ValueError if axes == 1 else TypeError
                raise kind(f"{function}: {where}, is {checks.shown(tokens)}; it must be a list of at least one token "
                           "id")
        prompt, *lengths = map(len, example.values())
        longest = max(lengths, default=new_tokens)
        if context is not None and prompt + longest > context:
            raise ValueError(f"{function}: dialogue {i} has {prompt} + {longest} tokens and the context is {context}; "
                             "shorten it, or use a model with a longer context")
    except (TypeError, ValueError, IndexError) as error:                    # NumPy's of a ragged list names no place
        return error if str(error).startswith(function) else type(error)(f"{function}: dialogue {i}: {error}")


@dataclasses.dataclass
class Batch:
    """Sequences padded to one length.

    tokens  (B,T)
    mask    (B,T) 1 on response tokens, EOS included
    real    (B,T) 1 on every token that is not padding

    The targets of tokens[:, :-1] are tokens[:, 1:]; mask[:, 1:] marks the targets that count in a loss.
    """

    tokens: np.ndarray
    mask: np.ndarray
    real: np.ndarray

    @property
    def target_mask(self) -> np.ndarray:
        """(B,T-1): the mask for model.log_probs(tokens)."""
        return self.mask[:, 1:]


def make_batch(prompts: Sequence[list[int]], responses: Sequence[list[int]], pad: int,
               context: int | None = None) -> Batch:
    """Token lists as a Batch, padded on the right to the longest dialogue.

    Raises ValueError, TypeError and IndexError as check_dialogues does; a token is any integer from 0 on.
    """
    check_dialogues("make_batch", ANY_TOKEN, context, prompts, responses=responses)
    checks.integer("make_batch", "pad", pad, at_least=0)
    T = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses))
    tokens = np.full((len(prompts), T), pad, np.int64)
    mask = np.zeros(tokens.shape)
    real = np.zeros(tokens.shape)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        start = len(prompt)
        end = start + len(response)
        tokens[i, :end] = [*prompt, *response]
        mask[i, start:end] = 1
        real[i, :end] = 1
    return Batch(tokens, mask, real)


def make_stream(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """Documents joined into one array of tokens (N,), each between a <bos> and an <eos>.

    Raises TypeError for a string in place of the documents: each of its letters would be one.
    """
    if isinstance(documents, (str, bytes)):
        raise TypeError(f"make_stream: documents is a {type(documents).__name__}; give a list of texts: [text]")
    tokens = []
    for document in documents:
        tokens += [tokenizer.bos, *tokenizer.encode(document), tokenizer.eos]
    return np.array(tokens, np.int32)


def windows(stream: np.ndarray, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """`count` random windows of the stream: (count,length) tokens.

    Raises ValueError if the stream is shorter than a window, or no array (N,) of integers.
    """
    checks.generator("windows", rng)
    checks.integer("windows", "count", count, at_least=0)
    checks.integer("windows", "length", length, at_least=1)
    stream = np.asarray(stream)
    if stream.ndim != 1 or stream.dtype.kind not in "iu":
        raise ValueError(f"windows: stream is {stream.dtype} {stream.shape}; it must be token ids (N,)")
    if len(stream) < length:
        raise ValueError(f"the text has {len(stream)} tokens, fewer than one window of {length}; use more text")
    starts = rng.integers(len(stream) - length + 1, size=count)
    return stream[starts[:, None] + np.arange(length)].astype(np.int64)


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file. Raises ValueError if the file is missing, empty, or not text."""
    try:
        with open(checks.ordinary_file(os.fspath(path)), "rb") as file:     # an integer would name an open file
            raw = file.read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of a text file") from error
    try:
        text = raw.decode("utf-8-sig")    # without the byte order mark that some editors write first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); convert it, or give another file") from error
    if "\0" in text:
        raise ValueError(f"{path}: a binary file (it holds NUL bytes); give a text file")
    if not text.strip():
        raise ValueError(f"{path}: empty; give a file with some text in it")
    return text
