"""What a demonstration buys, and what comparisons buy for the same money

Claim. Demonstrations are expensive to collect: people write them, where a comparison is a click.

Test. Short replies to 9 questions, each with all its 781 possible replies listed, so that gold reward and the share of
right answers are sums (scripts/lecture/worlds/replies.py). Transformers of 25,632 parameters are instructed on n = 8 to 2,048
demonstrations, from random weights. Against each stands the model instructed on 32 of these demonstrations and then
trained by DPO (beta 0.3) on pairs of its own replies, judged by people who follow gold by the Bradley-Terry law. The
price is an assumption: a demonstration costs as much as c comparisons, c = 1 and c = 4; the 32 demonstrations are paid
for. Demonstrators are human (right answers 73% of the time, polite or rambling as it comes), always right (with the
same manners), or ideal (they write the best reply there is; DPO has nothing to add and is not run).

Refuted. If, with any seed and human demonstrators, DPO on the most pairs does not have more gold reward than
demonstrations alone of the same cost (between two n by interpolation in log n), at either price, each sampled at
temperature 1 or decoded greedily, whichever is better for it.

Limits. What c is, is for whoever pays to say. The result rests on judges who know better than demonstrators do; ideal
demonstrators are the regime in which demonstrations win, at every price. So few questions are soon learned: 2,048
demonstrations show what a demonstration is missing, not what a task is missing. With eight of them the reward is that
of the mistakes among the eight. Greedy decoding came into the rule after a
review, and turns it round: of replies sampled at temperature 1, the rule before, it holds, with every seed. What
comparisons add is in good part sharpening, which greedy decoding has for nothing (dpo.py, too). That a demonstration
is expensive is assumed, not shown: c is. One recipe for all n.

Source. Ouyang et al. 2022, arXiv:2203.02155; Stiennon et al. 2020, arXiv:2009.01325; Rafailov et al. 2023,
arXiv:2305.18290 (DPO).
"""

import sys

from common.experiment import COLOURS, Conclusion, curve, level, run, shown, spread, verdict

import numpy as np

from minilm.generate import generate
from minilm.model import Config, Transformer
from minilm.stages.sft import train_sft
from minilm.stages.dpo import train_dpo
from minilm.stages.train_state import TrainState
from minilm.world.annotators import is_right
from minilm.exact.enumerable import expectation
from worlds.replies import EOS, LONGEST, MODEL, RIGHT, ReplyWorld

FEW = 32
PRICES = (1, 4)
DEMONSTRATORS = ("human", "always right", "ideal")
KINDS = (("demonstrations", "o", "-", "demonstrations alone"),          # and how they are drawn
         ("comparisons", "s", "--", f"{FEW}, then comparisons (DPO)"))
SIZES = {"quick": {"seeds": 3, "demonstrations": (8, FEW), "pairs": (128,), "steps": 2},
         "default": {"seeds": 4, "demonstrations": (8, FEW, 128, 512, 2048), "pairs": (128, 512, 2048), "steps": 200}}


def demonstrate(world, rng, count, who):
    """Prompts and replies, token lists."""
    if who != "ideal":
        return world.demonstrations(rng, count, RIGHT if who == "human" else 1.0)
    p = rng.integers(len(world.prompts), size=count)
    return world.tokens_of(p, world.gold.argmax(axis=1)[p])


def compared(world, policy, rng, count, steps):
    """A copy of the policy after DPO on `count` pairs of its own replies."""
    l = world.log_distributions(policy)
    p, *replies = world.comparisons(l, world.gold, rng, count)
    model, references = policy.copy(), [l[p, y].astype(np.float32) for y in replies]
    for _ in train_dpo(TrainState(model, rng), *world.tokens_of(p, *replies), *references, steps, 64,
                               beta=0.3, learning_rate=1e-3):
        pass
    return model


def measure(row, seed, demonstrations, pairs, steps):
    rng, world = np.random.default_rng(seed), ReplyWorld(words=2)
    right = world.table(lambda question, text, finished: float(is_right(question, text)))
    found = {"best possible": world.gold.max(axis=1).mean()}

    def note(name, model):
        l = world.log_distributions(model)
        for what, table in ("gold", world.gold), ("right", right):
            found.setdefault(f"{name}, {what}", []).append(expectation(l, table).mean())
        own = np.random.default_rng(seed)               # greedy decoding needs no luck: the runs keep theirs
        greedy = generate(model, world.prompts, LONGEST, own, EOS, temperature=0.0).responses()
        found.setdefault(f"{name}, greedy", []).append(world.gold[world.index(world.prompts, greedy)].mean())
    for who in DEMONSTRATORS:
        replies = demonstrate(world, rng, max(demonstrations), who)
        found[f"{who}, of the demonstrations"] = world.gold[world.index(*replies)].mean()
        for n in demonstrations:
            model = Transformer(Config(**MODEL), rng)
            for _ in train_sft(TrainState(model, rng), *(side[:n] for side in replies), steps, 64, 3e-3):
                pass
            note(f"{who}, demonstrations", model)
            if n == FEW and who != "ideal":
                note(f"{who}, comparisons", model)
                for count in pairs:
                    note(f"{who}, comparisons", compared(world, model, rng, count, steps))
        row.say(f"seed {seed}, {who}: gold {np.round(found[f'{who}, demonstrations, gold'], 2)}")
    return found


def cost(size, price, what):
    """Of the points of a curve, in comparisons."""
    if what == "demonstrations":
        return price * np.array(size["demonstrations"])
    return price * FEW + np.array([0, *size["pairs"]])


def at_equal_cost(s, size, who, price, kind="gold"):
    """Gold reward (or "greedy") of demonstrations alone that cost as much as the few and the most comparisons."""
    budget, costs = cost(size, price, "comparisons")[-1], cost(size, price, "demonstrations")
    return np.interp(np.log(budget), np.log(costs), s[f"{who}, demonstrations, {kind}"])


def conclude(seeds, size):
    kinds = ("gold", "greedy")
    holds = all(max(s[f"human, comparisons, {kind}"][-1] for kind in kinds)
                > max(at_equal_cost(s, size, "human", price, kind) for kind in kinds)
                for s in seeds for price in PRICES)
    numbers, prices = {}, [f"cost, c = {price}" for price in PRICES]
    table = [["demonstrators", "bought", *prices, "right answers", "gold reward", "gold reward, greedy"]]
    for who in DEMONSTRATORS:
        for what, bought in ("demonstrations", size["demonstrations"]), ("comparisons", (0, *size["pairs"])):
            for i, n in enumerate(bought if f"{who}, {what}, gold" in seeds[0] else ()):
                name = f"{n} demonstrations" if what == "demonstrations" else f"{FEW} demonstrations, {n} comparisons"
                values = {key: [s[f"{who}, {what}, {key}"][i] for s in seeds] for key in ("right", "gold", "greedy")}
                numbers[f"{who}: gold reward, {name}"] = spread(values["gold"])
                numbers[f"{who}: gold reward of greedy answers, {name}"] = spread(values["greedy"])
                costs = [str(cost(size, price, what)[i]) for price in PRICES]
                table.append([who, name, *costs, *map(shown, values.values())])
    last = {who: [s[f"{who}, comparisons, gold"][-1] for s in seeds] for who in DEMONSTRATORS[:2]}
    alone = {(who, price): [at_equal_cost(s, size, who, price) for s in seeds]
             for who in DEMONSTRATORS for price in PRICES}
    few = [s["ideal, demonstrations, gold"][size["demonstrations"].index(FEW)] for s in seeds]
    greedy = [s["human, comparisons, greedy"][-1] for s in seeds]
    greedy_alone = {price: [at_equal_cost(s, size, "human", price, "greedy") for s in seeds] for price in PRICES}
    first = [s["always right, comparisons, gold"][1] - s["always right, comparisons, gold"][0] for s in seeds]
    above = {who: np.mean(last[who]) - np.mean(alone[who, 1]) for who in last}
    numbers[f"always right: the first {size['pairs'][0]} comparisons add"] = spread(first)
    sentence = (f"With human demonstrators, {FEW} demonstrations and {size['pairs'][-1]:,} comparisons reach gold "
                f"reward {shown(last['human'])}; demonstrations alone, for the same money, "
                f"{shown(alone['human', 1])} if one costs a comparison and {shown(alone['human', 4])} if it costs "
                f"four; decoded greedily {shown(greedy)} against {shown(greedy_alone[1])} and "
                f"{shown(greedy_alone[4])}. "
                f"Demonstrators who are always right: {shown(last['always right'])} against "
                f"{shown(alone['always right', 1])} and {shown(alone['always right', 4])}; what comparisons add goes "
                f"from {above['human']:+.2f} to {above['always right']:+.2f}, and the first {size['pairs'][0]} change "
                f"gold by {', '.join(f'{a:+.2f}' for a in first)} (each seed). Ideal demonstrators bring {FEW} "
                f"demonstrations alone to {shown(few)}, {'more' if min(few) > max(last['human']) else 'not more'} "
                "than all those comparisons of human replies.")
    return Conclusion(verdict(holds), sentence, numbers, table)


def draw(figure, seeds, size):
    axes = figure.subplots(1, 2, sharey=True)
    for axis, price in zip(axes, PRICES):
        for i, who in enumerate(DEMONSTRATORS):
            for what, marker, style, label in KINDS:
                if (name := f"{who}, {what}, gold") in seeds[0]:
                    curve(axis, cost(size, price, what), [s[name] for s in seeds], f"{who}: {label}", COLOURS[i],
                          marker, linestyle=style)
        for what, marker, style, label in KINDS:
            curve(axis, cost(size, price, what), [s[f"human, {what}, greedy"] for s in seeds],
                  f"human, decoded greedily: {label}", COLOURS[4], marker, linestyle=style)
        level(axis, seeds[0]["best possible"], "best possible")
        axis.set(xscale="log", xlabel="cost, in comparisons",
                 title=f"a demonstration costs {price} comparison{'s' * (price > 1)}")
    axes[0].set_ylabel("gold reward of a reply, expected")
    figure.suptitle("What the same money buys, by who demonstrates; replies sampled at temperature 1, but for red")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(8.4, 4.8)))
