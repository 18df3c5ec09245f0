"""scripts/dev/long_run.py: its lines, its verdict about memory, the drift of log-probs, and its errors."""
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from minilm.generate import generate
from minilm.model import Config, RewardModel, Transformer
from minilm.model_file import save_model
from minilm.tokenizer import Tokenizer

pytest.importorskip("safetensors", reason="model files: pip install -e '.[test]'")

import long_run

SCRIPT = Path(long_run.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of assistant.py with tiny models that nobody has trained."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer()
    rng = np.random.default_rng(0)
    sft = Transformer(Config(vocab_size=tokenizer.vocab_size, width=8, layers=1, heads=1, context=256), rng)
    save_model(folder / "sft.safetensors", sft, tokenizer)
    save_model(folder / "reward_model.safetensors", RewardModel(sft.copy(), rng), tokenizer)
    return folder


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_a_run_prints_lines_of_numbers_and_a_verdict(folder):
    done = run(folder, "--minutes", "0.08")
    header, *lines, last = done.stdout.splitlines()
    assert done.stderr == "" and header.split()[:4] == ["minute", "step", "MiB", "drift"]
    rows = [[float(word) for word in line.split()] for line in lines]
    assert 2 <= len(rows) <= 10 and all(len(row) == 9 and np.isfinite(row).all() for row in rows)
    minutes, steps, memory, drifts = np.array(rows).T[:4]
    assert (np.diff(steps) > 0).all() and minutes[-1] >= 0.0 and (memory > 10).all() and (drifts < 1e-3).all()
    found = re.search(r"^(\d+) steps; greatest drift \S+ nats; memory (flat|grows) after minute \S+: slope (\S+) MiB/h",
                      last, re.IGNORECASE)
    assert found and int(found[1]) == steps[-1] and done.returncode == (found[2] != "flat")


@given(st.integers(3, 90), st.floats(50, 2000), st.data())
def test_memory_that_settles_in_the_first_half_is_flat(lines, mib, data):
    settled = data.draw(st.integers(0, lines // 2 - 1))
    minutes = np.arange(1.0, lines + 1)
    words, is_flat = long_run.verdict(minutes, np.where(np.arange(lines) < settled, 0.8 * mib, mib))
    assert is_flat and words.startswith(f"memory flat after minute {settled + 1}.0: slope ")
    assert abs(float(words.split()[6])) < 0.01


@given(st.integers(3, 90), st.floats(50, 2000), st.floats(0.1, 10))
def test_memory_that_grows_to_the_end_is_not_flat(lines, mib, share):
    minutes = np.arange(1.0, lines + 1)
    words, is_flat = long_run.verdict(minutes, mib * (1 + share * minutes / lines))
    assert not is_flat and words.startswith("MEMORY GROWS after minute")
    slope = float(words.split()[6])
    assert abs(slope - 60 * mib * share / lines) <= 0.01 + 1e-6 * slope


def test_the_slope_is_that_of_a_straight_line_in_mib_an_hour():
    minutes = np.arange(0.0, 61)
    words, is_flat = long_run.verdict(minutes, 1000 + 6 * minutes / 60)
    assert is_flat and "slope +6.00 MiB/h, from 1000.0 to 1006.0 MiB" in words


def test_one_line_has_no_slope():
    assert "slope +nan MiB/h, from 70.0 to 70.0 MiB" in long_run.verdict([0.1], [70.0])[0]


def test_the_drift_is_the_greatest_difference_of_a_tokens_log_prob(folder, monkeypatch):
    sft, _, tokenizer = long_run.models(folder)
    prompts = [[tokenizer.bos, 10, 11], [tokenizer.bos, 12]] * 4
    assert long_run.drift(sft, prompts, np.random.default_rng(0), tokenizer.eos) < 1e-4

    def moved(*arguments):
        samples = generate(*arguments)
        log_probs = samples.log_probs.copy()
        log_probs[2, 0] += 0.25
        log_probs[samples.mask == 0] = 7.0
        return dataclasses.replace(samples, log_probs=log_probs)
    monkeypatch.setattr(long_run, "generate", moved)
    assert abs(long_run.drift(sft, prompts, np.random.default_rng(0), tokenizer.eos) - 0.25) < 1e-4


@pytest.mark.parametrize("arguments, message", [
    (["--minutes", "0"], "--minutes: '0' must be a number from 0.0001"),
    (["--minutes", "nan"], "--minutes: 'nan' must be"),
    (["--beta", "-1"], "--beta: '-1' must be a number from 0"),
    (["--seed", "-1"], "--seed: '-1' must be a whole number")])
def test_an_impossible_option_is_one_line(folder, arguments, message):
    done = run(folder, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_a_folder_without_models_is_one_line(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and re.match(r"error: .*sft.safetensors: there is no such file", done.stderr)
