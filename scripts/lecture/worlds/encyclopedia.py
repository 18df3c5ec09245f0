"""Facts about entities, each stated a known number of times in known wordings, and questions with four choices.

    e7 lives-in new city-9 .  Q country e7 A great country-4 .

A fact is an entity, a subject and a value of one to three tokens. Each fact of the plain subjects is stated 1 to 256
times, all in one template, or in three, or as the very question that it will be asked by, or in all of these. Besides
there are two subjects of which one follows from the other: everybody's city is stated, the country is a function of
the city, and for some entities it is never stated. A document is two sentences; in half of those that state a country,
the first states the city. Tests: tests/test_encyclopedia.py.
"""

import numpy as np

PLAIN, CITY, COUNTRY = (0, 1, 2, 3), 4, 5
SUBJECTS = ("birthplace", "trade", "food", "instrument", "city", "country")
VALUES = (16, 16, 16, 16, 16, 8)        # of each subject
EXPOSURES = (1, 4, 16, 64, 256)
TEMPLATES, QUESTION = (0, 1, 2), 3      # the forms of a sentence
WORDINGS = {"one template": (0,), "three templates": TEMPLATES, "the question itself": (QUESTION,),
            "templates and question": (*TEMPLATES, QUESTION)}
KNOWN = 64                              # how often each city is stated, and each country that is
CHOICES = 4
PREFIXES = 12                           # tokens that names of values begin with, none of them telling

# Tokens: Q A . | the letters | filler words | prefixes | values | subjects by form | entities
ASK, ANSWER, END, LETTERS, FILLERS = 0, 1, 2, (3, 4, 5, 6), (7, 8, 9)
FIRST_PREFIX = 10
FIRST_VALUE = FIRST_PREFIX + PREFIXES
FIRST_SUBJECT = FIRST_VALUE + sum(VALUES)
FIRST_ENTITY = FIRST_SUBJECT + 4 * len(SUBJECTS)


class Encyclopedia:
    """The facts about so many entities.

    values     (E,S): the value of each entity for each subject
    names      names[s][v]: the tokens of a value, at most two prefixes and a last one of its own
    exposures  (E,S): how often the corpus states each fact
    wording    (E,S): in which forms, a place in WORDINGS (plain subjects only)
    inferred   the entities whose country is never stated
    """

    def __init__(self, rng, entities):
        self.entities, self.vocabulary = entities, FIRST_ENTITY + entities
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

    def opening(self, rng, entity, subject, form):
        """A sentence up to where the value is said."""
        e, s = FIRST_ENTITY + int(entity), FIRST_SUBJECT + 4 * int(subject) + form
        filler = FILLERS[rng.integers(len(FILLERS))]
        return {0: [e, s], 1: [filler, e, s], 2: [filler, s, e], QUESTION: [ASK, s, e, ANSWER]}[form]

    def sentence(self, rng, entity, subject, form):
        return [*self.opening(rng, entity, subject, form), *self.names[subject][self.values[entity, subject]], END]

    def forms(self, entity, subject):
        """The forms in which a fact is stated."""
        plain = subject in PLAIN
        return list(WORDINGS.values())[self.wording[entity, subject]] if plain else (*TEMPLATES, QUESTION)

    def corpus(self, rng):
        """All documents in random order: tokens and mask (N,T). Each fact is stated as often as exposures says."""
        def state(entity, subject, times):
            forms = self.forms(entity, subject)
            return [self.sentence(rng, entity, subject, forms[i % len(forms)]) for i in rng.permutation(times)]

        pairs, single = [], []
        for e in range(self.entities):
            cities, countries = (state(e, s, self.exposures[e, s]) for s in (CITY, COUNTRY))
            half = len(countries) // 2
            pairs += [city + country for city, country in zip(cities[:half], countries[:half])]
            single += cities[half:] + countries[half:] + [s for r in PLAIN for s in state(e, r, self.exposures[e, r])]
        single = [single[i] for i in rng.permutation(len(single))]
        pairs += [first + second for first, second in zip(single[::2], [*single[1::2], []])]
        return padded([pairs[i] for i in rng.permutation(len(pairs))])

    def choices(self, rng, entity, subject):
        """(four values of the subject in random order, the place of the right one)"""
        right = self.values[entity, subject]
        others = rng.permutation([v for v in range(VALUES[subject]) if v != right])[:CHOICES - 1]
        order = rng.permutation([right, *others])
        return order.tolist(), int(np.flatnonzero(order == right)[0])

    def lettered(self, subject, choices):
        """The choices as a question by letter lists them: each name, then its letter."""
        return [t for value, letter in zip(choices, LETTERS) for t in (*self.names[subject][value], letter)]

    def exam(self, rng, facts):
        """A document that asks these facts (entity, subject) by letter: (tokens, mask: 1 on the letters)."""
        tokens, mask = [], []
        for entity, subject in facts:
            choices, right = self.choices(rng, entity, subject)
            asked = [*self.opening(rng, entity, subject, QUESTION)[:-1], *self.lettered(subject, choices), ANSWER]
            tokens += [*asked, LETTERS[right], END]
            mask += [0] * len(asked) + [1, 0]
        return tokens, mask

    def drill(self, rng, questions):
        """A document that teaches what a letter stands for: four values with letters, then which letter each has."""
        subject = int(rng.integers(len(SUBJECTS)))
        choices = rng.permutation(VALUES[subject])[:CHOICES].tolist()
        tokens = self.lettered(subject, choices)
        mask = [0] * len(tokens)
        for i in rng.integers(CHOICES, size=questions):
            asked = self.names[subject][choices[i]]
            tokens += [*asked, LETTERS[i], END]
            mask += [0] * len(asked) + [1, 0]
        return tokens, mask


def padded(documents, masks=None):
    """Token lists to tokens and mask (B,T); without masks, every token counts."""
    T = max(map(len, documents))
    masks = masks or [[1] * len(document) for document in documents]
    return (np.array([[*document, *[END] * (T - len(document))] for document in documents]),
            np.array([[*mask, *[0] * (T - len(mask))] for mask in masks]))
