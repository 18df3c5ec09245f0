"""einsum with gradients: the gradient of an operand is the einsum of all others.

    z_out = sum over the letters that are not in `out` of the product of the operands
    d loss / d x_in = einsum of dz with the other operands, summed over the letters that are not in `in`

A letter that only this operand has was summed over: every entry along it has the same gradient.
Tests: tests/test_einsum.py.
"""

from __future__ import annotations

import numpy as np

from minilm.backend import array_module
from minilm.tensor import Tensor, primitive


def einsum(subscripts: str, *operands) -> Tensor:
    """numpy.einsum of Tensors, arrays or numbers, with explicit output: einsum("bthd,bshd->bhts", q, k).

    Raises TypeError for subscripts that are no text and for operands of other types; ValueError for subscripts without
    "->", with an ellipsis, or with a letter twice in one operand (a diagonal), for another number of operands or axes,
    and for a letter with two lengths: an axis of length 1 is not broadcast, as NumPy would.
    """
    if not isinstance(subscripts, str):
        raise TypeError(f"einsum: subscripts are of type {type(subscripts).__name__}; they come first, and are text, "
                        "as 'ij,jk->ik'")
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or not "".join([*letters, output]).isalpha():
        raise ValueError(f"einsum: subscripts are {subscripts!r}; write every axis as a letter and the output after "
                         "'->', as in 'ij,jk->ik'")
    if twice := [term for term in [*letters, output] if len(set(term)) < len(term)]:
        raise ValueError(f"einsum: a letter stands twice in {twice[0]!r}; a diagonal is not supported")
    operands = _arrays(operands)
    _check_axes(letters, operands)
    return _einsum(*operands, letters=letters, output=output)


def _arrays(operands):
    """The operands, Python numbers as arrays of the dtype that they have beside the others."""
    dtypes = [x.dtype for x in operands if hasattr(x, "dtype")]
    for i, x in enumerate(operands):
        if not hasattr(x, "shape") and not isinstance(x, (int, float)):
            raise TypeError(f"einsum: operand {i} is of type {type(x).__name__}; it must be a Tensor, an array or a "
                            "number")
    return [x if hasattr(x, "shape") else np.asarray(x, np.result_type(x, *dtypes)) for x in operands]


def _check_axes(letters, operands):
    if len(letters) != len(operands):
        raise ValueError(f"einsum: {len(letters)} operands in {','.join(letters)!r}, and {len(operands)} are given")
    found: dict[str, tuple[int, str]] = {}                  # of each letter, its length and the term that has it
    for i, (term, x) in enumerate(zip(letters, operands)):
        if len(term) != len(x.shape):
            raise ValueError(f"einsum: operand {i} has shape {tuple(x.shape)}; {term!r} has {len(term)} axes")
        for letter, length in zip(term, x.shape):
            other, where = found.setdefault(letter, (length, term))
            if other != length:
                raise ValueError(f"einsum: the letter {letter} has length {other} in {where!r} and {length} in "
                                 f"{term!r}")


@primitive
def _einsum(*operands, letters, output):
    xp = array_module(*operands)

    def gradient(i, dz):
        others = [j for j in range(len(operands)) if j != i]
        found = set(output).union(*(letters[j] for j in others))
        kept = "".join(letter for letter in letters[i] if letter in found)
        terms = ",".join([output, *(letters[j] for j in others)])
        dx = xp.einsum(f"{terms}->{kept}", dz, *(operands[j] for j in others))
        shape = [n if letter in found else 1 for letter, n in zip(letters[i], operands[i].shape)]
        return xp.broadcast_to(dx.reshape(shape), operands[i].shape)

    def vjp(dz):
        return tuple(gradient(i, dz) for i in range(len(operands)))
    return xp.einsum(f"{','.join(letters)}->{output}", *operands), vjp
