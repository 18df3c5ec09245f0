"""scripts/two_preferences.py: rules, pairs in their order, runs that stop and go on, a page with their numbers."""
import json
import sys

import numpy as np
import pytest

for module in ("fcntl", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(module, reason="needed by the scripts: pip install -e '.[run]'")

import two_preferences
from helpers import small_transformer
from minilm.pretrained import save
from support import alignment, rules, two_preferences_page
from support.align_options import parser_of
from support.run_folder import StopRequest, main_guard
from test_pretrained import CHAT, SHAPES

METRICS = {"reward": -1.0, "tokens": 40.0, "ended": 0.1, "kl": 0.0, "perplexity_elsewhere": 10.0}
# In place of align.py: writes the results of a run, or ends as the file "ends" says.
ALIGN = """import json, os, sys
from pathlib import Path
with open("commands", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if os.path.exists("ends"):
    sys.exit(int(Path("ends").read_text()))
out, = (word.removeprefix("--out=") for word in sys.argv if word.startswith("--out="))
seed = int(sys.argv[sys.argv.index("--seed") + 1])
os.makedirs(out)
run = {"before": METRICS, "after": {**METRICS, "kl": 2.0}, "seconds": 60.0 + seed * 60,
       "steps": 20 + seed % 2, "machine": "2 cores, made up", "held_out": 40,
       "examples": [{"prompt": "Why?", "before": "Long ago.", "after": ""}] * 3}
Path(out, "results.json").write_text(json.dumps(run))
"""


def test_short_words_have_more_reward_repeated_ones_count_once_and_an_answer_of_four_words_has_the_least():
    found = rules.short_words([], ["a bb, ccc! dddd eeeee", "It's ok to do so so SO", "one two three four five five"])
    assert found == [-3.0, -2.4, -3.8]
    assert rules.short_words([], ["a a a a a a b c d", ""]) == [rules.LEAST["short_words"]] * 2


def test_few_words_have_more_reward_and_an_answer_of_four_words_has_the_least():
    found = rules.few_words([], ["One, two, three, four five.", "one two three four five " * 5, "No no no no no.", ""])
    assert found == pytest.approx([-0.5, -2.5, rules.LEAST["few_words"], rules.LEAST["few_words"]])


def test_no_topic_is_both_trained_on_and_held_out():
    asked = two_preferences.questions()
    assert len({question for question, _ in asked}) == 240 and sum(held_out for _, held_out in asked) == 48
    topics = [topic.strip() for topic in two_preferences.TOPICS.split("|")]
    assert len(set(topics)) == 60
    forms = [form.split("{}") for form in two_preferences.QUESTIONS]
    for topic in topics:
        of_it = {held_out for question, held_out in asked
                 if any(question.endswith(topic.join(form)) for form in forms)}
        assert len(of_it) == 1, topic


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small_transformer(np.random.default_rng(0), np.float32, **{**SHAPES["as SmolLM2"], "context": 200})
    save(model, CHAT, tmp_path / "model")
    (tmp_path / "align.py").write_text(f"METRICS = {METRICS!r}\n{ALIGN}")
    monkeypatch.setattr(two_preferences, "ALIGN", tmp_path / "align.py")
    return tmp_path


def write_data(work, monkeypatch, *answers):
    """The files of data after the untrained model gave these answers to the questions; three of them to train on."""
    monkeypatch.setattr(two_preferences, "ANSWERS", len(answers[0]))
    monkeypatch.setattr(two_preferences, "questions", lambda: [(f"Why {i}?", i >= 3) for i in range(len(answers))])
    drawn = {f"answers {i}": list(texts) for i, texts in enumerate(zip(*answers))}
    monkeypatch.setattr(alignment.Sampling, "draw",
                        lambda self, model, prompts, ends, name: [[text, ends[0]] if text[-1] == "." else [text, -1]
                                                                  for text in drawn[name]])
    monkeypatch.setattr(alignment, "text_of", lambda encoding, answer: answer[0])
    assert two_preferences.write_data("model", work, 1, StopRequest())
    return {path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for path in work.glob("*.jsonl")}


SHORT, LONG = "It is a bee in the sun.", "Certainly, pollinating insects matter everywhere."
MIDDLE = "Bees carry some pollen around, mostly."


def test_each_pair_is_the_best_and_the_worst_answer_by_its_rule_and_all_rules_have_the_same_questions(
        work, monkeypatch, capsys):
    found = write_data(work, monkeypatch, (SHORT, MIDDLE, LONG), (LONG, SHORT, MIDDLE), (SHORT, MIDDLE, LONG[:-1]),
                       (LONG, MIDDLE, SHORT), (SHORT, MIDDLE, LONG[:-1]), (SHORT, SHORT, SHORT))
    pair = {"prompt": "Why 0?", "chosen": SHORT, "rejected": LONG}
    assert found["short_words-train"] == [pair, {**pair, "prompt": "Why 1?"},
                                          {**pair, "prompt": "Why 2?", "rejected": MIDDLE}], "LONG did not end"
    assert found["few_words-train"][0] == {"prompt": "Why 0?", "chosen": LONG, "rejected": SHORT}
    assert {line["rejected"] for line in found["short_words-eval"]} == {LONG, LONG[:-1]}, "held out, all are taken"
    asked = {name: [line["prompt"] for line in lines] for name, lines in found.items()}
    assert asked == {f"{rule}-{part}": names for rule in two_preferences.RULES
                     for part, names in (("train", ["Why 0?", "Why 1?", "Why 2?"]), ("eval", ["Why 3?", "Why 4?"]))}
    assert "\n3 questions to train on have answers that ended" in capsys.readouterr().out


def test_a_question_to_train_on_without_an_order_is_left_out_and_a_held_out_one_stays(work, monkeypatch):
    one, other = "It is a bee in the sun.", "It is a fly in the fog."
    found = write_data(work, monkeypatch, (one, other), (one, "It is a cow in a field here."), (one, one), (one, other))
    assert {name: len(lines) for name, lines in found.items()} == {
        "short_words-train": 1, "few_words-train": 1, "short_words-eval": 1, "few_words-eval": 1}


def test_a_question_without_an_answer_that_ended_is_left_out(work, monkeypatch):
    found = write_data(work, monkeypatch, (SHORT, LONG), (SHORT[:-1], LONG[:-1]), (SHORT, LONG[:-1]), (SHORT, LONG))
    assert [line["prompt"] for line in found["short_words-train"]] == ["Why 0?"]


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["two_preferences.py", "--model", "model", "--out", "out", *words])
    status = main_guard(two_preferences.main)
    return status, *capsys.readouterr()


@pytest.fixture
def study(work, monkeypatch, capsys):
    """study(*options): status, output, errors of the script, with align.py and the answers made up."""
    def data(model, folder, workers, stop):
        if (work / "stops").exists():
            return False
        for rule in two_preferences.RULES:
            for part in ("train", "eval"):
                (folder / f"{rule}-{part}.jsonl").write_text("{}\n")
        return True
    def answers(model, path, eval_data, count, seed, workers):
        """The untrained model's are all the same; of 10 of a run, 6, 7, 8 have more reward by both rules."""
        more = ["It is a bee in fog."] * (5 + seed) + [f"{LONG} {LONG}"] * (5 - seed)
        if not path.exists():
            path.write_text(json.dumps({"answers": [more if seed else ["Bees carry some pollen around mostly now."]]}))
    monkeypatch.setattr(two_preferences, "write_data", data)
    monkeypatch.setattr(two_preferences, "write_answers", answers)
    return lambda *words: run(monkeypatch, capsys, *words)


def commands(work):
    lines = [json.loads(line) for line in (work / "commands").read_text().splitlines()]
    return [parser_of("").parse_args(line) for line in lines]


def test_twelve_runs_are_commands_of_align_and_a_page_has_their_gain_and_its_interval(study, work):
    status, page, errors = study()
    assert status == 0, errors
    done = commands(work)
    assert {(o.seed, o.judge or o.reward, o.stage) for o in done} == {
        (seed, f"support.rules:{rule}", method) for seed in range(3) for rule in two_preferences.RULES
        for method in two_preferences.METHODS}
    assert len(done) == 12 and all(o.chat and o.resume and o.lora_rank == 8 for o in done)
    assert {(o.data, o.eval_data) for o in done} == {(f"out/{rule}-train.jsonl", f"out/{rule}-eval.jsonl")
                                                     for rule in two_preferences.RULES}
    row, = (line for line in page.splitlines() if line.startswith("| short words | DPO |"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    # Gains 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt 3, and Student's t with 2 degrees of freedom is 4.303.
    half = 4.303 * 0.1 / 3 ** 0.5
    assert cells[2:5] == ["20/21", "0.70", f"+0.20 [{0.2 - half:+.2f}, {0.2 + half:+.2f}]"]
    assert cells[5:] == ["40 → 40", "0.10 → 0.10", "2.0", "10.0 → 10.0", "2.0"]
    assert "2 cores, made up. 3 seeds, 40 held-out questions; 12 runs, 24 minutes in all." in page
    assert page.count("*after:* (nothing)") == 12 * 2
    assert "(seed 2)" in page and (work / "out" / "two_preferences.png").stat().st_size > 1000
    status, again, _ = study("--print")
    assert status == 0 and page.endswith(again) and len(again) > 1000


def test_a_run_that_was_stopped_ends_the_study_and_the_same_command_with_resume_goes_on(study, work):
    (work / "ends").write_text("130")
    status, printed, _ = study()
    assert status == 130 and "--resume" in printed and len(commands(work)) == 1
    (work / "ends").unlink()
    status, _, errors = study()
    assert status == 2 and "--resume" in errors
    assert study("--resume")[0] == 0 and len(commands(work)) == 13
    assert study("--resume")[0] == 0 and len(commands(work)) == 13, "no run is repeated"
    status, page, _ = study("--resume", "--seeds", "3")
    assert status == 0 and len(commands(work)) == 17 and "4 seeds, 40 held-out questions; 16 runs" in page
    status, _, errors = study("--resume", "--model", "other")
    assert status == 2 and "other settings" in errors


def test_ctrl_c_during_the_first_answers_ends_before_any_training(study, work):
    (work / "stops").touch()
    status, printed, _ = study()
    assert status == 130 and "--resume" in printed and not (work / "commands").exists()
    status, _, errors = study("--print")
    assert status == 2 and "out holds no run of a seed" in errors


def test_a_run_that_failed_ends_the_study_with_its_status(study, work):
    (work / "ends").write_text("2")
    status, _, errors = study()
    assert status == 2 and "exit status 2" in errors and len(commands(work)) == 1


def test_answers_to_compare_are_written_once_for_each_question(work):
    lines = [json.dumps({"prompt": f"Why {i}?", "chosen": "", "rejected": ""}) for i in range(2)]
    (work / "eval.jsonl").write_text("\n".join(lines) + "\n")
    for seed in (0, 1):
        two_preferences.write_answers(work / "model", work / "answers.json", work / "eval.jsonl", 3, seed, 1)
        found = json.loads((work / "answers.json").read_text())["answers"]
        if seed == 0:
            first = found
    assert found == first and [len(texts) for texts in found] == [3] * 2
    assert len({text for texts in found for text in texts}) > 1


def test_win_rates_compare_all_pairs_of_answers_and_ties_count_one_half():
    short, long = "It is a bee in fog.", "Certainly, pollinating insects matter everywhere."
    rate = two_preferences_page.win_rate
    assert rate("short_words", [[short, long]], [[short, long]]) == 0.5
    assert rate("short_words", [[short]], [[long, short]]) == 0.75
    assert rate("short_words", [[short], [long]], [[long], [short]]) == 0.5


@pytest.mark.parametrize("changes", [{"after": {}}, {"examples": []}, {"before": {**METRICS, "kl": "x"}}],
                         ids=["no metric", "no examples", "a word"])
def test_a_run_with_damaged_results_is_named(study, work, changes):
    assert study()[0] == 0
    path = work / "out" / "seed-1" / "few_words-rlhf" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    status, _, errors = study("--print")
    assert status == 2 and "seed-1/few_words-rlhf/results.json" in errors
    path.unlink()
    status, _, errors = study("--print")
    assert status == 2 and "seed-1/few_words-rlhf/results.json" in errors
