// What the parts of the runtime share: scheduler.cpp runs the threads, memory.cpp (with races.h) checks what they do
// to memory, undefined.cpp reports undefined behaviour.
#pragma once
#include "bridge.h"
#include <cstdint>

namespace emulator {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr int MOST_THREADS = 1024, LANES = 32, DEEPEST = 12;
constexpr uint32_t UNINITIALISED = 0x7ffa5a5a;     // a NaN as a float, twice as a double: no computation makes it

// A thread of the device: a fiber, that is a stack and the registers saved on it. One runs at a time.
struct Thread {
    void* stack_pointer;
    char *stack, *top;              // its lowest byte; where its first function's frame begins
    uint3 index;
    int number;                     // index, flattened
    bool done;
    const uint64_t* waits_for;      // it may go on when this counter differs from `seen`; nullptr: at once
    uint64_t seen;
    const char* operation;          // what it waits at, and where that was called
    Site site;
    const void* place;
    const void* calls[DEEPEST];     // where the functions that it is in were called (checked builds)
    int depth;
};

extern Launch* launch;              // what runs now
extern Thread* current;             // nullptr between kernels
extern Thread threads[MOST_THREADS];
extern int thread_count;
extern uint32_t block_number;       // blockIdx, flattened
extern uint64_t epoch;              // block barriers that this block has passed

// The kernel is at fault: the launch ends here. `place` is the return address in the kernel; '@' in the message
// stands for the place of the other access or the other thread.
[[noreturn]] void fault(const void* place, const void* other_place, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
uint3 unflatten(uint32_t number, const unsigned* extent);
const char* library();              // the first byte of this library in memory: places are counted from it

void begin_memory();                // allocates shared memory and what the checkers remember
void begin_block_memory();
void end_memory();
void join_clocks(int warp, unsigned mask);      // a warp barrier of the lanes in mask has completed

}
