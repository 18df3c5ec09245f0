"""The examples in the docstrings of minilm/exact: they run, and print the numbers in their comments."""

import contextlib
import inspect
import io
import re

import pytest

import minilm.exact
from minilm.exact import bias, gradients

BLOCKS = [inspect.cleandoc("\n" + block) for module in (minilm.exact, gradients, bias)
          for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", module.__doc__, re.MULTILINE)]


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text)]


def run(block, names):
    """The printed numbers."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block, names)
    return numbers(printed.getvalue())


def stated(block):
    return numbers("\n".join(line.partition("#")[2] for line in block.splitlines() if line.startswith("print(")))


def blocks(word):
    return [block for block in BLOCKS if word in block]


def test_the_example_of_a_reward_prints_the_stated_numbers():
    block, = blocks("descend(")
    assert len(stated(block)) == 4
    assert run(block, {}) == pytest.approx(stated(block), abs=1e-4)


def test_the_example_of_an_estimator_prints_the_stated_numbers():
    block, = blocks("compare_with_exact_gradient(")
    assert len(stated(block)) == 2
    assert run(block, {}) == pytest.approx(stated(block), abs=6e-4)


def test_the_example_of_the_bias_of_a_loss_prints_the_stated_numbers():
    block, = blocks("def rloo(")
    assert len(stated(block)) == 4
    assert run(block, {}) == pytest.approx(stated(block), abs=6e-4)


@pytest.mark.parity
def test_the_example_of_the_bias_of_a_loss_in_pytorch_prints_the_stated_numbers():
    pytest.importorskip("torch")
    names, (first,), (block,) = {}, blocks("def rloo("), blocks("def in_torch(")
    run(first, names)
    assert run(block, names) == pytest.approx(stated(block), abs=1e-9) and len(stated(block)) == 2


@pytest.mark.parity
def test_the_example_of_a_pytorch_policy_prints_the_stated_numbers():
    torch = pytest.importorskip("torch")
    names, (first,), (block,) = {}, blocks("descend("), blocks("torch.optim")
    run(first, names)
    threads = torch.get_num_threads()
    try:
        assert run(block, names) == pytest.approx(stated(block), abs=3e-3)
    finally:
        torch.set_num_threads(threads)
    assert len(stated(block)) == 4
