// The checks of every load and store of a checked kernel: inside an array of the kernel, aligned, no write to const, no
// read before the first write, no race.
//
// g++ -fsanitize=thread puts a call before each access, to functions such as __tsan_read4. Google's library for them is
// not linked; the functions are defined at the end of this file.
#include "races.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern char __ehdr_start[] __attribute__((visibility("hidden")));   // the linker's names: where this library begins
extern char _end[] __attribute__((visibility("hidden")));           // and ends

namespace emulator {

const char* library() { return __ehdr_start; }

// Memory that a kernel may access: an argument, or a shared array.
struct Region {
    char* begin;
    size_t bytes, element;
    bool shared, writable;
    const char* name;
    Buffer* buffer = nullptr;       // for an argument
    const void* key = nullptr;      // for a shared array: identifies its declaration
    unsigned shift = 0;             // a cell has 1 << shift bytes
    Cell* cells = nullptr;          // none in fast launches
};
constexpr int MOST_REGIONS = 128;
static Region regions[MOST_REGIONS];
static int region_count;
static char* dynamic_memory;
static size_t static_bytes;
static Region* recent[256];         // by instruction: most access the same array every time

static Region& add_region(const Region& region) {
    if (region_count == MOST_REGIONS) fault(nullptr, nullptr, "more than %d arrays in one kernel", MOST_REGIONS);
    Region& added = regions[region_count++] = region;
    if (launch->checked) {
        added.shift = region.element == 8 ? 3 : region.element >= 4 || region.element == 0 ? 2 : region.element / 2;
        added.cells = (Cell*)calloc((region.bytes >> added.shift) + 1, sizeof(Cell));   // a page is allocated at its first use
    }
    return added;
}

static void fill_uninitialised(void* memory, size_t bytes) {
    size_t words = bytes / 4;
    for (size_t i = 0; i < words; ++i) memcpy((char*)memory + 4 * i, &UNINITIALISED, 4);
    memset((char*)memory + 4 * words, 0x5a, bytes % 4);
}

constexpr size_t ALIGNMENT = 256;
static char* allocate(size_t bytes) { return (char*)aligned_alloc(ALIGNMENT, (bytes / ALIGNMENT + 1) * ALIGNMENT); }

bool begin_memory() {
    region_count = 0;
    static_bytes = 0;
    memset(recent, 0, sizeof recent);
    dynamic_memory = allocate(launch->dynamic_bytes);
    add_region({dynamic_memory, launch->dynamic_bytes, 0, true, true, "dynamic shared memory"});
    for (size_t i = 0; launch->checked && i < launch->buffer_count; ++i) {
        Buffer& buffer = launch->buffers[i];
        if (!add_region({buffer.address, buffer.bytes, buffer.element, false, buffer.writable != 0, buffer.name,
                         &buffer}).cells) return false;
    }
    return true;
}

void begin_block_memory() {
    for (int i = 0; i < region_count; ++i)
        if (regions[i].shared) fill_uninitialised(regions[i].begin, regions[i].bytes);
    if (launch->checked) reset_clocks();
}

void end_memory() {
    for (int i = 0; i < region_count; ++i) {
        free(regions[i].cells);
        if (regions[i].key) free((void*)((size_t)regions[i].begin / ALIGNMENT * ALIGNMENT));
    }
    free(dynamic_memory);
}

void* dynamic_shared() { return dynamic_memory; }

static void count_static(size_t bytes, const void* place) {
    static_bytes += bytes;
    if (static_bytes > 48 << 10)
        fault(place, nullptr, "%zu bytes of __shared__ variables; CUDA allows 48 KiB", static_bytes);
    if (static_bytes + launch->dynamic_bytes > launch->shared_limit)
        fault(place, nullptr, "%zu bytes of __shared__ variables and %zu of dynamic shared memory are more than "
              "the %zu that this launch may have", static_bytes, launch->dynamic_bytes, launch->shared_limit);
}

void declare_shared(void* address, size_t bytes) {
    for (int i = 0; i < region_count; ++i) if (regions[i].begin == address) return;
    count_static(bytes, __builtin_return_address(0));
    fill_uninitialised(address, bytes);
    add_region({(char*)address, bytes, 0, true, true, "shared memory"});
}

// The array is aligned as it is declared and no better, because a device may place it so.
void* shared_array(const void* key, size_t bytes, size_t element, size_t alignment, const char* name) {
    for (int i = 0; i < region_count; ++i) if (regions[i].key == key) return regions[i].begin;
    count_static(bytes, __builtin_return_address(0));
    char* memory = allocate(bytes + alignment) + alignment % ALIGNMENT;
    fill_uninitialised(memory, bytes);
    return add_region({memory, bytes, element, true, true, name, nullptr, key}).begin;
}

// Messages of faults.

static const char* name_of(const Region& region, const char* address) {
    static char text[128];
    size_t byte = address - region.begin;
    if (!region.element) snprintf(text, sizeof text, "%s at byte %zu", region.name, byte);
    else snprintf(text, sizeof text, "%s%s[%zu]", region.shared ? "shared " : "", region.name, byte / region.element);
    return text;
}

[[noreturn]] static void out_of_bounds(char* address, size_t bytes, Kind kind, const void* place) {
    size_t stack = (address - launch->stacks) / STACK_BYTES;
    if (address >= launch->stacks && stack < (size_t)thread_count) {
        uint3 i = threads[stack].index;
        fault(place, nullptr, "out of bounds: %s a local variable of thread (%u, %u, %u)", VERBS[kind], i.x, i.y, i.z);
    }
    const Region* nearest = nullptr;
    size_t gap = 0;
    for (int i = 0; i < region_count; ++i) {
        const Region& r = regions[i];
        size_t distance = address < r.begin ? r.begin - address : address + bytes - (r.begin + r.bytes);
        if (!nearest || distance < gap) nearest = &r, gap = distance;
    }
    if ((size_t)address < 4096 || !nearest)
        fault(place, nullptr, "out of bounds: %s %zu bytes at address %p", VERBS[kind], bytes, (void*)address);
    bool before = address < nearest->begin;
    char size[64];
    if (nearest->element) snprintf(size, sizeof size, "which has %zu elements", nearest->bytes / nearest->element);
    else snprintf(size, sizeof size, "which has %zu bytes", nearest->bytes);
    fault(place, nullptr, "out of bounds: %s %zu bytes, %zu bytes %s %s%s, %s", VERBS[kind], bytes,
          before ? gap : gap - bytes, before ? "before the start of" : "past the end of",
          nearest->shared && nearest->element ? "shared " : "", nearest->name, size);
}

[[noreturn]] static void race(const Cell& cell, const Access& then, Kind kind, const Region& region,
                              const char* address, const void* place) {
    bool read = &then == &cell.read || &then == &cell.other_read;
    uint3 i = unflatten(then.thread, launch->block), b = unflatten(then.block, launch->grid);
    char who[128];
    if (then.block == block_number) snprintf(who, sizeof who, "thread (%u, %u, %u)", i.x, i.y, i.z);
    else snprintf(who, sizeof who, "thread (%u, %u, %u) of block (%u, %u, %u)", i.x, i.y, i.z, b.x, b.y, b.z);
    fault(place, library() + then.instruction, "data race: %s %s, which %s %s @ with no barrier between", VERBS[kind],
          name_of(region, address), who, read ? "read" : then.atomic ? "updated atomically" : "wrote");
}

// The checks.

static inline Region* find(const char* address, size_t bytes, const void* place) {
    Region*& last = recent[(size_t)place % 256];
    if (last && address >= last->begin && address + bytes <= last->begin + last->bytes) return last;
    for (int i = 0; i < region_count; ++i) {
        Region& r = regions[i];
        if (address >= r.begin && address + bytes <= r.begin + r.bytes) return last = &r;
    }
    return nullptr;
}

// Without __restrict__ two arguments may be one array: then a write counts for the argument that is not const.
static Region* find_writable(const char* address, size_t bytes) {
    for (int i = 0; i < region_count; ++i) {
        Region& r = regions[i];
        if (r.writable && address >= r.begin && address + bytes <= r.begin + r.bytes) return &r;
    }
    return nullptr;
}

// Memory that was allocated and never written holds a mark (emulator.poison() puts it into arrays). One matching word
// of a double can be chance; two are not.
static inline bool uninitialised(const Region& region, const char* address, size_t bytes) {
    if (region.element < 4) return false;
    uint32_t word;
    for (size_t i = 0; i < bytes; i += 4) {
        memcpy(&word, address + i, 4);
        if (word != UNINITIALISED) return false;
    }
    return bytes >= region.element;
}

// The quarters of a cell that an access of `bytes` at byte `offset` of the cell covers, as bits.
static inline unsigned quarters(size_t offset, size_t bytes, unsigned shift) {
    if (bytes >> shift) return 15;
    size_t first = offset * 4 >> shift, last = (offset + bytes) * 4 - 1 >> shift;
    return (2u << last) - (1u << first) & 15;
}

static inline void access(void* pointer, size_t bytes, Kind kind, const void* place, bool counted = true) {
    if (!current) return;                               // a constructor that runs while the library is loaded
    char* address = (char*)pointer;
    if (size_t(address - current->stack) < STACK_BYTES) {
        if (address < (char*)__builtin_frame_address(0) || address >= current->top)
            fault(place, nullptr, "out of bounds: %s beyond the thread's local variables", VERBS[kind]);
        return;
    }
    if (address >= __ehdr_start && address < _end) {
        if (kind == READ) return;                       // a constant
        fault(place, nullptr, "%s a variable of the module; the emulator supports only reading them", VERBS[kind]);
    }
    if ((size_t)address % (bytes > 16 ? 4 : bytes))
        fault(place, nullptr, "misaligned: %s %zu bytes at an address that is not a multiple of %zu", VERBS[kind],
              bytes, bytes);
    Region* region = find(address, bytes, place);
    if (!region) out_of_bounds(address, bytes, kind, place);
    if (kind != READ && !region->writable) {
        Region* other = find_writable(address, bytes);
        if (!other) fault(place, nullptr, "writes to const: %s %s", VERBS[kind], name_of(*region, address));
        region = other;
    }
    size_t& bytes_read = region->buffer ? region->buffer->bytes_read : launch->shared_read;
    size_t& bytes_written = region->buffer ? region->buffer->bytes_written : launch->shared_written;
    if (kind != WRITE && counted) bytes_read += bytes;
    if (kind != READ && counted) bytes_written += bytes;
    if (region->shared && copies_in_flight) check_copies_in_flight(address, bytes, kind, place);
    if (kind != WRITE && !region->shared && uninitialised(*region, address, bytes))
        fault(place, nullptr, "uninitialised: %s %s, which nothing has written", VERBS[kind],
              name_of(*region, address));

    size_t offset = address - region->begin;
    uint32_t instruction = (const char*)place - library();
    Access now = this_access(instruction, quarters(offset & (1u << region->shift) - 1, bytes, region->shift), kind);
    for (size_t i = offset >> region->shift; i <= offset + bytes - 1 >> region->shift; ++i) {
        Cell& cell = region->cells[i];
        if (region->shared && kind != WRITE && !counts(cell.write, now, true))
            fault(place, nullptr, "uninitialised: %s %s, which no thread of this block has written", VERBS[kind],
                  name_of(*region, region->begin + (i << region->shift)));
        if (const Access* then = enter(cell, now, kind, region->shared))
            race(cell, *then, kind, *region, region->begin + (i << region->shift), place);
    }
}

void check_access(void* address, size_t bytes, Kind kind, const void* place, bool counted) {
    access(address, bytes, kind, place, counted);
}

static bool inside(const void* address, size_t bytes, const void* begin, size_t size) {
    return address >= begin && (const char*)address + bytes <= (const char*)begin + size;
}

bool in_shared(const void* address, size_t bytes) {
    for (int i = 0; i < region_count; ++i)
        if (regions[i].shared && inside(address, bytes, regions[i].begin, regions[i].bytes)) return true;
    return false;
}

bool in_argument(const void* address, size_t bytes) {
    for (size_t i = 0; i < launch->buffer_count; ++i)
        if (inside(address, bytes, launch->buffers[i].address, launch->buffers[i].bytes)) return true;
    return false;
}

const char* name_of(const void* address) {
    for (int i = 0; i < region_count; ++i)
        if (inside(address, 1, regions[i].begin, regions[i].bytes)) return name_of(regions[i], (const char*)address);
    return "memory of no array";
}

void atomic_load(const void* address, void* value, size_t bytes) {
    if (launch->checked) access(const_cast<void*>(address), bytes, ATOMIC, __builtin_return_address(0));
    memcpy(value, address, bytes);
}

void atomic_store(void* address, const void* value, size_t bytes) { memcpy(address, value, bytes); }
}

// The functions that -fsanitize=thread calls.

using emulator::access;
using emulator::current;

extern "C" {
#define EMULATOR_ACCESS(bytes)                                                                                   \
    void __tsan_read##bytes(void* p) { access(p, bytes, emulator::READ, __builtin_return_address(0)); }          \
    void __tsan_write##bytes(void* p) { access(p, bytes, emulator::WRITE, __builtin_return_address(0)); }        \
    void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, emulator::READ, __builtin_return_address(0)); } \
    void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, emulator::WRITE, __builtin_return_address(0)); }
EMULATOR_ACCESS(1) EMULATOR_ACCESS(2) EMULATOR_ACCESS(4) EMULATOR_ACCESS(8) EMULATOR_ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, emulator::READ, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, emulator::WRITE, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}

// The stack of calls, so that a fault in a helper can name the line of the kernel that called it.
void __tsan_func_entry(const void* caller) {
    if (!current) return;
    if (current->depth < emulator::DEEPEST) current->calls[current->depth] = caller;
    ++current->depth;
    size_t left = (char*)__builtin_frame_address(0) - current->stack;
    if (left < emulator::STACK_SPARE || left > emulator::STACK_BYTES)
        emulator::fault(caller, nullptr, "stack overflow: %d calls are active, and the %zu bytes of a thread's stack are "
                        "used up. Does the recursion end?", current->depth, emulator::STACK_BYTES);
}
void __tsan_func_exit() { if (current) --current->depth; }
}
