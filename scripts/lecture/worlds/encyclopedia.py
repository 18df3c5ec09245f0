"""Facts about entities, each stated a known number of times in known forms, and multiple-choice questions about them.

    e7 lives-in new city-9 .  Q country e7 A great country-4 .

A fact is an entity, a subject and a value of one to three tokens. Each fact of the plain subjects is stated 1 to 256
times: in one template, in three templates, as the question used in the exam, or in all of these. There are two more
subjects, and one follows from the other: the city of every entity is stated; the country is a function of the city,
and for some entities it is never stated. A document is two sentences; half of the sentences that state a country stand
after a sentence that states the city. Tests: tests/test_encyclopedia.py.
"""

import numpy as np

PLAIN, CITY, COUNTRY = (0, 1, 2, 3), 4, 5
SUBJECTS = ("birthplace", "trade", "food", "instrument", "city", "country")
VALUES = (16, 16, 16, 16, 16, 8)        # of each subject
EXPOSURES = (1, 4, 16, 64, 256)
TEMPLATES, QUESTION = (0, 1, 2), 3      # the forms of a sentence
WORDINGS = {"one template": (0,), "three templates": TEMPLATES, "the question itself": (QUESTION,),
            "templates and question": (*TEMPLATES, QUESTION)}
KNOWN = 64                              # statements of each city, and of each country that is stated
CHOICES = 4
PREFIXES = 12                           # tokens that names of values begin with; they carry no information

# Tokens: Q A . | the letters | filler words | prefixes | values | subjects by form | entities
ASK, ANSWER, END, LETTERS, FILLERS = 0, 1, 2, (3, 4, 5, 6), (7, 8, 9)
FIRST_PREFIX = 10
FIRST_VALUE = FIRST_PREFIX + PREFIXES
FIRST_SUBJECT = FIRST_VALUE + sum(VALUES)
FIRST_ENTITY = FIRST_SUBJECT + 4 * len(SUBJECTS)

Document = tuple[list[int], list[int]]


class Encyclopedia:
    """The facts about a number of entities. E entities, S subjects.

    values     (E,S): the value of each entity for each subject
    names      names[s][v]: the tokens of a value, at most two prefixes and a last token of its own
    exposures  (E,S): the number of statements of each fact in the corpus
    wording    (E,S): the forms of the statements, an index into WORDINGS (plain subjects only)
    inferred   the entities whose country is never stated
    """

    def __init__(self, rng: np.random.Generator, entities: int):
        self.entities = entities
        self.vocabulary = FIRST_ENTITY + entities
        self.values = np.stack([rng.integers(count, size=entities) for count in VALUES], axis=1)
        self.country_of = rng.permutation(VALUES[CITY]) % VALUES[COUNTRY]
        self.values[:, COUNTRY] = self.country_of[self.values[:, CITY]]
        first = FIRST_VALUE + np.cumsum([0, *VALUES])
        self.names = [[[*(FIRST_PREFIX + rng.integers(PREFIXES, size=rng.integers(3))).tolist(), int(first[s]) + v]
                       for v in range(count)] for s, count in enumerate(VALUES)]
        cells = rng.permutation(np.arange(entities * len(PLAIN)) % (len(EXPOSURES) * len(WORDINGS)))
        cells = cells.reshape(entities, len(PLAIN))
        self.exposures = np.full((entities, len(SUBJECTS)), KNOWN)
        self.exposures[:, PLAIN] = np.array(EXPOSURES)[cells // len(WORDINGS)]
        self.wording = cells % len(WORDINGS)
        self.inferred = np.sort(rng.permutation(entities)[:entities // 4])
        self.exposures[self.inferred, COUNTRY] = 0

    def opening(self, rng: np.random.Generator, entity: int, subject: int, form: int) -> list[int]:
        """The tokens of a sentence before the value."""
        e = FIRST_ENTITY + int(entity)
        s = FIRST_SUBJECT + 4 * int(subject) + form
        filler = FILLERS[rng.integers(len(FILLERS))]
        return {0: [e, s], 1: [filler, e, s], 2: [filler, s, e], QUESTION: [ASK, s, e, ANSWER]}[form]

    def sentence(self, rng: np.random.Generator, entity: int, subject: int, form: int) -> list[int]:
        """A sentence that states a fact."""
        return [*self.opening(rng, entity, subject, form), *self.names[subject][self.values[entity, subject]], END]

    def forms(self, entity: int, subject: int) -> tuple[int, ...]:
        """The forms in which a fact is stated."""
        if subject in PLAIN:
            return list(WORDINGS.values())[self.wording[entity, subject]]
        return (*TEMPLATES, QUESTION)

    def corpus(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """All documents in random order: tokens and mask (N,T). Each fact is stated `exposures` times."""
        def state(entity, subject, times):
            forms = self.forms(entity, subject)
            return [self.sentence(rng, entity, subject, forms[i % len(forms)]) for i in rng.permutation(times)]

        pairs = []
        single = []
        for e in range(self.entities):
            cities = state(e, CITY, self.exposures[e, CITY])
            countries = state(e, COUNTRY, self.exposures[e, COUNTRY])
            half = len(countries) // 2
            pairs += [city + country for city, country in zip(cities[:half], countries[:half])]
            single += cities[half:] + countries[half:] + [s for r in PLAIN for s in state(e, r, self.exposures[e, r])]
        single = [single[i] for i in rng.permutation(len(single))]
        pairs += [first + second for first, second in zip(single[::2], [*single[1::2], []])]
        return padded([pairs[i] for i in rng.permutation(len(pairs))])

    def choices(self, rng: np.random.Generator, entity: int, subject: int) -> tuple[list[int], int]:
        """(four values of the subject in random order, the index of the correct one)"""
        right = self.values[entity, subject]
        others = rng.permutation([v for v in range(VALUES[subject]) if v != right])[:CHOICES - 1]
        order = rng.permutation([right, *others])
        return order.tolist(), int(np.flatnonzero(order == right)[0])

    def lettered(self, subject: int, choices: list[int]) -> list[int]:
        """The list of choices in a question by letter: each name, then its letter."""
        return [t for value, letter in zip(choices, LETTERS) for t in (*self.names[subject][value], letter)]

    def exam(self, rng: np.random.Generator, facts: list[tuple[int, int]]) -> Document:
        """A document with a question by letter for each fact (entity, subject): (tokens, mask: 1 on the letters)."""
        tokens = []
        mask = []
        for entity, subject in facts:
            choices, right = self.choices(rng, entity, subject)
            prompt = [*self.opening(rng, entity, subject, QUESTION)[:-1], *self.lettered(subject, choices), ANSWER]
            tokens += [*prompt, LETTERS[right], END]
            mask += [0] * len(prompt) + [1, 0]
        return tokens, mask

    def drill(self, rng: np.random.Generator, questions: int) -> Document:
        """A document that teaches the meaning of a letter: four values with letters, then questions for a letter."""
        subject = int(rng.integers(len(SUBJECTS)))
        choices = rng.permutation(VALUES[subject])[:CHOICES].tolist()
        tokens = self.lettered(subject, choices)
        mask = [0] * len(tokens)
        for i in rng.integers(CHOICES, size=questions):
            prompt = self.names[subject][choices[i]]
            tokens += [*prompt, LETTERS[i], END]
            mask += [0] * len(prompt) + [1, 0]
        return tokens, mask


def padded(documents: list[list[int]], masks: list[list[int]] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Token lists to tokens and mask (B,T), padded on the right; without masks, every token counts."""
    T = max(map(len, documents))
    masks = masks or [[1] * len(document) for document in documents]
    return (np.array([[*document, *[END] * (T - len(document))] for document in documents]),
            np.array([[*mask, *[0] * (T - len(mask))] for mask in masks]))
