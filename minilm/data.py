"""From text to arrays: dialogues, batches, windows over a stream of documents.

A dialogue in tokens is

    <bos> User: What is 2 + 3?\\nAssistant:  |  The answer is 5. <eos>
    prompt, mask 0                          |  response, mask 1

with exactly one BOS, and an EOS that belongs to the response: it is learned like any other
token, because padding is a token of its own.
"""

import dataclasses

import numpy as np


def prompt_text(question):
    """How a question is put to the assistant."""
    return f"User: {question}\nAssistant:"


def encode_prompt(tokenizer, question):
    """<bos> and the question as a prompt, a list of token ids."""
    return [tokenizer.bos] + tokenizer.encode(prompt_text(question))


def encode_response(tokenizer, response):
    """The response, a leading space, and <eos>, as a list of token ids."""
    return tokenizer.encode(" " + response) + [tokenizer.eos]


def decode_response(tokenizer, tokens):
    """The text of a sampled response."""
    return tokenizer.decode(tokens).strip()


def encode_dialogue(tokenizer, question, response):
    """(prompt, response), two token lists whose sum is the tokenised dialogue.

    Raises ValueError if it is not: a merge across the boundary would train the model on
    tokens that it never meets when it answers.
    """
    prompt, answer = encode_prompt(tokenizer, question), encode_response(tokenizer, response)
    whole = tokenizer.encode(prompt_text(question) + " " + response)
    if prompt[1:] + answer[:-1] != whole:
        raise ValueError(f"the tokens of the prompt {question!r} are no prefix of those of prompt and response; "
                         "end the prompt where the tokenizer splits words")
    return prompt, answer


@dataclasses.dataclass
class Batch:
    """Sequences of one length: tokens (B,T), and two masks (B,T).

    mask  1 on response tokens, EOS included
    real  1 on every token that is not padding
    The targets of tokens[:, :-1] are tokens[:, 1:], and mask[:, 1:] says which of them count.
    """

    tokens: np.ndarray
    mask: np.ndarray
    real: np.ndarray

    @property
    def target_mask(self):
        """(B,T-1): the mask that goes with model.log_probs(tokens)."""
        return self.mask[:, 1:]


def make_batch(prompts, responses, pad, context=None):
    """Token lists to a Batch, padded on the right to the longest.

    Raises ValueError for an empty prompt or response, lists of unequal number, or a dialogue
    longer than `context`.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: expected as many, at least one")
    lengths = [(len(p), len(r)) for p, r in zip(prompts, responses)]
    for i, (p, r) in enumerate(lengths):
        if not p or not r:
            raise ValueError(f"dialogue {i} has a prompt of {p} and a response of {r} tokens; both need at least one")
        if context is not None and p + r > context:
            raise ValueError(f"dialogue {i} has {p} + {r} tokens and the context is {context}; "
                             "shorten it, or use a model with a longer context")
    T = max(p + r for p, r in lengths)
    tokens = np.full((len(prompts), T), pad, np.int64)
    mask, real = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for i, (p, r) in enumerate(lengths):
        tokens[i, :p + r] = [*prompts[i], *responses[i]]
        mask[i, p:p + r] = 1
        real[i, :p + r] = 1
    return Batch(tokens, mask, real)


def make_stream(tokenizer, documents):
    """Documents joined into one array of tokens (N,), each with a <bos> before it and an <eos> after."""
    tokens = []
    for document in documents:
        tokens += [tokenizer.bos, *tokenizer.encode(document), tokenizer.eos]
    return np.array(tokens, np.int32)


def windows(stream, rng, count, length):
    """`count` random stretches of the stream: (count, length) tokens. Raises ValueError if it is shorter."""
    if len(stream) < length:
        raise ValueError(f"the text has {len(stream)} tokens, fewer than one window of {length}; use more text")
    starts = rng.integers(len(stream) - length + 1, size=count)
    return stream[starts[:, None] + np.arange(length)].astype(np.int64)


def read_text(path):
    """A text file in UTF-8. Raises ValueError if it is missing, empty or no text, saying which."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of a text file") from error
    try:
        text = raw.decode("utf-8-sig")    # without the mark that some editors put first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); convert it, or give another file") from error
    if "\0" in text:
        raise ValueError(f"{path}: a binary file (it holds NUL bytes); give a text file")
    if not text.strip():
        raise ValueError(f"{path}: empty; give a file with some text in it")
    return text
