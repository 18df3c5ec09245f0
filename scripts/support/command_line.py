"""Shared by the scripts: options that are refused before the work starts, and files that are damaged.

Every error here is a UsageError; main_guard of run_folder.py prints it as one line and returns the exit status 2.
Checked in tests/test_commands.py, which runs every command of the repository with bad options.
"""
import argparse
import contextlib
import csv
import json
import math
import os
import reprlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from minilm.checkpoint import one_line
from minilm.checks import distinct, ordinary_file
from support.run_folder import UsageError

MOST_WORKERS = 64
# The exceptions that wrong values in a file end in, when a program relies on them. A full disk (OSError) is not one.
DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration, RecursionError, csv.Error)


class Parser(argparse.ArgumentParser):
    """argparse's parser. A wrong option raises UsageError; options cannot be abbreviated."""

    def __init__(self, description: str, **settings):
        super().__init__(description=description, allow_abbrev=False, **settings)

    def error(self, message):
        raise UsageError(f"{message.removeprefix('argument ')}; --help lists the options")


def whole(at_least: int, at_most: int | None = None) -> Callable[[str], int]:
    """The `type` of an option: an integer in this range.

    >>> whole(1, 64)("2")
    2
    """
    return _in_range(int, "a whole number", at_least, math.inf if at_most is None else at_most)


def wholes(at_least: int, at_most: int) -> Callable[[str], list[int]]:
    """The `type` of an option: integers in this range, with commas between them."""
    one = whole(at_least, at_most)
    return lambda text: [one(word) for word in text.split(",")]


def number(at_least: float, at_most: float) -> Callable[[str], float]:
    """The `type` of an option: a number in this range. NaN is in none."""
    return _in_range(float, "a number", at_least, at_most)


def _in_range(kind, words, at_least, at_most):
    limits = f"of at least {at_least}" if at_most == math.inf else f"from {at_least} to {at_most}"

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not at_least <= value <= at_most:
            raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} must be {words} {limits}")
        return value
    return read


def names(kind: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    """The `type` of an option: some of the known names, with commas between them.

    >>> names("size", ["S", "M", "L"])("M,S")
    ['M', 'S']
    """
    def read(text):
        wanted = list(dict.fromkeys(name.strip() for name in text.split(",")))
        if unknown := [name for name in wanted if name not in known]:
            raise argparse.ArgumentTypeError(f"no {kind} {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
        return wanted
    return read


def output_file(text: str) -> Path:
    """The `type` of an option: a file to write. It is refused at once, not after the work, if it cannot be written."""
    path = Path(text)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {path.parent}")
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:              # a name that is too long, or has a NUL
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a file ({getattr(error, 'strerror', error)})") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written (permission denied)")
    return path


def read_text(path: str | Path, hint: str) -> str:
    """A UTF-8 text file. Raises UsageError with the cause and the hint, a sentence that says what to do."""
    try:
        return Path(ordinary_file(path)).read_text("utf-8")
    except OSError as error:
        cause = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise UsageError(f"{path}: {cause}. {hint}") from error
    except ValueError as error:
        raise UsageError(f"{path} is no UTF-8 text ({one_line(error)}). {hint}") from error


def read_json(path: str | Path, hint: str) -> dict:
    """A dictionary from a JSON file. Raises UsageError with the cause and the hint."""
    try:
        content = json.loads(read_text(path, hint), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON, or damaged ({one_line(error)}). {hint}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a JSON {type(content).__name__}, not an object {{...}}. {hint}")
    return content


@contextlib.contextmanager
def relying_on(path: str | Path, hint: str):
    """Around the code that uses the content of a file: its exceptions become a UsageError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # the error says more
            yield
    except DAMAGE as error:
        raise UsageError(f"{path} is damaged, or of another version ({type(error).__name__}: {one_line(error)}). "
                         f"{hint}") from error
