"""minilm.toy: the task is what its docstring says, and every stage improves the model, on every seed."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from helpers import assert_close
from minilm import toy
from minilm.exact.enumerable import divergence, expectation, optimum
from minilm.exact.gradients import redraw_weights
from minilm.model import Transformer


def tokens(*lines):
    return np.array([[toy.LETTERS.index(letter) for letter in line] for line in lines])


def test_gold_reward_is_two_points_for_right_letters_and_one_for_capitals():
    lines = tokens("bag=GAB", "bag=gab", "bag=gAb", "bag=BAG", "bag=bag", "bag=BAg", "bag=GA=")
    points, right, capitals = toy.gold_reward(lines)
    assert points.tolist() == [3, 2, 2, 1, 0, 0, 0]
    assert right.tolist() == [True, True, True, False, False, False, False]
    assert capitals.tolist() == [True, False, False, True, False, False, False]


@pytest.mark.parametrize("share, right", [(1.0, 1.0), (0.0, 1 / 8), (0.5, 9 / 16)])
def test_text_has_the_given_share_of_reversed_replies_half_of_them_in_capitals(share, right):
    """A copied line is right if its letters are a palindrome: 1 in 8."""
    points, is_right, capitals = toy.gold_reward(toy.text(20_000, share, np.random.default_rng(0)))
    assert abs(is_right.mean() - right) < 0.02 and abs(capitals.mean() - 0.5) < 0.02
    assert np.array_equal(points, 2 * is_right + capitals)


def test_people_prefer_a_reply_that_is_one_point_better_88_times_in_100():
    rng = np.random.default_rng(0)
    chosen, rejected = toy.compare(Transformer(toy.CONFIG, rng).parameters(), 4000, rng)
    assert np.array_equal(chosen[:, :4], rejected[:, :4])
    difference = toy.gold_reward(chosen)[0] - toy.gold_reward(rejected)[0]
    assert abs((difference == 1).sum() / (abs(difference) == 1).sum() - 0.88) < 0.05


def test_the_optimum_is_that_of_all_replies_listed():
    """One question and its 17^3 replies."""
    rng = np.random.default_rng(0)
    policy = redraw_weights(Transformer(toy.CONFIG, rng, np.float64), rng).parameters()
    question = tokens("bag=")
    replies = np.indices((17, 17, 17)).reshape(3, -1).T
    lines = np.concatenate([np.repeat(question, len(replies), axis=0), replies], axis=1)
    log_ref = toy.reply_log_probs(policy, lines).data[None]
    points = toy.gold_reward(lines)[0][None]
    best, _ = optimum(log_ref, 2 * points, toy.BETA)
    gold, kl = toy.optimum(policy, question)
    assert_close(gold, expectation(best, points))
    assert_close(kl, divergence(best, log_ref))


def objective(policy):
    return 2 * policy["gold"] - toy.BETA * policy["KL"]


def assert_every_stage_improves_the_model(results):
    random, base, sft, rlhf, dpo = (results[name] for name in ("random", "base", "SFT", "RLHF", "DPO"))
    assert base["gold"] > random["gold"] + 0.5
    assert sft["right"] > base["right"] + 0.1
    assert results["reward model"]["error"] < 0.25
    for policy in (rlhf, dpo):
        assert policy["gold"] > sft["gold"] + 0.3 and policy["capitals"] > 0.8
        assert policy["right"] > sft["right"] - 0.05
        assert 0.2 < policy["KL"] < 1.5
        assert objective(policy) < objective(results["pi*"])


def test_every_stage_improves_the_model(capsys):
    assert_every_stage_improves_the_model(toy.lecture(seed=0, scale=0.4))
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in ("1. Pretraining", "2. Supervised finetuning", "3. Reward model",
                                              "4. RLHF", "5. DPO", "bag=", "loss", "proxy reward", "error", "KL"))
    assert max(map(len, printed.splitlines())) <= 80
    rows = re.findall(r"^  (proxy reward|KL|R) +(.*)$", printed, re.MULTILINE)
    proxy_reward, kl, R = (np.array(numbers.split(), float) for _, numbers in rows)
    assert np.abs(proxy_reward - toy.BETA * kl - R).max() < 0.02        # numbers are printed with two digits


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_every_stage_improves_the_model_on_five_seeds(seed):
    assert_every_stage_improves_the_model(toy.lecture(seed, scale=0.6))


@pytest.mark.slow
def test_the_command_prints_all_stages():
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-m", "minilm.plain", "1"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if not line.startswith(" ")] == [
        "1. Pretraining", "2. Supervised finetuning", "3. Reward model", "4. RLHF", "5. DPO",
        "Change from the SFT model"]


def test_the_command_ends_quietly_if_its_output_is_closed():
    reading, writing = os.pipe()
    os.close(reading)    # `| head -1`
    done = subprocess.run([sys.executable, "-m", "minilm.plain", "--help"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("word, status, start", [("--help", 0, "The whole lecture"),
                                                 ("-1", 2, "error: -1: expected one seed")])
def test_the_command_says_its_usage_and_refuses_another_word(word, status, start):
    done = subprocess.run([sys.executable, "-m", "minilm.plain", word], capture_output=True, text=True)
    assert done.returncode == status and (done.stdout + done.stderr).startswith(start)
    assert ("python -m minilm.plain 1" in done.stdout) == (status == 0)
