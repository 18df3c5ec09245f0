"""minilm.einsum: values are numpy.einsum's, gradients those of finite differences and of the same formula by matmul."""
import numpy as np
import pytest

from helpers import assert_close, gradients, normal
from minilm import Tensor, ops
from minilm.backend import to_numpy
from minilm.einsum import einsum
from minilm.gradcheck import gradcheck

SIZES = {"b": 2, "t": 3, "s": 4, "h": 2, "d": 5}
CASES = ["td,ds->ts", "td,sd->ts", "bthd,bshd->bhts", "bhts,bshd->bthd", "td,td->", "td->dt", "td->t", "td->", "d,d->d",
         "t,s->ts", "td,d,ds->ts", "tds->d", "td,s->t", "b,tb->tb", ",td->dt"]


@pytest.mark.parametrize("subscripts", CASES)
def test_the_value_is_numpys_and_the_gradients_are_those_of_finite_differences(subscripts, rng, xp):
    operands = [normal(rng, *(SIZES[letter] for letter in term))
                for term in subscripts.partition("->")[0].split(",")]
    expected = np.einsum(subscripts, *(operand.data for operand in operands))
    assert_close(einsum(subscripts, *operands), expected)
    gradcheck(lambda *operands: einsum(subscripts, *operands), *operands)
    on_device = einsum(subscripts, *(xp.asarray(operand.data) for operand in operands))
    assert_close(to_numpy(on_device.data), expected)


def test_it_has_the_gradients_of_a_product_of_matrices(rng):
    x, y = normal(rng, 3, 5), normal(rng, 5, 4)
    value, found = gradients(lambda x, y: einsum("ij,jk->ik", x, y), x, y)
    expected, wanted = gradients(ops.matmul, x, y)
    assert_close(value, expected)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("subscripts, words", [
    ("ij,jk", "after '->'"), ("...i->i", "every axis as a letter"), ("ii->i", "'ii'; a diagonal"),
    ("i->ii", "'ii'; a diagonal"), ("i1->i", "every axis as a letter")])
def test_subscripts_that_are_not_supported_raise_with_the_reason(subscripts, words):
    with pytest.raises(ValueError, match=words):
        einsum(subscripts, Tensor(np.ones((2, 2))))


@pytest.mark.parametrize("subscripts, shapes, words", [
    ("ij,jk->ik", [(1, 1), (2, 2)], "the letter j has the lengths 1 and 2 in "),
    ("ij,kj->ik", [(2, 3), (2, 4)], "the letter j has the lengths 3 and 4 in "),
    ("ij,jk->ik", [(2, 2)], "shapes .* do not have the axes of "),
    ("ij->i", [(2, 2), (2,)], "shapes .* do not have the axes of "),
    ("ij,jk->ik", [(2, 2), (2,)], r"shapes .* do not have the axes of ")])
def test_shapes_that_do_not_fit_raise_with_the_letter_and_nothing_is_broadcast(subscripts, shapes, words):
    with pytest.raises(ValueError, match=f"^einsum: {words}"):
        einsum(subscripts, *(np.ones(shape) for shape in shapes))


def test_subscripts_that_are_no_text_raise_with_their_type():
    with pytest.raises(TypeError, match="^einsum: subscripts are a int; they come first"):
        einsum(5, np.ones(2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_number_is_an_operand_without_axes_of_the_dtype_of_the_others(dtype, rng):
    x = normal(rng, 3, dtype=dtype)
    value, (d,) = gradients(lambda x: einsum("i,->i", x, 2.5), x, cotangent=np.ones(3, dtype))
    assert value.dtype == d.dtype == dtype
    assert_close(value, 2.5 * x.data)
    assert_close(d, np.full(3, 2.5))
