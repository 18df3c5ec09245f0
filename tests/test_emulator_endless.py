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


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_that_ends_is_no_fault_and_each_block_has_a_limit_of_its_own(emulated, name):
    with emulator.checked(steps=5000):
        for _ in range(10):
            launch(emulated, name, 1)
    with emulator.fast(seconds=0.05):
        began = time.process_time()
        while time.process_time() - began < 0.1:
            launch(emulated, name, 1)


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
