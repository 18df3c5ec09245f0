// The small operations of a training step, each in one pass over memory: RMSNorm, SwiGLU, rotary positions, AdamW, and
// the norm of a gradient. They have little arithmetic, so bytes decide. As array operations, each line of a formula
// would read and write whole arrays; here a number is read once, kept in registers, and written once. Sums over blocks
// go through partial sums that are added in a fixed order, without floating-point atomics: the result has the same bits
// in every order of blocks.
//
//   rms_norm   y = x r w,  r = 1 / sqrt(mean(x^2) + eps)        Zhang and Sennrich 2019, arXiv:1910.07467
//              with n = x r, dn = dy w:  dx = r (dn - n mean(dn n)),  dw = sum of dy n over the rows
//   swiglu     y = g s u,  s = sigmoid(g)                       Shazeer 2020, arXiv:2002.05202
//              dg = dy s (1 + g (1 - s)) u,  du = dy s g;  backward computes s again
//   rope       (a, b) -> (a cos - b sin, b cos + a sin)         Su et al. 2021, arXiv:2104.09864; backward: -sin
//   adamw      m += (1 - b1)(g - m),  v += (1 - b2)(g^2 - v),  p = decay p - rate m / (sqrt(v) + eps)
//                                                               Loshchilov and Hutter 2019, arXiv:1711.05101
//
// Tiles. A thread moves 16 bytes at a time, or single numbers if a pointer or a row is not aligned to 16 bytes. In
// rms_norm a thread holds 32 bytes of a row: 32 to 512 threads share a row of up to 16 KiB, and a block takes up to
// eight narrow rows at a time, so that it has about 256 threads. In swiglu a warp goes along a row. In rope a thread
// rotates the same pairs in every head of a token, so it reads cos and sin once.
//
// Numbers read and written for N rows, B rows at a time in C <= 512 blocks (to the byte: *_bytes in fused.py):
//   rms_norm_forward    N D + B D              N D + N          the minimum, except B instead of 1
//   rms_norm_backward   2 N D + N + (B + C) D  N D + (C + 1) D  the minimum, except B instead of 1 and C instead of 0
//   swiglu_forward      2 N F                  N F              the minimum
//   swiglu_backward     3 N F                  2 N F            the minimum if s is computed again
//   rope                N (H + G + 1) K        N (H + G) K      the minimum with tables
//   adamw               4 P                    3 P              the minimum
//   clip                P, or 0                P, or 0          0 if nothing is clipped; inside adamw it would be 0
// __launch_bounds__(.., 1) asks for one block a multiprocessor; otherwise NVRTC limits a thread to 64 registers and
// spills.
// Possible and not done: the residual addition before a norm; the rotation inside attention, when it loads Q and K.

#include "rows.cuh"

constexpr int VECTOR = 16 / sizeof(real);       // numbers moved at a time
constexpr int HELD = 32 / sizeof(real);         // numbers of a row that a thread holds

template <int N> struct alignas(N * sizeof(real)) Vector { real at[N]; };

template <int N> __device__ __forceinline__ Vector<N> load(const real* from) {
    return *reinterpret_cast<const Vector<N>*>(from);
}

template <int N> __device__ __forceinline__ void store(real* to, const Vector<N>& vector) {
    *reinterpret_cast<Vector<N>*>(to) = vector;
}

// Whether the arrays, and rows of `width` numbers in them, are aligned for vectors.
template <class... Pointer> __device__ __forceinline__ bool aligned(int width, Pointer... arrays) {
    return (((width * sizeof(real)) | ... | reinterpret_cast<size_t>(arrays)) % sizeof(Vector<VECTOR>)) == 0;
}

// ---- Rows (rows.cuh) ----

// A thread's share of a row: vectors t, t + blockDim.x, ..; zeros beyond the end.
template <int N> __device__ __forceinline__ void load_share(real (&held)[HELD], const real* row, int width) {
    for (int k = 0; k < HELD / N; ++k) {
        const int j = (k * blockDim.x + threadIdx.x) * N;
        Vector<N> part = {};
        if (j < width) part = load<N>(row + j);
        for (int e = 0; e < N; ++e) held[k * N + e] = part.at[e];
    }
}

template <int N> __device__ __forceinline__ void store_share(real* row, const real (&held)[HELD], int width) {
    for (int k = 0; k < HELD / N; ++k) {
        const int j = (k * blockDim.x + threadIdx.x) * N;
        Vector<N> part;
        for (int e = 0; e < N; ++e) part.at[e] = held[k * N + e];
        if (j < width) store<N>(row + j, part);
    }
}

// x, y (rows, width), weight (width,), r (rows,).
template <int N>
__device__ void rms_norm_forward_by(const real* __restrict__ x, const real* __restrict__ weight, real* __restrict__ y,
                                    real* __restrict__ r, int rows, int width, real eps) {
    real w[HELD], n[HELD];
    load_share<N>(w, weight, width);
    const int step = gridDim.x * blockDim.y;
    for (int first = blockIdx.x * blockDim.y; first < rows; first += step) {   // all threads, because of the barriers
        const int row = first + threadIdx.y, wide = row < rows ? width : 0;
        const size_t start = (size_t)row * width;
        load_share<N>(n, x + start, wide);
        real squares = 0;
        for (int i = 0; i < HELD; ++i) squares += n[i] * n[i];
        const real root = 1 / sqrt(row_sum(squares) / width + eps);
        for (int i = 0; i < HELD; ++i) n[i] *= root * w[i];
        store_share<N>(y + start, n, wide);
        if (threadIdx.x == 0 && row < rows) r[row] = root;
    }
}

extern "C" __global__ void __launch_bounds__(512, 1)
rms_norm_forward(const real* __restrict__ x, const real* __restrict__ weight, real* __restrict__ y,
                 real* __restrict__ r, int rows, int width, real eps) {
    if (aligned(width, x, weight, y)) rms_norm_forward_by<VECTOR>(x, weight, y, r, rows, width, eps);
    else rms_norm_forward_by<1>(x, weight, y, r, rows, width, eps);
}

// dx like x; partial (gridDim.x, width): dweight from the rows of each block. Shared memory: (blockDim.y, width).
template <int N>
__device__ void rms_norm_backward_by(const real* __restrict__ dy, const real* __restrict__ x,
                                     const real* __restrict__ weight, const real* __restrict__ r,
                                     real* __restrict__ dx, real* __restrict__ partial, int rows, int width) {
    extern __shared__ __align__(16) real shared[];
    real w[HELD], n[HELD], dn[HELD], dw[HELD] = {};
    load_share<N>(w, weight, width);
    const int step = gridDim.x * blockDim.y;
    for (int first = blockIdx.x * blockDim.y; first < rows; first += step) {
        const int row = first + threadIdx.y, wide = row < rows ? width : 0;
        const size_t start = (size_t)row * width;
        load_share<N>(n, x + start, wide);
        load_share<N>(dn, dy + start, wide);
        const real root = row < rows ? r[row] : 0;
        real along = 0;
        for (int i = 0; i < HELD; ++i) {
            n[i] *= root;
            dw[i] += dn[i] * n[i];
            dn[i] *= w[i];
            along += dn[i] * n[i];
        }
        const real mean = row_sum(along) / width;
        for (int i = 0; i < HELD; ++i) dn[i] = root * (dn[i] - n[i] * mean);
        store_share<N>(dx + start, dn, wide);
    }
    store_share<N>(shared + threadIdx.y * width, dw, width);
    __syncthreads();
    for (int j = threadIdx.y * blockDim.x + threadIdx.x; j < width; j += blockDim.x * blockDim.y) {
        real sum = 0;
        for (unsigned y = 0; y < blockDim.y; ++y) sum += shared[y * width + j];
        partial[(size_t)blockIdx.x * width + j] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(512, 1)
rms_norm_backward(const real* __restrict__ dy, const real* __restrict__ x, const real* __restrict__ weight,
                  const real* __restrict__ r, real* __restrict__ dx, real* __restrict__ partial, int rows,
                  int width) {
    if (aligned(width, dy, x, weight, dx)) rms_norm_backward_by<VECTOR>(dy, x, weight, r, dx, partial, rows, width);
    else rms_norm_backward_by<1>(dy, x, weight, r, dx, partial, rows, width);
}

// y (width,): the sum of each column of x (rows, width). Blocks of 32 columns, eight threads each.
extern "C" __global__ void __launch_bounds__(256, 1)
column_sums(const real* __restrict__ x, real* __restrict__ y, int rows, int width) {
    __shared__ real sums[8][32];
    const int j = blockIdx.x * 32 + threadIdx.x;
    real sum = 0;
    if (j < width) for (int row = threadIdx.y; row < rows; row += 8) sum += x[(size_t)row * width + j];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && j < width) {
        for (int other = 1; other < 8; ++other) sum += sums[other][threadIdx.x];
        y[j] = sum;
    }
}

// ---- SwiGLU: a warp along a row, a vector in each thread; gate_up (rows, 2 width), y (rows, width) ----

template <int N>
__device__ void swiglu_forward_by(const real* __restrict__ gate_up, real* __restrict__ y, int rows, int width) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y, step = gridDim.y * blockDim.x * N;
    if (row >= rows) return;
    gate_up += (size_t)row * 2 * width;
    y += (size_t)row * width;
    for (int j = (blockIdx.y * blockDim.x + threadIdx.x) * N; j < width; j += step) {
        const Vector<N> gate = load<N>(gate_up + j), up = load<N>(gate_up + width + j);
        Vector<N> out;
        for (int e = 0; e < N; ++e) out.at[e] = gate.at[e] * sigmoid(gate.at[e]) * up.at[e];
        store<N>(y + j, out);
    }
}

extern "C" __global__ void __launch_bounds__(256, 1)
swiglu_forward(const real* __restrict__ gate_up, real* __restrict__ y, int rows, int width) {
    if (aligned(width, gate_up, y)) swiglu_forward_by<VECTOR>(gate_up, y, rows, width);
    else swiglu_forward_by<1>(gate_up, y, rows, width);
}

template <int N>
__device__ void swiglu_backward_by(const real* __restrict__ dy, const real* __restrict__ gate_up,
                                   real* __restrict__ dgate_up, int rows, int width) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y, step = gridDim.y * blockDim.x * N;
    if (row >= rows) return;
    dy += (size_t)row * width;
    gate_up += (size_t)row * 2 * width;
    dgate_up += (size_t)row * 2 * width;
    for (int j = (blockIdx.y * blockDim.x + threadIdx.x) * N; j < width; j += step) {
        const Vector<N> gate = load<N>(gate_up + j), up = load<N>(gate_up + width + j), d = load<N>(dy + j);
        Vector<N> dgate, dup;
        for (int e = 0; e < N; ++e) {
            const real g = gate.at[e], s = sigmoid(g), ds = d.at[e] * s;
            dgate.at[e] = ds * (1 + g * (1 - s)) * up.at[e];
            dup.at[e] = ds * g;
        }
        store<N>(dgate_up + j, dgate);
        store<N>(dgate_up + width + j, dup);
    }
}

extern "C" __global__ void __launch_bounds__(256, 1)
swiglu_backward(const real* __restrict__ dy, const real* __restrict__ gate_up, real* __restrict__ dgate_up, int rows,
                int width) {
    if (aligned(width, dy, gate_up, dgate_up)) swiglu_backward_by<VECTOR>(dy, gate_up, dgate_up, rows, width);
    else swiglu_backward_by<1>(dy, gate_up, dgate_up, rows, width);
}

// ---- Rotary positions: x (tokens, x_heads, K), y (tokens, y_heads, K), cos and sin (tokens, K/2) ----

// Rotates N pairs of each of `count` heads. "half": numbers i and i + K/2 are a pair; "interleaved": 2i and 2i + 1. In
// both cases N pairs are in two vectors that begin `apart` numbers from each other.
template <int N, bool INTERLEAVED>
__device__ __forceinline__ void rotate_heads(const real* x, real* y, const Vector<N>& c, const Vector<N>& s, int count,
                                           int K) {
    const int apart = INTERLEAVED ? N : K / 2;
    for (int head = 0; head < count; ++head, x += K, y += K) {
        alignas(Vector<N>) real z[2 * N];
        store<N>(z, load<N>(x));
        store<N>(z + N, load<N>(x + apart));
        for (int e = 0; e < N; ++e) {
            real& a = z[INTERLEAVED ? 2 * e : e];
            real& b = z[INTERLEAVED ? 2 * e + 1 : N + e];
            const real turned = a * c.at[e] - b * s.at[e];
            b = b * c.at[e] + a * s.at[e];
            a = turned;
        }
        store<N>(y, load<N>(z));
        store<N>(y + apart, load<N>(z + N));
    }
}

template <int N, bool INTERLEAVED>
__device__ void rope_by(const real* x, const real* __restrict__ cos, const real* __restrict__ sin, real* y, int tokens,
                        int heads, int kv_heads, int x_heads, int y_heads, int K, real sign, real scale) {
    const size_t each = K / 2 / N, threads = (size_t)gridDim.x * blockDim.x;       // each: threads of a token
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < tokens * each; i += threads) {
        const size_t token = i / each, pair = i % each * N, offset = INTERLEAVED ? 2 * pair : pair;
        Vector<N> c = load<N>(cos + i * N), s = load<N>(sin + i * N), cq, sq;
        for (int e = 0; e < N; ++e) {
            s.at[e] *= sign;
            cq.at[e] = c.at[e] * scale;
            sq.at[e] = s.at[e] * scale;
        }
        const real* from = x + token * x_heads * K + offset;
        real* to = y + token * y_heads * K + offset;
        rotate_heads<N, INTERLEAVED>(from, to, cq, sq, heads, K);
        rotate_heads<N, INTERLEAVED>(from + (size_t)heads * K, to + (size_t)heads * K, c, s, kv_heads, K);
    }
}

// x and y may be one array. sign: 1, or -1 for backward. scale: of the query heads.
extern "C" __global__ void __launch_bounds__(128, 1)
rope(const real* x, const real* __restrict__ cos, const real* __restrict__ sin, real* y, int tokens, int heads,
     int kv_heads, int x_heads, int y_heads, int K, int interleaved, real sign, real scale) {
#define ROPE(N, INTERLEAVED) \
    rope_by<N, INTERLEAVED>(x, cos, sin, y, tokens, heads, kv_heads, x_heads, y_heads, K, sign, scale)
    const bool vectors = aligned(K / 2, x, cos, sin, y);
    if (vectors && interleaved) ROPE(VECTOR, true);
    else if (vectors) ROPE(VECTOR, false);
    else if (interleaved) ROPE(1, true);
    else ROPE(1, false);
}

// ---- Flat arrays of n numbers: vectors first, then the remaining numbers one by one ----

// The sum of f.at<N>(i) over this thread's part of the array, where f processes numbers i to i + N - 1.
template <class F> __device__ __forceinline__ real sum_of(F f, size_t n, bool by_vectors) {
    const size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (size_t)gridDim.x * blockDim.x;
    const size_t vectors = by_vectors ? n / VECTOR : 0;
    real sum = 0;
    for (size_t i = thread; i < vectors; i += threads) sum += f.template at<VECTOR>(i * VECTOR);
    for (size_t i = vectors * VECTOR + thread; i < n; i += threads) sum += f.template at<1>(i);
    return sum;
}

template <class F> __device__ __forceinline__ real block_sum_of(F f, size_t n, bool by_vectors) {
    __shared__ real scratch[32];
    return block_sum(sum_of(f, n, by_vectors), scratch);
}

struct Squares {
    const real* g;
    template <int N> __device__ __forceinline__ real at(size_t i) const {
        const Vector<N> part = load<N>(g + i);
        real sum = 0;
        for (int e = 0; e < N; ++e) sum += part.at[e] * part.at[e];
        return sum;
    }
};

struct Scale {
    real* g;
    real factor;
    template <int N> __device__ __forceinline__ real at(size_t i) const {
        Vector<N> part = load<N>(g + i);
        for (int e = 0; e < N; ++e) part.at[e] *= factor;
        store<N>(g + i, part);
        return 0;
    }
};

struct Step {                                   // of AdamW
    real* p; const real* g; real* m; real* v;
    size_t decayed;
    real towards_g, towards_square, decay, rate, eps;

    template <int N> __device__ __forceinline__ real at(size_t i) const {
        Vector<N> pi = load<N>(p + i), mi = load<N>(m + i), vi = load<N>(v + i);
        const Vector<N> gi = load<N>(g + i);
        real sum = 0;
        for (int e = 0; e < N; ++e) {
            mi.at[e] += (gi.at[e] - mi.at[e]) * towards_g;
            vi.at[e] += (gi.at[e] * gi.at[e] - vi.at[e]) * towards_square;
            if (i + e < decayed) pi.at[e] *= decay;
            pi.at[e] -= mi.at[e] / (sqrt(vi.at[e]) + eps) * rate;
            sum += pi.at[e] * pi.at[e];
        }
        store<N>(p + i, pi);
        store<N>(m + i, mi);
        store<N>(v + i, vi);
        return sum;
    }
};

// partial (gridDim.x,): the sum of squares of g (n,) from each block.
extern "C" __global__ void __launch_bounds__(256, 1)
squares(const real* __restrict__ g, real* __restrict__ partial, long long n) {
    const real sum = block_sum_of(Squares{g}, n, aligned(0, g));
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// g (n,) times max_norm / norm if norm, one number, is larger. For one that is NaN it is not.
extern "C" __global__ void __launch_bounds__(256, 1)
clip(real* __restrict__ g, const real* __restrict__ norm, real max_norm, long long n) {
    const real length = *norm;
    if (length > max_norm) sum_of(Scale{g, max_norm / length}, n, aligned(0, g));
}

// One step of p, m, v (n,) in place, unless only_if, one number, is not finite. partial (gridDim.x,): the sum of squares
// of the new p from each block.
extern "C" __global__ void __launch_bounds__(256, 1)
adamw(real* __restrict__ p, const real* __restrict__ g, real* __restrict__ m, real* __restrict__ v,
      const real* __restrict__ only_if, real* __restrict__ partial, long long n, long long decayed, real towards_g,
      real towards_square, real decay, real rate, real eps) {
    const bool refused = !isfinite(*only_if);
    const Step step = {p, g, m, v, size_t(decayed), towards_g, towards_square, decay, rate, eps};
    const bool vectors = aligned(0, p, g, m, v);
    const real sum = refused ? block_sum_of(Squares{p}, n, vectors) : block_sum_of(step, n, vectors);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// y (1,): the sum of x (n,), by one block.
extern "C" __global__ void __launch_bounds__(256, 1)
total(const real* __restrict__ x, real* __restrict__ y, int n) {
    __shared__ real scratch[32];
    real sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) y[0] = sum;
}
