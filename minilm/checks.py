"""Checks of a caller's arguments: settings, masks, shapes, token ids, numbers. One function for each kind.

Each returns the value in the form that is used afterwards, or raises an error that names the function, the argument and
its value, and says what is expected. Code that follows a check relies on it.
Tests: tests/test_checks.py.
"""

from __future__ import annotations

import errno
import math
import os
import reprlib
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from minilm.backend import array_module, is_cupy, to_numpy


def number(function: str, name: str, value: Any, *, above: float | None = None, at_least: float | None = None,
           below: float | None = None, at_most: float | None = None) -> float:
    """A setting that is one finite number in a range. Raises TypeError for another type, ValueError out of range.

    >>> number("dpo_loss", "beta", 0.1, above=0)
    0.1
    """
    if getattr(value, "shape", None) == ():
        value = value.item()                                # a NumPy scalar, or an array of one number
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} is {shown(value)}; it must be a number")
    if not (abs(value) <= sys.float_info.max and (above is None or value > above) and (below is None or value < below)
            and (at_least is None or value >= at_least) and (at_most is None or value <= at_most)):
        limits = {"above": above, "at least": at_least, "below": below, "at most": at_most}
        wanted = " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)
        raise ValueError(f"{function}: {name} is {reprlib.repr(value)}; it must be a finite number {wanted}".rstrip())
    return value


def integer(function: str, name: str, value: Any, *, at_least: int | None = None, below: int | None = None) -> int:
    """A setting that is one integer in a range. Raises TypeError for 3.0 and True, ValueError out of range."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{function}: {name} is {shown(value)}; it must be an integer")
    if (at_least is not None and value < at_least) or (below is not None and value >= below):
        limits = [f"at least {at_least}"] * (at_least is not None) + [f"below {below}"] * (below is not None)
        raise ValueError(f"{function}: {name} is {reprlib.repr(value)}; it must be {' and '.join(limits)}")
    return int(value)


def flag(function: str, name: str, value: Any) -> bool:
    """A setting that is True or False. Raises TypeError for others: the text "no" would count as True."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{function}: {name} is {shown(value)}; it must be True or False")
    return bool(value)


def choice(function: str, name: str, value: Any, choices: Sequence[str]) -> str:
    """A setting that is one of several words. Raises ValueError."""
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{function}: {name} is {reprlib.repr(value)}; it must be {', '.join(others)} or {last}")
    return value


def mask(function: str, values: Any, shape: tuple[int, ...] | None = None, name: str = "mask",
         hint: str = "") -> np.ndarray:
    """A mask of zeros and ones (integers, floats or bool) as a bool array on its device.

    shape: the shape that it must have, if given. Raises TypeError for what holds no numbers, ValueError for other
    values (labels such as -100, weights, NaN) and for another shape: a mask selects, it does not weigh.
    """
    values = _array(function, name, values, "biuf", "0 and 1 alone (or False and True)")
    if shape is not None and values.shape != tuple(shape):
        hint = f"; {hint}" if hint else ""
        raise ValueError(f"{function}: {name} has shape {values.shape}; it must be {tuple(shape)}{hint}")
    if values.dtype == bool:
        return values
    selected = values == 1
    wrong = ~(selected | (values == 0))
    if wrong.any():
        first = values[wrong][0].item()
        raise ValueError(f"{function}: {name} holds {first!r}; it must hold 0 and 1 alone (or False and True)")
    return selected


def same_shape(function: str, *, axes: str = "", hint: str = "", **arrays: Any) -> tuple[int, ...]:
    """The one shape of arrays or Tensors that belong together, entry by entry. Raises ValueError: none is broadcast.

    axes: the letters of its axes, if it must have just these: "PK" for arrays (P,K), without an axis of length 0.
    hint: how to get arrays of that shape. An argument that is None is not given.

    >>> same_shape("dpo_loss", axes="B", chosen=np.zeros(2), rejected=np.zeros(2))
    (2,)
    """
    shapes = {name: tuple(a.shape if hasattr(a, "shape") else np.shape(a)) for name, a in arrays.items()
              if a is not None}
    shape = next(iter(shapes.values()))
    if any(other != shape for other in shapes.values()) or (axes and (len(shape) != len(axes) or 0 in shape)):
        letters = f" ({axes},)" if len(axes) == 1 else f" ({','.join(axes)})" if axes else ""
        empty = ", without an axis of length 0" if 0 in shape else ""
        hint = f"; {hint}" if hint else ""
        raise ValueError(f"{function}: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}; "
                         f"they must have one shape{letters}{empty}{hint}")
    return shape


def finite(function: str, name: str, values: Any, entry: str = "entry", at_least: float | None = None) -> np.ndarray:
    """An array without NaN and infinity. Raises ValueError with the place and value of the first one, and TypeError for
    what holds no real numbers.

    at_least: the smallest value that is allowed.
    """
    values = _array(function, name, values, "biuf", "numbers")
    xp = array_module(values)
    right = xp.isfinite(values) if at_least is None else (values >= at_least) & (values < math.inf)
    if not right.all():
        place = tuple(int(i) for i in np.argwhere(~to_numpy(right))[0])
        raise ValueError(f"{function}: {name}, {entry} {place[0] if len(place) == 1 else place}, is "
                         f"{values[place].item()}; it must be finite"
                         f"{'' if at_least is None else f' and at least {at_least}'}")
    return values


def numbers(function: str, axes: str = "", *, hint: str = "", **arrays: Any) -> list[np.ndarray]:
    """Arrays of one shape without NaN and infinity, as NumPy arrays. Raises as same_shape and finite do."""
    arrays = {name: _array(function, name, values, "biuf", "numbers") for name, values in arrays.items()}
    same_shape(function, axes=axes, hint=hint, **arrays)
    return [finite(function, name, to_numpy(values)) for name, values in arrays.items()]


def indices(function: str, name: str, values: Any, count: int) -> np.ndarray:
    """Integers in [0, count) as an array. Raises TypeError for another type (floats are not rounded), IndexError for
    one out of range: a negative one does not count from the end."""
    return _integers_below(function, name, values, count, f"; it must hold integers from 0 to {count - 1}")


def token_ids(function: str, name: str, values: Any, vocab_size: int) -> np.ndarray:
    """Integers in [0, vocab_size) as an array. Raises as indices does: nothing wraps."""
    return _integers_below(function, name, values, vocab_size, f", which is not in the vocabulary of {vocab_size}; "
                           "was it made with another tokenizer?")


def _integers_below(function, name, values, count, otherwise):
    values = _array(function, name, values, "iu", "integers")
    if values.size and not 0 <= (lowest := int(values.min())) <= (highest := int(values.max())) < count:
        raise IndexError(f"{function}: {name} holds {lowest if lowest < 0 else highest}{otherwise}")
    return values


def _array(function, name, values, kinds, wanted):
    """The values as an array whose dtype is of these kinds. Raises TypeError for a Tensor, None, text, ragged lists."""
    try:
        array = values if is_cupy(values) else to_numpy(values)
    except ValueError:
        raise TypeError(f"{function}: {name} holds lists of unequal lengths; it must hold {wanted}") from None
    except TypeError as error:              # of a Tensor, or of an array with a mask
        raise TypeError(f"{function}: {name} is {shown(values)}; it must hold {wanted} ({error})") from None
    if array.dtype.kind not in kinds and array.size:
        held = f"is {shown(values)}" if array.dtype == object else f"holds {array.dtype}"
        raise TypeError(f"{function}: {name} {held}; it must hold {wanted}")
    return array if array.dtype.kind in kinds else array.astype("int64")        # an empty list has floats


TEMPERATURES = (1e-3, 1e6)


def temperature(function: str, value: Any, greedy: bool = False) -> float:
    """A temperature that logits are divided by, in TEMPERATURES; or 0, greedy decoding, if `greedy`.

    Drawing divides differences of logits, scoring divides hidden states. Both give the same log-prob up to the rounding
    of the logits (in float32 about 1e-6) over the temperature. Below 1e-3 that error is no longer small.
    """
    lowest, highest = TEMPERATURES
    try:
        return number(function, "temperature", value, at_least=lowest, at_most=highest)
    except ValueError as error:
        if greedy and value == 0:
            return value
        raise ValueError(f"{error}" + (", or 0 for greedy decoding" if greedy else "")) from None


def sampling(function: str, temperature_or_0: Any, top_k: Any, top_p: Any) -> None:
    """Settings of generate.sample: a temperature or 0; top_k, an integer from 1, or None; top_p in (0,1], or None."""
    temperature(function, temperature_or_0, greedy=True)
    if top_k is not None:
        integer(function, "top_k", top_k, at_least=1)
    if top_p is not None:
        number(function, "top_p", top_p, above=0, at_most=1)


def generator(function: str, rng: Any) -> np.random.Generator:
    """A numpy Generator. Raises TypeError for a seed, or for a generator of another kind."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"{function}: rng is {shown(rng)}; it must be a numpy Generator, as np.random.default_rng(0)")
    return rng


def uniforms(function: str, rng: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform random numbers in [0,1), float64: drawn from rng, a numpy Generator, or rng itself, an array.

    Raises TypeError for anything else, and ValueError for NaN and numbers outside [0,1): they would select a token of
    probability 0. 1.0 is outside; float32 rounds numbers above 1 - 3e-8 to it.
    """
    if isinstance(rng, np.random.Generator):
        return rng.random(shape)
    if isinstance(rng, (list, tuple)):
        rng = np.asarray(rng)
    if not hasattr(rng, "shape"):
        raise TypeError(f"{function}: uniform numbers are {shown(rng)}; they must be an array {shape}, or a numpy "
                        "Generator that draws them, such as np.random.default_rng(0)")
    if tuple(rng.shape) != shape:
        raise ValueError(f"{function}: uniform numbers of shape {tuple(rng.shape)}; expected {shape}")
    if rng.dtype.kind not in "fiu":
        raise TypeError(f"{function}: uniform numbers are {rng.dtype}; they must be floats")
    numbers = rng.astype("float64", copy=False)
    wrong = ~((numbers >= 0) & (numbers < 1))
    if wrong.any():
        raise ValueError(f"{function}: a uniform number is {numbers[wrong][0].item()}; it must be at least 0 and below "
                         "1 (draw it in float64: float32 rounds to 1.0)")
    return numbers


def rows(function: str, name: str, values: Any) -> np.ndarray:
    """An array (B,V) of float32 or float64, one distribution or its logits in each row. Raises TypeError for anything
    else: half precision has no number for the highest temperature."""
    is_array = isinstance(values, np.ndarray) or is_cupy(values)
    if not is_array or values.dtype.char not in "fd" or values.ndim != 2 or values.shape[1] == 0:
        of = f" of {values.dtype}" if is_array else ""
        raise TypeError(f"{function}: {name} is {shown(values)}{of}; it must be an array (B,V) of floats, V at least 1 "
                        "(float32 or float64)")
    return values


def draws(function: str, logits: Any, uniforms_given: Any, temperature_or_0: Any, top_k: Any = None,
          top_p: Any = None) -> np.ndarray:
    """Everything that one draw from each row of logits (B,V) takes. Returns the uniform numbers (B,), in float64.

    Raises as sampling, rows and uniforms do, and ValueError for a row with NaN, +inf or only -inf: it has no
    distribution.
    """
    sampling(function, temperature_or_0, top_k, top_p)
    finite(function, "the largest logit", rows(function, "logits", logits).max(axis=-1), "row")
    return uniforms(function, uniforms_given, logits.shape[:1])


def end_tokens(function: str, eos: Any, vocab_size: int) -> np.ndarray:
    """Which ids end a response, a bool array (vocab_size,). eos: one id, several (list, tuple, set, array), or None.

    Raises TypeError for names, floats and bools, ValueError for an id outside the vocabulary and for an empty list.

    >>> end_tokens("generate", [1, 3], 4)
    array([False,  True, False,  True])
    """
    ends = np.zeros(vocab_size, bool)
    several = isinstance(eos, (list, tuple, set, frozenset)) or np.ndim(eos) == 1
    if several and len(eos) == 0:
        raise ValueError(f"{function}: eos is {eos!r}; give None if no token ends a response")
    for token in eos if several else () if eos is None else (eos,):
        ends[integer(function, "eos", token, at_least=0, below=vocab_size)] = True
    return ends


def distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object_pairs_hook of json.loads for files: ValueError for a key that comes twice (json takes the last)."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        (key, _), = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {reprlib.repr(key)} twice")
    return fields


def ordinary_file(path: str | os.PathLike) -> str | os.PathLike:
    """The path. Raises OSError for a pipe, a socket or a device: reading one may never end. A folder raises later."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, "a pipe, a socket or a device, and no file", os.fspath(path))
    return path


def shown(value: Any) -> str:
    """A value in an error: an array by its type and shape, others as they are written, the middle of long ones left
    out."""
    if hasattr(value, "shape") and not isinstance(value, type) and tuple(value.shape):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"
