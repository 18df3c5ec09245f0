"""The emulator as a GPU for the benchmarks: what they call of CuPy beyond minilm, on the emulator's mock.

    emulated_gpu.install(monkeypatch, folder)

In this process and in those that it starts `import cupy` finds the mock, with the functions of ADDED. These measure
nothing: the memory is that of a pool that grows with each question. Tests: tests/test_gpu_benchmarks.py.
"""

import os
import sys
import time
import types
from pathlib import Path

import numpy as np

from minilm.kernels.emulator.arrays import backing, ndarray
from minilm.kernels.emulator.cupy import cupy
from minilm.kernels.emulator.stream import Device, finish_copies

SHIM = """import sys
sys.path.append({tests!r})
import emulated_gpu
emulated_gpu.add(lambda owner, name, value: setattr(owner, name, value))
sys.modules["cupy"] = emulated_gpu.cupy
"""


class CUDARuntimeError(RuntimeError):
    pass


class Pool:
    """A memory pool that has 1000 bytes more at each question."""

    bytes = 0

    def used_bytes(self):
        Pool.bytes += 1000
        return Pool.bytes

    total_bytes = used_bytes

    def free_all_blocks(self):
        pass


class MemoryHook:
    """One allocation, when the block begins."""

    def __enter__(self):
        self.malloc_postprocess(device_id=0, size=1, mem_size=512, mem_ptr=1, pmem_id=1)
        return self

    def __exit__(self, *_):
        pass


class Generator:
    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def standard_normal(self, size, dtype):
        return ndarray(self.generator.standard_normal(size, dtype))

    def integers(self, low, high, size):
        return ndarray(self.generator.integers(low, high, size))


def benchmark(func, args=(), kwargs=None, n_repeat=10000, *, name=None, n_warmup=10, max_duration=np.inf):
    times = []
    for _ in range(2):
        began = time.perf_counter()
        func()
        times.append(time.perf_counter() - began)
    return types.SimpleNamespace(gpu_times=np.array([times]))


RUNTIME = types.SimpleNamespace(
    CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: 1, runtimeGetVersion=lambda: 13000,
    driverGetVersion=lambda: 13010, getDeviceProperties=lambda device: {"name": b"the emulator"})
# Names of CuPy, and what stands for them here.
ADDED = {
    "cuda.runtime": RUNTIME, "cuda.MemoryHook": MemoryHook, "get_default_memory_pool": Pool,
    "cuda.Device.id": 0, "cuda.Device.synchronize": lambda self: finish_copies(),
    "random": types.SimpleNamespace(default_rng=Generator),
    "full": lambda shape, value, dtype: ndarray(np.full(shape, value, dtype)),
    "copyto": lambda dst, src, where=True: np.copyto(backing(dst), backing(src), where=backing(where)),
    "from_dlpack": lambda array: ndarray(np.from_dlpack(array)),
    "ndarray.__dlpack__": lambda self, **options: self._backing.__dlpack__(**options),
    "ndarray.__dlpack_device__": lambda self: self._backing.__dlpack_device__(),
    "ndarray.__abs__": lambda self: ndarray(abs(self._backing)),
}


def add(put):
    """Add the names; put is setattr, or that of pytest's monkeypatch."""
    for name, value in ADDED.items():
        owner = cupy
        *path, last = name.split(".")
        for part in path:
            owner = Device if part == "Device" else getattr(owner, part)
        put(owner, last, value)


def install(monkeypatch, folder):
    """Until the end of the test, here and in the processes that are started."""
    add(lambda owner, name, value: monkeypatch.setattr(owner, name, value, raising=False))
    profiler = types.ModuleType("cupyx.profiler")
    profiler.benchmark = benchmark
    monkeypatch.setitem(sys.modules, "cupyx", types.ModuleType("cupyx"))
    monkeypatch.setitem(sys.modules, "cupyx.profiler", profiler)
    shim = Path(folder) / "cupy"
    shim.mkdir()
    (shim / "__init__.py").write_text(SHIM.format(tests=str(Path(__file__).parent)))
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
