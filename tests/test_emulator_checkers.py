"""Each checker of the emulator finds the fault planted for it and its line, and reports nothing without the fault.

FAULTS is one text of kernels that are right with fault = 0 and wrong with fault = 1. Its comments mark the line of each
fault (FAULT), the other access of a race (OTHER), and the call of a helper (CALL).
"""
import numpy as np
import pytest

from emulator_launches import SCHEDULES, run, zeros
from minilm.kernels import emulator

pytestmark = pytest.mark.skipif(emulator.available() is not None, reason=f"{emulator.available()}")

FAULTS = r"""
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(64) name(const float* x, float* y, int fault)
#define ALL 0xffffffffu

KERNEL(past_the_end) {
    int t = threadIdx.x;
    y[t] = x[t + fault];                        // FAULT past_the_end
}
KERNEL(before_the_start) {
    y[(int)threadIdx.x - fault] = 1;            // FAULT before_the_start
}
KERNEL(past_a_shared_array) {
    __shared__ float first[64];
    __shared__ float second[64];
    int t = threadIdx.x;
    float* p = first + fault;
    second[t] = 1;
    p[t] = 2;                                   // FAULT past_a_shared_array
}
KERNEL(past_dynamic_shared_memory) {
    extern __shared__ float all[];
    all[threadIdx.x + fault] = 1;               // FAULT past_dynamic_shared_memory
}
KERNEL(past_a_local_array) {
    float own[4];
    own[threadIdx.x % 4 + 4 * fault] = 1;       // FAULT past_a_local_array
    y[threadIdx.x] = own[threadIdx.x % 4];
}
KERNEL(the_variable_of_another_thread) {
    __shared__ unsigned long long where[64];
    float own = 1;
    where[threadIdx.x] = (unsigned long long)&own;
    __syncthreads();
    y[threadIdx.x] = *(float*)where[threadIdx.x ^ fault];   // FAULT the_variable_of_another_thread
}
KERNEL(misaligned) {
    float4 four = *(const float4*)(x + 4 * (threadIdx.x % 8) + fault);    // FAULT misaligned
    y[threadIdx.x] = four.x + four.y + four.z + four.w;
}
KERNEL(write_to_const) {
    float* from = (float*)x;
    if (fault) from[threadIdx.x] = 1;           // FAULT write_to_const
}
KERNEL(uninitialised_shared_memory) {
    __shared__ float tile[64];
    if (!(fault && threadIdx.x == 5)) tile[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = tile[63 - threadIdx.x];    // FAULT uninitialised_shared_memory
}
KERNEL(what_the_last_block_left_in_shared_memory) {
    __shared__ float tile[64];
    if (!fault || blockIdx.x == 0) tile[threadIdx.x] = 1;
    y[threadIdx.x + 64 * blockIdx.x] = tile[threadIdx.x];   // FAULT what_the_last_block_left_in_shared_memory
}
KERNEL(uninitialised_global_memory) {
    if (!fault) y[threadIdx.x] = 0;
    y[threadIdx.x] += 1;                        // FAULT uninitialised_global_memory
}
KERNEL(no_barrier_before_a_read) {
    __shared__ float tile[64];
    int t = 63 - threadIdx.x;                   // in the forward schedule the threads that are read run first
    tile[threadIdx.x] = 0;
    __syncthreads();
    tile[threadIdx.x] = x[threadIdx.x];         // FAULT no_barrier_before_a_read
    if (!fault) __syncthreads();
    y[threadIdx.x] = tile[t];                   // OTHER no_barrier_before_a_read
}
KERNEL(no_barrier_before_the_next_tile) {
    __shared__ float tile[64];
    float sum = 0;
    for (int i = 0; i < 2; ++i) {
        tile[threadIdx.x] = x[threadIdx.x];     // OTHER no_barrier_before_the_next_tile
        __syncthreads();
        sum += tile[threadIdx.x ^ 32];          // FAULT no_barrier_before_the_next_tile
        if (!fault) __syncthreads();
    }
    y[threadIdx.x] = sum;
}
KERNEL(no_warp_barrier) {
    __shared__ float tile[64];
    __syncwarp();                               // a barrier before the write does not help
    tile[threadIdx.x] = x[threadIdx.x];         // OTHER no_warp_barrier
    float neighbour = __shfl_xor_sync(ALL, x[threadIdx.x], 1);
    if (!fault) __syncwarp();
    y[threadIdx.x] = tile[threadIdx.x ^ 1] - neighbour;     // FAULT no_warp_barrier
}
KERNEL(a_barrier_of_half_the_lanes) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];         // OTHER a_barrier_of_half_the_lanes
    unsigned low = 0xffff, mask = threadIdx.x & 16 ? ~low : low;
    __syncwarp(mask);                           // lanes 0 to 15, and 16 to 31
    if ((threadIdx.x & 31) == 15 || (threadIdx.x & 31) == 16) __syncwarp(0x18000);
    if (!fault) __syncwarp(mask);               // lane 0 knows of lane 31 through 15 and 16
    y[threadIdx.x] = tile[threadIdx.x ^ 31];    // FAULT a_barrier_of_half_the_lanes
}
KERNEL(the_last_to_read_writes) {
    __shared__ float one;
    if (threadIdx.x == 0) one = 1;
    __syncthreads();
    y[threadIdx.x] = one;                       // OTHER the_last_to_read_writes
    if (!fault) __syncthreads();
    if (threadIdx.x == 62) one = 2;             // FAULT the_last_to_read_writes
}
KERNEL(the_last_to_update_reads) {
    atomicAdd(y, 1.f);                          // OTHER the_last_to_update_reads
    if (!fault) __syncthreads();
    if (threadIdx.x == 63) y[1] = y[0];         // FAULT the_last_to_update_reads
}
KERNEL(two_threads_write_one_place) {
    if (threadIdx.x == 0 || fault) y[0] = 1;    // FAULT two_threads_write_one_place
}
KERNEL(two_blocks_write_one_place) {
    if (threadIdx.x == 0) y[fault ? 0 : blockIdx.x] = 1;    // FAULT two_blocks_write_one_place
}
KERNEL(a_block_reads_what_another_writes) {
    if (threadIdx.x == 0) y[blockIdx.x] = 1;    // OTHER a_block_reads_what_another_writes
    if (threadIdx.x == 0 && blockIdx.x && fault) y[8] = y[0];   // FAULT a_block_reads_what_another_writes
}
KERNEL(atomic_and_not) {
    if (fault && threadIdx.x == 63) y[0] += 1;  // FAULT atomic_and_not
    else atomicAdd(y, 1.f);                     // OTHER atomic_and_not
}
KERNEL(two_barriers) {
    if (threadIdx.x < 32 || !fault) __syncthreads();        // OTHER two_barriers
    else __syncthreads();                       // FAULT two_barriers
}
KERNEL(exits_before_the_barrier) {
    if (fault && threadIdx.x >= 32) return;
    __syncthreads();                            // FAULT exits_before_the_barrier
}
KERNEL(deadlock) {
    if (fault && threadIdx.x < 16) __syncwarp();            // FAULT deadlock
    __syncthreads();                            // OTHER deadlock
}
KERNEL(lane_not_in_its_mask) {
    y[threadIdx.x] = __shfl_xor_sync(fault ? 0xffffu : ALL, x[0], 1);   // FAULT lane_not_in_its_mask
}
KERNEL(reads_a_lane_not_in_the_mask) {
    if (threadIdx.x % 32 < 16)
        y[threadIdx.x] = __shfl_sync(0xffffu, x[threadIdx.x], fault ? 16 : 15);   // FAULT reads_a_lane_not_in_the_mask
}
KERNEL(two_shuffles) {
    float v = 1;
    if (threadIdx.x % 2 || !fault) v = __shfl_xor_sync(ALL, v, 1);      // FAULT two_shuffles
    else v = __shfl_xor_sync(ALL, v, 1);        // OTHER two_shuffles
}
KERNEL(names_a_lane_that_exited) {
    if (fault && threadIdx.x % 32 == 0) return;
    y[threadIdx.x] = __ballot_sync(ALL, 1);     // FAULT names_a_lane_that_exited
}
KERNEL(shift) { y[threadIdx.x] = 1 << 32 * fault; }                         // FAULT shift
KERNEL(product_of_32_bits) { y[threadIdx.x] = 70000 * (30000 + fault * 10000); }    // FAULT product_of_32_bits
KERNEL(division) { y[threadIdx.x] = 7 / (1 - fault); }                      // FAULT division
KERNEL(conversion) { y[threadIdx.x] = (int)(1e9f + 2e9f * fault); }         // FAULT conversion
KERNEL(null) { if (fault) *(float*)(size_t)(1 - fault) = 1; }               // FAULT null
KERNEL(assertion) { assert(fault == 0); }                                   // FAULT assertion
__device__ int counter;
KERNEL(variable_of_the_module) { if (fault) counter = 1; }                  // FAULT variable_of_the_module
__device__ __noinline__ float element(const float* x, int i) {
    return x[i];                                // FAULT in_a_helper
}
KERNEL(in_a_helper) {
    y[threadIdx.x] = element(x, 64 * fault);    // CALL in_a_helper
}
KERNEL(too_much_shared_memory) {
    if (!fault) return;
    __shared__ float half[6144];
    half[threadIdx.x] = 1;
    __shared__ float other_half[6145];
    other_half[threadIdx.x] = 1;
}
"""

def race(thread, does, did):
    return thread, f"data race: {does}, which {did} @ with no barrier between"


FOUND = {   # kernel: (thread, message); "@" stands for the other line
    "past_the_end": (63, "out of bounds: reads 4 bytes, 0 bytes past the end of x, which has 64 elements"),
    "before_the_start": (0, "out of bounds: writes 4 bytes, 4 bytes before the start of y, which has 64 elements"),
    "past_a_shared_array": (
        63, "out of bounds: writes 4 bytes, 0 bytes past the end of shared first, which has 64 elements"),
    "past_dynamic_shared_memory": (
        63, "out of bounds: writes 4 bytes, 0 bytes past the end of dynamic shared memory, which has 256 bytes"),
    "past_a_local_array": (0, "undefined behaviour: an index outside of its array"),
    "the_variable_of_another_thread": (63, "out of bounds: reads a local variable of thread (62, 0, 0)"),
    "misaligned": (0, "misaligned: uses an address that is not a multiple of 16"),
    "write_to_const": (0, "writes to const: writes x[0]"),
    "uninitialised_shared_memory": (
        58, "uninitialised: reads shared tile[5], which no thread of this block has written"),
    "what_the_last_block_left_in_shared_memory": (
        0, "uninitialised: reads shared tile[0], which no thread of this block has written"),
    "uninitialised_global_memory": (0, "uninitialised: reads y[0], which nothing has written"),
    "no_barrier_before_a_read": race(0, "writes shared tile[0]", "thread (63, 0, 0) read"),
    "no_barrier_before_the_next_tile": race(31, "reads shared tile[63]", "thread (63, 0, 0) wrote"),
    "no_warp_barrier": race(30, "reads shared tile[31]", "thread (31, 0, 0) wrote"),
    "a_barrier_of_half_the_lanes": race(31, "reads shared tile[0]", "thread (0, 0, 0) wrote"),
    "the_last_to_read_writes": race(62, "writes shared one[0]", "thread (31, 0, 0) read"),
    "the_last_to_update_reads": race(63, "reads y[0]", "thread (62, 0, 0) updated atomically"),
    "two_threads_write_one_place": race(1, "writes y[0]", "thread (0, 0, 0) wrote"),
    "two_blocks_write_one_place": race(0, "writes y[0]", "thread (0, 0, 0) of block (0, 0, 0) wrote"),
    "a_block_reads_what_another_writes": race(0, "reads y[0]", "thread (0, 0, 0) of block (0, 0, 0) wrote"),
    "atomic_and_not": race(63, "reads y[0]", "thread (62, 0, 0) updated atomically"),
    "two_barriers": (
        32, "divergent barriers: reaches this __syncthreads while thread (0, 0, 0) waits at another (@)"),
    "exits_before_the_barrier": (
        0, "deadlock: waits at __syncthreads forever; 32 of the block's 64 threads have exited"),
    "deadlock": (
        0, "deadlock: waits at __syncwarp forever, and thread (16, 0, 0) at __syncthreads (@); 0 of "
        "the block's 64 threads have exited"),
    "lane_not_in_its_mask": (16, "__shfl_xor_sync by lane 16, which is not in its mask 0x0000ffff"),
    "reads_a_lane_not_in_the_mask": (15, "__shfl_sync reads lane 16, which is not in its mask 0x0000ffff"),
    "two_shuffles": (
        1, "divergent warp operations: __shfl_xor_sync with mask 0xffffffff, while lane 0 waits at "
        "__shfl_xor_sync with mask 0xffffffff (@)"),
    "names_a_lane_that_exited": (1, "__ballot_sync with mask 0xffffffff names lane 0, which has exited"),
    "shift": (0, "undefined behaviour: a shift by more bits than there are, or of a negative number"),
    "product_of_32_bits": (0, "undefined behaviour: a product that does not fit its type"),
    "division": (0, "undefined behaviour: a division by zero, or of the smallest number by -1"),
    "conversion": (0, "undefined behaviour: a float that does not fit the integer it is converted to"),
    "null": (0, "undefined behaviour: a null pointer is used"),
    "assertion": (0, "assertion failed: fault == 0"),
    "variable_of_the_module": (0, "writes a variable of the module; the emulator supports only reading them"),
    "in_a_helper": (0, "out of bounds: reads 4 bytes, 0 bytes past the end of x, which has 64 elements"),
}
BLOCKS = {"two_blocks_write_one_place": 2, "a_block_reads_what_another_writes": 2,
          "what_the_last_block_left_in_shared_memory": 2}


def marked(word, name):
    """The line of FAULTS with this mark."""
    lines = [i for i, line in enumerate(FAULTS.splitlines(), 1) if line.endswith(f"// {word} {name}")]
    assert len(lines) <= 1, name
    return f"test.cu:{lines[0]}" if lines else None


def launch_faulty(name, fault):
    blocks = BLOCKS.get(name, 1)
    run(FAULTS, name, np.ones(64, np.float32), emulator.poison(zeros(64 * blocks)) if "global" in name else
        zeros(64 * blocks), fault, grid=(blocks,), shared=256 if "dynamic" in name else 0)


@pytest.mark.parametrize("name", FOUND)
def test_a_planted_fault_is_found_with_its_line_and_thread(name):
    thread, what = FOUND[name]
    where, other, call = marked("FAULT", name), marked("OTHER", name), marked("CALL", name)
    with emulator.checked(), pytest.raises(emulator.Fault) as found:
        launch_faulty(name, 1)
    block = (BLOCKS.get(name, 1) - 1, 0, 0)
    where += f" (called at {call})" if call else ""
    what = what.replace("@", f"at {other or where}")
    assert str(found.value) == f"{where}: kernel {name}, block {block}, thread {(thread, 0, 0)}: {what}"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_kernels_without_their_faults_pass(schedule):
    with emulator.checked(schedule):
        for name in FOUND:
            launch_faulty(name, 0)


@pytest.mark.parametrize("name", ["no_warp_barrier", "a_barrier_of_half_the_lanes"])
def test_a_race_whose_results_are_right_in_every_schedule_is_found_in_every_schedule(name):
    x = np.arange(64, dtype=np.float32)
    for schedule in SCHEDULES:
        results = []
        for fault in 0, 1:
            y = zeros(64)
            with emulator.fast(schedule):
                run(FAULTS, name, x, y, fault)
            results.append(y)
        assert np.array_equal(*results), "the results must be right although the race is there"
        with emulator.checked(schedule), pytest.raises(emulator.Fault, match="data race: reads shared tile"):
            run(FAULTS, name, x, zeros(64), 1)


RACES = [name for name, (_, what) in FOUND.items() if what.startswith("data race")]


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_a_race_is_found_whichever_of_its_threads_runs_first(schedule):
    for name in RACES:
        with emulator.checked(schedule), pytest.raises(emulator.Fault, match="data race"):
            launch_faulty(name, 1)


@pytest.mark.parametrize("how", [emulator.fast, emulator.checked])
def test_barriers_and_warp_operations_are_checked_in_the_fast_build_too(how):
    for name, what in (("two_barriers", "divergent barriers"), ("two_shuffles", "divergent warp operations"),
                       ("exits_before_the_barrier", "deadlock"), ("lane_not_in_its_mask", "not in its mask")):
        with how(), pytest.raises(emulator.Fault, match=what) as found:
            launch_faulty(name, 1)
        assert found.value.where == marked("FAULT", name)
        with how("reversed"), pytest.raises(emulator.Fault):
            launch_faulty(name, 1)


def test_a_thread_that_reaches_a_barrier_after_others_have_exited_is_a_fault():
    with emulator.checked("reversed"), pytest.raises(emulator.Fault, match="barrier not reached by all"):
        launch_faulty("exits_before_the_barrier", 1)


def test_a_launch_after_a_fault_runs_as_before():
    for _ in range(3):
        with emulator.checked(), pytest.raises(emulator.Fault):
            launch_faulty("no_barrier_before_a_read", 1)
        with emulator.checked():
            launch_faulty("no_barrier_before_a_read", 0)


@pytest.mark.parametrize("how", [emulator.fast, emulator.checked])
def test_more_than_48_kib_of_shared_variables_is_a_fault(how):
    with how(), pytest.raises(emulator.Fault, match="49156 bytes of __shared__ variables; CUDA allows 48 KiB"):
        launch_faulty("too_much_shared_memory", 1)


def test_an_index_past_one_argument_is_a_fault_even_if_another_argument_follows():
    memory = zeros(128)
    with emulator.checked(), pytest.raises(emulator.Fault, match="past the end of x"):
        run(FAULTS, "past_the_end", memory[:64], memory[64:], 1)


def test_a_view_that_would_be_misaligned_on_a_device_is_misaligned_here():
    memory = np.ones(128, np.float32)
    with emulator.checked():
        run(FAULTS, "misaligned", memory[4:68], zeros(64), 0)
        with pytest.raises(emulator.Fault, match="not a multiple of 16"):
            run(FAULTS, "misaligned", memory[1:65], zeros(64), 0)


def test_overlapping_arguments_of_a_restrict_kernel_raise():
    code = 'extern "C" __global__ void one(const float* __restrict__ x, float* __restrict__ y) {}'
    memory = zeros(96)
    run(code, "one", memory[:32], memory[32:], block=(32,))
    with pytest.raises(ValueError, match="x and y overlap in memory"):
        run(code, "one", memory[:33], memory[32:], block=(32,))
    run(FAULTS, "past_the_end", x := zeros(64), x, 0)       # in place, and not __restrict__
    with emulator.checked():
        run(FAULTS, "past_the_end", x, x, 0)
