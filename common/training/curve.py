"""The picture of a run's loss, redrawn while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import files

SMOOTHING = 0.9  # of the running mean


def draw(folder: Path) -> None:
    """training_loss.png: the loss of each logged step, its running mean, and the validation loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = files.read_jsonl(folder / "trainer_log.jsonl")
    steps, losses = [r["step"] for r in records], [r["loss"] - r.get("router_loss", 0.0) for r in records]
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="loss of a logged step")
    axes.plot(steps, smoothed(losses), color="tab:blue", label=f"running mean ({SMOOTHING})")
    held = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="tab:orange", label="validation loss")
    axes.set(xlabel="optimizer step", ylabel="cross entropy (nats per supervised token)", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")  # "best" may take seconds, and then warns
    figure.tight_layout()
    draft = folder / "training_loss.part.png"
    figure.savefig(draft)
    pyplot.close(figure)
    draft.replace(folder / "training_loss.png")  # an open viewer never sees half of it


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential running mean, corrected for its start."""
    mean = 0.0
    weight = 0.0
    found = []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        found.append(mean / weight)
    return found
