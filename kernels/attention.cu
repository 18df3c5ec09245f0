// Attention without the matrix of scores: FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2).
//
//   S = scale Q K^T,  P = softmax(S) by rows,  O = P V,  for one head, in tiles of ROWS queries and COLS keys.
//
//   forward   A block holds B_r = ROWS queries and loops over the keys that they see. Per row it keeps the largest
//             score m, the sum l of exp(S - m), and O before the division. For the S of a tile:
//                 m' = max(m, rowmax S),  P~ = exp(S - m'),  l = exp(m - m') l + rowsum P~,  O = exp(m - m') O + P~ V.
//             At the end O is divided by l. The log-sum-exp L = m + log l is stored: with it backward computes
//             P = exp(S - L) again.
//   backward  D = rowsum(dO O),  dP = dO V^T,  dS = P (dP - D),   dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.
//             One kernel holds queries and loops over keys (dQ); another holds keys and loops over queries (dK, dV).
//             S is computed twice, but no two blocks write to the same place: the results have the same bits every
//             time.
//
// Segments (packing.py). A segment is a run of queries, a run of its own keys (query i sees own key j if
// j <= i + diagonal), and a prefix of keys that all its queries see. Several segments can share a prefix. A batch
// (B,H,T,K) is B segments without a prefix; padding tokens are the keys of no segment. Query head h reads key head
// h / group.
//
// Tiles. A block has THREADS = 8 TY threads. Thread (ty, tx) has rows ty, ty + TY, ... and columns tx, tx + 8, ... of
// every tile: 8 neighbouring lanes share a row, and a warp reads 4 rows at a time, each row at one address. Shared
// rows have length HEAD + 1, so that 8 lanes that read 8 rows at one column use 8 different banks. attention.py chooses
// ROWS and COLS for the device: tiles of 64 KiB at most, or larger ones where a block may have 200 KiB (sm_90).
//
// Bytes. Forward reads Q once, and for each tile of queries the keys and values that the tile sees; it writes O and L.
// The minimum would read K and V once. Larger tiles come closer to it; so does the L2 cache, which the counts of
// attention.py leave out. Not done here: tensor cores and asynchronous copies, as in attention_bf16.cu.

#include "segments.cuh"

#define TY (THREADS / 8)
#define ROWS_A_THREAD (ROWS / TY)
#define COLS_A_THREAD (COLS / 8)
#define WIDTH_A_THREAD (HEAD / 8)
#define PITCH (HEAD + 1)

// Loads `count` tokens of an operand, from `token` on, times `scale` into shared memory; rows up to MOST get zeros. A
// thread stays in its column, so that it computes one address and adds to it.
template <int MOST>
__device__ __forceinline__ void load(real (*tile)[PITCH], const real* __restrict__ from, const int* __restrict__ places,
                                     int operand, int token, int head, int count, real scale) {
    constexpr int ALONG = HEAD < THREADS ? HEAD : THREADS, TOGETHER = THREADS / ALONG;
    const int first = threadIdx.x / ALONG, d = threadIdx.x % ALONG;
    const real* at_row = from + at(places, operand, token + first, head) + d;
    const size_t step = (size_t)places[3 * operand + 1] * TOGETHER;
#pragma unroll 4
    for (int row = first; row < MOST; row += TOGETHER, at_row += step)
        for (int e = 0; e < HEAD; e += ALONG)
            tile[row][d + e] = row < count ? scale * at_row[e] : real(0);
}

// product[i][j] = <row i of this thread in a, row j of this thread in b>: S = Q K^T and dP = dO V^T.
__device__ __forceinline__ void rows_by_rows(real product[ROWS_A_THREAD][COLS_A_THREAD], const real (*a)[PITCH],
                                             const real (*b)[PITCH], int ty, int tx) {
#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i)
#pragma unroll
        for (int j = 0; j < COLS_A_THREAD; ++j) product[i][j] = 0;
#pragma unroll 4
    for (int d = 0; d < HEAD; ++d) {
        real of_b[COLS_A_THREAD];
#pragma unroll
        for (int j = 0; j < COLS_A_THREAD; ++j) of_b[j] = b[tx + 8 * j][d];
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            const real of_a = a[ty + TY * i][d];
#pragma unroll
            for (int j = 0; j < COLS_A_THREAD; ++j) product[i][j] += of_a * of_b[j];
        }
    }
}

// The parts of shared memory.
typedef real (*Tile)[PITCH];
typedef real (*Scores)[COLS + 8];          // the 4 rows by 8 columns of a warp lie in 32 different banks

// acc += scores (ROWS, COLS) tile (COLS, HEAD): P V of forward, dS K of dQ.
__device__ __forceinline__ void add_rows_by_tile(real acc[ROWS_A_THREAD][WIDTH_A_THREAD], Scores scores, Tile tile,
                                                 int ty, int tx) {
#pragma unroll 2
    for (int j = 0; j < COLS; ++j) {
        real of_tile[WIDTH_A_THREAD];
#pragma unroll
        for (int d = 0; d < WIDTH_A_THREAD; ++d) of_tile[d] = tile[j][tx + 8 * d];
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            const real of_row = scores[ty + TY * i][j];
#pragma unroll
            for (int d = 0; d < WIDTH_A_THREAD; ++d) acc[i][d] += of_row * of_tile[d];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_forward(const real* __restrict__ q, const real* __restrict__ k, const real* __restrict__ v,
                  real* __restrict__ o, real* __restrict__ lse, const int* __restrict__ segments,
                  const int* __restrict__ tiles, const int* __restrict__ places, int lse_head, int group, real scale) {
    const int ty = threadIdx.x / 8, tx = threadIdx.x % 8, head = blockIdx.y;
    const Segment s = segment_of(segments, tiles[2 * blockIdx.x]);
    const int i0 = tiles[2 * blockIdx.x + 1], queries = min(ROWS, s.queries - i0);
    extern __shared__ real shared[];
    Tile sQ = (Tile)shared, sK = sQ + ROWS, sV = sK + COLS;
    Scores sP = (Scores)(sV + COLS);

    real m[ROWS_A_THREAD], l[ROWS_A_THREAD], acc[ROWS_A_THREAD][WIDTH_A_THREAD];
#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i) {
        m[i] = NEGATIVE_INFINITY;
        l[i] = 0;
#pragma unroll
        for (int d = 0; d < WIDTH_A_THREAD; ++d) acc[i][d] = 0;
    }
    load<ROWS>(sQ, q, places, Q, s.query + i0, head, queries, scale);

    for (int own = 0; own < 2; ++own) {                 // the prefix, then the segment's own keys
        const int first = own ? s.key : s.prefix;
        const int keys = own ? min(s.keys, i0 + queries + s.diagonal) : s.prefix_keys;
        for (int j0 = 0; j0 < keys; j0 += COLS) {
            const int count = min(COLS, keys - j0);
            __syncthreads();                            // all threads are done with the last tile
            load<COLS>(sK, k, places, K, first + j0, head / group, count, 1);
            load<COLS>(sV, v, places, V, first + j0, head / group, count, 1);
            __syncthreads();

            real S[ROWS_A_THREAD][COLS_A_THREAD];
            rows_by_rows(S, sQ, sK, ty, tx);
#pragma unroll
            for (int i = 0; i < ROWS_A_THREAD; ++i) {
                const int row = ty + TY * i;
                real highest = m[i];
#pragma unroll
                for (int j = 0; j < COLS_A_THREAD; ++j) {
                    const int col = tx + 8 * j;
                    if (col >= count || (own && j0 + col > i0 + row + s.diagonal)) S[i][j] = NEGATIVE_INFINITY;
                    highest = fmax(highest, S[i][j]);
                }
                highest = lanes_max<8>(highest);
                // For a row that has seen no key yet: exp(-inf - 0) is 0, but exp(-inf + inf) is NaN.
                const real shift = highest == NEGATIVE_INFINITY ? real(0) : highest;
                const real rescale = exp(m[i] - shift);
                real sum = 0;
#pragma unroll
                for (int j = 0; j < COLS_A_THREAD; ++j) {
                    const real p = exp(S[i][j] - shift);
                    sP[row][tx + 8 * j] = p;
                    sum += p;
                }
                l[i] = rescale * l[i] + lanes_sum<8>(sum);
                m[i] = highest;
#pragma unroll
                for (int d = 0; d < WIDTH_A_THREAD; ++d) acc[i][d] *= rescale;
            }
            __syncwarp();                               // one warp writes and reads a row of P
            add_rows_by_tile(acc, sP, sV, ty, tx);
        }
    }

#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i) {
        const int row = ty + TY * i;
        if (row >= queries) continue;
        real* out = o + at(places, O, s.query + i0 + row, head);
#pragma unroll
        for (int d = 0; d < WIDTH_A_THREAD; ++d) out[tx + 8 * d] = l[i] == 0 ? real(0) : acc[i][d] / l[i];
        if (tx == 0) lse[(size_t)head * lse_head + s.query + i0 + row] = m[i] + log(l[i]);     // -inf if no key is seen
    }
}

// D = rowsum(dO O), for the same tiles of queries as attention_dq.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_delta(const real* __restrict__ o, const real* __restrict__ dout, real* __restrict__ delta,
                const int* __restrict__ segments, const int* __restrict__ tiles, const int* __restrict__ places,
                int lse_head) {
    const int ty = threadIdx.x / 8, tx = threadIdx.x % 8, head = blockIdx.y;
    const Segment s = segment_of(segments, tiles[2 * blockIdx.x]);
    const int i0 = tiles[2 * blockIdx.x + 1], queries = min(ROWS, s.queries - i0);
    for (int i = 0; i < ROWS_A_THREAD; ++i) {
        const int row = ty + TY * i;
        const int token = s.query + i0 + min(row, queries - 1);     // all lanes must take part in the sum
        const real *of_o = o + at(places, O, token, head), *of_do = dout + at(places, DO, token, head);
        real sum = 0;
        if (row < queries)
            for (int d = tx; d < HEAD; d += 8) sum += of_o[d] * of_do[d];
        sum = lanes_sum<8>(sum);
        if (row < queries && tx == 0) delta[(size_t)head * lse_head + token] = sum;
    }
}

// Loads L or D of a tile's queries into shared memory.
__device__ __forceinline__ void load_rows(real* tile, const real* __restrict__ from, size_t first, int count) {
    for (int row = threadIdx.x; row < ROWS; row += THREADS) tile[row] = row < count ? from[first + row] : real(0);
}

// P = exp(S - L) and dS = P (dP - D) of a tile, into shared memory. Row i sees column j if j <= i + last.
// P is not stored if sP is null.
__device__ __forceinline__ void probabilities_and_gradient(Scores sP, Scores sdS, Tile sQ, Tile sK, Tile sdO, Tile sV,
                                                           const real* sL, const real* sD, int queries, int count,
                                                           int last, int ty, int tx) {
    real S[ROWS_A_THREAD][COLS_A_THREAD], dP[ROWS_A_THREAD][COLS_A_THREAD];
    rows_by_rows(S, sQ, sK, ty, tx);
    rows_by_rows(dP, sdO, sV, ty, tx);
#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i) {
        const int row = ty + TY * i;
#pragma unroll
        for (int j = 0; j < COLS_A_THREAD; ++j) {
            const int col = tx + 8 * j;
            const bool seen = row < queries && col < count && col <= row + last;
            const real p = seen ? exp(S[i][j] - sL[row]) : real(0);
            if (sP) sP[row][col] = p;
            sdS[row][col] = p * (dP[i][j] - sD[row]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_dq(const real* __restrict__ q, const real* __restrict__ k, const real* __restrict__ v,
             const real* __restrict__ dout, const real* __restrict__ lse, const real* __restrict__ delta,
             real* __restrict__ dq, const int* __restrict__ segments, const int* __restrict__ tiles,
             const int* __restrict__ places, int lse_head, int group, real scale) {
    const int ty = threadIdx.x / 8, tx = threadIdx.x % 8, head = blockIdx.y;
    const Segment s = segment_of(segments, tiles[2 * blockIdx.x]);
    const int i0 = tiles[2 * blockIdx.x + 1], queries = min(ROWS, s.queries - i0);
    extern __shared__ real shared[];
    Tile sQ = (Tile)shared, sdO = sQ + ROWS, sK = sdO + ROWS, sV = sK + COLS;
    Scores sdS = (Scores)(sV + COLS);
    real *sL = (real*)(sdS + ROWS), *sD = sL + ROWS;

    const size_t first_row = (size_t)head * lse_head + s.query + i0;
    load<ROWS>(sQ, q, places, Q, s.query + i0, head, queries, scale);
    load<ROWS>(sdO, dout, places, DO, s.query + i0, head, queries, 1);
    load_rows(sL, lse, first_row, queries);
    load_rows(sD, delta, first_row, queries);
    real acc[ROWS_A_THREAD][WIDTH_A_THREAD];
#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i)
#pragma unroll
        for (int d = 0; d < WIDTH_A_THREAD; ++d) acc[i][d] = 0;

    for (int own = 0; own < 2; ++own) {
        const int first = own ? s.key : s.prefix;
        const int keys = own ? min(s.keys, i0 + queries + s.diagonal) : s.prefix_keys;
        for (int j0 = 0; j0 < keys; j0 += COLS) {
            const int count = min(COLS, keys - j0);
            __syncthreads();
            load<COLS>(sK, k, places, K, first + j0, head / group, count, 1);
            load<COLS>(sV, v, places, V, first + j0, head / group, count, 1);
            __syncthreads();

            const int last = own ? s.diagonal + i0 - j0 : COLS;
            probabilities_and_gradient(nullptr, sdS, sQ, sK, sdO, sV, sL, sD, queries, count, last, ty, tx);
            __syncwarp();
            add_rows_by_tile(acc, sdS, sK, ty, tx);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i) {
        const int row = ty + TY * i;
        if (row >= queries) continue;
        real* out = dq + at(places, DQ, s.query + i0 + row, head);
#pragma unroll
        for (int d = 0; d < WIDTH_A_THREAD; ++d) out[tx + 8 * d] = scale * acc[i][d];
    }
}

// dK and dV of a tile of keys (first token, number, j of the first, begin and end of its rows in `users`), from every
// query that sees them: of their own segment, and of each segment whose prefix they are.
// users: (segment, whether the keys are its own).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_dk_dv(const real* __restrict__ q, const real* __restrict__ k, const real* __restrict__ v,
                const real* __restrict__ dout, const real* __restrict__ lse, const real* __restrict__ delta,
                real* dk, real* dv,             // no __restrict__: they may be parts of one array
                const int* __restrict__ segments, const int* __restrict__ key_tiles, const int* __restrict__ users,
                const int* __restrict__ places, int lse_head, int group, real scale) {
    const int ty = threadIdx.x / 8, tx = threadIdx.x % 8, key_head = blockIdx.y;
    const int* tile = key_tiles + 5 * blockIdx.x;
    const int token = tile[0], count = tile[1], j0 = tile[2], users_end = tile[4];
    extern __shared__ real shared[];
    Tile sQ = (Tile)shared, sdO = sQ + ROWS, sK = sdO + ROWS, sV = sK + COLS;
    Scores sP = (Scores)(sV + COLS), sdS = sP + ROWS;
    real *sL = (real*)(sdS + ROWS), *sD = sL + ROWS;

    load<COLS>(sK, k, places, K, token, key_head, count, 1);
    load<COLS>(sV, v, places, V, token, key_head, count, 1);
    real of_dk[COLS / TY][WIDTH_A_THREAD], of_dv[COLS / TY][WIDTH_A_THREAD];
#pragma unroll
    for (int c = 0; c < COLS / TY; ++c)
#pragma unroll
        for (int d = 0; d < WIDTH_A_THREAD; ++d) of_dk[c][d] = of_dv[c][d] = 0;

    for (int user = tile[3]; user < users_end; ++user) {
        const Segment s = segment_of(segments, users[2 * user]);
        const bool own = users[2 * user + 1];
        for (int head = key_head * group; head < (key_head + 1) * group; ++head) {
            for (int i0 = own ? max(0, j0 - s.diagonal) : 0; i0 < s.queries; i0 += ROWS) {
                const int queries = min(ROWS, s.queries - i0);
                const size_t first_row = (size_t)head * lse_head + s.query + i0;
                __syncthreads();                        // all threads are done with the last queries
                load<ROWS>(sQ, q, places, Q, s.query + i0, head, queries, scale);
                load<ROWS>(sdO, dout, places, DO, s.query + i0, head, queries, 1);
                load_rows(sL, lse, first_row, queries);
                load_rows(sD, delta, first_row, queries);
                __syncthreads();

                const int last = own ? s.diagonal + i0 - j0 : COLS;
                probabilities_and_gradient(sP, sdS, sQ, sK, sdO, sV, sL, sD, queries, count, last, ty, tx);
                __syncthreads();                        // all warps read the columns of P and dS
#pragma unroll 2
                for (int row = 0; row < ROWS; ++row) {
                    real of_q[WIDTH_A_THREAD], of_do[WIDTH_A_THREAD];
#pragma unroll
                    for (int d = 0; d < WIDTH_A_THREAD; ++d) {
                        of_q[d] = sQ[row][tx + 8 * d];
                        of_do[d] = sdO[row][tx + 8 * d];
                    }
#pragma unroll
                    for (int c = 0; c < COLS / TY; ++c) {
                        const real p = sP[row][ty + TY * c], ds = sdS[row][ty + TY * c];
#pragma unroll
                        for (int d = 0; d < WIDTH_A_THREAD; ++d) {
                            of_dv[c][d] += p * of_do[d];
                            of_dk[c][d] += ds * of_q[d];        // Q carries the scale
                        }
                    }
                }
            }
        }
    }
#pragma unroll
    for (int c = 0; c < COLS / TY; ++c) {
        const int col = ty + TY * c;
        if (col >= count) continue;
        real *to_dk = dk + at(places, DK, token + col, key_head), *to_dv = dv + at(places, DV, token + col, key_head);
#pragma unroll
        for (int d = 0; d < WIDTH_A_THREAD; ++d) {
            to_dk[tx + 8 * d] = of_dk[c][d];
            to_dv[tx + 8 * d] = of_dv[c][d];
        }
    }
}
