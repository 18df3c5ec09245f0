// Kernels that are right with fault = 0 and wrong with fault = 1 (test_tensor_core_checkers.py). A comment marks the
// line of each fault (FAULT) and the other access of a race, or the copy in flight (OTHER).
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
