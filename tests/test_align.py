"""scripts/align.py: each stage trains on a person's examples, resumes where it was stopped, and names every mistake."""
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for module in ("fcntl", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(module, reason="needed by the scripts: pip install -e '.[run]'")

import align
from helpers import small_transformer
from minilm.lora import Adapted
from minilm.model import RewardModel
from minilm.model_file import save_model
from minilm.pretrained import save
from minilm.tokenizer import Tokenizer
from support.align_stages import shuffled
from support.models import load_any
from test_pretrained import CHAT, SHAPES

SCRIPT = Path(align.__file__)
SMALL = Tokenizer()
WORDS = ["sun", "moon", "star", "rain", "wind", "snow", "tree", "leaf", "rock", "sand", "fish", "bird"]


def user(content):
    return [{"role": "user", "content": content}]


def assistant(content):
    return [{"role": "assistant", "content": content}]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a real model, a small one, examples and a reward function, to work in."""
    monkeypatch.chdir(tmp_path)
    real = small_transformer(np.random.default_rng(0), np.float32, **{**SHAPES["as SmolLM2"], "context": 200})
    for p in real.parameters().values():
        p.data *= 0.3
    save(real, CHAT, "real")
    save_model("small.safetensors", small_transformer(np.random.default_rng(0), np.float32, context=64,
                                                      vocab_size=SMALL.vocab_size), SMALL)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": user(word), "chosen": assistant(word), "rejected": assistant(f"Why {word}?")}) + "\n"
        for word in WORDS))
    (tmp_path / "strings.jsonl").write_text("".join(json.dumps(
        {"prompt": word, "completion": word, "chosen": word, "rejected": f"{word}!"}) + "\n" for word in WORDS))
    (tmp_path / "mine.py").write_text("def shorter(prompts, responses):\n    assert set(prompts) <= set(" + repr(WORDS)
                                      + ")\n    return [-len(r) for r in responses]\n\n\nnumber = 3\n")
    return tmp_path


FAST = ["--batch-size", 4, "--held-out", 3, "--max-new-tokens", 5, "--lora-rank", 2]


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["align.py", *map(str, words)])
    status = align.main_guard(align.main, align.DataError)
    return status, *capsys.readouterr()


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("stage, data, measured, metric", [
    ("sft", "strings.jsonl", "loss", "loss"), ("reward", "pairs.jsonl", "margin", "accuracy"),
    ("dpo", "pairs.jsonl", "rewards/margins", "rewards/margins"), ("rlhf", "pairs.jsonl", "kl", "reward")])
@pytest.mark.parametrize("model", ["real", "small.safetensors"])
def test_each_stage_trains_a_model_and_writes_all_files(work, monkeypatch, capsys, stage, data, measured, metric,
                                                        model):
    options = ["--reward", "mine:shorter"] * (stage == "rlhf")
    fast = FAST if model == "real" else FAST[:-2]
    status, printed, errors = run(monkeypatch, capsys, stage, "--model", model, "--data", data, "--out", "out",
                                  "--epochs", 2, "--learning-rate", 0.01, *fast, *options)
    assert status == 0, errors
    results = results_of(work / "out")
    assert measured in results["before"] and results["before"][measured] != results["after"][measured]
    assert "3 held-out examples" in printed and all(len(line) <= 80 for line in printed.splitlines())
    lines = [json.loads(line) for line in (work / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7)) and all(metric in line for line in lines)
    assert lines[-1]["epoch"] == 2 and lines[-1]["num_tokens"] > lines[0]["num_tokens"] > 0
    assert lines[0]["learning_rate"] == 0.01 and lines[-1]["learning_rate"] == pytest.approx(0.01 / 6)
    assert (work / "out" / "training.png").stat().st_size > 1000 and not (work / "out" / "state.safetensors").exists()
    trained, _ = load_any("out/model" if model == "real" else "out/model.safetensors")
    assert isinstance(trained, RewardModel) == (stage == "reward")
    if stage != "reward":
        assert len(results["examples"]) == 3 and "python scripts/chat.py" in printed
        if model == "real":
            adapted, _ = load_any("out/adapter")
            tokens = np.array([[1, 2, 3]])
            assert isinstance(adapted, Adapted)
            np.testing.assert_allclose(adapted(tokens).data, trained(tokens).data, rtol=1e-4, atol=1e-4)


def test_training_makes_the_held_out_loss_smaller(work, monkeypatch, capsys):
    run(monkeypatch, capsys, "sft", "--model", "real", "--data", "strings.jsonl", "--out", "out", "--epochs", 20,
        "--learning-rate", 0.02, "--chat", *FAST)
    results = results_of(work / "out")
    assert results["after"]["loss"] < 0.9 * results["before"]["loss"]


def test_a_reward_model_that_was_trained_here_is_the_reward_of_rlhf(work, monkeypatch, capsys):
    run(monkeypatch, capsys, "reward", "--model", "real", "--data", "pairs.jsonl", "--out", "rm", *FAST)
    status, _, errors = run(monkeypatch, capsys, "rlhf", "--model", "real", "--data", "pairs.jsonl", "--out", "out",
                            "--reward", "rm/model", *FAST)
    assert status == 0, errors
    assert results_of(work / "out")["before"]["win_rate"] <= 1
    status, _, errors = run(monkeypatch, capsys, "dpo", "--model", "rm/model", "--data", "pairs.jsonl", "--out", "x",
                            *FAST)
    assert status == 2 and "is a reward model" in errors


def test_no_prompt_is_both_trained_on_and_held_out(work, monkeypatch, capsys):
    lines = (work / "pairs.jsonl").read_text()
    (work / "twice.jsonl").write_text(lines + lines.replace("Why", "How"))
    _, printed, _ = run(monkeypatch, capsys, "dpo", "--model", "real", "--data", "twice.jsonl", "--out", "out", *FAST)
    assert "18 examples to train on; 6 are held out, of 3 other prompts" in printed


def test_the_examples_of_eval_data_are_held_out_and_their_prompts_are_not_trained_on(work, monkeypatch, capsys):
    lines = (work / "pairs.jsonl").read_text().splitlines(keepends=True)
    (work / "eval.jsonl").write_text("".join([*lines[:2], lines[0].replace(WORDS[0], "another")]))
    options = ["--model", "real", "--data", "pairs.jsonl", "--eval-data", "eval.jsonl", "--out", "out"]
    fast = [x for x in FAST if x not in ("--held-out", 3)]
    status, printed, errors = run(monkeypatch, capsys, "dpo", *options, *fast)
    assert status == 0, errors
    assert "10 examples to train on (2 are left out: eval.jsonl has their prompts); 3 are held out" in printed
    results = results_of(work / "out")
    assert (results["held_out"], results["eval_data"]) == (3, "eval.jsonl") and "cores" in results["machine"]
    # A prompt as a string is the same prompt: by its tokens. One whose end is cut is the same by its words.
    (work / "eval.jsonl").write_text(lines[0].replace(json.dumps(user(WORDS[0])), json.dumps(WORDS[0])).replace(
        json.dumps(assistant(WORDS[0])), '"x"').replace(json.dumps(assistant(f"Why {WORDS[0]}?")), '"y"'))
    _, printed, _ = run(monkeypatch, capsys, "dpo", *options[:-1], "chat", "--chat", *fast)
    assert "11 examples to train on (1 are left out" in printed
    (work / "eval.jsonl").write_text(lines[0])
    status, _, errors = run(monkeypatch, capsys, "dpo", *options, *fast, "--resume")
    assert status == 2 and "other settings" in errors, "the run is of another file"
    (work / "eval.jsonl").write_text("".join(lines))
    status, _, errors = run(monkeypatch, capsys, "dpo", *options[:-1], "new", *fast)
    assert status == 2 and "every prompt of pairs.jsonl is in eval.jsonl too" in errors


def test_every_epoch_has_each_example_once_in_another_order():
    batches = shuffled(10, 4, 6, seed=0)
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_a_stopped_run_is_resumed_bit_for_bit(work, monkeypatch, capsys):
    words = ["dpo", "--model", "real", "--data", "pairs.jsonl", "--epochs", 4, *FAST]
    run(monkeypatch, capsys, *words, "--out", "whole")
    steps = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(align.StopRequest, "requested", property(lambda self: next(steps) >= 4, lambda self, x: None),
                      raising=False)
        status, printed, _ = run(patch, capsys, *words, "--out", "parts")
    assert status == 130 and "stopped; continue with" in printed
    status, _, errors = run(monkeypatch, capsys, *words, "--out", "parts", "--batch-size", 5, "--resume")
    assert status == 2 and "batch_size was 4 and is now 5" in errors
    status, _, errors = run(monkeypatch, capsys, *words, "--out", "parts", "--resume")
    assert status == 0, errors
    assert (work / "whole" / "metrics.jsonl").read_text() == (work / "parts" / "metrics.jsonl").read_text()
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (work / "whole" / name).read_bytes() == (work / "parts" / name).read_bytes()
    status, printed, _ = run(monkeypatch, capsys, *words, "--out", "parts", "--resume")
    assert status == 0 and "holds a finished run" in printed


def test_ctrl_c_saves_and_the_run_goes_on(work):
    command = [sys.executable, str(SCRIPT), "dpo", "--model", "real", "--data", "pairs.jsonl", "--out", "out",
               "--epochs", "400", *map(str, FAST)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "dpo: step" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130), errors
    if process.returncode == 130:
        assert (work / "out" / "state.safetensors").exists() and "--resume" in printed


@pytest.mark.parametrize("words, message", [
    (["rlhf"], "rlhf needs --reward"), (["dpo", "--reward", "x"], "--reward is for rlhf"),
    (["dpo", "--data", "none.jsonl"], "none.jsonl: cannot be read"), (["dpo", "--model", "none"], "none"),
    (["sft"], 'line 1: a demonstration has prompt and completion'),
    (["dpo", "--held-out", "12"], "12 different prompts, and 12 are held out"),
    (["dpo", "--eval-data", "none.jsonl"], "none.jsonl: cannot be read: No such file or directory. Give a file of"),
    (["rlhf", "--reward", "nosuch:f"], "No module named 'nosuch'"),
    (["rlhf", "--reward", "mine:nosuch"], "mine:nosuch"), (["rlhf", "--reward", "real"], "is no reward model"),
    (["rlhf", "--reward", "mine:number"], "is 3, and no function"),
    (["rlhf", "--reward", "nosuch"], "no such file or folder"), (["dpo", "--max-length", "4"], "no example is left"),
    (["dpo", "--lora-targets", "lm_head"], "no matrix 'lm_head'"), (["teach"], "invalid choice: 'teach'")])
def test_a_mistake_is_one_line_that_says_what_to_do(work, monkeypatch, capsys, words, message):
    given = dict(zip(["--model", "--data", "--out"], ["real", "pairs.jsonl", "out"]))
    given.update(zip(words[1::2], words[2::2]))
    status, _, errors = run(monkeypatch, capsys, words[0], *(word for pair in given.items() for word in pair))
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert message in errors


def test_a_reward_function_that_gives_too_few_numbers_is_named(work, monkeypatch, capsys):
    (work / "bad.py").write_text("def few(prompts, responses):\n    return [1.0]\n")
    status, _, errors = run(monkeypatch, capsys, "rlhf", "--model", "real", "--data", "pairs.jsonl", "--out", "out",
                            "--reward", "bad:few", *FAST)
    assert (status, errors) == (2, "error: bad:few: reward gave 1 of 3 numbers; each response needs one\n")
