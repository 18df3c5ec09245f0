// Data races, found by happens-before, so that finding one does not depend on the schedule.
//
// Two accesses of one place in memory, at least one of them a write, race unless one happened before the other: a chain
// of program order and barriers leads from one to the other. Without a race every schedule gives the same numbers. With
// a race some schedule can give other numbers, even if every schedule that was tried gave the right ones.
// Two accesses are ordered if
//   - one thread makes both; or
//   - a __syncthreads of their block lies between them. The barriers of a block are counted; the count is the epoch; or
//   - a __syncwarp lies between them. Each lane has a clock that advances at every warp barrier it passes, and knows
//     the latest clock of every other lane that reached it, directly in a common barrier or through a third lane (a
//     vector clock, Lamport and Mattern; keeping only the last accesses is the idea of FastTrack, Flanagan and Freund).
// An asynchronous copy (copies.cpp) writes twice: where it is issued, and where its thread waits for it.
// Blocks of one launch, shuffles, votes, mma, ldmatrix and atomics order nothing, because CUDA promises no order of
// other memory for them. Atomics do not race with one another.
// (Included by memory.cpp, which sees every access.)
#pragma once
#include "runtime.h"
#include <cstring>

namespace emulator {

// The thread, the time and the instruction (0: no access yet) of an access. `bytes`: which quarters of the cell.
struct Access {
    uint32_t block, instruction;
    uint32_t epoch : 27, bytes : 4, atomic : 1;
    uint32_t clock : 22, thread : 10;
};

// The record of 4 bytes of memory (8 bytes in an array of doubles).
struct Cell {
    Access write, other_atomic;     // the last write; if it is atomic, also the last atomic of another thread
    Access read, other_read;        // since then: the last read, and one by a thread as distant as possible
};

static uint32_t clocks[MOST_THREADS / LANES][LANES][LANES];     // [warp][lane][other lane]: the latest known clock

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

// Every block has its own shared memory: accesses of an earlier block do not count.
inline bool counts(const Access& then, const Access& now, bool shared) {
    return then.instruction && !(shared && then.block != now.block);
}

inline bool races(const Access& then, const Access& now, bool shared) {
    return counts(then, now, shared) && (then.bytes & now.bytes) && !happened_before(then, now);
}

// How distant the other thread is: fewer later writes can be ordered after an access of a more distant thread.
inline int distance(const Access& then, const Access& now, bool shared) {
    if (!counts(then, now, shared)) return 0;
    if (then.block != now.block) return 4;
    if (then.epoch != now.epoch) return 1;
    return then.thread / LANES != now.thread / LANES ? 3 : 2;
}

// Records an access in its cell. Returns the earlier access with which it races, or nullptr.
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
    if (kind == WRITE) cell = {now, {}, {}, {}};    // an access after this write is also after the earlier ones
    else {
        if (cell.write.atomic && !same_thread(cell.write, now)) cell.other_atomic = cell.write;
        cell.write = now;
    }
    return nullptr;
}
}
