"""Why is GRPO's loss 0 or rising while the reward grows, and what do healthy metrics look like?

Claim. With one update for each batch and the mean of each response, the loss is beta times the KL estimate per token
and nothing else: centred advantages add up to zero at a ratio of 1. So the loss starts at 0 and rises with the KL,
whether the policy gets better or worse; read the reward, the KL, the entropy, the share of groups with equal rewards
and the share of responses that are cut off.

Test. A transformer of 25,632 parameters, finetuned on 4,000 demonstrations, answers 9 questions in at most 4 sentences.
A reply has the reward 1 if it names the right word and no other, otherwise 0. GRPO with 16 prompts of 4 samples a step:
advantages divided by the standard deviation of the group, the clipped token ratio, the mean over the tokens of each
response, and beta = 0.04 times k3 of tokens in the loss. One healthy run and four broken ones: the sign of the
advantages flipped; the learning rate ten times higher; tokens of the prompt counted as response; EOS not counted, which
happens if it is also the padding token. Of every step: the loss that a trainer logs, its part without the KL, and the
metrics. In the healthy run also two other losses of the same samples: the ratio with the mean over the batch (DAPO),
and -A log pi summed over tokens (RLOO, REINFORCE).

Rule. In the healthy run the reward rises by more than 0.1 and the loss rises as well; with flipped advantages the loss
rises while the reward falls by more than 0.1; and the part of the loss without the KL is below 1e-5 in every step of
the two runs and of the one with the higher learning rate. Rise: the mean over the last fifth of the steps minus the
mean over the first five.

Limits. One small world with one setting; a learning rate ten times too high need not have the same symptoms elsewhere.
The loss does differ between the runs, because their KL does; its sign and its rise do not tell them apart. Not every
mistake has a clear symptom: with tokens of the prompt counted the reward is lower by 0.01, and no other metric stands
out. Where EOS is not counted, a response of EOS alone has no counted token, so that advantages do not add up to zero
and the loss can be negative. With several updates for each batch the ratio differs from 1 and the loss without the KL
differs from 0; that is not tested here. The share of clipped ratios is 0, because there is one update for each batch.
The loss of a run without a KL term is 0 throughout. Gradients are not 0 where the loss is: its derivative is -A for
each response. The findings on correlations were expected to be below 0 and are not.

Source. GRPO: Shao et al. 2024, arXiv:2402.03300, (3); DAPO: Yu et al. 2025, arXiv:2503.14476; Ahmadian et al. 2024,
arXiv:2402.14740. Asked in open-r1 #239 and TRL #2976.

Figure. Loss, reward, KL (symlog axis), entropy, share of groups with equal rewards, share of responses cut off and
gradient norm (symlog axis) against the step, one colour per run, and three losses of the healthy run, all smoothed over
ten steps, as the mean and the range over the seeds.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "lecture"))       # for common
from common.experiment import COLOURS, Comparison, Conclusion, mean, mean_range, run, spread
from common.recipes import sft_model

# isort: split
import numpy as np

from minilm import ops
from minilm.data import make_batch
from minilm.generate import generate
from minilm.objectives.kl import k3
from minilm.objectives.kl_in_the_loss import token_kl_loss
from minilm.objectives.policy_gradient import (
    advantages,
    policy_gradient_loss,
    policy_gradient_metrics,
    ppo_clip_loss,
)
from minilm.optim import warmup_cosine
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState, stage
from minilm.tensor import no_grad
from worlds.replies import EOS, LONGEST, SENTENCES, ReplyWorld

# P prompts, K samples per prompt.
BETA, RATE, P, K = 0.04, 2e-3, 16, 4
HEALTHY, FLIPPED, FASTER, PROMPT, NO_EOS = ("healthy", "advantages flipped", "learning rate x 10", "prompt counted",
                                            "EOS not counted")
RUNS = (HEALTHY, FLIPPED, FASTER, PROMPT, NO_EOS)
LOSS, WITHOUT_KL, BATCH, LOG_PI = "loss", "loss without the KL", "ratio, mean of the batch", "-A log pi, summed"
METRICS = {LOSS: "loss", "reward": "reward", "kl_sequence": "KL (nats)", "entropy": "entropy\n(nats per token)",
           "frac_reward_zero_std": "groups with\nequal rewards", "completions/clipped_ratio": "responses cut off",
           "grad_norm": "gradient norm"}
SYMLOG = ("kl_sequence", "grad_norm")
SIZES = {"quick": {"seeds": 3, "tuning": 4, "steps": 6}, "default": {"seeds": 6, "tuning": 300, "steps": 100}}


def right(question, text, finished):
    """1 if the reply names the right word and no other."""
    return float({s for s in SENTENCES[3:] if s in text.split()} == {f"{question.answer}."})


def counted_as_response(run, batch):
    """The mask (N,T) of the predicted tokens that the loss of this run counts."""
    mask, tokens = batch.mask[:, 1:], batch.tokens[:, 1:]
    if run == PROMPT:
        return batch.real[:, 1:]
    return mask * (tokens != EOS) if run == NO_EOS else mask


def losses(log_probs, old, reference, A, mask):
    """(whole loss, its part without the KL), Tensors, of token log-probs (N,T)."""
    policy = ppo_clip_loss(log_probs, old, A, mask, token_mean="response")
    terms = k3(ops.where(mask > 0, log_probs, 0.0), np.where(mask > 0, reference, 0))
    return policy + BETA * token_kl_loss(terms, mask, "response"), policy


@stage
def grpo(training, reference, reward, prompts, steps, run):
    """GRPO with one update for each batch of samples, as this run does it. Yields the metrics of every step."""
    while training.step < steps:
        batch_prompts = [prompts[i] for i in training.rng.integers(len(prompts), size=P) for _ in range(K)]
        samples = generate(training.model, batch_prompts, LONGEST, training.rng, EOS)
        responses = samples.responses()
        batch = make_batch(batch_prompts, responses, pad=EOS)
        counted = counted_as_response(run, batch)
        with no_grad():
            old, log_ref = (model.log_probs(batch.tokens).data for model in (training.model, reference))
        kl = np.where(batch.mask[:, 1:] > 0, old - log_ref, 0).sum(axis=1).reshape(P, K)
        rewards = np.asarray(reward(batch_prompts, responses)).reshape(P, K)
        A = advantages(rewards, np.zeros((P, K)), 0.0, "group").reshape(-1) * (-1 if run == FLIPPED else 1)

        def loss(policy, _):
            return losses(policy.log_probs(batch.tokens), old, log_ref, A, counted)[0], None

        values = {WITHOUT_KL: losses(old, old, log_ref, A, counted)[1],
                  BATCH: ppo_clip_loss(old, old, A, counted, token_mean="batch"),
                  LOG_PI: policy_gradient_loss(old, A, counted)}
        rate = warmup_cosine(training.step, steps, RATE * (10 if run == FASTER else 1), warmup=5, floor=0.3)
        metrics = train_step(training, loss, [None], rate, "grpo", drawn=[batch.tokens])
        yield {**metrics, **policy_gradient_metrics(rewards, kl, batch.mask[:, 1:]),
               "entropy": samples.entropies[samples.mask > 0].mean(),
               "completions/clipped_ratio": np.mean([response[-1] != EOS for response in responses]),
               **{name: float(value.data) for name, value in values.items()}}


def measure(experiment, seed, tuning, steps):
    rng = np.random.default_rng(seed)
    world = ReplyWorld(words=2)
    model = sft_model(world, rng, tuning, experiment.dtype)
    reward = world.reward(world.table(right))
    results = {}
    for name in RUNS:
        training = TrainState(model.copy(), rng, weight_decay=0.0)
        history = list(grpo(training, model, reward, world.prompts, steps, name))
        results[name] = {key: [float(m[key]) for m in history] for key in (*METRICS, WITHOUT_KL, BATCH, LOG_PI)}
        experiment.say(f"seed {seed}, {name}: reward {np.mean(results[name]['reward'][-steps // 5:]):.2f}")
    return results


def early(s, run, key):
    return np.mean(s[run][key][:5])


def late(s, run, key):
    return np.mean(s[run][key][-max(1, len(s[run][key]) // 5):])


def rises(seeds, run, key):
    """The mean over the last fifth of the steps minus the mean over the first five, of each seed."""
    return [late(s, run, key) - early(s, run, key) for s in seeds]


def against_healthy(seeds, run, key):
    """A metric in the last fifth of this run minus that of the healthy one, of each seed."""
    return [late(s, run, key) - late(s, HEALTHY, key) for s in seeds]


def correlation(s, key):
    """Of this loss with the reward over the steps of the healthy run; 0 for a loss that does not change."""
    x, y = np.array(s[HEALTHY][key]), np.array(s[HEALTHY]["reward"])
    return 0.0 if min(x.std(), y.std()) < 1e-6 else float(np.corrcoef(x, y)[0, 1])


def conclude(seeds, size):
    rule = [Comparison("rise of the reward, healthy", rises(seeds, HEALTHY, "reward"), above=0.1),
            Comparison("rise of the loss, healthy", rises(seeds, HEALTHY, LOSS), above=0),
            Comparison("rise of the loss, advantages flipped", rises(seeds, FLIPPED, LOSS), above=0),
            Comparison("rise of the reward, advantages flipped", rises(seeds, FLIPPED, "reward"), below=-0.1),
            Comparison("largest part of the loss without the KL, three runs",
                       [max(np.abs(s[run][WITHOUT_KL]).max() for run in (HEALTHY, FLIPPED, FASTER)) for s in seeds],
                       below=1e-5)]
    findings = [Comparison(f"KL, {FASTER}, minus healthy (nats)", against_healthy(seeds, FASTER, "kl_sequence"),
                           above=0),
                Comparison(f"entropy, {FASTER}, minus healthy (nats per token)",
                           against_healthy(seeds, FASTER, "entropy"), below=0),
                Comparison(f"reward, {FASTER}, minus healthy", against_healthy(seeds, FASTER, "reward"), below=0),
                Comparison(f"share cut off, {NO_EOS}, minus healthy",
                           against_healthy(seeds, NO_EOS, "completions/clipped_ratio"), above=0.1),
                Comparison(f"reward, {NO_EOS}, minus healthy", against_healthy(seeds, NO_EOS, "reward"), below=0),
                Comparison(f"reward, {PROMPT}, minus healthy", against_healthy(seeds, PROMPT, "reward"), below=0),
                Comparison(f"KL, {PROMPT}, minus healthy (nats)", against_healthy(seeds, PROMPT, "kl_sequence"),
                           above=0),
                *(Comparison(f"correlation of the loss with the reward over the steps, healthy: {key}",
                             [correlation(s, key) for s in seeds], below=0) for key in (LOSS, BATCH, LOG_PI))]
    numbers = {f"{name}, {when}, {key}": spread(of(s, name, key) for s in seeds) for name in RUNS
               for when, of in (("first five steps", early), ("last fifth", late)) for key in METRICS}
    start = [np.mean([early(s, name, "reward") for name in RUNS]) for s in seeds]
    table = [["run", *(label.replace("\n", " ") for label in METRICS.values())]]
    table += [[name, *(mean_range([late(s, name, key) for s in seeds], 3 if key == LOSS else 2) for key in METRICS)]
              for name in RUNS]
    details = [["loss of the healthy run", "first five steps", "last fifth", "correlation with the reward"]]
    for key in (LOSS, WITHOUT_KL, BATCH, LOG_PI):
        details.append([key, *(mean_range([of(s, HEALTHY, key) for s in seeds], 3) for of in (early, late)),
                        mean_range([correlation(s, key) for s in seeds])])
    ends = {(name, key): [late(s, name, key) for s in seeds] for name in (HEALTHY, FLIPPED) for key in ("reward", LOSS)}
    words = (f"From a reward of {mean(start)} the healthy run ends at {mean(ends[HEALTHY, 'reward'])} and the run with "
             f"flipped advantages at {mean(ends[FLIPPED, 'reward'])}. The loss rises in both, to "
             f"{mean(ends[HEALTHY, LOSS], 3)} and {mean(ends[FLIPPED, LOSS], 3)}: it is beta times the KL estimate.")
    legend = "Mean over the last fifth of the steps, over the seeds [least, greatest]."
    return Conclusion(rule, words, numbers, table, findings=findings, legend=legend, details=details)


def smooth(values, width=10):
    """The mean of the last `width` values, of fewer at the start."""
    return [np.mean(values[max(0, i - width):i]) for i in range(1, len(values) + 1)]


def band(axis, seeds, run, key, label, colour, style="-"):
    by_seed = [smooth(s[run][key]) for s in seeds]
    steps = np.arange(1, len(by_seed[0]) + 1)
    axis.fill_between(steps, np.min(by_seed, axis=0), np.max(by_seed, axis=0), color=colour, alpha=0.15, linewidth=0)
    axis.plot(steps, np.mean(by_seed, axis=0), style, color=colour, linewidth=1.6, label=label)


def draw(figure, seeds, size):
    *axes, last = figure.subplots(2, 4).ravel()
    for axis, (key, label) in zip(axes, METRICS.items()):
        for name, colour in zip(RUNS, COLOURS):
            band(axis, seeds, name, key, name, colour)
        axis.set(title=label, xlabel="step")
        if key in SYMLOG:
            axis.set_yscale("symlog", linthresh=1)
    for key, label, style in ((LOSS, "GRPO", "-"), (BATCH, "mean of the batch", "--"), (LOG_PI, "-A log pi", ":")):
        band(last, seeds, HEALTHY, key, label, COLOURS[0], style)
    last.set(title="three losses,\nhealthy run", xlabel="step")
    last.legend(fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(RUNS), fontsize=9)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(12, 6)))
