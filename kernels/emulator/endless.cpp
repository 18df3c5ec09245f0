// Endless loops. A checked kernel counts the steps of each thread, a fast one is looked at by a clock.
//
// g++ -fsanitize-coverage=trace-pc puts a call at the beginning of every run of instructions without a branch: a step. If
// a thread takes more steps in a block than the launch allows, or all threads together take more than ten times as many,
// a thread is watched for some more steps; the place to which it comes most often is in the innermost loop.
// A fast kernel has no such calls, and g++ leaves them out of an empty loop. A timer interrupts both. A fast block that
// has taken more processor time than the launch allows is at fault where it was interrupted; a checked one if it has
// taken no step for that time.
#include "runtime.h"
#include <csignal>
#include <cstring>
#include <ctime>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace emulator {

constexpr uint64_t WATCHED = 1 << 16;           // steps
constexpr int PLACES = 4096, TICKS = 8, TIMES = 10;
struct Place { const void* at; uint64_t times; };
static Place places[PLACES];                    // of the watched thread; a table of hashes
static const Thread* watched;
static uint64_t seen, block_steps;              // steps of the watched thread while it was watched, and of the block
static uint64_t steps_at_tick;                  // of the block, at the last tick of the timer

static Place& place_of(const void* at) {
    size_t i = (size_t)at * 0x9e3779b97f4a7c15 >> 52;
    for (int tried = 0; tried < PLACES && places[i].at && places[i].at != at; ++tried) i = (i + 1) % PLACES;
    places[i].at = at;
    return places[i];
}

static void watch(const void* at) {
    if (!watched || watched->done) {
        watched = current;
        seen = 0;
        memset(places, 0, sizeof places);
    }
    if (watched != current) return;
    ++place_of(at).times;
    if (++seen < WATCHED) return;
    Place most = {};
    for (const Place& place : places)
        if (place.times > most.times || (place.times == most.times && place.at < most.at)) most = place;
    double times = double(most.times) * current->steps / WATCHED;
    fault(most.at, nullptr, "endless loop: the thread came here about %.0f times in %.0f steps; at most %llu steps of a "
          "thread, and %llu of a block, are allowed", times, double(current->steps), launch->most_steps,
          TIMES * launch->most_steps);
}

extern "C" void __sanitizer_cov_trace_pc() {
    if (!current) return;
    ++block_steps;
    if (++current->steps > launch->most_steps || block_steps > TIMES * launch->most_steps) watch(__builtin_return_address(0));
}

static timer_t timer;
static bool has_timer;
static struct sigaction action_before;
static volatile int ticks;
static int signal_number() { return SIGRTMAX - 7; }

static void tick(int, siginfo_t*, void* context) {
    size_t depth = (char*)__builtin_frame_address(0) - (current ? current->stack : nullptr);
    if (block_steps != steps_at_tick) ticks = 0;
    steps_at_tick = block_steps;
    if (!current || depth >= STACK_BYTES || ++ticks < TICKS) return;      // on another stack: between two threads
    const void* at = (char*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] + 1;     // + 1: as a return address
    if (launch->checked)
        fault(at, nullptr, "endless loop: the thread has taken %g s of processor time here, without a step",
              ticks * launch->most_seconds / TICKS);
    fault(at, current->place, "endless loop: the block has run for %g s, and the thread is here; the limit is %g s. "
          "emulator.checked() counts how often it comes round", ticks * launch->most_seconds / TICKS,
          launch->most_seconds);
}

void begin_watch() {
    watched = nullptr;
    has_timer = false;
    if (launch->most_seconds <= 0) return;
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = signal_number();
    event.sigev_notify_thread_id = syscall(SYS_gettid);
    struct sigaction action = {};
    action.sa_sigaction = tick;
    action.sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER;        // a fault leaves the handler without returning
    sigaction(signal_number(), &action, &action_before);
    has_timer = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer) == 0;
    double seconds = launch->most_seconds / TICKS;
    timespec every = {time_t(seconds), long((seconds - time_t(seconds)) * 1e9)};
    itimerspec times = {every, every};
    if (has_timer) timer_settime(timer, 0, &times, nullptr);
}

void begin_block_watch() {
    ticks = 0;
    block_steps = steps_at_tick = 0;
    watched = nullptr;
}

void end_watch() {
    if (launch->most_seconds <= 0) return;
    if (has_timer) timer_delete(timer);
    sigaction(signal_number(), &action_before, nullptr);
}
}
