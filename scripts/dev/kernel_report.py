"""Registers, spills, shared memory and occupancy of every CUDA kernel, on every architecture: no GPU needed.

    python scripts/dev/kernel_report.py [--compiler nvrtc|nvcc] [--room attention,fused] [--arch 75,90] [--json FILE]

Compiles kernels/*.cu as a GPU would get them (NVRTC, with the options of CuPy; or nvcc) in every variant that
their launches ask for, and reads what the assembler says. Occupancy is the share of a multiprocessor's warps that can
be resident at once, by the limits of the architecture: how much there is to hide latency with, and no speed.
Takes a few minutes for all kernels and architectures.
Exit status 1 if a kernel spills registers or could not be launched, 2 if there is no compiler.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from minilm.kernels import launch, nvrtc

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
from support.run_folder import UsageError, main_guard  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A multiprocessor's limits: CUDA C++ Programming Guide, "Compute Capabilities", the technical specifications.

    All have 64 K registers a multiprocessor and a block, 255 a thread, 1024 threads a block. What the guide leaves out
    (the units in which memory is given, the four parts that registers are divided among) is in NVIDIA's
    cuda_occupancy.h, which comes with nvcc; tests/test_kernel_report.py asks it.
    """

    warps: int
    blocks: int
    shared_kib: int             # of a multiprocessor
    block_shared_kib: int       # of a block, once the driver was asked
    reserved: int               # bytes of shared memory that the system takes of each block
    shared_unit: int            # bytes


ARCHITECTURES = {75: Architecture(32, 16, 64, 64, 0, 256), 80: Architecture(64, 32, 164, 163, 1024, 128),
                 90: Architecture(64, 32, 228, 227, 1024, 128), 100: Architecture(64, 32, 228, 227, 1024, 128),
                 120: Architecture(48, 24, 100, 99, 1024, 128)}
REGISTERS, REGISTER_UNIT, PARTS, MOST_REGISTERS, MOST_THREADS = 65536, 256, 4, 255, 1024


def resident_blocks(architecture, threads, registers, shared_bytes):
    """How many blocks fit a multiprocessor at once, by each limit of its own; 0 where not even one can be launched."""
    a, warps = ARCHITECTURES[architecture], -(-threads // 32)
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


def row(room, kernel, options, architecture, threads, dynamic_bytes, resources):
    """A line of the report, as a dictionary."""
    shared = resources.shared_bytes + dynamic_bytes
    fits = resident_blocks(architecture, threads, resources.registers, shared)
    blocks = min(fits.values())
    return {"room": room, "kernel": kernel, "options": " ".join(o[2:] for o in options if o.startswith("-D")),
            "arch": f"sm_{architecture}", "threads": threads, "registers": resources.registers,
            "spill_bytes": resources.spill_bytes, "stack_bytes": resources.stack_bytes, "shared_bytes": shared,
            "blocks_per_multiprocessor": blocks, "limited_by": min(fits, key=fits.get),
            "occupancy": blocks * -(-threads // 32) / ARCHITECTURES[architecture].warps}


def faults(line):
    """What is wrong with a line of the report, in words; empty where nothing is."""
    return ([f"spills {line['spill_bytes']} bytes"] if line["spill_bytes"] else []) + (
        [] if line["blocks_per_multiprocessor"] else [f"cannot be launched: too much of {line['limited_by']}"])


# Compilers: what each is called with, and what it says of the kernels.

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


def rooms():
    """(name, text, variants) of every .cu of kernels/: variants is what its .py says it can launch, or None."""
    for path in sorted(launch.FOLDER.glob("*.cu")):
        module = importlib.import_module(f"minilm.kernels.{path.stem}")
        yield path.stem, launch.source(path.stem), getattr(module, "variants", None)


def report(compiler, architectures, wanted=None):
    """Lines of the report, one by one; rooms that do not say what they launch are named and left out."""
    found = list(rooms())
    if unknown := set(wanted or ()) - {room for room, _, _ in found}:
        raise UsageError(f"--room {min(unknown)}: there is no kernels/{min(unknown)}.cu")
    for room, code, variants in found:
        if wanted and room not in wanted:
            continue
        if variants is None:
            print(f"{room}: no variants() says what it launches; left out")
            continue

        @functools.cache
        def compiled(options, architecture):
            return nvrtc.resources(compiler.log(code, options, architecture))

        for kernel, options, threads, dynamic_bytes in variants():
            for architecture in architectures:
                yield row(room, kernel, options, architecture, threads, dynamic_bytes,
                          compiled(tuple(options), architecture)[kernel])


COLUMNS = {"kernel": "20", "options": "46", "arch": "6", "threads": ">7", "registers": ">9", "spills": ">6",
           "shared": ">6", "occupancy": ">9", "limited by": ""}


def text(cells):
    """A line of the table."""
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, COLUMNS.values()))


def cells(line):
    """Of a line of the report, as text; what is wrong with it stands at the end."""
    wrong = "".join(f"    <- {fault}" for fault in faults(line))
    return [line["kernel"], line["options"], line["arch"], line["threads"], line["registers"], line["spill_bytes"],
            line["shared_bytes"], f"{line['occupancy']:.0%}", line["limited_by"] + wrong]


def choose(name):
    """The compiler of that name, or the first there is. Raises UsageError, and says what to install."""
    wanted = [COMPILERS[name]()] if name else [make() for make in COMPILERS.values()]
    for compiler in wanted:
        if compiler.available():
            return compiler
    raise UsageError("no compiler: " + "; ".join(compiler.install for compiler in wanted))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", choices=COMPILERS, help="default: NVRTC if it is installed, else nvcc")
    parser.add_argument("--room", help="of kernels/, separated by commas; all by default")
    parser.add_argument("--arch", help=f"of {','.join(map(str, ARCHITECTURES))}; all by default")
    parser.add_argument("--json", metavar="FILE", help="write the lines there too, as a list of objects")
    asked = parser.parse_args(arguments)
    compiler = choose(asked.compiler)
    try:
        wanted = [int(name) for name in asked.arch.split(",")] if asked.arch else list(ARCHITECTURES)
    except ValueError:
        raise UsageError(f"--arch {asked.arch}: expected numbers, as 75,90") from None
    if unknown := set(wanted) - set(ARCHITECTURES):
        raise UsageError(f"--arch {min(unknown)}: the limits of {', '.join(map(str, ARCHITECTURES))} are known")
    known = compiler.architectures()
    for architecture in wanted:
        if architecture not in known:
            print(f"sm_{architecture}: not known to this compiler; left out")
    print(compiler.name() + "\n\n" + text(COLUMNS))
    lines = []
    for line in report(compiler, [a for a in wanted if a in known], asked.room and asked.room.split(",")):
        print(text(cells(line)), flush=True)
        lines.append(line)
    if asked.json:
        Path(asked.json).write_text(json.dumps(lines, indent=1) + "\n")
    wrong = sum(map(bool, map(faults, lines)))
    print(f"\n{len(lines)} lines, {wrong} of them with faults")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main_guard(main))
