"""Stage 3b. RLHF: sample answers, reward them, reinforce the better ones, stay near the reference."""

import numpy as np

from minilm.generate import generate
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss, policy_gradient_metrics
from minilm.optim import warmup_cosine
from minilm.packing import pack
from minilm.stages.training import optimise, split
from minilm.tensor import no_grad


def rlhf(training, reference, reward, prompts, steps, prompts_per_step, samples_per_prompt, max_new_tokens,
         eos, beta=0.1, learning_rate=3e-4, temperature=1.0, baseline="leave_one_out",
         micro_batches=None):
    """Maximise reward minus beta times the KL divergence to `reference`, by the policy gradient.

    reward     (prompts, responses), two lists of N token lists, to N floats; any function will do
    prompts    token lists to sample answers to; no comparisons needed
    temperature  of sampling; policy and reference are both scored at it, with neither top-k nor
               top-p, or the log-probs would not be those of what was drawn
    micro_batches  parts of a step, None for one a thread
    One update per batch of samples, so they are always the policy's own.
    Yields {"loss", "grad_norm", "learning_rate", "reward", "kl_sequence", "kl_token", ...} a step.
    """
    context = training.model.config.context
    shape = (prompts_per_step, samples_per_prompt)
    while training.step < steps:
        drawn = training.rng.integers(len(prompts), size=prompts_per_step)
        asked = [prompts[i] for i in drawn for _ in range(samples_per_prompt)]
        uniforms = training.rng.random((len(asked), max_new_tokens))
        # The policy's own log-probs come with the draw: no second pass for them.
        samples = generate(training.model, asked, max_new_tokens, uniforms, eos, temperature, threads=training.threads)
        answers, mask = samples.responses(), samples.mask > 0
        # A prompt's samples stay together, for they share it, unless there are fewer prompts than parts.
        count, rows = micro_batches or training.threads, np.arange(len(asked))
        if count <= prompts_per_step:
            parts = [rows.reshape(shape)[part].reshape(-1) for part in split(prompts_per_step, count)]
        else:
            parts = [rows[part] for part in split(len(rows), count)]
        packs = [pack([asked[i] for i in rows], [answers[i] for i in rows], context) for rows in parts]

        def score(_, part):
            with no_grad():
                return reference.response_log_probs(part, temperature).data.sum(axis=1)

        log_pi_ref = np.empty(len(asked))
        for rows, log_probs in zip(parts, training.each(score, packs)):
            log_pi_ref[rows] = log_probs
        kl = (samples.log_probs * mask).sum(axis=1) - log_pi_ref
        rewards = np.asarray(reward(asked, answers)).reshape(shape)
        A = advantages(rewards, kl.reshape(shape), beta, baseline).reshape(-1)

        def loss(policy, rows_and_part):
            rows, part = rows_and_part
            log_probs = policy.response_log_probs(part, temperature)
            return policy_gradient_loss(log_probs, A[rows], part.mask) * (len(rows) / len(A)), None

        rate = warmup_cosine(training.step, steps, learning_rate, warmup=min(5, steps // 10 + 1), floor=0.3)
        metrics, _ = optimise(training, loss, list(zip(parts, packs)), rate, "rlhf")
        yield {**metrics, **policy_gradient_metrics(rewards, kl.reshape(shape), mask),
               "entropy": float(samples.entropies[mask].mean())}
