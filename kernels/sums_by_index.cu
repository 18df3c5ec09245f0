// Sums of the rows of a matrix that have the same index: the gradient of an embedding. The host sorts the indices, so each
// sum has a fixed order, and the same input gives the same bits. (Atomic additions would come in any order.)

// y (segments, width): y[s] is the sum of the rows order[i] of x (.., width), starts[s] <= i < starts[s + 1]. A block for
// each segment and 32 columns: eight threads add up a column, then the first of them adds their sums.
extern "C" __global__ void __launch_bounds__(256, 1)
sums_by_index(const real* __restrict__ x, const int* __restrict__ order, const int* __restrict__ starts,
              real* __restrict__ y, int width) {
    __shared__ real sums[8][32];
    const int s = blockIdx.x, j = blockIdx.y * 32 + threadIdx.x;
    real sum = 0;
    if (j < width) {
        const int stop = starts[s + 1];
        for (int i = starts[s] + threadIdx.y; i < stop; i += 8) sum += x[(size_t)order[i] * width + j];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && j < width) {
        for (int other = 1; other < 8; ++other) sum += sums[other][threadIdx.x];
        y[(size_t)s * width + j] = sum;
    }
}
