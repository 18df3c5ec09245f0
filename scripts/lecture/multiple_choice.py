"""Multiple choice, and memorised facts

Claim. Instruction-finetuned models are evaluated on many subjects by multiple choice, as MMLU does; such a
test measures largely facts memorised in pretraining.

Test. An invented encyclopedia: facts of four subjects, each stated 1, 4, 16, 64 or 256 times in one pass of
pretraining, in one template, in three, as the very question of the test, or in all of these. Of two further
subjects one follows from the other (a city determines the country); a quarter of the entities' countries is
never stated. Every second step trains on letters: which letter a given value has, eight times per document,
and in the second half also exams by letter about half of the entities. Questions have four choices of one
to three tokens, scored by the log-likelihood of the choice, by the same per token, and by the letter. All
questions are about the other half of the entities, because an exam states a fact once more (countries,
which no exam asks, about all). Baseline: the question with the entity struck out. Chance is 1/4; 1 is
possible for stated facts, and for countries by the rule; questions with the city in the prompt show whether
the rule was learned.

Rule. Scored by log-likelihood, questions whose text was in the corpus 64 times or more are answered better,
by at least 0.3, than questions that were there once; and countries that follow from the city but were never
stated are answered worse, by at least 0.2, than countries that were stated.

Limits. Facts are random, so only memory can answer the plain ones: that they are memorised is built in; the
number of exposures and wordings that it takes is measured. One rule of inference and a small transformer,
which learns the rule in part only, as questions with the city in the prompt show: the experiment does not
tell how much a large model infers. By letter, as MMLU asks, the claim could not be tested: facts stated
often are answered hardly above chance; so after a review the rule names the log-likelihood, from which it
was computed before too. By letter the value must be recalled and its letter found in one step. The meaning
of the letters is learned by such drills (a third as many, among exams from the start, were too few); the
rest may take more exams or layers, which was not tried. Keys are smeared (Config.key_smear, not in Llama),
for the letters.

Source. Hendrycks et al. 2020, arXiv:2009.03300 (MMLU); Brown et al. 2020, arXiv:2005.14165 (likelihood per
token of a choice); Allen-Zhu and Li 2023, arXiv:2309.14316 (wordings).

Figure. Left: accuracy against the number of times that a fact was stated in training (log axis), one line for each form
of the statement and of the question; right: accuracy by the way of scoring and for countries stated or inferred, one
point per seed; dotted: chance.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread

# isort: split
import numpy as np

from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.train_state import TrainState
from minilm.tensor import no_grad
from worlds.encyclopedia import (
    CHOICES,
    CITY,
    COUNTRY,
    END,
    EXPOSURES,
    FILLERS,
    FIRST_ENTITY,
    LETTERS,
    PLAIN,
    QUESTION,
    WORDINGS,
    Encyclopedia,
    padded,
)

MODEL = {"width": 64, "layers": 3, "heads": 4, "context": 128, "key_smear": True}
SIZES = {"quick": {"seeds": 3, "entities": 48, "documents": 256, "batch": 64, "repeats": 1},
         "default": {"seeds": 6, "entities": 96, "documents": None, "batch": 64, "repeats": 4}}
# How a fact was stated -> how it is asked: a place in WORDINGS, a form of sentence.
ASKED = {"question -> question": (2, QUESTION), "template -> same template": (0, 0),
         "all forms -> question": (3, QUESTION), "3 templates -> question": (1, QUESTION),
         "1 template -> question": (0, QUESTION), "question -> template": (2, 0)}
INFERENCE = ("stated", "never stated", "never stated, city in the prompt")


def measure(experiment, seed, entities, documents, batch, repeats):
    rng = np.random.default_rng(seed)
    world = Encyclopedia(rng, entities)
    model = experiment.transformer(rng, vocab_size=world.vocabulary, **MODEL)

    examined = range(0, entities, 2)
    others = range(1, entities, 2)

    def cell(exposures, wordings=None, of=others):
        return [(e, s) for e in of for s in PLAIN
                if world.exposures[e, s] == exposures and (wordings is None or world.wording[e, s] in wordings)]

    known = [fact for n in EXPOSURES[-2:] for fact in cell(n, of=examined)]
    tokens, mask = (array[:documents] for array in world.corpus(rng))       # None: all of it
    place = iter(range(0, len(tokens), batch))
    steps = 2 * -(-len(tokens) // batch) - 1

    def some_known(count):
        return [known[i] for i in rng.integers(len(known), size=count)]

    def drills(count):
        return [world.drill(rng, 8) for _ in range(count)]

    def lessons(rng, count):
        """Alternately the corpus, in order, and letters: drills alone at first, then half of them exams."""
        if state.step % 2 == 0:
            part = slice(start := next(place), start + count)
            return tokens[part], mask[part]
        exams = count // 4 if state.step > steps // 2 else 0
        examined_now = [world.exam(rng, some_known(3)) for _ in range(exams)]
        return padded(*zip(*examined_now, *drills(count // 2 - exams)))

    state = TrainState(model, rng)
    for metrics in pretrain_on_documents(state, lessons, steps, batch):
        if state.step % 100 == 0:
            experiment.say(f"seed {seed}, step {state.step} of {steps}: loss {metrics['loss']:.2f}")

    def right(facts, form=QUESTION, premise=False, blind=False):
        """Accuracy over the facts: by the likelihood of a choice, and by the likelihood per token."""
        accuracies = []
        for _ in range(repeats):
            openings = []
            names = []
            places = []
            for e, s in facts:
                given = world.sentence(rng, e, CITY, 0) if premise else []
                opening = [*given, *world.opening(rng, e, s, form)]
                choices, place = world.choices(rng, e, s)
                if blind:
                    opening = [FILLERS[0] if token >= FIRST_ENTITY else token for token in opening]
                openings += [opening] * CHOICES
                names += [[*world.names[s][value], END] for value in choices]
                places.append(place)
            rows, counted = padded([o + n for o, n in zip(openings, names)],
                                   [[0] * len(o) + [1] * len(n) for o, n in zip(openings, names)])
            with no_grad():
                scores = (model.log_probs(rows).data * counted[:, 1:]).sum(axis=1).reshape(-1, CHOICES)
            lengths = counted.sum(axis=1).reshape(-1, CHOICES)
            accuracies.append([np.mean(s.argmax(axis=1) == places) for s in (scores, scores / lengths)])
        return np.mean(accuracies, axis=0)

    def by_letter(exams):
        """The share of exams whose last letter is the likeliest of the four."""
        tokens, mask = padded(*zip(*exams))
        rows = np.arange(len(tokens))
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        with no_grad():
            logits = model(tokens).data[rows, last - 1][:, LETTERS]
        return np.mean(np.array(LETTERS)[logits.argmax(axis=1)] == tokens[rows, last])

    def after_two(facts):
        return [world.exam(rng, [*some_known(2), fact]) for fact in facts]

    stated = [(e, COUNTRY) for e in range(entities) if world.exposures[e, COUNTRY]]
    inferred = [(e, COUNTRY) for e in world.inferred]
    return {**{name: [right(cell(n, [wording]), form) for n in EXPOSURES]
               for name, (wording, form) in ASKED.items()},
            "all": [right(cell(n)) for n in EXPOSURES],
            "entity struck out": right([fact for n in EXPOSURES for fact in cell(n)], blind=True),
            "countries": [right(stated), right(inferred), right(inferred, premise=True)],
            "by letter": [by_letter(after_two(cell(n))) for n in EXPOSURES],
            "by letter, examined": by_letter(after_two(known)), "letters alone": by_letter(drills(100))}


def conclude(seeds, size):
    def of(name, i, score=0):
        return [s[name][i][score] for s in seeds]

    def often(name, score=0):
        return np.mean([of(name, 3, score), of(name, 4, score)], axis=0)

    text = "question -> question"
    times = range(len(EXPOSURES))
    once = of(text, 0)
    stated, inferred, _ = (of("countries", i) for i in range(3))
    comparisons = [Comparison("questions stated 64 or 256 times, minus those stated once (accuracy)",
                              often(text) - once, above=0.3),
                   Comparison("countries stated, minus those that only follow from the city (accuracy)",
                              np.subtract(stated, inferred), above=0.2)]
    letters = [[s["by letter"][i] for s in seeds] for i in times]
    examined, drilled, blind = ([np.ravel(s[name])[0] for s in seeds]
                                for name in ("by letter, examined", "letters alone", "entity struck out"))
    numbers = {f"{name}, stated {EXPOSURES[i]} times": spread(of(name, i))
               for name in (*ASKED, "all") for i in times}
    numbers |= {f"all, per token, stated {EXPOSURES[i]} times": spread(of("all", i, 1)) for i in times}
    numbers |= {f"all, by letter, stated {EXPOSURES[i]} times": spread(letters[i]) for i in times}
    numbers |= {f"country {name}": spread(of("countries", i)) for i, name in enumerate(INFERENCE)}
    numbers |= {"by letter, examined": spread(examined), "letter of a given value": spread(drilled),
                "entity struck out": spread(blind)}
    table = [["stated -> asked", *(f"{n} times" for n in EXPOSURES)]]
    table += [[name, *(mean_range(of(name, i)) for i in times)] for name in (*ASKED, "all")]
    table += [["all, per token", *(mean_range(of("all", i, 1)) for i in times)],
              ["all, by letter", *map(mean_range, letters)]]
    table += [[f"country {name}", *[""] * 3, mean_range(of("countries", i)), ""]
              for i, name in enumerate(INFERENCE)]
    words = (f"Questions whose text was in the corpus once are answered with accuracy {mean(once)} (chance "
             f"0.25), 64 or 256 times with {mean(often(text))}. Countries that follow from the city but were never "
             f"stated: "
             f"{mean(inferred)}.")
    return Conclusion(comparisons, words, numbers, table)


def draw(figure, seeds, size):
    stated, ways = figure.subplots(1, 2, width_ratios=(1.4, 1))
    for (name, (wording, form)), colour in zip(ASKED.items(), COLOURS):
        known = form in list(WORDINGS.values())[wording]
        curve(stated, EXPOSURES, [[x[0] for x in s[name]] for s in seeds], name.replace("->", "\u2192"),
              colour, marker="o" if known else "s", linestyle="-" if known else "--")
    stated.set(xscale="log", title="How a fact was stated \u2192 how it is asked", ylim=(0, 1.05),
               xlabel="times that the fact was stated in training", ylabel="accuracy")
    stated.set_xticks(EXPOSURES, [str(n) for n in EXPOSURES])
    stated.minorticks_off()
    level(stated, 0.25, "chance")
    figure.legend(*stated.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8)
    rows = [("all facts stated \u2265 64 times:\nby log-likelihood",
             lambda s: np.mean([x[0] for x in s["all"][-2:]])),
            ("per token", lambda s: np.mean([x[1] for x in s["all"][-2:]])),
            ("by letter", lambda s: np.mean(s["by letter"][-2:])),
            ("letter of a given value", lambda s: s["letters alone"]),
            ("country, stated 64 times", lambda s: s["countries"][0][0]),
            ("country that follows,\nnever stated", lambda s: s["countries"][1][0]),
            ("the same,\ncity in the prompt", lambda s: s["countries"][2][0])]
    for y, (_, value) in enumerate(rows):
        values = [value(s) for s in seeds]
        ways.plot(values, [y] * len(values), "o", color=COLOURS[0], alpha=0.4, markersize=5,
                  markeredgewidth=0)
        ways.plot(np.mean(values), y, "|", color=COLOURS[0], markersize=14, markeredgewidth=2)
    ways.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    ways.invert_yaxis()
    ways.axvline(0.25, color=COLOURS[-1], linestyle=":", linewidth=1.2)
    ways.set(xlim=(0, 1.05), title="Ways of scoring; inference", xlabel="accuracy; dotted: chance")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, (9.0, 4.6)))
