"""Stage 3b. RLHF: sample responses, score them with the reward, reinforce the better ones, stay near the reference.

With one update for each batch of samples, the samples are always drawn from the policy that is updated. With more,
they were drawn from an older policy from the second update on, and the loss is PPO's. The KL in the reward stays that
of the policy that drew the samples (ppo_clip_loss says what the gradient then lacks).

    RLOO       the default
    GRPO       baseline="group", token_mean="response"
    Dr. GRPO   baseline="mean", token_mean=max_new_tokens, beta=0
    DAPO       baseline="group", token_mean="batch", epsilon_high=0.28, beta=0 (without its dynamic sampling)
    GSPO       baseline="group", level="geometric_mean", epsilon=3e-4, epsilon_high=4e-4

The clips act with updates above 1. With beta above 0 the KL penalty is k1 in the reward; GRPO has k3 in the loss
(objectives/kl_in_the_loss.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from minilm import checks
from minilm.backend import concatenate
from minilm.data import check_dialogues
from minilm.diverged import Diverged
from minilm.generate import Samples, generate
from minilm.model import Transformer
from minilm.objectives.policy_gradient import (
    advantages,
    policy_gradient_loss,
    policy_gradient_metrics,
    ppo_clip_loss,
)
from minilm.packing import pack
from minilm.ranks import WorkersDisagree
from minilm.stages import inputs, plan
from minilm.stages.agreement import EVERYONE
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState, repeat, shards, stage
from minilm.tensor import no_grad

SAME_REWARDS = 1e-3         # of the largest: rounding on another kind of CPU changes less

@stage
def train_rlhf(state: TrainState, reference: Transformer, reward: Callable, prompts: Sequence, steps: int,
               prompts_per_step: int, samples_per_prompt: int, max_new_tokens: int,
               eos: int | Collection[int] | None, beta: float = 0.1, learning_rate: plan.Rate = 3e-4,
               temperature: float = 1.0, baseline: str = "leave_one_out", microbatches: int | None = None,
               batches: Sequence | None = None, token_mean: str | float | None = None, updates: int = 1,
               epsilon: float = 0.2, epsilon_high: float | None = None, level: str = "token") -> Iterator[Mapping]:
    """Maximise the reward minus beta times the KL divergence to `reference`, by the policy gradient.

    reference     a frozen copy, such as state.model.copy(): it may not share parameters with the policy
    reward        (prompts, responses), two lists of N token lists, to N finite numbers. It is called once a step, with
                  copies: by all ranks if they run the whole program (parallel.world), else by rank 0. A reward model
                  in it may not share parameters with the policy
    prompts       token lists to sample responses to; no comparisons needed
    eos           the token that ends a response, or several of them, or None (generate.py)
    temperature   of sampling. Policy and reference are both scored at it, without top-k and top-p: otherwise the
                  log-probs would not be those of the distribution that was drawn from
    microbatches  shards of a step, None for one per worker
    token_mean    the mean over tokens, of policy_gradient_loss; "batch" is over all samples of a step
    updates       steps of the optimiser on each batch of samples: 1 for policy_gradient_loss, more for ppo_clip_loss.
                  `steps` counts all of them. Samples are drawn at steps 0, updates, 2 updates ... The last batch of
                  samples has fewer steps if `steps` is no multiple of updates. A call that starts between these steps,
                  because an earlier one ended there, draws samples for the steps that are left until the next of them
    epsilon, epsilon_high, level    of ppo_clip_loss; at the first update the ratio is 1, and nothing is clipped
    batches       the places of the prompts of each batch of samples: batches[step // updates]. See plan.py, also for a
                  learning_rate that is a function
    Yields {"loss", "grad_norm", "learning_rate", "reward", "kl_sequence", "kl_token", "entropy", ...}, and the metrics
    of response_lengths, after each batch of samples: the loss, norm and rate of its last update.
    Raises TypeError, ValueError and IndexError before the first step: for settings out of range, for such models, for a
    prompt anywhere in the data set that is bad or too long for max_new_tokens; and later for the results of reward, as
    inputs.checked_rewards does.
    """
    K = samples_per_prompt
    inputs.check_settings("train_rlhf", steps, learning_rate, microbatches, prompts_per_step=prompts_per_step,
                          samples_per_prompt=K, max_new_tokens=max_new_tokens, updates=updates)
    config = inputs.checked_config("train_rlhf", state.model)
    inputs.check_reference_and_reward("train_rlhf", state.model, reference, reward)
    check_dialogues("train_rlhf", config.vocab_size, config.context, prompts, new_tokens=max_new_tokens)
    plan.check_batches("train_rlhf", steps, batches, len(prompts), updates)
    checks.number("train_rlhf", "beta", beta, at_least=0)
    checks.temperature("train_rlhf", temperature)
    ends = checks.end_tokens("train_rlhf", eos, config.vocab_size)
    advantages(np.zeros((1, K)), np.zeros((1, K)), beta, baseline)      # raises for a baseline that K does not allow
    loss_of_samples = chosen_loss(updates, token_mean, epsilon, epsilon_high, level)

    def step():
        drawn = plan.examples(state, batches, len(prompts), prompts_per_step, updates)
        P = len(drawn)
        batch = [prompts[i] for i in drawn for _ in range(K)]                           # P K prompts
        samples, log_pi_ref = sample_responses(state, reference, batch, prompt_shards(P, K, state.workers),
                                               max_new_tokens, eos, temperature)
        responses = samples.responses()
        mask = samples.mask > 0
        kl = (samples.log_probs * mask).sum(axis=1) - log_pi_ref                        # k1 of each response (P K,)
        rewards = ask(state, reward, batch, responses).reshape(P, K)
        kl = kl.reshape(P, K)
        A = advantages(rewards, kl, beta, baseline).reshape(-1)
        loss = loss_of_rows(loss_of_samples, batch, samples, A, token_mean, temperature)
        more = {**policy_gradient_metrics(rewards, kl, mask), "entropy": float(samples.entropies[mask].mean()),
                **response_lengths(responses, ends)}
        for _ in range(min(updates - state.step % updates, steps - state.step)):
            rate = plan.rate(state, learning_rate, steps, warmup=5, floor=0.3)
            metrics = train_step(state, loss, prompt_shards(P, K, microbatches or state.workers), rate, "RLHF",
                                 drawn=[drawn, *batch], metrics=lambda _: more)
        return metrics
    return repeat(step, state, steps)


def loss_of_rows(loss_of_samples: Callable, prompts: Sequence, samples: Samples, A: np.ndarray,
                 token_mean: str | float | None, temperature: float) -> Callable:
    """A loss for train_step, of the policy and some rows of N samples. The losses of all rows add up to the whole one.

    The mean over the tokens of all samples is one over a constant, their mean length, which is the same in all shards.
    The old log-probs are those of the first update, computed as in the later ones, so its ratio is exactly 1. Those of
    samples differ by the rounding of another computation; in bfloat16 GSPO's narrow clips would act on it.
    """
    responses = samples.responses()
    mean = samples.mask.sum() / len(A) if token_mean == "batch" else token_mean
    first: dict[bytes, np.ndarray] = {}                     # the log-probs at the first update, by rows

    def loss(policy, rows):
        part = pack([prompts[i] for i in rows], [responses[i] for i in rows], policy.config.context)
        log_probs = policy.response_log_probs(part, temperature)
        old = first.setdefault(rows.tobytes(), log_probs.data)
        return loss_of_samples(log_probs, old, A[rows], part.mask, token_mean=mean) * (len(rows) / len(A)), None
    return loss


def chosen_loss(updates: int, token_mean: str | float | None, epsilon: float, epsilon_high: float | None,
                level: str) -> Callable:
    """The loss of log_probs, old_log_probs (n,T), A (n,) and mask (n,T): policy_gradient_loss if the ratio is always 1,
    because each batch of samples has one update, otherwise ppo_clip_loss. Raises ValueError and TypeError for settings
    out of range.
    """
    ppo = functools.partial(ppo_clip_loss, epsilon=epsilon, level=level, epsilon_high=epsilon_high)
    zero = np.zeros((1, 1))
    ppo(zero, zero, zero[0], zero, token_mean=token_mean)                               # raises
    if updates > 1 or level == "geometric_mean":            # the geometric mean differs at ratio 1, too
        return ppo
    return lambda log_probs, old, A, mask, token_mean: policy_gradient_loss(log_probs, A, mask, token_mean)


def response_lengths(responses: Sequence, ends: np.ndarray) -> dict[str, float]:
    """Metrics of N responses, token lists, under TRL's names.

    ends: which tokens end a response, from checks.end_tokens.
    completions/clipped_ratio    fraction of responses that were cut off: they end with another token
    completions/mean_length, completions/min_length, completions/max_length
    completions/mean_terminated_length, and min and max   of the responses that were not cut off; 0 if all were
    """
    lengths, last = np.array([(len(response), response[-1]) for response in responses]).T
    ended = lengths[ends[last]]
    return {"completions/clipped_ratio": 1 - len(ended) / len(lengths),
            **{f"completions/{of}{which}_length": float(getattr(n, of)()) for of in ("mean", "min", "max")
               for which, n in (("", lengths), ("_terminated", ended if len(ended) else np.zeros(1)))}}


def ask(state: TrainState, reward: Callable, prompts: Sequence, responses: Sequence) -> np.ndarray:
    """The rewards of N responses, (N,), from the caller's function, which gets copies: those of rank 0 in every rank.

    Raises WorkersDisagree if another rank has other rewards, by more than the rounding of another kind of CPU.
    """
    def rewards():
        copies = ([list(map(int, tokens)) for tokens in side] for side in (prompts, responses))
        return inputs.checked_rewards("train_rlhf", reward(*copies), len(prompts))

    if not state.group.everyone:
        return state.group.once(rewards)
    first, *others = state.group.all_gather(rewards())
    for rank, theirs in enumerate(others, 1):
        if not np.allclose(theirs, first, rtol=0, atol=SAME_REWARDS * np.abs(first).max()):
            raise WorkersDisagree(f"RLHF, step {state.step + 1}: rank {rank} has other rewards than rank 0. {EVERYONE}")
    return first


def sample_responses(state: TrainState, reference: Transformer, prompts: Sequence,
                     row_shards: Sequence[np.ndarray], max_new_tokens: int, eos: int | Collection[int] | None,
                     temperature: float) -> tuple[Samples, np.ndarray]:
    """One response of state.model to each of N prompts, and log pi_ref of each, (N,). Every rank gets all of them.

    The policy's own log-probs come with the samples: no second forward for them.
    """
    uniforms = state.rng.random((len(prompts), max_new_tokens))

    def sample(rows):
        asked = [prompts[i] for i in rows]
        try:
            samples = generate(state.model, asked, max_new_tokens, uniforms[rows], eos, temperature)
        except Diverged as error:
            raise Diverged(f"RLHF, step {state.step + 1}: {error}") from error
        part = pack(asked, samples.responses(), state.model.config.context)
        with no_grad():
            return samples.arrays(), reference.response_log_probs(part, temperature).data.sum(axis=1)

    pieces, log_pi_ref = zip(*state.group.each(sample, row_shards)[0])
    order = np.argsort(np.concatenate(row_shards))
    return Samples.concatenate(pieces, order), concatenate(log_pi_ref)[order]


def prompt_shards(P: int, K: int, n: int) -> list[np.ndarray]:
    """The rows of P prompts with K samples each, in at most n shards.

    The samples of a prompt stay in one shard, because they share its computation, unless there are fewer prompts than
    shards.
    """
    rows = np.arange(P * K).reshape(P, K)
    if n > P:
        rows = rows.reshape(-1, 1)
    return [rows[shard].reshape(-1) for shard in shards(len(rows), n)]
