"""Gold reward for the same money: demonstrations alone, or a few of them and comparisons

Claim. Demonstrations are expensive to collect: people write them, where a comparison is a click.

Test. Short replies to 9 questions, each with all its 781 possible replies listed, so that gold reward and
the share of right answers are sums (scripts/lecture/worlds/replies.py). Transformers of 25,632 parameters
are finetuned on n = 8 to 2,048 demonstrations, from random weights. The rival is the model finetuned on 32
of these demonstrations and then trained by DPO (beta 0.3) on pairs of its own replies, judged by people who
follow the gold reward by the Bradley-Terry model. The price is an assumption: a demonstration costs as much
as c comparisons, c = 1 and c = 4; the 32 demonstrations are counted. Demonstrators are human (right answers
73% of the time, polite or rambling at random), always right (with the same manners), or ideal (they write
the best reply there is; DPO can add nothing and is not run). There are more seeds for human
demonstrators, because the rule is about them.

Rule. With human demonstrators, and with the better of greedy decoding and sampling for each side, 32
demonstrations and then DPO on 2,048 comparisons bring more gold reward than demonstrations alone of the
same total cost, if a demonstration costs as much as one comparison; the same holds if it costs as much as
four comparisons. Sampling is at temperature 1. Demonstrations alone at that cost are interpolated in log n.

Limits. The true price is for the payer to say. The result depends on judges who know better than
demonstrators do; with ideal demonstrators, demonstrations win at every price. So few questions are soon
learned: 2,048 demonstrations show the faults of each demonstration, and hardly a shortage of them. With
eight of them the reward is dominated by the mistakes among the eight. Greedy decoding came into the rule
after a review, and reverses the outcome: with replies sampled at temperature 1, the rule before,
comparisons are ahead with every seed. Much of the gain from comparisons is sharpening, which greedy
decoding has without any label (dpo.py, too). That a demonstration is expensive is assumed (c), not
measured. One recipe for all n. With 24 seeds the interval ended just below 0, and with float64 just above; then the
number of seeds was doubled. Such a second look makes a wrong "not shown" a little more probable.

Source. Ouyang et al. 2022, arXiv:2203.02155; Stiennon et al. 2020, arXiv:2009.01325; Rafailov et al. 2023,
arXiv:2305.18290 (DPO).

Figure. Expected gold reward of a reply against the cost in comparisons (log axis), in two panels where a demonstration
costs one and four comparisons; one colour for each demonstrator; solid: demonstrations alone; dashed: 32
demonstrations, then comparisons; dotted: the best possible reward.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread

# isort: split
import numpy as np

from minilm.exact.enumerable import expectation
from minilm.generate import generate
from minilm.stages.dpo import train_dpo
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from minilm.world.annotators import is_right
from worlds.replies import EOS, LONGEST, MODEL, RIGHT, ReplyWorld

FEW = 32
PRICES = (1, 4)
DEMONSTRATORS = ("human", "always right", "ideal")
DECODINGS = ("gold", "greedy")          # gold reward: of replies sampled at temperature 1, and of greedy ones
KINDS = (("demonstrations", "o", "-", "demonstrations alone"),          # with marker and line of the figure
         ("comparisons", "s", "--", f"{FEW}, then comparisons (DPO)"))
SIZES = {"quick": {"seeds": 3, "other_seeds": 2, "demonstrations": (8, FEW), "pairs": (128,), "steps": 2},
         "default": {"seeds": 48, "other_seeds": 12, "demonstrations": (8, FEW, 128, 512, 2048),
                     "pairs": (128, 512, 2048), "steps": 200}}


def demonstrate(world, rng, count, who):
    """Prompts and replies, token lists."""
    if who != "ideal":
        return world.demonstrations(rng, count, RIGHT if who == "human" else 1.0)
    p = rng.integers(len(world.prompts), size=count)
    return world.tokens_of(p, world.gold.argmax(axis=1)[p])


def compared(world, policy, rng, count, steps):
    """A copy of the policy after DPO on `count` pairs of its own replies."""
    log_pi = world.log_distributions(policy)
    p, *replies = world.comparisons(log_pi, world.gold, rng, count)
    model = policy.copy()
    references = [log_pi[p, y].astype(model.dtype) for y in replies]
    for _ in train_dpo(TrainState(model, rng), *world.tokens_of(p, *replies), *references, steps, 64,
                       beta=0.3, learning_rate=1e-3):
        pass
    return model


def measure(experiment, seed, other_seeds, demonstrations, pairs, steps):
    rng = np.random.default_rng(seed)
    world = ReplyWorld(words=2)
    right = world.table(lambda question, text, finished: float(is_right(question, text)))
    results = {"best possible": world.gold.max(axis=1).mean()}

    def note(name, model):
        log_pi = world.log_distributions(model)
        for what, table in ("gold", world.gold), ("right", right):
            results.setdefault(f"{name}, {what}", []).append(expectation(log_pi, table).mean())
        unused = np.random.default_rng(seed)            # greedy decoding draws nothing; rng stays as it is
        greedy = generate(model, world.prompts, LONGEST, unused, EOS, temperature=0.0).responses()
        reached = world.gold[world.index(world.prompts, greedy)]
        results.setdefault(f"{name}, greedy", []).append(reached.mean())
    for who in DEMONSTRATORS if seed < other_seeds else DEMONSTRATORS[:1]:
        replies = demonstrate(world, rng, max(demonstrations), who)
        results[f"{who}, of the demonstrations"] = world.gold[world.index(*replies)].mean()
        for n in demonstrations:
            model = experiment.transformer(rng, **MODEL)
            for _ in train_sft(TrainState(model, rng), *(side[:n] for side in replies), steps, 64, 3e-3):
                pass
            note(f"{who}, demonstrations", model)
            if n == FEW and who != "ideal":
                note(f"{who}, comparisons", model)
                for count in pairs:
                    note(f"{who}, comparisons", compared(world, model, rng, count, steps))
        experiment.say(f"seed {seed}, {who}: gold {np.round(results[f'{who}, demonstrations, gold'], 2)}")
    return results


def cost(size, price, what):
    """The cost of every point of a curve, in comparisons."""
    if what == "demonstrations":
        return price * np.array(size["demonstrations"])
    return price * FEW + np.array([0, *size["pairs"]])


def at_equal_cost(s, size, who, price, decoding="gold"):
    """Gold reward of demonstrations alone at the cost of the few demonstrations and the most comparisons."""
    budget = cost(size, price, "comparisons")[-1]
    costs = cost(size, price, "demonstrations")
    return np.interp(np.log(budget), np.log(costs), s[f"{who}, demonstrations, {decoding}"])


def conclude(seeds, size):
    with_comparisons = np.array([max(s[f"human, comparisons, {decoding}"][-1] for decoding in DECODINGS)
                                 for s in seeds])
    alone = {price: np.array([max(at_equal_cost(s, size, "human", price, decoding) for decoding in DECODINGS)
                              for s in seeds]) for price in PRICES}
    comparisons = [Comparison(f"lead of comparisons if a demonstration costs {price} (gold reward)",
                              with_comparisons - alone[price], above=0) for price in PRICES]
    numbers = {}
    prices = [f"cost, c = {price}" for price in PRICES]
    table = [["demonstrators", "training data", *prices, "right answers", "gold reward",
              "gold reward, greedy"]]
    for who in DEMONSTRATORS:
        of_it = [s for s in seeds if f"{who}, of the demonstrations" in s]
        for what, bought in ("demonstrations", size["demonstrations"]), ("comparisons", (0, *size["pairs"])):
            for i, n in enumerate(bought if f"{who}, {what}, gold" in seeds[0] else ()):
                name = f"{n} demonstrations"
                if what == "comparisons":
                    name = f"{FEW} demonstrations, {n} comparisons"
                values = {key: [s[f"{who}, {what}, {key}"][i] for s in of_it] for key in ("right", "gold", "greedy")}
                numbers[f"{who}: gold reward, {name}"] = spread(values["gold"])
                numbers[f"{who}: gold reward of greedy answers, {name}"] = spread(values["greedy"])
                costs = [str(cost(size, price, what)[i]) for price in PRICES]
                table.append([who, name, *costs, *map(mean_range, values.values())])
    sampled = [s["human, comparisons, gold"][-1] for s in seeds]
    sampled_alone = [at_equal_cost(s, size, "human", 4) for s in seeds]
    words = (f"At equal cost, each with its better decoding, comparisons have gold reward {mean(with_comparisons)}; "
             f"demonstrations alone have {mean(alone[1])} if one costs as much as one comparison, and {mean(alone[4])} "
             "if it costs as much as four. At that price and sampled at temperature 1, comparisons lead by "
             f"{np.mean(sampled) - np.mean(sampled_alone):.2f}.")
    legend = f"Human demonstrators: {len(seeds)} seeds; the others: the first {min(len(seeds), size['other_seeds'])}."
    return Conclusion(comparisons, words, numbers, table, legend=legend)


def draw(figure, seeds, size):
    axes = figure.subplots(1, 2, sharey=True)
    for axis, price in zip(axes, PRICES):
        for i, who in enumerate(DEMONSTRATORS):
            for what, marker, style, label in KINDS:
                if (name := f"{who}, {what}, gold") in seeds[0]:
                    curve(axis, cost(size, price, what), [s[name] for s in seeds if name in s], f"{who}: {label}",
                          COLOURS[i], marker, linestyle=style)
        for what, marker, style, label in KINDS:
            curve(axis, cost(size, price, what), [s[f"human, {what}, greedy"] for s in seeds],
                  f"human, decoded greedily: {label}", COLOURS[4], marker, linestyle=style)
        level(axis, seeds[0]["best possible"], "best possible")
        axis.set(xscale="log", xlabel="cost, in comparisons",
                 title=f"a demonstration costs {price} comparison{'s' * (price > 1)}")
    axes[0].set_ylabel("expected gold reward of a reply")
    figure.suptitle("Gold reward for the same money; replies sampled at temperature 1 (red: greedy)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(8.4, 4.8)))
