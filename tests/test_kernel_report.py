"""scripts/dev/kernel_report.py: the assembler's log is read right, occupancy is NVIDIA's, faults set the status."""
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kernel_report
from kernel_report import ARCHITECTURES, Nvcc, Nvrtc, faults, main, resident_blocks
from minilm.kernels import launch, nvrtc
from minilm.kernels.nvrtc import Resources
from support.run_folder import UsageError, main_guard

# As NVRTC 13.5 and nvcc 13.0 print it.
NVRTC_LOG = """ptxas info    : 8 bytes gmem, 16 bytes cmem[4]
ptxas info    : Compiling entry function 'fine' for 'sm_80'
ptxas info    : Function properties for fine
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 256 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 5.820 ms
ptxas info    : Compiling entry function 'spilling' for 'sm_80'
ptxas info    : Function properties for spilling
ptxas         .     928 bytes stack frame, 952 bytes spill stores, 1232 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 928 bytes cumulative stack size, 368 bytes cmem[0]
ptxas info    : Compile time = 127.726 ms
"""
NVCC_LOG = NVRTC_LOG.replace("ptxas         .", "").replace("8 bytes gmem, 16 bytes cmem[4]", "0 bytes gmem")

SCRATCH = r"""
extern "C" __global__ void __launch_bounds__(1024) spilling(const real* x, real* y) {
    real held[128], sum = 0;
    for (int i = 0; i < 128; ++i) held[i] = x[i * 1024 + threadIdx.x];
    for (int i = 0; i < 128; ++i) sum += held[i] * held[127 - i];
    for (int i = 0; i < 128; ++i) y[i * 1024 + threadIdx.x] = held[i] * sum;
}
extern "C" __global__ void __launch_bounds__(256) fine(real* y) {
    __shared__ real other[256];
    other[threadIdx.x] = y[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = other[threadIdx.x ^ 1];
}
"""


@pytest.fixture(params=["nvrtc", "nvcc"])
def compiler(request):
    found = kernel_report.COMPILERS[request.param]()
    if not found.available():
        pytest.skip(found.install)
    return request.param


@pytest.fixture
def scratch(monkeypatch):
    """A module with SCRATCH as its text: returns a function that sets its (kernel, threads, dynamic shared bytes)."""
    def launching(*variants):
        use(monkeypatch, SCRATCH, *variants)
    return launching


def use(monkeypatch, text, *variants):
    """Let the program see one module: this text, and the (kernel, threads, dynamic shared bytes) that it launches."""
    listed = [(kernel, launch.options("float32", {}), *rest) for kernel, *rest in variants]
    monkeypatch.setattr(kernel_report, "modules", lambda: [("scratch", launch.source("scratch", text), lambda: listed)])


# The log of the assembler.

@pytest.mark.parametrize("log", [NVRTC_LOG, NVCC_LOG], ids=["nvrtc", "nvcc"])
def test_registers_spills_stack_and_shared_memory_are_read_for_each_kernel(log):
    assert nvrtc.resources(log) == {"fine": Resources(10, 0, 0, 256), "spilling": Resources(64, 928, 952 + 1232, 0)}


def test_the_options_equal_cupys_in_its_order():
    assert nvrtc.cupy_options(("-DREAL=float",), 90) == (
        "-DREAL=float", "--std=c++17", "-ftz=true", "-arch=sm_90", "--device-as-default-execution-space")
    assert nvrtc.cupy_options(launch.options("float64", {}), 75) == (
        *launch.options("float64", {}), "-ftz=true", "-arch=sm_75", "--device-as-default-execution-space")


def test_cupy_still_adds_these_options():
    found = importlib.util.find_spec("cupy")
    if found is None:
        pytest.skip("CuPy is not installed")
    text = (Path(found.origin).parent / "cuda" / "compiler.py").read_text()
    assert "options += ('-ftz=true',)" in text and "return f'-arch=sm_{arch}', 'cubin'" in text
    assert text.index("options += (arch_opt,)") < text.index("options += ('--device-as-default-execution-space',)")


# Occupancy.

def occupancy(architecture, threads, registers, shared_bytes=0):
    return min(resident_blocks(architecture, threads, registers, shared_bytes).values()) * threads / (
        32 * ARCHITECTURES[architecture].warps)


@pytest.mark.parametrize("threads, registers, blocks, expected", [
    (128, 37, 12, 0.75),        # CUDA C++ Best Practices Guide, "Calculating Occupancy", for 64 K registers, 64 warps
    (320, 37, 4, 0.625),        # the same: 63%
    (256, 32, 8, 1.0),          # the same: 32 registers is the most for full occupancy
    (512, 64, 2, 0.5),          # CUDA C++ Programming Guide, "Multiprocessor Level": 32 warps
    (512, 65, 1, 0.25)])        # the same: one register more, 16 warps
@pytest.mark.parametrize("architecture", [80, 90])
def test_occupancy_equals_the_examples_of_nvidias_guides(architecture, threads, registers, blocks, expected):
    assert min(resident_blocks(architecture, threads, registers, 0).values()) == blocks
    assert occupancy(architecture, threads, registers) == expected


@pytest.mark.parametrize("architecture, kib, blocks", [
    (75, 64, 1), (75, 32, 2), (80, 163, 1), (80, 81, 2), (90, 227, 1), (90, 113, 2), (120, 99, 1), (120, 49, 2)])
def test_shared_memory_and_the_systems_part_of_it_limit_the_blocks(architecture, kib, blocks):
    """Tuning guides: 64, 163, 227, 99 KiB a block at most, 1 KiB of each block taken since Ampere."""
    assert resident_blocks(architecture, 128, 32, kib * 1024)["shared memory"] == blocks
    assert resident_blocks(architecture, 128, 32, kib * 1024 + 1)["shared memory"] == blocks - 1


@pytest.mark.parametrize("threads, registers, limit", [
    (1056, 32, "warps"), (32, 256, "registers"), (1024, 65, "registers")])
def test_a_block_beyond_the_limits_of_a_multiprocessor_does_not_fit(threads, registers, limit):
    assert resident_blocks(80, threads, registers, 0)[limit] == 0


NVIDIA = r"""
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
    int major, minor, warps, shared, block_shared, reserved, threads, registers, bytes;
    while (scanf("%d %d %d %d %d %d %d %d %d", &major, &minor, &warps, &shared, &block_shared, &reserved, &threads,
                 &registers, &bytes) == 9) {
        cudaOccDeviceProp device;
        device.computeMajor = major; device.computeMinor = minor; device.warpSize = 32; device.numSms = 1;
        device.maxThreadsPerBlock = 1024; device.maxThreadsPerMultiprocessor = 32 * warps;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536;
        device.sharedMemPerBlock = 49152; device.sharedMemPerMultiprocessor = shared * 1024;
        device.sharedMemPerBlockOptin = block_shared * 1024; device.reservedSharedMemPerBlock = reserved;
        cudaOccFuncAttributes kernel = {};
        kernel.maxThreadsPerBlock = 1024; kernel.numRegs = registers; kernel.numBlockBarriers = 1;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; kernel.maxDynamicSharedSizeBytes = bytes;
        cudaOccDeviceState state;
        cudaOccResult result;
        int failed = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, bytes);
        printf("%d\n", failed ? -1 : result.activeBlocksPerMultiprocessor);
    }
}
"""


def test_occupancy_equals_nvidias_header(tmp_path):
    """cuda_occupancy.h, which comes with nvcc: the same number of blocks in every case."""
    folders = [Path(shutil.which("nvcc") or "/").resolve().parent.parent, *Path("/usr/local").glob("cuda*")]
    include = next((f / "include" for f in folders if (f / "include" / "cuda_occupancy.h").exists()), None)
    if include is None or shutil.which("g++") is None:
        pytest.skip("needs cuda_occupancy.h, which comes with nvcc, and g++")
    (tmp_path / "ask.cpp").write_text(NVIDIA)
    subprocess.run(["g++", "-w", "-I", include, tmp_path / "ask.cpp", "-o", tmp_path / "ask"], check=True)
    cases = list(itertools.product(ARCHITECTURES, (32, 64, 96, 128, 320, 512, 1024), (16, 37, 64, 65, 96, 128, 255),
                                   (0, 1, 1024, 8000, 16384, 48 * 1024, 64 * 1024)))
    asked = []
    for architecture, *rest in cases:
        a = ARCHITECTURES[architecture]
        asked += [*divmod(architecture, 10), a.warps, a.shared_kib, a.block_shared_kib, a.reserved, *rest]
    answers = subprocess.run([tmp_path / "ask"], input=" ".join(map(str, asked)), capture_output=True, text=True,
                             check=True).stdout.split()
    assert len(answers) == len(cases) and len(set(answers)) > 8
    for case, answer in zip(cases, answers):
        assert min(resident_blocks(*case).values()) == int(answer), case


FAKE_NVRTC = """#include <dlfcn.h>
extern "C" int nvrtcVersion(int* major, int* minor) {       // 0 if the builtins are found, by their name alone
    *major = 13; *minor = 0;
    return dlopen("libnvrtc-builtins.so.13.0", RTLD_NOW | RTLD_NOLOAD) ? 0 : 1;
}"""


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_the_builtins_of_a_wheel_are_found_though_the_library_does_not_look_in_its_own_folder(tmp_path, monkeypatch):
    """As in nvidia-cuda-nvrtc 13.0: every compilation failed there."""
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    for name, code in ("libnvrtc.so.13", FAKE_NVRTC), ("libnvrtc-builtins.so.13.0", "int nothing;"):
        subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", f"-Wl,-soname,{name}", "-o", folder / name,
                        "-ldl"], input=code, text=True, check=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    nvrtc.library.cache_clear()
    try:
        assert nvrtc.version() == (13, 0)
    finally:
        nvrtc.library.cache_clear()


# The program.

def line(**changes):
    return {"module": "m", "kernel": "k", "options": "REAL=float HEAD=16 ROWS=8", "arch": "sm_80", "threads": 64,
            "registers": 40, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 4096, "blocks_per_multiprocessor": 3,
            "limited_by": "warps", "occupancy": 0.5, **changes}


def test_the_summary_has_a_line_for_each_kernel_with_its_worst_variant():
    lines = [line(), line(occupancy=0.25, arch="sm_90", options="REAL=double HEAD=16 ROWS=8", registers=80),
             line(kernel="other", spill_bytes=8, shared_bytes=0)]
    assert list(kernel_report.summary(lines)) == [
        ["k", "40-80", "4", 0, "25-50%", "sm_90 double HEAD=16"],
        ["other", "40", "0", 8, "50%", "sm_80 float HEAD=16    <- spills 8 bytes"]]


def test_details_are_printed_on_request_and_the_old_name_of_module_is_accepted(compiler, scratch, capsys):
    scratch(("fine", 256, 0))
    assert main(["--compiler", compiler, "--arch", "75", "--room", "scratch"]) == 0
    captured = capsys.readouterr()
    assert "REAL=float" not in captured.out and "--details lists them" in captured.out
    assert "1/1 compiling scratch" in captured.err
    assert main(["--compiler", compiler, "--arch", "75", "--module", "scratch", "--details"]) == 0
    assert "REAL=float" in capsys.readouterr().out


def test_a_planted_spill_is_found_named_and_sets_the_exit_status(compiler, scratch, tmp_path, capsys):
    scratch(("fine", 256, 0), ("spilling", 1024, 0))
    assert main(["--compiler", compiler, "--arch", "75,80", "--json", str(tmp_path / "report.json")]) == 1
    lines = json.loads((tmp_path / "report.json").read_text())
    assert [(line["kernel"], line["arch"], line["spill_bytes"] > 0) for line in lines] == [
        ("fine", "sm_75", False), ("fine", "sm_80", False), ("spilling", "sm_75", True), ("spilling", "sm_80", True)]
    assert lines[0]["shared_bytes"] == 1024 and lines[0]["occupancy"] == 1.0 and lines[2]["registers"] <= 64
    printed = capsys.readouterr().out
    assert printed.count("<- spills") == 1 and "4 variants on an architecture, 2 of them with faults" in printed


def test_without_faults_the_status_is_0_and_with_too_much_shared_memory_1(compiler, scratch, capsys):
    scratch(("fine", 256, 0))
    assert main(["--compiler", compiler, "--arch", "75"]) == 0
    scratch(("fine", 256, 64 * 1024))           # and 1 KiB of its own
    assert main(["--compiler", compiler, "--arch", "75,90"]) == 1
    assert "cannot be launched: too much of shared memory" in capsys.readouterr().out


def test_an_error_of_the_compiler_is_raised_with_the_line_of_the_source(compiler, monkeypatch):
    use(monkeypatch, 'extern "C" __global__ void broken(real* y) {\n    y[0] = nowhere;\n}\n', ("broken", 32, 0))
    with pytest.raises(nvrtc.CompileError, match=r'scratch\.cu[(:"]+2.*nowhere'):
        main(["--compiler", compiler, "--arch", "75"])


def test_without_a_compiler_the_error_says_what_to_install_and_the_status_is_2(monkeypatch, capsys):
    for which in (Nvrtc, Nvcc):
        monkeypatch.setattr(which, "available", lambda self: False)
    assert main_guard(lambda: main([])) == 2
    assert "pip install nvidia-cuda-nvrtc" in capsys.readouterr().err


def test_a_module_without_variants_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(kernel_report, "modules", lambda: [("silent", "", None)])
    assert not list(kernel_report.report(None, [75]))
    assert "silent: its Python file has no variants()" in capsys.readouterr().out


def test_an_unknown_architecture_raises():
    for given in ("61", "sm_75"):
        with pytest.raises(UsageError, match=f"--arch: no architecture '{given}'; there are 75, 80"):
            main(["--arch", given])


def test_an_unknown_module_raises(scratch):
    scratch(("fine", 256, 0))
    with pytest.raises(UsageError, match="--module nowhere: there is no kernels/nowhere.cu; there are scratch"):
        list(kernel_report.report(None, [75], ["scratch", "nowhere"]))


def test_variants_of_every_module_name_its_kernels_with_possible_sizes():
    for (module, code, variants), architecture in itertools.product(kernel_report.modules(), ARCHITECTURES):
        listed = kernel_report.variants_on(variants, architecture) if variants else []
        listed = [one for one in listed if architecture >= kernel_report.least_architecture(code, one[1])]
        if not listed:
            assert variants is None or architecture < 80
            continue
        assert len(set(listed)) == len(listed), module
        for kernel, options, threads, dynamic_bytes in listed:
            assert f" {kernel}(" in code.replace("\n", " "), kernel
            most = ARCHITECTURES[architecture].block_shared_kib * 1024
            assert threads % 32 == 0 and 0 <= dynamic_bytes <= most, (kernel, options)


def test_the_variant_of_bf16_alone_is_left_out_where_its_header_cannot_be_compiled():
    header = '#line 1 "tensor.cuh"'
    least = kernel_report.least_architecture
    assert least("x") == 0 and least(header) == 80 == least(header, ("-DBF16=1",))
    choice = f"#ifdef BF16\n{header}"
    assert least(choice, ("-DREAL=float",)) == 0 and least(choice, ("-DREAL=float", "-DBF16=1")) == 80


def test_faults_of_a_line_are_named():
    good = {"spill_bytes": 0, "blocks_per_multiprocessor": 3, "limited_by": "warps"}
    assert not faults(good)
    assert faults({**good, "spill_bytes": 8}) == ["spills 8 bytes"]
    assert faults({**good, "blocks_per_multiprocessor": 0}) == ["cannot be launched: too much of warps"]


def test_help_explains_the_exit_status():
    script = Path(kernel_report.__file__)
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "Exit status 1 if a kernel spills" in shown.stdout
