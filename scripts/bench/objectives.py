"""An optimiser step of SFT, DPO and RLOO: minilm's stages against TRL's trainers.

    python scripts/bench/objectives.py [--works sft,dpo] [--sizes 8M] [--peers trl] [--csv FILE] [--figure FILE]
    python scripts/bench/objectives.py --device gpu [--works dpo,rloo] [--compute bfloat16] [--json FILE]

Both have the same Llama with the same weights and tokens, in float32, on a GPU also in bf16. A step is batching the
tokens, forward, backward, clipping of the gradient's norm, and AdamW. Reading and tokenising the data is not part of
it.

    sft     8 dialogues of 64 to 320 tokens, three quarters of them prompt; the loss is on the response
    dpo     4 prompts of 256 tokens, two responses of 64 to each; the reference is the policy as it started
    rloo    1 prompt of 64 tokens, 8 samples of 64 drawn in the step, rewarded, and scored by a reference

`trl` has its defaults, except gradient checkpointing and bfloat16, which take longer on a CPU. In `trl-best` glibc
keeps freed memory, SFT has no padding, and DPO computes the reference's log-probs once, before the steps; minilm always
does all three. At 135M minilm checkpoints the activations of its blocks (Transformer.activation_checkpointing), but not
on a GPU. In bf16, TRL computes under autocast and minilm in its mixed precision, also when they sample.
"""

import dataclasses
import itertools
import sys
import tempfile

import numpy as np

import library_process
import measuring
from benchmark import Benchmark
from minilm.model import Config, Transformer
from objective_steps import BF16_TOLERANCE, LOADERS, TOLERANCE, WORKS
from support.run_folder import UsageError, main_guard

SIZES = {"tiny": {"vocab_size": 256, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_width": 64},
         "tiny-32": {"vocab_size": 256, "width": 64, "layers": 2, "heads": 2, "kv_heads": 1, "ffn_width": 64},
         "8M": {"vocab_size": 8192, "width": 256, "layers": 6, "heads": 4, "ffn_width": 1024},
         "135M": measuring.SMOLLM2}
PEERS = ["trl", "trl-best"]
GPU = {"sizes": ["135M"], "peers": ["trl-best"], "works": WORKS, "possible": PEERS}


def write(path, size):
    """Write the weights of a size to a file. Returns the spec of the workers."""
    config = Config(**SIZES[size], tied=True, context=512)
    np.savez(path, **{name: p.data for name, p in Transformer(config, np.random.default_rng(0)).parameters().items()})
    return {"file": str(path), "config": dataclasses.asdict(config)}


def main():
    run = Benchmark(__doc__.partition("\n")[0], SIZES, PEERS, GPU, ["torch", "transformers", "trl"], works=WORKS,
                    unasked=["tiny", "tiny-32"])
    peers = run.asked.peers
    if not run.asked.other and not measuring.installed("trl"):
        if not run.on_gpu:
            raise UsageError("TRL is not installed: pip install trl==1.16.0")
        print("trl: not installed, skipped (pip install trl==1.16.0)")
        peers = [None]
    for size, compute in run.cases():
        with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            spec = write(file.name, size)
            for work, peer in itertools.product(run.asked.works, peers):    # one after the other: TRL may need 9 GB
                run.compare(f"{work.upper()} step", size, compute, {**spec, "work": work},
                            ["minilm", peer][:1 + bool(peer)],
                            {"minilm": measuring.blas_threads(1), "trl-best": measuring.KEEP_MEMORY},
                            BF16_TOLERANCE[work] if compute == "bfloat16" else TOLERANCE)
    return run.finish("An optimiser step, against TRL")


if __name__ == "__main__":
    sys.exit(main_guard(library_process.role(main, LOADERS)))
