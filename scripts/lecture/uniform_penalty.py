"""Equally likely, differently liked: the loss does not know which mistakes matter

Claim. The loss punishes every wrong token alike, and open-ended tasks have no single right answer: likelihood and
human preference disagree.

Test. Short replies to 9 questions, all 781 possible replies listed (scripts/lecture/worlds/replies.py), so that the loss on
everything that demonstrators write, and the gold reward, are sums. Transformers of 25,632 parameters are instructed on
4,000 demonstrations, in which a share is altered: "careless" ones give another answer, "harmless" ones say what stands
before the answer after it and the other way round, which costs no reward. Equal likelihood: half of the demonstrations
careless against that share of harmless ones, found by bisection, at which the loss is the same within 0.01 nats a
reply. Equal preference: unaltered against all harmless, which is the same reward to write and another likelihood. And
one token at a time: the gradient of the loss for a wrong answer and for a courtesy of the same probability, and the
reward of a model that puts what it withholds from the demonstrated reply on the one or on the other.

Refuted. If, with any seed, no such share is found; or the models of equal loss differ by less than 0.2 in gold reward,
or are not ordered by a person with odds better than 11 to 9; or the models of gold reward equal within 0.1 differ by
less than 0.1 nats a reply in loss.

Limits. A construction: it shows that the two can come apart, and how far here, not how often they do. The noise is
ours; models from the same demonstrations err more alike. The loss is against what demonstrators write, wrong answers
included (27% of theirs).

Source. Ouyang et al. 2022, arXiv:2203.02155; Stiennon et al. 2020, arXiv:2009.01325.
"""

import sys

from common.experiment import COLOURS, Conclusion, level, run, shown, spread, verdict

import numpy as np

from minilm import layers
from minilm.model import Config, Transformer
from minilm.objectives.sft import sft_loss
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from minilm.tensor import Tensor
from minilm.world.annotators import is_right
from minilm.exact.enumerable import expectation, preference
from worlds.replies import COURTESY, EOS, MODEL, VOCABULARY, WORDS, ReplyWorld

CARELESS, TOLERANCE = 0.5, 0.01
SHARES = (0.25, 0.5, 0.75, 1.0)
SIZES = {"quick": {"seeds": 3, "steps": 2, "bisections": 1}, "default": {"seeds": 4, "steps": 200, "bisections": 6}}


def careless(reply, rng):
    """The same reply about another word."""
    return [3 + (token - 3 + rng.integers(1, len(WORDS))) % len(WORDS) if token >= 3 else token for token in reply]


def harmless(reply, rng):
    """The same sentences, those before the answer after it and the other way round."""
    at = next(i for i, token in enumerate(reply) if token >= 3)
    return [*reply[at + 1:-1], reply[at], *reply[:at], reply[-1]]


def measure(row, seed, steps, bisections):
    world = ReplyWorld(words=2)
    demonstrations = world.demonstration_distribution()
    right = world.table(lambda question, text, finished: float(is_right(question, text)))
    prompts, replies = world.demonstrations(np.random.default_rng(seed), 4000)

    def instructed(alter, share):
        """The law of a model after demonstrations of which a share is altered; all else is as for any other share."""
        rng = np.random.default_rng([seed, 1])
        altered = [alter(reply, rng) if u < share else reply for reply, u in zip(replies, rng.random(len(replies)))]
        model, rng = Transformer(Config(**MODEL), np.random.default_rng([seed, 2])), np.random.default_rng([seed, 3])
        for _ in train_sft(TrainState(model, rng), prompts, altered, steps, 64, 3e-3):
            pass
        return world.log_distributions(model)

    def point(l):
        return {"loss": -(demonstrations * l).sum(axis=1).mean(), "gold": expectation(l, world.gold).mean(),
                "right": expectation(l, right).mean()}
    plain, wrong = instructed(harmless, 0), instructed(careless, CARELESS)
    curves = {"careless": [point(plain), point(instructed(careless, CARELESS / 2)), point(wrong)],
              "harmless": [point(plain), *(point(instructed(harmless, share)) for share in SHARES)]}
    low, high = 0.0, 1.0
    for _ in range(bisections):
        share = (low + high) / 2
        polite = instructed(harmless, share)
        gap = point(polite)["loss"] - point(wrong)["loss"]
        if abs(gap) < TOLERANCE:
            break
        low, high = (share, high) if gap < 0 else (low, share)
    # How often a person prefers a reply of the one to a reply of the other.
    odds = np.einsum("pi,pij,pj->p", np.exp(polite), preference(world.gold), np.exp(wrong)).mean()
    row.say(f"seed {seed}: share {share:.3f}, loss {point(polite)['loss']:.3f} and {point(wrong)['loss']:.3f}")
    return {**curves, "harmless, equal loss": point(polite), "careless, equal loss": point(wrong), "share": share,
            "preferred": odds, "demonstrators": point(np.log(np.maximum(demonstrations, 1e-300))),
            "token": one_token(world, plain)}


def one_token(world, l):
    """Of one question, its right answer alone the demonstration: what the loss, and what gold, make of the rest."""
    p = 0
    answer = world.prompts[p][-1]
    wrong = 3 + (answer - 2) % len(WORDS)
    demonstration, mistake, courtesy = ([answer, EOS], [wrong, EOS], [COURTESY, answer, EOS])
    _, y = world.index([world.prompts[p]] * 3, [demonstration, mistake, courtesy])
    first = np.array([response[0] for response in world.responses])
    logits = np.array([[np.logaddexp.reduce(l[p, first == token]) for token in range(VOCABULARY)]])
    logits[0, [wrong, COURTESY]] = np.log(np.exp(logits[0, [wrong, COURTESY]]).mean())        # equally probable
    hidden = Tensor(logits, requires_grad=True)
    sft_loss(layers.token_log_probs(hidden, Tensor(np.eye(VOCABULARY)), np.array([answer])), np.ones(1)).backward()
    kept = np.exp(l[p, y[0]])
    return {"loss": -l[p, y[0]],
            "wrong, gradient": hidden.grad[0, wrong], "courtesy, gradient": hidden.grad[0, COURTESY],
            **{f"{name}, gold": kept * world.gold[p, y[0]] + (1 - kept) * world.gold[p, other]
               for name, other in (("wrong", y[1]), ("courtesy", y[2]))}}


def conclude(seeds, size):
    def column(name, what):
        return [s[name][what] for s in seeds]
    polite, wrong = "harmless, equal loss", "careless, equal loss"
    gaps = [abs(a - b) for a, b in zip(column(polite, "loss"), column(wrong, "loss"))]
    better = [a - b for a, b in zip(column(polite, "gold"), column(wrong, "gold"))]
    plain, moved = ([s["harmless"][i] for s in seeds] for i in (0, -1))
    worse = [b["loss"] - a["loss"] for a, b in zip(plain, moved)]
    as_good = [abs(b["gold"] - a["gold"]) for a, b in zip(plain, moved)]
    holds = (max(gaps) < TOLERANCE and min(better) >= 0.2 and min(s["preferred"] for s in seeds) > 0.55
             and max(as_good) <= 0.1 and min(worse) >= 0.1)
    models = {"equal likelihood: careless answers": [s[wrong] for s in seeds],
              "equal likelihood: harmless order": [s[polite] for s in seeds],
              "equal preference: as demonstrated": plain, "equal preference: all in the other order": moved}
    table = [["model", "loss (nats a reply)", "right answers", "gold reward"]]
    digits = {"loss": 3, "right": 2, "gold": 2}
    table += [[name, *(shown([m[what] for m in points], digits[what]) for what in digits)]
              for name, points in models.items()]
    numbers = {f"{name}: {what}": spread(m[what] for m in points)
               for name, points in models.items() for what in ("loss", "gold")}
    numbers |= {"preferred at equal loss": spread(s["preferred"] for s in seeds),
                "share of harmless": spread(s["share"] for s in seeds)}
    token = {name: [s["token"][name] for s in seeds] for name in seeds[0]["token"]}
    sentence = (f"Two models with a loss of {shown(column(wrong, 'loss'))} nats a reply, at most {max(gaps):.4f} "
                f"apart, have gold reward {shown(column(wrong, 'gold'))} where answers are careless and "
                f"{shown(column(polite, 'gold'))} where manners are merely moved; a person prefers the latter's "
                f"reply {shown([s['preferred'] for s in seeds])} of the time. Two models of gold reward "
                f"{shown([m['gold'] for m in plain])} and {shown([m['gold'] for m in moved])} differ by "
                f"{shown(worse)} nats. On one token the gradient of the loss is the probability of what was not "
                f"said, a wrong answer or a courtesy; at the same loss of {shown(token['loss'])} nats on one "
                f"demonstration gold reward is {shown(token['wrong, gold'])} or "
                f"{shown(token['courtesy, gold'])} as the rest is wrong or polite.")
    return Conclusion(verdict(holds), sentence, numbers, table)


def draw(figure, seeds, size):
    axis = figure.subplots()
    labels = {"careless": "other answers, in up to half of the demonstrations",
              "harmless": "manners moved, in up to all of them"}
    for i, (name, label) in enumerate(labels.items()):
        paths = np.array([[[m["loss"], m["gold"]] for m in s[name]] for s in seeds])       # (seeds, shares, 2)
        for path in paths:
            axis.plot(*path.T, color=COLOURS[i], linewidth=0.8, alpha=0.35)
        axis.plot(*paths.mean(axis=0).T, color=COLOURS[i], marker="o", markersize=4, linewidth=1.8, label=label)
    for s in seeds:
        pair = [s[f"{name}, equal loss"] for name in ("careless", "harmless")]
        axis.plot([m["loss"] for m in pair], [m["gold"] for m in pair], "D:", color=COLOURS[2], markersize=5,
                  linewidth=1.2, label="equal likelihood" if s is seeds[0] else None)
    level(axis, seeds[0]["demonstrators"]["gold"], "the demonstrators")
    axis.axvline(seeds[0]["demonstrators"]["loss"], color=COLOURS[5], linestyle=":", linewidth=1.2,
                 label="least loss there is (entropy)")
    axis.set(xlabel="loss on what demonstrators write, nats a reply (exact)",
             ylabel="gold reward of a reply, expected (exact)", title="The same loss, and other mistakes")
    axis.margins(y=0.1)
    axis.legend(fontsize=8, loc="center right")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES))
