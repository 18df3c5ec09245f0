"""Sizes beyond a grid's limits or beyond 32 bits: the kernels compute them, or an error names the limit. None wraps."""
import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close
from minilm.kernels import attention, fused, launch
from minilm.kernels.decode import decode
from minilm.kernels.launch import MOST_BLOCKS, MOST_COUNT, counts


class Compiled:
    """A kernel that notes its arguments."""

    def __call__(self, grid, block, arguments, shared_mem):
        self.arguments = arguments


def launched(grid, *arguments):
    kernel = launch.Kernel(Compiled(), "kernel", np.dtype("float32"))
    launch.launch(kernel, grid, (32,), *arguments)
    return kernel.compiled.arguments


@given(st.tuples(*(st.integers(most - 2, most + 2) for most in MOST_BLOCKS)))
def test_a_grid_is_launched_if_a_device_takes_it_and_otherwise_the_error_names_the_limit(grid):
    if all(n <= most for n, most in zip(grid, MOST_BLOCKS)):
        launched(grid)
    else:
        with pytest.raises(OverflowError, match=r"kernel: a grid of .* takes at most \(2147483647, 65535, 65535\)"):
            launched(grid)


@given(st.lists(st.one_of(st.integers(-2 ** 63, 2 ** 63 - 1), st.integers(-9, 9)), max_size=4))
def test_integers_for_a_kernel_keep_their_values_or_raise(values):
    if all(-MOST_COUNT <= value <= MOST_COUNT for value in values):
        assert counts("n", values).tolist() == values and counts("n", values).dtype == np.int32
    else:
        with pytest.raises(OverflowError, match="n is -?[0-9]+; the kernels count in 32 bits"):
            counts("n", values)


@pytest.mark.parametrize("n", [MOST_COUNT + 1, 2 ** 31 - 1, 2 ** 31, 2 ** 40, -2 ** 31])
def test_an_argument_that_a_loop_in_32_bits_would_pass_is_refused(n):
    assert launched((1,), MOST_COUNT) == (MOST_COUNT,)
    with pytest.raises(OverflowError, match=f"kernel: an argument is {n}; the kernels count in 32 bits"):
        launched((1,), n)


def test_arrays_on_the_cpu_are_refused_in_words():
    with pytest.raises(TypeError, match="squares: the arrays are on the CPU; this kernel takes CuPy's, on a GPU"):
        fused.squared_norm(np.ones(3))


def test_a_cache_without_heads_is_refused_in_words():
    with pytest.raises(ValueError, match="decode: 2 query heads for 0 key/value heads"):
        decode(np.ones((1, 2, 16)), np.ones((1, 0, 3, 16)), np.ones((1, 0, 3, 16)), 3)


@pytest.mark.parametrize("B, heads, T", [(3, 2 ** 15, 2 ** 15), (2, 1, 2 ** 30), (1, 1, 2 ** 31)])
@pytest.mark.parametrize("of", ["queries", "keys"])
def test_a_batch_with_more_tokens_than_32_bits_count_is_refused_by_attention(B, heads, T, of):
    q_shape, kv_shape = ((B, heads, T, 16), (B, 1, 1, 16))[::1 if of == "queries" else -1]
    with pytest.raises(OverflowError, match="attention: the number of the last token is [0-9]{10}; .* at most 213"):
        attention.batch_plan(np, q_shape, kv_shape, causal=False)


def test_offsets_and_diagonals_that_do_not_fit_are_refused_by_attention():
    with pytest.raises(OverflowError, match="queries . diagonal of a segment is 2147483651"):
        attention.Plan(np, [(0, 4, 0, 4, 2 ** 31 - 1, 0, 0)])
    with pytest.raises(OverflowError, match="a number in a table is 4294967296"):
        attention.Plan(np, [(0, 4, 0, 4, 0, 0, 0)]).device("places", [[2 ** 32, 16, 64]], 3)


def test_decoding_takes_more_rows_than_a_grid_has_along_z(emulated, rng):
    B = MOST_BLOCKS[2] + 2
    q, keys, values = (rng.normal(size=(B, *axes, 16)).astype(np.float32) for axes in ((1,), (1, 1), (1, 1)))
    out = decode(*map(emulated.asarray, (q, keys, values)), 1).get()
    assert np.array_equal(out, values[:, :, 0])         # of one key the probability is 1


@pytest.mark.parametrize("F", [1024, 1023], ids=["vectors", "numbers"])
def test_a_row_of_swiglu_that_is_longer_than_a_grid_is_computed_whole(F, xp, rng, monkeypatch):
    """With a limit of 2 blocks in place of 65,535, which holds 8 million numbers of a row."""
    monkeypatch.setattr(launch, "MOST_BLOCKS", (2 ** 31 - 1, 2, 2))
    gate_up, dy = rng.normal(size=(9, 2 * F)), rng.normal(size=(9, F))
    gate, up = np.split(gate_up, 2, axis=1)
    s = 1 / (1 + np.exp(-gate))
    assert_close(fused.swiglu_forward(xp.asarray(gate_up)).get(), gate * s * up)
    assert_close(fused.swiglu_backward(xp.asarray(dy), xp.asarray(gate_up)).get(),
                 np.concatenate([dy * s * (1 + gate * (1 - s)) * up, dy * s * gate], axis=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_setting_that_is_a_numpy_number_is_passed_in_the_kernels_precision(dtype, rng, xp):
    """np.float64 is a float of Python: 8 bytes of it would be read as 4."""
    start = rng.normal(size=(4, 33)).astype(dtype)
    found = []
    for number in (float, np.float64):
        p, g, m, v = map(xp.asarray, np.abs(start))
        fused.adamw_step(p, g, m, v, 9, number(0.1), (number(0.9), number(0.95)), number(1e-8), number(0.1), 1)
        found.append(p.get())
    assert (found[0] == found[1]).all()
