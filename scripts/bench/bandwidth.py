"""Decoding against reading the weights: the time of a token for B sequences, and of one pass over as many bytes.

    python scripts/bench/bandwidth.py [--batches 1,2,4,8,16] [--threads 1,2] [--rounds N]

A new token of each sequence needs all weights once, so the memory limits a decoder of float32 weights. The model has
the shape of SmolLM2-135M, random float32 weights, and 64 tokens in its cache. `read` is the dot product of a vector
with itself, of as many bytes as the weights. `plain products` has no small products (fast/few_rows.py). All have the
same number of BLAS threads, and take turns (measuring.py). A share is the time of `read` divided by the time of a
token.
"""

import functools
import sys

import numpy as np

import library_process
import measuring
from support.command_line import MOST_WORKERS, Parser, wholes
from support.run_folder import main_guard

SHAPE = {**measuring.SMOLLM2, "tied": True, "context": 128}
TINY = {**SHAPE, "vocab_size": 256, "layers": 2}
PROMPT = 64
TOLERANCE = 1e-3


def load_minilm(blocks=True):
    from minilm.fast import few_rows
    from minilm.fast.cached_decoding import Decoder, forward_cached
    from minilm.model import Config, Transformer
    if not blocks:
        few_rows.ROWS = range(0)

    def make(spec):
        model = Transformer(Config(**spec["shape"]), np.random.default_rng(0))
        batch = spec["batch"]
        tokens = np.random.default_rng(1).integers(256, size=(batch, PROMPT + 1))
        decoder = Decoder(model)
        cache = decoder.cache(batch, PROMPT + 1)
        forward_cached(decoder, tokens[:, :PROMPT], None, cache)

        def step():
            cache.length = PROMPT
            return decoder.logits(forward_cached(decoder, tokens[:, PROMPT:], None, cache))
        return step, lambda: {"logits": step()}
    return make


def load_read():
    def make(spec):
        vector = np.ones(spec["numbers"], np.float32)
        return functools.partial(np.dot, vector, vector), dict
    return make


LOADERS = {"read": load_read, "minilm": load_minilm, "plain products": functools.partial(load_minilm, blocks=False)}


def medians(spec, threads, rounds):
    """{name: milliseconds} of each of LOADERS, after their logits were compared."""
    with measuring.all_started(LOADERS, spec, dict.fromkeys(LOADERS, measuring.blas_threads(threads))) as by_name:
        measuring.check_results(by_name["plain products"], by_name["minilm"], TOLERANCE)
        found = measuring.counted(*measuring.take_turns(list(by_name.values()), rounds, measuring.TURN))
    return dict(zip(LOADERS, 1e3 * np.median(found, axis=0)))


def main():
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=wholes(1, 1024), default="1,2,4,8,16", metavar="B,...",
                        help="sequences decoded together (default: %(default)s)")
    parser.add_argument("--threads", type=wholes(1, MOST_WORKERS), default="1,2", metavar="N,...",
                        help="of BLAS (default: %(default)s)")
    parser.add_argument("--rounds", type=measuring.whole(1, measuring.MOST_ROUNDS), default=7,
                        help="of turns (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a small model: it runs, and its times mean little")
    asked = parser.parse_args()
    shape = TINY if asked.tiny else SHAPE
    from minilm.model import Config, Transformer
    numbers = sum(int(np.prod(dimensions)) for dimensions in Transformer.shapes(Config(**shape)).values())
    lines = ["| BLAS threads | B | read, ms | GB/s | a token of each, ms | share of the read speed | tokens/s | "
             "plain products, ms | share |", "|---" * 9 + "|"]
    for threads in asked.threads:
        for batch in asked.batches:
            found = medians({"shape": shape, "batch": batch, "numbers": numbers}, threads, asked.rounds)
            read, ours, plain = (found[name] for name in LOADERS)
            others = f"{plain:.1f} | {read / plain:.2f}" if threads == 1 else "- | -"       # the same code
            lines.append(f"| {threads} | {batch} | {read:.1f} | {4e-6 * numbers / read:.1f} | {ours:.1f} | "
                         f"{read / ours:.2f} | {1e3 * batch / ours:.0f} | {others} |")
    print(f"{measuring.machine()}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main_guard(library_process.role(main, LOADERS)))
