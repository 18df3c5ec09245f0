"""Forked ranks: every rank runs the whole program, and they train as one process does.

The ranks are forked from the test, and rank 0 goes on with it. The other engine: test_mpi.py.
"""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers import assert_close
from minilm import ops
from minilm.diverged import Diverged
from minilm.fast.workers import WorkerFailed
from minilm.parallel.forked import ForkedRanks
from minilm.stages.agreement import WorkersDisagree
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.step import train_step
from minilm.stages.train_state import TrainState
from test_stages import PROMPTS, RESPONSES, STAGES, make_training, run, transformer

STEPS = 4
every_stage = pytest.mark.parametrize("stage", STAGES)
two_or_three = pytest.mark.parametrize("size", [2, 3])


def make_state(stage, ranks, dtype=np.float64):
    state = make_training(stage, dtype=dtype)
    return TrainState(type(state.model)(state.model.transformer.copy(), np.random.default_rng(5))
                      if stage == "reward model" else state.model.copy(), np.random.default_rng(4), group=ranks)


def numbers(state):
    return {name: np.array(a) for name, a in state.snapshot()[0].items()}


def trained(stage, size, dtype=np.float64, steps=STEPS):
    with ForkedRanks(size) as ranks:
        state = make_state(stage, ranks, dtype)
        metrics = run(stage, state, steps)
        return metrics, numbers(state)      # of rank 0; the others end here


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# Equality.

@every_stage
@two_or_three
def test_ranks_train_as_one_process_does(stage, size):
    one = make_training(stage, dtype=np.float64)
    metrics = run(stage, one, STEPS)
    found, arrays = trained(stage, size)
    for name, a in numbers(one).items():
        assert_close(arrays[name], a, 1e-12, name)
    for step, other in zip(metrics, found):
        assert_close(np.array(list(other.values())), np.array(list(step.values())), 1e-10)


@every_stage
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_ranks_are_two_workers_bit_for_bit(stage, dtype):
    two = make_training(stage, workers=2, dtype=dtype)
    metrics = run(stage, two, STEPS)
    found, arrays = trained(stage, 2, dtype)
    assert found == metrics
    assert {name: a.tobytes() for name, a in arrays.items()} == {
        name: np.array(a).tobytes() for name, a in two.snapshot()[0].items()}


@every_stage
def test_a_state_saved_by_two_ranks_continues_with_any_number(stage):
    whole = trained(stage, 1, steps=STEPS)[1]
    for size in (1, 2, 3):
        with ForkedRanks(2) as ranks:
            state = make_state(stage, ranks)
            run(stage, state, STEPS, until=2)
            saved = numbers(state), state.snapshot()[1]
            ranks.all_gather(None)
        with ForkedRanks(size) as ranks:
            state = make_state(stage, ranks)
            state.restore(*saved)
            run(stage, state, STEPS)
            arrays = numbers(state)
            ranks.all_gather(None)
        for name, a in whole.items():
            assert_close(arrays[name], a, 1e-12, name)


@two_or_three
def test_each_rank_keeps_the_moments_of_its_own_stretch_alone(size):
    with ForkedRanks(size) as ranks:
        optimizer = make_state("SFT", ranks).optimizer
        sizes = ranks.all_gather([optimizer.m.size, optimizer.v.size])
    total = optimizer.data.size
    assert [sum(column) for column in zip(*sizes)] == [total, total]
    assert max(map(max, sizes)) <= total // size + 1


# The caller's program between two steps.

def draw(state, *_):
    state.rng.random()


def decay(state, *_):
    state.optimizer.weight_decay = 1.0 if state.step >= 3 else 0.0


def more_data(state, prompts, responses):
    prompts.append([1, 1])
    responses.append([3, 2])


def halve(state, *_):
    for p in state.model.parameters().values():
        p.assign(p.data * 0.5)


def freeze(state, *_):
    for name, p in state.model.parameters().items():
        p.requires_grad = name != "embedding"


def weights_after(change, size, only=None):
    with ForkedRanks(size) as ranks:
        state = TrainState(transformer(np.float64), np.random.default_rng(4), group=ranks)
        prompts, responses = list(PROMPTS), list(RESPONSES)
        for _ in train_sft(state, prompts, responses, 5, 5):
            if only is None or ranks.rank == only:
                change(state, prompts, responses)
        arrays = numbers(state)
        ranks.all_gather(None)
    return arrays


@pytest.mark.parametrize("change", [draw, decay, more_data, halve, freeze], ids=lambda change: change.__name__)
@two_or_three
def test_a_change_between_two_steps_is_made_by_all_ranks_and_counts_once(change, size):
    one = weights_after(change, 1)
    for name, a in weights_after(change, size).items():
        assert_close(a, one[name], 1e-12, name)


@pytest.mark.parametrize("change, fact", [
    (draw, "Generator"), (decay, "weight_decay"), (more_data, "length of prompts"), (halve, "parameters of the model"),
    (freeze, r"which parameters are frozen: .*embedding")],
    ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("only", [0, 1])
def test_a_change_in_one_rank_alone_is_named(change, fact, only):
    with pytest.raises(WorkersDisagree, match=f"{fact}.*Every rank runs the loop"):
        weights_after(change, 2, only)


def restore_once(state, *_):
    """Keeps the state after step 2, and returns to it after step 4."""
    if state.step == 2 and not hasattr(state, "kept"):
        state.kept = numbers(state), state.snapshot()[1]
    if state.step == 4 and not hasattr(state, "returned"):
        state.returned = True
        state.restore(*state.kept)


@two_or_three
def test_a_state_restored_within_the_loop_by_all_ranks_is_trained_on(size):
    one = weights_after(restore_once, 1)
    for name, a in weights_after(restore_once, size).items():
        assert_close(a, one[name], 1e-12, name)


def rlhf_weights(size, judge):
    """judge(ranks, the state's Generator, responses) gives the rewards."""
    with ForkedRanks(size) as ranks:
        state = TrainState(transformer(np.float64), np.random.default_rng(4), group=ranks)
        reward = judge(ranks, state.rng)
        for _ in train_rlhf(state, state.model.copy(), lambda _, responses: reward(responses), PROMPTS, 4, 4, 4, 6,
                            None, learning_rate=1e-2):
            pass
        arrays = numbers(state)
        ranks.all_gather(None)
    return arrays


def with_the_states_generator(ranks, rng):
    return lambda responses: rng.normal(size=len(responses))


def with_a_generator_of_its_own(ranks, rng):
    own = np.random.default_rng(1)
    return lambda responses: own.normal(size=len(responses))


def asked_of_rank_0(ranks, rng):
    """The Generator differs by rank, as a clock does."""
    own = np.random.default_rng(ranks.rank)
    return lambda responses: ranks.once(lambda: own.normal(size=len(responses)))


@pytest.mark.parametrize("judge", [with_the_states_generator, with_a_generator_of_its_own, asked_of_rank_0],
                         ids=lambda judge: judge.__name__)
@two_or_three
def test_a_random_judge_gives_what_it_gives_one_process(judge, size):
    one = rlhf_weights(1, judge)
    for name, a in rlhf_weights(size, judge).items():
        assert_close(a, one[name], 1e-12, name)


def test_a_judge_that_differs_by_rank_is_named():
    def judge(ranks, rng):
        return lambda responses: np.arange(len(responses)) + ranks.rank * (np.arange(len(responses)) == 3)
    with pytest.raises(WorkersDisagree, match=r"rank 1 has other rewards.*ranks\.once"):
        rlhf_weights(2, judge)


def test_rewards_that_differ_by_rounding_are_those_of_rank_0_in_every_rank():
    def judge(ranks, rng):
        return lambda responses: np.arange(len(responses)) * (1 + 1e-6 * ranks.rank)
    one = rlhf_weights(1, judge)
    for name, a in rlhf_weights(2, judge).items():
        assert_close(a, one[name], 1e-12, name)


def test_a_nan_in_the_gradient_of_one_rank_is_named_in_every_rank():
    """No rank has the whole gradient: rank 0 adds up the first half of the parameters, rank 1 the second."""
    def loss(model, part):
        last = model.parameters()["unembedding"]
        return ops.sum(ops.sqrt(last * 0.0) if part else last), None
    with pytest.raises(Diverged, match="norm is nan; first bad tensor: the gradient of parameter unembedding"):
        with ForkedRanks(2) as ranks:
            state = TrainState(transformer(np.float64), np.random.default_rng(4), group=ranks)
            train_step(state, loss, [0, 1], 1e-3, "here")


@pytest.mark.parametrize("wrong", [{"group": 2}, {"group": ForkedRanks(1), "workers": 2}])
def test_a_state_takes_ranks_or_a_number_of_workers(wrong):
    with pytest.raises(TypeError, match=r"group is .* ranks of parallel\.world\(\) as group, or the number"):
        TrainState(transformer(np.float64), np.random.default_rng(4), **wrong)


@pytest.mark.parametrize("size, settings, fact", [
    (2, lambda rank: {"seed": rank}, "after step 0: .*the parameters of the model"),
    (2, lambda rank: {"learning_rate": 10.0 ** -rank}, "after step 0: .*the setting learning_rate"),
    (3, lambda rank: {"steps": 5 + (rank == 2)}, "worker 2 differs .*the setting steps: 6 there, 5 in worker 0")],
    ids=["weights", "a setting", "a setting of the last"])
def test_ranks_that_start_a_stage_differently_are_named_before_the_first_step(size, settings, fact):
    def train(rank, seed=0, steps=5, **options):
        model = transformer(np.float64, seed=seed)
        return list(train_sft(TrainState(model, np.random.default_rng(4), group=ranks), PROMPTS, RESPONSES, steps, 5,
                              **options))
    with pytest.raises(WorkersDisagree, match=fact), ForkedRanks(size) as ranks:
        train(ranks.rank, **settings(ranks.rank))


def test_after_their_block_ranks_refuse_to_save_and_to_train():
    with ForkedRanks(2) as ranks:
        state = make_state("SFT", ranks)
        run("SFT", state, 1)
    for call in (state.snapshot, lambda: run("SFT", state, 2), lambda: ranks.zeros(3, float)):
        with pytest.raises(RuntimeError, match="exist only within their block"):
            call()


@pytest.mark.parametrize("call", [lambda ranks: ranks.once(lambda: 1), lambda ranks: ranks.zeros(10, float),
                                  lambda ranks: ranks.all_gather(1), lambda ranks: None],
                         ids=["once", "zeros", "all_gather", "the end"])
def test_ranks_that_make_other_calls_end_with_an_error_that_names_them(call):
    with pytest.raises(WorkersDisagree, match="all ranks must make the same calls.* at rank 0: .*rank 1: each"):
        with ForkedRanks(2) as ranks:
            if ranks.rank == 0:
                call(ranks)
            else:
                ranks.each(lambda part: part, range(3))


def test_arrays_of_other_lengths_are_not_added_up():
    with pytest.raises(WorkersDisagree, match="rank 0: zeros of 100 float64; rank 1: zeros of 90 float64"):
        with ForkedRanks(2) as ranks:
            ranks.zeros(100 - 10 * ranks.rank, np.float64)


def test_an_error_after_the_last_call_of_a_rank_is_raised():
    with pytest.raises(WorkerFailed, match="(?s)worker 1 raised an error.*ZeroDivisionError"):
        with ForkedRanks(2) as ranks:
            ranks.all_gather(None)
            if ranks.rank:
                raise ZeroDivisionError


def test_files_that_were_open_stay_open_in_all_ranks(tmp_path):
    with open(tmp_path / "log", "w", buffering=1) as log, ForkedRanks(3) as ranks:
        array = ranks.zeros(1000, np.float64)
        for rank in range(3):
            ranks.all_gather(None)
            if rank == ranks.rank:
                print(f"rank {rank}", file=log)
        assert not array.any()
    assert (tmp_path / "log").read_text() == "rank 0\nrank 1\nrank 2\n"


def test_what_ranks_print_into_a_pipe_is_there_once():
    program = """import sys
from minilm.parallel import ForkedRanks
sys.stdout.write("before\\n")
with ForkedRanks(3) as ranks:
    sys.stdout.write(f"rank {ranks.rank}\\n")
sys.stdout.write("after\\n")"""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", program], env=buffered, capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == ["after", "before", "rank 0", "rank 1", "rank 2"], done.stderr


def test_a_gradient_with_nan_is_named_although_each_rank_has_a_part_of_the_sum():
    with ForkedRanks(2) as ranks:
        state = make_state("SFT", ranks)
        collect = state.optimizer.flat.collect
        where = list(state.model.parameters())[-1]

        def with_nan():
            found = collect()
            state.model.parameters()[where].grad_buffer[...] = np.nan
            return found
        state.optimizer.flat.collect = with_nan
        try:
            run("SFT", state, 1)
        except Diverged as error:
            words = ranks.all_gather(str(error))
    assert all(where in text for text in words), words


# Small values.

def test_once_is_called_by_rank_0_alone_and_its_result_goes_to_all():
    calls = []
    with ForkedRanks(3) as ranks:
        answers = [ranks.once(lambda: (calls.append(1), len(calls), ranks.rank)[1:]) for _ in range(2)]
        everyone = ranks.all_gather((answers, len(calls)))
    assert [given for given, _ in everyone] == [[(1, 0), (2, 0)]] * 3
    assert [count for _, count in everyone] == [2, 0, 0]


def test_an_error_of_once_is_raised_in_all_ranks():
    with ForkedRanks(3) as ranks:
        try:
            ranks.once(lambda: 1 / 0)
        except (ZeroDivisionError, WorkerFailed) as error:
            found = ranks.all_gather(f"{type(error).__name__}: {error}")
    assert found == ["ZeroDivisionError: division by zero",
                     *["WorkerFailed: rank 0 raised an error: ZeroDivisionError: division by zero"] * 2]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_parts_are_dealt_to_the_ranks_in_turn_and_some_may_have_none(count):
    with ForkedRanks(3) as ranks:
        results, ends = ranks.each(lambda part: (part, ranks.rank), range(count), then=lambda: ranks.rank)
    assert results == [(i, i % 3) for i in range(count)] and ends == [0, 1, 2]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_in_one_part_is_raised_in_all_ranks(bad):
    def work(part):
        return 1 / (part - bad)
    with ForkedRanks(3) as ranks:
        try:
            ranks.each(work, range(3))
        except (ZeroDivisionError, WorkerFailed) as error:
            found = ranks.all_gather(type(error).__name__)
    assert found == ["ZeroDivisionError"] * 3


def test_an_error_that_only_one_rank_meets_is_named_in_the_others():
    with ForkedRanks(3) as ranks:
        try:
            ranks.each(lambda part: 1 / (ranks.rank - 1), range(3))
        except (ZeroDivisionError, WorkerFailed) as error:
            found = ranks.all_gather(f"{type(error).__name__}: {error}")
    words = "WorkerFailed: rank 1 raised an error that rank {} did not: ZeroDivisionError: division by zero"
    assert found == [words.format(0), "ZeroDivisionError: division by zero", words.format(2)]


# Flat arrays.

@two_or_three
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100_000])
def test_add_up_and_share_make_every_rank_have_the_sum(size, count):
    """The parts of the ranks have different lengths, and some none."""
    with ForkedRanks(size) as ranks:
        flat = ranks.zeros(count, np.float64)
        flat[:] = np.arange(count) + 1000 * ranks.rank
        ranks.add_up(flat)
        outside = np.ones(count, bool)
        outside[ranks.stretch(count)] = False
        assert (flat[outside] == (np.arange(count) + 1000 * ranks.rank)[outside]).all()
        ranks.share(flat)
        everyone = ranks.all_gather(flat)
    for a in everyone:
        assert_close(a, size * np.arange(count) + 1000.0 * sum(range(size)))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the open files of a process are counted in /proc")
def test_an_array_of_the_ranks_keeps_one_file_open():
    with ForkedRanks(2) as ranks:
        before = len(os.listdir("/proc/self/fd"))
        arrays = [ranks.zeros(10, np.float64) for _ in range(5)]
        opened = ranks.all_gather(len(os.listdir("/proc/self/fd")) - before)
    assert opened == [5, 5] and len(arrays) == 5        # the one of mmap


# Ends.

@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(3), lambda: 1 / 0,
                                 lambda: exit(1)], ids=["SIGKILL", "_exit", "exception", "sys.exit"])
def test_a_rank_that_ends_ends_all_within_a_minute(end):
    began = time.monotonic()
    with pytest.raises(WorkerFailed, match="killed|raised an error|has ended"):
        with ForkedRanks(3) as ranks:
            if ranks.rank == 1:
                end()
            ranks.all_gather(None)
    assert time.monotonic() - began < 60


def test_sigterm_and_ctrl_c_reach_rank_0_alone():
    """Sent to all processes, as by a terminal or a batch system: rank 0 decides, and the others go on with it."""
    caught = []
    before = {number: signal.signal(number, lambda number, _: caught.append(number))
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ForkedRanks(3) as ranks:
            processes = ranks.all_gather(os.getpid())
            if ranks.rank == 0:
                for process in processes:
                    for number in before:
                        os.kill(process, number)
            assert ranks.all_gather(len(caught)) == [2, 0, 0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
