// Log-probabilities of given tokens, with their entropy and their gradient, from logits (N,V). One block for each row.
//
// forward   With m_j = max(m_{j-1}, x_j) the running maximum, the sum of exponentials is kept up to date in one pass,
//               d_j = d_{j-1} exp(m_{j-1} - m_j) + exp(x_j - m_j)
//           (Milakov and Gimelshein 2018, arXiv:1805.02867), every thread over its own share of the row; these are
//           joined by the same formula. Then log p_y = (x_y - m) - log d, lse = m + log d.
// entropy   H = -sum p log p = log d - w / d, where w = sum (x_j - m) exp(x_j - m) is carried along. When the maximum
//           grows by g, w becomes exp(-g) (w - g d). Both terms of H are at least 0: nothing cancels.
// backward  dx_j = dy ([j = y] - exp(x_j - lse)), and dx may be the array that holds x.
//
// lse is float64 in both precisions: rounded to float32 it would be off by 5e-4 at logits of 1e4, and with it every
// probability. Backward takes it apart, once a row, into two numbers of its own precision.
// A logit of -inf (a masked token) has probability 0. A row that is -inf throughout, or holds NaN or +inf, gives NaN,
// and so does a target outside the vocabulary, which callers have refused already: it is never used as an address.
//
// Bytes: forward reads the logits once, 4NV in float32, backward reads and writes them once, 8NV, the least possible
// with the logits in memory; both some 20N more. THREADS is 256: several blocks share a multiprocessor, and one loads
// while another reduces. A shorter row takes fewer. Nothing is tiled: no logit is needed twice.
// Left on the table: loads of 16 bytes (rows are aligned only if 4 divides V), and more than one block for a row where
// N is smaller than the number of multiprocessors.

struct Sums {
    real highest;       // m, the largest logit so far
    real sum;           // d, the sum of exp(x - m)
    real weighted;      // w, the sum of (x - m) exp(x - m)
};

// The same sums, taken relative to a maximum that is not smaller.
__device__ __forceinline__ Sums relative_to(real highest, Sums a) {
    if (NEGATIVE_INFINITY < a.highest && a.highest < highest) {
        const real shift = a.highest - highest, factor = exp(shift);
        a.weighted = factor * a.weighted + factor * shift * a.sum;
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
    a.weighted += shift * e;
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
        picked = NEGATIVE_INFINITY - NEGATIVE_INFINITY;     // NaN, which stays if no token of the row is the target
    }
    __syncthreads();

    Sums sums = {NEGATIVE_INFINITY, 0, 0};
    #pragma unroll 4
    for (int j = threadIdx.x; j < V; j += blockDim.x) {
        const real x = row[j];
        if (j == target) picked = x;
        sums = with(x, sums);
    }

    const real highest = block_max(sums.highest, scratch);
    sums = relative_to(highest, sums);
    const real sum = block_sum(sums.sum, scratch), weighted = block_sum(sums.weighted, scratch);
    if (threadIdx.x == 0) {
        const real log_sum = log(sum);
        log_probs[n] = (picked - highest) - log_sum;    // in this order: with lse it would cancel
        lse[n] = double(highest) + double(log_sum);
        if (with_entropies) entropies[n] = log_sum - weighted / sum;
    }
}

// logits and dlogits may be one array: each element is read and then written by one thread. (Hence no __restrict__.)
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

    #pragma unroll 4
    for (int j = threadIdx.x; j < V; j += blockDim.x) {
        const real p = exp((row[j] - high) - low);
        drow[j] = slope * (real(j == target) - p);
    }
}
