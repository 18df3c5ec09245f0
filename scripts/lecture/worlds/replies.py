"""Short replies to short questions: a world with annotators in it that is small enough to enumerate.

It uses the questions of tasks.py and the annotators of annotators.py, but a token is a whole sentence and a reply has
few of them:

    What is the last word of sea sky sun?   ->   Sure!  sun.  <eos>

So every reply y to every question x can be listed (enumerable.py). The gold reward is a table (P,Y); KL divergences
and optima are exact. There are enough questions to compare replies to some of them and to test on the others.
P questions (prompts), N replies (responses).
Tests: tests/test_replies.py.
"""

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np

from minilm import checks, ops
from minilm.exact.enumerable import EnumerableWorld
from minilm.model import Transformer
from minilm.ops import stable_sigmoid
from minilm.tensor import Tensor, no_grad
from minilm.world.annotators import gold_reward
from minilm.world.tasks import Question

EOS, COURTESY, FILLER = 0, 1, 2
WORDS = ("sun", "sky", "sea")
SENTENCES = ("", "Sure!", "Well, hmm.", *(f"{word}." for word in WORDS))       # by token; EOS has no text
VOCABULARY = len(SENTENCES)
LONGEST = 4             # sentences of a reply, EOS included
MODEL = {"vocab_size": VOCABULARY, "width": 32, "layers": 2, "heads": 2, "context": 16}       # for a model.Config

# The demonstrators know the answer with probability RIGHT and guess otherwise. The other numbers are the
# probabilities of 0, 1, 2, .. courtesies and fillers before the answer, and of courtesies after it.
RIGHT = 0.6
COURTESIES, FILLERS, CLOSINGS = (0.55, 0.3, 0.15), (0.7, 0.3), (0.8, 0.2)

Tokens = list[list[int]]


class ReplyWorld(EnumerableWorld):
    """An EnumerableWorld whose prompts are all questions about `words` words: P = 3^words.

    questions   list of P Questions
    texts       list of N replies as text
    finished    (N,) whether a reply ends with EOS; the others were cut off at LONGEST
    gold        (P,Y): annotators.gold_reward of every reply to every question
    """

    def __init__(self, words: int = 2):
        prompts = [[EOS, *(3 + digit for digit in digits)] for digits in np.ndindex((len(WORDS),) * words)]
        super().__init__(prompts, VOCABULARY, LONGEST, EOS)
        self.questions = []
        for prompt in self.prompts:
            content = " ".join(WORDS[token - 3] for token in prompt[1:])
            text = f"What is the last word of {content}?"
            self.questions.append(Question("last", text, WORDS[prompt[-1] - 3], content))
        self.texts = [" ".join(SENTENCES[token] for token in reply if token != EOS) for reply in self.responses]
        self.finished = np.array([response[-1] == EOS for response in self.responses])
        self.gold = self.table(gold_reward)
        longest = [reply[:-1] for reply in self.responses if len(reply) == LONGEST and reply[-1] == EOS]
        prefixes = {reply[:t]: row for row, reply in enumerate(map(tuple, longest)) for t in range(LONGEST)}
        self._rows = np.array([prompt + reply for prompt in self.prompts for reply in longest])
        # (rows x positions x tokens, N): 1 where a reply contains this token, predicted in this row and position.
        contains = np.zeros((len(longest), LONGEST, VOCABULARY, len(self.responses)), bool)
        for y, reply in enumerate(self.responses):
            for t, token in enumerate(reply):
                contains[prefixes[tuple(reply[:t])], t, token, y] = True
        self._contains = contains.reshape(-1, len(self.responses))
        self._row = {tuple(prompt): p for p, prompt in enumerate(self.prompts)}
        self._column = {tuple(response): y for y, response in enumerate(self.responses)}

    def log_probs(self, model: Transformer, temperature: float = 1.0) -> Tensor:
        """log pi(y|x) of every reply: a Tensor (P,Y), equal to EnumerableWorld.log_probs at a seventh of the time.

        Shared prefixes are computed once: in the rows of LONGEST - 1 sentences without EOS, every token of every
        reply is predicted somewhere.
        """
        scores = ops.log_softmax(model(self._rows)[:, -LONGEST:] * (1 / checks.temperature("log_probs", temperature)))
        return scores.reshape(len(self.prompts), -1) @ self._contains.astype(model.dtype)

    def log_distributions(self, model: Transformer, temperature: float = 1.0) -> np.ndarray:
        """log pi(y|x) (P,Y) in float64, without a graph: for measuring."""
        with no_grad():
            return self.log_probs(model, temperature).data.astype(np.float64)

    def table(self, score: Callable[[Question, str, bool], float]) -> np.ndarray:
        """score(question, text, finished) of every reply to every question, (P,Y).

        score may depend on the question only through its answer, as gold_reward and Annotator.utility do.
        """
        rows = {}                                           # by answer: there are as many distinct rows as words
        for question in self.questions:
            if question.answer not in rows:
                rows[question.answer] = [score(question, *reply) for reply in zip(self.texts, self.finished)]
        return np.array([rows[question.answer] for question in self.questions])

    def index(self, prompts: Tokens, responses: Tokens) -> tuple[np.ndarray, np.ndarray]:
        """The row p and the column y of each (prompt, response) in a table: (B,), (B,).

        Raises KeyError for a prompt or a response that the world does not list.
        """
        return (np.array([self._row[tuple(prompt)] for prompt in prompts]),
                np.array([self._column[tuple(response)] for response in responses]))

    def reward(self, table: np.ndarray) -> Callable[[Tokens, Tokens], np.ndarray]:
        """A reward function for stages.rlhf, (prompts, responses) to floats, that reads a table (P,Y)."""
        def look_up(prompts, responses):
            return table[self.index(prompts, responses)]
        return look_up

    def demonstrations(self, rng: np.random.Generator, count: int, right: float = RIGHT) -> tuple[Tokens, Tokens]:
        """`count` replies of the demonstrators to random questions: prompts and responses."""
        checks.number("demonstrations", "right", right, at_least=0, at_most=1)
        prompts = []
        responses = []
        while len(responses) < count:
            prompt = self.prompts[int(rng.integers(len(self.prompts)))]
            draw = functools.partial(_draw, rng)
            opening = [COURTESY] * draw(COURTESIES) + [FILLER] * draw(FILLERS)
            answer = prompt[-1] if rng.random() < right else 3 + int(rng.integers(len(WORDS)))
            opening = [opening[i] for i in rng.permutation(len(opening))]
            response = [*opening, answer, *[COURTESY] * draw(CLOSINGS), EOS]
            if len(response) <= LONGEST:
                prompts.append(prompt)
                responses.append(response)
        return prompts, responses

    def demonstration_distribution(self, right: float = RIGHT) -> np.ndarray:
        """The probability (P,Y) of each reply under demonstrations()."""
        checks.number("demonstration_distribution", "right", right, at_least=0, at_most=1)
        pi = np.zeros(self.shape)
        answers = np.array(self.prompts)[:, -1]
        p = np.arange(len(self.prompts))
        for (k, a), (f, b), (m, c) in itertools.product(*map(enumerate, (COURTESIES, FILLERS, CLOSINGS))):
            for opening in sorted(set(itertools.permutations([COURTESY] * k + [FILLER] * f))):
                for word in range(3, VOCABULARY):
                    reply = (*opening, word, *[COURTESY] * m, EOS)
                    if len(reply) <= LONGEST:
                        p_word = right * (answers == word) + (1 - right) / len(WORDS)
                        pi[p, self._column[reply]] += a * b * c / math.comb(k + f, f) * p_word
        return pi / pi.sum(axis=1, keepdims=True)

    def draw(self, log_pi: np.ndarray, rng: np.random.Generator, prompts: np.ndarray) -> np.ndarray:
        """One reply y ~ pi(.|x) for each of the prompts, given by index (B,): y (B,). log_pi is (P,Y)."""
        prompts = checks.indices("draw", "prompts", prompts, len(self.prompts))
        self.check_tables("draw", log_pi=log_pi)
        uniforms = rng.random(len(prompts))
        y = np.empty(len(prompts), int)
        for p in np.unique(prompts):
            cumulative = np.exp(log_pi[p]).cumsum()
            here = prompts == p
            y[here] = np.searchsorted(cumulative, uniforms[here] * cumulative[-1], side="right")
        return y

    def ordered_by_gold(self, log_pi: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` pairs of replies, less those of equal gold reward: the prompts, the better and the worse, (3,N)."""
        p, first, second = self.comparisons(log_pi, self.gold, rng, count)
        lead = self.gold[p, first] - self.gold[p, second]
        return np.array([p, *np.where(lead > 0, (first, second), (second, first))])[:, lead != 0]

    def comparisons(self, log_pi: np.ndarray, utility: np.ndarray, rng: np.random.Generator, count: int,
                    prompts: np.ndarray | None = None, flip_rate: float = 0.0
                    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`count` pairs of different replies drawn from pi (P,Y), and the preferred reply of each pair.

        The first reply is preferred with probability sigma(u_1 - u_2) (Bradley-Terry), u = utility (P,Y); afterwards
        each preference is flipped with probability flip_rate. prompts: indices of the questions to use, by default
        all. Returns the indices p, chosen, rejected, (count,) each; tokens_of turns them into tokens.
        """
        pool = np.arange(len(self.prompts)) if prompts is None else np.asarray(prompts)
        checks.number("comparisons", "flip_rate", flip_rate, at_least=0, at_most=1)
        self.check_tables("comparisons", log_pi=log_pi, utility=utility)
        if (np.exp(log_pi[pool]).max(axis=1) > 1 - 1e-9).any():
            raise ValueError("comparisons: a policy that gives one reply alone has no two different replies to compare")
        p = pool[rng.integers(len(pool), size=count)]
        first = self.draw(log_pi, rng, p)
        second = self.draw(log_pi, rng, p)
        while (same := first == second).any():
            second[same] = self.draw(log_pi, rng, p[same])
        first_preferred = rng.random(count) < stable_sigmoid(utility[p, first] - utility[p, second])
        first_preferred ^= rng.random(count) < flip_rate
        return p, np.where(first_preferred, first, second), np.where(first_preferred, second, first)

    def check_tables(self, function: str, **tables: np.ndarray) -> None:
        """Raises ValueError for a table of another shape than (P,Y), or with NaN in it."""
        for name, table in tables.items():
            if table.shape != self.shape or np.isnan(table).any():
                raise ValueError(f"{function}: {name} {table.shape} must be {self.shape}, without NaN")

    def tokens_of(self, p: np.ndarray, *replies: np.ndarray) -> tuple[Tokens, ...]:
        """Indices to token lists: the prompts p (B,), and each array of replies (B,), in this order."""
        return [self.prompts[i] for i in p], *([self.responses[i] for i in y] for y in replies)


def _draw(rng, shares):
    return int(rng.choice(len(shares), p=shares))
