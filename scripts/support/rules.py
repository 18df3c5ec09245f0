"""Rules that judge answers, for align.py: --reward support.rules:short_words.

Each takes lists of prompts and answers. They see the text alone: they know nothing of what is right. Both are means, so
that they depend little on where an answer is cut off.
"""

import re

FEWEST = 5              # words; an answer of fewer gets the reward of a bad one


def words(text: str) -> list[str]:
    """Runs of letters and digits, with apostrophes inside."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text)


def sentences(text: str) -> list[list[str]]:
    """The words of each sentence: it ends with . ! ? or a new line."""
    return [found for part in re.split(r"[.!?\n]", text) if (found := words(part))]


def short_words(prompts: list[str], answers: list[str]) -> list[float]:
    """The shorter the words the better: minus the mean number of letters of a word."""
    found = [words(answer) for answer in answers]
    return [-sum(map(len, some)) / len(some) if len(some) >= FEWEST else -6.0 for some in found]


def short_sentences(prompts: list[str], answers: list[str]) -> list[float]:
    """The shorter the sentences the better: minus the mean number of words of a sentence, in tens of words."""
    found = [list(map(len, sentences(answer))) for answer in answers]
    return [-sum(some) / len(some) / 10 if sum(some) >= FEWEST else -3.0 for some in found]
