"""Each check of mma, ldmatrix and asynchronous copies finds the fault planted for it, and its line.

As in test_emulator_checkers.py: the kernels of tensor_core_faults.cu are right with fault = 0 and wrong with fault = 1.
"""
from pathlib import Path

import numpy as np
import pytest

from emulator_launches import SCHEDULES, run, zeros
from minilm.kernels import emulator

pytestmark = pytest.mark.skipif(emulator.available() is not None, reason=f"{emulator.available()}")

FAULTS = Path(__file__).with_name("tensor_core_faults.cu").read_text("utf-8")


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
        5, "misaligned: lane 5 gives ldmatrix4 a row at shared tile[36], which is not aligned to 16 bytes"),
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
