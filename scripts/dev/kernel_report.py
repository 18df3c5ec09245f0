"""Registers, spills, shared memory and occupancy of every CUDA kernel on every architecture, without a GPU.

    python scripts/dev/kernel_report.py [--module attention,fused] [--arch 75,90] [--details] [--json FILE]

Prints one line for each kernel: the range of its numbers over all variants and architectures, and the worst occupancy.
--details adds a line for each variant and architecture (about 600 lines).

The kernels are compiled as for a GPU (by NVRTC with the options of CuPy, or by nvcc) in every variant that the function
variants() of their module lists (see kernels/launch.py); the numbers come from the log of the assembler. Occupancy is
the share of a multiprocessor's warps that can be resident at once, by the limits of the architecture. It says how much
latency can be hidden, and is not a speed. All kernels and architectures take about four minutes on one core.
Exit status 1 if a kernel spills registers or cannot be launched, 2 if there is no compiler.
"""

import argparse
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from minilm import checkpoint
from minilm.kernels import launch, nvrtc

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
from support.command_line import Parser, names, output_file  # noqa: E402
from support.run_folder import UsageError, main_guard  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The limits of a multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities", technical specifications.

    All have 64 K registers for a multiprocessor and a block, 255 for a thread, 1024 threads for a block. NVIDIA's
    cuda_occupancy.h, which comes with nvcc, has what the guide leaves out: the allocation units, and the four parts
    of the registers. tests/test_kernel_report.py compares the results with it.
    """

    warps: int
    blocks: int
    shared_kib: int             # of a multiprocessor
    block_shared_kib: int       # of a block, after it is requested from the driver
    reserved: int               # bytes of shared memory that the system takes for each block
    shared_unit: int            # bytes


ARCHITECTURES = {75: Architecture(32, 16, 64, 64, 0, 256), 80: Architecture(64, 32, 164, 163, 1024, 128),
                 90: Architecture(64, 32, 228, 227, 1024, 128), 100: Architecture(64, 32, 228, 227, 1024, 128),
                 120: Architecture(48, 24, 100, 99, 1024, 128)}
REGISTERS = 65536
REGISTER_UNIT = 256
PARTS = 4
MOST_REGISTERS = 255
MOST_THREADS = 1024


def resident_blocks(architecture, threads, registers, shared_bytes):
    """{limit: how many blocks fit a multiprocessor at once by that limit}; 0 if not even one can be launched."""
    a = ARCHITECTURES[architecture]
    warps = -(-threads // 32)
    registers_of_warp = max(1, -(-registers * 32 // REGISTER_UNIT)) * REGISTER_UNIT
    shared = -(-(shared_bytes + a.reserved) // a.shared_unit) * a.shared_unit
    fits = {"blocks": a.blocks, "warps": a.warps // warps,
            "registers": REGISTERS // PARTS // registers_of_warp * PARTS // warps,
            "shared memory": a.shared_kib * 1024 // shared if shared else a.blocks}
    if threads > MOST_THREADS:
        fits["warps"] = 0
    if registers > MOST_REGISTERS or registers_of_warp * -(-warps // PARTS) * PARTS > REGISTERS:
        fits["registers"] = 0
    if shared_bytes > a.block_shared_kib * 1024:
        fits["shared memory"] = 0
    return fits


def line_of(module, kernel, options, architecture, threads, dynamic_bytes, resources):
    """A line of the report, as a dictionary."""
    shared = resources.shared_bytes + dynamic_bytes
    fits = resident_blocks(architecture, threads, resources.registers, shared)
    blocks = min(fits.values())
    return {"module": module, "kernel": kernel, "options": " ".join(o[2:] for o in options if o.startswith("-D")),
            "arch": f"sm_{architecture}", "threads": threads, "registers": resources.registers,
            "spill_bytes": resources.spill_bytes, "stack_bytes": resources.stack_bytes, "shared_bytes": shared,
            "blocks_per_multiprocessor": blocks, "limited_by": min(fits, key=fits.get),
            "occupancy": blocks * -(-threads // 32) / ARCHITECTURES[architecture].warps}


def faults(line):
    """The faults of a line of the report, in words."""
    return ([f"spills {line['spill_bytes']} bytes"] if line["spill_bytes"] else []) + (
        [] if line["blocks_per_multiprocessor"] else [f"cannot be launched: too much of {line['limited_by']}"])


# Compilers.

class Nvrtc:
    install = nvrtc.INSTALL

    def available(self):
        return nvrtc.library() is not None

    def name(self):
        return "NVRTC {}.{}, with the options of CuPy".format(*nvrtc.version())

    def architectures(self):
        return nvrtc.architectures()

    def log(self, code, options, architecture):
        return nvrtc.compile(code, options, architecture)[1]


class Nvcc:
    install = "nvcc is not on the path: install NVIDIA's CUDA toolkit"

    def available(self):
        return shutil.which("nvcc") is not None

    def name(self):
        return self._run("--version").stdout.splitlines()[-2].strip()

    def architectures(self):
        return [int(name) for name in re.findall(r"compute_(\d+)\b", self._run("--list-gpu-arch").stdout)]

    def log(self, code, options, architecture):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernels.cu"
            path.write_text(code)
            run = self._run(*options, "-ftz=true", f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v",
                            "-o", str(path.with_suffix(".cubin")), str(path))
        if run.returncode:
            raise nvrtc.CompileError(run.stderr)
        return run.stderr

    def _run(self, *arguments):
        return subprocess.run(["nvcc", *arguments], capture_output=True, text=True)


COMPILERS = {"nvrtc": Nvrtc, "nvcc": Nvcc}


def modules():
    """(name, text, variants) of every module of kernels/; variants is its function of that name, or None.

    A function variants(most_shared) has other variants on architectures with more shared memory for a block."""
    for path in sorted(launch.FOLDER.glob("*.cu")):
        module = importlib.import_module(f"minilm.kernels.{path.stem}")
        yield path.stem, launch.source(path.stem), getattr(module, "variants", None)


def least_architecture(code, options=()):
    """The first architecture on which a text can be compiled: tensor.cuh needs sm_80, where #ifdef BF16 keeps it."""
    return 80 if '#line 1 "tensor.cuh"' in code and ("#ifdef BF16" not in code or "-DBF16=1" in options) else 0


def chosen(wanted=None):
    """The modules to report on. Those without variants() are named and left out. Raises UsageError."""
    found = list(modules())
    if unknown := set(wanted or ()) - {module for module, _, _ in found}:
        raise UsageError(f"--module {min(unknown)}: there is no kernels/{min(unknown)}.cu; there are "
                         f"{', '.join(module for module, _, _ in found)}")
    for module, code, variants in found:
        if wanted and module not in wanted:
            continue
        if variants is None:
            print(f"{module}: its Python file has no variants() (see kernels/launch.py); left out")
        else:
            yield module, code, functools.partial(variants_on, variants)


def variants_on(variants, architecture):
    """The variants of a module that are launched on an architecture."""
    takes = "most_shared" in inspect.signature(variants).parameters
    return list(variants(ARCHITECTURES[architecture].block_shared_kib * 1024) if takes else variants())


def report(compiler, architectures, wanted=None, progress=lambda done, total, module: None):
    """Lines of the report, one by one. progress(done, total, module) is called before each compilation."""
    jobs = []
    for module, code, variants in chosen(wanted):
        for of_each in zip(*map(variants, architectures)):
            jobs += [(module, code, variant, a) for variant, a in zip(of_each, architectures)
                     if a >= least_architecture(code, variant[1])]
    total = len({(module, tuple(options), architecture) for module, _, (_, options, *_), architecture in jobs})
    compiled = {}
    for module, code, (kernel, options, threads, dynamic_bytes), architecture in jobs:
        key = module, tuple(options), architecture
        if key not in compiled:
            progress(len(compiled), total, module)
            compiled[key] = nvrtc.resources(compiler.log(code, options, architecture))
        yield line_of(module, kernel, options, architecture, threads, dynamic_bytes, compiled[key][kernel])


# Tables.

COLUMNS = {"kernel": "20", "options": "46", "arch": "6", "threads": ">7", "registers": ">9", "spills": ">6",
           "shared": ">6", "occupancy": ">9", "limited by": ""}
SUMMARY = {"kernel": "18", "registers": ">9", "KiB": ">5", "spills": ">6", "occupancy": ">9", "worst on": ""}
SHOWN = re.compile(r"REAL=(\w+)|((?:HEAD|GROUP)=\w+)")           # of the options, in the summary


def text(cells, columns):
    """A line of a table."""
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, columns.values())).rstrip()


def cells(line):
    """The cells of a line of the report; its faults stand at the end."""
    wrong = "".join(f"    <- {fault}" for fault in faults(line))
    return [line["kernel"], line["options"], line["arch"], line["threads"], line["registers"], line["spill_bytes"],
            line["shared_bytes"], f"{line['occupancy']:.0%}", line["limited_by"] + wrong]


def summary(lines):
    """The cells of one line for each kernel: ranges over its variants and architectures, and the worst occupancy."""
    for kernel in dict.fromkeys(line["kernel"] for line in lines):
        mine = [line for line in lines if line["kernel"] == kernel]
        worst = min(mine, key=lambda line: line["occupancy"])
        where = " ".join([worst["arch"], *(match[1] or match[2] for match in SHOWN.finditer(worst["options"]))])
        wrong = "".join(f"    <- {fault}" for fault in dict.fromkeys(itertools.chain(*map(faults, mine))))
        yield [kernel, span(line["registers"] for line in mine), span(line["shared_bytes"] // 1024 for line in mine),
               max(line["spill_bytes"] for line in mine), span(round(100 * line["occupancy"]) for line in mine) + "%",
               where + wrong]


def span(numbers):
    """"least-most" of some numbers."""
    numbers = sorted(numbers)
    return f"{numbers[0]}-{numbers[-1]}" if numbers[0] < numbers[-1] else str(numbers[0])


def show_progress(done, total, module):
    """A line on the terminal that is overwritten at each call; in a file a line for every tenth compilation."""
    line = f"{done + 1}/{total} compiling {module}"
    if sys.stderr.isatty():
        print(f"\r{line:40}", end="\n" if done + 1 == total else "", file=sys.stderr, flush=True)
    elif done % 10 == 0:
        print(line, file=sys.stderr, flush=True)


def choose(name):
    """The compiler of that name, or the first one installed. Raises UsageError with what to install."""
    wanted = [COMPILERS[name]()] if name else [make() for make in COMPILERS.values()]
    for compiler in wanted:
        if compiler.available():
            return compiler
    raise UsageError("no compiler: " + "; ".join(compiler.install for compiler in wanted))


def main(arguments=None):
    parser = Parser(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", choices=COMPILERS, help="default: NVRTC if it is installed, else nvcc")
    module_names = names("module", [module for module, _, _ in modules()])
    parser.add_argument("--module", type=module_names, help="modules of kernels/, separated by commas; all by default")
    parser.add_argument("--room", dest="module", type=module_names, help=argparse.SUPPRESS)        # its old name
    known = list(map(str, ARCHITECTURES))
    parser.add_argument("--arch", type=names("architecture", known), help=f"of {','.join(known)}; all by default")
    parser.add_argument("--details", action="store_true", help="also print a line for each variant and architecture")
    parser.add_argument("--json", metavar="FILE", type=output_file,
                        help="write the details to a file, as a list of objects")
    asked = parser.parse_args(arguments)
    wanted = [int(name) for name in asked.arch or known]
    compiler = choose(asked.compiler)
    known = compiler.architectures()
    for architecture in wanted:
        if architecture not in known:
            print(f"sm_{architecture}: this compiler does not know it; left out")
    lines = list(report(compiler, [a for a in wanted if a in known], asked.module, show_progress))
    print(f"{compiler.name()}; {', '.join(f'sm_{a}' for a in wanted if a in known)}\n\n{text(SUMMARY, SUMMARY)}")
    for line in summary(lines):
        print(text(line, SUMMARY))
    if asked.details:
        print("\n" + text(COLUMNS, COLUMNS))
        for line in lines:
            print(text(cells(line), COLUMNS))
    if asked.json:
        checkpoint.write_text(asked.json, json.dumps(lines, indent=1) + "\n")
    wrong = sum(map(bool, map(faults, lines)))
    print(f"\n{len(lines)} variants on an architecture, {wrong} of them with faults"
          + ("" if asked.details else "; --details lists them"))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main_guard(main))
