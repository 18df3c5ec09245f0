"""What a question consists of."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Question:
    """title    one line
    ask      the whole question, which names the computation
    compute  the numbers, by words
    holds    whether the explanation fits the numbers
    because  the explanation, two to four sentences
    read     where minilm has more
    """

    title: str
    ask: str
    compute: Callable[[], dict[str, float]]
    holds: Callable[[dict[str, float]], bool]
    because: str
    read: str
