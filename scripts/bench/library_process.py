"""One library in a process of its own: serve() runs in that process, Worker is its handle in the benchmark.

They exchange lines of JSON over a pipe: the benchmark sends a number of steps, the process answers with their times.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
import gpu_process  # noqa: E402
from support.command_line import relying_on  # noqa: E402
from support.run_folder import UsageError  # noqa: E402


def peak_memory():
    """The peak resident memory of this process, in bytes."""
    with open("/proc/self/status") as status:
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))


def of_process(pid, what):
    """The text of a file of /proc/pid; "" if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{what}").read_text()
    except OSError:
        return ""


def children(pid):
    return of_process(pid, f"task/{pid}/children").split()


def with_descendants(pid):
    return [pid, *(process for child in children(pid) for process in with_descendants(child))]


def private_memory(pid):
    """The resident memory that a process shares with no other, in bytes."""
    return 1024 * sum(int(line.split()[1]) for line in of_process(pid, "smaps_rollup").splitlines()
                      if line.startswith("Private_"))


def asked():
    """The name of the library, in a process that a benchmark started with `--worker NAME SPEC`; otherwise None."""
    return sys.argv[2] if sys.argv[1:2] == ["--worker"] and len(sys.argv) == 4 else None


def role(main, loaders):
    """The function that this process runs: main, or serve() in a process that a benchmark started."""
    if asked() is None:
        return main

    def work():
        with relying_on("--worker", "The benchmark itself passes this option."):
            load, spec = loaders[asked()], json.loads(sys.argv[3])
        serve(load, spec)
    return work


class Cpu:
    """Times each step, and measures the resident memory of this process."""

    peak = staticmethod(peak_memory)

    def times(self, step, count):
        times = []
        for _ in range(count):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        return times


def serve(load, spec):
    """Run a library in this process. load() imports it and returns make(spec) -> (step, check).

    step()   does the work once
    check()  returns arrays by name, which are compared with those of the other libraries; called once, before any step
    With "device": "gpu" in the spec, time and memory are those of gpu_process.py.
    """
    make = load()
    device = gpu_process.device_of(spec, asked()) if spec.get("device") == "gpu" else Cpu()
    base = device.peak()
    step, check = make(spec)
    with tempfile.NamedTemporaryFile(suffix=".npz", delete=False) as file:
        np.savez(file, **check())
    answer(results=file.name, base=base)
    for line in sys.stdin:
        answer(times=device.times(step, int(line)), peak=device.peak())


def answer(**message):
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class Worker:
    """A process that serves one library, started with `--worker`. results: the arrays of its check().

    script, library: the script that serves it and the name there, if they are not this script and name.
    prefix: the words of a command that starts the process, such as mpiexec.
    """

    def __init__(self, name, spec, environment, script=None, library=None, prefix=()):
        self.name = name
        self.process = subprocess.Popen(
            [*prefix, sys.executable, script or sys.argv[0], "--worker", library or name, json.dumps(spec)],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment})
        message = self._read()
        self.base = message["base"]
        self.helpers = 0                    # the private memory of its forked processes, at most
        with np.load(message["results"]) as results:
            self.results = dict(results)
        os.unlink(message["results"])

    def run(self, steps, watched=False):
        """The times of some steps, in seconds. watched: also measure the memory of its forked processes meanwhile."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        while watched and not select.select([self.process.stdout], [], [], 0.02)[0]:
            self.helpers = max(self.helpers, sum(map(private_memory, children(self.process.pid))))
        message = self._read()
        self.memory = message["peak"] - self.base + self.helpers
        return message["times"]

    def ticks(self):
        """The processor time of the process and its descendants, ended ones included, in ticks of the system."""
        return sum(sum(map(int, text.rpartition(")")[2].split()[11:15])) for text in
                   (of_process(pid, "stat") for pid in with_descendants(self.process.pid)))

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise UsageError(f"{self.name} ended with exit status {self.process.wait()}; its error is above")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
