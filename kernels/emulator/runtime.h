// Declarations that the parts of the runtime share: scheduler.cpp runs the threads, memory.cpp (with races.h) checks
// their accesses to memory, undefined.cpp reports undefined behaviour, endless.cpp endless loops; tensor_cores.cpp and
// copies.cpp are the functions of tensor.cuh.
#pragma once
#include "bridge.h"
#include <cstdint>

namespace emulator {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t STACK_SPARE = 32 << 10;        // for the functions of the checkers
constexpr int MOST_THREADS = 1024, LANES = 32, DEEPEST = 12;
constexpr uint32_t UNINITIALISED = 0x7ffa5a5a;     // a NaN as a float, twice as a double; no computation gives it

// A thread of the device is a fiber: a stack, and the registers saved on it. One fiber runs at a time.
struct Thread {
    void* stack_pointer;
    char *stack, *top;              // the lowest byte; where the frame of the first function begins
    uint3 index;
    int number;                     // index, flattened
    bool done;
    const uint64_t* waits_for;      // the thread can continue when this counter differs from `seen`; nullptr: at once
    uint64_t seen;
    const char* operation;          // the operation at which it waits, and where that was called
    Site site;
    const void* place;
    const void* calls[DEEPEST];     // return addresses of its active functions (checked builds)
    int depth;
    uint64_t steps;                 // see endless.cpp (checked builds)
};

extern Launch* launch;              // the running one
extern Thread* current;             // nullptr between kernels
extern Thread threads[MOST_THREADS];
extern int thread_count;
extern uint32_t block_number;       // blockIdx, flattened
extern uint64_t epoch;              // how many block barriers this block has passed

// Report a fault of the kernel and end the launch. `place` is the return address in the kernel; module.py replaces '@'
// in the message by the place of the other access or the other thread.
[[noreturn]] void fault(const void* place, const void* other_place, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
uint3 unflatten(uint32_t number, const unsigned* extent);
const char* library();              // the first byte of this library in memory; places are offsets from it

bool begin_memory();                // allocates shared memory and the records of the checkers; false: not enough
void begin_block_memory();
void end_memory();
void begin_watch();                 // for endless loops
void begin_block_watch();
void end_watch();
void join_clocks(int warp, unsigned mask);      // after a warp barrier of the lanes in mask

// All 32 lanes of a warp meet. Each first stores its values for the others under the number of the round, 0 or 1: a
// lane can read those of this round while another stores those of the next.
int warp_round();
void meet_warp(Site site, const char* operation, const void* place);

// Memory, for tensor_cores.cpp and copies.cpp.
enum Kind { READ, WRITE, ATOMIC };
constexpr const char* VERBS[] = {"reads", "writes", "updates (atomically)"};
void check_access(void* address, size_t bytes, Kind kind, const void* place, bool counted);     // of a checked kernel
bool in_shared(const void* address, size_t bytes);      // wholly inside one __shared__ array
bool in_argument(const void* address, size_t bytes);
const char* name_of(const void* address);               // "shared tile[3]"; its array must exist

void begin_block_copies();
void end_thread_copies();           // a thread exits
extern size_t copies_in_flight;     // of all threads of the block
// For an access to shared memory: a fault if a copy to that place has not arrived.
void check_copies_in_flight(const char* address, size_t bytes, Kind kind, const void* place);

}
