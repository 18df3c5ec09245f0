// The interface between a kernel, as g++ compiles it, and the runtime. Included by device.h and by runtime.h.
// No library headers: the text of a kernel is compiled without any, as with NVRTC.
#pragma once

typedef __SIZE_TYPE__ size_t;
struct uint3 { unsigned x, y, z; };

namespace emulator {

// Every communication between threads goes through these functions, so that the runtime sees it.
// A site is the place of a call in the source; each site has a number.
struct Site { const char* file; int line, number; };
enum Vote { NO_VOTE, ANY_VOTE, ALL_VOTE, COUNT_VOTE };
int block_barrier(Site site, Vote vote, bool ballot);                    // __syncthreads and its three votes
void warp_barrier(Site site, unsigned mask);                             // __syncwarp
unsigned warp_ballot(Site site, const char* name, unsigned mask, bool ballot);
enum Shuffle { FROM_LANE, FROM_ABOVE, FROM_BELOW, FROM_XOR };           // _sync, _down_sync, _up_sync, _xor_sync
void warp_shuffle(Site site, Shuffle kind, unsigned mask, const void* value, void* result, size_t bytes,
                  int lane, int width);
// The two halves of an atomic operation. No thread can come between them: threads switch only at barriers.
void atomic_load(const void* address, void* value, size_t bytes);
void atomic_store(void* address, const void* value, size_t bytes);
void* dynamic_shared();
void* shared_array(const void* key, size_t bytes, size_t element, size_t alignment, const char* name);  // checked
void declare_shared(void* address, size_t bytes);                                       // fast: a static variable
[[noreturn]] void trap(const char* what);
// Tensor cores (tensor_cores.cpp) and asynchronous copies (copies.cpp), for tensor_cores.h.
void warp_mma(Site site, float* d, const unsigned* a, unsigned b0, unsigned b1);
void warp_ldmatrix(Site site, const char* name, bool transposed, unsigned* result, const void* row);
void begin_copy(void* to, const void* from, bool real);
void commit_copies();
void wait_for_copies(int groups);

// One launch. module.py fills it in through a ctypes.Structure with the same fields.
struct Buffer {                     // an array given as an argument
    char* address;
    size_t bytes, element;
    int writable;
    const char* name;
    size_t bytes_read, bytes_written;
};
struct Launch {
    unsigned grid[3], block[3];
    size_t dynamic_bytes, shared_limit;
    int checked, order;             // order of threads and blocks: 0 forward, 1 reversed, 2 random
    unsigned seed;
    unsigned long long most_steps;  // of a thread in a block, if checked
    double most_seconds;            // of a block, if not; without a step, if checked; 0: no limit
    char* stacks;                   // memory of 1024 stacks
    size_t buffer_count;
    Buffer* buffers;
    size_t shared_read, shared_written;
    char message[512];              // empty: no fault. module.py replaces "@" by the place of the other access.
    unsigned fault_block[3], fault_thread[3];
    size_t places[16], other_place; // return addresses in this library, innermost first; 0 where there is none
};
int run(Launch* launch, void (*kernel)(void**), void** arguments);

// The types of a kernel's arguments come from the type system: const float* is "cf4", int is "i4".
template <class T> struct Letter { static constexpr char value = '?'; };
#define EMULATOR_LETTER(type, letter) template <> struct Letter<type> { static constexpr char value = letter; };
EMULATOR_LETTER(float, 'f') EMULATOR_LETTER(double, 'f') EMULATOR_LETTER(bool, 'b')
EMULATOR_LETTER(char, 'i') EMULATOR_LETTER(signed char, 'i') EMULATOR_LETTER(unsigned char, 'u')
EMULATOR_LETTER(short, 'i') EMULATOR_LETTER(int, 'i') EMULATOR_LETTER(long, 'i') EMULATOR_LETTER(long long, 'i')
EMULATOR_LETTER(unsigned short, 'u') EMULATOR_LETTER(unsigned, 'u') EMULATOR_LETTER(unsigned long, 'u')
EMULATOR_LETTER(unsigned long long, 'u')
#undef EMULATOR_LETTER

#define EMULATOR_UNCHECKED __attribute__((no_sanitize("thread", "undefined")))
template <class T> struct Code {
    EMULATOR_UNCHECKED static void write(char*& out) {
        *out++ = Letter<T>::value; *out++ = char('0' + sizeof(T)); *out++ = ' ';
    }
};
template <class T> struct Code<T*> {
    EMULATOR_UNCHECKED static void write(char*& out) { *out++ = 'p'; Code<T>::write(out); }
};
template <class T> struct Code<const T*> {
    EMULATOR_UNCHECKED static void write(char*& out) { *out++ = 'c'; Code<T>::write(out); }
};

template <auto function> struct Kernel;
template <class... Arguments, void (*function)(Arguments...)> struct Kernel<function> {
    template <size_t...> struct Indices {};
    template <size_t n, size_t... rest> struct Count : Count<n - 1, n - 1, rest...> {};
    template <size_t... indices> struct Count<0, indices...> { typedef Indices<indices...> Result; };
    template <size_t... i> EMULATOR_UNCHECKED static void unpack(void** arguments, Indices<i...>) {
        function(*(Arguments*)arguments[i]...);
    }
    EMULATOR_UNCHECKED static void call(void** arguments) {
        unpack(arguments, typename Count<sizeof...(Arguments)>::Result());
    }
    EMULATOR_UNCHECKED static void signature(char* out) { (Code<Arguments>::write(out), ...); *out = 0; }
};
}

// build.py appends one line of this macro for every kernel. most_threads: of a block, from __launch_bounds__, or 0.
#define EMULATOR_EXPORT(name, most_threads, parameters)                                                            \
    extern "C" EMULATOR_UNCHECKED const char* name##__parameters() { return parameters; }                          \
    extern "C" EMULATOR_UNCHECKED int name##__signature(char* emulator_out) {                                      \
        emulator::Kernel<&::name>::signature(emulator_out); return most_threads; }                                 \
    extern "C" EMULATOR_UNCHECKED int name##__launch(emulator::Launch* emulator_launch, void** emulator_arguments) { \
        return emulator::run(emulator_launch, &emulator::Kernel<&::name>::call, emulator_arguments); }
