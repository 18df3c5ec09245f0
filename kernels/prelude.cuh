// Definitions for every kernel. launch.py puts this text before the text of a module.
// REAL is float or double, chosen with -D: one source, tested in double, used in float.
typedef REAL real;

#define ALL_LANES 0xffffffffu
// Bare NVRTC has no INFINITY.
#define NEGATIVE_INFINITY real(__int_as_float(0xff800000))

// The sum and the maximum over WIDTH neighbouring lanes of a warp (a power of 2); every lane gets it.
template <int WIDTH>
__device__ __forceinline__ real lanes_sum(real x) {
    for (int other = WIDTH / 2; other > 0; other /= 2) x += __shfl_xor_sync(ALL_LANES, x, other);
    return x;
}

template <int WIDTH>
__device__ __forceinline__ real lanes_max(real x) {
    for (int other = WIDTH / 2; other > 0; other /= 2) x = fmax(x, __shfl_xor_sync(ALL_LANES, x, other));
    return x;
}

// The sum and the maximum over a block of whole warps; every thread gets it.
// scratch: 32 numbers of shared memory, free again when the call returns.
template <bool LARGEST>
__device__ __forceinline__ real block_reduce(real x, real* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = LARGEST ? lanes_max<32>(x) : lanes_sum<32>(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = lane < warps ? scratch[lane] : (LARGEST ? NEGATIVE_INFINITY : real(0));
    x = LARGEST ? lanes_max<32>(x) : lanes_sum<32>(x);
    __syncthreads();
    return x;
}

__device__ __forceinline__ real block_sum(real x, real* scratch) { return block_reduce<false>(x, scratch); }
__device__ __forceinline__ real block_max(real x, real* scratch) { return block_reduce<true>(x, scratch); }
