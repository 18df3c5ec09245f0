"""minilm's transformer in plain, idiomatic PyTorch: the peer of the benchmarks.

The same weights under the same names, in PyTorch's layout (out, in); fused attention and fused RMSNorm.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        heads = c["heads"] + 2 * c["kv_heads"]
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(c["width"], eps=c["norm_eps"]) for _ in range(2))
        self.qkv = nn.Linear(c["width"], heads * c["head_width"], bias=False)
        self.attention_out = nn.Linear(c["heads"] * c["head_width"], c["width"], bias=False)
        self.gate_up = nn.Linear(c["width"], 2 * c["ffn_width"], bias=False)
        self.ffn_out = nn.Linear(c["ffn_width"], c["width"], bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        H = self.c["heads"]
        G = self.c["kv_heads"]
        qkv = self.qkv(self.attention_norm(x)).view(B, T, H + 2 * G, -1).transpose(1, 2)
        q, k, v = qkv.split([H, G, G], dim=1)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=G != H)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.ffn_out(F.silu(gate) * up)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Llama(nn.Module):
    """config: a dictionary of the fields of minilm.model.Config."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.embedding = nn.Embedding(c["vocab_size"], c["width"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["layers"]))
        self.final_norm = nn.RMSNorm(c["width"], eps=c["norm_eps"])
        self.unembedding = nn.Linear(c["width"], c["vocab_size"], bias=False)
        frequencies = c["rope_base"] ** (-torch.arange(0, c["head_width"], 2, dtype=torch.float64) / c["head_width"])
        angles = torch.outer(torch.arange(c["context"], dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float())
        self.register_buffer("sin", angles.sin().float())

    def load(self, weights):
        """Copy weights, arrays by minilm's names, into the model."""
        for name, p in self.named_parameters():
            array = torch.from_numpy(weights[name.removesuffix(".weight")])
            with torch.no_grad():
                p.copy_(array.T if transposed(name) else array)
        return self

    def gradients(self):
        """The gradients by minilm's names and in its layout."""
        return {name.removesuffix(".weight"): (p.grad.T if transposed(name) else p.grad).cpu().numpy()
                for name, p in self.named_parameters()}

    def forward(self, tokens, caches=None):
        start = caches[0].length if caches else 0
        cos = self.cos[start:start + tokens.shape[1]]
        sin = self.sin[start:start + tokens.shape[1]]
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, caches[i] if caches else None)
        return self.unembedding(self.final_norm(x if caches is None else x[:, -1:]))

    def loss(self, tokens):
        """The mean cross-entropy of every next token."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def transposed(name):
    return name.removesuffix(".weight").rpartition(".")[2] in ("qkv", "attention_out", "gate_up", "ffn_out")
