"""What align.py measures before and after training, on examples that it did not train on."""

import dataclasses
import pydoc_data.topics
from collections.abc import Callable, Sequence

import numpy as np

from minilm import data, evaluate
from minilm.fast.workers import parallel_map
from minilm.generate import generate
from minilm.model import RewardModel, Transformer
from minilm.packing import packs
from minilm.pretrained.encoding import ChatEncoding, QuestionEncoding
from minilm.pretrained.training_data import Examples
from minilm.stages.dpo import summed_log_probs
from minilm.tensor import no_grad

TOGETHER = 16               # sequences in a forward pass
OTHER_TEXT_TOKENS = 512     # of the text that has nothing to do with the examples


@dataclasses.dataclass
class Sampling:
    """How answers are drawn: random numbers by name and seed, tokens, temperature 1, processes."""
    seed: int
    max_new_tokens: int
    workers: int

    def draw(self, model: Transformer, prompts: Sequence[list[int]], ends: Sequence[int], name: str) -> list[list[int]]:
        """One response to each prompt. The same name gives the same random numbers."""
        uniforms = np.random.default_rng([self.seed, *name.encode()]).random((len(prompts), self.max_new_tokens))
        responses = []
        for i in range(0, len(prompts), TOGETHER):
            part = slice(i, i + TOGETHER)
            responses += generate(model, prompts[part], self.max_new_tokens, uniforms[part], ends,
                                  workers=self.workers).responses()
        return responses


def of_demonstrations(model: Transformer, held_out: Examples, workers: int) -> dict:
    """The loss of held-out responses, in nats per token."""
    responses = held_out.responses["responses"]
    total = log_probs(model, held_out.prompts, responses, workers)
    return {"loss": float(-total.sum() / sum(map(len, responses)))}


def of_pairs(model: Transformer, base: Transformer, held_out: Examples, beta: float, workers: int) -> dict:
    """DPO's accuracy and margin on held-out pairs, with TRL's names."""
    rewards = [beta * log_ratios(model, base, held_out.prompts, side, workers) for side in held_out.responses.values()]
    return {**with_error("rewards/accuracies", rewards[0] > rewards[1]),
            **with_error("rewards/margins", rewards[0] - rewards[1])}


def of_rewards(model: RewardModel, held_out: Examples, workers: int) -> dict:
    """The share of held-out pairs in which the chosen response has the higher reward, and the difference."""
    chosen, rejected = (evaluate.predicted_rewards(model, held_out.prompts, side, TOGETHER, workers)
                        for side in held_out.responses.values())
    return {**with_error("accuracy", evaluate.wins(chosen, rejected)), **with_error("margin", chosen - rejected)}


def of_answers(model: Transformer, base: Transformer, held_out: Examples, ends: Sequence[int], sampling: Sampling,
               judge: Callable | None, rivals: np.ndarray | None) -> dict:
    """Of one answer to each held-out prompt, at temperature 1: length and KL from the base; with a judge the reward and
    the share of prompts on which it beats a second answer of the base (the base itself wins about half).

    rivals (N,): the rewards of these second answers.
    """
    prompts = held_out.prompts
    answers = sampling.draw(model, prompts, ends, "answers")
    found = {**with_error("tokens", list(map(len, answers))),
             **with_error("ended", [answer[-1] in ends for answer in answers]),
             **with_error("kl", log_ratios(model, base, prompts, answers, sampling.workers))}
    if judge is not None:
        rewards = np.array(judge(prompts, answers), float)
        found |= {**with_error("reward", rewards), **with_error("win_rate", evaluate.wins(rewards, rivals))}
    return found


def perplexity_elsewhere(model: Transformer, encoding: ChatEncoding | QuestionEncoding) -> dict:
    """exp(loss) of a text that has nothing to do with the examples: of Python's help on `with`, `try` and others."""
    text = "".join(pydoc_data.topics.topics[topic] for topic in ("with", "try", "assert"))
    tokens = encoding.tokenizer.encode(text)[:min(OTHER_TEXT_TOKENS, model.config.context)]
    with no_grad():
        return {"perplexity_elsewhere": float(np.exp(-model.log_probs(np.array([tokens])).data.mean()))}


def log_ratios(model: Transformer, base: Transformer, prompts: Sequence[list[int]], responses: Sequence[list[int]],
               workers: int) -> np.ndarray:
    """log(pi(response | prompt) / pi_base(response | prompt)) of each: (N,)."""
    if model is base:
        return np.zeros(len(prompts))
    return evaluate.sequence_kl(model, base, prompts, responses, TOGETHER, workers=workers)


def log_probs(model: Transformer, prompts: Sequence[list[int]], responses: Sequence[list[int]],
              workers: int) -> np.ndarray:
    """log pi(response | prompt) of each: (N,)."""
    with no_grad():
        return np.concatenate(parallel_map(lambda part: summed_log_probs(model, part).data,
                                           list(packs(prompts, responses, TOGETHER)), workers))


def with_error(name: str, values: Sequence) -> dict:
    """{name: mean, name_se: its standard error}"""
    mean, error = evaluate.mean_and_error(np.asarray(values, float))
    return {name: mean, f"{name}_se": None if np.isnan(error) else error}


def text_of(encoding: ChatEncoding | QuestionEncoding, tokens: list[int]) -> str:
    """The words of a response."""
    if isinstance(encoding, QuestionEncoding):
        return data.decode_response(encoding.tokenizer, tokens).strip()
    return encoding.tokenizer.decode(tokens).strip()
