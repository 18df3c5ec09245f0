"""The benchmarks: what they report is what was measured, and nothing is timed that does not compute the same."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import measuring
from run_folder import UsageError

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


class FakeWorker:
    """Takes a fixed time a step, by its own account."""

    def __init__(self, name, seconds, **results):
        self.name, self.seconds, self.memory = name, seconds, 100.0
        self.results = {key: np.array(value) for key, value in results.items()}

    def run(self, steps):
        return [self.seconds] * steps


def test_medians_are_of_each_workers_turns_and_a_busy_machine_is_noticed(monkeypatch):
    shares = iter([1.0, 1.0, 1.0, 1.0] + [1.0, 0.2, 1.0, 1.0] + [1.0] * 4)
    monkeypatch.setattr(measuring, "idle", lambda: next(shares))
    medians, undisturbed = measuring.take_turns([FakeWorker("a", 0.5), FakeWorker("b", 0.25)], rounds=3, turn=1.0)
    assert medians.tolist() == [[0.5, 0.25]] * 3
    assert undisturbed.tolist() == [True, False, True]


@pytest.mark.parametrize("theirs", [{"loss": 1.1, "dw": [1.0, 2.0]}, {"loss": 1.0, "dw": [1.0, 2.1]},
                                    {"loss": 1.0, "dw": [np.nan, 2.0]}])
def test_what_does_not_compute_the_same_is_not_timed(theirs):
    ours = FakeWorker("minilm", 1.0, loss=1.0, dw=[1.0, 2.0])
    measuring.check_results(ours, FakeWorker("twin", 1.0, loss=1.0, dw=[1.0, 2.0]), 1e-3)
    with pytest.raises(UsageError, match="do not compute the same"):
        measuring.check_results(ours, FakeWorker("other", 1.0, **theirs), 1e-3)
    with pytest.raises(UsageError, match="do not compute the same"):
        measuring.check_results(ours, FakeWorker("other", 1.0, loss=1.0), 1e-3)


def row(**figures):
    return {"work": "training step", "size": "XS", "peer": "torch", "time_ratio": 0.5, "time_ratio_low": 0.4,
            "time_ratio_high": 0.6, "memory_ratio": 0.25, "ours_ms": 1, "theirs_ms": 2, "ours_mb": 1, "theirs_mb": 4, **figures}


def test_the_csv_has_the_agreed_header_and_plain_numbers(tmp_path):
    measuring.write_csv(tmp_path / "ratios.csv", [row(), row(peer="compile", time_ratio=1.25)])
    assert (tmp_path / "ratios.csv").read_text().splitlines() == [
        "work,size,peer,time_ratio,time_ratio_low,time_ratio_high,memory_ratio",
        "training step,XS,torch,0.5000,0.4000,0.6000,0.2500", "training step,XS,compile,1.2500,0.4000,0.6000,0.2500"]


def test_the_table_shows_losses_like_the_others():
    assert [line.split(" | ")[3] for line in measuring.table([row(), row(time_ratio=1.7)]).splitlines()[2:]] == [
        "0.50", "1.70"]


def test_a_size_or_peer_that_does_not_exist_is_refused_by_name(monkeypatch):
    for given, message in (("--sizes=XXL", "no size XXL; there are XS, S"), ("--peers=jax", "no peer jax"),
                           ("--rounds=0", "at least 1")):
        monkeypatch.setattr(sys, "argv", ["bench", given])
        with pytest.raises(UsageError, match=message):
            measuring.arguments("", ["XS", "S"], ["torch"])


@pytest.mark.parity
def test_a_training_step_computes_what_pytorchs_does_and_is_timed(tmp_path):
    pytest.importorskip("torch", reason="parity needs PyTorch: pip install torch")
    run = subprocess.run([sys.executable, SCRIPTS / "bench_train.py", "--sizes", "XS", "--peers", "torch,autograd",
                          "--rounds", "1", "--csv", tmp_path / "ratios.csv"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ratios = (tmp_path / "ratios.csv").read_text().splitlines()
    assert ratios[0] == ",".join(measuring.HEADER) and ratios[1].startswith("training step,XS,torch,")
    assert float(ratios[1].split(",")[3]) > 0
    assert "autograd: not installed" in run.stdout or ratios[2].startswith("training step,XS,autograd,")
