"""The benchmarks: reports equal the measurements, and a library with wrong results is not timed."""

import argparse
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import gpu_measuring
import measuring
import minilm
from bench import (
    attention as bench_attention,
    gemm as bench_gemm,
    log_probs as bench_log_probs,
    processes as bench_processes,
    scaling as bench_scaling,
    table as bench_table,
)
from helpers import assert_close
from minilm.model import Config, Transformer
from support.run_folder import UsageError

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


class FakeWorker:
    """Reports a fixed time for each step."""

    def __init__(self, name, seconds, **results):
        self.name, self.seconds, self.memory, self.used = name, seconds, 100.0, 0
        self.results = {key: np.array(value) for key, value in results.items()}

    def run(self, steps, watched=False):
        self.used += 40
        return [self.seconds] * steps

    def ticks(self):
        return self.used


def test_medians_are_of_each_workers_turns_and_a_disturbed_round_is_marked(monkeypatch):
    """A worker has 40 of 100 ticks in a turn; in the second round another process takes 20 during the first turn."""
    clock = iter(range(0, 10**6, 100))
    busy = iter(np.cumsum([0, 40, 0, 40] + [0, 60, 0, 40] + [0, 40, 0, 40]).tolist())
    monkeypatch.setattr(measuring, "busy_ticks", lambda: (next(busy), next(clock)))
    monkeypatch.setattr(measuring, "wait_until_quiet", lambda: None)
    medians, undisturbed = measuring.take_turns([FakeWorker("a", 0.5), FakeWorker("b", 0.25)], rounds=3, turn=1.0)
    assert medians.tolist() == [[0.5, 0.25]] * 3
    assert undisturbed.tolist() == [True, False, True]


@pytest.mark.parametrize("theirs", [{"loss": 1.1, "dw": [1.0, 2.0]}, {"loss": 1.0, "dw": [1.0, 2.1]},
                                    {"loss": 1.0, "dw": [np.nan, 2.0]}])
def test_libraries_with_different_results_are_not_timed(theirs):
    ours = FakeWorker("minilm", 1.0, loss=1.0, dw=[1.0, 2.0])
    measuring.check_results(ours, FakeWorker("twin", 1.0, loss=1.0, dw=[1.0, 2.0]), 1e-3)
    with pytest.raises(UsageError, match="do not compute the same"):
        measuring.check_results(ours, FakeWorker("other", 1.0, **theirs), 1e-3)
    with pytest.raises(UsageError, match="do not compute the same"):
        measuring.check_results(ours, FakeWorker("other", 1.0, loss=1.0), 1e-3)


def row(**figures):
    return {"work": "training step", "size": "XS", "peer": "torch", "time_ratio": 0.5, "time_ratio_low": 0.4,
            "time_ratio_high": 0.6, "memory_ratio": 0.25, "ours_ms": 1, "theirs_ms": 2, "ours_mb": 1, "theirs_mb": 4,
            **figures}


def test_a_row_has_the_ratios_within_rounds_and_the_medians_of_each_library():
    found = measuring.row_of("step", "S", "torch", np.array([1.0, 2.0, 6.0]), np.array([2.0, 8.0, 8.0]), 2**20, 2**22)
    assert (found["time_ratio_low"], found["time_ratio"], found["time_ratio_high"]) == (0.375, 0.5, 0.625)
    assert (found["ours_ms"], found["theirs_ms"]) == (2000.0, 8000.0)
    assert (found["ours_mb"], found["theirs_mb"], found["memory_ratio"]) == (1.0, 4.0, 0.25)


def test_the_csv_has_its_header_and_plain_numbers(tmp_path):
    measuring.write_csv(tmp_path / "ratios.csv", [row(), row(peer="compile", time_ratio=1.25)])
    assert (tmp_path / "ratios.csv").read_text().splitlines() == [
        "work,size,peer,time_ratio,time_ratio_low,time_ratio_high,memory_ratio",
        "training step,XS,torch,0.5000,0.4000,0.6000,0.2500", "training step,XS,compile,1.2500,0.4000,0.6000,0.2500"]


def test_the_table_shows_losses_like_the_others():
    assert [line.split(" | ")[3] for line in measuring.table([row(), row(time_ratio=1.7)]).splitlines()[2:]] == [
        "0.50", "1.70"]


def test_an_unknown_size_or_peer_raises_with_the_known_ones(monkeypatch):
    for given, message in (("--sizes=XXL", "no size 'XXL'; there are XS, S"), ("--peers=jax", "no peer 'jax'"),
                           ("--rounds=0", "from 1 to 1000")):
        monkeypatch.setattr(sys, "argv", ["bench", given])
        with pytest.raises(UsageError, match=message):
            measuring.arguments("", ["XS", "S"], ["torch"])


@pytest.mark.parity
def test_a_training_step_equals_pytorchs_and_is_timed(tmp_path):
    pytest.importorskip("torch", reason="parity needs PyTorch: pip install torch")
    run = subprocess.run([sys.executable, SCRIPTS / "bench" / "train.py", "--sizes", "XS", "--peers", "torch,autograd",
                          "--rounds", "1", "--csv", tmp_path / "ratios.csv"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ratios = (tmp_path / "ratios.csv").read_text().splitlines()
    assert ratios[0] == ",".join(measuring.HEADER) and ratios[1].startswith("training step,XS,torch,")
    assert float(ratios[1].split(",")[3]) > 0
    assert "autograd: not installed" in run.stdout or ratios[2].startswith("training step,XS,autograd,")


def test_two_versions_that_compute_the_same_are_timed(tmp_path):
    other = tmp_path / "other"
    for folder in (Path(minilm.__file__).parent, SCRIPTS):
        shutil.copytree(folder, other / folder.name, ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    command = [sys.executable, SCRIPTS / "bench" / "train.py", "--other", other, "--sizes", "XS", "--rounds", "1"]
    run = subprocess.run([*command, "--csv", tmp_path / "ratios.csv"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (line,) = (tmp_path / "ratios.csv").read_text().splitlines()[1:]
    assert line.startswith("training step,XS,other,") and float(line.split(",")[3]) > 0
    sft = other / "minilm" / "objectives" / "sft.py"
    sft.write_text(sft.read_text().replace("return loss, vjp", "return 2 * loss, vjp"))
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "minilm and other do not compute the same: loss differs" in run.stderr


@pytest.mark.parametrize("given, message", [(SCRIPTS.parent, "is this checkout"), (SCRIPTS, "is no checkout")])
def test_the_other_version_is_another_checkout(given, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "bench" / "train.py")])
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        measuring.checkout(str(given))


def test_works_are_options_like_sizes_and_some_sizes_run_only_if_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench"])
    asked = measuring.arguments("", ["tiny", "8M"], ["trl"], ["sft", "dpo"], unasked=["tiny"])
    assert (asked.works, asked.sizes, asked.peers) == (["sft", "dpo"], ["8M"], ["trl"])
    monkeypatch.setattr(sys, "argv", ["bench", "--works=ppo", "--sizes=tiny"])
    with pytest.raises(UsageError, match="no work 'ppo'; there are sft, dpo"):
        measuring.arguments("", ["tiny", "8M"], ["trl"], ["sft", "dpo"], unasked=["tiny"])


@pytest.mark.parity
def test_a_step_of_every_objective_equals_trls_and_is_timed(tmp_path):
    pytest.importorskip("trl", reason="parity with TRL needs it: pip install trl==1.16.0")
    run = subprocess.run([sys.executable, SCRIPTS / "bench" / "objectives.py", "--sizes", "tiny", "--peers", "trl-best",
                          "--rounds", "1", "--csv", tmp_path / "ratios.csv"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    header, *ratios = (line.split(",") for line in (tmp_path / "ratios.csv").read_text().splitlines())
    assert header == measuring.HEADER
    assert [row[:3] for row in ratios] == [[f"{work} step", "tiny", "trl-best"] for work in ("SFT", "DPO", "RLOO")]
    assert all(float(ratio) > 0 for row in ratios for ratio in row[3:])


@pytest.fixture
def small_gguf(tmp_path):
    """A GGUF file that llama.cpp opens, with a Llama of 21 thousand numbers."""
    pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")
    from test_pretrained import SHAPES, as_gguf, model_of
    model = model_of({**SHAPES["as SmolLM2"], "context": 512})
    for name, p in model.parameters().items():
        if not name.endswith("norm"):
            p.data *= 0.4
    uint32, int32 = (b"tokenizer.ggml.token_type" + struct.pack("<II", 9, code) for code in (4, 5))
    (tmp_path / "model.gguf").write_bytes(as_gguf(model).replace(uint32, int32))
    return tmp_path / "model.gguf"


def ratios_of_align(*options):
    """The rows of the CSV, without its header."""
    path = options[1].parent / "ratios.csv"
    run = subprocess.run([sys.executable, SCRIPTS / "bench" / "align.py", *options, "--rounds", "1", "--csv", path],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    header, *rows = (line.split(",") for line in path.read_text().splitlines())
    assert header == measuring.HEADER and all(float(ratio) > 0 for row in rows for ratio in row[3:6])
    return rows


@pytest.mark.parity
def test_a_step_of_adapters_of_every_objective_equals_trls_with_peft(small_gguf):
    pytest.importorskip("trl", reason="parity with TRL needs it: pip install trl==1.16.0")
    pytest.importorskip("peft", reason="needs peft: pip install peft")
    rows = ratios_of_align("--model", small_gguf, "--works", "sft-adapters,dpo-adapters,rloo-adapters")
    assert [row[:3] for row in rows] == [[f"{work} step of adapters", "0.0214M", "trl-best"]
                                         for work in ("SFT", "DPO", "RLOO")]


@pytest.mark.parity
@pytest.mark.parametrize("peer, package", [("hf", "transformers"), ("llama.cpp", "xllamacpp"),
                                           ("llama.cpp-as-is", "xllamacpp")])
def test_a_model_of_a_file_has_the_log_probs_of_transformers_and_llama_cpp(small_gguf, peer, package):
    for name in (package, "gguf"):
        pytest.importorskip(name, reason=f"needs {name}: pip install {name}")
    rows = ratios_of_align("--model", small_gguf, "--works", "sampling", "--peers", peer, "--threads", "1")
    assert [row[:3] for row in rows] == [["sampling", f"B{B} 1 thread", peer] for B in (1, 4)]


def test_the_products_of_a_step_are_those_of_every_weight_for_any_number_of_threads():
    V, D, L, H, T, B = measuring.SIZES["XS"]
    model = Transformer(Config(vocab_size=V, width=D, layers=L, heads=H), np.random.default_rng(0))
    weights = sum(p.size for name, p in model.parameters().items() if p.ndim == 2 and name != "embedding")
    assert bench_gemm.flops("XS") == 6 * B * T * weights
    for threads in (1, 3):
        assert bench_gemm.flops("XS") == sum(
            2 * a.shape[0] * a.shape[1] * b.shape[1] * times
            for mine in bench_gemm.products("XS", threads, out_first=False) for a, b, _, times in mine)
    results = [bench_gemm.multiplying("XS", np.matmul, threads, out_first=out_first)[1]()
               for threads, out_first in ((1, False), (3, False), (1, True))]
    for name, expected in results[0].items():
        for other in results[1:]:
            assert np.abs(other[name] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_step_is_compared_with_its_products_in_the_table():
    rows = [{"size": "XS", "flops": 2e9, "step_ms": 40.0, "compared": [row(ours_ms=10.0, theirs_ms=20.0)]}]
    assert bench_gemm.table(rows).splitlines()[2] == "| XS | 2 | 200 | 100 | 40.0 ms | 25% |"


def test_exponents_fit_a_power_law_and_the_number_of_tokens_is_constant_when_t_grows():
    T = np.array(bench_scaling.POINTS["T"])
    assert bench_scaling.exponent(T, 0.3 * T ** 1.25) == pytest.approx(1.25)
    assert all(t * b == 8192 for *_, t, b in (bench_scaling.shape("T", int(t)) for t in T))
    assert bench_scaling.shape("V", 512) == (512, 64, 2, 4, 128, 16)


def test_memory_above_the_limit_is_reported():
    for peak, words in ((1023.0, "1023 MiB at the peak, under"), (1025.0, "1025 MiB at the peak, NOT UNDER")):
        assert words in bench_scaling.verdict({"variable": "T", "value": 8192, "peak_mb": peak})


def test_scaling_measures_every_point_in_a_process_of_its_own(tmp_path):
    run = subprocess.run([sys.executable, SCRIPTS / "bench" / "scaling.py", "--variables", "B", "--quick",
                          "--rounds", "1", "--csv", tmp_path / "points.csv"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    header, *points = (line.split(",") for line in (tmp_path / "points.csv").read_text().splitlines())
    assert header == bench_scaling.HEADER and [point[:2] for point in points] == [["B", "1"], ["B", "2"], ["B", "4"]]
    times, peaks = ([float(point[column]) for point in points] for column in (2, 3))
    assert min(times) > 0 and 0 < peaks[0] < peaks[2]
    assert float(points[0][5]) == pytest.approx(bench_scaling.exponent([1, 2, 4], peaks), abs=1e-3)


def test_two_ranks_send_4n_bytes_each_and_more_ranks_at_most_8n():
    assert bench_processes.exchanged(1000, 1) == 0 and bench_processes.exchanged(1000, 2) == 4000
    assert bench_processes.exchanged(1000, 1024) == pytest.approx(8000, rel=1e-3)
    assert bench_processes.communication(1000, 8, calls=5, link=(1e3, 1e-2)) == pytest.approx(7 + 2 * 5 * 3 * 1e-2)
    assert bench_processes.communication(1000, 8, calls=5, link=bench_processes.FREE) == 0


def test_an_engine_that_cannot_run_here_is_named_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(bench_processes, "can_fork", lambda: False)
    monkeypatch.setattr(bench_processes.network, "mpiexec", lambda: None)
    assert bench_processes.present() == ["one"]
    printed = capsys.readouterr().out
    assert "forked: skipped, this system cannot fork" in printed
    assert all(f"{engine}: skipped, needs mpi4py and mpiexec" in printed for engine in ("mpi", "network"))


def test_the_ranks_of_an_engine_compute_the_gradient_of_one_process(monkeypatch):
    """As the benchmark checks it before timing, for forked ranks; wrong ones are not timed."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "bench" / "processes.py")])
    monkeypatch.setattr(measuring, "wait_until_quiet", lambda: None)
    rows = bench_processes.measure("small", "sft", ["one", "forked"], {"forked": bench_processes.FREE}, None, 1, 0.01)
    assert [row["engine"] for row in rows] == ["one", "forked"] and rows[0]["numbers"] == 233_088
    assert rows[1]["model_ms"] == pytest.approx(rows[0]["ms"] / 2) and min(row["ms"] for row in rows) > 0


def test_every_engine_that_can_run_here_is_measured_and_ends_without_a_word():
    run = subprocess.run([sys.executable, SCRIPTS / "bench" / "processes.py", "--quick", "--works", "exchange"],
                         capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr and "error" not in run.stderr, run.stderr
    rows = [line.split("|") for line in run.stdout.splitlines() if line.startswith("| 233,088 | exchange")]
    engines = [row[3].strip() for row in rows]
    wanted = ["forked", "mpi"] if bench_processes.network.mpiexec() else ["forked"]
    assert engines[:len(wanted)] == wanted


def test_an_unknown_variable_raises_with_the_known_ones():
    run = subprocess.run([sys.executable, SCRIPTS / "bench" / "scaling.py", "--variables", "T,H"],
                         capture_output=True, text=True)
    assert run.returncode != 0 and "no variable 'H'; there are T, B, V, D" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parity
def test_matrix_products_are_the_same_in_pytorch_and_are_timed(tmp_path):
    pytest.importorskip("torch", reason="parity needs PyTorch: pip install torch")
    run = subprocess.run([sys.executable, SCRIPTS / "bench" / "gemm.py", "--sizes", "XS", "--rounds", "1",
                          "--csv", tmp_path / "ratios.csv"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    header, *ratios = (line.split(",") for line in (tmp_path / "ratios.csv").read_text().splitlines())
    assert header == measuring.HEADER
    assert [row[:3] for row in ratios] == [
        ["matrix products", "XS", "blas-threads"], ["matrix products", "XS", "torch"],
        ["training step", "XS", "its products alone"]]
    assert float(ratios[2][3]) > 1
    assert all(float(row[3]) > 0 and row[6] == "nan" for row in ratios)


@pytest.mark.parity
def test_minilms_samples_have_the_log_probs_of_hugging_face_and_pytorch_with_their_caches(tmp_path):
    pytest.importorskip("transformers", reason="parity needs transformers: pip install transformers")
    run = subprocess.run([sys.executable, SCRIPTS / "bench" / "generate.py", "--sizes", "B1", "--peers", "hf,torch",
                          "--rounds", "1", "--csv", tmp_path / "ratios.csv"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ratios = [line.split(",") for line in (tmp_path / "ratios.csv").read_text().splitlines()[1:]]
    assert [row[:3] for row in ratios] == [["sampling", "B1", peer] for peer in ("hf", "torch")]
    assert all(float(ratio) > 0 for row in ratios for ratio in row[3:])


def test_the_table_of_goals_has_every_goal_with_its_verdict_or_not_measured(tmp_path, monkeypatch, capsys):
    measuring.write_csv(tmp_path / "train.csv", [row(size="S", time_ratio=0.99), row(size="M", memory_ratio=0.7)])
    (tmp_path / "scaling.csv").write_text("variable,value,time_exponent,memory_exponent\n"
                                          "T,4096,1.6,0.9\nT,8192,1.6,0.9\nB,64,1.0,1.0\n")
    monkeypatch.setattr(sys, "argv", ["bench_table", str(tmp_path), "--print"])
    bench_table.main()
    lines = capsys.readouterr().out.splitlines()
    assert "| training step | S | torch | 0.99 [0.40, 0.60] | 1.00 | yes | 0.25 | 0.6 | yes |" in lines
    assert "| training step | M | torch | 0.50 [0.40, 0.60] | 1.00 | yes | 0.70 | 0.6 | **no** |" in lines
    assert "| training step | XS | torch | not measured | 0.80 | | | | |" in lines
    assert "| time of a step of 8192 tokens | T to 8192 | | T^1.60 | T^1.5 | **no** | | | |" in lines
    goals = sum(len(sizes) for _, _, sizes in bench_table.GOALS)
    assert sum(line.count("not measured") for line in lines) == goals - 2
    assert "The machine was not recorded." in lines


def test_a_table_without_results_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_table", str(tmp_path), "--print"])
    with pytest.raises(UsageError, match="has no results"):
        bench_table.main()


def test_the_plain_peer_of_the_kernels_gives_the_same_results_every_time(emulated, rng):
    q, k, v, do = (emulated.asarray(rng.normal(size=(2, 2, 9, 16))) for _ in range(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_attention, "K", 16)
        plan = bench_attention.attention.batch_plan(emulated, q.shape, k.shape, True)
        ours, our_backward = bench_attention.ours(q, k, v, do, plan)
        plain, backward = bench_attention.plain(q, k, v, do)
        assert_close(ours.get(), plain.get())
        for _ in range(2):
            for a, b in zip(our_backward(), backward()):
                assert_close(a.get(), b.get())


def test_the_kernels_in_bf16_that_are_timed_agree_with_those_in_float32(emulated, rng):
    arrays = [rng.normal(size=(2, 2, 70, 32)).astype(np.float32) for _ in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_attention, "K", 32)
        plan = bench_attention.attention.batch_plan(emulated, arrays[0].shape, arrays[0].shape, True)
        exact, rounded = (bench_attention.both(lambda: call(*map(emulated.asarray, given), plan)) for call, given in (
            (bench_attention.ours, arrays), (bench_attention.ours_bf16, map(bench_attention.to_bf16, arrays))))
    for a, b in zip(exact, rounded, strict=True):
        a, b = a.get(), b.get()
        assert b.dtype == np.float32 and abs(a - b).max() < bench_attention.BF16_TOLERANCE * abs(a).max()


class OutOfMemoryError(Exception):
    pass


def test_on_a_gpu_peers_that_fit_and_agree_with_the_first_are_timed(capsys):
    released = []
    pool = types.SimpleNamespace(free_all_blocks=lambda: released.append("all"))
    cupy = types.SimpleNamespace(get_default_memory_pool=lambda: pool)
    def too_large():
        raise OutOfMemoryError
    right, close, wrong = (lambda by=by: [np.arange(3.0), np.ones(2) + by] for by in (0, 1e-6, 1e-3))
    peers = {"ours": right, "large": too_large, "theirs": close}
    assert [*gpu_measuring.those_that_agree(cupy, peers, lambda call: call(), 1e-4)] == ["ours", "theirs"]
    assert capsys.readouterr().out == "large: does not fit this device\n" and len(released) == 3
    with pytest.raises(ValueError, match="theirs: result 1 differs from ours by 1.0e-03 of its largest entry"):
        gpu_measuring.those_that_agree(cupy, {"ours": right, "theirs": wrong}, lambda call: call(), 1e-4)


def test_without_a_gpu_the_bytes_are_printed_and_the_reason_why_nothing_is_timed(capfd, monkeypatch):
    reports = []
    monkeypatch.setattr(gpu_measuring, "gpu", lambda: (None, "no GPU here"))
    monkeypatch.setattr(gpu_measuring.subprocess, "run", reports.append)
    for script, options, line in ((bench_attention, ["--lengths", "128"], "| 128 | backward | 20.1 |"),
                                  (bench_log_probs, ["--vocabularies", "4096"], "| 4096 | forward | 67.2 |")):
        monkeypatch.setattr(sys, "argv", [script.__name__, *options])
        script.main()
        printed = capfd.readouterr().out
        assert line in printed and "Not timed: no GPU here" in printed
    assert [report[3] for report in reports] == ["attention,attention_bf16,decode", "log_probs"]


@pytest.mark.parametrize("script, option", [("bench_attention", "--lengths"), ("bench_log_probs", "--vocabularies")])
@pytest.mark.parametrize("value", ["0", "x", "128,", "-3"])
def test_sizes_that_are_not_positive_numbers_raise(script, option, value, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, option, value])
    with pytest.raises(UsageError, match=option):
        {"bench_attention": bench_attention, "bench_log_probs": bench_log_probs}[script].main()
