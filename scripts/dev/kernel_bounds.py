"""How fast the CUDA kernels could be at most: a prediction from bytes and operations, without a GPU.

    python scripts/dev/kernel_bounds.py

For each launch, at the sizes of the benchmarks: the bytes of its operands, each read or written once, and the
floating-point operations of its products. A card needs at least

    bytes / bandwidth   and   operations / (operations a second),

the larger of them (the roofline: Williams et al. 2009, doi:10.1145/1498765.1498785); the bound of several launches is
their sum. Time to launch, exponentials, and operands that are read again are left out, so kernels are slower than their
bound. Only operands that the L2 cache (50 MB) holds from the launch before are read faster. The numbers of a card are
those of its data sheet, which no program reaches.

The last column is measured: by scripts/bench/attention.py and log_probs.py on a GPU, if what their option --json wrote
lies in scripts/bench/measured/. Tests: tests/test_kernel_bounds.py.
"""

import dataclasses
import math
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
from minilm.model import Config, Transformer  # noqa: E402
from support.command_line import Parser, read_json, relying_on  # noqa: E402
from support.run_folder import main_guard  # noqa: E402

MEASURED = Path(__file__).resolve().parents[1] / "bench" / "measured"


@dataclasses.dataclass(frozen=True)
class Card:
    """NVIDIA's data sheets: bytes a second of the memory, operations a second (bf16: without sparsity)."""

    bandwidth: float
    float32: float
    bfloat16: float


CARDS = {"H100 SXM": Card(3.35e12, 67e12, 989e12), "H200 SXM": Card(4.8e12, 67e12, 989e12)}


@dataclasses.dataclass(frozen=True)
class Launch:
    """The bytes of a launch, its operations, and the unit that does these."""

    bytes: float
    operations: float = 0
    unit: str = "float32"

    def seconds(self, card):
        return max(self.bytes / card.bandwidth, self.operations / getattr(card, self.unit))

    def limited_by(self, card):
        return "memory" if self.bytes / card.bandwidth >= self.operations / getattr(card, self.unit) else self.unit


def attention(B, H, G, T, K, item, unit):
    """{direction: launches} of causal attention, as the kernels compute it: two products forward; backward one kernel
    has three, for dq, and one has four, for dk and dv."""
    queries = B * H * T * K * item
    keys = B * G * T * K * item
    rows = B * H * T * 4                            # lse and delta, float32
    product = 2 * B * H * K * T * (T + 1) // 2
    return {"forward": [Launch(2 * queries + 2 * keys + rows, 2 * product, unit)],
            "backward": [Launch(2 * queries + rows),
                         Launch(3 * queries + 2 * keys + 2 * rows, 3 * product, unit),
                         Launch(2 * queries + 4 * keys + 2 * rows, 4 * product, unit)]}


def linear_log_probs(N, D, V, unit):
    """Launches of log-probs from hidden states and their gradients, with all logits held in float32.

    bf16: the gradient of the logits is rounded to it by a launch of its own, before the two products.
    """
    matrices = N * D + V * D
    item = 2 if unit == "bfloat16" else 4
    rounding = [Launch(6 * matrices), Launch(6 * N * V)] if unit == "bfloat16" else []
    product = 2 * N * V * D
    return [Launch(matrices * item + 4 * N * V, product, unit), Launch(4 * N * V), Launch(8 * N * V), *rounding,
            Launch(N * V * item + V * D * item + 4 * N * D, product, unit),
            Launch(N * V * item + N * D * item + 4 * V * D, product, unit)]


def cases():
    """(kernel, size, launches, the table and the row of the benchmark that measures it or None)."""
    B, H, K = 4, 8, 64
    for T in (2048, 8192):
        size = f"B {B}, H {H}, T {T}, K {K}"
        for name, item, unit, title, row in (
                ("attention", 4, "float32", f"T = {T}", "minilm"),
                ("attention_bf16", 2, "bfloat16", f"T = {T}, bf16 (the share is of a product in float16)",
                 "minilm, bf16")):
            for direction, launches in attention(B, H, H, T, K, item, unit).items():
                yield f"{name}, {direction}", size, launches, (f"{title}, {direction}", row)
    N, D, V = 4096, 768, 50257
    yield "log_probs, forward", f"N {N}, V {V}", [Launch(4 * N * V)], (f"V = {V}, from logits, forward", "minilm")
    yield "log_probs, backward", f"N {N}, V {V}", [Launch(8 * N * V)], (f"V = {V}, from logits, backward", "minilm")
    for unit, end in (("float32", ""), ("bfloat16", ", bf16 (the share is of a product in float16)")):
        yield (f"log_probs with the product, {'bf16' if end else unit}", f"N {N}, D {D}, V {V}",
               linear_log_probs(N, D, V, unit), (f"V = {V}, with the product, forward and backward{end}", "minilm"))
    yield from of_a_step()
    S = 2048
    yield ("decode", f"B 32, H {H}, G {H}, T {S}, K {K}",
           [Launch(4 * 32 * H * K * (2 * S + 2), 4 * 32 * H * S * K)], None)
    yield "sampling", f"B 32, V {V}", [Launch(4 * 32 * V)], None


def of_a_step():
    """The kernels without products in a training step of size G8x1024 of scripts/bench: each kernel once."""
    config = Config(vocab_size=50257, width=768, layers=12, heads=12)
    N, D, F, H, K = 8 * 1024, config.width, config.ffn_width, config.heads, config.head_width
    P = sum(map(math.prod, Transformer.shapes(config).values()))
    for name, size, numbers in (
            ("rms_norm, forward", f"N {N}, D {D}", 4 * (2 * N * D + D + N)),
            ("rms_norm, backward", f"N {N}, D {D}", 4 * (3 * N * D + 2 * D + N)),
            ("rms_norm_bf16, forward", f"N {N}, D {D}", 6 * N * D + 4 * (D + N)),
            ("swiglu_bf16, forward", f"N {N}, F {F}", 2 * 3 * N * F),
            ("swiglu_bf16, backward", f"N {N}, F {F}", 2 * 5 * N * F),
            ("rope_bf16", f"N {N}, heads {2 * H}, K {K}", 2 * 2 * N * 2 * H * K + 4 * N * K),
            ("adamw", f"P {P}", 4 * 7 * P)):
        yield name, size, [Launch(numbers)], None


def measured():
    """{(table, row): (seconds, card)} of the files in MEASURED."""
    found = {}
    for path in sorted(MEASURED.glob("*.json")):
        with relying_on(path, "Write it again with --json of scripts/bench/attention.py or log_probs.py."):
            content = read_json(path, "Write it again.")
            card = content["machine"].partition(",")[0]
            found |= {(row["table"], row["name"]): (float(row["seconds"][0]), card) for row in content["rows"]}
    return found


def microseconds(seconds):
    return f"{1e6 * seconds:.3g} us" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def table():
    cards = " | ".join(f"{name}, at least" for name in CARDS)
    lines = [f"| kernel | size | MB | GFLOP | limited by | {cards} | measured |",
             "|---" * (6 + len(CARDS)) + "|"]
    known = measured()
    for name, size, launches, key in cases():
        bounds = [sum(launch.seconds(card) for launch in launches) for card in CARDS.values()]
        limits = dict.fromkeys(launch.limited_by(next(iter(CARDS.values()))) for launch in launches)
        time = known.get(key)
        lines.append(f"| {name} | {size} | {sum(launch.bytes for launch in launches) / 1e6:.0f} "
                     f"| {sum(launch.operations for launch in launches) / 1e9:.0f} | {', '.join(limits)} "
                     f"| {' | '.join(map(microseconds, bounds))} "
                     f"| {f'{microseconds(time[0])}, {time[1]}' if time else 'not measured'} |")
    return "\n".join(lines)


def main():
    Parser(__doc__.partition("\n")[0]).parse_args()
    print(table())


if __name__ == "__main__":
    sys.exit(main_guard(main))
