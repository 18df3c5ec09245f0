"""The attention kernels: bytes moved, and on a GPU their time against PyTorch and plain CuPy.

    python scripts/bench/attention.py [--lengths 128,1024,8192]

Without a GPU it prints the bytes moved, from the formula that the tests compare with the emulator's count, beside
those of attention with a matrix of scores and the least possible. The plan of the tiles is made before the timing,
because a model makes one for all its layers. On a GPU of sm_80 or later it also times bf16 on tensor cores, with heads
of 64 and of 128 numbers, against PyTorch's FlashAttention-2, cuDNN and memory-efficient attention. --json writes the
times to a file.
"""

import functools
import sys

import numpy as np

import gpu_measuring as measuring
from minilm.backend import array_module
from minilm.kernels import attention, attention_bf16
from minilm.kernels.bf16 import from_bf16, to_bf16
from support.run_folder import main_guard

B = 4
H = 8
G = 8
K = 64
WIDE = 128              # the other head width that bf16 is timed with
TOLERANCE = 1e-4
BF16_TOLERANCE = 2e-2


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
    q, k, v, gradient = (torch.from_dlpack(a) for a in (q, k, v, do))
    leaves = [a.requires_grad_() for a in (q, k, v)]

    def call():
        with sdpa_kernel(getattr(SDPBackend, backend)):
            o = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        return o, lambda: torch.autograd.grad(o, leaves, gradient, retain_graph=True)
    return call


def ours_bf16(q, k, v, do, plan):
    """Of arrays of uint16; the results too."""
    scale = q.shape[-1] ** -0.5
    o, lse = attention_bf16.batch_forward(q, k, v, plan, scale)
    return o, lambda: attention_bf16.batch_backward(q, k, v, o, do, lse, plan, scale)


def pytorch_bf16(backend, *arrays):
    """The same by PyTorch: its tensors are the same memory."""
    import torch
    return pytorch(backend, *(torch.from_dlpack(a.view(np.int16)).view(torch.bfloat16) for a in arrays))


def both(call):
    """The output and the gradients; those in bf16 as float32."""
    o, backward = call()
    return [as_float(a) for a in (o, *backward())]


def as_float(a):
    if hasattr(a, "float"):                     # PyTorch's
        return a.float()
    return array_module(a).asarray(from_bf16(a.get())) if a.dtype == np.uint16 else a


def installed_torch():
    try:
        import torch  # noqa: F401
    except ImportError:
        print("PyTorch: not installed, skipped")
        return False
    return True


def time_on(report, T):
    cupy = report.cupy
    q, k, v, do = arrays = drawn(cupy, T, K)
    plan = attention.batch_plan(cupy, q.shape, k.shape, True)
    with_torch = installed_torch()
    peers = {"minilm": functools.partial(ours, *arrays, plan), "plain CuPy": functools.partial(plain, *arrays)}
    if with_torch:
        peers |= {f"torch, {backend.lower()}": pytorch(backend, *arrays) for backend in ("EFFICIENT_ATTENTION", "MATH")}
    compare(report, f"T = {T}", peers, TOLERANCE, T, traffic(T))
    if int(cupy.cuda.Device().compute_capability) < 80:
        print("\nbf16: needs a device of sm_80 or later")
        return
    peak = measuring.product_rate(cupy, np.float16)
    for width, words in ((K, ""), (WIDE, f", K = {WIDE}")):
        bits = [cupy.asarray(to_bf16(a.get())) for a in (arrays if width == K else drawn(cupy, T, width))]
        peers = {"minilm, bf16": functools.partial(ours_bf16, *bits, plan)}
        if with_torch:
            peers |= {f"torch, bf16, {backend.lower()}": pytorch_bf16(backend, *bits)
                      for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")}
        compare(report, f"T = {T}{words}, bf16 (the share is of a product in float16)", peers, BF16_TOLERANCE, T,
                peak=peak, width=width)


def drawn(cupy, T, width):
    """Random q, k, v and the gradient of the output, (B,heads,T,width) in float32."""
    rng = cupy.random.default_rng(0)
    return [rng.standard_normal((B, heads, T, width), dtype=np.float32) for heads in (H, G, G, H)]


def compare(report, title, peers, tolerance, T, moved=None, peak=None, width=None):
    """Tables of those {name: call} that agree, forward and backward."""
    with report.attempt(title):
        peers = measuring.those_that_agree(report.cupy, peers, both, tolerance)
        products = operations(T, K=width or K)
        report.compare(f"{title}, forward", peers, lambda call: call, moved and moved["forward"][0],
                       products["forward"], peak)
        report.compare(f"{title}, backward", peers, lambda call: call()[1], moved and moved["backward"][0],
                       products["backward"], peak)


def operations(T, B=B, H=H, K=K):
    """Floating-point operations of the products over the causal half: two forward, five backward."""
    product = 2 * B * H * K * T * (T + 1) // 2
    return {"forward": 2 * product, "backward": 5 * product}


def main():
    return measuring.main(__doc__.partition("\n")[0], "--lengths", "128,256,512,1024,2048,4096,8192", print_traffic,
                          time_on, "attention,attention_bf16,decode")


if __name__ == "__main__":
    sys.exit(main_guard(main))
