"""Reverse-mode automatic differentiation.

A primitive is a function of arrays that returns its output and its vector-Jacobian
product: `vjp(dy)` takes the gradient of the loss with respect to the output and returns
the gradient with respect to each input. `@primitive` lets it take Tensors, and records
which Tensors it was called on. `backward` walks those records from the last to the first.
That is the whole idea:

    @primitive
    def exp(x):
        y = np.exp(x)
        def vjp(dy):
            return dy * y
        return y, vjp
"""

import contextlib
import functools
import inspect
import itertools
import threading

import numpy as np

from minilm.backend import array_module, is_cupy

_order = itertools.count()         # a primitive called later has a larger number
_thread = threading.local()        # no_grad holds in the thread that entered it


class Tensor:
    """An array, and where it came from.

    data           the array, float32 or float64 (integers and lists become float64)
    grad           an array of the same shape once backward has reached this leaf, else None.
                   Only leaves (Tensors made by hand with requires_grad=True) keep theirs.
    requires_grad  whether backward should reach it
    grad_buffer    an array of the same shape that grad is to be (AdamW's, part of its flat one), or None

    Raises TypeError for any other dtype, and for a Tensor in place of an array.
    """

    __slots__ = ("data", "grad", "requires_grad", "grad_buffer", "node")
    __array_ufunc__ = None         # so that `array * tensor` is tensor.__rmul__(array)

    def __init__(self, data, requires_grad=False):
        if isinstance(data, Tensor):
            raise TypeError("Tensor of a Tensor; pass its .data for a copy outside the graph")
        if not is_cupy(data):
            data = np.asarray(data)
        if data.dtype.kind in "iub":
            data = data.astype(np.float64)
        if data.dtype not in (np.float32, np.float64):
            raise TypeError(f"a Tensor holds float32 or float64, not {data.dtype}")
        self.data = data
        self.grad = None
        self.requires_grad = requires_grad
        self.grad_buffer = None
        self.node = None

    shape = property(lambda self: self.data.shape)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    dtype = property(lambda self: self.data.dtype)

    def item(self):
        """The value of a Tensor of one element, as a Python float."""
        return float(self.data.item())

    def __len__(self):
        return len(self.data)

    def __float__(self):
        return self.item()

    def __repr__(self):
        source = f", from {self.node.name}" if self.node else ""
        return f"Tensor({self.data!r}{source})"

    def backward(self, gradient=None):
        """Add d(self)/d(leaf) to `.grad` of every leaf that self was computed from.

        The chain rule, from the last node to the first: dL/dx is the sum, over every use of x in some
        y, of dL/dy times the Jacobian dy/dx.
        gradient: the cotangent, an array of self's shape; needed unless self has one element.
        The graph is freed on the way: what a primitive kept for its vjp goes as soon as that
        vjp has run. A second backward through any part of it raises RuntimeError.
        """
        if not self.requires_grad:
            raise RuntimeError("backward: nothing here requires a gradient (computed under "
                               "no_grad, or from Tensors without requires_grad)")
        xp = array_module(self.data)
        if gradient is None:
            if self.size != 1:
                raise ValueError(f"backward on shape {self.shape} needs its cotangent: "
                                 "pass backward(gradient) of that shape, or reduce to a scalar")
            gradient = xp.ones_like(self.data)
        gradient = xp.asarray(gradient, dtype=self.dtype)
        if gradient.shape != self.shape:
            raise ValueError(f"backward on shape {self.shape}: the cotangent has shape {gradient.shape}")

        if self.node is None:
            _accumulate(self, gradient)
            return
        tape, gradients = history(self.node), {self.node: gradient}
        while tape:
            node = tape.pop()
            for source, dx in zip(node.inputs, node.pull_back(gradients.pop(node))):
                if source is None:
                    continue
                if dx is None or dx.shape != source.shape or dx.dtype != source.dtype:
                    raise RuntimeError(f"{node.name}: gradient for an input of shape {source.shape}, "
                                       f"{source.dtype} came back as {_describe(dx)}")
                if isinstance(source, Tensor):
                    _accumulate(source, dx)
                elif source in gradients:
                    gradients[source] = gradients[source] + _evaluated(dx)
                else:
                    gradients[source] = _evaluated(dx)
            node.free()


class Node:
    """One call of a primitive: its vjp, where its inputs came from, and what its output was like.

    inputs: for each argument the Node that computed it, or the leaf that it is, or None where no gradient
    is asked for. Arrays are kept by the vjp alone, and only those that it needs.
    """

    __slots__ = ("name", "inputs", "vjp", "order", "shape", "dtype")

    def __init__(self, name, inputs, vjp, output):
        self.name, self.vjp, self.order = name, vjp, next(_order)
        self.inputs = tuple((x.node or x) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs)
        self.shape, self.dtype = output.shape, output.dtype

    def pull_back(self, dy):
        """One gradient per argument; None for those that have none."""
        dx = self.vjp(dy)
        dx = dx if isinstance(dx, tuple) else (dx,)
        return dx + (None,) * (len(self.inputs) - len(dx))

    def free(self):
        self.inputs, self.vjp = (), None


def history(node):
    """Every node that this one depends on, itself included, oldest first."""
    found, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n in found:
            continue
        if n.vjp is None:
            raise RuntimeError(f"backward through {n.name} a second time: the graph was freed by "
                               "the first; compute the forward again")
        found.add(n)
        stack += [source for source in n.inputs if isinstance(source, Node)]
    return sorted(found, key=lambda n: n.order)


class DeferredMatmul:
    """A gradient x @ y that is yet to be computed.

    A vjp may leave it so: for a leaf it is then written where it is to stand, instead of being made, and
    copied or added there. (A weight's gradient is as large as the weight, however few the tokens.)
    """

    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y

    shape = property(lambda self: (self.x.shape[0], self.y.shape[1]))
    dtype = property(lambda self: self.x.dtype)

    def write(self, out=None):
        return array_module(self.x).matmul(self.x, self.y, out=out)

    def add_to(self, array):
        array += self.write()


class SparseRows:
    """A gradient of the shape of `like` that is zero but for these rows (N,), each named once: (N,D)."""

    __slots__ = ("shape", "dtype", "rows", "values")

    def __init__(self, like, rows, values):
        self.shape, self.dtype, self.rows, self.values = like.shape, like.dtype, rows, values

    def write(self, out=None):
        if out is None:
            out = array_module(self.values).empty(self.shape, self.dtype)
        out.fill(0)
        self.add_to(out)
        return out

    def add_to(self, array):
        array[self.rows] += self.values


def _evaluated(gradient):
    return gradient.write() if isinstance(gradient, (DeferredMatmul, SparseRows)) else gradient


def _accumulate(leaf, gradient):
    unevaluated = isinstance(gradient, (DeferredMatmul, SparseRows))
    if leaf.grad is not None and unevaluated:
        gradient.add_to(leaf.grad)
    elif leaf.grad is not None:
        leaf.grad += gradient
    elif unevaluated:
        leaf.grad = gradient.write(out=leaf.grad_buffer)
    elif leaf.grad_buffer is not None:
        leaf.grad_buffer[...] = gradient
        leaf.grad = leaf.grad_buffer
    else:                       # a copy: one array may be the gradient of several Tensors
        leaf.grad = array_module(gradient).array(gradient)


def primitive(function):
    """Turn `function(*arrays, **options) -> (output, vjp)` into a function of Tensors.

    Arguments may be Tensors, arrays or scalars, given by position or by name. vjp returns one array
    per argument from the first on (a tuple, or a single array for the first alone); trailing
    arguments that have no gradient may be left out. Tensors are all on one device; a primitive that
    takes masks, indices or references beside them takes them from the CPU too, and moves them.
    The result is always a Tensor. Errors name the primitive and the shapes it was given.
    """
    name, signature = function.__name__, inspect.signature(function)

    @functools.wraps(function)
    def apply(*inputs, **options):
        if any(isinstance(option, Tensor) for option in options.values()):
            bound = signature.bind(*inputs, **options)      # Tensors named: to their positions
            bound.apply_defaults()                              # or those after a gap would get no gradient
            inputs, options = bound.args, bound.kwargs
        arrays = [_array(x) for x in inputs]
        options = {key: _array(option) for key, option in options.items()}
        dtypes = {x.dtype for x in inputs if isinstance(x, Tensor)}
        try:
            array_module(*(x.data for x in inputs if isinstance(x, Tensor)))
            output, vjp = function(*arrays, **options)
        except (IndexError, TypeError, ValueError) as error:
            kind = next(k for k in (IndexError, TypeError, ValueError) if isinstance(error, k))
            raise kind(f"{_call(name, arrays)}: {error}") from error
        if len(dtypes | {output.dtype}) > 1 and dtypes:
            raise TypeError(f"{_call(name, arrays)}: mixed dtypes "
                            f"{' and '.join(sorted(map(str, dtypes | {output.dtype})))}; convert one side")
        if (watched := getattr(_thread, "watched", None)) is not None and not array_module(output).isfinite(output).all():
            watched.append(f"the output of {name}, shape {output.shape}")
        result = Tensor(output)
        if grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            result.requires_grad = True
            result.node = Node(name, inputs, vjp, output)
        return result

    return apply


def activation_checkpoint(function, *inputs):
    """function(*inputs), Tensors to a Tensor, of which the inputs alone are kept: backward computes it again.

    Chen et al. 2016, arXiv:1604.06174. Memory is paid for with another forward; the results are the same
    bit for bit. Leaves that the function uses beside its inputs get their gradients too; it may hold no
    other Tensor, whose history backward would walk twice.
    """
    if not grad_enabled():
        return function(*inputs)
    with no_grad():
        output = function(*inputs)
    arrays = [x.data for x in inputs]

    def vjp(dy):
        leaves = [Tensor(array, requires_grad=True) for array in arrays]
        with _recording(True):                  # backward itself may have been called under no_grad
            function(*leaves).backward(dy)
        return tuple(array_module(a).zeros_like(a) if leaf.grad is None else leaf.grad
                     for a, leaf in zip(arrays, leaves))
    output.requires_grad, output.node = True, Node("activation_checkpoint", inputs, vjp, output)
    return output


def _array(x):
    if isinstance(x, Tensor):
        return x.data
    # np.float64(2) would turn float32 arithmetic into float64; the Python scalar does not.
    return x.item() if isinstance(x, np.generic) else x


def _describe(x):
    return f"{x.shape}, {x.dtype}" if hasattr(x, "shape") else repr(x)


def _call(name, arrays):
    return f"{name}({', '.join(str(a.shape) if hasattr(a, 'shape') else repr(a) for a in arrays)})"


def grad_enabled():
    """Whether primitives called in this thread are being recorded."""
    return getattr(_thread, "grad_enabled", True)


def no_grad():
    """Within it, nothing is recorded and nothing is kept for a backward."""
    return _recording(False)


@contextlib.contextmanager
def _recording(enabled):
    before, _thread.grad_enabled = grad_enabled(), enabled
    try:
        yield
    finally:
        _thread.grad_enabled = before


def first_nonfinite(function):
    """Which primitive first gives a NaN or an infinity when function() is called.

    Returns "the output of NAME, shape (..)", or None.
    """
    before, _thread.watched = getattr(_thread, "watched", None), []
    try:
        function()
        return next(iter(_thread.watched), None)
    finally:
        _thread.watched = before
