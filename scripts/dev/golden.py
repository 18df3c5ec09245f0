"""Golden vectors: inputs, losses, gradients and metrics with which another implementation can be compared.

    python scripts/dev/golden.py [--out DIR] [--seed N] [--size small|large]

Writes an .npz file for each of CASES, and index.json with their functions and these conventions:

arrays: Inputs have the names of the function's arguments. `loss` is a scalar result, `output` an array. dNAME is the
    gradient with respect to the input NAME: of loss, or of sum(output * doutput), where doutput is an input.
    What has no dNAME (references, masks, old log-probs, advantages) is a constant. metrics/NAME is a number.
numbers: Floating-point inputs are multiples of 1/256, and so exact in float32 too, or NaN (cases ..._masked_nan: NaN
    outside the mask, of which nothing may come). Cases ..._extreme: logits or other arguments of exp of about 1000.
letters: B batch, T tokens, V vocabulary, D width, H query heads, G key/value heads, K head width, F hidden width of
    the feed-forward. Of samples there are K for each of P prompts, and N = P K in all, prompt by prompt.
log-probs: Natural logarithms, of tokens (B,T), or summed over a response (B,) and not averaged.
mask: True on the response and its EOS, False on prompt and padding. Select with it, do not multiply.
shift: Logits at t score token t+1. Arguments come aligned and functions do not shift, but for `transformer`, whose
    log_probs (B,T-1) belong to tokens[:, 1:] and mask[:, 1:].
normalisation: SFT: by the tokens selected in the whole accumulation window. Other losses: by responses, or by pairs;
    with token_mean by tokens too.
weights: Used as x @ W, which is the transpose of nn.Linear's; no biases. embedding and unembedding are (V,D).
qkv: Columns are H query heads, G key heads, G value heads, of K each. Query head h reads key/value head h // (H/G).
gate_up: Columns are the gate (F), then the up-projection (F).
rope: Pair i turns by position * base^(-2i/K), positions from 0. Pairing half: (i, i + K/2), Llama in Hugging Face
    form; interleaved: (2i, 2i + 1), the paper.

The index contains the conventions word for word. tests/golden/ is the small set of seed 0. Tests: tests/test_golden.py.
"""
import inspect
import json
import pathlib
import sys
import types
import typing
from functools import partial
from pathlib import Path

import numpy as np

from minilm import checkpoint, layers, ops
from minilm.model import Config, Transformer
from minilm.objectives import dpo, kl, kl_in_the_loss, policy_gradient, reward, sft
from minilm.optim import AdamW
from minilm.tensor import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))      # scripts/, for support
from golden_files import FORMAT, INDEX, read_index  # noqa: E402
from golden_inputs import (  # noqa: E402
    activations,
    comparisons,
    grouped_samples,
    groups,
    improbable_samples,
    language_model,
    nan_outside,
    normal,
    pairs,
    responses,
    samples,
)
from support.command_line import Parser, whole  # noqa: E402
from support.run_folder import UsageError, main_guard  # noqa: E402

CONVENTIONS = dict(line.split(": ", 1) for line in __doc__.split("\n\n")[3].replace("\n    ", " ").splitlines())
TOLERANCE = {"error": "max|yours - ours| / max(max|ours|, 1e-3), of each array", "float64": 1e-10, "float32": 1e-4}
SIZES = {"small": types.SimpleNamespace(B=4, T=6, P=2, K=3, V=9, D=6, H=4, head=4, F=5),
         "large": types.SimpleNamespace(B=16, T=64, P=8, K=4, V=500, D=48, H=8, head=16, F=80)}


# Functions that the library does not have as one function.

def rope(x, positions, base=10000.0, pairing="half"):
    return layers.rope(x, *layers.rope_tables(positions, x.shape[-1], base, x.dtype), pairing=pairing)


def grpo_loss(log_probs, old_log_probs, reference_log_probs, rewards, mask, beta, epsilon, epsilon_high, token_mean,
              baseline="group", level="token"):
    """The whole loss of one step of GRPO, in the forms of TRL's GRPOTrainer."""
    A = policy_gradient.advantages(rewards, np.zeros(rewards.shape), 0.0, baseline).reshape(-1)
    of_tokens = level == "token"
    clipped = policy_gradient.ppo_clip_loss(log_probs, old_log_probs, A, mask, epsilon, level, epsilon_high,
                                            token_mean if of_tokens else None)
    logs = [ops.where(mask, given, 0.0) for given in (log_probs, old_log_probs, reference_log_probs)]
    terms = kl_in_the_loss.k3_times_ratio(*logs) if of_tokens else kl_in_the_loss.k3_times_mean_ratio(*logs, mask)
    return clipped + kl_in_the_loss.token_kl_loss(terms, mask, token_mean) * beta


def transformer(tokens, mask, config, **weights):
    model = Transformer(Config(**config), np.random.default_rng(0)).over(weights)
    log_probs = model.log_probs(tokens)
    return {"logits": model(tokens), "log_probs": log_probs, "loss": sft.sft_loss(log_probs, mask[:, 1:])}


def adamw(matrix, vector, dmatrix, dvector, max_norm, learning_rate, betas, eps, weight_decay):
    """A step for each of dmatrix and dvector: the norms before clipping, and the parameters after each step."""
    p = Tensor(matrix, requires_grad=True)
    q = Tensor(vector, requires_grad=True)
    optimiser = AdamW({"matrix": p, "vector": q}, learning_rate, betas, eps, weight_decay)
    steps = []
    for p_gradient, q_gradient in zip(dmatrix, dvector):
        p.grad = p_gradient
        q.grad = q_gradient
        norm = optimiser.clip(max_norm)
        optimiser.step()
        steps.append((norm, p.data.copy(), q.data.copy()))
    return dict(zip(("norms", "matrix_after", "vector_after"), map(np.array, zip(*steps))))


# The cases: functions, and the recipes of their inputs.

class Function(typing.NamedTuple):
    call: typing.Callable
    gradients: str       # the inputs with a gradient; "*": every floating-point input
    cases: dict          # {suffix of the function's name: (recipe, options)}
    formula: str         # in the names of the arguments
    paper: str = ""
    trl: str = ""        # the class of TRL 1.16 that computes it


def case(recipe, **options):
    return recipe, options


Z = "z = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))"
BASELINES = "b by baseline: 0 (none), mean R of the prompt's other samples (leave_one_out) or of all of them (mean)"
MEANS = "s by token_mean: 1; 1 / (tokens of the response) (response); N / sum(mask) (batch); 1 / token_mean (a number)"
GRPO = {"beta": 0.25, "epsilon": 0.125, "epsilon_high": 0.25}
DEEPSEEK = "DeepSeek-AI 2025, arXiv:2512.02556, (7)"
PAIR = "policy_chosen policy_rejected"
FAR = partial(pairs, scale=2000.0)
BY_TOKEN = partial(samples, by_token=True)
RLOO = "Williams 1992; Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740"
OUYANG = "Ouyang et al. 2022, arXiv:2203.02155"
SCHULMAN = "Schulman 2020, Approximating KL divergence"

FUNCTIONS = [
    Function(sft.sft_loss, "log_probs",
             {"": case(responses), "_window": case(responses, total=40), "_masked_nan": case(nan_outside(responses))},
             "-sum(log_probs where mask) / total; total is sum(mask) unless given", OUYANG, "SFTTrainer"),
    Function(sft.sft_metrics, "", {"": case(responses)}, "means over sum(mask) = trained_tokens", trl="SFTTrainer"),
    Function(reward.reward_loss, "chosen_rewards rejected_rewards",
             {"": case(comparisons, margin=0.0), "_margin_centering": case(comparisons, centering=0.25),
              "_extreme": case(partial(comparisons, scale=2000.0))},
             "mean(-log_sigmoid(chosen_rewards - rejected_rewards - margin)) "
             "+ centering * mean((chosen_rewards + rejected_rewards)^2)",
             f"{OUYANG}, (1); margin: arXiv:2307.09288, (2); centering: arXiv:2312.09244",
             "RewardTrainer; centering is center_rewards_coefficient"),
    Function(reward.reward_metrics, "", {"": case(comparisons)}, "accuracy: chosen > rejected", trl="RewardTrainer"),
    Function(policy_gradient.advantages, "",
             {f"_{b}": case(samples, beta=0.3, baseline=b) for b in ("none", "leave_one_out", "mean", "group")},
             f"R - b, R = rewards - beta * kl; {BASELINES}; group: (R - mean R) / (std R + 1e-4), ddof 1",
             f"{RLOO}; group: Shao et al. 2024, arXiv:2402.03300",
             "leave_one_out: RLOOTrainer; group: GRPOTrainer, whose KL is in the loss and not in R"),
    Function(policy_gradient.reward_to_go, "",
             {**{f"_{b}": case(groups, beta=0.3, baseline=b) for b in ("none", "leave_one_out", "mean")},
              "_masked_nan": case(nan_outside(groups), beta=0.3)},
             f"rewards - beta * sum(token_kl from t on) - b, R = rewards - beta * sum(token_kl); {BASELINES}", RLOO),
    Function(policy_gradient.policy_gradient_loss, "log_probs",
             {"": case(samples), "_by_token": case(BY_TOKEN), "_masked_nan": case(nan_outside(samples)),
              **{f"_{mean}_mean": case(samples, token_mean=mean) for mean in ("response", "batch")},
              "_constant": case(samples, token_mean=8.0)},
             f"-sum(s * advantages * log_probs where mask) / N; advantages (N,) or (N,T); {MEANS}", RLOO),
    Function(policy_gradient.ppo_clip_loss, "log_probs",
             {"_token": case(samples, level="token"), "_sequence": case(samples, level="sequence"),
              "_by_token": case(BY_TOKEN), "_masked_nan": case(nan_outside(samples)),
              "_clip_higher": case(samples, epsilon_high=0.75),
              "_geometric_mean": case(samples, level="geometric_mean", epsilon=0.125)},
             "-sum(s * min(ratio * advantages, clip(ratio, 1 - epsilon, 1 + epsilon_high) * advantages)) / N, level "
             "token: ratio = exp(log_probs - old_log_probs) of each token in the mask; sequence: one ratio, of their "
             f"sums; geometric_mean: of their means; epsilon_high is epsilon unless given; {MEANS}",
             "Schulman et al. 2017, arXiv:1707.06347, (7)",
             "sequence: RLOOTrainer; token: GRPOTrainer, which divides by numbers of tokens, not by N"),
    Function(kl_in_the_loss.k3_times_ratio, "policy", {"": case(grouped_samples), "_extreme": case(improbable_samples)},
             "exp(policy - old) * (exp(reference - policy) - 1 + policy - reference)", DEEPSEEK,
             "GRPOTrainer, of each token, use_bias_correction_kl"),
    Function(kl_in_the_loss.k3_times_mean_ratio, "policy",
             {"": case(grouped_samples), "_masked_nan": case(nan_outside(grouped_samples)),
              "_extreme": case(improbable_samples)},
             "exp(mean of policy - old where mask, by row) * (exp(reference - policy) - 1 + policy - reference) where "
             "mask, 0 elsewhere", trl="GRPOTrainer, importance_sampling_level sequence"),
    Function(kl_in_the_loss.token_kl_loss, "terms",
             {"": case(grouped_samples), "_masked_nan": case(nan_outside(grouped_samples))},
             f"sum(s * terms where mask) / N; {MEANS}", trl="GRPOTrainer, a part of its loss"),
    Function(grpo_loss, "log_probs",
             {"_grpo": case(grouped_samples, **GRPO, token_mean="response"),
              "_bnpo": case(grouped_samples, **GRPO, token_mean="batch"),
              "_dapo": case(grouped_samples, **GRPO, token_mean="batch", baseline="group"),
              "_dr_grpo": case(grouped_samples, **GRPO, token_mean=8.0, baseline="mean"),
              "_gspo": case(grouped_samples, **GRPO, token_mean="response", level="geometric_mean"),
              "_masked_nan": case(nan_outside(grouped_samples), **GRPO, token_mean="response")},
             "ppo_clip_loss, with advantages of the baseline group or mean without KL, + beta * token_kl_loss of "
             "k3_times_ratio, or of k3_times_mean_ratio at the level geometric_mean. loss_type in TRL is grpo for "
             "token_mean response, bnpo and dapo for batch, dr_grpo for a number, the max_completion_length; "
             "scale_rewards is none for the baseline mean",
             "Shao et al. 2024, arXiv:2402.03300; arXiv:2503.14476 (dapo); arXiv:2503.20783 (dr_grpo); "
             "arXiv:2507.18071 (gspo)", "GRPOTrainer; gspo: importance_sampling_level sequence"),
    Function(policy_gradient.policy_gradient_metrics, "", {"": case(samples)},
             "kl_sequence: mean(kl); kl_token: sum(kl) / sum(mask); reward_std: ddof 1", trl="RLOOTrainer"),
    Function(dpo.dpo_loss, PAIR,
             {"": case(pairs, beta=0.5), "_extreme": case(FAR, beta=0.5),
              "_label_smoothing": case(pairs, beta=0.5, label_smoothing=0.125),
              "_label_smoothing_extreme": case(FAR, beta=0.5, label_smoothing=0.125)},
             f"mean((1 - label_smoothing) * -log_sigmoid(z) + label_smoothing * -log_sigmoid(-z)), {Z}",
             "Rafailov et al. 2023, arXiv:2305.18290, (7); label_smoothing: cDPO, Mitchell 2023",
             "DPOTrainer, loss_type sigmoid; label_smoothing is ignored there"),
    Function(dpo.robust_dpo_loss, PAIR,
             {"": case(pairs, beta=0.5, flip_rate=0.125), "_extreme": case(FAR, beta=0.5, flip_rate=0.125)},
             f"mean((1 - flip_rate) * -log_sigmoid(z) - flip_rate * -log_sigmoid(-z)) / (1 - 2 * flip_rate), {Z}",
             "Chowdhury et al. 2024, arXiv:2403.00409", "DPOTrainer, loss_type robust; flip_rate is label_smoothing"),
    Function(dpo.ipo_loss, PAIR, {"": case(pairs, beta=0.5)}, f"mean((z / beta - 1 / (2 * beta))^2), {Z}",
             "Azar et al. 2023, arXiv:2310.12036, (17)", "DPOTrainer, loss_type ipo, there of means over tokens"),
    Function(dpo.length_normalised_dpo_loss, PAIR, {"": case(pairs, beta=0.5)},
             f"mean(-log_sigmoid(z)), {Z}, after each log-prob is divided by the length of its response",
             "Lambert et al. 2024, arXiv:2411.15124, (6)", "DPOTrainer, loss_type sigmoid_norm"),
    Function(dpo.dpo_metrics, "", {"": case(pairs, beta=0.5)}, "accuracies: chosen > rejected", trl="DPOTrainer"),
    Function(kl.k1, "policy", {"": case(pairs)}, "policy - reference", SCHULMAN, "RLOOTrainer, in its rewards"),
    Function(kl.k2, "policy", {"": case(pairs)}, "(policy - reference)^2 / 2", SCHULMAN),
    Function(kl.k3, "policy", {"": case(pairs)}, "exp(reference - policy) - 1 + policy - reference", SCHULMAN,
             "GRPOTrainer, there of each token"),
    Function(kl.kl_metrics, "", {"": case(responses), "_masked_nan": case(nan_outside(responses))},
             "x = policy - reference where mask; kl_sequence: sum(x) / B; kl_token: sum(x) / sum(mask)", SCHULMAN),
    Function(layers.rms_norm, "x weight", {"": case(activations, eps=0.125)},
             "x / sqrt(mean(x^2, last axis) + eps) * weight", "Zhang and Sennrich 2019, arXiv:1910.07467"),
    Function(layers.swiglu, "gate_up", {"": case(activations)}, "gate * sigmoid(gate) * up", "arXiv:2002.05202"),
    Function(rope, "x", {f"_{way}": case(activations, base=50.0, pairing=way) for way in ("half", "interleaved")},
             "a pair (a, b) becomes (a cos - b sin, b cos + a sin)", "Su et al. 2021, arXiv:2104.09864"),
    Function(layers.attention, "q k v",
             {"_causal": case(activations), "_bidirectional": case(activations, causal=False),
              "_grouped": case(partial(activations, sharing=2)), "_cached": case(partial(activations, queries=2)),
              "_padding": case(partial(activations, sharing=2, padding=True))},
             "softmax(q k^T / sqrt(K)) v over the keys seen: those of key_mask, if given; if causal, none after the "
             "query, and the queries are the last positions; a query that sees no key gives zeros",
             "Vaswani et al. 2017, arXiv:1706.03762; grouped: Ainslie et al. 2023, arXiv:2305.13245"),
    Function(layers.token_log_probs, "hidden unembedding", {"": case(activations), "_extreme": case(
             partial(activations, scale=400.0))}, "log_softmax(hidden @ unembedding.T)[targets]"),
    Function(layers.sequence_log_probs, "log_probs",
             {"": case(responses), "_masked_nan": case(nan_outside(responses))}, "sum(log_probs where mask) by row"),
    Function(transformer, "*",
             {"": case(language_model), "_tied": case(partial(language_model, tied=True, rope_pairing="interleaved"))},
             "x = embedding[tokens]; in each block x += attention(q, k, v) @ attention_out, where q, k, v are "
             "rms_norm(x) @ qkv, with rope on q and k, and then x += swiglu(rms_norm(x) @ gate_up) @ ffn_out; "
             "logits = rms_norm(x) @ unembedding.T; log_probs = token_log_probs; loss = sft_loss",
             "Touvron et al. 2023, arXiv:2302.13971"),
    Function(adamw, "",
             {"": case(activations, max_norm=6.5, learning_rate=0.5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.25)},
             "g *= max_norm / norm where the norm of both exceeds it; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; "
             "p -= learning_rate * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p, of the matrix)",
             "Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2"),
]
CASES = {f.call.__name__ + suffix: (f, *case) for f in FUNCTIONS for suffix, case in f.cases.items()}


def make(name, seed=0, size="small"):
    """The arguments of a case's function: (arrays, options), defaults included."""
    function, recipe, options = CASES[name]
    rng = np.random.default_rng(seed)
    arguments = inspect.signature(function.call).parameters.values()
    made = recipe(rng, SIZES[size])
    if not any(a.kind is a.VAR_KEYWORD for a in arguments):
        # Without options that change no number.
        made = {a.name: made.get(a.name, a.default) for a in arguments if a.name not in ("kernel", "train_unembedding")}
    made = {key: value for key, value in {**made, **options}.items() if value is not None}
    inputs = {key: value for key, value in made.items() if isinstance(value, np.ndarray)}
    if function.gradients not in ("", "*") and (shape := function.call(**made).shape):
        inputs["doutput"] = normal(rng, *shape)
    return inputs, {key: value for key, value in made.items() if key not in inputs}


def compute(name, inputs, options):
    """The results of a case, arrays by name, from its inputs and options."""
    function = CASES[name][0]
    arguments = {key: a for key, a in inputs.items() if key != "doutput"}
    floating = (key for key, a in arguments.items() if a.dtype.kind == "f")
    leaves = {key: Tensor(arguments[key], requires_grad=True)
              for key in (floating if function.gradients == "*" else function.gradients.split())}
    results = function.call(**{**arguments, **leaves}, **options)
    if not isinstance(results, dict):
        results = {"output" if results.shape else "loss": results}
    if leaves:
        results["loss" if "loss" in results else "output"].backward(inputs.get("doutput"))
    named = {f"metrics/{key}" if isinstance(value, float) else key: value for key, value in results.items()}
    arrays = {key: np.array(value.data if isinstance(value, Tensor) else value) for key, value in named.items()}
    return {**arrays, **{f"d{key}": leaf.grad for key, leaf in leaves.items()}}


def golden(name, seed=0, size="small"):
    """A case as it is written: (its entry in the index, its arrays)."""
    function = CASES[name][0]
    inputs, options = make(name, seed, size)
    results = compute(name, inputs, options)
    entry = {"file": f"{name}.npz", "function": function.call.__name__, "formula": function.formula,
             "paper": function.paper, "TRL 1.16": function.trl, "options": options}
    for kind, arrays in (("inputs", inputs), ("results", results)):
        entry[kind] = {key: f"{a.dtype}{list(a.shape)}" for key, a in arrays.items()}
    return {key: value for key, value in entry.items() if value}, {**inputs, **results}


def write_arrays(path, arrays):
    """Write an .npz file completely or not at all. Equal arrays give equal files: NumPy dates all entries 1980."""
    temporary = path.with_name(f".{path.name}{checkpoint.TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: not written: {error.strerror}. Check that disk and folder.") from error
    finally:
        temporary.unlink(missing_ok=True)


def main():
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--out", metavar="DIR", default="runs/golden", help="where to write (default: %(default)s)")
    parser.add_argument("--seed", metavar="N", type=whole(0), default=0, help="of the inputs (default: %(default)s)")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the inputs (default: %(default)s)")
    asked = parser.parse_args()
    folder = pathlib.Path(asked.out)
    header = {**FORMAT, "seed": asked.seed, "size": asked.size}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        same = header.items() <= read_index(folder).items()
    except UsageError:
        same = not any(folder.iterdir())
    if not same:
        raise UsageError(f"{folder} is not empty, and no golden set of this seed and size. Choose another --out.")
    cases = {name: golden(name, asked.seed, asked.size) for name in CASES}
    index = {**header, "tolerance": TOLERANCE, "conventions": CONVENTIONS,
             "cases": {name: entry for name, (entry, _) in cases.items()}}
    # The index first: with it an interrupted run can continue.
    checkpoint.write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    for name, (_, arrays) in cases.items():
        write_arrays(folder / f"{name}.npz", arrays)
    print(f"{len(cases)} cases in {folder}; begin with {folder / INDEX}")


if __name__ == "__main__":
    sys.exit(main_guard(main))
