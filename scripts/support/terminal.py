"""Text for a terminal: answers on one line, lines of at most 80 columns, progress bars."""

import contextlib
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator

WIDTH = 80
EMPTY = "(empty)"
CUT_OFF = " ..."
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]"
SHOWN_METRICS = {"loss": "loss", "accuracy": "accuracy", "reward": "raw proxy reward", "kl_sequence": "KL",
                 "rewards/accuracies": "accuracy"}      # {name: name in the progress bar}


def one_line(text: str, finished: bool = True) -> str:
    """An answer of a model on one line.

    Newlines and other control characters are escaped, as in Python: a newline is \\n. An
    empty answer is "(empty)". An answer that was cut off (finished False) ends with " ...".
    """
    return (printable(text, "") or EMPTY) + ("" if finished else CUT_OFF)


# Characters that change the direction of the text around them.
DIRECTIONS = {0x061c, 0x200e, 0x200f, *range(0x202a, 0x202f), *range(0x2066, 0x206a)}


def printable(text: str, also: str = "\n") -> str:
    """The text with control characters escaped as in Python, but for those in `also`: no answer of a model moves the
    cursor, or changes the colours or the direction of a terminal."""
    return "".join(repr(c)[1:-1] if c not in also and (unicodedata.category(c) in ("Cc", "Cs") or ord(c) in DIRECTIONS)
                   else c for c in text)


def columns(text: str) -> int:
    """How many columns a terminal needs for it: two for a wide character (Korean, most emoji), none for a combining
    one."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else unicodedata.category(c) not in ("Mn", "Me", "Cf")
               for c in text)


def labelled(label: str, text: str, label_width: int) -> str:
    """A label and, indented beside it, a text of at most WIDTH columns, on as many lines as it needs."""
    written: list[str] = []
    column = Column(f"    {label:<{label_width}}  ", written.append)
    column.write(text)
    column.end()
    return "".join(written).removesuffix("\n")


class Column:
    """A label, and beside it a text that comes in pieces, in lines of at most WIDTH columns.

    A word is written when it is complete; a longer word than a line is cut. margin: the blanks before each line but the
    first. write: takes the text (default: to the terminal).
    """

    def __init__(self, label: str, write: Callable[[str], object] | None = None):
        self.margin = " " * columns(label)
        self._out = write or (lambda text: print(text, end="", flush=True))
        self._used = columns(label)     # columns of this line
        self._word = ""                 # with the blank before it
        self._out(label)

    def write(self, piece: str) -> None:
        """Write the words that the piece completes."""
        for character in piece.replace("\t", "    "):
            if character in " \n" and self._word.strip():
                self._write_word()
            if character == "\n":
                self._write_word()
                self._new_line()
            else:
                self._word += character

    def end(self) -> None:
        """Write what is left, and end the line."""
        self._write_word()
        self._out("\n")

    def _write_word(self):
        if self._used + columns(self._word) > WIDTH and self._used > len(self.margin):
            self._new_line()
            self._word = self._word.lstrip(" ")
        for character in self._word:
            if self._used + columns(character) > WIDTH:
                self._new_line()
            self._out(character)
            self._used += columns(character)
        self._word = ""

    def _new_line(self):
        self._out(f"\n{self.margin}")
        self._used = len(self.margin)


def paragraph(text: str) -> str:
    """A text in lines of at most WIDTH columns."""
    return textwrap.fill(text, WIDTH)


def trial_note(scale: float) -> str:
    """The warning of a run that is too short to learn the tasks."""
    return paragraph(f"A TRIAL RUN: with --scale {scale:g} the models do not learn the tasks. The run shows that "
                     "everything works. Its answers, numbers and figures mean nothing.")


@contextlib.contextmanager
def progress(title: str, steps: int, done: int = 0, unit: str = "step") -> Iterator[Callable]:
    """A bar with the time left in a terminal; elsewhere a line at every tenth of the steps.

    Yields advance(metrics=None), to be called after each step.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm
        # Not the size that tqdm finds: in a terminal that reports 0 columns and 0 rows, tqdm shows nothing.
        columns, rows = shutil.get_terminal_size()
        with tqdm(total=steps, initial=done, desc=f"{title:>13}", bar_format=BAR, ncols=columns, nrows=rows) as bar:
            def advance(metrics=None):
                if metrics:
                    bar.set_postfix_str(brief(metrics), refresh=False)
                bar.update()
            yield advance
        return

    began = time.monotonic()
    first = done

    def advance(metrics=None):
        nonlocal done
        done += 1
        if done == steps or done % max(1, steps // 10) == 0:
            elapsed = time.monotonic() - began
            left = elapsed / (done - first) * (steps - done)
            line = f"{title}: {unit} {done}/{steps}, {elapsed:.0f} s, {left:.0f} s left"
            print(", ".join([line, *filter(None, [brief(metrics or {})])]), flush=True)
    yield advance


def brief(metrics: dict) -> str:
    """The metrics that a progress bar has space for: "loss 0.123, accuracy 0.750"; 0.000 also for -0.0001.

    The loss of the policy gradient is left out: its value does not show progress. The proxy reward is the output of the
    reward model. In the table of the results, the proxy reward of an SFT answer is subtracted from it.
    """
    shown = {short: metrics[name] for name, short in SHOWN_METRICS.items() if name in metrics}
    if "reward" in metrics:
        shown.pop("loss", None)
    return ", ".join(f"{name} {round(value, 3) + 0.0:.3f}" for name, value in shown.items())
