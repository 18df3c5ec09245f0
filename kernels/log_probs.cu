// Log-probabilities of given tokens, with their entropy and their gradient, from logits (N,V). One block for each row.
//
// forward   With the running maximum m_j = max(m_{j-1}, x_j) the sum of exponentials is updated in one pass,
//               d_j = d_{j-1} exp(m_{j-1} - m_j) + exp(x_j - m_j)
//           (Milakov and Gimelshein 2018, arXiv:1805.02867). Every thread does this for its share of the row; the
//           shares are joined by the same formula. Then log p_y = (x_y - m) - log d, lse = m + log d.
// entropy   H = -sum p log p = log d - w / d with w = sum (x_j - m) exp(x_j - m), updated in the same pass. When the
//           maximum grows by g, w becomes exp(-g) (w - g d). Both terms of H are at least 0: nothing cancels.
// backward  dx_j = dy ([j = y] - exp(x_j - lse)); dx may be the array that holds x.
//
// lse is float64 in both precisions. In float32 it would have an error of 5e-4 at logits of 1e4, and every probability
// with it. Backward splits it, once a row, into two numbers of its own precision.
// A logit of -inf (a masked token) has probability 0. A row that is -inf throughout, or contains NaN or +inf, gives
// NaN. A target outside the vocabulary also gives NaN and is never used as an address; callers check targets before.
//
// Bytes: forward reads the logits once, 4NV in float32; backward reads and writes them once, 8NV: the minimum with the
// logits in memory. Both move about 20N more. THREADS is 256, so that several blocks share a multiprocessor, and one
// loads while another reduces. A shorter row takes fewer threads. There are no tiles, because no logit is needed twice.
// Possible and not done: loads of 16 bytes (rows are aligned only if 4 divides V), and several blocks for a row where N
// is smaller than the number of multiprocessors.

constexpr int IN_FLIGHT = 4;    // logits that a thread has asked for before it uses the first one: memory is far away

struct Sums {
    real highest;       // m, the largest logit so far
    real sum;           // d, the sum of exp(x - m)
    real weighted;      // w, the sum of (x - m) exp(x - m)
};

// The same sums relative to a maximum that is at least as large.
__device__ __forceinline__ Sums relative_to(real highest, Sums a) {
    if (a.highest < highest) {
        const real shift = a.highest - highest, factor = exp(shift);
        a.weighted = factor > 0 ? factor * a.weighted + factor * shift * a.sum : 0;     // 0 * infinity is NaN
        a.sum *= factor;
    }
    a.highest = highest;
    return a;
}

__device__ __forceinline__ Sums with(real x, Sums a) {
    if (x == NEGATIVE_INFINITY) return a;
    a = relative_to(fmax(a.highest, x), a);
    const real shift = x - a.highest, e = exp(shift);
    a.sum += e;
    if (e > 0) a.weighted += shift * e;
    return a;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
log_probs_forward(const real* __restrict__ logits, const long long* __restrict__ targets, real* __restrict__ log_probs,
                  double* __restrict__ lse, real* __restrict__ entropies, int V, int with_entropies) {
    __shared__ real scratch[32];
    __shared__ long long target;
    __shared__ real picked;
    const size_t n = blockIdx.x;
    const real* row = logits + n * V;
    if (threadIdx.x == 0) {
        target = targets[n];
        picked = NEGATIVE_INFINITY - NEGATIVE_INFINITY;     // NaN, which remains if no token of the row is the target
    }
    __syncthreads();

    Sums sums = {NEGATIVE_INFINITY, 0, 0};
    for (int first = threadIdx.x; first < V; first += IN_FLIGHT * blockDim.x) {
        real x[IN_FLIGHT];
        #pragma unroll
        for (int e = 0; e < IN_FLIGHT; ++e) {
            const int j = first + e * blockDim.x;
            x[e] = j < V ? row[j] : NEGATIVE_INFINITY;                      // which adds nothing
            if (j < V && j == target) picked = x[e];
        }
        #pragma unroll
        for (int e = 0; e < IN_FLIGHT; ++e) sums = with(x[e], sums);
    }

    const real highest = block_max(sums.highest, scratch);
    sums = relative_to(highest, sums);
    const real sum = block_sum(sums.sum, scratch), weighted = block_sum(sums.weighted, scratch);
    if (threadIdx.x == 0) {
        const real log_sum = log(sum);
        log_probs[n] = (picked - highest) - log_sum;    // in this order; picked - lse would cancel
        lse[n] = double(highest) + double(log_sum);
        if (with_entropies) entropies[n] = log_sum - weighted / sum;
    }
}

// logits and dlogits may be one array (hence no __restrict__): one thread reads and then writes each element.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
log_probs_backward(const real* logits, const long long* __restrict__ targets, const double* __restrict__ lse,
                   const real* __restrict__ dy, real* dlogits, int V) {
    __shared__ long long target;
    __shared__ real high;
    __shared__ real low;
    __shared__ real slope;
    const size_t n = blockIdx.x;
    const real* row = logits + n * V;
    real* drow = dlogits + n * V;
    if (threadIdx.x == 0) {
        const double exact = lse[n];
        high = real(exact);
        low = real(exact - high);                       // lse = high + low
        target = targets[n];
        slope = 0 <= target && target < V ? dy[n] : NEGATIVE_INFINITY - NEGATIVE_INFINITY;
    }
    __syncthreads();

    for (int first = threadIdx.x; first < V; first += IN_FLIGHT * blockDim.x) {
        real x[IN_FLIGHT];
        #pragma unroll
        for (int e = 0; e < IN_FLIGHT; ++e) {
            const int j = first + e * blockDim.x;
            x[e] = j < V ? row[j] : real(0);
        }
        #pragma unroll
        for (int e = 0; e < IN_FLIGHT; ++e) {
            const int j = first + e * blockDim.x;
            if (j < V) drow[j] = slope * (real(j == target) - exp((x[e] - high) - low));
        }
    }
}
