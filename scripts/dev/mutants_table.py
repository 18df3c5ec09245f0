"""The tables of mutants.py: reading them, and putting a bug into the text of a file."""
import ast
import dataclasses
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
from support.command_line import read_text  # noqa: E402
from support.run_folder import UsageError  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Mutant:
    """file: from the project's root; old, new: the right and the wrong lines, without the margin of the source."""
    file: str
    words: str
    old: tuple
    new: tuple
    survives: str = ""
    hangs: str = ""

    def __str__(self):
        return f"{self.file}: {self.words}"


def read_table(text, name="the table"):
    """The mutants of a table, written as scripts/dev/mutants/README.md says. Raises UsageError with the line."""
    entries = []
    file = None

    def fail(message):
        raise UsageError(f"{name}, line {number}: {message}")

    for number, line in enumerate(text.splitlines(), start=1):      # noqa: B007, fail reads number
        content = line.strip()
        indent = len(line) - len(line.lstrip(" "))
        if not content or line.startswith("#"):
            continue
        if indent == 0:
            file = content
        elif indent == 2 and file is None:
            fail("a bug before any file")
        elif indent == 2 and entries and not entries[-1]["old"]:
            fail(f"the bug before it, {entries[-1]['words']!r}, has no line that is right (-)")
        elif indent == 2 and any((e["file"], e["words"]) == (file, content) for e in entries):
            fail(f"{content!r} a second time")
        elif indent == 2:
            entries.append({"file": file, "words": content, "old": (), "new": ()})
        elif indent < 4 or not entries or entries[-1]["file"] != file:
            fail("expected a file at the margin, a bug in words two spaces in, its lines four spaces in")
        elif line[4:6] in ("- ", "+ "):
            entries[-1]["old" if line[4] == "-" else "new"] += (line[6:].rstrip(),)
        elif content.startswith(("survives: ", "hangs: ")):
            kind, _, why = content.partition(": ")
            entries[-1][kind] = why
        else:
            fail(f"expected '- ', '+ ', 'survives: why' or 'hangs: why', got {content!r}")
    if not entries or not entries[-1]["old"]:
        raise UsageError(f"{name}: ends before the lines of its last bug" if entries else f"{name}: no bugs in it")
    return [Mutant(**entry) for entry in entries]


def read_tables(path):
    """The mutants of one table, or of every table in a folder."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    return [mutant for file in files for mutant in read_table(read_text(file, "Name a table with --table."), file.name)]


def find(source, mutant):
    """(index, margin) of the right lines in the source. Raises UsageError unless they are there exactly once."""
    lines = source.splitlines()
    places = []
    for i, line in enumerate(lines):
        margin = line[:len(line) - len(line.lstrip())]
        if lines[i:i + len(mutant.old)] == [margin + right for right in mutant.old]:
            places.append((i, margin))
    if len(places) != 1:
        raise UsageError(f"{mutant}: its right lines are in the file {len(places)} times, not once: {mutant.old[0]!r}")
    return places[0]


def mutated(source, mutant):
    """The source with the mutant's bug in it."""
    lines = source.splitlines()
    i, margin = find(source, mutant)
    lines[i:i + len(mutant.old)] = [margin + wrong for wrong in mutant.new]
    return "\n".join(lines) + "\n"


def place(source, mutant):
    """The names of the function (of Python) and the module with the bug: tests with one of these names run first."""
    line = find(source, mutant)[0] + 1
    tree = ast.parse(source if mutant.file.endswith(".py") else "")
    functions = [node.name for node in ast.walk(tree)                       # the outermost first
                 if isinstance(node, ast.FunctionDef) and node.lineno <= line <= node.end_lineno]
    return " ".join([*functions[:1], Path(mutant.file).stem])
