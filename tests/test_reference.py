"""minilm.stages.reference: reference log-probs know the dialogues and the model that they were computed from."""
import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import rngs
from minilm.stages.dpo import reference_log_probs, train_dpo
from minilm.stages.reference import ReferenceLogProbs
from test_stages import PROMPTS, REJECTED, RESPONSES, make_training, transformer

REFERENCE = transformer(np.float32)
CHOSEN, WORSE = (reference_log_probs(REFERENCE, PROMPTS, side) for side in (RESPONSES, REJECTED))


def dpo(prompts=PROMPTS, chosen=RESPONSES, rejected=REJECTED, reference_chosen=CHOSEN, reference_rejected=WORSE):
    return train_dpo(make_training("DPO"), prompts, chosen, rejected, reference_chosen, reference_rejected, 2, 5)


def plain(values):
    return np.array(values, np.float32)


def test_they_are_an_array_of_the_same_numbers():
    assert isinstance(CHOSEN, np.ndarray) and CHOSEN.dtype == np.float32 and CHOSEN.shape == (len(PROMPTS),)
    assert list(dpo()) == list(dpo(reference_chosen=plain(CHOSEN), reference_rejected=plain(WORSE)))


@given(rng=rngs)
def test_an_index_keeps_their_origin(rng):
    rows = rng.integers(len(PROMPTS), size=rng.integers(1, 9))
    picked = [[side[i] for i in rows] for side in (PROMPTS, RESPONSES, REJECTED)]
    assert len(list(dpo(*picked, CHOSEN[rows], WORSE[rows]))) == 2
    assert len(list(dpo(*(side[2:] for side in (PROMPTS, RESPONSES, REJECTED)), CHOSEN[2:], WORSE[2:]))) == 2
    keep = np.arange(len(PROMPTS)) != rng.integers(len(PROMPTS))
    kept = [[x for x, k in zip(side, keep) if k] for side in (PROMPTS, RESPONSES, REJECTED)]
    assert len(list(dpo(*kept, CHOSEN[keep], WORSE[keep]))) == 2


def test_after_arithmetic_they_are_an_array_like_any_other():
    for array in (CHOSEN * 0.5, CHOSEN - 1, -abs(CHOSEN), np.concatenate([CHOSEN[:3], CHOSEN[3:]]), CHOSEN.copy()):
        assert getattr(array, "dialogues", None) is None
        list(dpo(reference_chosen=array))
    assert type(CHOSEN[0]) is np.float32 and float(CHOSEN.sum()) == plain(CHOSEN).sum()


@given(rng=rngs, count=st.integers(2, 20))
def test_log_probs_of_pairs_in_another_order_are_refused_with_the_first_wrong_entry_and_their_number(rng, count):
    prompts = [[1, i % 9, i // 9] for i in range(count)]
    responses = [rng.integers(3, 9, size=rng.integers(1, 4)).tolist() for _ in range(count)]
    references = [reference_log_probs(REFERENCE, prompts, responses) for _ in range(2)]
    order = rng.permutation(count)
    list(dpo(prompts, responses, responses, *references))
    wrong = np.flatnonzero(order != np.arange(count))
    if len(wrong):
        with pytest.raises(ValueError, match=rf"^train_dpo: reference_rejected, entry {wrong[0]}, .*it was computed "
                                             rf"for another prompt or response \({len(wrong)} entries are wrong\)"):
            dpo(prompts, responses, responses, references[0], references[1][order])


@pytest.mark.parametrize("change", [
    {"reference_chosen": WORSE, "reference_rejected": CHOSEN}, {"chosen": REJECTED, "rejected": RESPONSES},
    {"reference_rejected": CHOSEN}, {"prompts": PROMPTS[::-1]}, {"chosen": [[*r[:-1], 3] for r in RESPONSES]},
    {"chosen": [r + [3] for r in RESPONSES]}, {"prompts": [p[:-1] + [8] for p in PROMPTS]},
], ids=["swapped", "swapped pairs", "one side twice", "reversed prompts", "other tokens", "longer", "prompts"])
def test_log_probs_of_other_dialogues_are_refused(change):
    with pytest.raises(ValueError, match=r"^train_dpo: reference_\w+, entry \d, .*for another prompt or response"):
        dpo(**change)


def test_a_token_that_moves_from_the_prompt_to_the_response_is_noticed():
    longer = [i for i, r in enumerate(RESPONSES) if len(r) > 1]
    prompts = [PROMPTS[i] + RESPONSES[i][:1] for i in longer]
    responses = [RESPONSES[i][1:] for i in longer]
    with pytest.raises(ValueError, match=rf"entry 0, .*another prompt or response \({len(longer)} entries are wrong"):
        dpo(prompts, responses, responses, CHOSEN[longer], CHOSEN[longer])


def test_log_probs_of_two_models_are_refused():
    other = transformer(np.float32)
    other.parameters()["final_norm"].data[-1] += 1e-3
    with pytest.raises(ValueError, match="^train_dpo: the reference log-probs are of two models"):
        dpo(reference_rejected=reference_log_probs(other, PROMPTS, REJECTED))
    list(dpo(reference_rejected=reference_log_probs(REFERENCE.copy(), PROMPTS, REJECTED)))


def test_lists_arrays_and_tuples_of_the_same_tokens_are_the_same_dialogues():
    for kind in (np.array, tuple, lambda tokens: np.array(tokens, np.uint8)):
        again = reference_log_probs(REFERENCE, [kind(p) for p in PROMPTS], [kind(r) for r in RESPONSES])
        assert isinstance(again, ReferenceLogProbs) and (again.dialogues == CHOSEN.dialogues).all()


@pytest.mark.parametrize("values, message", [
    (plain(CHOSEN)[:-1], r"holds float32 of shape \(6,\)"),
    (plain(CHOSEN)[:, None], r"holds float32 of shape \(7, 1\)"),
    (CHOSEN[:-1], r"holds float32 of shape \(6,\)"), (np.full(7, np.nan, np.float32), "entry 0, is nan"),
    (plain([-1, -1, -np.inf, -1, -1, -1, -1]), "entry 2, is -inf"), (-5.0, r"holds float64 of shape \(\)"),
    (plain([-1, -1, 0.5, 2, -1, -1, -1]), r"entry 2, is 0.5: a log-prob is at most 0 \(2 entries are wrong\)"),
    (-plain(CHOSEN), "a log-prob is at most 0"), (None, "holds object"), (["-1"] * 7, "holds <U2"),
    (np.full(7, -3), "holds int64"),
], ids=str)
@pytest.mark.parametrize("side", ["reference_chosen", "reference_rejected"])
def test_arrays_that_are_no_log_probs_of_these_dialogues_are_refused(values, message, side):
    with pytest.raises(ValueError, match=f"^train_dpo: {side}.*{message}"):
        dpo(**{side: values})


def test_rounding_above_0_is_a_log_prob():
    list(dpo(reference_chosen=np.full(7, 1e-6, np.float32)))
