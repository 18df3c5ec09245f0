"""Twenty steps of SmolLM2-135M-Instruct have the losses, metrics and updates of TRL's trainers. Peak memory: 4 GB.

The first update of TRL's own SFT differs by 1.7e-3, because transformers gives the padding token no gradient as an
input: in this model it is <|im_end|>, the end of every message. With that gradient (test_trl_training.Recorded) at most
1.3e-4 is left: the rounding of float32, which Adam enlarges where a gradient is near its eps.
"""
import gc

import pytest

import test_smollm2
import test_trl_training
from minilm.pretrained import load, save

pytestmark = [pytest.mark.parity, pytest.mark.slow]
file, libraries = test_smollm2.file, test_trl_training.libraries        # the fixtures
LOSSES, UPDATES = 2e-5, 5e-4        # relative, as in test_trl_training.py; 3e-6 and 1.3e-4 are seen


@pytest.fixture(scope="module")
def work(file, tmp_path_factory):
    """A folder with the model, and lines for each stage. A short system message in place of the model's own."""
    folder = tmp_path_factory.mktemp("work")
    save(*load(file), folder / "model")
    test_trl_training.write_lines(folder, [{"role": "system", "content": "Be brief."}])
    return folder


@pytest.mark.parametrize("stage, adapters, rate", [("sft", False, 1e-5), ("dpo", True, 2e-4), ("reward", True, 2e-4)],
                         ids=["sft-whole", "dpo-adapters", "reward-adapters"])
def test_losses_metrics_and_updates_of_twenty_steps_are_those_of_trl(libraries, work, tmp_path, stage, adapters, rate):
    theirs = test_trl_training.Recorded(libraries, work, tmp_path, stage, adapters, learning_rate=rate)
    gc.collect()            # the trainer, with its moments
    test_trl_training.assert_training_is_theirs(theirs, stage, work, adapters, LOSSES, UPDATES)
