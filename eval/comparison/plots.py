"""Pictures of runs and comparisons, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from eval.checkpoint import Checkpoint

matplotlib.rcParams["text.parse_math"] = False  # a `$` in the name of a run, a task or a file is a `$`
_MARKS = "osD^vPX*"  # one for each run
SMOOTHING = 0.7  # weight of the running mean in a drawn curve; the raw points stay behind it, pale


@contextmanager
def plot(file: Path, size: tuple[float, float] = (7.5, 4.5), **settings: Any) -> Iterator[Any]:
    """Yields the axes of a picture with `settings` (labels, limits), and writes it as PNG."""
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    yield axes
    axes.set(**settings)  # after what is drawn: a limit that is None follows it
    figure.savefig(file, dpi=150)
    plt.close(figure)


def set_log_scale(axes: Any) -> None:
    """Makes the y axis logarithmic with plain numbers: its usual formulas are off (`text.parse_math`)."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_learning_curves(checkpoints: Mapping[str, Checkpoint], file: Path) -> None:
    """Draws training loss over seconds of training, one curve a run, and validation loss as dots, to a PNG file."""
    with plot(file, xlabel="seconds of training", ylabel="loss on answer tokens", title="Learning curves") as axes:
        for number, (name, checkpoint) in enumerate(checkpoints.items()):
            points = [(line["seconds"], line["loss"]) for line in checkpoint.log if "loss" in line]
            if not points:
                continue
            seconds, losses = zip(*points, strict=True)
            axes.plot(seconds, losses, color=f"C{number}", alpha=0.2, linewidth=1)
            axes.plot(seconds, smooth(losses), color=f"C{number}", label=name)
            held_out = [(line["seconds"], line["eval_loss"]) for line in checkpoint.log if "eval_loss" in line]
            if held_out:
                axes.plot(*zip(*held_out, strict=True), f"C{number}o--", markersize=4, label=f"{name}, validation")
        set_log_scale(axes)
        axes.grid(alpha=0.3, which="both")
        axes.legend()


@dataclass(frozen=True)
class Point:
    """One row in a plot of score against cost: `error` is the score's standard error, None where there is none."""

    run: str
    schedule: str
    cost: float
    score: float
    error: float | None


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other beats in both cost and score, from the cheapest to the dearest."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.score)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def draw_scores(points: Sequence[Point], file: Path, *, cost: str, score: str, floors: Mapping[str, float]) -> None:
    """Draws score against cost, a mark for each run, a colour for each schedule, with the Pareto front as a line.

    `cost` and `score` are what the axes say; `floors`, scores of rows that look at no image, are marked beside them.
    """
    runs = list(dict.fromkeys(point.run for point in points))
    schedules = list(dict.fromkeys(point.schedule for point in points))
    # all points with their errors, and little more
    low = min(point.score - (point.error or 0) for point in points)
    high = max(point.score + (point.error or 0) for point in points)
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin
    with plot(file, (7, 5.4), xlabel=cost, ylabel=score, ylim=(low, high)) as axes:
        costs, scores = zip(*((point.cost, point.score) for point in pareto_front(points)), strict=True)
        line = {"color": "0.6", "linestyle": "--", "zorder": 1, "label": "Pareto front"}
        axes.step(costs, scores, where="post", **line)
        for point in points:
            mark, colour = _MARKS[runs.index(point.run) % len(_MARKS)], _colour(schedules.index(point.schedule))
            axes.errorbar(point.cost, point.score, yerr=point.error, fmt=mark, color=colour, markersize=7, capsize=3)
        for number, run in enumerate(runs):
            axes.plot([], [], _MARKS[number % len(_MARKS)], color="0.3", label=run)
        for number, schedule in enumerate(schedules):
            axes.plot([], [], "_", color=_colour(number), markersize=12, markeredgewidth=4, label=schedule)
        _mark_floors(axes, floors, low, high)
        axes.grid(alpha=0.3)
        axes.figure.legend(loc="outside lower center", fontsize="small", frameon=False, ncols=4)


def _colour(number: int) -> Any:
    """Returns one of 20 colours that differ, the strong ones first."""
    return plt.get_cmap("tab20")(2 * number % 20 + number // 10 % 2)


def _mark_floors(axes: Any, floors: Mapping[str, float], low: float, high: float) -> None:
    """Marks scores that need no image beside the score axis: at their height, or at its end with an arrow beyond it."""
    below = 0
    for name, value in sorted(floors.items(), key=lambda floor: floor[1]):
        text, height = f"{name} {value:.1f}", (value - low) / (high - low)
        if 0 <= height <= 1:
            axes.axhline(value, color="0.75", linewidth=1, zorder=0)
        else:
            text += " ↓" if height < 0 else " ↑"
            height, below = (0.05 * below if height < 0 else 1.0), below + (height < 0)
        place = {"xytext": (4, 0), "xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(text, (1.0, height), va="center", fontsize="small", color="0.45", **place)


def draw_live(live: Mapping[str, Mapping[str, Sequence[float]]], file: Path) -> None:
    """Draws the live visual tokens of each layer, one panel for each title, on the same scale, to a PNG file.

    `live` holds for each title `mean`, `low` and `high` over prompts, by layer: bars and whiskers.
    """
    columns = min(3, len(live))
    lines = math.ceil(len(live) / columns)
    size = (max(6, 3.6 * columns), max(2.6, 2.1 * lines))
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes, (title, counts) in zip(panels, live.items(), strict=False):
        means = counts["mean"]
        below = [mean - low for mean, low in zip(means, counts["low"], strict=True)]
        above = [high - mean for mean, high in zip(means, counts["high"], strict=True)]
        axes.bar(range(len(means)), means, yerr=[below, above], capsize=2, color="C0", ecolor="0.4", width=0.75)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3, axis="y")
    for axes in panels[len(live) :]:
        axes.axis("off")
    figure.supxlabel("decoder layer", fontsize=9)
    figure.supylabel("live visual tokens", fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def smooth(values: Sequence[float]) -> list[float]:
    """Returns the running mean of `values`, right from the first one on."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1.0
        means.append(total / weight)
    return means
