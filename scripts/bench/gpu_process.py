"""A library on a GPU, in a process of its own: when its steps have ended, and how much memory of the device it needs.

A GPU executes a queue of kernels, and Python runs ahead of it. So the clock is read when the queue is empty: before the
first step of a turn and after the last one. A turn gives one time, the mean of its steps.

Memory is the peak of the bytes that the library's arrays have during the steps of the warm-up: of CuPy's memory pool,
and torch.cuda.max_memory_allocated. Memory that a pool keeps for later, and that of the CUDA context, is not in it.
Tests: tests/test_gpu_process.py.
"""

import contextlib
import time

import numpy as np

from minilm.backend import to_numpy
from minilm.fast import workers

WARM_UP = 3             # steps before the first turn: kernels are compiled, and pools filled
TORCH = "cuda"          # PyTorch's device; "cpu" in tests, beside minilm on the emulator


class ByCuPy:
    """minilm's side of the measurement."""

    def __init__(self):
        import cupy
        self.cupy = cupy

    def finish(self):
        self.cupy.cuda.Device().synchronize()

    @contextlib.contextmanager
    def watching(self):
        """Within it, allocations are watched. Yields a function that gives the peak so far, in bytes."""
        pool = self.cupy.get_default_memory_pool()

        class Watch(self.cupy.cuda.MemoryHook):
            name = "minilm's peak"
            peak = pool.used_bytes()

            def malloc_postprocess(self, **_):
                self.peak = max(self.peak, pool.used_bytes())

        with Watch() as watch:
            yield lambda: watch.peak


class ByTorch:
    """The same for libraries that use PyTorch. device: the name of PyTorch's device."""

    def __init__(self, device):
        import torch
        self.cuda = torch.cuda
        self.module = torch.get_device_module(device)

    def finish(self):
        self.module.synchronize()

    @contextlib.contextmanager
    def watching(self):
        if self.cuda.is_available():
            self.cuda.reset_peak_memory_stats()
        yield self.cuda.max_memory_allocated


class Gpu:
    """The GPU for serve() of library_process.py."""

    def __init__(self, library):
        self.library = library
        self.memory = None

    def peak(self):
        """Bytes; 0 before the first step."""
        return self.memory or 0

    def times(self, step, count):
        """The mean time of `count` steps in seconds, as a list of one. The first call warms up before it."""
        if self.memory is None:
            with self.library.watching() as peak:
                for _ in range(WARM_UP):
                    step()
                self.library.finish()
                self.memory = peak()
        self.library.finish()
        began = time.perf_counter()
        for _ in range(count):
            step()
        self.library.finish()
        return [(time.perf_counter() - began) / count]


def device_of(spec, name):
    """The Gpu of a worker's spec, for the library of this name."""
    return Gpu(ByCuPy() if name == "minilm" else ByTorch(spec["torch"]))


def torch_device(spec):
    """PyTorch's device of a worker's spec."""
    return spec.get("torch", "cpu")


def cores(spec):
    """How many processes minilm uses: one for each core, or one beside a GPU."""
    return 1 if spec.get("device") == "gpu" else workers.available_cores()


def gradients(spec, named):
    """Gradients by name, as NumPy arrays, for the comparison; of a GPU with the norm of all of them."""
    found = {name: to_numpy(g) for name, g in named.items()}
    if spec.get("device") == "gpu":
        found["norm of the gradient"] = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in found.values()))
    return found


def on_gpu(model, spec):
    """minilm's model where the spec of a worker says, and in its precision. Returns the model."""
    return model.to_device("gpu", spec["compute"]) if spec.get("device") == "gpu" else model


def autocast(spec):
    """PyTorch's mixed precision if the spec asks for bf16: as minilm's, float32 parameters and bf16 products."""
    import torch
    return torch.autocast(torch_device(spec), torch.bfloat16, enabled=spec.get("compute") == "bfloat16")


def torch_for_sampling(model, spec):
    """A module of PyTorch on its device, for inference; in bf16 with weights of bf16, as is usual there."""
    import torch
    dtype = torch.bfloat16 if spec.get("compute") == "bfloat16" else torch.float32
    return model.eval().to(torch_device(spec), dtype)
