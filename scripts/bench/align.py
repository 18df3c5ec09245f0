"""Aligning a real model: steps of SFT, DPO and RLOO against TRL, and sampling against transformers and llama.cpp.

    python scripts/bench/align.py [--model MODEL] [--works dpo,dpo-adapters] [--peers hf] [--threads 1] [--csv FILE]

MODEL is a GGUF file (python scripts/get_smollm2.py fetches one). All but llama.cpp-as-is have its weights in float32
on the CPU. The steps are those of objectives.py. In a work with -adapters only LoRA adapters of rank 8 on all
matrices of the blocks are trained, TRL's by the package PEFT. Both start with the same adapters, with a B that is not
zero: otherwise the gradient of A would be, and comparing it would show nothing.

    trl-best          TRL without padding, with the reference's log-probs computed before, without a second model
    hf                generate of transformers, which opens the folder that minilm's `save` wrote
    llama.cpp         by the package xllamacpp; the file, written again with float32 weights, and a float32 cache,
                      which flash attention would round to float16: it is off
    llama.cpp-as-is   the same with the weights as they are in MODEL (4 bits, say), and llama.cpp's own settings

Sampling reads 1 or 4 prompts of 32 tokens and draws 64 new tokens for each at temperature 1; no response ends early.
All have the same number of threads. In every process glibc keeps freed memory. First the log-probs of minilm's most
likely tokens are compared; quantised weights are multiplied by rounded activations, so llama.cpp-as-is may differ more.
The wheel of xllamacpp has no AVX-512; a llama.cpp that is compiled on a machine with it may be faster.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np

import decoding
import library_process
import llama_cpp
import measuring
import objective_steps
from minilm.lora import Adapted
from minilm.model import RewardModel
from minilm.pretrained import load, save
from support.command_line import Parser, names, whole, wholes
from support.run_folder import UsageError, main_guard

WORKS = [*objective_steps.WORKS, *(f"{work}-adapters" for work in objective_steps.WORKS), "sampling"]
PEERS = {"trl-best": ["trl", "peft"], "hf": ["transformers"], "llama.cpp": ["xllamacpp", "gguf"],
         "llama.cpp-as-is": ["xllamacpp"]}          # and the packages that they need
RANK, ALPHA = 8, 16
B_SCALE = 0.02
PROMPT, NEW = 32, 64
BATCHES = 1, 4
# Of log-probs, relative to the largest.
TOLERANCE, QUANTISED_TOLERANCE = 1e-3, 0.1


# The processes.

def load_minilm():
    of_steps = objective_steps.load_minilm()

    def make(spec):
        if spec["work"] != "sampling":
            return of_steps(spec)
        return decoding.by_minilm(load(spec["model"])[0], np.array(spec["prompts"]), NEW, spec["drawn"], workers=1,
                                  temperature=0.0)
    return make


def load_hf():
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def make(spec):
        model = transformers.AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=torch.float32).eval()
        return decoding.by_transformers(model, np.array(spec["prompts"]), NEW, spec["drawn"])
    return make


def load_llama_cpp():
    import xllamacpp
    print(f"  llama.cpp: {xllamacpp.get_system_info()}", file=sys.stderr)
    as_is = library_process.asked() == "llama.cpp-as-is"

    def make(spec):
        return llama_cpp.by_llama_cpp(spec["model" if as_is else "float32"], np.array(spec["prompts"]), NEW,
                                      spec["drawn"], spec["threads"], float32=not as_is, letter=spec["letter"])
    return make


LOADERS = {"minilm": load_minilm, "trl-best": objective_steps.load_trl, "hf": load_hf, "llama.cpp": load_llama_cpp,
           "llama.cpp-as-is": load_llama_cpp}


# The benchmark.

def opened(path):
    """(model, tokenizer) of MODEL. Raises UsageError for one that this benchmark cannot use."""
    if Path(path).is_dir():
        raise UsageError(f"{path} is a folder, and llama.cpp needs a GGUF file")
    model, tokenizer = load(path)
    if isinstance(model, RewardModel) or model.config.context < objective_steps.LONGEST:
        raise UsageError(f"{path}: needs a language model with a context of at least {objective_steps.LONGEST}")
    return model, tokenizer


def write_steps(model, folder):
    """Write weights and adapters to the folder. Returns the specs of the workers: of all weights, of adapters."""
    np.savez(folder / "weights.npz", **{name: p.data for name, p in model.parameters().items()})
    rng = np.random.default_rng(0)
    adapters = {name: p.data for name, p in Adapted(model, RANK, ALPHA, rng).parameters().items()}
    np.savez(folder / "adapters.npz", **{
        name: rng.normal(size=a.shape, scale=B_SCALE).astype(a.dtype) if name.endswith("lora_b") else a
        for name, a in adapters.items()})
    spec = {"file": str(folder / "weights.npz"), "config": dataclasses.asdict(model.config)}
    return spec, {**spec, "adapters": str(folder / "adapters.npz"), "alpha": ALPHA}


def steps(asked, model, folder):
    """Rows of the works but sampling."""
    works = [work for work in asked.works if work != "sampling" and "trl-best" in asked.peers]
    if not works:
        return []
    size = f"{sum(p.size for p in model.parameters().values()) / 1e6:.3g}M"
    of_all, of_adapters = write_steps(model, folder)
    rows = []
    for work in works:
        kind, _, adapters = work.partition("-")
        spec = {**(of_adapters if adapters else of_all), "work": kind}
        rows += measuring.compare(
            f"{kind.upper()} step{' of adapters' if adapters else ''}", size, spec, ["minilm", "trl-best"],
            {"minilm": measuring.blas_threads(1), "trl-best": measuring.KEEP_MEMORY}, objective_steps.TOLERANCE,
            asked.rounds)
    return rows


def sampling(asked, model, tokenizer, folder):
    """Rows of sampling. llama.cpp-as-is has rows with a minilm of its own: it is compared with another tolerance."""
    peers = [peer for peer in asked.peers if peer != "trl-best"]
    if "sampling" not in asked.works or not peers:
        return []
    if "hf" in peers:
        save(model, tokenizer, folder / "model")
    if "llama.cpp" in peers:
        llama_cpp.as_float32(asked.model, folder / "float32.gguf")
    of_float32 = [peer for peer in peers if peer != "llama.cpp-as-is"], TOLERANCE
    as_is = [peer for peer in peers if peer == "llama.cpp-as-is"], QUANTISED_TOLERANCE
    rows = []
    for B in BATCHES:
        prompts = np.random.default_rng(1).integers(2, model.config.vocab_size, size=(B, PROMPT)).tolist()
        for threads in asked.threads:
            spec = {"work": "sampling", "model": str(asked.model), "folder": str(folder / "model"), "prompts": prompts,
                    "float32": str(folder / "float32.gguf"), "drawn": str(folder / "drawn.npy"), "threads": threads,
                    "letter": tokenizer.encode("a")[0]}
            alike = {"minilm": measuring.blas_threads(threads), **dict.fromkeys(
                peers, {**measuring.KEEP_MEMORY, **measuring.blas_threads(threads)})}
            for others, tolerance in (of_float32, as_is):
                if others:
                    rows += measuring.compare("sampling", f"B{B} {threads} thread{'s' * (threads > 1)}", spec,
                                              ["minilm", *others], alike, tolerance, asked.rounds)
    return rows


def arguments():
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct.gguf", help="(default: %(default)s)")
    for kind, known in (("work", WORKS), ("peer", PEERS)):
        parser.add_argument(f"--{kind}s", type=names(kind, known), default=",".join(known),
                            help="with commas (default: %(default)s)")
    parser.add_argument("--threads", type=wholes(1, 64), default="1,2",
                        help="of sampling, with commas (default: %(default)s)")
    parser.add_argument("--rounds", type=whole(1, measuring.MOST_ROUNDS), default=5, help="of turns (default: "
                        "%(default)s)")
    measuring.output_options(parser, "the ratios")
    return parser.parse_args()


def main():
    asked = arguments()
    for peer in asked.peers:
        if missing := [package for package in PEERS[peer] if not measuring.installed(package)]:
            raise UsageError(f"{peer} needs {' and '.join(missing)}: pip install -e '.[bench]', or leave it out of "
                             "--peers")
    model, tokenizer = opened(asked.model)
    print(measuring.machine("torch", "transformers", "trl", "peft", "xllamacpp"))
    with tempfile.TemporaryDirectory() as folder:
        rows = steps(asked, model, Path(folder)) + sampling(asked, model, tokenizer, Path(folder))
    measuring.finish(asked, rows, "Aligning a real model")


if __name__ == "__main__":
    sys.exit(main_guard(library_process.role(main, LOADERS)))
