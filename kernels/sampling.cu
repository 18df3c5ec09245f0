// One token for each row of logits (B,V): temperature, top-k, top-p and the draw, without sorting. One block a row.
//
// A token is known by its gap g_j = (max x - x_j) / temperature >= 0, computed in each pass again, and weighs
// w_j = exp(-g_j). What is summed are whole numbers: counts of tokens, or weights in units of 1/scale, scale being the
// power of 2 with which V weights of 1 just fit 64 bits. Such sums are exact in any order, so that neither the number
// of threads nor their order has a say in which token is drawn.
//
// search      Top-k and top-p ask the same: from the smallest gap on, where does a sum reach a target? For the k-th
//             largest logit the sum counts tokens, for top-p (Holtzman et al. 2020, arXiv:1904.09751) it adds weights.
//             Read as an integer, a float that is not negative keeps its order: the answer is found 4 bits at a time
//             from the top (radix selection), in 8 passes over the row for float32 and 16 for float64. Only tokens
//             whose gap begins with the bits found so far are looked at closer, and few are after two passes.
// ties        Top-k keeps all tokens that equal the k-th. Top-p keeps, of those that equal the last one it needs, as
//             many as it needs, the first ones: what a stable sort would do.
// draw        Inverse CDF: the first token at which the running sum exceeds u times the total. Each warp adds up one
//             stretch of the row, and the warp in whose stretch the line lies walks it again, 32 tokens at a time.
//             The first of several that equal the last needed one, and of those that equal the highest (temperature
//             0), are found by the same walk, over counts.
//
// Of the exponentials alone the last bits may differ from NumPy's, whose float32 distribution has rounding of its own.
// Then the borders between tokens lie a little apart, and a uniform between the two gives another token. For normal
// logits of deviation 3 its probability (the sum of these distances) is 9e-6 at V = 1,000 and 3e-4 at V = 50,000 in
// float32, most of it NumPy's rounding, and 3e-14 and 3e-10 in float64.
//
// A row with NaN or +inf, or with nothing but -inf, gives token 0 with the log-prob NaN, as NumPy's formula does; a
// uniform outside [0,1) gives the log-prob NaN.
//
// Bytes: the row is read 2 times for a draw, 8 (float64: 16) more for top-k, 10 (18) more for top-p, and what the walk
// reads; from the second time on out of the L2 cache (200 KB for V = 50,000 in float32). The least is once. THREADS is
// 512: few rows must fill the machine, and 16 sums of 64 bits want 32 of a thread's 128 registers.
// Left on the table: keeping a row of up to 12,000 in shared memory; more than one block for a row.

typedef unsigned long long Mass;        // a sum of counts, or of weights

constexpr int DIGIT_BITS = 4;
constexpr int DIGITS = 1 << DIGIT_BITS;  // half as many as lanes
constexpr int WARPS = THREADS / 32;     // at most

__device__ __forceinline__ unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ unsigned long long bits_of(double x) { return __double_as_longlong(x); }
typedef decltype(bits_of(real(0))) Bits;

struct Row {
    const real* logits;
    int V;
    real highest;
    real temperature;
    __device__ __forceinline__ real gap(int j) const { return (highest - logits[j]) / temperature; }
};

// What a token adds to a sum.
struct Count {
    __device__ __forceinline__ Mass operator()(real, int) const { return 1; }
};

struct Weight {
    real scale;
    __device__ __forceinline__ Mass operator()(real gap, int) const { return Mass(exp(-gap) * scale + real(0.5)); }
};

struct CountOfEqual {
    Bits bits;
    __device__ __forceinline__ Mass operator()(real gap, int) const { return bits_of(gap) == bits; }
};

// The weights of the tokens that are kept; and, beside them, the sums that the log-prob and the entropy need.
struct Kept {
    Bits limit;         // kept is what has a smaller gap,
    int last;           // and of those with this gap the tokens up to this one
    real scale;
    real sum;           // of w
    real weighted;      // of w g
    __device__ __forceinline__ Mass operator()(real gap, int j) {
        const Bits bits = bits_of(gap);
        if (bits > limit || (bits == limit && j > last)) return 0;
        const real w = exp(-gap);
        sum += w;
        if (w > 0) weighted += w * gap;
        return Mass(w * scale + real(0.5));
    }
};

__device__ __forceinline__ Mass warp_sum(Mass x) {
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(ALL_LANES, x, other);
    return x;
}

// The smallest gap, as bits, such that the tokens of gaps up to it add up to at least target, which all of them do.
// below: what those of smaller gaps add up to. equal: what those of this gap do.
template <class Adds>
__device__ Bits search(const Row& row, Adds adds, Mass target, Mass& below, Mass& equal) {
    __shared__ Mass of_warp[WARPS][DIGITS];
    __shared__ Mass of_digit[DIGITS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    Bits found = 0;
    below = equal = 0;
    for (int shift = 8 * sizeof(real) - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        Mass sums[DIGITS] = {};
        for (int j = threadIdx.x; j < row.V; j += blockDim.x) {
            const real gap = row.gap(j);
            const Bits bits = bits_of(gap);
            if ((bits ^ found) >> shift >> DIGIT_BITS != 0) continue;
            const Mass mass = adds(gap, j);
            const int digit = bits >> shift & (DIGITS - 1);
            #pragma unroll
            for (int d = 0; d < DIGITS; ++d) sums[d] += d == digit ? mass : 0;
        }
        // Two lanes meet, add up one half of the digits each, and go on with that half: lane l ends with digit l / 2.
        #pragma unroll
        for (int step = 1; step <= DIGIT_BITS; ++step) {
            const int half = DIGITS >> step;
            const bool upper = lane & 2 * half;
            #pragma unroll
            for (int d = 0; d < DIGITS / 2; ++d) {
                if (d >= half) continue;                    // bounds that are known, or nvcc 13 puts sums into memory
                const Mass low = sums[d], high = sums[d + half];
                sums[d] = (upper ? high : low) + __shfl_xor_sync(ALL_LANES, upper ? low : high, 2 * half);
            }
        }
        const Mass sum = sums[0] + __shfl_xor_sync(ALL_LANES, sums[0], 1);
        if (lane % 2 == 0) of_warp[warp][lane / 2] = sum;
        __syncthreads();
        if (threadIdx.x < DIGITS) {
            Mass all = 0;
            for (int w = 0; w < warps; ++w) all += of_warp[w][threadIdx.x];
            of_digit[threadIdx.x] = all;
        }
        __syncthreads();
        int digit = 0;
        while (below + of_digit[digit] < target) below += of_digit[digit++];
        found |= Bits(digit) << shift;
        equal = of_digit[digit];
    }
    return found;
}

// The stretch of the row that a warp adds up: whole steps of 32 tokens, but for the last warp.
__device__ __forceinline__ int stretch_begin(int V, int warp) {
    const int warps = blockDim.x / 32, steps = (V + 31) / 32;
    return min(V, (steps + warps - 1) / warps * 32 * warp);
}

// What each stretch adds up to; returns the total.
template <class Adds>
__device__ Mass add_stretches(const Row& row, Adds& adds, Mass* stretches) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int end = stretch_begin(row.V, warp + 1);
    Mass sum = 0;
    for (int j = stretch_begin(row.V, warp) + lane; j < end; j += 32) sum += adds(row.gap(j), j);
    sum = warp_sum(sum);
    __syncthreads();                                        // until everybody has read what stood there before
    if (lane == 0) stretches[warp] = sum;
    __syncthreads();
    Mass total = 0;
    for (int w = 0; w < warps; ++w) total += stretches[w];
    return total;
}

// The first token at which the running sum exceeds target, which is less than the total of the stretches.
template <class Adds>
__device__ int crossing(const Row& row, Adds& adds, const Mass* stretches, Mass target) {
    __shared__ int found;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Mass before = 0;
    for (int w = 0; w < warp; ++w) before += stretches[w];
    if (before <= target && target < before + stretches[warp]) {        // of one warp alone
        const int end = stretch_begin(row.V, warp + 1);
        for (int start = stretch_begin(row.V, warp); start < end; start += 32) {
            const int j = start + lane;
            Mass sum = j < end ? adds(row.gap(j), j) : 0;
            for (int other = 1; other < 32; other *= 2) {               // of the lanes up to this one
                const Mass lower = __shfl_up_sync(ALL_LANES, sum, other);
                if (lane >= other) sum += lower;
            }
            const unsigned beyond = __ballot_sync(ALL_LANES, before + sum > target);
            if (beyond != 0) {
                if (lane == __ffs(beyond) - 1) found = j;
                break;
            }
            before += __shfl_sync(ALL_LANES, sum, 31);
        }
    }
    __syncthreads();
    return found;
}

// top_k: 0 for none; top_p: 1 for none; temperature 0 takes the most likely token, and its log-prob at temperature 1.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
sample(const real* __restrict__ logits, const double* __restrict__ uniforms, long long* __restrict__ tokens,
       real* __restrict__ log_probs, real* __restrict__ entropies, int V, real temperature, int top_k, real top_p,
       real scale) {
    __shared__ real scratch[32];
    __shared__ Mass stretches[WARPS];
    __shared__ double uniform;
    const size_t b = blockIdx.x;
    const bool greedy = temperature == 0;
    Row row = {logits + b * V, V, NEGATIVE_INFINITY, greedy ? real(1) : temperature};
    if (threadIdx.x == 0) uniform = uniforms[b];

    for (int j = threadIdx.x; j < V; j += blockDim.x) {
        const real x = row.logits[j];
        row.highest = isnan(x) ? -NEGATIVE_INFINITY : fmax(row.highest, x);
    }
    row.highest = block_max(row.highest, scratch);
    if (isinf(row.highest)) {
        if (threadIdx.x == 0) {
            tokens[b] = 0;
            log_probs[b] = entropies[b] = NEGATIVE_INFINITY - NEGATIVE_INFINITY;
        }
        return;
    }

    Kept kept = {~Bits(0), V, scale, 0, 0};
    Mass below, equal;
    if (top_k > 0 && !greedy) kept.limit = search(row, Count(), top_k, below, equal);
    if (top_p < 1 && !greedy) {
        const Mass total = add_stretches(row, kept, stretches);
        const Mass target = max(Mass(1), min(total, Mass(ceil(double(top_p) * double(total)))));
        kept.limit = search(row, Weight{scale}, target, below, equal);
        CountOfEqual ties = {kept.limit};
        const Mass count = add_stretches(row, ties, stretches), each = equal / count;
        const Mass needed = (target - below + each - 1) / each;
        if (needed < count) kept.last = crossing(row, ties, stretches, needed - 1);
    }

    kept.sum = kept.weighted = 0;
    const Mass total = add_stretches(row, kept, stretches);
    const real sum = block_sum(kept.sum, scratch), log_sum = log(sum);
    const real weighted = block_sum(kept.weighted, scratch);
    int token;
    if (greedy) {
        CountOfEqual highest = {0};
        add_stretches(row, highest, stretches);
        token = crossing(row, highest, stretches, 0);
    } else {
        const double u = fmin(fmax(uniform, 0.0), 1.0);
        token = crossing(row, kept, stretches, min(Mass(u * double(total)), total - 1));
    }
    if (threadIdx.x == 0) {
        const bool drawn = greedy || (0 <= uniform && uniform < 1);
        tokens[b] = token;
        log_probs[b] = drawn ? -row.gap(token) - log_sum : NEGATIVE_INFINITY - NEGATIVE_INFINITY;
        entropies[b] = log_sum + weighted / sum;
    }
}
