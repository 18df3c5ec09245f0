"""Some tasks that eight demonstrations do not solve, a few gradient steps do

Claim. On harder tasks prompting is not enough; some gradient steps are needed.

Test. The transformer of in_context, pretrained on eight string tasks put as demonstrations, is given three that were
in no document: swap the last two letters (abc>acb), repeat the middle one (abc>bbb), go three letters on (abc>def). By
prompt: k = 0, 1, 2, 4 or 8 demonstrations before the query; 8 are all that its context of 72 tokens holds. By
gradient: N = 8, 32 or 128 labelled words, up to 100 steps of AdamW on batches of at most 32 of them, each a document
of its own without demonstrations; accuracy after 1, 2, 5, .. steps on all 200 held-out words, exact match. Beside it:
the same steps from random weights, the known tasks by prompt, and what the best of the eight known tasks would get.

Refuted. If, on the mean of the three tasks and with any seed, some k reaches 0.5 by prompt, or 100 steps on 128 labels
do not reach 0.5. If the known tasks stay below 0.5 with 8 demonstrations, prompting was not learned and nothing can be
shown here.

Limits. A prompt holds 8 labels, so only N = 8 compares at equal numbers of labels; that more of them do not fit is
part of the claim (context_limit). The model is small and knows eight tasks: what it cannot infer, a model pretrained
on many more may. New tasks are made of the same moves as the known ones, which is why few steps do; random weights
learn them too, from more steps and to less. The gradient steps leave a model for one task.

Source. Brown et al. 2020, arXiv:2005.14165 (where few-shot learning struggles); Liu et al. 2022, arXiv:2205.05638
(finetuning on few examples against prompting, at equal numbers of them).
"""

import sys

from common.experiment import COLOURS, OUTCOMES, Conclusion, curve, level, run, shown, spread, verdict
from common.recipes import recognise_strings

import numpy as np

from minilm.model import Config, Transformer
from minilm.stages.pretraining import pretrain_on_documents
from minilm.stages.train_state import TrainState
from worlds import strings

CONFIG = {"vocab_size": strings.VOCABULARY, "width": 64, "layers": 3, "heads": 4, "context": 72, "key_smear": True}
LABELS = (8, 32, 128)
SHOTS = (0, 1, 2, 4, 8)
AFTER = (0, 1, 2, 5, 10, 20, 50, 100)            # gradient steps
RATE = 3e-3
SIZES = {"quick": {"seeds": 3, "steps": 5, "gradient_steps": 2, "documents": 20},
         "default": {"seeds": 4, "steps": 900, "gradient_steps": 100, "documents": 200}}


def accuracy_after(model, rng, task, labels, steps, words_asked):
    """Accuracy on held-out words along so many steps on `labels` examples of a task, at the numbers of AFTER."""
    words = rng.permutation(strings.every_word(held_out=False))[:labels, None]
    tokens, mask = strings.document(words, task(words))
    held_out = strings.every_word(held_out=True)[:words_asked, None]
    exam, _ = strings.document(held_out, task(held_out))

    def draw(rng, count):
        rows = rng.permutation(labels)[:count]
        return tokens[rows], mask[rows]

    found = [strings.right(model, exam).mean()]
    for step, _ in enumerate(pretrain_on_documents(TrainState(model, rng), draw, steps, 32, RATE), 1):
        if step in AFTER:
            found.append(strings.right(model, exam).mean())
    return found


def measure(row, seed, steps, gradient_steps, documents):
    rng = np.random.default_rng(seed)
    model, _ = row.trained("strings", seed, CONFIG, recognise_strings, steps=steps)

    def by_prompt(*tasks):
        return strings.right(model, strings.draw(rng, documents, tasks, held_out=True)[0]).mean(axis=0)[list(SHOTS)]

    new = strings.NEW_TASKS.values()
    found = {"known": by_prompt(*strings.TASKS.values()), "prompt": [by_prompt(task) for task in new]}
    for labels in LABELS:
        found[f"steps on {labels}"] = [accuracy_after(model.copy(), rng, task, labels, gradient_steps, documents)
                                       for task in new]
    found["random"] = [accuracy_after(Transformer(Config(**CONFIG), rng), rng, task, LABELS[-1], gradient_steps,
                                      documents) for task in new]
    return found


def known_task_at_best():
    """Accuracy of whichever known task comes closest to each new one, a mean over the new ones."""
    words = strings.every_word(held_out=True)
    return np.mean([max((known(words) == task(words)).all(axis=1).mean() for known in strings.TASKS.values())
                    for task in strings.NEW_TASKS.values()])


def conclude(seeds, size):
    means, after = _means(seeds), _after(size)
    few, most = min(20, after[-1]), f"steps on {LABELS[-1]}"
    pretrained = all(s["known"][-1] >= 0.5 for s in means)
    holds = all(s["prompt"].max() < 0.5 <= s[most][-1] for s in means)
    numbers = {f"{of} tasks by prompt, {k} labels": spread(s[name][i] for s in means)
               for of, name in (("new", "prompt"), ("known", "known")) for i, k in enumerate(SHOTS)}
    series = {f"{labels} labels": f"steps on {labels}" for labels in LABELS}
    series[f"{LABELS[-1]} labels, random weights"] = "random"
    numbers |= {f"new tasks, {label}, {n} steps": spread(s[name][i] for s in means)
                for label, name in series.items() for i, n in enumerate(after)}
    table = [["labels", "used by", *strings.NEW_TASKS, "mean"]]

    def line(labels, used, name, i):
        by_task = np.array([np.array(s[name])[:, i] for s in seeds])            # (seeds, tasks)
        table.append([f"{labels}", used, *map(shown, by_task.T), shown(by_task.mean(axis=1))])

    for i, k in enumerate(SHOTS):
        line(k, "prompt", "prompt", i)
    for label, name in series.items():
        for i, n in enumerate(after[1:], 1):
            line(label, f"{n} steps", name, i)

    def reached(name, i):
        return shown([s[name][i] for s in means])

    gradient = [f"with {label} {reached(name, after.index(few))} after {few} steps and {reached(name, -1)} after "
                f"{after[-1]}" for label, name in series.items()]
    sentence = (f"With 8 demonstrations in the prompt the known tasks reach {reached('known', -1)}, the new ones "
                f"{reached('prompt', -1)} (the closest known task would get {known_task_at_best():.2f}); by gradient "
                f"{gradient[-2]}. And {'; '.join([*gradient[:-2], gradient[-1]])}.")
    return Conclusion(verdict(holds) if pretrained else OUTCOMES[2], sentence, numbers, table)


def _means(seeds):
    """Every measure of every seed, averaged over the tasks where it has one line for each."""
    return [{name: np.mean(np.atleast_2d(values), axis=0) for name, values in s.items()} for s in seeds]


def _after(size):
    return [n for n in AFTER if n <= size["gradient_steps"]]


def draw(figure, seeds, size):
    prompt, gradient = figure.subplots(1, 2, sharey=True)
    means, after = _means(seeds), _after(size)
    shots, steps = np.arange(len(SHOTS)), np.arange(len(after))
    curve(prompt, shots, [s["known"] for s in means], "the eight tasks of pretraining", COLOURS[5], "s")
    curve(prompt, shots, [s["prompt"] for s in means], "three new tasks", COLOURS[4])
    prompt.set(title="By prompt, no gradient step", xlabel="demonstrations in the prompt (labels)",
               ylabel="exact match on held-out words", xticks=shots, xticklabels=SHOTS, ylim=(-0.02, 1.04))
    for labels, colour, marker in zip(LABELS, COLOURS, "oD^"):
        curve(gradient, steps, [s[f"steps on {labels}"] for s in means], f"{labels} labels", colour, marker)
    curve(gradient, steps, [s["random"] for s in means], f"{LABELS[-1]} labels, random weights", COLOURS[3], "x")
    gradient.set(title="By gradient: three new tasks", xlabel="gradient steps", xticks=steps, xticklabels=after)
    level(prompt, known_task_at_best(), "closest known task")
    level(gradient, known_task_at_best(), "")
    prompt.legend(loc="upper right", bbox_to_anchor=(1, 0.62))
    gradient.legend(loc="upper left")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, (9.6, 4.2)))
