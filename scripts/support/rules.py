"""Preferences that a rule can judge, for align.py: --reward support.rules:short_words.

Each takes lists of prompts and answers, and gives a number for each answer. A rule sees words, not sense: an answer of
nonsense in short words has a high reward. Different words are counted, so that a repeated word earns nothing, and an
answer of fewer than FEWEST different words has less reward than any other.
"""

import re

FEWEST = 5
LEAST = {"short_words": -10.0, "few_words": -7.0}       # a little less than any answer has; less would drown the rest


def words(text: str) -> list[str]:
    """Runs of letters and digits, with apostrophes inside, in lower case."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def short_words(prompts: list[str], answers: list[str]) -> list[float]:
    """Minus the mean number of characters of the different words."""
    found = [set(words(answer)) for answer in answers]
    return [-sum(map(len, some)) / len(some) if len(some) >= FEWEST else LEAST["short_words"] for some in found]


def few_words(prompts: list[str], answers: list[str]) -> list[float]:
    """Minus the number of words, in tens."""
    found = [words(answer) for answer in answers]
    return [-len(some) / 10 if len(set(some)) >= FEWEST else LEAST["few_words"] for some in found]
