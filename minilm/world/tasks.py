"""The questions of the world: nine tasks about words, digits and invented people, with their right answers.

Each question is about some content: words, digits, or a person. One content in five is held out, by a checksum:
no stage trains on it, and accuracy is measured on it. Facts about people are different. The pretraining text
states all of them; the demonstrations ask about most people, and the held-out questions about the other four.
"""

import dataclasses
import hashlib
import textwrap
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minilm import checks

WORDS = ("apple bird boat book box bread cat chair cloud cup dog door fish flower hat house "
         "key lake lamp leaf moon pen rain road ship sky snow star stone sun tree wind").split()
PEOPLE = ("Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jon Kira Leo Mira Ned Olga Paul Rita Sam Tess Uma "
          "Vera Will Yara Zoe").split()
CITIES = "Oslo Rome Lima Cairo Tokyo Paris Delhi Quito".split()
ANIMALS = "fox owl goat duck crab swan mole wolf".split()
COLOURS = "red blue green black white yellow brown grey".split()
HELD_OUT_ONE_IN = 5
MIN_WORDS = 2
MAX_WORDS = 5
MIN_DIGITS = 2
MAX_DIGITS = 4
LARGEST_DIGIT = 5


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    task     its name, one of TASKS
    text     the wording
    answer   the right answer
    content  the words, digits or person that it is about
    steps    the additions that lead to the answer (sums only)
    """

    task: str
    text: str
    answer: str
    content: str
    steps: tuple = ()


class ListTask(NamedTuple):
    """A task about a list of words. In the templates {x} is the list and {a} the answer."""

    answer: Callable[[list[str]], str]
    wordings: tuple[str, ...]
    statements: tuple[str, ...]


class FactTask(NamedTuple):
    """A fact about a person. In the templates {x} is the person and {a} the fact."""

    wordings: tuple[str, ...]
    statements: tuple[str, ...]


LIST_TASKS = {
    "first": ListTask(
        lambda words: words[0],
        ("What is the first word of {x}?", "Say the first word of {x}.", "Which word comes first in {x}?"),
        ("The first word of {x} is {a}.", "In {x} the first word is {a}.")),
    "last": ListTask(
        lambda words: words[-1],
        ("What is the last word of {x}?", "Say the last word of {x}.", "Which word comes last in {x}?"),
        ("The last word of {x} is {a}.", "In {x} the last word is {a}.")),
    "reverse": ListTask(
        lambda words: " ".join(words[::-1]),
        ("Reverse the words {x}.", "Say {x} backwards.", "What is {x} in reverse?"),
        ("The reverse of {x} is {a}.", "Say {x} backwards and it is {a}.")),
    "repeat": ListTask(
        lambda words: " ".join(words),
        ("Repeat the words {x}.", "Say {x} again.", "Copy the words {x}."),
        ("Repeat {x} and it is {a}.", "A copy of {x} is {a}.")),
    "count": ListTask(
        lambda words: str(len(words)),
        ("How many words are in {x}?", "Count the words {x}.", "What is the number of words in {x}?"),
        ("The number of words in {x} is {a}.", "There are {a} words in {x}.")),
}
FACT_TASKS = {
    "city": FactTask(
        ("Where does {x} live?", "In which city does {x} live?", "What is the city of {x}?"),
        ("{x} lives in {a}.", "The city of {x} is {a}.", "In {a} lives {x}.")),
    "animal": FactTask(
        ("Which animal does {x} have?", "What animal does {x} have?", "What is the animal of {x}?"),
        ("{x} has a {a}.", "The animal of {x} is the {a}.", "The {a} is the animal of {x}.")),
    "colour": FactTask(
        ("Which colour does {x} like?", "What colour does {x} like?", "What is the colour of {x}?"),
        ("{x} likes {a}.", "The colour of {x} is {a}.", "The colour {a} is what {x} likes.")),
}
SUM_WORDINGS = ("What is {x}?", "Add {x}.", "How much is {x}?")
TASKS = (*LIST_TASKS, "sum", *FACT_TASKS)
EXAMPLE_LIST = "sun cat moon"
EXAMPLE_SUM = "2 + 3 + 1"
EXAMPLE_PERSON = "Mira"


def wordings(task: str) -> tuple[str, ...]:
    """The wordings of a task, with {x} for the content."""
    if task == "sum":
        return SUM_WORDINGS
    return LIST_TASKS[task].wordings if task in LIST_TASKS else FACT_TASKS[task].wordings


def example_questions() -> dict[str, str]:
    """{task: one question in words}, the same in every run."""
    content = {**dict.fromkeys(LIST_TASKS, EXAMPLE_LIST), "sum": EXAMPLE_SUM,
               **dict.fromkeys(FACT_TASKS, EXAMPLE_PERSON)}
    return {task: wordings(task)[0].format(x=content[task]) for task in TASKS}


def guide() -> str:
    """The questions that the assistant of this world is trained to answer, as text for its user."""
    vocabulary = (f"Lists have {MIN_WORDS} to {MAX_WORDS} of these words: {' '.join(WORDS)}.",
                  f"Sums have {MIN_DIGITS} to {MAX_DIGITS} digits from 0 to {LARGEST_DIGIT}, with spaces around +.",
                  f"People: {' '.join(PEOPLE)}.")
    return "\n".join([f"This small assistant knows {len(TASKS)} kinds of questions. Write them like this:", "",
                      *(f"    {question}" for question in example_questions().values()), "",
                      *(textwrap.fill(line, 80) for line in vocabulary)])


def is_held_out(content: str) -> bool:
    """Whether this content is for evaluation only: the same on every machine and in every run.

    A list and its reverse are held out together, because one gives the other away. A sum of two digits is never
    held out, because it is a step of longer sums.
    """
    if " + " in content:
        key = content if content.count(" + ") > 1 else None
    else:
        words = content.split()
        key = " ".join(min(words, words[::-1]))
    return key is not None and zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def person(name: str) -> dict[str, str]:
    """The facts about a person, {"city", "animal", "colour"}: the same in every run."""
    def choose(fact, options):
        return options[hashlib.sha256(f"the {fact} of {name}".encode()).digest()[0] % len(options)]
    return {"city": choose("city", CITIES), "animal": choose("animal", ANIMALS), "colour": choose("colour", COLOURS)}


def _choose(rng, options):
    return options[int(rng.integers(len(options)))]


def draw_list(rng: np.random.Generator, task: str) -> tuple[str, str]:
    """A random list of words for one of LIST_TASKS: (content, answer)."""
    words = [_choose(rng, WORDS) for _ in range(int(rng.integers(MIN_WORDS, MAX_WORDS + 1)))]
    return " ".join(words), LIST_TASKS[task].answer(words)


def draw_sum(rng: np.random.Generator) -> tuple[str, str, tuple[str, ...]]:
    """A random sum: (content, answer, steps). The steps add one digit at a time."""
    count = int(rng.integers(MIN_DIGITS, MAX_DIGITS + 1))
    digits = [int(digit) for digit in rng.integers(0, LARGEST_DIGIT + 1, size=count)]
    total = digits[0]
    steps = []
    for digit in digits[1:]:
        steps.append(f"{total} + {digit} = {total + digit}")
        total += digit
    return " + ".join(map(str, digits)), str(total), tuple(steps)


def draw_question(rng: np.random.Generator, held_out: bool = False, task: str | None = None) -> Question:
    """A random Question, held out or not, of the given task or of a random one."""
    checks.flag("draw_question", "held_out", held_out)      # of another value there is no question, and no end
    task = _choose(rng, TASKS) if task is None else checks.choice("draw_question", "task", task, TASKS)
    while True:
        steps = ()
        if task == "sum":
            content, answer, steps = draw_sum(rng)
        elif task in LIST_TASKS:
            content, answer = draw_list(rng, task)
        else:
            content = _choose(rng, PEOPLE)
            answer = person(content)[task]
        if is_held_out(content) == held_out:
            return Question(task, _choose(rng, wordings(task)).format(x=content), answer, content, steps)


def statement(question: Question) -> str:
    """The start of a statement that the answer completes: how to ask a model that was trained on no dialogue."""
    if question.task == "sum":
        return f"The sum {question.content} ="
    task = LIST_TASKS.get(question.task) or FACT_TASKS[question.task]
    return task.statements[0].format(x=question.content, a="").removesuffix(" .")


def draw_questions(rng: np.random.Generator, count: int, held_out: bool = False) -> list[Question]:
    """`count` Questions in random order. The numbers of questions of two tasks differ by at most one."""
    questions = [draw_question(rng, held_out, TASKS[i % len(TASKS)]) for i in range(count)]
    return [questions[i] for i in rng.permutation(count)]
