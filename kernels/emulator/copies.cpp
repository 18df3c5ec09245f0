// Asynchronous copies from global to shared memory (cp.async).
//
// A device may copy the bytes at any time between copy16 and the wait. Here they arrive at the wait, as late as
// possible, so a kernel that reads them before the wait gets the old ones. A checked kernel enters a write into the
// records of races twice, at copy16 and at the wait: a barrier must come between a read of the old bytes and copy16,
// and between the wait and a read of the new ones. An access between the two writes is a fault of its own.
#include "runtime.h"
#include <cstring>
#include <unordered_map>
#include <vector>

namespace emulator {

constexpr size_t BYTES = 16;                    // of a copy
struct Copy {
    char* to;
    const char* from;                           // nullptr: zeros
    const void* place;                          // where it was issued
    uint64_t group;
};
static struct { std::vector<Copy> copies; uint64_t group; } queues[MOST_THREADS];    // group: the one that is open
static std::unordered_map<size_t, std::pair<int, const void*>> targets;     // checked: address / 16 to thread, place
size_t copies_in_flight;

void begin_block_copies() {
    for (int i = 0; i < thread_count; ++i) {
        queues[i].copies.clear();
        queues[i].group = 0;
    }
    targets.clear();
    copies_in_flight = 0;
}

void check_copies_in_flight(const char* address, size_t bytes, Kind kind, const void* place) {
    auto found = targets.find((size_t)address / BYTES);
    if (found == targets.end()) found = targets.find((size_t)(address + bytes - 1) / BYTES);
    if (found == targets.end()) return;
    uint3 i = threads[found->second.first].index;
    fault(place, found->second.second, "copy in flight: %s %s, to which thread (%u, %u, %u) copies @; the bytes arrive "
          "at its copies_wait", VERBS[kind], name_of(address), i.x, i.y, i.z);
}

void begin_copy(void* to, const void* from, bool real) {
    const void* place = __builtin_return_address(0);
    if ((size_t)to % BYTES || (size_t)from % BYTES)
        fault(place, nullptr, "misaligned: copy16 %s an address that is not a multiple of 16",
              (size_t)to % BYTES ? "writes to" : "reads from");
    if (!in_shared(to, BYTES))
        fault(place, nullptr, "out of bounds: copy16 writes 16 bytes that are not all inside one shared array");
    if (real && !in_argument(from, BYTES))
        fault(place, nullptr, "out of bounds: copy16 reads 16 bytes that are not all inside one array in global "
              "memory");
    if (launch->checked) {
        if (real) check_access(const_cast<void*>(from), BYTES, READ, place, true);
        check_access(to, BYTES, WRITE, place, true);
        targets[(size_t)to / BYTES] = {current->number, place};
    }
    auto& queue = queues[current->number];
    queue.copies.push_back({(char*)to, real ? (const char*)from : nullptr, place, queue.group});
    ++copies_in_flight;
}

void commit_copies() { ++queues[current->number].group; }

static void arrive(const Copy& copy, const void* place) {
    --copies_in_flight;
    if (launch->checked) {
        targets.erase((size_t)copy.to / BYTES);
        if (copy.from) check_access(const_cast<char*>(copy.from), BYTES, READ, place, false);
        check_access(copy.to, BYTES, WRITE, place, false);
    }
    if (copy.from) memcpy(copy.to, copy.from, BYTES);
    else memset(copy.to, 0, BYTES);
}

void wait_for_copies(int groups) {
    const void* place = __builtin_return_address(0);
    auto& [copies, group] = queues[current->number];
    size_t arrived = 0;
    while (arrived < copies.size() && copies[arrived].group + groups < group) arrive(copies[arrived++], place);
    copies.erase(copies.begin(), copies.begin() + arrived);
}

void end_thread_copies() {
    const auto& copies = queues[current->number].copies;
    if (copies.empty()) return;
    fault(copies[0].place, nullptr, "copy in flight: the thread ends and has not waited for this copy16; %zu of its "
          "copies are in flight", copies.size());
}
}
