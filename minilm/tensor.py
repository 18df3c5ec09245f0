"""Reverse-mode automatic differentiation.

A primitive is a function of arrays. It returns its output and its vector-Jacobian product: `vjp(dy)` takes the gradient
of the loss with respect to the output, and returns the gradient with respect to each input. `@primitive` makes it a
function of Tensors, and records the Tensors that it was called on (`Node`). `backward` visits the records from the
last to the first. That is the whole idea:

    @primitive
    def exp(x):
        y = np.exp(x)
        def vjp(dy):
            return dy * y
        return y, vjp

Read `Tensor.backward`, `Node` and `primitive` first; the rest is operators and checks. To save memory, a vjp may
return a DeferredMatmul(x, y) in place of the array x @ y (fast/deferred.py).

Order: records are numbered in the order of creation. An input always exists before the output that is computed from
it. So decreasing numbers are a reverse topological order of the graph: when `backward` reaches a record, every use of
its output has already added its part to the gradient.

Cotangent of a Tensor: the gradient of the loss in it, for example the dy of a vjp.

To add a primitive, write such a function in ops.py or layers.py, and check its gradient with gradcheck.gradcheck.
tests/test_ops.py has a table of cases: add one for it. Tests: tests/test_tensor.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from minilm.backend import array_module, is_cupy, plain_argument, to_numpy
from minilm.in_place import NEVER, changed_since, mark_changed, order
from minilm.modes import arrays_only, grad_enabled, no_grad, recording, thread, watching
from minilm.numpy_functions import NumpyFunctions

__all__ = ["Node", "Tensor", "arrays_only", "grad_enabled", "history", "no_grad", "primitive", "recording", "watching"]

# Of a call with wrong arguments. A list or None in place of an array raises AttributeError.
ERRORS = (IndexError, TypeError, ValueError, AttributeError)
operations: Any = None             # the module ops, with the functions behind the operators; ops.py sets it


def _operator(name, reflected=False):
    """A method of Tensor that calls the function `name` of ops.py; reflected: for `array + tensor`."""
    if reflected:
        return lambda x, y: getattr(operations, name)(y, x)
    return lambda x, *arguments, **options: getattr(operations, name)(x, *arguments, **options)


class Tensor(NumpyFunctions):
    """An array, and the record of the call that computed it.

    data           the array, float32 or float64 (integers and lists become float64)
    grad           an array of the same shape after backward has reached this leaf, else None.
                   Only leaves (Tensors made by hand with requires_grad=True) keep theirs.
    requires_grad  whether backward computes its gradient
    grad_buffer    preallocated storage for grad (a view into AdamW's flat gradient), or None
    changed        when, and by which function, a leaf was last overwritten (in_place.py)
    node           the Node of the call that computed it, or None (a leaf, or nothing was recorded)

    Raises TypeError for any other dtype, and for a Tensor in place of an array.
    """

    __slots__ = ("data", "grad", "requires_grad", "grad_buffer", "changed", "node")

    def __init__(self, data, requires_grad: bool = False):
        if isinstance(data, Tensor):
            raise TypeError("Tensor of a Tensor: pass its .data for a copy outside the graph")
        if not is_cupy(data):
            data = to_numpy(data)
        if data.dtype.kind in "iub":
            data = data.astype(np.float64)
        if data.dtype not in (np.float32, np.float64):
            raise TypeError(f"a Tensor holds float32 or float64, not {data.dtype}: convert with .astype(np.float32)")
        self.data = data
        self.grad: Any = None
        self.requires_grad = requires_grad
        self.grad_buffer: Any = None
        self.changed = NEVER
        self.node: Node | None = None

    # Operators. The functions of ops.py of these names, with their gradients.

    __add__ = _operator("add")
    __radd__ = _operator("add", reflected=True)
    __sub__ = _operator("subtract")
    __rsub__ = _operator("subtract", reflected=True)
    __mul__ = _operator("multiply")
    __rmul__ = _operator("multiply", reflected=True)
    __truediv__ = _operator("divide")
    __rtruediv__ = _operator("divide", reflected=True)
    __matmul__ = _operator("matmul")
    __rmatmul__ = _operator("matmul", reflected=True)
    __neg__ = _operator("negative")
    __pow__ = _operator("power")
    __rpow__ = _operator("power", reflected=True)
    __abs__ = _operator("absolute")
    __getitem__ = _operator("getitem")
    sum = _operator("sum")
    mean = _operator("mean")

    def reshape(self, *shape) -> Tensor:
        """reshape(2, 3) or reshape((2, 3))"""
        return operations.reshape(self, shape=_unpacked(shape))

    def transpose(self, *axes) -> Tensor:
        """transpose(1, 0), transpose((1, 0)), or transpose() to reverse the axes"""
        return operations.transpose(self, axes=_unpacked(axes) or None)

    T = property(transpose)
    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)

    def item(self) -> float:
        """The value of a Tensor of one element, as a Python float."""
        return float(self.data.item())

    __float__ = item

    def assign(self, values: np.ndarray) -> None:
        """self.data[...] = values of its shape, in a way that backward notices: through an earlier use it raises."""
        values = array_module(self.data).asarray(values)
        if values.shape != self.shape:
            raise ValueError(f"assign: values {values.shape} to a Tensor {self.shape}; none is broadcast")
        self.data[...] = values
        mark_changed({"": self}, "assign")

    def __reduce__(self):               # of copy and pickle: a leaf of its own, without gradient and history
        return Tensor, (self.data, self.requires_grad and self.node is None)

    def __len__(self):
        return len(self.data)

    def __bool__(self):
        return bool(self.data)          # NumPy raises ValueError for several elements

    def __repr__(self):
        source = f", from {self.node.name}" if self.node else ""
        return f"Tensor({self.data!r}{source})"

    def backward(self, gradient: np.ndarray | None = None) -> None:
        """Add d(self)/d(leaf) to `.grad` of every leaf that self was computed from.

        The chain rule, from the last node to the first: dL/dx is the sum, over every use of x in some y, of dL/dy
        times the Jacobian dy/dx.
        gradient: dL/d(self), the cotangent of self, an array of self's shape; needed unless self has one element.
        The graph is freed on the way: the arrays that a primitive kept for its vjp are released when that vjp has
        run. A second backward through any part of the graph raises RuntimeError.
        """
        gradient = self._cotangent(gradient)
        if self.node is None:
            return _accumulate(self, gradient)
        tape = history(self.node)
        gradients = {self.node: gradient}
        while tape:
            node = tape.pop()
            for source, dx in zip(node.inputs, node.pull_back(gradients.pop(node))):
                if source is None:
                    continue
                if isinstance(source, Tensor):
                    _accumulate(source, dx)
                elif source in gradients:
                    gradients[source] = gradients[source] + _evaluated(dx)
                else:
                    gradients[source] = _evaluated(dx)
            node.free()

    def _cotangent(self, gradient):
        if not self.requires_grad:
            raise RuntimeError("backward: nothing here requires a gradient (computed under no_grad, or from Tensors "
                               "without requires_grad=True)")
        xp = array_module(self.data)
        if gradient is None:
            if self.size != 1:
                raise ValueError(f"backward on shape {self.shape} needs its cotangent: pass backward(gradient) of "
                                 "that shape, or reduce to a scalar")
            gradient = xp.ones_like(self.data)
        gradient = xp.asarray(gradient, dtype=self.dtype)
        if gradient.shape != self.shape:
            raise ValueError(f"backward on shape {self.shape}: the cotangent has shape {gradient.shape}")
        return gradient


class Node:
    """The record of one call of a primitive. All records that a result depends on are its tape (history).

    inputs     for each argument: the Node that computed it, or the leaf itself, or None if it needs no gradient
    leaves     every Tensor among the arguments that no Node computed, also those without a gradient: none may change
               before backward (in_place.py)
    vjp        keeps the arrays that the gradient needs, and no others
    order      the number of the call: decreasing numbers are a reverse topological order
    since      the same number: a leaf that was marked later has changed
    name, arguments     of the primitive and of its parameters, for errors
    shape, dtype        of the output
    """

    __slots__ = ("name", "arguments", "inputs", "leaves", "vjp", "order", "since", "shape", "dtype")

    def __init__(self, name, inputs, vjp, output, arguments=()):
        self.name = name
        self.arguments = arguments
        self.inputs = [(x.node or x) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs]
        self.leaves = [x for x in inputs if isinstance(x, Tensor) and x.node is None]
        self.vjp = vjp
        self.order = self.since = next(order)
        self.shape = output.shape
        self.dtype = output.dtype

    def pull_back(self, dy):
        """vjp(dy), checked: one gradient per argument, None for those that have none. Raises RuntimeError."""
        dx = self.vjp(dy)
        dx = dx if isinstance(dx, tuple) else (dx,)
        dx += (None,) * (len(self.inputs) - len(dx))
        for i, (source, gradient) in enumerate(zip(self.inputs, dx)):
            if source is not None:
                self._check(i, source, gradient)
        return dx

    def _check(self, i, source, dx):
        if dx is None or dx.shape != source.shape or dx.dtype != source.dtype:
            returned = f"{dx.shape}, {dx.dtype}" if hasattr(dx, "shape") else repr(dx)
            raise RuntimeError(f"{self.name}: gradient for an input of shape {source.shape}, {source.dtype} ("
                               f"{self.argument(i)}) came back as {returned}; vjp must return one array per argument, "
                               "each of its argument's shape and dtype")

    def argument(self, i):
        """Argument i in words, for errors."""
        return f"argument {i + 1}" + (f" '{self.arguments[i]}'" if i < len(self.arguments) else "")

    def free(self):
        self.inputs, self.leaves, self.vjp = (), (), None


def history(node: Node) -> list[Node]:
    """The tape: every node that this one depends on, itself included, oldest first.

    Raises RuntimeError if a part of the graph was freed, or a leaf that was used has changed since (in_place.py).
    """
    found, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n in found:
            continue
        if n.vjp is None:
            raise RuntimeError(f"backward through {n.name} a second time: the graph was freed by the first; compute "
                               "the forward again")
        for leaf in n.leaves:
            if leaf.changed[0] > n.since:
                raise changed_since(n, leaf)
        found.add(n)
        stack += [source for source in n.inputs if isinstance(source, Node)]
    return sorted(found, key=lambda n: n.order)


def _accumulate(leaf, gradient):
    """leaf.grad += gradient. The first DeferredMatmul is computed where it is to be stored."""
    if leaf.grad is not None and hasattr(gradient, "add_to"):
        gradient.add_to(leaf.grad)
    elif leaf.grad is not None:
        leaf.grad += _evaluated(gradient)
    elif hasattr(gradient, "write"):
        leaf.grad = gradient.write(out=leaf.grad_buffer)
    elif leaf.grad_buffer is not None:
        leaf.grad_buffer[...] = gradient
        leaf.grad = leaf.grad_buffer
    else:                       # a copy: one array may be the gradient of several Tensors
        leaf.grad = array_module(gradient).array(gradient)


def _evaluated(gradient):
    return gradient.write() if hasattr(gradient, "write") else gradient


def primitive(function: Callable) -> Callable:
    """Turn `function(*arrays, **options) -> (output, vjp)` into a function of Tensors.

    Arguments may be Tensors, arrays or scalars, given by position or by name. vjp(dy) returns one array per argument
    from the first on: a tuple, or a single array for the first argument alone. Trailing arguments without a gradient
    may be left out. All Tensors are on one device; masks, indices and references beside them may be on the CPU, and a
    primitive moves them. The result is a Tensor (within arrays_only(), an array). Errors name the primitive and the
    shapes of its arguments: TypeError, ValueError, IndexError and AttributeError keep their kinds.
    The core is lines (1) to (4); the rest is modes and messages.
    """
    name = function.__name__
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    arguments = () if any(p.kind is p.VAR_POSITIONAL for p in parameters) else tuple(signature.parameters)

    @functools.wraps(function)
    def apply(*inputs, **options):
        if thread.arrays_only:
            if Tensor in map(type, inputs):
                raise TypeError(f"{name}: within arrays_only() primitives take arrays: pass tensor.data")
            return function(*inputs, **options)[0]
        if options and any(isinstance(option, Tensor) for option in options.values()):
            bound = signature.bind(*inputs, **options)          # Tensors given by name go to their positions,
            bound.apply_defaults()                              # and defaults fill the gaps between them
            inputs, options = bound.args, bound.kwargs
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        recorded = grad_enabled() and any(x.requires_grad for x in tensors)
        arrays = [_array(x, recorded) for x in inputs]                      # (1) Tensors to arrays
        options = {k: _array(x, recorded and type(x) is not list) for k, x in options.items()}
        try:
            array_module(*(x.data for x in tensors))
            output, vjp = _checked(function(*arrays, **options))            # (2) the call
            _check_dtypes(tensors, output)
        except ERRORS as error:
            kind = next(k for k in ERRORS if isinstance(error, k))
            raise kind(f"{_call(name, arrays)}: {str(error).removeprefix(name + ': ')}") from error
        if thread.watch is not None:
            thread.watch(name, output)
        result = Tensor(output, requires_grad=recorded)                     # (3) array to Tensor
        if recorded:
            result.node = Node(name, inputs, vjp, output, arguments)        # (4) the record of the call
        return result

    return apply


def _checked(result):
    """The two things that a primitive must return, or TypeError with the rule."""
    if not (isinstance(result, tuple) and len(result) == 2 and callable(result[1])):
        returned = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(f"a primitive returns (output, vjp): its output, an array, and a function that takes "
                        f"d(loss)/d(output) and returns d(loss)/d(argument) for each argument; got {returned}")
    if isinstance(result[0], Tensor):
        raise TypeError("the output is a Tensor; inside a primitive compute on arrays, with NumPy's functions "
                        "instead of those of minilm.ops")
    return result


def _check_dtypes(tensors, output):
    if any(x.data.dtype != output.dtype for x in tensors):
        names = " and ".join(sorted({str(x.dtype) for x in (*tensors, output)}))
        raise TypeError(f"mixed dtypes {names}; convert one side")


def _unpacked(arguments):
    """(2, 3) of both f(2, 3) and f((2, 3))"""
    return tuple(arguments[0]) if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)) else arguments


def _array(x, kept=False):
    """An argument as its primitive gets it. kept: a vjp may keep it, so arrays beside Tensors are copied, also those in
    an index. They are small, and the caller may overwrite a buffer before backward."""
    if isinstance(x, Tensor):
        return x.data
    if kept and type(x) in (list, tuple):
        return type(x)(_array(part, kept) for part in x)
    return plain_argument(x, kept)


def _call(name, arrays):
    return f"{name}({', '.join(str(a.shape) if hasattr(a, 'shape') else repr(a) for a in arrays)})"
