"""What can be asked: tasks over words and digits, and questions about invented people.

A task draws a Question from a Generator. Every question's content (its words, its digits, its
person) is trained on or held out, by a checksum: one in five is held out, is never trained on
in any stage, and is what accuracy is measured on. Facts are the exception that knowledge is: the
pretraining text states all of them, the demonstrations ask about some people, and the held-out
questions are about the others (four of them).
"""

import dataclasses
import hashlib
import zlib

WORDS = ("apple bird boat book box bread cat chair cloud cup dog door fish flower hat house "
         "key lake lamp leaf moon pen rain road ship sky snow star stone sun tree wind").split()
PEOPLE = ("Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jon Kira Leo Mira Ned Olga Paul Rita Sam Tess Uma "
          "Vera Will Yara Zoe").split()
CITIES = "Oslo Rome Lima Cairo Tokyo Paris Delhi Quito".split()
ANIMALS = "fox owl goat duck crab swan mole wolf".split()
COLOURS = "red blue green black white yellow brown grey".split()
HELD_OUT_ONE_IN = 5


@dataclasses.dataclass(frozen=True)
class Question:
    """task: its name; text: how it is asked; answer: what is right; steps: sentences that work
    it out (sums only); content: what it is about, apart from its wording."""

    task: str
    text: str
    answer: str
    content: str
    steps: tuple = ()


def is_held_out(content):
    """Whether this content is for evaluation only (the same on every machine and in every run).

    A list is held out together with its reverse, which would give it away; a sum of two digits never
    is: it is a step of the longer ones.
    """
    if " + " in content:
        key = content if content.count(" + ") > 1 else None
    else:
        words = content.split()
        key = " ".join(min(words, words[::-1]))
    return key is not None and zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def person(name):
    """The facts about a person, the same in every run: {"city", "animal", "colour"}."""
    def choose(fact, options):
        return options[hashlib.sha256(f"the {fact} of {name}".encode()).digest()[0] % len(options)]
    return {"city": choose("city", CITIES), "animal": choose("animal", ANIMALS), "colour": choose("colour", COLOURS)}


def _choose(rng, options):
    return options[int(rng.integers(len(options)))]


def _words(rng):
    return [_choose(rng, WORDS) for _ in range(int(rng.integers(2, 6)))]


LIST_TASKS = {
    # name: (the answer, ways to ask, ways to state)
    "first": (lambda w: w[0],
              ("What is the first word of {x}?", "Say the first word of {x}.", "Which word comes first in {x}?"),
              ("The first word of {x} is {a}.", "In {x} the first word is {a}.")),
    "last": (lambda w: w[-1],
             ("What is the last word of {x}?", "Say the last word of {x}.", "Which word comes last in {x}?"),
             ("The last word of {x} is {a}.", "In {x} the last word is {a}.")),
    "reverse": (lambda w: " ".join(w[::-1]),
                ("Reverse the words {x}.", "Say {x} backwards.", "What is {x} in reverse?"),
                ("The reverse of {x} is {a}.", "Say {x} backwards and it is {a}.")),
    "repeat": (lambda w: " ".join(w),
               ("Repeat the words {x}.", "Say {x} again.", "Copy the words {x}."),
               ("Repeat {x} and it is {a}.", "A copy of {x} is {a}.")),
    "count": (lambda w: str(len(w)),
              ("How many words are in {x}?", "Count the words {x}.", "What is the number of words in {x}?"),
              ("The number of words in {x} is {a}.", "There are {a} words in {x}.")),
}
FACT_TASKS = {
    "city": (("Where does {x} live?", "In which city does {x} live?", "What is the city of {x}?"),
             ("{x} lives in {a}.", "The city of {x} is {a}.", "In {a} lives {x}.")),
    "animal": (("Which animal does {x} have?", "What animal does {x} have?", "What is the animal of {x}?"),
               ("{x} has a {a}.", "The animal of {x} is the {a}.", "The {a} is the animal of {x}.")),
    "colour": (("Which colour does {x} like?", "What colour does {x} like?", "What is the colour of {x}?"),
               ("{x} likes {a}.", "The colour of {x} is {a}.", "The colour {a} is what {x} likes.")),
}
SUM_ASKED = ("What is {x}?", "Add {x}.", "How much is {x}?")
TASKS = (*LIST_TASKS, "sum", *FACT_TASKS)


def draw_list(rng, task):
    """(words as text, answer)"""
    words = _words(rng)
    return " ".join(words), LIST_TASKS[task][0](words)


def draw_sum(rng):
    """(digits as text, answer, steps): two to four digits from 0 to 5, added one at a time."""
    digits = [int(d) for d in rng.integers(0, 6, size=int(rng.integers(2, 5)))]
    total, steps = digits[0], []
    for d in digits[1:]:
        steps.append(f"{total} + {d} = {total + d}")
        total += d
    return " + ".join(map(str, digits)), str(total), tuple(steps)


def draw_question(rng, held_out=False, task=None):
    """A random Question, of a random task unless one is named."""
    task = task or _choose(rng, TASKS)
    while True:
        steps = ()
        if task == "sum":
            asked, (content, answer, steps) = SUM_ASKED, draw_sum(rng)
        elif task in LIST_TASKS:
            asked, (content, answer) = LIST_TASKS[task][1], draw_list(rng, task)
        else:
            asked, content = FACT_TASKS[task][0], _choose(rng, PEOPLE)
            answer = person(content)[task]
        if is_held_out(content) == held_out:
            return Question(task, _choose(rng, asked).format(x=content), answer, content, steps)


def statement(question):
    """The start of a statement whose next words are the answer: how to ask a model that knows no dialogue."""
    if question.task == "sum":
        return f"The sum {question.content} ="
    stated = LIST_TASKS[question.task][2] if question.task in LIST_TASKS else FACT_TASKS[question.task][1]
    return stated[0].format(x=question.content, a="").removesuffix(" .")


def draw_questions(rng, count, held_out=False):
    """`count` Questions, the tasks in equal numbers (up to one), in random order."""
    questions = [draw_question(rng, held_out, TASKS[i % len(TASKS)]) for i in range(count)]
    return [questions[i] for i in rng.permutation(count)]
