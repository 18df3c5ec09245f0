"""The READMEs: links lead somewhere, code prints the output shown, claims name tests, generated parts are fresh."""

import ast
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import readme

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md",
         *(path for folder in ("kernels", "minilm", "scripts", "tests")
           for path in sorted((ROOT / folder).rglob("README.md")))]
FRESH = ["levels", "speed", "imports", "golden", "predictions"]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def name_of(path):
    return str(path.relative_to(ROOT))


def anchors(path):
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Links.

@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_an_empty_line_or_a_comment_ends_every_table(page):
    """Markdown takes any other line after a row as one more row."""
    lines = [*page.read_text("utf-8").splitlines(), ""]
    after = [line for row, line in zip(lines, lines[1:]) if row.startswith("|") and not line.startswith("|")]
    assert {line[:4] for line in after} <= {"", "<!--"}


def test_the_front_page_links_to_the_others():
    front = (ROOT / "README.md").read_text("utf-8")
    for page in PAGES:
        folder = name_of(page).removesuffix("README.md").rstrip("/")
        assert f"({folder}" in front or page.parent == ROOT or "mutants" in folder, page


def test_the_front_page_counts_the_outcomes_as_the_page_of_the_lecture_does():
    front = " ".join((ROOT / "README.md").read_text("utf-8").split())
    lecture = (ROOT / "scripts" / "lecture" / "README.md").read_text("utf-8")
    outcomes, = re.findall(r"claims tested: (\d.*)\.$", lecture, re.MULTILINE)
    seeds, = re.findall(r", (\d+ to \d+ seeds) per experiment", lecture)
    assert f"claims: {outcomes}, over {seeds} (shown: " in front


def test_the_front_page_has_at_most_200_lines_and_starts_with_a_figure():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 200
    assert any(line.startswith("![") for line in lines[:10])


# Code. Every ```python block runs in the root of a checkout, and prints the ```text block after it, or its "# prints".

BLOCKS = [pytest.param(code, output, id=f"{name_of(page)}-{number}",
                       marks=[pytest.mark.parity] if "import torch" in code else [])
          for page in PAGES for number, (code, output) in enumerate(BLOCK.findall(page.read_text("utf-8")))]


@pytest.mark.parametrize("code, output", BLOCKS)
def test_code_prints_the_output_shown_after_it(code, output, monkeypatch):
    if "import torch" in code:
        pytest.importorskip("torch")
    if "emulator" in code:
        from minilm.kernels import emulator
        if reason := emulator.available():
            pytest.skip(reason)
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    expected = output or "".join(f"{line}\n" for line in re.findall(r"prints (.+)$", code, re.MULTILINE))
    assert printed.getvalue() == expected


# ```console blocks: a command after $, then its output.

COMMANDS = [pytest.param(command, output, id=command) for page in PAGES for command, output in
            re.findall(r"^```console\n\$ python (.*?)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)]


@pytest.mark.parametrize("command, output", COMMANDS)
def test_a_command_prints_the_output_shown_after_it(command, output):
    from minilm.kernels import emulator
    if "emulator" in command and (reason := emulator.available()):
        pytest.skip(reason)
    ran = subprocess.run([sys.executable, *command.split()], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, timeout=300)
    assert ran.stdout == output


def test_the_quickstart_has_at_most_a_dozen_lines_and_is_first():
    code, output = BLOCK.findall((ROOT / "README.md").read_text("utf-8"))[0]
    assert {"dpo_loss", "backward", "gradcheck"} <= set(re.findall(r"\w+", code))
    assert len(code.splitlines()) <= 12
    assert output


# Claims.

def claims():
    """The items of tests/README.md: the claim and its tolerance in the first line, then its tests."""
    page = (ROOT / "tests" / "README.md").read_text("utf-8")
    return [tuple(item.partition("\n\n")[0].split("\n", 1)) for item in page.split("\n- ")[1:]]


def functions_of(name):
    tree = ast.parse((ROOT / "tests" / name).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_the_page_has_claims():
    assert len(claims()) > 30


@pytest.mark.parametrize("claim, shown_by", claims(), ids=lambda text: text[:50])
def test_a_claim_says_how_closely_it_holds_and_names_tests_that_exist(claim, shown_by):
    assert re.search(r": \*.+\*\.$", claim), "no tolerance"
    files = shown_by.split("[")[1:]
    assert files, "no test file is named"
    for file in files:
        name = file.split("]")[0]
        missing = set(re.findall(r"`(test_\w+)`", file)) - functions_of(name)
        assert not missing, f"{name} has no {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_test_that_a_page_names_exists(page):
    known = {name for path in (ROOT / "tests").glob("test_*.py") for name in functions_of(path.name) | {path.stem}}
    assert set(re.findall(r"`(test_\w+)`", page.read_text("utf-8"))) <= known


# Generated parts: scripts/dev/readme.py.

@pytest.mark.parametrize("name", FRESH)
def test_a_generated_part_is_what_its_script_gives_now(name):
    assert not readme.stale(name), f"python scripts/dev/readme.py --what {name}"


@pytest.mark.parametrize("name", [name for name, part in readme.PARTS.items() if part.file])
def test_every_part_has_its_place(name):
    page = (ROOT / readme.PARTS[name].file).read_text("utf-8")
    assert "new text\n<!-- end -->" in readme.replaced(page, name, "new text")


def test_a_part_without_its_markers_is_an_error():
    with pytest.raises(ValueError, match="expected once: <!-- generated: python scripts/dev/readme.py"):
        readme.replaced("no markers", "levels", "text")


def test_levels_put_a_module_after_all_that_it_imports():
    assert readme.levels({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}) == [["c", "d"], ["b"], ["a"]]


def test_imports_are_found_wherever_they_stand(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text("import numpy\nfrom minilm import Tensor, ops\n"
                    "def f():\n    from minilm.objectives.dpo import dpo_loss\n    import minilm.layers\n")
    assert readme.imported(path) == {"", "ops", "objectives.dpo", "layers"}


def test_the_first_table_is_taken_from_what_a_script_prints():
    assert readme.first_table("words\n\n| a |\n|---|\n| 1 |\n\n| b |\n") == "| a |\n|---|\n| 1 |"


def test_without_an_installation_the_check_is_one_line_that_says_how_to_install(tmp_path):
    """Python with -S sees no installed package."""
    for folder in ("minilm", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder,
                        ignore=shutil.ignore_patterns("__pycache__", "lecture", "kernels"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "numpy.py").write_text("")
    for path, missing in ("", "numpy and no minilm and no minilm.kernels"), ("site", "minilm and no minilm.kernels"):
        done = subprocess.run([sys.executable, "-S", "scripts/dev/readme.py", "--check"], cwd=tmp_path, text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": path})
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(f"error: .* has no {missing}\\. .* pip install .*\n", done.stderr), done.stderr
