"""The sizes of a Transformer, and the shapes of its parameters.

Tests: tests/test_model.py.
"""

from __future__ import annotations

import dataclasses

from minilm import checks


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a Transformer. Raises ValueError when they do not fit together, TypeError for another type."""

    vocab_size: int = 512
    width: int = 64                 # D
    layers: int = 2                 # L
    heads: int = 4                  # H
    kv_heads: int | None = None     # G, key/value heads; None: one for each query head
    head_width: int | None = None   # K here and in layers.py, dh in plain.py; None: width / heads
    ffn_width: int | None = None    # F; None: 8/3 of the width, rounded up to a multiple of 8
    context: int = 256              # the longest sequence, in tokens
    causal: bool = True             # False: every position sees all others (an encoder)
    tied: bool = False              # the unembedding is the embedding
    key_smear: bool = False         # mix each key with the previous one (rotary.smear); Llama does not
    rope_base: float = 10000.0
    rope_pairing: str = "half"      # or "interleaved"; see rotary.rope
    norm_eps: float = 1e-6

    def __post_init__(self):
        def default(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        def sizes(*names):
            for name in names:
                object.__setattr__(self, name, checks.integer("Config", name, getattr(self, name), at_least=1))

        default("kv_heads", self.heads)
        sizes("vocab_size", "width", "layers", "heads", "kv_heads", "context")
        checks.number("Config", "rope_base", self.rope_base, above=0)
        checks.number("Config", "norm_eps", self.norm_eps, at_least=0)
        for name in ("causal", "tied", "key_smear"):
            checks.flag("Config", name, getattr(self, name))
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"Config: width {self.width} is not a multiple of heads {self.heads}; give head_width")
        default("head_width", self.width // self.heads)
        default("ffn_width", -(-8 * self.width // 24) * 8)
        sizes("head_width", "ffn_width")
        if self.heads % self.kv_heads:
            raise ValueError(f"Config: kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.head_width % 2:
            raise ValueError(f"Config: head_width {self.head_width} is odd; rotary positions rotate pairs")
        checks.choice("Config", "rope_pairing", self.rope_pairing, ("half", "interleaved"))

    @property
    def widths(self):
        """(H K, G K, F): how many numbers the queries and the keys of a token have, and its feed-forward network."""
        return self.heads * self.head_width, self.kv_heads * self.head_width, self.ffn_width


def matrix_widths(config: Config, name: str) -> list[int]:
    """The output widths of the matrices that a weight of a block joins: of queries, keys and values in `qkv`."""
    queries, keys, F = config.widths
    kind = name.rpartition(".")[2]
    return {"qkv": [queries, keys, keys], "gate_up": [F, F]}.get(kind, [config.width])


def parameter_starts(config: Config) -> dict[str, tuple[tuple[int, ...], float | None]]:
    """{name of a parameter: (shape, standard deviation of its start, or None for ones)}, in the order of
    Transformer.parameters()."""
    D = config.width
    queries, keys, F = config.widths
    std = D ** -0.5                             # 1 / sqrt(fan_in)
    residual = (2 * config.layers) ** -0.5
    starts: dict = {"embedding": ((config.vocab_size, D), std if config.tied else 1.0)}
    for i in range(config.layers):
        starts[f"blocks.{i}.attention_norm"] = (D,), None
        starts[f"blocks.{i}.qkv"] = (D, queries + 2 * keys), std
        if config.key_smear:
            starts[f"blocks.{i}.key_smear"] = (config.kv_heads, config.head_width), 0.0
        starts[f"blocks.{i}.attention_out"] = (queries, D), queries ** -0.5 * residual
        starts[f"blocks.{i}.ffn_norm"] = (D,), None
        starts[f"blocks.{i}.gate_up"] = (D, 2 * F), std
        starts[f"blocks.{i}.ffn_out"] = (F, D), F ** -0.5 * residual
    starts["final_norm"] = (D,), None
    if not config.tied:
        starts["unembedding"] = (config.vocab_size, D), 0.1 * std
    return starts
