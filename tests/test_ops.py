"""minilm.ops: the value of every primitive equals NumPy's, and its gradient equals finite differences, on shapes
that hypothesis chooses. Then properties of single primitives."""
import functools
import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, broadcastable_shapes, mutually_broadcastable_shapes

from helpers import assert_close, assert_same, gradients, normal, rngs
from minilm import Tensor, activations, ops
from minilm.gradcheck import gradcheck


class Plain:
    """NumPy, and formulas of the functions that NumPy does not have."""

    def __getattr__(self, name):
        return getattr(np, name)

    def sigmoid(self, x):
        return 1 / (1 + np.exp(-x))

    def softplus(self, x):
        return np.log(1 + np.exp(x))

    def log_sigmoid(self, x):
        return np.log(self.sigmoid(x))

    def softmax(self, x, axis=-1):
        return np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)

    def log_softmax(self, x, axis=-1):
        return np.log(self.softmax(x, axis))

    def logsumexp(self, x, axis=-1, keepdims=False):
        return np.log(np.exp(x).sum(axis=axis, keepdims=keepdims))

    def getitem(self, x, index):
        return x[index]

    def embed(self, table, indices):
        return table[indices]

    def gather(self, x, indices):
        return np.array([x[i][indices[i]] for i in np.ndindex(indices.shape)]).reshape(indices.shape)


# A case: from hypothesis' draw and an rng, a function of a module (ops, or Plain) and arrays, and the arrays.

SHAPES = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
FULL = array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=3)


def away_from(kink, x):
    """x, moved away from a point where a function is not differentiable (or too steep for finite differences)."""
    return np.where(x >= kink, x + 0.1, x - 0.1)


def elementwise(name, domain=lambda x: x):
    def case(draw, rng):
        return lambda m, x: getattr(m, name)(x), [domain(rng.normal(size=draw(SHAPES)))]
    return case


def positive(x):
    return np.exp(x)


def power_of_a_number(draw, rng):
    exponent = draw(st.sampled_from([0.5, 1, 2, 3, -1, -1.5]))
    x = rng.normal(size=draw(SHAPES))
    x = positive(x / 2) if exponent % 1 else away_from(0, x)
    return lambda m, x: m.power(x, exponent), [x]


def power(draw, rng):
    """Base or exponent may be a Python number."""
    kind = draw(st.sampled_from(["x^2", "2^y", "x^y"]))
    x, y = pair(draw, rng)
    if kind == "x^2":
        return power_of_a_number(draw, rng)
    if kind == "2^y":
        return lambda m, y: m.power(2.5, y), [y]
    return lambda m, x, y: m.power(x, y), [positive(x / 2), y]


def clip(draw, rng):
    return lambda m, x: m.clip(x, -0.5, 0.5), [away_from(0.5, away_from(-0.5, rng.normal(size=draw(SHAPES))))]


def pair(draw, rng):
    """Two arrays whose shapes broadcast, empty ones and scalars among them."""
    shapes = draw(mutually_broadcastable_shapes(num_shapes=2, max_dims=3, min_side=0, max_side=3)).input_shapes
    return [rng.normal(size=shape) for shape in shapes]


def binary(name, second=lambda y: y):
    def case(draw, rng):
        x, y = pair(draw, rng)
        return lambda m, x, y: getattr(m, name)(x, y), [x, second(y)]
    return case


def extreme(name):
    def case(draw, rng):
        x, y = pair(draw, rng)
        return lambda m, x, y: getattr(m, name)(x, y), [np.round(x), np.round(y) + 0.5]       # no ties
    return case


def stretchable_to(shape):
    shapes = broadcastable_shapes(shape, max_dims=len(shape), min_side=0)
    return shapes.filter(lambda small: np.broadcast_shapes(small, shape) == shape)


def where(draw, rng):
    x, y = pair(draw, rng)
    shape = np.broadcast_shapes(x.shape, y.shape)
    condition = rng.random(draw(stretchable_to(shape))) < 0.5
    return lambda m, x, y: m.where(condition, x, y), [x, y]


def over_axes(name, shapes=FULL, **options):
    """A reduction, or a softmax, over an axis of either sign, over several, over all."""
    def case(draw, rng):
        x = rng.normal(size=draw(shapes))
        axes = st.integers(-x.ndim, x.ndim - 1) if x.ndim else st.nothing()
        several = st.lists(axes, unique_by=lambda i: i % x.ndim, min_size=1).map(tuple)
        chosen = {"axis": draw(st.none() | axes | several)}
        for option, values in options.items():
            chosen[option] = draw(values)
        return lambda m, x: getattr(m, name)(x, **chosen), [x]
    return case


def reshape(draw, rng):
    x = rng.normal(size=draw(SHAPES))
    shape = draw(st.sampled_from([x.shape[::-1], (x.size,), (1, *x.shape)] + [(-1,)] * (x.size > 0)))
    return lambda m, x: m.reshape(x, shape), [x]


def transpose(draw, rng):
    x = rng.normal(size=draw(SHAPES))
    axes = draw(st.none() | st.permutations([i - x.ndim * draw(st.booleans()) for i in range(x.ndim)]))
    return lambda m, x: m.transpose(x, axes=axes), [x]


def swapaxes(draw, rng):
    x = rng.normal(size=draw(FULL))
    i, j = (draw(st.integers(-x.ndim, x.ndim - 1)) for _ in range(2))
    return lambda m, x: m.swapaxes(x, i, j), [x]


def broadcast_to(draw, rng):
    shape = draw(SHAPES)
    return lambda m, x: m.broadcast_to(x, shape=shape), [rng.normal(size=draw(stretchable_to(shape)))]


def concatenate(draw, rng):
    shape = list(draw(FULL))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    arrays = []
    for shape[axis] in draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)):
        arrays.append(rng.normal(size=shape))
    return lambda m, *arrays: m.concatenate(arrays, axis=axis), arrays


INDICES = [0, -1, slice(None, None, -2), None, Ellipsis, (slice(1, 3), 0), (Ellipsis, 1), (None, 1, Ellipsis, None),
           (0, 1, 2), [2, 2, 0], np.array([[0, -1], [2, 0]]), (np.array([0, 0, 0]), np.array([1, 1, 2])),
           (np.array([0, 0]), None, slice(0, 2)), (slice(None), np.array([1, 1]), 0), (Ellipsis, np.array([3, 3, 0])),
           np.array([True, False, True]), (slice(None), np.array([False, True, True])), np.zeros(3, bool),
           np.zeros((3, 3, 4), bool), np.int64(1), (np.int64(1), slice(0, 0)), np.zeros(0, int)]


def getitem(draw, rng):
    index = draw(st.sampled_from(INDICES))
    return lambda m, x: m.getitem(x, index), [rng.normal(size=(3, 3, 4))]


def embed(draw, rng):
    rows = draw(st.integers(1, 4))
    indices = rng.integers(rows, size=draw(SHAPES))
    return lambda m, table: m.embed(table, indices), [rng.normal(size=(rows, 2))]


def gather(draw, rng):
    indices = rng.integers(4, size=draw(SHAPES))
    return lambda m, x: m.gather(x, indices), [rng.normal(size=(*indices.shape, 4))]


def matmul(draw, rng):
    M, K, N = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    left, right = draw(mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=3)).input_shapes
    x = draw(st.sampled_from([(K,), (*left, M, K)]))
    y = draw(st.sampled_from([(K,), (K, N), (*right, K, N)]))
    return lambda m, x, y: m.matmul(x, y), [rng.normal(size=x), rng.normal(size=y)]


KEEPDIMS = {"keepdims": st.booleans()}
CASES = {
    "add": binary("add"), "subtract": binary("subtract"), "multiply": binary("multiply"),
    "divide": binary("divide", lambda y: away_from(0, y) * 2), "negative": elementwise("negative"), "power": power,
    "exp": elementwise("exp"), "log": elementwise("log", positive), "sqrt": elementwise("sqrt", positive),
    "tanh": elementwise("tanh"), "sigmoid": elementwise("sigmoid"), "softplus": elementwise("softplus"),
    "log_sigmoid": elementwise("log_sigmoid"), "clip": clip, "minimum": extreme("minimum"),
    "maximum": extreme("maximum"), "absolute": elementwise("absolute", functools.partial(away_from, 0)),
    "where": where,
    "sum": over_axes("sum", SHAPES, **KEEPDIMS), "mean": over_axes("mean", **KEEPDIMS),
    "logsumexp": over_axes("logsumexp", **KEEPDIMS), "softmax": over_axes("softmax"),
    "log_softmax": over_axes("log_softmax"), "reshape": reshape, "transpose": transpose, "swapaxes": swapaxes,
    "broadcast_to": broadcast_to, "concatenate": concatenate, "getitem": getitem, "embed": embed, "gather": gather,
    "matmul": matmul,
}


def test_every_primitive_of_ops_has_a_case():
    of_arrays = {"unbroadcast", "stable_sigmoid", "stable_softplus"}
    public = {name for name, f in inspect.getmembers(ops, inspect.isfunction)
              if f.__module__ == ops.__name__ and not name.startswith("_")}
    assert public - of_arrays == set(CASES)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40)
@given(data=st.data(), rng=rngs)
def test_the_value_equals_numpys_and_the_gradient_equals_finite_differences(name, data, rng):
    function, arrays = CASES[name](data.draw, rng)
    tensors = [Tensor(a, requires_grad=True) for a in arrays]
    assert_close(function(ops, *tensors), function(Plain(), *arrays), 1e-12)
    gradcheck(lambda *tensors: function(ops, *tensors), *tensors)


# Far from zero.

FAR = {     # value and derivative at -1000, 0, 1000
    "sigmoid": ([0, 0.5, 1], [0, 0.25, 0]),
    "softplus": ([0, np.log(2), 1000], [0, 0.5, 1]),
    "log_sigmoid": ([-1000, -np.log(2), 0], [1, 0.5, 0]),
    "tanh": ([-1, 0, 1], [0, 1, 0]),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FAR)
def test_sigmoid_softplus_log_sigmoid_and_tanh_have_finite_values_and_gradients_at_1000(name, dtype):
    x = Tensor(np.array([-1000, 0, 1000], dtype), requires_grad=True)
    with np.errstate(all="raise", under="ignore"):
        value, (grad,) = gradients(getattr(ops, name), x, cotangent=np.ones(3, dtype))
    for actual, expected in zip((value, grad), FAR[name]):
        assert_close(actual, np.array(expected), np.finfo(dtype).eps)


@pytest.mark.parametrize("shift", [-1000, 1000])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_a_shift_of_all_logits_by_1000_changes_no_gradient(name, shift, rng):
    x = normal(rng, 2, 5)
    function = getattr(ops, name)
    constant = shift if name == "logsumexp" else 0
    assert_same(lambda x: function(x + shift) - constant, function, x)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_logits_2000_apart_stay_finite(name):
    x = Tensor([[-1000.0, 1000.0]], requires_grad=True)
    with np.errstate(all="raise", under="ignore"):
        value, (grad,) = gradients(getattr(ops, name), x)
    assert np.isfinite(value).all() and np.isfinite(grad).all()


def test_small_log_probs_at_large_logits_keep_their_digits_in_float32():
    likely, unlikely = ops.log_softmax(np.array([1000, 996], np.float32)).data
    assert_close(likely, -np.log1p(np.exp(-4)), 1e-5)
    assert_close(unlikely, -4 - np.log1p(np.exp(-4)), 1e-6)


def test_the_log_of_a_sum_of_zeros_is_minus_infinity():
    with np.errstate(divide="ignore"):
        assert ops.logsumexp(np.array([[-np.inf, -np.inf], [-np.inf, 2.0]])).data.tolist() == [-np.inf, 2]


# Ties, kinks, masks.

def test_minimum_shares_the_gradient_of_a_tie():
    x, y = Tensor([1.0, 2.0, 3.0], requires_grad=True), Tensor([1.0, 5.0, 0.0], requires_grad=True)
    _, (dx, dy) = gradients(ops.minimum, x, y, cotangent=np.ones(3))
    assert dx.tolist() == [0.5, 1, 0] and dy.tolist() == [0.5, 0, 1]


def test_clip_has_gradient_0_outside_and_1_at_the_ends():
    x = Tensor([-2.0, -1.0, 0.0, 1.0, 2.0], requires_grad=True)
    _, (dx,) = gradients(lambda x: ops.clip(x, -1.0, 1.0), x, cotangent=np.ones(5))
    assert dx.tolist() == [0, 1, 1, 1, 0]


def test_where_gives_gradient_0_to_a_nan_that_is_not_selected():
    x, y = Tensor([np.nan, 1.0], requires_grad=True), Tensor([2.0, np.inf], requires_grad=True)
    infinite = np.array([np.inf, np.inf])
    value, (dx, dy) = gradients(lambda x, y: ops.where(np.array([False, True]), x, y), x, y, cotangent=infinite)
    assert value.tolist() == [2, 1] and dx.tolist() == [0, np.inf] and dy.tolist() == [np.inf, 0]


@pytest.mark.parametrize("x, y", [((2, 0), (0, 3)), ((2, 3), (3, 0)), ((0,), (0,))], ids=str)
def test_a_product_with_an_empty_matrix_is_numpys(x, y):
    x, y = Tensor(np.ones(x), requires_grad=True), Tensor(np.ones(y), requires_grad=True)
    assert_close(x @ y, x.data @ y.data)
    gradcheck(ops.matmul, x, y)


@pytest.mark.parametrize("x, y", [((2, 3, 4, 2), (3, 2, 5)), ((3, 4, 2), (2, 1, 2, 5)), ((2, 1, 4, 2), (1, 3, 2, 5)),
                                  ((4, 2), (3, 2, 5)), ((2,), (3, 2, 5)), ((4, 2), (2, 2)), ((3, 4, 2), (2, 2))],
                         ids=str)
def test_products_of_batches_and_of_square_matrices_have_the_gradients_of_finite_differences(x, y, rng):
    """Broadcast leading axes are summed over, and a square matrix is transposed."""
    x, y = normal(rng, *x), normal(rng, *y)
    assert_close(x @ y, x.data @ y.data)
    gradcheck(ops.matmul, x, y)


def test_the_mean_over_each_row_of_an_empty_batch_is_empty():
    assert ops.mean(Tensor(np.ones((0, 3))), axis=1).shape == (0,)


def test_the_gradient_of_x_to_the_power_0_is_0_also_at_0():
    x = Tensor([0.0, 2.0], requires_grad=True)
    _, (dx,) = gradients(lambda x: x ** 0, x)
    assert dx.tolist() == [0, 0]


def test_the_gradient_of_an_exponent_is_0_where_the_base_is_0_and_nan_where_it_is_negative():
    x, y = Tensor([0.0, 0.0, -2.0], requires_grad=True), Tensor([2.0, 0.0, 2.0], requires_grad=True)
    _, (dx, dy) = gradients(ops.power, x, y, cotangent=np.ones(3))
    assert dx.tolist() == [0, 0, -4] and dy[:2].tolist() == [0, 0] and np.isnan(dy[2])


def test_the_gradient_of_a_negative_exponent_is_minus_infinity_where_the_base_is_0():
    """As x goes to 0, x^y log x goes to -infinity."""
    y = Tensor([-1.0, -0.5, 1.0], requires_grad=True)
    with np.errstate(divide="ignore"):
        _, (dy,) = gradients(lambda y: ops.power(np.zeros(3), y), y, cotangent=np.ones(3))
    assert dy.tolist() == [-np.inf, -np.inf, 0]
    _, (near,) = gradients(lambda y: ops.power(np.full(3, 1e-9), y), y, cotangent=np.ones(3))
    assert near[0] < near[1] < -1e5 and abs(near[2]) < 1e-7


def test_operators_for_powers_and_absolute_values_are_those_of_ops(rng):
    x, y = normal(rng, 3), normal(rng, 3)
    assert_close(2.0 ** y, ops.power(2.0, y))
    assert_close(abs(x) ** y, ops.power(ops.absolute(x), y))


def test_activations_of_other_models_have_their_formulas_and_the_gradients_of_finite_differences(rng):
    x = Tensor(away_from(0, rng.normal(size=(4, 5))), requires_grad=True)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x.data + 0.044715 * x.data ** 3))
    for function, expected in ((activations.relu, np.where(x.data > 0, x.data, 0)),
                               (activations.gelu, 0.5 * x.data * (1 + tanh))):
        assert_close(function(x), expected)
        gradcheck(function, x)
    z = np.linspace(-6, 6, 1001)
    exact = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in z])
    assert np.abs(activations.gelu(z).data - exact).max() < 5e-4


def test_the_gradients_at_the_kinks_of_relu_absolute_and_maximum():
    x = Tensor([0.0, 1.0], requires_grad=True)
    for function, wanted in ((activations.relu, [0, 1]), (ops.absolute, [0, 1]),
                             (lambda x: ops.maximum(x, 0.0), [0.5, 1])):
        _, (dx,) = gradients(function, x, cotangent=np.ones(2))
        assert dx.tolist() == wanted


# Indices.

def test_an_element_picked_twice_gets_both_gradients():
    x = Tensor(np.zeros(3), requires_grad=True)
    _, (dx,) = gradients(lambda x: x[np.array([0, 2, 0, 0])], x, cotangent=np.array([1.0, 10.0, 100.0, 1000.0]))
    assert dx.tolist() == [1101, 0, 10]


@pytest.mark.parametrize("bad", [-1, 5])
def test_embedding_an_index_outside_the_table_raises(bad):
    with pytest.raises(IndexError, match=rf"embed\(.*indices holds {bad}; it must hold integers from 0 to 4"):
        ops.embed(Tensor(np.zeros((5, 2))), np.array([0, bad]))


# Operators and methods.

@given(rng=rngs)
def test_operators_and_methods_equal_the_functions_of_their_names(rng):
    x, y, a = normal(rng, 2, 3), normal(rng, 2, 3), rng.normal(size=(2, 3))
    for operator, function in [
        (lambda x, y: x + y, ops.add), (lambda x, y: x - y, ops.subtract), (lambda x, y: x * y, ops.multiply),
        (lambda x, y: x / y, ops.divide), (lambda x, y: x @ y.T, lambda x, y: ops.matmul(x, ops.transpose(y))),
        (lambda x, y: -x + y ** 2, lambda x, y: ops.add(ops.negative(x), ops.power(y, 2))),
        (lambda x, y: a - x + a / y, lambda x, y: ops.add(ops.subtract(a, x), ops.divide(a, y))),
        (lambda x, y: a.T @ x + y.T @ a, lambda x, y: ops.add(ops.matmul(a.T, x), ops.matmul(ops.transpose(y), a))),
        (lambda x, y: x[1] + y.mean(axis=0), lambda x, y: ops.add(ops.getitem(x, 1), ops.mean(y, axis=0))),
        (lambda x, y: x.reshape(3, 2) + y.reshape((3, 2)),
         lambda x, y: ops.add(ops.reshape(x, shape=(3, 2)), ops.reshape(y, shape=(3, 2)))),
        (lambda x, y: x.transpose(1, 0) + y.transpose((1, 0)) + x.transpose(),
         lambda x, y: ops.transpose(x) + ops.transpose(y) + ops.transpose(x)),
    ]:
        assert_same(operator, function, x, y, tolerance=1e-15)
