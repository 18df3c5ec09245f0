"""One run of assistant.py: its folder, its random generators, training with checkpoints, and sampling.

Every rank runs all of it (minilm/parallel). What depends on the disk, the clock or a signal goes through ranks.once().
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from minilm import checks, data
from minilm.checkpoint import CheckpointError, load_into
from minilm.generate import generate
from minilm.model import RewardModel, Transformer
from minilm.model_file import save_model
from minilm.ranks import Ranks
from minilm.stages.train_state import TrainState
from minilm.tokenizer import Tokenizer
from minilm.world import annotators, tasks
from support.json_files import fault
from support.results import shape_of_history
from support.run_folder import RunFolder, StopRequest
from support.terminal import progress

SAVE_EVERY = 30.0       # seconds
BLOCK = 128             # responses that are sampled together


class Stopped(Exception):
    """Ctrl-C: the state of the run is saved."""


@dataclasses.dataclass
class Job:
    """The state that all stages share: options, folder, tokenizer, and the measurements so far.

    history  {model: [metrics of each step]}
    seconds  {model or step of the run: duration}
    """

    options: argparse.Namespace
    run: RunFolder
    stop: StopRequest
    ranks: Ranks
    max_new_tokens: int
    tokenizer: Tokenizer = None
    history: dict = dataclasses.field(default_factory=dict)
    seconds: dict = dataclasses.field(default_factory=dict)

    def rng(self, name: str) -> np.random.Generator:
        """A generator for one part of the run, so that a resumed run need not repeat the parts before it."""
        return np.random.default_rng([self.options.seed, *name.encode()])

    def stop_if_asked(self) -> None:
        if self.ranks.once(lambda: self.stop.requested):
            raise Stopped

    def train(self, name: str, steps: int, start: Callable, loop: Callable, **settings) -> Transformer | RewardModel:
        """Trains the model `name` up to the step `steps`, and writes its model file.

        start() makes the model. loop(training, steps) is the stage, a generator of metrics. settings go to AdamW.
        A model whose file exists is loaded instead; a stopped training continues at its checkpoint.
        """
        self.stop_if_asked()
        model = start().to_device(self.options.device)
        if trained := self.run.load_state(name):
            return self._take_trained(name, model, *trained)
        training = TrainState(model, self.rng(name), group=self.ranks, **settings)
        history, seconds_before = self._restore(name, training)
        began = time.monotonic()
        last_save = began
        with progress(name, steps, training.step) as advance:
            def note(step, metrics):
                history.append({"step": step, **metrics})
                advance(metrics)

            late: list = []             # a GPU may be computing the last step still: it is noted after the next one
            for metrics in loop(training, steps):
                late.append((training.step, metrics))
                now = time.monotonic()
                save = self.ranks.once(lambda: self.stop.requested or now - last_save > SAVE_EVERY)
                known = save or isinstance(metrics, dict) or training.step == steps
                while len(late) > (0 if known else 1):
                    note(*late.pop(0))
                if save:
                    self._save_state(name, training, history, seconds_before + now - began)
                    last_save = time.monotonic()
                    self.stop_if_asked()
        self.history[name] = history
        self.seconds[name] = seconds_before + time.monotonic() - began
        self.run.write(f"{name}.safetensors", lambda path: save_model(
            path, training.model, self.tokenizer, run=self.run.fingerprint, history=history,
            seconds=self.seconds[name]))
        self.run.drop_state(f"{name}-state")
        return training.model

    def _take_trained(self, name, model, arrays, metadata):
        path = self.run.path(f"{name}.safetensors")
        try:
            self._check(name, metadata)
            for tensor, array in arrays.items():
                checks.finite("load", tensor, array)
        except (TypeError, ValueError) as error:
            raise _other_run(path) from error
        load_into(model.parameters(), arrays, path)
        self.history[name] = metadata["history"]
        self.seconds[name] = metadata["seconds"]
        self.run.drop_state(f"{name}-state")
        return model

    def _check(self, name, metadata):
        """Raises ValueError if the metadata of a model or a checkpoint are of another run, or cannot be continued."""
        if metadata.get("run") != self.run.fingerprint:
            raise ValueError("another run")
        if found := fault(metadata, {"history": shape_of_history(name), "seconds": float}):
            raise ValueError(found)

    def _restore(self, name, training):
        """Restores the checkpoint of a stopped training, if there is one: (history, seconds) until then."""
        saved = self.run.load_state(f"{name}-state")
        if saved is None:
            return [], 0.0
        arrays, metadata = saved
        try:
            self._check(name, metadata)
            training.restore(arrays, metadata)
            return metadata["history"], metadata["seconds"]
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise _other_run(self.run.path(f"{name}-state.safetensors")) from error

    def _save_state(self, name, training, history, seconds):
        arrays, metadata = training.snapshot()
        self.run.save_state(f"{name}-state", arrays, {**metadata, "run": self.run.fingerprint, "history": history,
                                                      "seconds": seconds})

    def sample(self, model: Transformer, prompts: Sequence[list[int]], rng: np.random.Generator,
               temperature: float = 1.0) -> list[list[int]]:
        """One response to each prompt, as token lists."""
        self.stop_if_asked()
        uniforms = rng.random((len(prompts), self.max_new_tokens))

        def draw(i):
            block = slice(i, i + BLOCK)
            return generate(model, prompts[block], self.max_new_tokens, uniforms[block], self.tokenizer.eos,
                            temperature).responses()

        blocks, _ = self.ranks.each(draw, range(0, len(prompts), BLOCK))
        return [response for block in blocks for response in block]

    def encode_questions(self, questions: Sequence[tasks.Question]) -> list[list[int]]:
        """The prompts of the questions, as token lists."""
        return [data.encode_prompt(self.tokenizer, question.text) for question in questions]

    def read(self, responses: Sequence[list[int]]) -> list[tuple[str, bool]]:
        """(text, whether it ended with <eos>) of each response."""
        return [(data.decode_response(self.tokenizer, tokens).strip(), tokens[-1] == self.tokenizer.eos)
                for tokens in responses]

    def judge(self, questions: Sequence[tasks.Question],
              responses: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Two arrays (N,): whether each response is right (0 or 1), and its gold reward."""
        answered = list(zip(questions, self.read(responses)))
        return (np.array([annotators.is_right(question, text) for question, (text, _) in answered], float),
                np.array([annotators.gold_reward(question, *reading) for question, reading in answered]))


def _other_run(path):
    return CheckpointError(f"{path}: damaged, or of another run or another architecture. Delete this file; "
                           "--resume then trains that stage again.")
