// vecsum.cu without the barrier at the end of its loop: a data race, which the emulator finds.
//
//     python -m minilm.kernels.emulator kernels/emulator/examples/vecsum_race.cu --x arange:300 --out 3 --n 300

extern "C" __global__ void __launch_bounds__(128)
vecsum(const float* x, float* out, int n) {
    __shared__ float sums[128];
    const int t = threadIdx.x, i = blockIdx.x * 128 + t;
    sums[t] = i < n ? x[i] : 0.f;
    __syncthreads();
    for (int half = 64; half > 0; half /= 2) {
        if (t < half) sums[t] += sums[t + half];
    }
    if (t == 0) out[blockIdx.x] = sums[0];
}
