// C (M,N) = A (M,K) B (K,N) on tensor cores: bf16 in, float out. K and N are multiples of 8, so that every row begins
// at a multiple of 16 bytes. A block of 4 warps computes 64x64 numbers of C. It copies the next tiles of A and B while
// it multiplies these.
//
//     python -m minilm.kernels.emulator product.cu --A 6240 --B 4992 --C 2880 --M 60 --N 48 --K 104 --grid 1
#include "tensor.cuh"

#define ROWS 64
#define COLUMNS 64
#define STEP 32                     // columns of A and rows of B in a tile

// The place of 8 numbers (a chunk) in a tile whose rows have CHUNKS of them. The chunks of a row are exchanged (xor),
// so that the 8 rows that ldmatrix reads at once lie in different banks of shared memory.
template <int CHUNKS> __device__ __forceinline__ int at(int row, int chunk) {
    return 8 * (row * CHUNKS + (chunk ^ row * CHUNKS / 8 % CHUNKS));
}

// Begins to copy a tile; numbers beyond the rows and columns of the matrix are zeros.
template <int TILE_ROWS, int CHUNKS>
__device__ __forceinline__ void load(bf16* tile, const bf16* from, int width, int rows, int columns) {
    for (int i = threadIdx.x; i < TILE_ROWS * CHUNKS; i += 128) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const bool real = row < rows && 8 * chunk < columns;
        copy16(tile + at<CHUNKS>(row, chunk), real ? from + (size_t)row * width + 8 * chunk : from, real);
    }
}

extern "C" __global__ void __launch_bounds__(128, 1)
product(const bf16* __restrict__ A, const bf16* __restrict__ B, float* __restrict__ C, int M, int N, int K) {
    __shared__ __align__(16) bf16 a[2][ROWS * STEP];
    __shared__ __align__(16) bf16 b[2][STEP * COLUMNS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i0 = blockIdx.y * ROWS, j0 = blockIdx.x * COLUMNS;
    float sums[COLUMNS / 8][4] = {};
    for (int next = 0; next < K + STEP; next += STEP) {         // one step ahead of the product
        const int stage = next / STEP % 2, k0 = next - STEP;
        if (next < K) {
            load<ROWS, STEP / 8>(a[stage], A + (size_t)i0 * K + next, K, M - i0, K - next);
            load<STEP, COLUMNS / 8>(b[stage], B + (size_t)next * N + j0, N, K - next, N - j0);
        }
        copies_commit();                        // a group without copies after the last step
        if (k0 < 0) continue;
        copies_wait<1>();                       // all but the group of the next step
        __syncthreads();                        // the copies of the other threads are there too
        for (int k = 0; k < STEP; k += 16) {
            unsigned left[4];
            ldmatrix4(left, a[1 - stage] + at<STEP / 8>(16 * warp + lane % 16, k / 8 + lane / 16));
            for (int j = 0; j < COLUMNS; j += 16) {
                unsigned right[4];              // two matrices B, side by side
                ldmatrix4_trans(right, b[1 - stage] + at<COLUMNS / 8>(k + lane % 16, j / 8 + lane / 16));
                mma(sums[j / 8], left, right[0], right[1]);
                mma(sums[j / 8 + 1], left, right[2], right[3]);
            }
        }
        __syncthreads();                        // all warps have read these tiles; the next copies overwrite them
    }
    for (int j = 0; j < COLUMNS / 8; ++j) {
        for (int e = 0; e < 4; ++e) {
            const int row = i0 + 16 * warp + lane / 4 + e / 2 * 8, column = j0 + 8 * j + lane % 4 * 2 + e % 2;
            if (row < M && column < N) C[(size_t)row * N + column] = sums[j][e];
        }
    }
}
