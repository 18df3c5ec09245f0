"""Shared by the tests: inputs and weights of order 1 in float64, and comparisons that say where they fail."""
import os
import select
import time
import tracemalloc
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from minilm import ops
from minilm.exact.gradients import parameter_gradients, redraw_weights  # noqa: F401 (the first for the tests)
from minilm.gradcheck import relative_error
from minilm.model import Config, Transformer
from minilm.tensor import Tensor

rngs = st.integers(0, 2 ** 32 - 1).map(np.random.default_rng)
"""A hypothesis strategy: a numpy Generator whose seed hypothesis chooses."""


@st.composite
def distributions(draw, count, P=2, N=7):
    """A hypothesis strategy: log-probs (P,Y) of `count` random distributions over Y responses."""
    z = draw(rngs).normal(size=(count, P, N))
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def normal(rng, *shape, scale=1.0, dtype=np.float64):
    """A leaf of N(0, scale) entries."""
    return Tensor((rng.normal(size=shape) * scale).astype(dtype), requires_grad=True)


def small_transformer(rng, dtype=np.float64, **config):
    """A Transformer whose weights, norms included, are all redrawn from N(0, 0.7^2): of order 1."""
    config = Config(**{"vocab_size": 7, "width": 4, "layers": 1, "heads": 2, "ffn_width": 3, "context": 16, **config})
    return redraw_weights(Transformer(config, rng, dtype), rng)


def padded(sequences, left, right, fill=0):
    """Token lists, padded to the longest and by `left` and `right` more tokens: tokens and mask, (B,T)."""
    longest = max(map(len, sequences))
    tokens = np.full((len(sequences), left + longest + right), fill)
    mask = np.zeros(tokens.shape)
    for i, sequence in enumerate(sequences):
        start = left + (longest - len(sequence) if left else 0)
        tokens[i, start:start + len(sequence)] = sequence
        mask[i, start:start + len(sequence)] = 1
    return tokens, mask


def assert_close(actual, expected, tolerance=1e-10, name="value"):
    """max|actual - expected| / max(max|expected|, 1e-3) <= tolerance; on failure, shows the worst element."""
    actual, expected = (np.asarray(x.data if isinstance(x, Tensor) else x) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    error, worst = relative_error(actual, expected)
    assert error <= tolerance, (f"{name}: relative error {error:.2e} (tolerance {tolerance:.0e}), worst at {worst}: "
                                f"{actual[worst]:.17g}, expected {expected[worst]:.17g}")


def gradients(function, *tensors, cotangent=None):
    """The value of function(*tensors), and the gradient of every leaf (None if none reached it).

    The default cotangent has N(0,1) entries, the same for all functions with outputs of one shape.
    """
    for t in tensors:
        t.grad = None
    output = function(*tensors)
    if cotangent is None:
        cotangent = np.random.default_rng(7).normal(size=output.shape)
    ops.sum(output * cotangent).backward()
    return output.data, [t.grad for t in tensors]


def assert_same(function, other, *tensors, tolerance=1e-10):
    """Two implementations of one function agree in value, and in the gradient of every tensor."""
    value, grads = gradients(function, *tensors)
    expected, expected_grads = gradients(other, *tensors)
    assert_close(value, expected, tolerance)
    for i, (grad, expected_grad) in enumerate(zip(grads, expected_grads)):
        assert_close(grad, expected_grad, tolerance, f"gradient of tensor {i}")


def assert_same_gradients(actual, expected, factor=1.0):
    """The gradients of every parameter agree, up to the factor; and the expected ones are not all 0."""
    assert max(np.abs(g).max() for g in expected.values()) > 1e-6, "every expected gradient is 0"
    for name, gradient in expected.items():
        assert_close(actual[name], factor * gradient, name=name)


def has_ended(process):
    """Whether a process that is not our child has ended (it may still be a zombie)."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def gradient_error(actual, expected):
    """The relative error of the gradients of all parameters, as one vector."""
    return relative_error(*(np.concatenate([g.reshape(-1) for g in side.values()]) for side in (actual, expected)))[0]


def log_probs_along(model, world, gradients, step):
    """d log_pi (P,Y) / d learning_rate of gradient descent, by central differences of +-step."""
    sides = []
    for sign in (1, -1):
        for name, p in model.parameters().items():
            p.data -= sign * step * gradients[name]
        sides.append(world.log_probs(model).data)
        for name, p in model.parameters().items():
            p.data += sign * step * gradients[name]
    return (sides[0] - sides[1]) / (2 * step)


def peak_memory(function):
    """The peak of bytes allocated while function() runs, beyond those allocated before (NumPy reports its arrays)."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def read_until(terminal, end, press=None, seconds=120):
    """What a program shows at this pseudo-terminal, up to the bytes `end`, or, with None, until the program closes it.

    The key `press` is pressed first, and again when nothing has been shown for five seconds: CPython does not hear a
    Ctrl-C that arrives between the prompt of input() and its read. AssertionError after `seconds`.
    """
    shown, deadline, silence = b"", time.monotonic() + seconds, 0
    while end is None or not shown.endswith(end):
        assert time.monotonic() < deadline, f"{end!r} was not shown in {seconds} s; shown was {shown!r}"
        if press and silence % 5 == 0:
            os.write(terminal, press)
        silence += 1
        if select.select([terminal], [], [], 1)[0]:
            silence = 1
            try:
                block = os.read(terminal, 4096)
            except OSError:     # how Linux reports that the other side has closed
                block = b""
            if not block:
                return shown
            shown += block
    return shown
