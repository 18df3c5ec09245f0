__device__ void join(float& m, float& d, float other_m, float other_d) {
    const float highest = fmaxf(m, other_m);
    if (highest == __int_as_float(0xff800000)) return;
    d = d * expf(m - highest) + other_d * expf(other_m - highest);
    m = highest;
}

extern "C" __global__ void __launch_bounds__(32)
softmax(const float* x, float* y, int rows, int columns) {
    const float* row = x + (size_t)blockIdx.x * columns;
    float m = __int_as_float(0xff800000), d = 0;
    for (int j = threadIdx.x; j < columns; j += 32) join(m, d, row[j], 1);
    for (int n = 16; n > 0; n /= 2) {
        const float other_m = __shfl_xor_sync(0xffffffff, m, n), other_d = __shfl_xor_sync(0xffffffff, d, n);
        join(m, d, other_m, other_d);
    }
    for (int j = threadIdx.x; j < columns; j += 32) y[(size_t)blockIdx.x * columns + j] = expf(row[j] - m) / d;
}
