"""The encyclopedia: the number and the form of the statements of every fact, counted in the documents."""

import collections

import numpy as np
import pytest

from worlds import encyclopedia as page
from worlds.encyclopedia import (
    ANSWER,
    ASK,
    CITY,
    COUNTRY,
    END,
    EXPOSURES,
    KNOWN,
    LETTERS,
    PLAIN,
    QUESTION,
    SUBJECTS,
    VALUES,
    WORDINGS,
    Encyclopedia,
)


@pytest.fixture(scope="module")
def world():
    return Encyclopedia(np.random.default_rng(0), 24)


def parse(world, sentence):
    """(entity, subject, value, form) of a sentence without its full stop, read token by token."""
    entity = [t - page.FIRST_ENTITY for t in sentence if t >= page.FIRST_ENTITY]
    word = [t - page.FIRST_SUBJECT for t in sentence if page.FIRST_SUBJECT <= t < page.FIRST_ENTITY]
    name = [t for t in sentence if page.FIRST_PREFIX <= t < page.FIRST_SUBJECT]
    subject, form = divmod(word[0], 4)
    assert len(entity) == len(word) == 1 and name == sentence[-len(name):]
    assert (form == QUESTION) == (sentence[0] == ASK and ANSWER in sentence)
    return entity[0], subject, world.names[subject].index(name), form


def sentences(row):
    """The sentences of a row of the corpus."""
    found, current = [], []
    for token in row:
        if token != END:
            current.append(int(token))
        elif current:
            found.append(current)
            current = []
    assert not current
    return found


def test_the_corpus_states_each_fact_as_often_and_in_the_forms_that_the_tables_give(world):
    tokens, mask = world.corpus(np.random.default_rng(1))
    counts, forms, premises = collections.Counter(), collections.defaultdict(collections.Counter), 0
    for row, real in zip(tokens, mask):
        assert (row[real == 0] == END).all() and (np.diff(real) <= 0).all() and row[real.sum() - 1] == END
        stated = [parse(world, s) for s in sentences(row)]
        assert 1 <= len(stated) <= 2
        premises += len(stated) == 2 and [s[:2] for s in stated] == [(stated[0][0], CITY), (stated[0][0], COUNTRY)]
        for entity, subject, value, form in stated:
            assert value == world.values[entity, subject]
            counts[entity, subject] += 1
            forms[entity, subject][form] += 1
    for entity in range(world.entities):
        for subject in range(len(SUBJECTS)):
            assert counts[entity, subject] == world.exposures[entity, subject]
            if subject in PLAIN:
                allowed = list(WORDINGS.values())[world.wording[entity, subject]]
                used = [forms[entity, subject][form] for form in allowed]
                assert sum(used) == counts[entity, subject] and max(used) - min(used) <= 1
    assert premises >= (world.entities - len(world.inferred)) * KNOWN // 2


def test_plain_facts_are_spread_evenly_over_exposures_and_wordings(world):
    cells = collections.Counter(zip(world.exposures[:, PLAIN].ravel().tolist(), world.wording.ravel().tolist()))
    assert set(cells) == {(n, w) for n in EXPOSURES for w in range(len(WORDINGS))}
    assert max(cells.values()) - min(cells.values()) <= 1


def test_a_country_follows_from_the_city_and_is_never_stated_for_the_inferred_entities(world):
    by_city = collections.defaultdict(set)
    for entity in range(world.entities):
        by_city[world.values[entity, CITY]].add(world.values[entity, COUNTRY])
    assert all(len(countries) == 1 for countries in by_city.values()) and len(set.union(*by_city.values())) > 4
    assert len(world.inferred) == 6 and (world.exposures[world.inferred, CITY] == KNOWN).all()
    assert {e for e in range(world.entities) if world.exposures[e, COUNTRY] == 0} == set(world.inferred)


def test_names_have_one_to_three_tokens_and_no_two_are_the_same(world):
    names = [tuple(name) for of_subject in world.names for name in of_subject]
    assert {len(name) for name in names} == {1, 2, 3}
    assert len({name[-1] for name in names}) == len(names) == sum(VALUES)
    assert all(page.FIRST_VALUE <= name[-1] < page.FIRST_SUBJECT and page.FIRST_PREFIX <= min(name) for name in names)


def letters_of(world, subject, tokens):
    """{value: letter}, read from a list of choices."""
    found, name = {}, []
    for token in tokens:
        if token in LETTERS:
            found[world.names[subject].index(name)], name = token, []
        else:
            name.append(token)
    return found


def test_choices_are_four_different_values_with_the_correct_one_at_a_random_place(world):
    rng, places = np.random.default_rng(2), collections.Counter()
    for _ in range(400):
        entity, subject = int(rng.integers(world.entities)), int(rng.integers(len(SUBJECTS)))
        choices, right = world.choices(rng, entity, subject)
        assert len(set(choices)) == 4 and set(choices) <= set(range(VALUES[subject]))
        assert choices[right] == world.values[entity, subject]
        places[right] += 1
    assert min(places[i] for i in range(4)) > 70


def test_the_mask_of_an_exam_is_on_the_letter_of_the_correct_value(world):
    facts = [(3, 0), (5, 2), (7, 1)]
    tokens, mask = world.exam(np.random.default_rng(3), facts)
    assert len(tokens) == len(mask) and sum(mask) == 3
    for (entity, subject), question in zip(facts, sentences(tokens)):
        assert question[0] == ASK and question[-2] == ANSWER and page.FIRST_ENTITY + entity == question[2]
        assert letters_of(world, subject, question[3:-2])[world.values[entity, subject]] == question[-1]
    assert [tokens[i] in LETTERS and tokens[i - 1] == ANSWER for i in np.flatnonzero(mask)] == [True] * 3


def test_a_drill_asks_for_letters_given_earlier_in_the_document(world):
    rng = np.random.default_rng(4)
    for _ in range(20):
        tokens, mask = world.drill(rng, 5)
        places = np.flatnonzero(mask)
        start = [i for i, token in enumerate(tokens) if token in LETTERS][3] + 1
        subject = next(s for s, names in enumerate(world.names) if any(name[-1] in tokens for name in names))
        given = letters_of(world, subject, tokens[:start])
        assert len(given) == 4 and len(places) == 5 and all(tokens[i] in LETTERS for i in places)
        assert all(given[world.names[subject].index(asked[:-1])] == asked[-1] for asked in sentences(tokens[start:]))


def test_padding_is_on_the_right_and_has_mask_zero():
    tokens, mask = page.padded([[7, 8], [9, 8, 7]], [[0, 1], [1, 1, 0]])
    assert tokens.tolist() == [[7, 8, END], [9, 8, 7]] and mask.tolist() == [[0, 1, 0], [1, 1, 0]]
    assert page.padded([[7], [9, 8]])[1].tolist() == [[1, 0], [1, 1]]
