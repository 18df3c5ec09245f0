"""Regenerates the tables and figures of the READMEs, each by the script that it comes from.

    python scripts/dev/readme.py                        lists the parts: file, script, time
    python scripts/dev/readme.py --what levels,golden   regenerates these; --what all: every part
    python scripts/dev/readme.py --check                names the stale ones among the parts that are cheap to compute

A generated part of a README stands between the lines `<!-- generated: COMMAND -->` and `<!-- end -->`. Parts that
train or measure something keep their results in runs/ and do not repeat finished runs. Figures are written beside
their scripts.
"""

import ast
import dataclasses
import functools
import graphlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
from support import installed  # noqa: E402

installed.check("numpy", "minilm", "minilm.kernels")
from minilm import checkpoint  # noqa: E402
from support.command_line import Parser, names  # noqa: E402
from support.run_folder import main_guard  # noqa: E402

ASKED = "What is rain good for?\n"
ROOT = Path(__file__).resolve().parents[2]
SPEED = [("training step", "torch"), ("training step", "compile"), ("SFT step", "trl-best"), ("DPO step", "trl-best"),
         ("RLOO step", "trl-best"), ("sampling", "torch")]


# The imports of minilm. tests/test_structure.py asserts this picture.

@functools.cache
def modules() -> dict[str, Path]:
    """The file of every module, by its dotted name without "minilm."; "" is the package itself."""
    found = {}
    for package, folder in (((), ROOT / "minilm"), (("kernels",), ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = package + path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imported(path: Path) -> set[str]:
    """The modules of minilm that a file imports, anywhere in it; b of `from minilm.a import b` may be one or not."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    known, found = modules(), set()
    for name in names:
        if name.partition(".")[0] == "minilm":
            name = name.removeprefix("minilm").removeprefix(".")
            while name not in known:
                name = name.rpartition(".")[0]
            found.add(name)
    return found


def node(name: str) -> str:
    """A module as the picture names it: each file of minilm/ and of fast/ by itself, other folders as one."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "fast" else parts[0]


def import_graph() -> dict[str, set[str]]:
    """{node: the other nodes that it imports}."""
    graph = {}
    for name, path in modules().items():
        if name not in ("", "fast"):
            graph.setdefault(node(name), set()).update(node(other) for other in imported(path))
    return {name: others - {name, "", "fast"} for name, others in sorted(graph.items())}


def levels(graph: dict[str, set[str]]) -> list[list[str]]:
    """The nodes in lines: each imports only from the lines before its own. Raises graphlib.CycleError."""
    sorter, found = graphlib.TopologicalSorter(graph), []
    sorter.prepare()
    while sorter.is_active():
        found.append(sorted(sorter.get_ready()))
        sorter.done(*found[-1])
    return found


def levels_diagram() -> str:
    return "\n".join(f"    {'  '.join(line)}" for line in levels(import_graph()))


def imports_table() -> str:
    graph = import_graph()
    lines = ["| | imports |", "|---|---|"]
    for level in levels(graph):
        lines += [f"| {name} | {', '.join(sorted(graph[name])) or '-'} |" for name in level]
    return "\n".join(lines)


# Tables made from files of the repository.

def golden_cases() -> str:
    cases = json.loads((ROOT / "tests" / "golden" / "index.json").read_text("utf-8"))["cases"]
    of_function = {}
    for name, case in cases.items():
        of_function.setdefault(case["function"], []).append((name, case))
    lines = ["| function | formula | cases |", "|---|---|---|"]
    for function, named in of_function.items():
        formula = named[0][1].get("formula", "").replace("|", "\\|").replace("*", "\\*")
        lines.append(f"| {function} | {formula} | {', '.join(name for name, _ in named)} |")
    return "\n".join(lines)


def counts() -> str:
    """How many checks there are."""
    tables = sorted((ROOT / "scripts" / "dev" / "mutants").rglob("*.txt"))
    bugs = Counter()
    for path in tables:
        lines = path.read_text("utf-8").splitlines()
        bugs[path] = sum(line[:2] == "  " and line[2:3] not in ("", " ") for line in lines)
    cases = json.loads((ROOT / "tests" / "golden" / "index.json").read_text("utf-8"))["cases"]
    files = sorted((ROOT / "tests").glob("test_*.py"))
    functions = sum(node.name.startswith("test_") for path in files
                    for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef))
    return (f"{functions:,} test functions in {len(files)} files; {len(cases)} golden cases; "
            f"{bugs.total()} planted bugs in {len(tables)} tables.")


def speed_rows() -> str:
    """Of the first table of scripts/bench/README.md, for each work and library in SPEED the size with the highest ratio
    of time."""
    page = (ROOT / "scripts" / "bench" / "README.md").read_text("utf-8").partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:2] == "| "]
    lines = ["| work | size | against | time, ours/theirs [quartiles] | memory, ours/theirs |", "|---|---|---|---|---|"]
    for work, peer in SPEED:
        sizes = [row for row in rows if [row[0], *row[2:3]] == [work, peer]]
        row = max(sizes, key=lambda row: float(row[3].split()[0]))
        lines.append(f"| {' | '.join(row[:4])} | {row[6] or '-'} |")
    return "\n".join(lines)


def conversation() -> str:
    """A conversation with a real model, as chat.py prints it."""
    chat = [sys.executable, "scripts/chat.py", "models/smollm2-135m-instruct.gguf", "--seed", "0", "--max-tokens", "40"]
    done = subprocess.run(chat, cwd=ROOT, check=True, text=True, input=ASKED, stdout=subprocess.PIPE)
    return "".join(f"    {line}".rstrip() + "\n" for line in done.stdout.rstrip().splitlines()).rstrip()


# The parts.

@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a README: its file, the time that it takes, and a function or commands that give its text.

    The last of the commands prints a Markdown table; commands of a part without a file write their own files.
    whole: the part is all that the last command prints, not the first table alone.
    figure: the path of a figure that the commands write, and where a README shows it.
    """

    file: str
    time: str
    make: Callable[[], str] | None = None
    commands: tuple[str, ...] = ()
    cheap: bool = False
    whole: bool = False
    figure: tuple[str, str] | None = None

    def text(self) -> str:
        if self.make:
            return self.make()
        for command in self.commands:
            print(f"$ python {command}", flush=True)
            last = command == self.commands[-1] and bool(self.file)
            done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True, text=True,
                                  stdout=subprocess.PIPE if last else None)
        if not self.file:
            return ""
        return done.stdout.strip() if self.whole else first_table(done.stdout)


def first_table(printed: str) -> str:
    """The first Markdown table in what a script prints."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i, line in enumerate(lines) if i > start and not line.startswith("|")), len(lines))
    return "\n".join(lines[start:end])


ALIGN_STAGES = "scripts/bench/align.py --works sft,sft-adapters,rloo,rloo-adapters --threads 2 --rounds 3"
ASSISTANT = tuple(f"scripts/assistant.py --seed {seed} --out runs/{name} --resume"
                  for seed, name in ((3, "a"), (4, "b"), (5, "c")))
PARTS = {
    "levels": Part("tests/README.md", "1 s", levels_diagram, cheap=True),
    "speed": Part("README.md", "1 s; from scripts/bench/README.md", speed_rows, cheap=True),
    "imports": Part("tests/README.md", "1 s", imports_table, cheap=True),
    "counts": Part("tests/README.md", "1 s", counts, cheap=True),
    "golden": Part("tests/golden/README.md", "1 s", golden_cases, cheap=True),
    "bytes": Part("kernels/README.md", "5 s", commands=("scripts/bench/attention.py",), cheap=True),
    "bounds": Part("kernels/README.md", "1 s; measured figures from scripts/bench/measured/",
                   commands=("scripts/dev/kernel_bounds.py",), cheap=True),
    "assistant": Part("README.md", "12 min", commands=(*ASSISTANT, "scripts/support/figures.py runs/a runs/b runs/c"),
                      figure=("runs/a/reward_against_kl.png", "scripts/support/reward_against_kl.png")),
    "bench": Part("scripts/bench/README.md", "40 min, on an idle machine",
                  commands=("scripts/bench/table.py runs/bench", "scripts/bench/table.py runs/bench --print")),
    "tricks": Part("scripts/bench/README.md", "minutes, on an idle machine", commands=("scripts/bench/tricks.py",)),
    "processes": Part("scripts/bench/processes.md", "13 min, on an idle machine, as root", whole=True,
                      commands=("scripts/bench/processes.py",)),
    "predictions": Part("scripts/bench/processes.md", "2 s", commands=("scripts/bench/processes.py --predict",),
                        cheap=True, whole=True),
    "bandwidth": Part("scripts/bench/README.md", "10 min, on an idle machine",
                      commands=("scripts/bench/bandwidth.py",)),
    "align": Part("scripts/bench/README.md", "40 min, on an idle machine",
                  commands=("scripts/bench/align.py --works dpo,dpo-adapters,sampling --threads 2 --rounds 3",)),
    "align_stages": Part("scripts/bench/README.md", "25 min, on an idle machine", commands=(ALIGN_STAGES,)),
    "preferences": Part("scripts/two_preferences.md", "an hour, after scripts/get_smollm2.py", whole=True,
                        commands=("scripts/two_preferences.py --out runs/two-preferences --resume",
                                  "scripts/two_preferences.py --out runs/two-preferences --print"),
                        figure=("runs/two-preferences/two_preferences.png", "scripts/two_preferences.png")),
    "conversation": Part("README.md", "5 s, after scripts/get_smollm2.py", conversation),
    "lecture": Part("", "about an hour on two cores", commands=("scripts/lecture/all.py --out runs/claims --resume",
                                                  "scripts/lecture/all.py --readme runs/claims")),
    "vectors": Part("", "2 s", commands=("scripts/dev/golden.py",)),
}
COMMANDS = {"bytes": "scripts/bench/attention.py", "bounds": "scripts/dev/kernel_bounds.py",
            "assistant": "scripts/support/figures.py runs/a runs/b runs/c",
            "bench": "scripts/bench/table.py runs/bench --print", "tricks": "scripts/bench/tricks.py",
            "bandwidth": "scripts/bench/bandwidth.py",
            "align": "scripts/bench/align.py --works dpo,dpo-adapters,sampling --threads 2 --rounds 3",
            "align_stages": ALIGN_STAGES,
            "preferences": "scripts/two_preferences.py --out runs/two-preferences --print",
            "processes": "scripts/bench/processes.py", "predictions": "scripts/bench/processes.py --predict"}


def marker(name: str) -> str:
    command = COMMANDS.get(name, f"scripts/dev/readme.py --what {name}")
    return f"<!-- generated: python {command} -->\n"


def replaced(page: str, name: str, text: str) -> str:
    """The page with this text in its generated part. Raises ValueError if the markers are not there exactly once."""
    before, found, rest = page.partition(marker(name))
    old, end, after = rest.partition("<!-- end -->")
    if not found or not end or marker(name) in after:
        raise ValueError(f"expected once: {marker(name).strip()}, and <!-- end --> after it")
    return f"{before}{found}{text}\n{end}{after}"


def stale(name: str) -> bool:
    """Whether a README has another text in that part than its script gives now."""
    path = ROOT / PARTS[name].file
    page = path.read_text("utf-8")
    return replaced(page, name, PARTS[name].text()) != page


def regenerate(name: str) -> None:
    part = PARTS[name]
    text = part.text()
    if part.file:
        path = ROOT / part.file
        checkpoint.write_text(path, replaced(path.read_text("utf-8"), name, text))
    if part.figure:
        source, target = part.figure
        shutil.copyfile(ROOT / source, ROOT / target)
    print(f"{name}: {part.file or 'written by its script'}")


def main() -> int:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--what", type=names("part", [*PARTS, "all"]),
                        help=f"with commas, of {', '.join(PARTS)}; or all")
    parser.add_argument("--check", action="store_true", help="name the stale parts; exit status 1 if there are any")
    asked = parser.parse_args()
    if asked.check:
        wrong = [name for name, part in PARTS.items() if part.cheap and stale(name)]
        print("\n".join(f"{PARTS[name].file}: stale; python scripts/dev/readme.py --what {name}" for name in wrong)
              or "no cheap part is stale")
        return int(bool(wrong))
    if not asked.what:
        for name, part in PARTS.items():
            scripts = "; ".join(part.commands) or "this script"
            print(f"{name:10} {part.file or 'files of their own':24} {part.time}\n{'':10} {scripts}")
        return 0
    for name in PARTS if "all" in asked.what else asked.what:
        regenerate(name)
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main, subprocess.CalledProcessError))
