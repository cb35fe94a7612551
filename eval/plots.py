"""Pictures of a comparison, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from eval.checkpoint import Checkpoint

SMOOTHING = 0.7  # weight of the running mean in a drawn curve; the raw points stay behind it, pale


def draw_learning_curves(checkpoints: Sequence[Checkpoint], file: Path) -> None:
    """Draws training loss over seconds of training, one curve a run; runs without a log are left out.

    Args:
        checkpoints: the runs.
        file: PNG to write.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for number, checkpoint in enumerate(checkpoints):
        points = [(line["seconds"], line["loss"]) for line in checkpoint.log if "loss" in line]
        if not points:
            continue
        seconds, losses = zip(*points, strict=True)
        axes.plot(seconds, losses, color=f"C{number}", alpha=0.2, linewidth=1)
        axes.plot(seconds, smooth(losses), color=f"C{number}", label=checkpoint.name)
    axes.set(xlabel="seconds of training", ylabel="loss on answer tokens", yscale="log", title="Learning curves")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_live_tokens(name: str, counts: Sequence[Sequence[int]], file: Path) -> None:
    """Draws the live visual tokens of each layer: the mean over samples as bars, their range as whiskers.

    Args:
        name: the schedule.
        counts: [layer][sample] visual tokens that the layer ran on.
        file: PNG to write.
    """
    means = [sum(layer) / len(layer) for layer in counts]
    below = [mean - min(layer) for mean, layer in zip(means, counts, strict=True)]
    above = [max(layer) - mean for mean, layer in zip(means, counts, strict=True)]
    figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
    axes.bar(range(len(means)), means, yerr=[below, above], capsize=4, color="C0", ecolor="0.4", width=0.7)
    axes.set(
        xlabel="decoder layer", ylabel="live visual tokens", title=f"{name}: mean and range of {len(counts[0])} prompts"
    )
    axes.set_xticks(range(len(means)))
    axes.set_ylim(0, max(map(max, counts)) * 1.08 + 1)
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def smooth(values: Sequence[float]) -> list[float]:
    """Returns the running mean of `values`, right from the first one on."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1.0
        means.append(total / weight)
    return means
