"""The pictures of a study: accuracy over the cost of the training, accuracy of each window, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator

from eval.comparison.plots import plot, set_log_scale, smooth
from eval.studies.results import Record
from eval.studies.tables import Cell, cells_of, error_of, members_of
from models.schedules import TRAINED
from models.stage_plan import StagePlan
from recipes.study import Study

PICTURES: Final = ("accuracy.png", "windows.png", "curves.png")
Looks = Mapping[str, tuple[str, Any]]  # by arm: its name and its colour in pictures
_COLOURS: Final = colormaps["tab10"]
_COST: Final = "decoder TFLOP of the training"  # the axis of every picture


def draw_pictures(study: Study, plans: Mapping[str, StagePlan | None], records: Sequence[Record]) -> None:
    """Draws the pictures of a study's first task beside its results.

    `plans` are the stage plans of the arms that have one and no penalty.
    """
    folder, task = Path(study.results), study.tasks[0]
    trained = [cell for cell in cells_of(task, list(study.arms), records) if cell.schedule == TRAINED]
    shown = [cell for cell in trained if study.picture is None or cell.arm in study.picture]
    order = dict.fromkeys([cell.arm for cell in shown] + list(study.arms))  # so that those shown differ in colour
    looks = {arm: (study.arms[arm].label or arm, _COLOURS(number % _COLOURS.N)) for number, arm in enumerate(order)}
    if shown:
        draw_accuracy(shown, looks, task, folder / "accuracy.png")
    windows = {arm: plan for arm, plan in plans.items() if plan is not None and _is_window(plan)}
    members = [cell for cell in trained if cell.arm in windows]
    if len(members) > 1:
        reference = next((cell for cell in trained if cell.arm == study.reference), None)
        draw_windows(members, windows, reference, looks, task, folder / "windows.png")
    draw_curves({cell.arm: looks[cell.arm] for cell in shown}, records, folder / "curves.png")


def _is_window(plan: StagePlan) -> bool:
    """Returns whether a plan lets all visual tokens run in consecutive layers and nowhere else."""
    return plan.layers is None and plan.update == "full" and not plan.keep


def draw_accuracy(cells: Sequence[Cell], looks: Looks, task: str, file: Path) -> None:
    """Draws accuracy over the FLOPs of the training: of each arm the mean with its error over seeds, each seed pale."""
    dearest = max(cell.training for cell in cells) / 1e12
    label = f"accuracy on {task} (%)"
    with plot(file, (8, 5), xlabel=_COST, ylabel=label, xlim=(0, 1.25 * dearest)) as axes:  # room for the last names
        places = []
        for cell in cells:
            cost, (name, colour) = cell.training / 1e12, looks[cell.arm]
            _draw_seeds(axes, cost, cell, colour)
            places.append((cost, 100 * cell.score, name, colour))
        low, high = axes.get_ylim()
        for cost, score, name, colour in apart(places, width=0.25 * dearest, gap=(high - low) / 26):
            axes.annotate(
                name, (cost, score), (9, 0), textcoords="offset points", va="center", fontsize=9, color=colour
            )
        axes.grid(alpha=0.3)


def apart(places: Sequence[tuple[float, float, str, Any]], *, width: float, gap: float) -> list[Any]:
    """Returns names at (x, y) with a larger y where another name, less than `width` away, is less than `gap` below."""
    found: list[Any] = []
    for x, y, *rest in sorted(places, key=lambda place: place[1]):
        for other_x, other_y, *_ in found:  # ascending
            if abs(other_x - x) < width and abs(other_y - y) < gap:
                y = other_y + gap
        found.append((x, y, *rest))
        found.sort(key=lambda place: place[1])
    return found


def _draw_seeds(axes: Any, x: float, cell: Cell, colour: Any) -> None:
    """Draws an arm's mean with its error over seeds, and each of several seeds pale behind it."""
    scores, error = [100 * score for score in cell.scores], error_of(cell.scores)
    if len(scores) > 1:
        axes.plot([x] * len(scores), scores, "o", color=colour, alpha=0.25, markersize=5, markeredgewidth=0)
    axes.errorbar([x], [100 * cell.score], None if error is None else 100 * error, fmt="D", color=colour, capsize=4)


def draw_windows(
    cells: Sequence[Cell],
    windows: Mapping[str, StagePlan],
    reference: Cell | None,
    looks: Looks,
    task: str,
    file: Path,
) -> None:
    """Draws the accuracy of each window as a bar over its layers, with its error over seeds; the reference as a line.

    `windows` has the plan of each arm in `cells`.
    """
    label = f"accuracy on {task} (%)"
    with plot(file, (8, 5), xlabel="decoder layers in which the image is live", ylabel=label) as axes:
        for cell in cells:
            plan, colour = windows[cell.arm], looks[cell.arm][1]
            enter, leave = plan.enter or 0, plan.exit or 0
            axes.hlines(100 * cell.score, enter - 0.4, leave - 0.6, color=colour, linewidth=4, alpha=0.6)
            _draw_seeds(axes, (enter + leave - 1) / 2, cell, colour)
        if reference is not None:
            score, error = 100 * reference.score, 100 * (error_of(reference.scores) or 0.0)
            axes.axhline(score, color="0.3", linestyle="--", linewidth=1)
            axes.axhspan(score - error, score + error, color="0.5", alpha=0.15, linewidth=0)
            place = {"xycoords": ("axes fraction", "data"), "xytext": (-4, 3), "textcoords": "offset points"}
            axes.annotate(
                looks[reference.arm][0], (1, score), ha="right", va="bottom", fontsize=9, color="0.3", **place
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)


def draw_curves(looks: Looks, records: Sequence[Record], file: Path) -> None:
    """Draws training loss over FLOPs, a curve for each arm in `looks`, of its first seed."""
    with plot(file, xlabel=_COST, ylabel="loss on answer tokens", xlim=(0, None)) as axes:
        for number, (arm, (name, colour)) in enumerate(looks.items()):
            flops, losses = zip(*members_of(arm, records)[0]["curve"], strict=True)
            style = "-" if number < _COLOURS.N else "--"
            axes.plot(np.array(flops) / 1e12, smooth(losses), style, color=colour, label=name)
        set_log_scale(axes)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
