"""Holds your function against the golden vectors of one of ours, and says where the first number differs.

    python -m minilm.check --list                               our functions: arguments, results, formula
    python -m minilm.check my_losses.py:dpo dpo_loss            dpo in my_losses.py, on every case of dpo_loss
    python -m minilm.check my_losses.py:dpo dpo_loss --as torch

Your function gets the arguments that --list shows, by name: arrays in float64, and
settings. A case with an argument that it does not take is left out, and named,
unless the argument is 0 or False there.

--as numpy   (the default) It gets arrays. It returns the result; or a tuple, the
             result and its gradients in the order of --list; or a dict of all by
             name. Where the result is an array, the gradients are those of
             sum(result * doutput): then doutput is an argument too.
--as torch   It gets tensors, and returns the result or a dict. Where there are
             gradients, PyTorch differentiates.
--as minilm  The same with Tensors of minilm.

In the cases named masked_nan everything outside the mask is NaN; in those named
extreme, numbers are about 1000. An error is max|yours - ours| / max(max|ours|, 1e-3)
of an array, its tolerance 1e-10, or 1e-4 for results in float32.
Exit status 0: all numbers agree. 1: some differ, or your function raised an error.
2: a mistake in the command, or a file that Python cannot read.

The vectors: tests/golden/README.md. Tests: tests/test_check.py.
"""

import argparse
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minilm.gradcheck import FLOOR
from minilm.tensor import Tensor

HERE = Path(__file__).resolve().parent
# In an installed package the vectors are beside this file, in a checkout among the tests.
FOLDERS = (HERE / "golden", HERE.parent / "tests" / "golden")
COTANGENT = "doutput"


class Mistake(Exception):
    """In the command, or a file that Python cannot read: one line, and exit status 2."""


class WrongResult(Exception):
    """Something else than numbers came back from the function."""


# The vectors.

def folder() -> Path:
    """The folder of the golden vectors. Raises Mistake if this copy of minilm has none."""
    for path in FOLDERS:
        if (path / "index.json").is_file():
            return path
    raise Mistake(f"no golden vectors in {' or '.join(map(str, FOLDERS))}; install minilm again")


def read_index() -> dict[str, Any]:
    """index.json: tolerances, conventions, and the cases by name."""
    return json.loads((folder() / "index.json").read_text("utf-8"))


def read_case(entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The arguments of a case by name, arrays and settings, and its results. entry: its part of the index."""
    with np.load(folder() / entry["file"]) as file:
        arrays = {name: file[name] for name in file.files}
    arguments = {name: arrays[name] for name in entry["inputs"]}
    return {**arguments, **entry.get("options", {})}, {name: arrays[name] for name in entry["results"]}


def cases_of(index: dict[str, Any], function: str) -> dict[str, dict[str, Any]]:
    """The entries of the index for one of our functions. Raises Mistake, with all names, if it has none."""
    cases = {name: entry for name, entry in index["cases"].items() if entry["function"] == function}
    if not cases:
        names = ", ".join(dict.fromkeys(entry["function"] for entry in index["cases"].values()))
        raise Mistake(f"there are no vectors of {function!r}; there are some of {names}")
    return cases


# One case.

def check(function: Callable, entry: dict[str, Any], framework: str, tolerance: dict[str, Any]) -> tuple[str, str]:
    """("agrees", "DIFFERS" or "left out", in which arrays or why) of the function on one case."""
    arguments, expected = read_case(entry)
    parameters = inspect.signature(function).parameters.values()
    takes = {p.name for p in parameters}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in arguments.keys() - takes - {COTANGENT}:
            if isinstance(arguments[name], (np.ndarray, str, dict, list)) or arguments[name]:
                return "left out", f"it has the argument {name}, which your function does not take"
        arguments = {name: a for name, a in arguments.items() if name in takes or name == COTANGENT}
    try:
        found = results(function, arguments, list(expected), framework, COTANGENT in takes)
    except WrongResult as error:
        return "DIFFERS", str(error)
    except Exception as error:
        return "DIFFERS", f"it raised {type(error).__name__}: {error}{place(error, function)}"
    for name in expected:
        if name in found and (words := first_difference(name, found[name], expected[name], tolerance)):
            return "DIFFERS", words
    missing = [name for name in expected if name not in found]
    if any(name[0] != "d" for name in missing):
        return "DIFFERS", f"there is no {next(name for name in missing if name[0] != 'd')} among your results"
    return "agrees", ", ".join(found) + (f"; not given, not checked: {', '.join(missing)}" if missing else "")


def place(error: Exception, function: Callable) -> str:
    """" (FILE, line N)": the last line in the function's file that the error went through; "" if there is none."""
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({file}, line {lines[-1]})" if lines else ""


def results(function: Callable, arguments: dict[str, Any], names: list[str], framework: str,
            takes_cotangent: bool) -> dict[str, np.ndarray]:
    """What the function returns, and its gradients, arrays by name. names: of all results of ours."""
    variables = [name[1:] for name in names if name[0] == "d"]
    values = [name for name in names if name[0] != "d"]
    made = {name: leaf(framework, a, name in variables) for name, a in arguments.items()}
    cotangent = made.get(COTANGENT)
    if not (takes_cotangent and framework == "numpy"):
        made.pop(COTANGENT, None)
    returned = function(**made)
    if returned is None:
        raise WrongResult("your function returned None; is there a return?")
    if isinstance(returned, dict):
        found = {key if key in names else f"metrics/{key}": value for key, value in returned.items()}
    elif isinstance(returned, (tuple, list)):
        found = dict(zip([values[0], *(f"d{name}" for name in variables)], returned))
    else:
        found = {values[0]: returned}
    result: Any = found.get("loss", found.get("output"))
    if framework != "numpy" and variables and result is not None:
        if not hasattr(result, "backward"):
            kind = "a Tensor" if framework == "minilm" else "a tensor"
            raise WrongResult(f"with --as {framework} it must return {kind}; it returned {type(result).__name__}")
        result.backward(*([] if cotangent is None else [cotangent]))
        # A leaf that the result does not depend on has no gradient: it is 0.
        found.update({f"d{name}": np.zeros(arguments[name].shape) if (gradient := made[name].grad) is None else gradient
                      for name in variables})
    return {name: as_array(name, value) for name, value in found.items() if name in names}


def leaf(framework: str, value: Any, differentiated: bool) -> Any:
    """An argument as the framework has it: an array or a tensor; settings as they are."""
    if not isinstance(value, np.ndarray):
        return value
    if framework == "torch":
        import torch
        return torch.tensor(value, requires_grad=differentiated)
    return Tensor(value, requires_grad=True) if framework == "minilm" and differentiated else value


def as_array(name: str, value: Any) -> np.ndarray:
    """An array, a number, or the numbers of a tensor. Raises WrongResult for anything else."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    array = np.asarray(value.data if isinstance(value, Tensor) else value)
    if array.dtype.kind not in "fiub":
        raise WrongResult(f"{name} is {type(value).__name__}; it must be a number or an array")
    return array


def first_difference(name: str, got: np.ndarray, expected: np.ndarray, tolerance: dict[str, Any]) -> str | None:
    """Where an array first differs from ours, in words; None if it does not."""
    if got.shape != expected.shape:
        return f"{name} has shape {got.shape}; it must have {expected.shape}"
    allowed = tolerance["float32" if got.dtype.kind == "f" and got.dtype.itemsize < 8 else "float64"]
    with np.errstate(invalid="ignore"):                     # infinity minus a number
        right = np.abs(got - expected) <= allowed * max(np.abs(expected).max(initial=0), FLOOR)
    if right.all():
        return None
    place = tuple(int(i) for i in np.argwhere(~right)[0])
    where = f"{name}[{', '.join(map(str, place))}]" if place else name
    values = f"{where} is {got[place].item()!r}, expected {expected[place].item()!r}"
    return f"{values} ({(~right).sum()} of {right.size} differ)"


# The command.

def load(words: str) -> Callable:
    """The function of FILE.py:function. Raises Mistake if there is none, and for a file that Python cannot read.
    Another error in the file itself is raised."""
    path, _, name = words.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise Mistake(f"{words!r} must be FILE.py:function, with a file that exists")
    sys.path.insert(0, str(Path(path).resolve().parent))    # as if the file were run: it may import its neighbours
    module_name = f"_minilm_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module                       # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise Mistake(f"Python cannot read {error.filename}: line {error.lineno}: {error.msg}: "
                      f"{(error.text or '').strip()}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise Mistake(f"{path} has no function {name!r}")
    return function


def listing(index: dict[str, Any]) -> str:
    """Our functions, each with the arguments of its cases, results and formula."""
    lines = []
    for name in dict.fromkeys(entry["function"] for entry in index["cases"].values()):
        cases = cases_of(index, name)
        first = next(iter(cases.values()))
        settings = {key: None for entry in cases.values() for key in entry.get("options", {})}
        lines += [f"{name}({', '.join(dict.fromkeys([*first['inputs'], *settings]))}) -> {', '.join(first['results'])}",
                  f"    {first['formula']}", f"    cases: {', '.join(cases)}"]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The exit status. Prints one line for each case."""
    parser = argparse.ArgumentParser(prog="python -m minilm.check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", nargs="?", metavar="FILE.py:function", help="yours")
    parser.add_argument("name", nargs="?", metavar="NAME", help="of ours")
    parser.add_argument("--as", dest="framework", choices=("numpy", "torch", "minilm"), default="numpy",
                        help="what it gets and returns (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print our functions, and do nothing else")
    parser.error = _mistake                                 # type: ignore[method-assign, assignment]
    asked = parser.parse_args(arguments)
    index = read_index()
    if asked.list:
        print(listing(index))
        return 0
    if asked.name is None:
        raise Mistake("give FILE.py:function and NAME; --list shows the names")
    if importlib.util.find_spec(asked.framework) is None:
        raise Mistake(f"--as {asked.framework} needs {asked.framework}, which is not installed")
    cases = cases_of(index, asked.name)
    function = load(asked.function)
    verdicts = []
    for case, entry in cases.items():
        verdict, words = check(function, entry, asked.framework, index["tolerance"])
        verdicts.append(verdict)
        print(f"{case:36s} {verdict}: {words}")
    if "agrees" not in verdicts and "DIFFERS" not in verdicts:
        raise Mistake(f"your function takes no case of {asked.name}; --list shows the arguments")
    return int("DIFFERS" in verdicts)


def _mistake(words):
    raise Mistake(f"{words}; --help lists the options")


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        print(end="", flush=True)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # otherwise Python tries again at exit, and complains
        status = 141
    sys.exit(status)
