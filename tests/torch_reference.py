"""The transformer and the objectives in PyTorch: the second implementation of the parity tests.

Written with torch's own functions, and autograd for every gradient. It shares with minilm only the names and
layouts of the parameters: a dict of torch tensors, one for each name in `Transformer.parameters()` (and
"reward_head"), and a Config for the numbers. Where there are two ways to compute something, this file takes
the other one: rotations are products of complex numbers, negative log-probs are F.cross_entropy with
ignore_index, padding is cut off instead of masked.
Shapes and letters as in minilm/layers.py.
"""

import torch
import torch.nn.functional as F

IGNORED = -100


# The model.

def rope(x, base=10000.0, pairing="half"):
    """x (B,H,T,K) rotated by its positions 0..T-1: as complex numbers, times exp(i angle)."""
    T, K = x.shape[-2:]
    angles = torch.outer(torch.arange(T).double(), base ** (-2 * torch.arange(K // 2).double() / K))
    turn = torch.polar(torch.ones_like(angles), angles).to(x.dtype.to_complex())
    pairs = x.unflatten(-1, (2, K // 2)).transpose(-1, -2) if pairing == "half" else x.unflatten(-1, (K // 2, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (turned.transpose(-1, -2) if pairing == "half" else turned).flatten(-2)


def attention(q, k, v, causal=True, key_mask=None):
    """Like minilm.layers.attention: with S > T keys, the queries are the last T positions."""
    (T, S), allowed = (q.shape[-2], k.shape[-2]), None
    if causal:      # torch's is_causal places the queries at the first T
        allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if key_mask is not None:
        seen = key_mask.bool()[:, None, None, :]
        allowed = seen.expand(-1, 1, T, -1) if allowed is None else allowed & seen
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)


def smear(k, amount):
    """Each key (B,G,T,K) mixed with the one before, zeros before the first, by sigmoid(amount (G,K))."""
    return torch.lerp(k, F.pad(k, (0, 0, 1, -1)), amount.sigmoid()[:, None])


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def hidden(parameters, config, tokens):
    """Final hidden states of unpadded tokens: (B,T) -> (B,T,D)."""
    c, p = config, parameters

    def norm(x, name):
        return F.rms_norm(x, (c.width,), p[name], c.norm_eps)

    x = F.embedding(tokens, p["embedding"])
    for i in range(c.layers):
        qkv = norm(x, f"blocks.{i}.attention_norm") @ p[f"blocks.{i}.qkv"]
        q, k, v = (part.unflatten(-1, (-1, c.head_width)).transpose(1, 2)
                   for part in qkv.split([n * c.head_width for n in (c.heads, c.kv_heads, c.kv_heads)], dim=-1))
        if c.key_smear:
            k = smear(k, p[f"blocks.{i}.key_smear"])
        q, k = (rope(part, c.rope_base, c.rope_pairing) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=c.causal, enable_gqa=True)
        x = x + mixed.transpose(1, 2).flatten(2) @ p[f"blocks.{i}.attention_out"]
        x = x + swiglu(norm(x, f"blocks.{i}.ffn_norm") @ p[f"blocks.{i}.gate_up"]) @ p[f"blocks.{i}.ffn_out"]
    return norm(x, "final_norm")


def logits(parameters, config, tokens):
    """(B,T) -> (B,T,V)"""
    return F.linear(hidden(parameters, config, tokens), parameters["embedding" if config.tied else "unembedding"])


def log_probs(parameters, config, tokens, mask, temperature=1.0):
    """log pi(token t+1), tokens and mask (B,T) -> (B,T-1); zero where the mask is 0."""
    scores = logits(parameters, config, tokens[:, :-1]) / temperature
    return -F.cross_entropy(scores.transpose(1, 2), labels(tokens, mask), reduction="none", ignore_index=IGNORED)


def labels(tokens, mask):
    return torch.where(mask.bool(), tokens, IGNORED)[:, 1:]


def rewards(parameters, config, tokens, real):
    """(B,): each sequence alone, without its padding on either side."""
    return torch.cat([hidden(parameters, config, row[keep.bool()][None])[:, -1] @ parameters["reward_head"]
                      for row, keep in zip(tokens, real)]).squeeze(-1)


# The objectives: the losses, from logits, log-probs or rewards.

def sft_loss(logits, labels):
    """Logits (B,T,V) and the tokens that they score (B,T), IGNORED outside the response."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def reward_loss(chosen, rejected, margin, centering):
    return -F.logsigmoid(chosen - rejected - margin).mean() + centering * (chosen + rejected).square().mean()


def leave_one_out(rewards, kl, beta):
    """Advantages (P,K): R minus the mean R of the others, with a matrix of ones whose diagonal is 0."""
    R = rewards - beta * kl
    K = R.shape[1]
    return R - R @ (1 - torch.eye(K, dtype=R.dtype)) / (K - 1)


def policy_gradient_loss(log_probs, advantages):
    """log_probs (N,T), zero outside the response; advantages (N,)."""
    return -(advantages * log_probs.sum(dim=1)).mean()


def ppo_clip_loss(log_ratio, advantages, mask, epsilon=0.2, level="token"):
    """log_ratio (N,T), log(pi / pi_old) of each token, zero outside the response."""
    if level == "sequence":
        log_ratio, mask = log_ratio.sum(dim=1, keepdim=True), torch.ones(len(mask), 1)
    ratio, A = log_ratio.exp(), advantages[:, None]
    return -(torch.min(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A) * mask).sum(dim=1).mean()


def dpo_loss(delta, beta, label_smoothing=0.0):
    """delta (B,): log(pi / pi_ref) of the chosen response minus log(pi / pi_ref) of the rejected one."""
    eps, right, wrong = label_smoothing, -F.logsigmoid(beta * delta), -F.logsigmoid(-beta * delta)
    return ((1 - eps) * right + eps * wrong).mean()


def robust_dpo_loss(delta, beta, flip_rate):
    eps, right, wrong = flip_rate, -F.logsigmoid(beta * delta), -F.logsigmoid(-beta * delta)
    return ((1 - eps) * right - eps * wrong).mean() / (1 - 2 * eps)


def ipo_loss(delta, beta):
    return F.mse_loss(delta, torch.full_like(delta, 1 / (2 * beta)))


# From tokens to a scalar.

class Objectives:
    """Each objective with the gradient of every parameter, from the arrays that `batch` in test_torch_parity.py lists.

    The same methods as Minilm there."""

    def __init__(self, config, policy, reference, batch):
        """policy and reference: arrays by parameter; batch: arrays by name."""
        self.config, self.reference = config, {name: torch.tensor(w) for name, w in reference.items()}
        self.policy = {name: torch.tensor(w, requires_grad=True) for name, w in policy.items()}
        self.batch = {name: torch.tensor(a) for name, a in batch.items()}

    def run(self, objective, **options):
        """The value, as "output", and the gradient of every parameter that the objective uses."""
        loss = getattr(self, objective)(**options)
        loss.backward()
        gradients = {name: p.grad.numpy() for name, p in self.policy.items() if p.grad is not None}
        return {"output": loss.detach().numpy(), **gradients}

    def logits(self):
        """The logits of each sequence without its padding, multiplied by the cotangent and summed."""
        rows = zip(self.batch["tokens"], self.batch["real"].bool(), self.batch["cotangent"])
        return sum((logits(self.policy, self.config, row[real][None])[0] * cotangent[real]).sum()
                   for row, real, cotangent in rows)

    def sft(self):
        tokens = self.batch["tokens"]
        return sft_loss(logits(self.policy, self.config, tokens[:, :-1]), labels(tokens, self.batch["response"]))

    def reward(self, centering):
        chosen, rejected = rewards(self.policy, self.config, self.batch["tokens"], self.batch["real"]).chunk(2)
        return reward_loss(chosen, rejected, self.batch["margin"], centering)

    def log_probs(self, temperature=1.0):
        """The policy's and the reference's, (B,T), zero outside the response."""
        return (log_probs(model, self.config, self.batch["tokens"], self.batch["response"], temperature)
                for model in (self.policy, self.reference))

    def sampled(self, temperature, beta):
        """log-probs (N,T) and advantages (N,)"""
        policy, reference = self.log_probs(temperature)
        scores = self.batch["scores"]
        kl = (policy.detach() - reference).sum(dim=1).view_as(scores)
        return policy, leave_one_out(scores, kl, beta).flatten()

    def policy_gradient(self, temperature, beta):
        return policy_gradient_loss(*self.sampled(temperature, beta))

    def ppo_clip(self, temperature, beta, level):
        policy, advantages = self.sampled(temperature, beta)
        log_ratio = policy - policy.detach() + self.batch["log_ratio " + level]
        return ppo_clip_loss(log_ratio, advantages, self.batch["response"][:, 1:], level=level)

    def delta(self, weigh=1.0):
        policy, reference = self.log_probs()
        chosen, rejected = ((policy - reference) * weigh).sum(dim=1).chunk(2)
        return chosen - rejected

    def dpo(self, beta, label_smoothing=0.0):
        return dpo_loss(self.delta(), beta, label_smoothing)

    def robust_dpo(self, beta, flip_rate):
        return robust_dpo_loss(self.delta(), beta, flip_rate)

    def ipo(self, beta):
        return ipo_loss(self.delta(), beta)

    def length_normalised_dpo(self, beta):
        lengths = self.batch["response"].sum(dim=1, keepdim=True).to(self.batch["margin"].dtype)
        return dpo_loss(self.delta(1 / lengths), beta)
