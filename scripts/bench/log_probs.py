"""The log-prob kernels: bytes moved, and on a GPU their time against PyTorch, Liger and plain CuPy.

    python scripts/bench/log_probs.py [--vocabularies 4096,50257]

From logits (N,V), forward and backward; and fused with the product hidden (N,D) times unembedding that gives the
logits. Without a GPU it prints the bytes moved, from the formula that the tests compare with the emulator's count,
beside those of one operation at a time and the least possible. On a GPU of sm_80 or later the fused form is also timed
in bf16. --json writes the times to a file.
"""

import sys

import numpy as np

import gpu_measuring as measuring
from minilm.kernels import log_probs
from support.run_folder import main_guard

N = 4096
D = 768
TOLERANCE = 1e-4
BF16_TOLERANCE = 3e-2
BF16 = ", bf16 (the share is of a product in float16)"


def traffic(V, N=N, dtype="float32"):
    """Bytes: {direction: (ours, one operation at a time, the least possible)}."""
    numbers = N * V * np.dtype(dtype).itemsize
    # One at a time: max; subtract (read, write); exp (read, write); sum; and for the gradient multiply (read, write).
    return {"forward": (sum(log_probs.forward_bytes(N, V, dtype)), 6 * numbers, numbers),
            "backward": (sum(log_probs.backward_bytes(N, V, dtype)), 4 * numbers, 2 * numbers)}


def print_traffic(vocabularies):
    print(f"Bytes moved by log-probs of {N} rows of logits, float32, in MB:\n\n"
          "| V | direction | ours | one operation at a time | the least | ours / the least |\n"
          "|---|---|---|---|---|---|")
    for V in vocabularies:
        for direction, (ours, naive, least) in traffic(V).items():
            megabytes = " | ".join(f"{count / 1e6:.1f}" for count in (ours, naive, least))
            print(f"| {V} | {direction} | {megabytes} | {ours / least:.3f} |")


def from_logits(cupy, V):
    """{peer: call() -> log-probs, backward()}"""
    rng = cupy.random.default_rng(0)
    logits = rng.standard_normal((N, V), dtype=np.float32)
    dy = rng.standard_normal(N, dtype=np.float32)
    targets = rng.integers(0, V, N)

    def ours():
        found, lse, _ = log_probs.forward(logits, targets)
        return found, lambda: log_probs.backward(logits, targets, lse, dy)

    def plain():
        z = logits - logits.max(axis=1, keepdims=True)
        total = cupy.exp(z).sum(axis=1, keepdims=True)
        rows = cupy.arange(N)

        def backward():
            dlogits = cupy.exp(z) * (-dy[:, None] / total)
            dlogits[rows, targets] += dy
            return dlogits
        return (z[rows, targets] - cupy.log(total[:, 0])), backward

    peers = {"minilm": ours, "plain CuPy": plain}
    try:
        import torch
        leaf = torch.from_dlpack(logits).detach().requires_grad_()
        their_targets = torch.from_dlpack(targets)
        their_dy = torch.from_dlpack(dy)

        def pytorch():
            found = -torch.nn.functional.cross_entropy(leaf, their_targets, reduction="none")
            return found, lambda: torch.autograd.grad(found, leaf, their_dy, retain_graph=True)[0]
        peers["torch"] = pytorch
        # No Liger here: its cross-entropy overwrites the logits with the gradient of the mean, another function.
    except ImportError:
        print("PyTorch: not installed, skipped")
    return peers


def from_hidden(cupy, V, bf16=False):
    """{peer: call()}: the mean loss and its gradients from hidden states, as in training.

    bf16: products of matrices rounded to bf16, as in mixed precision; Liger gets matrices of bf16.
    """
    rng = cupy.random.default_rng(1)
    hidden = rng.standard_normal((N, D), dtype=np.float32)
    unembedding = rng.standard_normal((V, D), dtype=np.float32) * np.float32(D ** -0.5)
    targets = rng.integers(0, V, N)
    dy = cupy.full(N, -1 / N, np.float32)
    compute = "bfloat16" if bf16 else "float32"

    def ours():
        _, lse, _, logits = log_probs.linear_forward(hidden, unembedding, targets, compute=compute)
        return log_probs.linear_backward(hidden, unembedding, targets, lse, dy, logits, compute=compute)

    def theirs(loss, of_bf16=False):
        import torch
        leaves = [torch.from_dlpack(a).detach() for a in (hidden, unembedding)]
        leaves = [(a.bfloat16() if of_bf16 else a).requires_grad_() for a in leaves]
        their_targets = torch.from_dlpack(targets)

        def call():
            with torch.autocast(leaves[0].device.type, torch.bfloat16, enabled=bf16 and not of_bf16):
                value = loss(*leaves, their_targets)
            return [gradient.float() for gradient in torch.autograd.grad(value, leaves)]
        return call

    peers = {"minilm": ours}
    try:
        import torch
        peers["torch"] = theirs(lambda h, u, y: torch.nn.functional.cross_entropy(h @ u.T, y))
    except ImportError:
        print("PyTorch: not installed, skipped")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        peers["Liger"] = theirs(lambda h, u, y: LigerFusedLinearCrossEntropyLoss()(u, h, y), bf16)
    except ImportError:
        print("Liger: not installed, skipped (pip install liger-kernel)")
    return peers


def both(call):
    """The log-probs and the gradient."""
    found, backward = call()
    return found, backward()


def time_on(report, V):
    moved = traffic(V)
    title = f"V = {V}, from logits"
    with report.attempt(title):
        peers = measuring.those_that_agree(report.cupy, from_logits(report.cupy, V), both, TOLERANCE)
        report.compare(f"{title}, forward", peers, lambda call: call, moved["forward"][0], None)
        report.compare(f"{title}, backward", peers, lambda call: call()[1], moved["backward"][0], None)
    peers = None                        # with their logits
    for bf16 in (False, True) if int(report.cupy.cuda.Device().compute_capability) >= 80 else (False,):
        title = f"V = {V}, with the product, forward and backward{BF16 if bf16 else ''}"
        with report.attempt(title):
            peers = measuring.those_that_agree(report.cupy, from_hidden(report.cupy, V, bf16), lambda call: call(),
                                               BF16_TOLERANCE if bf16 else TOLERANCE)
            report.compare(title, peers, lambda call: call, None, 6 * N * V * D,
                           measuring.product_rate(report.cupy, np.float16) if bf16 else None)


def main():
    return measuring.main(__doc__.partition("\n")[0], "--vocabularies", "4096,50257,151936", print_traffic, time_on,
                          "log_probs")


if __name__ == "__main__":
    sys.exit(main_guard(main))
