// The sum of each block's share of x: out[b] is the sum of x[b blockDim.x] to x[(b + 1) blockDim.x - 1].
//
//     python -m minilm.kernels.emulator kernels/emulator/examples/vecsum.cu --x arange:300 --out 3 --n 300
//
// An example for the emulator. Delete a __syncthreads() and run it again.

extern "C" __global__ void __launch_bounds__(128)
vecsum(const float* x, float* out, int n) {
    __shared__ float sums[128];
    const int t = threadIdx.x, i = blockIdx.x * 128 + t;
    sums[t] = i < n ? x[i] : 0.f;
    __syncthreads();
    for (int half = 64; half > 0; half /= 2) {
        if (t < half) sums[t] += sums[t + half];
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = sums[0];
}
