"""How a language model becomes an assistant, on one page.

This file is the definition. Everything else in minilm computes the same numbers, faster, and the tests
compare it with this file (tests/test_plain.py). All of it is written with the elementary operations of
ops.py, and tensor.py computes the gradients. It has no cache, no packing, no processes and no GPU.

    python -m minilm.plain          from random weights to an assistant, on a toy task
    python -m minilm.plain 1        the same with another random seed

Symbols: B sequences, T tokens, V vocabulary, D width, H query heads, G key/value heads, K head width,
F feed-forward width, P prompts, N samples of each prompt. A shape stands behind each line that changes it.
`parameters` is a dict of Tensors, made by model.Transformer; `config` is its model.Config:

    embedding (V,D)      unembedding (V,D) unless tied      final_norm (D)      reward_head (D,1) of a reward model
    of block i, "blocks.i." and    attention_norm (D)  qkv (D,(H+2G)K)  attention_out (HK,D)  key_smear (G,K), optional
                                   ffn_norm (D)        gate_up (D,2F)   ffn_out (F,D)
"""

import numpy as np

from minilm import ops
from minilm.tensor import Tensor, no_grad

Parameters = dict[str, Tensor]


# ------------------------------------------------------------------------------------ the transformer

def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    mean_square = ops.mean(x * x, axis=-1, keepdims=True)                   # (B,T,1)
    return x / ops.sqrt(mean_square + eps) * weight                         # (B,T,D)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up with silu(g) = g sigmoid(g); gate and up are the two halves of the last axis."""
    F = gate_up.shape[-1] // 2
    gate = gate_up[..., :F]                                                 # (B,T,F)
    up = gate_up[..., F:]                                                   # (B,T,F)
    return gate * ops.sigmoid(gate) * up


def rope_tables(positions: np.ndarray, head_width: int, base: float = 10000.0, dtype="float32"):
    """cos and sin of the angle of pair i: position * base^(-2i/K)."""
    frequencies = base ** (-np.arange(0, head_width, 2) / head_width)       # (K/2)
    angles = positions[..., None] * frequencies                             # (T,K/2)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rope(x: Tensor, cos: np.ndarray, sin: np.ndarray, pairing: str = "half") -> Tensor:
    """Rotary positions: rotate each pair (a, b) of the K numbers of a head by the angle of its position."""
    half = x.shape[-1] // 2
    first = slice(0, half) if pairing == "half" else slice(0, None, 2)      # pair i is (i, i + K/2) or (2i, 2i + 1)
    second = slice(half, None) if pairing == "half" else slice(1, None, 2)
    a = x[..., first]                                                       # (B,H,T,K/2)
    b = x[..., second]                                                      # (B,H,T,K/2)
    rotated = [a * cos - b * sin, b * cos + a * sin]
    if pairing == "half":
        return ops.concatenate(rotated, axis=-1)                            # (B,H,T,K)
    pairs = ops.concatenate([y[..., None] for y in rotated], axis=-1)       # (B,H,T,K/2,2)
    return pairs.reshape(*x.shape)                                          # (B,H,T,K)


def smear(k: Tensor, amount: Tensor) -> Tensor:
    """Key smearing, an option that Llama does not have: (1 - a) k_t + a k_{t-1} with a = sigmoid(amount)."""
    a = ops.sigmoid(amount)[:, None]                                        # (G,1,K)
    previous = ops.concatenate([0.0 * k[:, :, :1], k[:, :, :-1]], axis=2)   # (B,G,T,K), zero before the first key
    return (1.0 - a) * k + a * previous


def attention(q: Tensor, k: Tensor, v: Tensor, visible: np.ndarray) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, where query t reads only the keys s with visible[t, s].

    q (B,H,T,K); k, v (B,G,S,K); visible (T,S) or (B,1,T,S). A query that may read no key gets zeros.
    """
    H = q.shape[1]
    K = q.shape[3]
    key_head = [h // (H // k.shape[1]) for h in range(H)]                   # query head h reads this key head
    scores = q @ ops.swapaxes(k[:, key_head], -1, -2) / K ** 0.5            # (B,H,T,S)
    weights = ops.softmax(ops.where(visible, scores, -1e30))                # (B,H,T,S)
    return ops.where(visible, weights, 0.0) @ v[:, key_head]                # (B,H,T,K)


def self_attention(x: Tensor, parameters: Parameters, block: str, config, mask: np.ndarray) -> Tensor:
    """Tokens of a sequence exchange information: (B,T,D) -> (B,T,HK)."""
    B, T, D = x.shape
    H = config.heads
    G = config.kv_heads
    qkv = (x @ parameters[block + "qkv"]).reshape(B, T, H + 2 * G, config.head_width)
    qkv = ops.transpose(qkv, axes=(0, 2, 1, 3))                             # (B,H+2G,T,K)
    q = qkv[:, :H]                                                          # (B,H,T,K)
    k = qkv[:, H:H + G]                                                     # (B,G,T,K)
    v = qkv[:, H + G:]                                                      # (B,G,T,K)
    if config.key_smear:
        k = smear(ops.where(mask[:, None, :, None], k, 0.0), parameters[block + "key_smear"])
    cos, sin = rope_tables(np.arange(T), config.head_width, config.rope_base, x.dtype)
    q = rope(q, cos, sin, config.rope_pairing)
    k = rope(k, cos, sin, config.rope_pairing)
    visible = np.tri(T, dtype=bool) if config.causal else np.ones((T, T), bool)     # (T,T)
    mixed = attention(q, k, v, visible & mask[:, None, None, :])            # (B,H,T,K)
    return ops.transpose(mixed, axes=(0, 2, 1, 3)).reshape(B, T, -1)        # (B,T,HK)


def hidden_states(parameters: Parameters, tokens: np.ndarray, config, mask: np.ndarray | None = None) -> Tensor:
    """What the model computes of each token: (B,T) -> (B,T,D). mask (B,T): 0 on padding, 1 on real tokens."""
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    x = ops.embed(parameters["embedding"], tokens)                          # (B,T,D)
    for i in range(config.layers):
        block = f"blocks.{i}."
        h = rms_norm(x, parameters[block + "attention_norm"], config.norm_eps)
        x = x + self_attention(h, parameters, block, config, mask) @ parameters[block + "attention_out"]
        h = rms_norm(x, parameters[block + "ffn_norm"], config.norm_eps)
        x = x + swiglu(h @ parameters[block + "gate_up"]) @ parameters[block + "ffn_out"]
    return rms_norm(x, parameters["final_norm"], config.norm_eps)


def transformer(parameters: Parameters, tokens: np.ndarray, config, mask: np.ndarray | None = None) -> Tensor:
    """Logits of the next token: (B,T) -> (B,T,V). Those at position t are a prediction of token t + 1."""
    unembedding = parameters["embedding" if config.tied else "unembedding"]
    return hidden_states(parameters, tokens, config, mask) @ unembedding.T


def log_probs(parameters: Parameters, tokens: np.ndarray, config, temperature: float = 1.0,
              mask: np.ndarray | None = None) -> Tensor:
    """log pi(token t + 1 | tokens up to t): (B,T) -> (B,T-1)."""
    logits = transformer(parameters, tokens, config, mask) / temperature    # (B,T,V)
    return ops.gather(ops.log_softmax(logits)[:, :-1], tokens[:, 1:])       # (B,T-1)


def sequence_log_probs(log_probs: Tensor, mask: np.ndarray) -> Tensor:
    """log pi(y|x): the sum over the tokens of the response y, where mask is 1. (B,T) -> (B)"""
    return ops.sum(ops.where(mask, log_probs, 0.0), axis=-1)


def reward(parameters: Parameters, tokens: np.ndarray, config, mask: np.ndarray | None = None) -> Tensor:
    """r(x, y), one number for each sequence, computed from its last real token: (B,T) -> (B)."""
    B, T = tokens.shape
    mask = np.ones((B, T)) if mask is None else np.asarray(mask)
    last = T - 1 - mask[:, ::-1].argmax(axis=1)                             # (B)
    hidden = hidden_states(parameters, tokens, config, mask)                # (B,T,D)
    return (hidden[np.arange(B), last] @ parameters["reward_head"]).reshape(B)


# ------------------------------------------------------------------------------------ the four losses

def sft_loss(log_probs: Tensor, mask: np.ndarray, total: float | None = None) -> Tensor:
    """Pretraining and supervised finetuning: the mean of -log pi over the tokens where mask is 1. (B,T) -> scalar"""
    total = np.sum(mask) if total is None else total
    return -ops.sum(sequence_log_probs(log_probs, mask)) / total


def reward_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin=0.0, centering: float = 0.0) -> Tensor:
    """Bradley-Terry: -log sigmoid(r(x, y_w) - r(x, y_l)), y_w chosen and y_l rejected. (B), (B) -> scalar"""
    difference = chosen_rewards - rejected_rewards - margin
    total = chosen_rewards + rejected_rewards
    return ops.mean(-ops.log_sigmoid(difference)) + centering * ops.mean(total * total)


def advantages(rewards: np.ndarray, kl: np.ndarray, beta: float, baseline: str = "leave_one_out") -> np.ndarray:
    """A = R - baseline with R = r - beta (log pi - log pi_ref), for N samples of each prompt: (P,N) -> (P,N)."""
    R = rewards - beta * kl
    N = R.shape[1]
    mean = R.mean(axis=1, keepdims=True)                                    # (P,1)
    if baseline == "none":
        return R
    if baseline == "mean":
        return R - mean
    if baseline == "leave_one_out":                                         # the mean of the N - 1 other samples
        return R - (N * mean - R) / (N - 1)
    if baseline == "group":
        return (R - mean) / (R.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    raise ValueError(f"baseline is {baseline!r}; it must be 'none', 'mean', 'leave_one_out' or 'group'")


def policy_gradient_loss(log_probs: Tensor, advantages: np.ndarray, mask: np.ndarray) -> Tensor:
    """RLHF: -A log pi(y|x), the mean over samples y of pi. A is a number, without gradient. (B,T), (B) -> scalar

    In expectation its gradient is the one of  -E_pi[ r ] + beta KL(pi || pi_ref).
    """
    if advantages.ndim == 1:
        advantages = advantages[:, None]                                    # (B,1): the same for all tokens
    return -ops.sum(ops.where(mask, log_probs, 0.0) * advantages) / len(log_probs)


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: np.ndarray,
             reference_rejected: np.ndarray, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: reward_loss with the reward r = beta log(pi / pi_ref), from log pi(y|x) of both responses. (B) -> scalar"""
    delta = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    right = ops.mean(-ops.log_sigmoid(beta * delta))
    wrong = ops.mean(-ops.log_sigmoid(-beta * delta))                       # the label is wrong
    return (1 - label_smoothing) * right + label_smoothing * wrong


# ------------------------------------------------------------------------------------ sampling

def sample(logits: np.ndarray, uniforms: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """One token of each row: the first whose cumulative probability exceeds u, uniform in [0, 1). (B,V), (B) -> (B)"""
    if temperature == 0:
        return logits.argmax(axis=-1)
    cumulative = ops.softmax(logits / temperature).data.cumsum(axis=-1)     # (B,V)
    return (cumulative > uniforms[:, None] * cumulative[:, -1:]).argmax(axis=-1)


def generate(parameters: Parameters, prompts, config, max_new_tokens: int, rng, eos: int | None = None,
             temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A response to each prompt, a list of tokens, until eos. Returns tokens and mask (B,R), 0 after the end.

    rng is a numpy Generator, or the uniform numbers (B,max_new_tokens) themselves.
    """
    longest = max(len(prompt) for prompt in prompts)
    B = len(prompts)
    uniforms = rng.random((B, max_new_tokens)) if isinstance(rng, np.random.Generator) else rng
    tokens = np.zeros((B, longest), int)
    mask = np.zeros((B, longest), bool)
    for i, prompt in enumerate(prompts):                                    # padding is on the left
        tokens[i, longest - len(prompt):] = prompt
        mask[i, longest - len(prompt):] = True
    running = np.ones(B, bool)                                              # rows without eos so far
    for t in range(max_new_tokens):
        with no_grad():
            logits = transformer(parameters, tokens, config, mask).data[:, -1]      # (B,V)
        new = np.where(running, sample(logits, uniforms[:, t], temperature), 0)
        tokens = np.concatenate([tokens, new[:, None]], axis=1)             # (B,longest+t+1)
        mask = np.concatenate([mask, running[:, None]], axis=1)
        running = running & (new != eos)
        if not running.any():
            break
    return tokens[:, longest:], mask[:, longest:]


# ------------------------------------------------------------------------------------ training

def adamw(parameters: Parameters, state: dict, learning_rate: float = 1e-3, betas=(0.9, 0.95), eps: float = 1e-8,
          weight_decay: float = 0.01) -> None:
    """One step of AdamW along the gradients that backward() left in the parameters.

    state: an empty dict before the first step; it keeps the running means m of g and v of g^2 (g a gradient).
    """
    b1, b2 = betas
    t = state["steps"] = state.get("steps", 0) + 1
    for name, p in parameters.items():
        g = np.zeros_like(p.data) if p.grad is None else p.grad
        m, v = state.get(name, (0.0, 0.0))
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g ** 2
        state[name] = (m, v)
        direction = (m / (1 - b1 ** t)) / (np.sqrt(v / (1 - b2 ** t)) + eps)
        decay = weight_decay * p.data if p.ndim >= 2 else 0.0               # matrices only
        p.data = p.data - learning_rate * (direction + decay)


def train_step(loss: Tensor, parameters: Parameters, state: dict, learning_rate: float) -> float:
    """Gradients of the loss, and one step of AdamW. Returns the loss."""
    for p in parameters.values():
        p.grad = None
    loss.backward()
    adamw(parameters, state, learning_rate)
    return loss.item()


if __name__ == "__main__":
    import runpy
    runpy.run_module("minilm.toy", run_name="__main__")
