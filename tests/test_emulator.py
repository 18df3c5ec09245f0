"""The emulator: results, bytes, errors of code and launches, the build."""
import math
import multiprocessing
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from emulator_launches import SCHEDULES, Device, kernel, run, zeros
from minilm.kernels import emulator
from minilm.kernels.emulator import build

pytestmark = pytest.mark.skipif(emulator.available() is not None, reason=f"{emulator.available()}")


# Right kernels: their results, their bytes, no false alarm.

WARPS = r"""
extern "C" __global__ void warps(const int* x, const double* d, int* ints, double* doubles) {
    const unsigned all = 0xffffffffu;
    int t = threadIdx.x, *out = ints + t;
    out[0 * 64] = __shfl_sync(all, x[t], 5);
    out[1 * 64] = __shfl_sync(all, x[t], 5, 8);
    out[2 * 64] = __shfl_up_sync(all, x[t], 3);
    out[3 * 64] = __shfl_up_sync(all, x[t], 3, 8);
    out[4 * 64] = __shfl_down_sync(all, x[t], 3);
    out[5 * 64] = __shfl_down_sync(all, x[t], 3, 8);
    out[6 * 64] = __shfl_xor_sync(all, x[t], 9);
    out[7 * 64] = __ballot_sync(all, x[t] % 3 == 0);
    out[8 * 64] = __any_sync(all, x[t] == 40);
    out[9 * 64] = __all_sync(all, x[t] < 32);
    out[10 * 64] = __syncthreads_or(x[t] == 40);
    out[11 * 64] = __syncthreads_and(x[t] < 63);
    out[12 * 64] = __syncthreads_count(x[t] % 3 == 0);
    doubles[t] = __shfl_xor_sync(all, d[t], 16);
}
"""


@pytest.mark.parametrize("how", [emulator.fast, emulator.checked])
@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_warp_operations_and_votes_return_what_cuda_defines(how, schedule, rng):
    x, d = rng.permutation(64).astype(np.int32), rng.normal(size=64)
    ints, doubles = zeros(13, 64, dtype=np.int32), np.zeros(64)
    with how(schedule):
        run(WARPS, "warps", x, d, ints, doubles)
    t = np.arange(64)
    lane, warp = t % 32, t // 32 * 32
    threes = (x % 3 == 0).reshape(2, 32)
    ballots = (threes.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1).astype(np.uint32).view(np.int32)
    expected = [x[warp + 5], x[t // 8 * 8 + 5], x[np.where(lane >= 3, t - 3, t)], x[np.where(t % 8 >= 3, t - 3, t)],
                x[np.where(lane < 29, t + 3, t)], x[np.where(t % 8 < 5, t + 3, t)], x[warp + (lane ^ 9)],
                np.repeat(ballots, 32), np.repeat((x == 40).reshape(2, 32).any(1), 32),
                np.repeat((x < 32).reshape(2, 32).all(1), 32),
                np.ones(64), np.zeros(64), np.full(64, threes.sum())]
    assert np.array_equal(ints, np.array(expected))
    assert np.array_equal(doubles, d[warp + (lane ^ 16)])


PLACES = r"""
extern "C" __global__ void places(int* out, int all) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    int threads = blockDim.x * blockDim.y * blockDim.z;
    out[block * threads + thread] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z
                                    + 1000 * (threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z);
}
"""


def test_grids_and_blocks_have_three_axes():
    grid, block = (3, 2, 4), (8, 4, 2)
    out = zeros(24, 64, dtype=np.int32)
    with emulator.checked():
        run(PLACES, "places", out, 0, grid=grid, block=block)
    numbers = [np.array([x + 10 * y + 100 * z for z in range(c) for y in range(b) for x in range(a)])
               for a, b, c in (grid, block)]
    assert np.array_equal(out, numbers[0][:, None] + 1000 * numbers[1])


MATMUL = r"""
// C (M,N) = A (M,K) B (K,N) by tiles of 16 x 16; M, N and K are not multiples of it.
extern "C" __global__ void __launch_bounds__(16 * 16)
matmul(const REAL* __restrict__ A, const REAL* __restrict__ B, REAL* __restrict__ C, int M, int N, int K) {
    __shared__ REAL a[16][16];
    __shared__ REAL b[16]
                     [16 + 1];
    int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * 16 + y, column = blockIdx.x * 16 + x;
    REAL sum = 0;
    for (int k = 0; k < K; k += 16) {
        a[y][x] = row < M && k + x < K ? A[row * K + k + x] : REAL(0);
        b[y][x] = column < N && k + y < K ? B[(k + y) * N + column] : REAL(0);
        __syncthreads();
        for (int i = 0; i < 16; ++i) sum += a[y][i] * b[i][x];
        __syncthreads();
    }
    if (row < M && column < N) C[row * N + column] = sum;
}
"""


@pytest.mark.parametrize("real, dtype", [("float", np.float32), ("double", np.float64)])
def test_a_tiled_product_has_the_same_right_result_in_every_schedule_and_its_bytes_are_counted(real, dtype, rng):
    M, N, K = 40, 50, 33
    A, B = rng.normal(size=(M, K)).astype(dtype), rng.normal(size=(K, N)).astype(dtype)
    results = []
    for how in emulator.checked, emulator.fast:
        for schedule in SCHEDULES:
            C = np.full((M, N), np.nan, dtype)
            with how(schedule) as launches:
                run(MATMUL, "matmul", A, B, C, M, N, K, grid=(4, 3), block=(16, 16), options=(f"-DREAL={real}",))
            results.append(C)
    assert all(np.array_equal(C, results[0]) for C in results)
    assert np.allclose(results[0], A @ B, rtol=0, atol=1e-13 if real == "double" else 1e-5)
    size = A.itemsize               # A is read once for each of 4 columns of tiles, B for each of 3 rows
    assert emulator.traffic() == {0: (4 * A.nbytes, 0), 1: (3 * B.nbytes, 0), 2: (0, C.nbytes)}
    steps = 4 * 3 * 3               # blocks times tiles along K
    assert emulator.shared_traffic() == (steps * 256 * 16 * 2 * size, steps * 256 * 2 * size)
    assert launches[0].traffic is None and launches[0].parameters == ("A", "B", "C", "M", "N", "K")


REDUCE = r"""
__device__ __forceinline__ float warp_sum(float v) {
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}
extern "C" __global__ void __launch_bounds__(128)
reduce(const float4* unused, const float* __restrict__ x, float* __restrict__ sums, int* histogram, int n) {
    __shared__ float parts[32];
    float v = 0;
    for (int i = 4 * threadIdx.x; i < n; i += 4 * blockDim.x) {
        float4 four = __ldg((const float4*)(x + blockIdx.x * n + i));
        v += four.x + four.y + four.z + four.w;
        atomicAdd(histogram + ((int)four.x & 7), 1);
        atomicMax(histogram + 8, i);
        atomicMin(histogram + 9, i);
        atomicCAS(histogram + 10, 0, 7);
    }
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = warp_sum(threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0.f);
        if (threadIdx.x == 0) sums[blockIdx.x] = v;
    }
}
"""


@pytest.mark.parametrize("how", [emulator.fast, emulator.checked])
@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_a_reduction_with_shuffles_and_a_histogram_with_atomics_raise_no_fault(how, schedule, rng):
    x = rng.integers(0, 8, (5, 1000)).astype(np.float32)
    sums, histogram = zeros(5), np.array([0] * 9 + [99, 0], np.int32)
    code = REDUCE.replace("const float4* unused, ", "")
    with how(schedule):
        run(code, "reduce", x, sums, histogram, 1000, grid=(5,), block=(128,))
    assert np.array_equal(sums, x.sum(1))
    assert np.array_equal(histogram, [*np.bincount(x[:, ::4].astype(int).ravel(), minlength=8), 996, 0, 7])
    if how is emulator.checked:     # an atomic operation reads and writes 4 bytes
        assert emulator.traffic() == {0: (x.nbytes, 0), 1: (0, 20), 2: (4 * 4 * 1250, 4 * 4 * 1250)}


FUNCTIONS = ("exp exp2 log log2 log1p expm1 sqrt cbrt sin cos tanh erf fabs floor ceil trunc rint rsqrt").split()
MATH = "\n".join(["""
extern "C" __global__ void math(const REAL* x, const REAL* y, REAL* out) {
    int t = threadIdx.x;
    REAL a = x[t], b = y[t];"""] + [f"    out[{i} * 32 + t] = {name}(a);" for i, name in enumerate(FUNCTIONS)] + [
    f"    out[{len(FUNCTIONS) + i} * 32 + t] = {text};" for i, text in enumerate(
        ("pow(a, b)", "fmax(a, b)", "fmin(a, b)", "fma(a, b, a)", "max(a, b)", "min(a, b)",
         "a < b ? isnan(a) : isfinite(b)",
         "REAL(max(t, 7) + min(3u, 4u) + __popc(255) + __clz(1) + __ffs(8))"))] + ["}"])


@pytest.mark.parametrize("real, dtype", [("float", np.float32), ("double", np.float64)])
def test_mathematical_functions_are_those_of_their_names(real, dtype, rng):
    x, y = rng.uniform(0.1, 2, 32).astype(dtype), rng.uniform(0.1, 2, 32).astype(dtype)
    out = np.zeros((len(FUNCTIONS) + 8, 32), dtype)
    run(MATH, "math", x, y, out, block=(32,), options=(f"-DREAL={real}",))
    own = {"erf": np.vectorize(math.erf), "rsqrt": lambda x: 1 / np.sqrt(x)}
    expected = [own.get(name, getattr(np, name, None))(x) for name in FUNCTIONS] + [
        x ** y, np.maximum(x, y), np.minimum(x, y), x * y + x, np.maximum(x, y), np.minimum(x, y), x >= y,
        np.maximum(np.arange(32), 7) + 3 + 8 + 31 + 4]
    assert np.allclose(out, np.array(expected), rtol=10 * np.finfo(dtype).eps, atol=np.finfo(dtype).eps)


# Code and launches that are errors with NVRTC or on a device are errors here, with a message.

def one(body, before=""):
    return f'{before}\nextern "C" __global__ void one(float* y) {{ {body} }}'


CONTRACTED = r"""
extern "C" __global__ void sums(const float* a, const float* b, const float* c, float* written, float* fused) {
    const int i = threadIdx.x;
    written[i] = a[i] * b[i] + c[i];
    fused[i] = fmaf(a[i], b[i], c[i]);
}
"""


def test_a_product_and_a_sum_are_rounded_twice_or_once_as_the_mode_says(rng):
    a, b = rng.normal(size=(2, 256)).astype(np.float32)
    exact, rounded = a.astype(np.float64) * b, a * b
    results = []
    for how in emulator.fast, emulator.checked, emulator.contracted:
        written, fused = zeros(256), zeros(256)
        with how():
            run(CONTRACTED, "sums", a, b, -rounded, written, fused, block=(256,))
        assert np.array_equal(fused, (exact - rounded).astype(np.float32)), "the rounding error of the product"
        results.append(written)
    assert not results[0].any() and not results[1].any()
    if " fma " not in Path("/proc/cpuinfo").read_text("utf-8"):
        pytest.skip("this processor has no FMA instructions")
    assert np.array_equal(results[2], fused) and fused.any()


@pytest.mark.parametrize("code", [
    one("y[0] = std::max(1, 2);"), one("y[0] = INFINITY;"), one("y[0] = M_PI;"), one("uint32_t n = 1;"),
    one("y[0] = memcmp(y, y, 4);"), one("", "#include <cmath>"), one("", "#include <cuda_runtime.h>"),
    one("atomicMax(y, 1.f);"), one("y[0] = __shfl_xor(1, 1);"), one("y[0] = __activemask();"),
    one("threadIdx.x = 3;"), one("y[0] = MINILM_EMULATED;")])
def test_code_that_nvrtc_cannot_compile_raises_with_its_line(code):
    with pytest.raises(emulator.CompileError, match=r"test\.cu:[12]:"):
        kernel(code, "one")


@pytest.mark.parametrize("declaration", ["__shared__ float a[4], b[4];", "__shared__ float* p;",
                                         "__shared__ struct { int x; } s;"])
@pytest.mark.parametrize("how", [emulator.fast, emulator.checked])
def test_a_shared_declaration_of_an_unsupported_form_raises(declaration, how):
    message = r"^test\.cu:\d+: the emulator needs one __shared__ variable in a declaration: "
    with how(), pytest.raises(emulator.Unsupported, match=message):
        kernel(one(declaration), "one")
    with how():
        kernel(one("", f"// {declaration}\n/* {declaration} */"), "one")


def test_an_option_that_is_not_a_definition_raises():
    kernel(one("y[0] = N;"), "one", "-DN=3", "--std=c++17")
    with pytest.raises(ValueError, match="--use_fast_math"):
        kernel(one(""), "one", "--use_fast_math")
    with pytest.raises(KeyError, match="no kernel .* two; its kernels are one"):
        kernel(one(""), "two")


ARGUMENTS = r"""
extern "C" __global__ void __launch_bounds__(LANES * 3, 1) take(
    const float* __restrict__ x, double* __restrict__ y, int n, float a, double b, bool flag,
    long long big, unsigned u) {
    extern __shared__ char bytes[];
    if (threadIdx.x == 0) y[0] = x[0] + n + a + b + flag + big + u;
}
"""
TAKEN = dict(x=Device(np.ones(4, np.float32)), y=Device(np.zeros(4)), n=np.int32(1), a=np.float32(2), b=np.float64(3),
             flag=np.bool_(True), big=np.int64(4), u=np.uint32(5))


def take(grid=(1,), block=(32,), shared_mem=0, most=None, **changed):
    function = kernel(ARGUMENTS, "take", "-DLANES=32")
    if most:
        function.max_dynamic_shared_size_bytes = most
    function(grid, block, tuple({**TAKEN, **changed}.values()), shared_mem=shared_mem)


def test_arguments_of_the_declared_types_reach_the_kernel():
    take()
    assert TAKEN["y"].array[0] == 1 + 1 + 2 + 3 + 1 + 4 + 5


@pytest.mark.parametrize("changed, message", [
    (dict(n=1), r"argument 2 \(n\) is declared int32, but is a int; pass np.int32"),
    (dict(a=2.0), "declared float32, but is a float"), (dict(b=3.0), "declared float64, but is a float"),
    (dict(flag=True), "declared bool, but is a bool; pass np.bool"), (dict(n=np.int64(1)), "but is a int64"),
    (dict(a=np.float64(2)), "but is a float64"), (dict(b=np.float32(3)), "but is a float32"),
    (dict(u=np.int32(5)), "but is a int32"),
    (dict(n=None), "but is a NoneType"),
    (dict(x=np.ones(4, np.float32)), "must be an array on the device, but is a NumPy array"),
    (dict(x=None), "must be an array on the device, but is NoneType"), (dict(x=np.float32(1)), "is float32"),
    (dict(x=Device(np.ones(4))), r"argument 0 \(x\) is an array of float64; the kernel declares float32"),
    (dict(y=Device(np.ones(4, np.int64))), "array of int64"),
    (dict(x=Device(np.ones((4, 4), np.float32).T)), "not contiguous"),
    (dict(x=Device(np.ones(8, np.float32)[::2])), "not contiguous"),
    (dict(extra=np.int32(1)), r"takes 8 arguments \(x, y, n, a, b, flag, big, u\), not 9"),
    (dict(grid=1), "a grid must be a tuple"), (dict(block=[1, 1, 1, 1]), "a block must be a tuple")])
def test_an_argument_of_another_type_than_the_declared_one_raises_type_error(changed, message):
    with pytest.raises(TypeError, match=message):
        take(**changed)


@pytest.mark.parametrize("changed, message", [
    (dict(grid=(0,)), "at least one"), (dict(grid=(1, -1)), "at least one"), (dict(grid=(1, 65536)), "CUDA allows"),
    (dict(block=(2048,)), "CUDA allows"), (dict(block=(64, 32)), "2048 threads a block; CUDA allows at most 1024"),
    (dict(block=(1, 1, 96)), "CUDA allows"), (dict(block=(33,)), "whole warps"),
    (dict(shared_mem=49153), "max_dynamic_shared_size_bytes is 49152; set it first"),
    (dict(shared_mem=60000, most=59999), "set it first"), (dict(most=227 * 1024 + 1), "a device has at most")])
def test_a_launch_beyond_the_limits_of_devices_raises(changed, message):
    with pytest.raises(ValueError, match=message):
        take(**changed)


def test_more_threads_than_the_launch_bounds_promise_are_a_fault():
    take(block=(96,))
    with pytest.raises(emulator.Fault, match="kernel take: 128 threads a block, .* promise at most 96"):
        take(block=(128,))


def test_more_than_48_kib_of_shared_memory_is_available_after_it_is_requested():
    take(shared_mem=49152)
    take(shared_mem=200 * 1024, most=227 * 1024)


# The build.

@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder with the runtime in it and nothing else; the commands that g++ is run with."""
    kernel(one(""), "one")
    folder = tmp_path / "minilm" / "kernels"
    folder.mkdir(parents=True)
    for runtime in build.cache_folder().glob("runtime-*.o"):
        shutil.copy2(runtime, folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands, gxx = [], build._gxx
    monkeypatch.setattr(build, "_gxx", lambda *command, **options: commands.append(command) or gxx(*command, **options))
    return folder, commands


def test_a_second_build_comes_from_the_cache_and_a_changed_header_builds_again(own_cache, tmp_path, monkeypatch):
    folder, commands = own_cache
    code = one("y[threadIdx.x] = VALUE;")
    run(code, "one", y := zeros(32), block=(32,), options=("-DVALUE=3",))
    assert (y == 3).all() and len(commands) == 3, "g++ finds the names of the kernels, compiles, and links"
    kept = sorted(folder.iterdir())
    assert [path.suffix for path in kept if "runtime" not in path.name] == [".so"]
    run(code, "one", y := zeros(32), block=(32,), options=("-DVALUE=3",))
    assert (y == 3).all() and len(commands) == 3 and sorted(folder.iterdir()) == kept
    for name in {*build.KERNEL_HEADERS, *build.RUNTIME_HEADERS, *build.RUNTIME}:
        shutil.copy(build.HERE / name, tmp_path)
    header = tmp_path / "device.h"
    header.write_text(header.read_text().replace("warpSize = 32", "warpSize = 64"))
    monkeypatch.setattr(build, "HERE", tmp_path)
    run(one("y[threadIdx.x] = warpSize;"), "one", y := zeros(32), block=(32,))
    assert (y == 64).all() and len(commands) == 6


def test_a_build_that_fails_leaves_nothing_behind(own_cache):
    folder, _ = own_cache
    kernel(one(""), "one")
    before = sorted(folder.iterdir())
    with pytest.raises(emulator.CompileError):
        kernel(one("nonsense;"), "one")
    assert sorted(folder.iterdir()) == before


def build_in_a_process(_):
    run(one("y[threadIdx.x] = 5;"), "one", y := zeros(32), block=(32,))
    return y.sum()


def test_two_processes_can_build_at_once_and_a_fork_can_launch(own_cache):
    folder, _ = own_cache
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(build_in_a_process, range(2), chunksize=1) == [160, 160]
    assert [path.suffix for path in folder.iterdir() if "runtime" not in path.name] == [".so"]


def test_on_an_unsupported_machine_the_error_gives_the_reason(monkeypatch):
    def reason(monkeypatch):
        build.available.cache_clear()
        try:
            found = emulator.available()
            with pytest.raises(RuntimeError, match=f"kernels cannot run here: {re.escape(found)}"):
                emulator.RawModule(code="")
            return found
        finally:
            monkeypatch.undo()
            build.available.cache_clear()

    monkeypatch.setattr(build.shutil, "which", lambda program: None)
    assert reason(monkeypatch) == "the emulator needs g++ (Debian: apt-get install g++)"
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert "x86-64, not on Linux on aarch64" in reason(monkeypatch)
    monkeypatch.setattr(build, "_output", lambda *command: "10.2.1\n")
    assert "g++ 11 or newer, and this is g++ 10.2.1" in reason(monkeypatch)
    assert emulator.available() is None
