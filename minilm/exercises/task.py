"""What a task consists of, the file that a student gets, and the wrong variants of a solution.

A file of tasks/ is read from the top: the specification is its docstring, then comes the solution. The student's file
has the same docstring and the same function with a hole in place of its body, so both are written once.
"""

import ast
import dataclasses
import importlib.abc
import inspect
import shlex
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SEED = 19
HOLE = "    # YOUR CODE HERE\n    raise NotImplementedError\n"


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A mistake that people make: `right`, which stands in the solution once, is replaced by `wrong`.

    hint  what is wrong and why, without the code that mends it
    """

    hint: str
    right: str
    wrong: str


def forms(hint: str, right: str, *wrong: str) -> tuple[Mistake, ...]:
    """One mistake that people write in several ways, with different numbers."""
    return tuple(Mistake(hint, right, text) for text in wrong)


@dataclasses.dataclass(frozen=True)
class Property:
    """A statement that holds for the right function, as two arrays that must agree.

    tolerance  for max|got - expected| / max(max|expected|, 1)
    at_most    got may be smaller
    quantity   what got is, if it is one number
    """

    statement: str
    got: Any
    expected: Any
    tolerance: float = 1e-9
    at_most: bool = False
    quantity: str = "it"


@dataclasses.dataclass(frozen=True)
class Task:
    """solution    the function to write, with our body. It takes arrays and numbers, and returns an array or a tuple
    returns     the names of its results
    cases       maps a random generator to {words: the arguments}
    expected    the same results by other code of minilm, or by plain loops
    hints       two: the first says where to begin, the second gives the formula
    mistakes    at least five
    read        where minilm has it
    given       functions that the student's file contains
    scalar      a function of the same arguments whose derivatives the results are, for finite differences; or None
    wrt         the names of the arguments it is differentiated by, one for each result
    properties  maps the function to Properties, for what must hold beyond its numbers; or None
    golden      (case of tests/golden, {argument: its name there, if another}, the results' names there); or None
    smallest    numbers are compared to 1e-9 of the largest number of a result, or of this, if it is larger
    """

    solution: Callable
    returns: tuple[str, ...]
    cases: Callable[[np.random.Generator], dict[str, tuple]]
    expected: Callable
    hints: tuple[str, str]
    mistakes: tuple[Mistake, ...]
    read: str
    given: tuple[Callable, ...] = ()
    scalar: Callable | None = None
    wrt: tuple[str, ...] = ()
    properties: Callable[[Callable], Iterator[Property]] | None = None
    golden: tuple[str, dict[str, str], tuple[str, ...]] | None = None
    smallest: float = 1e-3

    @property
    def name(self) -> str:
        return self.solution.__name__

    @property
    def module(self) -> types.ModuleType:
        return sys.modules[self.solution.__module__]

    @property
    def title(self) -> str:
        """The first line of the specification."""
        return (self.module.__doc__ or "").split("\n", 1)[0].rstrip(".")

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.solution).parameters)


def cases(task: Task) -> dict[str, tuple]:
    """{words: the arguments} of a task, always the same."""
    return task.cases(np.random.default_rng(SEED))


def copies(arguments: tuple) -> tuple:
    """The arguments with arrays of their own."""
    return tuple(x.copy() if isinstance(x, np.ndarray) else x for x in arguments)


# The file of a student.

def commands(name: str, folder: str) -> tuple[str, ...]:
    """The commands that a file names in its first lines."""
    command = "python -m minilm.exercises"
    return (f"{command} check {name} {shlex.quote(folder)}", f"{command} hint {name}", f"{command} hint {name} 2",
            f"{command} solution {name}")


def student_file(task: Task, folder: str = "DIR") -> str:
    """The text that `start` writes: specification, the given functions, and the function with a hole."""
    lines = "".join(f"    {line}\n" for line in commands(task.name, folder)).replace("\\", r"\\")
    given = "".join(f"{inspect.getsource(function)}\n\n" for function in task.given)
    return (f'"""{(task.module.__doc__ or "").strip()}\n\n'
            f'{lines}"""\n\nimport numpy as np\n\n\n{given}{_head(task)}{HOLE}')


def _head(task):
    """Signature and docstring of the solution."""
    source = inspect.getsource(task.solution)
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    return "".join(source.splitlines(keepends=True)[:function.body[0].end_lineno])


def is_untouched(task: Task, text: bytes) -> bool:
    """Whether a file ends as student_file does. Then nobody has written a function into it."""
    return text.endswith((_head(task) + HOLE).encode())


def solution_text(task: Task) -> str:
    """Our body, under the signature."""
    return inspect.getsource(task.solution)


# Code from text.

class _FromText(importlib.abc.SourceLoader):
    """Loads a module from a text. Nothing is cached: a file that has just been saved is never mistaken for an older
    one."""

    def __init__(self, text: str, path: str):
        self.text = text
        self.path = path

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: Any) -> bytes:
        return self.text.encode()


def run_text(name: str, text: str, path: str, names: dict[str, Any] | None = None) -> types.ModuleType:
    """The module of a text, in which `names` are defined beforehand. Raises what the text raises.

    name  its key in sys.modules, where dataclasses and typing look for the module of a class. Not the name of another
          module
    """
    module = types.ModuleType(name)
    module.__dict__.update(names or {})
    module.__dict__.update(__name__=name, __file__=path)
    sys.modules[name] = module
    _FromText(text, path).exec_module(module)
    return module


def variant(task: Task, *mistakes: Mistake) -> Callable:
    """The solution with these mistakes. Raises ValueError if their right code does not stand in it once."""
    text = solution_text(task)
    for mistake in mistakes:
        if text.count(mistake.right) != 1:
            raise ValueError(f"{task.name}: {mistake.right!r} stands in the solution {text.count(mistake.right)} times")
        text = text.replace(mistake.right, mistake.wrong)
    module = run_text(f"_minilm_variant_of_{task.name}", text, f"<{task.name} with a mistake>", vars(task.module))
    return getattr(module, task.name)
