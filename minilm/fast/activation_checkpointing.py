"""Activation checkpointing: keep the inputs of a function only, and compute it again in the backward pass.

Chen et al. 2016, arXiv:1604.06174. It saves memory and costs time (how much: scripts/bench/tricks.py): of the
activations of a Transformer only one block's are alive at a time. The results are the same bit for bit. A parameter of
the function that was changed in place in between would make them wrong, so that it raises here too (in_place.py).
Tests: tests/test_tensor.py.
"""

from __future__ import annotations

from collections.abc import Callable

from minilm.backend import array_module
from minilm.tensor import Node, Tensor, grad_enabled, history, no_grad, recording


def activation_checkpoint(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), recorded as one node that keeps the inputs alone.

    Leaves that the function uses beside its inputs get their gradients too. The function may not use any other
    Tensor with a history: backward would visit that history twice.
    """
    if not grad_enabled():
        return function(*inputs)
    with no_grad():
        output = function(*inputs)
    arrays = [x.data for x in inputs]

    def vjp(dy):
        leaves = [Tensor(array, requires_grad=True) for array in arrays]
        with recording(True):                   # backward itself may have been called under no_grad
            again = function(*leaves)
            # As if they were recorded in the forward pass: no leaf may have changed since. An identity has no node.
            for n in history(again.node) if again.node else ():
                n.since = node.since
            again.backward(dy)
        return tuple(array_module(a).zeros_like(a) if leaf.grad is None else leaf.grad
                     for a, leaf in zip(arrays, leaves))
    output.requires_grad = True
    output.node = node = Node("activation_checkpoint", inputs, vjp, output)
    return output
