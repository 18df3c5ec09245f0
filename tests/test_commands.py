"""Every command of the repository: a wrong option, value or file is one line that starts with "error:", and status 2.

Commands are found in the folders, and their options in their parsers, so that a new one is tested too. They run in
this process, as `python FILE` would run them; what replaces its process runs in one of its own.
"""
import argparse
import contextlib
import io
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings, strategies as st

from support.command_line import output_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*.py")
                 if 'if __name__ == "__main__":\n    sys.exit' in path.read_text("utf-8")
                 or "\n    sys.exit(main_guard(" in path.read_text("utf-8"))
SECONDS = 30                    # a command that has not ended by then has begun to work, or hangs


class TooLate(BaseException):
    pass


def in_this_process(script, *arguments):
    """(exit status, stdout, stderr) of `python SCRIPT ARGUMENTS`."""
    def too_late(*_):
        raise TooLate(f"{script} {arguments} did not end in {SECONDS} s")

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(SECONDS)
    with (mock.patch.object(sys, "argv", [str(script), *map(str, arguments)]), mock.patch.dict(os.environ),
          mock.patch.object(sys, "path", [*sys.path]), contextlib.redirect_stdout(io.StringIO()) as out,
          contextlib.redirect_stderr(io.StringIO()) as err):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        finally:
            signal.alarm(0)
            for number, handler in kept.items():
                signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


def assert_one_line_of_error(ended, *words):
    status, _, err = ended
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, ended
    for word in words:
        assert str(word) in err, err


class Found(BaseException):
    pass


def options_of(script):
    """The parser's actions, without --help."""
    def found(parser, *_):
        raise Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", found), pytest.raises(Found) as caught:
        in_this_process(script)
    return [action for action in caught.value.args[0]._actions if action.dest != "help"]


# Wrong values by the kind of an option.

NUMBERS = "", "x", "nan", "inf", "-inf", "-1", "1e999", "0x1"
TOO_LARGE_OR_SMALL = "0", "1e9", "1" + 30 * "0"
FILES_TO_WRITE = "no/such/folder/file", ".", "file/within", "n" * 300, "nul\0nul"
NAMES = "", "nosuch", "S,,M", ","
# Options whose value is a text or a path, and values of them that no command can do anything with.
TEXTS = {"out": ("file", "file/within"), "text": ("nosuch", ".", "binary"), "rows": NAMES, "rounding": NAMES,
         "readme": ("nosuch", "file", ".", ""), "seconds": ("nosuch", "file", ".", ""), "models": ("nosuch", "binary"),
         "folders": ("nosuch", "file", "."), "folder": ("file", "file/within"), "project": ("nosuch", "file"),
         "only": ("no mutant has this",), "earlier": ("nosuch", "binary", "."), "wheel": ("nosuch", "file", "."),
         "model": ("nosuch", "binary"), "data": ("nosuch", "."), "eval_data": ("nosuch", "."),
         "judge": ("nosuch",), "reward": ("nosuch",), "system": ()}
TABLES = {"scripts/dev/mutants.py": ("nosuch", "binary", "file"), "scripts/lecture/all.py": ("nosuch", "file", ".", ""),
          "scripts/answers/all.py": ("nosuch", "file", ".", "")}


def wrong_values(script, action):
    if action.nargs == 0:                               # a flag
        return [None]
    if action.type is output_file:
        return FILES_TO_WRITE
    if action.choices:
        return "", "nosuch"
    if isinstance(action.default, (int, float)) or (action.default is None and action.dest in ("workers", "jobs")):
        return NUMBERS if action.dest in ("seed", "temperature", "beta") else (*NUMBERS, *TOO_LARGE_OR_SMALL)
    if action.dest == "table":
        return TABLES[script]
    if action.type is not None and action.type is not Path:
        return (*NAMES, "-1", "x")
    return TEXTS[action.dest]                           # a KeyError: add the new option there


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with a file and a binary file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not what is expected")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    return tmp_path


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("file", "binary"))


def test_the_commands_are_found():
    assert len([s for s in SCRIPTS if s.startswith("scripts/lecture/")]) == 24, SCRIPTS
    assert {"scripts/assistant.py", "scripts/chat.py", "scripts/support/figures.py", "scripts/dev/mutants.py",
            "scripts/dev/readme.py", "scripts/dev/golden.py", "scripts/dev/kernel_report.py"} <= set(SCRIPTS)
    assert len([s for s in SCRIPTS if s.startswith("scripts/bench/")]) == 12, SCRIPTS
    with_a_guard = {str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*.py")
                    if re.search(r"^if __name__ == .__main__.:", path.read_text("utf-8"), re.MULTILINE)}
    assert with_a_guard == set(SCRIPTS), "a command that does not end through main_guard"


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_options_and_surplus_words_are_one_line_of_error(script, here):
    for words in (["--nosuch"], ["--nosuch", "1"], ["--nosuch=1"], ["-z"], ["--", "surplus", "--nosuch"]):
        assert_one_line_of_error(in_this_process(script, *words))
    assert not left(here)


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_values_of_every_option_are_one_line_of_error_and_nothing_is_written(script, here):
    for action in options_of(script):
        for value in wrong_values(script, action):
            option = max(action.option_strings, key=len, default=None)
            words = [value] if option is None else [f"{option}={'' if value is None else value}"]
            if action.dest == "project":                # checked when the mutants are read
                words.append("--list")
            if script == "scripts/bench/table.py" and action.dest != "folder":
                words += ["--print", "nosuch"]
            if action.dest == "redraw":
                continue
            ended = in_this_process(script, *words)
            assert ended[0] == 2, (words, ended)
            assert_one_line_of_error(ended)
            assert not left(here), words


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_option_without_its_value_is_one_line_of_error(script, here):
    for action in options_of(script):
        if action.nargs is None and action.option_strings:
            assert_one_line_of_error(in_this_process(script, action.option_strings[0]), action.option_strings[0])


@pytest.mark.parametrize("words", [[], ["torch"], ["nosuch", "{}"], ["minilm", "not JSON"],
                                   ["minilm", "{}", "surplus"]], ids=" ".join)
@pytest.mark.parametrize("script", ["align", "bandwidth", "gemm", "generate", "objectives", "processes", "scaling",
                                    "train"])
def test_the_option_with_which_a_benchmark_starts_its_processes_is_refused_to_others(script, words, here):
    assert_one_line_of_error(in_this_process(f"scripts/bench/{script}.py", "--worker", *words))


# Commands that replace their process, or are modules.

@pytest.mark.parametrize("words", ["minilm.plain x", "minilm.toy -1", "minilm.toy 1 2", "minilm.toy --nosuch",
                                   "minilm.toy nan", "minilm.toy 1e9", "minilm.kernels.emulator nosuch",
                                   "minilm.exercises nosuch", "minilm.exercises start softmax",
                                   "minilm.exercises start nosuch DIR", "minilm.exercises check nosuch",
                                   "minilm.exercises check softmax minilm", "minilm.exercises check a b c",
                                   "minilm.exercises check --seconds nan minilm", "minilm.exercises hint softmax 3",
                                   "minilm.exercises solution 0", "minilm.exercises predict 21",
                                   "minilm.exercises predict --answer", "minilm.exercises --nosuch",
                                   "minilm.kernels.emulator attention --T -1", "minilm.check",
                                   "minilm.check --nosuch", "minilm.check nosuch.py:f dpo_loss", "minilm.check a b c",
                                   "minilm.check tests/helpers.py:nosuch dpo_loss", "minilm.check --as jax a b",
                                   "minilm.check tests/helpers.py:normal nosuch"])
def test_a_module_that_is_run_with_wrong_words_is_one_line_of_error(words):
    ended = subprocess.run([sys.executable, "-m", *words.split()], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert_one_line_of_error((ended.returncode, ended.stdout, ended.stderr))


@pytest.mark.skipif(not (ROOT / "minilm").is_dir(), reason="reads the sources of a checkout")
def test_no_other_module_is_a_command():
    with_a_guard = {str(path.relative_to(ROOT)) for folder in ("minilm", "kernels")
                    for path in (ROOT / folder).rglob("*.py") if "\nif __name__ ==" in path.read_text("utf-8")}
    assert with_a_guard == {"minilm/plain.py", "minilm/toy.py", "minilm/check.py", "minilm/exercises/__main__.py",
                            "kernels/emulator/__main__.py"}


# Files that are missing, damaged, or of another program.

def make_unreadable(path, kind):
    path.unlink(missing_ok=True)
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "binary": bytes(range(256)), "not JSON": b"{", "{}": b"{}", "[]": b"[]",
                          "a number": b"1e999", "null": b"null", "deep": b"[" * 100_000,
                          "UTF-16": "{}".encode("utf-16"),
                          "long number": b'{"trial": ' + b"9" * 5000 + b"}"}[kind])


KINDS = ["missing", "a folder", "empty", "binary", "not JSON", "{}", "[]", "a number", "null", "deep", "UTF-16",
         "long number"]


def row(stage, **values):
    names = ("task_accuracy", "gold_reward", "proxy_reward", "win_rate", "kl_sequence")
    return {"stage": stage, **{n: 0.5 for n in names}, **{f"{n}_se": 0.1 for n in names}, **values}


def results():
    """results.json of a run of scripts/assistant.py, in small."""
    def steps(n=3):
        return [{"step": i, "loss": 1.0, "accuracy": 0.5, "reward": 0.1 * i, "kl_sequence": 0.2 * i, "gold_reward": 0.1,
                 "gold_reward_se": 0.1} for i in range(n)]
    points = {method: [row(method, beta=beta, kl_sequence=k) for beta, k in ((0.1, 2.0), (0.3, 1.0))]
              for method in ("rlhf", "dpo")}
    runs = ("base", "sft", "reward_model", "rlhf-beta-0.1", "rlhf-beta-0.3", "dpo-beta-0.1")
    return {"trial": True, "scale": 0.1, "main_beta": 0.1, "history": {name: steps() for name in runs},
            "frontier": points, "rows": [row("base"), row("sft"), row("sft_lower_temperature"),
                                         row("best_of_n", n=4, kl_is_upper_bound=True),
                                         row("rlhf", beta=0.1), row("dpo", beta=0.1)],
            "turning_point": {"step": 1, "kl_sequence": 0.2, "gold_reward": 0.1, "last_kl_sequence": 0.4,
                              "last_gold_reward": 0.1, "turned_down": False},
            "held_out_questions": 8, "distinct_questions": 8, "reward_model_accuracy": 0.5,
            "reward_model_accuracy_se": 0.1, "base_completion_accuracy": 0.1, "base_completion_accuracy_se": 0.1,
            "examples": [{"question": "q", "answer": "a", "base": ["x", True], "sft": ["y", False]}],
            "seconds": {"base": 1.0}, "parameters": 1000, "seed": 0, "workers": 1}


FIGURES = "scripts/support/figures.py"


def places(tree, path=()):
    """The path of every value in a tree of dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


PLACES = list(places(results()))


@pytest.mark.parametrize("others", [[], ["good"]], ids=["alone", "with another"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_that_cannot_be_read_are_one_line_of_error(here, kind, others):
    (here / "good").mkdir()
    (here / "good" / "results.json").write_text(json.dumps(results()))
    (here / "run").mkdir()
    make_unreadable(here / "run" / "results.json", kind)
    assert_one_line_of_error(in_this_process(FIGURES, *others, "run"), "run/results.json")


@settings(max_examples=5)                               # drawing takes a second
@given(place=st.sampled_from(PLACES), value=st.sampled_from([None, "x", [], {}, -1, 1e308, math.nan, True, "delete"]))
def test_results_with_one_wrong_value_are_drawn_or_are_one_line_of_error(tmp_path_factory, place, value):
    pytest.importorskip("matplotlib")
    changed = results()
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    if value == "delete":
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    folder = tmp_path_factory.mktemp("run")
    (folder / "results.json").write_text(json.dumps(changed))
    ended = in_this_process(FIGURES, folder)
    if ended[0] != 0:
        assert_one_line_of_error(ended, folder)


def test_good_results_are_drawn(here):
    pytest.importorskip("matplotlib")
    (here / "results.json").write_text(json.dumps(results()))
    status, out, err = in_this_process(FIGURES, here)
    assert (status, err) == (0, "") and (here / "reward_against_kl.png").exists() and "RLHF" in out


def test_figures_that_cannot_be_written_stay_as_they_were(here):
    pytest.importorskip("matplotlib")
    resource = pytest.importorskip("resource")
    (here / "results.json").write_text(json.dumps(results()))
    (here / "training_curves.png").write_bytes(b"an older figure")
    def a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    done = subprocess.run([sys.executable, ROOT / FIGURES, here], capture_output=True, text=True,
                          preexec_fn=a_full_disk)
    assert_one_line_of_error((done.returncode, done.stdout, done.stderr), "training_curves.png: not saved", "intact")
    assert (here / "training_curves.png").read_bytes() == b"an older figure" and len(left(here)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_an_experiment_that_cannot_be_read_are_one_line_of_error(here, kind):
    pytest.importorskip("matplotlib")
    make_unreadable(here / "dpo.json", kind)
    assert_one_line_of_error(in_this_process("scripts/lecture/dpo.py", "--redraw", "--out", here), "dpo.json")


@pytest.mark.parametrize("wrong", [{"by_seed": []}, {"by_seed": [{}]}, {"settings": None}, {"size": 1}, {"seeds": 3}])
def test_numbers_of_an_experiment_of_another_form_are_one_line_of_error(here, wrong):
    pytest.importorskip("matplotlib")
    numbers = {"experiment": "dpo", "settings": {}, "size": "default", "by_seed": [{"x": 1}], "seeds": [0],
               "seconds": 1}
    (here / "dpo.json").write_text(json.dumps({**numbers, **wrong}))
    assert_one_line_of_error(in_this_process("scripts/lecture/dpo.py", "--redraw", "--out", here), "dpo.json")


@pytest.mark.parametrize("option", ["--table", "--readme", "--seconds", "--resume"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "missing"])
def test_a_lecture_run_with_a_damaged_file_is_one_line_of_error(here, monkeypatch, kind, option):
    for name in ("matplotlib", "PIL"):
        pytest.importorskip(name)
    script = "scripts/lecture/all.py"
    run = {"format": "minilm run", "settings": {"size": "default"}}
    (here / "run.json").write_text(json.dumps(run))
    make_unreadable(here / "dpo.json", kind)
    words = [option, here] if option != "--resume" else ["--resume", "--out", here, "--rows", "rlhf"]
    readme = (ROOT / "scripts/lecture/README.md").read_bytes()
    assert_one_line_of_error(in_this_process(script, *words), "dpo.json")
    make_unreadable(here / "run.json", kind)
    assert_one_line_of_error(in_this_process(script, *words), here)
    assert (ROOT / "scripts/lecture/README.md").read_bytes() == readme


@pytest.mark.parametrize("content", ["", "work,size\n1,2\n", "work,size,peer,time_ratio\na,b,c,x\n", "\0",
                                     "a" * 200_000, b"\xff\xfe\x00", "folder"], ids=range(7))
def test_measurements_that_cannot_be_read_are_one_line_of_error(here, content):
    if content == "folder":
        (here / "train.csv").mkdir()
    else:
        (here / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line_of_error(in_this_process("scripts/bench/table.py", here, "--print"), here)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"no table", b"file\n  words\n",
                                     b"file\n  words\n    - a\n    + b\n"], ids=range(5))
def test_a_table_of_mutants_that_cannot_be_used_is_one_line_of_error(here, content):
    (here / "table.txt").write_bytes(content)
    assert_one_line_of_error(in_this_process("scripts/dev/mutants.py", "--table", here / "table.txt", "--list"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("missing", "a folder")])
def test_golden_vectors_are_not_written_over_other_files(here, kind):
    (here / "out").mkdir()
    make_unreadable(here / "out" / "index.json", kind)
    before = (here / "out" / "index.json").read_bytes()
    assert_one_line_of_error(in_this_process("scripts/dev/golden.py", "--out", "out"), "Choose another --out")
    assert (here / "out" / "index.json").read_bytes() == before
