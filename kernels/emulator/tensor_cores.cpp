// Tensor cores: mma.sync m16n8k16 of bf16 numbers, and ldmatrix. kernels/tensor.cuh shows which lane holds what.
//
// All lanes of a warp must reach the same call, as for a shuffle. Neither operation orders other accesses to memory.
#include "runtime.h"
#include <cstring>

namespace emulator {

constexpr int WARPS = MOST_THREADS / LANES;
static struct { float a[16][16], b[8][16]; } matrices[2][WARPS];        // [round][warp]; b: by columns
static const char* rows[2][WARPS][LANES];                               // the addresses of ldmatrix

static void unpack(float* to, unsigned pair) {
    unsigned low = pair << 16, high = pair & 0xffff0000;
    memcpy(to, &low, 4);
    memcpy(to + 1, &high, 4);
}

// Four registers of a lane, which the kernel may have declared in memory of any kind.
static void check_four(const void* registers, Kind kind, const void* place) {
    for (int i = 0; launch->checked && i < 4; ++i) check_access((char*)registers + 4 * i, 4, kind, place, true);
}

// The sums run over k = 0 to 15 in float, after d. A device adds in an order that NVIDIA does not document.
void warp_mma(Site site, float* d, const unsigned* a, unsigned b0, unsigned b1) {
    const void* place = __builtin_return_address(0);
    int lane = current->number % LANES, g = lane / 4, t = lane % 4;
    check_four(a, READ, place);
    check_four(d, READ, place);
    check_four(d, WRITE, place);
    auto& m = matrices[warp_round()][current->number / LANES];
    for (int i = 0; i < 4; ++i) unpack(&m.a[g + i % 2 * 8][2 * t + i / 2 * 8], a[i]);
    unpack(&m.b[g][2 * t], b0);
    unpack(&m.b[g][2 * t + 8], b1);
    meet_warp(site, "mma", place);
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) d[i] += m.a[g + i / 2 * 8][k] * m.b[2 * t + i % 2][k];
}

static void check_row(const void* row, const char* name, const void* place) {
    int lane = current->number % LANES;
    if (!in_shared(row, 1))
        fault(place, nullptr, "out of bounds: lane %d gives %s a row outside of shared memory", lane, name);
    if ((size_t)row % 16)
        fault(place, nullptr, "misaligned: lane %d gives %s a row at %s, which is not aligned to 16 bytes", lane, name,
              name_of(row));
    if (!in_shared(row, 16))
        fault(place, nullptr, "out of bounds: lane %d gives %s a row at %s, which ends beyond the array", lane, name,
              name_of(row));
}

// A lane reads what it receives, from the rows of other lanes: the record of a race has the lane that receives.
void warp_ldmatrix(Site site, const char* name, bool transposed, unsigned* result, const void* row) {
    const void* place = __builtin_return_address(0);
    int lane = current->number % LANES, g = lane / 4, t = lane % 4;
    check_row(row, name, place);
    auto& all = rows[warp_round()][current->number / LANES];
    all[lane] = (const char*)row;
    meet_warp(site, name, place);
    check_four(result, WRITE, place);
    for (int m = 0; m < 4; ++m) {
        const char* first = transposed ? all[8 * m + 2 * t] + 2 * g : all[8 * m + g] + 4 * t;
        const char* second = transposed ? all[8 * m + 2 * t + 1] + 2 * g : first + 2;
        if (launch->checked) {
            check_access(const_cast<char*>(first), 2, READ, place, true);
            check_access(const_cast<char*>(second), 2, READ, place, true);
        }
        memcpy((char*)&result[m], first, 2);
        memcpy((char*)&result[m] + 2, second, 2);
    }
}
}
