"""Inputs of the golden vectors (golden.py): functions of a Generator and the sizes that return arrays by name.

A case takes the arguments of its function from these arrays. Floating-point numbers are multiples of 1/256. The order
of the draws must not change: another order gives other files.
"""

import numpy as np

from minilm.model import Config, Transformer


def normal(rng, *shape, mean=0.0, scale=1.0):
    return np.round((mean + scale * rng.normal(size=shape)) * 256) / 256


def log_probabilities(rng, *shape):
    return -0.75 - np.abs(normal(rng, *shape))


def spans(rng, N, T):
    """A mask (N,T), True on the response, False on prompt and padding. Row 0 has no padding; the response of row 1 is
    a single EOS."""
    start = rng.integers(1, T // 2, size=N)
    end = rng.integers(start + 1, T + 1)
    end[:2] = T, start[1] + 1
    return (start[:, None] <= np.arange(T)) & (np.arange(T) < end[:, None])


def responses(rng, n):
    """Token log-probs of responses (B,T), with targets and predictions, about half of which are right."""
    log_probs = log_probabilities(rng, n.B, n.T)
    targets, guesses = rng.integers(n.V, size=(2, n.B, n.T))
    return {"log_probs": log_probs, "mask": spans(rng, n.B, n.T), "entropies": np.abs(normal(rng, n.B, n.T)),
            "policy": log_probs, "reference": log_probs + normal(rng, n.B, n.T),
            "targets": targets, "predictions": np.where(rng.random(targets.shape) < 0.5, targets, guesses)}


def comparisons(rng, n, scale=1.0):
    """Rewards of B pairs; both rewards of the last pair are equal."""
    chosen, rejected = scale * normal(rng, 2, n.B)
    rejected[-1] = chosen[-1]
    return {"chosen_rewards": chosen, "rejected_rewards": rejected, "margin": np.abs(normal(rng, n.B))}


def pairs(rng, n, scale=4.0):
    """Sequence log-probs of B pairs; policy and reference are equal on the last pair."""
    chosen, rejected = scale * log_probabilities(rng, 2, n.B)
    from_chosen, from_rejected = scale * normal(rng, 2, n.B, scale=0.5) * (np.arange(n.B) < n.B - 1)
    chosen_lengths, rejected_lengths = rng.integers(1, n.T + 1, size=(2, n.B))
    return {"policy_chosen": chosen, "policy_rejected": rejected,
            "reference_chosen": chosen + from_chosen, "reference_rejected": rejected + from_rejected,
            "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths,
            "policy": chosen, "reference": chosen + from_chosen}


def samples(rng, n, by_token=False):
    """K samples for each of P prompts. The ratios of first tokens are within the clip, above, below, above, below,
    within it; of six advantages the first three are positive; samples of the last prompt have the same reward."""
    N = n.P * n.K
    mask = spans(rng, N, n.T)
    drift = 0.4 * np.resize([0, 1, -1, 1, -1, 0], (N, 1)) * (mask & (mask.cumsum(axis=1) == 1))
    old = log_probabilities(rng, N, n.T)
    advantages = 0.25 + np.abs(normal(rng, N))
    rewards = normal(rng, n.P, n.K) * (np.arange(n.P) < n.P - 1)[:, None]
    return {"log_probs": old + normal(rng, N, n.T, mean=drift, scale=0.03), "old_log_probs": old, "mask": mask,
            "advantages": normal(rng, N, n.T) if by_token else advantages * np.resize([1, 1, 1, -1, -1, -1], N),
            "rewards": rewards, "kl": normal(rng, n.P, n.K), "entropies": np.abs(normal(rng, N, n.T))}


def grouped_samples(rng, n):
    """Samples, with log-probs of the reference and with rewards that differ within every prompt."""
    made = samples(rng, n)
    reference = made["old_log_probs"] + normal(rng, *made["mask"].shape, scale=0.5)
    rewards = normal(rng, n.P, n.K)
    return {**made, "reference_log_probs": reference, "rewards": rewards, "policy": made["log_probs"],
            "old": made["old_log_probs"], "reference": reference, "terms": made["log_probs"]}


def improbable_samples(rng, n):
    """Grouped samples. The policy gives the tokens of every second one about e^-1000 of pi_old's probability."""
    made = grouped_samples(rng, n)
    return {**made, "policy": made["policy"] - 1000.0 * (np.arange(n.P * n.K) % 2 == 0)[:, None]}


def groups(rng, n):
    """Rewards (P,K) and token KLs (P,K,T) of K samples for each of P prompts."""
    return {"rewards": normal(rng, n.P, n.K), "token_kl": normal(rng, n.P, n.K, n.T),
            "mask": spans(rng, n.P * n.K, n.T).reshape(n.P, n.K, n.T)}


def nan_outside(recipe):
    """A recipe that gives the same inputs, with NaN where the mask is False."""
    def poisoned(rng, n):
        made = recipe(rng, n)
        return {name: np.where(made["mask"], a, np.nan) if a.shape == made["mask"].shape and a.dtype == float else a
                for name, a in made.items()}
    return poisoned


def activations(rng, n, scale=1.0, sharing=1, queries=None, padding=False):
    """Inputs of layers. Row 0 is padded on the left, so its first queries see no key; row 1 on the right."""
    k, v = normal(rng, 2, 2, n.H // sharing, n.T, n.head)
    real = np.ones((2, n.T), bool)
    real[0, :2] = real[1, -3:] = False
    return {"q": normal(rng, 2, n.H, queries or n.T, n.head), "k": k, "v": v, "key_mask": real if padding else None,
            "x": normal(rng, 2, n.H, n.T, n.head), "positions": np.append(np.arange(n.T - 1), 8192),
            "weight": normal(rng, n.head), "gate_up": normal(rng, 2, n.T, 2 * n.F),
            "hidden": scale * normal(rng, 2, n.T, n.D), "unembedding": normal(rng, n.V, n.D),
            "targets": rng.integers(n.V, size=(2, n.T)), "matrix": normal(rng, n.D, n.F), "vector": normal(rng, n.D),
            "dmatrix": normal(rng, 3, n.D, n.F), "dvector": normal(rng, 3, n.D)}


def language_model(rng, n, **config):
    """Tokens, mask and weights of a Transformer. Weights are of order 1, because small weights hide wrong gradients;
    base and eps are not the defaults."""
    config = vars(Config(vocab_size=n.V, width=n.D, heads=n.H, kv_heads=n.H // 2, head_width=n.head, ffn_width=n.F,
                         context=n.T, rope_base=50.0, norm_eps=0.125, **config))
    weights = {name: normal(rng, *p.shape, mean=1.0 if "norm" in name else 0.0, scale=0.3 if "norm" in name else 0.7)
               for name, p in Transformer(Config(**config), rng).parameters().items()}
    return {"tokens": rng.integers(n.V, size=(3, n.T)), "mask": spans(rng, 3, n.T), "config": config, **weights}
