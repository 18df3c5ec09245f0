extern "C" __global__ void __launch_bounds__(32)
attention(const float* q, const float* k, const float* v, float* o, int queries, int keys) {
    __shared__ float of_k[32][32];
    __shared__ float of_v[32][32];
    const int t = threadIdx.x, i = 32 * blockIdx.x + t;
    float mine[32], sum[32] = {}, m = __int_as_float(0xff800000), d = 0;
    for (int e = 0; e < 32; ++e) mine[e] = i < queries ? q[32 * i + e] / sqrtf(32.f) : 0;
    for (int first = 0; first < keys; first += 32) {
        const int count = min(32, keys - first);
        for (int j = 0; j < count; ++j) {
            of_k[j][t] = k[32 * (first + j) + t];
            of_v[j][t] = v[32 * (first + j) + t];
        }
        __syncthreads();
        for (int j = 0; j < count; ++j) {
            float score = 0;
            for (int e = 0; e < 32; ++e) score += mine[e] * of_k[j][e];
            const float highest = fmaxf(m, score), shrink = expf(m - highest), p = expf(score - highest);
            d = d * shrink + p;
            for (int e = 0; e < 32; ++e) sum[e] = sum[e] * shrink + p * of_v[j][e];
            m = highest;
        }
        __syncthreads();
    }
    for (int e = 0; e < 32; ++e) if (i < queries) o[32 * i + e] = sum[e] / d;
}
