"""The programs of the command line: the example of a module of minilm.kernels, and a kernel from a .cu file."""

import difflib
import functools
import importlib
import inspect
import math
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from minilm import checks
from minilm.kernels import emulator
from minilm.kernels.bf16 import from_bf16, to_bf16
from minilm.kernels.emulator import build
from minilm.kernels.emulator.module import SHARED_UNASKED
from minilm.kernels.emulator.running import never_written
from minilm.kernels.launch import with_headers

KERNELS = Path(__file__).resolve().parents[1]
SHOWN = 8                       # elements of a result that are printed
DEFINITION = re.compile(r"[A-Za-z_]\w*(=.*)?")
BLOCK = 128                     # threads of a block, unless the kernel or the user says another number
MOST = 1 << 26                  # threads of a launch, elements of an array; more would run for hours
FILLS = "random", "zeros", "ones", "arange", "empty"


def nearest(name: str, known: Iterable[str]) -> str:
    """". Did you mean ..?" for a misspelt name; "" if no known name is near."""
    lowered = {other.lower(): other for other in known}
    found = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, 2, 0.5)]
    return f". Did you mean {' or '.join(found)}?" if found else ""


class Unavailable(RuntimeError):
    """The emulator cannot run on this machine; the message says why."""


class Program:
    """Launches kernels. run(mode) gives the results and the launches; mode: emulator.checked() or another."""

    folder = KERNELS            # of the source, for gdb

    def report(self, steps):
        """Run it under the checkers, then in other orders and in the fast build. Raises Fault."""
        results, launches = self.run(emulator.checked(steps=steps))
        for launch in launches:
            print(f"{launch.kernel}: grid {launch.grid}, block {launch.block}, "
                  f"{launch.shared:,} bytes of dynamic shared memory")
            moved = {launch.parameters[i]: bytes for i, bytes in launch.traffic.items()}
            for name, (read, written) in (*moved.items(), ("(shared)", launch.shared_traffic)):
                print(f"    {name:12} {read:12,} bytes read {written:12,} written")
        self.show(results)
        print(f"{_count(len(launches), 'launch', 'launches')}, {_count(len(results), 'result', 'results')}: "
              "no checker found a fault")
        for words, mode in (("threads and blocks in reversed order", emulator.checked("reversed", steps)),
                            ("in random order", emulator.checked(1, steps)), ("the fast build", emulator.fast())):
            others = self.run(mode)[0]
            same = all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(results, others))
            print(f"{words}: {'the same results, bit for bit' if same else 'NOT the same results'}")

    def show(self, results):
        """Print the results themselves."""


def _count(number, one, several):
    return f"{number} {one if number == 1 else several}"


# Modules of minilm.kernels.

@functools.cache
def modules() -> dict[str, str]:
    """{module: the options of its example with their defaults} of every module of minilm.kernels."""
    return {name: " ".join(f"--{size} {default}" for size, default in _defaults(name).items())
            for name in sorted(path.stem for path in KERNELS.glob("*.cu"))}


def _defaults(module):
    example = importlib.import_module(f"minilm.kernels.{module}").example
    return {name: parameter.default for name, parameter in inspect.signature(example).parameters.items()
            if parameter.default is not parameter.empty}


class Module(Program):
    """The example of a module. sizes: {name: text}, as they were typed."""

    def __init__(self, name, sizes, seed):
        self.name = name
        self.seed = seed
        self.sizes = {}
        defaults = _defaults(name)
        for size, text in sizes.items():
            if size not in defaults:
                raise LookupError(f"{name} has no size --{size}; it has {modules()[name]}" + nearest(size, defaults))
            self.sizes[size] = _number(f"--{size}", text, type(defaults[size]))

    def run(self, mode):
        with emulator.as_cupy() as xp, mode as launches:
            module = importlib.import_module(f"minilm.kernels.{self.name}")
            try:
                results = module.example(xp, np.random.default_rng(self.seed), **self.sizes)
            except (LookupError, TypeError, ValueError, ArithmeticError, MemoryError) as error:
                given = " ".join(f"--{size} {value}" for size, value in self.sizes.items())
                raise ValueError(f"{self.name} {given}: {error}") from error
        results = results if isinstance(results, tuple) else (results,)
        return [r.get() if hasattr(r, "get") else np.asarray(r) for r in results], launches


def _number(name, text, kind):
    """The value of an option; kind: int, float or str. Raises ValueError."""
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{name} {reprlib.repr(text)[1:-1]}: expected "
                         f"{'a whole number' if kind is int else 'a number'}") from None
    if kind is int and value < 0:
        raise ValueError(f"{name} {text}: expected a number of at least 0")
    if kind is int and value > MOST:
        raise ValueError(f"{name} {text}: expected a number of at most {MOST}; the emulator would run for hours")
    return value


# A kernel of one's own.

class OwnKernel(Program):
    """A kernel of a .cu file. sizes: {parameter: text}, the elements of an array or the value of a scalar."""

    def __init__(self, path, sizes, seed, kernel, grid, block, shared, define):
        self.path = path
        self.sizes = sizes
        self.seed = seed
        self.shared = shared or 0
        try:
            text = checks.ordinary_file(path).read_text("utf-8")
        except FileNotFoundError:
            raise LookupError(f"there is no file {path}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text: {error}") from None
        self.folder = path.resolve().parent         # raises for a loop of links, which cannot be read either
        if wrong := [definition for definition in define if not DEFINITION.fullmatch(definition)]:
            raise ValueError(f"--define {wrong[0]}: expected NAME=VALUE, as in --define REAL=double")
        self.code = with_headers(path.name, text)
        self.options = "--std=c++17", *(f"-D{definition}" for definition in define)
        self.kernel = self._chosen(kernel, build.kernel_names(text))
        self.grid = _extent("--grid", grid)
        self.block = _extent("--block", block)

    def _chosen(self, kernel, names):
        if kernel and names and kernel not in names:
            raise LookupError(f"{self.path} has no kernel {kernel}; it has {', '.join(names)}" + nearest(kernel, names))
        if not kernel and not names:
            raise LookupError(f'{self.path} has no kernel; declare it extern "C" __global__ void name(...)')
        if not kernel and len(names) > 1:
            raise LookupError(f"{self.path} has the kernels {', '.join(names)}: choose one with --kernel")
        return kernel or names[0]

    def run(self, mode):
        with emulator.as_cupy() as xp, mode as launches:
            function = xp.RawModule(code=self.code, options=self.options).get_function(self.kernel)
            compiled = function.compiled("checked")
            arguments = self._arguments(xp, compiled.parameters)
            block = self.block or (compiled.most_threads or BLOCK,)
            most = max((a.size for a in arguments if hasattr(a, "get")), default=1)
            if self.shared > SHARED_UNASKED:
                function.max_dynamic_shared_size_bytes = self.shared
            grid = self.grid or (max(1, -(-most // max(1, math.prod(block)))),)
            if math.prod(grid) * math.prod(block) > MOST:
                raise ValueError(f"a grid of {grid} blocks of {block} threads: expected at most {MOST} threads in all")
            function(grid, block, arguments, shared_mem=self.shared)
        self.results = {p.name: from_bf16(a.get()) if p.bf16 else a.get()
                        for p, a in zip(compiled.parameters, arguments) if p.writable}
        return list(self.results.values()), launches

    def _arguments(self, xp, parameters):
        names = [p.name for p in parameters]
        for name, text in self.sizes.items():
            if name not in names:
                raise LookupError(f"--{name} {text}: kernel {self.kernel} has no argument {name}; it has "
                                  f"{', '.join(names)}" + nearest(name, names))
        if missing := [p for p in parameters if p.name not in self.sizes]:
            raise LookupError(f"kernel {self.kernel}({', '.join(names)}) also needs " + " ".join(
                f"--{p.name} {'ELEMENTS' if p.pointer else 'VALUE'}" for p in missing))
        rng = np.random.default_rng(self.seed)
        return tuple(_argument(xp, rng, p, self.sizes[p.name]) for p in parameters)

    def show(self, results):
        for (name, _), array in zip(self.results.items(), results):
            flat = array.reshape(-1)
            absent = never_written(array.reshape(-1))
            words = ["(not written)" if absent[i] else str(flat[i]) for i in range(min(SHOWN, flat.size))]
            rest = f" .. ({flat.size} in all)" if flat.size > SHOWN else ""
            print(f"{name} = {' '.join(words)}{rest}"
                  + (f"; {absent.sum()} of {flat.size} elements were not written" if absent.any() else ""))


def _argument(xp, rng, parameter, text):
    """The value of a scalar; or an array of the device, from "300" or "zeros:300"."""
    name = f"--{parameter.name}"
    if parameter.dtype is None:
        raise TypeError(f"argument {parameter.name}: the emulator passes numbers and pointers to numbers alone")
    dtype = np.dtype(np.float32) if parameter.bf16 else parameter.dtype
    stored = to_bf16 if parameter.bf16 else np.asarray
    whole = dtype.kind in "iub"
    if not parameter.pointer:
        try:
            return stored(dtype.type(int(text, 0) if whole else float(text)))[()]
        except ValueError:
            raise ValueError(f"{name} {text}: expected {'a whole number' if whole else 'a number'}") from None
        except OverflowError as error:
            raise ValueError(f"{name}: {error}") from None
    fill, colon, count = text.rpartition(":")
    fill = fill if colon else "empty" if parameter.writable else "random"
    if fill not in FILLS:
        raise ValueError(f"{name} {text}: the content of an array is one of {', '.join(FILLS)}, as in {name} zeros:300")
    size = _number(name, count, int)
    if fill == "empty":
        return xp.empty(size, parameter.dtype)
    if fill == "random":
        numbers = rng.integers(0, 2 if dtype.kind == "b" else 10, size) if whole else rng.normal(size=size)
    else:
        numbers = {"zeros": np.zeros, "ones": np.ones, "arange": np.arange}[fill](size)
    return xp.asarray(stored(numbers.astype(dtype)))


def _extent(name, text):
    """(x, y, z) of "x,y,z", one to three numbers; None if not given."""
    if text is None:
        return None
    try:
        extent = tuple(int(number) for number in text.split(","))
    except ValueError:
        extent = ()
    if not 1 <= len(extent) <= 3:
        raise ValueError(f"{name} {text}: expected one to three whole numbers with commas, as in {name} 8,2")
    return extent
