"""NVRTC, the compiler that CuPy uses for the kernels, called through ctypes. It needs no GPU.

    pip install nvidia-cuda-nvrtc           (or nvidia-cuda-nvrtc-cu12)

It compiles the same code as on a GPU of a given architecture, with the options that CuPy passes. The log of the
assembler has the registers and the memory of each kernel (scripts/dev/kernel_report.py).
"""

import ctypes
import ctypes.util
import dataclasses
import functools
import re
import sys
from pathlib import Path

INSTALL = "NVRTC is not installed: pip install nvidia-cuda-nvrtc (or nvidia-cuda-nvrtc-cu12)"


class CompileError(RuntimeError):
    """The source does not compile; the message is the log of the compiler."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library, from the wheel or the system; None if neither has it."""
    folders = [Path(folder or ".") / "nvidia" for folder in sys.path]
    found = sorted((path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.1*")),
                   key=lambda path: int(path.suffix[1:]))
    if not found:
        name = ctypes.util.find_library("nvrtc")
        return ctypes.CDLL(name) if name else None
    # NVRTC opens its builtins by name at the first compilation. The libraries of some wheels (13.0) do not look for
    # them in their own folder; a library that is loaded already is found.
    for builtins in sorted(found[-1].parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(found[-1]))


def architectures() -> list[int]:
    """The architectures that this NVRTC supports, as integers: 75 is sm_75."""
    count = ctypes.c_int()
    _call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    _call("nvrtcGetSupportedArchs", found)
    return list(found)


def version() -> tuple[int, int]:
    """(major, minor)"""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def cupy_options(options: tuple[str, ...], architecture: int) -> tuple[str, ...]:
    """The options that CuPy 14 passes to NVRTC for a RawModule with these options, in its order, without include paths.

    cupy/_core/core.pyx, assemble_cupy_compiler_options; cupy/cuda/compiler.py, _compile_module_with_cache and
    _compile_using_nvrtc_no_warning.
    """
    standard = () if any("-std=" in option for option in options) else ("--std=c++17",)
    return (*options, *standard, "-ftz=true", f"-arch=sm_{architecture}", "--device-as-default-execution-space")


def compile(code: str, options: tuple[str, ...], architecture: int) -> tuple[bytes, str]:
    """Compile CUDA C as for a GPU of that architecture: (cubin, log of the assembler). Raises CompileError."""
    options = [o.encode() for o in (*cupy_options(options, architecture), "--ptxas-options=-v")]
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), code.encode(), b"kernels.cu", 0, None, None)
    try:
        status = library().nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _text(program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise CompileError(log)
        return _text(program, "CUBIN"), log
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def _text(program, what):
    size = ctypes.c_size_t()
    _call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    _call(f"nvrtcGet{what}", program, text)
    return text.raw


def _call(name, *arguments):
    if library() is None:
        raise ImportError(INSTALL)
    status = getattr(library(), name)(*arguments)
    if status:
        library().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"{name}: {library().nvrtcGetErrorString(status).decode()}")


@dataclasses.dataclass
class Resources:
    """The resources of a kernel: registers, bytes of stack and of spills a thread; static shared bytes a block."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def resources(log: str) -> dict[str, Resources]:
    """{kernel: Resources} from the log of ptxas -v, through NVRTC or nvcc."""
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        registers, stack, stores, loads, shared = (
            max((int(number) for number in re.findall(rf"(\d+) {what}", part)), default=0)
            for what in ("registers", "bytes stack frame", "bytes spill stores", "bytes spill loads", "bytes smem"))
        found[re.match(r"'(\w+)'", part)[1]] = Resources(registers, stack, stores + loads, shared)
    return found
