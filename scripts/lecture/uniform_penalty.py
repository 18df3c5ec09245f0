"""Likelihood and preference: models of equal loss, and their gold reward

Claim. The loss punishes every wrong token alike, and open-ended tasks have no single right answer:
likelihood and human preference disagree.

Test. Short replies to 9 questions, all 781 possible replies listed (scripts/lecture/worlds/replies.py), so
that the loss on the whole distribution of demonstrations, and the gold reward, are sums. Transformers of
25,632 parameters are finetuned on 4,000 demonstrations, of which a share is altered: "careless" ones give
another answer; "harmless" ones have the sentences before the answer after it and the other way round, which
costs no reward. Equal likelihood: half of the demonstrations careless, against the share of harmless ones,
found by bisection, at which the loss is the same within 0.01 nats per reply. Equal preference: unaltered
against all harmless, which is the same reward for the demonstrations and another likelihood. And one token
at a time: the gradient of the loss for a wrong answer and for a courtesy of the same probability, and the
reward of a model that gives the probability missing from the demonstrated reply to the one or to the other.

Rule. Of two models with equal loss, one has more gold reward by at least 0.2 and is preferred by people in
more than 55% of comparisons; and two models with equal gold reward, within 0.1, differ by at least 0.1 nats
per reply in loss. Condition: the pair of equal loss is found with every seed.

Limits. A construction: it shows that the two can disagree, and how far here, not how often they do. The
alterations are ours; errors of models from the same demonstrations are more alike. The loss is against the
distribution of demonstrations, wrong answers included (27% of them).

Source. Ouyang et al. 2022, arXiv:2203.02155; Stiennon et al. 2020, arXiv:2009.01325.

Figure. Expected gold reward of a reply against the loss on demonstrations, one line for wrong answers and one for moved
manners among the demonstrations, and for each seed a dotted link between two models of equal loss; dotted: the
demonstrators and the lowest possible loss.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, level, mean, mean_range, run, spread

# isort: split
import numpy as np

from minilm import layers
from minilm.exact.enumerable import expectation, preference
from minilm.objectives.sft import sft_loss
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from minilm.tensor import Tensor
from minilm.world.annotators import is_right
from worlds.replies import COURTESY, EOS, MODEL, VOCABULARY, WORDS, ReplyWorld

CARELESS = 0.5                          # the share of careless demonstrations
TOLERANCE = 0.01                        # of equal loss, nats per reply
SHARES = (0.25, 0.5, 0.75, 1.0)
SIZES = {"quick": {"seeds": 3, "steps": 2, "bisections": 1},
         "default": {"seeds": 6, "steps": 200, "bisections": 8}}


def careless(reply, rng):
    """The same reply about another word."""
    return [3 + (token - 3 + rng.integers(1, len(WORDS))) % len(WORDS) if token >= 3 else token
            for token in reply]


def harmless(reply, rng):
    """The same sentences: those before the answer come after it, those after it before."""
    at = next(i for i, token in enumerate(reply) if token >= 3)
    return [*reply[at + 1:-1], reply[at], *reply[:at], reply[-1]]


def measure(experiment, seed, steps, bisections):
    world = ReplyWorld(words=2)
    demonstrations = world.demonstration_distribution()
    right = world.table(lambda question, text, finished: float(is_right(question, text)))
    prompts, replies = world.demonstrations(np.random.default_rng(seed), 4000)

    def finetuned(alter, share):
        """log pi (P,Y) after demonstrations, a share of them altered; all other draws are the same."""
        rng = np.random.default_rng([seed, 1])
        altered = [alter(reply, rng) if u < share else reply
                   for reply, u in zip(replies, rng.random(len(replies)))]
        model = experiment.transformer(np.random.default_rng([seed, 2]), **MODEL)
        rng = np.random.default_rng([seed, 3])
        for _ in train_sft(TrainState(model, rng), prompts, altered, steps, 64, 3e-3):
            pass
        return world.log_distributions(model)

    def point(log_pi):
        return {"loss": -(demonstrations * log_pi).sum(axis=1).mean(),
                "gold": expectation(log_pi, world.gold).mean(), "right": expectation(log_pi, right).mean()}

    plain = finetuned(harmless, 0)
    wrong = finetuned(careless, CARELESS)
    curves = {"careless": [point(plain), point(finetuned(careless, CARELESS / 2)), point(wrong)],
              "harmless": [point(plain), *(point(finetuned(harmless, share)) for share in SHARES)]}
    low = 0.0
    high = 1.0
    for _ in range(bisections):
        share = (low + high) / 2
        polite = finetuned(harmless, share)
        gap = point(polite)["loss"] - point(wrong)["loss"]
        if abs(gap) < TOLERANCE:
            break
        if gap < 0:
            low = share
        else:
            high = share
    # The probability that a person prefers a reply of the one to a reply of the other.
    preferred = np.einsum("pi,pij,pj->p", np.exp(polite), preference(world.gold), np.exp(wrong)).mean()
    experiment.say(f"seed {seed}: share {share:.3f}, loss {point(polite)['loss']:.3f} and "
                   f"{point(wrong)['loss']:.3f}")
    return {**curves, "harmless, equal loss": point(polite), "careless, equal loss": point(wrong),
            "share": share, "preferred": preferred,
            "demonstrators": point(np.log(np.maximum(demonstrations, 1e-300))),
            "token": one_token(world, plain)}


def one_token(world, log_pi):
    """One question, demonstrated by its right answer alone: the loss and the gold reward of other replies."""
    p = 0
    answer = world.prompts[p][-1]
    wrong = 3 + (answer - 2) % len(WORDS)
    replies = [[answer, EOS], [wrong, EOS], [COURTESY, answer, EOS]]        # demonstration, mistake, courtesy
    _, y = world.index([world.prompts[p]] * 3, replies)
    first = np.array([response[0] for response in world.responses])
    logits = np.array([[np.logaddexp.reduce(log_pi[p, first == token]) for token in range(VOCABULARY)]])
    logits[0, [wrong, COURTESY]] = np.log(np.exp(logits[0, [wrong, COURTESY]]).mean())   # equally probable
    hidden = Tensor(logits, requires_grad=True)
    log_probs = layers.token_log_probs(hidden, Tensor(np.eye(VOCABULARY)), np.array([answer]))
    sft_loss(log_probs, np.ones(1)).backward()
    demonstrated = np.exp(log_pi[p, y[0]])
    return {"loss": -log_pi[p, y[0]],
            "wrong, gradient": hidden.grad[0, wrong], "courtesy, gradient": hidden.grad[0, COURTESY],
            **{f"{name}, gold": demonstrated * world.gold[p, y[0]] + (1 - demonstrated) * world.gold[p, other]
               for name, other in (("wrong", y[1]), ("courtesy", y[2]))}}


def conclude(seeds, size):
    def column(name, what):
        return [s[name][what] for s in seeds]

    polite = "harmless, equal loss"
    wrong = "careless, equal loss"
    gaps = np.abs(np.subtract(column(polite, "loss"), column(wrong, "loss")))
    better = np.subtract(column(polite, "gold"), column(wrong, "gold"))
    plain = [s["harmless"][0] for s in seeds]
    moved = [s["harmless"][-1] for s in seeds]
    worse = [b["loss"] - a["loss"] for a, b in zip(plain, moved)]
    difference = [b["gold"] - a["gold"] for a, b in zip(plain, moved)]
    condition = Comparison("share of seeds with a pair of equal loss", gaps < TOLERANCE, above=0.99)
    comparisons = [
        Comparison("equal loss: harmless alterations minus careless ones (gold reward)", better, above=0.2),
        Comparison("equal loss: how often people prefer the model with harmless alterations",
                   [s["preferred"] for s in seeds], above=0.55),
        Comparison("all demonstrations with harmless alterations, minus unaltered (gold reward)", difference,
                   above=-0.1, below=0.1),
        Comparison("all demonstrations with harmless alterations, minus unaltered (loss, nats per reply)", worse,
                   above=0.1)]
    models = {"equal likelihood: careless answers": [s[wrong] for s in seeds],
              "equal likelihood: harmless order": [s[polite] for s in seeds],
              "equal preference: as demonstrated": plain, "equal preference: all in the other order": moved}
    table = [["model", "loss (nats per reply)", "right answers", "gold reward"]]
    digits = {"loss": 3, "right": 2, "gold": 2}
    table += [[name, *(mean_range([m[what] for m in points], digits[what]) for what in digits)]
              for name, points in models.items()]
    numbers = {f"{name}: {what}": spread(m[what] for m in points)
               for name, points in models.items() for what in ("loss", "gold")}
    numbers |= {"preferred at equal loss": spread(s["preferred"] for s in seeds),
                "share of harmless": spread(s["share"] for s in seeds)}
    words = (f"Two models with equal loss have gold reward {mean(column(wrong, 'gold'))} and "
             f"{mean(column(polite, 'gold'))}; two with equal gold reward (no demonstration altered, and all of them "
             f"harmlessly: difference {mean(difference, 3)}) differ by {mean(worse)} nats per reply in loss.")
    return Conclusion(comparisons, words, numbers, table, conditions=[condition])


def draw(figure, seeds, size):
    axis = figure.subplots()
    labels = {"careless": "wrong answers, in up to half of the demonstrations",
              "harmless": "manners moved, in up to all demonstrations"}
    for i, (name, label) in enumerate(labels.items()):
        paths = np.array([[[m["loss"], m["gold"]] for m in s[name]] for s in seeds])   # (seeds, shares, 2)
        for path in paths:
            axis.plot(*path.T, color=COLOURS[i], linewidth=0.8, alpha=0.35)
        axis.plot(*paths.mean(axis=0).T, color=COLOURS[i], marker="o", markersize=4, linewidth=1.8,
                  label=label)
    for s in seeds:
        pair = [s[f"{name}, equal loss"] for name in ("careless", "harmless")]
        axis.plot([m["loss"] for m in pair], [m["gold"] for m in pair], "D:", color=COLOURS[2], markersize=5,
                  linewidth=1.2, label="equal likelihood" if s is seeds[0] else None)
    level(axis, seeds[0]["demonstrators"]["gold"], "the demonstrators")
    axis.axvline(seeds[0]["demonstrators"]["loss"], color=COLOURS[5], linestyle=":", linewidth=1.2,
                 label="lowest possible loss (entropy)")
    axis.set(xlabel="loss on the distribution of demonstrations, nats per reply (exact)",
             ylabel="expected gold reward of a reply (exact)", title="Gold reward against loss")
    axis.margins(y=0.1)
    axis.legend(fontsize=8, loc="center right")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES))
