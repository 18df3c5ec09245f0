"""scripts/assistant.py interrupted at random moments, in every stage: by signals, a full disk, and memory that ends.

Each of 200 moments ends a run. The run is continued with the command that it printed, and must leave the same bits as
a run that nothing interrupted, without a stray process, a lock, or a temporary file. The moments are drawn from a seed:
INTERRUPTED_SEED=n draws others, INTERRUPTED_MOMENTS=n fewer or more.
"""
import collections
import multiprocessing
import os
import random
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest

for module in ("fcntl", "safetensors", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason="the script needs a POSIX system and pip install -e '.[run]'")
if not os.path.isdir("/proc/self"):
    pytest.skip("stray processes are looked for in /proc", allow_module_level=True)

import interrupted_job
from test_assistant import assert_same_run

SEED = int(os.environ.get("INTERRUPTED_SEED", 0))
MOMENTS = int(os.environ.get("INTERRUPTED_MOMENTS", 200))
PROCESSES = 2
OPTIONS = ["--scale", "0.001", "--workers", "2"]
# Part of a run, and the file with which it ends.
PARTS = {"pretraining": "base.safetensors", "SFT": "sft.safetensors", "comparisons": "comparisons.json",
         "reward model": "reward_model.safetensors", "RLHF": "rlhf-beta-0.3.safetensors",
         "DPO": "dpo-beta-0.3.safetensors", "evaluation and figures": "results.json"}


def started(folder, whole, part):
    """A run folder as it is when this part begins: the files of the parts before."""
    (folder / "run").mkdir(parents=True)
    names = list(PARTS)
    done = ["run.json", *(PARTS[name] for name in names[:names.index(part)])]
    for name in done if part != "pretraining" else ():
        shutil.copy(whole / "run" / name, folder / "run" / name)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupts, and {part: (ticks, seconds) from the start of that part on}."""
    folder = tmp_path_factory.mktemp("whole")
    assert interrupted_job.run(folder, [*OPTIONS, "--out", str(folder / "run")]).status == 0
    durations = {}
    for part in PARTS:
        again = started(tmp_path_factory.mktemp("part") / "job", folder, part)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TICKS", str(again / "ticks"))
            ended = interrupted_job.run(again, [*OPTIONS, "--out", str(again / "run"), "--resume"])
        assert ended.status == 0 and ended.stderr == "", ended.stderr
        assert_same_run(again / "run", folder / "run")
        durations[part] = int((again / "ticks").read_text()), ended.seconds
    return folder, durations


def draw_moment(i, durations):
    """The i-th moment: how the accident comes, in which part, and when in that part."""
    rng = random.Random(f"{SEED}-{i}")
    names = list(PARTS)
    part = rng.choice(names)
    ticks, seconds = durations[part]
    after = durations[names[names.index(part) + 1]] if part != names[-1] else (0, 0.0)
    accident = interrupted_job.KINDS[i % len(interrupted_job.KINDS)]
    # Ticks of this part alone. By time it is the whole of the rest, because the time of a part depends on the machine.
    moment = rng.randint(1, max(2, ticks - after[0])) if rng.random() < 0.5 else rng.uniform(0, seconds)
    return {"part": part, "accident": accident, "moment": moment, "group": rng.random() < 0.5,
            "save_every": rng.choice((-1.0, 1e9))}


def interrupted(task):
    """(what happened, the fault or None) at one moment."""
    i, folder, whole, durations = task
    plan = draw_moment(i, durations)
    part = plan.pop("part")
    options = [*OPTIONS, "--out", str(folder / "run"), "--resume"]
    try:
        for _ in range(4):
            shutil.rmtree(folder, ignore_errors=True)
            started(folder, whole, part)
            ended = interrupted_job.run(folder, options, **plan)
            happened = check_end(ended, folder, plan)
            if happened != "went on to its end" or isinstance(plan["moment"], int):
                break
            plan["moment"] /= 2         # the run was faster than the one that was measured
        # results.json is the last file: once it is there, the run is whole.
        if happened == "went on to its end" or (folder / "run" / "results.json").exists():
            assert_same_run(folder / "run", whole / "run")
        if happened == "went on to its end":
            return happened, None
        if command := ended.command():
            assert command[1] == interrupted_job.SCRIPT and command[2:] == options, command
            options = command[2:]
        resumed = interrupted_job.run(folder, options)
        assert (resumed.status, resumed.stderr, resumed.left) == (0, "", []), resumed.stdout + resumed.stderr
        assert_same_run(folder / "run", whole / "run")
        assert os.listdir(folder / "tmp") == []
        shutil.rmtree(folder)
        return happened, None
    except AssertionError as error:
        return "failed", f"moment {i} of seed {SEED}, {draw_moment(i, durations)}: {error}"


def check_end(ended, folder, plan):
    """How the run ended, in words; AssertionError if it should not have ended so."""
    printed = f"status {ended.status}\n{ended.stdout}\n{ended.stderr}"
    assert "Traceback" not in printed and "Warning" not in printed, printed
    assert ended.left == [], f"stray processes: {ended.left}"
    accident = plan["accident"]
    if ended.status == 0:
        return "went on to its end"
    if accident == "SIGKILL":
        assert ended.status == -9, printed
        return "was killed"
    assert not [name for name in os.listdir(folder / "run") if name.endswith("partial")], printed
    if accident in ("disk", "memory"):
        assert ended.status == 2 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, printed
        assert ended.command() or not ended.stdout, printed        # nothing printed: the run had not begun
        return "ended with one line of error"
    # SIGTERM ends the process at once before the run has begun, and after its last file.
    outside = not ended.stdout or (folder / "run" / "results.json").exists()
    assert ended.status == 130 or (ended.status == -15 and accident == "SIGTERM" and outside), printed
    return "stopped"


@pytest.mark.slow
def test_a_run_interrupted_at_any_moment_is_resumed_and_leaves_the_same_bits(whole, tmp_path):
    folder, durations = whole
    tasks = [(i, tmp_path / str(i), folder, durations) for i in range(MOMENTS)]
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("fork")) as pool:
        results = list(pool.map(interrupted, tasks))
    record = collections.Counter()
    for (i, *_), (happened, _) in zip(tasks, results):
        plan = draw_moment(i, durations)
        record[f"{plan['accident']:8}{'by time' if isinstance(plan['moment'], float) else 'by tick'}: {happened}"] += 1
    lines = [f"{count:4}  {words}" for words, count in sorted(record.items())]
    print(f"seed {SEED}, {MOMENTS} moments", *lines, sep="\n")
    faults = [fault for _, fault in results if fault]
    assert not faults, f"{len(faults)} of {MOMENTS} moments:\n" + "\n\n".join(faults[:5])
