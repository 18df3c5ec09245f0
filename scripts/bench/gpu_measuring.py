"""How kernels are timed on a GPU; shared by attention.py and log_probs.py.

Results are compared first; a wrong result is not timed. Time is the median of many calls, by CUDA events
(cupyx.profiler.benchmark), after some calls to warm up. For a short call it is the time to launch its kernels.
Memory is the growth of CuPy's memory pool during a call, outputs included; it is unknown for libraries with a pool of
their own. Two ceilings are measured: bytes per second of a copy, operations per second of a cuBLAS matrix product.
"""

import contextlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from minilm import checkpoint

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
from support.command_line import Parser, output_file, wholes  # noqa: E402
from support.machine import installed  # noqa: E402

REPEATS = 50
MOST_SECONDS = 3         # of the timed calls; then fewer are made
WARM_UP = 5
LIBRARIES = ("torch", "Liger")      # how the names of peers that are no code of this repository begin
MOST = 1 << 20           # for a larger size even the bytes take long to count


def gpu():
    """(CuPy, None), or (None, the reason why nothing can be timed)."""
    if not installed("cupy"):
        return None, "CuPy is not installed (pip install -e '.[gpu]')"
    try:
        import cupy
    except ImportError as error:
        return None, f"CuPy cannot be imported: {error}"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return None, f"no GPU: {error}"
    return cupy, None


def not_timed(reason, modules):
    """Without a GPU: print why nothing is timed, and the report of the compiler on these modules."""
    print(f"\nNot timed: {reason}. The report of the compiler for one architecture:\n", flush=True)
    report = Path(__file__).resolve().parents[1] / "dev" / "kernel_report.py"
    subprocess.run([sys.executable, report, "--module", modules, "--arch", "80"])


def machine(cupy):
    """The device, its driver and the versions, in one line."""
    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(cupy.cuda.Device().id)
    versions = [f"driver {driver()} for CUDA {runtime.driverGetVersion()}", f"cupy {cupy.__version__}",
                f"CUDA {runtime.runtimeGetVersion()}"]
    if installed("torch"):
        versions.append(f"torch {importlib.metadata.version('torch')}")         # its import takes seconds
    return f"{properties['name'].decode()}, {', '.join(versions)}"


def driver():
    """The version of NVIDIA's driver, as nvidia-smi gives it."""
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                               capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "of unknown version"
    return found.stdout.partition("\n")[0].strip() if found.returncode == 0 else "of unknown version"


def seconds(call):
    """Median and quartiles of the time of call() on the device."""
    from cupyx.profiler import benchmark
    times = benchmark(call, name="", n_repeat=REPEATS, n_warmup=WARM_UP, max_duration=MOST_SECONDS).gpu_times[0]
    return np.quantile(times, [0.5, 0.25, 0.75])


def extra_bytes(cupy, call):
    """The growth of CuPy's memory pool during call(), in bytes."""
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    call()
    cupy.cuda.Device().synchronize()
    return pool.total_bytes() - before


def ceilings(cupy):
    """Bytes a second of a copy, operations a second of a product in float32 (without TF32)."""
    rates = copy_rate(cupy), product_rate(cupy)
    cupy.get_default_memory_pool().free_all_blocks()
    return rates


def copy_rate(cupy):
    """Bytes read and written per second when an array of 1 GiB is copied."""
    a = cupy.ones(1 << 28, cupy.float32)
    b = cupy.empty_like(a)
    return 2 * a.nbytes / seconds(lambda: cupy.copyto(b, a))[0]


def product_rate(cupy, dtype=np.float32):
    """Operations per second of a matrix product of width 8192; in float16 by tensor cores, as fast as in bf16.

    The numbers are random: a product of constant ones takes less power, and so less time.
    """
    x = cupy.random.default_rng(0).standard_normal((8192, 8192), dtype=np.float32).astype(dtype)
    return 2 * 8192 ** 3 / seconds(lambda: x @ x)[0]


def those_that_agree(cupy, peers, results_of, tolerance):
    """The entries of {name: peer} that fit the memory of the device. Prints the names of the others, and of peers that
    do not run there.

    The first peer is minilm's. results_of(peer) gives arrays of CuPy or PyTorch. Raises ValueError if one differs from
    that of the first peer by more than the tolerance, relative to its largest entry.
    """
    reference = None
    fitting = {}
    for name, peer in peers.items():
        if (results := _if_it_runs(name, lambda: results_of(peer))) is not None:
            results = [cupy.from_dlpack(a.detach()) if hasattr(a, "detach") else a for a in results]
            reference = reference or results
            for i, (a, b) in enumerate(zip(reference, results, strict=True)):
                error = float(abs(a - b).max() / abs(b).max())
                if not error <= tolerance:
                    raise ValueError(f"{name}: result {i} differs from ours by {error:.1e} of its largest entry "
                                     f"(allowed: {tolerance:.0e}). Nothing was timed.")
            fitting[name] = peer
        results = None
        release(cupy)
    return fitting


def _if_it_runs(name, call):
    """call(), or None with a line that says why: out of memory, or any error of another library, such as PyTorch's for
    a kernel that it does not have for this device."""
    try:
        return call()
    except Exception as error:                  # CuPy and PyTorch each have their own class
        if "OutOfMemory" in type(error).__name__:
            print(f"{name}: does not fit this device")
        elif name.startswith(LIBRARIES):
            print(f"{name}: does not run here, skipped ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
        else:
            raise
        return None


def release(cupy):
    """Free the memory that CuPy and PyTorch cache."""
    cupy.get_default_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def row(name, time, bytes_moved, operations, extra, ceiling):
    """One line of a table. ceiling: the result of ceilings()."""
    median, low, high = 1e6 * time
    cells = [name, f"{median:.0f} us [{low:.0f}, {high:.0f}]"]
    amounts = (bytes_moved, ceiling[0], "GB/s", 1e9), (operations, ceiling[1], "TFLOP/s", 1e12)
    for amount, most, unit, scale in amounts:
        cells.append("" if amount is None else f"{amount / time[0] / scale:.1f} {unit}, {amount / time[0] / most:.0%}")
    return f"| {' | '.join(cells)} | {'' if extra is None else f'{extra / 2**20:.0f} MB'} |"


HEADER = ("| | time [quartiles] | bytes/s, share of a copy's | operations/s, share of a product's | extra memory |\n"
          "|---|---|---|---|---|")


class Report:
    """The tables of a benchmark of kernels. rows: what they hold, for --json."""

    def __init__(self, cupy, ceiling):
        self.cupy = cupy
        self.ceiling = ceiling
        self.rows = []
        self.failed = 0

    def compare(self, title, peers, of_peer, bytes_moved, operations, peak=None):
        """Time of_peer(peer), a function, for each {name: peer}; print a table, and the speed of the first, minilm, in
        shares of the others'.

        bytes_moved: by minilm, or None; peak: operations per second of a product, if not float32's.
        """
        print(f"\n{title}\n\n{HEADER}")
        mine = []
        for name, peer in peers.items():
            call = of_peer(peer)                # one at a time: it may hold much memory
            time = seconds(call)
            extra = None if name.startswith(LIBRARIES) else extra_bytes(self.cupy, call)
            moved = None if mine else bytes_moved
            print(row(name, time, moved, operations, extra, (self.ceiling[0], peak or self.ceiling[1])), flush=True)
            call = None
            mine.append({"table": title, "name": name, "seconds": list(map(float, time)), "bytes": moved,
                         "operations": operations})
        for other in mine[1:]:
            share = other["seconds"][0] / mine[0]["seconds"][0]
            print(f"{mine[0]['name']}: {share:.2f} of the speed of {other['name']}", flush=True)
        self.rows += mine

    @contextlib.contextmanager
    def attempt(self, title):
        """Around the comparison of one table: results that differ are named, and the other tables are made."""
        try:
            yield
        except ValueError as error:
            self.failed += 1
            print(f"failed: {title}: {error}", flush=True)


def main(description, option, default, print_traffic, time_on, modules):
    """A benchmark of kernels: print_traffic(sizes), and on a GPU time_on(report, size). Returns the exit status.

    option: the name of the option that gives the sizes; modules: of minilm.kernels, with commas.
    """
    parser = Parser(description)
    parser.add_argument(option, dest="sizes", metavar="N,N", type=wholes(1, MOST), default=default,
                        help="with commas (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write machine and times there, on a GPU")
    asked = parser.parse_args()
    print_traffic(asked.sizes)
    cupy, reason = gpu()
    if cupy is None:
        not_timed(reason, modules)
        return 0
    ceiling = ceilings(cupy)
    here = machine(cupy)
    print(f"\n{here}; a copy {ceiling[0] / 1e9:.0f} GB/s, a product {ceiling[1] / 1e12:.1f} TFLOP/s")
    report = Report(cupy, ceiling)
    for size in asked.sizes:
        time_on(report, size)
    if asked.json:
        checkpoint.write_text(asked.json, json.dumps({"machine": here, "copy": ceiling[0], "product": ceiling[1],
                                                      "rows": report.rows}, indent=1) + "\n")
    return int(report.failed > 0)
