"""The figure of align.py: what the training steps measured."""

from pathlib import Path

from support.figures import curve, pyplot, save, widen

PANELS = {"sft": (("loss", "nats per response token"),),
          "reward": (("loss", "loss (log 2: no preference)"), ("accuracy", "pairs in the right order")),
          "dpo": (("loss", "loss (log 2 at the start)"), ("rewards/margins", "margin: β δ"),
                  ("rewards/accuracies", "pairs with a margin above 0")),
          "rlhf": (("reward", "reward"), ("kl_sequence", "KL to the base (nats per response)"))}


def figure(metrics: list[dict], stage: str, path: Path) -> None:
    """One panel for each metric of PANELS, at each step."""
    plt = pyplot()
    panels = PANELS[stage]
    drawn, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.0), layout="constrained", squeeze=False)
    for axis, (name, label) in zip(axes[0], panels):
        values = [line[name] for line in metrics]
        curve(axis, [line["step"] for line in metrics], values)
        axis.set(xlabel="step", ylabel=label, title=f"{stage}: {name}")
        widen(axis, "y", values)
    save(drawn, path)
    plt.close(drawn)
