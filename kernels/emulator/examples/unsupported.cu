// CUDA that the emulator does not support: it names each feature and what to use instead.
//
//     python -m minilm.kernels.emulator kernels/emulator/examples/unsupported.cu --x 32

#include <cuda_fp16.h>
#include <cooperative_groups.h>

extern "C" __global__ void halved(__half* x) {
    cooperative_groups::this_thread_block().sync();
    x[threadIdx.x] = __hmul(x[threadIdx.x], __float2half(0.5f));
}
