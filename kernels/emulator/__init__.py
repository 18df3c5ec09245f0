"""CUDA on CPU: runs the kernels of this package, as their .cu files are, on a machine with g++ and no GPU.

    with as_cupy() as cupy:                     # import cupy now finds a stand-in; its RawModule is the emulator's
        with checked() as launches:             # bounds, alignment, races, barriers, undefined behaviour: a Fault
            ...                                 # outside of it kernels run fast, and unchecked
        launches[-1].traffic                    # bytes that each argument was read and written, exactly

    python -m minilm.kernels.emulator attention --T 33 [--debug]

A reading order: device.h (what a kernel sees), scheduler.cpp (threads and barriers), races.h and memory.cpp (the
checkers), build.py, module.py, running.py. It is no GPU: it tells nothing of speed, occupancy or coalescing, and its
exp and its sums (no fused multiply-add unless asked for) differ from a device's in the last bits.
"""

from minilm.kernels.emulator.build import CompileError, available
from minilm.kernels.emulator.cupy import as_cupy
from minilm.kernels.emulator.module import Fault, RawModule
from minilm.kernels.emulator.running import Launch, checked, debug, fast, poison, shared_traffic, traffic

__all__ = ["CompileError", "Fault", "Launch", "RawModule", "as_cupy", "available", "checked", "debug", "fast",
           "poison", "shared_traffic", "traffic"]
