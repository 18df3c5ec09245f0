"""On one GPU a step reports late: its numbers are on the way while the next step is asked for. Nothing else changes.

The mock of CuPy delivers a copy only when its event is waited for, so a number that is looked at too early is NaN.
"""
import collections
import gc
import math
import weakref

import numpy as np
import pytest

from helpers import assert_close, small_transformer
from minilm import ops
from minilm.backend import to_numpy
from minilm.diverged import Diverged
from minilm.kernels import emulator
from minilm.model import RewardModel
from minilm.optim import AdamW
from minilm.readback import Readback
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState
from test_work import STAGES


def state_of(rng, device="gpu", name="SFT", **settings):
    model = small_transformer(rng, head_width=16, **settings)
    reference = model.copy().to_device(device)
    model = RewardModel(model, np.random.default_rng(1)) if name == "reward model" else model
    return TrainState(model.to_device(device), np.random.default_rng(2)), reference


def parameters(state):
    return {name: to_numpy(p.data).copy() for name, p in state.model.parameters().items()}


def saved(state):
    """A snapshot in memory of its own."""
    arrays, metadata = state.snapshot()
    return {name: a.copy() for name, a in arrays.items()}, metadata


def same(a, b):
    return all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("name", STAGES)
def test_metrics_and_weights_of_a_gpu_are_those_of_the_cpu(name, xp):
    runs, tolerance = {}, 1e-6 if name == "RLHF" else 1e-9       # the KL divergence of its first steps is nearly 0
    for device in ("cpu", "gpu"):
        state, reference = state_of(np.random.default_rng(5), device, name)
        runs[device] = [dict(metrics) for metrics in STAGES[name](state, reference)], parameters(state)
    for there, here in zip(runs["gpu"][0], runs["cpu"][0], strict=True):
        assert list(there) == list(here)
        assert there == pytest.approx(here, rel=tolerance, abs=tolerance)
    for parameter, a in runs["gpu"][1].items():
        assert_close(a, runs["cpu"][1][parameter], tolerance, parameter)


@pytest.mark.parametrize("name", STAGES)
def test_metrics_that_are_read_at_the_end_are_those_that_are_read_at_once(name, xp):
    runs = []
    for read in (dict, lambda metrics: metrics):
        state, reference = state_of(np.random.default_rng(5), name=name)
        runs.append(list(map(dict, [read(metrics) for metrics in STAGES[name](state, reference)])))
    assert runs[0] == runs[1] and all(math.isfinite(value) for metrics in runs[0] for value in metrics.values())


def test_metrics_are_a_mapping_that_waits_when_it_is_read(rng, emulated):
    state, reference = state_of(rng)
    metrics = next(STAGES["SFT"](state, reference))
    assert state.pending is not None
    with emulator.counted() as work:
        assert list(metrics) == ["loss", "grad_norm", "learning_rate", "trained_tokens"] and len(metrics) == 4
        assert repr(metrics) == repr(dict(metrics)) and metrics["loss"] > 0
    assert len(work.waits) == 1 and state.pending is None
    assert metrics._step.loss is metrics._step.shards is None          # a list of metrics holds no batches


# What is not finite.

def step(state, *losses, rate=1e-3, **options):
    return train_step(state, lambda model, part: (part(model.parameters()["final_norm"]), None), losses, rate, "here",
                      **options)


def fine(p):
    return ops.sum(p * p)


BAD = {"loss": (lambda p: ops.sum(p) * math.nan, "the loss is nan; first bad tensor: the output of multiply, "),
       "infinite loss": (lambda p: ops.sum(p) + math.inf, "the loss is inf; first bad tensor: the output of add, "),
       "gradient": (lambda p: ops.sum(ops.sqrt(p * 0.0)),
                    "the gradient's norm is nan; first bad tensor: the gradient of parameter final_norm, ")}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_gpu_refuses_a_step_that_is_not_finite_and_the_one_after_it(name, shards, rng, xp):
    bad, message = BAD[name]
    state, _ = state_of(rng)
    step(state, fine)
    before, moments, updates = parameters(state), to_numpy(state.optimizer.m), state.optimizer.updates.copy()
    metrics = step(state, *[fine, bad][2 - shards:])
    assert same(parameters(state), before)
    with pytest.raises(Diverged, match=f"^here, step 2: {message}") as first:
        step(state, fine)
    assert same(parameters(state), before) and (to_numpy(state.optimizer.m) == moments).all()
    assert state.step == 1 and (state.optimizer.updates == updates).all()
    with pytest.raises(Diverged) as again:
        metrics["loss"]                         # noqa: B018
    assert again.value is first.value
    assert step(state, fine)["loss"] > 0 and state.step == 2
    assert not same(parameters(state), before)


LOOKS = {"reading the metrics": lambda state, metrics: metrics["grad_norm"], "settle": lambda state, _: state.settle(),
         "snapshot": lambda state, _: state.snapshot(), "another step": lambda state, _: step(state, fine)}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_look_at_a_bad_step_raises(look, rng, xp):
    state, _ = state_of(rng)
    metrics = step(state, BAD["loss"][0])
    with pytest.raises(Diverged, match="^here, step 1: the loss is nan"):
        LOOKS[look](state, metrics)
    state.settle()
    assert state.step == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_end_of_a_stage_looks_at_its_last_step(rng, xp):
    state, reference = state_of(rng)
    steps = STAGES["SFT"](state, reference)
    next(steps), next(steps)
    state.settle()
    state.model.parameters()["final_norm"].data[0] = math.nan
    next(steps)
    with pytest.raises(Diverged, match="^SFT, step 3: the loss is nan; first bad tensor: the parameter final_norm, "):
        next(steps)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_update_that_overflows_is_reported_when_its_step_is_looked_at(rng, xp):
    state, _ = state_of(rng)
    metrics = step(state, lambda p: ops.sum(p), rate=1e308, clip=math.inf)
    with pytest.raises(Diverged, match="^here, step 1: the update went to NaN or infinity; first bad tensor: the "):
        step(state, fine, rate=1e308)
    with pytest.raises(Diverged, match="step 1"):
        dict(metrics)
    assert not np.isfinite(parameters(state)["final_norm"]).all()       # as on a CPU: nothing is taken back


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_restored_state_forgets_a_step_that_was_not_looked_at(rng, xp):
    state, _ = state_of(rng)
    step(state, fine)
    arrays, metadata = saved(state)
    step(state, BAD["infinite loss"][0])
    state.restore(arrays, metadata)
    before = parameters(state)
    assert step(state, fine)["loss"] > 0 and not same(parameters(state), before) and state.step == 2


# The parts.

def test_a_readback_gives_the_tree_with_numpy_arrays_once_its_event_is_reached(rng, emulated):
    x, y, i = rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=()), np.array([2 ** 40, -1])
    there = [emulated.asarray(a) for a in (x, y, i)]
    Pair = collections.namedtuple("Pair", "a b")
    tree = (there[0], [there[1], "text", None, x], {"i": there[2]}, Pair(there[1], 3))
    readback = Readback(tree)
    assert np.isnan(readback._host).all()                   # nothing has come yet
    there[0][...] = 0                                       # behind the copy
    found = readback.get()
    assert type(found) is tuple and (found[0] == x).all() and found[0].dtype == np.float32
    assert found[1][0] == y and found[1][1:3] == ["text", None] and found[1][3] is x
    assert (found[2]["i"] == i).all() and found[2]["i"].dtype == i.dtype
    assert type(found[3]) is Pair and found[3] == (y, 3)


def test_a_copy_to_the_host_has_the_values_of_when_it_was_asked_for(emulated):
    x, host = emulated.ones(3), np.zeros(3)
    x.get(out=host, blocking=False)
    x[...] = 2
    event = emulated.cuda.Event()
    event.record()
    event.synchronize()
    assert (host == 1).all()


def test_a_readback_that_is_dropped_waits_for_its_copy(emulated):
    """Its memory is given to the next copy at once."""
    readback = Readback((emulated.ones(3),))
    host = readback._host
    del readback
    assert (host == 1).all()


def test_an_event_brings_the_copies_before_it_and_a_wait_brings_all(emulated):
    x = emulated.asarray(np.ones(2))
    outs = [np.zeros(2) for _ in range(3)]
    events = [emulated.cuda.Event(disable_timing=True) for _ in outs]
    for out, event in zip(outs, events):
        assert x.get(out=out, blocking=False) is out
        event.record()
    events[1].synchronize()
    assert [np.isnan(out).any() for out in outs] == [False, False, True]
    x.sum().item()
    assert (outs[2] == 1).all()
    events[2].synchronize()
    with pytest.raises(TypeError, match="blocking=False alone"):
        x.get(out=outs[0])
    with pytest.raises(TypeError, match="one stream"):
        events[0].record(1)


def test_an_event_with_work_behind_it_is_late_and_one_without_is_a_wait(emulated):
    x = emulated.ones(3)
    event = emulated.cuda.Event()
    with emulator.counted() as work:
        event.record()
        event.synchronize()
        event.record()
        x + x
        event.synchronize()
    assert work.late == 1 and len(work.waits) == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_metrics_from_before_a_restore_are_an_error_and_change_nothing(rng, xp):
    state, _ = state_of(rng)
    step(state, fine)
    arrays, metadata = saved(state)
    step(state, fine)
    metrics = step(state, BAD["loss"][0])
    state.restore(arrays, metadata)
    step(state, fine)
    with pytest.raises(RuntimeError, match="^here, step 3: the state was restored before this step's metrics"):
        metrics["loss"]                         # noqa: B018
    assert state.step == state.optimizer.steps == 2 and state.pending is not None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_parameters_that_were_frozen_for_refused_steps_have_their_own_bias_corrections(rng, xp):
    """The slices of neighbours with equally many updates are made again when the counts are set back."""
    ends = {}
    for refused in (False, True):
        state, _ = state_of(np.random.default_rng(5), layers=2)
        p = state.model.parameters()
        both = lambda q: ops.sum(p["blocks.0.ffn_norm"]) + ops.sum(q * q)         # noqa: E731
        step(state, both)
        p["blocks.0.ffn_norm"].requires_grad = False
        step(state, fine)
        p["blocks.0.ffn_norm"].requires_grad = True
        if refused:
            state.settle()
            step(state, BAD["loss"][0])
            with pytest.raises(Diverged):
                step(state, both)
        step(state, both)
        ends[refused] = parameters(state)
    assert same(*ends.values())


def test_losses_whose_sum_overflows_are_no_divergence(rng, xp):
    state, _ = state_of(rng)
    metrics = step(state, *[lambda p: ops.sum(p) * 0.0 + 1e308] * 2)
    assert metrics["loss"] == math.inf and state.step == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_refused_steps_are_counted_until_they_are_accepted(rng, emulated):
    optimizer = AdamW(small_transformer(rng).to_device("gpu").parameters(), learning_rate=0.1)
    ops.sum(optimizer.parameters["final_norm"]).backward()
    before = to_numpy(optimizer.data)
    number = emulated.asarray(np.array(1.0))
    optimizer.step_if_finite(0.1, [number, number * math.inf])
    optimizer.step_if_finite(0.1, [number])
    assert (to_numpy(optimizer.data) == before).all()
    optimizer.accept()
    optimizer.step_if_finite(0.1, [number])
    assert (to_numpy(optimizer.data) != before).any() and optimizer.steps == 3


@pytest.mark.parametrize("name", STAGES)
def test_a_state_that_is_dropped_frees_its_model_without_the_garbage_collector(name, xp):
    """Otherwise the memory of the GPU stays taken until the collector runs."""
    state, reference = state_of(np.random.default_rng(5), name=name)
    steps = STAGES[name](state, reference)
    metrics = [next(steps), next(steps)]
    model = weakref.ref(state.model)
    collects = gc.isenabled()
    gc.disable()
    try:
        del state, steps
        assert model() is not None                      # metrics that were not read keep what they need
        assert all(math.isfinite(each["loss"]) for each in metrics)
        assert model() is None
    finally:
        if collects:
            gc.enable()
