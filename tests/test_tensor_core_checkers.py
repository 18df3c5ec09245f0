"""Each check of mma, ldmatrix and asynchronous copies finds the fault planted for it, and its line.

As in test_emulator_checkers.py: FAULTS is one text of kernels that are right with fault = 0 and wrong with fault = 1.
"""
import numpy as np
import pytest

from emulator_launches import SCHEDULES, run, zeros
from minilm.kernels import emulator

pytestmark = pytest.mark.skipif(emulator.available() is not None, reason=f"{emulator.available()}")

FAULTS = r"""
#include "tensor.cuh"
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(64) name(bf16* x, float* y, int fault)
#define THREAD const int t = threadIdx.x, lane = t % 32
#define TILE __shared__ __align__(16) bf16 tile[64 * 8];

KERNEL(no_wait) {
    THREAD; TILE
    copy16(tile + 8 * t, x + 8 * t, true);      // OTHER no_wait
    copies_commit();
    if (!fault) copies_wait<0>();
    __syncthreads();
    y[t] = float(tile[8 * (t ^ 1)]);            // FAULT no_wait
    copies_wait<0>();
}
KERNEL(wait_for_too_few_groups) {
    THREAD; TILE
    if (t < 32) copy16(tile + 8 * t, x + 8 * t, true);
    copies_commit();
    if (t >= 32) copy16(tile + 8 * t, x + 8 * t, true);     // OTHER wait_for_too_few_groups
    copies_commit();
    if (fault) copies_wait<1>();
    else copies_wait<0>();
    __syncthreads();
    y[t] = float(tile[8 * (t ^ 32)]);           // FAULT wait_for_too_few_groups
    copies_wait<0>();
}
KERNEL(no_commit) {
    THREAD; TILE
    copy16(tile + 8 * t, x + 8 * t, true);      // OTHER no_commit
    if (!fault) copies_commit();
    copies_wait<0>();
    y[t] = float(tile[8 * t]);                  // FAULT no_commit
}
KERNEL(no_barrier_after_the_wait) {
    THREAD; TILE
    copy16(tile + 8 * t, x + 8 * t, true);
    copies_commit();
    copies_wait<0>();                           // OTHER no_barrier_after_the_wait
    if (!fault) __syncthreads();
    y[t] = float(tile[8 * (t & ~1)]);           // FAULT no_barrier_after_the_wait
}
KERNEL(wait_after_the_barrier) {
    THREAD; TILE
    copy16(tile + 8 * t, x + 8 * t, true);
    copies_commit();
    if (!fault) copies_wait<0>();
    __syncthreads();
    copies_wait<0>();                           // OTHER wait_after_the_barrier
    y[t] = float(tile[8 * 63]);                 // FAULT wait_after_the_barrier
}
KERNEL(copy_over_a_tile_that_is_still_read) {
    THREAD; TILE
    tile[8 * t] = bf16(1.f);
    __syncthreads();
    y[t] = float(tile[8 * (t | 1)]);            // OTHER copy_over_a_tile_that_is_still_read
    if (!fault) __syncthreads();
    copy16(tile + 8 * t, x + 8 * t, true);      // FAULT copy_over_a_tile_that_is_still_read
    copies_commit();
    __syncthreads();
    copies_wait<0>();
}
KERNEL(write_to_a_copy_in_flight) {
    THREAD; TILE
    copy16(tile + 8 * t, x + 8 * t, true);      // OTHER write_to_a_copy_in_flight
    copies_commit();
    if (fault) tile[8 * t + 7] = bf16(1.f);     // FAULT write_to_a_copy_in_flight
    copies_wait<0>();
}
KERNEL(two_copies_to_one_place) {
    THREAD; TILE
    copy16(tile + 8 * t, x + 8 * t, true);      // OTHER two_copies_to_one_place
    if (fault) copy16(tile + 8 * t, x, true);   // FAULT two_copies_to_one_place
    copies_commit();
    copies_wait<0>();
}
KERNEL(source_written_while_it_is_copied) {
    THREAD; TILE
    copy16(tile + 8 * t, x + 8 * t, true);
    copies_commit();
    __syncthreads();
    if (fault) x[8 * (t ^ 1)] = bf16(1.f);      // FAULT source_written_while_it_is_copied
    copies_wait<0>();                           // OTHER source_written_while_it_is_copied
}
KERNEL(misaligned_target) {
    THREAD; TILE
    copy16(tile + 8 * (t % 32) + 256 * (t / 32) - 4 * fault * (t == 9), x, true);       // FAULT misaligned_target
    copies_commit();
    copies_wait<0>();
}
KERNEL(misaligned_source) {
    THREAD; TILE
    copy16(tile + 8 * t, x + 4 * fault * (t == 9), t != 9);     // FAULT misaligned_source
    copies_commit();
    copies_wait<0>();
}
KERNEL(target_past_the_end) {
    THREAD; TILE
    copy16(tile + 8 * (t + fault), x, true);    // FAULT target_past_the_end
    copies_commit();
    copies_wait<0>();
}
KERNEL(target_in_global_memory) {
    THREAD; TILE
    copy16(fault ? x + 8 * t : tile + 8 * t, x + 8 * t, true);  // FAULT target_in_global_memory
    copies_commit();
    copies_wait<0>();
}
KERNEL(source_past_the_end) {
    THREAD; TILE
    copy16(tile + 8 * t, x + 8 * (t + fault), true);            // FAULT source_past_the_end
    copies_commit();
    copies_wait<0>();
}
KERNEL(source_in_shared_memory) {
    THREAD; TILE
    __shared__ __align__(16) bf16 other[8];
    if (t < 8) other[t] = bf16(1.f);
    __syncthreads();
    copy16(tile + 8 * t, fault ? other : x, true);              // FAULT source_in_shared_memory
    copies_commit();
    copies_wait<0>();
}
KERNEL(exit_without_a_wait) {
    THREAD; TILE
    copy16(tile + 8 * t, x, true);              // FAULT exit_without_a_wait
    copies_commit();
    if (!fault || t != 33) copies_wait<0>();
}
KERNEL(exit_without_a_commit) {
    THREAD; TILE
    copy16(tile + 8 * t, x, true);              // FAULT exit_without_a_commit
    if (!fault) copies_commit();
    copies_wait<0>();
}
KERNEL(misaligned_row) {
    THREAD; TILE
    for (int i = 0; i < 8; ++i) tile[8 * t + i] = bf16(1.f);
    __syncthreads();
    unsigned r[4];
    ldmatrix4(r, tile + 8 * t - 4 * fault * (lane == 5));       // FAULT misaligned_row
    y[t] = r[0];
}
KERNEL(tile_that_is_declared_without_its_alignment) {
    THREAD; TILE
    __shared__ bf16 other[64 * 8];
    copy16((fault ? other : tile) + 8 * t, x + 8 * t, true);    // FAULT tile_that_is_declared_without_its_alignment
    copies_commit();
    copies_wait<0>();
}
KERNEL(row_in_global_memory) {
    THREAD; TILE
    for (int i = 0; i < 8; ++i) tile[8 * t + i] = bf16(1.f);
    __syncthreads();
    unsigned r[4];
    ldmatrix4(r, fault ? x + 8 * t : tile + 8 * t);             // FAULT row_in_global_memory
    y[t] = r[0];
}
KERNEL(row_that_ends_beyond_the_array) {
    THREAD;
    __shared__ __align__(16) bf16 tile[64 * 8 - 4];
    for (int i = t; i < 64 * 8 - 4; i += 64) tile[i] = bf16(1.f);
    __syncthreads();
    unsigned r[4];
    ldmatrix4_trans(r, tile + 8 * (fault || t < 63 ? t : 0));   // FAULT row_that_ends_beyond_the_array
    y[t] = r[0];
}
KERNEL(row_that_nothing_has_written) {
    THREAD; TILE
    if (!fault || t != 9) for (int i = 0; i < 8; ++i) tile[8 * t + i] = bf16(1.f);
    __syncthreads();
    unsigned r[4];
    ldmatrix4(r, tile + 8 * t);                 // FAULT row_that_nothing_has_written
    y[t] = r[0];
}
KERNEL(no_barrier_before_ldmatrix) {
    THREAD; TILE
    for (int i = 0; i < 8; ++i) tile[8 * t + i] = bf16(1.f);    // OTHER no_barrier_before_ldmatrix
    if (!fault) __syncwarp();
    unsigned r[4];
    ldmatrix4(r, tile + 8 * t);                 // FAULT no_barrier_before_ldmatrix
    y[t] = r[0];
}
KERNEL(no_barrier_after_ldmatrix) {
    THREAD; TILE
    for (int i = 0; i < 8; ++i) tile[8 * t + i] = bf16(1.f);
    __syncthreads();
    unsigned r[4];
    ldmatrix4_trans(r, tile + 8 * t);           // OTHER no_barrier_after_ldmatrix
    if (!fault) __syncwarp();
    tile[8 * t] = bf16(2.f);                    // FAULT no_barrier_after_ldmatrix
    y[t] = r[0];
}
KERNEL(two_calls_of_mma) {
    THREAD;
    float d[4] = {};
    unsigned a[4] = {};
    if (lane % 2 || !fault) mma(d, a, 0, 0);    // FAULT two_calls_of_mma
    else mma(d, a, 0, 0);                       // OTHER two_calls_of_mma
    y[t] = d[0];
}
KERNEL(mma_by_half_of_the_lanes) {
    THREAD;
    float d[4] = {};
    unsigned a[4] = {};
    if (lane < 16 || !fault) mma(d, a, 0, 0);   // FAULT mma_by_half_of_the_lanes
    __syncthreads();                            // OTHER mma_by_half_of_the_lanes
    y[t] = d[0];
}
KERNEL(mma_after_a_lane_has_exited) {
    THREAD;
    float d[4] = {};
    unsigned a[4] = {};
    if (fault && t == 0) return;
    mma(d, a, 0, 0);                            // FAULT mma_after_a_lane_has_exited
    y[t] = d[0];
}
KERNEL(sums_of_mma_in_shared_memory) {
    THREAD;
    __shared__ float common[4];
    float own[4] = {};
    unsigned a[4] = {};
    if (t == 0) for (int i = 0; i < 4; ++i) common[i] = 0;
    __syncthreads();
    mma(fault ? common : own, a, 0, 0);         // FAULT sums_of_mma_in_shared_memory
    y[t] = own[0];
}
"""


def in_flight(thread, does, copier):
    return thread, (f"copy in flight: {does}, to which thread ({copier}, 0, 0) copies @; the bytes arrive at its "
                    "copies_wait")


def race(thread, does, did):
    return thread, f"data race: {does}, which {did} @ with no barrier between"


FOUND = {   # kernel: (thread, message); "@" stands for the other line
    "no_wait": in_flight(63, "reads shared tile[496]", 62),
    "wait_for_too_few_groups": in_flight(0, "reads shared tile[256]", 32),
    "no_commit": in_flight(0, "reads shared tile[0]", 0),
    "no_barrier_after_the_wait": race(1, "reads shared tile[0]", "thread (0, 0, 0) wrote"),
    "wait_after_the_barrier": race(0, "reads shared tile[504]", "thread (63, 0, 0) wrote"),
    "copy_over_a_tile_that_is_still_read": race(1, "writes shared tile[8]", "thread (0, 0, 0) read"),
    "write_to_a_copy_in_flight": in_flight(0, "writes shared tile[7]", 0),
    "two_copies_to_one_place": in_flight(0, "writes shared tile[0]", 0),
    "source_written_while_it_is_copied": race(1, "writes x[0]", "thread (0, 0, 0) read"),
    "misaligned_target": (9, "misaligned: copy16 writes to an address that is not a multiple of 16"),
    "misaligned_source": (9, "misaligned: copy16 reads from an address that is not a multiple of 16"),
    "target_past_the_end": (
        63, "out of bounds: copy16 writes 16 bytes that are not all inside one shared array"),
    "target_in_global_memory": (
        0, "out of bounds: copy16 writes 16 bytes that are not all inside one shared array"),
    "source_past_the_end": (
        63, "out of bounds: copy16 reads 16 bytes that are not all inside one array in global memory"),
    "source_in_shared_memory": (
        63, "out of bounds: copy16 reads 16 bytes that are not all inside one array in global memory"),
    "exit_without_a_wait": (
        33, "copy in flight: the thread ends and has not waited for this copy16; 1 of its copies are in flight"),
    "exit_without_a_commit": (
        0, "copy in flight: the thread ends and has not waited for this copy16; 1 of its copies are in flight"),
    "misaligned_row": (
        5, "misaligned: lane 5 gives ldmatrix4 a row at shared tile[36], which is not a multiple of 16 bytes"),
    "tile_that_is_declared_without_its_alignment": (
        0, "misaligned: copy16 writes to an address that is not a multiple of 16"),
    "row_in_global_memory": (63, "out of bounds: lane 31 gives ldmatrix4 a row outside of shared memory"),
    "row_that_ends_beyond_the_array": (
        63, "out of bounds: lane 31 gives ldmatrix4_trans a row at shared tile[504], which ends beyond the array"),
    "row_that_nothing_has_written": (
        4, "uninitialised: reads shared tile[72], which no thread of this block has written"),
    "no_barrier_before_ldmatrix": race(31, "reads shared tile[62]", "thread (7, 0, 0) wrote"),
    "no_barrier_after_ldmatrix": race(1, "writes shared tile[8]", "thread (0, 0, 0) read"),
    "two_calls_of_mma": (
        1, "divergent warp operations: mma with mask 0xffffffff, while lane 0 waits at mma with mask 0xffffffff (@)"),
    "mma_by_half_of_the_lanes": (
        0, "deadlock: waits at mma forever, and thread (16, 0, 0) at __syncthreads (@); 0 of the block's 64 threads "
        "have exited"),
    "mma_after_a_lane_has_exited": (1, "mma with mask 0xffffffff names lane 0, which has exited"),
    "sums_of_mma_in_shared_memory": race(0, "reads shared common[0]", "thread (63, 0, 0) wrote"),
}
# They are found without the checkers too.
ALSO_FAST = [name for name, (_, what) in FOUND.items()
             if ("copy16" in what or "mma" in what or " row " in what) and "declared" not in name]
# They depend on the order of the threads: another order gives another fault, or in the fast build none.
RACES = [name for name, (_, what) in FOUND.items() if what.startswith(("data race", "copy in flight: reads"))]


def marked(word, name):
    """The line of FAULTS with this mark."""
    lines = [i for i, line in enumerate(FAULTS.splitlines(), 1) if line.endswith(f"// {word} {name}")]
    assert len(lines) <= 1, name
    return f"test.cu:{lines[0]}" if lines else None


def launch_faulty(name, fault):
    run(FAULTS, name, zeros(512, dtype=np.uint16), zeros(64), fault)


@pytest.mark.parametrize("name", FOUND)
def test_a_planted_fault_is_found_with_its_line_and_thread(name):
    thread, what = FOUND[name]
    where, other = marked("FAULT", name), marked("OTHER", name)
    with emulator.checked(), pytest.raises(emulator.Fault) as found:
        launch_faulty(name, 1)
    what = what.replace("@", f"at {other or where}")
    assert str(found.value) == f"{where}: kernel {name}, block (0, 0, 0), thread {(thread, 0, 0)}: {what}"


@pytest.mark.parametrize("how", [emulator.fast, emulator.checked])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_kernels_without_their_faults_pass(how, schedule):
    with how(schedule):
        for name in FOUND:
            launch_faulty(name, 0)


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_an_access_that_is_not_ordered_with_a_copy_is_found_in_every_schedule(schedule):
    for name in RACES:
        with emulator.checked(schedule), pytest.raises(emulator.Fault, match="data race|copy in flight|uninit"):
            launch_faulty(name, 1)


def test_addresses_lanes_and_copies_at_the_exit_are_checked_in_the_fast_build_too():
    for name in ALSO_FAST:
        with emulator.fast(), pytest.raises(emulator.Fault) as found:
            launch_faulty(name, 1)
        assert found.value.where == marked("FAULT", name), name


def test_a_launch_after_a_fault_has_no_copies_in_flight():
    for how in emulator.fast, emulator.checked:
        with how(), pytest.raises(emulator.Fault, match="has not waited"):
            launch_faulty("exit_without_a_wait", 1)
        with how():
            launch_faulty("no_wait", 0)
