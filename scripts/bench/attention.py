"""The attention kernels: bytes moved, and on a GPU their time against PyTorch and plain CuPy.

    python scripts/bench/attention.py [--lengths 128,1024,8192]

Without a GPU it prints the bytes moved, from the formula that the tests compare with the emulator's count, beside
those of attention with a matrix of scores and the least possible. The plan of the tiles is made before the timing,
because a model makes one for all its layers.
"""

import functools
import sys

import numpy as np

import gpu_measuring as measuring
from minilm.kernels import attention
from support.run_folder import main_guard

B = 4
H = 8
G = 8
K = 64
TOLERANCE = 1e-4


def traffic(T, B=B, H=H, G=G, K=K, dtype="float32"):
    """Bytes of causal attention at length T: {direction: (ours, with a matrix of scores, the least possible)}."""
    plan = attention.batch_plan(np, (B, H, T, K), (B, G, T, K), True)
    item = np.dtype(dtype).itemsize
    forward = sum(map(sum, attention.forward_bytes(plan, H, G, K, dtype).values()))
    backward = sum(sum(map(sum, operands.values()))
                   for operands in attention.backward_bytes(plan, H, G, K, dtype).values())
    queries = B * H * T * K * item
    keys = B * G * T * K * item
    scores = B * H * T * T * item
    # With a matrix each product reads its operands and writes its result once; softmax and its gradient read and write
    # the scores. Forward writes S, reads S, writes P, reads P. Backward writes and reads dP, reads P twice, writes dS,
    # and reads dS in two products.
    naive = 2 * queries + 2 * keys + 4 * scores, 4 * queries + 4 * keys + 8 * scores
    least = 2 * queries + 2 * keys, 4 * queries + 4 * keys
    return {"forward": (forward, naive[0], least[0]), "backward": (backward, naive[1], least[1])}


def print_traffic(lengths):
    print(f"Bytes moved by causal attention, B {B}, H {H}, K {K}, float32, in MB; counted, if no cache helps:\n\n"
          "| T | direction | ours | with a matrix of scores | the least | ours / matrix |\n|---|---|---|---|---|---|")
    for T in lengths:
        for direction, (ours, naive, least) in traffic(T).items():
            megabytes = " | ".join(f"{count / 1e6:.1f}" for count in (ours, naive, least))
            print(f"| {T} | {direction} | {megabytes} | {ours / naive:.2f} |")


def ours(q, k, v, do, plan):
    o, lse = attention.batch_forward(q, k, v, plan, K ** -0.5)
    return o, lambda: attention.batch_backward(q, k, v, o, do, lse, plan, K ** -0.5)


def plain(q, k, v, do):
    """The formula of layers.attention on CuPy arrays."""
    from minilm.layers import attention as layer
    o, vjp = layer.__wrapped__(q, k, v, True, kernel=False)
    return o, lambda: vjp(do)


def pytorch(backend, q, k, v, do):
    """A call of PyTorch's scaled_dot_product_attention with one of its kernels ("MATH": unfused)."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    leaves = [torch.from_dlpack(a).requires_grad_() for a in (q, k, v)]
    gradient = torch.from_dlpack(do)

    def call():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            o = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        return o, lambda: torch.autograd.grad(o, leaves, gradient, retain_graph=True)
    return call


def both(call):
    """The output and the gradients."""
    o, backward = call()
    return o, *backward()


def time_on(cupy, T, ceiling):
    rng = cupy.random.default_rng(0)
    q, k, v, do = (rng.standard_normal((B, heads, T, K), dtype=cupy.float32) for heads in (H, G, G, H))
    plan = attention.batch_plan(cupy, q.shape, k.shape, True)
    peers = {"minilm": functools.partial(ours, q, k, v, do, plan), "plain CuPy": functools.partial(plain, q, k, v, do)}
    try:
        import torch  # noqa: F401
    except ImportError:
        print("PyTorch: not installed, skipped")
    else:
        peers |= {f"torch, {backend.lower()}": pytorch(backend, q, k, v, do)
                  for backend in ("EFFICIENT_ATTENTION", "MATH")}
    peers = measuring.those_that_agree(cupy, peers, both, TOLERANCE)
    moved = traffic(T)
    pairs = 2 * B * H * K * T * (T + 1) // 2          # operations of one product of the causal half
    for direction, products in (("forward", 2), ("backward", 5)):
        print(f"\nT = {T}, {direction}\n\n{measuring.HEADER}")
        for name, call in peers.items():
            timed = call if direction == "forward" else call()[1]
            bytes_moved = moved[direction][0] if name == "minilm" else None
            extra = None if name.startswith("torch") else measuring.extra_bytes(cupy, timed)
            line = measuring.row(name, measuring.seconds(timed), bytes_moved, products * pairs, extra, ceiling)
            print(line, flush=True)


def main():
    measuring.main(__doc__.partition("\n")[0], "--lengths", "128,256,512,1024,2048,4096,8192", print_traffic, time_on,
                   "attention,decode")


if __name__ == "__main__":
    sys.exit(main_guard(main))
