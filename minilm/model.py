"""The transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    x = embedding[tokens]
    for each block:   x += attention(rms_norm(x));   x += swiglu(rms_norm(x))
    logits = rms_norm(x) unembedding^T

the architecture of Llama (Touvron et al. 2023, arXiv:2302.13971), without biases. plain.py has the same model in one
file; its numbers are the definition.
One function computes the blocks, hidden_states. Its argument `attend` mixes the tokens that see each other (rotations
and key smearing included): a rectangle of sequences or the segments of a pack (fast/packed_attention.py), a padded
rectangle (padded_attention.py), or a new token and a cache (fast/cached_decoding.py).
Tests: tests/test_model.py, tests/test_plain.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from minilm import checks, layers, mixed_precision, ops
from minilm.backend import array_module, to_device, to_numpy
from minilm.config import Config, parameter_starts
from minilm.fast.activation_checkpointing import activation_checkpoint
from minilm.fast.packed_attention import attend_to_segments, rectangle_segments
from minilm.packing import Pack, scatter
from minilm.padded_attention import attend_to_padded
from minilm.tensor import Tensor


def linear(x: Tensor, weight: Any) -> Tensor:
    """x W.  x (..,in), W (in,out); an adapted weight (lora.py) is a function of x."""
    return weight(x) if callable(weight) else x @ weight


def block(parameters: dict, i: int, x: Tensor, attend: Callable, eps: float) -> Tensor:
    """Layer i: x (..,D) -> (..,D). attend(i, qkv) mixes the tokens; everything else is computed token by token."""
    p = f"blocks.{i}."
    h = layers.rms_norm(x, parameters[p + "attention_norm"], eps=eps)
    qkv = linear(h, parameters[p + "qkv"])                                                      # (..,(H+2G)K)
    x = x + linear(attend(i, qkv), parameters[p + "attention_out"])
    h = layers.rms_norm(x, parameters[p + "ffn_norm"], eps=eps)
    return x + linear(layers.swiglu(linear(h, parameters[p + "gate_up"])), parameters[p + "ffn_out"])


def hidden_states(parameters: dict, config: Config, tokens: np.ndarray, attend: Callable,
                  checkpointing: bool = False) -> Tensor:
    """Final hidden states, normalised: tokens (..) integers -> (..,D).

    attend(i, qkv): from queries, keys and values (..,(H+2G)K) of layer i to the mixed values (..,H K).
    """
    layer = functools.partial(block, parameters, attend=attend, eps=config.norm_eps)
    return after_blocks(parameters, config, ops.embed(parameters["embedding"], tokens), layer, checkpointing)


def after_blocks(parameters: dict, config: Config, x: Any, layer: Callable, checkpointing: bool = False) -> Tensor:
    """hidden_states from the embedded tokens x (..,D), through layer(i, x): block, or one of mixed_precision."""
    for i in range(config.layers):
        x = activation_checkpoint(functools.partial(layer, i), x) if checkpointing else layer(i, x)
    return layers.rms_norm(x, parameters["final_norm"], eps=config.norm_eps)


class Transformer:
    """A language model: tokens (B,T) to logits (B,T,V).

    Weights start as N(0, 1/fan_in), with fan_in the number of inputs. Weights that write into the residual stream are
    divided by sqrt(2L) more (L layers), so that the stream does not grow with depth. The embedding starts as N(0,1),
    and the unembedding with standard deviation 0.1 / sqrt(D), so that the first predictions are near uniform (tied,
    both are N(0, 1/D)). key_smear starts at 0: half of each key is the previous one.

    activation_checkpointing: set it to True to keep only each block's input between forward and backward
    (fast/activation_checkpointing.py): less memory, more time.
    compute: "float32", or "bfloat16" or "tensorfloat32" after to_device("gpu", compute=...) (mixed_precision.py).
    """

    compute = "float32"

    def __init__(self, config: Config, rng: np.random.Generator, dtype: np.dtype | type = np.float32):
        if not isinstance(config, Config):
            raise TypeError(f"Transformer: config is {checks.shown(config)}; it must be a Config")
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise TypeError(f"Transformer: dtype is {dtype!r}; it must be float32 or float64")
        self.config = config
        self.activation_checkpointing = False
        self._parameters = _fresh_parameters(config, checks.generator("Transformer", rng), dtype)

    @staticmethod
    def shapes(config: Config) -> dict[str, tuple[int, ...]]:
        """{name of a parameter: its shape}, in the order of parameters()."""
        return {name: shape for name, (shape, _) in parameter_starts(config).items()}

    @classmethod
    def of(cls, config: Config, weights: dict[str, np.ndarray]) -> Transformer:
        """A Transformer of these weights, {name: array}, which it keeps: nothing is drawn and nothing copied. The body
        of a RewardModel needs no unembedding.

        Raises ValueError for names or shapes that are not those of shapes(config), TypeError for several dtypes or
        others than float32 and float64.
        """
        shapes = {name: shape for name, shape in cls.shapes(config).items() if name != "unembedding" or name in weights}
        found = {name: weight.shape for name, weight in weights.items()}
        if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
            name = wrong[0]
            raise ValueError(f"Transformer.of: the weight '{name}' is {found.get(name, 'missing')}; this Config has "
                             f"{shapes.get(name, 'none of this name')}")
        if {weight.dtype for weight in weights.values()} not in ({np.dtype("float32")}, {np.dtype("float64")}):
            raise TypeError("Transformer.of: the weights must all be float32, or all float64")
        model = object.__new__(cls)
        model.config = config
        model.activation_checkpointing = False
        model._parameters = {name: Tensor(weights[name], requires_grad=True) for name in shapes}
        return model

    def parameters(self) -> dict[str, Tensor]:
        """Every trained Tensor by name, in a fixed order."""
        return dict(self._parameters)

    @property
    def unembedding(self) -> Tensor:
        """(V,D): the output matrix, which is the embedding itself when tied."""
        return self._parameters["embedding" if self.config.tied else "unembedding"]

    @property
    def dtype(self):
        return self._parameters["embedding"].dtype

    def to_device(self, device: str, compute: str = "float32") -> Transformer:
        """Move the parameters to "cpu" or "gpu", in place; returns self. Make the optimiser afterwards.

        compute: "bfloat16" for mixed precision on a GPU, "tensorfloat32" for products of TF32. Raises ValueError where
        it cannot be had, with the reason.
        """
        mixed_precision.check(self.config, self.dtype, device, compute)
        for p in self._parameters.values():
            move_parameter(p, device)
        self.compute = compute
        return self

    def over(self, parameters: dict[str, Tensor]) -> Transformer:
        """The same Transformer over other Tensors: a mapping like the one that parameters() returns.

        Raises ValueError for other names or shapes. A RewardModel needs no unembedding.
        """
        shapes = {name: p.shape for name, p in self._parameters.items()}
        if wrong := [name for name, p in parameters.items() if shapes.get(name) != p.shape]:
            raise ValueError(f"over: the parameter '{wrong[0]}' is unknown here, or of another shape")
        other = object.__new__(type(self))
        other.config = self.config
        other.activation_checkpointing = self.activation_checkpointing
        other.compute = self.compute
        other._parameters = dict(parameters)
        return other

    def merged(self) -> Transformer:
        """A plain model of the same function: itself. An adapted one (lora.py) is merged into a plain one."""
        return self

    def decoding_weights(self) -> dict[str, Any]:
        """{name: array} for fast/cached_decoding.py, with the unembedding also when tied. In mixed precision they are
        bf16 copies, and do not change with the parameters."""
        if self.compute == "bfloat16":
            return mixed_precision.decoding_weights(self._parameters, self.unembedding)
        return {"unembedding": self.unembedding.data, **{name: p.data for name, p in self._parameters.items()}}

    def copy(self) -> Transformer:
        """A Transformer with copies of the same weights, frozen where these are (for example a reference policy)."""
        return self.over({name: Tensor(p.data.copy(), p.requires_grad) for name, p in self.parameters().items()})

    def __call__(self, tokens, key_mask=None) -> Tensor:
        """Logits (B,T,V). The logits at position t are about token t+1."""
        hidden = self.hidden(tokens, key_mask)
        if self.compute != "float32":
            return mixed_precision.logits(hidden, self.unembedding, self.compute)
        return hidden @ self.unembedding.T

    def log_probs(self, tokens: np.ndarray, temperature: float = 1.0) -> Tensor:
        """log pi(token t+1 | tokens up to t), tokens (B,T) -> (B,T-1), at a sampling temperature.

        The shift by one token happens here. Dividing the hidden states by the temperature divides the logits by it.
        Raises ValueError for a bidirectional model or a temperature outside checks.TEMPERATURES, and as hidden does.
        """
        if not self.config.causal:
            raise ValueError("a bidirectional model has seen the token that it would predict; mask the token in the "
                             "input and score it with layers.token_log_probs")
        checks.temperature("log_probs", temperature)
        tokens = _rectangle(tokens)
        hidden = _at_temperature(self.hidden(tokens[:, :-1]), temperature)
        return self._token_log_probs(hidden, tokens[:, 1:])

    def response_log_probs(self, pack: Pack, temperature: float = 1.0) -> Tensor:
        """log pi of every response token of a packing.Pack (N tokens, M response tokens, R in the longest response):
        (B,R) like its mask, 0 outside it.

        The hidden states of a prompt are computed once, and logits only where a response token is predicted.
        """
        checks.temperature("response_log_probs", temperature)
        hidden = self.packed_hidden(pack)                                                           # (N,D)
        hidden = _at_temperature(ops.embed(hidden, pack.rows), temperature)                         # (M,D)
        return scatter(self._token_log_probs(hidden, pack.targets), pack.mask)

    def _token_log_probs(self, hidden, targets):
        if self.compute != "float32":
            return mixed_precision.token_log_probs(hidden, self.unembedding, targets, self.compute)
        return layers.token_log_probs(hidden, self.unembedding, targets,
                                      train_unembedding=self.unembedding.requires_grad)

    def hidden(self, tokens: np.ndarray, key_mask: np.ndarray | None = None) -> Tensor:
        """Final hidden states, normalised: tokens (B,T) integers -> (B,T,D).

        key_mask (B,T): 0 on padding, which no token attends to. Padding on the right of a causal model needs none,
        because no token sees later ones. Padding on the left does. Rotary attention depends on distances alone, so
        left padding does not shift anything.
        Raises IndexError for a token outside the vocabulary, ValueError for more tokens than the context, and for a
        key_mask of another shape, or of other values than 0 and 1.
        """
        c = self.config
        tokens = self.checked_tokens(tokens)
        key_mask = None if key_mask is None else to_numpy(checks.mask("hidden", key_mask, tokens.shape, "key_mask"))
        B, T = tokens.shape
        if key_mask is None and c.causal and T:
            # One node of the graph from qkv to the mixed values instead of about ten (gain: scripts/bench/tricks.py).
            return self._hidden_of_segments(tokens, rectangle_segments(B, T), np.tile(np.arange(T), B))
        if self.compute == "bfloat16" and T:
            key_mask = np.ones((B, T)) if key_mask is None else key_mask
            positions = self._on_device(np.tile(np.arange(T), B))
            return self._through(mixed_precision.layers_of_padded(c, self._parameters, key_mask, positions), tokens)
        attend = attend_to_padded(c, self._parameters, T, key_mask)
        return hidden_states(self._linear_parameters(), c, tokens, attend, self.activation_checkpointing)

    def _hidden_of_segments(self, tokens, segments, positions):
        """hidden_states of tokens that are segments of one row, in the precision of self.compute."""
        c, positions = self.config, self._on_device(positions)
        if self.compute != "bfloat16":
            attend = attend_to_segments(c, self._parameters, segments, positions)
            return hidden_states(self._linear_parameters(), c, tokens, attend, self.activation_checkpointing)
        return self._through(mixed_precision.layers_of_segments(c, self._parameters, segments, positions), tokens)

    def _linear_parameters(self):
        """The parameters for block, whose products with them are those of self.compute."""
        return mixed_precision.with_tf32(self._parameters) if self.compute == "tensorfloat32" else self._parameters

    def _through(self, layer, tokens):
        """Final hidden states of tokens whose embeddings go through layer(i, x)."""
        embedded = ops.embed(self._parameters["embedding"], tokens)
        return after_blocks(self._parameters, self.config, embedded, layer, self.activation_checkpointing)

    def checked_tokens(self, tokens: np.ndarray | list) -> np.ndarray:
        """tokens as a NumPy array. Raises as hidden does."""
        tokens = _rectangle(tokens)
        self._check_length(tokens.shape[1])
        return checks.token_ids("hidden", "tokens", tokens, self.config.vocab_size)

    def packed_hidden(self, pack: Pack) -> Tensor:
        """Final hidden states (N,D) of the row of tokens of a packing.Pack. Raises as hidden does."""
        if not self.config.causal:
            raise ValueError("a bidirectional model cannot share a prompt between responses: the prompt would see them")
        self._check_length(int(pack.positions.max(initial=-1)) + 1)
        return self._hidden_of_segments(pack.tokens, pack.segments, pack.positions)

    def _on_device(self, array):
        return array_module(self._parameters["embedding"].data).asarray(array)

    def _check_length(self, longest):
        if longest > self.config.context:
            raise ValueError(f"{longest} tokens do not fit the context of {self.config.context}; "
                             "shorten the prompt, or use a model with a longer context")


class RewardModel:
    """A Transformer with one number per sequence: r(prompt, response), a projection of the last hidden state.

    The body is the given Transformer (its unembedding is not used); the head starts small.
    """

    def __init__(self, transformer: Transformer, rng: np.random.Generator):
        if not isinstance(transformer, Transformer):
            raise TypeError(f"RewardModel: transformer is {checks.shown(transformer)}; it must be a Transformer")
        self.transformer = transformer
        D = transformer.config.width
        checks.generator("RewardModel", rng)
        self.head = Tensor((rng.normal(size=(D, 1)) * 0.1 * D ** -0.5).astype(transformer.dtype), requires_grad=True)

    @classmethod
    def of(cls, transformer: Transformer, head: np.ndarray) -> RewardModel:
        """A RewardModel of this body and head (D,1), which it keeps. Raises ValueError for another shape."""
        if head.shape != (transformer.config.width, 1):
            raise ValueError(f"RewardModel.of: head has shape {head.shape}; it must be ({transformer.config.width}, 1)")
        model = object.__new__(cls)
        model.transformer = transformer
        model.head = Tensor(np.ascontiguousarray(head, transformer.dtype), requires_grad=True)
        return model

    def parameters(self) -> dict[str, Tensor]:
        """The Transformer's parameters, without an unembedding of its own, and the head."""
        body = {name: p for name, p in self.transformer.parameters().items() if name != "unembedding"}
        return {**body, "reward_head": self.head}

    def to_device(self, device: str, compute: str = "float32") -> RewardModel:
        """As Transformer.to_device."""
        self.transformer.to_device(device, compute)
        move_parameter(self.head, device)
        return self

    def over(self, parameters: dict[str, Tensor]) -> RewardModel:
        """The same RewardModel over other Tensors: a mapping like the one that parameters() returns."""
        body = dict(parameters)
        other = object.__new__(type(self))
        other.head = body.pop("reward_head")
        other.transformer = self.transformer.over(body)
        return other

    def rewards(self, tokens: np.ndarray, mask: np.ndarray) -> Tensor:
        """One reward per sequence, (B,), read at its last real token.

        tokens (B,T); mask (B,T) is 1 on real tokens (prompt, response and EOS) and 0 on padding, on either side.
        Raises ValueError for a sequence of padding alone.
        """
        tokens = to_numpy(tokens)
        mask = checks.mask("rewards", to_numpy(mask), tokens.shape)
        if not mask.any(axis=1).all():
            raise ValueError(f"row {int((~mask.any(axis=1)).argmax())} is all padding: nothing to reward")
        B, T = mask.shape
        last = T - 1 - mask[:, ::-1].argmax(axis=1)
        hidden = self.transformer.hidden(tokens, key_mask=mask)
        return self._read(hidden.reshape(B * T, hidden.shape[-1]), np.arange(B) * T + last)

    def packed_rewards(self, pack: Pack) -> Tensor:
        """The same, (B,), of the dialogues of a packing.Pack made with last=True. Raises ValueError for another one."""
        if pack.last is None:
            raise ValueError("packed_rewards: the pack lacks the last tokens, where rewards are read; make it with "
                             "pack(..., last=True)")
        return self._read(self.transformer.packed_hidden(pack), pack.last)

    def _read(self, hidden, rows):
        """The rewards at these rows of hidden states (N,D)."""
        return (ops.embed(hidden, rows) @ self.head).reshape(-1)


def move_parameter(p: Tensor, device: str) -> None:
    """Move a leaf to "cpu" or "gpu", in place. Its gradient is dropped."""
    p.data = to_device(p.data, device)
    p.grad = None
    p.grad_buffer = None


def _rectangle(tokens):
    tokens = to_numpy(tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be integers of shape (B,T); got {tokens.dtype} {tokens.shape}")
    return tokens


def _at_temperature(hidden, temperature):
    return hidden if temperature == 1.0 else hidden * (1.0 / temperature)


def _fresh_parameters(c, rng, dtype):
    return {name: Tensor((rng.normal(size=shape) * std).astype(dtype) if std is not None else np.ones(shape, dtype),
                         requires_grad=True) for name, (shape, std) in parameter_starts(c).items()}
