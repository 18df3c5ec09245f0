"""How the benchmarks measure on a GPU: when the clock is read, which results agree, which library names they use."""

import contextlib
import inspect
import types

import numpy as np
import pytest

import emulated_gpu
import gpu_process
import measuring
from support.run_folder import UsageError


@pytest.mark.parametrize("theirs, allowed", [(1.0, True), (1.04, True), (1.06, False), (-1.0, False)])
def test_gradients_in_bf16_are_compared_together_by_norm_and_numbers_by_themselves(theirs, allowed):
    """One small gradient may be quite another; a wrong factor is found by the norm of all."""
    def worker(name, factor, small=1.0, loss=2.0):
        results = {"loss": np.array(loss), "w": factor * np.ones(100), "norm": small * np.ones(1) * 0.01}
        return types.SimpleNamespace(name=name, results=results)
    ours = worker("minilm", 1.0)
    with contextlib.nullcontext() if allowed else pytest.raises(UsageError, match="gradients differ by"):
        measuring.check_results(ours, worker("torch", theirs, small=-1.0), (0.05, 1e-3))
    with pytest.raises(UsageError, match="loss differs by"):
        measuring.check_results(ours, worker("torch", 1.0, loss=2.01), (0.05, 1e-3))


def test_the_queue_is_empty_when_the_clock_is_read_and_a_turn_gives_the_mean_of_its_steps(monkeypatch):
    events, clock = [], iter([10.0, 16.0])
    library = types.SimpleNamespace(finish=lambda: events.append("finish"),
                                    watching=lambda: contextlib.nullcontext(lambda: 7))
    def read():
        events.append("clock")
        return next(clock)
    monkeypatch.setattr(gpu_process.time, "perf_counter", read)
    device = gpu_process.Gpu(library)
    assert device.times(lambda: events.append("step"), 3) == [2.0] and device.peak() == 7
    assert events == 3 * ["step"] + 2 * ["finish"] + ["clock"] + 3 * ["step"] + ["finish", "clock"]


def test_the_names_of_cupy_that_the_benchmarks_add_to_the_mock_are_those_of_the_real_package():
    real = pytest.importorskip("cupy", reason="needs CuPy, without a GPU: pip install cupy-cuda13x")
    for name, mine in emulated_gpu.ADDED.items():
        there = real
        for part in name.split("."):
            there = getattr(there, part)
        if name == "cuda.runtime":
            assert all(hasattr(there, member) for member in vars(mine))
    assert {"malloc_postprocess", "__enter__", "__exit__", "name"} <= set(dir(real.cuda.MemoryHook))
    assert {"used_bytes", "total_bytes", "free_all_blocks"} <= set(dir(real.cuda.MemoryPool))
    from cupyx.profiler import benchmark
    assert [*inspect.signature(emulated_gpu.benchmark).parameters] == [
        name for name in inspect.signature(benchmark).parameters if name != "devices"]


def test_pytorch_has_the_names_of_its_cuda_that_the_benchmarks_use():
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    for name in ("synchronize", "max_memory_allocated", "reset_peak_memory_stats", "is_available", "empty_cache"):
        assert callable(getattr(torch.cuda, name))
    assert torch.get_device_module("cuda") is torch.cuda
    assert {"EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION", "MATH"} <= set(
        torch.nn.attention.SDPBackend.__members__)
