"""Endless loops in kernels: a fault with the thread, the line, and how often it came round; long loops are none."""
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from minilm.kernels import emulator
from minilm.kernels.emulator import Fault

pytestmark = pytest.mark.skipif(emulator.available() is not None, reason=f"{emulator.available()}")

# A kernel ends if step is 1, and never if it is 0. Its line LINE name is in the innermost loop.
KERNELS = r"""
#define KERNEL(name) extern "C" __global__ void name(float* y, int n, int step)
__device__ unsigned helper(int n, int step) {
    unsigned sum = 0;
    for (int i = 0; i < n; i += step) sum += i;                         // LINE in_a_function
    return sum;
}
KERNEL(that_writes) {
    for (int i = threadIdx.x; i < n; i += step) y[threadIdx.x] = i;     // LINE that_writes
}
KERNEL(of_one_thread) {
    while (threadIdx.x == 5 && step == 0) {}                            // LINE of_one_thread
    y[threadIdx.x] = 1;
}
KERNEL(with_a_barrier) {
    for (int i = 0; i < n; i += step) __syncthreads();                  // LINE with_a_barrier
}
KERNEL(with_a_warp_operation) {
    for (int i = 0; i < n; i += step) __shfl_xor_sync(0xffffffffu, i, 1);       // LINE with_a_warp_operation
}
KERNEL(of_two_loops) {
    for (int i = 0; i < n; i += step)
        for (int j = 0; j < 10; ++j) y[threadIdx.x] += j;               // LINE of_two_loops
}
KERNEL(in_a_function) { y[threadIdx.x] = helper(n, step); }
KERNEL(of_a_goto) {
again:
    y[threadIdx.x] += 1;                                                // LINE of_a_goto
    if (step == 0) goto again;                                          // LINE of_a_goto
}
"""
NAMES = re.findall(r"KERNEL\((\w+)\) \{", KERNELS)
LINES = {name: [i for i, line in enumerate(KERNELS.splitlines(), 1) if line.endswith(f"LINE {name}")] for name in NAMES}


def launch(cupy, name, step, n=64):
    function = cupy.RawModule(code=KERNELS).get_function(name)
    function((1,), (64,), (cupy.zeros(64, np.float32), np.int32(n), np.int32(step)))


@pytest.mark.parametrize("name", NAMES)
def test_a_checked_endless_loop_is_named_with_its_thread_its_line_and_its_rounds(emulated, name):
    with emulator.checked(steps=100_000), pytest.raises(Fault, match="endless loop") as found:
        launch(emulated, name, 0)
    fault = found.value
    assert int(re.match(r"kernel.cu:(\d+)", fault.where)[1]) in LINES[name], fault
    rounds, steps = map(int, re.search(r"about (\d+) times in (\d+) steps; at most 100000", fault.what).groups())
    assert steps / 4 <= rounds <= steps and (steps > 100_000 or name.startswith("with_"))
    assert fault.thread[0] < 64 and (name != "of_one_thread" or fault.thread[0] == 5)


@pytest.mark.parametrize("name", NAMES)
def test_a_fast_endless_loop_is_named_with_its_thread_and_its_line(emulated, name):
    with emulator.fast(seconds=0.2), pytest.raises(Fault, match="endless loop: the block has run for 0.2") as found:
        launch(emulated, name, 0)
    fault = found.value
    place = re.match(r"kernel.cu:(\d+)", fault.where)
    assert int(place[1]) in LINES[name] or name == "of_two_loops", fault
    assert fault.thread[0] < 64 and (name != "of_one_thread" or fault.thread[0] == 5)
    launch(emulated, name, 1)                           # the next launch is as if nothing had been


def test_an_endless_loop_that_is_interrupted_between_two_threads_is_named_by_its_barrier(emulated):
    for _ in range(30):         # one in five is interrupted in the assembly that switches from thread to thread
        with emulator.fast(seconds=0.02), pytest.raises(Fault, match="endless loop") as found:
            launch(emulated, "with_a_barrier", 0)
        assert int(re.match(r"kernel.cu:(\d+)", found.value.where)[1]) in LINES["with_a_barrier"]


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_that_ends_is_no_fault_and_each_block_has_a_limit_of_its_own(emulated, name):
    with emulator.checked(steps=5000):
        for _ in range(10):
            launch(emulated, name, 1)
    with emulator.fast(seconds=0.05):
        began = time.process_time()
        while time.process_time() - began < 0.1:
            launch(emulated, name, 1)


WITHOUT_STEPS = """
#define KERNEL(name) extern "C" __global__ void name(float* y, int n, int step)
KERNEL(a_goto_to_itself) { if (threadIdx.x != 5) return; again: goto again; }
KERNEL(an_empty_for) { for (;;); }
"""


@pytest.mark.parametrize("name", ["a_goto_to_itself", "an_empty_for"])
def test_a_checked_loop_without_instructions_is_named_by_the_clock(emulated, name):
    function = emulated.RawModule(code=WITHOUT_STEPS).get_function(name)
    with emulator.fast(seconds=0.2), emulator.checked(), pytest.raises(Fault, match="endless loop") as found:
        function((1,), (64,), (emulated.zeros(64, np.float32), np.int32(1), np.int32(0)))
    assert re.match(r"kernel.cu:[34]\b", found.value.where) and found.value.thread[0] < 64, found.value
    with emulator.fast(seconds=0.1), emulator.checked():            # a loop with steps may take longer
        launch(emulated, "that_writes", 1, 100_000)


RECURSION = """
__device__ int depth(int n, int end) { return n == end ? 0 : depth(n + 1, end) + 1; }
__device__ int large(int n) { volatile int a[100000]; a[n] = n; return a[n]; }
extern "C" __global__ void recursive(int* y, int end) { y[threadIdx.x] = depth(0, end); }
extern "C" __global__ void with_a_large_array(int* y, int n) { if (threadIdx.x == 40) y[threadIdx.x] = large(n); }
"""


@pytest.mark.parametrize("name, last", [("recursive", -1), ("with_a_large_array", 3)])
def test_a_stack_that_overflows_is_a_fault_with_its_thread_and_its_line(emulated, name, last):
    function = emulated.RawModule(code=RECURSION).get_function(name)
    with emulator.checked(), pytest.raises(Fault, match="stack overflow: .* of a thread's stack are used up") as found:
        function((1,), (64,), (emulated.zeros(64, np.int32), np.int32(last)))
    assert re.match(r"kernel.cu:[2345]\b", found.value.where), found.value
    y = emulated.zeros(64, np.int32)
    emulated.RawModule(code=RECURSION).get_function("recursive")((1,), (64,), (y, np.int32(100)))
    assert (y.get() == 100).all()


def test_by_default_both_builds_have_a_limit():
    from minilm.kernels.emulator.running import Setting
    assert 0 < Setting().steps < 1e9 and 0 < Setting().seconds <= 60


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), "x", None])
def test_a_limit_that_cannot_be_is_refused(limit):
    for call in (lambda: emulator.checked(steps=limit), lambda: emulator.fast(seconds=limit)):
        with pytest.raises((TypeError, ValueError), match="steps|seconds"):
            call()


def test_the_command_line_has_the_limit_as_an_option(tmp_path):
    declared = 'extern "C" __global__ void that_writes(float* y, int n, int step)'
    (tmp_path / "kernel.cu").write_text(KERNELS.replace("KERNEL(that_writes)", declared))
    done = subprocess.run([sys.executable, "-m", "minilm.kernels.emulator", tmp_path / "kernel.cu", "--y", "64",
                           "--kernel", "that_writes",
                           "--n", "64", "--step", "0", "--steps", "1000"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith(f"kernel.cu:{LINES['that_writes'][0]}: endless loop\n"), done
