"""scripts/dev/gpu_check.sh without a GPU: its syntax, the files that it names, its parts and its exit status."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minilm.kernels.emulator import programs

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "dev" / "gpu_check.sh"
TEXT = SCRIPT.read_text("utf-8")


def run(folder, parts):
    return subprocess.run(["bash", SCRIPT], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OUT": str(folder), "PARTS": parts, "PYTHON": sys.executable})


def test_its_syntax_is_right_and_the_programs_in_it_compile():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    programs = re.findall(r"<<'PROGRAM'\n(.*?)^PROGRAM$", TEXT, re.DOTALL | re.MULTILINE)
    assert len(programs) == 2
    for program in programs:
        compile(program, "program", "exec")


def test_every_file_in_it_exists():
    names = re.findall(r"\bscripts/\w+(?:/\w+)*\.py\b", TEXT)
    names += [f"scripts/bench/{name}.py" for name in re.findall(r"^    timed (\w+)", TEXT, re.MULTILINE)]
    names += [f"tests/test_{name}.py" for name in re.search(r"for name in (.*); do", TEXT)[1].split()]
    assert len(names) >= 11 and not [name for name in names if not (ROOT / name).exists()]


def test_every_test_file_with_tests_for_a_gpu_is_run():
    """Tests that take the fixture xp, or the whole of test_device.py, run on a GPU with -m gpu."""
    listed = set(re.search(r"for name in (.*); do", TEXT)[1].split())
    for path in (ROOT / "tests").glob("test_*.py"):
        text = path.read_text("utf-8")
        if re.search(r"^def test_.*\(.*\bxp\b|mark\.gpu", text, re.MULTILINE) and path.name != Path(__file__).name:
            assert path.stem.removeprefix("test_") in listed, path.name


def test_every_test_file_that_is_run_has_tests_for_a_gpu():
    """pytest -m gpu ends with status 5 if it finds none."""
    for name in re.search(r"for name in (.*); do", TEXT)[1].split():
        text = (ROOT / "tests" / f"test_{name}.py").read_text("utf-8")
        assert re.search(r"^def .*\(.*\bxp\b|mark\.gpu", text, re.MULTILINE), name


def test_the_sanitizer_runs_the_examples_with_sizes_that_they_have():
    sizes = re.search(r"^SIZES = (\{.*?\]\})$", TEXT, re.DOTALL | re.MULTILINE)[1]
    found = ast.literal_eval(sizes)
    assert set(found) == set(programs.modules())
    for name, cases in found.items():
        assert all(f"--{size} " in programs.modules()[name] for case in cases for size in case), name


def test_no_parts_is_a_success_and_a_failed_part_sets_the_status(tmp_path):
    assert run(tmp_path, "").returncode == 0
    done = run(tmp_path, "env")
    assert done.returncode == ("FAILED" in (tmp_path / "summary.txt").read_text())
    assert "env: " in done.stdout and (tmp_path / "env.log").read_text().startswith("Python 3")


@pytest.mark.parametrize("settings, words", [({"PARTS": "nosuch"}, "no part nosuch"), ({"LIMIT": "x"}, "LIMIT=x"),
                                             ({"JOBS": "0"}, "JOBS=0"),
                                             ({"LIMIT": "-1"}, "LIMIT=-1"), ({"OUT": "/dev/null/logs"}, "OUT=")])
def test_a_wrong_setting_is_one_line_of_error(tmp_path, settings, words):
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "OUT": str(tmp_path), "PARTS": "", "PYTHON": sys.executable, **settings})
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
