"""The text that the model is pretrained on, and the demonstrations that instruct it.

Pretraining text states, works out and shows; it holds no dialogue. Statements about the tasks
("The last word of cat sun is sun."), sums with and without their steps, facts about people,
small talk, lines of examples whose task is never named, and real English.
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


def english():
    """Real English prose that comes with every Python: the topics of its help(). -> (text, sha256)

    It varies between Python versions, which is why its hash is part of a run's results.
    """
    from pydoc_data.topics import topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text, hashlib.sha256(text.encode()).hexdigest()


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def _list_content(rng, task):
    while True:
        content, answer = tasks.draw_list(rng, task)
        if not tasks.is_held_out(content):
            return content, answer


def list_statements(rng):
    """Several things said of the same words: most of the text repeats, which is what makes a model learn to copy."""
    content, _ = _list_content(rng, "first")
    lines = []
    for task in rng.permutation(tuple(tasks.LIST_TASKS))[:4]:
        answer = tasks.LIST_TASKS[task].answer(content.split())
        lines.append(_pick(rng, tasks.LIST_TASKS[task].statements).format(x=content, a=answer))
    return " ".join(lines)


def songs(rng):
    """A few words over and over."""
    content, _ = _list_content(rng, "first")
    return " , ".join([content] * int(rng.integers(3, 6)))


def unnamed_examples(rng):
    """`cat sun -> sun ; box key lake -> lake ; ...`: what the task is must be read off the line."""
    task = _pick(rng, tuple(tasks.LIST_TASKS))
    return " ; ".join(" -> ".join(_list_content(rng, task)) for _ in range(6))


def sums(rng):
    lines = []
    for _ in range(3):
        while True:
            content, answer, steps = tasks.draw_sum(rng)
            if not tasks.is_held_out(content):
                break
        worked = len(steps) > 1 and rng.random() < 0.7
        lines.append(f"To add {content} : {' , '.join(steps)}." if worked else f"The sum {content} = {answer}.")
    return " ".join(lines)


def facts(rng):
    lines = []
    for _ in range(4):
        name, fact = _pick(rng, tasks.PEOPLE), _pick(rng, tuple(tasks.FACT_TASKS))
        lines.append(_pick(rng, tasks.FACT_TASKS[fact].statements).format(x=name, a=tasks.person(name)[fact]))
    return " ".join(lines)


def small_talk(rng):
    return " ".join(_pick(rng, SMALL_TALK).format(x=_pick(rng, tasks.PEOPLE), y=_pick(rng, tasks.PEOPLE),
                                                  w=_pick(rng, tasks.WORDS), v=_pick(rng, tasks.WORDS))
                    for _ in range(3))


# Each kind of document and its share of the documents.
MIXTURE = ((list_statements, 0.35), (songs, 0.1), (unnamed_examples, 0.15), (sums, 0.2), (facts, 0.15), (small_talk, 0.05))


def documents(rng, count):
    """`count` documents of the invented world, as texts."""
    kinds, shares = zip(*MIXTURE)
    return [kinds[i](rng) for i in rng.choice(len(kinds), size=count, p=shares)]


def pretraining_texts(rng, count, prose, share=0.1, piece=400):
    """`count` documents and, for a share of their length, pieces of `prose` of so many characters, shuffled."""
    texts = documents(rng, count)
    length = min(len(prose), round(share * sum(map(len, texts))))
    starts = rng.permutation(np.arange(0, len(prose), piece))[:length // piece + 1]
    texts += [prose[i:i + piece] for i in starts]
    return [texts[i] for i in rng.permutation(len(texts))]


def demonstrations(rng, count):
    """`count` pairs (Question, response): right answers, in every manner that people have."""
    pairs = []
    for question in tasks.draw_questions(rng, count):
        pairs.append((question, phrase(question, question.answer, draw_manner(rng))))
    return pairs
