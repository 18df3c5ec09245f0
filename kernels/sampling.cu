// One token for each row of logits (B,V): temperature, top-k, top-p and the draw, without sorting. One block for a row.
//
// A token has a gap g_j = (max x - x_j) / temperature >= 0, computed again in each pass, and a weight
// w_j = exp(-g_j). All sums are of whole numbers: counts of tokens, or weights in units of 1/scale, where scale is a
// power of 2 such that V weights of 1 fit 64 bits. Such sums are exact in any order, so the drawn token depends neither
// on the number of threads nor on their order.
//
// search      Top-k and top-p have the same question: going from the smallest gap on, where does a sum reach a target?
//             For the k-th largest logit the sum counts tokens; for top-p (Holtzman et al. 2020, arXiv:1904.09751) it
//             adds weights. A non-negative float, read as an integer, keeps its order. So the answer is found 4 bits at
//             a time from the top (radix selection), in 8 passes over the row for float32 and 16 for float64. A pass
//             adds only tokens whose gap begins with the bits found so far; few remain after two passes.
// ties        Of the tokens that equal the last one they need, top-k and top-p keep the first ones, as many as they need:
//             the same as a stable sort.
// draw        Inverse CDF: the first token at which the running sum exceeds u times the total. Each warp sums one
//             segment of the row; the warp whose segment contains the crossing walks the segment again, 32 tokens at a
//             time. The same walk, over counts, finds the last tied token of top-p, and the first of the largest logits
//             (temperature 0).
//
// Only the last bits of the exponentials can differ from NumPy, whose float32 distribution has its own rounding. The
// borders between tokens then differ slightly, and a uniform between two versions of a border gives another token. For
// normal logits of standard deviation 3 the probability of that (the sum of these differences) is 9e-6 at V = 1,000 and
// 3e-4 at V = 50,000 in float32, mostly from NumPy's rounding, and 3e-14 and 3e-10 in float64.
//
// A row with NaN or +inf, or with only -inf, gives token 0 and log-prob NaN, as NumPy's formula does. A uniform outside
// [0,1) gives log-prob NaN.
//
// Bytes: a draw reads the row 2 times, top-k 8 (float64: 16) times more, top-p 10 (18) times more, and the walk its
// part; all reads but the first can hit the L2 cache (200 KB for V = 50,000 in float32). The minimum is once. THREADS
// is 512: a few rows must fill the device, and 16 sums of 64 bits take 32 of the 128 registers of a thread.
// Possible and not done: a row of up to 12,000 in shared memory; several blocks for a row.

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

// The number that a token adds to a sum.
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

// The weights of the kept tokens, and the sums for the log-prob and the entropy.
struct Kept {
    Bits limit;         // tokens with a smaller gap are kept,
    int last;           // and of the tokens with this gap those up to this one
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

// The smallest gap, as bits, such that the tokens with at most that gap sum to at least target (all tokens do).
// below: the sum of the tokens with smaller gaps. equal: the sum of the tokens with this gap.
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
        // Pairs of lanes exchange halves: each lane sums one half of the digits and continues with it. In the end lane
        // l has digit l / 2.
        #pragma unroll
        for (int step = 1; step <= DIGIT_BITS; ++step) {
            const int half = DIGITS >> step;
            const bool upper = lane & 2 * half;
            #pragma unroll
            for (int d = 0; d < DIGITS / 2; ++d) {
                if (d >= half) continue;                    // constant bounds keep sums in registers (nvcc 13)
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

// The first token of a warp's segment of the row. Segments are whole steps of 32 tokens, except the last.
__device__ __forceinline__ int segment_begin(int V, int warp) {
    const int warps = blockDim.x / 32, steps = (V + 31) / 32;
    return min(V, (steps + warps - 1) / warps * 32 * warp);
}

// The sum of each warp's segment; returns the total.
template <class Adds>
__device__ Mass add_segments(const Row& row, Adds& adds, Mass* segments) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int end = segment_begin(row.V, warp + 1);
    Mass sum = 0;
    for (int j = segment_begin(row.V, warp) + lane; j < end; j += 32) sum += adds(row.gap(j), j);
    sum = warp_sum(sum);
    __syncthreads();                                        // until all threads have read the last sums
    if (lane == 0) segments[warp] = sum;
    __syncthreads();
    Mass total = 0;
    for (int w = 0; w < warps; ++w) total += segments[w];
    return total;
}

// The first token at which the running sum exceeds target. target must be less than the sum of the segments.
template <class Adds>
__device__ int crossing(const Row& row, Adds& adds, const Mass* segments, Mass target) {
    __shared__ int found;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Mass before = 0;
    for (int w = 0; w < warp; ++w) before += segments[w];
    if (before <= target && target < before + segments[warp]) {        // true for one warp
        const int end = segment_begin(row.V, warp + 1);
        for (int start = segment_begin(row.V, warp); start < end; start += 32) {
            const int j = start + lane;
            Mass sum = j < end ? adds(row.gap(j), j) : 0;
            for (int other = 1; other < 32; other *= 2) {               // sum over the lanes up to this one
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

// top_k: 0 for none; top_p: 1 for none. Temperature 0 takes the most likely token, with its log-prob at temperature 1.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
sample(const real* __restrict__ logits, const double* __restrict__ uniforms, long long* __restrict__ tokens,
       real* __restrict__ log_probs, real* __restrict__ entropies, int V, real temperature, int top_k, real top_p,
       real scale) {
    __shared__ real scratch[32];
    __shared__ Mass segments[WARPS];
    __shared__ double uniform;
    const size_t b = blockIdx.x;
    const bool greedy = temperature == 0;
    Row row = {logits + b * V, V, NEGATIVE_INFINITY, greedy ? real(1) : temperature};
    if (threadIdx.x == 0) uniform = uniforms[b];

    for (int j = threadIdx.x; j < V; j += blockDim.x) {
        const real x = row.logits[j];
        row.highest = isnan(x) ? -NEGATIVE_INFINITY : fmax(row.highest, x);
    }
    row.highest = block_max(row.highest, scratch) + real(0);            // -0 becomes 0: no gap is -0, which sorts last
    if (isinf(row.highest)) {
        if (threadIdx.x == 0) {
            tokens[b] = 0;
            log_probs[b] = entropies[b] = NEGATIVE_INFINITY - NEGATIVE_INFINITY;
        }
        return;
    }

    Kept kept = {~Bits(0), V, scale, 0, 0};
    Mass below, equal;
    if (top_k > 0 && !greedy) {
        kept.limit = search(row, Count(), top_k, below, equal);
        CountOfEqual ties = {kept.limit};
        const Mass needed = top_k - below;
        if (needed < equal) {
            add_segments(row, ties, segments);
            kept.last = crossing(row, ties, segments, needed - 1);
        }
    }
    if (top_p < 1 && !greedy) {
        const Mass total = add_segments(row, kept, segments);
        const Mass target = max(Mass(1), min(total, Mass(ceil(double(top_p) * double(total)))));
        kept.limit = search(row, Weight{scale}, target, below, equal);
        CountOfEqual ties = {kept.limit};
        const Mass count = add_segments(row, ties, segments), each = equal / count;
        const Mass needed = (target - below + each - 1) / each;
        kept.last = needed < count ? crossing(row, ties, segments, needed - 1) : V;
    }

    kept.sum = kept.weighted = 0;
    const Mass total = add_segments(row, kept, segments);
    const real sum = block_sum(kept.sum, scratch), log_sum = log(sum);
    const real weighted = block_sum(kept.weighted, scratch);
    int token;
    if (greedy) {
        CountOfEqual highest = {0};
        add_segments(row, highest, segments);
        token = crossing(row, highest, segments, 0);
    } else {
        const double u = fmin(fmax(uniform, 0.0), 1.0);
        token = crossing(row, kept, segments, min(Mass(u * double(total)), total - 1));
    }
    if (threadIdx.x == 0) {
        const bool drawn = greedy || (0 <= uniform && uniform < 1);
        tokens[b] = token;
        log_probs[b] = drawn ? -row.gap(token) - log_sum : NEGATIVE_INFINITY - NEGATIVE_INFINITY;
        entropies[b] = log_sum + weighted / sum;
    }
}
