"""Runs CUDA kernels on the CPU, under all checkers or line by line in gdb.

    python -m minilm.kernels.emulator attention --T 33
    python -m minilm.kernels.emulator attention --T 33 --debug
    python -m minilm.kernels.emulator mysum.cu --kernel vecsum --x 300 --out 3
    python -m minilm.kernels.emulator puzzle sums mine.cu

MODULE: a module of minilm.kernels. Its function example(xp, rng, **sizes) runs
its kernels on random numbers.

FILE.cu: kernels of your own, declared extern "C" __global__. Give every
argument by name: the number of elements of an array, the value of a scalar.
Arrays that the kernel declares const are filled with random numbers (integers
from 0 to 9); other arrays are memory that nothing has written yet. To choose
the content: --x zeros:300, or random, ones, arange, empty. The grid has one
thread for each element of the largest array, unless --grid is given.

puzzle sums|softmax|attention FILE.cu: writes the task to the file, if there is
none; otherwise checks the solution in it.

Printed: launches, bytes moved, results, and whether the results are the same in
other orders of threads and blocks. A fault is printed alone, with its source
lines, and so is the message of the compiler; the exit status is then 1. A mistake
in the command is one line, and the exit status 2.
"""

import argparse
import os
import reprlib
import shutil
import sys
from pathlib import Path

from minilm.kernels import emulator
from minilm.kernels.emulator import programs, puzzles
from minilm.kernels.emulator.fault import explained
from minilm.kernels.emulator.running import STEPS

HERE = Path(__file__).resolve().parent


# Of a command that cannot be run. Another exception is a bug, and keeps its traceback.
MISTAKES = LookupError, OSError, TypeError, ValueError, ArithmeticError, MemoryError, programs.Unavailable


def main(arguments: list[str] | None = None) -> None:
    """Ends with SystemExit: text (status 1) for a fault, 2 for a mistake, 130 for Ctrl-C, 141 for a closed output."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _main(arguments)
        print(end="", flush=True)                           # not sys.stdout.flush(): it may have been closed
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # otherwise Python tries again at exit, and complains
        raise SystemExit(141) from None
    except (emulator.Fault, emulator.CompileError, *MISTAKES) as error:
        if "--traceback" in arguments:
            raise
        if isinstance(error, emulator.Fault):
            raise SystemExit(explained(error)) from None
        if isinstance(error, emulator.CompileError):
            raise SystemExit(str(error)) from None
        print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        raise SystemExit(2) from None


def _main(arguments):
    if arguments[:1] == ["puzzle"]:
        _puzzle(arguments[1:])
        return
    if arguments[:1] == ["run"] and len(arguments) > 1:         # run FILE.cu: the word may be there
        arguments = arguments[1:]
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    sizes = _sizes(parser, rest)
    if reason := emulator.available():
        raise programs.Unavailable(reason)
    program = _program(given, sizes)
    if given.debug:
        _gdb(given, rest, program)
    elif given.inferior:
        program.run(emulator.debug())
    else:
        program.report(given.steps)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message.removeprefix('argument ')}; --help lists the options")


def _whole(text, at_least=0):
    """The value of --seed or --shared."""
    if not text.isdecimal() or len(text) > 18 or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} must be a whole number of at least {at_least} with at "
                                         "most 18 digits")
    return int(text)


def _positive(text):
    return _whole(text, at_least=1)


def _parser():
    modules = "\n".join(f"    {name:12} {sizes}" for name, sizes in programs.modules().items())
    parser = _Parser(
        prog="python -m minilm.kernels.emulator", usage="%(prog)s MODULE|FILE.cu [--NAME VALUE ...] [options]",
        description=__doc__, epilog=f"modules, and their sizes by default:\n{modules}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", metavar="MODULE|FILE.cu")
    parser.add_argument("--seed", type=_whole, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--steps", type=_positive, default=STEPS, metavar="N",
                        help="of a thread in a block: one that takes more is in an endless loop (default: %(default)s)")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of a fault or an error")
    parser.add_argument("--debug", action="store_true", help="stop in gdb at the first line of the first kernel")
    parser.add_argument("--do", action="append", default=[], metavar="COMMAND",
                        help="with --debug: run this command of gdb, without its prompt; can be given several times")
    parser.add_argument("--inferior", action="store_true", help=argparse.SUPPRESS)     # the process that gdb runs
    own = parser.add_argument_group("for a .cu file")
    own.add_argument("--kernel", help="the kernel to run, if the file has several")
    own.add_argument("--grid", metavar="X[,Y[,Z]]", help="blocks")
    own.add_argument("--block", metavar="X[,Y[,Z]]",
                     help="threads of a block (default: those of __launch_bounds__, or 128)")
    own.add_argument("--shared", type=_whole, metavar="BYTES", help="dynamic shared memory of a block (default: 0)")
    own.add_argument("--define", action="append", default=[], metavar="NAME=VALUE", help="as -D of the compiler")
    return parser


def _sizes(parser, rest):
    """{name: text} of ["--name", "text", ..] and ["--name=text", ..]."""
    sizes = {}
    words = iter(rest)
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        text = text if equals else next(words, None)
        if not word.startswith("--") or not name or text is None:
            parser.error(f"a size is given as --NAME VALUE, for example --T 33; {' '.join(rest)} is not of that form")
        sizes[name] = text
    return sizes


def _program(given, sizes):
    own = {name: getattr(given, name) for name in ("kernel", "grid", "block", "shared", "define")}
    if given.module.endswith(".cu"):
        path = Path(given.module)
        if path.stem in programs.modules() and (not path.is_file() or path.resolve().parent == programs.KERNELS):
            raise LookupError(f"{path} is a module of minilm.kernels; give its name: {path.stem}")
        return programs.OwnKernel(path, sizes, given.seed, **own)
    if chosen := [name for name, value in own.items() if value]:
        raise ValueError(f"--{chosen[0]} is for a .cu file; {given.module} takes sizes (see --help)")
    if given.module not in programs.modules():
        raise LookupError(f"no module {given.module}; there are {', '.join(programs.modules())}, or give a .cu file"
                          + programs.nearest(given.module, programs.modules()))
    return programs.Module(given.module, sizes, given.seed)


def _puzzle(words):
    if reason := emulator.available():
        raise programs.Unavailable(reason)
    if len(words) != 2 or words[0] not in puzzles.PUZZLES or not words[1].endswith(".cu"):
        raise ValueError(f"puzzle {' '.join(words)}: expected puzzle {'|'.join(puzzles.PUZZLES)} FILE.cu")
    name, path = words[0], Path(words[1])
    if not path.exists():
        with path.open("x", encoding="utf-8") as file:
            file.write(puzzles.task(name))
        print(f"{path}: the task is in it. Write the kernel, and run the same command again")
        return
    try:
        print(puzzles.check(name, path))
    except emulator.Fault as fault:
        raise SystemExit("\n".join(filter(None, [explained(fault), puzzles.advice(fault)]))) from None
    except puzzles.Unsolved as error:
        raise SystemExit(f"not solved. {error}") from None


def _gdb(given, rest, program):
    if not shutil.which("gdb"):
        raise OSError("--debug needs gdb (Debian: apt-get install gdb)")
    launches = program.run(emulator.debug())[1]         # builds the kernels, and gives their names
    names = dict.fromkeys(launch.kernel for launch in launches)
    commands = [f"directory {program.folder}:{HERE}", *(f"tbreak {name}" for name in names)]
    commands += ["run", "next", "list", "whoami"]
    options = ["-q", "-iex", "set auto-load no", "-x", str(HERE / "debug.gdb"), *(["-batch"] if given.do else [])]
    options += [word for command in commands + given.do for word in ("-ex", command)]
    own = [f"--{name}={value}" for name in ("kernel", "grid", "block", "shared") if (value := getattr(given, name))]
    own += [f"--define={definition}" for definition in given.define]
    inferior = [sys.executable, "-m", "minilm.kernels.emulator", given.module, *rest, *own, "--seed", str(given.seed)]
    os.execvp("gdb", ["gdb", *options, "--args", *inferior, "--inferior"])


if __name__ == "__main__":
    main()
