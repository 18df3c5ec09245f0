"""A loss, gradient, weight or logit became NaN or infinite: which tensor was the first."""

from __future__ import annotations

from collections.abc import Callable

from minilm.backend import array_module
from minilm.tensor import Tensor, watching


class Diverged(ArithmeticError):
    """A loss, a gradient, an update or the logits to sample from became NaN or infinite."""


def first_nonfinite(function: Callable) -> str | None:
    """The first primitive whose output has a NaN or an infinity when function() is called.

    Returns "the output of NAME, shape (..)", or None.
    """
    found = []

    def watch(name, output):
        if not array_module(output).isfinite(output).all():
            found.append(f"the output of {name}, shape {output.shape}")

    with watching(watch):
        function()
    return next(iter(found), None)


def first_bad_parameter(parameters: dict[str, Tensor], field: str) -> str | None:
    """The first parameter whose `field`, "data" or "grad", has a NaN or an infinity; in words, or None.

    A frozen parameter has no gradient.
    """
    for name, p in parameters.items():
        array = getattr(p, field)
        if array is not None and not array_module(array).isfinite(array).all():
            return f"the {'gradient of ' if field == 'grad' else ''}parameter {name}, shape {p.shape}"
    return None
