"""python -m minilm.kernels.emulator: modules, kernels of one's own, faults and errors as they are printed, gdb."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minilm.kernels import attention, emulator, launch
from minilm.kernels.emulator import __main__, fault, programs

pytestmark = pytest.mark.skipif(emulator.available() is not None, reason=f"{emulator.available()}")

EXAMPLES = Path(emulator.__file__).parent / "examples"
VECSUM = [str(EXAMPLES / "vecsum.cu"), "--out", "3"]


def printed(capsys, *arguments):
    __main__.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def error(*arguments):
    """The text of the fault, or of the compiler's error, with which the command ends."""
    with pytest.raises(SystemExit) as exit:
        __main__.main([str(argument) for argument in arguments])
    return str(exit.value)


def mistake(capsys, *arguments):
    """The line with which a command ends that cannot be run."""
    with pytest.raises(SystemExit) as exit:
        __main__.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# Modules.

def test_a_module_runs_under_the_checkers_in_every_order_of_threads(capsys):
    text = printed(capsys, "log_probs", "--N", "3", "--V", "40")
    assert "log_probs_forward: grid (3, 1, 1)" in text and "2 launches, 4 results: no checker found a fault" in text
    assert text.count("the same results, bit for bit") == 3


def test_sizes_have_the_types_of_their_defaults(capsys):
    text = printed(capsys, "sampling", "--V=33", "--temperature", "0.5", "--top_k", "3", "--dtype", "float64")
    assert "logits" in text and "NOT" not in text


def test_help_lists_the_modules_and_their_sizes(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    text = capsys.readouterr().out
    assert "attention    --B 2 --H 4 --G 2 --T 33 --K 32 --dtype float32" in text
    assert all(name in text for name in ("decode", "fused", "log_probs", "sampling"))
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("arguments, message", [
    (["attentoin"], "no module attentoin; there are attention, .*Did you mean attention or attention_bf16?"),
    (["attention", "--t", "3"], "attention has no size --t; it has --B 2 .*Did you mean T?"),
    (["attention", "--T", "abc"], "--T abc: expected a whole number"),
    (["attention", "--T", "-1"], "--T -1: expected a number of at least 0"),
    (["attention", "--T", "1000000000"], "--T 1000000000: expected a number of at most"),
    (["attention", "--G", "0"], "attention --G 0: (integer modulo|division) by zero"),
    (["log_probs", "--V", "0"], "log_probs --V 0"),
    (["attention", "--seed", "-1"], "--seed: '-1' must be a whole number of at least 0"), (["--nosuch"], "required"),
    (["attention", "--K", "24"], "head width 24; this kernel supports 16, 32, 64, 128"),
    (["attention", "--dtype", "half"], "float32 or float64, not in float16"),
    (["attention", "--block", "32"], "--block is for a .cu file"),
    ([str(programs.KERNELS / "attention.cu")], "is a module of minilm.kernels; give its name: attention"),
    (["nothing.cu"], "there is no file nothing.cu")])
def test_a_mistake_in_the_command_is_one_line_with_the_nearest_name(capsys, arguments, message):
    assert re.search(message.replace("?", r"\?"), mistake(capsys, *arguments))


def test_a_size_without_a_value_is_an_error_of_the_command(capsys):
    assert "a size is given as --NAME VALUE, for example --T 33" in mistake(capsys, "attention", "--T")


# A kernel of one's own.

def test_a_file_of_ones_own_runs_and_its_results_are_printed(capsys):
    text = printed(capsys, *VECSUM, "--x", "arange:300", "--n", "300")
    assert "vecsum: grid (3, 1, 1), block (128, 1, 1)" in text
    assert "out = 8128.0 24512.0 12210.0\n" in text                 # 44850 in all
    assert "1 launch, 1 result: no checker found a fault" in text


def test_grid_block_content_and_constants_can_be_chosen(tmp_path, capsys):
    path = tmp_path / "two.cu"
    path.write_text('extern "C" __global__ void add(const int* x, REAL* y, bool* flags, REAL scale) {\n'
                    "    int i = blockIdx.x * blockDim.x + threadIdx.x;\n"
                    "    extern __shared__ int all[];\n    all[threadIdx.x] = x[i];\n"
                    "    if (i % 2 == 0) y[i] = scale * all[threadIdx.x];\n}\n"
                    'extern "C" __global__ void other() {}\n')
    text = printed(capsys, path, "--kernel", "add", "--x", "ones:64", "--y", "64", "--flags", "zeros:2",
                   "--scale", "1.5", "--grid", "2", "--block", "32", "--shared", "128", "--define", "REAL=double")
    assert "add: grid (2, 1, 1), block (32, 1, 1), 128 bytes of dynamic shared memory" in text
    assert "y = 1.5 (not written) 1.5 (not written)" in text
    assert "(64 in all); 32 of 64 elements were not written" in text
    assert "flags = False False\n" in text


@pytest.mark.parametrize("arguments, message", [
    (["--x", "300"], "kernel vecsum(x, out, n) also needs --n VALUE"),
    (["--x", "300", "--n", "3.5"], "--n 3.5: expected a whole number"),
    (["--x", "300", "--n", "9999999999"], "9999999999 out of bounds for int32"),
    (["--x", "300", "--n", "9999999999"], "--n: "), (["--x", "9" * 5000, "--n", "3"], "9999: expected a whole number"),
    (["--x", "three", "--n", "3"], "--x three: expected a whole number"),
    (["--x", "ranges:3", "--n", "3"], "the content of an array is one of random, zeros, ones, arange, empty"),
    (["--oot", "3", "--n", "3"], "kernel vecsum has no argument oot; it has x, out, n. Did you mean out?"),
    (["--x", "3", "--n", "3", "--kernel", "vecsim"], "has no kernel vecsim; it has vecsum. Did you mean vecsum?"),
    (["--x", "3", "--n", "3", "--grid", "2,"], "--grid 2,: expected one to three whole numbers"),
    (["--x", "3", "--n", "3", "--block", "100"], "100 threads a block; the emulator needs a multiple of 32"),
    (["--x", "3", "--n", "3", "--block", "0"], "each number must be at least one"),
    (["--x", "3", "--n", "3", "--grid", "1000000000"], "expected at most 67108864 threads in all"),
    (["--x", "1000000000", "--n", "3"], "--x 1000000000: expected a number of at most"),
    (["--x", "3", "--n", "3", "--define", "=1"], "--define =1: expected NAME=VALUE")])
def test_a_mistake_in_the_arguments_of_a_kernel_is_one_line(capsys, arguments, message):
    assert message in mistake(capsys, *VECSUM, *arguments)


def test_a_file_that_is_no_text_is_one_line_of_error(capsys, tmp_path):
    (tmp_path / "binary.cu").write_bytes(bytes(range(256)))
    (tmp_path / "folder.cu").mkdir()
    assert "binary.cu is no UTF-8 text" in mistake(capsys, tmp_path / "binary.cu")
    assert "Is a directory" in mistake(capsys, tmp_path / "folder.cu")


def test_a_pipe_a_device_and_a_loop_of_links_are_one_line_of_error(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe.cu")
    (tmp_path / "loop.cu").symlink_to(tmp_path / "loop.cu")
    (tmp_path / "zero.cu").symlink_to("/dev/zero")
    assert "a pipe, a socket or a device, and no file" in mistake(capsys, tmp_path / "pipe.cu")
    assert "a pipe, a socket or a device, and no file" in mistake(capsys, tmp_path / "zero.cu")
    assert "symbolic links" in mistake(capsys, tmp_path / "loop.cu")


def test_arrays_without_elements_are_shown(capsys, tmp_path):
    (tmp_path / "none.cu").write_text('extern "C" __global__ void none(const double* x, float* y, bool* z) {}\n')
    text = printed(capsys, tmp_path / "none.cu", "--x", "0", "--y", "0", "--z", "0")
    assert "y = \nz = \n" in text and "no checker found a fault" in text


def test_arrays_too_large_for_the_records_of_the_checkers_are_one_line_of_error():
    resource = pytest.importorskip("resource")
    def little_memory():
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    done = subprocess.run([sys.executable, "-m", "minilm.kernels.emulator", *VECSUM[:1], "--x", "zeros:67000000", "--n",
                           "1", "--out", "1", "--grid", "1"], capture_output=True, text=True, preexec_fn=little_memory)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done


def test_a_file_with_several_kernels_or_none_needs_a_choice(capsys, tmp_path):
    path = tmp_path / "some.cu"
    path.write_text('extern "C" __global__ void a() {}\nextern "C" __global__ void b() {}\n')
    assert "some.cu has the kernels a, b: choose one with --kernel" in mistake(capsys, path)
    path.write_text("__global__ void a() {}\n")
    assert 'has no kernel; declare it extern "C" __global__' in mistake(capsys, path)


# Faults.

def test_a_fault_is_printed_alone_with_its_source_lines(capsys):
    text = error(EXAMPLES / "vecsum_race.cu", "--x", "arange:300", "--out", "3", "--n", "300")
    assert capsys.readouterr().out == ""
    assert text == ("vecsum_race.cu:12: data race\n\n"
                    "  -> vecsum_race.cu:12  if (t < half) sums[t] += sums[t + half];\n\n"
                    "kernel vecsum, block (0, 0, 0), thread (1, 0, 0)\n"
                    "writes shared sums[1], which thread (0, 0, 0) read at vecsum_race.cu:12 with no barrier between")


def test_an_index_past_the_end_is_printed_with_the_array():
    text = error(*VECSUM, "--x", "300", "--n", "301")
    assert text.startswith("vecsum.cu:11: out of bounds\n\n  -> vecsum.cu:11       sums[t] = i < n ? x[i] : 0.f;\n\n")
    assert text.endswith("reads 4 bytes, 0 bytes past the end of x, which has 300 elements")


def test_the_traceback_is_shown_on_request():
    with pytest.raises(emulator.Fault, match="vecsum_race.cu:12: kernel vecsum"):
        __main__.main([str(EXAMPLES / "vecsum_race.cu"), "--x", "300", "--out", "3", "--n", "300", "--traceback"])


def test_the_race_in_the_documentation_is_printed_as_documented(emulated, monkeypatch):
    """Which pair of threads is found first depends on g++; the lines do not."""
    text = (launch.FOLDER / "attention.cu").read_text()
    line = "            __syncthreads();                            // all threads are done with the last tile\n"
    assert text.count(line) == 1
    function = attention.function
    monkeypatch.setattr(attention, "function", lambda *arguments, **constants: function(
        *arguments, text=text.replace(line, "\n"), **constants))
    with emulator.checked(), pytest.raises(emulator.Fault) as found:
        attention.example(emulated, np.random.default_rng(0), T=33)

    def without_numbers(text):
        return re.sub(r"thread \(\d+, 0, 0\)|byte \d+", "..", " ".join(text.split()))
    assert without_numbers(fault.explained(found.value)) in without_numbers(emulator.__doc__)


# CUDA that is not supported.

def test_unsupported_features_are_named_with_their_lines_and_what_to_use_instead():
    lines = error(EXAMPLES / "unsupported.cu", "--x", "32").splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        f"unsupported.cu:{number}: not supported by the emulator: {name}" for number, name in (
            (5, "#include <cuda_fp16.h>"), (6, "#include <cooperative_groups.h>"), (8, "__half"),
            (9, "cooperative_groups"), (10, "__hmul"))]


@pytest.mark.parametrize("line, name", [
    ('#include "tensor.cuh"', '#include "tensor.cuh"'),
    ("#include <cuda_runtime.h>", "#include <cuda_runtime.h>"), ("#include <mma.h>", "#include <mma.h>"),
    ("using namespace nvcuda;", "nvcuda"), ("namespace cg = cooperative_groups;", "cooperative_groups"),
    ("__device__ half twice(half x) { return x; }", "half"), ("__nv_bfloat16 x;", "__nv_bfloat16"),
    ('__device__ void f() { int r; asm volatile("mov.u32 %0, %%laneid;" : "=r"(r)); }', "asm"),
    ("void f() { k<<<1, 32>>>(0); }", "a launch <<<...>>>"), ("int main() { cudaMalloc(0, 0); }", "int main"),
    ("__device__ int f() { return std::max(1, 2); }", "std::"), ("__device__ float3 f();", "float3"),
    ("__device__ long long f() { return clock64(); }", "clock64"),
    ("__device__ float f() { return INFINITY; }", "INFINITY"), ("void f() { int* p = (int*)malloc(8); }", "malloc"),
    ("__device__ int f() { return __shfl_xor(1, 1); }", "__shfl_xor"),
    ("__device__ unsigned f() { return __activemask(); }", "__activemask"),
    ("__device__ int f(int x) { return __reduce_add_sync(~0u, x); }", "__reduce_add_sync")])
def test_each_unsupported_feature_is_named(line, name):
    code = f'#line 1 "mine.cu"\n\n{line}\nextern "C" __global__ void k(float* y) {{ y[0] = 1; }}\n'
    with pytest.raises(emulator.CompileError) as found:
        emulator.RawModule(code=code).get_function("k")
    assert f"not supported by the emulator: {name} (" in str(found.value).splitlines()[0], found.value


@pytest.mark.parametrize("line", ["float half = missing;", "y[0] = missing; // asm, std::max", "y[0] = missing"])
def test_another_error_is_that_of_gxx(line):
    with pytest.raises(emulator.CompileError, match="missing") as found:
        emulator.RawModule(code=f'extern "C" __global__ void k(float* y) {{ {line} }}').get_function("k")
    assert "not supported" not in str(found.value)


# gdb.

def gdb(arguments, commands):
    result = subprocess.run([sys.executable, "-m", "minilm.kernels.emulator", *map(str, arguments), "--debug",
                             *(word for command in commands for word in ("--do", command))],
                            capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    if "ptrace" in result.stderr:
        pytest.skip("needs the permission to trace a process")
    return result.stdout


@pytest.mark.skipif(not shutil.which("gdb"), reason="needs gdb")
def test_gdb_stops_at_the_first_line_of_a_kernel_and_shows_the_state_of_its_threads():
    text = gdb(["log_probs", "--N", "2", "--V", "40"], [
        "print threadIdx", "fibers", "break log_probs_forward if threadIdx.x == 5", "continue", "next", "whoami",
        "fibers"])
    assert "block (0, 0, 0) of (2, 1, 1), thread (0, 0, 0) of" in text
    assert "log_probs_forward" in text and "$1 = {x = 0, y = 0, z = 0}" in text
    assert re.search(r"threads 0 to 0: running\nthreads 1 to \d+: can continue", text)
    assert "block (0, 0, 0) of (2, 1, 1), thread (5, 0, 0) of" in text
    assert re.search(r"threads 5 to 5: running\nthreads 6 to \d+: can continue", text)
    assert re.search(r"threads 0 to \d: (wait at \w+, \w+\.cuh?:\d+|exited)", text)


@pytest.mark.skipif(not shutil.which("gdb"), reason="needs gdb")
def test_gdb_stops_in_a_file_of_ones_own():
    text = gdb([*VECSUM, "--x", "300", "--n", "300"], ["next", "print t"])
    assert "at vecsum.cu:" in text and "const int t = threadIdx.x" in text


def test_a_module_of_the_command_line_is_every_cu_file_with_an_example():
    assert set(programs.modules()) == {path.stem for path in launch.FOLDER.glob("*.cu")}
