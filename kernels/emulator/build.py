"""Compiles the text of kernels with g++: one library for each text, options and mode, in the user's cache folder.

The name of a library is a hash of its inputs (text, options, runtime, compiler, processor), so a library is never out
of date. It is built in a temporary folder and then renamed, so two processes can build the same library at once.
"""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from minilm.kernels.emulator.fault import lines_of
from minilm.kernels.emulator.unsupported import hints

HERE = Path(__file__).resolve().parent
RUNTIME = "scheduler.cpp", "memory.cpp", "tensor_cores.cpp", "copies.cpp", "undefined.cpp", "endless.cpp"
RUNTIME_HEADERS = "bridge.h", "runtime.h", "races.h"
KERNEL_HEADERS = "bridge.h", "device.h", "tensor_cores.h"

# -nostdinc: no header is available, as with NVRTC. -fno-strict-aliasing: nvcc lets a float4* point to floats.
# -fno-gnu-unique: otherwise two libraries in one process share the static variables of their templates.
# -fno-optimize-sibling-calls: a barrier in the last line of a kernel must return there, because its return address
# gives the line. -gdwarf-4: with version 5 addr2line loses the file names of #line.
FLAGS = ("-std=c++17", "-nostdinc", "-nostdinc++", "-fPIC", "-fno-builtin", "-fno-strict-aliasing", "-fno-math-errno",
         "-ffp-contract=off", "-fno-gnu-unique", "-fno-threadsafe-statics", "-fno-exceptions",
         "-fno-optimize-sibling-calls", "-march=native", "-gdwarf-4", "-w")
# -O2 with these options compiles twice as fast as -O3, and its loops run faster. The optimiser must not merge two
# barriers or move a part of a kernel into another function, because a fault names its line.
# Checked builds do not merge or move loads and stores, because they are counted as they stand in the source.
# A contracted build rounds a * b + c once, as nvcc and NVRTC do unless -fmad=false is given.
FAST = ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-funroll-loops", "-fno-partial-inlining",
        "-fno-crossjumping", "-fno-tree-tail-merge", "-fno-finite-loops")
MODES = {
    "fast": FAST,
    "contracted": (*FAST, "-ffp-contract=fast"),
    "checked": ("-O1", "-fsanitize=thread,bounds,object-size,alignment,null,shift,signed-integer-overflow,"
                "integer-divide-by-zero,float-cast-overflow", "-fsanitize-coverage=trace-pc", "-fno-tree-fre",
                "-fno-tree-pre", "-fno-tree-loop-im", "-fno-tree-dominator-opts", "-fno-tree-sra",
                "-fno-gcse", "-fno-tree-dse"),
    "debug": ("-O0", "-ggdb3", "-gdwarf-4"),
}
RUNTIME_FLAGS = ("-std=c++17", "-O2", "-g", "-fPIC", "-fno-gnu-unique", "-fno-exceptions", "-march=native",
                 "-ffp-contract=off", "-w")
# gdb finds the sources of the emulator by their names alone: checkouts share the cache, so paths would be wrong.
PATHS = "-fdebug-prefix-map={}=."

# Blocks run one after another, so `__shared__ real tile[8][9];` becomes a static variable. In a checked build it
# becomes memory of its own from the runtime, far from other arrays. `extern __shared__ real all[];` becomes a pointer.
# A rewritten declaration keeps its number of lines.
ALIGN = r"(?:__align__\s*\([^)]*\)\s*|alignas\s*\([^)]*\)\s*)?"
DYNAMIC = re.compile(rf"extern\s+__shared__\s+{ALIGN}([\w:]+(?:\s+\w+)*?)\s+(\w+)\s*\[\s*\]\s*;")
STATIC = re.compile(rf"__shared__\s+({ALIGN})([\w:]+(?:\s+\w+)*?)\s+(\w+)\s*((?:\[[^\];]*\]\s*)*);")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
PARENTHESES = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+'
                    rf'((?:void\s+|__launch_bounds__\s*{PARENTHESES}\s*)+)(\w+)\s*\(([^)]*)\)')


class CompileError(RuntimeError):
    """g++ could not compile the text of a kernel. The message is the log of g++."""


class Unsupported(CompileError):
    """The text may be right CUDA, but has what the emulator does not support. The message names lines and advice."""


@functools.lru_cache(maxsize=None)
def available() -> str | None:
    """None if the emulator can run on this machine, otherwise the reason in words."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator runs on Linux on x86-64, not on {platform.system()} on {platform.machine()}"
    for program in ("g++", "addr2line"):
        if not shutil.which(program):
            return f"the emulator needs {program} (Debian: apt-get install g++)"
    version = _output("g++", "-dumpfullversion", "-dumpversion").strip()
    if int(version.split(".")[0]) < 11:
        return f"the emulator needs g++ 11 or newer, and this is g++ {version}"


def library(code: str, options: tuple[str, ...], mode: str) -> Path:
    """The path of the library of that text, from the cache or built by g++. Raises CompileError."""
    runtime = _cached("runtime", "o", RUNTIME_HEADERS + RUNTIME, (RUNTIME_FLAGS, PATHS), _compile_runtime)
    definitions = tuple(option for option in options if _checked_option(option))
    return _cached(mode, "so", KERNEL_HEADERS, (code, definitions, MODES[mode], FLAGS, runtime.name),
                   functools.partial(_compile, code, definitions, mode, runtime))


def _checked_option(option):
    """Whether the option is a definition. --std=c++17 is always on and is dropped. Raises ValueError for others."""
    if option in ("-std=c++17", "--std=c++17"):
        return False
    if not re.fullmatch(r"-D\w+(=.*)?", option):
        raise ValueError(f"the emulator takes the options -DNAME=VALUE and --std=c++17, not {option!r}")
    return True


def cache_folder() -> Path:
    """minilm/kernels in $XDG_CACHE_HOME or ~/.cache; a temporary folder if that is not writable."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minilm" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _temporary_folder()
    return folder if os.access(folder, os.W_OK) else _temporary_folder()


@functools.lru_cache(maxsize=None)
def _temporary_folder():
    holder = tempfile.TemporaryDirectory(prefix="minilm-kernels-")
    _temporary_folder.holder = holder         # removed when the process ends
    return Path(holder.name)


def _cached(kind, suffix, files, content, make):
    """The path of the file that make(folder) builds, under a name that is a hash of its inputs."""
    texts = [(HERE / name).read_text("utf-8") for name in files]
    key = hashlib.sha256(repr((content, texts, _machine())).encode()).hexdigest()[:32]
    path = cache_folder() / f"{kind}-{key}.{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
            os.replace(make(Path(folder)), path)
    return path


@functools.lru_cache(maxsize=None)
def _machine():
    """The version of g++ and the features of the processor (-march=native)."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return _output("g++", "--version").splitlines()[0], flags


def _output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _gxx(*arguments, code=""):
    result = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True,
                            env={**os.environ, "LC_ALL": "C"})         # hints() reads the messages in English
    if result.returncode:
        if found := hints(code, result.stderr):
            raise Unsupported("\n".join(found))
        raise CompileError("\n".join(result.stderr.splitlines()[:40]))
    return result.stdout


def _compile_runtime(folder):
    output = folder / "runtime.o"
    _gxx(*RUNTIME_FLAGS, PATHS.format(HERE), "-r", "-nostdlib", *(HERE / name for name in RUNTIME), "-o", output)
    return output


def _compile(code, definitions, mode, runtime, folder):
    text = '#line 1 "kernel.cu"\n' + rewritten(code, mode)
    source = folder / "kernel.cc"
    source.write_text(text, "utf-8")
    include = ("-iquote", HERE, "-include", HERE / "device.h", PATHS.format(os.getcwd()), PATHS.format(HERE),
               *definitions)
    # A macro may define a kernel, so kernels are found after preprocessing; these two words are kept as they are.
    unexpanded = [f"-D{word}={word}" for word in ("__global__", "__launch_bounds__")]
    expanded = _gxx(*FLAGS, *include, *unexpanded, "-E", "-P", source, code=code)
    exports = "".join(_export(*found) for found in KERNEL.findall(expanded))
    source.write_text(f'{text}\n#line 1 "exports"\n{exports}', "utf-8")
    _gxx(*FLAGS, *MODES[mode], *include, "-c", source, "-o", folder / "kernel.o", code=code)
    _gxx("-shared", "-Wl,-Bsymbolic", folder / "kernel.o", runtime, "-o", folder / "kernel.so", "-lrt")
    return folder / "kernel.so"


def rewritten(code: str, mode: str) -> str:
    """The text with its __shared__ declarations in C++. Raises Unsupported for a declaration of another form."""
    def dynamic(match):
        kind, name = match.groups()
        return f"{kind}* {name} = ({kind}*)::emulator::dynamic_shared();" + "\n" * match[0].count("\n")

    def static(match):
        align, kind, name, extent = match.groups()
        lines = "\n" * (match[0].count("\n") - extent.count("\n"))
        if mode == "checked":
            alignment = f"[] {{ struct One {{ {align}{kind} x; }}; return alignof(One); }}"
            return f'auto& {name} = ::emulator::shared_variable<{kind}{extent}>("{name}", {alignment});{lines}'
        return f"static {align}{kind} {name}{extent}; ::emulator::declare_shared(&{name}, sizeof {name});{lines}"

    text = STATIC.sub(static, DYNAMIC.sub(dynamic, code))
    bare = COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), text)
    for file, number, line in lines_of(bare):
        if "__shared__" in line:
            raise Unsupported(f"{file}:{number}: the emulator needs one __shared__ variable in a declaration: "
                              f"__shared__ type name[n]; or extern __shared__ type name[];  the line is: {line}")
    return text


def kernel_names(code: str) -> list[str]:
    """The kernels that stand in a text as extern "C" __global__ void name(...), in their order."""
    return [name for _, name, _ in KERNEL.findall(COMMENT.sub("", code))]


def _export(qualifiers, name, parameters):
    bounds = re.search(rf"__launch_bounds__\s*({PARENTHESES})", qualifiers)
    first = ""
    depth = 0
    for letter in bounds[1][1:-1] if bounds else "0":
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            break
        first += letter
    words = " ".join(parameters.split()).replace("\\", "\\\\").replace('"', '\\"')
    return f'EMULATOR_EXPORT({name}, ({first}), "{words}")\n'
