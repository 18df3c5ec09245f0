"""A mistake that a checker found in a kernel, and how it is shown to a person."""

import re
import textwrap
from collections.abc import Iterator

PLACE = re.compile(r"(\S+):(\d+)")
LINE_DIRECTIVE = re.compile(r'#line (\d+) "([^"]+)"')


class Fault(RuntimeError):
    """A mistake of a kernel. str(fault) is one line: place, kernel, block, thread, what the thread did.

    where and other: the place of the access and of the earlier access it conflicts with, "attention.cu:45 (called at
    attention.cu:118)", or None. block and thread: three integers each, or None. code: the text of the module.
    """

    def __init__(self, what, kernel, where=None, block=None, thread=None, other=None, code=""):
        self.what = what
        self.kernel = kernel
        self.code = code
        self.where = where
        self.other = other
        self.block = block
        self.thread = thread
        place = f"{where}: " if where else ""
        who = f", block {block}, thread {thread}" if thread else ""
        super().__init__(f"{place}kernel {kernel}{who}: {what}")


def explained(fault: Fault) -> str:
    """Several lines: the place, the source lines with an arrow at each access, then who did what."""
    kind, colon, sentence = fault.what.partition(": ")
    if not colon:
        kind = "fault"
        sentence = fault.what
    lines = [f"{fault.where}: {kind}" if fault.where else f"{kind} in kernel {fault.kernel}", ""]
    for places in filter(None, dict.fromkeys([fault.where, fault.other])):
        for i, (file, number) in enumerate(PLACE.findall(places)):
            text = source_line(fault.code, file, int(number))
            lines.append(f"  {'  ' if i else '->'} {file + ':' + number:18} {text}".rstrip())
    who = f", block {fault.block}, thread {fault.thread}" if fault.thread else ""
    lines += ["" if lines[-1] else None, f"kernel {fault.kernel}{who}", *textwrap.wrap(sentence, 100)]
    return "\n".join(line for line in lines if line is not None)


def lines_of(code: str) -> Iterator[tuple[str, int, str]]:
    """(file, number, line without its margin) of every line of a text in which #line directives name the files."""
    file = "kernel.cu"
    number = 1
    for line in code.splitlines():
        if directive := LINE_DIRECTIVE.fullmatch(line.strip()):
            number = int(directive[1])
            file = directive[2]
            continue
        yield file, number, line.strip()
        number += 1


def source_line(code: str, file: str, number: int) -> str:
    """That line of a file; "" if the text does not have it."""
    return next((line for name, at, line in lines_of(code) if (name, at) == (file, number)), "")
