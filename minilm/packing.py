"""Packing: dialogues in one row of tokens, without padding, and each prompt once however many responses it has.

    prompt 0 | response 0 | response 1 | prompt 1 | response 2 ...

A response attends to its prompt and to itself, and its positions continue those of the prompt. So its hidden states
are those of the dialogue alone, up to rounding: Transformer.response_log_probs(pack) has the values of
plain.log_probs on each dialogue. A prompt of P tokens with two responses costs P + R_1 + R_2 tokens, where padded
rows cost 2 (P + max(R_1, R_2)): for DPO with 256 + 2 x 64 tokens 384 instead of 640.
The last token of a response is a target only, so it is left out of the row unless a reward is to be read there.
Attention over the segments of a row: fast/packed_attention.py. Tests: tests/test_packing.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from minilm import checks
from minilm.backend import array_module, to_numpy
from minilm.data import ANY_TOKEN, check_dialogues
from minilm.fast.packed_attention import Segment
from minilm.tensor import primitive

Tokens = Sequence[int]


@dataclasses.dataclass
class Pack:
    """B dialogues in one row of N tokens. Responses have at most R tokens each, M in all.

    tokens, positions  (N,) the row, and the position of each of its tokens in its own dialogue
    segments           of the row, in order
    rows, targets      (M,) for each response token: the row number whose hidden state predicts it, and the token
    last               (B,) the row number of each response's last token; None without last=True
    mask               (B,R) True on response tokens
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: list[Segment]
    rows: np.ndarray
    targets: np.ndarray
    last: np.ndarray | None
    mask: np.ndarray


def pack(prompts: Sequence[Tokens], responses: Sequence[Tokens], context: int | None = None,
         last: bool = False) -> Pack:
    """Token lists to a Pack. Equal prompts are stored once. last: keep the last token of each response.

    Raises ValueError, TypeError and IndexError as data.check_dialogues does; a token is any integer from 0 on.
    """
    check_dialogues("pack", ANY_TOKEN, context, prompts, responses=responses)
    tokens: list[int] = []
    positions: list[int] = []
    segments = []
    rows = []
    last_rows = []
    segment_of: dict[tuple[int, ...], Segment] = {}         # prompt -> its Segment
    for prompt, response in zip(prompts, responses):
        P, R = len(prompt), len(response)
        prefix = segment_of.get(tuple(prompt))
        if prefix is None:
            prefix = segment_of[tuple(prompt)] = Segment(len(tokens), len(tokens) + P)
            segments.append(prefix)
            tokens.extend(prompt)
            positions += range(P)
        start = len(tokens)
        fed = R if last else R - 1                          # response tokens that are inputs
        if fed:
            segments.append(Segment(start, start + fed, prefix.start, prefix.stop))
            tokens.extend(response[:fed])
            positions += range(P, P + fed)
        rows += [prefix.stop - 1, *range(start, start + R - 1)]
        last_rows.append(len(tokens) - 1)
    targets = np.concatenate(responses, dtype=int)
    lengths = np.array([len(response) for response in responses])
    mask = np.arange(lengths.max()) < lengths[:, None]
    return Pack(np.array(tokens, int), np.array(positions), segments, np.array(rows), targets,
                np.array(last_rows) if last else None, mask)


def packs(prompts: Sequence[Tokens], responses: Sequence[Tokens], batch_size: int, context: int | None = None,
          last: bool = False) -> Iterator[Pack]:
    """All the dialogues in order, as Packs of at most batch_size dialogues.

    Raises as pack does, before the first Pack, and ValueError for a batch_size below 1.
    """
    checks.integer("packs", "batch_size", batch_size, at_least=1)
    check_dialogues("packs", ANY_TOKEN, context, prompts, responses=responses)      # an error has the place among all
    for i in range(0, len(prompts), batch_size):
        yield pack(prompts[i:i + batch_size], responses[i:i + batch_size], last=last)


@primitive
def scatter(values, mask):
    """M values to the places where mask (B,R) is True, row by row; zeros elsewhere: (B,R).

    Raises ValueError for another number of values, and for a mask of other values than 0 and 1.
    """
    xp = array_module(values)
    mask = to_numpy(checks.mask("scatter", mask))
    shape = getattr(values, "shape", ())
    if shape != (mask.sum(),):
        raise ValueError(f"scatter: values {shape} for {mask.sum()} places of the mask; pass one for each")
    places = xp.asarray(np.flatnonzero(mask))      # a mask as an index on a GPU would make the host wait
    out = xp.zeros(mask.size, values.dtype)
    out[places] = values
    def vjp(dy):
        return dy.reshape(-1)[places]
    return out.reshape(mask.shape), vjp
