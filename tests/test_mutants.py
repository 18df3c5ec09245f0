"""scripts/dev/mutants.py: its tables fit the source, and it tells killed mutants from surviving ones."""
import ast
import builtins
import csv
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

for module in ("fcntl", "safetensors"):
    pytest.importorskip(module, reason="needed by the scripts: pip install -e '.[run]'")

import mutants
import mutants_table
from helpers import has_ended
from minilm.kernels import emulator, launch
from minilm.kernels.emulator import build
from support.run_folder import UsageError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "dev" / "mutants.py"
MUTANTS = mutants_table.read_tables(mutants.TABLES)
PYTHON = sorted({m.file for m in MUTANTS if m.file.endswith(".py")})
C = sorted({m.file for m in MUTANTS} - set(PYTHON))


# The table.

@pytest.mark.parametrize("file", PYTHON)
def test_every_mutant_is_other_code_that_compiles(file):
    right = (ROOT / file).read_text("utf-8")
    tree = ast.dump(ast.parse(right))
    for mutant in (m for m in MUTANTS if m.file == file):
        wrong = mutants_table.mutated(right, mutant)
        assert ast.dump(ast.parse(wrong)) != tree, mutant
        compile(wrong, str(mutant), "exec")


@pytest.mark.skipif(emulator.available() is not None, reason=f"{emulator.available()}")
@pytest.mark.parametrize("file", C)
def test_every_mutant_of_the_emulator_compiles_too(file, tmp_path):
    """Otherwise any test would kill it. A header is compiled with the product that includes it."""
    path = ROOT / file
    is_runtime = path.suffix == ".cpp"
    flags = build.RUNTIME_FLAGS if is_runtime else (*build.FLAGS, "-include", build.HERE / "device.h")
    for mutant in (m for m in MUTANTS if m.file == file):
        wrong = mutants_table.mutated(path.read_text("utf-8"), mutant)
        code = wrong if path.suffix == ".cu" else (build.HERE / "examples" / "product.cu").read_text("utf-8")
        (tmp_path / path.name).write_text(wrong, "utf-8")
        source = tmp_path / "source.cc"
        source.write_text(wrong if is_runtime else build.rewritten(launch.with_headers("product.cu", code), "fast"))
        build._gxx(*flags, "-iquote", tmp_path, "-iquote", build.HERE, "-fsyntax-only", source)


def unbound_names(source):
    """The names that a module reads and nowhere defines: reading one raises NameError."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(dir(builtins)) | {"__file__"}
    bound |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return {node.id for node in names} - bound


def test_unbound_names_are_found():
    assert unbound_names("import a.b, c as d\ndef f(x, *y):\n    z = [w for w in x]\n    return a, d, y, z, f, "
                         "len, c, v") == {"c", "v"}


@pytest.mark.parametrize("file", PYTHON)
def test_no_mutant_dies_of_a_name_that_does_not_exist(file):
    """Such a mutant would be killed by any test, whatever the tests check."""
    right = (ROOT / file).read_text("utf-8")
    for mutant in (m for m in MUTANTS if m.file == file):
        assert not unbound_names(mutants_table.mutated(right, mutant)) - unbound_names(right), mutant


def test_every_file_with_mathematics_has_bugs_each_with_its_own_words():
    assert len({(m.file, m.words) for m in MUTANTS}) == len(MUTANTS) >= 60
    folders = [f"objectives/{path.name}" for path in (ROOT / "minilm" / "objectives").glob("[!_]*.py")]
    files = {f"{name}.py" for name in ("ops", "layers", "model", "tensor", "data", "optim", "generate")}
    assert files | set(folders) <= {m.file.removeprefix("minilm/") for m in MUTANTS}


def test_few_mutants_are_declared_to_survive():
    assert sum(bool(m.survives) for m in MUTANTS) <= len(MUTANTS) // 50


def table(text):
    return mutants_table.read_table(textwrap.dedent(text), "table")


def test_a_table_is_read_into_mutants():
    assert table("""\
        # a remark

        minilm/a.py
          words: of a bug
            - x = 1
            -     y - 2
            + x = 2

          another
            hangs: it waits
            - while x:
        minilm/b.py
          words: of a bug
            survives: nobody asks
            - z
            + w
        """) == [mutants_table.Mutant("minilm/a.py", "words: of a bug", ("x = 1", "    y - 2"), ("x = 2",)),
                 mutants_table.Mutant("minilm/a.py", "another", ("while x:",), (), hangs="it waits"),
                 mutants_table.Mutant("minilm/b.py", "words: of a bug", ("z",), ("w",), survives="nobody asks")]


@pytest.mark.parametrize("text, message", [
    ("", "table: no bugs in it"),
    ("a.py\n", "table: no bugs in it"),
    ("  words\n    - x\n", "table, line 1: a bug before any file"),
    ("a.py\n    - x\n", "table, line 2: expected a file"),
    ("a.py\n words\n", "table, line 2: expected a file"),
    ("a.py\n  words\n    + x\n  others\n    - x\n", "table, line 4: the bug before it, 'words', has no line"),
    ("a.py\n  words\n    + x\n", "table: ends before the lines of its last bug"),
    ("a.py\n  words\n    - x\nb.py\n    + y\n", "table, line 5: expected a file"),
    ("a.py\n  words\n    - x\n  words\n    - y\n", "table, line 4: 'words' a second time"),
    ("a.py\n  words\n    x = 1\n", "table, line 3: expected '- ', .*, got 'x = 1'"),
    ("a.py\n  words\n    survives:\n    - x\n", "table, line 3: expected .*, got 'survives:'"),
])
def test_a_wrong_table_raises_with_its_line(text, message):
    with pytest.raises(UsageError, match=message):
        mutants_table.read_table(text, "table")


SOURCE = "def f(x):\n    if x:\n        return 1\n    return 12\n"


@pytest.mark.parametrize("old, new, expected", [
    (["return 1"], ["return 2"], "def f(x):\n    if x:\n        return 2\n    return 12\n"),
    (["if x:", "    return 1"], ["pass"], "def f(x):\n    pass\n    return 12\n"),
    (["return 12"], [], "def f(x):\n    if x:\n        return 1\n"),
    (["def f(x):"], ["def f(x):", "    x = 0"], "def f(x):\n    x = 0\n    if x:\n        return 1\n    return 12\n"),
])
def test_lines_are_replaced_with_the_margin_of_the_source(old, new, expected):
    assert mutants_table.mutated(SOURCE, mutants_table.Mutant("f.py", "words", old, new)) == expected


@pytest.mark.parametrize("source, times", [(SOURCE, 0), ("return\nreturn\n", 2), ("if x:\n    return\nreturn\n", 2)])
def test_right_lines_that_are_not_in_the_source_exactly_once_raise(source, times):
    with pytest.raises(UsageError, match=f"f.py: words: its right lines are in the file {times} times, not once"):
        mutants_table.mutated(source, mutants_table.Mutant("f.py", "words", ["return"], ["x"]))


# The runner, on a project of three lines.

@pytest.fixture
def project(tmp_path):
    """A folder with a package minilm, tests with its name and with another name, and a table."""
    files = {
        "minilm/__init__.py": "",
        "minilm/area.py": "def area(a, b):\n    return a * b\n\n\ndef name():\n    return 'area'\n\n\n"
                          "def unused():\n    return 0\n",
        "tests/test_area.py": "from minilm.area import area\n\n\ndef test_area():\n    assert area(2, 3) == 6\n",
        "tests/test_names.py": "from minilm.area import name\n\n\ndef test_name():\n    assert name() == 'area'\n",
        "tests/test_mutants.py": "def test_that_would_never_end():\n    assert False\n",
        "table.txt": """\
minilm/area.py
  a sum for a product
    - return a * b
    + return a + b
  another name
    - return 'area'
    + return 'volume'
  a zero that nobody uses
    - return 0
    + return 1
""",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def command(project, *options):
    return [sys.executable, str(SCRIPT), "--project", str(project), "--table", str(project / "table.txt"), *options]


def run(project, *options):
    variables = {"FORCE_COLOR": "1", "PYTEST_ADDOPTS": "-rN"}      # as some set for all their tests
    return subprocess.run(command(project, "--jobs", "2", *options), env={**os.environ, **variables}, text=True,
                          capture_output=True, timeout=120)


def change(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def test_killed_and_surviving_mutants_are_distinguished_and_the_project_is_unchanged(project):
    before = {path: path.read_bytes() for path in project.rglob("*.*") if path.is_file()}
    done = run(project, "--csv", str(project.parent / "results.csv"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "minilm/area.py: a sum for a product\n    killed by tests/test_area.py::test_area, in " in done.stdout
    assert "minilm/area.py: another name\n    killed by tests/test_names.py::test_name, in " in done.stdout
    assert done.stdout.endswith("  minilm/area.py: a zero that nobody uses\n    SURVIVED\n")
    assert "\n2 of 3 mutants were noticed" in done.stdout
    with (project.parent / "results.csv").open() as file:
        assert [row["outcome"] for row in csv.DictReader(file)] == ["failed", "failed", "passed"]
    assert {path: path.read_bytes() for path in project.rglob("*.*") if path.is_file()} == before


def test_a_mutant_that_is_declared_to_survive_must_survive(project):
    (project / "table.txt").write_text("minilm/area.py\n"
                                       "  right\n    survives: nobody uses it\n    - return 0\n    + return 1\n"
                                       "  wrong\n    survives: who knows\n    - return a * b\n    + return a + b\n")
    done = run(project)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "minilm/area.py: right\n    survived, in " in done.stdout and "\n1 of 2 mutants" in done.stdout
    assert done.stdout.endswith("minilm/area.py: wrong\n    DECLARED TO SURVIVE, but killed by "
                                "tests/test_area.py::test_area\n")


def test_a_mutant_that_hangs_is_an_error_unless_declared(project):
    (project / "table.txt").write_text("minilm/area.py\n"
                                       "  right\n    hangs: forever\n    - return a * b\n    + while True: pass\n"
                                       "  wrong\n    - return a * b\n    + while a: pass\n")
    done = run(project, "--timeout", "15")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "minilm/area.py: right\n    killed by hanging, in " in done.stdout
    assert done.stdout.endswith("minilm/area.py: wrong\n    HANGS: no end after 15 s\n")


def test_a_mutant_that_cannot_be_imported_is_an_error_and_not_a_kill(project):
    change(project / "table.txt", "return a * b", "def area(a, b):")
    change(project / "table.txt", "return a + b", "def volume(a, b):")
    done = run(project, "--only", "for a product")
    assert done.returncode == 1 and "ERROR: ERROR tests/test_area.py" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("file, name, right, wrong", [
    ("tests/test_area.py", "test_area", "==", "!="), ("tests/test_names.py", "test_name", "==", "!="),
    ("tests/test_names.py", "test_name", "== 'area'", "== 'length'")])      # fails with the bug and without it
def test_tests_that_fail_without_any_mutant_are_reported_with_status_2(project, file, name, right, wrong):
    change(project / file, right, wrong)
    done = run(project, "--only", "another name")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stdout + done.stderr
    assert f"the tests do not pass without any bug: {file} failed, {file}::{name}" in done.stderr


def test_all_tests_counts_every_test_that_fails(project):
    change(project / "tests/test_names.py", "def test_name", "from test_area import test_area\n\n\ndef test_name")
    done = run(project, "--all-tests", "--only", "for a product")
    assert done.returncode == 0 and "killed by tests/test_area.py::test_area and 1 more" in done.stdout, done.stdout


def test_the_test_that_failed_in_an_earlier_run_runs_first_and_alone(project):
    results = project / "results.csv"
    change(project / "tests/test_names.py", "def test_name", "def test_late():\n    assert name()[0] == 'a'\n\n\n"
                                                             "def test_name")
    results.write_text("file,mutant,outcome,test\n"
                       "minilm/area.py,another name,failed,tests/test_names.py::test_name\n"
                       "minilm/area.py,a sum for a product,failed,tests/test_area.py::test_of_another_name\n"
                       "minilm/area.py,a zero that nobody uses,failed,tests/test_names.py::test_late\n")
    (project / "tests/test_area.py").rename(project / "tests/test_more.py")
    done = run(project, "--earlier", str(results))
    assert "another name\n    killed by tests/test_names.py::test_name, in " in done.stdout, done.stdout + done.stderr
    assert "a sum for a product\n    killed by tests/test_more.py::test_area, in " in done.stdout
    assert done.returncode == 1 and done.stdout.endswith("  minilm/area.py: a zero that nobody uses\n    SURVIVED\n")


def test_unknown_words_raise_and_a_list_runs_nothing(project):
    done = run(project, "--only", "rotation")
    assert done.returncode == 2 and done.stderr == "error: no mutant has 'rotation' in its words\n"
    change(project / "tests/test_area.py", "==", "!=")
    done = run(project, "--list")
    assert done.returncode == 0 and done.stdout.splitlines()[0] == "minilm/area.py: a sum for a product"


def test_an_installed_minilm_instead_of_the_copy_raises(project):
    (project / "minilm/__init__.py").unlink()
    (project / "minilm/area.py").rename(project / "area.py")
    (project / "minilm").rmdir()
    change(project / "table.txt", "minilm/area.py", "area.py")
    done = run(project)
    assert done.returncode == 2 and "is not the one that is imported there" in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_and_no_copy_behind(project, number, tmp_path_factory):
    marker, scratch = project / "started", tmp_path_factory.mktemp("scratch")
    (project / "tests/test_area.py").write_text(
        "import os, time, pathlib\n\n\ndef test_area():\n"
        f"    pathlib.Path({str(marker)!r}).write_text(str(os.getpid()))\n    time.sleep(60)\n")
    process = subprocess.Popen(command(project, "--jobs", "1"), env={**os.environ, "TMPDIR": str(scratch)}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(300):
        if marker.exists() and marker.read_text():
            break
        time.sleep(0.1)
    child = int(marker.read_text())
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and error == "interrupted\n"
    assert not list(scratch.iterdir())
    for _ in range(50):
        if has_ended(child):
            return
        time.sleep(0.1)
    raise AssertionError("the tests still run")


# All mutants.

@pytest.mark.slow
def test_every_mutant_is_killed():
    done = subprocess.run([sys.executable, str(SCRIPT)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
