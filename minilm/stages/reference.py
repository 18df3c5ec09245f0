"""Reference log-probs that know their origin: which dialogues, and which model.

train_dpo takes log pi_ref(y|x) as arrays, computed once. An array that belongs to other pairs, or to pairs in another
order, has the right shape and the wrong numbers, and the loss falls all the same. So reference_log_probs keeps digests
beside the values, and train_dpo compares them with the digests of its pairs.
Tests: tests/test_reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minilm import checks
from minilm.backend import to_numpy


class ReferenceLogProbs(np.ndarray):
    """log pi_ref(y|x), (N,), and the digests of its origin.

    dialogues  (N,), a digest of the tokens of each x and y
    model      the sum and the sum of squares of every parameter of the reference
    An index or a slice keeps them. After other operations both are None: the result is an array like any other.
    """

    dialogues: np.ndarray | None = None
    model: tuple[float, ...] | None = None

    @classmethod
    def of(cls, values: np.ndarray, reference: Any, prompts: Sequence, responses: Sequence) -> ReferenceLogProbs:
        """The values (N,) with the digests of their origin."""
        array = values.view(cls)
        array.dialogues = _dialogue_digests(prompts, responses)
        array.model = tuple(number for p in reference.parameters().values()      # on a GPU the weights stay there
                            for number in (p.data.sum().item(), (p.data * p.data).sum().item()))
        return array

    def __getitem__(self, rows):
        part = super().__getitem__(rows)
        if self.dialogues is not None and isinstance(part, ReferenceLogProbs):
            part.dialogues = self.dialogues[rows]
            part.model = self.model
        return part


def checked_log_probs(function: str, prompts: Sequence, **sides: tuple[Sequence, Any]) -> list[np.ndarray]:
    """The reference log-probs of each side, name=(responses, log-probs), as plain arrays (N,).

    Raises ValueError if the number of values differs from the number of dialogues, for NaN, infinity and values above
    0, and, where the origin is known, for other dialogues, and for two models.
    """
    arrays = []
    for name, (responses, values) in sides.items():
        array = np.asarray(to_numpy(values))
        if array.shape != (len(prompts),) or array.dtype.kind != "f":
            raise ValueError(f"{function}: reference_{name} holds {array.dtype} of shape {array.shape}; it must hold a "
                             f"log-prob for each of the {len(prompts)} dialogues")
        checks.finite(function, f"reference_{name}", array)
        known = getattr(values, "dialogues", None)
        wrong = array > 1e-3 if known is None else known != _dialogue_digests(prompts, responses)     # 1e-3: rounding
        if wrong.any():
            reason = "a log-prob is at most 0" if known is None else "it was computed for another prompt or response"
            i = wrong.argmax()
            raise ValueError(f"{function}: reference_{name}, entry {i}, is {array[i]}: {reason} "
                             f"({wrong.sum()} entries are wrong); compute it with reference_log_probs on these lists")
        arrays.append(array)
    if len({getattr(values, "model", None) for _, values in sides.values()} - {None}) > 1:
        raise ValueError(f"{function}: the reference log-probs are of two models; compute both sides with one")
    return arrays


def _dialogue_digests(prompts, responses):
    """(N,): equal for equal tokens, whether they are lists or arrays."""
    return np.array([hash((*map(int, x), -1, *map(int, y))) for x, y in zip(prompts, responses)])
