// Attention of one new token to a long cache. There is one query a head, so no product of matrices, and every key and
// value is read once from global memory for all query heads that share it. The speed of reading the cache decides.
//
// The keys are split over blocks (Flash-Decoding; Dao, Haziza, Massa and Sizov 2023); otherwise a batch of one would
// leave most of the device idle. In a block a warp takes one key at a time: its 32 lanes read the HEAD numbers of the
// key side by side, sum q k by shuffles, and keep m, l and the unnormalised O of attention.cu for each of the GROUP
// queries. The warps of a block are combined in shared memory, the blocks of a head by decode_combine:
//     m = max m_i,  l = sum exp(m_i - m) l_i,  O = sum exp(m_i - m) O_i / l.
//
// The cache is (B, kv heads, capacity, HEAD) with `length` filled positions; row b begins at position first[b] (padding
// on the left). Bytes: keys and values once, which is the minimum; the partial results, HEAD + 2 numbers for each
// split, twice. Possible and not done: loads of 16 bytes, several keys at a time in a warp.
//
// q, keys, values and out are of type `stored`: real, or with -DBF16=1 bf16, and half the bytes of float. Scores, sums
// and partial results are real in any case.
#ifdef BF16
#include "tensor.cuh"
typedef bf16 stored;
#else
typedef real stored;
#endif

#define WARPS (THREADS / 32)
#define LANE_WIDTH ((HEAD + 31) / 32)       // numbers of a head in a lane

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode_split(const stored* __restrict__ q, const stored* __restrict__ keys, const stored* __restrict__ values,
             const int* __restrict__ first, real* __restrict__ o, real* __restrict__ m, real* __restrict__ l,
             int length, int capacity, int chunk, real scale) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = blockIdx.x, key_head = blockIdx.y, split = blockIdx.z, kv_heads = gridDim.y;
    const int heads = kv_heads * GROUP, head0 = key_head * GROUP;
    const int start = max(first[row], split * chunk), stop = min(length, (split + 1) * chunk);
    const size_t cache = ((size_t)row * kv_heads + key_head) * capacity * HEAD;

    real query[GROUP][LANE_WIDTH], acc[GROUP][LANE_WIDTH], highest[GROUP], sum[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        highest[g] = NEGATIVE_INFINITY;
        sum[g] = 0;
#pragma unroll
        for (int i = 0; i < LANE_WIDTH; ++i) {
            const int d = lane + 32 * i;
            query[g][i] = d < HEAD ? scale * real(q[((size_t)row * heads + head0 + g) * HEAD + d]) : real(0);
            acc[g][i] = 0;
        }
    }
    for (int j = start + warp; j < stop; j += WARPS) {
        real key[LANE_WIDTH], value[LANE_WIDTH];
#pragma unroll
        for (int i = 0; i < LANE_WIDTH; ++i) {
            const int d = lane + 32 * i;
            key[i] = d < HEAD ? real(keys[cache + (size_t)j * HEAD + d]) : real(0);
            value[i] = d < HEAD ? real(values[cache + (size_t)j * HEAD + d]) : real(0);
        }
#pragma unroll
        for (int g = 0; g < GROUP; ++g) {
            real score = 0;
#pragma unroll
            for (int i = 0; i < LANE_WIDTH; ++i) score += query[g][i] * key[i];
            score = lanes_sum<32>(score);
            const real before = highest[g];
            highest[g] = fmax(before, score);
            const real rescale = exp(before - highest[g]), p = exp(score - highest[g]);
            sum[g] = rescale * sum[g] + p;
#pragma unroll
            for (int i = 0; i < LANE_WIDTH; ++i) acc[g][i] = rescale * acc[g][i] + p * value[i];
        }
    }

    __shared__ real of_warps[WARPS][HEAD + 2];          // O, then m and l
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        __syncthreads();                                // the last head has been read
#pragma unroll
        for (int i = 0; i < LANE_WIDTH; ++i)
            if (lane + 32 * i < HEAD) of_warps[warp][lane + 32 * i] = acc[g][i];
        if (lane == 0) {
            of_warps[warp][HEAD] = highest[g];
            of_warps[warp][HEAD + 1] = sum[g];
        }
        __syncthreads();
        real largest = NEGATIVE_INFINITY;
        for (int w = 0; w < WARPS; ++w) largest = fmax(largest, of_warps[w][HEAD]);
        const real shift = largest == NEGATIVE_INFINITY ? real(0) : largest;
        const size_t at = ((size_t)split * gridDim.x + row) * heads + head0 + g;
        for (int d = threadIdx.x; d < HEAD + 2; d += THREADS) {
            real total = 0;
            for (int w = 0; w < WARPS; ++w) total += exp(of_warps[w][HEAD] - shift) * of_warps[w][d];
            if (d < HEAD) o[at * HEAD + d] = total;
            if (d == HEAD) m[at] = largest;
            if (d == HEAD + 1) l[at] = total;
        }
    }
}

// Combines the splits of each row and head, in their order: one block of HEAD threads (at least 32) for each.
extern "C" __global__ void __launch_bounds__(128)
decode_combine(const real* __restrict__ o, const real* __restrict__ m, const real* __restrict__ l,
               stored* __restrict__ out, int splits) {
    const int at = blockIdx.x, rows = gridDim.x;        // (row, head)
    real largest = NEGATIVE_INFINITY;
    for (int s = 0; s < splits; ++s) largest = fmax(largest, m[(size_t)s * rows + at]);
    const real shift = largest == NEGATIVE_INFINITY ? real(0) : largest;
    for (int d = threadIdx.x; d < HEAD; d += blockDim.x) {
        real total = 0, sum = 0;
        for (int s = 0; s < splits; ++s) {
            const size_t from = (size_t)s * rows + at;
            const real weight = exp(m[from] - shift);
            sum += weight * l[from];
            total += weight * o[from * HEAD + d];
        }
        out[(size_t)at * HEAD + d] = stored(sum == 0 ? real(0) : total / sum);
    }
}
