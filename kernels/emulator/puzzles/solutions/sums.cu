extern "C" __global__ void __launch_bounds__(128)
sums(const float* x, float* y, int rows, int columns) {
    __shared__ float of_threads[128];
    const int t = threadIdx.x;
    float sum = 0;
    for (int j = t; j < columns; j += 128) sum += x[(size_t)blockIdx.x * columns + j];
    of_threads[t] = sum;
    __syncthreads();
    for (int half = 64; half > 0; half /= 2) {
        if (t < half) of_threads[t] += of_threads[t + half];
        __syncthreads();
    }
    if (t == 0) y[blockIdx.x] = of_threads[0];
}
