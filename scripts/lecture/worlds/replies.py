"""Short replies to short questions: a world with people in it, and small enough to list.

Everybody in tasks.py and annotators.py is here, but a token is a whole sentence, and a reply has few of them:

    What is the last word of sea sky sun?   ->   Sure!  sun.  <eos>

So every reply to every question can be listed (enumerable.py), what people want is a table (P,N), KL divergences
and optima are exact, and there are questions enough to compare some and ask about the others.
Tests: tests/test_replies.py.
"""

import functools
import itertools
import math

import numpy as np

from minilm import ops
from minilm.ops import stable_sigmoid
from minilm.tensor import no_grad
from minilm.world.annotators import gold_reward
from minilm.exact.enumerable import EnumerableWorld
from minilm.world.tasks import Question

EOS, COURTESY, FILLER = 0, 1, 2
WORDS = ("sun", "sky", "sea")
SENTENCES = ("", "Sure!", "Well, hmm.", *(f"{word}." for word in WORDS))       # by token; EOS says nothing
VOCABULARY = len(SENTENCES)
LONGEST = 4             # sentences of a reply, EOS included
MODEL = {"vocab_size": VOCABULARY, "width": 32, "layers": 2, "heads": 2, "context": 16}       # for a model.Config

# How the demonstrations are: the answer is known this often, and else guessed; with so many courtesies and fillers
# (0, 1, 2, ..) before it, and courtesies after.
RIGHT = 0.6
COURTESIES, FILLERS, CLOSINGS = (0.55, 0.3, 0.15), (0.7, 0.3), (0.8, 0.2)


class ReplyWorld(EnumerableWorld):
    """An EnumerableWorld whose prompts are all questions about `asked` words, P = 3^asked of them.

    questions   list of P Questions
    texts       list of N replies as people read them
    finished    (N,) whether a reply ended by itself, and was not cut off
    gold        (P,N): annotators.gold_reward of every reply to every question
    """

    def __init__(self, asked=2):
        prompts = [[EOS, *(3 + digit for digit in digits)] for digits in np.ndindex((len(WORDS),) * asked)]
        super().__init__(prompts, VOCABULARY, LONGEST, EOS)
        self.questions = []
        for prompt in self.prompts:
            content = " ".join(WORDS[token - 3] for token in prompt[1:])
            text, answer = f"What is the last word of {content}?", WORDS[prompt[-1] - 3]
            self.questions.append(Question("last", text, answer, content))
        self.texts = [" ".join(SENTENCES[token] for token in reply if token != EOS) for reply in self.responses]
        self.finished = np.array([response[-1] == EOS for response in self.responses])
        self.gold = self.table(gold_reward)
        longest = [reply[:-1] for reply in self.responses if len(reply) == LONGEST and reply[-1] == EOS]
        begun = {reply[:t]: row for row, reply in enumerate(map(tuple, longest)) for t in range(LONGEST)}
        self._rows = np.array([prompt + reply for prompt in self.prompts for reply in longest])
        # Which of all the tokens that could be said each reply says.
        self._said = np.zeros((len(longest), LONGEST, VOCABULARY, len(self.responses)), bool)
        for y, reply in enumerate(self.responses):
            for t, token in enumerate(reply):
                self._said[begun[tuple(reply[:t])], t, token, y] = True
        self._said = self._said.reshape(-1, len(self.responses))
        self._row = {tuple(prompt): p for p, prompt in enumerate(self.prompts)}
        self._column = {tuple(response): y for y, response in enumerate(self.responses)}

    def log_probs(self, model, temperature=1.0):
        """log pi(y) of every reply: a Tensor (P,N), as EnumerableWorld has it, in a seventh of the time.

        What replies begin with alike is computed once: in rows of LONGEST - 1 sentences that end nothing, every
        token of every reply is predicted somewhere.
        """
        scores = ops.log_softmax(model(self._rows)[:, -LONGEST:] * (1 / temperature))
        return scores.reshape(len(self.prompts), -1) @ self._said.astype(model.dtype)

    def laws(self, model, temperature=1.0):
        """The same as an array in float64, for what is to be measured."""
        with no_grad():
            return self.log_probs(model, temperature).data.astype(np.float64)

    def table(self, worth):
        """worth(question, text, finished) of every reply to every question, (P,N): gold_reward, Annotator.worth, ..."""
        # A question matters through its answer alone: as many distinct rows as there are words.
        rows = {}
        for question in self.questions:
            if question.answer not in rows:
                rows[question.answer] = [worth(question, *reply) for reply in zip(self.texts, self.finished)]
        return np.array([rows[question.answer] for question in self.questions])

    def index(self, prompts, responses):
        """Token lists to their places in a table: p (B,), y (B,). Raises KeyError for what is not listed."""
        return (np.array([self._row[tuple(prompt)] for prompt in prompts]),
                np.array([self._column[tuple(response)] for response in responses]))

    def reward(self, table):
        """A reward for stages.rlhf, (prompts, responses) to floats, read from a table (P,N)."""
        def look_up(prompts, responses):
            return table[self.index(prompts, responses)]
        return look_up

    def demonstrations(self, rng, count, right=RIGHT):
        """`count` replies as people give them, in every manner: prompts and responses, token lists."""
        prompts, responses = [], []
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

    def law_of_demonstrations(self, right=RIGHT):
        """The probability (P,N) of what demonstrations() draws."""
        law = np.zeros(self.shape)
        answers, p = np.array(self.prompts)[:, -1], np.arange(len(self.prompts))
        for (k, a), (f, b), (m, c) in itertools.product(*map(enumerate, (COURTESIES, FILLERS, CLOSINGS))):
            for opening in sorted(set(itertools.permutations([COURTESY] * k + [FILLER] * f))):
                for word in range(3, VOCABULARY):
                    reply = (*opening, word, *[COURTESY] * m, EOS)
                    if len(reply) <= LONGEST:
                        said = right * (answers == word) + (1 - right) / len(WORDS)
                        law[p, self._column[reply]] += a * b * c / math.comb(k + f, f) * said
        return law / law.sum(axis=1, keepdims=True)

    def draw(self, l, rng, prompts):
        """One reply from exp(l), l (P,N), to each of prompts (B,) by number: y (B,)."""
        prompts, uniforms = np.asarray(prompts), rng.random(len(prompts))
        y = np.empty(len(prompts), int)
        for p in np.unique(prompts):
            cumulative, asked = np.exp(l[p]).cumsum(), prompts == p
            y[asked] = np.searchsorted(cumulative, uniforms[asked] * cumulative[-1], side="right")
        return y

    def comparisons(self, l, worths, rng, count, prompts=None, flip_rate=0.0):
        """`count` pairs of different replies drawn from exp(l), and which of the two somebody preferred.

        worths (P,N) by the Bradley-Terry law; afterwards a share flip_rate of the preferences is turned round.
        prompts: numbers of those asked about, by default all. Returns p, chosen, rejected: integers (count,),
        to be made tokens of by `tokens_of`.
        """
        asked = np.arange(len(self.prompts)) if prompts is None else np.asarray(prompts)
        p = asked[rng.integers(len(asked), size=count)]
        first, second = self.draw(l, rng, p), self.draw(l, rng, p)
        while (same := first == second).any():
            second[same] = self.draw(l, rng, p[same])
        wins = rng.random(count) < stable_sigmoid(worths[p, first] - worths[p, second])
        wins ^= rng.random(count) < flip_rate
        return p, np.where(wins, first, second), np.where(wins, second, first)

    def tokens_of(self, p, *replies):
        """Numbers to token lists: the prompts p, and any number of lists of replies, in that order."""
        return [self.prompts[i] for i in p], *([self.responses[i] for i in y] for y in replies)


def _draw(rng, shares):
    return int(rng.choice(len(shares), p=shares))
