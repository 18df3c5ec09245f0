// The functions of tensor.cuh in C++, with the same names. Included by tensor.cuh; implemented in tensor_cores.cpp and
// copies.cpp.
#pragma once
#undef __CUDA_ARCH__
#define __CUDA_ARCH__ 800

namespace emulator {
// Rounds to the nearest, ties to even: the addition carries into the upper half, and from there into the exponent.
EMULATOR_INLINE unsigned short bf16_bits(unsigned x) {
    return (x & 0x7fffffff) > 0x7f800000 ? 0x7fff : x + 0x7fff + (x >> 16 & 1) >> 16;
}
}

struct bf16 {
    unsigned short bits;
    bf16() = default;
    EMULATOR_INLINE explicit bf16(float x) : bits(::emulator::bf16_bits(__float_as_uint(x))) {}
    EMULATOR_INLINE explicit operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
EMULATOR_INLINE unsigned bf16_pair(float low, float high) {
    return bf16(low).bits | (unsigned)bf16(high).bits << 16;
}

#define mma(...) ::emulator::multiply(EMULATOR_SITE, __VA_ARGS__)
#define ldmatrix4(...) ::emulator::load_matrices(EMULATOR_SITE, "ldmatrix4", false, __VA_ARGS__)
#define ldmatrix4_trans(...) ::emulator::load_matrices(EMULATOR_SITE, "ldmatrix4_trans", true, __VA_ARGS__)
EMULATOR_INLINE void copy16(void* to, const void* from, bool real) { ::emulator::begin_copy(to, from, real); }
EMULATOR_INLINE void copies_commit() { ::emulator::commit_copies(); }
template <int groups> EMULATOR_INLINE void copies_wait() {
    static_assert(groups >= 0, "groups is how many may still be in flight");
    ::emulator::wait_for_copies(groups);
}

namespace emulator {
template <> struct Letter<bf16> { static constexpr char value = 'h'; };
EMULATOR_INLINE void multiply(Site site, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    warp_mma(site, d, a, b0, b1);
}
EMULATOR_INLINE void load_matrices(Site site, const char* name, bool transposed, unsigned (&r)[4], const bf16* row) {
    warp_ldmatrix(site, name, transposed, r, row);
}
}
