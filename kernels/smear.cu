// Key smearing (minilm/rotary.py): (1 - a) k_n + a k_p, a = sigmoid(amount), where p is the row before row n in its own
// text. In a pack (minilm/packing.py) that is not always row n - 1: the row before a response's first is the last one of
// its prompt, which several responses may share. The host makes the tables of neighbours (smear.py). By CuPy's functions
// of arrays this is 35 operations for a layer, forward and backward; here three launches, and copies of keys and
// gradients.
//
//     forward    y_n = k_n + a (k_p - k_n),  k_p = 0 for the first row of a text
//     backward   dk_n = dy_n + a (sum of dy over the rows after n - dy_n),  damount = a (1 - a) sum_n dy_n (k_p - k_n)
//
// A thread takes one of the `width` numbers of a row, and every (8 gridDim.x)-th row. The sums have a fixed order. Each
// number is read twice, as k_n and as k_p, the second time mostly from the cache. y and dk lie `stride` numbers from row
// to row, among the queries and values. Possible and not done: loads of 16 bytes; smearing inside the kernel that
// rotates.
//
// smear_next is for generation: there the previous key is kept in the cache.
//
// Keys and gradients are of type `stored`: real, or with -DBF16=1 bf16. amount, partial and all sums are real.
#ifdef BF16
#include "tensor.cuh"
typedef bf16 stored;
#else
typedef real stored;
#endif

// keys (rows, width), amount (width,), previous (rows,): the row before each, or -1.
extern "C" __global__ void __launch_bounds__(256, 1)
smear_forward(const stored* __restrict__ keys, const real* __restrict__ amount, const int* __restrict__ previous,
              stored* __restrict__ y, int rows, int width, int stride) {
    const int j = blockIdx.y * 32 + threadIdx.x;
    if (j >= width) return;
    const real a = 1 / (1 + exp(-amount[j]));
    for (int row = blockIdx.x * 8 + threadIdx.y; row < rows; row += gridDim.x * 8) {
        const int p = previous[row];
        const real k = real(keys[(size_t)row * width + j]), before = p < 0 ? real(0) : real(keys[(size_t)p * width + j]);
        y[(size_t)row * stride + j] = stored(k + a * (before - k));
    }
}

// One new row of each of `rows` texts, y, in place; last (rows, width): the key before it, which it replaces.
extern "C" __global__ void __launch_bounds__(256, 1)
smear_next(stored* __restrict__ y, real* __restrict__ last, const real* __restrict__ amount, int rows, int width,
           int stride) {
    const int row = blockIdx.x * 8 + threadIdx.y, j = blockIdx.y * 32 + threadIdx.x;
    if (row >= rows || j >= width) return;
    const real k = real(y[(size_t)row * stride + j]), before = last[(size_t)row * width + j];
    const real a = 1 / (1 + exp(-amount[j]));
    y[(size_t)row * stride + j] = stored(k + a * (before - k));
    last[(size_t)row * width + j] = k;
}

// dy like keys; the rows after row n are following[i], starts[n] <= i < starts[n + 1]. partial (gridDim.x, width):
// damount from the rows of each block.
extern "C" __global__ void __launch_bounds__(256, 1)
smear_backward(const stored* __restrict__ dy, const stored* __restrict__ keys, const real* __restrict__ amount,
               const int* __restrict__ previous, const int* __restrict__ starts, const int* __restrict__ following,
               stored* __restrict__ dk, real* __restrict__ partial, int rows, int width, int stride) {
    __shared__ real sums[8][32];
    const int j = blockIdx.y * 32 + threadIdx.x;
    const real a = j < width ? 1 / (1 + exp(-amount[j])) : real(0);
    real sum = 0;
    if (j < width) {
        for (int row = blockIdx.x * 8 + threadIdx.y; row < rows; row += gridDim.x * 8) {
            const int p = previous[row], stop = starts[row + 1];
            const real k = real(keys[(size_t)row * width + j]), d = real(dy[(size_t)row * width + j]);
            const real before = p < 0 ? real(0) : real(keys[(size_t)p * width + j]);
            sum += d * (before - k);
            real after = 0;
            for (int i = starts[row]; i < stop; ++i) after += real(dy[(size_t)following[i] * width + j]);
            dk[(size_t)row * stride + j] = stored(d + a * (after - d));
        }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && j < width) {
        for (int other = 1; other < 8; ++other) sum += sums[other][threadIdx.x];
        partial[(size_t)blockIdx.x * width + j] = a * (1 - a) * sum;
    }
}
