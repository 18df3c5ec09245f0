// CUDA's device API for g++, included before the text of a kernel: the part that the emulator supports.
//
// It defines nothing that NVRTC does not: no header of the C or C++ library, no std::, no INFINITY. Code that NVRTC
// rejects must fail to compile here too. Operations between threads are implemented in scheduler.cpp.
#pragma once
#include "bridge.h"

#define EMULATOR            // tensor.cuh: functions of tensor_cores.h instead of PTX
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDA_ARCH__ 750

// Qualifiers. build.py defines the first two as themselves when it searches for the names of kernels.
#ifndef __global__
#define __global__
#define __launch_bounds__(...)
#endif
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define EMULATOR_INLINE inline __attribute__((always_inline))

// The place of a thread: constant for the thread (the scheduler sets it when it resumes one), hence const.
typedef uint3 dim3;
extern const uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// Vectors, of CUDA's alignment.
#define EMULATOR_VECTORS(type, name, alignment2, alignment4)                                                     \
    struct alignas(alignment2) name##2 { type x, y; };                                                           \
    struct alignas(alignment4) name##4 { type x, y, z, w; };                                                     \
    EMULATOR_INLINE name##2 make_##name##2(type x, type y) { return {x, y}; }                                    \
    EMULATOR_INLINE name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned, uint, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
#undef EMULATOR_VECTORS

// Barriers. Each place in the source has a number: two threads that wait at different places have diverged.
#define EMULATOR_SITE ::emulator::Site{__FILE__, __LINE__, __COUNTER__}
#define __syncthreads() ((void)::emulator::block_barrier(EMULATOR_SITE, ::emulator::NO_VOTE, false))
#define __syncthreads_or(...) ::emulator::block_barrier(EMULATOR_SITE, ::emulator::ANY_VOTE, (__VA_ARGS__) != 0)
#define __syncthreads_and(...) ::emulator::block_barrier(EMULATOR_SITE, ::emulator::ALL_VOTE, (__VA_ARGS__) != 0)
#define __syncthreads_count(...) ::emulator::block_barrier(EMULATOR_SITE, ::emulator::COUNT_VOTE, (__VA_ARGS__) != 0)
#define __syncwarp(...) ::emulator::sync_warp(EMULATOR_SITE __VA_OPT__(,) __VA_ARGS__)
#define __ballot_sync(...) ::emulator::ballot(EMULATOR_SITE, __VA_ARGS__)
#define __any_sync(...) ::emulator::any(EMULATOR_SITE, __VA_ARGS__)
#define __all_sync(...) ::emulator::all(EMULATOR_SITE, __VA_ARGS__)
#define __shfl_sync(...) ::emulator::shuffle<::emulator::FROM_LANE>(EMULATOR_SITE, __VA_ARGS__)
#define __shfl_up_sync(...) ::emulator::shuffle<::emulator::FROM_BELOW>(EMULATOR_SITE, __VA_ARGS__)
#define __shfl_down_sync(...) ::emulator::shuffle<::emulator::FROM_ABOVE>(EMULATOR_SITE, __VA_ARGS__)
#define __shfl_xor_sync(...) ::emulator::shuffle<::emulator::FROM_XOR>(EMULATOR_SITE, __VA_ARGS__)
unsigned __activemask() __attribute__((error("__activemask() tells which lanes happen to run together; name the "
                                             "lanes that must meet in the mask")));

namespace emulator {
EMULATOR_INLINE void sync_warp(Site site, unsigned mask = 0xffffffffu) { warp_barrier(site, mask); }
EMULATOR_INLINE unsigned ballot(Site site, unsigned mask, int predicate) {
    return warp_ballot(site, "__ballot_sync", mask, predicate != 0);
}
EMULATOR_INLINE int any(Site site, unsigned mask, int predicate) {
    return warp_ballot(site, "__any_sync", mask, predicate != 0) != 0;
}
EMULATOR_INLINE int all(Site site, unsigned mask, int predicate) {
    return warp_ballot(site, "__all_sync", mask, predicate == 0) == 0;
}
template <Shuffle kind, class T>
EMULATOR_INLINE T shuffle(Site site, unsigned mask, T value, int lane, int width = 32) {
    static_assert(Letter<T>::value != '?' && sizeof(T) >= 4, "CUDA shuffles numbers of 4 or 8 bytes");
    T result;
    warp_shuffle(site, kind, mask, &value, &result, sizeof(T), lane, width);
    return result;
}
// A __shared__ variable of a checked build has memory of its own, so that its bounds are exact.
// `alignment` is a lambda; its type is a different one for every declaration.
template <class T> struct Scalar { typedef T type; };
template <class T, size_t n> struct Scalar<T[n]> : Scalar<T> {};
template <class T, class Here> EMULATOR_INLINE T& shared_variable(const char* name, Here alignment) {
    static char key;
    return *(T*)shared_array(&key, sizeof(T), sizeof(typename Scalar<T>::type), alignment(), name);
}
}

// Atomic operations, for the types for which CUDA has them.
#define EMULATOR_ATOMIC(name, type, updated)                                                                      \
    EMULATOR_INLINE type name(type* address, type value) {                                                        \
        type old; ::emulator::atomic_load(address, &old, sizeof old);                                             \
        type result = updated; ::emulator::atomic_store(address, &result, sizeof result); return old; }
#define EMULATOR_ATOMICS(type)                                                                                    \
    EMULATOR_ATOMIC(atomicAdd, type, old + value)                                                                 \
    EMULATOR_ATOMIC(atomicMax, type, old > value ? old : value)                                                   \
    EMULATOR_ATOMIC(atomicMin, type, old < value ? old : value)                                                   \
    EMULATOR_ATOMIC(atomicExch, type, value)                                                                      \
    EMULATOR_INLINE type atomicCAS(type* address, type expected, type value) {                                    \
        type old; ::emulator::atomic_load(address, &old, sizeof old);                                             \
        type result = old == expected ? value : old;                                                              \
        ::emulator::atomic_store(address, &result, sizeof result); return old; }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
EMULATOR_ATOMIC(atomicAdd, float, old + value)
EMULATOR_ATOMIC(atomicAdd, double, old + value)
EMULATOR_ATOMIC(atomicExch, float, value)
EMULATOR_ATOMIC(atomicSub, int, old - value)
EMULATOR_ATOMIC(atomicSub, unsigned, old - value)
#undef EMULATOR_ATOMICS
#undef EMULATOR_ATOMIC
EMULATOR_INLINE void __threadfence() {}
EMULATOR_INLINE void __threadfence_block() {}

// Mathematics: the same name for float and double, and with an f for float.
#define EMULATOR_MATH(name)                                                                                       \
    EMULATOR_INLINE float name##f(float x) { return __builtin_##name##f(x); }                                     \
    EMULATOR_INLINE float name(float x) { return __builtin_##name##f(x); }                                        \
    EMULATOR_INLINE double name(double x) { return __builtin_##name(x); }
#define EMULATOR_MATH2(name)                                                                                      \
    EMULATOR_INLINE float name##f(float x, float y) { return __builtin_##name##f(x, y); }                         \
    EMULATOR_INLINE float name(float x, float y) { return __builtin_##name##f(x, y); }                            \
    EMULATOR_INLINE double name(double x, double y) { return __builtin_##name(x, y); }
EMULATOR_MATH(exp) EMULATOR_MATH(exp2) EMULATOR_MATH(expm1) EMULATOR_MATH(log) EMULATOR_MATH(log2) EMULATOR_MATH(log10)
EMULATOR_MATH(log1p) EMULATOR_MATH(sqrt) EMULATOR_MATH(cbrt) EMULATOR_MATH(sin) EMULATOR_MATH(cos) EMULATOR_MATH(tan)
EMULATOR_MATH(sinh) EMULATOR_MATH(cosh) EMULATOR_MATH(tanh) EMULATOR_MATH(asin) EMULATOR_MATH(acos) EMULATOR_MATH(atan)
EMULATOR_MATH(erf) EMULATOR_MATH(erfc) EMULATOR_MATH(fabs) EMULATOR_MATH(floor) EMULATOR_MATH(ceil)
EMULATOR_MATH(trunc) EMULATOR_MATH(round) EMULATOR_MATH(rint)
EMULATOR_MATH2(pow) EMULATOR_MATH2(fmod) EMULATOR_MATH2(atan2) EMULATOR_MATH2(hypot) EMULATOR_MATH2(copysign)
#undef EMULATOR_MATH
#undef EMULATOR_MATH2
#define EMULATOR_FOR(type, suffix)                                                                                \
    EMULATOR_INLINE type fma##suffix(type x, type y, type z) { return __builtin_fma##suffix(x, y, z); }           \
    EMULATOR_INLINE type rsqrt##suffix(type x) { return 1 / __builtin_sqrt##suffix(x); }                          \
    /* of a NaN and a number: the number */                                                                       \
    EMULATOR_INLINE type fmax##suffix(type x, type y) { return x > y || y != y ? x : y; }                         \
    EMULATOR_INLINE type fmin##suffix(type x, type y) { return x < y || y != y ? x : y; }                         \
    EMULATOR_INLINE type ldexp##suffix(type x, int n) { return __builtin_ldexp##suffix(x, n); }                   \
    EMULATOR_INLINE bool isnan(type x) { return __builtin_isnan(x); }                                             \
    EMULATOR_INLINE bool isinf(type x) { return __builtin_isinf(x); }                                             \
    EMULATOR_INLINE bool isfinite(type x) { return __builtin_isfinite(x); }                                       \
    EMULATOR_INLINE type abs(type x) { return __builtin_fabs##suffix(x); }
EMULATOR_FOR(float, f)
EMULATOR_FOR(double, )
#undef EMULATOR_FOR
EMULATOR_INLINE float fma(float x, float y, float z) { return fmaf(x, y, z); }
EMULATOR_INLINE float rsqrt(float x) { return rsqrtf(x); }
EMULATOR_INLINE float fmax(float x, float y) { return fmaxf(x, y); }
EMULATOR_INLINE float fmin(float x, float y) { return fminf(x, y); }
EMULATOR_INLINE float ldexp(float x, int n) { return ldexpf(x, n); }
EMULATOR_INLINE int abs(int x) { return x < 0 ? -x : x; }
EMULATOR_INLINE long long abs(long long x) { return x < 0 ? -x : x; }

#define EMULATOR_MIN_MAX(type)                                                                                    \
    EMULATOR_INLINE type min(type x, type y) { return y < x ? y : x; }                                            \
    EMULATOR_INLINE type max(type x, type y) { return x < y ? y : x; }
EMULATOR_MIN_MAX(int) EMULATOR_MIN_MAX(unsigned) EMULATOR_MIN_MAX(long) EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long) EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
#define EMULATOR_MIN_MAX(left, right, result)                                                                     \
    EMULATOR_INLINE result min(left x, right y) { return fmin((result)x, (result)y); }                            \
    EMULATOR_INLINE result max(left x, right y) { return fmax((result)x, (result)y); }
EMULATOR_MIN_MAX(float, float, float) EMULATOR_MIN_MAX(double, double, double)
EMULATOR_MIN_MAX(float, double, double) EMULATOR_MIN_MAX(double, float, double)
#undef EMULATOR_MIN_MAX
EMULATOR_INLINE unsigned min(int x, unsigned y) { return min((unsigned)x, y); }
EMULATOR_INLINE unsigned min(unsigned x, int y) { return min(x, (unsigned)y); }
EMULATOR_INLINE unsigned max(int x, unsigned y) { return max((unsigned)x, y); }
EMULATOR_INLINE unsigned max(unsigned x, int y) { return max(x, (unsigned)y); }

// Intrinsics: correctly rounded here; on a device they have an error.
EMULATOR_INLINE float __expf(float x) { return expf(x); }
EMULATOR_INLINE float __logf(float x) { return logf(x); }
EMULATOR_INLINE float __log2f(float x) { return log2f(x); }
EMULATOR_INLINE float __powf(float x, float y) { return powf(x, y); }
EMULATOR_INLINE float __fdividef(float x, float y) { return x / y; }
EMULATOR_INLINE float __frcp_rn(float x) { return 1 / x; }
EMULATOR_INLINE float __fsqrt_rn(float x) { return sqrtf(x); }
EMULATOR_INLINE float __frsqrt_rn(float x) { return rsqrtf(x); }
EMULATOR_INLINE float __fadd_rn(float x, float y) { return x + y; }
EMULATOR_INLINE float __fmul_rn(float x, float y) { return x * y; }
EMULATOR_INLINE float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
EMULATOR_INLINE double __dadd_rn(double x, double y) { return x + y; }
EMULATOR_INLINE double __dmul_rn(double x, double y) { return x * y; }
EMULATOR_INLINE double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
template <class T> EMULATOR_INLINE T __ldg(const T* address) { return *address; }

#define EMULATOR_BITS(name, from, to)                                                                             \
    EMULATOR_INLINE to name(from x) { to y; __builtin_memcpy(&y, &x, sizeof y); return y; }
EMULATOR_BITS(__int_as_float, int, float) EMULATOR_BITS(__float_as_int, float, int)
EMULATOR_BITS(__uint_as_float, unsigned, float) EMULATOR_BITS(__float_as_uint, float, unsigned)
EMULATOR_BITS(__longlong_as_double, long long, double) EMULATOR_BITS(__double_as_longlong, double, long long)
#undef EMULATOR_BITS
EMULATOR_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
EMULATOR_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMULATOR_INLINE int __clz(int x) { return x ? __builtin_clz(x) : 32; }
EMULATOR_INLINE int __ffs(int x) { return __builtin_ffs(x); }

extern "C" int printf(const char*, ...);
[[noreturn]] EMULATOR_INLINE void __trap() { ::emulator::trap("__trap() was called"); }
#define assert(...) ((__VA_ARGS__) ? (void)0 : ::emulator::trap("assertion failed: " #__VA_ARGS__))
