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

    Raises TypeError for subscripts that are no text; ValueError for subscripts without
    "->", with an ellipsis, or with a letter twice in one operand (a diagonal), for another number of operands or axes,
    and for a letter with two lengths: an axis of length 1 is not broadcast, as NumPy would.
    """
    if not isinstance(subscripts, str):
        raise TypeError(f"einsum: subscripts are a {type(subscripts).__name__}; they come first, as 'ij,jk->ik'")
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or not "".join([*letters, output]).isalpha():
        raise ValueError(f"einsum: subscripts are {subscripts!r}; write every axis as a letter and the output after "
                         "'->', as in 'ij,jk->ik'")
    if twice := [term for term in [*letters, output] if len(set(term)) < len(term)]:
        raise ValueError(f"einsum: a letter stands twice in {twice[0]!r}; a diagonal is not supported")
    dtypes = [x.dtype for x in operands if hasattr(x, "dtype")]
    operands = [np.asarray(x, np.result_type(x, *dtypes)) if isinstance(x, (int, float)) else x for x in operands]
    shapes = [tuple(getattr(x, "shape", (None,))) for x in operands]
    if [*map(len, shapes)] != [*map(len, letters)]:
        raise ValueError(f"einsum: shapes {shapes} do not have the axes of {subscripts!r}; operands are arrays")
    lengths: dict[str, int] = {}
    for letter, n in zip("".join(letters), (n for shape in shapes for n in shape)):
        if lengths.setdefault(letter, n) != n:
            raise ValueError(f"einsum: the letter {letter} has the lengths {lengths[letter]} and {n} in {subscripts!r}")
    return _einsum(*operands, letters=letters, output=output)


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
