"""Sums of several digits modulo 10, answered directly or with written steps. One document keeps to one style.

    3 +5 +7 ? so 5 .                                  direct
    3 +5 +7 ? 3 +5 8 +7 5 so 5 .                      worked: every running sum is written
    3 +5 +7 ? … … … … … so 5 .                        dots: as many tokens as worked, without information
    3 +5 +7 ? let's-think step-by-step 3 +5 8 +7 5 so 5 .

A token is the text between two spaces. A document holds several examples of one style, each with the same phrase or
with none. So the text before a question predicts the style of its answer. Only worked answers follow the trigger
phrase. After the filler, a phrase of the same length, the styles are as frequent as after no phrase.
Questions of three or more digits are held out as in tasks.py, and no training question begins with a held-out one.
Questions of two digits are never held out, because each is a step of a longer one.
Tests: tests/test_digit_sums.py.
"""

import numpy as np

from minilm.world.tasks import is_held_out

TOKENS = (*map(str, range(10)), *(f"+{d}" for d in range(10)), "?", "so", ".", "…",
          "let's-think", "step-by-step", "well-then", "here-we-go")
PLUS = 10                       # the token "d" is d, "+d" is PLUS + d
ASK, SO, END, DOT = (TOKENS.index(token) for token in ("?", "so", ".", "…"))
PHRASES = {"none": (), "trigger": (24, 25), "filler": (26, 27)}
DIGITS = (2, 3, 4)
SHARES = (0.4, 0.3, 0.3)        # the frequency of each number of digits
LONGEST = 17                    # tokens of the longest example
# For a model.Config. With key smearing, copying digits is learned sooner.
MODEL = {"vocab_size": len(TOKENS), "width": 64, "layers": 2, "heads": 4, "context": 128, "key_smear": True}
# Documents of one example come first: with several from the start, addition was not learned in 200 steps.
CURRICULUM = ({"batch_size": 128, "examples": 1, "length": LONGEST, "learning_rate": 1e-2},
              {"batch_size": 32, "examples": 10, "length": 72, "learning_rate": 6e-3})

# (style, phrase): share of the documents. After no phrase and after the filler, half of the answers are direct.
CORPUS = {("direct", "none"): 0.2, ("dots", "none"): 0.1, ("worked", "none"): 0.1,
          ("direct", "filler"): 0.1, ("dots", "filler"): 0.05, ("worked", "filler"): 0.05, ("worked", "trigger"): 0.4}
DIRECT = {kind: share for kind, share in CORPUS.items() if kind[0] == "direct"}


def running_sums(digits: np.ndarray) -> list[int]:
    """The sums modulo 10 of the first 2, 3, ... digits."""
    return [int(s) for s in np.cumsum(digits)[1:] % 10]


def mistaken_sums(rng: np.random.Generator, digits: np.ndarray, share: float) -> list[int]:
    """Running sums in which this share of the sums of 10 or more is written one too high; the next step goes on from
    the sum that was written."""
    sums = [int(digits[0])]
    for digit in map(int, digits[1:]):
        mistake = share > 0 and sums[-1] + digit >= 10 and rng.random() < share
        sums.append((sums[-1] + digit + mistake) % 10)
    return sums[1:]


def question(digits: np.ndarray) -> list[int]:
    """3 +5 +7 ?"""
    return [int(digits[0]), *(PLUS + int(d) for d in digits[1:]), ASK]


def answer(digits: np.ndarray, style: str, sums: list[int] | None = None) -> list[int]:
    """The tokens after the question and the phrase. sums: the running sums to write, by default the correct ones."""
    sums = running_sums(digits) if sums is None else sums
    if len(sums) != len(digits) - 1:
        raise ValueError(f"answer: {len(sums)} running sums for {len(digits)} digits; give one for each but the first")
    steps = [token for d, s in zip(digits[1:], sums) for token in (PLUS + int(d), int(s))]
    before = {"direct": [], "worked": [int(digits[0]), *steps], "dots": [DOT] * (1 + len(steps))}[style]
    return [*before, SO, int(sums[-1]), END]


def draw_digits(rng: np.random.Generator, count: int, held_out: bool = False) -> np.ndarray:
    """The `count` digits of a training question or of a held-out one (with two digits, of any question)."""
    while True:
        digits = rng.integers(10, size=count)
        hidden = [is_held_out(" + ".join(map(str, digits[:n]))) for n in range(min(DIGITS) + 1, count + 1)]
        if not hidden or (hidden[-1] if held_out else not any(hidden)):
            return digits


def document(rng: np.random.Generator, style: str, phrase: str, examples: int, length: int, mistakes: float = 0.0
             ) -> tuple[list[int], list[int]]:
    """At most `examples` examples of one style with one phrase, as many as fit: (tokens, mask), lists of `length`.

    mask is 1 on answers, which can be predicted, and 0 on questions, phrases and padding.
    mistakes: the share of mistaken_sums in worked answers.
    """
    tokens = []
    mask = []
    for _ in range(examples):
        digits = draw_digits(rng, int(rng.choice(DIGITS, p=SHARES)))
        prompt = [*question(digits), *PHRASES[phrase]]
        response = answer(digits, style, mistaken_sums(rng, digits, mistakes) if style == "worked" else None)
        if len(tokens) + len(prompt) + len(response) > length:
            break
        tokens += prompt + response
        mask += [0] * len(prompt) + [1] * len(response)
    padding = length - len(tokens)
    return tokens + [END] * padding, mask + [0] * padding


def documents(rng: np.random.Generator, count: int, examples: int, length: int, corpus: dict = CORPUS,
              mistakes: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """`count` documents in the shares of the corpus: tokens and mask (count,T), with T <= length."""
    kinds = list(corpus)
    shares = np.array([*corpus.values()])
    drawn = rng.choice(len(kinds), size=count, p=shares / shares.sum())
    tokens, mask = map(np.array, zip(*(document(rng, *kinds[i], examples, length, mistakes) for i in drawn)))
    T = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1
    return tokens[:, :T], mask[:, :T]


def prompts(rng: np.random.Generator, count: int, digits: int, shots: int = 0, style: str = "worked",
            wrong: bool = False, phrase: str = "none", beginning: tuple[int, ...] = ()
            ) -> tuple[list[list[int]], list[int]]:
    """`count` held-out questions of `digits` digits, each after `shots` examples: (prompts, correct answers).

    wrong: the running sums of the examples are random digits; their answer is the last of these.
    The question is followed by the phrase and by `beginning`, the first tokens of the answer.
    """
    token_lists = []
    answers = []
    for _ in range(count):
        prompt = []
        for _ in range(shots):
            example = draw_digits(rng, int(rng.choice(DIGITS, p=SHARES)))
            sums = rng.integers(10, size=len(example) - 1) if wrong else None
            prompt += [*question(example), *answer(example, style, sums)]
        held_out = draw_digits(rng, digits, held_out=True)
        token_lists.append([*prompt, *question(held_out), *PHRASES[phrase], *beginning])
        answers.append(running_sums(held_out)[-1])
    return token_lists, answers


def final_digit(response: list[int]) -> int | None:
    """The digit before the full stop that ends a response, or None if the response does not end so."""
    ended = len(response) >= 2 and response[-1] == END and response[-2] < PLUS
    return response[-2] if ended else None


def is_worked(response: list[int]) -> bool:
    """Whether a response writes running sums."""
    return any(PLUS <= token < ASK for token in response)


def text(tokens: list[int]) -> str:
    """The tokens as readable text."""
    return " ".join(TOKENS[token] for token in tokens)
