"""scripts/lecture: common/experiment.py, all.py and the page, on made-up experiments, and on the real ones."""
import ast
import base64
import io
import json
import os
import re
import select
import shutil
import struct
import subprocess
import sys
import zlib
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fcntl", reason="the scripts need a POSIX system")

LECTURE = Path(__file__).resolve().parents[1] / "scripts" / "lecture"
sys.path.append(str(LECTURE))
import all as lecture  # noqa: E402
from common import (
    experiment,  # noqa: E402
    markdown,  # noqa: E402
    page,  # noqa: E402
    record,
    suite,
    text as plain_text,
)
from common.words import LECTURE as LECTURE_WORDS  # noqa: E402
from support.run_folder import main_guard  # noqa: E402

CONFIG = dict(vocab_size=5, width=4, layers=1, heads=1, ffn_width=4, context=8)
DOC = "\n\n".join(["{title}", "Claim. {claim}", "Test. As said:\nso.", "Rule. It ends high. Or not.", "Limits. All.",
                   "Source. Nobody 2020, arXiv:2009.01325.", "Figure. The end against the step."])


@pytest.fixture
def drawing():
    """What figures need; one test environment of the gate is without it."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[run]'")
    return pytest.importorskip("PIL.Image")


# The experiments.

@pytest.mark.parametrize("name", lecture.SUITE.experiments)
def test_a_claim_has_its_script_its_six_paragraphs_and_its_sizes(name):
    source = lecture.SUITE.script(name).read_text("utf-8")
    title, sections = experiment.paragraphs(ast.get_docstring(ast.parse(source)))
    assert 10 < len(title) < 120, title
    assert len(sections["Rule"]) > 30 and len(sections["Limits"]) > 30
    assert not re.search(r"\b(todo|tbd|fixme)\b", source, re.IGNORECASE)
    assert {"quick", "default"} <= set(lecture.SUITE.sizes(name)) <= {"quick", "default", "full"}


@pytest.mark.parametrize("row", lecture.SUITE.experiments)
def test_an_experiment_imports_numpy_after_the_module_that_limits_blas(row):
    imports = [node for node in ast.parse(lecture.SUITE.script(row).read_text("utf-8")).body
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    standard = [name for name in modules if name.partition(".")[0] in sys.stdlib_module_names]
    assert modules[len(standard)] == "common.experiment" and "numpy" in modules


def test_every_script_of_the_folder_is_a_claim_or_shared():
    assert {path.stem for path in LECTURE.glob("*.py")} == {"all", *lecture.SUITE.experiments}


def test_the_lecture_has_23_claims_in_three_stages_and_none_twice():
    assert [len(rows) for rows in lecture.STAGES.values()] == [7, 5, 11]
    assert len(set(lecture.SUITE.experiments)) == 23


# common/experiment.py

def test_spread_keeps_mean_least_greatest_and_every_seed():
    kept = experiment.spread(np.float32(x) for x in (1, 2, 6))
    assert kept == {"mean": 3.0, "least": 1.0, "greatest": 6.0, "by_seed": [1.0, 2.0, 6.0]}


def test_mean_range_is_the_mean_and_in_brackets_the_least_and_the_greatest():
    assert experiment.mean_range([0.5, 1.0, 0.75]) == "0.75 [0.50, 1.00]"
    assert experiment.mean_range([-1, 2], digits=0) in ("0 [-1, 2]", "1 [-1, 2]")
    assert experiment.mean([0.5, 1.0]) == "0.75"


def test_a_docstring_has_a_title_and_six_paragraphs_in_order():
    title, sections = experiment.paragraphs(DOC.format(title="A\ntitle", claim="One. Two."))
    assert title == "A title" and tuple(sections) == experiment.PARAGRAPHS
    assert sections["Claim"] == "One. Two." and sections["Test"] == "As said: so."


@pytest.mark.parametrize("change", [("Limits. All.\n\n", ""), ("Limits.", "Limit."),
                                    ("Rule. It ends high. Or not.", "Rule."), ("Source.", "More. Text.\n\nSource."),
                                    ("\n\nFigure. The end against the step.", ""),
                                    ("Claim. {claim}\n\nTest. As said:\nso.", "Test. So.\n\nClaim. It.")])
def test_a_docstring_that_lacks_repeats_or_confuses_a_paragraph_is_refused(change):
    assert change[0] in DOC
    with pytest.raises(ValueError, match="Claim, Test, Rule, Limits, Source, Figure"):
        experiment.paragraphs(DOC.replace(*change))


def test_the_outcome_of_a_conclusion_follows_from_its_comparisons():
    for effects, expected in (([1.0, 1.1], "shown"), ([-1.0, -1.1], "not shown"), ([1.0, -1.0], "undecided")):
        comparison = experiment.Comparison("lead", effects, above=0)
        conclusion = experiment.Conclusion([comparison], "It leads.", {}, [["lead"]])
        assert conclusion.outcome == conclusion.summary()["outcome"] == expected
        assert conclusion.summary()["comparisons"] == [comparison.summary()]


def test_findings_have_an_outcome_of_their_own_and_do_not_decide_that_of_the_claim():
    rule = [experiment.Comparison("gain", [1.0, 1.1, 0.9], above=0)]
    finding = experiment.Comparison("lead over the baseline", [-1.0, -1.1, -0.9], above=0)
    summary = experiment.Conclusion(rule, "", {}, [], findings=[finding]).summary()
    assert summary["outcome"] == "shown" and [f["outcome"] for f in summary["findings"]] == ["not shown"]


def test_a_table_has_columns():
    assert plain_text.as_text([["a", "long"], ["wide", 1]]) == "a     long\nwide  1"


def test_a_wide_table_wraps_its_heads_and_continues_in_a_further_block():
    table = [["n", *(f"a long title of column {i}" for i in range(4))], ["1", *(["0.50 [0.25, 0.75]"] * 4)]]
    text = plain_text.as_text(table, columns=45)
    assert text.splitlines() == [
        "   a long title of    a long title of", "n  column 0           column 1",
        "1  0.50 [0.25, 0.75]  0.50 [0.25, 0.75]", "",
        "   a long title of    a long title of", "n  column 2           column 3",
        "1  0.50 [0.25, 0.75]  0.50 [0.25, 0.75]"]


def test_the_legend_stands_under_the_first_table_and_the_details_are_a_table_of_their_own():
    result = {"table": [["n", "end"], ["1", "3.5"]]}
    first = plain_text.as_text(result["table"])
    assert plain_text.tables(result) == first
    result |= {"legend": "End: the last value.", "details": [["at", "term"], ["the start", "+0.1"]]}
    assert plain_text.tables(result) == f"{first}\n\nEnd: the last value.\n\n{plain_text.as_text(result['details'])}"


def test_a_model_is_trained_once_and_anew_when_seed_recipe_code_or_library_change(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setattr(experiment, "_sources", lambda: "the library")
    calls = []

    def train(model, rng, steps):
        calls.append(steps)
        for p in model.parameters().values():
            p.data += rng.normal(size=p.shape).astype(p.data.dtype)
        return {"loss": [1.5] * steps}

    def otherwise(model, rng, steps):
        calls.append("otherwise")
        return {"loss": []}

    def weights(seed=0, train=train, folder=tmp_path, steps=2, dtype=np.float32):
        model, history = experiment.Experiment("tiny", folder, dtype).trained("base", seed, CONFIG, train, steps=steps)
        return [p.data for p in model.parameters().values()], history

    first, history = weights()
    again, kept = weights()
    assert calls == [2] and kept == history == {"loss": [1.5, 1.5]}
    elsewhere, _ = weights(folder=tmp_path / "other")
    assert calls == [2, 2]
    for a, b, c in zip(first, again, elsewhere):
        assert a.dtype == b.dtype and (a == b).all() and (a == c).all()
    assert any((a != b).any() for a, b in zip(first, weights(seed=1)[0]))
    weights(steps=3)
    weights(train=otherwise)
    assert calls[2:] == [2, 3, "otherwise"]
    weights()
    assert len(calls) == 5, "the first was still there"
    monkeypatch.setattr(experiment, "_sources", lambda: "another library")
    weights()
    assert len(calls) == 6
    doubles, _ = weights(dtype=np.float64)
    assert len(calls) == 7 and {a.dtype for a in doubles} == {np.dtype(np.float64)}
    assert np.allclose(doubles[0], first[0], atol=1e-6), "the same draws, rounded less"


def test_the_library_is_known_by_every_file_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.minilm, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "world").mkdir()
    known = [experiment._sources()]
    for name in ("__init__.py", "world/markov.py"):
        for text in ("x = 1", "x = 2"):
            (tmp_path / name).write_text(text)
            known.append(experiment._sources())
            assert known[-1] == experiment._sources()
    assert len(set(known)) == 5


def measure(experiment, seed, steps):
    experiment.say("measuring")
    return {"curve": np.arange(3) * (seed + 1.0), "steps": np.int64(steps)}


def conclude(seeds, size):
    ends = [s["curve"][-1] for s in seeds]
    table = [["seed", "end"], *([str(i), f"{end:.1f}"] for i, end in enumerate(ends))]
    return experiment.Conclusion([experiment.Comparison("end (metres)", ends, above=-10)],
                                 f"It ends at {experiment.mean(ends)}.", {"end": experiment.spread(ends)}, table)


def draw(figure, seeds, size):
    axis = figure.subplots()
    experiment.curve(axis, range(3), [s["curve"] for s in seeds], "curve", experiment.COLOURS[0])
    experiment.level(axis, 1.0, "chance")


def run_alone(monkeypatch, measure, *arguments):
    """The exit status of an experiment as a command."""
    monkeypatch.setattr(sys, "argv", ["tiny.py", *map(str, arguments)])
    sizes = {"quick": {"seeds": 3, "steps": 1}, "default": {"seeds": 4, "steps": 5}}
    doc = DOC.format(title="Tiny", claim="It ends high.")
    return experiment.run("tiny.py", doc, measure, conclude, draw, sizes, (3, 2))


def test_axes_of_a_trial_contain_their_data(drawing):
    def fixed(figure):
        axis = figure.subplots()
        experiment.curve(axis, [1, 2], [[-0.5, -0.4], [-0.6, -0.5]], "far below", experiment.COLOURS[0])
        experiment.level(axis, 0.0, "chance")
        axis.set(xlim=(0, 3), ylim=(1.4, 2))
        figures.append(figure)

    figures = []
    experiment.picture(fixed, "", (3, 2))
    experiment.picture(fixed, "", (3, 2), trial=True)
    assert figures[0].axes[0].get_ylim() == (1.4, 2)
    low, high = figures[1].axes[0].get_ylim()
    assert low <= -0.6 and high >= 0 and figures[1].axes[0].get_xlim() == (0, 3)


def test_a_report_says_the_rule_and_stays_within_its_columns():
    comparison = experiment.Comparison("lead (gold reward)", [1.0, 1.1, 1.2], above=0.5).summary()
    text = plain_text.report(RESULT | {"experiment": "tiny", "comparisons": [comparison], "words": "word " * 60})
    assert "tiny: shown\n  rule      It ends above 3.\n  measured  word" in text
    assert "compared  lead (gold reward): 1.1 (95% interval 0.852 to 1.35); required: above 0.5" in text
    assert max(map(len, text.splitlines())) <= plain_text.COLUMNS


def test_a_report_of_a_trial_says_that_it_decides_nothing_and_gives_no_other_outcome():
    comparison = experiment.Comparison("lead", [1.0, 1.1, 1.2], above=2).summary()
    compared = {"experiment": "tiny", **{kind: [comparison] for kind in ("comparisons", "conditions", "findings")}}
    assert "required: above 2: not shown" in plain_text.report(RESULT | compared)
    text = plain_text.report(RESULT | compared | {"outcome": experiment.TRIAL})
    assert text.startswith("tiny: a trial, which decides nothing: the models are hardly trained\n")
    assert "required: above 2: a trial\n" in text
    assert not any(outcome in text for outcome in experiment.OUTCOMES)


def test_an_experiment_leaves_numbers_and_two_figures_and_is_concluded_again_without_measuring(
        tmp_path, monkeypatch, capsys, drawing):
    assert run_alone(monkeypatch, measure, "--quick", "--out", tmp_path, "--workers", 2) == 0
    assert "It ends at 4.00." in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-dark.png", "tiny.json", "tiny.png"]
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert result["by_seed"] == [{"curve": [0, s + 1, 2 * s + 2], "steps": 1} for s in range(3)]
    assert (result["size"], result["seeds"], result["settings"]) == ("quick", [0, 1, 2], {"steps": 1})
    assert (result["outcome"], result["Claim"]) == ("a trial", "It ends high.")
    assert result["numbers"]["end"]["by_seed"] == [2, 4, 6]
    for style, ground in (("", (255, 255, 255)), ("-dark", (0x16, 0x17, 0x1a))):
        picture = drawing.open(tmp_path / f"tiny{style}.png").convert("RGB")
        assert picture.getpixel((0, 0)) == ground and len(picture.getcolors(1 << 20)) > 9

    def refuse(*_):
        raise AssertionError("measured again")
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert run_alone(monkeypatch, refuse, "--redraw", "--out", tmp_path) == 0
    assert json.loads((tmp_path / "tiny.json").read_text()) == result and len([*tmp_path.glob("*.png")]) == 2


def test_drawing_again_needs_what_was_measured(tmp_path, monkeypatch, capsys, drawing):
    assert run_alone(monkeypatch, measure, "--redraw", "--out", tmp_path) == 2
    assert "Run it first, without --redraw" in capsys.readouterr().err


# All of them.

SCRIPT = '''"""{title}

Claim. It is so.
"""
import json, os, pathlib, shutil, sys, time
SIZES = {sizes}
name, folder = pathlib.Path(__file__).stem, pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
size = next((size for size in ("quick", "full") if f"--{{size}}" in sys.argv), "default")
print("measuring", name, size, *sys.argv[sys.argv.index("--workers"):], flush=True)
{accident}
for style in ("", "-dark"):
    shutil.copy(pathlib.Path(__file__).with_name("picture.png"), folder / f"{{name}}{{style}}.png")
(folder / f"{{name}}.json").write_text(json.dumps({{**{result}, "size": size}}))
'''
RESULT = {"title": "A title", "Claim": "It is so.", "Test": "Tried.", "Rule": "It ends above 3. More.",
          "Limits": "Many.", "Source": "arXiv:2009.01325", "Figure": "The end against n.", "outcome": "shown",
          "words": "It came to 3.5. More is said here.",
          "numbers": {"end": {"mean": 3.5}}, "comparisons": [], "conditions": [], "settings": {"steps": 5},
          "table": [["n", "end"], ["1", "3.5"]],
          "seeds": [0, 1, 2], "seconds": 2.0, "workers": 2, "date": "2020-01-02", "machine": "2 cores", "by_seed": []}


@pytest.fixture
def run(tmp_path, monkeypatch, drawing):
    """run(*arguments): the exit status of all.py over three made-up experiments; without arguments, of all three into
    run.folder. run.write(name, ...) changes one."""
    scripts = tmp_path / "scripts"
    folder = tmp_path / "out"
    scripts.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    drawing.fromarray(noise).save(scripts / "picture.png")
    three = suite.Suite(scripts, {"Stage <1>": ("one", "two"), "Stage 2": ("three",)}, LECTURE_WORDS, "Tests.", "runs")
    monkeypatch.setattr(lecture, "SUITE", three)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["all.py", *map(str, arguments or ["--out", folder])])
        return main_guard(lecture.SUITE.main)

    def write(name, accident="", sizes="{'quick': {}, 'default': {}}", **result):
        text = SCRIPT.format(title=f"Row {name}", sizes=sizes, accident=accident, result=RESULT | result)
        (scripts / f"{name}.py").write_text(text)
    for name in lecture.SUITE.experiments:
        write(name)
    run.folder = folder
    run.write = write
    run.scripts = scripts
    run.figures = scripts / "figures"
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def measured(text):
    """The experiments that ran, in order, by their own output."""
    return re.findall(r"^    measuring (\w+)", text, re.MULTILINE)


def test_all_experiments_are_run_in_order_and_their_claims_written_down(run, capsys):
    run.write("two", outcome="not shown")
    assert run("--out", run.folder, "--rows", "three,two, one", "--workers", 7) == 0
    out = capsys.readouterr().out
    assert measured(out) == ["one", "two", "three"] and out.count("default --workers 7") == 3
    assert "[2/3] two: Row two" in out
    assert re.search(r"\[2/3\] two: not shown; \d+ s so far, about \d+ s left", out)
    claims = json.loads((run.folder / "claims.json").read_text())
    assert list(claims) == ["one", "two", "three"]
    assert claims["two"] == {"outcome": "not shown", "rule": "It ends above 3.", "figure": "two.png",
                             "numbers": {"end": {"mean": 3.5}}, "comparisons": [], "conditions": [], "findings": [],
                             "seeds": [0, 1, 2]}
    assert (run.folder / "claims.md").exists() and (run.folder / "index.html").exists()


def test_an_experiment_that_fails_is_reported_at_the_end_the_others_go_on_and_resume_runs_it_alone(run, capsys):
    run.write("two", accident="print('before'); raise SystemExit('the disk <is> full')")
    assert run() == 1
    out, err = capsys.readouterr()
    assert measured(out) == ["one", "two", "three"] and "[2/3] two: failed" in out
    assert re.search(r"two failed:\n.*    before\n    the disk <is> full\n    exit status 1\n", err, re.DOTALL)
    assert list(json.loads((run.folder / "claims.json").read_text())) == ["one", "three"]
    assert "not run" in (run.folder / "index.html").read_text()

    run.write("two")
    before = contents(run.folder)
    assert run() == 2 and "Pass --resume" in capsys.readouterr().err and contents(run.folder) == before
    assert run("--out", run.folder, "--resume", "--quick") == 2
    assert 'size was "default" and is now "quick"' in capsys.readouterr().err
    assert run("--out", run.folder, "--resume") == 0
    assert measured(capsys.readouterr().out) == ["two"]
    assert len(json.loads((run.folder / "claims.json").read_text())) == 3
    assert run("--out", run.folder, "--resume") == 0 and measured(capsys.readouterr().out) == []


def test_an_experiment_that_leaves_nothing_has_failed(run, capsys):
    run.write("one", accident="sys.exit(0)")
    assert run("--out", run.folder, "--rows", "one") == 1
    assert "it wrote no results" in capsys.readouterr().err


def test_results_of_another_size_do_not_count(run, capsys):
    assert run("--out", run.folder, "--rows", "one") == 0
    path = run.folder / "one.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": "quick"}))
    assert run("--out", run.folder, "--rows", "one", "--resume") == 0
    assert measured(capsys.readouterr().out) == ["one", "one"]


def test_an_experiment_without_more_to_show_runs_in_its_default_size_when_the_others_run_for_longer(run, capsys):
    run.write("two", sizes="{'quick': {}, 'default': {}, 'full': {}}")
    assert run("--out", run.folder, "--full") == 0
    assert re.findall(r"measuring (\w+ \w+)", capsys.readouterr().out) == ["one default", "two full", "three default"]
    assert len(json.loads((run.folder / "claims.json").read_text())) == 3


def test_an_unknown_experiment_and_a_missing_script_are_refused_before_anything_is_written(run, capsys):
    assert run("--out", run.folder, "--rows", "one,fore") == 2
    assert "'fore'; there are one, two, three" in capsys.readouterr().err
    (run.scripts / "two.py").unlink()
    assert run() == 2 and "lacks two.py" in capsys.readouterr().err
    assert not run.folder.exists()


def test_ctrl_c_lets_the_experiment_finish_and_says_how_to_go_on(run, capsys):
    run.write("one", accident="os.kill(os.getppid(), 2); time.sleep(0.2)")
    assert run() == 130
    out = capsys.readouterr().out
    assert measured(out) == ["one"] and re.search(r"stopped; continue with .*--resume", out)
    assert list(json.loads((run.folder / "claims.json").read_text())) == ["one"]


def test_a_second_ctrl_c_ends_the_experiment_and_its_workers_at_once(run, tmp_path):
    held = tmp_path / "held"
    os.mkfifo(held)     # whoever lives holds it open; its reader comes to the end when nobody does
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    run.write("one", accident=f"held, parent = os.open({str(held)!r}, os.O_WRONLY), os.getppid()\n"
                              "os.write(held, b'here')\n"
                              "for i in range(2 if os.fork() else 0): os.kill(parent, 2); time.sleep(1)\n"
                              "time.sleep(60)")
    assert run() == 130
    assert os.read(reader, 99) == b"here"
    assert select.select([reader], [], [], 20)[0] and os.read(reader, 99) == b"", "somebody still holds it open"
    os.close(reader)
    assert not (run.folder / "one.json").exists()


# Other roundings, and how long it takes.

def test_every_experiment_runs_again_under_the_roundings_asked_for_and_the_outcomes_are_compared(run, capsys):
    path = run.scripts / "two.py"
    path.write_text(path.read_text().replace("'outcome': 'shown'", "'outcome': 'undecided' if 'float64' in sys.argv or "
                                             "'OPENBLAS_CORETYPE' in os.environ else 'shown'"))
    assert run("--out", run.folder, "--rows", "one,two", "--workers", 4, "--rounding", "float64, coretype,workers") == 0
    out = capsys.readouterr().out
    assert re.findall(r"measuring (\w+) default --workers (.*)", out) == [
        ("one", "4"), ("two", "4"), ("one", "4 --dtype float64"), ("two", "4 --dtype float64"), ("one", "4"),
        ("two", "4"), ("one", "1"), ("two", "1")]
    text = (run.folder / "rounding.md").read_text()
    assert text in out
    assert "float64: 1 of 2 outcomes are the same (not two (undecided instead of shown)). " in text
    assert "workers: 2 of 2 outcomes are the same. In 2 of 2 experiments every number is the same." in text
    assert "| one | shown | shown | shown | shown | the same |" in text
    assert "| two | shown | undecided | undecided | shown | **differs** |" in text and "three" not in text
    assert run("--out", run.folder, "--rows", "one", "--resume", "--rounding", "float64") == 0
    out = capsys.readouterr().out
    assert measured(out) == [] and "(not two" in out, "two is still among the results"
    assert run("--out", run.folder, "--rounding", "float128") == 2
    assert "'float128'; there are float64, coretype, workers" in capsys.readouterr().err


def test_an_experiment_that_ran_under_one_rounding_alone_is_compared_with_nothing():
    rows = {"one": {"outcome": "shown"}, "two": {"outcome": "undecided"}}
    again = {"one": {"outcome": "shown", "equal": False}}
    text = markdown.roundings(("one", "two", "three"), {"rows": rows, "roundings": {"float64": again}})
    assert "| one | shown | shown | the same |" in text and "| two | undecided | not run |  |" in text
    assert text.endswith("\n\nfloat64: 1 of 1 outcomes are the same. In 0 of 1 experiments every number is the same. "
                         "Not run: two.\n")


def test_trials_have_no_outcomes_to_compare_but_their_numbers_are_compared():
    trials = {"one": {"outcome": experiment.TRIAL, "equal": True}}
    text = markdown.roundings(("one",), {"rows": trials, "roundings": {"float64": trials}})
    assert "float64: trials have no outcomes to compare. In 1 of 1 experiments every number is the same." in text
    assert "outcomes are the same" not in text


def test_the_readme_says_which_outcomes_hold_under_other_roundings(run):
    assert run("--out", run.folder, "--rounding", "float64") == 0
    assert run("--readme", run.folder) == 0
    text = (run.scripts / "README.md").read_text()
    assert text.endswith("- float64: 3 of 3 outcomes are the same. In 3 of 3 experiments every number is the same.\n")


def test_the_time_is_estimated_from_a_measurement_by_experiment(run, capsys):
    assert run("--out", run.folder, "--rows", "one") == 0
    assert "how long they take at this size was not measured" in capsys.readouterr().out
    run.write("two", seconds=298.0)
    assert run("--out", run.folder, "--rows", "one,two", "--resume") == 0
    assert run("--seconds", run.folder) == 0
    kept = json.loads((run.scripts / "seconds.json").read_text())["default"]
    assert kept == {"seconds": {"one": 2, "two": 298}, "date": "2020-01-02", "machine": "2 cores", "workers": 2}
    capsys.readouterr()
    again = run.folder.with_name("again")
    assert run("--out", again, "--rows", "one,two") == 0
    assert "2 experiments took 5 minutes with 2 workers on 2 cores (2020-01-02)." in capsys.readouterr().out
    assert lecture.SUITE.expected_seconds(["two", "three"], "default") == [298, 150], "an average one"
    assert lecture.SUITE.share_left(["one", "two"], 1, "default") == 149
    run.write("three", seconds=0.1)
    assert run("--out", again, "--rows", "three", "--resume") == 0 and run("--seconds", again) == 0
    assert lecture.SUITE.expected_seconds(["three"], "default") == [1], "at least 1, so that no share is infinite"
    assert lecture.SUITE.expectation(["one"], "quick").endswith("was not measured.")


@pytest.mark.parametrize("kept", ["", "[]", '{"default": 3}', '{"default": {}}',
                                  '{"default": {"seconds": {"one": "2"}, "workers": 1, "date": "", "machine": ""}}',
                                  '{"default": {"seconds": {"one": NaN}, "workers": 1, "date": "", "machine": ""}}'])
def test_damaged_times_are_one_line_of_error(run, capsys, kept):
    (run.scripts / "seconds.json").write_text(kept)
    assert run("--out", run.folder, "--rows", "one") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and "seconds.json" in printed


def test_times_of_0_seconds_give_shares(run):
    times = {"seconds": {"one": 0, "two": -1}, "workers": 1, "date": "", "machine": ""}
    (run.scripts / "seconds.json").write_text(json.dumps({"default": times}))
    assert lecture.SUITE.share_left(["one", "two"], 1, "default") == 1


def huge_png():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + name + data
                                           + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)


@pytest.mark.parametrize("damage", [lambda png: b"", lambda png: b"GIF", lambda png: png[:len(png) // 2],
                                    lambda png: huge_png(), lambda png: png.replace(b"IDAT", b"\0\0\0I", 1),
                                    lambda png: None],
                         ids=["empty", "no picture", "cut short", "60,000 pixels wide", "no chunk's name", "a pipe"])
def test_a_damaged_figure_is_one_line_of_error_that_names_it(run, capsys, damage):
    assert run("--out", run.folder, "--rows", "one") == 0
    figure = run.folder / "one.png"
    damaged = damage(figure.read_bytes())
    figure.unlink()
    os.mkfifo(figure) if damaged is None else figure.write_bytes(damaged)
    capsys.readouterr()
    for words in (["--readme", run.folder], ["--out", run.folder, "--rows", "one", "--resume"]):
        assert run(*words) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1 and "one.png: " in printed, printed
        assert "Draw it again with one.py --redraw" in printed


# The page.

class Page(HTMLParser):
    """The words, the tags and what they point to."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.pointers = [], set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        pointing = ("src", "srcset", "href", "action", "data", "poster", "background", "style")
        self.pointers += [(name, value) for name, value in attributes if name in pointing or name.startswith("on")]

    def handle_data(self, data):
        self.words.append(data)


HOSTILE = """</td><script>alert("1")</script> & 'quotes' {braces} %s <b onload=x>"""


def test_whatever_an_experiment_says_stays_text(run):
    said = {name: f"{name} {HOSTILE}" for name in (*experiment.PARAGRAPHS, "title", "words", "machine", "date")}
    run.write("one", **said, table=[[f"head {HOSTILE}"], [f"cell {HOSTILE}"]], settings={HOSTILE: HOSTILE})
    assert run("--out", run.folder, "--rows", "one") == 0
    text = (run.folder / "index.html").read_text()
    read = Page(text)
    assert not {"script", "b"} & read.tags
    words = "\n".join(read.words)
    alternative = said.pop("Figure")
    for expected in (*said.values(), f"head {HOSTILE}", f"cell {HOSTILE}", "Stage <1>"):
        assert expected in words
    assert f'alt="{escape("Figure: " + alternative)}"' in text


def test_the_page_asks_nobody_for_anything_and_holds_both_figures_of_every_experiment(run, drawing):
    assert run() == 0
    text = (run.folder / "index.html").read_text()
    read = Page(text)
    assert not {"link", "script", "iframe", "object", "embed", "form", "base"} & read.tags
    assert {name for name, _ in read.pointers} == {"src", "srcset", "href"}
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text or "default-src &#x27;none&#x27;" in text
    for name, value in read.pointers:
        if name == "href":
            assert re.fullmatch(r"#[a-z-]+[12]?|https://arxiv\.org/abs/[\d.]+", value)
            assert value[0] != "#" or f'id="{value[1:]}"' in text, "a link to nowhere"
        else:
            png = base64.b64decode(value.removeprefix("data:image/png;base64,"), validate=True)
            assert drawing.open(io.BytesIO(png)).size == (60, 40)
    assert [name for name, _ in read.pointers].count("srcset") == [name for name, _ in read.pointers].count("src") == 3
    assert text.count('width="60" height="40"') == 3
    assert all(f'id="{name}"' in text and f'href="#{name}"' in text for name in lecture.SUITE.experiments)


def test_every_link_of_the_page_leads_somewhere_and_the_contents_stay(run):
    assert run() == 0
    text = (run.folder / "index.html").read_text()
    hrefs = re.findall(r'href="#([^"]+)"', text)
    assert {f'id="{href}"' in text for href in hrefs} == {True}
    assert {"top", "contents", "formulas", "glossary", "stage-1", "stage-2"} < set(hrefs)
    section = text[text.index('<section id="two">'):text.index('<section id="three">')]
    assert 'href="#one">← previous' in text and 'href="#three">next →' in text
    assert "↑ top" in section and section.count("<details>") == 2
    assert len(re.findall(r"position: sticky", text)) >= 2
    for term in ("gold reward", "proxy reward", "KL (in nats)", "π*", "at a lower temperature"):
        assert f"<dt>{term}</dt>" in text
    for objective in ("SFT", "Reward model", "RLHF", "DPO"):
        assert any(objective in name for name in page.FORMULAS) and objective in text


def test_the_page_says_the_rule_beside_the_claim_and_its_comparisons_in_a_table(run):
    comparison = experiment.Comparison("lead <m>", [1.0, 1.1, 1.2], above=0.5).summary()
    condition = experiment.Comparison("learned", [1, 1], above=0).summary()
    run.write("one", comparisons=[comparison], findings=[comparison | {"name": "more"}], conditions=[condition])
    assert run("--out", run.folder, "--rows", "one") == 0
    text = (run.folder / "index.html").read_text()
    assert text.index("The lecture's claim.") < text.index("Rule tested here.") < text.index("Measured.")
    words = "\n".join(Page(text).words)
    assert "It ends above 3." in words and "condition: learned" in words and "beside the rule: more" in words
    assert "<td>lead &lt;m&gt;</td><td>1.1</td><td>0.852 to 1.35</td><td>above 0.5</td><td>shown</td>" in text
    assert "It came to 3.5. More is said here." in words


def test_the_page_shows_the_legend_and_the_details_below_the_table(run):
    run.write("one", legend="End <m>.", details=[["at", "term <m>"], ["the start", "+0.1"]])
    assert run("--out", run.folder, "--rows", "one") == 0
    text = (run.folder / "index.html").read_text()
    assert text.index("<td>3.5</td>") < text.index("<p>End &lt;m&gt;.</p>") < text.index("<td>+0.1</td>")


def test_alternative_texts_are_one_sentence(run):
    assert run() == 0
    alts = re.findall(r'alt="([^"]*)"', (run.folder / "index.html").read_text())
    assert alts == ["Figure: The end against n."] * 3


def test_the_alternative_text_of_a_trial_says_that_it_decides_nothing(run):
    run.write("one", outcome=experiment.TRIAL)
    assert run("--out", run.folder, "--rows", "one", "--quick") == 0
    alternative = 'alt="Figure of a trial, which decides nothing: The end against n."'
    assert alternative in (run.folder / "index.html").read_text()


@pytest.mark.parametrize("name", lecture.SUITE.experiments)
def test_the_alternative_text_of_a_figure_is_one_sentence_on_its_axes_and_no_title_states_the_claim(name):
    title, sections = experiment.paragraphs(ast.get_docstring(ast.parse(lecture.SUITE.script(name).read_text("utf-8"))))
    figure = sections["Figure"]
    assert plain_text.first_sentence(figure) == figure and figure[-1] == "." and 60 < len(figure) < 500
    assert "against" in figure, "what is drawn against what?"
    source = lecture.SUITE.script(name).read_text("utf-8")
    assert ("symlog" in figure) == ("symlog" in source.replace(figure, "").partition("def draw(")[2])
    assert title.rstrip(".") not in sections["Claim"]


def test_figures_and_wide_tables_say_that_they_scroll(run):
    run.write("one", table=[["a", "b", "c", "d"], ["1", "2", "3", "4"]])
    assert run("--out", run.folder, "--rows", "one") == 0
    text = (run.folder / "index.html").read_text()
    assert "the figure scrolls sideways" in text and "the table scrolls sideways" in text


def test_a_quick_run_is_marked_as_one_that_proves_nothing_and_the_readme_shows_none_of_it(run, capsys):
    assert run("--out", run.folder, "--rows", "one") == 0
    quick = run.folder.with_name("quick")
    assert run("--out", quick, "--rows", "one", "--quick") == 0
    assert ["A trial." in (folder / "index.html").read_text() for folder in (run.folder, quick)] == [False, True]
    capsys.readouterr()
    assert run("--readme", quick) == 2 and "decides nothing" in capsys.readouterr().err
    assert not run.figures.exists()


def luminance(colour):
    """Of a colour, as WCAG 2 defines it."""
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


@pytest.mark.parametrize("scheme", [page.LIGHT, page.DARK], ids=["light", "dark"])
def test_all_text_stands_out_from_its_ground(scheme):
    pairs = [(text, ground) for text in ("text", "soft", "link") for ground in ("ground", "panel")]
    for text, ground in pairs + [(kind, f"on-{kind}") for _, kind in page.SIGNS.values()]:
        bright, dim = sorted([luminance(scheme[text]), luminance(scheme[ground])], reverse=True)
        assert (bright + 0.05) / (dim + 0.05) > 4.5, f"{text} on {ground}"
    assert luminance("#ffffff") == pytest.approx(1) and luminance("#000000") == 0


def test_pages_and_figures_have_the_same_ground_and_every_outcome_a_sign():
    assert [page.LIGHT["ground"], page.DARK["ground"]] == [style["ground"] for style in experiment.STYLES.values()]
    assert set(page.SIGNS) == {*experiment.OUTCOMES, experiment.TRIAL, "not run"}
    assert len({sign for sign, _ in page.SIGNS.values()}) == 5, "not by colour alone"


# What the README shows.

def test_the_readme_has_the_claims_and_the_rules_in_markdown_with_links(run, capsys):
    run.write("two", outcome="not shown", Claim="a | b, <i> and *c*", words="At 2.5 vs. 3. it fails. Then more.")
    assert run("--out", run.folder, "--rows", "one,two") == 0
    capsys.readouterr()
    assert run("--table", run.folder) == 0
    out = capsys.readouterr().out
    assert (run.folder / "claims.md").read_text() in out
    assert ("| a \\| b, \\<i> and \\*c\\* | It ends above 3. | not shown | At 2.5 vs. 3. it fails. | "
            "[two.py](two.py), [figure](figures/two.png) |") in out.splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in out.splitlines() if line.startswith("|")} == {6}
    assert re.search(r"\|\n\n2 of 3 claims tested: 1 shown, 1 not shown\.\n\n2020-01-02, size ", out)
    assert max(map(len, out.splitlines())) < 400
    assert run("--table", run.scripts) == 2 and "holds no run" in capsys.readouterr().err
    assert run("--readme", run.folder) == 0
    assert (run.scripts / "README.md").read_text() == out and (run.figures / "two.png").exists()


def test_the_measured_cell_ends_with_the_comparison_on_which_the_outcome_depends():
    def written(*comparisons, **others):
        return {"comparisons": [experiment.Comparison(*c, **m).summary() for *c, m in comparisons], **others}

    far = "far", [1.9, 2.0, 2.1], {"above": 0}
    near = "near", [0.2, 0.25, 0.3], {"above": 0}
    open_ = "open", [-0.1, 0.06, 0.22], {"above": -0.1, "below": 0.1}
    bad = "bad", [-2.0, -2.1, -2.2], {"above": 0}
    worse = "worse", [-2.1, -2.1, -2.11], {"above": 0}
    assert markdown.decided_by(written(far, near)) == (
        "Decided by: near: 0.25 [0.126, 0.374] over 3 seeds; required: above 0.")
    assert markdown.decided_by(written(near, open_, far)) == (
        "Decided by: open: 0.06 [-0.337, 0.457] over 3 seeds; required: above -0.1 and below 0.1.")
    assert markdown.decided_by(written(bad, worse)) == (
        "Decided by: worse: -2.1 [-2.12, -2.08] (97.5% interval) over 3 seeds; required: above 0.")
    assert markdown.decided_by(written(far, near, bad, at_least=2)) == (
        "Decided by: near: 0.25 [0.0292, 0.471] (98.3% interval) over 3 seeds; required: above 0.")
    endless = {**written(near)["comparisons"][0], "mean": None, "interval": [None, None], "by_seed": [None, 1.0]}
    assert markdown.decided_by({"comparisons": [endless]}) == (
        "Decided by: near: inf no interval over 2 seeds; required: above 0.")
    assert markdown.decided_by({}) == ""


def test_an_experiment_that_ran_again_replaces_its_row_alone_and_its_outcomes_under_other_roundings(run, tmp_path):
    assert run("--out", run.folder, "--rounding", "float64,coretype") == 0 and run("--readme", run.folder) == 0
    before = record.read(run.scripts / "results.json")
    run.write("two", outcome="not shown", date="2020-02-03", seconds=62.0)
    again = tmp_path / "again"
    assert run("--out", again, "--rows", "two", "--rounding", "coretype") == 0 and run("--readme", again) == 0
    after = record.read(run.scripts / "results.json")
    assert list(after["rows"]) == ["one", "two", "three"]
    assert {name for name in after["rows"] if after["rows"][name] != before["rows"][name]} == {"two"}
    assert after["rows"]["two"]["outcome"] == "not shown"
    assert {name: set(found) for name, found in after["roundings"].items()} == {
        "float64": {"one", "three"}, "coretype": {"one", "two", "three"}}, "that of two in float64 is of the run before"
    text = (run.scripts / "README.md").read_text()
    assert "3 of 3 claims tested: 2 shown, 1 not shown.\n\n2020-01-02 to 2020-02-03, size default, " in text
    assert ", 1 minutes in all" in text
    assert text.endswith("- float64: 2 of 2 outcomes are the same. In 2 of 2 experiments every number is the same. "
                         "Not run: two.\n"
                         "- coretype: 3 of 3 outcomes are the same. In 3 of 3 experiments every number is the same.\n")


def test_times_and_memory_are_no_numbers_that_must_be_the_same():
    one, other, third = ({**RESULT, "seconds": 1.0, "Claim": "A.", "Rule": "B.", "words": "C.", "size": "full",
                          "by_seed": [{"gold": gold, "seconds": seconds}]}
                         for gold, seconds in ((0.5, 1.0), (0.5, 2.0), (0.25, 1.0)))
    found = record.of_run({"as run": {"dpo": one}, "workers": {"dpo": other}, "float64": {"dpo": third}})
    assert [found["roundings"][name]["dpo"]["equal"] for name in ("workers", "float64")] == [True, False]


def test_a_damaged_record_is_an_error_and_nothing_is_written(run, capsys, drawing):
    assert run("--out", run.folder) == 0 and run("--readme", run.folder) == 0
    path, others = run.scripts / "results.json", [run.scripts / "README.md", *run.figures.iterdir()]
    before = [other.read_bytes() for other in others]
    for figure in run.folder.glob("*.png"):
        drawing.new("RGB", (30, 20)).save(figure)
    whole = path.read_text()
    for text, message in ((whole[:-3], "results.json"), ('{"rows": {}}', "lacks 'roundings'"),
                          (whole.replace('"outcome": "shown"', '"outcome": "nice"'), "outcome of 'one' is 'nice'")):
        path.write_text(text)
        capsys.readouterr()
        assert run("--readme", run.folder) == 2
        err = capsys.readouterr().err
        assert re.search(message, err) and "Take the file of the repository again" in err
        assert path.read_text() == text and [other.read_bytes() for other in others] == before


def test_the_readmes_figures_are_small_and_from_a_palette(run, drawing, capsys, monkeypatch):
    monkeypatch.setattr(suite, "FIGURE_BYTES", 1000)
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    assert run("--out", run.folder, "--rows", "one") == 0
    drawing.fromarray(np.repeat(noise, 2, axis=1)).save(run.folder / "one.png")
    assert run("--readme", run.folder) == 2 and "one.png; draw them smaller" in capsys.readouterr().err
    assert not (run.scripts / "README.md").exists() and not (run.scripts / "results.json").exists()
    drawing.fromarray(noise[:20]).save(run.folder / "one.png")
    assert run("--readme", run.folder) == 0
    picture = drawing.open(run.figures / "one.png")
    assert picture.mode == "P" and picture.size in ((60, 20), (45, 15), (36, 12))
    assert (run.figures / "one.png").stat().st_size < 1000 < (run.folder / "one.png").stat().st_size
    assert [path.name for path in run.figures.iterdir()] == ["one.png"]
    assert (run.scripts / "README.md").exists()


def test_what_is_made_compact_keeps_its_colours(drawing):
    flat = np.zeros((20, 20, 3), np.uint8)
    flat[:, 10:] = (0x2f, 0x7e, 0xd8)
    file = io.BytesIO()
    drawing.fromarray(flat).save(file, "PNG")
    assert (np.asarray(drawing.open(io.BytesIO(page.compact(file.getvalue()))).convert("RGB")) == flat).all()
    half = np.asarray(drawing.open(io.BytesIO(page.compact(file.getvalue(), scale=0.5))).convert("RGB"))
    assert half.shape == (10, 10, 3) and (half == flat[::2, ::2]).all()


def test_the_readme_of_the_folder_is_made_of_its_record_and_every_claim_has_its_figure():
    found = record.read(LECTURE / "results.json")
    assert (LECTURE / "README.md").read_text("utf-8") == lecture.SUITE.readme(found)
    assert list(found["rows"]) == list(lecture.SUITE.experiments)
    assert all((LECTURE / "figures" / f"{name}.png").exists() for name in lecture.SUITE.experiments)


@pytest.mark.parametrize("name", lecture.SUITE.experiments)
def test_the_record_has_the_claim_the_rule_and_the_number_of_seeds_of_the_experiments_file(name):
    tree = ast.parse(lecture.SUITE.script(name).read_text("utf-8"))
    _, sections = experiment.paragraphs(ast.get_docstring(tree))
    row = record.read(LECTURE / "results.json")["rows"][name]
    assert (row["claim"], row["rule"]) == (sections["Claim"], plain_text.first_sentence(sections["Rule"]))
    size, = (value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SIZES"
             for key, value in zip(node.value.keys, node.value.values) if ast.literal_eval(key) == row["size"])
    assert {ast.unparse(key): ast.unparse(value) for key, value in zip(size.keys, size.values)}["'seeds'"] == str(
        row["seeds"])


# The real ones: longer.

@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The folder of a quick run of every experiment, and what it printed."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("lecture") / "run"
    command = [sys.executable, str(LECTURE / "all.py"), "--quick", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return folder


@pytest.mark.slow
def test_a_quick_run_of_every_experiment_gives_every_claim_an_outcome_and_two_figures(quick_run):
    from PIL import Image
    def refuse(constant):
        raise ValueError(f"{constant} is no number of JSON's")
    claims = json.loads((quick_run / "claims.json").read_text(), parse_constant=refuse)
    text = (quick_run / "index.html").read_text()
    assert list(claims) == list(lecture.SUITE.experiments)
    for name, claim in claims.items():
        assert set(claim) == {"outcome", "rule", "figure", "numbers", "comparisons", "conditions", "findings", "seeds"}
        assert claim["outcome"] == experiment.TRIAL
        assert len(claim["seeds"]) >= 3 and claim["numbers"]
        assert all(0 < len(numbers["by_seed"]) <= len(claim["seeds"]) for numbers in claim["numbers"].values())
        light, dark = (Image.open(quick_run / f"{name}{style}.png").convert("RGB") for style in ("", "-dark"))
        assert claim["figure"] == f"{name}.png" and light.size == dark.size
        assert light.getpixel((0, 0)) == (255, 255, 255) and dark.getpixel((0, 0)) == (0x16, 0x17, 0x1a)
        assert f'<section id="{name}">' in text
    assert "A trial." in text and not re.search(r'class="badge (yes|no|open)"', text)


def overflow(text, width, folder):
    """By how many pixels a page is wider than its window: in a frame, for those can be as narrow as a phone."""
    frame = f"""<iframe width="{width}" height="800" style="border: 0" srcdoc="{escape(text)}" onload="
        const root = this.contentDocument.documentElement;
        document.title = this.contentWindow.innerWidth + ' ' + (root.scrollWidth - root.clientWidth)"></iframe>"""
    (folder / "frame.html").write_text(f"<title>not loaded</title>{frame}", "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=20000",
               f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "frame.html").as_uri()]
    dumped = subprocess.run(["chromium", *options], capture_output=True, text=True, timeout=120)
    window, excess = map(int, re.search(r"<title>(\d+) (\d+)</title>", dumped.stdout).groups())
    assert window == width
    return excess


@pytest.mark.slow
def test_no_page_is_wider_than_its_window_on_a_phone_or_a_desktop(quick_run, tmp_path):
    if not shutil.which("chromium"):
        pytest.skip("needs a browser: chromium")
    text = (quick_run / "index.html").read_text("utf-8")
    wide = text.replace("<main>", "<main><div style='width: 500px'>wide</div>")
    assert overflow(wide, 390, tmp_path) > 100, "it cannot fail"
    for width in (320, 390, 1280):
        assert overflow(text, width, tmp_path) == 0, f"at {width} pixels"
