"""scripts/lecture/common/masked_pretraining.py: the loss token by token; hidden tokens are not visible."""
import numpy as np
import pytest

from common.masked_pretraining import masked_log_probs, masked_pretraining
from helpers import assert_close, small_transformer
from minilm import checkpoint
from minilm.model import Config, Transformer
from minilm.stages.train_state import TrainState

MASK, VOCABULARY = 6, 7


def encoder(seed=0, **config):
    return small_transformer(np.random.default_rng(seed), vocab_size=VOCABULARY, causal=False, **config)


def draw(rng, count):
    """Six tokens, of which the odd ones may be hidden."""
    return rng.integers(MASK, size=(count, 6)), np.tile([0, 1], (count, 3))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum())


def test_a_hidden_token_is_scored_at_its_position_with_the_mask_as_input():
    model, rng = encoder(), np.random.default_rng(1)
    tokens, hidden = rng.integers(MASK, size=(4, 5)), rng.random((4, 5)) < 0.5
    actual = masked_log_probs(model, tokens, hidden, MASK).data
    for b, t in zip(*np.nonzero(hidden)):
        seen = [MASK if hidden[b, i] else tokens[b, i] for i in range(5)]
        assert_close(actual[b, t], log_softmax(model(np.array([seen])).data[0, t])[tokens[b, t]])


def test_hidden_tokens_are_not_visible_and_later_tokens_are():
    model, tokens, hidden = encoder(), np.array([[0, 1, 2, 3]]), np.array([[False, True, True, False]])
    before = masked_log_probs(model, tokens, hidden, MASK).data
    other = masked_log_probs(model, np.array([[0, 1, 5, 3]]), hidden, MASK).data
    assert before[0, 1] == other[0, 1]
    after = masked_log_probs(model, np.array([[0, 1, 2, 4]]), hidden, MASK).data
    assert abs(after[0, 1] - before[0, 1]) > 1e-3


@pytest.mark.parametrize("workers, microbatches", [(1, None), (1, 4), (2, None)])
def test_the_loss_is_the_mean_over_the_hidden_tokens_of_the_whole_step(workers, microbatches):
    training = TrainState(encoder(), np.random.default_rng(3), workers)
    model, rng = training.model.copy(), np.random.default_rng(3)
    tokens, mask = draw(rng, 8)
    hidden = mask.astype(bool) & (rng.random(tokens.shape) < 0.4)
    metrics = next(masked_pretraining(training, draw, 1, 8, MASK, share=0.4, microbatches=microbatches))
    assert 0 < hidden.sum() == metrics["trained_tokens"] < mask.sum()
    losses = [-masked_log_probs(model, tokens[b:b + 1], hidden[b:b + 1], MASK).data[0, t]
              for b, t in zip(*np.nonzero(hidden))]
    assert_close(metrics["loss"], np.mean(losses))


def test_a_share_of_one_hides_every_token_of_the_mask():
    training = TrainState(encoder(), np.random.default_rng(0))
    assert next(masked_pretraining(training, draw, 1, 8, MASK, share=1.0))["trained_tokens"] == 24


def test_a_token_that_only_its_right_neighbour_determines_is_learned():
    """Each pair of tokens is x x; the first is hidden, and a decoder cannot predict it."""
    def pairs(rng, count):
        return rng.integers(MASK, size=(count, 3)).repeat(2, axis=1), np.tile([1, 0], (count, 3))

    rng = np.random.default_rng(0)
    model = Transformer(Config(vocab_size=VOCABULARY, width=16, layers=1, heads=2, causal=False), rng)
    losses = [m["loss"] for m in masked_pretraining(TrainState(model, rng), pairs, 120, 16, MASK, 1.0, 1e-2)]
    assert losses[0] > 1.5 and np.mean(losses[-10:]) < 0.2


def test_a_run_restored_from_a_file_continues_bit_for_bit(tmp_path):
    pytest.importorskip("safetensors")

    def losses(training, until):
        loop = masked_pretraining(training, draw, 4, 5, MASK, share=0.5)
        return [next(loop)["loss"] for _ in range(training.step, until)]

    expected = losses(TrainState(encoder(), np.random.default_rng(0)), 4)
    stopped = TrainState(encoder(), np.random.default_rng(0))
    before = losses(stopped, 2)
    checkpoint.save(tmp_path / "state", *stopped.snapshot())
    resumed = TrainState(encoder(9), np.random.default_rng(9))
    resumed.restore(*checkpoint.load(tmp_path / "state"))
    assert before + losses(resumed, 4) == expected


def test_a_causal_model_and_a_step_without_hidden_tokens_raise():
    causal = TrainState(small_transformer(np.random.default_rng(0), vocab_size=VOCABULARY), np.random.default_rng(0))
    with pytest.raises(ValueError, match="causal=False"):
        next(masked_pretraining(causal, draw, 1, 4, MASK))
    with pytest.raises(ValueError, match="no token was hidden .*share 0.0, batch_size 4.*raise share or batch_size"):
        next(masked_pretraining(TrainState(encoder(), np.random.default_rng(0)), draw, 1, 4, MASK, share=0.0))
