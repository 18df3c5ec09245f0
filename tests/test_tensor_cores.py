"""tensor.cuh on the emulator: rounding, fragments of mma and ldmatrix, the time at which copies arrive, a product."""
import numpy as np
import pytest

from emulator_launches import SCHEDULES, run, zeros
from minilm.kernels import bf16, emulator, launch, nvrtc

emulated = pytest.mark.skipif(emulator.available() is not None, reason=f"{emulator.available()}")
PRODUCT = (launch.FOLDER / "emulator" / "examples" / "product.cu").read_text("utf-8")
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4            # of each lane, as in tensor.cuh


# Rounding. The kernel has one thread for 64 numbers, so that a launch of 65,536 numbers is short.

ROUND = r"""
#include "tensor.cuh"
extern "C" __global__ void round_all(const float* x, bf16* rounded, unsigned* pairs, float* back) {
    for (int i = threadIdx.x; i < COUNT; i += 1024) {
        rounded[i] = bf16(x[i]);
        pairs[i] = bf16_pair(x[i], x[COUNT - 1 - i]);
        back[i] = float(rounded[i]);
    }
}
"""
EVERY = np.arange(1 << 16, dtype=np.uint16)             # the bits of each bf16
NANS = (EVERY & 0x7FFF) > 0x7F80


def nearest(x):
    """The bits of the bf16 nearest to float32 numbers, by distances in float64; a second formula for to_bf16."""
    down = (x.view(np.uint32) >> 16).astype(np.uint16)              # towards zero
    def value(bits):                    # of a magnitude; infinity begins where 2^128 would be
        bits = bits & 0x7FFF
        return np.where(bits >= 0x7F80, 2.0 ** 128, bf16.from_bf16(np.minimum(bits, 0x7F7F)).astype(np.float64))
    magnitude = np.abs(np.where(np.isnan(x), 0, x).astype(np.float64))
    below = magnitude - value(down)
    above = value(down + 1) - magnitude
    rounded = np.where((below < above) | ((below == above) & (down % 2 == 0)), down, down + 1)
    return np.where(np.isnan(x), 0x7FFF, np.where(np.isinf(x), down, rounded)).astype(np.uint16)


def floats(rng):
    """2^16 float32 numbers: any bits, ties of two bf16 and their neighbours, denormal numbers, infinities, NaNs."""
    bits = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    bits[:20_000] = bits[:20_000] & 0xFFFF0000 | rng.choice(np.array([0x7FFF, 0x8000, 0x8001], np.uint32), 20_000)
    bits[20_000:30_000] &= 0x807FFFFF
    bits[30_000:30_006] = 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0xFF7F8000
    return bits.view(np.float32)


def test_every_bf16_survives_the_way_to_float32_and_back_and_every_nan_becomes_one():
    there = bf16.from_bf16(EVERY)
    assert there.dtype == np.float32 and np.array_equal(there.view(np.uint32) >> 16, EVERY)
    assert np.array_equal(bf16.to_bf16(there), np.where(NANS, 0x7FFF, EVERY))
    assert bf16.to_bf16(np.float32(1)).shape == () and bf16.from_bf16(np.zeros((2, 3), np.uint16)).shape == (2, 3)


def test_float32_is_rounded_to_the_nearest_bf16_and_ties_to_even(rng):
    x = floats(rng)
    assert np.array_equal(bf16.to_bf16(x), nearest(x))
    halves = np.array([1 + 2.0 ** -8, 1 + 3 * 2.0 ** -8, -1 - 2.0 ** -8, 2.0 ** 128 - 2.0 ** 119], np.float32)
    assert bf16.from_bf16(bf16.to_bf16(halves)).tolist() == [1, 1 + 2.0 ** -6, -1, np.inf]


@emulated
@pytest.mark.parametrize("how", [emulator.fast, emulator.checked])
def test_a_kernel_rounds_as_the_host_does_bit_for_bit(how, rng):
    for x in bf16.from_bf16(EVERY), floats(rng):
        rounded, pairs, back = (np.zeros(x.size, dtype) for dtype in (np.uint16, np.uint32, np.float32))
        with how():
            run(ROUND, "round_all", x, rounded, pairs, back, block=(1024,), options=(f"-DCOUNT={x.size}",))
        expected = bf16.to_bf16(x)
        assert np.array_equal(rounded, expected)
        assert np.array_equal(pairs, expected | expected[::-1].astype(np.uint32) << 16)
        assert np.array_equal(back.view(np.uint32), expected.astype(np.uint32) << 16)


# Fragments, by the formulas of the PTX ISA. Two warps, each with its own matrices.

FRAGMENTS = r"""
#include "tensor.cuh"
extern "C" __global__ void multiply(const unsigned* a, const unsigned* b, float* d) {
    const int t = threadIdx.x;
    const unsigned left[4] = {a[4 * t], a[4 * t + 1], a[4 * t + 2], a[4 * t + 3]};
    float sums[4] = {d[4 * t], d[4 * t + 1], d[4 * t + 2], d[4 * t + 3]};
    mma(sums, left, b[2 * t], b[2 * t + 1]);
    for (int i = 0; i < 4; ++i) d[4 * t + i] = sums[i];
}
extern "C" __global__ void load(const bf16* x, const int* rows, unsigned* plain, unsigned* transposed) {
    __shared__ __align__(16) bf16 tile[64 * 8];
    const int t = threadIdx.x;
    copy16(tile + 8 * t, x + 8 * t, true);
    copies_commit();
    copies_wait<0>();
    __syncthreads();
    unsigned r[4];
    ldmatrix4(r, tile + 8 * rows[t]);
    for (int i = 0; i < 4; ++i) plain[4 * t + i] = r[i];
    ldmatrix4_trans(r, tile + 8 * rows[t]);
    for (int i = 0; i < 4; ++i) transposed[4 * t + i] = r[i];
}
"""


def pairs(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def fragment_of_a(A):
    """(16,16) to (lane,4)"""
    places = [(G, 2 * T), (G + 8, 2 * T), (G, 2 * T + 8), (G + 8, 2 * T + 8)]
    return np.stack([pairs(A[row, column], A[row, column + 1]) for row, column in places], axis=1)


def fragment_of_b(B):
    """(16,8) to (lane,2)"""
    return np.stack([pairs(B[row, G], B[row + 1, G]) for row in (2 * T, 2 * T + 8)], axis=1)


def fragment_of_d(D):
    """(16,8) to (lane,4)"""
    return np.stack([D[row, 2 * T + i] for row in (G, G + 8) for i in (0, 1)], axis=1)


def random_bf16(rng, *shape):
    return bf16.to_bf16(rng.normal(size=shape))


@emulated
@pytest.mark.parametrize("how", [emulator.fast, emulator.checked])
@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_mma_adds_the_product_of_two_matrices_in_every_schedule(how, schedule, rng):
    A, B, D = random_bf16(rng, 2, 16, 16), random_bf16(rng, 2, 16, 8), rng.normal(size=(2, 16, 8)).astype(np.float32)
    exact = bf16.from_bf16(A).astype(float) @ bf16.from_bf16(B).astype(float) + D
    d = np.stack(list(map(fragment_of_d, D)))
    with how(schedule):
        run(FRAGMENTS, "multiply", np.stack(list(map(fragment_of_a, A))), np.stack(list(map(fragment_of_b, B))), d)
    expected = np.stack(list(map(fragment_of_d, exact)))
    assert np.abs(d - expected).max() <= 2.0 ** -20 * np.abs(expected).max()


@emulated
def test_mma_sums_from_the_first_column_to_the_last_in_float32():
    """So two runs have the same bits. 2^24 + 1 is not a float32: the order shows which ones are lost."""
    A, B = np.zeros((2, 16, 16), np.uint16), np.zeros((2, 16, 8), np.uint16)
    B[:] = bf16.to_bf16(np.float32(1))
    A[:, 0] = bf16.to_bf16(np.array([2.0 ** 24, *[1.0] * 14, -2.0 ** 24], np.float32))      # each 1 is lost
    A[:, 1] = bf16.to_bf16(np.array([*[1.0] * 14, 2.0 ** 24, -2.0 ** 24], np.float32))      # none is lost
    d = zeros(2, 32, 4)
    run(FRAGMENTS, "multiply", np.stack(list(map(fragment_of_a, A))), np.stack(list(map(fragment_of_b, B))), d)
    expected = np.zeros((16, 8), np.float32)
    expected[1] = 14
    assert np.array_equal(d, [fragment_of_d(expected)] * 2)


@emulated
@pytest.mark.parametrize("how", [emulator.fast, emulator.checked])
@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_ldmatrix_gives_each_lane_its_part_of_the_rows_that_the_lanes_name(how, schedule, rng):
    x = rng.permutation(1 << 16)[:512].astype(np.uint16).reshape(64, 8)
    rows = rng.permutation(64).astype(np.int32)
    plain, transposed = zeros(64, 4, dtype=np.uint32), zeros(64, 4, dtype=np.uint32)
    with how(schedule):
        run(FRAGMENTS, "load", x, rows, plain, transposed)
    matrices = x[rows].reshape(2, 4, 8, 8)              # warp, matrix, row, column
    by_row = pairs(matrices[:, :, G, 2 * T], matrices[:, :, G, 2 * T + 1])
    by_column = pairs(matrices[:, :, 2 * T, G], matrices[:, :, 2 * T + 1, G])
    assert np.array_equal(plain.reshape(2, 32, 4), by_row.transpose(0, 2, 1))
    assert np.array_equal(transposed.reshape(2, 32, 4), by_column.transpose(0, 2, 1))
    if how is emulator.checked:
        assert emulator.traffic()[0] == (x.nbytes, 0)
        assert emulator.shared_traffic() == (2 * x.nbytes, x.nbytes)


# Asynchronous copies.

COPIES = r"""
#include "tensor.cuh"
extern "C" __global__ void arrivals(const bf16* x, float* seen) {
    __shared__ __align__(16) bf16 tile[64 * 3 * 8];
    const int t = threadIdx.x;
    bf16* mine = tile + 24 * t;
    for (int i = 0; i < 3; ++i) mine[8 * i] = bf16(-1.f);
    copy16(mine, x + 24 * t, true);
    copies_commit();
    copy16(mine + 8, x + 24 * t + 8, true);
    copies_commit();
    copy16(mine + 16, x + 24 * t + 16, true);
    __syncthreads();
    float* row = seen + 5 * 3 * t;
    for (int i = 0; i < 3; ++i) row[i] = float(mine[8 * i]);
    copies_wait<2>();
    for (int i = 0; i < 3; ++i) row[3 + i] = float(mine[8 * i]);
    copies_wait<1>();
    for (int i = 0; i < 3; ++i) row[6 + i] = float(mine[8 * i]);
    copies_wait<0>();
    for (int i = 0; i < 3; ++i) row[9 + i] = float(mine[8 * i]);
    copies_commit();
    copies_wait<0>();
    for (int i = 0; i < 3; ++i) row[12 + i] = float(mine[8 * i]);
}
extern "C" __global__ void zeros(const bf16* x, unsigned short* y) {
    extern __shared__ __align__(16) bf16 tile[];
    const int t = threadIdx.x;
    for (int i = 0; i < 8; ++i) tile[8 * t + i] = bf16(-1.f);
    copy16(tile + 8 * t, t % 2 ? x + 8 * t : x + (1 << 20), t % 2);
    copies_commit();
    copies_wait<0>();
    for (int i = 0; i < 8; ++i) y[8 * t + i] = tile[8 * t + i].bits;
}
"""


@emulated
@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_copies_arrive_at_the_wait_for_their_group_and_not_before(schedule, rng):
    x = random_bf16(rng, 64, 3, 8)
    seen = zeros(64, 5, 3)
    with emulator.fast(schedule):
        run(COPIES, "arrivals", x, seen)
    new = bf16.from_bf16(x[:, :, 0])
    for stage, arrived in enumerate(([0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1])):
        assert np.array_equal(seen[:, stage], np.where(arrived, new, -1)), stage
    with emulator.checked(schedule), pytest.raises(emulator.Fault, match="copy in flight: reads shared tile"):
        run(COPIES, "arrivals", x, seen)


@emulated
@pytest.mark.parametrize("how", [emulator.fast, emulator.checked])
def test_a_copy_that_is_not_real_writes_zeros_and_reads_nothing(how, rng):
    x = random_bf16(rng, 64, 8)
    y = zeros(64, 8, dtype=np.uint16)
    with how():
        run(COPIES, "zeros", x, y, shared=1024)
    assert np.array_equal(y[1::2], x[1::2]) and not y[::2].any()
    if how is emulator.checked:
        assert emulator.traffic() == {0: (x.nbytes // 2, 0), 1: (0, y.nbytes)}


# A product with two stages of copies.

def multiply(A, B):
    (M, K), N = A.shape, B.shape[1]
    with emulator.as_cupy() as xp:
        kernel = xp.RawModule(code=launch.with_headers("product.cu", PRODUCT)).get_function("product")
        C = xp.empty((M, N), np.float32)
        kernel((-(-N // 64), -(-M // 64)), (128,), (xp.asarray(A), xp.asarray(B), C, *map(np.int32, (M, N, K))))
        return C.get()


@emulated
@pytest.mark.parametrize("M, N, K", [(1, 8, 8), (70, 88, 104), (64, 64, 32), (33, 16, 64)])
def test_the_product_is_that_of_numpy_and_has_the_same_bits_in_every_schedule(M, N, K, rng):
    A, B = random_bf16(rng, M, K), random_bf16(rng, K, N)
    exact = bf16.from_bf16(A).astype(float) @ bf16.from_bf16(B).astype(float)
    results = []
    for how in emulator.checked, emulator.fast:
        for schedule in SCHEDULES[:3]:
            with how(schedule):
                results.append(multiply(A, B))
    assert np.abs(results[0] - exact).max() <= 1e-6 * K * np.abs(exact).max()
    assert all(np.array_equal(C, results[0]) for C in results)
    columns, rows, steps = -(-N // 64), -(-M // 64), -(-K // 32)        # of blocks, of tiles along K
    assert emulator.traffic() == {0: (columns * A.nbytes, 0), 1: (rows * B.nbytes, 0), 2: (0, 4 * M * N)}
    tile = 2 * 64 * 32                                                  # bytes of A, and of B
    reads = tile + 4 * tile                                             # each warp reads its rows of A, and all of B
    assert emulator.shared_traffic() == (columns * rows * steps * reads, columns * rows * steps * 2 * tile)


@emulated
@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.float16])
def test_a_parameter_of_bf16_takes_arrays_of_uint16_alone(dtype):
    with pytest.raises(TypeError, match=r"argument 0 \(A\) is an array of .*; .* declares bf16, uint16 on the host"):
        multiply(np.zeros((16, 16), dtype), np.zeros((16, 16), np.uint16))


# The PTX.

@pytest.mark.skipif(nvrtc.library() is None, reason=nvrtc.INSTALL)
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_nvrtc_compiles_every_function_of_tensor_cuh_without_spills(architecture):
    for name, code in ("product", PRODUCT), ("round_all", ROUND), ("load", FRAGMENTS), ("arrivals", COPIES):
        _, log = nvrtc.compile(launch.with_headers("test.cu", code), ("--std=c++17", "-DCOUNT=65536"), architecture)
        assert nvrtc.resources(log)[name].spill_bytes == 0


@pytest.mark.skipif(nvrtc.library() is None, reason=nvrtc.INSTALL)
def test_the_error_for_an_older_device_names_the_least_one():
    with pytest.raises(nvrtc.CompileError, match=r"tensor\.cuh.*needs sm_80 or later"):
        nvrtc.compile(launch.with_headers("test.cu", ROUND), ("--std=c++17", "-DCOUNT=1"), 75)


def test_a_header_is_put_into_a_text_and_the_lines_keep_their_numbers():
    text = launch.with_headers("a.cu", '// first\n#include "tensor.cuh"\nthird\n')
    assert text.startswith('#line 1 "a.cu"\n// first\n#line 1 "tensor.cuh"\n// Tensor cores')
    assert text.endswith('#line 3 "a.cu"\nthird\n')
    assert launch.with_headers("a.cu", '// #include "tensor.cuh"\n') == '#line 1 "a.cu"\n// #include "tensor.cuh"\n'
