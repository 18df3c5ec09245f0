"""minilm/world: questions and right answers, texts, the split between training and evaluation, and the annotators."""
import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helpers import rngs
from minilm.world import annotators, corpus, manners, tasks
from minilm.world.annotators import Annotator, draw_annotators, gold_reward, is_right
from minilm.world.manners import Manner, phrase, read

task_names = st.sampled_from(tasks.TASKS)
a_manner = st.builds(Manner, opening=st.sampled_from(["", *manners.OPENINGS]), shows_steps=st.booleans(),
                     full_sentence=st.booleans(), closing=st.sampled_from(["", *manners.CLOSINGS]))
PLAIN = Manner("", False, True, "")

# A second definition of the right answers, from the content of the question alone.
ANSWERS = {
    "first": lambda x: re.match(r"\w+", x)[0],
    "last": lambda x: re.search(r"\w+$", x)[0],
    "reverse": lambda x: " ".join(reversed(x.split(" "))),
    "repeat": lambda x: x,
    "count": lambda x: str(1 + x.count(" ")),
    "sum": lambda x: str(sum(int(d) for d in x if d.isdigit())),
    "city": lambda x: tasks.person(x)["city"],
    "animal": lambda x: tasks.person(x)["animal"],
    "colour": lambda x: tasks.person(x)["colour"],
}


@pytest.fixture(scope="module")
def documents():
    return corpus.documents(np.random.default_rng(0), 2500)


@pytest.fixture(scope="module")
def demonstrations():
    return corpus.demonstrations(np.random.default_rng(1), 2500)


def stated(documents):
    """(task, content, answer) of every statement in the documents, found with the templates."""
    templates = [(task, t) for task, (*_, ways) in {**tasks.LIST_TASKS, **tasks.FACT_TASKS}.items() for t in ways]
    patterns = [(task, re.compile(r"(?:(?<=^)|(?<=\. ))" + re.escape(t).replace(r"\{x\}", r"(?P<x>[\w ]+?)")
                                  .replace(r"\{a\}", r"(?P<a>[\w ]+?)"))) for task, t in templates]
    for text in documents:
        for task, pattern in patterns:
            for found in pattern.finditer(text):
                yield task, found["x"], found["a"]
        if " -> " in text:
            pairs = [example.split(" -> ") for example in text.split(" ; ")]
            task = next(t for t in tasks.LIST_TASKS if all(ANSWERS[t](x) == a for x, a in pairs))
            yield from ((task, x, a) for x, a in pairs)
        for x, a in re.findall(r"The sum ([\d +]+) = (\d+)\.", text):
            yield "sum", x, a
        for x, steps in re.findall(r"To add ([\d +]+) : ([^.]+)\.", text):
            yield "sum", x, steps.split(" = ")[-1]


# Questions.

@given(rng=rngs, task=task_names, held_out=st.booleans())
def test_a_question_has_the_right_answer_and_is_held_out_as_requested(rng, task, held_out):
    q = tasks.draw_question(rng, held_out, task)
    assert q.task == task and q.content in q.text and "{" not in q.text
    assert q.answer == ANSWERS[task](q.content)
    assert tasks.is_held_out(q.content) == held_out


@given(rng=rngs)
def test_the_steps_of_a_sum_lead_from_its_digits_to_its_answer(rng):
    q = tasks.draw_question(rng, task="sum")
    total, *digits = map(int, q.content.split(" + "))
    for step, digit in zip(q.steps, digits, strict=True):
        assert step == f"{total} + {digit} = {total + digit}"
        total += digit
    assert q.answer == str(total)


def test_tasks_come_in_equal_numbers_and_random_order():
    questions = tasks.draw_questions(np.random.default_rng(0), 9 * 20 + 1)
    counts = [sum(q.task == task for q in questions) for task in tasks.TASKS]
    assert sorted(set(counts)) == [20, 21]
    assert [q.task for q in questions[:9]] != list(tasks.TASKS)


@pytest.mark.parametrize("draw", [
    lambda rng: tasks.draw_questions(rng, 20), lambda rng: tasks.draw_questions(rng, 20, held_out=True),
    lambda rng: corpus.documents(rng, 20), lambda rng: corpus.demonstrations(rng, 20), draw_annotators],
    ids=["questions", "held out", "documents", "demonstrations", "annotators"])
def test_all_draws_are_determined_by_the_generator(draw):
    assert draw(np.random.default_rng(5)) == draw(np.random.default_rng(5)) != draw(np.random.default_rng(6))


def test_the_held_out_contents_and_the_facts_are_the_same_on_every_machine_and_in_every_run():
    """Fixed values: if they change, every published number changes."""
    people = [name for name in tasks.PEOPLE if tasks.is_held_out(name)]
    assert people == ["Finn", "Mira", "Will", "Yara"]
    assert tasks.person("Finn") == {"city": "Cairo", "animal": "goat", "colour": "green"}
    held_out = {text: tasks.is_held_out(text) for text in ("cat bird", "cat dog", "2 + 2 + 2", "1 + 2 + 3", "2 + 2")}
    assert held_out == {"cat bird": False, "cat dog": False, "2 + 2 + 2": True, "1 + 2 + 3": False, "2 + 2": False}


@given(words=st.lists(st.sampled_from(tasks.WORDS), min_size=2, max_size=5))
def test_a_list_and_its_reverse_are_held_out_together(words):
    assert tasks.is_held_out(" ".join(words)) == tasks.is_held_out(" ".join(words[::-1]))


@given(rng=rngs, task=task_names)
def test_a_statement_completed_by_the_answer_is_a_statement_of_the_documents(rng, task):
    q = tasks.draw_question(rng, task=task)
    assert list(stated([f"{tasks.statement(q)} {q.answer}."])) == [(task, q.content, q.answer)]


# Training texts, and contents that stay out of them.

def test_the_statements_of_the_documents_are_true_and_cover_every_task(documents):
    statements = list(stated(documents))
    assert {task for task, _, _ in statements} == set(tasks.TASKS)
    assert len(statements) > 5000
    for task, content, answer in statements:
        assert answer == ANSWERS[task](content), (task, content, answer)


def test_documents_state_no_held_out_list_or_sum(documents):
    contents = {content for task, content, _ in stated(documents) if task not in tasks.FACT_TASKS}
    contents |= {song for text in documents for song in text.split(" , ") if re.fullmatch(r"[a-z ]+", song)}
    assert len(contents) > 3000
    assert not [content for content in contents if tasks.is_held_out(content)]


def test_demonstrations_and_training_questions_contain_no_held_out_question(demonstrations):
    trained = [q for q, _ in demonstrations] + tasks.draw_questions(np.random.default_rng(2), 2500)
    held_out = tasks.draw_questions(np.random.default_rng(3), 2500, held_out=True)
    assert {q.task for q in trained} == {q.task for q in held_out} == set(tasks.TASKS)
    assert not {q.content for q in trained} & {q.content for q in held_out}
    assert not {q.text for q in trained} & {q.text for q in held_out}


def test_no_step_of_a_longer_sum_is_a_held_out_sum(documents, demonstrations):
    """3 + 4 + 1 begins with 3 + 4 = 7. A step may come later too, if its total is a digit that sums are made of."""
    texts = [*documents, *(response for _, response in demonstrations)]
    given_away = {step for text in texts for step in re.findall(r"(?:^|[.!?,:] )([0-5] \+ [0-5]) = \d", text)}
    assert not [step for step in given_away if tasks.is_held_out(step)]


def test_documents_state_every_fact_and_demonstrations_ask_about_no_held_out_person(documents, demonstrations):
    told = {(task, name) for task, name, _ in stated(documents) if task in tasks.FACT_TASKS}
    assert told == {(task, name) for task in tasks.FACT_TASKS for name in tasks.PEOPLE}
    asked = {q.content for q, _ in demonstrations if q.task in tasks.FACT_TASKS}
    held_out = {name for name in tasks.PEOPLE if tasks.is_held_out(name)}
    assert held_out and asked == set(tasks.PEOPLE) - held_out


def test_documents_hold_no_dialogue(documents):
    assert not [text for text in documents if "User:" in text or "Assistant:" in text or "?" in text]


def test_demonstrations_are_right_in_every_manner(demonstrations):
    for question, response in demonstrations:
        assert is_right(question, response)
    responses = " ".join(response for _, response in demonstrations)
    for words in (*manners.KINDS, "The answer is", " + "):
        assert words in responses


def test_the_english_text_is_long_and_comes_with_its_hash():
    text, sha256 = corpus.english()
    assert len(text) > 100_000 and len(sha256) == 64 and (text, sha256) == corpus.english()


def test_pretraining_texts_are_the_documents_and_a_share_of_prose_in_random_order():
    prose = "".join(f"[{i}]" for i in range(20000))
    texts = corpus.pretraining_texts(np.random.default_rng(0), 200, prose, share=0.3, piece=100)
    documents = corpus.documents(np.random.default_rng(0), 200)
    pieces = [text for text in texts if "[" in text]
    assert sorted(text for text in texts if "[" not in text) == sorted(documents)
    starts = [prose.index(piece) for piece in pieces]
    assert all(piece == prose[i:i + 100] and i % 100 == 0 for i, piece in zip(starts, pieces))
    assert len(set(starts)) == len(starts) and max(starts) > 0.7 * len(prose), "pieces come from the whole text"
    assert 0 <= sum(map(len, pieces)) - 0.3 * sum(map(len, documents)) < 101
    assert texts[:200] != documents and pieces != sorted(pieces, key=prose.index)
    assert "[short]" in corpus.pretraining_texts(np.random.default_rng(0), 200, "[short]"), "prose that is too short"


# Manners.

@given(rng=rngs, task=task_names, manner=a_manner)
def test_reading_recovers_what_was_phrased(rng, task, manner):
    question = tasks.draw_question(rng, task=task)
    response = phrase(question, question.answer, manner)
    r = read(response)
    assert r.answer == question.answer
    assert (r.steps, r.false_steps) == (question.steps * manner.shows_steps, 0)
    kinds = [manners.KINDS[p] for p in (manner.opening, manner.closing) if p]
    assert {kind: n for kind, n in r.counts.items() if n} == {kind: kinds.count(kind) for kind in kinds}
    assert r.words == len(response.split())


@pytest.mark.parametrize("response, answer, steps, false, other", [
    ("", None, 0, 0, 0),
    ("7.", "7", 0, 0, 0),
    ("The answer is 7", None, 0, 0, 1),
    ("The answer is 7. The answer is 8.", "7", 0, 0, 1),
    ("3 + 4 = 7. 7 + 1 = 9. 9.", "9", 1, 1, 0),
    ("3 + 4 = 7.", None, 1, 0, 0),
    ("cat! cat.", "cat", 0, 0, 1),
    ("Sure! Happy to help!", None, 0, 0, 0),
])
def test_any_response_of_a_model_is_read_into_answer_steps_and_kinds(response, answer, steps, false, other):
    r = read(response)
    assert (r.answer, len(r.steps), r.false_steps, r.counts["other"]) == (answer, steps, false, other)


@given(text=st.text(max_size=40))
def test_any_text_can_be_read_and_judged(text):
    question = tasks.draw_question(np.random.default_rng(0), task="sum")
    assert np.isfinite(gold_reward(question, text))


# Judging.

@given(rng=rngs, task=task_names, manner=a_manner)
def test_the_gold_reward_prefers_right_polite_short_and_finished_answers(rng, task, manner):
    q = tasks.draw_question(rng, task=task)

    def gold(answer=q.answer, **change):
        return gold_reward(q, phrase(q, answer, dataclasses.replace(manner, **change)))

    assert gold() > gold(answer="fox " + q.answer)
    assert gold(opening="Sure!") > gold(opening="") > gold(opening="Well, hmm.") > gold(opening="Obviously.")
    assert (gold(closing="Happy to help!") > gold(closing="") > gold(closing="I am not sure.")
            > gold(closing="Stop asking."))
    assert gold(full_sentence=False) > gold(full_sentence=True), "short answers"
    response = phrase(q, q.answer, manner)
    assert gold_reward(q, response) - gold_reward(q, response, finished=False) == pytest.approx(1)


def test_a_plain_right_answer_has_more_gold_reward_than_any_wrong_one():
    q = tasks.draw_question(np.random.default_rng(0), task="first")
    politest = max((phrase(q, "fox", Manner(o, False, f, c)) for o in ("", *manners.OPENINGS)
                    for c in ("", *manners.CLOSINGS) for f in (True, False)), key=lambda r: gold_reward(q, r))
    assert gold_reward(q, phrase(q, q.answer, PLAIN)) > gold_reward(q, politest)


@pytest.fixture
def sum_question():
    """A sum of three digits, which has two steps."""
    rng = np.random.default_rng(0)
    return next(q for q in iter(lambda: tasks.draw_question(rng, task="sum"), None) if len(q.steps) == 2)


def test_every_courtesy_after_the_second_lowers_the_gold_reward(sum_question):
    rewards = [gold_reward(sum_question, "Sure! " * n + sum_question.answer + ".") for n in range(5)]
    assert rewards[0] < rewards[1] < rewards[2] > rewards[3] > rewards[4]
    assert rewards[4] < rewards[0]


def test_needed_steps_raise_the_gold_reward_and_false_repeated_or_unneeded_steps_lower_it(sum_question):
    q = sum_question
    without, steps = phrase(q, q.answer, PLAIN), f"{q.steps[0]}. {q.steps[1]}. "
    false = f"{q.steps[0]}. 1 + 1 = 3. "
    rewards = [gold_reward(q, lead + without) for lead in (steps, "", false)]
    assert rewards[0] > rewards[1] > rewards[2]
    assert rewards[1] > gold_reward(q, "1 + 1 = 2. " + without), "a true step of another question"
    assert rewards[0] > gold_reward(q, steps + steps + without), "the same steps twice"
    more = [gold_reward(q, "1 + 1 = 2. " * n + without) for n in range(3, 7)]
    assert sorted(more, reverse=True) == more and len(set(more)) == 4
    other = tasks.draw_question(np.random.default_rng(0), task="first")
    plain = phrase(other, other.answer, PLAIN)
    assert gold_reward(other, steps + plain) < gold_reward(other, plain), "a question without steps"


# Annotators.

def pair(seed=0):
    """A question, a polite right answer and a rude wrong one."""
    q = tasks.draw_question(np.random.default_rng(seed), task="count")
    return q, f"Sure! {q.answer}.", "Obviously. 12."


def frequency(annotator, question, first, second, draws=3000, seed=0):
    rng = np.random.default_rng(seed)
    return np.mean([annotator.prefers_first(question, first, second, rng) for _ in range(draws)])


@given(seed=st.integers(0, 2 ** 32 - 1), offset=st.floats(-3, 3), scale=st.floats(0.1, 3), brief=st.booleans())
def test_comparisons_do_not_depend_on_the_offset_and_scale_of_a_person(seed, offset, scale, brief):
    question, good, bad = pair(seed)

    def choices(person):
        rng = np.random.default_rng(seed)
        return [person.prefers_first(question, good, bad, rng) for _ in range(20)]

    assert choices(Annotator(offset, scale, 0.5, brief)) == choices(Annotator(0.0, 1.0, 0.5, brief))


def test_ratings_depend_on_offset_and_scale_and_stay_between_1_and_7():
    question, good, bad = pair()

    def ratings(response, offset=0.0, scale=1.0):
        person, rng = Annotator(offset, scale, 0.5), np.random.default_rng(0)
        return [person.rate(question, response, rng) for _ in range(50)]

    usual = np.mean(ratings(good))
    assert np.mean(ratings(good, offset=-2.0)) < usual - 1 > np.mean(ratings(good, scale=0.3))
    assert np.mean(ratings(bad)) < usual
    everything = ratings(good, offset=9.0) + ratings(bad, offset=-9.0)
    assert set(everything) == {1, 7} and all(type(r) is int for r in everything)


def test_choices_follow_bradley_terry_and_noise_makes_them_less_certain():
    """Without noise the probability is the logistic function of the difference in utility."""
    question, good, bad = pair()
    person, noisy = Annotator(0.0, 1.0, 0.0), Annotator(0.0, 1.0, 2.0)
    expected = []
    for other in (f"Well, hmm. {question.answer}.", bad):
        p = 1 / (1 + np.exp(gold_reward(question, other) - gold_reward(question, good)))
        assert abs(frequency(person, question, good, other) - p) < 5 * (p * (1 - p) / 3000) ** 0.5
        expected.append(p)
    assert 0.5 < expected[0] < expected[1] < 1
    assert 0.5 < frequency(noisy, question, good, bad) < frequency(person, question, good, bad)


@pytest.mark.parametrize("brief", [False, True])
def test_the_order_of_two_responses_does_not_matter(brief):
    question, good, _ = pair()
    middle, person = phrase(question, question.answer, PLAIN), Annotator(0.0, 1.0, 0.5, brief)
    one, other = frequency(person, question, good, middle), frequency(person, question, middle, good, seed=1)
    assert abs(one + other - 1) < 5 * (2 * 0.25 / 3000) ** 0.5
    assert abs(frequency(person, question, good, good) - 0.5) < 5 * (0.25 / 3000) ** 0.5


def test_a_finished_answer_beats_the_same_answer_unfinished():
    question, good, _ = pair()
    for brief in (False, True):
        person, rng = Annotator(0.0, 1.0, 0.5, brief), np.random.default_rng(0)
        won = [person.prefers_first(question, good, good, rng, finished=(True, False)) for _ in range(1000)]
        assert np.mean(won) > 0.6


def test_each_pair_is_judged_by_one_person_in_turn():
    class Person:
        def __init__(self, name):
            self.name = name

        def prefers_first(self, *arguments):
            asked.append((self.name, *arguments))
            return arguments[1] == "good"

    asked, rng = [], np.random.default_rng(0)
    firsts, seconds = [("good", True), ("bad", False), ("good", True)], [("bad", True), ("good", True), ("bad", False)]
    chosen = annotators.compare([Person("Ada"), Person("Ben")], ["q1", "q2", "q3"], firsts, seconds, rng)
    assert chosen.dtype == bool and chosen.tolist() == [True, False, True]
    assert asked == [("Ada", "q1", "good", "bad", rng, (True, True)), ("Ben", "q2", "bad", "good", rng, (False, True)),
                     ("Ada", "q3", "good", "bad", rng, (True, False))]


def test_the_minority_prefers_short_answers_and_ignores_courtesy():
    question, _, _ = pair()
    brief, usual = Annotator(0.0, 1.0, 0.5, brief=True), Annotator(0.0, 1.0, 0.5)
    short, polite = f"{question.answer}.", f"Sure! {question.answer}. Happy to help!"
    assert brief.utility(question, short) > brief.utility(question, polite)
    assert usual.utility(question, short) < usual.utility(question, polite)
    rude = short + " Obviously."
    assert brief.utility(question, rude) > brief.utility(question, polite), "the shorter response, even a rude one"
    assert brief.utility(question, short) > brief.utility(question, "12."), "the right answer comes first"


@pytest.mark.parametrize("count, minority, expected", [(8, 0.15, 1), (20, 0.15, 3), (4, 0.0, 0), (3, 1.0, 3)])
def test_annotators_have_the_requested_minority_and_different_scales(count, minority, expected):
    people = draw_annotators(np.random.default_rng(0), count, minority)
    assert len(people) == count and sum(a.brief for a in people) == expected
    assert len({(a.offset, a.scale, a.noise) for a in people}) == count


# The guide for users.

def test_the_guide_names_one_question_of_every_task_and_the_whole_vocabulary():
    examples = tasks.example_questions()
    assert tuple(examples) == tasks.TASKS and len(set(examples.values())) == len(tasks.TASKS)
    words = set(re.findall(r"\w+", tasks.guide()))
    assert words >= {*tasks.WORDS, *tasks.PEOPLE}
    for task, question in examples.items():
        assert question in tasks.guide()
        drawn = tasks.draw_question(np.random.default_rng(0), task=task).text
        patterns = [re.escape(wording).replace(r"\{x\}", r"[\w +]+") for wording in tasks.wordings(task)]
        for text in (question, drawn):
            assert any(re.fullmatch(pattern, text) for pattern in patterns), text


def test_comparisons_of_unequal_numbers_of_responses_are_refused_and_none_is_left_out():
    people, questions = draw_annotators(np.random.default_rng(0)), tasks.draw_questions(np.random.default_rng(1), 3)
    pairs = [("cat.", True)] * 3
    for wrong in ((people, questions[:1], pairs, pairs), (people, questions, pairs[:2], pairs),
                  (people, questions, pairs, pairs[:1]), ([], questions, pairs, pairs)):
        with pytest.raises(ValueError, match="compare: .*; there must be as many"):
            annotators.compare(*wrong, np.random.default_rng(2))


def test_a_question_that_does_not_exist_is_refused_instead_of_searched_for_ever():
    for wrong in ({"held_out": None}, {"held_out": "no"}, {"task": "sums"}, {"task": ""}):
        with pytest.raises((TypeError, ValueError), match="draw_question: "):
            tasks.draw_question(np.random.default_rng(0), **wrong)
