"""The Korean walkthrough of the lecture has the claims, the outcomes and the numbers of the English table."""
import re

import pytest

from common import korean, page, record
from common.words import HEADER, LECTURE as WORDS
from support.run_folder import UsageError
from test_lecture import LECTURE, RESULT, lecture

WRITTEN = record.read(LECTURE / "results.json")
NAMES = [name for names in lecture.STAGES.values() for name in names]


def test_the_walkthrough_is_what_its_template_and_the_results_give():
    assert (LECTURE / "README.ko.md").read_text("utf-8") == korean.walkthrough(WRITTEN)


def test_it_has_every_claim_once_with_a_title():
    assert sorted(korean.CLAIMS) == sorted(korean.titles()) == sorted(NAMES)
    assert len(korean.STAGES) == len(lecture.STAGES)


@pytest.mark.parametrize("name", NAMES)
def test_its_section_has_the_outcome_the_files_and_the_numbers_of_the_english_row(name):
    text = (LECTURE / "README.ko.md").read_text("utf-8")
    section = re.split(r"^#+ ", text.partition(f"[{name}.py]")[2], flags=re.M)[0]
    row = WRITTEN["rows"][name]
    assert f"판정: {korean.OUTCOMES[row['outcome']]}** · [{name}.py]" in text and f"figures/{name}.png" in text
    given = korean.numbers(row["measured"])
    sentences = section.partition("**측정.**")[2]
    assert sentences and given and all(number in row["measured"] for number in given)
    used = re.findall(r"\{%s\.(\d+)\}" % name, korean.TEMPLATE.read_text("utf-8"))
    assert used and all(given[int(index)] in section for index in used)
    written_here, written_there = (set(re.findall(r"\d+\.\d+", text)) for text in (sentences, " ".join(given)))
    assert written_here == written_there | ({"0.97"} if name == "encoder_vs_decoder" else set())


def test_new_results_give_new_numbers_and_outcomes():
    rows = {name: dict(row) for name, row in WRITTEN["rows"].items()}
    rows["dpo"] |= {"outcome": "not shown", "measured": rows["dpo"]["measured"].replace("2.27", "9.87")}
    changed = korean.walkthrough({"rows": rows})
    assert "9.87" in changed and "9.87" not in korean.walkthrough(WRITTEN)
    assert changed.count("판정: 확인되지 않음") == korean.walkthrough(WRITTEN).count("판정: 확인되지 않음") + 1


def test_a_number_that_was_not_measured_is_an_error_with_its_place():
    rows = {name: dict(row) for name, row in WRITTEN["rows"].items()}
    rows["dpo"]["measured"] = "Nothing."
    with pytest.raises(UsageError, match=r"\{dpo\.0\} is no number that was measured"):
        korean.walkthrough({"rows": rows})


def test_links_of_the_walkthrough_lead_to_files():
    text = (LECTURE / "README.ko.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 2 * len(NAMES)
    assert [link for link in links if not (LECTURE / link).exists()] == []


def test_the_page_has_titles_claims_outcomes_and_glossary_in_both_languages():
    result = RESULT | {"experiment": "dpo", "title": "Title <of> dpo", "size": "default"}
    html = page.html(WORDS, lecture.STAGES, {"dpo": result}, {"dpo": [b"\0" * 24] * 2}, "default")
    for english, in_korean in (
            ("Title &lt;of&gt; dpo", korean.titles()["dpo"]), (WORDS.title, korean.TITLE),
            (result["Claim"], korean.CLAIMS["dpo"]), (result["outcome"], korean.OUTCOMES[result["outcome"]]),
            *((title, korean.STAGES[i]) for i, title in enumerate(lecture.STAGES) if i == 2)):
        assert f'<span class="en">{english}</span><span class="ko" lang="ko">{in_korean}</span>' in html
    assert all(term in html for term, *_ in korean.TERMS)
    assert 'id="korean"' in html and "body:has(#korean:checked) .en { display: none }" in html


def test_the_english_table_and_the_walkthrough_link_to_each_other():
    assert "(README.ko.md)" in HEADER and "(README.md)" in korean.TEMPLATE.read_text("utf-8")
