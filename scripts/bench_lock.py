"""What Python's interpreter lock costs a training step: halves of a batch in two threads, and in two processes.

    python scripts/bench_lock.py [--sizes XS,S]

minilm splits a batch over threads, which share the lock: NumPy lets go of it inside an operation, and each must have
it again before the next. Two processes have a lock each. Here they do nothing but half of a step each, at the same
time, and add no gradients up: it is the least that a step could take if the lock were free, of work with the same
operations (a half alone says what the second core's company costs besides: caches, memory, clock).
"""

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

import measuring
from run_folder import UsageError, main_guard


def measure(size, cores, rounds, turn=1.0):
    """Medians in ms, of the rounds: a part alone, the parts in processes at once, the whole batch in threads."""
    environment, (*shape, B) = measuring.blas_threads(1), measuring.SIZES[size]
    workers = [measuring.Worker("part", {"shape": [*shape, B // cores], "threads": 1}, environment)
               for _ in range(cores)]
    workers.append(measuring.Worker("threads", {"shape": [*shape, B], "threads": cores}, environment))
    *processes, threads = workers
    try:
        steps = [max(1, round(turn / min(worker.run(3)))) for worker in (processes[0], threads)]
        alone, at_once, whole = [], [], []
        with ThreadPoolExecutor(cores) as pool:
            for _ in range(rounds):
                measuring.wait_until_quiet()
                alone.append(statistics.median(processes[0].run(steps[0])))
                times = list(pool.map(lambda worker: worker.run(steps[0]), processes))
                at_once.append(max(map(statistics.median, times)))
                whole.append(statistics.median(threads.run(steps[1])))
    finally:
        for worker in workers:
            worker.close()
    return [1e3 * statistics.median(times) for times in (alone, at_once, whole)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="XS,S,M", help="with commas (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of turns (default: %(default)s)")
    asked = parser.parse_args()
    if unknown := set(asked.sizes.split(",")) - set(measuring.SIZES):
        raise UsageError(f"no size {', '.join(sorted(unknown))}; there are {', '.join(measuring.SIZES)}")
    cores = os.cpu_count()
    if cores < 2:
        raise UsageError("one core: nothing is done at once here")
    print(measuring.machine() + "\n")
    print(f"| size | 1/{cores} of a batch alone | {cores} in processes | {cores} in threads | threads / processes |\n"
          "|---|---|---|---|---|", flush=True)
    for size in asked.sizes.split(","):
        alone, at_once, whole = measure(size, cores, asked.rounds)
        print(f"| {size} | {alone:.1f} ms | {at_once:.1f} ms | {whole:.1f} ms | {whole / at_once:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        measuring.serve(measuring.load_step, json.loads(sys.argv[3]))
    else:
        sys.exit(main_guard(main))
