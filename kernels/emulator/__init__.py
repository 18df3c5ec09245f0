"""CUDA on the CPU: runs .cu files unchanged on a machine with g++ and without a GPU.

    with as_cupy() as cupy:                 # import cupy now finds a mock; its RawModule is the emulator
        with checked() as launches:         # a mistake of a kernel raises Fault
            ...                             # outside of it kernels run fast and unchecked
        launches[-1].traffic                # bytes that each argument was read and written, exactly

The checkers find: accesses outside of an array, misaligned accesses, writes to const, reads of memory that nothing has
written, data races, barriers that not all threads reach, wrong masks of warp operations, undefined behaviour, endless
loops. Races are found by happens-before, so also where every schedule gives the right numbers. An endless loop is found
without the checkers too, by the time that a block takes: fast(seconds=60).

From the command line (--help lists the modules and their sizes):

    python -m minilm.kernels.emulator attention --T 33 [--debug]
    python -m minilm.kernels.emulator kernels/emulator/examples/vecsum.cu --x arange:300 --out 3 --n 300

A fault is printed alone. For example, delete the __syncthreads() of attention.cu with the comment "all threads are done
with the last tile"; the first command then prints (g++ 12; another compiler may find another pair of threads first):

    attention.cu:49 (called at attention.cu:121): data race

      -> attention.cu:49    tile[row][d + e] = row < count ? scale * at_row[e] : real(0);
         attention.cu:121   load<COLS>(sK, k, places, K, first + j0, head / group, count, 1);
      -> attention.cu:63    for (int j = 0; j < COLS_A_THREAD; ++j) of_b[j] = b[tx + 8 * j][d];
         attention.cu:126   rows_by_rows(S, sQ, sK, ty, tx);

    kernel attention_forward, block (0, 0, 0), thread (7, 0, 0)
    writes dynamic shared memory at byte 8476, which thread (120, 0, 0) read at attention.cu:63 (called
    at attention.cu:126) with no barrier between

Supported CUDA: the language as NVRTC compiles it without headers; __global__, __device__, __shared__ (one variable in a
declaration), __launch_bounds__, templates; __syncthreads and its votes, __syncwarp, ballots, votes and shuffles with a
mask; atomics on int, unsigned, unsigned long long, float, double; float2, float4, double2, double4, int2, int4, uint2,
uint4; the functions of mathematics and conversion; __ldg, printf, assert, __trap; bf16, tensor cores and asynchronous
copies through the functions of kernels/tensor.cuh. Not supported, and named in the error: other headers, cooperative
groups, half, other inline PTX, textures, clocks, allocation on the device, blocks that are not whole warps.

The emulator is no GPU. It says nothing about speed, occupancy or coalescing. Its exp and its sums differ from those of
a device in the last bits; multiplications and additions are fused only where the source has fma, or, as compilers for
a GPU do, everywhere: with contracted().

Reading order: device.h (the interface of a kernel), scheduler.cpp (threads and barriers), races.h and memory.cpp (the
checkers), tensor_cores.cpp and copies.cpp (tensor.cuh), endless.cpp, build.py, module.py, running.py, fault.py,
programs.py, puzzles.py.
"""

from minilm.kernels.emulator.build import CompileError, Unsupported, available
from minilm.kernels.emulator.cupy import as_cupy
from minilm.kernels.emulator.fault import Fault
from minilm.kernels.emulator.module import RawModule
from minilm.kernels.emulator.running import Launch, checked, contracted, debug, fast, poison, shared_traffic, traffic
from minilm.kernels.emulator.work import Work, counted

__all__ = ["CompileError", "Fault", "Launch", "RawModule", "Unsupported", "Work", "as_cupy", "available", "checked",
           "contracted", "counted", "debug", "fast", "poison", "shared_traffic", "traffic"]
