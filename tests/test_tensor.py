"""minilm.tensor: what primitives record, what backward adds up and frees, and the errors."""
import copy
import pickle
import re
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given

from helpers import assert_close, normal, peak_memory, rngs, small_transformer
from minilm import Tensor, layers, no_grad, numpy_functions, ops, primitive
from minilm.backend import array_module, to_device
from minilm.checkpoint import load_into
from minilm.diverged import first_nonfinite
from minilm.exact.gradients import parameter_gradients, redraw_weights
from minilm.fast.activation_checkpointing import activation_checkpoint
from minilm.fast.flat_parameters import overlap
from minilm.gradcheck import gradcheck
from minilm.in_place import mark_changed
from minilm.model import RewardModel
from minilm.objectives import kl
from minilm.objectives.dpo import dpo_loss
from minilm.objectives.policy_gradient import policy_gradient_loss, ppo_clip_loss
from minilm.objectives.sft import sft_loss
from minilm.optim import AdamW
from minilm.packing import pack, scatter
from minilm.tensor import arrays_only, grad_enabled, watching

# Gradients add up.

def test_the_gradients_of_all_uses_of_a_value_add_up():
    x = Tensor(3.0, requires_grad=True)
    y = x * x                                   # twice in one call
    (y * x + y + x).backward()                  # y and x again in three others
    assert x.grad == 3 * 9 + 2 * 3 + 1


def test_two_backward_passes_add_to_the_gradient(rng):
    x = normal(rng, 3)
    for _ in range(2):
        (x * 5.0).sum().backward()
    assert np.array_equal(x.grad, np.full(3, 10.0))


def test_two_leaves_with_equal_gradients_have_arrays_of_their_own(rng):
    x, y = normal(rng, 3), normal(rng, 3)
    dz = np.ones(3)
    (x + y).backward(dz)                        # the vjp of add returns dz itself for both
    x.grad += 1
    assert np.array_equal(y.grad, np.ones(3)) and np.array_equal(dz, np.ones(3))


def test_backward_of_a_leaf_stores_its_cotangent(rng):
    x = normal(rng, 2)
    x.backward(np.array([2.0, 3.0]))
    assert np.array_equal(x.grad, [2, 3])


def test_only_leaves_that_require_a_gradient_keep_one(rng):
    x, constant = normal(rng, 2), Tensor(np.ones(2))
    y = x * constant
    y.sum().backward()
    assert x.grad is not None and constant.grad is None and y.grad is None


def test_backward_starts_from_the_given_cotangent(rng):
    x = normal(rng, 2, 2)
    cotangent = rng.normal(size=(2, 2))
    (x * 3.0).backward(cotangent)
    assert np.array_equal(x.grad, 3 * cotangent)


def test_a_vjp_may_get_a_read_only_broadcast_gradient(rng):
    writeable = []

    @primitive
    def watch(x):
        def vjp(dy):
            writeable.append(dy.flags.writeable)
            return dy
        return x * 1, vjp

    x = normal(rng, 2, 3)
    watch(x).sum().backward()                   # the vjp of sum returns broadcast_to(1.0, (2, 3))
    assert writeable == [False] and np.array_equal(x.grad, np.ones((2, 3)))
    x.grad += 1                                 # the leaf's own array can be written


def test_a_chain_of_ten_thousand_operations_needs_no_recursion():
    x = y = Tensor(1.0, requires_grad=True)
    for _ in range(10_000):
        y = y + 1.0
    y.backward()
    assert x.grad == 1 and y.item() == 10_001


def test_gradients_add_up_in_a_new_array(rng):
    """The vjp of add returns one array for both inputs. The other gradient of y must not be added to the one of u."""
    x, w = normal(rng, 3), normal(rng, 3)
    u, y = w * 1.0, x * 1.0
    v = y * 2.0
    dz = np.ones(3)
    ((y + u) + v).backward(dz)
    assert x.grad.tolist() == [3, 3, 3] and w.grad.tolist() == [1, 1, 1] and dz.tolist() == [1, 1, 1]


def test_an_array_a_product_and_rows_are_written_to_the_gradient_buffer_and_then_added(rng):
    """The buffer holds old numbers at first: here NaN."""
    x = rng.normal(size=(4, 3))
    uses = {"array": (lambda w: w * x, x),
            "product": (lambda w: x.T @ w, np.tile(x.sum(axis=1)[:, None], 3)),
            "rows": (lambda w: ops.embed(w, np.array([2, 0, 2])), np.array([[1], [0], [2], [0]]) * np.ones(3))}
    for use, expected in uses.values():
        w = normal(rng, 4, 3)
        w.grad_buffer = np.full((4, 3), np.nan)
        for times in (1, 2):
            use(w).sum().backward()
            assert w.grad is w.grad_buffer
            assert_close(w.grad, times * expected)


# One backward per graph.

def test_a_second_backward_raises(rng):
    loss = ops.tanh(normal(rng, 2)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through sum a second time"):
        loss.backward()


def test_a_second_backward_through_a_shared_part_raises_and_changes_no_gradient(rng):
    x, w = normal(rng, 2), normal(rng, 2)
    shared = ops.tanh(x)
    first, second = shared.sum(), (shared * w).sum()
    first.backward()
    before = x.grad.copy()
    with pytest.raises(RuntimeError, match="backward through tanh a second time"):
        second.backward()
    assert w.grad is None and np.array_equal(x.grad, before)


def test_arrays_kept_and_returned_by_a_primitive_are_freed_before_the_next_vjp_runs(rng):
    kept, returned, alive = [], [], []

    @primitive
    def hold(x):
        block, y = np.zeros(3), x.copy()
        kept.append(weakref.ref(block))
        returned.append(weakref.ref(y))
        def vjp(dy):
            alive.append([[ref() is not None for ref in refs] for refs in (kept, returned)])
            return dy + block
        return y, vjp

    y = hold(hold(hold(normal(rng, 3)))).sum()
    y.backward()
    # The outputs are freed even earlier, because no vjp needs them.
    assert alive == [[[i <= current for i in range(3)], [False] * 3] for current in (2, 1, 0)]
    assert not any(ref() is not None for ref in kept + returned)


# no_grad.

def test_no_grad_records_nothing_and_ends_also_after_an_error(rng):
    x = normal(rng, 2)
    with pytest.raises(ZeroDivisionError), no_grad():
        y = x * 2.0
        raise ZeroDivisionError
    assert not y.requires_grad and y.node is None
    assert (x * 2.0).requires_grad
    with pytest.raises(RuntimeError, match="nothing here requires a gradient"):
        y.sum().backward()


def test_no_grad_holds_in_its_own_thread_alone(rng):
    x, recorded = normal(rng, 2), {}

    def elsewhere():
        recorded["other"] = (x * 2.0).requires_grad

    with no_grad():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        recorded["this"] = (x * 2.0).requires_grad
    assert recorded == {"other": True, "this": False}


def test_an_inner_no_grad_does_not_end_the_outer_one(rng):
    x = normal(rng, 2)
    with no_grad():
        with no_grad():
            pass
        assert not (x * 2.0).requires_grad
    assert (x * 2.0).requires_grad


def test_tensors_that_require_no_gradient_are_not_recorded():
    assert (Tensor(1.0) * 2.0).node is None


# arrays_only and watching.

def test_within_arrays_only_primitives_take_and_return_arrays(rng):
    x, y = rng.normal(size=(2, 3)), rng.normal(size=(3, 2))
    with arrays_only():
        z = ops.tanh(ops.matmul(x, y))
        assert type(z) is np.ndarray
    assert np.array_equal(z, ops.tanh(Tensor(x) @ Tensor(y)).data)


def test_arrays_only_ends_with_its_block_also_after_an_error(rng):
    x = rng.normal(size=3)
    with arrays_only():
        with arrays_only():
            pass
        assert type(ops.exp(x)) is np.ndarray
    with pytest.raises(ZeroDivisionError), arrays_only():
        raise ZeroDivisionError
    assert isinstance(ops.exp(x), Tensor)


def test_arrays_only_holds_in_its_own_thread_alone(rng):
    x, kinds = rng.normal(size=3), []
    with arrays_only():
        thread = threading.Thread(target=lambda: kinds.append(type(ops.exp(x))))
        thread.start()
        thread.join()
    assert kinds == [Tensor]


def test_watching_sees_the_name_and_the_output_of_each_call_and_ends_also_after_an_error(rng):
    x, seen = normal(rng, 3), []
    with pytest.raises(ZeroDivisionError), watching(lambda name, output: seen.append((name, output.tolist()))):
        ops.exp(x * 2.0)
        raise ZeroDivisionError
    ops.tanh(x)
    assert seen == [("multiply", (x.data * 2).tolist()), ("exp", np.exp(x.data * 2).tolist())]


# Errors.

def test_backward_of_a_non_scalar_without_a_cotangent_raises(rng):
    with pytest.raises(ValueError, match=r"shape \(2, 3\) needs its cotangent"):
        normal(rng, 2, 3).backward()


def test_a_cotangent_of_another_shape_raises(rng):
    with pytest.raises(ValueError, match=r"shape \(2, 3\): the cotangent has shape \(3,\)"):
        normal(rng, 2, 3).backward(np.ones(3))


def test_mixed_dtypes_raise_and_name_the_primitive_and_shapes(rng):
    with pytest.raises(TypeError, match=r"multiply\(\(2, 1\), \(3,\)\): mixed dtypes float32 and float64"):
        normal(rng, 2, 1, dtype=np.float32) * normal(rng, 3)


def test_a_float64_array_beside_a_float32_tensor_raises(rng):
    with pytest.raises(TypeError, match="mixed dtypes float32 and float64"):
        normal(rng, 2, dtype=np.float32) + np.ones(2)


class FakeCuPyArray:
    """An array that minilm takes for an array on the GPU, on a machine without one."""
    shape, ndim, size, dtype = (2,), 1, 2, np.dtype(np.float64)


FakeCuPyArray.__module__ = "cupy._core.core"


def test_mixed_devices_raise_and_name_the_primitive(rng):
    with pytest.raises(TypeError, match=r"add\(\(2,\), \(2,\)\): .*CPU \(numpy\) and on the GPU \(cupy\) are mixed"):
        normal(rng, 2) + Tensor(FakeCuPyArray())
    with pytest.raises(TypeError, match="mixed"):
        array_module(np.ones(2), FakeCuPyArray())


def test_an_unknown_device_raises():
    with pytest.raises(ValueError, match="device is 'tpu'"):
        to_device(np.ones(2), "tpu")


@pytest.mark.parametrize("wrong, described", [
    (lambda dy: dy[:1], r"\(1,\), float64"),
    (lambda dy: dy.astype(np.float32), r"\(3,\), float32"),
    (lambda dy: None, "None"),
], ids=["shape", "dtype", "missing"])
def test_a_gradient_of_another_shape_or_dtype_raises_with_the_name_of_the_primitive(rng, wrong, described):
    @primitive
    def double(x):
        return 2 * x, wrong

    y = double(normal(rng, 3)).sum()
    with pytest.raises(RuntimeError, match=r"double: gradient for an input of shape \(3,\), .* as " + described):
        y.backward()


@pytest.mark.parametrize("function, described", [
    (lambda x: 2 * x, "ndarray"),
    (lambda x: np.stack([x, x]), "ndarray"),                    # two rows, as many as (output, vjp)
    (lambda x: (2 * x, 2 * x), "2 values"),
    (lambda x: (2 * x, lambda dy: 2 * dy, x), "3 values"),
], ids=["output alone", "two rows", "gradient instead of vjp", "three values"])
def test_a_primitive_without_a_vjp_raises_at_its_call_with_the_two_things_to_return(rng, function, described):
    function.__name__ = "double"
    message = r"^double\(\(3,\)\): a primitive returns \(output, vjp\): .*; got " + described
    with pytest.raises(TypeError, match=message):
        primitive(function)(normal(rng, 3))


def test_a_missing_second_gradient_raises_with_the_number_and_the_name_of_its_argument(rng):
    @primitive
    def product(left, right):
        return left * right, lambda dz: dz * right

    z = product(normal(rng, 3), normal(rng, 3)).sum()
    message = r"^product: .* \(argument 2 'right'\) came back as None; vjp must return one array per argument"
    with pytest.raises(RuntimeError, match=message):
        z.backward()


def test_a_tensor_as_the_output_of_a_primitive_raises_and_points_to_numpy(rng):
    @primitive
    def double(x):
        return ops.multiply(x, 2.0), lambda dy: 2 * dy

    with pytest.raises(TypeError, match=r"^double\(\(3,\)\): the output is a Tensor; .* with NumPy's functions"):
        double(normal(rng, 3))


@pytest.mark.parametrize("call, message", [
    (lambda x: np.exp(x), r"^np.exp does not take a Tensor: use minilm.ops.exp, or tensor.data"),
    (lambda x: np.arctan(x), r"^np.arctan does not take a Tensor: use the functions of minilm.ops, or tensor.data"),
    (lambda x: np.linalg.norm(x), r"^np.\w+ does not take a Tensor"),
    (lambda x: np.add(x.data, x, out=np.zeros(3)), r"^np.add does not take a Tensor: use minilm.ops.add"),
    (lambda x: np.add.reduce(x), r"^np.add does not take a Tensor: use minilm.ops.add"),
    (lambda x: np.multiply.outer(x.data, x), r"^np.multiply does not take a Tensor: use minilm.ops.multiply"),
    (lambda x: np.where(x.data > 0, x, 0), r"^np.where does not take a Tensor: use minilm.ops.where, or tensor.data"),
    (lambda x: np.concatenate([x, x]), r"^np.concatenate does not take a Tensor: use minilm.ops.concatenate"),
    (lambda x: np.concatenate([x.data, x]), r"^np.concatenate does not take a Tensor: use minilm.ops.concatenate"),
    (lambda x: np.stack([x, x]), r"^np.stack does not take a Tensor: use minilm.ops.concatenate"),
    (lambda x: np.mean(x), r"^np.mean does not take a Tensor: use minilm.ops.mean"),
    (lambda x: np.sum(x, axis=0), r"^np.sum does not take a Tensor: use minilm.ops.sum"),
    (lambda x: np.transpose(x), r"^np.transpose does not take a Tensor: use minilm.ops.transpose"),
    (lambda x: np.dot(x, x.data), r"^np.dot does not take a Tensor: use minilm.ops.matmul"),
    (lambda x: np.einsum("i,i", x, x), r"^np.einsum does not take a Tensor: use minilm.einsum.einsum, or"),
    (lambda x: np.max(x), r"^np.max does not take a Tensor: use the functions of minilm.ops, or tensor.data"),
    (lambda x: np.zeros_like(x), r"^np.zeros_like does not take a Tensor: .* or tensor.data for the array"),
    (lambda x: np.allclose(x, x.data), r"^np.allclose does not take a Tensor"),
    (lambda x: np.array(x), r"^np.array and np.asarray do not take a Tensor: use tensor.data"),
    (lambda x: np.asarray(x, np.float32), r"^np.array and np.asarray do not take a Tensor: use tensor.data"),
    (lambda x: np.array([x, x]), r"do not take a Tensor: .* or minilm.ops.concatenate to join Tensors"),
    (lambda x: np.array([x.data, x]), r"do not take a Tensor: .* or minilm.ops.concatenate to join Tensors"),
    (lambda x: np.array([ops.sum(x)]), r"do not take a Tensor: .* tensor.item\(\) for a number"),
    (lambda x: np.zeros(3).__setitem__(slice(None), x), r"do not take a Tensor: use tensor.data"),
], ids=["exp", "arctan", "linalg.norm", "out=", "reduce", "outer", "where", "concatenate", "concatenate beside arrays",
        "stack", "mean", "sum", "transpose", "dot", "einsum", "max", "zeros_like", "allclose", "array", "asarray",
        "array of a list", "array of arrays", "array of numbers", "assignment"])
def test_a_numpy_function_of_a_tensor_raises_and_names_the_function_of_ops(rng, call, message):
    with pytest.raises(TypeError, match=message):
        call(normal(rng, 3))


def test_numpy_shape_ndim_and_size_of_a_tensor_are_its_own(rng):
    x = normal(rng, 2, 3)
    assert (np.shape(x), np.ndim(x), np.size(x)) == ((2, 3), 2, 6)


def test_numpy_asks_the_class_for_its_ufuncs_and_cupy_asks_the_tensor():
    """NEP 13. CuPy evaluates `array + tensor` itself unless the tensor's __array_ufunc__ is None."""
    assert callable(Tensor.__array_ufunc__) and Tensor(1.0).__array_ufunc__ is None


def test_shapes_that_do_not_fit_raise_with_the_primitive_and_both_shapes(rng):
    with pytest.raises(ValueError, match=r"add\(\(2,\), \(3,\)\): "):
        normal(rng, 2) + normal(rng, 3)


def test_a_tensor_passed_by_name_gets_its_gradient(rng):
    x, y = normal(rng, 2), normal(rng, 2)
    ops.sum(ops.multiply(y=y, x=x)).backward()
    assert (x.grad == y.data).all() and (y.grad == x.data).all()


def test_a_tensor_passed_by_name_after_an_omitted_default_gets_its_gradient(rng):
    @primitive
    def scaled_sum(x, scale=2.0, y=None):
        return scale * x + y, lambda dz: (scale * dz, None, dz)
    x, y = normal(rng, 2), normal(rng, 2)
    ops.sum(scaled_sum(x, y=y)).backward()
    assert (x.grad == 2).all() and (y.grad == 1).all()


@pytest.mark.parametrize("data", [np.ones(2, np.float16), np.ones(2, complex), np.array(["a"])], ids=str)
def test_a_tensor_of_another_dtype_raises(data):
    with pytest.raises(TypeError, match="a Tensor holds float32 or float64, not"):
        Tensor(data)


def test_a_tensor_of_a_tensor_raises():
    with pytest.raises(TypeError, match="Tensor of a Tensor"):
        Tensor(Tensor(1.0))


# Arrays and scalars beside Tensors.

@pytest.mark.parametrize("operator", [lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b,
                                      lambda a, b: a @ b, lambda a, b: abs(a) ** b],
                         ids=[*"+-*/@", "**"])
def test_an_array_on_either_side_keeps_its_side(rng, operator):
    x = Tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    a = np.array([[5.0, -1.0], [2.0, 7.0]])
    for result, expected in ((operator(a, x), operator(a, x.data)), (operator(x, a), operator(x.data, a))):
        assert isinstance(result, Tensor) and result.requires_grad and np.allclose(result.data, expected, 0, 1e-15)
    gradcheck(lambda x: operator(a, x), x)


def test_vectors_multiply_an_array_on_the_left(rng):
    x, a = normal(rng, 3), rng.normal(size=3)
    assert isinstance(a @ x, Tensor) and np.allclose((a @ x).data, a @ x.data, 0, 1e-15)


def test_a_number_on_the_left_stays_on_the_left():
    x = Tensor([1.0, 4.0], requires_grad=True)
    assert (5 - x).data.tolist() == [4, 1] and (2 / x).data.tolist() == [2, 0.5]
    assert (np.float64(5) - x).data.tolist() == [4, 1]
    (5 - x).sum().backward()
    assert x.grad.tolist() == [-1, -1]


@pytest.mark.parametrize("scalar", [2, 2.5, np.float64(2.5), np.int64(2)], ids=repr)
def test_scalars_keep_float32(rng, scalar):
    x = normal(rng, 3, dtype=np.float32)
    y = (scalar * x + scalar) / scalar - scalar
    y.sum().backward()
    assert y.dtype == x.grad.dtype == np.float32


def test_a_numpy_scalar_as_an_option_keeps_float32(rng):
    @primitive
    def scale(x, by=1.0):
        return x * by, lambda dy: dy * by

    assert scale(normal(rng, 3, dtype=np.float32), by=np.float64(2.5)).dtype == np.float32


def test_integers_and_lists_become_float64():
    assert Tensor([1, 2]).dtype == Tensor(np.array([True])).dtype == np.float64


# first_nonfinite and activation_checkpoint.

def test_first_nonfinite_names_the_first_primitive_with_a_nan():
    x = Tensor([-1.0, 1.0], requires_grad=True)
    with np.errstate(invalid="ignore"):
        assert first_nonfinite(lambda: (ops.log(x) * 2.0).sum()) == "the output of log, shape (2,)"
    assert first_nonfinite(lambda: (x * 2.0).sum()) is None


def test_activation_checkpoint_has_the_same_gradients_also_for_the_functions_own_tensors(rng):
    x, w = normal(rng, 3), normal(rng, 3)

    def function(x):
        return ops.tanh(x * w) * x
    (function(x) * function(x)).sum().backward()
    expected = x.grad, w.grad
    x.grad = w.grad = None
    (activation_checkpoint(function, x) * activation_checkpoint(function, x)).sum().backward()
    assert np.array_equal(x.grad, expected[0]) and np.array_equal(w.grad, expected[1])
    with no_grad():
        assert activation_checkpoint(function, x).node is None
    w.grad = None
    activation_checkpoint(function, Tensor(x.data)).sum().backward()               # an input without a gradient
    assert_close(w.grad, (1 - np.tanh(x.data * w.data) ** 2) * x.data ** 2)


def test_activation_checkpoint_goes_backward_under_no_grad_and_gives_zeros_for_an_unused_input(rng):
    x, ignored = normal(rng, 3), normal(rng, 2)
    y = activation_checkpoint(lambda x, ignored: x * x, x, ignored * 1.0).sum()
    with no_grad():
        y.backward()
        assert not grad_enabled()
    assert np.array_equal(x.grad, 2 * x.data) and np.array_equal(ignored.grad, np.zeros(2))


def test_the_graph_keeps_only_the_arrays_that_a_vjp_needs(rng):
    x = Tensor(rng.normal(size=1 << 16), requires_grad=True)

    def forward():
        y = x
        for _ in range(20):
            y = y + 1.0                         # its vjp needs no array
        return y
    kept = []
    peak = peak_memory(lambda: kept.append(forward()))
    assert peak < 3.5 * x.data.nbytes, peak / x.data.nbytes
    kept[0].backward(np.ones(1 << 16))
    assert np.array_equal(x.grad, np.ones(1 << 16))


def test_an_array_is_never_equal_to_a_tensor(rng):
    x = normal(rng, 2)
    assert not (x.data == x) and (x.data != x) and x not in [x.data]


def test_a_tensor_within_arrays_only_raises(rng):
    x = normal(rng, 2)
    with arrays_only(), pytest.raises(TypeError, match="within arrays_only.* pass tensor.data"):
        ops.exp(x)


@pytest.mark.parametrize("name", numpy_functions.INSTEAD)
def test_the_advice_for_a_function_that_ops_does_not_have_is_a_formula_of_the_same_values(rng, name):
    function = getattr(np, name)
    x, y = normal(rng, 5), normal(rng, 5)
    with pytest.raises(TypeError) as raised:
        function(*(x, y)[:function.nin])
    words = str(raised.value)
    assert words.startswith(f"np.{name} does not take a Tensor: use the functions of minilm.ops, or tensor.data")
    formula = re.search(f"ops has no {name}, but (.*) is the same$", words).group(1)
    assert not hasattr(ops, name)
    assert_close(eval(formula, {"ops": ops, "x": x, "y": y}), function(*(x.data, y.data)[:function.nin]))


# Changes between forward and backward.

TOKENS = np.array([[1, 2, 3, 4], [4, 0, 2, 5]])


def step(model):
    optimizer = AdamW(model.parameters())
    loss = model.log_probs(TOKENS).sum()
    model.log_probs(TOKENS).sum().backward()
    optimizer.step()
    return loss


def load(model):
    loss = model.log_probs(TOKENS).sum()
    load_into(model.parameters(), {name: 2 * p.data for name, p in model.parameters().items()})
    return loss


def redraw(model):
    loss = model.log_probs(TOKENS).sum()
    redraw_weights(model, np.random.default_rng(0))
    return loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change, message", [
    (step, r"parameter '\S+', shape .*, was changed in place by AdamW.step after \w+ had used it \(its argument"),
    (load, r"parameter '\S+', shape .*, was changed in place by load_into after"),
    (redraw, r"a Tensor of shape \(.*\) was changed in place by assign after")], ids=["step", "load", "redraw"])
def test_backward_through_a_model_whose_parameters_were_overwritten_raises(change, message, checkpointing, rng):
    model = small_transformer(rng)
    model.activation_checkpointing = checkpointing
    loss = change(model)
    before = {name: p.data.copy() for name, p in model.parameters().items()}
    with pytest.raises(RuntimeError, match="^backward: " + message + ".* compute the forward again"):
        loss.backward()
    model.log_probs(TOKENS).sum().backward()                    # the forward again
    assert all((p.data == before[name]).all() for name, p in model.parameters().items())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name, frozen", [
    ("embedding", False), *((name, frozen) for frozen in (False, True) for name in (
        "blocks.0.qkv", "blocks.0.ffn_norm", "blocks.0.key_smear", "blocks.1.gate_up", "final_norm", "unembedding"))])
def test_a_change_of_one_parameter_is_noticed_with_its_name_also_if_it_is_frozen(name, frozen, checkpointing, rng):
    """But not of a frozen embedding: its rows were copied, and the other gradients are right."""
    model = small_transformer(rng, layers=2, key_smear=True)
    model.activation_checkpointing = checkpointing
    p = model.parameters()[name]
    p.requires_grad = not frozen
    loss = model.log_probs(TOKENS).sum()
    p.data += 1
    mark_changed({name: p}, "my_update")
    with pytest.raises(RuntimeError, match=f"parameter '{name}', shape .* by my_update after"):
        loss.backward()


@pytest.mark.parametrize("used", ["first", "second", "third"])
def test_every_parameter_that_is_marked_is_noticed_under_its_own_name(used, rng):
    parameters = {name: normal(rng, 3) for name in ("first", "second", "third")}
    loss = ops.tanh(parameters[used]).sum()
    mark_changed(parameters, "my_update")
    with pytest.raises(RuntimeError, match=f"parameter '{used}', .* by my_update after tanh"):
        loss.backward()


def test_a_changed_parameter_raises_before_any_gradient_is_added(rng):
    x, w = normal(rng, 3), normal(rng, 3)
    loss = (x * w + ops.tanh(x)).sum()
    w.assign(np.ones(3))
    with pytest.raises(RuntimeError, match=r"after multiply had used it \(its argument 2 'y'\)"):
        loss.backward()
    assert x.grad is None and w.grad is None


def test_a_change_before_the_use_or_of_another_tensor_does_no_harm(rng):
    x, w, other = normal(rng, 3), normal(rng, 3), normal(rng, 3)
    w.assign(2 * w.data)
    loss = (x * w).sum()
    other.assign(x.data)
    loss.backward()
    assert np.array_equal(x.grad, w.data) and np.array_equal(w.grad, x.data)


def test_a_constant_that_changed_in_place_raises(rng):
    x, constant = normal(rng, 3), Tensor(np.ones(3))
    loss = (x * constant).sum()
    constant.assign(np.zeros(3))
    with pytest.raises(RuntimeError, match=r"a Tensor of shape \(3,\) was changed in place by assign after multiply"):
        loss.backward()


def test_a_checkpoint_of_the_identity_has_the_gradient_1(rng):
    x = normal(rng, 3)
    activation_checkpoint(lambda x: x, x * 2.0).backward(np.ones(3))
    assert np.array_equal(x.grad, np.full(3, 2.0))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_checkpoint_within_a_checkpoint_notices_changes_too(depth, rng):
    x, w = normal(rng, 3), normal(rng, 3)

    def function(x, depth=depth):
        return activation_checkpoint(lambda x: function(x, depth - 1), x) if depth else ops.tanh(x * w)
    loss = function(x).sum()
    function(x).sum().backward()
    assert_close(x.grad, (1 - np.tanh(x.data * w.data) ** 2) * w.data)
    w.assign(2 * w.data)
    with pytest.raises(RuntimeError, match="after multiply had used it"):
        loss.backward()


def test_assign_writes_in_place_and_checks_the_shape(rng):
    p = normal(rng, 2, 3)
    array = p.data
    p.assign(np.arange(6).reshape(2, 3))
    assert p.data is array and array.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="broadcast"):
        p.assign(np.zeros(4))


# Each: (a function of x (4,6) and of integers or masks, those arrays). They are overwritten after the forward pass.
INDICES = {
    "getitem": (lambda x, i: x[i], [np.array([3, 0, 3])]),
    "getitem, two arrays": (lambda x, i, j: x[i, j], [np.array([3, 0, 3]), np.array([5, 1, 1])]),
    "getitem, slice and array": (lambda x, i: x[1:, i], [np.array([5, 1, 1])]),
    "getitem, list": (lambda x, i: x[i], [[3, 0, 3]]),
    "getitem, lists": (lambda x, i, j: x[i, j], [[3, 0, 3], [5, 1, 1]]),
    "getitem, mask": (lambda x, m: x[m], [np.eye(4, 6, dtype=bool)]),
    "embed": (lambda x, i: ops.embed(x, i), [np.array([[3, 0], [3, 1]])]),
    "embed by name": (lambda x, i: ops.embed(x, indices=i), [np.array([[3, 0], [3, 1]])]),
    "gather": (lambda x, i: ops.gather(x, i), [np.array([5, 0, 1, 1])]),
    "where": (lambda x, m: ops.where(m, x, 2 * x), [np.eye(4, 6, dtype=bool)]),
    "where, integers": (lambda x, m: ops.where(m, x, 0.0), [np.eye(4, 6, dtype=np.int8)]),
    "scatter": (lambda x, m: scatter(x[:, 0], m), [np.array([[1, 1, 0], [0, 1, 1]], bool)]),
    "sequence_log_probs": (lambda x, m: layers.sequence_log_probs(x, m), [np.eye(4, 6)]),
    "token_log_probs": (lambda x, i: layers.token_log_probs(x, x, i), [np.array([3, 0, 1, 1])]),
    "token_log_probs_without_chunks": (lambda x, i: layers.token_log_probs_without_chunks(x, x, i),
                                       [np.array([3, 0, 1, 1])]),
    "attention": (lambda x, m: layers.attention(*[x.reshape(1, 1, 4, 6)] * 3, causal=False, key_mask=m),
                  [np.array([[1, 1, 0, 1]])]),
}


@pytest.mark.parametrize("name", INDICES)
@given(rng=rngs)
def test_indices_and_masks_may_be_overwritten_before_backward(name, rng):
    function, arrays = INDICES[name]
    gradients = []
    for overwritten in (False, True):
        x, given = normal(np.random.default_rng(7), 4, 6), [a.copy() for a in arrays]
        y = function(x, *given)
        for a in given if overwritten else ():
            a[:] = rng.permutation(np.ravel(a)).reshape(np.shape(a)).tolist()
        y.backward(np.random.default_rng(8).normal(size=y.shape))
        gradients.append(x.grad)
    assert np.array_equal(*gradients)


# Each: a loss of log-probs (4,6), or their row sums, and of arrays, which are overwritten after the forward pass.
OBJECTIVES = {
    "policy_gradient_loss": (policy_gradient_loss, [np.array([1.0, -2.0, 0.5, 3.0]), np.eye(4, 6)]),
    "policy_gradient_loss, by token": (policy_gradient_loss, [np.arange(24.0).reshape(4, 6), np.eye(4, 6, dtype=bool)]),
    "ppo_clip_loss": (ppo_clip_loss, [-np.ones((4, 6)), np.array([1.0, -2.0, 0.5, 3.0]), np.ones((4, 6))]),
    "sft_loss": (sft_loss, [np.eye(4, 6)]),
    "k2": (lambda x, ref: kl.k2(x, ref).sum(), [-np.arange(24.0).reshape(4, 6) / 9]),
    "k3": (lambda x, ref: kl.k3(x, ref).sum(), [-np.arange(24.0).reshape(4, 6) / 9]),
    "dpo_loss": (lambda x, *ref: dpo_loss(ops.sum(x, axis=1), ops.sum(x * x, axis=1), *ref),
                 [-np.ones(4), -np.arange(4.0)]),
    "multiply": (lambda x, a: (x * a).sum(), [np.arange(6.0)]),
    "divide": (lambda x, a: (a / x).sum(), [np.arange(6.0)]),
    "matmul": (lambda x, a: (x @ a).sum(), [np.arange(12.0).reshape(6, 2)]),
    "rope": (lambda x, cos, sin: layers.rope(x.reshape(1, 1, 4, 6), cos, sin).sum(),
             [np.ones((4, 3)), np.arange(12.0).reshape(4, 3)]),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_arrays_beside_log_probs_may_be_overwritten_before_backward(name, rng):
    function, arrays = OBJECTIVES[name]
    gradients = []
    for overwritten in (False, True):
        x, given = normal(np.random.default_rng(7), 4, 6), [a.copy() for a in arrays]
        loss = function(x, *given)
        for a in given if overwritten else ():
            a[...] = a[::-1] if a.dtype == bool else rng.normal(size=a.shape)
        loss.backward()
        gradients.append(x.grad)
    assert np.array_equal(*gradients) and gradients[0].any()


class Subclass(np.ndarray):
    """Like np.memmap: an array of another class, in the same memory."""


@pytest.mark.parametrize("name", [*INDICES, *OBJECTIVES])
def test_arrays_of_another_class_may_be_overwritten_before_backward_too(name, rng):
    function, arrays = {**INDICES, **OBJECTIVES}[name]
    gradients = []
    for overwritten in (False, True):
        x = normal(np.random.default_rng(7), 4, 6)
        given = [np.array(a).view(Subclass) for a in arrays]
        y = function(x, *given)
        for a in given if overwritten else ():
            a[...] = a[::-1] if a.dtype.kind == "f" else 0
        y.backward(np.random.default_rng(8).normal(size=y.shape))
        gradients.append(x.grad)
    assert np.array_equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("name", ["y", "weight"])
def test_an_array_given_by_name_may_be_overwritten_before_backward(name, rng):
    x, a = normal(rng, 4, 6), rng.normal(size=6)
    kept = a.copy()
    y = ops.multiply(x, y=a) if name == "y" else layers.rms_norm(x, weight=a)
    a[...] = 0
    ops.sum(y).backward()
    twin = Tensor(x.data, requires_grad=True)
    ops.sum(ops.multiply(twin, kept) if name == "y" else layers.rms_norm(twin, kept)).backward()
    assert np.array_equal(x.grad, twin.grad) and x.grad.any()


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")      # of np.matrix
def test_a_matrix_multiplies_like_an_array():
    """np.matrix * is a matrix product: in a loss it would be taken for the product of the elements."""
    x, m = Tensor(np.arange(4.0).reshape(2, 2), requires_grad=True), np.arange(1, 5.0).reshape(2, 2)
    for product in (x * np.matrix(m), np.matrix(m) * x, ops.multiply(x, y=np.matrix(m))):
        assert type(product.data) is np.ndarray and np.array_equal(product.data, x.data * m)
    assert np.array_equal((x @ np.matrix(m)).data, x.data @ m)


def test_a_masked_array_is_refused_because_its_mask_would_have_no_effect():
    masked = np.ma.array([1.0, 999.0], mask=[False, True])
    for use in (lambda: Tensor(masked), lambda: Tensor([1.0, 2.0]) + masked, lambda: Tensor([1.0, 2.0]) * masked,
                lambda: ops.where(np.ma.array([1, 1], mask=[0, 1]), Tensor([1.0, 2.0]), 0.0)):
        with pytest.raises(TypeError, match=r"a masked array of shape \(2,\): its mask would have no effect"):
            use()


@pytest.mark.parametrize("wrong", [[[1.0, 2.0]], None], ids=repr)
def test_an_argument_that_is_no_array_is_named_with_its_primitive(wrong):
    with pytest.raises((TypeError, AttributeError), match=r"^sft_loss\((\[\[1.0, 2.0\]\]|None), \(1, 2\)\): "):
        sft_loss(wrong, np.ones((1, 2)))


# Copies.

@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_of_a_model_in_training_is_a_model_of_its_own(again, rng):
    model = small_transformer(rng)
    optimizer = AdamW(model.parameters())
    ops.sum(model.log_probs(TOKENS)).backward()
    optimizer.step()
    other = again(model)
    for name, p in other.parameters().items():
        assert p.grad is p.grad_buffer is p.node is None and p.requires_grad
        assert np.array_equal(p.data, model.parameters()[name].data) and not overlap(p.data, optimizer.data)
    ops.sum(other.log_probs(TOKENS)).backward()
    assert all(p.grad.any() for p in other.parameters().values())


def test_a_pickled_parameter_has_not_changed_for_the_process_that_reads_it():
    """The calls of a new process are counted from 0: the mark of the old one would be later than all of them."""
    p = Tensor(np.ones(3), requires_grad=True)
    p.assign(np.zeros(3))
    assert pickle.loads(pickle.dumps(p)).changed == Tensor(1.0).changed != p.changed


def test_a_copy_of_a_computed_tensor_is_a_constant():
    """Its gradient could reach copies of the leaves alone, which nobody has."""
    x = Tensor(np.ones(3), requires_grad=True)
    assert copy.deepcopy(x).requires_grad and not copy.deepcopy(x * 2).requires_grad


def test_assign_broadcasts_nothing():
    p = Tensor(np.ones((2, 3)), requires_grad=True)
    for wrong in (0.0, np.zeros(3), np.zeros((2, 1)), np.zeros((1, 2, 3))):
        with pytest.raises(ValueError, match=r"assign: values .* to a Tensor \(2, 3\); none is broadcast"):
            p.assign(wrong)
    assert (p.data == 1).all()


def test_arguments_of_a_readers_own_primitive_are_copied_too(rng):
    @primitive
    def pick(x, rows):
        def vjp(dy):
            dx = np.zeros_like(x)
            dx[rows] = dy
            return dx
        return x[rows], vjp

    x, rows = normal(rng, 4), np.array([0, 2])
    y = pick(x, rows)
    rows[:] = [1, 3]
    y.backward(np.array([5.0, 6.0]))
    assert x.grad.tolist() == [5, 0, 6, 0]


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("use", ["log_probs", "hidden", "rewards", "response_log_probs"])
def test_a_buffer_of_tokens_may_be_used_again_before_backward(use, padding, rng):
    model = small_transformer(rng, layers=2)
    rewarder = RewardModel(model, rng)
    mask = np.ones(TOKENS.shape)
    mask[:, 0] = padding == "none"

    def value(tokens, mask):
        if use == "rewards":
            return rewarder.rewards(tokens, mask)
        if use == "hidden":
            return model.hidden(tokens, mask if padding == "left" else None)
        if use == "log_probs":
            return model.log_probs(tokens)
        return model.response_log_probs(pack(list(tokens[:, :2]), list(tokens[:, 2:])))
    gradients = []
    for again in (False, True):
        buffer, kept = TOKENS.copy(), mask.copy()
        y = value(buffer, kept)
        if again:
            buffer[...] = 6 - buffer
            kept[...] = 1 - kept
        gradients.append(parameter_gradients(rewarder if use == "rewards" else model, y, np.ones(y.shape)))
    for name, g in gradients[0].items():
        assert np.array_equal(g, gradients[1][name]), name
