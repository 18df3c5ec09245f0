// Tensor cores, 16-bit floats and asynchronous copies: functions around the PTX of sm_80 and later. All inline PTX is
// in this file. A .cu file has them after the line #include "tensor.cuh" (launch.py puts this text there).
//
// A warp multiplies 16x16 by 16x8 numbers: D = A B + D. Each lane holds a part of each matrix, its fragment. A register
// holds a pair of neighbours: in a row of A, in a column of B; the first one is in the low half (PTX ISA, "Matrix
// Fragments for mma.m16n8k16"). With g = lane / 4 and t = lane % 4, a lane holds
//
//     A (16,16), bf16      a[0]  row g        columns 2t, 2t+1        a[2]  row g        columns 2t+8, 2t+9
//                          a[1]  row g + 8    columns 2t, 2t+1        a[3]  row g + 8    columns 2t+8, 2t+9
//     B (16,8), bf16       b0    rows 2t, 2t+1      column g          b1    rows 2t+8, 2t+9    column g
//     D (16,8), float      d[0], d[1]  row g        columns 2t, 2t+1  d[2], d[3]  row g + 8    columns 2t, 2t+1
//
// Two fragments of D side by side, rounded to pairs, are therefore one fragment of A.
#ifdef EMULATOR
#include "tensor_cores.h"         // kernels/emulator: the same functions in C++
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error tensor.cuh needs sm_80 or later: tensor cores for bfloat16, and asynchronous copies
#endif

// The upper half of a float. Rounded to the nearest, ties to even; a NaN becomes 0x7fff.
struct bf16 {
    unsigned short bits;
    bf16() = default;
    __device__ __forceinline__ explicit bf16(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ __forceinline__ explicit operator float() const { return __uint_as_float((unsigned)bits << 16); }
};

// Two floats, rounded to bf16, in one register.
__device__ __forceinline__ unsigned bf16_pair(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// D = A B + D, by all 32 lanes of a warp together.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// For the instructions below; the emulator does not have it.
__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Fragments of four matrices (8,8) in shared memory, by all 32 lanes together. Lane 8m + i gives the address of row i
// of matrix m: 16 bytes, aligned to 16. r[m] gets row g, columns 2t and 2t+1 of matrix m; transposed: rows 2t and 2t+1,
// column g. So the four quarters of an A stored by rows are one ldmatrix4, and two matrices B stored by rows are one
// ldmatrix4_trans.
__device__ __forceinline__ void ldmatrix4(unsigned (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix4_trans(unsigned (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Begins to copy 16 bytes from global to shared memory, both aligned to 16; 16 zeros instead if not real. The thread
// continues at once. Its copies since the last copies_commit are one group; copies_wait<N> returns when all of its
// groups but the last N have arrived. Other threads see them only after a barrier that follows the wait.
__device__ __forceinline__ void copy16(void* to, const void* from, bool real) {
    const int bytes = real ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups> __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(groups) : "memory");
}
#endif
