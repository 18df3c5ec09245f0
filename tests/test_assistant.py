"""scripts/assistant.py with impatient users: bad input, a full disk, Ctrl-C and kills at any moment.

Most runs go through RUNNER: the script's main() in its own process, with smaller constants, and with an accident at
a chosen tick (a training step, a sampled block, a written file, a drawn figure). One test runs the real command.
"""
import json
import math
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import read_until
from minilm import checkpoint
from minilm.world import tasks

for module in ("fcntl", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason="what the scripts need: pip install -e '.[run]'")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SCRIPT = [sys.executable, str(SCRIPTS / "assistant.py")]
RUNNER = f"""import json, os, resource, signal, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import assistant; from support import figures, job, terminal
from minilm import checkpoint
assistant.STEPS = dict(dict.fromkeys(assistant.STEPS, 2000), pretraining=3000)
assistant.SIZES["small"] = dict(width=32, layers=1)
assistant.RLHF_BETAS, assistant.DPO_BETAS = (assistant.MAIN_BETA, 0.0), (assistant.MAIN_BETA,)
assistant.MAX_NEW_TOKENS, assistant.BEST_OF, job.SAVE_EVERY = 4, 2, -1
assistant.COMPARISONS = assistant.HELD_OUT = 400
moment, number = map(int, os.environ.get("ACCIDENT", "0 0").split())
ticks = 0
def tick(what):
    global ticks
    ticks += 1
    if ticks == moment:
        print("accident at", what, flush=True)
        os.kill(os.getpid(), number)
    if ticks == int(os.environ.get("FULL", 0)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
def ticking(module, name):
    function = getattr(module, name)
    def wrapped(*arguments, **options):
        tick("before " + name)
        result = function(*arguments, **options)
        tick("after " + name)
        return result
    setattr(module, name, wrapped)
for module, name in [(os, "fsync"), (job, "generate"), (assistant, "prepare"), (job, "save_model"),
                     (figures, "training_curves"), (figures, "reward_against_kl"), (terminal, "brief")]:
    ticking(module, name)
if "POISON" in os.environ:
    class Poisoned(job.TrainState):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            zero_grad = self.optimizer.zero_grad
            def poisoned():
                zero_grad()
                if self.step == 2:
                    self.model.parameters()["embedding"].data[:] = float("nan")
            self.optimizer.zero_grad = poisoned
    job.TrainState = Poisoned
if "LONE" in os.environ and os.environ["LONE"] == os.environ.get("PMI_RANK"):
    def require(*modules):
        raise assistant.UsageError("matplotlib is not on this host")
    assistant.require = require
status = assistant.main_guard(assistant.main, ranks=True)
if "TICKS" in os.environ:
    print("ticks", ticks)
sys.exit(status)
"""
SMALL = [sys.executable, "-c", RUNNER, "--scale", "0.001", "--workers", "2"]


def environment(**variables):
    own = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    return {**own, "COLUMNS": "120", **variables}


def run(command, *options, limit=None, stdout=subprocess.PIPE, **variables):
    """A finished process. limit: the largest file, in bytes, that it may write."""
    def restrict():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.run([*command, *map(str, options)], env=environment(**variables), text=True, stdout=stdout,
                          stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, preexec_fn=restrict, timeout=300)


def start(command, *options, **popen):
    return subprocess.Popen([*command, *map(str, options)], text=True, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, **popen)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def assert_error(done, *parts):
    """Exit status 2 and one line, without a traceback, that holds every one of the parts."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr, (part, done.stderr)


def error_of(monkeypatch, capsys, *options):
    """The one line of error for these options, from main() in this process."""
    import assistant
    monkeypatch.setattr(sys, "argv", ["assistant.py", *map(str, options)])
    assert assistant.main_guard(assistant.main) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def without_times(tree):
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key != "seconds"}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def assert_same_run(folder, other):
    """The same files with the same contents: results apart from times, weights and comparisons bit for bit."""
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    results = [without_times(json.loads((f / "results.json").read_text())) for f in (folder, other)]
    assert results[0] == results[1]
    assert (folder / "comparisons.json").read_bytes() == (other / "comparisons.json").read_bytes()
    for name in names:
        if name.endswith(".safetensors"):
            (arrays, metadata), (others, other_metadata) = checkpoint.load(folder / name), checkpoint.load(other / name)
            assert without_times(metadata) == without_times(other_metadata), name
            assert {n: a.tobytes() for n, a in arrays.items()} == {n: a.tobytes() for n, a in others.items()}, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small undisturbed run: (folder, process, number of ticks)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(SMALL, "--out", folder, TICKS="1")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder, done, int(done.stdout.rsplit("ticks ", 1)[1])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped in the middle of pretraining; copy it before use."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    done = run(SMALL, "--out", folder, ACCIDENT=f"9 {signal.SIGINT:d}")
    assert done.returncode == 130 and (folder / "base-state.safetensors").exists(), done.stdout + done.stderr
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


# All stages.

def numbers(tree):
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [n for value in tree for n in numbers(value)]
    return [tree] if isinstance(tree, (int, float)) else []


def test_the_real_command_ends_with_table_results_figures_and_models(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    folder = tmp_path / "run"
    done = run(SCRIPT, "--scale", "0.0005", "--out", folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")
    results = json.loads((folder / "results.json").read_text(), parse_constant=refuse)
    columns = ("task_accuracy", "gold_reward", "proxy_reward", "win_rate", "kl_sequence")
    assert [row["stage"] for row in results["rows"]] == ["base", "sft", "sft_lower_temperature", "best_of_n", "rlhf",
                                                         "dpo"]
    for row in results["rows"]:
        assert set(row) >= {"stage", *columns, *(f"{c}_se" for c in columns)}
        assert all(row[f"{c}_se"] >= 0 for c in columns)
        assert 0 <= row["task_accuracy"] <= 1 and 0 <= row["win_rate"] <= 1
    assert all(map(math.isfinite, numbers(results)))
    assert (results["seed"], results["scale"], results["size"]) == (0, 0.0005, "small")
    assert {"python", "numpy"} <= set(results["versions"]) and re.fullmatch("[0-9a-f]{64}", results["text"]["sha256"])
    assert results["config"]["width"] * results["config"]["layers"] < results["parameters"]
    models = [f"{method}-beta-{row['beta']}" for method, rows in results["frontier"].items() for row in rows]
    models += ["base", "sft", "reward_model"]
    assert set(results["seconds"]) >= {*models, "evaluation"} and min(results["seconds"].values()) >= 0
    assert len(results["frontier"]["rlhf"]) > 1 and len(results["frontier"]["dpo"]) > 1
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "run.json", "results.json", "comparisons.json", "training_curves.png", "reward_against_kl.png",
        *(f"{name}.safetensors" for name in models)}
    for name in ("training_curves.png", "reward_against_kl.png"):
        image = pyplot.imread(folder / name)
        assert min(image.shape[:2]) > 300 and image.std() > 0.05, name

    for words in ("task accuracy", "gold reward", "proxy reward", "win rate", "KL (nats)", "RLHF", "DPO", "best of n"):
        assert words in done.stdout
    for stage in ("base: step 1/1, ", "comparisons: sampling answers, part 2/2, ",
                  "evaluation: sampling answers, part 21/21, "):
        assert stage in done.stdout
    assert "\r" not in done.stdout and re.search(r"^about \d+ seconds for all stages", done.stdout, re.MULTILINE)
    assert_examples(results["examples"], done.stdout)
    assert results["trial"] and done.stdout.count("A TRIAL RUN") == 2
    assert tasks.guide() in done.stdout and f"python scripts/chat.py {folder}" in done.stdout


def assert_examples(examples, printed):
    """Different questions from different tasks, with one line or more for each model, of at most 80 columns."""
    assert len({example["question"] for example in examples}) == len(examples) > 3
    for example in examples:
        assert example["question"] in printed and {"base", "sft", "rlhf", "dpo"} < set(example)
    table = printed[printed.index("           task accuracy"):printed.index("Talk to the models")]
    assert max(map(len, table.splitlines())) <= 80
    assert len(re.findall("^    (base|SFT model|RLHF|DPO)  ", table, re.MULTILINE)) == 4 * len(examples)


def test_a_finished_run_is_reported_and_left_unchanged(whole):
    folder, _, _ = whole
    before = contents(folder)
    done = run(SMALL, "--out", folder, "--resume")
    assert (done.returncode, done.stderr) == (0, "") and "finished run" in done.stdout
    assert str(folder / "results.json") in done.stdout
    assert_error(run(SMALL, "--out", folder), "already holds a run", "--resume", "--out")
    assert contents(folder) == before


def test_a_terminal_shows_a_bar_with_the_time_left(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*SMALL, "--out", str(tmp_path / "run")], stdin=theirs, stdout=theirs, stderr=theirs,
                               env=environment(ACCIDENT=f"60 {signal.SIGINT:d}"), start_new_session=True)
    os.close(theirs)
    shown = read_until(ours, None).decode()
    os.close(ours)
    assert process.wait(timeout=60) == 130, shown
    assert re.search(r"base: 100%\|.*\| 3/3 \[\d\d:\d\d<\d\d:\d\d", shown) and "loss" in shown, shown
    assert "base: step" not in shown and "--resume" in shown and "Traceback" not in shown


def test_resume_in_an_empty_folder_starts_a_new_run_and_says_so(tmp_path, stopped):
    done = run(SMALL, "--out", tmp_path / "run", "--resume", ACCIDENT=f"5 {signal.SIGINT:d}")
    assert done.returncode == 130 and "--resume: a new run starts, because there is none in" in done.stdout
    folder = Path(shutil.copytree(stopped, tmp_path / "stopped"))
    done = run(SMALL, "--out", folder, "--resume", ACCIDENT=f"5 {signal.SIGINT:d}")
    assert done.returncode == 130 and f"resuming the run in {folder}" in done.stdout


@pytest.fixture
def drawn(whole, monkeypatch, tmp_path):
    """The figures of the undisturbed run, by the name of their function."""
    from support import figures
    results = json.loads((whole[0] / "results.json").read_text())
    kept = {}
    for name in ("training_curves", "reward_against_kl"):
        monkeypatch.setattr(figures, "save", lambda figure, path, name=name: kept.update({name: figure}))
        getattr(figures, name)(results, tmp_path / "unused.png")
    return kept


def test_labels_of_the_figures_fit_into_their_figure_and_their_axes(drawn):
    for figure in drawn.values():
        figure.draw_without_rendering()
        for axis in figure.axes:
            frame = axis.get_window_extent()
            assert axis.yaxis.label.get_window_extent().height <= frame.height, axis.get_ylabel()
            for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
                box = text.get_window_extent()
                assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= figure.bbox.y0, text


def test_the_labels_of_the_betas_do_not_overlap_and_the_square_root_axis_is_named(drawn):
    from matplotlib.text import Text
    figure = drawn["reward_against_kl"]
    figure.draw_without_rendering()
    axis = figure.axes[0]
    assert "square-root axis" in axis.get_xlabel() and "square-root" not in figure.axes[1].get_xlabel()
    # The boxes of the words: that of an annotation would include its line to the point.
    boxes = [Text.get_window_extent(text) for text in axis.texts if text.get_text().startswith("β=")]
    assert len(boxes) == 3      # two runs of RLHF and one of DPO
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_tables_of_finished_runs_are_printed_again(whole, tmp_path):
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    figures = [sys.executable, str(SCRIPTS / "support" / "figures.py")]
    one = run(figures, folder)
    assert (one.returncode, one.stderr) == (0, "")
    table = one.stdout.strip().split("Written to")[0].strip()
    assert table in whole[1].stdout
    several = run(figures, folder, whole[0])
    assert several.returncode == 0 and several.stdout.startswith("| | task accuracy | gold reward | proxy reward |")
    assert "| SFT model | " in several.stdout and "- RLHF minus SFT model, win rate: " in several.stdout
    results = json.loads((folder / "results.json").read_text())
    del results["trial"]
    (folder / "results.json").write_text(json.dumps(results))
    assert_error(run(figures, folder), str(folder), "older version", "Run it again")
    assert_error(run(figures, tmp_path / "none"), str(tmp_path / "none"), "there is no such file")


def test_help_names_every_option_with_its_default():
    done = run(SCRIPT, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for words in ("--scale", "--size", "--seed", "--out DIR", "--resume", "--text FILE", "--workers", "runs/assistant",
                  "default: 1.0", "Ctrl-C", "results.json"):
        assert words in " ".join(done.stdout.split())
    assert "None" not in done.stdout and "False" not in done.stdout


# Impossible requests end at once, and nothing is written.

@pytest.mark.parametrize("content, fault", [
    (None, "No such file"), (b"", "empty"), (b" \n", "empty"), (b"\x7fELF\x02\x01\x00\x00", "binary"),
    ("caf\u00e9".encode("latin-1"), "not UTF-8 text (byte 3)"), ("hi there".encode("utf-16"), "not UTF-8"),
    ("folder", "Is a directory")], ids=["missing", "empty", "blank", "binary", "latin-1", "utf-16", "folder"])
def test_a_text_file_that_is_missing_empty_or_no_utf8_is_an_error(tmp_path, monkeypatch, capsys, content, fault):
    text = tmp_path / "text"
    if content == "folder":
        text.mkdir()
    elif content is not None:
        text.write_bytes(content)
    message = error_of(monkeypatch, capsys, "--out", tmp_path / "run", "--text", text)
    assert str(text) in message and fault in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [
    "--scale 0", "--scale -1", "--scale nan", "--scale inf", "--scale 1e9", "--scale much", "--workers 0",
    "--workers -2", "--workers 1000000", "--device tpu", "--device gpu --workers 2", "--size huge", "--seed -1",
    "--seed x", "--seed", "--unknown", "--res", "stray", "--text ''"])
def test_a_bad_option_is_an_error_that_names_it(tmp_path, monkeypatch, capsys, options):
    message = error_of(monkeypatch, capsys, "--out", tmp_path / "run", *shlex.split(options))
    assert options.split()[0] in message or options == "--text ''"
    assert not (tmp_path / "run").exists()


def test_a_gpu_without_cupy_is_an_error_that_names_the_package_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    message = error_of(monkeypatch, capsys, "--out", tmp_path / "run", "--device", "gpu")
    assert "--device gpu" in message and "cupy-cuda13x[ctk]" in message


def test_a_bad_option_ends_the_real_command_with_status_2(tmp_path):
    assert_error(run(SCRIPT, "--out", tmp_path / "run", "--size", "huge"), "--size", "'huge'", "small")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["matplotlib", "safetensors", "tqdm"])
def test_a_missing_package_is_named_before_the_work_starts(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(\"No module named '%s'\")" % name)
    done = run(SCRIPT, "--out", tmp_path / "run", PYTHONPATH=str(tmp_path))
    assert_error(done, name, "pip install -e '.[run]'")
    assert done.stdout == "" and not (tmp_path / "run").exists()


def test_a_folder_with_other_files_stays_unchanged(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    for path in (tmp_path / "theirs", tmp_path / "theirs" / "thesis.txt"):
        for options in ([], ["--resume"]):
            message = error_of(monkeypatch, capsys, "--out", path, *options)
            assert str(path) in message and "Choose another --out" in message
    assert contents(tmp_path / "theirs") == {"thesis.txt": b"years of work"}


def test_resuming_with_other_settings_is_an_error_with_both_values(folder):
    before = contents(folder)
    done = run(SMALL, "--out", folder, "--resume", "--seed", "7", "--size", "large")
    assert_error(done, "seed was 0 and is now 7", 'size was "small" and is now "large"')
    assert contents(folder) == before


def test_a_run_in_use_excludes_a_second_one_and_resumes_by_the_command_that_it_prints(tmp_path, whole):
    out = tmp_path / "it's a run"    # quotes and blanks
    first = start(SMALL, "--out", out, env=environment(ACCIDENT=f"12 {signal.SIGSTOP:d}"))
    while not (line := first.stdout.readline()).startswith("accident"):
        assert line, first.communicate()
    for options in ([], ["--resume"]):
        assert_error(run(SMALL, "--out", out, *options), "in use by another run")
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    output, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and "press again to stop at once" in errors and "Traceback" not in errors
    command = output.split("Continue with:", 1)[1].strip()
    assert command.endswith(f"{shlex.quote(str(out))} --resume")
    resumed = subprocess.run(command, shell=True, text=True, capture_output=True, timeout=120)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert_same_run(out, whole[0])


# Damaged files.

def changed(name, change):
    def damage(folder):
        arrays, metadata = checkpoint.load(folder / name)
        change(arrays, metadata)
        checkpoint.save(folder / name, arrays, metadata)
    return damage


def of_another_architecture(arrays, metadata):
    arrays["model.embedding"] = arrays["model.embedding"][:, :16]


@pytest.mark.parametrize("fault, damage", [
    ("damaged", lambda folder: os.truncate(folder / "base-state.safetensors", 100_000)),
    ("empty", lambda folder: os.truncate(folder / "base-state.safetensors", 0)),
    ("not a safetensors file", lambda folder: (folder / "base-state.safetensors").write_text("PK: a zip, perhaps")),
    ("another architecture", changed("base-state.safetensors", of_another_architecture)),
    ("another architecture", changed("base-state.safetensors", lambda a, m: a.clear())),
    ("another run", changed("base-state.safetensors", lambda a, m: m["run"].update(seed=5))),
    ("another run", changed("base-state.safetensors", lambda a, m: m.clear())),
    ("damaged", lambda folder: (folder / "base.safetensors").write_bytes(
        (folder / "base-state.safetensors").read_bytes()[:-1])),
    ("another run", lambda folder: checkpoint.save(folder / "base.safetensors", {}, {"kind": "Transformer"})),
    ("run.json", lambda folder: (folder / "run.json").write_text("{}")),
], ids=["cut short", "empty", "not safetensors", "other shapes", "no arrays", "other run", "no metadata",
        "model cut short", "model of another program", "run.json"])
def test_a_damaged_checkpoint_is_an_error_and_stays_unchanged(folder, fault, damage):
    damage(folder)
    before = contents(folder)
    assert_error(run(SMALL, "--out", folder, "--resume"), str(folder), fault)
    assert contents(folder) == before


def test_a_model_of_another_architecture_is_an_error(whole, tmp_path):
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (folder / "results.json").unlink()
    changed("base.safetensors", lambda a, m: a.update(embedding=a["embedding"][:, :16]))(folder)
    assert_error(run(SMALL, "--out", folder, "--resume"), "base.safetensors", "another architecture", "embedding")


# A full disk, and NaN.

def test_a_full_disk_keeps_the_previous_checkpoint_and_the_run_can_be_resumed(folder, whole):
    before = contents(folder)
    size = (folder / "base-state.safetensors").stat().st_size
    done = run(SMALL, "--out", folder, "--resume", limit=int(0.9 * size))       # the memory of the ranks is smaller
    assert_error(done, "base-state.safetensors: not saved", "File too large", "intact")
    assert contents(folder) == before
    assert run(SMALL, "--out", folder, "--resume").returncode == 0
    assert_same_run(folder, whole[0])


def test_a_disk_too_full_for_the_figures_is_an_error_and_the_run_can_be_resumed(whole, tmp_path):
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (folder / "results.json").unlink()
    done = run(SMALL, "--out", folder, "--resume", limit=40_000)
    assert_error(done, "training_curves.png: not saved", "File too large", "intact")
    assert not (folder / "results.json").exists()
    assert run(SMALL, "--out", folder, "--resume").returncode == 0
    assert_same_run(folder, whole[0])


def test_output_that_cannot_be_written_ends_the_run_without_a_traceback(folder):
    with open("/dev/full", "w") as full:
        assert_error(run(SMALL, "--out", folder, "--resume", stdout=full), "the output: No space left on device")
    reading, writing = os.pipe()
    os.close(reading)    # `| head -1`
    done = run(SMALL, "--out", folder, "--resume", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_nan_in_the_loss_names_stage_step_and_tensor_and_keeps_the_last_good_checkpoint(tmp_path):
    folder = tmp_path / "run"
    done = run(SMALL, "--out", folder, POISON="1")
    assert_error(done, "pretraining, step 3: the loss is nan", "parameter embedding", "last good checkpoint is kept")
    arrays, metadata = checkpoint.load(folder / "base-state.safetensors")
    assert metadata["step"] == 2 and all(np.isfinite(a).all() for a in arrays.values())
    assert not (folder / "base.safetensors").exists() and not (folder / "results.json").exists()


# Stopped and killed, at any moment.

def go_on_through(folder, accidents):
    """Runs into each accident (tick, signal) in turn, resumes each time, then runs to the end. Returns the outputs."""
    printed = []
    for tick, number in accidents:
        done = run(SMALL, "--out", folder, "--resume", ACCIDENT=f"{tick} {number:d}")
        printed.append(done.stdout + done.stderr)
        assert "Traceback" not in printed[-1], printed[-1]
        if done.returncode == 0:    # the request to stop came too late
            assert (folder / "results.json").exists()
            break
        assert done.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), printed[-1]
        assert not (folder / "results.json").exists()
        if number != signal.SIGKILL:
            assert "--resume" in done.stdout, printed[-1]
    else:
        done = run(SMALL, "--out", folder, "--resume")
        assert (done.returncode, done.stderr) == (0, "")
    return printed


def test_a_run_stopped_and_killed_many_times_gives_the_same_files_as_an_undisturbed_one(tmp_path, whole):
    # Ticks count from each start: each part gets a little further than the previous one.
    printed = go_on_through(tmp_path / "run", [
        (1, signal.SIGKILL), (2, signal.SIGINT), (8, signal.SIGKILL), (6, signal.SIGTERM), (40, signal.SIGKILL),
        (30, signal.SIGINT), (25, signal.SIGKILL)])
    assert len(printed) == 7
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("share", np.linspace(0.02, 0.98, 7).round(2))
def test_one_accident_at_any_moment_gives_the_same_files(tmp_path, whole, number, share):
    go_on_through(tmp_path / "run", [(max(1, round(share * whole[2])), number)])
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_the_real_command_stopped_at_any_time_gives_the_same_files(tmp_path, number):
    """From the first imports on: no traceback, and 130 for Ctrl-C."""
    options = ["--scale", "0.0005", "--out", str(tmp_path / "run"), "--resume"]
    delay = 0.1
    while not (tmp_path / "run" / "results.json").exists():
        process = start(SCRIPT, *options)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert "Traceback" not in output + errors
        expected = -number if number == signal.SIGKILL else 130
        assert process.returncode == expected or (tmp_path / "run" / "results.json").exists(), (delay, output, errors)
        delay *= 1.5
    assert run(SCRIPT, *options[:-1], "--resume").returncode == 0
    other = tmp_path / "other"
    assert run(SCRIPT, "--scale", "0.0005", "--out", other).returncode == 0
    assert_same_run(tmp_path / "run", other)
