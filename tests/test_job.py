"""scripts/support/job.py: what was saved with a model is checked when a run is resumed, also behind its checksum."""
import argparse
import contextlib
import math

import numpy as np
import pytest

for module in ("fcntl", "safetensors"):
    pytest.importorskip(module, reason="what the scripts need: pip install -e '.[run]'")

from helpers import small_transformer
from minilm import checkpoint
from minilm.checkpoint import CheckpointError
from minilm.parallel import ForkedRanks
from minilm.stages.train_state import TrainState
from minilm.tokenizer import Tokenizer
from support.job import Job
from support.run_folder import RunFolder, StopRequest

TOKENIZER = Tokenizer()
KINDS = {"base": "a finished model", "base-state": "a model in training"}


def model():
    return small_transformer(np.random.default_rng(0), np.float32, vocab_size=TOKENIZER.vocab_size)


def resumed(folder):
    """The model of a run that is resumed: of two steps, in which nothing is trained."""
    def loop(training, steps):
        while training.step < steps:
            training.step += 1
            yield {"loss": 1.0}

    with RunFolder(folder, True, {"seed": 0}) as run:
        options = argparse.Namespace(device="cpu", workers=1, seed=0)
        return Job(options, run, StopRequest(), ForkedRanks(1), 4, TOKENIZER).train("base", 2, model, loop)


def save(folder, kind, arrays, metadata):
    """The file of the finished model, or the checkpoint of the model in training, with a right checksum."""
    metadata = {"history": [{"step": 1, "loss": 1.0}], "seconds": 1.0, "run": {"seed": 0}, **metadata}
    state = TrainState(model(), np.random.default_rng(0))
    state.step = 1
    saved, own = state.snapshot()
    if kind == "base":
        saved = {name: p.data for name, p in model().parameters().items()}
    with RunFolder(folder, True, {"seed": 0}) as run:
        checkpoint.save(run.path(f"{kind}.safetensors"), {**saved, **arrays}, {**own, **metadata})


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_loaded_or_trained_on(tmp_path, kind):
    save(tmp_path / "run", kind, {}, {})
    assert resumed(tmp_path / "run").config == model().config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [{"history": None}, {"history": "x"}, {"history": []}, {"history": [{"step": 1}]},
                                   {"history": [{"loss": 1.0}]}, {"history": [{"step": 1, "loss": math.nan}]},
                                   {"seconds": None}, {"seconds": "1"}, {"seconds": math.inf}, {"run": None}], ids=str)
def test_metadata_that_a_run_cannot_go_on_with_are_refused_in_one_line(tmp_path, kind, wrong):
    save(tmp_path / "run", kind, {}, wrong)
    with pytest.raises(CheckpointError, match=f"{kind}.safetensors: damaged, or of another run .*Delete") as caught:
        resumed(tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"rng": None}, {"rng": {}}, {"rng": 10 ** 400}, {"rng": []}, {"step": -1},
                                   {"step": "1"}, {"step": None}], ids=lambda wrong: str(wrong)[:30])
def test_a_checkpoint_without_a_generator_or_a_step_is_refused_in_one_line(tmp_path, wrong):
    save(tmp_path / "run", "base-state", {}, wrong)
    with pytest.raises(CheckpointError, match="base-state.safetensors: damaged"):
        resumed(tmp_path / "run")


@pytest.mark.parametrize("value", [2 ** 128, -1, 10 ** 400, 1.5, None, "x", [], {}], ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("place", ["state", "inc", "uinteger", "has_uint32", "bit_generator"])
def test_a_damaged_generator_of_a_checkpoint_is_refused_in_one_line_or_read(tmp_path, place, value):
    rng = np.random.default_rng(0).bit_generator.state
    (rng["state"] if place in rng["state"] and place != "state" else rng)[place] = value
    save(tmp_path / "run", "base-state", {}, {"rng": rng})
    with contextlib.suppress(CheckpointError):
        resumed(tmp_path / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_nan_are_refused_in_one_line(tmp_path, kind):
    bad = np.full(model().parameters()["final_norm"].shape, np.nan, np.float32)
    save(tmp_path / "run", kind, {"final_norm" if kind == "base" else "model.final_norm": bad}, {})
    with pytest.raises(CheckpointError, match=f"{kind}.safetensors: damaged"):
        resumed(tmp_path / "run")
