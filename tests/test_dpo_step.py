"""scripts/lecture/common/dpo_step.py: the parts of a gradient step on the DPO loss against a step that is taken."""

import numpy as np
import pytest

from common.dpo_step import TERMS, as_table, decomposition
from helpers import assert_close, small_transformer
from minilm.objectives.dpo import dpo_loss
from minilm.tensor import no_grad
from worlds.replies import VOCABULARY, ReplyWorld

BETA = 0.3


@pytest.fixture(scope="module")
def world():
    return ReplyWorld(words=1)


def moved(world, model, reference, pairs, watched, rate=1e-6):
    """d (mean log pi of the watched (p, y)) / d rate for a step of gradient descent on the loss of the pairs."""
    p, chosen, rejected = pairs
    parameters = model.parameters().values()
    for w in parameters:
        w.grad = None
    log_pi = world.log_probs(model)
    dpo_loss(log_pi[p, chosen], log_pi[p, rejected], reference[p, chosen], reference[p, rejected], BETA).backward()
    gradients = [w.grad.copy() for w in parameters]
    sides = []
    for sign in (1, -1):
        for w, gradient in zip(parameters, gradients):
            w.data -= sign * rate * gradient
        with no_grad():
            sides.append(world.log_probs(model).data[watched].mean())
        for w, gradient in zip(parameters, gradients):
            w.data += sign * rate * gradient
    return (sides[0] - sides[1]) / (2 * rate)


def test_the_two_terms_of_all_pairs_add_up_to_the_effect_of_a_step_and_those_of_one_pair_to_its_own(world):
    rng = np.random.default_rng(0)
    model = small_transformer(rng, vocab_size=VOCABULARY)
    reference = world.log_distributions(small_transformer(rng, vocab_size=VOCABULARY))
    pairs = world.comparisons(reference, world.gold, rng, 5)
    terms, error = decomposition(model, world, reference, pairs, BETA, alone=5)
    assert len(terms) == len(TERMS) and error < 1e-6
    p, chosen, _ = pairs
    assert_close(sum(terms[:2]), moved(world, model, reference, pairs, (p, chosen)), 1e-6)
    alone = [moved(world, model, reference, [column[i:i + 1] for column in pairs], (p[i:i + 1], chosen[i:i + 1]))
             for i in range(5)]
    assert_close(sum(terms[2:]), np.mean(alone), 1e-6)


def test_the_chosen_reply_of_a_pair_alone_raises_its_own_log_prob(world):
    rng = np.random.default_rng(1)
    model = small_transformer(rng, vocab_size=VOCABULARY)
    reference = world.log_distributions(model)
    pairs = world.comparisons(reference, world.gold, rng, 4)
    terms, _ = decomposition(model, world, reference, pairs, BETA, alone=4)
    assert terms[TERMS.index("one pair alone: its chosen")] > 0


def test_the_table_has_the_means_over_the_seeds_at_each_moment():
    terms = np.arange(24.0).reshape(2, 3, 4)
    assert as_table(terms, {"the start": 0, "the end": -1}) == [
        ["d log pi(chosen) / d rate, by", *TERMS],
        ["at the start", "+6.00", "+7.00", "+8.00", "+9.00"], ["at the end", "+14.00", "+15.00", "+16.00", "+17.00"]]
