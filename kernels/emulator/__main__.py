"""Runs the kernels of a room on random numbers, under all checkers, or in gdb, line by line.

    python -m minilm.kernels.emulator attention --T 33          # checks, launches, bytes moved
    python -m minilm.kernels.emulator attention --T 33 --debug  # gdb, stopped at the first line of the first kernel

A room is a module of minilm.kernels with a function example(xp, rng, **sizes); what is not known here (--T 33) is
one of its sizes.
"""

import argparse
import importlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from minilm.kernels import emulator

HERE = Path(__file__).resolve().parent


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m minilm.kernels.emulator", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", help="attention, log_probs, sampling, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="stop in gdb at the first line of the first kernel")
    parser.add_argument("--do", action="append", default=[], metavar="COMMAND",
                        help="with --debug: a command for gdb, in place of its prompt; may be given again")
    parser.add_argument("--inferior", action="store_true", help=argparse.SUPPRESS)     # what gdb runs
    given, rest = parser.parse_known_args(arguments)
    if reason := emulator.available():
        raise SystemExit(reason)
    if len(rest) % 2 or not all(name.startswith("--") for name in rest[::2]):
        parser.error(f"sizes are given as --NAME NUMBER, not {' '.join(rest)}")
    sizes = {name[2:]: _number(value) for name, value in zip(rest[::2], rest[1::2])}
    if given.debug:
        return _gdb(given, sizes, rest)
    if given.inferior:
        return _example(given, sizes, emulator.debug())
    _report(given, sizes)


def _number(text):
    for kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            pass


def _example(given, sizes, how):
    """The results of the example, as NumPy arrays, and its launches."""
    with emulator.as_cupy() as xp, how as launches:
        results = importlib.import_module(f"minilm.kernels.{given.room}").example(
            xp, np.random.default_rng(given.seed), **sizes)
    results = results if isinstance(results, tuple) else (results,)
    return [r.get() if hasattr(r, "get") else np.asarray(r) for r in results], launches


def _report(given, sizes):
    results, launches = _example(given, sizes, emulator.checked())
    for launch in launches:
        print(f"{launch.kernel}: grid {launch.grid}, block {launch.block}, {launch.shared:,} bytes of shared memory")
        moved = {launch.parameters[i]: bytes for i, bytes in launch.traffic.items()}
        for name, (read, written) in (*moved.items(), ("(shared)", launch.shared_traffic)):
            print(f"    {name:12} {read:12,} bytes read {written:12,} written")
    print(f"{len(launches)} launches, {len(results)} results: no checker found anything")
    for words, how in (("threads and blocks in reversed order", emulator.checked("reversed")),
                       ("in random order", emulator.checked(1)), ("the fast build", emulator.fast())):
        others = _example(given, sizes, how)[0]
        same = all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(results, others))
        print(f"{words}: {'the same, bit for bit' if same else 'NOT the same numbers'}")


def _gdb(given, sizes, rest):
    if not shutil.which("gdb"):
        raise SystemExit("--debug needs gdb (Debian: apt-get install gdb)")
    launches = _example(given, sizes, emulator.debug())[1]      # builds, and tells which kernels there are
    names = dict.fromkeys(launch.kernel for launch in launches)
    commands = [f"directory {HERE.parent}", *(f"tbreak {name}" for name in names), "run", "next", "list", "whoami"]
    options = ["-q", "-iex", "set auto-load no", "-x", str(HERE / "debug.gdb"), *(["-batch"] if given.do else [])]
    options += [word for command in commands + given.do for word in ("-ex", command)]
    inferior = [sys.executable, "-m", "minilm.kernels.emulator", given.room, *rest, "--seed", str(given.seed)]
    os.execvp("gdb", ["gdb", *options, "--args", *inferior, "--inferior"])


if __name__ == "__main__":
    main()
