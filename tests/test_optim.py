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
from minilm.stages.train_state import TrainState

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
                                 lambda optimizer: optimizer.flat.collect()], ids=["step", "clip", "collect"])
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


def continued(tensors, saved):
    """Copies of these parameters, and an optimiser of them that continues from a saved state."""
    copies = {name: Tensor(p.data.copy(), requires_grad=True) for name, p in tensors.items()}
    optimizer = AdamW(copies)
    optimizer.load_state(saved)
    return copies, optimizer


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
    second, resumed = continued(first, saved)
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
                optimizer.flat.add_gradients(group.all_gather(optimizer.flat.collect()), list(gradients))
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
    assert AdamW(copy.parameters()) and shares_parameters(copy, model) is None      # it moves them to its own array


def test_arrays_overlap_where_an_element_is_in_both(rng):
    w = rng.normal(size=(4, 6))
    assert overlap(w, w) and overlap(w, w.T) and overlap(w[1:], w[:2]) and overlap(w[0, 3:], w[:, 5])
    assert not overlap(w, w.copy()) and not overlap(w[:, :3], w[:, 3:]) and not overlap(w[:2], w[2:])


# Freezing: a parameter without a gradient is skipped whole.

def textbook_with_freezing(weights, gradients, rates, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3):
    """plain_adamw, where a gradient may be None: that parameter stays, and its t counts its own updates."""
    state, weights = {}, {name: w.copy() for name, w in weights.items()}
    for rate, gradient in zip(rates, gradients):
        for name, g in gradient.items():
            if g is not None:
                t, m, v = state.get(name, (0, 0.0, 0.0))
                state[name] = t, m, v = t + 1, b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g ** 2
                decay = weight_decay * weights[name] if weights[name].ndim >= 2 else 0
                step = (m / (1 - b1 ** t)) / (np.sqrt(v / (1 - b2 ** t)) + eps)
                weights[name] = weights[name] - rate * (step + decay)
    return weights


frozen_sets = st.lists(st.frozensets(st.sampled_from(sorted(SHAPES))), min_size=1, max_size=6)


@pytest.mark.parametrize("how", ["no gradient", "requires_grad", "requires_grad, and an earlier gradient is left"])
@given(rng=rngs, frozen=frozen_sets, block=st.sampled_from([5, flat_parameters.BLOCK]))
def test_frozen_parameters_and_their_moments_stay_bit_for_bit_and_the_others_train(how, rng, frozen, block):
    """frozen: at each step, the names of the frozen parameters. Clipping counts and scales the others alone."""
    tensors, before = parameters(rng), flat_parameters.BLOCK
    weights = {name: p.data.copy() for name, p in tensors.items()}
    optimizer, used, rates = AdamW(tensors, weight_decay=0.3), [], 0.1 / np.arange(1, 1 + len(frozen))
    flat_parameters.BLOCK = block
    try:
        for rate, names in zip(rates, frozen):
            set_gradients(tensors, rng)
            kept = {name: [flat[name].copy() for flat in map(optimizer.flat.views, (optimizer.data, optimizer.m,
                                                                                  optimizer.v))] for name in names}
            for name, p in tensors.items():
                p.requires_grad = name not in names or how == "no gradient"
                if name in names and how != "requires_grad, and an earlier gradient is left":
                    p.grad = None
            trained = {name: p.grad.copy() for name, p in tensors.items() if name not in names}
            norm = math.sqrt(sum((g ** 2).sum() for g in trained.values()))
            assert optimizer.clip(1.0) == pytest.approx(norm, rel=1e-14)
            used.append({name: g * min(1, 1 / norm) for name, g in trained.items()})
            length = math.sqrt(sum((tensors[name].data ** 2).sum() for name in trained))
            assert optimizer.step(rate) == pytest.approx(length, rel=1) and (length == 0) == (not trained)
            for name, arrays in kept.items():
                for array, flat in zip(arrays, (optimizer.data, optimizer.m, optimizer.v)):
                    assert array.tobytes() == optimizer.flat.views(flat)[name].tobytes()
    finally:
        flat_parameters.BLOCK = before
    expected = textbook_with_freezing(weights, used, rates)
    for name, p in tensors.items():
        assert_close(p.data, expected[name], 1e-11, name)
        count = sum(name not in names for names in frozen)
        assert optimizer.updates[list(optimizer.flat.views(optimizer.data)).index(name)] == count


def test_a_gradient_of_zeros_is_a_gradient(rng):
    """Decay and momentum go on, as in PyTorch."""
    tensors = parameters(rng)
    optimizer, before = AdamW(tensors, weight_decay=0.5), tensors["matrix"].data.copy()
    for p in tensors.values():
        p.grad = np.zeros(p.shape)
    optimizer.step(0.1)
    assert_close(tensors["matrix"].data, 0.95 * before, 1e-15)
    assert (optimizer.updates == 1).all()


@pytest.mark.parametrize("nothing", ["no gradients", "all frozen"])
def test_a_step_without_anything_to_train_changes_nothing(nothing, rng):
    tensors = parameters(rng)
    optimizer = AdamW(tensors, weight_decay=0.5)
    if nothing == "all frozen":
        set_gradients(tensors, rng)
        for p in tensors.values():
            p.requires_grad = False
    before = optimizer.data.copy()
    assert optimizer.clip(1.0) == optimizer.step() == optimizer.steps == 0
    assert np.array_equal(optimizer.data, before) and not optimizer.m.any() and not optimizer.updates.any()


def test_runs_are_neighbours_with_one_label_and_without_the_frozen(rng):
    flat = AdamW(parameters(rng)).flat                  # matrix 12, cube 12, norm 4, bias 2
    assert flat.runs(np.array([1, 1, 1, 1])) == [(slice(0, 30), 0)]
    assert flat.runs(np.array([3, 3, 0, 2])) == [(slice(0, 24), 0), (slice(28, 30), 3)]
    assert flat.runs(np.array([0, 1, 2, 2])) == [(slice(12, 24), 1), (slice(24, 30), 2)]
    assert flat.runs(np.zeros(4, int)) == []


def test_a_run_with_frozen_parameters_continues_from_its_state_bit_for_bit(rng):
    def steps(tensors, optimizer, rng):
        for _ in range(3):
            set_gradients(tensors, rng)
            tensors["cube"].requires_grad = False
            optimizer.step(0.1)

    first = parameters(rng)
    optimizer = AdamW(first)
    set_gradients(first, rng)
    optimizer.step(0.1)                                             # everything is trained
    steps(first, optimizer, np.random.default_rng(1))
    saved = {name: array.copy() for name, array in optimizer.state().items()}
    second, resumed = continued(first, saved)
    for tensors, each in ((first, optimizer), (second, resumed)):
        steps(tensors, each, np.random.default_rng(2))
        tensors["cube"].requires_grad = True
        set_gradients(tensors, np.random.default_rng(3))
        each.step(0.1)
    assert np.array_equal(optimizer.data, resumed.data) and sorted(resumed.updates) == [2, 8, 8, 8]


def test_a_state_with_other_numbers_of_updates_holds_from_the_next_step_on(rng):
    """In an optimiser that has trained all its parameters alike until then, and that freezes none afterwards."""
    used, fresh = parameters(np.random.default_rng(0)), parameters(np.random.default_rng(0))
    optimizer, other = AdamW(used), AdamW(fresh)
    set_gradients(used, rng)
    optimizer.step(0.0)
    state = {"m": rng.normal(size=30), "v": rng.random(30), "steps": np.array([1, 7, 7, 3])}
    for tensors, each in ((used, optimizer), (fresh, other)):
        each.load_state(state)
        set_gradients(tensors, np.random.default_rng(3))
        each.step(0.1)
    assert np.array_equal(optimizer.data, other.data) and optimizer.updates.tolist() == [2, 8, 8, 4]


def test_a_state_with_one_number_of_steps_counts_for_all_parameters(rng):
    optimizer = AdamW(parameters(rng))
    optimizer.load_state({**optimizer.state(), "steps": np.array(7)})
    assert optimizer.updates.tolist() == [7] * 4 and optimizer.steps == 7
    with pytest.raises(ValueError, match="optimiser state of 3 tensors, model of 4"):
        optimizer.load_state({**optimizer.state(), "steps": np.zeros(3, int)})


def test_with_several_workers_frozen_parameters_stay_and_a_gradient_of_any_worker_counts(rng):
    """The norm has no gradient, the bias one in worker 2 alone. Worker 0 freezes the cube, and the others do not."""
    start, group = parameters(rng), ProcessGroup(3)
    gradient = {name: rng.normal(size=p.shape) for name, p in start.items()}
    expected = {name: Tensor(p.data.copy(), requires_grad=True) for name, p in start.items()}
    alone, shared = AdamW(expected, weight_decay=0.3), AdamW(start, weight_decay=0.3, group=group)
    others = [shared.flat.zeros() for _ in range(2)]
    for name, scale in (("matrix", 3), ("bias", 1)):
        expected[name].grad = scale * gradient[name]
    norms = [alone.clip(0.5), alone.step(0.1)]
    before = shared.data.copy()
    with group:
        if group.rank:
            for name, view in shared.flat.views(others[group.rank - 1]).items():
                start[name].grad_buffer = view
        start["cube"].requires_grad = group.rank > 0
        for name in ("matrix", "cube", *(["bias"] if group.rank == 2 else [])):
            start[name].grad = gradient[name].copy()
        shared.flat.add_gradients(group.all_gather(shared.flat.collect()), others)
        found = [shared.clip(0.5), shared.step(0.1)]
        assert_close(np.array(found), np.array(norms), 1e-14)
        if group.rank:
            assert (shared.updates == alone.updates).all()
            group.all_gather(None)
        else:
            group.all_gather(None)
    for name, view in shared.flat.views(before).items():
        assert_close(start[name].data, expected[name].data, 1e-14, name)
        assert (name in ("norm", "cube")) == (start[name].data.tobytes() == view.tobytes())


@pytest.mark.parametrize("again", [False, True])
def test_an_optimiser_that_is_made_after_backward_uses_its_gradients(again, rng):
    model, tokens = small_transformer(rng), np.array([[1, 2, 3]])
    copy = model.copy()
    first = AdamW(copy.parameters())
    for m in (model, copy):
        m.log_probs(tokens).sum().backward()
    optimizer = AdamW(model.parameters())
    for m in (model, copy) if again else ():
        m.log_probs(tokens).sum().backward()
    assert optimizer.step(0.1) == first.step(0.1)
    assert np.array_equal(optimizer.data, first.data)


# Parameters that have left their optimiser.

USES = {"zero_grad": lambda optimizer: optimizer.zero_grad(), "clip": lambda optimizer: optimizer.clip(1.0),
        "step": lambda optimizer: optimizer.step(), "state": lambda optimizer: optimizer.state()}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("take", ["another optimiser", "another optimiser for some", "another stage's TrainState",
                                  "its reward model's optimiser", "p.data = x", "p.data = x for one"])
def test_an_optimiser_whose_parameters_were_taken_raises_at_once_with_the_name(use, take, rng):
    model = small_transformer(rng)
    optimizer, parameters = AdamW(model.parameters()), model.parameters()
    taken = "final_norm" if "one" in take or "some" in take else "embedding"
    if take == "another optimiser":
        AdamW(parameters)
    elif take == "another optimiser for some":
        AdamW({"final_norm": parameters["final_norm"]})
    elif take == "another stage's TrainState":
        TrainState(model, rng)
    elif take == "its reward model's optimiser":
        AdamW(RewardModel(model, rng).parameters())
    else:
        parameters[taken].data = parameters[taken].data.copy()
    before = {name: p.data.copy() for name, p in parameters.items()}
    model.log_probs(np.array([[1, 2, 3]])).sum().backward()
    message = f"parameter '{taken}' has left this optimiser's flat array: another AdamW or TrainState .* p.assign"
    with pytest.raises(RuntimeError, match=message):
        USES[use](optimizer)
    assert all(np.array_equal(p.data, before[name]) for name, p in parameters.items())


def test_the_last_of_two_optimisers_trains(rng):
    model = small_transformer(rng)
    first, last = AdamW(model.parameters()), AdamW(model.parameters())
    with pytest.raises(RuntimeError, match="has left this optimiser"):
        first.zero_grad()
    before = model.parameters()["embedding"].data.copy()
    last.zero_grad()
    model.log_probs(np.array([[1, 2, 3]])).sum().backward()
    last.step(0.1)
    assert np.abs(model.parameters()["embedding"].data - before).max() > 0.05


def test_two_optimisers_may_have_parts_of_one_model(rng):
    tensors = parameters(rng)
    matrices, vectors = (AdamW({name: p for name, p in tensors.items() if (p.ndim >= 2) == wide}, learning_rate=rate)
                         for wide, rate in ((True, 0.1), (False, 0.01)))
    both = {name: Tensor(p.data.copy(), requires_grad=True) for name, p in tensors.items()}
    set_gradients(tensors, rng)
    for name, p in tensors.items():
        both[name].grad = p.grad.copy()
    for optimizer in (matrices, vectors):
        optimizer.step()
    for rate, wide in ((0.1, True), (0.01, False)):
        alone = {name: Tensor(both[name].data.copy(), requires_grad=True) for name in both}
        for name, p in alone.items():
            p.grad = both[name].grad.copy()
        AdamW(alone).step(rate)
        assert all(np.array_equal(tensors[name].data, p.data) for name, p in alone.items() if (p.ndim >= 2) == wide)


@pytest.mark.parametrize("second", [lambda w: w, lambda w: Tensor(w.data, requires_grad=True),
                                    lambda w: Tensor(w.data.T, requires_grad=True),
                                    lambda w: Tensor(w.data[1:], requires_grad=True)],
                         ids=["one Tensor", "one array", "transposed", "a part"])
def test_parameters_that_share_memory_are_refused(second, rng):
    w = normal(rng, 4, 4)
    with pytest.raises(ValueError, match="AdamW: parameters 'w' and 'tied' share memory.* give tied weights one name"):
        AdamW({"w": w, "tied": second(w)})
    assert w.data.base is None and w.grad_buffer is None            # nothing was moved


# Gradients that somebody has kept.

@pytest.mark.parametrize("keep", [lambda p: p.grad, lambda p: p.grad[0], lambda p: p.grad.T, lambda p: p.grad.ravel()],
                         ids=["gradient", "row", "transposed", "flat"])
def test_a_kept_gradient_stays_when_the_next_one_is_computed(keep, rng):
    model = small_transformer(rng)
    optimizer, p = AdamW(model.parameters()), model.parameters()["blocks.0.qkv"]
    kept, copies = [], []
    for tokens in rng.integers(7, size=(4, 3, 5)):
        optimizer.zero_grad()
        model.log_probs(tokens).sum().backward()
        kept.append(keep(p))
        copies.append(np.copy(kept[-1]))
        optimizer.step(0.1)
        assert np.shares_memory(p.grad, optimizer.grad)
    assert len(np.unique(copies, axis=0)) == 4
    for a, b in zip(kept, copies):
        assert np.array_equal(a, b)


def test_the_gradient_keeps_its_memory_if_nobody_keeps_it(rng):
    model = small_transformer(rng)
    optimizer = AdamW(model.parameters())
    address = optimizer.grad.ctypes.data
    for tokens in rng.integers(7, size=(4, 3, 5)):
        optimizer.zero_grad()
        model.log_probs(tokens).sum().backward()
        copied = {name: p.grad.copy() for name, p in model.parameters().items()}
        optimizer.clip(1.0)
        optimizer.step()
    assert optimizer.grad.ctypes.data == address and copied
