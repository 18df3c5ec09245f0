// attention.cu on tensor cores: the same formulas and segments; q, k, v, o and their gradients are bf16, and scores,
// sums and the log-sum-exp are float. P and dS are rounded to bf16 for their products with V, dO, K and Q. Read
// attention.cu first: this file says only what is different.
//
// Fragments. A block has 4 warps. A warp has 16 rows of the block's tile (forward: 32 if QUERIES is 128) and all its
// columns. The scores of 16 rows and 8 columns are one accumulator of mma: with g = lane / 4 and t = lane % 4, element e
// of a lane is row g + e / 2 * 8, column 2t + e % 2. So 4 neighbouring lanes share a row. Two such accumulators, rounded,
// are the left factor of the next product (tensor.cuh): P and dS go through no shared memory. attention_bf16_dk_dv
// therefore computes S^T = K Q^T and dP^T = V dO^T, whose rows are keys.
//
// Tiles. A row of HEAD numbers is CHUNKS chunks of 8 numbers (16 bytes). The chunks of a row are exchanged (xor with a
// number of the row), so that the 8 rows of a matrix of ldmatrix lie in different banks of shared memory.
//
// Copies. The next tile arrives while this one is multiplied. Copies are counted in groups: at each wait, the group that
// is needed is the last but one, also after the last tile, because a group may be empty. A tile is overwritten only
// after a barrier that follows its last reader.
//
// Rounding. The exponents are written with fmaf, because a GPU may contract a b - c, and the emulator does not.
//
// Bytes. As in attention.cu with these tiles, and 2 bytes for a number.
//
// Not done here: wgmma and TMA of sm_90, with warps that do nothing but copy (FlashAttention-3); dQ, dK and dV in one
// kernel, which needs atomic sums and gives other bits every time.
#include "tensor.cuh"
#include "segments.cuh"

#define THREADS 128
#define ROWS 64                         // queries of a block of dq, keys of a block of dk_dv: 16 for each warp
#define PIECES (QUERIES / 64)           // forward: pieces of 16 queries, for each warp
#define CHUNKS (HEAD / 8)
#define LOG2E 1.4426950408889634f       // exp(x) = exp2(LOG2E x), and exp2 is one instruction (with -ftz=true, as CuPy)

// The place of a chunk in a tile.
__device__ __forceinline__ int place(int row, int chunk) {
    return 8 * (row * CHUNKS + (chunk ^ (CHUNKS < 8 ? row * CHUNKS / 8 % CHUNKS : row % 8)));
}

// Begins to copy `count` tokens of an operand, from `token` on; the rows after them, up to MOST, get zeros.
template <int MOST>
__device__ __forceinline__ void copy_rows(bf16* tile, const bf16* __restrict__ from, const int* __restrict__ places,
                                          int operand, int token, int head, int count) {
    const bf16* first = from + at(places, operand, token, head);
    const int stride = places[3 * operand + 1];
    static_assert(MOST * CHUNKS % THREADS == 0, "each thread copies the same number of chunks");
#pragma unroll
    for (int i = 0; i < MOST * CHUNKS / THREADS; ++i) {
        const int row = (threadIdx.x + THREADS * i) / CHUNKS, chunk = (threadIdx.x + THREADS * i) % CHUNKS;
        const bool real_row = row < count;
        copy16(tile + place(row, chunk), first + (size_t)(real_row ? row : 0) * stride + 8 * chunk, real_row);
    }
}

// 16 rows of a tile, from `row` on, and 16 of their columns, as the left factor of mma.
__device__ __forceinline__ void left_of(unsigned (&left)[4], const bf16* tile, int row, int columns) {
    const int lane = threadIdx.x % 32;
    ldmatrix4(left, tile + place(row + lane % 16, columns / 8 + lane / 16));
}

// product (16 M rows, 8 N columns) = rows of a, from `row` on, times rows of b: Q K^T, dO V^T, and their transposes.
template <int M, int N>
__device__ __forceinline__ void rows_by_rows(float (&product)[M][N][4], const bf16* a, int row, const bf16* b) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) product[m][n][e] = 0;
#pragma unroll
    for (int d = 0; d < HEAD; d += 16) {
        unsigned left[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) left_of(left[m], a, row + 16 * m, d);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned right[4];                          // two right factors: 8 rows of b each, as columns
            ldmatrix4(right, b + place(8 * n + lane % 8 + lane / 16 * 8, d / 8 + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma(product[m][n], left[m], right[0], right[1]);
                mma(product[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// acc (16 M rows, HEAD) += scores (16 M rows, 8 N columns) tile (8 N rows, HEAD): P V, dS K, P^T dO, dS^T Q.
template <int M, int N>
__device__ __forceinline__ void add_scores_by_tile(float (&acc)[M][CHUNKS][4], const float (&scores)[M][N][4],
                                                   const bf16* tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        unsigned left[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)                 // two accumulators are one left factor
                left[m][i] = bf16_pair(scores[m][n + i / 2][i % 2 * 2], scores[m][n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int d = 0; d < CHUNKS; d += 2) {
            unsigned right[4];
            ldmatrix4_trans(right, tile + place(8 * n + lane % 16, d + lane / 16));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma(acc[m][d], left[m], right[0], right[1]);
                mma(acc[m][d + 1], left[m], right[2], right[3]);
            }
        }
    }
}

template <int M>
__device__ __forceinline__ void clear(float (&acc)[M][CHUNKS][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int d = 0; d < CHUNKS; ++d)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[m][d][e] = 0;
}

// Writes this lane's numbers of one row (half 0: row g of 16; half 1: row g + 8), times `factor`; to: the row's first.
__device__ __forceinline__ void store_row(bf16* to, const float (&acc)[CHUNKS][4], int half, float factor) {
#pragma unroll
    for (int d = 0; d < CHUNKS; ++d)
        *(unsigned*)(to + 8 * d + threadIdx.x % 4 * 2) =
            bf16_pair(factor * acc[d][2 * half], factor * acc[d][2 * half + 1]);
}

// The keys that a tile of queries sees, in tiles of COLS: first those of the prefix, then the segment's own.
struct Keys {
    int token, count;           // the first key of a tile, and the number of keys
    int diagonal;               // row i of the block sees column j if j <= i + diagonal
};

__device__ __forceinline__ int key_tiles_of(const Segment& s, int queries_end) {
    const int own = max(0, min(s.keys, queries_end + s.diagonal));
    return (s.prefix_keys + COLS - 1) / COLS + (own + COLS - 1) / COLS;
}

__device__ __forceinline__ Keys keys_of(const Segment& s, int i0, int queries_end, int tile) {
    const int of_prefix = (s.prefix_keys + COLS - 1) / COLS;
    if (tile < of_prefix) return {s.prefix + COLS * tile, min(COLS, s.prefix_keys - COLS * tile), COLS};
    const int j0 = COLS * (tile - of_prefix), keys = min(s.keys, queries_end + s.diagonal);
    return {s.key + j0, min(COLS, keys - j0), s.diagonal + i0 - j0};
}

// The largest number or the sum of a row: its 4 lanes together.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_bf16_forward(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                       bf16* __restrict__ o, float* __restrict__ lse, const int* __restrict__ segments,
                       const int* __restrict__ tiles, const int* __restrict__ places, int lse_head, int group,
                       float scale) {
    const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16 * PIECES, head = blockIdx.y;
    const Segment s = segment_of(segments, tiles[2 * blockIdx.x]);
    const int i0 = tiles[2 * blockIdx.x + 1], queries = min(QUERIES, s.queries - i0), queries_end = i0 + queries;
    const int key_tiles = key_tiles_of(s, queries_end);
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *sQ = shared, *sK = sQ + QUERIES * HEAD, *sV = sK + 2 * COLS * HEAD;      // two tiles of K, and of V

    float m[PIECES][2], l[PIECES][2], acc[PIECES][CHUNKS][4];
    clear(acc);
#pragma unroll
    for (int p = 0; p < PIECES; ++p)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            m[p][half] = NEGATIVE_INFINITY;
            l[p][half] = 0;                             // of this lane's columns, until the end
        }
    copy_rows<QUERIES>(sQ, q, places, Q, s.query + i0, head, queries);
    if (key_tiles) {
        const Keys first = keys_of(s, i0, queries_end, 0);
        copy_rows<COLS>(sK, k, places, K, first.token, head / group, first.count);
    }
    copies_commit();

    for (int tile = 0; tile < key_tiles; ++tile) {
        const Keys keys = keys_of(s, i0, queries_end, tile);
        bf16 *K_now = sK + tile % 2 * COLS * HEAD, *V_now = sV + tile % 2 * COLS * HEAD;
        copy_rows<COLS>(V_now, v, places, V, keys.token, head / group, keys.count);
        copies_commit();
        copies_wait<1>();                               // K is there, and Q; V may be on its way
        __syncthreads();
        float S[PIECES][COLS / 8][4];
        rows_by_rows(S, sQ, row0, K_now);
        if (tile + 1 < key_tiles) {
            const Keys next = keys_of(s, i0, queries_end, tile + 1);
            copy_rows<COLS>(sK + (tile + 1) % 2 * COLS * HEAD, k, places, K, next.token, head / group, next.count);
        }
        copies_commit();

        // Whether every row of the warp sees every key of the tile.
        const bool all_seen = keys.count == COLS && row0 + keys.diagonal >= COLS - 1;
#pragma unroll
        for (int p = 0; p < PIECES; ++p)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = row0 + 16 * p + lane / 4 + 8 * half;
                float highest = m[p][half];
#pragma unroll
                for (int n = 0; n < COLS / 8; ++n)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        const int col = 8 * n + lane % 4 * 2 + e % 2;
                        if (!all_seen && (col >= keys.count || col > row + keys.diagonal)) S[p][n][e] = NEGATIVE_INFINITY;
                        highest = fmaxf(highest, S[p][n][e]);
                    }
                highest = row_max(highest);
                // m is the largest product before the scale: one fmaf then makes each exponent. The factor for what was
                // summed before is exactly 1 if m stays, else its rounding would grow with every tile.
                const bool none = highest == NEGATIVE_INFINITY;
                const float shift = none ? 0 : highest * (scale * LOG2E);
                const float rescale = none ? 1 : exp2f((m[p][half] - highest) * (scale * LOG2E));
                float sum = 0;
#pragma unroll
                for (int n = 0; n < COLS / 8; ++n)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        S[p][n][e] = exp2f(fmaf(S[p][n][e], scale * LOG2E, -shift));
                        sum += S[p][n][e];
                    }
                l[p][half] = rescale * l[p][half] + sum;
                m[p][half] = highest;
#pragma unroll
                for (int d = 0; d < CHUNKS; ++d) {
                    acc[p][d][2 * half] *= rescale;
                    acc[p][d][2 * half + 1] *= rescale;
                }
            }
        copies_wait<1>();                               // V is there; the next K may be on its way
        __syncthreads();
        add_scores_by_tile(acc, S, V_now);
    }
    copies_wait<0>();                                   // Q of a block whose queries see no key

#pragma unroll
    for (int p = 0; p < PIECES; ++p)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row0 + 16 * p + lane / 4 + 8 * half;
            const float sum = row_sum(l[p][half]);
            if (row >= queries) continue;
            store_row(o + at(places, O, s.query + i0 + row, head), acc[p], half, sum == 0 ? 0 : 1 / sum);
            if (lane % 4 == 0) lse[(size_t)head * lse_head + s.query + i0 + row] = m[p][half] * scale + logf(sum);
        }
}

// D = rowsum(dO O); a warp for each row.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_bf16_delta(const bf16* __restrict__ o, const bf16* __restrict__ dout, float* __restrict__ delta,
                     const int* __restrict__ segments, const int* __restrict__ tiles, const int* __restrict__ places,
                     int lse_head) {
    const int lane = threadIdx.x % 32, head = blockIdx.y;
    const Segment s = segment_of(segments, tiles[2 * blockIdx.x]);
    const int i0 = tiles[2 * blockIdx.x + 1], queries = min(ROWS, s.queries - i0);
    for (int row = threadIdx.x / 32; row < queries; row += THREADS / 32) {
        const int token = s.query + i0 + row;
        const bf16 *of_o = o + at(places, O, token, head), *of_do = dout + at(places, DO, token, head);
        float sum = 0;
        for (int d = lane; d < HEAD; d += 32) sum += float(of_o[d]) * float(of_do[d]);
        sum = lanes_sum<32>(sum);
        if (lane == 0) delta[(size_t)head * lse_head + token] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_bf16_dq(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                  const bf16* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta,
                  bf16* __restrict__ dq, const int* __restrict__ segments, const int* __restrict__ tiles,
                  const int* __restrict__ places, int lse_head, int group, float scale) {
    const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16, head = blockIdx.y;
    const Segment s = segment_of(segments, tiles[2 * blockIdx.x]);
    const int i0 = tiles[2 * blockIdx.x + 1], queries = min(ROWS, s.queries - i0), queries_end = i0 + queries;
    const int key_tiles = key_tiles_of(s, queries_end);
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *sQ = shared, *sdO = sQ + ROWS * HEAD, *sKV = sdO + ROWS * HEAD;       // twice a tile of K and one of V

    copy_rows<ROWS>(sQ, q, places, Q, s.query + i0, head, queries);
    copy_rows<ROWS>(sdO, dout, places, DO, s.query + i0, head, queries);
    float L[2], D[2], acc[1][CHUNKS][4];
    clear(acc);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = min(queries - 1, row0 + lane / 4 + 8 * half);           // a row that is not there is not stored
        L[half] = lse[(size_t)head * lse_head + s.query + i0 + row] * LOG2E;
        D[half] = delta[(size_t)head * lse_head + s.query + i0 + row];
    }
    for (int next = 0; next <= key_tiles; ++next) {     // one tile ahead of the products
        if (next < key_tiles) {
            const Keys keys = keys_of(s, i0, queries_end, next);
            bf16* to = sKV + next % 2 * 2 * COLS * HEAD;
            copy_rows<COLS>(to, k, places, K, keys.token, head / group, keys.count);
            copy_rows<COLS>(to + COLS * HEAD, v, places, V, keys.token, head / group, keys.count);
        }
        copies_commit();
        if (next == 0) continue;
        copies_wait<1>();
        __syncthreads();
        const Keys keys = keys_of(s, i0, queries_end, next - 1);
        const bf16 *sK = sKV + (next - 1) % 2 * 2 * COLS * HEAD, *sV = sK + COLS * HEAD;
        float S[1][COLS / 8][4], dP[1][COLS / 8][4];
        rows_by_rows(S, sQ, row0, sK);
        rows_by_rows(dP, sdO, row0, sV);
#pragma unroll
        for (int n = 0; n < COLS / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = row0 + lane / 4 + e / 2 * 8, col = 8 * n + lane % 4 * 2 + e % 2;
                const bool seen = col < keys.count && col <= row + keys.diagonal;
                const float p = seen ? exp2f(fmaf(S[0][n][e], scale * LOG2E, -L[e / 2])) : 0;
                S[0][n][e] = p * (dP[0][n][e] - D[e / 2]);              // dS
            }
        add_scores_by_tile(acc, S, sK);
        __syncthreads();                                // all warps have read K; the next copies overwrite it
    }
    copies_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + lane / 4 + 8 * half;
        if (row < queries) store_row(dq + at(places, DQ, s.query + i0 + row, head), acc[0], half, scale);
    }
}

// The queries that see a tile of keys, in tiles of COLS: of each user (segment, whether the keys are its own), of each
// head of the group, in this order.
struct Queries {
    int token, count, head;     // the first query of a tile, the number of queries, their head
    int diagonal;               // key j of the block is seen by query i of the tile if j <= i + diagonal
};

struct Seers {
    const int *segments, *users;
    int user, users_end, head, first_head, group, j0, i0;

    // The next tile of queries; false if there is none.
    __device__ __forceinline__ bool next(Queries& queries) {
        for (; user < users_end; ++user, head = first_head, i0 = -1) {
            const Segment s = segment_of(segments, users[2 * user]);
            const bool own = users[2 * user + 1];
            for (; head < first_head + group; ++head, i0 = -1) {
                if (i0 < 0) i0 = own ? max(0, j0 - s.diagonal) : 0;     // those before see no key of the tile
                if (i0 >= s.queries) continue;
                queries = {s.query + i0, min(COLS, s.queries - i0), head, own ? s.diagonal + i0 - j0 : ROWS};
                i0 += COLS;
                return true;
            }
        }
        return false;
    }
};

// A block has ROWS keys and loops over tiles of COLS queries.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_bf16_dk_dv(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                     const bf16* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta,
                     bf16* dk, bf16* dv,                // no __restrict__: they may be parts of one array
                     const int* __restrict__ segments, const int* __restrict__ key_tiles,
                     const int* __restrict__ users, const int* __restrict__ places, int lse_head, int group,
                     float scale) {
    const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16, key_head = blockIdx.y;
    const int* tile = key_tiles + 5 * blockIdx.x;
    const int token = tile[0], count = tile[1];
    extern __shared__ __align__(16) bf16 shared[];
    bf16 *sK = shared, *sV = sK + ROWS * HEAD, *sQdO = sV + ROWS * HEAD;        // twice a tile of Q and one of dO
    float* sLD = (float*)(sQdO + 4 * COLS * HEAD);      // twice L and D of a tile

    copy_rows<ROWS>(sK, k, places, K, token, key_head, count);
    copy_rows<ROWS>(sV, v, places, V, token, key_head, count);
    float of_dk[1][CHUNKS][4], of_dv[1][CHUNKS][4];
    clear(of_dk);
    clear(of_dv);
    Seers seers = {segments, users, tile[3], tile[4], key_head * group, key_head * group, group, tile[2], -1};
    const auto copy_queries = [&](int stage, const Queries& queries) {
        bf16* to = sQdO + stage * 2 * COLS * HEAD;
        copy_rows<COLS>(to, q, places, Q, queries.token, queries.head, queries.count);
        copy_rows<COLS>(to + COLS * HEAD, dout, places, DO, queries.token, queries.head, queries.count);
        for (int i = threadIdx.x; i < 2 * COLS; i += THREADS) {
            const size_t number = (size_t)queries.head * lse_head + queries.token + i % COLS;
            float x = 0;
            if (i % COLS < queries.count) x = i < COLS ? lse[number] * LOG2E : delta[number];
            sLD[stage * 2 * COLS + i] = x;
        }
    };
    Queries now, next;
    bool more = seers.next(next);
    if (more) copy_queries(0, next);
    copies_commit();
    for (int stage = 0; more; stage ^= 1) {
        now = next;
        more = seers.next(next);
        if (more) copy_queries(stage ^ 1, next);        // one tile ahead of the products
        copies_commit();
        copies_wait<1>();
        __syncthreads();
        const bf16 *sQ = sQdO + stage * 2 * COLS * HEAD, *sdO = sQ + COLS * HEAD;
        const float *L = sLD + stage * 2 * COLS, *D = L + COLS;
        float P[1][COLS / 8][4], dS[1][COLS / 8][4];    // transposed: rows are keys
        rows_by_rows(P, sK, row0, sQ);
        rows_by_rows(dS, sV, row0, sdO);
#pragma unroll
        for (int n = 0; n < COLS / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = row0 + lane / 4 + e / 2 * 8, col = 8 * n + lane % 4 * 2 + e % 2;
                const bool seen = row <= col + now.diagonal;        // of a query that is not there, dO, L and D are 0
                const float p = seen ? exp2f(fmaf(P[0][n][e], scale * LOG2E, -L[col])) : 0;
                P[0][n][e] = p;
                dS[0][n][e] = p * (dS[0][n][e] - D[col]);
            }
        add_scores_by_tile(of_dv, P, sdO);
        add_scores_by_tile(of_dk, dS, sQ);
        __syncthreads();                                // all warps have read this tile; the next copies overwrite it
    }
    copies_wait<0>();                                   // K and V of keys that no query sees
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + lane / 4 + 8 * half;
        if (row >= count) continue;
        store_row(dk + at(places, DK, token + row, key_head), of_dk[0], half, scale);
        store_row(dv + at(places, DV, token + row, key_head), of_dv[0], half, 1);
    }
}
