"""What the README points to is there: files, and the tests that its page 'How we know' names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def claims():
    """The items of the page 'How we know': what is claimed and how closely, in the first line, then the tests."""
    page = README.split("\n## How we know\n")[1].split("\n## ")[0]
    return [item.split("\n", 1) for item in page.split("\n- ")[1:]]


def functions_of(name):
    tree = ast.parse((ROOT / "tests" / name).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_link_leads_somewhere():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(targets) > 30
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_the_page_has_claims():
    assert len(claims()) > 25


@pytest.mark.parametrize("claim, shown_by", claims(), ids=lambda text: text[:50])
def test_a_claim_says_how_closely_it_holds_and_names_tests_that_exist(claim, shown_by):
    assert re.search(r": \*.+\*\.$", claim), "no tolerance"
    files = shown_by.split("[")[1:]
    assert files, "no test file is named"
    for file in files:
        name = file.split("]")[0]
        missing = set(re.findall(r"`(test_\w+)`", file)) - functions_of(name)
        assert not missing, f"{name} has no {', '.join(missing)}"
