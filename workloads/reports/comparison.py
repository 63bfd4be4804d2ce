"""Draws a comparison of pretraining runs (`draw_comparison`): loss over images, and nearest neighbours over computing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCurves:
    """The curves of one run."""

    name: str
    loss: Sequence[tuple[float, float]]  # (images, loss as a share of its first value)
    accuracy: Sequence[
        tuple[float, float, float, float]
    ]  # (FLOPs, value, low, high): kNN with its 95 % interval, 0 to 1


def draw_comparison(runs: Sequence[RunCurves], baselines: Mapping[str, float], target: Path) -> None:
    """Write a PNG with the loss of `runs` on the left and their kNN accuracy on the right.

    Args:
        baselines: name → kNN accuracy, 0 to 1, drawn as a horizontal line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        colour = f"C{number}"
        images, losses = zip(*run.loss, strict=True)
        left.plot(images, losses, color=colour, label=run.name)
        flops, value, low, high = zip(*run.accuracy, strict=True)
        x = [one / 1e12 for one in flops]
        right.plot(x, [100 * one for one in value], marker="o", markersize=4, color=colour, label=run.name)
        right.fill_between(x, [100 * one for one in low], [100 * one for one in high], color=colour, alpha=0.1)
    for (name, accuracy), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        right.axhline(100 * accuracy, color="0.5", linestyle=style, label=name)
    left.set(
        xlabel="images",
        ylabel="loss, as a share of its first value",
        title="Training loss (losses differ: compare the shapes only)",
    )
    right.set(
        xlabel="TFLOPs spent on training",
        ylabel="kNN accuracy, mean over classes, %",
        title="Classification by frozen features (bands: 95 %)",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
