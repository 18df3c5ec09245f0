"""The puzzles of the emulator: right solutions pass, and what is wrong is said of others. Also its pytest plugin."""
import subprocess
import sys
from pathlib import Path

import pytest

from minilm.kernels import emulator
from minilm.kernels.emulator import __main__, puzzles

SOLUTIONS = puzzles.FOLDER / "solutions"


@pytest.fixture(autouse=True)
def there():
    if reason := emulator.available():
        pytest.skip(reason)


@pytest.mark.parametrize("name", puzzles.PUZZLES)
def test_a_right_solution_is_solved(name):
    assert puzzles.check(name, SOLUTIONS / f"{name}.cu").startswith(f"{name}: solved. ")


@pytest.mark.parametrize("name", puzzles.PUZZLES)
def test_a_solution_under_the_words_of_the_task_is_solved(name, tmp_path):
    body = (SOLUTIONS / f"{name}.cu").read_text()
    comments = "\n".join(line for line in puzzles.task(name).split("\n") if line.startswith("//"))
    path = tmp_path / "mine.cu"
    path.write_text(f"{comments}\n\n{body}")
    assert puzzles.check(name, path).startswith(f"{name}: solved. ")


WRONG = [       # a solution, what is changed in it, and what the checker says
    ("sums", "        __syncthreads();\n    }", "    }", emulator.Fault, "data race"),
    ("sums", "    __syncthreads();\n    for", "    for", emulator.Fault, "race|uninitialised"),
    ("sums", "j < columns", "j < 128", emulator.Fault, "out of bounds"),
    ("sums", "int half = 64", "int half = 32", puzzles.Unsolved, r"sums of x \(\d, \d+\): number 0 is"),
    ("sums", "y[blockIdx.x] = of", "if (columns > 128) y[blockIdx.x] = of", puzzles.Unsolved, "number 0 is nan"),
    ("sums", "float sum = 0;", "float sum = x[0] - x[0];", puzzles.Unsolved, "numbers of x are read; .* allows 128"),
    ("softmax", "expf(row[j] - m) / d", "expf(row[j]) / d", puzzles.Unsolved, "softmax of x .* must be"),
    ("softmax", "expf(row[j] - m) / d", "expf(row[j] - m)", puzzles.Unsolved, "softmax of x .* must be"),
    ("softmax", "d = d * expf(m - highest) + ", "d += ", puzzles.Unsolved, "softmax of x .* must be"),
    ("softmax", "    if (highest == __int_as_float(0xff800000)) return;\n", "", puzzles.Unsolved, "is nan"),
    ("softmax", "int n = 16", "int n = 8", puzzles.Unsolved, "must be"),
    ("softmax", "row[j], 1);", "fmaxf(row[j], row[j]), 1);", puzzles.Unsolved, "numbers of x are read"),
    ("attention", "        __syncthreads();\n        for (int j = 0; j < count; ++j) {\n            float",
     "        for (int j = 0; j < count; ++j) {\n            float", emulator.Fault, "race|uninitialised"),
    ("attention", "        __syncthreads();\n    }", "    }", emulator.Fault, "race"),
    ("attention", "min(32, keys - first)", "32", emulator.Fault, "out of bounds"),
    ("attention", "sum[e] * shrink + p", "sum[e] + p", puzzles.Unsolved, r"attention of q \(32, 32\), k \(32, 32\), v"),
    ("attention", "if (i < queries) o[", "o[", emulator.Fault, "out of bounds")]


@pytest.mark.parametrize("name, old, new, error, message", WRONG, ids=range(len(WRONG)))
def test_a_wrong_solution_is_told_what_is_wrong(name, old, new, error, message, tmp_path):
    text = (SOLUTIONS / f"{name}.cu").read_text()
    assert text.count(old) == 1
    path = tmp_path / "mine.cu"
    path.write_text(text.replace(old, new))
    with pytest.raises(error, match=message):
        puzzles.check(name, path)


def test_one_thread_that_adds_all_sums_is_a_solution_as_the_task_says(tmp_path):
    text = (SOLUTIONS / "sums.cu").read_text()
    loop, end = text.index("    for (int half"), text.index("    if (t == 0)")
    path = tmp_path / "mine.cu"
    one_thread = "    if (t == 0) for (int i = 1; i < 128; ++i) of_threads[0] += of_threads[i];\n"
    path.write_text(text[:loop] + one_thread + text[end:])
    assert "One thread" in puzzles.task("sums") and puzzles.check("sums", path).startswith("sums: solved. ")


def test_numbers_that_nothing_has_written_are_spoken_of_only_if_there_are_some(tmp_path):
    text = (SOLUTIONS / "sums.cu").read_text()
    for right, wrong, unwritten in (("int half = 64", "int half = 32", False), ("y[b", "if (columns > 128) y[b", True)):
        path = tmp_path / "mine.cu"
        path.write_text(text.replace(right, wrong))
        with pytest.raises(puzzles.Unsolved) as raised:
            puzzles.check("sums", path)
        assert ("nothing has written" in str(raised.value)) == unwritten, raised.value


def test_the_task_and_atomics_are_no_solution(tmp_path):
    path = tmp_path / "mine.cu"
    path.write_text(puzzles.task("sums"))
    with pytest.raises(puzzles.Unsolved, match="still has the line YOUR CODE HERE"):
        puzzles.check("sums", path)
    path.write_text("atomicAdd(y, x[0]);")
    with pytest.raises(puzzles.Unsolved, match="uses atomics"):
        puzzles.check("sums", path)
    with pytest.raises(LookupError, match="no puzzle sum; there are sums, softmax, attention"):
        puzzles.task("sum")


def test_the_command_writes_the_task_and_then_checks_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    __main__.main(["puzzle", "softmax", "mine.cu"])
    assert capsys.readouterr().out.startswith("mine.cu: the task is in it. ")
    assert (tmp_path / "mine.cu").read_text() == puzzles.task("softmax")
    with pytest.raises(SystemExit, match="^not solved. mine.cu still has the line YOUR CODE HERE"):
        __main__.main(["puzzle", "softmax", "mine.cu"])
    (tmp_path / "race.cu").write_text((SOLUTIONS / "sums.cu").read_text().replace("        __syncthreads();\n", ""))
    with pytest.raises(SystemExit, match="race[^?]*Is a barrier missing[?] "):
        __main__.main(["puzzle", "sums", "race.cu"])
    (tmp_path / "mine.cu").write_text((SOLUTIONS / "softmax.cu").read_text())
    __main__.main(["puzzle", "softmax", "mine.cu"])
    assert capsys.readouterr().out.startswith("softmax: solved. ")


@pytest.mark.parametrize("words", [[], ["sums"], ["sum", "mine.cu"], ["sums", "mine.txt"], ["sums", "a.cu", "b.cu"]])
def test_a_puzzle_command_of_another_form_is_a_mistake(words, capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["puzzle", *words])
    assert ended.value.code == 2
    assert "expected puzzle sums|softmax|attention FILE.cu" in capsys.readouterr().err


def test_the_word_run_may_stand_before_a_file(capsys):
    example = str(Path(emulator.__file__).parent / "examples" / "vecsum.cu")
    printed = []
    for words in ([], ["run"]):
        __main__.main([*words, example, "--kernel", "vecsum", "--x", "arange:300", "--out", "3", "--n", "300"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "no checker found a fault" in printed[0]


PLUGIN_TEST = '''
import numpy as np
import pytest
from minilm.kernels import emulator

CODE = open({file!r}).read()

def test_of_somebody_else(emulated_cupy):
    import cupy
    assert cupy is emulated_cupy
    x, out = cupy.asarray(np.arange(300, dtype=np.float32)), cupy.empty(3, np.float32)
    kernel = cupy.RawModule(code=CODE).get_function("vecsum")
    if {race}:
        with pytest.raises(emulator.Fault, match="data race"):
            kernel((3,), (128,), (x, out, np.int32(300)))
    else:
        kernel((3,), (128,), (x, out, np.int32(300)))
        assert out.get().tolist() == [8128, 24512, 12210]
'''


@pytest.mark.parametrize("race", [False, True])
def test_the_plugin_gives_the_fixture_to_other_projects(race, tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["minilm.kernels.emulator.pytest_plugin"]')
    file = Path(emulator.__file__).parent / "examples" / ("vecsum_race.cu" if race else "vecsum.cu")
    (tmp_path / "test_mine.py").write_text(PLUGIN_TEST.format(file=str(file), race=race))
    ended = subprocess.run([sys.executable, "-m", "pytest", "-q", "--rootdir", tmp_path, tmp_path], cwd=tmp_path,
                           capture_output=True, text=True)
    assert ended.returncode == 0 and "1 passed" in ended.stdout, ended.stdout
