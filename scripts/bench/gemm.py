"""The speed of matrix products on this machine, and their share of a training step.

    python scripts/bench/gemm.py [--sizes XS,S] [--peers torch] [--csv FILE] [--figure FILE]

The products are those with the weights in a training step of train.py: forward, gradient of the input and of
the weight, for every layer and the unembedding, in float32 (without the small ones inside attention). Results are
written into existing arrays, and nothing else happens between the products, so a step with these products cannot take
less time. `numpy` computes them as minilm does: a thread for each core, each with its share of the rows and BLAS on one
thread. `blas-threads` computes one product at a time on all threads of the same BLAS; `torch` the same with PyTorch's
BLAS. The share is the time of `numpy` divided by the time of minilm's whole step.
"""

import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import library_process
import measuring
from support.run_folder import main_guard

CORES = os.cpu_count()
PEERS = {"torch": "torch"}
TOLERANCE = 1e-4        # of products in float32, relative to the largest entry


def shapes(size):
    """The number of rows N, and the weights {name: (in, out, number of such weights)}."""
    from minilm.model import Config
    V, D, L, H, T, B = measuring.SIZES[size]
    F = Config(vocab_size=V, width=D, heads=H).ffn_width
    return B * T, {"qkv": (D, 3 * D, L), "attention_out": (D, D, L), "gate_up": (D, 2 * F, L), "ffn_out": (F, D, L),
                   "unembedding": (D, V, 1)}


def flops(size):
    """Operations of the products of a step: a multiplication and an addition, three times for each row and weight."""
    N, weights = shapes(size)
    return 6 * N * sum(i * o * times for i, o, times in weights.values())


def products(size, threads, out_first):
    """For each thread a list of (a, b, result, repetitions). out_first: weights are stored as (out, in)."""
    N, weights = shapes(size)
    rng = np.random.default_rng(0)
    dealt = [[] for _ in range(threads)]
    for name, (i, o, times) in weights.items():
        x, w, dy = (rng.standard_normal(shape, np.float32) for shape in ((N, i), (i, o), (N, o)))
        if out_first or name == "unembedding":
            w = np.ascontiguousarray(w.T).T
        for mine, rows, drows in zip(dealt, np.array_split(x, threads), np.array_split(dy, threads)):
            mine += [(rows, w, np.empty_like(drows), times), (drows, w.T, np.empty_like(rows), times),
                     (rows.T, drows, np.empty_like(w), times)]
    return dealt


def multiplying(size, matmul, threads=1, convert=np.asarray, out_first=False):
    dealt = products(size, threads, out_first)
    converted = [[(convert(a), convert(b), convert(out), times) for a, b, out, times in mine] for mine in dealt]
    each = ThreadPoolExecutor(threads).map if threads > 1 else map

    def multiply(mine):
        for a, b, out, times in mine:
            for _ in range(times):
                matmul(a, b, out=out)

    def step():
        list(each(multiply, converted))

    def check():
        """Every result times a vector. The gradient of a weight is the sum over the threads."""
        step()
        results = {}
        for j, parts in enumerate(zip(*([out for _, _, out, _ in mine] for mine in dealt))):
            whole = np.concatenate(parts) if j % 3 < 2 else sum(parts)
            results[f"product {j}"] = whole @ np.linspace(-1, 1, whole.shape[1], dtype=np.float32)
        return results
    return step, check


def load_numpy():
    return lambda spec: multiplying(spec["size"], np.matmul, threads=CORES)


def load_blas_threads():
    return lambda spec: multiplying(spec["size"], np.matmul)


def load_torch():
    import torch
    return lambda spec: multiplying(spec["size"], torch.matmul, convert=torch.from_numpy, out_first=True)


LOADERS = {"numpy": load_numpy, "blas-threads": load_blas_threads, "torch": load_torch, "step": measuring.load_step}


def table(rows):
    """A row for each size: the results of compare(), and the time of the step."""
    names = [row["peer"] for row in rows[0]["compared"]]
    lines = [f"| size | GFLOP | GF/s, numpy | {' | '.join(names)} | step of minilm | products' share |",
             "|---" * (len(names) + 5) + "|"]
    for r in rows:
        times = [r["compared"][0]["ours_ms"], *(row["theirs_ms"] for row in r["compared"])]
        rates = " | ".join(f"{r['flops'] / 1e6 / ms:.0f}" for ms in times)
        lines.append(f"| {r['size']} | {r['flops'] / 1e9:.3g} | {rates} | {r['step_ms']:.1f} ms "
                     f"| {times[0] / r['step_ms']:.0%} |")
    return "\n".join(lines)


def of_step(row):
    """The whole step over its products, as another row. The medians are of different turns, so there is no spread."""
    compared = row["compared"][0]
    ratio = row["step_ms"] / compared["ours_ms"]
    return {**compared, "work": "training step", "peer": "its products alone", "time_ratio": ratio,
            "time_ratio_low": ratio, "time_ratio_high": ratio}


def main():
    asked = measuring.arguments(__doc__.partition("\n")[0], measuring.SIZES, PEERS, unasked=measuring.UNASKED)
    names = ["numpy", "blas-threads", *measuring.present(asked.peers, PEERS)]
    environments = {"numpy": measuring.blas_threads(1), "blas-threads": measuring.blas_threads(CORES)}
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    print(f"{measuring.machine('torch')}; NumPy's BLAS is {blas['name']} {blas['version']}")
    rows = []
    for size in asked.sizes:
        spec = {"size": size, "shape": measuring.SIZES[size], "workers": CORES}
        compared = measuring.compare("matrix products", size, spec, names, environments, TOLERANCE, asked.rounds)
        seconds, _ = measuring.alone("step", spec, measuring.blas_threads(1), asked.rounds)
        # Memory is that of the operands, the same for all peers.
        compared = [{**row, "memory_ratio": math.nan} for row in compared]
        rows.append({"size": size, "flops": flops(size), "compared": compared, "step_ms": 1e3 * seconds})
    ratios = [row for r in rows for row in [*r["compared"], of_step(r)]]
    print("\n" + table(rows))
    if asked.csv:
        measuring.write_csv(asked.csv, ratios)
    if asked.figure:
        measuring.draw(asked.figure, ratios, "The matrix products of a training step")


if __name__ == "__main__":
    sys.exit(main_guard(library_process.role(main, LOADERS)))
