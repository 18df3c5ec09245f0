"""minilm.optim: AdamW equals a plain loop over parameters; flat views, clipping, state, schedule."""
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import assert_close, normal, rngs, small_transformer
from minilm import Tensor
from minilm.fast import flat_parameters
from minilm.fast.flat_parameters import overlap, shares_parameters
from minilm.fast.workers import ProcessGroup
from minilm.model import RewardModel
from minilm.optim import AdamW, warmup_cosine

SHAPES = {"norm": (4,), "matrix": (3, 4), "bias": (2,), "cube": (2, 2, 3)}       # matrices are not first, on purpose


@pytest.fixture(params=[5, flat_parameters.BLOCK], ids=["blocks of 5", "one block"])
def block(request, monkeypatch):
    monkeypatch.setattr(flat_parameters, "BLOCK", request.param)


def parameters(rng, dtype=np.float64):
    return {name: normal(rng, *shape, dtype=dtype) for name, shape in SHAPES.items()}


def set_gradients(tensors, rng):
    for p in tensors.values():
        p.grad = rng.normal(size=p.shape).astype(p.dtype)


def plain_adamw(weights, gradients, rates, betas, eps, weight_decay):
    """Loshchilov and Hutter's algorithm 2, one parameter at a time; the decay of matrices is scaled by the rate."""
    b1, b2 = betas
    weights = {name: w.copy() for name, w in weights.items()}
    m = {name: 0.0 for name in weights}
    v = {name: 0.0 for name in weights}
    for t, (rate, gradient) in enumerate(zip(rates, gradients), start=1):
        for name, g in gradient.items():
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g ** 2
            decay = weight_decay * weights[name] if weights[name].ndim >= 2 else 0
            step = (m[name] / (1 - b1 ** t)) / (np.sqrt(v[name] / (1 - b2 ** t)) + eps)
            weights[name] = weights[name] - rate * (step + decay)
    return weights


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_equals_the_textbook_loop(block, dtype, tolerance, weight_decay, rng):
    tensors, rates = parameters(rng, dtype), [0.1, 0.02, 0.3, 0.1]
    start = {name: p.data.copy() for name, p in tensors.items()}
    optimizer = AdamW(tensors, learning_rate=9.0, betas=(0.8, 0.95), eps=1e-3, weight_decay=weight_decay)
    gradients = []
    for rate in rates:
        set_gradients(tensors, rng)
        gradients.append({name: p.grad.copy() for name, p in tensors.items()})
        optimizer.step(rate)
    expected = plain_adamw(start, gradients, rates, (0.8, 0.95), 1e-3, weight_decay)
    for name, p in tensors.items():
        assert p.dtype == dtype
        assert_close(p.data, expected[name], tolerance, name)


def test_decay_shrinks_matrices_and_leaves_vectors(rng):
    tensors = parameters(rng)
    before = {name: p.data.copy() for name, p in tensors.items()}
    optimizer = AdamW(tensors, learning_rate=0.1, weight_decay=0.5)
    for p in tensors.values():
        p.grad = np.zeros(p.shape)
    optimizer.step()
    for name, p in tensors.items():
        assert_close(p.data, before[name] * (0.95 if p.ndim >= 2 else 1), 1e-15)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_keep_their_values_in_the_flat_array_and_train_there(tied, rng):
    model, tokens = small_transformer(rng, tied=tied), rng.integers(7, size=(4, 6))

    def loss():
        return -model.log_probs(tokens).mean()
    before = loss().item()
    optimizer = AdamW(model.parameters(), learning_rate=1e-3)
    assert loss().item() == before
    loss().backward()
    optimizer.step()
    assert loss().item() < before


def test_parameters_and_gradients_are_views_of_the_flat_arrays(rng):
    tensors = parameters(rng)
    optimizer = AdamW(tensors)
    for name, p in tensors.items():
        assert np.shares_memory(p.data, optimizer.data) and np.shares_memory(p.grad_buffer, optimizer.grad)
        assert np.array_equal(p.data, optimizer.flat.views(optimizer.data)[name])
    optimizer.grad.fill(np.nan)                                          # old numbers are overwritten
    for times in (2, 4):
        sum((p * p).sum() for p in tensors.values()).backward()          # the second time added
        assert_close(np.sort(optimizer.grad), np.sort(times * optimizer.data))
    optimizer.zero_grad()
    assert all(p.grad is None for p in tensors.values())


@pytest.mark.parametrize("use", [lambda optimizer: optimizer.step(0.0), lambda optimizer: optimizer.clip(1e9),
                                 lambda optimizer: optimizer.flat.add_gradients([])], ids=["step", "clip", "add"])
def test_a_missing_gradient_counts_as_0_in_sums_and_one_set_by_hand_is_used(use, rng):
    tensors = parameters(rng)
    optimizer = AdamW(tensors)
    optimizer.grad.fill(np.nan)
    tensors["matrix"].grad = rng.normal(size=(3, 4))
    expected = {**{name: np.zeros(p.shape) for name, p in tensors.items()}, "matrix": tensors["matrix"].grad.copy()}
    use(optimizer)
    for name, view in optimizer.flat.views(optimizer.grad).items():
        assert np.array_equal(view, expected[name])
        assert tensors[name].grad is (tensors[name].grad_buffer if name == "matrix" else None)
        assert np.array_equal(tensors[name].grad_buffer, expected[name])


@given(rng=rngs, max_norm=st.floats(0.1, 20))
def test_clipping_scales_the_norm_over_all_parameters_and_returns_the_norm_before(rng, max_norm):
    tensors = parameters(rng)
    optimizer = AdamW(tensors)
    set_gradients(tensors, rng)
    before = {name: p.grad.copy() for name, p in tensors.items()}
    norm = math.sqrt(sum((g ** 2).sum() for g in before.values()))
    assert optimizer.clip(max_norm) == pytest.approx(norm, rel=1e-14)
    for name, p in tensors.items():
        assert_close(p.grad, before[name] * min(1, max_norm / norm), 1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_optimiser_with_loaded_state_continues_bit_for_bit(block, dtype):
    def steps(tensors, optimizer, rng):
        for _ in range(3):
            set_gradients(tensors, rng)
            optimizer.step()

    first = parameters(np.random.default_rng(0), dtype)
    optimizer = AdamW(first)
    steps(first, optimizer, np.random.default_rng(1))
    saved = {name: array.copy() for name, array in optimizer.state().items()}
    second = {name: Tensor(p.data.copy(), requires_grad=True) for name, p in first.items()}
    resumed = AdamW(second)
    resumed.load_state(saved)
    for tensors, each in ((first, optimizer), (second, resumed)):
        steps(tensors, each, np.random.default_rng(2))
    assert np.array_equal(optimizer.data, resumed.data) and not np.array_equal(optimizer.m, saved["m"])


def test_the_state_of_another_model_raises(rng):
    optimizer = AdamW(parameters(rng))
    state = AdamW({"p": Tensor(np.zeros(3), requires_grad=True)}).state()
    with pytest.raises(ValueError, match="optimiser state for 3 parameters, model of 30"):
        optimizer.load_state(state)
    with pytest.raises(ValueError, match="optimiser state for 1 parameters, model of 30"):
        optimizer.load_state({**optimizer.state(), "v": np.zeros(1)})


def test_a_parameter_moved_after_the_optimiser_was_made_raises(rng):
    model = small_transformer(rng)
    optimizer = AdamW(model.parameters())
    model.to_device("cpu")
    with pytest.raises(RuntimeError, match="make the optimiser after to_device"):
        optimizer.step()


def test_parameters_of_two_dtypes_raise(rng):
    with pytest.raises(TypeError, match="float32.*float64"):
        AdamW({"a": normal(rng, 2), "b": normal(rng, 2, dtype=np.float32)})


def test_the_schedule_warms_up_linearly_and_falls_as_half_a_cosine_to_its_floor():
    rates = [warmup_cosine(step, steps=14, peak=2.0, warmup=4, floor=0.1) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[9] == pytest.approx(1.1)                                # half way: the mean of peak and floor
    assert rates[14:] == pytest.approx([0.2] * 6)                        # it stays there
    assert all(a > b for a, b in zip(rates[4:14], rates[5:15]))
    assert warmup_cosine(0, steps=10, peak=2.0, warmup=0) == 2.0


@pytest.mark.parametrize("max_norm", [1e9, 0.3])
def test_the_norm_is_over_all_blocks(block, max_norm, rng):
    tensors = parameters(rng)
    optimizer = AdamW(tensors)
    set_gradients(tensors, rng)
    before = np.concatenate([tensors[name].grad.reshape(-1) for name in ("matrix", "cube", "norm", "bias")])
    norm = np.linalg.norm(before)
    assert optimizer.clip(max_norm) == pytest.approx(norm, rel=1e-14)
    assert_close(optimizer.grad, before * min(1, max_norm / norm), 1e-14)


def test_a_step_at_rate_0_moves_nothing(rng):
    """A rate of 0 is used as given, because a schedule may end at 0."""
    tensors = parameters(rng)
    optimizer = AdamW(tensors, learning_rate=0.1)
    set_gradients(tensors, rng)
    before = optimizer.data.copy()
    optimizer.step(0.0)
    assert np.array_equal(optimizer.data, before) and optimizer.m.any()


def test_a_run_of_warm_up_alone_has_a_schedule():
    assert [warmup_cosine(step, steps=2, peak=2.0, warmup=2) for step in range(3)] == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("block", [1, 4])
def test_several_workers_update_every_element_as_one_does(block, rng, monkeypatch):
    """The slices of the workers end inside blocks, inside parameters, and elsewhere than the decay."""
    shapes = {"norm": (7,), "matrix": (11, 5), "bias": (3,), "cube": (2, 3, 8)}
    weights, others = {name: rng.normal(size=shape) for name, shape in shapes.items()}, rng.normal(size=(4, 3, 113))
    monkeypatch.setattr(flat_parameters, "BLOCK", block)
    results = []
    for group in (ProcessGroup(1), ProcessGroup(3)):
        tensors = {name: normal(rng, *shape) for name, shape in shapes.items()}
        for name, p in tensors.items():
            p.data[...] = weights[name]
        optimizer = AdamW(tensors, learning_rate=0.1, weight_decay=0.3, group=group)
        norms = []
        with group:
            for gradients in others:
                if group.rank == 0:
                    optimizer.grad.fill(0)
                group.all_gather(None)
                for p in optimizer.parameters.values():
                    p.grad = p.grad_buffer
                optimizer.flat.collect()
                group.all_gather(None)
                optimizer.flat.add_gradients(list(gradients))
                group.all_gather(None)
                assert_close(optimizer.grad, gradients.sum(axis=0), 1e-14)
                group.all_gather(None)
                norms += [optimizer.clip(0.5), optimizer.step()]
                assert_close(norms[-1], np.linalg.norm(optimizer.data), 1e-14)
        results.append((optimizer.data, optimizer.m, optimizer.v, optimizer.grad, np.array(norms)))
    for one, three in zip(*results):
        assert_close(three, one, 1e-14)


@pytest.mark.parametrize("in_an_optimiser", [False, True])
def test_models_share_parameters_with_themselves_and_with_their_reward_model_and_not_with_copies(in_an_optimiser, rng):
    model = small_transformer(rng)
    copy, rewarder = model.copy(), RewardModel(model, rng)
    if in_an_optimiser:                         # all parameters are then in one array
        AdamW(model.parameters())
    for other in (model, model.over(model.parameters()), rewarder):
        assert shares_parameters(model, other) == shares_parameters(other, model) == "embedding"
    assert shares_parameters(model, copy) is shares_parameters(copy, rewarder) is None
    copy.parameters()["final_norm"].data = model.parameters()["final_norm"].data[:]
    assert shares_parameters(copy, model) == "final_norm"


def test_arrays_overlap_where_an_element_is_in_both(rng):
    w = rng.normal(size=(4, 6))
    assert overlap(w, w) and overlap(w, w.T) and overlap(w[1:], w[:2]) and overlap(w[0, 3:], w[:, 5])
    assert not overlap(w, w.copy()) and not overlap(w[:, :3], w[:, 3:]) and not overlap(w[:2], w[2:])
