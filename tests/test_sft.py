"""Supervised finetuning: every selected token has the same weight, and every other token has none."""

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from helpers import assert_close, normal, rngs, small_transformer
from minilm import Tensor, ops
from minilm.gradcheck import gradcheck
from minilm.objectives.sft import sft_loss, sft_metrics

shapes = st.tuples(st.integers(1, 4), st.integers(1, 7))


def batch(rng, shape):
    """Log-probs of O(1) as a leaf, and a mask that selects at least one token."""
    mask = (rng.random(shape) < 0.5).astype(float)
    mask[rng.integers(shape[0]), rng.integers(shape[1])] = 1
    return normal(rng, *shape), mask


def gradient(log_probs, mask, **options):
    """(value, gradient) of one sft_loss at a fresh leaf."""
    leaf = Tensor(np.array(log_probs), requires_grad=True)
    loss = sft_loss(leaf, mask, **options)
    loss.backward()
    return loss.item(), leaf.grad


# Value and gradient.

@given(rngs, shapes)
def test_the_loss_and_its_gradient_are_the_closed_form(rng, shape):
    log_probs, mask = batch(rng, shape)
    value, d = gradient(log_probs.data, mask)
    count = int(mask.sum())
    expected = np.array([[-1 / count if m else 0.0 for m in row] for row in mask])
    assert_close(value, -sum(log_p for log_p, m in zip(log_probs.data.flat, mask.flat) if m) / count)
    assert_close(d, expected)


@given(rngs, shapes)
def test_the_gradient_agrees_with_finite_differences(rng, shape):
    log_probs, mask = batch(rng, shape)
    gradcheck(lambda x: sft_loss(x, mask), log_probs)
    gradcheck(lambda x: sft_loss(x, mask, total=2.5 * mask.sum()), log_probs)


@given(rngs)
def test_the_gradient_through_logits_agrees_with_finite_differences(rng):
    _, mask = batch(rng, (2, 3))
    targets = rng.integers(0, 4, (2, 3))
    logits = Tensor(rng.normal(size=(2, 3, 4)), requires_grad=True)
    gradcheck(lambda z: sft_loss(ops.gather(ops.log_softmax(z), targets), mask), logits)


@given(rngs, shapes, st.sampled_from([np.float64, np.float32, np.int64, bool]))
def test_float32_log_probs_take_a_mask_of_any_dtype(rng, shape, mask_dtype):
    log_probs, mask = batch(rng, shape)
    log_probs = Tensor(-np.abs(log_probs.data))         # of one sign: no digits are lost in their sum
    for total in (None, np.float64(2 * mask.sum())):
        small = Tensor(log_probs.data.astype(np.float32), requires_grad=True)
        loss = sft_loss(small, mask.astype(mask_dtype), total=total)
        loss.backward()
        assert loss.dtype == small.grad.dtype == np.float32
        assert_close(loss, sft_loss(log_probs, mask, total=total), 1e-5)


# Positions outside the mask.

@given(rngs, shapes)
@example(np.random.default_rng(0), (3, 5))
def test_nan_outside_the_mask_changes_neither_value_nor_gradient(rng, shape):
    log_probs, mask = batch(rng, shape)
    clean = gradient(log_probs.data, mask)
    for poison in (np.nan, np.inf, -np.inf):
        value, d = gradient(np.where(mask > 0, log_probs.data, poison), mask)
        assert value == clean[0]
        np.testing.assert_array_equal(d, clean[1])


def test_a_nan_inside_the_mask_is_not_hidden():
    assert np.isnan(sft_loss(np.array([[np.nan, -1.0]]), np.ones((1, 2))).item())


@given(rngs, shapes, st.integers(1, 5), st.sampled_from(["left", "right"]))
def test_the_amount_and_side_of_padding_do_not_matter(rng, shape, amount, side):
    log_probs, mask = batch(rng, shape)
    widths = ((0, 0), (amount, 0) if side == "left" else (0, amount))
    value, d = gradient(log_probs.data, mask)
    padded_value, padded_d = gradient(np.pad(log_probs.data, widths, constant_values=-7.0), np.pad(mask, widths))
    assert_close(padded_value, value)
    np.testing.assert_array_equal(padded_d, np.pad(d, widths))


@given(shapes)
def test_a_mask_that_selects_nothing_raises_unless_a_total_is_given(shape):
    """With a total, a microbatch may be empty, because other microbatches of the window have tokens."""
    log_probs = Tensor(np.full(shape, -1.0), requires_grad=True)
    with pytest.raises(ValueError, match="selects no token"):
        sft_loss(log_probs, np.zeros(shape))
    value, d = gradient(log_probs.data, np.zeros(shape), total=3)
    assert value == 0 and not d.any()
    mask = np.zeros((2, 3))
    mask[1] = 1
    value, d = gradient(np.full((2, 3), -1.0), mask)
    assert value == 1 and not d[0].any() and (d[1] == -1 / 3).all()


@pytest.mark.parametrize("mask_shape", [(3, 2), (2,), (1, 3), (2, 3, 1)])
def test_a_mask_of_another_shape_raises(mask_shape):
    with pytest.raises(ValueError, match="shape"):
        sft_loss(np.zeros((2, 3)), np.ones(mask_shape))


# Splitting.

@given(rngs, st.tuples(st.integers(2, 6), st.integers(1, 6)), st.data())
def test_microbatches_with_the_total_of_the_window_equal_the_whole_batch(rng, shape, data):
    """For every split into microbatches: loss and gradient."""
    log_probs, mask = batch(rng, shape)
    value, d = gradient(log_probs.data, mask)
    cuts = sorted(data.draw(st.sets(st.integers(1, shape[0] - 1), min_size=1)))
    pieces = [slice(i, j) for i, j in zip([0, *cuts], [*cuts, shape[0]])]
    leaf = Tensor(log_probs.data.copy(), requires_grad=True)
    losses = [sft_loss(leaf[piece], mask[piece], total=mask.sum()) for piece in pieces]
    for loss in losses:
        loss.backward()
    assert_close(sum(loss.item() for loss in losses), value)
    assert_close(leaf.grad, d)


def test_the_average_of_microbatch_means_is_not_the_mean_over_tokens():
    log_probs, mask = np.array([[-1.0, -1.0, -1.0], [-4.0, 0.0, 0.0]]), np.array([[1, 1, 1], [1, 0, 0]])
    whole = sft_loss(log_probs, mask).item()
    averaged = np.mean([sft_loss(log_probs[i:i + 1], mask[i:i + 1]).item() for i in (0, 1)])
    assert whole == 7 / 4 and averaged == 5 / 2


@given(rngs, shapes)
def test_two_forwards_accumulate(rng, shape):
    log_probs, mask = batch(rng, shape)
    once = gradient(log_probs.data, mask)[1]
    sft_loss(log_probs, mask).backward()
    sft_loss(log_probs, mask).backward()
    assert_close(log_probs.grad, 2 * once)


# Which tokens count: prompt, response, EOS, padding.

PROMPT, RESPONSE, EOS, PAD = 1, 2, 3, 4
EOS_ID = PAD_ID = 0


@st.composite
def conversations(draw):
    """Tokens (B,T) and the role of each: prompts and responses of every length, padding = EOS token."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=3))
    rng = draw(rngs)
    width = max(p + r + 1 for p, r in lengths) + draw(st.integers(0, 2))
    roles = np.array([[PROMPT] * p + [RESPONSE] * r + [EOS] + [PAD] * (width - p - r - 1) for p, r in lengths])
    tokens = np.where(roles <= RESPONSE, rng.integers(1, 6, roles.shape), EOS_ID)
    return tokens, roles


def logit_gradient(tokens, roles, rng):
    """d loss / d logits (B,T,V); logits at t score token t+1."""
    logits = Tensor(rng.normal(size=(*tokens.shape, 6)), requires_grad=True)
    log_probs = ops.gather(ops.log_softmax(logits[:, :-1]), tokens[:, 1:])
    sft_loss(log_probs, np.isin(roles, (RESPONSE, EOS))[:, 1:]).backward()
    return logits.grad


@given(conversations(), rngs)
def test_the_eos_has_a_gradient_where_padding_has_the_same_id(conversation, rng):
    """The mask tells the EOS of a response from padding, although both have the same token id."""
    tokens, roles = conversation
    moved = np.abs(logit_gradient(tokens, roles, rng)).max(axis=-1)[:, :-1]
    assert (tokens[roles == EOS] == PAD_ID).all()
    assert (moved[roles[:, 1:] == EOS] > 0).all()
    assert (moved[roles[:, 1:] == PAD] == 0).all()


@given(conversations(), rngs)
def test_logits_have_a_gradient_exactly_where_they_score_a_response_token(conversation, rng):
    """Logits at t have a gradient exactly if token t+1 is in the response, and raise that token's logit."""
    tokens, roles = conversation
    d = logit_gradient(tokens, roles, rng)
    scored = np.zeros(roles.shape, bool)
    scored[:, :-1] = np.isin(roles[:, 1:], (RESPONSE, EOS))
    np.testing.assert_array_equal(np.abs(d).max(axis=-1) > 0, scored)
    assert_close(d.sum(axis=-1), np.zeros(roles.shape))      # softmax - onehot adds up to 0
    rows, columns = np.nonzero(scored)
    assert (d[rows, columns, tokens[rows, columns + 1]] < 0).all()  # descent raises the logit of the next token


@given(conversations(), rngs)
def test_every_token_but_padding_affects_the_loss(conversation, rng):
    """Through a Transformer: changing a padding token does not change the loss by one bit; changing any other does."""
    tokens, roles = conversation
    model = small_transformer(rng)

    def loss(tokens):
        return sft_loss(model.log_probs(tokens), np.isin(roles, (RESPONSE, EOS))[:, 1:]).item()

    before = loss(tokens)
    for index in np.ndindex(tokens.shape):
        other = tokens.copy()
        other[index] = (other[index] + 1) % 7
        if roles[index] == PAD:
            assert loss(other) == before, f"padding at {index} counts: {before!r} -> {loss(other)!r}"
        else:
            assert loss(other) != before, f"{index}, role {roles[index]}, does not count"


# Metrics.

@given(rngs, shapes, st.integers(0, 4))
def test_metrics_do_not_depend_on_padding(rng, shape, amount):
    """Each metric is a mean over selected tokens; appended padding, NaN included, does not change it."""
    log_probs, mask = batch(rng, shape)
    targets, predictions = rng.integers(0, 2, shape), rng.integers(0, 2, shape)
    entropies = rng.random(shape)

    def pad(x, value):
        return np.pad(x, ((0, 0), (0, amount)), constant_values=value)

    metrics = sft_metrics(pad(log_probs.data, np.nan), pad(mask, 0), pad(predictions, 1), pad(targets, 1),
                          pad(entropies, np.nan))
    chosen = [i for i in np.ndindex(shape) if mask[i]]
    expected = {"loss": -np.mean([log_probs.data[i] for i in chosen]), "trained_tokens": len(chosen),
                "mean_token_accuracy": np.mean([predictions[i] == targets[i] for i in chosen]),
                "entropy": np.mean([entropies[i] for i in chosen])}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert type(metrics[name]) is float
        assert_close(metrics[name], value)
    assert_close(metrics["loss"], sft_loss(log_probs, mask).item())


def test_metrics_that_were_not_asked_for_are_absent():
    assert sft_metrics(np.array([[-1.0, -2.0]]), np.array([[0, 1]])) == {"loss": 2.0, "trained_tokens": 1.0}


def test_metrics_without_a_response_token_are_finite():
    """sft_loss allows such a microbatch if `total` is given; a NaN would spread to the mean in the log."""
    try:
        metrics = sft_metrics(np.zeros((1, 2)), np.zeros((1, 2)), entropies=np.zeros((1, 2)))
    except ValueError:
        return
    assert all(np.isfinite(list(metrics.values()))), f"{metrics}"
