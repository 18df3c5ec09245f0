"""What a program asks of the device is counted by the mock of CuPy, and each stage asks for what is written here.

The counts are exact: a change that adds a launch, a copy or a wait to a step fails here, and one that saves some too.
"""
import numpy as np
import pytest

from helpers import small_transformer
from minilm.fast import packed_attention
from minilm.kernels import emulator, fused
from minilm.model import RewardModel
from minilm.packing import pack
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.pretraining import pretrain
from minilm.stages.reward_model import train_reward_model
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState

PROMPTS = [[1, 2, 3], [4], [1, 2, 3], [5, 6], [4, 4]]
RESPONSES = [[2, 0], [3, 3, 1, 0], [5, 1, 0], [6], [2, 5, 0]]
OTHERS = [[1], [2, 0], [6, 6, 0], [3, 0], [1, 1, 1, 0]]


def counts(work):
    return work.launches, work.products, work.operations, work.copies, work.late, len(work.waits)


OF_ONE = [     # a call, and its launches, products, operations, copies, late waits, waits
    (lambda xp, x: x + 1, (0, 0, 1, 0, 0, 0)), (lambda xp, x: 1 - x, (0, 0, 1, 0, 0, 0)),
    (lambda xp, x: -x, (0, 0, 1, 0, 0, 0)), (lambda xp, x: x.__iadd__(x), (0, 0, 1, 0, 0, 0)),
    (lambda xp, x: xp.exp(x), (0, 0, 1, 0, 0, 0)),
    (lambda xp, x: x @ x, (0, 1, 0, 0, 0, 0)), (lambda xp, x: xp.matmul(x, x), (0, 1, 0, 0, 0, 0)),
    (lambda xp, x: x[:2].T.reshape(2, 4, 1), (0, 0, 1, 0, 0, 0)), (lambda xp, x: x[1:3, None], (0, 0, 0, 0, 0, 0)),
    (lambda xp, x: x.reshape(-1), (0, 0, 0, 0, 0, 0)), (lambda xp, x: xp.empty(3), (0, 0, 0, 0, 0, 0)),
    (lambda xp, x: xp.zeros(3), (0, 0, 1, 0, 0, 0)), (lambda xp, x: xp.asarray(np.ones(3)), (0, 0, 0, 1, 0, 0)),
    (lambda xp, x: xp.asarray(x), (0, 0, 0, 0, 0, 0)), (lambda xp, x: xp.ascontiguousarray(x), (0, 0, 0, 0, 0, 0)),
    (lambda xp, x: xp.ascontiguousarray(x.T), (0, 0, 1, 0, 0, 0)),
    (lambda xp, x: x.get(), (0, 0, 0, 0, 0, 1)), (lambda xp, x: x.sum().item(), (0, 0, 1, 0, 0, 1)),
    (lambda xp, x: float(x[0, 0]), (0, 0, 0, 0, 0, 1)), (lambda xp, x: bool((x > 1).any()), (0, 0, 2, 0, 0, 1)),
    (lambda xp, x: x[[0, 2]], (0, 0, 1, 0, 0, 0)), (lambda xp, x: x[x > 1], (0, 0, 2, 0, 0, 1)),
    (lambda xp, x: x.__setitem__(x > 1, 0), (0, 0, 2, 0, 0, 1)),
    (lambda xp, x: x.__setitem__(0, 1), (0, 0, 1, 0, 0, 0)),
    (lambda xp, x: fused.squared_norm(x.reshape(-1)), (2, 0, 0, 0, 0, 0))]


@pytest.mark.parametrize("call, expected", OF_ONE, ids=range(len(OF_ONE)))
def test_each_call_is_counted_as_what_cupy_does(call, expected, emulated):
    x = emulated.asarray(np.arange(16.0).reshape(4, 4))
    with emulator.counted() as work:
        call(emulated, x)
    assert counts(work) == expected
    call(emulated, x)
    assert counts(work) == expected                     # nothing is counted after the block


def test_a_wait_names_its_line_and_an_inner_block_counts_alone(emulated):
    x = emulated.ones(3)
    with emulator.counted() as outer:
        x.get()
        with emulator.counted() as inner:
            x.get()
            x.max().item()
    assert len(outer.waits) == 1 and len(inner.waits) == 2
    assert all(place.startswith("tests/test_work.py:") for place in outer.waits + inner.waits)


STAGES = {
    "pretraining": lambda state, _: pretrain(state, np.arange(200) % 7, 3, 4, 6),
    "SFT": lambda state, _: train_sft(state, PROMPTS, RESPONSES, 3, 4),
    "reward model": lambda state, _: train_reward_model(state, PROMPTS, RESPONSES, OTHERS, 3, 4),
    "DPO": lambda state, reference: train_dpo(state, PROMPTS, RESPONSES, OTHERS, *(
        reference_log_probs(reference, PROMPTS, side) for side in (RESPONSES, OTHERS)), 3, 4),
    "RLHF": lambda state, reference: train_rlhf(state, reference, lambda _, ys: [len(y) for y in ys], PROMPTS, 3, 2, 3,
                                                6, eos=None)}
# Launches, products, operations, copies, late waits and waits of one step of three layers; with smeared keys in the
# second row. RLHF waits for the tokens, which the reward needs, and for the log-probs of the reference.
OF_A_STEP = {
    "pretraining": [(53, 39, 49, 7, 1, 0), (62, 39, 64, 7, 1, 0)],
    "SFT": [(54, 39, 55, 18, 1, 0), (63, 39, 70, 19, 1, 0)],
    "reward model": [(52, 39, 78, 16, 1, 0), (61, 39, 93, 17, 1, 0)],
    "DPO": [(54, 39, 101, 20, 1, 0), (63, 39, 116, 21, 1, 0)],
    "RLHF": [(170, 130, 314, 38, 1, 2), (197, 130, 386, 42, 1, 2)]}


@pytest.mark.parametrize("smeared", [False, True], ids=["", "key_smear"])
@pytest.mark.parametrize("name", STAGES)
def test_a_step_asks_the_device_for_this_much(name, smeared, rng, emulated):
    packed_attention._tables_on_gpu.cache_clear()
    model = small_transformer(rng, head_width=16, layers=3, key_smear=smeared)
    reference = model.copy().to_device("gpu")
    model = RewardModel(model, rng) if name == "reward model" else model
    model.to_device("gpu")
    steps = STAGES[name](TrainState(model, np.random.default_rng(2)), reference)
    next(steps)
    with emulator.counted() as work:
        next(steps)
    assert counts(work) == OF_A_STEP[name][smeared], work


@pytest.mark.gpu
def test_cupy_refuses_products_while_a_stream_is_captured(real_cupy):
    """Why no step is a CUDA graph. When this fails, CuPy has learned it: kernels/README.md."""
    x = real_cupy.ones((2, 2), np.float32)
    x @ x                                               # what is made once is made before
    stream = real_cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(NotImplementedError, match="cuBLAS"):
                x @ x
        finally:
            stream.end_capture()


def test_batches_of_one_shape_share_the_tables_of_attention(rng, emulated):
    """And a batch of another shape, or a pack with another prompt, has its own."""
    model = small_transformer(rng, head_width=16).to_device("gpu")
    packs = [pack(PROMPTS, RESPONSES), pack(PROMPTS[::-1], RESPONSES[::-1])]
    calls = [lambda: model.log_probs(np.zeros((3, 5), int)), lambda: model.log_probs(np.ones((3, 5), int)),
             lambda: model.log_probs(np.zeros((5, 3), int)), *(
                 lambda batch=batch: model.response_log_probs(batch) for batch in (packs[0], packs[0], packs[1]))]
    packed_attention._tables_on_gpu.cache_clear()
    copies = []
    for call in calls:
        with emulator.counted() as work:
            call()
        copies.append(work.copies)
    assert copies == [6, 3, 6, 8, 5, 8]
