"""Parameters that change in place, and how backward notices it.

A vjp keeps arrays of the forward pass, parameters among them. If a parameter is overwritten before backward runs, the
gradient belongs to no function. NumPy does not report a write. So every function that overwrites parameters marks
them: AdamW.step, checkpoint.load_into, TrainState.restore, Tensor.assign. A mark and the record of a call
(tensor.Node) take their numbers from one counter, and a parameter has changed since a call if its mark is the later
of the two. It costs one comparison for each use of a parameter.
A write that no function marks, such as p.data[...] = x, is not noticed (PyTorch does not notice it either). Use
p.assign(x), or mark_changed. Arrays beside Tensors (tokens, masks, advantages) need no mark, because a recorded call
copies them; on a GPU it copies integers and masks alone.
Tests: tests/test_tensor.py, tests/test_optim.py.
"""

from __future__ import annotations

import itertools
from typing import Any

order = itertools.count()           # a later call, or change, has a larger number
NEVER = (-1, "", "")                # the mark of a Tensor that has not changed: number, name, by which function


def mark_changed(parameters: dict[str, Any], by: str) -> None:
    """Say that the numbers of these leaves, Tensors by name, have changed in place: backward through an earlier use of
    one raises. by: the function that changed them, for the error."""
    now = next(order)
    for name, p in parameters.items():
        p.changed = now, name, by


def changed_since(node: Any, leaf: Any) -> RuntimeError:
    """The error for a leaf that was changed after a call had used it, of which node (tensor.Node) is the record."""
    _, name, by = leaf.changed
    which = f"parameter '{name}', shape {leaf.shape}," if name else f"a Tensor of shape {leaf.shape}"
    place = next((f" (its {node.argument(i)})" for i, x in enumerate(node.inputs) if x is leaf), "")
    return RuntimeError(f"backward: {which} was changed in place by {by} after {node.name} had used it{place}, so that "
                        "this gradient would be wrong; call backward before the change, or compute the forward again")
