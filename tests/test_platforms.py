"""minilm off Linux: it is imported quickly and without warnings, and one worker needs neither fork nor locks.

What other systems lack is taken away in a process of its own. Windows has no fcntl, fork, resource, SIGKILL, sysconf,
O_DIRECTORY, and reads text in another encoding unless it is told; macOS has no sched_getaffinity and no mallopt.
"""
import subprocess
import sys
from pathlib import Path

import pytest

import minilm

# Modules of the package that are commands.
COMMANDS = {"minilm.kernels.emulator.__main__"}
FOR_PYTEST = {"minilm.kernels.emulator.pytest_plugin"}

SMALLER = """
import ctypes, mmap, os, signal, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "killpg", "register_at_fork", "sched_getaffinity", "sysconf", "O_DIRECTORY"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGPIPE"):
    delattr(signal, name)
class Missing:
    def __init__(self, *arguments, **options):
        raise TypeError("not on this system")
ctypes.CDLL = type("CDLL", (Missing, ctypes.CDLL), {})
mmap.mmap = type("mmap", (Missing, mmap.mmap), {})
"""

# Every stage at a tiny size with one worker; then samples, a saved and a loaded model. Prints a digest of all numbers.
STAGES = """
import hashlib, os, sys
import numpy as np
from minilm import data, evaluate
from minilm.fast.malloc import keep_freed_memory, return_freed_memory
from minilm.generate import generate
from minilm.model import Config, RewardModel, Transformer
from minilm.model_file import load_model, save_model
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.pretraining import pretrain
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState, workers_for
from minilm.tokenizer import Tokenizer

keep_freed_memory()
return_freed_memory()
rng = np.random.default_rng(0)
questions = [f"What is {i} + {j}?" for i in range(3) for j in range(3)]
tokenizer = Tokenizer.train(questions, 270)
stream = data.make_stream(tokenizer, questions)
prompts, responses = zip(*[data.encode_dialogue(tokenizer, q, "It is 3.") for q in questions])
model = Transformer(Config(vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, context=64), rng)
losses = []

def train(loop, model, *arguments, **options):
    state = TrainState(model, np.random.default_rng(1), workers=1)
    losses.extend(metrics["loss"] for metrics in loop(state, *arguments, **options))
    return model

train(pretrain, model, stream, 2, batch_size=2, length=8)
train(train_sft, model, prompts, responses, 2, batch_size=4)
pairs = prompts, responses, [response[1:] for response in responses]
reward_model = train(train_reward_model, RewardModel(model.copy(), rng), *pairs, 2, batch_size=4)
train(train_rlhf, model.copy(), model, lambda x, y: evaluate.predicted_rewards(reward_model, x, y), prompts, 2,
      prompts_per_step=2, samples_per_prompt=2, max_new_tokens=4, eos=tokenizer.eos)
references = [reference_log_probs(model, prompts, side) for side in pairs[1:]]
policy = train(train_dpo, model.copy(), *pairs, *references, 2, batch_size=4)
path = os.path.join(sys.argv[1], "policy.safetensors")
save_model(path, policy, tokenizer)
loaded, _, _ = load_model(path)
assert all((loaded.parameters()[name].data == p.data).all() for name, p in policy.parameters().items())
tokens = generate(loaded, prompts, 4, np.random.default_rng(2), tokenizer.eos).tokens
assert np.isfinite(losses).all() and len(losses) == 10
print(hashlib.sha256(repr((losses, tokens.tolist())).encode()).hexdigest())
"""


def modules():
    """The dotted names of all modules of the installed package."""
    names = set()
    for folder, package in ((Path(minilm.__file__).parent, "minilm"),
                            (Path(__import__("minilm.kernels").kernels.__file__).parent, "minilm.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            names.add(".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts))))
    return sorted(names - COMMANDS - FOR_PYTEST)


def run(code, *arguments, options=("-W", "error", "-X", "warn_default_encoding")):
    """What the code prints in a process of its own. It must print no warning, and raise no error."""
    done = subprocess.run([sys.executable, *options, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                          timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_the_import_of_all_modules_warns_of_nothing_and_loads_numpy_alone_and_little_of_the_standard_library():
    """The modules loaded are counted, not the seconds: the time of an import is another on each machine."""
    assert {"minilm", "minilm.plain", "minilm.stages.rlhf", "minilm.kernels.emulator"} <= set(modules())
    code = (f"import sys, numpy\nbefore = set(sys.modules)\nimport {', '.join(modules())}\n"
            "print(*sorted(set(sys.modules) - before))")
    loaded = [name for name in run(code).split() if name.split(".")[0] not in ("minilm", "numpy", "cython_runtime")]
    others = [name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names]
    assert [name for name in others if not name.startswith(("_cython", "__mp_main__"))] == []
    assert len(loaded) - len(others) < 100          # 50 with Python 3.11


def test_all_modules_are_imported_on_a_system_without_fork_and_locks():
    run(f"{SMALLER}\nimport {', '.join(modules())}")


def test_one_worker_trains_all_stages_without_fork_and_locks_to_the_same_bits(tmp_path):
    pytest.importorskip("safetensors")
    digests = {run(start + STAGES, tmp_path) for start in ("", SMALLER)}
    assert len(digests) == 1


def test_without_fork_the_default_is_one_worker_and_two_are_an_error():
    code = f"""{SMALLER}
from minilm.fast.workers import ProcessGroup, parallel_map
from minilm.stages.train_state import workers_for
print(workers_for(10 ** 6), parallel_map(abs, [-1, 2], 1))
try:
    ProcessGroup(2)
except ValueError as error:
    print(error)
"""
    assert run(code).splitlines() == ["1 [1, 2]", "2 workers: this system cannot fork processes; ask for 1"]


SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.mark.parametrize("script", ["assistant.py", "chat.py"])
def test_without_fork_and_locks_a_command_still_explains_itself(script):
    code = f"{SMALLER}\nimport runpy\nsys.argv = ['{script}', '--help']\nsys.path.insert(0, {str(SCRIPTS)!r})\n"
    assert "usage" in run(f"{code}runpy.run_path({str(SCRIPTS / script)!r}, run_name='__main__')")


def test_without_locks_a_run_ends_with_one_line_that_says_what_it_needs(tmp_path):
    code = f"""{SMALLER}
sys.path.insert(0, {str(SCRIPTS)!r})
from support.run_folder import RunFolder, main_guard
def main():
    with RunFolder({str(tmp_path / "run")!r}, False, {{}}):
        print("entered")
sys.exit(main_guard(main))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: a run locks its folder with flock") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["assistant.py", "chat.py"])
def test_without_numpy_and_minilm_a_command_is_one_line_that_says_how_to_install_them(script, tmp_path):
    """-S: without site-packages; the working directory is not on the path of a script."""
    done = subprocess.run([sys.executable, "-S", "-E", SCRIPTS / script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert " has no numpy and no minilm. " in done.stderr and "pip install -e '.[run]'" in done.stderr
