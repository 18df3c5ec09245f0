"""New tasks: demonstrations in the prompt, or a few gradient steps

Claim. On harder tasks prompting is not enough; some gradient steps are needed.

Test. The transformer of in_context, pretrained on eight string tasks put as demonstrations, is given three
tasks that were in no document: swap the last two letters (abc>acb), repeat the middle one (abc>bbb), go
three letters on (abc>def). By prompt: k = 0, 1, 2, 4 or 8 demonstrations before the query; 8 are all that
its context of 72 tokens holds. By gradient: N = 8, 32 or 128 labelled words, up to 100 steps of AdamW on
batches of at most 32 of them, each a document of its own without demonstrations; accuracy after 1, 2, 5, ..
steps on all 200 held-out words, exact match. Baselines: the same steps from random weights, the known tasks
by prompt, and the accuracy of the closest of the eight known tasks.

Rule. On the mean of three new tasks, which were in no document of pretraining, no number of demonstrations
in the prompt reaches accuracy 0.5, and 100 gradient steps on 128 labels do. Condition: the known tasks
reach 0.5 with 8 demonstrations; otherwise prompting was not learned and the outcome is undecided.

Limits. A prompt holds 8 labels, so only N = 8 compares at equal numbers of labels; that more labels do not
fit is part of the claim (context_limit). The model is small and knows eight tasks: a model pretrained on
many more may infer the new ones. New tasks are made of the same moves as the known ones, so few steps
suffice; random weights learn them too, from more steps and to a lower accuracy. The gradient steps give a
model for one task.

Source. Brown et al. 2020, arXiv:2005.14165 (where few-shot learning struggles); Liu et al. 2022,
arXiv:2205.05638 (finetuning on few examples against prompting, at equal numbers of them).

Figure. Share of exact answers on held-out words, left against the number of demonstrations in the prompt, for known and
for new tasks; right against the number of gradient steps on new tasks, one line for each number of labels and one from
random weights; dotted: the closest known task.
"""

import sys

from common.experiment import COLOURS, Comparison, Conclusion, curve, level, mean, mean_range, run, spread
from common.recipes import recognise_strings

# isort: split
import numpy as np

from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.train_state import TrainState
from worlds import strings

CONFIG = {"vocab_size": strings.VOCABULARY, "width": 64, "layers": 3, "heads": 4, "context": 72,
          "key_smear": True}
LABELS = (8, 32, 128)
SHOTS = (0, 1, 2, 4, 8)
AFTER = (0, 1, 2, 5, 10, 20, 50, 100)            # gradient steps
RATE = 3e-3
SIZES = {"quick": {"seeds": 3, "steps": 5, "gradient_steps": 2, "documents": 20},
         "default": {"seeds": 6, "steps": 900, "gradient_steps": 100, "documents": 200}}


def accuracy_after(model, rng, task, labels, steps, words_in_test):
    """Accuracy on held-out words at the steps of AFTER, in `steps` steps on `labels` examples of a task."""
    words = rng.permutation(strings.every_word(held_out=False))[:labels, None]
    tokens, mask = strings.document(words, task(words))
    held_out = strings.every_word(held_out=True)[:words_in_test, None]
    exam, _ = strings.document(held_out, task(held_out))

    def draw(rng, count):
        rows = rng.permutation(labels)[:count]
        return tokens[rows], mask[rows]

    accuracies = [strings.right(model, exam).mean()]
    for step, _ in enumerate(pretrain_on_documents(TrainState(model, rng), draw, steps, 32, RATE), 1):
        if step in AFTER:
            accuracies.append(strings.right(model, exam).mean())
    return accuracies


def measure(experiment, seed, steps, gradient_steps, documents):
    rng = np.random.default_rng(seed)
    model, _ = experiment.trained("strings", seed, CONFIG, recognise_strings, steps=steps)

    def by_prompt(*tasks):
        tokens, _ = strings.draw(rng, documents, tasks, held_out=True)
        return strings.right(model, tokens).mean(axis=0)[list(SHOTS)]

    new = strings.NEW_TASKS.values()
    results = {"known": by_prompt(*strings.TASKS.values()), "prompt": [by_prompt(task) for task in new]}
    for labels in LABELS:
        results[f"steps on {labels}"] = [
            accuracy_after(model.copy(), rng, task, labels, gradient_steps, documents) for task in new]
    results["random"] = []
    for task in new:
        fresh = experiment.transformer(rng, **CONFIG)
        results["random"].append(accuracy_after(fresh, rng, task, LABELS[-1], gradient_steps, documents))
    return results


def known_task_at_best():
    """Accuracy of the known task that is closest to each new one, a mean over the new ones."""
    words = strings.every_word(held_out=True)
    return np.mean([max((known(words) == task(words)).all(axis=1).mean() for known in strings.TASKS.values())
                    for task in strings.NEW_TASKS.values()])


def conclude(seeds, size):
    means = _means(seeds)
    after = _after(size)
    most = f"steps on {LABELS[-1]}"
    condition = Comparison("known tasks, 8 demonstrations: accuracy", [s["known"][-1] for s in means],
                           above=0.5)
    comparisons = [Comparison("new tasks by prompt: best accuracy of all numbers of demonstrations",
                              [s["prompt"].max() for s in means], below=0.5),
                   Comparison(f"new tasks, {after[-1]} gradient steps on {LABELS[-1]} labels: accuracy",
                              [s[most][-1] for s in means], above=0.5)]
    numbers = {f"{of} tasks by prompt, {k} labels": spread(s[name][i] for s in means)
               for of, name in (("new", "prompt"), ("known", "known")) for i, k in enumerate(SHOTS)}
    series = {f"{labels} labels": f"steps on {labels}" for labels in LABELS}
    series[f"{LABELS[-1]} labels, random weights"] = "random"
    numbers |= {f"new tasks, {label}, {n} steps": spread(s[name][i] for s in means)
                for label, name in series.items() for i, n in enumerate(after)}
    table = [["labels", "used by", *strings.NEW_TASKS, "mean"]]

    def line(labels, used, name, i):
        by_task = np.array([np.array(s[name])[:, i] for s in seeds])            # (seeds, tasks)
        table.append([f"{labels}", used, *map(mean_range, by_task.T), mean_range(by_task.mean(axis=1))])

    for i, k in enumerate(SHOTS):
        line(k, "prompt", "prompt", i)
    for label, name in series.items():
        for i, n in enumerate(after[1:], 1):
            line(label, f"{n} steps", name, i)

    last = {name: mean([s[name][-1] for s in means]) for name in ("prompt", "known", most)}
    words = (f"With 8 demonstrations in the prompt the new tasks reach accuracy {last['prompt']} (known "
             f"tasks {last['known']}); {after[-1]} gradient steps on {LABELS[-1]} labels reach {last[most]}.")
    return Conclusion(comparisons, words, numbers, table, conditions=[condition])


def _means(seeds):
    """Every measurement of every seed, averaged over the tasks where it has one line per task."""
    return [{name: np.mean(np.atleast_2d(values), axis=0) for name, values in s.items()} for s in seeds]


def _after(size):
    return [n for n in AFTER if n <= size["gradient_steps"]]


def draw(figure, seeds, size):
    prompt, gradient = figure.subplots(1, 2, sharey=True)
    means = _means(seeds)
    after = _after(size)
    shots = np.arange(len(SHOTS))
    steps = np.arange(len(after))
    curve(prompt, shots, [s["known"] for s in means], "the eight tasks of pretraining", COLOURS[5], "s")
    curve(prompt, shots, [s["prompt"] for s in means], "three new tasks", COLOURS[4])
    prompt.set(title="By prompt, no gradient step", xlabel="demonstrations in the prompt (labels)",
               ylabel="exact match on held-out words", xticks=shots, xticklabels=SHOTS, ylim=(-0.02, 1.04))
    for labels, colour, marker in zip(LABELS, COLOURS, "oD^"):
        curve(gradient, steps, [s[f"steps on {labels}"] for s in means], f"{labels} labels", colour, marker)
    random = [s["random"] for s in means]
    curve(gradient, steps, random, f"{LABELS[-1]} labels, random weights", COLOURS[3], "x")
    gradient.set(title="By gradient: three new tasks", xlabel="gradient steps", xticks=steps,
                 xticklabels=after)
    level(prompt, known_task_at_best(), "closest known task")
    level(gradient, known_task_at_best(), "")
    prompt.legend(loc="upper right", bbox_to_anchor=(1, 0.62))
    gradient.legend(loc="upper left")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, (9.6, 4.2)))
