// Runs thousands of threads on one core: every thread of a block is a fiber, and blocks run one after another.
//
// A fiber runs until it waits at a barrier, or at a warp operation that other lanes have not reached; then the next
// fiber that can continue is resumed. There are no other switches, so a kernel runs at the speed of C++ between its
// barriers, and two runs are the same. The checkers find the bugs that this one schedule would hide.
#include "runtime.h"
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <vector>

// A switch saves the registers that a function must preserve (System V ABI), changes the stack, and returns on the
// other stack.
extern "C" void emulator_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

uint3 threadIdx, blockIdx, blockDim, gridDim;       // const in the kernel: for a thread they never change

namespace emulator {

Launch* launch;
Thread* current;
Thread threads[MOST_THREADS];
int thread_count;
uint32_t block_number;
uint64_t epoch;

static void (*kernel)(void**);
static void** kernel_arguments;
static Thread host;                         // the caller of the launch, so that a fiber can switch to it
static std::vector<int> blocks;             // in the order in which they run
static std::vector<int> turns;              // threads, in the order in which the scheduler tries to resume them
static uint64_t random_state;
static int turn, exited;

// The block barrier. `votes` of two rounds: a thread can read the last round while another votes in the next.
static struct { int arrived, site, votes[2]; const Thread* first; } barrier;

// A warp operation at which lanes meet. There are 32 meetings a warp; lanes of one mask use that of its lowest lane.
struct Meeting {
    uint64_t rounds;
    unsigned mask;
    int arrived, site;
    const Thread* first;
    unsigned ballots[2];
    char values[2][LANES][8];               // of this round and the last one, as in the barrier
};
struct Warp { unsigned exited; Meeting meetings[LANES]; };
static Warp warps[MOST_THREADS / LANES];

uint3 unflatten(uint32_t number, const unsigned* extent) {
    return {number % extent[0], number / extent[0] % extent[1], number / extent[0] / extent[1]};
}

void fault(const void* place, const void* other_place, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(launch->message, sizeof launch->message, format, arguments);
    va_end(arguments);
    memcpy(launch->fault_block, &blockIdx, sizeof blockIdx);
    memcpy(launch->fault_thread, &current->index, sizeof current->index);
    auto offset = [](const void* address) { return address ? size_t((const char*)address - library()) : 0; };
    int count = 0;
    launch->places[count++] = offset(place);
    for (int i = current->depth; i-- > 0;) if (i < DEEPEST) launch->places[count++] = offset(current->calls[i]);
    launch->other_place = offset(other_place);
    void* abandoned;
    emulator_switch(&abandoned, host.stack_pointer);
    __builtin_unreachable();
}

static bool can_continue(const Thread& thread) {
    return !thread.done && !(thread.waits_for && *thread.waits_for == thread.seen);
}

static void resume(Thread& next) {
    Thread* from = current;
    next.waits_for = nullptr;
    threadIdx = next.index;
    current = &next;
    emulator_switch(&from->stack_pointer, next.stack_pointer);
}

[[noreturn]] static void deadlock() {
    const Thread *waiting = nullptr, *other = nullptr;
    for (int i = 0; i < thread_count; ++i) {
        if (threads[i].done) continue;
        if (!waiting) waiting = &threads[i];
        else if (threads[i].place != waiting->place && !other) other = &threads[i];
    }
    current = const_cast<Thread*>(waiting);
    if (!other)
        fault(waiting->place, nullptr, "deadlock: waits at %s forever; %d of the block's %d threads have exited",
              waiting->operation, exited, thread_count);
    uint3 i = other->index;
    fault(waiting->place, other->place,
          "deadlock: waits at %s forever, and thread (%u, %u, %u) at %s (@); %d of the block's %d threads have "
          "exited",
          waiting->operation, i.x, i.y, i.z, other->operation, exited, thread_count);
}

// Called by a thread that cannot continue: resumes the next thread that can, or the host when all have exited.
static void run_others() {
    for (int tried = 0; tried < thread_count; ++tried) {
        if (++turn >= thread_count) turn = 0;
        Thread& next = threads[turns[turn]];
        if (can_continue(next)) return resume(next);
    }
    if (exited < thread_count) deadlock();
    emulator_switch(&current->stack_pointer, host.stack_pointer);
}

static void wait(const uint64_t* counter, const char* operation, Site site, const void* place) {
    current->waits_for = counter;
    current->seen = *counter;
    current->operation = operation;
    current->site = site;
    current->place = place;
    run_others();
}

static void thread_main() {
    kernel(kernel_arguments);
    end_thread_copies();
    current->done = true;
    ++exited;
    warps[current->number / LANES].exited |= 1u << current->number % LANES;
    run_others();
    __builtin_trap();
}

int block_barrier(Site site, Vote vote, bool ballot) {
    const void* place = __builtin_return_address(0);
    current->place = place;
    if (exited)
        fault(place, nullptr, "barrier not reached by all: reaches __syncthreads after %d of the block's %d threads "
              "have exited", exited, thread_count);
    int round = epoch & 1;
    if (barrier.arrived == 0) {
        barrier.site = site.number;
        barrier.first = current;
        barrier.votes[round] = 0;
    } else if (barrier.site != site.number) {
        uint3 i = barrier.first->index;
        fault(place, barrier.first->place, "divergent barriers: reaches this __syncthreads while thread (%u, %u, %u) "
              "waits at another (@)", i.x, i.y, i.z);
    }
    barrier.votes[round] += ballot;
    if (++barrier.arrived < thread_count) wait(&epoch, "__syncthreads", site, place);
    else barrier.arrived = 0, ++epoch;
    int count = barrier.votes[round];
    return vote == ANY_VOTE ? count > 0 : vote == ALL_VOTE ? count == thread_count : count;
}

// The lanes of the mask meet: each deposits a value, and all continue when the last has arrived.
template <class Deposit>
static inline Meeting& meet(Site site, const char* operation, unsigned mask, const void* place, Deposit deposit) {
    int lane = current->number % LANES, number = current->number / LANES;
    Warp& warp = warps[number];
    if (!(mask >> lane & 1))
        fault(place, nullptr, "%s by lane %d, which is not in its mask 0x%08x", operation, lane, mask);
    if (warp.exited & mask)
        fault(place, nullptr, "%s with mask 0x%08x names lane %d, which has exited",
              operation, mask, __builtin_ctz(warp.exited & mask));
    Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
    if (meeting.arrived == 0) {
        meeting.site = site.number;
        meeting.mask = mask;
        meeting.first = current;
        meeting.ballots[meeting.rounds & 1] = 0;
    } else if (meeting.site != site.number || meeting.mask != mask) {
        fault(place, meeting.first->place, "divergent warp operations: %s with mask 0x%08x, while lane %d waits at %s "
              "with mask 0x%08x (@)", operation, mask, meeting.first->number % LANES, meeting.first->operation,
              meeting.mask);
    }
    deposit(meeting, meeting.rounds & 1, lane);
    if (++meeting.arrived < __builtin_popcount(mask)) wait(&meeting.rounds, operation, site, place);
    else meeting.arrived = 0, ++meeting.rounds;
    return meeting;
}

void warp_barrier(Site site, unsigned mask) {
    int number = current->number / LANES;
    meet(site, "__syncwarp", mask, __builtin_return_address(0), [=](Meeting& meeting, int, int) {
        // The last lane to arrive joins the clocks of all lanes before any lane continues.
        if (launch->checked && meeting.arrived + 1 == __builtin_popcount(mask)) join_clocks(number, mask);
    });
}

unsigned warp_ballot(Site site, const char* name, unsigned mask, bool ballot) {
    int mine;
    Meeting& meeting = meet(site, name, mask, __builtin_return_address(0), [&](Meeting& meeting, int round, int lane) {
        meeting.ballots[mine = round] |= unsigned(ballot) << lane;
    });
    return meeting.ballots[mine];
}

void warp_shuffle(Site site, Shuffle kind, unsigned mask, const void* value, void* result, size_t bytes, int lane,
                  int width) {
    static const char* const names[] = {"__shfl_sync", "__shfl_down_sync", "__shfl_up_sync", "__shfl_xor_sync"};
    const void* place = __builtin_return_address(0);
    int mine, self = current->number % LANES;
    Meeting& meeting = meet(site, names[kind], mask, place, [&](Meeting& meeting, int round, int) {
        if (bytes == 4) memcpy(meeting.values[round][self], value, 4);
        else memcpy(meeting.values[round][self], value, 8);
        mine = round;
    });
    // Segments of `width` lanes; a lane that would read beyond its segment gets its own value.
    int first = self & ~(width - 1), source = self;
    if (kind == FROM_LANE) source = first + (lane & (width - 1));
    if (kind == FROM_ABOVE && self + lane < first + width) source = self + lane;
    if (kind == FROM_BELOW && self - lane >= first) source = self - lane;
    if (kind == FROM_XOR && (self ^ lane) < first + width) source = self ^ lane;
    if (!(mask >> source & 1))
        fault(place, nullptr, "%s reads lane %d, which is not in its mask 0x%08x", names[kind], source, mask);
    if (bytes == 4) memcpy(result, meeting.values[mine][source], 4);
    else memcpy(result, meeting.values[mine][source], 8);
}

int warp_round() { return warps[current->number / LANES].meetings[0].rounds & 1; }

void meet_warp(Site site, const char* operation, const void* place) {
    meet(site, operation, ~0u, place, [](Meeting&, int, int) {});
}

void trap(const char* what) { fault(__builtin_return_address(0), nullptr, "%s", what); }

static void prepare(Thread& thread, int number) {
    thread = Thread();
    thread.number = number;
    thread.index = unflatten(number, launch->block);
    thread.stack = launch->stacks + number * STACK_BYTES;
    // Stacks begin at different offsets in a page; otherwise all frames would compete for the same few cache lines.
    thread.top = thread.stack + STACK_BYTES - 64 - number * 1088 % 61440 / 64 * 64;
    void** stack = (void**)thread.top;
    *--stack = nullptr;                     // no caller
    *--stack = (void*)&thread_main;         // emulator_switch returns there
    stack -= 6;
    memset(stack, 0, 6 * sizeof(void*));    // the registers that it pops
    thread.stack_pointer = stack;
}

// 0 to count - 1 in the order of the launch's schedule; the random order is a Fisher-Yates shuffle with Knuth's
// generator.
static void put_in_order(std::vector<int>& numbers, int count) {
    numbers.resize(count);
    for (int i = 0; i < count; ++i) numbers[i] = launch->order == 1 ? count - 1 - i : i;
    for (int i = count - 1; launch->order == 2 && i > 0; --i) {
        random_state = random_state * 6364136223846793005 + 1442695040888963407;
        int other = (random_state >> 33) % (i + 1), moved = numbers[i];
        numbers[i] = numbers[other];
        numbers[other] = moved;
    }
}

int run(Launch* next, void (*function)(void**), void** arguments) {
    launch = next;
    kernel = function;
    kernel_arguments = arguments;
    memcpy(&gridDim, launch->grid, sizeof gridDim);
    memcpy(&blockDim, launch->block, sizeof blockDim);
    thread_count = blockDim.x * blockDim.y * blockDim.z;
    launch->message[0] = 0;

    random_state = launch->seed;
    put_in_order(blocks, gridDim.x * gridDim.y * gridDim.z);

    if (!begin_memory()) {
        end_memory();
        return 2;
    }
    begin_watch();
    for (int block : blocks) {
        block_number = block;
        blockIdx = unflatten(block, launch->grid);
        put_in_order(turns, thread_count);
        for (int i = 0; i < thread_count; ++i) prepare(threads[i], i);
        for (int i = 0; i < (thread_count + LANES - 1) / LANES; ++i) {
            warps[i].exited = 0;
            for (Meeting& meeting : warps[i].meetings) meeting.arrived = 0;
        }
        epoch = barrier.arrived = exited = 0;
        turn = -1;
        begin_block_memory();
        begin_block_copies();
        begin_block_watch();
        current = &host;
        run_others();
        current = nullptr;
        if (launch->message[0]) break;
    }
    end_watch();
    end_memory();
    return launch->message[0] != 0;
}
}
