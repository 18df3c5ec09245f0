"""Three CUDA puzzles, and the checker of a solution: a reduction, an online softmax, a tile of attention.

    python -m minilm.kernels.emulator puzzle sums mine.cu       the first time this writes mine.cu, with the task
    python -m minilm.kernels.emulator puzzle sums mine.cu       then it checks it

They are also the last tasks of `python -m minilm.exercises`. Our solutions: the folder puzzles/solutions.
A solution is run under all checkers of the emulator, at sizes that fit and at sizes that do not, in three orders of
threads; its numbers are compared with NumPy's, and the bytes that it reads with what the task allows.
Tests: tests/test_puzzles.py.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilm import checks
from minilm.kernels import emulator
from minilm.kernels.launch import with_headers

FOLDER = Path(__file__).with_suffix("")
SCHEDULES = "forward", "reversed", 1
STEPS = 5_000_000
TOLERANCE = 2e-6            # of the largest number of a result


def sums(x):
    """(rows, columns) -> (rows,)"""
    return x.sum(axis=1)


def softmax(x):
    """(rows, columns) -> the same"""
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def attention(q, k, v):
    """(queries,32), (keys,32), (keys,32) -> (queries,32)"""
    return softmax(q @ k.T / 32 ** 0.5) @ v


class Puzzle(NamedTuple):
    """expected   the function in NumPy
    threads    of a block
    sizes      the last arguments of the kernel in each case, and the arguments of the functions below
    shapes     of the inputs
    blocks     of the grid
    most_read  how many numbers of each input may be read
    """
    expected: Callable
    threads: int
    sizes: tuple
    shapes: Callable
    blocks: Callable
    most_read: Callable


PUZZLES = {
    "sums": Puzzle(sums, 128, ((1, 128), (3, 5), (2, 1000), (1, 1)), lambda rows, columns: [(rows, columns)],
                   lambda rows, columns: rows, lambda rows, columns: [rows * columns]),
    "softmax": Puzzle(softmax, 32, ((1, 32), (3, 5), (2, 1000), (4, 1)), lambda rows, columns: [(rows, columns)],
                      lambda rows, columns: rows, lambda rows, columns: [2 * rows * columns]),
    "attention": Puzzle(attention, 32, ((32, 32), (32, 40), (33, 7), (70, 101), (1, 1)),
                        lambda queries, keys: [(queries, 32), (keys, 32), (keys, 32)],
                        lambda queries, keys: -(-queries // 32),
                        lambda queries, keys: [queries * 32, *[-(-queries // 32) * keys * 32] * 2])}


class Unsolved(ValueError):
    """What is wrong with a solution."""


def task(name: str) -> str:
    """The text of a puzzle. Raises LookupError for another name."""
    if name not in PUZZLES:
        raise LookupError(f"no puzzle {name}; there are {', '.join(PUZZLES)}")
    return (FOLDER / f"{name}.cu").read_text("utf-8")


def solution(name: str) -> str:
    """Our kernel. Raises LookupError for another name."""
    task(name)
    return (FOLDER / "solutions" / f"{name}.cu").read_text("utf-8")


def advice(fault: emulator.Fault) -> str:
    """The usual cause of a fault in shared memory, in words; "" for another fault."""
    if not re.match("data race: |uninitialised: reads shared ", fault.what):
        return ""
    return ("Is a barrier missing? Between a write by one thread and an access to the same number by another, all "
            "threads of the block must wait in __syncthreads().")


def check(name: str, path: Path) -> str:
    """The message for a right solution. Raises Unsolved, emulator.Fault, emulator.CompileError, and LookupError for
    another name."""
    task(name)
    code = checks.ordinary_file(path).read_text("utf-8")
    if "YOUR CODE HERE" in code:
        raise Unsolved(f"{path} still has the line YOUR CODE HERE: replace it by your code")
    if re.search(r"\batomic[A-Z]\w*\s*\(", code):
        raise Unsolved(f"{path} uses atomics, whose order of additions is not fixed; this puzzle can do without")
    puzzle = PUZZLES[name]
    for sizes in puzzle.sizes:
        for schedule in SCHEDULES:
            _check_case(name, puzzle, with_headers(path.name, code), sizes, schedule)
    return (f"{name}: solved. {len(puzzle.sizes)} sizes, {len(SCHEDULES)} orders of threads: the numbers are right, no "
            "checker found a fault, and nothing is read too often.")


def _check_case(name, puzzle, code, sizes, schedule):
    rng = np.random.default_rng(sum(sizes))
    inputs = [rng.normal(size=shape).astype(np.float32) for shape in puzzle.shapes(*sizes)]
    if name == "softmax":
        # Far from 0, so that exp overflows or underflows; close together, so that several numbers of a row count.
        inputs[0] += np.where(np.arange(len(inputs[0])) % 2, -1000, 1000)[:, None].astype(np.float32)
        inputs[0][:, 1::3] = -np.inf
    expected = puzzle.expected(*(x.astype(np.float64) for x in inputs))
    names = list(inspect.signature(puzzle.expected).parameters)
    where = f"{name} of " + ", ".join(f"{one} {x.shape}" for one, x in zip(names, inputs))
    with emulator.as_cupy() as cupy, emulator.checked(schedule, STEPS) as launches:
        kernel = cupy.RawModule(code=code).get_function(name)
        out = cupy.empty(expected.shape, np.float32)
        kernel((puzzle.blocks(*sizes),), (puzzle.threads,),
               (*map(cupy.asarray, inputs), out, *map(np.int32, sizes)))
        found = out.get()
    wrong = ~(np.abs(found - expected) <= TOLERANCE * np.abs(expected).max())
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        unwritten = " (a number that nothing has written is nan)" * bool(np.isnan(found).any())
        raise Unsolved(f"{where}: number {', '.join(map(str, place))} is {found[place]:.7g}; it must be "
                       f"{expected[place]:.7g}. {wrong.sum()} of {wrong.size} numbers are wrong{unwritten}")
    for i, (one, most) in enumerate(zip(names, puzzle.most_read(*sizes))):
        read = launches[0].traffic[i][0] // 4
        if read > most:
            raise Unsolved(f"{where}: the numbers are right, but {read} numbers of {one} are read; this puzzle allows "
                           f"{most}")
