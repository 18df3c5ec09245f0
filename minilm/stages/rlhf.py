"""Stage 3b. RLHF: sample answers, reward them, reinforce the better ones, stay near the reference."""

import numpy as np

from minilm.backend import concatenate
from minilm.generate import Samples, generate
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss, policy_gradient_metrics
from minilm.optim import warmup_cosine
from minilm.packing import pack
from minilm.stages.train_state import train_step, shards, stage
from minilm.tensor import no_grad


@stage
def train_rlhf(training, reference, reward, prompts, steps, prompts_per_step, samples_per_prompt, max_new_tokens,
         eos, beta=0.1, learning_rate=3e-4, temperature=1.0, baseline="leave_one_out",
         microbatches=None):
    """Maximise reward minus beta times the KL divergence to `reference`, by the policy gradient.

    reward     (prompts, responses), two lists of N token lists, to N floats; any function will do
    prompts    token lists to sample answers to; no comparisons needed
    temperature  of sampling; policy and reference are both scored at it, with neither top-k nor
               top-p, or the log-probs would not be those of what was drawn
    microbatches  parts of a step, None for one a worker
    One update per batch of samples, so they are always the policy's own.
    Yields {"loss", "grad_norm", "learning_rate", "reward", "kl_sequence", "kl_token", ...} a step.
    """
    context = training.model.config.context
    shape = (prompts_per_step, samples_per_prompt)
    while training.step < steps:
        drawn = training.rng.integers(len(prompts), size=prompts_per_step)
        asked = [prompts[i] for i in drawn for _ in range(samples_per_prompt)]
        uniforms = training.rng.random((len(asked), max_new_tokens))

        def sample(rows):
            # The policy's own log-probs come with the draw: no second pass for them.
            samples = generate(training.model, [asked[i] for i in rows], max_new_tokens, uniforms[rows], eos, temperature)
            part = pack([asked[i] for i in rows], samples.responses(), context)
            with no_grad():
                return samples.arrays(), reference.response_log_probs(part, temperature).data.sum(axis=1)

        parts = prompt_shards(shape, training.workers)
        pieces, log_pi_ref = zip(*training.team.map(sample, parts))
        order = np.argsort(np.concatenate(parts))
        samples, log_pi_ref = Samples.concatenate(pieces, order), concatenate(log_pi_ref)[order]
        answers, mask = samples.responses(), samples.mask > 0
        kl = (samples.log_probs * mask).sum(axis=1) - log_pi_ref
        rewards = training.team.broadcast(lambda: np.asarray(reward(asked, answers))).reshape(shape)
        A = advantages(rewards, kl.reshape(shape), beta, baseline).reshape(-1)

        def loss(policy, rows):
            part = pack([asked[i] for i in rows], [answers[i] for i in rows], context)
            log_probs = policy.response_log_probs(part, temperature)
            return policy_gradient_loss(log_probs, A[rows], part.mask) * (len(rows) / len(A)), None

        rate = warmup_cosine(training.step, steps, learning_rate, warmup=min(5, steps // 10 + 1), floor=0.3)
        metrics, _ = train_step(training, loss, prompt_shards(shape, microbatches or training.workers), rate, "rlhf")
        yield {**metrics, **policy_gradient_metrics(rewards, kl.reshape(shape), mask),
               "entropy": float(samples.entropies[mask].mean())}


def prompt_shards(shape, count):
    """The rows of (prompts, samples) in at most `count` parts. A prompt's samples stay together, for they share it,
    unless there are fewer prompts than parts."""
    rows = np.arange(np.prod(shape)).reshape(shape)
    if count > len(rows):
        rows = rows.reshape(-1, 1)
    return [rows[part].reshape(-1) for part in shards(len(rows), count)]
