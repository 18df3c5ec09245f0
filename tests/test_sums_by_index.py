"""kernels/sums_by_index.cu: sums of rows equal NumPy's, in a fixed order; under the checkers: no fault, bytes counted;
errors; planted bugs that are found."""
import numpy as np
import pytest

from helpers import assert_close
from minilm.kernels import emulator, launch, sums_by_index as module
from minilm.kernels.sums_by_index import sums_by_index, sums_by_index_bytes
from minilm.segment_sum import segment_sum

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@DTYPES
@pytest.mark.parametrize("n, D, distinct", [(1, 1, 1), (7, 33, 3), (100, 64, 5), (300, 8, 200), (65, 100, 1)])
def test_the_sums_of_equal_indices_equal_numpys(n, D, distinct, dtype, rng, xp):
    indices, values = rng.integers(distinct, size=n), rng.normal(size=(n, D)).astype(dtype)
    found, sums = segment_sum(indices, xp.asarray(values))
    expected = np.zeros((distinct, D))
    np.add.at(expected, indices, values.astype(np.float64))
    assert (found == np.unique(indices)).all() and sums.dtype == dtype
    assert_close(sums.get(), expected[found], 1e-12 if dtype is np.float64 else 1e-6)


def test_values_of_more_axes_that_are_not_contiguous_are_summed(rng, xp):
    values = rng.normal(size=(3, 4, 6))
    found, sums = segment_sum(np.array([2, 0, 2, 2]), xp.asarray(values).swapaxes(0, 1))
    assert found.tolist() == [0, 2]
    assert_close(sums.get(), np.stack([values[:, 1], values[:, [0, 2, 3]].sum(axis=1)]))


def example(xp, **sizes):
    return module.example(xp, np.random.default_rng(0), **sizes)[0].get()


@DTYPES
def test_no_checker_finds_a_fault_and_the_bits_are_the_same_in_any_order_of_blocks(dtype, emulated):
    found = []
    for schedule in ("forward", "reversed", 1, 2):
        with emulator.checked(schedule):
            found.append(example(emulated, dtype=dtype))
    assert all((one == found[0]).all() for one in found) and (found[0][1] == 0).all()


@DTYPES
@pytest.mark.parametrize("n, D", [(1, 1), (40, 33), (9, 64)])
def test_bytes_equal_the_formula(n, D, dtype, emulated):
    with emulator.checked() as launches:
        example(emulated, N=n, D=D, dtype=dtype)
    found = {launches[0].parameters[i]: moved for i, moved in launches[0].traffic.items()}
    assert found == sums_by_index_bytes(n, 3, D, dtype)["sums_by_index"]


@pytest.mark.parametrize("order, starts", [([0, 1, 3], [0]), ([-1, 0, 1], [0]), ([0, 1, 2], [1]),
                                           ([0, 1, 2], [0, 2, 1]), ([0, 1, 2], [0, 4])])
def test_integers_out_of_range_raise_before_the_launch(order, starts, emulated):
    with pytest.raises(IndexError, match="order holds integers below 3, and starts ascend from 0 to at most 3"):
        sums_by_index(emulated.zeros((3, 4), "float32"), np.array(order), np.array(starts))


def test_other_arrays_raise_before_the_launch(emulated):
    order, starts = np.arange(3), np.array([0])
    for x, error, words in ((emulated.zeros((3, 4), np.int32), TypeError, "not in int32"),
                            (emulated.zeros((4, 4)), ValueError, r"x has shape \(4, 4\); .* \(3, any\)"),
                            (emulated.zeros((3, 4))[:, ::2], ValueError, "x is not contiguous")):
        with pytest.raises(error, match=words):
            sums_by_index(x, order, starts)


# Bugs: (right text, wrong text, words of the checker that finds the bug, or "numbers").
MUTANTS = [
    ("    if (j < width) {", "    {", "out of bounds"),
    ("i < stop; i += 8) sum", "i <= stop; i += 8) sum", "numbers|out of bounds"),
    ("i < stop; i += 8) sum", "i < stop; i += 4) sum", "numbers"),
    ("= starts[s] + threadIdx.y;", "= starts[s];", "numbers"),
    ("order[i] * width", "i * width", "numbers"),
    ("    __syncthreads();\n", "", "uninitialised|data race"),
    ("threadIdx.y == 0 && j < width", "j < width", "data race|numbers"),
    ("other = 1; other < 8", "other = 1; other < 7", "numbers"),
    ("other = 1; other < 8", "other = 1; other <= 8", "index outside of its array"),
    ("other = 1; other < 8", "other = 0; other < 8", "numbers"),
    ("y[(size_t)s * width + j] = sum", "y[(size_t)s * width + j] += sum", "uninitialised")]


@pytest.mark.parametrize("right, wrong, words", MUTANTS, ids=[wrong.strip() or "no barrier" for _, wrong, _ in MUTANTS])
def test_a_planted_bug_is_found(right, wrong, words, emulated, monkeypatch):
    expected = example(emulated)
    text = (launch.FOLDER / "sums_by_index.cu").read_text()
    assert text.count(right) == 1
    monkeypatch.setattr(module, "function", lambda *names: launch.function(*names, text=text.replace(right, wrong)))
    try:
        with emulator.checked():
            found = example(emulated)
        assert "numbers" in words and not np.allclose(found, expected)
    except emulator.Fault as fault:
        assert any(word in str(fault) for word in words.split("|")), fault
