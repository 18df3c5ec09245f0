"""Generation in mixed precision: rounded where training rounds, so that sampled log-probs are those of training."""
import numpy as np
import pytest

from minilm.backend import array_module, to_numpy
from minilm.fast.cached_decoding import Decoder, forward_cached
from minilm.generate import generate
from minilm.kernels.bf16 import to_bf16
from minilm.packing import pack
from minilm.stages.rlhf import train_rlhf
from minilm.stages.train_state import TrainState
from minilm.stream import Text
from test_mixed_precision import CONFIGS, PROMPTS, models

LOGITS = {"tied": 10}               # times as large as those of the others


@pytest.fixture(autouse=True)
def cupy(xp):
    return xp


def left_padded(prompts):
    """Tokens (B,T), key_mask (B,T), and the first real position of each row, int32."""
    longest = max(map(len, prompts))
    first = np.array([longest - len(prompt) for prompt in prompts], np.int32)
    tokens = np.array([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    return tokens, (np.arange(longest) >= first[:, None]).astype(int), first


@pytest.mark.parametrize("seed", [0, 205])          # 205: a smeared key is near the middle of two numbers of bf16
@pytest.mark.parametrize("config", CONFIGS)
def test_a_prompt_has_the_bits_of_training(config, seed, xp):
    _, mixed = models(np.random.default_rng(seed), **CONFIGS[config])
    tokens, mask, first = left_padded(PROMPTS)
    decoder = Decoder(mixed)
    found = forward_cached(decoder, tokens, first, decoder.cache(len(tokens), tokens.shape[1]))
    assert (to_numpy(found) == to_numpy(mixed.hidden(tokens, mask).data)[:, -1]).all()
    logits = to_numpy(decoder.logits(found))
    assert logits == pytest.approx(to_numpy(mixed(tokens, mask).data)[:, -1], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("pieces", [[1] * 8, [3, 1, 1, 3], [2, 6]])
@pytest.mark.parametrize("config", ["plain", "grouped, smeared"])
def test_new_tokens_have_the_hidden_states_of_the_whole_text(config, pieces, rng):
    _, mixed = models(rng, **CONFIGS[config])
    tokens, mask, first = left_padded([[1, 2, 3, 4, 5, 6, 1, 2], [3, 4, 5, 6, 1, 2]] if pieces[0] > 2 else
                                      [[1, 2, 3, 4, 5, 6, 1, 2], [6, 5, 4, 3, 2, 1, 6, 5]])
    expected = to_numpy(mixed.hidden(tokens, mask).data)
    decoder = Decoder(mixed)
    xp = array_module(mixed.unembedding.data)
    cache = decoder.cache(2, 8)
    for start, T in zip(np.cumsum([0, *pieces]), pieces):
        given = None if not first.any() else xp.asarray(first) if T == 1 else first
        found = to_numpy(forward_cached(decoder, tokens[:, start:start + T], given, cache))
        assert np.linalg.norm(found - expected[:, start + T - 1]) < 3e-3 * np.linalg.norm(found)


def test_weights_and_cache_have_two_bytes_a_number(rng):
    _, mixed = models(rng, layers=2)
    decoder = Decoder(mixed)
    assert decoder.cache(2, 5).keys.dtype == decoder.cache(2, 5).values.dtype == np.uint16
    for name, w in decoder.weights.items():
        p = mixed.parameters()[name]
        if p.data.ndim == 2 and name != "embedding":
            bits = (w.bits if name == "unembedding" else w.W).get()
            assert (bits == to_bf16(p.data.get())).all()
        else:
            assert (w == p.data).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("config", CONFIGS)
def test_log_probs_of_samples_are_those_of_training(config, temperature, rng):
    """The ratio of the policy to itself is within 2e-3 of 1 for each token, and by root mean square within 8e-4: less
    than the log-probs are from float64. Tokens are those of float64 but where a draw falls between the two."""
    exact, mixed = models(rng, **CONFIGS[config])
    samples = generate(mixed, PROMPTS, 8, np.random.default_rng(1), 0, temperature)
    batch = pack(PROMPTS, samples.responses())
    mask = batch.mask > 0
    sampled = samples.log_probs[:, :mask.shape[1]][mask]
    log_ratio = to_numpy(mixed.response_log_probs(batch, temperature).data)[mask] - sampled
    assert np.abs(log_ratio).max() < 2e-3 * LOGITS.get(config, 1)
    assert (log_ratio ** 2).mean() ** 0.5 < 8e-4 * LOGITS.get(config, 1)
    of_exact = exact.response_log_probs(batch, temperature).data[mask]
    assert np.abs(sampled - of_exact).max() < 4e-3 * LOGITS.get(config, 1)
    expected = generate(exact, PROMPTS, 8, np.random.default_rng(1), 0, temperature)
    width = min(expected.tokens.shape[1], samples.tokens.shape[1])
    assert (expected.tokens[:, :width] == samples.tokens[:, :width]).mean() > 0.7


def test_a_conversation_draws_the_tokens_of_generate(rng):
    _, mixed = models(rng, layers=2)
    text = Text(mixed)
    for seed, prompt in enumerate(([1, 2, 3], [1, 2, 3, 4, 5], [6])):
        drawn = list(text.respond(prompt, 6, np.random.default_rng(seed), None))
        assert drawn == generate(mixed, [prompt], 6, np.random.default_rng(seed), None).responses()[0]


def test_each_call_decodes_with_the_weights_of_now(rng):
    _, mixed = models(rng)
    before = generate(mixed, PROMPTS, 4, np.random.default_rng(1), None)
    mixed.unembedding.data[...] = -30 * mixed.unembedding.data
    after = generate(mixed, PROMPTS, 4, np.random.default_rng(1), None)
    assert (before.log_probs != after.log_probs).all()
    log_probs = to_numpy(mixed.response_log_probs(pack(PROMPTS, after.responses())).data)
    assert log_probs == pytest.approx(after.log_probs, abs=0.1)


def test_rlhf_samples_and_trains_the_same_policy(rng):
    """At the first step policy and reference are equal: k1 of the samples is the error of sampling alone."""
    _, mixed = models(rng)
    reference = mixed.copy()
    steps = train_rlhf(TrainState(mixed, rng), reference, lambda prompts, answers: [float(len(a)) for a in answers],
                       PROMPTS, 1, 4, 2, 6, eos=0, beta=0.1, learning_rate=1e-3)
    assert abs(next(iter(steps))["kl_sequence"]) < 3e-3


@pytest.mark.parametrize("level", ["geometric_mean", "sequence", "token"])
@pytest.mark.parametrize("updates", [1, 2])
def test_the_first_update_has_the_ratio_1_so_a_narrow_clip_does_not_act(updates, level, rng):
    """Sampled log-probs and those of training differ by rounding, much more than this clip allows."""
    _, mixed = models(rng)
    found = []
    for epsilon in (1e-9, 0.5):
        model, rng = mixed.copy(), np.random.default_rng(3)
        steps = train_rlhf(TrainState(model, rng), mixed, lambda prompts, answers: np.arange(8.0), PROMPTS, 1, 4, 2, 6,
                           eos=0, beta=0.0, learning_rate=1e-3, updates=updates, level=level, epsilon=epsilon)
        found.append((next(iter(steps)), {name: to_numpy(p.data) for name, p in model.parameters().items()}))
    (narrow, weights), (wide, others) = found
    assert narrow["loss"] == wide["loss"] and narrow["grad_norm"] == wide["grad_norm"] > 0
    assert all((weights[name] == others[name]).all() for name in weights)
