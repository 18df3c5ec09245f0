"""The transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    x = embedding[tokens]
    for each block:   x += attention(rms_norm(x));   x += swiglu(rms_norm(x))
    logits = rms_norm(x) unembedding^T

the architecture of Llama (Touvron et al. 2023, arXiv:2302.13971), without biases.
"""

import dataclasses
import functools

import numpy as np

from minilm import layers, ops
from minilm.backend import array_module, is_cupy, to_device, to_numpy
from minilm.packing import first_tokens, packed_attention, rectangle, smeared_keys, scatter
from minilm.tensor import Tensor, activation_checkpoint


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a Transformer. Raises ValueError when the numbers do not fit together."""

    vocab_size: int = 512
    width: int = 64                 # D
    layers: int = 2                 # L
    heads: int = 4                  # H
    kv_heads: int | None = None     # G, key/value heads; None: one for each query head
    head_width: int | None = None   # K; None: width / heads
    ffn_width: int | None = None    # F; None: 8/3 of the width, rounded up to a multiple of 8
    context: int = 256              # the longest sequence accepted, in tokens
    causal: bool = True             # False: every position sees every other (an encoder)
    tied: bool = False              # the unembedding is the embedding
    key_smear: bool = False         # mix each key with the one before (layers.smear): not in Llama
    rope_base: float = 10000.0
    rope_pairing: str = "half"      # or "interleaved"; see layers.rope
    norm_eps: float = 1e-6

    def __post_init__(self):
        def default(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        default("kv_heads", self.heads)
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"Config: {name} is {getattr(self, name)}; it must be at least 1")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"Config: width {self.width} is not a multiple of heads {self.heads}; "
                             "change one, or give head_width")
        default("head_width", self.width // self.heads)
        default("ffn_width", -(-8 * self.width // 24) * 8)
        for name in ("head_width", "ffn_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"Config: {name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"Config: kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.head_width % 2:
            raise ValueError(f"Config: head_width {self.head_width} is odd; rotary positions rotate pairs")
        if self.rope_pairing not in ("half", "interleaved"):
            raise ValueError(f"Config: rope_pairing is {self.rope_pairing!r}; 'half' or 'interleaved'")


class Transformer:
    """A language model: tokens (B,T) to logits (B,T,V).

    Weights start as N(0, 1/fan_in), those that write into the residual stream divided by
    sqrt(2L) more, so that the stream does not grow with depth; the embedding as N(0,1) and
    the unembedding ten times smaller than fan-in, so that the first predictions are near
    uniform (tied, both are N(0, 1/D)).

    activation_checkpointing: set it to True to keep no more of a block than its input (tensor.recomputed). Training then
    takes about a third more time; of what lies between forward and backward, one block at a time is whole.
    """

    def __init__(self, config, rng, dtype=np.float32):
        self.config, self.activation_checkpointing = config, False
        c = config
        self._parameters = {}

        def weight(name, *shape, scale):
            self._parameters[name] = Tensor((rng.normal(size=shape) * scale).astype(dtype), requires_grad=True)

        def norm(name):
            self._parameters[name] = Tensor(np.ones(c.width, dtype), requires_grad=True)

        fan_in, residual = c.width ** -0.5, (2 * c.layers) ** -0.5
        heads_width, kv_width = c.heads * c.head_width, c.kv_heads * c.head_width
        weight("embedding", c.vocab_size, c.width, scale=fan_in if c.tied else 1.0)
        for i in range(c.layers):
            norm(f"blocks.{i}.attention_norm")
            weight(f"blocks.{i}.qkv", c.width, heads_width + 2 * kv_width, scale=fan_in)
            if c.key_smear:
                weight(f"blocks.{i}.key_smear", c.kv_heads, c.head_width, scale=0.0)
            weight(f"blocks.{i}.attention_out", heads_width, c.width, scale=heads_width ** -0.5 * residual)
            norm(f"blocks.{i}.ffn_norm")
            weight(f"blocks.{i}.gate_up", c.width, 2 * c.ffn_width, scale=fan_in)
            weight(f"blocks.{i}.ffn_out", c.ffn_width, c.width, scale=c.ffn_width ** -0.5 * residual)
        norm("final_norm")
        if not c.tied:
            weight("unembedding", c.vocab_size, c.width, scale=0.1 * fan_in)

    def parameters(self):
        """Every trained Tensor by name, in a fixed order."""
        return dict(self._parameters)

    @property
    def unembedding(self):
        """(V,D): the output matrix, which is the embedding itself when tied."""
        return self._parameters["embedding" if self.config.tied else "unembedding"]

    @property
    def dtype(self):
        return self._parameters["embedding"].dtype

    def to_device(self, device):
        """Move the parameters to "cpu" or "gpu", in place; returns self. Make the optimiser after."""
        for p in self._parameters.values():
            p.data, p.grad, p.grad_buffer = to_device(p.data, device), None, None
        return self

    def over(self, parameters):
        """The same Transformer over other Tensors: a mapping like the one parameters() returns."""
        other = object.__new__(type(self))
        other.config, other.activation_checkpointing, other._parameters = self.config, self.activation_checkpointing, dict(parameters)
        return other

    def copy(self):
        """A Transformer of its own with the same weights (a reference policy, say)."""
        return self.over({name: Tensor(p.data.copy(), requires_grad=True) for name, p in self._parameters.items()})

    def hidden(self, tokens, key_mask=None):
        """Final hidden states, normalised: tokens (B,T) integers -> (B,T,D).

        key_mask (B,T): 0 on padding, which nobody may attend to. Padding on the right of a
        causal model needs none: what comes later is never seen. Padding on the left does.
        Rotary attention depends on distances alone, so left padding does not shift anything.
        Raises IndexError for a token outside the vocabulary, ValueError past the context.
        """
        c, p = self.config, self._parameters
        xp, tokens = array_module(p["embedding"].data), to_numpy(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers of shape (B,T); got {tokens.dtype} {tokens.shape}")
        B, T = tokens.shape
        if T > c.context:
            raise ValueError(f"{T} tokens do not fit the context of {c.context}; "
                             "shorten the prompt, or use a model with a longer context")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < c.vocab_size:
            raise IndexError(f"token {int(tokens.max() if tokens.min() >= 0 else tokens.min())} is not in the "
                             f"vocabulary of {c.vocab_size}; was it made with another tokenizer?")
        if key_mask is None and c.causal and T:
            # Without padding a batch is a Pack of B segments: the same numbers, one path.
            return self.packed_hidden(rectangle(tokens)).reshape(B, T, c.width)
        cos, sin = layers.rope_tables(xp.arange(T), c.head_width, c.rope_base, self.dtype)
        key_mask = None if key_mask is None else xp.asarray(key_mask)
        return self._blocks(tokens, lambda i, qkv: self._padded_attention(i, qkv, cos, sin, key_mask))

    def packed_hidden(self, pack):
        """Final hidden states (N,D) of the row of tokens of a packing.Pack. Raises as hidden does."""
        c, p = self.config, self._parameters
        if not c.causal:
            raise ValueError("a bidirectional model cannot share a prompt between responses: it would see them")
        if (longest := int(pack.positions.max(initial=-1)) + 1) > c.context:
            raise ValueError(f"{longest} tokens do not fit the context of {c.context}; "
                             "shorten them, or use a model with a longer context")
        positions = array_module(p["embedding"].data).asarray(pack.positions)
        cos, sin = layers.rope_tables(positions, c.head_width, c.rope_base, self.dtype)
        shape = {"heads": c.heads, "kv_heads": c.kv_heads, "pairing": c.rope_pairing}
        if not is_cupy(positions):
            turn, groups = cos + 1j * sin, pack.groups()

            def attend(i, qkv):
                return packed_attention(qkv, p.get(f"blocks.{i}.key_smear"), turn=turn, groups=groups, **shape)
        else:
            plan, before = layers.on_gpu.segment_plan(pack.segments, positions), first_tokens(pack.segments, positions)

            def attend(i, qkv):
                if c.key_smear:
                    qkv = smeared_keys(qkv, p[f"blocks.{i}.key_smear"], *before, c.heads, c.kv_heads)
                return layers.segment_attention(qkv, cos, sin, plan=plan, **shape)
        return self._blocks(pack.tokens, attend)

    def response_log_probs(self, pack, temperature=1.0):
        """log pi of every response token of a packing.Pack, (B,R) as its mask, 0 outside it.

        Prompts are computed once, and logits only where a response token is predicted.
        """
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; log-probs are of a temperature above 0")
        hidden = ops.embed(self.packed_hidden(pack), pack.rows)
        if temperature != 1.0:
            hidden = hidden * (1.0 / temperature)
        return scatter(layers.token_log_probs(hidden, self.unembedding, pack.targets), pack.mask)

    def _blocks(self, tokens, attend):
        """attend(layer, qkv) mixes what the tokens hold; all the rest is done token by token."""
        c, p = self.config, self._parameters

        def block(i, x):
            qkv = layers.rms_norm(x, p[f"blocks.{i}.attention_norm"], eps=c.norm_eps) @ p[f"blocks.{i}.qkv"]
            x = x + attend(i, qkv) @ p[f"blocks.{i}.attention_out"]
            h = layers.rms_norm(x, p[f"blocks.{i}.ffn_norm"], eps=c.norm_eps)
            return x + layers.swiglu(h @ p[f"blocks.{i}.gate_up"]) @ p[f"blocks.{i}.ffn_out"]

        x = ops.embed(p["embedding"], tokens)
        for i in range(c.layers):
            x = activation_checkpoint(functools.partial(block, i), x) if self.activation_checkpointing else block(i, x)
        return layers.rms_norm(x, p["final_norm"], eps=c.norm_eps)

    def _padded_attention(self, i, qkv, cos, sin, key_mask):
        c, (B, T, _) = self.config, qkv.shape
        q, k, v = self._heads(qkv)
        if c.key_smear:
            k = self._smeared(i, k, key_mask)
        q = layers.rope(q, cos, sin, pairing=c.rope_pairing)
        k = layers.rope(k, cos, sin, pairing=c.rope_pairing)
        mixed = layers.attention(q, k, v, causal=c.causal, key_mask=key_mask)             # (B,H,T,K)
        return ops.transpose(mixed, axes=(0, 2, 1, 3)).reshape(B, T, c.heads * c.head_width)

    def _heads(self, qkv):
        """(B,T,(H+2G)K) -> q (B,H,T,K), k and v (B,G,T,K)"""
        c, (B, T, _) = self.config, qkv.shape
        heads = ops.transpose(qkv.reshape(B, T, c.heads + 2 * c.kv_heads, c.head_width), axes=(0, 2, 1, 3))
        return (heads[:, :c.heads], heads[:, c.heads:c.heads + c.kv_heads], heads[:, c.heads + c.kv_heads:])

    def _smeared(self, i, k, key_mask):
        xp, (B, G, _, K) = array_module(k.data), k.shape
        if key_mask is not None:          # padding is no predecessor: as if nothing stood there
            k = ops.where(xp.asarray(key_mask)[:, None, :, None].astype(bool), k, 0.0)
        return layers.smear(k, self._parameters[f"blocks.{i}.key_smear"], xp.zeros((B, G, K), self.dtype))

    def __call__(self, tokens, key_mask=None):
        """Logits (B,T,V); those at position t score token t+1."""
        return self.hidden(tokens, key_mask) @ self.unembedding.T

    def log_probs(self, tokens, temperature=1.0):
        """log pi(token t+1 | tokens up to t), tokens (B,T) -> (B,T-1), at a sampling temperature.

        This is where the shift by one is done, once for everybody. Dividing the hidden states
        by the temperature divides the logits by it.
        """
        if not self.config.causal:
            raise ValueError("a bidirectional model has seen the token that it would predict; "
                             "see stages/masked_pretraining.py")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; log-probs are of a temperature above 0")
        tokens = to_numpy(tokens)
        hidden = self.hidden(tokens[:, :-1])
        if temperature != 1.0:
            hidden = hidden * (1.0 / temperature)
        return layers.token_log_probs(hidden, self.unembedding, tokens[:, 1:])


class RewardModel:
    """A Transformer whose last hidden state is projected to one number: r(prompt, response).

    The body is the given Transformer (its unembedding goes unused), the head starts small.
    """

    def __init__(self, transformer, rng):
        self.transformer = transformer
        width = transformer.config.width
        self.head = Tensor((rng.normal(size=(width, 1)) * 0.1 * width ** -0.5).astype(transformer.dtype),
                           requires_grad=True)

    def parameters(self):
        """The Transformer's, less an unembedding of its own, and the head."""
        body = {name: p for name, p in self.transformer.parameters().items() if name != "unembedding"}
        return {**body, "reward_head": self.head}

    def to_device(self, device):
        """As Transformer.to_device."""
        self.transformer.to_device(device)
        self.head.data, self.head.grad, self.head.grad_buffer = to_device(self.head.data, device), None, None
        return self

    def over(self, parameters):
        """The same RewardModel over other Tensors: a mapping like the one parameters() returns."""
        other, body = object.__new__(type(self)), dict(parameters)
        other.head = body.pop("reward_head")
        other.transformer = self.transformer.over(body)
        return other

    def rewards(self, tokens, mask):
        """One reward per sequence, (B,), read at its last real token.

        tokens (B,T); mask (B,T) is 1 on real tokens (prompt, response and EOS), 0 on padding,
        which may be on either side. Raises ValueError for a sequence of padding alone.
        """
        mask, tokens = array_module(self.head.data).asarray(mask).astype(bool), to_numpy(tokens)
        if mask.shape != tokens.shape:
            raise ValueError(f"mask {mask.shape} and tokens {tokens.shape} must have one shape")
        if not mask.any(axis=1).all():
            raise ValueError(f"row {int((~mask.any(axis=1)).argmax())} is all padding: nothing to reward")
        B, T = mask.shape
        last = T - 1 - mask[:, ::-1].argmax(axis=1)
        hidden = self.transformer.hidden(tokens, key_mask=mask)
        rows = array_module(mask).arange(B) * T + last
        return (ops.embed(hidden.reshape(B * T, hidden.shape[-1]), rows) @ self.head).reshape(-1)

    def packed_rewards(self, pack):
        """The same, (B,), of the dialogues of a packing.Pack made with last=True."""
        return (ops.embed(self.transformer.packed_hidden(pack), pack.last) @ self.head).reshape(-1)
