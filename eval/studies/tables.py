"""The tables of a study: each arm's scores over seeds, and their paired differences to the reference arm."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.comparison.tables import markdown
from eval.significance import difference, standard_error
from eval.studies.results import Record
from eval.tasks.built_in import questions_of
from models.schedules import TRAINED


@dataclass(frozen=True)
class Cell:
    """One arm under one schedule on one task, over its seeds."""

    arm: str
    schedule: str
    seeds: list[int]  # with a result, ascending
    scores: list[float]  # one a seed
    right: np.ndarray  # (seeds, questions) 0 or 1
    metrics: dict[str, float]  # mean over seeds of each family's accuracy
    training: float  # decoder FLOPs of the training, mean over seeds
    dense: float  # what they would be without a plan
    prompt: float  # decoder FLOPs of a prompt as a share of dense

    @property
    def name(self) -> str:
        """What its row is called."""
        return self.arm if self.schedule == TRAINED else f"{self.arm}, {self.schedule}"

    @property
    def score(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.scores)


def error_of(values: Sequence[float]) -> float | None:
    """Returns the standard error of a mean over seeds; None of fewer than two."""
    return standard_error(values, range(len(values)))


def members_of(arm: str, records: Sequence[Record]) -> list[Record]:
    """Returns an arm's records by seed."""
    return sorted((record for record in records if record["arm"] == arm), key=lambda record: record["seed"])


def cells_of(task: str, arms: Sequence[str], records: Sequence[Record]) -> list[Cell]:
    """Returns a task's cells, arm by arm; arms without a result are left out."""
    cells = []
    for arm in arms:
        members = members_of(arm, records)
        schedules = members[0]["scores"][task] if members else ()
        cells += [_cell(task, arm, schedule, members) for schedule in schedules]
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
        training=flops,
        dense=dense,
        prompt=statistics.fmean(one["flops"] / one["dense_flops"] for one in found),
    )


def score_table(cells: Sequence[Cell], reference: str, images: Sequence[str]) -> list[list[str]]:
    """Returns one task's scores over seeds, of families too, and the paired difference to the reference arm.

    That is the arm that the others are compared with, as it was trained; `images` has the image of each question. The
    cost of a training is a share of dense for as many steps as the longest one took.
    """
    dense = max(cell.dense for cell in cells)
    base = next((cell for cell in cells if cell.arm == reference and cell.schedule == TRAINED), None)
    families = [name for name in cells[0].metrics if name != "accuracy"]
    heading = ["arm", "seeds", "accuracy", "one seed", *families, f"to {reference}, points", "over images", "training"]
    lines = [[*heading, "of dense", "prompt of dense"]]
    for cell in cells:
        error, within = error_of(cell.scores), _image_error(cell, images)
        lines.append(
            [
                cell.name,
                str(len(cell.seeds)),
                f"{100 * cell.score:.2f}" + (" %" if error is None else f" ± {100 * error:.2f} %"),
                "-" if within is None else f"± {100 * within:.2f}",
                *(f"{100 * cell.metrics[name]:.1f} %" for name in families),
                *_to_reference(cell, base, images),
                f"{cell.training / 1e12:,.1f} TFLOP",
                f"{100 * cell.training / dense:.1f} %",
                f"{100 * cell.prompt:.1f} %",
            ]
        )
    return lines


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
    if found is None:
        return mean, "-"
    return mean, f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"


def tables(name: str, reference: str, arms: Sequence[str], records: Sequence[Record]) -> str:
    """Returns the tables of a study's records, at least one, as Markdown.

    `reference` is the arm that the others are compared with, `arms` are in the order of the rows.
    """
    parts = [f"# {name}"]
    for task in records[0]["scores"]:
        cells = cells_of(task, arms, records)
        images = [question.image.name for question in questions_of(task)[: cells[0].right.shape[1]]]
        parts += [f"## {task}", markdown(score_table(cells, reference, images)).rstrip()]
    parts += [_notes(arms, records), _made(records)]
    return "\n\n".join(parts) + "\n"


def _notes(arms: Sequence[str], records: Sequence[Record]) -> str:
    part = f"Tested on the first {records[0]['limit']:,} questions. " if records[0]["limit"] else ""
    steps = {record["arm"]: sum(phase["steps"] for phase in record["phases"]) for record in records}
    most = max(steps.values())
    fewer = [f"{arm} ({count:,})" for arm, count in steps.items() if count < most]
    but = f", except {', '.join(fewer)}" if fewer else ""
    missing = [arm for arm in arms if not any(record["arm"] == arm for record in records)]
    rest = f" Not run yet: {', '.join(missing)}." if missing else ""
    return (
        f"All runs took {most:,} optimizer steps{but}. {part}Accuracy is the mean over seeds ± its standard error; "
        '"one seed" is the standard error over a seed\'s images. The difference is paired: seed by seed ± its standard '
        "error over seeds, and its 95 % interval when images are resampled. Training and prompt count the decoder's "
        f"FLOPs.{rest}"
    )


def _made(records: Sequence[Mapping[str, Any]]) -> str:
    dates = sorted({record["date"] for record in records})
    devices = sorted({record["device"] for record in records})
    precisions = sorted({phase["precision"] for record in records for phase in record["phases"]})
    used = [record["versions"] for record in records]
    versions = sorted({f"torch {each['torch']}, transformers {each['transformers']}" for each in used})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{days}; {', '.join(devices)}; {', '.join(precisions)}; {'; '.join(versions)}."
