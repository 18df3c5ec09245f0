"""A benchmark of libraries on the CPU or, with --device gpu, on a GPU: its options, its comparisons, its results.

The measurement is that of measuring.py. On a GPU each comparison is made in float32 and in bf16, without waiting for
idle cores, and the processes of both libraries stay on the device while they take turns. Time on a GPU is short, so a
comparison that fails is named, and the others are made; the exit status is then 1. A peer that is not installed is left
out, and without any peer minilm is timed alone. Tests: tests/test_gpu_benchmarks.py.
"""

import itertools
import json
import os
import sys

import gpu_measuring
import gpu_process
import measuring
from minilm import checkpoint
from support.run_folder import UsageError

COMPUTE = ["float32", "bfloat16"]
SHORT = {"float32": "float32", "bfloat16": "bf16"}
ADVICE = "Run it on a machine with an NVIDIA GPU, its driver and CuPy, or leave out --device"


class Benchmark:
    """asked: the options. rows: the results so far.

    gpu: what runs on a GPU, {"sizes", "peers", "works": those that run if none are named, "possible": every peer that
    can be named}. packages: those whose version is printed, PyTorch first. Raises UsageError for wrong options, and
    without a GPU for --device gpu.
    """

    def __init__(self, description, sizes, peers, gpu, packages, works=(), unasked=()):
        self.asked = measuring.arguments(description, sizes, peers, works, unasked, versions=True, gpu=COMPUTE)
        self.rows = []
        self.failed = 0
        self.on_gpu = self.asked.device == "gpu"
        self.machine = measuring.machine(*packages)
        if self.on_gpu:
            cupy, reason = gpu_measuring.gpu()
            if cupy is None:
                raise UsageError(f"--device gpu: {reason}. {ADVICE}")
            self._choose(gpu)
            self.machine = f"{gpu_measuring.machine(cupy)}; {measuring.machine(*packages[1:])}"
        else:
            self.asked.compute = COMPUTE[:1]
        print(self.machine, flush=True)

    def _choose(self, gpu):
        """Put the defaults of a GPU in the place of those of a CPU. Raises UsageError for a peer without a GPU mode."""
        for kind in ("sizes", "peers", "works"):
            if kind in gpu and getattr(self.asked, kind) == self.asked.usual[kind]:
                setattr(self.asked, kind, gpu[kind])
        if self.asked.other:
            raise UsageError("--other compares two versions on the CPU; leave out --device")
        if missing := [peer for peer in self.asked.peers if peer not in gpu["possible"]]:
            raise UsageError(f"{missing[0]} has no GPU mode; with --device gpu there are {', '.join(gpu['possible'])}")

    def cases(self):
        """(size, compute) of all comparisons."""
        return itertools.product(self.asked.sizes, self.asked.compute)

    def compare(self, work, size, compute, spec, names, environments, tolerance):
        """Add the rows of measuring.compare."""
        if not self.on_gpu:
            self.rows += measuring.compare(work, size, spec, names, environments, tolerance, self.asked.rounds)
            return
        visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}     # one for every library
        environments = {name: {**environments.get(name, {}), **visible} for name in names}
        spec = {**spec, "device": "gpu", "torch": gpu_process.TORCH, "compute": compute}
        try:
            found = measuring.compare(f"{work}, {SHORT[compute]}", size, spec, names, environments, tolerance,
                                      self.asked.rounds)
            self.rows += [{**row, "compute": compute} for row in found]
            print(measuring.table(found[:1]).splitlines()[-1], flush=True)      # known, if a later comparison hangs
        except UsageError as error:
            self.failed += 1
            print(f"failed: {work}, {size}, {SHORT[compute]}: {error}", flush=True)

    def finish(self, title):
        """Print the table, write the files that were asked for. Returns the exit status."""
        measuring.finish(self.asked, self.rows, title)
        if self.asked.json:
            # NaN, which equals nothing, is no JSON.
            rows = [{key: None if value != value else value for key, value in row.items()} for row in self.rows]
            checkpoint.write_text(self.asked.json, json.dumps({"machine": self.machine, "rows": rows}, indent=1) + "\n")
        if self.failed:
            print(f"{self.failed} of the comparisons failed; see above", file=sys.stderr)
        return int(self.failed > 0)
