"""Instructions made of two: what to do with the places of a word, then what to do with its letters.

    [reverse][upper]:abc=CBA;              [reverse][upper]:abc=cba:CBA;   (the step between written out)

Six operations on places and six maps of letters make 36 tasks that have names. So a task can be held out although
both its operations are trained on, each in other company; whoever follows the instruction, and has not learned tasks
by heart, can do it. Words are held out too: by the sum of their letters, together with every rearrangement of them.
Tests: tests/test_instructions.py.
"""

import numpy as np

LETTERS, WORD = 10, 3           # a-j in words of three; answers may be upper case, the tokens LETTERS to 2 LETTERS - 1
PLACES = {"keep": [0, 1, 2], "reverse": [2, 1, 0], "left": [1, 2, 0], "right": [2, 0, 1], "first": [0, 0, 0],
          "swap": [1, 0, 2]}
MAPS = {"same": (0, 0), "next": (1, 0), "previous": (-1, 0), "upper": (0, 1), "upper next": (1, 1),
        "upper second": (2, 1)}         # letters further in the alphabet, and whether upper case
OPERATIONS = (*PLACES, *MAPS)
KEEP, SAME = 0, len(PLACES)             # the two operations that change nothing
TASKS = tuple((i, len(PLACES) + j) for i in range(len(PLACES)) for j in range(len(MAPS)))       # pairs of OPERATIONS

FIRST_OPERATION = 2 * LETTERS
COLON, EQUALS, END = range(FIRST_OPERATION + len(OPERATIONS), FIRST_OPERATION + len(OPERATIONS) + 3)
VOCABULARY = END + 1
PROMPT = 4 + WORD               # tokens up to and with "="
MODEL = {"vocab_size": VOCABULARY, "width": 64, "layers": 2, "heads": 4, "context": 24}         # for a model.Config
HELD_OUT_ONE_IN = 5
_ORDER, _SHIFT = np.array([*PLACES.values()]), np.array([*MAPS.values()])


def text(tokens):
    """As people read it."""
    signs = "abcdefghijABCDEFGHIJ", [f"[{name}]" for name in OPERATIONS], ":=;"
    return "".join([*signs[0], *signs[1], *signs[2]][token] for token in tokens)


def carry_out(tasks, words):
    """What the tasks (B,2) make of words (B,WORD): after the first operation, and after both; two arrays (B,WORD)."""
    tasks = np.asarray(tasks)
    moved = np.take_along_axis(words, _ORDER[tasks[:, 0]], axis=1)
    shift, upper = _SHIFT[tasks[:, 1] - len(PLACES)].T[..., None]
    return moved, (moved + shift) % LETTERS + LETTERS * upper


def is_held_out(words):
    """Whether words (B,WORD) are for evaluation only: (B,)."""
    return words.sum(axis=1) % HELD_OUT_ONE_IN == 0


def draw_words(rng, count, held_out=False):
    """Lower-case words (count,WORD) of the half that is asked for."""
    words = rng.integers(LETTERS, size=(count, WORD))
    while len(other := np.flatnonzero(is_held_out(words) != held_out)):
        words[other] = rng.integers(LETTERS, size=(len(other), WORD))
    return words


def split_tasks(rng, held_out=9):
    """(training, held out), two lists of TASKS. Held out are pairs of two operations that each do something, neither
    "keep" nor "same". Of the training tasks any first n use all operations as evenly as they can: the next is always
    one whose operations have occurred least."""
    order = [TASKS[i] for i in rng.permutation(len(TASKS))]
    chosen = [(i, j) for i, j in order if i != KEEP and j != SAME][:held_out]
    order = chosen + [task for task in order if task not in chosen]
    held, pool, training = order[:held_out], order[held_out:], []
    while pool:
        used = [operation for task in training for operation in task]
        training.append(min(pool, key=lambda task: sum(map(used.count, task))))
        pool.remove(training[-1])
    return training, held


def coverage(tasks):
    """The share of OPERATIONS that occur in these tasks."""
    return len({operation for task in tasks for operation in task}) / len(OPERATIONS)


def documents(rng, count, tasks, held_out=False, steps=False):
    """`count` documents of tasks drawn from a list: tokens (count,T), and a mask, 1 on what follows "=".

    held_out: about held-out words; steps: with the word between the two operations.
    """
    drawn = np.array(tasks)[rng.integers(len(tasks), size=count)]
    words = draw_words(rng, count, held_out)
    moved, answers = carry_out(drawn, words)
    return _lines(drawn, words, moved, answers) if steps else _lines(drawn, words, answers)


def single_operations(rng, count, held_out=False):
    """The same about one operation each, `[reverse]:abc=cba;`."""
    drawn = rng.integers(len(OPERATIONS), size=count)
    words, on_places = draw_words(rng, count, held_out), drawn < len(PLACES)
    tasks = np.where(on_places, (drawn, np.full(count, SAME)), (np.full(count, KEEP), drawn)).T
    _, answers = carry_out(tasks, words)
    return _lines(drawn[:, None], words, answers)


def _lines(operations, words, *results):
    def sign(token):
        return np.full((len(words), 1), token)
    results = [part for result in results for part in (sign(COLON), result)][1:]
    tokens = [operations + FIRST_OPERATION, sign(COLON), words, sign(EQUALS), *results, sign(END)]
    tokens = np.concatenate(tokens, axis=1)
    answer = np.arange(tokens.shape[1]) >= operations.shape[1] + 2 + WORD
    return tokens, np.tile(answer.astype(float), (len(words), 1))


def nearest(tasks, task, words):
    """How often the best of those `tasks` that share an operation with `task`, and of all single operations, gives its
    answers to words (B,WORD)."""
    def answers(one):
        return carry_out([one] * len(words), words)[1]
    sharing = [other for other in tasks if set(other) & set(task)]
    single = [(i, j) for i, j in TASKS if i == KEEP or j == SAME]
    return max((answers(other) == answers(task)).all(axis=1).mean() for other in sharing + single)
