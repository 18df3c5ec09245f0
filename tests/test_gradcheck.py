"""gradcheck finds wrong gradients: primitives with a right forward and a wrong backward must fail, each by name."""
import numpy as np
import pytest
from hypothesis import given

from helpers import normal, rngs
from minilm import Tensor, layers, ops, primitive
from minilm.gradcheck import GradientError, gradcheck, relative_error
from minilm.optim import AdamW

T, K, V = 5, 4, 6
TARGETS = np.array([0, 1, 2, 3, 5])


# The attention of one head with a causal mask, and five errors in its backward.

def softmax_backward(P, dP):
    return P * (dP - (dP * P).sum(axis=-1, keepdims=True))


def attention(bug):
    @primitive
    def attend(q, k, v):
        def weights(causal=True):
            S = np.exp(q @ k.T / K ** 0.5) * (np.tri(T) if causal else 1)
            return S / S.sum(axis=-1, keepdims=True)

        def vjp(dO):
            P = weights(causal=bug != "causal mask dropped in the backward")
            dP = dO @ v.T
            dS = P * dP if bug == "rowsum of the softmax forgotten" else softmax_backward(P, dP)
            if bug != "1/sqrt(K) missing":
                dS = dS / K ** 0.5
            dK = (dS if bug == "dK transposed" else dS.T) @ q
            dV = (P if bug == "dV transposed" else P.T) @ dO
            return dS @ k, dK, dV
        return weights() @ v, vjp
    return attend


ATTENTION_BUGS = ["dK transposed", "dV transposed", "causal mask dropped in the backward", "1/sqrt(K) missing",
                  "rowsum of the softmax forgotten"]


# Other primitives with a right forward and a wrong backward.

@primitive
def rms_norm_without_the_projection(x, weight):
    n = x / np.sqrt((x * x).mean(axis=-1, keepdims=True))
    return n * weight, lambda dy: (dy * weight * n / x, (dy * n).sum(axis=0))


@primitive
def swiglu_with_gate_and_up_swapped(gate_up):
    y, vjp = layers.swiglu.__wrapped__(gate_up)
    return y, lambda dy: np.roll(vjp(dy), K // 2, axis=-1)


@primitive
def token_log_probs_with_a_shifted_target(hidden, unembedding):
    y, _ = layers.token_log_probs.__wrapped__(hidden, unembedding, TARGETS)
    return y, layers.token_log_probs.__wrapped__(hidden, unembedding, np.roll(TARGETS, 1))[1]


@primitive
def masked_sum_without_the_mask(x):
    return (x * np.tri(T, K)).sum(), lambda dy: np.full_like(x, dy)


@primitive
def silu_with_one_of_two_paths(x):
    s = ops.stable_sigmoid(x)
    return x * s, lambda dy: dy * s


@primitive
def square_without_its_factor(x):
    return x ** 2, lambda dy: dy * x


@primitive
def mean_without_its_denominator(x):
    return x.mean(), lambda dy: np.full_like(x, dy)


@primitive
def rope_turned_forward_again(x):
    tables = layers.rope_tables(np.arange(T), K, dtype="float64")
    rotate = layers.rope.__wrapped__
    return rotate(x, *tables)[0], lambda dy: rotate(dy, *tables)[0]


@primitive
def gather_that_overwrites_repeats(x):
    rows = np.array([0, 1, 0])
    def vjp(dy):
        dx = np.zeros_like(x)
        dx[rows] = dy
        return dx
    return x[rows], vjp


SABOTAGED = {bug: (attention(bug), [(T, K)] * 3) for bug in ATTENTION_BUGS} | {
    "projection of rms_norm forgotten": (rms_norm_without_the_projection, [(T, K), (K,)]),
    "gate and up swapped": (swiglu_with_gate_and_up_swapped, [(T, K)]),
    "target shifted": (token_log_probs_with_a_shifted_target, [(T, K), (V, K)]),
    "mask dropped": (masked_sum_without_the_mask, [(T, K)]),
    "fan-out not accumulated": (silu_with_one_of_two_paths, [(T, K)]),
    "repeated index overwritten": (gather_that_overwrites_repeats, [(T, K)]),
    "factor 2 missing": (square_without_its_factor, [(T, K)]),
    "1/N missing": (mean_without_its_denominator, [(T, K)]),
    "rotation not reversed": (rope_turned_forward_again, [(1, 1, T, K)]),
}


@pytest.mark.parametrize("directions", [None, 2], ids=["every element", "directions"])
@pytest.mark.parametrize("bug", SABOTAGED)
@given(rng=rngs)
def test_a_sabotaged_backward_is_caught(bug, directions, rng):
    function, shapes = SABOTAGED[bug]
    with pytest.raises(GradientError, match="relative error"):
        gradcheck(function, *(normal(rng, *shape) for shape in shapes), directions=directions, rng=rng)


@pytest.mark.parametrize("directions", [None, 2], ids=["every element", "directions"])
@given(rng=rngs)
def test_the_same_attention_without_a_bug_passes(directions, rng):
    assert gradcheck(attention(bug=None), *(normal(rng, T, K) for _ in range(3)), directions=directions, rng=rng) < 1e-6


@pytest.mark.parametrize("scale, passes", [(0.02, True), (1.0, False)])
def test_tiny_weights_and_an_absolute_tolerance_hide_a_transposed_dk(scale, passes):
    def dk(bug):
        rng = np.random.default_rng(0)
        q, k, v = (normal(rng, T, K, scale=scale) for _ in range(3))
        attention(bug)(q, k, v).backward(np.ones((T, K)) / T)
        return k.grad

    right, wrong = dk(None), dk("dK transposed")
    assert np.abs(wrong - right).max() > 0.5 * np.abs(right).max()          # equally wrong at both scales
    assert np.allclose(wrong, right, rtol=0, atol=1e-3) == passes


@pytest.mark.parametrize("directions", [None, 2], ids=["every element", "directions"])
def test_a_backward_that_is_wrong_only_for_uneven_cotangents_is_caught(directions, rng):
    """A softmax adds up to 1, so with a cotangent of ones a gradient of 0 is right."""
    @primitive
    def softmax_without_a_gradient(x):
        return np.exp(x) / np.exp(x).sum(), lambda dy: 0 * dy

    with pytest.raises(GradientError, match="relative error"):
        gradcheck(softmax_without_a_gradient, normal(rng, 4), directions=directions)


def test_the_step_grows_with_x():
    """At x = 1e6 a fixed step of 6e-6 would be lost in the rounding of x^2, which is 1e-4."""
    gradcheck(lambda x: x * x, Tensor([1e6, -3e6], requires_grad=True))


# Reports.

def test_the_error_shows_the_worst_element_and_both_values():
    with pytest.raises(GradientError, match=r"Tensor 0, shape \(3,\): relative error 5.00e-01 .*worst at \(2,\): "
                                            r"backward 10, differences 20") as caught:
        gradcheck(lambda x: square_without_its_factor(x).sum(), Tensor([1.0, -2.0, 10.0], requires_grad=True))
    assert isinstance(caught.value, AssertionError)


def test_the_relative_error_is_relative_to_the_largest_entry_with_a_minimum():
    assert relative_error(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == (0.25, (1,))
    assert relative_error(np.array([[1e-6]]), np.array([[0.0]])) == (pytest.approx(1e-3), (0, 0))
    assert relative_error(np.zeros((0, 2)), np.zeros((0, 2))) == (0.0, ())


def test_a_gradient_that_never_arrives_is_reported(rng):
    x, y = normal(rng, 2), normal(rng, 3)
    with pytest.raises(GradientError, match=r"no gradient reached Tensor 1 \(shape \(3,\)\)"):
        gradcheck(lambda x, y: x * 2.0, x, y)


@pytest.mark.parametrize("directions", [None, 1])
def test_a_nan_fails_the_check(directions, rng):
    @primitive
    def broken(x):
        return x * 1, lambda dy: dy * np.nan

    with pytest.raises(GradientError, match="relative error nan"):
        gradcheck(broken, normal(rng, 2), directions=directions)


def test_a_direction_orthogonal_to_the_gradient_is_compared_with_a_typical_derivative():
    """Its derivative and its error are both tiny next to the gradient, so the check passes."""
    class Across(np.random.Generator):
        directions = iter([np.array([1.0, 1.0]), np.array([1.0, -1.0 + 1e-7])])

        def normal(self, size):
            return next(self.directions)

    x = Tensor([1.234, 2.345], requires_grad=True)
    gradcheck(lambda x: x * 1e4, x, directions=1, rng=Across(np.random.PCG64(0)))


@given(rng=rngs)
def test_a_direction_finds_an_error_of_one_in_a_thousand_among_many_elements(rng):
    """Errors are compared with the typical derivative of a direction, |gradient| / sqrt(number of elements)."""
    @primitive
    def almost_sum(x):
        return x.sum(), lambda dy: np.full_like(x, 1.001 * dy)

    with pytest.raises(GradientError, match="relative error"):
        gradcheck(almost_sum, normal(rng, 1000), directions=20, tolerance=3e-4, rng=rng)


# Tensors that share memory, and memory that cannot be written.

W = np.random.default_rng(0).normal(size=(3, 3))
SHARED = {
    "the same array twice": (lambda a, b: a * b, [W, W]),
    "W and its transpose": (lambda a, b: a @ b, [W, W.T]),
    "overlapping parts": (lambda a, b: a * ops.tanh(b), [W[:2], W[1:]]),
    "a row and all rows": (lambda a, b: a * b, [W[0], W]),
    "in Fortran's order": (lambda a: ops.tanh(a) * a, [np.asfortranarray(W)]),
    "backwards": (lambda a: ops.tanh(a) * a, [W[::-1, ::-2]]),
    "read-only": (lambda a: a * a, [np.broadcast_to(2.0, (3,))]),
    "read-only and shared": (lambda a, b: a / b, [np.broadcast_to(2.0, (2, 3)), np.broadcast_to(2.0, (3,))]),
}


@pytest.mark.parametrize("directions", [None, 2], ids=["every element", "directions"])
@pytest.mark.parametrize("name", SHARED)
def test_tensors_that_share_memory_or_are_read_only_pass_and_keep_their_arrays(name, directions):
    function, arrays = SHARED[name]
    tensors = [Tensor(a, requires_grad=True) for a in arrays]
    assert gradcheck(function, *tensors, directions=directions) < 1e-8
    assert all(t.data is a for t, a in zip(tensors, arrays))
    with pytest.raises(GradientError, match="relative error"):          # and a wrong gradient is still found
        gradcheck(lambda *x: square_without_its_factor(function(*x)), *tensors, directions=directions)


@pytest.mark.parametrize("directions", [None, 2], ids=["every element", "directions"])
def test_a_tensor_that_is_given_twice_is_checked_once_and_keeps_its_array(directions, rng):
    x = normal(rng, 2, 3)
    array, before = x.data, x.data.copy()
    assert gradcheck(lambda a, b: a * ops.tanh(b), x, x, directions=directions) < 1e-8
    assert x.data is array and np.array_equal(array, before)


@pytest.mark.parametrize("directions", [None, 2], ids=["every element", "directions"])
def test_arrays_without_elements_have_no_error(directions, rng):
    empty = Tensor(np.zeros((0, 3)), requires_grad=True)
    assert gradcheck(lambda x: ops.sum(x * x), empty, directions=directions) == 0
    assert gradcheck(lambda x: x[:0], normal(rng, 2, 3), directions=directions) == 0
    assert 0 < gradcheck(lambda x, y: ops.sum(x * x) + ops.tanh(y), empty, normal(rng, 2), directions=directions) < 1e-8


def test_a_constant_that_shares_memory_with_a_checked_tensor_stays_constant():
    gradcheck(lambda a, b: a * b, Tensor(W, requires_grad=True), Tensor(W))


# Errors, and values that it restores.

def test_float32_raises(rng):
    with pytest.raises(TypeError, match="needs float64"):
        gradcheck(ops.tanh, normal(rng, 2, dtype=np.float32))


@pytest.mark.parametrize("result", [3.0, None, np.ones(2), [Tensor([1.0])]], ids=lambda result: type(result).__name__)
def test_a_function_that_gives_no_tensor_and_a_seed_for_a_generator_are_named(result, rng):
    with pytest.raises(TypeError, match="gradcheck: function gave .*; it must give a Tensor"):
        gradcheck(lambda x: result, normal(rng, 2))
    with pytest.raises(TypeError, match="gradcheck: rng is 0 .int.; it must be a numpy Generator"):
        gradcheck(ops.tanh, normal(rng, 2), rng=0)


def test_nothing_to_check_raises():
    with pytest.raises(ValueError, match="no Tensor has requires_grad=True"):
        gradcheck(ops.tanh, Tensor([1.0]))


@pytest.mark.parametrize("directions", [0, -1])
def test_no_directions_raise(directions, rng):
    with pytest.raises(ValueError, match=f"directions is {directions}; it must be at least 1"):
        gradcheck(ops.tanh, normal(rng, 2), directions=directions)


def test_the_gradients_that_an_optimiser_holds_do_not_change(rng):
    x = normal(rng, 2, 3)
    optimizer = AdamW({"x": x})
    ops.sum(x).backward()
    gradcheck(ops.tanh, x)
    assert x.grad is x.grad_buffer and (optimizer.grad == 1).all()


@pytest.mark.parametrize("directions", [None, 3])
@pytest.mark.parametrize("calls", [2, 3])
def test_values_are_restored_when_the_function_raises(directions, calls, rng):
    x, left = normal(rng, 2, 3), [1.0] * (calls - 1)
    before = x.data.copy()
    with pytest.raises(IndexError):
        gradcheck(lambda x: ops.tanh(x) * left.pop(), x, directions=directions)
    assert np.array_equal(x.data, before)


@pytest.mark.parametrize("directions", [None, 3])
def test_values_and_gradients_of_the_tensors_are_restored(directions, rng):
    x = normal(rng, 2, 3)
    x.grad = np.full((2, 3), 7.0)
    before = x.data.copy()
    gradcheck(ops.tanh, x, directions=directions)
    assert np.array_equal(x.data, before) and np.array_equal(x.grad, np.full((2, 3), 7.0))
