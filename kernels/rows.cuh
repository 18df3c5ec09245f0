// Rows of a matrix: blockDim.x threads (whole warps) share a row, blockDim.y rows are taken at a time.

// The sum over all threads of a row, for each of them.
__device__ __forceinline__ real row_sum(real value) {
    __shared__ real of_warp[32];
    const int warps = blockDim.x / 32, first = threadIdx.y * warps;
    value = lanes_sum<32>(value);
    if (warps == 1) return value;
    if (threadIdx.x % 32 == 0) of_warp[first + threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
    for (int warp = 0; warp < warps; ++warp) value += of_warp[first + warp];
    __syncthreads();                            // before the sums of the next row are written
    return value;
}

// At |g| = 1000 exp is 0 or infinite, and the quotient is 1 or 0.
__device__ __forceinline__ real sigmoid(real g) { return 1 / (1 + exp(-g)); }
