// The small operations of a training step with activations in bf16, between a residual stream and parameters in float:
// RMSNorm, SwiGLU, rotary positions, and the conversion to bf16. The formulas are those of fused.cu, where their papers
// are named. Everything is computed in float; only what is stored for a matrix product is rounded to bf16. The gradient
// of RMSNorm is fused.cu's: the product before it gives floats.
//
// A thread moves 8 numbers at a time: 16 bytes of bf16. So rows are multiples of 8 numbers, and arrays begin at
// multiples of 16 bytes (fused_bf16.py checks both). Bytes read and written for N rows, to the byte in fused_bf16.py:
//   to_bf16                 4 n                   2 n          the minimum
//   rms_norm_bf16           4 N D + 4 B D         2 N D + 4 N  B: rows at a time; the minimum would be 1
//   swiglu_bf16_forward     4 N F                 2 N F        the minimum
//   swiglu_bf16_backward    6 N F                 4 N F        the minimum if the sigmoid is computed again
//   rope_bf16               N (2 H + 4) K         2 N H K      the minimum with tables

#include "tensor.cuh"
#include "rows.cuh"

__device__ __forceinline__ void load8(float (&x)[8], const float* from) {
    const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    x[0] = low.x;
    x[1] = low.y;
    x[2] = low.z;
    x[3] = low.w;
    x[4] = high.x;
    x[5] = high.y;
    x[6] = high.z;
    x[7] = high.w;
}

// Two numbers of one register; the first is in the low half.
__device__ __forceinline__ void unpack(float& first, float& second, unsigned pair) {
    first = __uint_as_float(pair << 16);
    second = __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ void load8(float (&x)[8], const bf16* from) {
    const uint4 pairs = *reinterpret_cast<const uint4*>(from);
    unpack(x[0], x[1], pairs.x);
    unpack(x[2], x[3], pairs.y);
    unpack(x[4], x[5], pairs.z);
    unpack(x[6], x[7], pairs.w);
}

__device__ __forceinline__ void store8(bf16* to, const float (&x)[8]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]),
                                               bf16_pair(x[6], x[7]));
}

// y (n,): x (n,) rounded.
extern "C" __global__ void __launch_bounds__(256, 1)
to_bf16(const float* __restrict__ x, bf16* __restrict__ y, long long n) {
    const size_t threads = (size_t)gridDim.x * blockDim.x;
    const size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, whole = n / 8;
    for (size_t i = thread; i < whole; i += threads) {
        float part[8];
        load8(part, x + 8 * i);
        store8(y + 8 * i, part);
    }
    if (thread < n % 8) y[8 * whole + thread] = bf16(x[8 * whole + thread]);
}

// x, weight in float, y (rows, width) in bf16, r (rows,): 1 / sqrt(mean(x^2) + eps). A thread has 8 numbers of a row.
extern "C" __global__ void __launch_bounds__(512, 1)
rms_norm_bf16(const float* __restrict__ x, const float* __restrict__ weight, bf16* __restrict__ y,
              float* __restrict__ r, int rows, int width, float eps) {
    const int j = 8 * threadIdx.x, step = gridDim.x * blockDim.y;
    float w[8] = {};
    if (j < width) load8(w, weight + j);
    for (int first = blockIdx.x * blockDim.y; first < rows; first += step) {   // all threads, because of the barriers
        const int row = first + threadIdx.y;
        const bool mine = row < rows && j < width;
        const size_t start = (size_t)row * width + j;
        float n[8] = {};
        if (mine) load8(n, x + start);
        float squares = 0;
        for (int e = 0; e < 8; ++e) squares += n[e] * n[e];
        const float root = 1 / sqrt(row_sum(squares) / width + eps);
        for (int e = 0; e < 8; ++e) n[e] *= root * w[e];
        if (mine) store8(y + start, n);
        if (threadIdx.x == 0 && row < rows) r[row] = root;
    }
}

// gate_up (rows, 2 width), y (rows, width): a warp along a row.
extern "C" __global__ void __launch_bounds__(256, 1)
swiglu_bf16_forward(const bf16* __restrict__ gate_up, bf16* __restrict__ y, int rows, int width) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y, step = gridDim.y * blockDim.x * 8;
    if (row >= rows) return;
    gate_up += (size_t)row * 2 * width;
    y += (size_t)row * width;
    for (int j = (blockIdx.y * blockDim.x + threadIdx.x) * 8; j < width; j += step) {
        float gate[8], up[8];
        load8(gate, gate_up + j);
        load8(up, gate_up + width + j);
        for (int e = 0; e < 8; ++e) gate[e] *= sigmoid(gate[e]) * up[e];
        store8(y + j, gate);
    }
}

// dgate_up like gate_up, from dy like y.
extern "C" __global__ void __launch_bounds__(256, 1)
swiglu_bf16_backward(const bf16* __restrict__ dy, const bf16* __restrict__ gate_up, bf16* __restrict__ dgate_up,
                     int rows, int width) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y, step = gridDim.y * blockDim.x * 8;
    if (row >= rows) return;
    dy += (size_t)row * width;
    gate_up += (size_t)row * 2 * width;
    dgate_up += (size_t)row * 2 * width;
    for (int j = (blockIdx.y * blockDim.x + threadIdx.x) * 8; j < width; j += step) {
        float gate[8], up[8], d[8], dgate[8];
        load8(gate, gate_up + j);
        load8(up, gate_up + width + j);
        load8(d, dy + j);
        for (int e = 0; e < 8; ++e) {
            const float s = sigmoid(gate[e]), ds = d[e] * s;
            dgate[e] = ds * (1 + gate[e] * (1 - s)) * up[e];
            up[e] = ds * gate[e];
        }
        store8(dgate_up + j, dgate);
        store8(dgate_up + width + j, up);
    }
}

// The first `heads` heads of x (tokens, x_heads, K) in place; cos and sin (tokens, K/2). A thread has 8 pairs of every
// head of a token. "half": numbers i and i + K/2 are a pair; interleaved: 2i and 2i + 1. sign: -1 for backward.
extern "C" __global__ void __launch_bounds__(128, 1)
rope_bf16(bf16* x, const float* __restrict__ cos, const float* __restrict__ sin, int tokens, int heads, int x_heads,
          int K, int interleaved, float sign) {
    const size_t each = K / 16, i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, token = i / each;
    if (token >= tokens) return;
    const size_t pair = i % each * 8;
    const int apart = interleaved ? 8 : K / 2;
    float c[8], s[8];
    load8(c, cos + 8 * i);
    load8(s, sin + 8 * i);
    bf16* to = x + token * x_heads * K + (interleaved ? 2 * pair : pair);
    for (int head = 0; head < heads; ++head, to += K) {
        float z[16];
        load8(*reinterpret_cast<float (*)[8]>(z), to);
        load8(*reinterpret_cast<float (*)[8]>(z + 8), to + apart);
        for (int e = 0; e < 8; ++e) {
            float& a = z[interleaved ? 2 * e : e];
            float& b = z[interleaved ? 2 * e + 1 : 8 + e];
            const float turned = a * c[e] - sign * b * s[e];
            b = b * c[e] + sign * a * s[e];
            a = turned;
        }
        store8(to, *reinterpret_cast<float (*)[8]>(z));
        store8(to + apart, *reinterpret_cast<float (*)[8]>(z + 8));
    }
}
