"""Instructions of two operations: one on the positions of a word, then one on its letters.

    [reverse][upper]:abc=CBA;              [reverse][upper]:abc=cba:CBA;   (with the intermediate word)

Six operations on positions and six on letters make 36 named tasks. A task can be held out although both its
operations are trained on, each in other combinations. A model that follows the instruction, instead of memorising
tasks, can solve it. Words are held out too: by the sum of their letters, so every rearrangement is held out as well.
Tests: tests/test_instructions.py.
"""

import numpy as np

from minilm import checks

LETTERS, WORD = 10, 3           # a-j in words of three; upper-case letters are the tokens LETTERS to 2 LETTERS - 1
PLACES = {"keep": [0, 1, 2], "reverse": [2, 1, 0], "left": [1, 2, 0], "right": [2, 0, 1], "first": [0, 0, 0],
          "swap": [1, 0, 2]}
# (steps forward in the alphabet, 1 for upper case)
MAPS = {"same": (0, 0), "next": (1, 0), "previous": (-1, 0), "upper": (0, 1), "upper next": (1, 1),
        "upper second": (2, 1)}
OPERATIONS = (*PLACES, *MAPS)
KEEP, SAME = 0, len(PLACES)             # the two operations that change nothing
TASKS = tuple((i, len(PLACES) + j) for i in range(len(PLACES)) for j in range(len(MAPS)))       # pairs of OPERATIONS

FIRST_OPERATION = 2 * LETTERS
COLON, EQUALS, END = range(FIRST_OPERATION + len(OPERATIONS), FIRST_OPERATION + len(OPERATIONS) + 3)
VOCABULARY = END + 1
PROMPT = 4 + WORD               # tokens up to and including "="
MODEL = {"vocab_size": VOCABULARY, "width": 64, "layers": 2, "heads": 4, "context": 24}         # for a model.Config
HELD_OUT_ONE_IN = 5
_ORDER = np.array([*PLACES.values()])
_SHIFT = np.array([*MAPS.values()])

Task = tuple[int, int]


def text(tokens: np.ndarray) -> str:
    """The tokens as readable text."""
    signs = [*"abcdefghijABCDEFGHIJ", *(f"[{name}]" for name in OPERATIONS), *":=;"]
    return "".join(signs[token] for token in tokens)


def carry_out(tasks: list[Task], words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Apply the tasks (B,2) to words (B,WORD): the words after the first operation, and after both, (B,WORD) each."""
    tasks = np.asarray(tasks)
    places = checks.indices("carry_out", "the first operation of a task", tasks[:, 0], len(PLACES))
    maps = checks.indices("carry_out", "the second operation of a task, from its first,", tasks[:, 1] - len(PLACES),
                          len(MAPS))
    moved = np.take_along_axis(words, _ORDER[places], axis=1)
    shift, upper = _SHIFT[maps].T[..., None]
    return moved, (moved + shift) % LETTERS + LETTERS * upper


def is_held_out(words: np.ndarray) -> np.ndarray:
    """Whether words (B,WORD) are for evaluation only: (B,)."""
    return words.sum(axis=1) % HELD_OUT_ONE_IN == 0


def draw_words(rng: np.random.Generator, count: int, held_out: bool = False) -> np.ndarray:
    """Random lower-case words (count,WORD), all held out or all for training."""
    words = rng.integers(LETTERS, size=(count, WORD))
    while len(other := np.flatnonzero(is_held_out(words) != held_out)):
        words[other] = rng.integers(LETTERS, size=(len(other), WORD))
    return words


def split_tasks(rng: np.random.Generator, held_out: int = 9) -> tuple[list[Task], list[Task]]:
    """(training, held out), two lists of TASKS.

    Both operations of a held-out task change something: neither is "keep" or "same". The first n training tasks, for
    any n, use all operations as evenly as possible: the next task is always one whose operations occurred least.
    """
    order = [TASKS[i] for i in rng.permutation(len(TASKS))]
    chosen = [(i, j) for i, j in order if i != KEEP and j != SAME][:held_out]
    order = chosen + [task for task in order if task not in chosen]
    held = order[:held_out]
    pool = order[held_out:]
    training = []
    while pool:
        used = [operation for task in training for operation in task]
        training.append(min(pool, key=lambda task: sum(map(used.count, task))))
        pool.remove(training[-1])
    return training, held


def coverage(tasks: list[Task]) -> float:
    """The share of OPERATIONS that occur in these tasks."""
    return len({operation for task in tasks for operation in task}) / len(OPERATIONS)


def documents(rng: np.random.Generator, count: int, tasks: list[Task], held_out: bool = False, steps: bool = False
              ) -> tuple[np.ndarray, np.ndarray]:
    """`count` documents of tasks drawn from a list: tokens (count,T), and a mask, 1 after "=".

    held_out: use held-out words; steps: write the word between the two operations.
    """
    drawn = np.array(tasks)[rng.integers(len(tasks), size=count)]
    words = draw_words(rng, count, held_out)
    moved, answers = carry_out(drawn, words)
    return _lines(drawn, words, moved, answers) if steps else _lines(drawn, words, answers)


def single_operations(rng: np.random.Generator, count: int, held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The same for one operation each, `[reverse]:abc=cba;`."""
    drawn = rng.integers(len(OPERATIONS), size=count)
    words = draw_words(rng, count, held_out)
    on_places = drawn < len(PLACES)
    tasks = np.where(on_places, (drawn, np.full(count, SAME)), (np.full(count, KEEP), drawn)).T
    _, answers = carry_out(tasks, words)
    return _lines(drawn[:, None], words, answers)


def _lines(operations, words, *results):
    """Documents of operations (B,1 or 2), words (B,WORD) and results (B,WORD each): tokens, mask."""
    def sign(token):
        return np.full((len(words), 1), token)
    results = [part for result in results for part in (sign(COLON), result)][1:]
    tokens = [operations + FIRST_OPERATION, sign(COLON), words, sign(EQUALS), *results, sign(END)]
    tokens = np.concatenate(tokens, axis=1)
    answer = np.arange(tokens.shape[1]) >= operations.shape[1] + 2 + WORD
    return tokens, np.tile(answer.astype(float), (len(words), 1))


def nearest(tasks: list[Task], task: Task, words: np.ndarray) -> float:
    """The accuracy on `task`, for words (B,WORD), of the best other task that a model may have learned.

    Candidates are the `tasks` that share an operation with `task`, and all single operations.
    """
    def answers(one):
        return carry_out([one] * len(words), words)[1]
    sharing = [other for other in tasks if set(other) & set(task)]
    single = [(i, j) for i, j in TASKS if i == KEEP or j == SAME]
    return max((answers(other) == answers(task)).all(axis=1).mean() for other in sharing + single)
