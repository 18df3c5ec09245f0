"""TRL 1.16.0, with the same weights and text, computes the same losses, gradients and metrics.

The other implementation is trl_reference.py: TRL's own trainers with a Llama of transformers, in float64. Each
test makes a trainer and runs one step. It compares the loss, the gradient of every parameter (which must not be
0 on either side), and every metric with TRL's name; max|ours - TRL's| / max(max|TRL's|, 1e-3) is at most 1e-10.

Where TRL differs from minilm, a test shows it:
    IPO             TRL averages log-probs over a response's tokens first
    cDPO            TRL's "sigmoid" ignores label_smoothing
    RLOO, GRPO      their losses at ratio 1 have the value -mean(A), ours -mean(A log pi): same gradient
    num_tokens      counts all tokens seen since training began, prompts too; our trained_tokens, the response's
    frac_reward_zero_std    RLOO's is of the KL-penalised rewards; minilm's, like GRPO's, of the rewards
    kl              RLOO logs the mean k1 of a token (our kl_token), GRPO the mean k3
"""

import argparse
import functools
import os

import numpy as np
import pytest

from helpers import assert_close
from minilm import layers, ops
from minilm.data import make_batch
from minilm.generate import entropy
from minilm.gradcheck import FLOOR
from minilm.model import Config, RewardModel, Transformer
from minilm.objectives import dpo, kl, kl_in_the_loss, policy_gradient, reward, sft
from minilm.pretrained.training_data import Examples
from minilm.stages.rlhf import response_lengths
from minilm.tensor import Tensor
from support.align_stages import Stage

os.environ["HF_HUB_OFFLINE"] = "1"      # no test needs the network; read when TRL is imported
torch = pytest.importorskip("torch", reason="parity needs PyTorch: pip install torch")
pytest.importorskip("trl", reason="parity with TRL needs it: pip install trl==1.16.0")
import hf_llama  # noqa: E402  (they import both)
import trl_reference as theirs  # noqa: E402

# TRL 1.16.0 sets an option by a name that transformers has deprecated.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")]

PAD, EOS = theirs.PAD, theirs.EOS


@pytest.fixture(scope="module", autouse=True)
def float64():
    with theirs.float64():
        yield


# Weights of order 1, where an error in a gradient is visible. All widths differ, and base and eps are not the
# defaults.

SHAPE = {"vocab_size": 17, "width": 12, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 6, "ffn_width": 10,
         "rope_base": 50.0, "norm_eps": 0.1, "context": 32}


@pytest.fixture(params=["untied", "tied"])
def config(request):
    return Config(**SHAPE, tied=request.param == "tied")


@functools.cache
def weights(config):
    """Arrays by name of a policy, of a reference near it, and of an older policy, still nearer."""
    rng = np.random.default_rng(1)
    model = RewardModel(Transformer(config, rng), rng)
    shapes = {name: p.shape for name, p in {**model.parameters(), **model.transformer.parameters()}.items()}
    policy = {name: ("norm" in name) + rng.normal(size=shape) * (0.3 if "norm" in name else 0.7)
              for name, shape in shapes.items()}
    return policy, *({name: w + distance * rng.normal(size=w.shape) for name, w in policy.items()}
                     for distance in (0.05, 0.015))


def transformer(config, values):
    model = Transformer(config, np.random.default_rng(0), np.float64)
    for name, p in model.parameters().items():
        p.data = values[name].copy()
    return model


# Dialogues. Every response ends in EOS, except two completions that are cut off. With these seeds no accuracy is 0, 1
# or 1/2 (so that a reversed comparison is noticed), and ratios are clipped on both sides; the tests assert it.

def draw(rng, lengths, last=()):
    return [[*map(int, rng.integers(2, SHAPE["vocab_size"], size=n)), *last] for n in lengths]


rng = np.random.default_rng(32)
PROMPTS = draw(rng, [4, 2, 3, 1])
CHOSEN, REJECTED = draw(rng, [5, 1, 3, 4], [EOS]), draw(rng, [2, 6, 3, 1], [EOS])
MARGIN = [0.5, 0.0, 1.5, -0.5]
COMPLETIONS = draw(rng, [3, 5]) + draw(rng, [4, 1, 2, 6, 3, 2, 4, 2, 5, 1], [EOS])     # three for each prompt
REWARDS = np.array([*rng.normal(size=(3, 3)), [0.5, 0.5, 0.5]])


def dialogues(responses):
    repeats = len(responses) // len(PROMPTS)
    return make_batch([p for p in PROMPTS for _ in range(repeats)], responses, PAD)


# The comparison.

def step(loss, model):
    """The loss and the gradient of every parameter."""
    loss.backward()
    return {"loss": loss.data, **{name: p.grad for name, p in model.parameters().items()}}


def assert_alive(results):
    """Every gradient is large enough that an error in it is visible."""
    largest = {name: float(np.abs(g).max()) for name, g in results.items() if name != "loss"}
    dead = {name: size for name, size in largest.items() if not size > max(FLOOR, 1e-6 * max(largest.values()))}
    assert not dead, f"gradients that are 0 or nearly 0, by their largest element: {dead}"


def assert_parity(ours, trls, but=()):
    assert ours.keys() == trls.keys()
    assert_alive(ours)
    assert_alive(trls)
    for name in trls.keys() - set(but):
        assert_close(ours[name], trls[name], name=name)


def assert_metrics(ours, logged, alone=(), but=()):
    """Only minilm has the metrics `alone`; all others, except `but`, have TRL's value."""
    assert ours.keys() - logged.keys() == set(alone)
    for name in ours.keys() - set(alone) - set(but):
        assert_close(ours[name], logged[name], name=name)


# Supervised finetuning.

def test_sft_has_trls_loss_gradients_and_metrics(tmp_path, config):
    model, batch = transformer(config, weights(config)[0]), dialogues(CHOSEN)
    log_probs = model.log_probs(batch.tokens)
    trainer = theirs.sft_trainer(tmp_path, config, weights(config)[0], PROMPTS, CHOSEN)
    trls, logged = theirs.step(trainer, theirs.batch(trainer))
    assert_parity(step(sft.sft_loss(log_probs, batch.target_mask), model), trls)

    logits = model(batch.tokens[:, :-1])
    metrics = sft.sft_metrics(log_probs.data, batch.target_mask, predictions=logits.data.argmax(axis=-1),
                              targets=batch.tokens[:, 1:],
                              entropies=entropy(ops.softmax(logits).data, ops.log_softmax(logits).data))
    assert 0 < logged["mean_token_accuracy"] < 1
    assert_metrics(metrics, logged, alone={"trained_tokens"})
    assert (metrics["trained_tokens"], logged["num_tokens"]) == (batch.mask.sum(), batch.real.sum())


def test_microbatches_of_unequal_size_have_trls_loss_and_gradients(tmp_path, config):
    model = transformer(config, weights(config)[0])
    parts = [make_batch(PROMPTS[rows], CHOSEN[rows], PAD) for rows in (slice(0, 1), slice(1, 4))]
    total = sum(part.target_mask.sum() for part in parts)
    losses = [sft.sft_loss(model.log_probs(part.tokens), part.target_mask, total=total) for part in parts]
    trainer = theirs.sft_trainer(tmp_path, config, weights(config)[0], PROMPTS, CHOSEN)
    trls, _ = theirs.step(trainer, theirs.batch(trainer, [0]), theirs.batch(trainer, [1, 2, 3]))
    assert_parity(step(losses[0] + losses[1], model), trls)
    means = [sft.sft_loss(model.log_probs(part.tokens), part.target_mask).item() for part in parts]
    assert abs(np.mean(means) - trls["loss"]) > 0.01        # the mean of losses that are normalised separately


# The reward model.

@pytest.mark.parametrize("centering", [0.0, 0.1], ids=["not centred", "centred"])
@pytest.mark.parametrize("margin", [None, MARGIN], ids=["no margin", "margin"])
def test_the_reward_model_has_trls_loss_gradients_and_metrics(tmp_path, config, margin, centering):
    model = RewardModel(transformer(config, weights(config)[0]), np.random.default_rng(0))
    model.head.data = weights(config)[0]["reward_head"].copy()
    chosen, rejected = (model.rewards(batch.tokens, batch.real) for batch in map(dialogues, (CHOSEN, REJECTED)))
    margins = 0.0 if margin is None else np.array(margin)
    trainer = theirs.reward_trainer(tmp_path, config, weights(config)[0], PROMPTS, CHOSEN, REJECTED, margin,
                                    center_rewards_coefficient=centering or None)
    trls, logged = theirs.step(trainer, theirs.batch(trainer))
    assert_parity(step(reward.reward_loss(chosen, rejected, margins, centering), model), trls)
    assert logged["accuracy"] not in (0, 0.5, 1)
    assert_metrics(reward.reward_metrics(chosen.data, rejected.data), logged, alone={"ties"})


def test_equal_rewards_count_as_wrong_in_both(tmp_path, config):
    nothing = {**weights(config)[0], "reward_head": np.zeros((config.width, 1))}
    trainer = theirs.reward_trainer(tmp_path, config, nothing, PROMPTS, CHOSEN, REJECTED)
    _, logged = theirs.step(trainer, theirs.batch(trainer))
    metrics = reward.reward_metrics(np.zeros(4), np.zeros(4))
    assert_metrics(metrics, logged, alone={"ties"})
    assert (metrics["accuracy"], metrics["ties"]) == (0, 1)


# Direct preference optimisation.

BETA, EPSILON = 0.3, 0.2
LENGTHS = [np.array([len(response) for response in responses]) for responses in (CHOSEN, REJECTED)]


def pairs(policy, reference):
    """Summed log-probs of chosen and rejected: the policy's as Tensors, the reference's as arrays."""
    batches = [dialogues(responses) for responses in (CHOSEN, REJECTED)]
    policy, reference = ([layers.sequence_log_probs(model.log_probs(batch.tokens), batch.target_mask)
                          for batch in batches] for model in (policy, reference))
    return *policy, *(log_probs.data for log_probs in reference)


def ipo_loss_per_token(*log_probs, beta):
    """TRL's IPO: log-probs are averaged over the tokens of a response, where the paper and minilm sum them.

    With averages as inputs, our loss equals TRL's.
    """
    return dpo.ipo_loss(*(sums * (1 / lengths) for sums, lengths in zip(log_probs, 2 * LENGTHS)), beta=beta)


def length_normalised_dpo_loss(*log_probs, beta):
    return dpo.length_normalised_dpo_loss(*log_probs, *LENGTHS, beta=beta)


# TRL's name, its options, and our loss.
DPO = {
    "sigmoid": ({}, dpo.dpo_loss),
    "robust": ({"label_smoothing": EPSILON}, functools.partial(dpo.robust_dpo_loss, flip_rate=EPSILON)),
    "ipo": ({}, ipo_loss_per_token),
    "sigmoid_norm": ({}, length_normalised_dpo_loss),
}


def dpo_by_trl(folder, config, loss_type, chosen=CHOSEN, rejected=REJECTED, rows=None, reference=None, **options):
    policy, near, _ = weights(config)
    trainer = theirs.dpo_trainer(folder, config, policy, reference or near, PROMPTS, chosen, rejected,
                                 loss_type=loss_type, beta=BETA, **options)
    return theirs.step(trainer, theirs.batch(trainer, rows))


@pytest.mark.parametrize("loss_type", DPO)
def test_dpo_has_trls_loss_gradients_and_metrics(tmp_path, config, loss_type):
    options, loss = DPO[loss_type]
    policy, reference = (transformer(config, values) for values in weights(config)[:2])
    log_probs = pairs(policy, reference)
    trls, logged = dpo_by_trl(tmp_path, config, loss_type, **options)
    assert_parity(step(loss(*log_probs, beta=BETA), policy), trls)
    assert logged["rewards/accuracies"] not in (0, 0.5, 1)
    # The implied rewards are computed from sums, also if the loss is computed from means.
    sums = [*(log_prob.data for log_prob in log_probs[:2]), *log_probs[2:]]
    assert_metrics(dpo.dpo_metrics(*sums, beta=BETA), logged, alone={"rewards/ties"})


def test_dpo_starts_at_log_2_and_accuracy_0_in_both(tmp_path, config):
    policy = transformer(config, weights(config)[0])
    log_probs = pairs(policy, policy)
    trls, logged = dpo_by_trl(tmp_path, config, "sigmoid", reference=weights(config)[0])
    ours = step(dpo.dpo_loss(*log_probs, beta=BETA), policy)
    assert_parity(ours, trls)
    assert_close(trls["loss"], np.log(2.0))
    metrics = dpo.dpo_metrics(log_probs[0].data, log_probs[1].data, *log_probs[2:], beta=BETA)
    assert_metrics(metrics, logged, alone={"rewards/ties"})
    assert metrics["rewards/accuracies"] == logged["rewards/accuracies"] == 0 and metrics["rewards/ties"] == 1


# Conservative DPO: TRL has it only under another name, so our label_smoothing is compared with three other losses.

def cdpo(config):
    policy, reference = (transformer(config, values) for values in weights(config)[:2])
    return step(dpo.dpo_loss(*pairs(policy, reference), beta=BETA, label_smoothing=EPSILON), policy)


def test_trls_sigmoid_ignores_label_smoothing(tmp_path, config):
    (plain, _), (smoothed, _) = (dpo_by_trl(tmp_path, config, "sigmoid", label_smoothing=epsilon)
                                 for epsilon in (0.0, EPSILON))
    for name in plain:
        np.testing.assert_array_equal(smoothed[name], plain[name])
    assert abs(cdpo(config)["loss"] - smoothed["loss"]) > 0.01


def test_smoothed_labels_mix_trls_losses_of_either_order(tmp_path, config):
    right, _ = dpo_by_trl(tmp_path, config, "sigmoid")
    wrong, _ = dpo_by_trl(tmp_path, config, "sigmoid", chosen=REJECTED, rejected=CHOSEN)
    assert_parity(cdpo(config), {name: (1 - EPSILON) * right[name] + EPSILON * wrong[name] for name in right})


def test_smoothed_labels_are_trls_aot_of_a_single_pair(tmp_path, config):
    """TRL's aot sorts the log-ratios of a batch first, which does nothing to a single one."""
    trls, _ = dpo_by_trl(tmp_path, config, "aot", rows=[0], label_smoothing=EPSILON)
    policy, reference = (transformer(config, values) for values in weights(config)[:2])
    log_probs = [of_pairs[:1] for of_pairs in pairs(policy, reference)]
    assert_parity(step(dpo.dpo_loss(*log_probs, beta=BETA, label_smoothing=EPSILON), policy), trls)


def test_smoothed_labels_are_mitchells_cross_entropy_with_the_target_1_less_epsilon():
    arrays = np.random.default_rng(0).normal(size=(4, 5))
    ours = [Tensor(a, requires_grad=True) for a in arrays[:2]]
    loss = dpo.dpo_loss(*ours, *arrays[2:], beta=BETA, label_smoothing=EPSILON)
    loss.backward()
    chosen, rejected, *reference = (torch.tensor(a, requires_grad=True) for a in arrays)
    delta = (chosen - reference[0]) - (rejected - reference[1])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        BETA * delta, torch.full_like(delta, 1 - EPSILON))
    expected.backward()
    assert_close(loss, expected.detach().numpy())
    for log_probs, torchs in zip(ours, (chosen, rejected)):
        assert_close(log_probs.grad, torchs.grad.numpy())


# RLHF.

SAMPLED = dialogues(COMPLETIONS)
MASK = SAMPLED.target_mask


def online_by_trl(name, folder, config, beta, temperature, off_policy=False, **options):
    """Advantages (P,K), the step, and the log, for samples drawn from the policy or from the older policy."""
    policy, reference, older = weights(config)
    trainer = theirs.online_trainer(name, folder, config, older if off_policy else policy, reference, REWARDS,
                                    beta=beta, temperature=temperature, **options)
    batch = theirs.rollout(trainer, PROMPTS, COMPLETIONS)
    hf_llama.load(trainer.model, policy)
    return batch["advantages"].numpy().reshape(REWARDS.shape), *theirs.step(trainer, batch)


class Online:
    """minilm's side: the policy, and log-probs (N,T) of the samples under it, the older policy and the reference."""

    def __init__(self, config, temperature, off_policy=False):
        policy, reference, older = weights(config)
        self.policy = transformer(config, policy)
        self.log_probs = self.policy.log_probs(SAMPLED.tokens, temperature)
        self.old, self.reference = (transformer(config, values).log_probs(SAMPLED.tokens, temperature).data
                                    for values in (older if off_policy else policy, reference))
        k1 = layers.sequence_log_probs(self.old - self.reference, MASK).data
        self.kl = k1.reshape(REWARDS.shape)
        scaled = self.policy(SAMPLED.tokens[:, :-1]) * (1 / temperature)
        self.entropies = entropy(ops.softmax(scaled).data, ops.log_softmax(scaled).data)

    def advantages(self, beta, baseline="leave_one_out"):
        return policy_gradient.advantages(REWARDS, self.kl, beta, baseline)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rloo_has_trls_advantages_gradients_and_metrics(tmp_path, config, temperature):
    ours = Online(config, temperature)
    A = ours.advantages(beta=0.2)
    trls_A, trls, logged = online_by_trl("RLOO", tmp_path, config, beta=0.2, temperature=temperature)
    assert_close(A, trls_A, name="advantages")
    assert np.abs(A - ours.advantages(beta=0.0)).max() > 0.01         # the KL penalty has an effect
    loss = policy_gradient.policy_gradient_loss(ours.log_probs, A.reshape(-1), MASK)
    assert_parity(step(loss, ours.policy), trls, but={"loss"})
    assert_close(trls["loss"], -A.mean(), name="TRL's loss")

    metrics = policy_gradient.policy_gradient_metrics(REWARDS, ours.kl, MASK, ours.entropies)
    assert_metrics(metrics, logged, alone={"kl_sequence", "kl_token"}, but={"frac_reward_zero_std"})
    assert_close(metrics["kl_token"], logged["kl"], name="kl")
    assert_close(kl.kl_metrics(ours.old, ours.reference, MASK)["kl_token"], logged["kl"], name="kl")
    # The rewards of one prompt in four are equal, but not after the KL penalty is subtracted.
    assert (metrics["frac_reward_zero_std"], logged["frac_reward_zero_std"]) == (1 / 4, 0)
    penalised = policy_gradient.policy_gradient_metrics(REWARDS - 0.2 * ours.kl, ours.kl, MASK)
    assert penalised["frac_reward_zero_std"] == logged["frac_reward_zero_std"]


@pytest.mark.parametrize("completions", [COMPLETIONS, [c[:-1] + [2] for c in COMPLETIONS]],
                         ids=["two cut off", "all cut off"])
def test_metrics_of_lengths_and_num_tokens_are_those_of_rloo(tmp_path, config, completions):
    policy, reference, _ = weights(config)
    trainer = theirs.online_trainer("RLOO", tmp_path, config, policy, reference, REWARDS)
    theirs.rollout(trainer, PROMPTS, completions)
    trainer.log({})
    found = response_lengths(completions, np.arange(config.vocab_size) == EOS)
    assert 0 < found["completions/clipped_ratio"] <= 1
    logged = trainer.state.log_history[-1]
    assert_metrics(found, logged)
    options = argparse.Namespace(epochs=1, batch_size=4, seed=0, samples_per_prompt=3)
    stage = Stage(options, None, Examples(PROMPTS, {}, [], [], []), (), None)
    assert stage.tokens(0, found) == logged["num_tokens"]


def test_without_a_kl_penalty_every_metric_is_rloos(tmp_path, config):
    ours = Online(config, temperature=1.0)
    trls_A, _, logged = online_by_trl("RLOO", tmp_path, config, beta=0.0, temperature=1.0)
    assert_close(ours.advantages(beta=0.0), trls_A, name="advantages")
    metrics = policy_gradient.policy_gradient_metrics(REWARDS, ours.kl, MASK, ours.entropies)
    assert_metrics(metrics, logged, alone={"kl_sequence", "kl_token"})


def assert_clipped_on_both_sides_and_not_everywhere(logged):
    assert logged["clip_ratio/low_mean"] > 0 and logged["clip_ratio/high_mean"] > 0
    assert logged["clip_ratio/region_mean"] < 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppos_clip_by_sequence_has_rloos_loss_and_gradients(tmp_path, config, temperature):
    ours = Online(config, temperature, off_policy=True)
    A = ours.advantages(beta=0.2)
    trls_A, trls, logged = online_by_trl("RLOO", tmp_path, config, beta=0.2, temperature=temperature, off_policy=True)
    assert_close(A, trls_A, name="advantages")
    assert_clipped_on_both_sides_and_not_everywhere(logged)
    loss = policy_gradient.ppo_clip_loss(ours.log_probs, ours.old, A.reshape(-1), MASK, level="sequence")
    assert_parity(step(loss, ours.policy), trls)


def test_the_group_baseline_has_grpos_advantages_and_metrics(tmp_path, config):
    ours = Online(config, temperature=1.0)
    trls_A, _, logged = online_by_trl("GRPO", tmp_path, config, beta=0.0, temperature=1.0)
    assert_close(ours.advantages(beta=0.0, baseline="group"), trls_A, name="advantages")
    metrics = policy_gradient.policy_gradient_metrics(REWARDS, ours.kl, MASK, ours.entropies)
    assert_metrics(metrics, logged, alone={"kl_sequence", "kl_token"})


@pytest.mark.parametrize("scale, baseline", [("group", "group"), ("none", "mean")])
def test_advantages_and_gradients_are_grpos_with_its_mean_over_tokens(tmp_path, config, scale, baseline):
    """GRPO's first loss, loss_type "grpo", divides log pi(y|x) by the length of y: so do advantages A / length here.

    scale_rewards "group" divides A by the standard deviation of the prompt's rewards, "none" does not.
    """
    ours = Online(config, temperature=1.0)
    A = ours.advantages(beta=0.0, baseline=baseline)
    trls_A, trls, _ = online_by_trl("GRPO", tmp_path, config, beta=0.0, temperature=1.0, loss_type="grpo",
                                    scale_rewards=scale)
    assert_close(A, trls_A, name="advantages")
    loss = policy_gradient.policy_gradient_loss(ours.log_probs, A.reshape(-1) / MASK.sum(axis=1), MASK)
    assert_parity(step(loss, ours.policy), trls, but={"loss"})


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_ppos_clip_by_token_and_k3_have_grpos_loss_and_gradients(tmp_path, config, beta):
    """The loss is PPO's loss plus beta times the k3 of every token.

    "dr_grpo" divides by a fixed length, 1 here; TRL's other loss types divide by the lengths of the samples. By
    default TRL multiplies k3 by the ratio; here it does not.
    """
    ours = Online(config, temperature=0.7, off_policy=True)
    A = ours.advantages(beta=0.0, baseline="group").reshape(-1)
    k3 = ops.where(MASK.astype(bool), kl.k3(ours.log_probs, ours.reference), 0.0)
    loss = policy_gradient.ppo_clip_loss(ours.log_probs, ours.old, A, MASK, level="token")
    loss = loss + ops.sum(k3) * (beta / len(A))
    _, trls, logged = online_by_trl(
        "GRPO", tmp_path, config, beta=beta, temperature=0.7, off_policy=True, num_iterations=2, loss_type="dr_grpo",
        max_completion_length=1, use_bias_correction_kl=False)
    assert_clipped_on_both_sides_and_not_everywhere(logged)
    assert_parity(step(loss, ours.policy), trls)
    if beta:
        assert_close(k3.data.sum() / MASK.sum(), logged["kl"], name="kl")


# GRPO as a whole: group advantages, clipped ratio, k3 in the loss, the mean over tokens; off policy.

# TRL's loss_type, and our token_mean. A batch of one step is TRL's whole accumulation window.
GRPO_MEANS = {"grpo": "response", "bnpo": "batch", "dapo": "batch", "dr_grpo": 7}
CLIP_HIGHER = {"epsilon": 0.05, "epsilon_high": 0.15}
NARROWER = {"epsilon": 0.01, "epsilon_high": 0.03}      # geometric means vary less


def grpo_by_trl(folder, config, beta, loss_type, clip, **options):
    return online_by_trl("GRPO", folder, config, beta=beta, temperature=0.7, off_policy=True, num_iterations=2,
                         loss_type=loss_type, max_completion_length=7, **clip, **options)


@pytest.mark.parametrize("scale, baseline", [("group", "group"), ("none", "mean")])
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", GRPO_MEANS)
def test_every_mean_over_tokens_has_grpos_loss_and_gradients(tmp_path, config, loss_type, beta, scale, baseline):
    """With an asymmetric clip, and TRL's default KL term, k3 times the token ratio."""
    ours, mean = Online(config, temperature=0.7, off_policy=True), GRPO_MEANS[loss_type]
    A = ours.advantages(beta=0.0, baseline=baseline)
    trls_A, trls, logged = grpo_by_trl(tmp_path, config, beta, loss_type, CLIP_HIGHER, scale_rewards=scale)
    assert_close(A, trls_A, name="advantages")
    assert_clipped_on_both_sides_and_not_everywhere(logged)
    loss = policy_gradient.ppo_clip_loss(ours.log_probs, ours.old, A.reshape(-1), MASK, **CLIP_HIGHER, token_mean=mean)
    terms = kl_in_the_loss.k3_times_ratio(ours.log_probs, ours.old, ours.reference)
    assert_parity(step(loss + kl_in_the_loss.token_kl_loss(terms, MASK, mean) * beta, ours.policy), trls)


@pytest.mark.parametrize("loss_type", GRPO_MEANS)
def test_k3_without_a_ratio_has_grpos_loss_and_gradients_under_every_mean(tmp_path, config, loss_type):
    ours, mean = Online(config, temperature=0.7, off_policy=True), GRPO_MEANS[loss_type]
    A = ours.advantages(beta=0.0, baseline="group").reshape(-1)
    _, trls, _ = grpo_by_trl(tmp_path, config, 0.2, loss_type, CLIP_HIGHER, use_bias_correction_kl=False)
    loss = policy_gradient.ppo_clip_loss(ours.log_probs, ours.old, A, MASK, **CLIP_HIGHER, token_mean=mean)
    terms = kl.k3(ours.log_probs, ours.reference)
    assert_parity(step(loss + kl_in_the_loss.token_kl_loss(terms, MASK, mean) * 0.2, ours.policy), trls)


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("loss_type", GRPO_MEANS)
@pytest.mark.filterwarnings("ignore:When using `importance_sampling_level")
def test_the_geometric_mean_has_the_loss_and_gradients_of_grpos_level_sequence(tmp_path, config, loss_type, beta):
    """GSPO is loss_type "grpo". TRL sums the one term of a response over its tokens. "grpo" divides the sum by their
    number; the other means weigh a response by its length: ours with advantages times the length and s."""
    ours, mean = Online(config, temperature=0.7, off_policy=True), GRPO_MEANS[loss_type]
    lengths = MASK.sum(axis=1)
    s = {"grpo": 1 / lengths, "bnpo": 1 / lengths.mean(), "dapo": 1 / lengths.mean(), "dr_grpo": 1 / 7}[loss_type]
    A = ours.advantages(beta=0.0, baseline="group").reshape(-1)
    _, trls, logged = grpo_by_trl(tmp_path, config, beta, loss_type, NARROWER, importance_sampling_level="sequence")
    assert_clipped_on_both_sides_and_not_everywhere(logged)
    loss = policy_gradient.ppo_clip_loss(ours.log_probs, ours.old, A * lengths * s, MASK, **NARROWER,
                                         level="geometric_mean")
    terms = kl_in_the_loss.k3_times_mean_ratio(ours.log_probs, ours.old, ours.reference, MASK)
    assert_parity(step(loss + kl_in_the_loss.token_kl_loss(terms, MASK, mean) * beta, ours.policy), trls)


# The comparison itself.

@pytest.mark.parametrize("change", [np.zeros_like, np.negative, lambda g: g * (1 + 1e-9), lambda g: g * np.nan],
                         ids=["zero", "negative", "a little too large", "NaN"])
def test_the_comparison_names_a_wrong_gradient(change):
    right = {"loss": np.array(1.0), "embedding": np.ones(3), "blocks.0.qkv": np.ones(3)}
    with pytest.raises(AssertionError, match="blocks.0.qkv"):
        assert_parity({**right, "blocks.0.qkv": change(right["blocks.0.qkv"])}, right)


def test_two_gradients_of_0_do_not_agree():
    dead = {"loss": np.array(1.0), "embedding": np.ones(3), "blocks.0.qkv": np.zeros(3)}
    with pytest.raises(AssertionError, match="nearly 0.*blocks.0.qkv"):
        assert_parity(dead, dead)
