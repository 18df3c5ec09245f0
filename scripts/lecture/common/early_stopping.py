"""Stop where it is best: train to the end of a stage, and keep the weights that did best on data held out."""

import numpy as np


def keep_best(stage, model, held_out_loss, every=20):
    """Run a stage that trains `model`; it ends with the weights it had when held_out_loss() was least.

    stage          a generator of metrics, one a step, as the stages are
    held_out_loss  asked every so many steps and after the last one, as a float
    Returns that least loss, and the step it was met at (0 for a stage without steps, which changes nothing).
    """
    least, best, step, kept = np.inf, 0, 0, {}

    def look():
        nonlocal least, best
        if (loss := held_out_loss()) < least:
            least, best = loss, step
            kept.update({name: p.data.copy() for name, p in model.parameters().items()})

    for step, _ in enumerate(stage, 1):
        if step % every == 0:
            look()
    if step % every:
        look()
    for name, p in model.parameters().items():
        p.data[...] = kept.get(name, p.data)
    return least, best
