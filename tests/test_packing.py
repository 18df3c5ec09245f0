"""minilm.packing: packed dialogues have the values and gradients of each dialogue alone."""

import weakref

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from helpers import assert_close, assert_same_gradients, parameter_gradients, rngs, small_transformer
from minilm import Tensor, layers, no_grad
from minilm.data import make_batch
from minilm.fast import packed_attention
from minilm.fast.packed_attention import Segment, group_segments
from minilm.gradcheck import gradcheck
from minilm.model import RewardModel
from minilm.packing import pack, packs

KINDS = {"plain": {}, "grouped, smeared, two layers": {"kv_heads": 1, "key_smear": True, "layers": 2},
         "interleaved": {"rope_pairing": "interleaved", "heads": 4, "kv_heads": 2, "head_width": 4, "tied": True},
         "interleaved and smeared": {"rope_pairing": "interleaved", "key_smear": True}}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
DIALOGUES = [[1, 2], [1, 2], [3, 4]], [[5, 0], [6], [5, 6, 0]]
tokens = st.lists(st.integers(0, 6), min_size=1, max_size=6)


@st.composite
def dialogues(draw):
    """Prompts and responses; some prompts have several responses."""
    prompts = draw(st.lists(tokens, min_size=1, max_size=3))
    drawn = draw(st.lists(st.tuples(st.sampled_from(prompts), tokens), min_size=1, max_size=7))
    return [prompt for prompt, _ in drawn], [response for _, response in drawn]


def alone(model, prompt, response, temperature=1.0):
    """log-probs of one response, computed without packing: a Tensor (R,). (A mask selects the padded path.)"""
    tokens = np.array([prompt + response])
    hidden = model.hidden(tokens[:, :-1], key_mask=np.ones((1, tokens.shape[1] - 1))) * (1 / temperature)
    return layers.token_log_probs(hidden, model.unembedding, tokens[:, 1:])[0, len(prompt) - 1:]


def test_a_row_has_the_layout_of_the_docstring_of_packing():
    part = pack(*DIALOGUES)
    assert part.tokens.tolist() == [1, 2, 5, 3, 4, 5, 6]
    assert part.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert [(s.start, s.stop, s.prefix_start, s.prefix_stop) for s in part.segments] == [
        (0, 2, 0, 0), (2, 3, 0, 2), (3, 5, 0, 0), (5, 7, 3, 5)]
    assert part.rows.tolist() == [1, 2, 1, 4, 5, 6] and part.targets.tolist() == [5, 0, 6, 5, 6, 0]


@each_kind
@given(dialogues=dialogues(), rng=rngs, temperature=st.floats(0.5, 2))
@example(dialogues=DIALOGUES, rng=np.random.default_rng(0), temperature=2.0)
def test_packed_log_probs_and_all_gradients_equal_those_of_each_dialogue_alone(kind, dialogues, rng, temperature):
    model, part = small_transformer(rng, **kind), pack(*dialogues)
    cotangent = rng.normal(size=part.mask.shape) * part.mask
    packed = model.response_log_probs(part, temperature)
    actual, expected = parameter_gradients(model, packed, cotangent), None
    for p in model.parameters().values():
        p.grad = None
    for i, (prompt, response) in enumerate(zip(*dialogues)):
        one = alone(model, prompt, response, temperature)
        assert_close(packed.data[i, :len(response)], one.data)
        assert not packed.data[i, len(response):].any()
        one.backward(cotangent[i, :len(response)])
    expected = {name: p.grad for name, p in model.parameters().items()}
    assert_same_gradients(actual, expected)


@each_kind
def test_packed_log_probs_have_the_gradients_of_finite_differences(kind):
    rng = np.random.default_rng(0)
    model = small_transformer(rng, **kind)
    part = pack([[1, 2], [1, 2], [3]], [[4, 0], [5, 6, 0], [0]])
    gradcheck(lambda *_: model.response_log_probs(part), *model.parameters().values(), directions=8)


@given(dialogues())
def test_each_prompt_is_stored_once_and_there_is_no_padding(dialogues):
    """P + sum(R - 1) tokens, or P + sum(R) with last=True."""
    prompts, responses = dialogues
    once = sum(map(len, {tuple(p) for p in prompts}))
    part = pack(prompts, responses)
    assert len(part.tokens) == len(part.positions) == once + sum(len(r) - 1 for r in responses)
    assert len(pack(prompts, responses, last=True).tokens) == once + sum(map(len, responses))
    assert len(part.rows) == len(part.targets) == part.mask.sum() == sum(map(len, responses))
    grouped = [s for group in group_segments(part.segments) for s in group.segments]
    assert sorted(s.start for s in grouped) == [s.start for s in part.segments]
    assert sum(s.queries for s in grouped) == len(part.tokens)


@given(dialogues=dialogues(), rng=rngs)
@example(dialogues=DIALOGUES, rng=np.random.default_rng(0))
def test_packed_rewards_equal_those_of_each_dialogue_alone(dialogues, rng):
    model = RewardModel(small_transformer(rng), rng)
    rewards = model.packed_rewards(pack(*dialogues, last=True)).data
    for reward, prompt, response in zip(rewards, *dialogues):
        whole = np.array([prompt + response])
        assert_close(reward, model.rewards(whole, np.ones(whole.shape)).data[0])


def test_a_rectangle_has_the_hidden_states_of_one_with_a_mask_of_ones():
    rng = np.random.default_rng(0)
    model, batch = small_transformer(rng, layers=2), rng.integers(7, size=(3, 5))
    with no_grad():
        hidden = model.hidden(batch).data
        padded = model.hidden(batch, key_mask=np.ones((3, 5))).data
    assert_close(hidden, padded)


def test_a_long_prompt_does_not_join_a_group_of_short_responses():
    """In a group, queries and keys are padded to the longest."""
    part = pack([[1] * 400] * 3, [[2] * 5] * 3)
    assert [[s.queries for s in group.segments] for group in group_segments(part.segments)] == [[4, 4, 4], [400]]


def test_arrays_are_packed_as_lists_are():
    lists = [[1, 2, 3], [4, 5]], [[1, 2], [3, 4, 5]]
    expected, actual = pack(*lists), pack(*([np.array(tokens) for tokens in side] for side in lists))
    assert actual.tokens.tolist() == expected.tokens.tolist() == [1, 2, 3, 1, 4, 5, 3, 4]


def test_packs_hold_all_dialogues_in_order():
    parts = list(packs([[1], [2], [3]], [[4, 5], [6], [0]], batch_size=2))
    assert [part.targets.tolist() for part in parts] == [[4, 5, 6], [0]]


@pytest.mark.parametrize("prompts, responses, context, message", [
    ([[1]], [], None, "as many"), ([], [], None, "at least one"), ([[]], [[1]], None, r"prompts\[0\], is \[\]"),
    ([[1]], [[]], None, r"responses\[0\], is \[\]"), ([[1, 2]], [[3, 4]], 3, "context is 3")])
def test_dialogues_that_cannot_be_packed_raise(prompts, responses, context, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, responses, context)


@pytest.mark.parametrize("wrong", [[[1, 2]], np.array([[1, 2]]), {1, 2}, {1: 2}, "ab", ["ab"], 3, None, np.array(3),
                                   Tensor([1.0, 2.0]), [1.5], [None]], ids=lambda wrong: str(wrong)[:16])
def test_what_is_no_list_of_tokens_is_named_and_not_packed(wrong):
    for prompts, responses in (([[1], wrong], [[2], [3]]), ([[1], [2]], [[3], wrong])):
        for make in (pack, lambda x, y: make_batch(x, y, 0)):
            with pytest.raises(TypeError, match=r"dialogue 1, .*\[1\],? .*it must (hold integers|be a list)"):
                make(prompts, responses)


@pytest.mark.parametrize("wrong", [None, 3, "ab", iter([[1]])], ids=str)
def test_what_is_no_list_of_prompts_is_named(wrong):
    for prompts, responses, name in ((wrong, [[1]], "prompts"), ([[1]], wrong, "responses")):
        with pytest.raises(TypeError, match=f"{name} is .*; it must be a list of token lists"):
            pack(prompts, responses)


def test_too_long_dialogues_unknown_tokens_and_temperature_0_raise():
    model = small_transformer(np.random.default_rng(0), context=4)
    with pytest.raises(ValueError, match="5 tokens do not fit the context of 4"):
        model.response_log_probs(pack([[1, 2, 3]], [[4, 5, 6]]))
    with pytest.raises(IndexError, match="7"):
        model.response_log_probs(pack([[7]], [[1]]))
    with pytest.raises(ValueError, match="temperature"):
        model.response_log_probs(pack([[1]], [[4]]), temperature=0)


def test_a_pack_raises_in_a_bidirectional_model():
    with pytest.raises(ValueError, match="bidirectional"):
        small_transformer(np.random.default_rng(0), causal=False).response_log_probs(pack([[1]], [[2]]))


def test_a_dialogue_that_fills_the_context_is_packed_and_one_token_more_raises():
    assert len(pack([[1, 2]], [[3, 4]], context=4).tokens) == 3
    with pytest.raises(ValueError, match="context is 4"):
        list(packs([[1], [1, 2]], [[2], [3, 4, 5]], batch_size=1, context=4))


def test_results_do_not_depend_on_the_grouping_of_segments(rng, monkeypatch):
    """Two prompts of equal length form a group of their own, and the response to the first lies between them."""
    model = small_transformer(rng, key_smear=True)
    part = pack([[1, 2], [3, 4]], rng.integers(7, size=(2, 9)).tolist())
    cotangent, results = rng.normal(size=part.mask.shape), []
    for call in (0, packed_attention.CALL):
        monkeypatch.setattr(packed_attention, "CALL", call)
        log_probs = model.response_log_probs(part)
        found = parameter_gradients(model, log_probs, cotangent)
        results.append((len(group_segments(part.segments)), log_probs.data, found))
    (apart, *split), (together, *joint) = results
    assert (apart, together) == (2, 1)
    assert_close(split[0], joint[0])
    assert_same_gradients(split[1], joint[1])


def test_a_layer_keeps_no_array_of_all_queries_keys_and_values(rng):
    """Its vjp needs the rotated queries and keys, and the values; qkv itself would be as large again."""
    qkv = rng.normal(size=(6, 8))
    kept = weakref.ref(qkv)
    rotation = np.ones((6, 1), complex)
    groups = [packed_attention.Group([Segment(0, 6)])]
    _, vjp = packed_attention.packed_attention.__wrapped__(qkv, None, rotation, 2, 1, groups)
    del qkv
    assert kept() is None and vjp(np.ones((6, 4)))[0].shape == (6, 8)
