"""Exercises in the mathematics of language models, with a grader. Each is one function of NumPy arrays.

    python -m minilm.exercises list                     the tasks, by topic
    python -m minilm.exercises start TASK|all DIR       writes NN_TASK.py: specification, shapes, a hole
    python -m minilm.exercises check TASK DIR           grades one file; or check FILE
    python -m minilm.exercises check DIR                grades all files in DIR
    python -m minilm.exercises hint TASK [1|2]          where to begin; then the formula
    python -m minilm.exercises solution TASK            ours
    python -m minilm.exercises predict                  twenty questions: predict a number, then run
    python -m minilm.exercises predict N [--answer]     one question; with --answer the numbers, computed now

TASK is a name or a number of the list, DIR a folder. start never writes over a file, unless --overwrite is given.
check runs a file in a process of its own, for at most --seconds (20). It says which number is wrong first and what it
should be, and, if it is the number of a well-known mistake, which one. Tasks in CUDA need g++.

Exit status: 0; 1 if the one file is not solved, or one of all that have been begun is wrong; 2 for a mistake in the
command.
"""

import argparse
import contextlib
import os
import shlex
import sys
import textwrap
from pathlib import Path

from minilm.exercises import catalogue, predict, process
from minilm.exercises.grading import NOT_BEGUN

WIDTH = 100


def main(words: list[str]) -> int:
    """The exit status."""
    given = _parser().parse_args(words)
    command = {"list": _list, "start": _start, "check": _check, "hint": _hint, "solution": _solution,
               "predict": _predict}
    if given.command is None:
        print(__doc__.strip())
        return 0
    return command[given.command](given)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}; --help shows the commands")


def _parser():
    parser = _Parser(prog="python -m minilm.exercises", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("list")
    start = commands.add_parser("start")
    start.add_argument("task", metavar="TASK|all")
    start.add_argument("folder", metavar="DIR")
    start.add_argument("--overwrite", action="store_true")
    check = commands.add_parser("check")
    check.add_argument("words", nargs="+", metavar="[TASK] DIR")
    check.add_argument("--seconds", type=float, default=process.SECONDS)
    hint = commands.add_parser("hint")
    hint.add_argument("task", metavar="TASK")
    hint.add_argument("number", nargs="?", choices=("1", "2"), default="1")
    solution = commands.add_parser("solution")
    solution.add_argument("task", metavar="TASK")
    questions = commands.add_parser("predict")
    questions.add_argument("number", nargs="?")
    questions.add_argument("--answer", action="store_true")
    return parser


def _list(given):
    for name in catalogue.NAMES:
        exercise = catalogue.find(name)
        print(f"{exercise.number:3} {name:24} {exercise.title}")
    return 0


def _start(given):
    folder = Path(given.folder)
    wanted = catalogue.NAMES if given.task == "all" else (catalogue.find(given.task).name,)
    if folder.is_file() or folder.suffix in (".py", ".cu"):
        raise NotADirectoryError(f"{folder} is a file; start needs a folder: start {given.task} DIR")
    folder.mkdir(parents=True, exist_ok=True)
    kept = 0
    for exercise in map(catalogue.find, wanted):
        path = folder / exercise.file
        try:
            with path.open("w" if given.overwrite else "x", encoding="utf-8") as file:
                file.write(exercise.text(str(folder.resolve())))
            print(f"{path}: written")
        except FileExistsError:
            kept += 1
            print(f"{path}: it is there already, and stays as it is (--overwrite writes it anew)")
    return int(kept == 1 == len(wanted))


def _check(given):
    if not 0 < given.seconds < 1e6:
        raise ValueError(f"--seconds is {given.seconds}; it must be above 0 and below a million")
    if len(given.words) > 2:
        raise ValueError(f"check {' '.join(given.words)}: expected check TASK DIR, or check DIR")
    folder = Path(given.words[-1])
    if not folder.exists():
        raise FileNotFoundError(_no_folder(given.words))
    if folder.is_dir() and (len(given.words) == 1 or given.words[0] == "all"):
        return _check_all(folder, given.seconds)
    exercise = catalogue.find(given.words[0])
    verdict = exercise.check(folder, given.seconds)
    print(f"{exercise.number} {exercise.name}: {_wrapped(verdict.text)}")
    return 0 if verdict.solved else 1


def _no_folder(words):
    """What is wrong with words whose last one is the path of nothing."""
    with contextlib.suppress(LookupError):
        if len(words) == 1 == len(Path(words[0]).parts) and not Path(words[0]).suffix:
            return f"{words[0]} is a task: in which folder? check {catalogue.find(words[0]).name} DIR"
    return f"there is no folder or file {words[-1]}; expected check TASK DIR, or check DIR, or check FILE"


def _check_all(folder, seconds):
    """One line for each exercise that has a file, and the next one."""
    solved = wrong = 0
    following = None
    for exercise in map(catalogue.find, catalogue.NAMES):
        try:
            verdict = exercise.check(folder, seconds)
        except FileNotFoundError as error:
            if " has no " not in str(error):
                raise
            line = "-"
        else:
            line = "not begun" if verdict == NOT_BEGUN else verdict.text.split("\n")[0]
            solved += verdict.solved
            wrong += verdict.begun and not verdict.solved
            if verdict.solved:
                print(f"{exercise.number:3} {exercise.name:24} {line}", flush=True)
                continue
        print(f"{exercise.number:3} {exercise.name:24} {textwrap.shorten(line, 200)}", flush=True)
        following = following or exercise
    then = f" Next: {following.name}" if following else ""
    print(f"{solved} of {len(catalogue.NAMES)} solved, {wrong} wrong.{then}")
    if wrong:
        print(f"check TASK {shlex.quote(str(folder))} says more about a wrong one, and which mistake it may be")
    return 1 if wrong else 0


def _wrapped(text):
    """Long lines broken, the rest of a line indented. Lines of code, which begin with four spaces, stay whole."""
    first, *others = text.split("\n")
    return "\n".join([_filled(first), *("  " + line if line.startswith("    ") else _filled(line, "  ")
                                       for line in others)])


def _filled(line, indent=""):
    return textwrap.fill(line, WIDTH, initial_indent=indent, subsequent_indent="      ", break_long_words=False,
                         break_on_hyphens=False, replace_whitespace=False)


def _hint(given):
    exercise = catalogue.find(given.task)
    print(textwrap.fill(exercise.hints[int(given.number) - 1], WIDTH))
    if given.number == "1":
        print(f"(The second hint, with the formula: hint {exercise.name} 2)")
    return 0


def _solution(given):
    print(catalogue.find(given.task).solution(), end="")
    return 0


def _predict(given):
    if given.answer and given.number is None:
        raise ValueError("predict --answer: of which question? predict lists them")
    print(predict.listed() if given.number is None else predict.text(given.number, given.answer))
    return 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        print(end="", flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:                         # the program that reads the output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # otherwise Python writes again at exit, and complains
        status = 141
    except (LookupError, OSError, ValueError) as error:
        print("error:", " ".join(str(error.args[0] if isinstance(error, LookupError) else error).split()),
              file=sys.stderr)
        status = 2
    sys.exit(status)
