// Data races, found by happens-before and not by the luck of a schedule.
//
// Two accesses of one place in memory, one of them a write, race unless one happened before the other: unless a chain
// of program order and barriers leads from the one to the other. Then every schedule gives the same numbers; if not,
// some schedule may give others, even where every one that was tried gave the right ones. What orders two accesses:
//   - they are of one thread;
//   - a __syncthreads of their block lies between them: its barriers are counted, the count is called the epoch;
//   - a __syncwarp lies between them. Each lane has a clock, which moves on at every warp barrier it passes, and knows
//     of every other lane up to which time it has heard of it, in a barrier together or through a third (a vector
//     clock, as of Lamport and Mattern; to keep only the last accesses is the idea of FastTrack, Flanagan and Freund).
// Nothing else does: neither two blocks of a launch, nor shuffles, nor votes, nor atomics, for which CUDA promises no
// order of other memory. Atomics do not race with one another.
// (Part of memory.cpp, where every access comes by.)
#pragma once
#include "runtime.h"
#include <cstring>

namespace emulator {

enum Kind { READ, WRITE, ATOMIC };

// Who did it, when, and by which instruction (0: nobody yet). `bytes`: which quarters of the cell.
struct Access {
    uint32_t block, instruction;
    uint32_t epoch : 27, bytes : 4, atomic : 1;
    uint32_t clock : 22, thread : 10;
};

// What is remembered of 4 bytes of memory (of 8, of an array of doubles).
struct Cell {
    Access write, other_atomic;     // the last write; if atomic, also the last one of another thread
    Access read, other_read;        // since then: the last read, and one of a thread as far away as any
};

static uint32_t clocks[MOST_THREADS / LANES][LANES][LANES];     // [warp][lane][of which it has heard]

inline void reset_clocks() {
    int warps = (thread_count + LANES - 1) / LANES;
    memset(clocks, 0, warps * sizeof clocks[0]);
    for (int i = 0; i < warps; ++i) for (int lane = 0; lane < LANES; ++lane) clocks[i][lane][lane] = 1;
}

void join_clocks(int warp, unsigned mask) {
    uint32_t joined[LANES] = {};
    for (int lane = 0; lane < LANES; ++lane) {
        if (!(mask >> lane & 1)) continue;
        uint32_t* heard = clocks[warp][lane];
        ++heard[lane];
        for (int i = 0; i < LANES; ++i) joined[i] = heard[i] > joined[i] ? heard[i] : joined[i];
    }
    for (int lane = 0; lane < LANES; ++lane) if (mask >> lane & 1) memcpy(clocks[warp][lane], joined, sizeof joined);
}

inline Access this_access(uint32_t instruction, unsigned bytes, Kind kind) {
    uint32_t number = current->number, lane = number % LANES;
    uint32_t clock = clocks[number / LANES][lane][lane];
    return {block_number, instruction, (uint32_t)epoch, bytes, kind == ATOMIC, clock, number};
}

inline bool same_thread(const Access& a, const Access& b) { return a.block == b.block && a.thread == b.thread; }

inline bool happened_before(const Access& then, const Access& now) {
    if (then.block != now.block) return false;
    if (then.thread == now.thread || then.epoch < now.epoch) return true;
    if (then.thread / LANES != now.thread / LANES) return false;
    return then.clock < clocks[now.thread / LANES][now.thread % LANES][then.thread % LANES];
}

// Shared memory is another one for every block: what an earlier block did there does not count.
inline bool counts(const Access& then, const Access& now, bool shared) {
    return then.instruction && !(shared && then.block != now.block);
}

inline bool races(const Access& then, const Access& now, bool shared) {
    return counts(then, now, shared) && (then.bytes & now.bytes) && !happened_before(then, now);
}

// How far away the other thread is: one that is further can be ordered before fewer writes to come.
inline int distance(const Access& then, const Access& now, bool shared) {
    if (!counts(then, now, shared)) return 0;
    if (then.block != now.block) return 4;
    if (then.epoch != now.epoch) return 1;
    return then.thread / LANES != now.thread / LANES ? 3 : 2;
}

// Enters an access into its cell. Returns the earlier one that it races with, or nullptr.
inline const Access* enter(Cell& cell, const Access& now, Kind kind, bool shared) {
    if (races(cell.write, now, shared) && !(kind == ATOMIC && cell.write.atomic)) return &cell.write;
    if (kind != ATOMIC && races(cell.other_atomic, now, shared)) return &cell.other_atomic;
    if (kind == READ) {
        if (!same_thread(cell.read, now) && distance(cell.read, now, shared) >= distance(cell.other_read, now, shared))
            cell.other_read = cell.read;
        cell.read = now;
        return nullptr;
    }
    if (races(cell.read, now, shared)) return &cell.read;
    if (races(cell.other_read, now, shared)) return &cell.other_read;
    if (kind == WRITE) cell = {now, {}, {}, {}};    // whatever comes after this write comes after those before it
    else {
        if (cell.write.atomic && !same_thread(cell.write, now)) cell.other_atomic = cell.write;
        cell.write = now;
    }
    return nullptr;
}
}
