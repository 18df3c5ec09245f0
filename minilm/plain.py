"""How a language model becomes an assistant: the definitions, in one file.

This file defines the model, the losses, sampling, AdamW and one step of training. The training loops are in
toy.py, the initial values in model.py. layers.py, model.py, generate.py, optim.py and objectives/ compute the same
numbers faster; tests/test_plain.py compares them with this file. Variants (IPO, PPO, ...) are only in objectives/.
The functions below are made of the elementary operations of ops.py, whose gradients tensor.py computes. checks.py
raises an error for arrays that do not belong together. Complete derivations, gradients by hand and papers:
objectives/ (begin with objectives/__init__.py) and layers.py.

    python -m minilm.plain [seed]   runs toy.py: from random weights to an assistant, on a toy task; [seed] is a number

Symbols: B sequences or pairs, T columns of an array of tokens, V vocabulary, D width, H query heads, G key/value
heads (grouped-query attention), dh head width, F feed-forward width; P prompts, K samples of each prompt,
N = P K sampled responses; x prompt, y response with its EOS; y_w chosen, y_l rejected; pi policy, pi_ref reference
(the SFT model); r reward, beta weight of the KL penalty, R reward minus the KL penalty. E is the mean over y drawn from
pi(y|x), grad the gradient with respect to the parameters of pi. T tokens have T-1 log-probs, because the first token is
not predicted. (In README.md and objectives/ T is one less: there it counts the predicted tokens.)

A comment gives the shape of the result where the shape changes. The mask of the transformer and of `reward`
is 1 on real tokens and 0 on padding. The mask of a loss (B,T-1) goes with the log-probs: entry t is about token
t + 1, so it is the mask of tokens[:, 1:]. It is 1 on the tokens to be scored: those of y, or all in pretraining.
An argument called log_probs or advantages holds the result of the function of that name.

`config` is a model.Config. This file reads its fields

    vocab_size V, layers, heads H, kv_heads G, head_width dh
    causal       no token reads a later one             rope_base       `base` of rope_tables
    tied         the unembedding is the embedding       rope_pairing    `pairing` of rope
    key_smear    whether to apply smear                 norm_eps        `eps` of rms_norm

`parameters` is a dict of Tensors; model.py makes their initial values:

    embedding (V,D)      unembedding (V,D), unless tied      final_norm (D)      reward_head (D,1), reward model only
    blocks.i.attention_norm (D)      blocks.i.qkv (D,(H+2G)dh)      blocks.i.attention_out (H dh,D)
    blocks.i.ffn_norm (D)            blocks.i.gate_up (D,2F)       blocks.i.ffn_out (F,D)
    blocks.i.key_smear (G,dh), only with config.key_smear
"""

import numpy as np

from minilm import checks, ops
from minilm.tensor import Tensor, no_grad

Parameters = dict[str, Tensor]


# ---------------------------------------------------------------------------------- the transformer

def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, for each token."""
    mean_square = ops.mean(x * x, axis=-1, keepdims=True)                   # (B,T,1)
    return x / ops.sqrt(mean_square + eps) * weight                         # (B,T,D)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate sigmoid(gate) up, where gate and up are the two halves of the last axis: (B,T,2F) -> (B,T,F)."""
    F = gate_up.shape[-1] // 2
    gate = gate_up[..., :F]                                                 # (B,T,F)
    up = gate_up[..., F:]                                                   # (B,T,F)
    return gate * ops.sigmoid(gate) * up


def rope_tables(positions: np.ndarray, head_width: int, base: float = 10000.0,
                dtype="float32") -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the angle of pair i at each position: angle = position * base^(-2i/dh). (T) -> (T,dh/2) each"""
    frequencies = base ** (-np.arange(0, head_width, 2) / head_width)       # (dh/2)
    angles = positions[..., None] * frequencies                             # (T,dh/2)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rope(x: Tensor, cos: np.ndarray, sin: np.ndarray, pairing: str = "half") -> Tensor:
    """Rotary positions: rotate each pair (a, b) of the dh numbers of a head by its angle.

    x (B,H,T,dh); cos and sin (T,dh/2). Pair i is numbers i and i + dh/2 with pairing "half", and
    numbers 2i and 2i + 1 with pairing "interleaved".
    """
    half = x.shape[-1] // 2
    a = x[..., :half] if pairing == "half" else x[..., 0::2]                # (B,H,T,dh/2)
    b = x[..., half:] if pairing == "half" else x[..., 1::2]                # (B,H,T,dh/2)
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    if pairing == "half":
        return ops.concatenate([rotated_a, rotated_b], axis=-1)             # (B,H,T,dh)
    pairs = ops.concatenate([rotated_a[..., None], rotated_b[..., None]], axis=-1)      # (B,H,T,dh/2,2)
    return pairs.reshape(*x.shape)                                          # (B,H,T,dh)


def smear(k: Tensor, amount: Tensor) -> Tensor:
    """Key smearing mixes each key with the previous one: (1 - a) k_t + a k_{t-1}, a = sigmoid(amount), k_{-1} = 0.

    It is optional, and helps small models to copy. k (B,G,T,dh), amount (G,dh) -> (B,G,T,dh)
    """
    a = ops.sigmoid(amount)[:, None]                                        # (G,1,dh)
    # The first key has no previous one: 0.0 * k[:, :, :1] is the zeros k_{-1}.
    previous = ops.concatenate([0.0 * k[:, :, :1], k[:, :, :-1]], axis=2)   # (B,G,T,dh)
    return (1.0 - a) * k + a * previous


def attention(q: Tensor, k: Tensor, v: Tensor, visible: np.ndarray) -> Tensor:
    """softmax(q k^T / sqrt(dh)) v. Query t reads key s only if visible[t, s] is True.

    A query that may read no key has the result 0.

    q (B,H,T,dh); k and v (B,G,S,dh), S keys; visible (T,S), or (B,1,T,S).
    """
    H = q.shape[1]
    G = k.shape[1]
    dh = q.shape[3]
    shared = [h // (H // G) for h in range(H)]                              # query head h: key/value head shared[h]
    scores = q @ ops.swapaxes(k[:, shared], -1, -2) / dh ** 0.5             # (B,H,T,S)
    weights = ops.softmax(ops.where(visible, scores, -1e30))                # exp(-1e30) is 0
    # A query that sees no key has equal scores -1e30, so equal weights; the second where makes them 0.
    return ops.where(visible, weights, 0.0) @ v[:, shared]                  # (B,H,T,dh)


def self_attention(x: Tensor, parameters: Parameters, block: str, config, mask: np.ndarray) -> Tensor:
    """Each token reads itself and the tokens before it (all tokens, if not config.causal): (B,T,D) -> (B,T,H dh)."""
    B, T, _ = x.shape
    H = config.heads
    G = config.kv_heads
    qkv = (x @ parameters[block + "qkv"]).reshape(B, T, H + 2 * G, config.head_width)      # (B,T,H+2G,dh)
    qkv = ops.transpose(qkv, axes=(0, 2, 1, 3))                             # (B,H+2G,T,dh)
    q = qkv[:, :H]                                                          # (B,H,T,dh)
    k = qkv[:, H:H + G]                                                     # (B,G,T,dh)
    v = qkv[:, H + G:]                                                      # (B,G,T,dh)
    if config.key_smear:
        # Keys of padding become 0. So the first real token has k_{-1} = 0 after padding on the left, too.
        k = smear(ops.where(mask[:, None, :, None], k, 0.0), parameters[block + "key_smear"])
    cos, sin = rope_tables(np.arange(T), config.head_width, config.rope_base, x.dtype)
    q = rope(q, cos, sin, config.rope_pairing)
    k = rope(k, cos, sin, config.rope_pairing)
    visible = np.tri(T, dtype=bool) if config.causal else np.ones((T, T), bool)         # (T,T)
    visible = visible & mask[:, None, None, :]                              # (B,1,T,T)
    return ops.transpose(attention(q, k, v, visible), axes=(0, 2, 1, 3)).reshape(B, T, H * config.head_width)


def hidden_states(parameters: Parameters, tokens: np.ndarray, config, mask: np.ndarray | None = None) -> Tensor:
    """The final hidden state of each token: (B,T) -> (B,T,D)."""
    mask = np.ones(tokens.shape, bool) if mask is None else checks.mask("hidden_states", mask, tokens.shape)
    x = ops.embed(parameters["embedding"], tokens)                          # (B,T,D)
    for i in range(config.layers):
        block = f"blocks.{i}."
        h = rms_norm(x, parameters[block + "attention_norm"], config.norm_eps)
        x = x + self_attention(h, parameters, block, config, mask) @ parameters[block + "attention_out"]
        h = rms_norm(x, parameters[block + "ffn_norm"], config.norm_eps)
        x = x + swiglu(h @ parameters[block + "gate_up"]) @ parameters[block + "ffn_out"]      # (B,T,D)
    return rms_norm(x, parameters["final_norm"], config.norm_eps)


def transformer(parameters: Parameters, tokens: np.ndarray, config, mask: np.ndarray | None = None) -> Tensor:
    """Logits: (B,T) -> (B,T,V). The logits at position t predict the token at position t + 1."""
    unembedding = parameters["embedding" if config.tied else "unembedding"]                    # (V,D)
    return hidden_states(parameters, tokens, config, mask) @ unembedding.T


def log_probs(parameters: Parameters, tokens: np.ndarray, config, temperature: float = 1.0,
              mask: np.ndarray | None = None) -> Tensor:
    """log pi(token t + 1 | tokens up to t): (B,T) -> (B,T-1)."""
    temperature = checks.temperature("plain.log_probs", temperature)
    logits = transformer(parameters, tokens, config, mask) / temperature    # (B,T,V)
    return ops.gather(ops.log_softmax(logits)[:, :-1], tokens[:, 1:])       # (B,T-1)


def sequence_log_probs(log_probs: Tensor, mask: np.ndarray) -> Tensor:
    """log pi(y|x): the sum over the tokens of y, where mask is 1. (B,T-1), (B,T-1) -> (B)"""
    mask = checks.mask("sequence_log_probs", mask, log_probs.shape)
    return ops.sum(ops.where(mask, log_probs, 0.0), axis=-1)


def reward(parameters: Parameters, tokens: np.ndarray, config, mask: np.ndarray | None = None) -> Tensor:
    """r(x, y): one number for each sequence, from the hidden state of its last real token. (B,T) -> (B)"""
    B, T = tokens.shape
    mask = np.ones((B, T), bool) if mask is None else checks.mask("reward", mask, (B, T))
    last = T - 1 - mask[:, ::-1].argmax(axis=1)                             # (B): index of the last real token
    hidden = hidden_states(parameters, tokens, config, mask)                # (B,T,D)
    return (hidden[np.arange(B), last] @ parameters["reward_head"]).reshape(B)


# ---------------------------------------------------------------------------------- the four losses

def sft_loss(log_probs: Tensor, mask: np.ndarray, total: float | None = None) -> Tensor:
    """Pretraining and supervised finetuning: the mean of -log pi over the tokens where mask is 1.

    log_probs and mask: (B,T-1). total: the number to divide by, if not the sum of this mask (gradient accumulation).
    """
    loss = -ops.sum(sequence_log_probs(log_probs, mask))
    return loss / checks.number("sft_loss", "total", np.sum(mask) if total is None else total, above=0)


def reward_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin=0.0, centering: float = 0.0) -> Tensor:
    """Reward model (Bradley-Terry): the mean of -log sigmoid(z) + centering (r_w + r_l)^2, z = r_w - r_l - margin.

    r_w = r(x, y_w) and r_l = r(x, y_l), (B) each. margin: by how much r_w should exceed r_l, a number or (B).
    Comparisons determine the rewards only up to a constant for each prompt; the term with centering makes it small.
    sigmoid' = sigmoid (1 - sigmoid), so d/dz[-log sigmoid(z)] = -(1 - sigmoid(z)) = -sigmoid(-z). Without centering,
    the derivative of one pair's loss is therefore -sigmoid(-z) for r_w and +sigmoid(-z) for r_l.
    """
    z = chosen_rewards - rejected_rewards - margin
    checks.same_shape("reward_loss", axes="B", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards, z=z)
    return ops.mean(-ops.log_sigmoid(z)) + centering * ops.mean((chosen_rewards + rejected_rewards) ** 2)


def advantages(rewards: np.ndarray, kl: np.ndarray, beta: float, baseline: str = "leave_one_out") -> np.ndarray:
    """A = R - b with R = r - beta kl, kl = log pi(y|x) - log pi_ref(y|x), and the baseline b. (P,K) -> (P,K)

    kl is a one-sample estimate of KL(pi || pi_ref), called k1 in objectives/kl.py; it may be negative.
    b is 0 ("none"), the mean R of all K samples of the prompt ("mean"), or of the K - 1 others ("leave_one_out", as in
    RLOO). "group", as in GRPO, is (R - mean R) / (standard deviation + 1e-4), not of the form R - b.
    All but "none" need K >= 2.
    """
    checks.same_shape("advantages", axes="PK", rewards=rewards, kl=kl)
    R = rewards - beta * kl                                                 # (P,K)
    K = R.shape[1]
    if baseline == "none":
        return R
    if K < 2:
        raise ValueError(f"baseline {baseline!r} compares the samples of a prompt; it needs K >= 2, got K = {K}")
    # A stays the same when one number is subtracted from all R of a prompt. Equal R, however large, are now exactly 0;
    # their mean would have been rounded.
    R = R - R[:, :1]                                                        # (P,K)
    mean = R.mean(axis=1, keepdims=True)                                    # (P,1)
    if baseline == "mean":
        return R - mean
    if baseline == "leave_one_out":
        return R - (K * mean - R) / (K - 1)
    if baseline == "group":
        return (R - mean) / (R.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    raise ValueError(f"baseline is {baseline!r}; it must be 'none', 'mean', 'leave_one_out' or 'group'")


def policy_gradient_loss(log_probs: Tensor, advantages: np.ndarray, mask: np.ndarray,
                         token_mean: str | float | None = None) -> Tensor:
    """RLHF: the mean of -A log pi(y|x) over N responses y drawn from pi. A is a constant (detached, stop-gradient).

    log_probs and mask: (N,T-1). advantages: the (P,K) array of `advantages`, reshaped to (N); or (N,T-1), one for each
    token (objectives.policy_gradient.reward_to_go). Why A is a constant: RLHF maximises, for each prompt,

        J = E[R] = E[r] - beta KL(pi || pi_ref) = sum_y pi R                pi is short for pi(y|x)
        grad J = sum_y R grad pi + sum_y pi grad R
               = E[R grad log pi] + E[grad R]                               because grad pi = pi grad log pi
        E[grad R] = -beta E[grad log pi]                                     r and pi_ref do not depend on theta
                  = -beta sum_y pi grad log pi = -beta sum_y grad pi = -beta grad 1 = 0

    So R needs no gradient. In the same way E[b grad log pi] = 0 if b is a number (none), or is computed from samples
    that are independent of y (leave_one_out). Then grad J = E[A grad log pi], and the expected gradient of this loss
    is -grad J.

    token_mean: None for the sum over tokens, as above. Otherwise A is divided by the length of the response
    ("response": GRPO), the mean length ("batch": DAPO) or a number (Dr. GRPO); only the last keeps the direction.
    """
    A = advantages if advantages.ndim == 2 else np.tile(advantages[:, None], log_probs.shape[1])        # (N,T-1)
    checks.same_shape("policy_gradient_loss", log_probs=log_probs, advantages=A)
    weighted = sequence_log_probs(log_probs * A, mask)                                                   # (N)
    lengths = np.maximum(mask.sum(axis=1), 1)                                                           # (N)
    divisors = {None: 1.0, "response": lengths, "batch": max(mask.sum(), 1) / len(mask)}
    return -ops.mean(weighted / (divisors[token_mean] if token_mean in divisors else token_mean))


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: np.ndarray,
             reference_rejected: np.ndarray, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: reward_loss with the reward beta log(pi(y|x) / pi_ref(y|x)), which is computed from the policy.

    A reward r determines the policy pi* that maximises J (policy_gradient_loss), and pi* determines r up to a constant
    for each prompt:

        pi*(y|x) = pi_ref(y|x) exp(r(x,y) / beta) / Z(x),      Z(x) = sum_y pi_ref(y|x) exp(r(x,y) / beta)
        r(x,y) = beta log(pi*(y|x) / pi_ref(y|x)) + beta log Z(x)               the first line, solved for r
        J = E[r - beta log(pi / pi_ref)]
          = E[beta log(pi* / pi_ref) + beta log Z(x) - beta log(pi / pi_ref)]   the second line, substituted
          = beta log Z(x) - beta KL(pi || pi*)                                  so J is largest at pi = pi*

    So train pi itself as the reward model: put beta log(pi(y|x) / pi_ref(y|x)) in place of r in reward_loss. The
    constant beta log Z(x) cancels in r_w - r_l, which becomes beta delta, with

        delta = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)].

    The first four arguments are these log-probs, (B) each. label_smoothing eps: the target probability of y_w is
    1 - eps in place of 1, for comparisons that are uncertain. For labels that are flipped use
    objectives.dpo.robust_dpo_loss. For eps = 0, the derivative of one pair's loss with respect to log pi(y_w|x) is
    -beta sigmoid(-beta delta), and with respect to log pi(y_l|x) it is +beta sigmoid(-beta delta).
    """
    checks.same_shape("dpo_loss", axes="B", policy_chosen=policy_chosen, policy_rejected=policy_rejected,
                      reference_chosen=reference_chosen, reference_rejected=reference_rejected)
    delta = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    as_labelled = ops.mean(-ops.log_sigmoid(beta * delta))
    exchanged = ops.mean(-ops.log_sigmoid(-beta * delta))
    return (1 - label_smoothing) * as_labelled + label_smoothing * exchanged


# ---------------------------------------------------------------------------------- sampling

def sample(logits: np.ndarray, uniforms: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The first token whose cumulative probability is above u, a uniform random number. (N,V), (N) -> (N)"""
    uniforms = checks.draws("plain.sample", logits, uniforms, temperature)  # (N)
    if temperature == 0:
        return logits.argmax(axis=-1)
    cumulative = ops.softmax(logits / temperature).data.cumsum(axis=-1)     # (N,V)
    # By rounding, the last cumulative probability can be a little below 1. So u is multiplied by it: some entry is
    # always above the product.
    return (cumulative > uniforms[:, None] * cumulative[:, -1:]).argmax(axis=-1)


def generate(parameters: Parameters, prompts, config, max_new_tokens: int, rng, eos=None,
             temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Sample a response to each of N prompts (lists of tokens), token by token, until it ends with eos.

    For K samples of a prompt, give it K times. rng: a numpy Generator, or the uniform random numbers
    (N,max_new_tokens) themselves. eos: a token, or several (list, tuple, set or array); None: no token ends a
    response. Returns the tokens of the responses and their mask, 0 after the end: (N,length of the longest
    response) each.
    """
    N = len(prompts)
    uniforms = checks.uniforms("plain.generate", rng, (N, max_new_tokens))
    ends = checks.end_tokens("plain.generate", eos, config.vocab_size)      # (V)
    longest = max(len(prompt) for prompt in prompts)
    # Padding stands on the left, because new tokens are appended on the right. It shifts the positions of a row,
    # but attention with RoPE depends only on differences of positions.
    tokens = np.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])     # (N,longest)
    mask = np.array([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    running = np.ones(N, bool)                                              # responses that have not ended
    for t in range(max_new_tokens):
        with no_grad():
            logits = transformer(parameters, tokens, config, mask).data[:, -1]                  # (N,V)
        new = np.where(running, sample(logits, uniforms[:, t], temperature), 0)                 # (N)
        tokens = np.concatenate([tokens, new[:, None]], axis=1)             # (N,longest+t+1)
        mask = np.concatenate([mask, running[:, None]], axis=1)             # (N,longest+t+1)
        running = running & ~ends[new]
        if not running.any():
            break
    return tokens[:, longest:], mask[:, longest:]


# ---------------------------------------------------------------------------------- training

def adamw(parameters: Parameters, state: dict, learning_rate: float = 1e-3, betas=(0.9, 0.95), eps: float = 1e-8,
          weight_decay: float = 0.01) -> None:
    """One step of AdamW with the gradients that backward() has left in the parameters.

    state: an empty dict at the first step. For each parameter it keeps t, the number of updates; m, the running mean
    of the gradient g; and v, the running mean of g^2. A parameter without a gradient is frozen: it is skipped.
    """
    b1, b2 = betas
    for name, p in parameters.items():
        if p.grad is None:
            continue
        t, m, v = state.get(name, (0, 0.0, 0.0))
        t += 1
        m = b1 * m + (1 - b1) * p.grad
        v = b2 * v + (1 - b2) * p.grad ** 2
        state[name] = (t, m, v)
        # m and v start at 0, so they are too small at first; 1 - b^t corrects this.
        direction = (m / (1 - b1 ** t)) / (np.sqrt(v / (1 - b2 ** t)) + eps)
        decay = weight_decay * p.data if p.ndim >= 2 else 0.0                           # matrices only
        p.data = p.data - learning_rate * (direction + decay)


def train_step(loss: Tensor, parameters: Parameters, state: dict, learning_rate: float) -> float:
    """One step of training: gradients of the loss, then AdamW. Returns the loss."""
    for p in parameters.values():
        p.grad = None
    loss.backward()
    adamw(parameters, state, learning_rate)
    return loss.item()


if __name__ == "__main__":
    import os
    import sys
    # execve starts Python again, because the number of BLAS threads is read when NumPy is imported. Small matrix
    # products are fastest with one thread.
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ}
    os.execve(sys.executable, [sys.executable, "-m", "minilm.toy", *sys.argv[1:]], environment)
