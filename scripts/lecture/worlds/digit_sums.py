"""Sums of several digits, mod 10, answered at once or worked out, in documents that keep to one way of answering.

    3 +5 +7 ? so 5 .                                  direct
    3 +5 +7 ? 3 +5 8 +7 5 so 5 .                    worked: every running sum is written down
    3 +5 +7 ? … … … … … so 5 .                        dots: as many tokens as worked, which say nothing
    3 +5 +7 ? let's-think step-by-step 3 +5 8 +7 5 so 5 .

A token is what stands between two spaces. A document is filled with examples of one style, each with the same
phrase or none: what comes before a question tells how it will be answered. The trigger is followed by
worked answers only; the filler, a phrase of the same length, by every style as often as no phrase is.
Questions of three digits or more are held out as in tasks.py, and no question trained on begins with one of them;
those of two digits never are, being a step of the others.
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
SHARES = (0.4, 0.3, 0.3)        # how common sums of so many digits are
LONGEST = 17                    # tokens of the longest example
# For a model.Config. Smeared keys: copying the digits is learned sooner.
MODEL = {"vocab_size": len(TOKENS), "width": 64, "layers": 2, "heads": 4, "context": 128, "key_smear": True}
# Documents of one example come first: with several from the start, adding was not learned in 200 steps.
CURRICULUM = ({"batch_size": 128, "examples": 1, "length": LONGEST, "learning_rate": 1e-2},
              {"batch_size": 32, "examples": 10, "length": 72, "learning_rate": 6e-3})

# (style, phrase): its share of the documents. After no phrase and after the filler half are answered at once.
CORPUS = {("direct", "none"): 0.2, ("dots", "none"): 0.1, ("worked", "none"): 0.1,
          ("direct", "filler"): 0.1, ("dots", "filler"): 0.05, ("worked", "filler"): 0.05, ("worked", "trigger"): 0.4}
DIRECT = {kind: share for kind, share in CORPUS.items() if kind[0] == "direct"}


def running_sums(digits):
    """The sum mod 10 of the first 2, 3, .. digits."""
    return [int(s) for s in np.cumsum(digits)[1:] % 10]


def question(digits):
    """3 +5 +7 ?"""
    return [int(digits[0]), *(PLUS + int(d) for d in digits[1:]), ASK]


def answer(digits, style, sums=None):
    """What follows the question and the phrase. sums: the running sums to write, by default the right ones."""
    sums = running_sums(digits) if sums is None else sums
    steps = [token for d, s in zip(digits[1:], sums) for token in (PLUS + int(d), int(s))]
    before = {"direct": [], "worked": [int(digits[0]), *steps], "dots": [DOT] * (1 + len(steps))}[style]
    return [*before, SO, int(sums[-1]), END]


def draw_digits(rng, count, held_out=False):
    """`count` digits whose sum is asked for, trained on or held out (of two digits, all are trained on and asked)."""
    while True:
        digits = rng.integers(10, size=count)
        hidden = [is_held_out(" + ".join(map(str, digits[:n]))) for n in range(min(DIGITS) + 1, count + 1)]
        if not hidden or (hidden[-1] if held_out else not any(hidden)):
            return digits


def document(rng, style, phrase, examples, length):
    """Up to so many examples of one style with one phrase, as far as they fit: (tokens, mask), lists of `length`.

    mask: 1 where something can be predicted: on answers, not on questions, phrases and padding.
    """
    tokens, mask = [], []
    for _ in range(examples):
        digits = draw_digits(rng, int(rng.choice(DIGITS, p=SHARES)))
        asked, answered = [*question(digits), *PHRASES[phrase]], answer(digits, style)
        if len(tokens) + len(asked) + len(answered) > length:
            break
        tokens += asked + answered
        mask += [0] * len(asked) + [1] * len(answered)
    padding = length - len(tokens)
    return tokens + [END] * padding, mask + [0] * padding


def documents(rng, count, examples, length, corpus=CORPUS):
    """`count` documents in the shares of the corpus: tokens and mask (count, T), T at most `length`."""
    kinds, shares = list(corpus), np.array([*corpus.values()])
    drawn = rng.choice(len(kinds), size=count, p=shares / shares.sum())
    tokens, mask = map(np.array, zip(*(document(rng, *kinds[i], examples, length) for i in drawn)))
    T = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1
    return tokens[:, :T], mask[:, :T]


def prompts(rng, count, digits, shots=0, style="worked", wrong=False, phrase="none", beginning=()):
    """`count` held-out questions of so many digits, after `shots` examples: (prompts, right answers), lists.

    wrong: the running sums of the examples are random digits, and their answer is the last of these.
    The question is followed by the phrase and by `beginning`, tokens of the answer.
    """
    asked, right = [], []
    for _ in range(count):
        prompt = []
        for _ in range(shots):
            shown = draw_digits(rng, int(rng.choice(DIGITS, p=SHARES)))
            sums = rng.integers(10, size=len(shown) - 1) if wrong else None
            prompt += [*question(shown), *answer(shown, style, sums)]
        held_out = draw_digits(rng, digits, held_out=True)
        asked.append([*prompt, *question(held_out), *PHRASES[phrase], *beginning])
        right.append(running_sums(held_out)[-1])
    return asked, right


def said(response):
    """The digit that a response ends with, after "so"; None if it has none."""
    ended = len(response) >= 2 and response[-1] == END and response[-2] < PLUS
    return response[-2] if ended else None


def is_worked(response):
    """Whether a response writes down running sums."""
    return any(PLUS <= token < ASK for token in response)


def text(tokens):
    return " ".join(TOKENS[token] for token in tokens)
