"""The tables and pictures of a study, from its records alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
import numpy as np

from eval.comparison.plots import smooth
from eval.comparison.rows import markdown
from eval.paired import difference, standard_error
from eval.studies.record import Record, questions_of
from models.schedules import TRAINED

_COLOURS = plt.get_cmap("tab20")  # an arm's in every picture


@dataclass(frozen=True)
class Cell:
    """One arm under one schedule on one task, over its seeds.

    Attributes:
        arm, schedule: of the row.
        seeds: with a result, ascending.
        scores: one a seed.
        right: (seeds, questions) 0 or 1.
        metrics: mean over seeds of each family's accuracy.
        training: decoder FLOPs of the training, mean over seeds, and as a share of dense.
        prompt: decoder FLOPs of a prompt as a share of dense.
    """

    arm: str
    schedule: str
    seeds: list[int]
    scores: list[float]
    right: np.ndarray
    metrics: dict[str, float]
    training: tuple[float, float]
    prompt: float

    @property
    def name(self) -> str:
        """What its row is called."""
        return self.arm if self.schedule == TRAINED else f"{self.arm}, {self.schedule}"

    @property
    def score(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.scores)

    @property
    def seed_error(self) -> float | None:
        """The standard error of the mean over seeds; None with one seed."""
        return error_of(self.scores)


def error_of(values: Sequence[float]) -> float | None:
    """Returns the standard error of a mean; None of fewer than two values."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def cells_of(task: str, arms: Sequence[str], records: Sequence[Record]) -> list[Cell]:
    """Returns a task's cells, arm by arm; arms without a result are left out."""
    cells = []
    for arm in arms:
        members = sorted((record for record in records if record["arm"] == arm), key=lambda record: record["seed"])
        if members:
            cells += [_cell(task, arm, schedule, members) for schedule in members[0]["scores"][task]]
    return cells


def _cell(task: str, arm: str, schedule: str, members: Sequence[Record]) -> Cell:
    found = [record["scores"][task][schedule] for record in members]
    phases = [phase for record in members for phase in record["phases"]]
    flops, dense = (sum(phase[key] for phase in phases) / len(members) for key in ("flops", "dense_flops"))
    return Cell(
        arm=arm,
        schedule=schedule,
        seeds=[record["seed"] for record in members],
        scores=[one["score"] for one in found],
        right=np.array([[int(digit) for digit in one["right"]] for one in found]),
        metrics={name: statistics.fmean(one["metrics"][name] for one in found) for name in found[0]["metrics"]},
        training=(flops, flops / dense),
        prompt=statistics.fmean(one["flops"] / one["dense_flops"] for one in found),
    )


def score_table(cells: Sequence[Cell], reference: str, images: Sequence[str]) -> list[list[str]]:
    """Returns heading and rows: scores over seeds, families, and the paired difference to the reference arm.

    Args:
        cells: of one task.
        reference: the arm that the others are compared with, as it was trained.
        images: the image of each question.
    """
    base = next((cell for cell in cells if cell.arm == reference and cell.schedule == TRAINED), None)
    families = [name for name in cells[0].metrics if name != "accuracy"]
    heading = ["arm", "seeds", "accuracy", "one seed", *families, f"to {reference}, points", "over images", "training"]
    heading += ["of dense", "prompt of dense"]
    return [heading, *([*_scores(cell, families, images), *_to_reference(cell, base, images), *_costs(cell)]
                       for cell in cells)]  # fmt: skip


def _scores(cell: Cell, families: Sequence[str], images: Sequence[str]) -> list[str]:
    within = _image_error(cell, images)
    return [
        cell.name,
        str(len(cell.seeds)),
        _share(cell.score, cell.seed_error),
        "-" if within is None else f"± {100 * within:.2f}",
        *(f"{100 * cell.metrics[name]:.1f} %" for name in families),
    ]


def _costs(cell: Cell) -> list[str]:
    flops, share = cell.training
    return [f"{flops / 1e12:,.1f} TFLOP", f"{100 * share:.1f} %", f"{100 * cell.prompt:.1f} %"]


def _share(value: float, error: float | None) -> str:
    return f"{100 * value:.2f} %" if error is None else f"{100 * value:.2f} ± {100 * error:.2f} %"


def _image_error(cell: Cell, images: Sequence[str]) -> float | None:
    """Returns the mean over seeds of the standard error over images."""
    errors = [standard_error(row.tolist(), images) for row in cell.right]
    known = [error for error in errors if error is not None]
    return statistics.fmean(known) if known else None


def _to_reference(cell: Cell, base: Cell | None, images: Sequence[str]) -> tuple[str, str]:
    """Returns the mean difference on common seeds with its error over seeds, and its 95 % interval over images."""
    if base is None or cell is base:
        return ("reference" if base is cell else "-"), "-"
    common = [seed for seed in cell.seeds if seed in base.seeds]
    if not common:
        return "-", "-"
    ours, theirs = (found.right[[found.seeds.index(seed) for seed in common]] for found in (cell, base))
    changes = (ours.mean(axis=1) - theirs.mean(axis=1)).tolist()
    error = error_of(changes)
    found = difference(theirs.mean(axis=0).tolist(), ours.mean(axis=0).tolist(), images)
    mean = f"{100 * statistics.fmean(changes):+.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
    return mean, f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"


def write_report(folder: Path, name: str, reference: str, arms: Sequence[str], records: Sequence[Record]) -> str:
    """Writes table.md, accuracy.png and curves.png; returns the tables as text.

    Args:
        folder: of the results.
        name: of the study.
        reference: the arm that the others are compared with.
        arms: in the order of the rows.
        records: the results, at least one.
    """
    parts = [f"# {name}"]
    tasks = list(records[0]["scores"])
    for task in tasks:
        cells = cells_of(task, arms, records)
        images = [question.image.name for question in questions_of(task)[: cells[0].right.shape[1]]]
        parts += [f"## {task}", markdown(score_table(cells, reference, images)).rstrip()]
    parts += [_notes(arms, records), _made(records)]
    text = "\n\n".join(parts) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    draw_accuracy(arms, cells_of(tasks[0], arms, records), tasks[0], folder / "accuracy.png")
    draw_curves(arms, records, folder / "curves.png")
    return text


def _notes(arms: Sequence[str], records: Sequence[Record]) -> str:
    asked = f"Asked: the first {records[0]['limit']:,} questions. " if records[0]["limit"] else ""
    steps = {sum(phase["steps"] for phase in record["phases"]) for record in records}
    equal = f"All runs took {steps.pop():,} optimizer steps. " if len(steps) == 1 else ""
    missing = [arm for arm in arms if not any(record["arm"] == arm for record in records)]
    rest = f" Not run yet: {', '.join(missing)}." if missing else ""
    return (
        f'{equal}{asked}Accuracy is the mean over seeds ± its standard error; "one seed" is the standard error over a '
        "seed's images. The difference is paired: seed by seed ± its standard error over seeds, and its 95 % interval "
        "when images are resampled. Training and prompt count the decoder's FLOPs." + rest
    )


def _made(records: Sequence[Mapping[str, Any]]) -> str:
    dates = sorted({record["date"] for record in records})
    devices = sorted({record["device"] for record in records})
    precisions = sorted({phase["precision"] for record in records for phase in record["phases"]})
    versions = sorted({f"torch {record['versions']['torch']}, transformers {record['versions']['transformers']}"
                       for record in records})  # fmt: skip
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{days}; {', '.join(devices)}; {', '.join(precisions)}; {'; '.join(versions)}."


def draw_accuracy(arms: Sequence[str], cells: Sequence[Cell], task: str, file: Path) -> None:
    """Draws accuracy over the FLOPs of the training, a point an arm with its error over seeds, each seed pale."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for cell in (cell for cell in cells if cell.schedule == TRAINED):
        cost, colour = cell.training[0] / 1e12, _COLOURS(arms.index(cell.arm))
        axes.plot([cost] * len(cell.scores), [100 * score for score in cell.scores], "o", color=colour, alpha=0.3)
        error = None if cell.seed_error is None else 100 * cell.seed_error
        axes.errorbar([cost], [100 * cell.score], yerr=error, fmt="D", color=colour, capsize=4, label=cell.name)
    axes.set(xlabel="decoder TFLOP of the training", ylabel=f"accuracy on {task} (%)", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_curves(arms: Sequence[str], records: Sequence[Record], file: Path) -> None:
    """Draws training loss over FLOPs, a curve an arm, of its first seed."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for number, arm in enumerate(arms):
        members = sorted((record for record in records if record["arm"] == arm), key=lambda record: record["seed"])
        if members:
            flops, losses = zip(*members[0]["curve"], strict=True)
            axes.plot(np.array(flops) / 1e12, smooth(losses), color=_COLOURS(number), label=arm)
    axes.set(xlabel="decoder TFLOP of the training", ylabel="loss on answer tokens", yscale="log", xlim=(0, None))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)
