"""The GPU mode of the benchmarks on the emulator, with PyTorch on the CPU beside it.

tests/test_gpu_process.py compares what they use of CuPy and of torch.cuda with the real packages.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import emulated_gpu
import gpu_measuring
import gpu_process
import measuring
import objective_steps
from bench import attention as bench_attention, generate, log_probs as bench_log_probs, objectives, train
from benchmark import Benchmark
from support.run_folder import UsageError

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"
SCRIPTS = {"train": train, "generate": generate, "objectives": objectives}


@pytest.fixture
def gpu(emulated, monkeypatch, tmp_path):
    """The emulator in the place of a GPU, for PyTorch the CPU."""
    emulated_gpu.install(monkeypatch, tmp_path)
    monkeypatch.setattr(gpu_process, "TORCH", "cpu")
    monkeypatch.setattr(measuring, "TURN", 0.01)
    return emulated


def results(script, monkeypatch, tmp_path, *options):
    """(exit status, the rows of the JSON file) of a script with --device gpu."""
    path = tmp_path / "results.json"
    command = f"{BENCH / script}.py --device gpu --rounds 1 --json {path}"
    monkeypatch.setattr(sys, "argv", [*command.split(), *options])
    status = SCRIPTS[script].main()
    found = json.loads(path.read_text())
    assert found["machine"].startswith("the emulator, driver ")
    return status, found["rows"]


@pytest.mark.parity
def test_a_training_step_on_a_gpu_equals_pytorchs_in_both_precisions(gpu, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="parity needs PyTorch: pip install torch")
    status, rows = results("train", monkeypatch, tmp_path, "--sizes", "tiny")
    assert status == 0, capsys.readouterr()
    assert [(row["work"], row["size"], row["peer"]) for row in rows] == [
        (f"training step, {precision}", "tiny", "torch") for precision in ("float32", "bf16")]
    assert all(row["time_ratio"] > 0 and row["ours_mb"] > 0 for row in rows)


@pytest.mark.slow               # TRL is imported in six processes
@pytest.mark.parity
def test_a_step_of_every_objective_on_a_gpu_equals_trls_in_both_precisions(gpu, monkeypatch, tmp_path, capsys):
    pytest.importorskip("trl", reason="parity with TRL needs it: pip install trl==1.16.0")
    status, rows = results("objectives", monkeypatch, tmp_path, "--sizes", "tiny-32")
    assert status == 0, capsys.readouterr()
    assert [(row["work"], row["size"], row["peer"]) for row in rows] == [
        (f"{work} step, {precision}", "tiny-32", "trl-best") for precision in ("float32", "bf16")
        for work in ("SFT", "DPO", "RLOO")]


@pytest.mark.parametrize("work", objective_steps.WORKS)
def test_the_steps_of_an_objective_run_on_a_gpu_and_their_memory_is_measured(gpu, tmp_path, work):
    spec = {**objectives.write(tmp_path / "weights.npz", "tiny-32"), "work": work, "device": "gpu",
            "compute": "bfloat16"}
    step, check = objective_steps.load_minilm()(spec)
    found = check()
    assert found["norm of the gradient"] > 0 and all(np.isfinite(a).all() for a in found.values())
    device = gpu_process.device_of(spec, "minilm")
    assert device.peak() == 0 and device.times(step, 1)[0] > 0 and device.peak() > 0


@pytest.mark.parity
def test_samples_on_a_gpu_have_the_log_probs_of_hugging_face_and_pytorch(gpu, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", reason="parity needs transformers: pip install transformers")
    monkeypatch.setattr(generate, "NEW", 3)
    monkeypatch.setattr(generate, "CONFIG", {**generate.CONFIG, "vocab_size": 64, "width": 64, "layers": 1, "heads": 2})
    status, rows = results("generate", monkeypatch, tmp_path, "--sizes", "B1")
    assert status == 0, capsys.readouterr()
    assert [(row["work"], row["size"], row["peer"]) for row in rows] == [
        (f"sampling, {precision}", "B1", peer) for precision in ("float32", "bf16") for peer in ("hf", "torch")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_gpu_the_reason_and_what_to_do_are_one_error(script, monkeypatch):
    monkeypatch.setattr(gpu_measuring, "gpu", lambda: (None, "no GPU: no driver"))
    monkeypatch.setattr(sys, "argv", [str(BENCH / f"{script}.py"), "--device", "gpu"])
    with pytest.raises(UsageError, match="--device gpu: no GPU: no driver. Run it on a machine with an NVIDIA GPU"):
        SCRIPTS[script].main()


@pytest.mark.parametrize("options, message", [
    ("--peers autograd", "autograd has no GPU mode; with --device gpu there are torch, compile"),
    ("--compute float16", "no precision 'float16'")])
def test_what_a_gpu_does_not_run_is_an_error(gpu, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", [str(BENCH / "train.py"), "--device", "gpu", *options.split()])
    with pytest.raises(UsageError, match=message):
        train.main()


def asked(monkeypatch, *options):
    """The options of the benchmark of training steps."""
    monkeypatch.setattr(sys, "argv", [str(BENCH / "train.py"), *options])
    return Benchmark("", measuring.SIZES, train.PEERS, train.GPU, [], unasked=measuring.UNASKED)


def test_a_gpu_has_its_own_sizes_and_peers_unless_others_are_named(gpu, monkeypatch):
    usual = asked(monkeypatch, "--device", "gpu")
    assert [*usual.cases()] == [(size, compute) for size in ("S", "G8x1024") for compute in ("float32", "bfloat16")]
    assert usual.asked.peers == ["torch"]
    named = asked(monkeypatch, "--device", "gpu", "--sizes", "M", "--peers", "compile", "--compute", "bfloat16")
    assert [*named.cases()] == [("M", "bfloat16")] and named.asked.peers == ["compile"]
    on_cpu = asked(monkeypatch)
    assert [*on_cpu.cases()] == [(size, "float32") for size in ("XS", "S", "M", "G")]
    assert on_cpu.asked.peers == [*train.PEERS]


def test_on_a_gpu_a_comparison_that_fails_does_not_stop_the_others(gpu, monkeypatch, tmp_path, capsys):
    """The second one; minilm alone is timed in the others."""
    def compare(work, size, spec, names, *_):
        if spec["compute"] == "float32":
            raise UsageError("another result")
        return [measuring.row_of(work, size, "-", np.ones(3), np.full(3, np.nan), 2**20, np.nan)]
    monkeypatch.setattr(measuring, "compare", compare)
    run = asked(monkeypatch, "--device", "gpu", "--sizes", "S", "--json", str(tmp_path / "results.json"))
    for size, compute in run.cases():
        run.compare("training step", size, compute, {}, ["minilm"], {}, 1)
    assert run.finish("") == 1
    printed = capsys.readouterr().out
    assert "failed: training step, S, float32: another result" in printed
    assert "| training step, bf16 | S | - | nan |" in printed
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["ours_ms"], row["ours_mb"], row["time_ratio"], row["compute"]) == (1000, 1, None, "bfloat16")


def kernels_report(script, monkeypatch, tmp_path, capsys, *options):
    """(exit status, what is printed, the JSON) of attention.py or log_probs.py with the emulator as a GPU."""
    monkeypatch.setattr(gpu_measuring, "copy_rate", lambda cupy: 1e9)
    monkeypatch.setattr(gpu_measuring, "product_rate", lambda cupy, dtype=None: 1e12)
    path = tmp_path / "times.json"
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--json", str(path)])
    status = script.main()
    return status, capsys.readouterr().out, json.loads(path.read_text())


def test_attention_is_timed_in_both_precisions_against_the_kernels_of_pytorch_that_run(
        gpu, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    for name, value in (("B", 1), ("H", 2), ("G", 2), ("K", 32), ("WIDE", 64)):
        monkeypatch.setattr(bench_attention, name, value)
    status, printed, found = kernels_report(bench_attention, monkeypatch, tmp_path, capsys, "--lengths", "70")
    assert status == 0, printed
    assert "torch, efficient_attention: does not run here, skipped (RuntimeError" in printed
    tables = {table: [row["name"] for row in found["rows"] if row["table"] == table]
              for table in dict.fromkeys(row["table"] for row in found["rows"])}
    bf16 = "T = 70, bf16 (the share is of a product in float16)"
    assert tables == {**dict.fromkeys(("T = 70, forward", "T = 70, backward"), ["minilm", "plain CuPy", "torch, math"]),
                      **dict.fromkeys((f"{bf16}, {direction}" for bf16 in (bf16, bf16.replace("70,", "70, K = 64,"))
                                       for direction in ("forward", "backward")),
                                      ["minilm, bf16", "torch, bf16, flash_attention"])}
    assert "minilm, bf16: " in printed and " of the speed of torch, bf16, flash_attention" in printed
    assert found["machine"].startswith("the emulator") and all(min(row["seconds"]) > 0 for row in found["rows"])


def test_log_probs_are_timed_with_and_without_the_product(gpu, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    monkeypatch.setattr(bench_log_probs, "N", 9)
    monkeypatch.setattr(bench_log_probs, "D", 16)
    status, printed, found = kernels_report(bench_log_probs, monkeypatch, tmp_path, capsys, "--vocabularies", "65")
    assert status == 0, printed
    assert [row["name"] for row in found["rows"]] == 2 * ["minilm", "plain CuPy", "torch"] + 2 * ["minilm", "torch"]


def test_the_rates_of_a_copy_and_a_product_are_measured(gpu, monkeypatch):
    """With smaller arrays than on a GPU."""
    real = np.ones
    monkeypatch.setattr(gpu, "ones", lambda n, dtype: emulated_gpu.ndarray(real(100, dtype)), raising=False)
    normal = emulated_gpu.Generator.standard_normal
    monkeypatch.setattr(emulated_gpu.Generator, "standard_normal",
                        lambda self, size, dtype: normal(self, (3, 3), dtype))
    assert min(gpu_measuring.ceilings(gpu)) > 0 and gpu_measuring.product_rate(gpu, np.float16) > 0


def test_results_that_differ_are_named_and_the_other_tables_are_made(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_log_probs, "N", 9)
    monkeypatch.setattr(bench_log_probs, "D", 16)
    monkeypatch.setattr(bench_log_probs, "TOLERANCE", 0.0)
    status, printed, found = kernels_report(bench_log_probs, monkeypatch, tmp_path, capsys, "--vocabularies", "65")
    assert status == 1 and "failed: V = 65, from logits: plain CuPy: result" in printed
    assert any("bf16" in row["table"] for row in found["rows"])
