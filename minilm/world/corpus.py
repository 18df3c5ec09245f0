"""Text for pretraining, and demonstrations for supervised finetuning (SFT).

The pretraining text states facts, shows examples and works out sums; it holds no dialogue. It has statements about
the tasks ("The last word of cat sun is sun."), sums with and without steps, facts about people, small talk, lines of
examples whose task is not named, and real English.
"""

import hashlib

import numpy as np

from minilm.world import tasks
from minilm.world.manners import draw_manner, phrase

SMALL_TALK = ("Thank you , said {x}. Happy to help! said {y}.",
              "{x} asked {y} for a {w}. Sure! said {y}.",
              "Well, hmm , said {x}. I am not sure.",
              "Stop asking , said {x} to {y}. Obviously , said {y}.",
              "{x} and {y} saw a {w} near the {v}.",
              "The answer is a {w} , said {x}. Great question! said {y}.")


def english() -> tuple[str, str]:
    """Real English that comes with every Python, the topics of its help(): (text, sha256).

    The text differs between Python versions. Its hash is therefore part of a run's results.
    """
    from pydoc_data.topics import topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text, hashlib.sha256(text.encode()).hexdigest()


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def _trained_list(rng, task):
    """(content, answer) of a list that is not held out."""
    while True:
        content, answer = tasks.draw_list(rng, task)
        if not tasks.is_held_out(content):
            return content, answer


def list_statements(rng: np.random.Generator) -> str:
    """Several statements about one list of words. Most of the text repeats, and the model learns to copy."""
    content, _ = _trained_list(rng, "first")
    lines = []
    for name in rng.permutation(tuple(tasks.LIST_TASKS))[:4]:
        task = tasks.LIST_TASKS[name]
        answer = task.answer(content.split())
        lines.append(_pick(rng, task.statements).format(x=content, a=answer))
    return " ".join(lines)


def songs(rng: np.random.Generator) -> str:
    """A few words again and again."""
    content, _ = _trained_list(rng, "first")
    return " , ".join([content] * int(rng.integers(3, 6)))


def unnamed_examples(rng: np.random.Generator) -> str:
    """`cat sun -> sun ; box key lake -> lake ; ...`: the reader has to find the task in the examples."""
    task = _pick(rng, tuple(tasks.LIST_TASKS))
    return " ; ".join(" -> ".join(_trained_list(rng, task)) for _ in range(6))


def sums(rng: np.random.Generator) -> str:
    """Three sums, some with their steps."""
    lines = []
    for _ in range(3):
        while True:
            content, answer, steps = tasks.draw_sum(rng)
            if not tasks.is_held_out(content):
                break
        with_steps = len(steps) > 1 and rng.random() < 0.7
        lines.append(f"To add {content} : {' , '.join(steps)}." if with_steps else f"The sum {content} = {answer}.")
    return " ".join(lines)


def facts(rng: np.random.Generator) -> str:
    """Four facts about people."""
    lines = []
    for _ in range(4):
        name = _pick(rng, tasks.PEOPLE)
        fact = _pick(rng, tuple(tasks.FACT_TASKS))
        lines.append(_pick(rng, tasks.FACT_TASKS[fact].statements).format(x=name, a=tasks.person(name)[fact]))
    return " ".join(lines)


def small_talk(rng: np.random.Generator) -> str:
    """Three lines of people who talk."""
    return " ".join(_pick(rng, SMALL_TALK).format(x=_pick(rng, tasks.PEOPLE), y=_pick(rng, tasks.PEOPLE),
                                                  w=_pick(rng, tasks.WORDS), v=_pick(rng, tasks.WORDS))
                    for _ in range(3))


# The kinds of documents, and their fractions of the documents.
MIXTURE = ((list_statements, 0.35), (songs, 0.1), (unnamed_examples, 0.15), (sums, 0.2), (facts, 0.15),
           (small_talk, 0.05))


def documents(rng: np.random.Generator, count: int) -> list[str]:
    """`count` documents about the world."""
    kinds, fractions = zip(*MIXTURE)
    return [kinds[i](rng) for i in rng.choice(len(kinds), size=count, p=fractions)]


def pretraining_texts(rng: np.random.Generator, count: int, prose: str, share: float = 0.1,
                      piece: int = 400) -> list[str]:
    """`count` documents and pieces of real English, shuffled.

    The pieces have `piece` characters. All pieces together have a fraction `share` of the documents' length.
    """
    texts = documents(rng, count)
    length = min(len(prose), round(share * sum(map(len, texts))))
    starts = rng.permutation(np.arange(0, len(prose), piece))[:length // piece + 1]
    texts += [prose[i:i + piece] for i in starts]
    return [texts[i] for i in rng.permutation(len(texts))]


def demonstrations(rng: np.random.Generator, count: int) -> list[tuple[tasks.Question, str]]:
    """`count` pairs (Question, response): right answers, in every manner that people have."""
    return [(question, phrase(question, question.answer, draw_manner(rng)))
            for question in tasks.draw_questions(rng, count)]
