"""The experiments of scripts/answers are made as those of the lecture, and the page of the folder is their record's."""
import ast
import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("fcntl", reason="the scripts need a POSIX system")

from common import experiment, record
from common.text import first_sentence

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "answers"
SPEC = importlib.util.spec_from_file_location("answers", FOLDER / "all.py")
answers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(answers)
NAMES = answers.SUITE.experiments


def document(name):
    return experiment.paragraphs(ast.get_docstring(ast.parse(answers.SUITE.script(name).read_text("utf-8"))))


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_has_a_question_as_its_title_and_at_least_five_seeds(name):
    title, sections = document(name)
    assert title.endswith("?") and 20 < len(title) < 120
    assert len(sections["Rule"]) > 30 and len(sections["Limits"]) > 30
    figure = sections["Figure"]
    assert first_sentence(figure) == figure and "against" in figure and 60 < len(figure) < 500
    seeds = re.search(r'"default": \{"seeds": (\d+)', answers.SUITE.script(name).read_text("utf-8")).group(1)
    assert int(seeds) >= 5 and {"quick", "default"} <= set(answers.SUITE.sizes(name)) <= {"quick", "default", "full"}


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_imports_numpy_after_the_module_that_limits_blas(name):
    text = answers.SUITE.script(name).read_text("utf-8")
    assert text.index("from common.experiment import") < text.index("import numpy")


def test_every_script_of_the_folder_is_an_answer():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"all", *NAMES}


def test_the_table_is_made_of_its_record_and_every_answer_has_its_figure():
    found = record.read(FOLDER / "results.json")
    assert (FOLDER / "README.md").read_text("utf-8") == answers.SUITE.readme(found)
    assert list(found["rows"]) == list(NAMES)
    assert all((FOLDER / "figures" / f"{name}.png").exists() for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_record_has_the_answer_and_the_rule_of_the_experiments_file(name):
    _, sections = document(name)
    row = record.read(FOLDER / "results.json")["rows"][name]
    assert (row["claim"], row["rule"]) == (sections["Claim"], first_sentence(sections["Rule"]))


def test_the_table_shows_the_questions():
    text = (FOLDER / "README.md").read_text("utf-8")
    assert all(f"**{document(name)[0]}**" in text for name in NAMES)
