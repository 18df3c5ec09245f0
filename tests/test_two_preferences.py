"""scripts/two_preferences.py: rules, pairs in their order, and a page with the numbers of the runs."""
import argparse
import json

import numpy as np
import pytest

for module in ("fcntl", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(module, reason="needed by the scripts: pip install -e '.[run]'")

import two_preferences
from helpers import small_transformer
from minilm.pretrained import save
from support import rules
from support.run_folder import UsageError
from test_pretrained import CHAT, SHAPES

METRICS = {"win_rate": 0.5, "reward": -1.0, "tokens": 40.0, "ended": 0.1, "kl": 0.0, "perplexity_elsewhere": 10.0}


def test_short_words_have_more_reward_and_an_answer_of_a_few_words_little():
    assert rules.short_words([], ["a bb, ccc! dddd eeeee", "It's ok to do so", "five"]) == [-3.0, -2.4, -6.0]


def test_short_sentences_have_more_reward_and_an_answer_of_a_few_words_little():
    found = rules.short_sentences([], ["One two three. Four!\nFive six?", "one two three four five", "Yes.", "..."])
    assert found == pytest.approx([-0.2, -0.5, -3.0, -3.0])


@pytest.fixture
def model(tmp_path):
    model = small_transformer(np.random.default_rng(0), np.float32, **{**SHAPES["as SmolLM2"], "context": 200})
    save(model, CHAT, tmp_path / "model")
    return str(tmp_path / "model")


def test_the_240_questions_are_different():
    assert len(set(two_preferences.questions())) == 240


def test_each_pair_has_the_order_of_its_rule_and_ties_are_left_out(model, tmp_path, monkeypatch):
    asked = [f"Why {word}?" for word in ("sun", "moon", "rain", "star", "wind", "snow")]
    monkeypatch.setattr(two_preferences, "questions", lambda: asked)
    monkeypatch.setattr(two_preferences.rules, "FEWEST", 1)         # answers of random weights have few words
    two_preferences.write_pairs(model, tmp_path, workers=1)

    def lines(name):
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in lines("prompts")] == asked
    answers = {rule: {line["prompt"]: {line["chosen"], line["rejected"]} for line in lines(rule)}
               for rule in two_preferences.RULES}
    for rule in two_preferences.RULES:
        judge = getattr(rules, rule)
        assert all(judge([], [line["chosen"]]) > judge([], [line["rejected"]]) for line in lines(rule))
        assert answers[rule], "no pair to look at"
    for prompt in set.intersection(*map(set, answers.values())):
        assert len({frozenset(answers[rule][prompt]) for rule in answers}) == 1, "the same two answers for each rule"


def finished(out, changes=lambda run: {}):
    """Results of all runs, as align.py writes them; the win rate after is 0.6, 0.7, 0.8 for seeds 0, 1, 2."""
    for seed in range(3):
        for rule in two_preferences.RULES:
            for method in two_preferences.METHODS:
                folder = out / f"seed-{seed}" / f"{rule}-{method}"
                folder.mkdir(parents=True)
                run = {"before": METRICS, "after": {**METRICS, "win_rate": 0.6 + 0.1 * seed, "kl": 2.0},
                       "seconds": 60.0, "steps": 20, "held_out": 40,
                       "examples": [{"prompt": "Why?", "before": "Long ago.", "after": ""}]}
                (folder / "results.json").write_text(json.dumps({**run, **changes(run)}))


def page(out):
    return two_preferences.page(argparse.Namespace(out=out, seeds=[0, 1, 2]))


def test_the_page_has_the_gain_its_range_and_its_standard_errors(tmp_path):
    finished(tmp_path)
    found = page(tmp_path)
    row, = (line for line in found.splitlines() if line.startswith("| short words | DPO |"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    # 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt 3
    assert cells[2:6] == ["0.50", "0.70", "+0.20 [+0.10, +0.30]", f"{0.2 / (0.1 / 3 ** 0.5):.1f}"]
    assert cells[6:] == ["-1.00 → -1.00", "40 → 40", "0.10 → 0.10", "2.0", "10.0 → 10.0", "1.0"]
    assert "12 runs: 12 minutes" in found and "*after:* (nothing)" in found
    assert (tmp_path / "two_preferences.png").stat().st_size > 1000


@pytest.mark.parametrize("changes", [lambda run: {"after": {}}, lambda run: {"examples": []},
                                     lambda run: {"before": {**METRICS, "kl": "x"}}], ids=["no metric", "no examples",
                                                                                           "a word"])
def test_a_run_with_damaged_results_is_named(tmp_path, changes):
    finished(tmp_path, changes)
    with pytest.raises(UsageError, match="results.json"):
        page(tmp_path)


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="seed-0/short_words-dpo"):
        page(tmp_path)
