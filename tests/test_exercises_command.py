"""python -m minilm.exercises: the commands, and files that loop, end their process, or cannot be read."""
import ast
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from minilm.exercises import __main__, catalogue, cuda, process, tasks
from minilm.exercises.grading import NOT_BEGUN, grade
from minilm.exercises.task import HOLE, solution_text, student_file
from minilm.kernels import emulator

SOFTMAX = tasks.load("softmax")
SECONDS = 60            # of a file that ends by itself, on a machine that is busy


@pytest.fixture
def run(capsys):
    """run(words) is (exit status, output) of the command."""
    def run(*words):
        status = __main__.main([str(word) for word in words])
        return status, capsys.readouterr().out
    return run


def solved_file(name):
    task = tasks.load(name)
    return student_file(task).replace(HOLE, solution_text(task).partition('"""\n')[2])


def checked(tmp_path, text, seconds=SECONDS, task=SOFTMAX):
    path = tmp_path / "my.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return process.check(task, path, seconds)


# The commands.

def test_without_words_the_commands_are_shown(run):
    assert run() == (0, __main__.__doc__.strip() + "\n")


def test_the_list_has_every_task_in_order_and_ends_with_cuda(run):
    status, out = run("list")
    lines = out.splitlines()
    assert status == 0 and [line.split()[:2] for line in lines] == [[str(i), name] for i, name
                                                                    in enumerate(catalogue.NAMES, start=1)]
    assert len(lines) >= 25 and [line.split()[1] for line in lines[-3:]] == list(cuda.TITLES)
    assert {path.stem for path in Path(tasks.__file__).parent.glob("*.py")} - {"__init__"} == set(tasks.ORDER)


def test_a_task_is_started_once_and_never_overwritten_without_being_told(run, tmp_path):
    folder = tmp_path / "new" / "folder"
    assert run("start", "2", folder)[0] == 0
    path = folder / "02_softmax.py"
    assert path.read_text() == student_file(SOFTMAX, str(folder)) and f"check softmax {folder}" in path.read_text()
    path.write_text("mine")
    status, out = run("start", "softmax", folder)
    assert status == 1 and "stays as it is" in out and path.read_text() == "mine"
    assert run("start", "all", folder)[0] == 0 and path.read_text() == "mine"
    assert len(list(folder.iterdir())) == len(catalogue.NAMES)
    assert run("start", "softmax", folder, "--overwrite")[0] == 0 and path.read_text() != "mine"


def test_hints_and_solutions_are_shown_when_asked_for(run):
    first, second = SOFTMAX.hints
    out = " ".join(run("hint", "softmax")[1].split())
    assert out == f"{first} (The second hint, with the formula: hint softmax 2)"
    assert " ".join(run("hint", "softmax", "2")[1].split()) == second
    assert run("solution", "softmax") == (0, solution_text(SOFTMAX))
    assert run("solution", "cuda_sums")[1].startswith('extern "C" __global__ void __launch_bounds__(128)\nsums(')
    assert all(len(catalogue.find(name).hints) == 2 for name in catalogue.NAMES)


def test_a_folder_is_checked_with_one_line_for_each_task_and_the_next_one(run, tmp_path):
    run("start", "all", tmp_path)
    (tmp_path / "01_exp_vjp.py").write_text(solved_file("exp_vjp"))
    (tmp_path / "02_softmax.py").write_text("import numpy as np\ndef softmax(x):\n    return np.exp(x)\n")
    (tmp_path / "04_unbroadcast.py").unlink()
    for path in (*tmp_path.glob("[12]?_*"), *tmp_path.glob("0[5-9]_*")):
        path.unlink()
    status, out = run("check", tmp_path)
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert status == 1 and lines[0][2].startswith("solved: right in 3 cases")
    assert lines[1][2].startswith('wrong in the case "one row": number [0] of p is 1.0; expected 0.24')
    assert lines[2][2] == "not begun" and lines[3][2] == "-"
    assert out.endswith(f"1 of {len(catalogue.NAMES)} solved, 1 wrong. Next: softmax\n"
                        f"check TASK {tmp_path} says more about a wrong one, and which mistake it may be\n")
    (tmp_path / "02_softmax.py").unlink()
    status, out = run("check", tmp_path)
    assert status == 0 and out.endswith("0 wrong. Next: softmax\n")


def test_a_file_that_nobody_has_touched_is_not_run(run, tmp_path):
    run("start", "all", tmp_path)
    with mock.patch.object(subprocess, "run", side_effect=AssertionError("it is run")):
        status, out = run("check", tmp_path)
    assert status == 0 and out.count("not begun\n") == len(catalogue.NAMES)
    path = tmp_path / "02_softmax.py"
    path.write_text(path.read_text().replace("    # YOUR", "    return x\n    # YOUR"))
    assert "number [0] of p is 0.0" in run("check", "softmax", tmp_path)[1]


def test_one_file_is_checked_by_name_or_number_and_under_another_number(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no 02_softmax.py: start softmax .* writes it"):
        run("check", "softmax", tmp_path)
    (tmp_path / "77_softmax.py").write_text(solved_file("softmax"))
    status, out = run("check", "2", tmp_path)
    assert status == 0 and out == ("2 softmax: solved: right in 6 cases\n  In minilm: minilm/ops.py, softmax\n")
    (tmp_path / "02_softmax.py").write_text(student_file(SOFTMAX))
    with pytest.raises(FileNotFoundError, match=r"has 02_softmax.py and 77_softmax.py; keep one of them"):
        run("check", "softmax", tmp_path)
    (tmp_path / "77_softmax.py").unlink()
    status, out = run("check", "softmax", tmp_path)
    assert status == 1 and out == "2 softmax: not begun: the function still has its hole\n"


def test_the_commands_in_a_file_work_from_every_folder_and_with_spaces_in_its_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("start", "all", "my dir")
    for name in ("softmax", "cuda_sums"):
        text = (tmp_path / "my dir" / catalogue.find(name).file).read_text()
        command, = re.findall("python -m minilm.exercises (check .*)", text)
        assert shlex.split(command) == ["check", name, str(tmp_path / "my dir")]
        assert f"python -m minilm.exercises hint {name}\n" in text and f"exercises solution {name}\n" in text
    monkeypatch.chdir("/")
    assert run(*shlex.split(command))[1] == f"{catalogue.find(name).number} {name}: {NOT_BEGUN.text}\n"
    ast.parse(student_file(SOFTMAX, r"C:\new\x"))            # a backslash is no escape in the docstring


def test_a_hole_that_is_still_reached_below_the_code_is_told_by_its_line(run, tmp_path):
    run("start", "softmax", tmp_path)
    path = tmp_path / "02_softmax.py"
    path.write_text(path.read_text().replace("    # YOUR CODE HERE\n", "    p = x / x.sum()\n"))
    number = path.read_text().splitlines().index("    raise NotImplementedError") + 1
    words = f"not begun: it raises NotImplementedError in line {number}: this line of the hole is still reached"
    assert words in " ".join(run("check", "softmax", tmp_path)[1].split())
    assert words in run("check", tmp_path)[1]


def test_the_lines_of_to_try_it_compute_the_wrong_number(run, tmp_path):
    folder = tmp_path / "my dir"
    folder.mkdir()
    (folder / "02_softmax.py").write_text("import numpy as np\ndef softmax(x):\n    return np.exp(x) + 0.25\n")
    out = run("check", "softmax", folder)[1]
    command, *lines = [line.strip() for line in out.partition("To try it:\n")[2].splitlines()]
    assert command == f"python -i '{folder}/02_softmax.py'"
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], input="\n".join([*lines, ""]), text=True,
                          capture_output=True)
    assert re.search(r"number \[0\] of p is (1\.25);", out) and "array([1.25" in done.stdout, done


def test_a_file_is_checked_by_its_path(run, tmp_path):
    path = tmp_path / "02_softmax.py"
    path.write_text(solved_file("softmax"))
    expected = run("check", "softmax", tmp_path)
    assert expected[0] == 0
    for words in ((path,), ("softmax", path), ("2", path)):
        assert run("check", *words) == expected


@pytest.mark.parametrize("words, message", [
    (("check", "softmax"), "^softmax is a task: in which folder[?] check softmax DIR$"),
    (("check", "2"), "^2 is a task: in which folder[?] check softmax DIR$"),
    (("check", "nosuch"), "^there is no folder or file nosuch; expected check TASK DIR, or check DIR, or check FILE$"),
    (("check", "softmax", "nosuch"), "^there is no folder or file nosuch; "),
    (("check", "nosuch/02_softmax.py"), "^there is no folder or file nosuch/02_softmax.py; "),
    (("check", "a", "b", "c"), "^check a b c: expected check TASK DIR, or check DIR$"),
    (("start", "softmax", "there.py"), "^there.py is a file; start needs a folder: start softmax DIR$"),
    (("start", "2", "new/02_softmax.py"), "^new/02_softmax.py is a file; start needs a folder: start 2 DIR$"),
    (("start", "softmax"), "^the following arguments are required: DIR; "),
    (("hint",), "^the following arguments are required: TASK; "),
    (("check", "there.py"), "^no task 'there.py'; `list` shows")])
def test_words_of_another_form_are_told_what_is_missing(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").write_text("")
    with pytest.raises((ValueError, OSError, LookupError)) as raised:
        run(*words)
    assert re.search(message, str(raised.value.args[0])), raised.value


@pytest.mark.parametrize("words, name", [
    ("softmax", "softmax"), ("Softmax", "softmax"), ("DPO_loss", "dpo_loss"), ("02_softmax", "softmax"),
    ("77_softmax.py", "softmax"), ("my dir/02_softmax.py", "softmax"), ("29_cuda_sums.cu", "cuda_sums"),
    ("1", "exp_vjp")])
def test_a_task_is_found_by_its_name_in_either_case_and_by_the_name_of_its_file(words, name):
    assert catalogue.find(words).name == name


@pytest.mark.parametrize("words, meant", [
    ("sofmax", " Did you mean softmax or softmax_vjp or cuda_softmax?"),
    ("dpo", " Did you mean dpo_loss or dpo_gradient?"), ("swiglu", " Did you mean swiglu_backward?"),
    ("0", ""), ("", ""), ("all", ""), ("32", "")])
def test_a_name_that_is_near_a_task_is_answered_with_this_task(words, meant):
    with pytest.raises(LookupError) as raised:
        catalogue.find(words)
    assert raised.value.args[0] == f"no task {words!r}; `list` shows the 31 tasks by number and name.{meant}"


def test_a_question_is_shown_and_then_its_numbers(run):
    assert "predict N" in run("predict")[1]
    assert run("predict", "8")[1].endswith("Predict, then run: predict 8 --answer\n")
    assert "0.693147" in run("predict", "8", "--answer")[1]


# Files of students.

def test_a_loop_without_an_end_is_stopped_and_its_case_is_named(tmp_path):
    started = time.perf_counter()
    verdict = checked(tmp_path, "def softmax(x):\n    while True: pass\n", seconds=10)
    assert not verdict.solved and "it has not ended after 10 seconds" in verdict.text and "--seconds" in verdict.text
    assert verdict.text.startswith(('wrong in the case "one row": ', "wrong it has not"))
    assert time.perf_counter() - started < 40


def test_a_mistake_is_recognised_in_a_file_and_in_its_own_process(tmp_path):
    right = solved_file("softmax")
    mistake = SOFTMAX.mistakes[0]
    assert f"\nHint: {mistake.hint}\n" in checked(tmp_path, right.replace(mistake.right, mistake.wrong)).text


def test_a_loop_after_the_first_wrong_number_still_gives_the_verdict(tmp_path):
    text = "def softmax(x):\n    while x.ndim == 3: pass\n    return x\n"
    assert "number [0] of p is 0.0; expected 0.24" in checked(tmp_path, text, seconds=10).text


@pytest.mark.parametrize("text, words", [
    ("def softmax(x):\n    return x +\n", "Python cannot read the file: line 2: invalid syntax: return x +"),
    ("x = 1 / 0\n", "the file cannot be loaded: ZeroDivisionError in line 1: division by zero"),
    ("raise SystemExit\n", "the file cannot be loaded: SystemExit"),
    ("\nraise KeyboardInterrupt\n", "the file cannot be loaded: KeyboardInterrupt in line 2"),
    ("def softmax(x):\n    raise KeyboardInterrupt\n", "it raises KeyboardInterrupt in line 2"),
    ("softmax = 3\n", "the file has no function softmax"), ("", "the file has no function softmax"),
    (b"\xff\xfe", "the file cannot be loaded: UnicodeDecodeError"),
    ("import os\ndef softmax(x):\n    os._exit(3)\n", 'wrong in the case "one row": the process ended with status 3'),
    ("def softmax(x):\n    breakpoint()\n    return 0 * x\n", "number [0] of p is 0.0; expected"),
    ("def softmax(x):\n    return softmax(x)\n", "it raises RecursionError in line 2"),
    ("def softmax(x):\n    print('x is', x)\n", "It printed:\nx is [ 0.  1. -1.]"),
    ("def softmax(x):\n    for i in range(10 ** 5): print('spam')\n", "It printed:\nspam")])
def test_a_file_that_cannot_be_graded_is_told_why(tmp_path, text, words):
    verdict = checked(tmp_path, text)
    assert not verdict.solved and words in verdict.text and len(verdict.text) < 4000, verdict


def test_a_file_with_a_byte_order_mark_and_imports_of_its_folder_is_read(tmp_path):
    (tmp_path / "my_tools.py").write_text("import numpy as np\n")
    text = "\ufeff" + solved_file("softmax").replace("import numpy as np", "from my_tools import np")
    verdict = checked(tmp_path, text)
    assert verdict.solved and not list(tmp_path.rglob("*.pyc"))


def test_a_file_with_a_dataclass_and_annotations_that_are_text_is_read(tmp_path):
    text = ("from __future__ import annotations\nimport dataclasses\n\n\n@dataclasses.dataclass\nclass Row:\n"
            "    numbers: list[float]\n\n\n" + solved_file("softmax").partition('"""\n')[2])
    assert checked(tmp_path, text).solved


@pytest.mark.parametrize("change", ["np.exp = np.zeros_like", "np.log = None", "np.seterr(all='raise')",
                                    "import warnings\nwarnings.simplefilter('error')\nnp.exp = lambda x: 1 / 0 * x"])
def test_a_file_that_changes_numpy_is_held_against_the_right_numbers(tmp_path, change):
    wrong = f"import numpy as np\n{change}\ndef softmax(x):\n    return np.full(x.shape, 1 / x.shape[-1])\n"
    verdict = checked(tmp_path, wrong)
    assert verdict.text.startswith('wrong in the case "one row": number [0] of p is 0.3333333333333333; expected 0.24')
    mistake = f"import numpy as np\nexp = np.exp\n{change}\ndef softmax(x):\n    return exp(x)\n"
    verdict = checked(tmp_path, mistake)
    assert verdict.text.count("\n  - ") == 2 and f"  - {SOFTMAX.mistakes[0].hint}\n" in verdict.text
    matmul = tasks.load("matmul_vjp")
    text = f"import numpy as np\n{change}\ndef matmul_vjp(x, w, dy):\n    return dy @ w.T, x @ dy\n"
    assert "Hint: x is not transposed in dw." in checked(tmp_path, text, task=matmul).text


def test_settings_of_warnings_and_of_numpy_in_a_file_do_not_stop_the_grader(tmp_path):
    rope = tasks.load("rope")
    text = "import warnings\nwarnings.simplefilter('error')\n" + solved_file("rope").replace(
        "import numpy as np\n", "import numpy as np\nnp.seterr(all='raise')\n")
    assert checked(tmp_path, text, task=rope).solved
    text = solved_file("softmax").replace("import numpy as np\n", "import numpy as np\nnp.seterr(all='raise')\n")
    assert checked(tmp_path, text).solved               # exp(-2000) is 0, without an error


def test_a_file_that_breaks_the_grader_is_told_so(tmp_path):
    verdict = checked(tmp_path, "import numpy as np\nnp.isnan = None\n" + solved_file("softmax"))
    assert verdict.text.startswith("the grader fails: TypeError: 'NoneType' object is not callable. Does the file")


def test_a_property_that_is_interrupted_is_told():
    rope = tasks.load("rope")

    def stops(x, positions, base):
        if base == 50:                              # the base of the property
            raise KeyboardInterrupt
        return rope.solution(x, positions, base)

    verdict = grade(rope, stops)
    assert verdict.text == "right in all cases; computing a property, it raises KeyboardInterrupt"


def test_a_file_that_is_saved_again_at_once_is_the_new_one(tmp_path):
    right = solved_file("softmax")
    assert checked(tmp_path, right).solved
    assert not checked(tmp_path, right.replace("axis=-1", "axis=+0")).solved


def test_files_of_the_students_folder_do_not_stand_in_for_modules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("json", "numpy", "fractions"):         # the last one has not been imported before
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not this one')\n")
    assert checked(tmp_path, solved_file("softmax").replace("import numpy", "import fractions\nimport numpy")).solved


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_place_of_a_file_is_refused(run, tmp_path):
    os.mkfifo(tmp_path / "02_softmax.py")
    with pytest.raises(OSError, match="a pipe, a socket or a device"):
        run("check", "softmax", tmp_path)


def test_an_output_that_is_closed_ends_the_command_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run([sys.executable, "-m", "minilm.exercises", "list"], stdout=closed, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


# In CUDA.

@pytest.mark.parametrize("name", cuda.TITLES)
def test_a_task_in_cuda_is_graded_by_the_emulator(run, tmp_path, name):
    if reason := emulator.available():
        pytest.skip(reason)
    run("start", name, tmp_path)
    path, = tmp_path.iterdir()
    assert path.name == catalogue.find(name).file and path.suffix == ".cu"
    not_begun = f"{catalogue.find(name).number} {name}: not begun: the function still has its hole\n"
    assert run("check", name, tmp_path) == (1, not_begun)
    path.write_text(cuda.solution(name))
    status, out = run("check", name, tmp_path)
    assert status == 0 and "solved. " in out
    right, wrong = {"cuda_sums": ("int half = 64", "int half = 32"), "cuda_softmax": (" / d;", ";"),
                    "cuda_attention": ("sum[e] * shrink", "sum[e]")}[name]
    path.write_text(cuda.solution(name).replace(right, wrong))
    status, out = run("check", name, tmp_path)
    assert status == 1 and re.search(r": wrong: \w+ of .* must\s+be", out), out


def test_a_kernel_that_does_not_compile_shows_the_message(tmp_path):
    if reason := emulator.available():
        pytest.skip(reason)
    path = tmp_path / "x.cu"
    path.write_text("no code")
    assert cuda.check("cuda_sums", path).text.startswith("wrong: x.cu:1:")


@pytest.mark.parametrize("right, other", [("of_threads[128];", "of_threads[128], b[2];"),
                                          ("const int t", "cudaError_t e; const int t")])
def test_right_cuda_that_the_emulator_does_not_support_is_not_called_wrong(tmp_path, right, other):
    if reason := emulator.available():
        pytest.skip(reason)
    path = tmp_path / "x.cu"
    path.write_text(cuda.solution("cuda_sums").replace(right, other))
    verdict = cuda.check("cuda_sums", path)
    number = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if other in line)
    assert not verdict.solved
    assert verdict.text.startswith(f"not graded, although it may be right CUDA: x.cu:{number}: "), verdict.text


@pytest.mark.parametrize("name, right, wrong, barrier", [
    ("cuda_sums", "= sum;\n    __syncthreads();", "= sum;", True),
    ("cuda_sums", "        __syncthreads();\n", "", True), ("cuda_sums", "j < columns", "j < 128", False),
    ("cuda_attention", "        __syncthreads();\n    }", "    }", True)])
def test_a_fault_of_a_missing_barrier_names_the_barrier(tmp_path, name, right, wrong, barrier):
    if reason := emulator.available():
        pytest.skip(reason)
    path = tmp_path / "x.cu"
    assert right in cuda.solution(name)
    path.write_text(cuda.solution(name).replace(right, wrong))
    text = cuda.check(name, path).text
    assert text.startswith("wrong: x.cu:") and ("\nIs a barrier missing? " in text) == barrier, text


def test_without_a_compiler_the_command_says_so(run, tmp_path):
    run("start", "cuda_sums", tmp_path)
    path, = tmp_path.iterdir()
    path.write_text(cuda.solution("cuda_sums"))
    with mock.patch.object(emulator, "available", lambda: "the emulator needs g++"):
        status, out = run("check", "cuda_sums", tmp_path)
        assert status == 1 and "not checked: the emulator needs g++" in out
        path.write_text(cuda.text("cuda_sums"))
        assert "not begun" in run("check", "cuda_sums", tmp_path)[1]
