"""The results of a study: what is kept of each run, a small file, and the tables and pictures that they make."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator

from eval.arguments import UsageError
from eval.checkpoint import Checkpoint, run_file_errors
from eval.comparison.cells import read_json, write_json
from eval.comparison.plots import plot, set_log_scale, smooth
from eval.comparison.tables import markdown
from eval.significance import difference, standard_error
from eval.tasks.built_in import questions_of
from models.cost import plan_cost, search_cost, spread_flops, training_flops
from models.schedules import TRAINED
from models.stage_plan import StagePlan
from recipes.schema import ModelSection, Phase, Recipe
from recipes.study import Study

Record = dict[str, Any]
Looks = Mapping[str, tuple[str, Any]]  # by arm: its name and its colour in pictures
WRITTEN: Final = ("table.md", "accuracy.png", "windows.png", "curves.png")
_KEYS: Final = {"arm", "seed", "recipe", "limit", "date", "device", "versions", "phases", "curve", "scores"}
_CURVE: Final = 100  # points of a learning curve at most
_TRAINING: Final = ("steps", "samples", "tokens", "visual_tokens", "seconds", "precision", "ranks")
_WEIGHTS: Final = ("model*.safetensors", "pytorch_model*.bin")
_PER_RUN: Final = ("name", "output", "seed")  # what differs between the runs of an arm
_COLOURS: Final = colormaps["tab10"]
_COST: Final = "decoder TFLOP of the training"  # the axis of every picture


@dataclass(frozen=True)
class Results:
    """The files of a study's results."""

    folder: Path

    def file(self, arm: str, seed: int) -> Path:
        """Returns where a run's record is kept."""
        return self.folder / f"{arm}-seed{seed}.json"

    def read(self, arm: str, seed: int) -> Record | None:
        """Returns a run's record; None: there is none. Raises UsageError where the file is no record."""
        file = self.file(arm, seed)
        if not file.exists():
            return None
        record = read_json(file)
        if record is None or not record.keys() >= _KEYS or (record["arm"], record["seed"]) != (arm, seed):
            raise UsageError(f"{file}: got no result of {arm}, seed {seed}; expected what a study wrote: move it away")
        return record

    def write(self, record: Record) -> None:
        """Keeps a record."""
        write_json(self.file(record["arm"], record["seed"]), record, indent=1)


def fingerprint(recipe: Recipe) -> str:
    """Returns a hash of what a recipe says but for name, folder and seed; keys left at their defaults do not count."""
    fields = recipe.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps({key: value for key, value in fields.items() if key not in _PER_RUN}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def start_of(model: ModelSection) -> str | None:
    """Returns a hash of the weights in the folders that a recipe starts from; None: it names no folder that is here."""
    named = (model.checkpoint, model.language_model, model.vision_tower)
    folders = [Path(name) for name in named if name is not None]
    files = [file for folder in folders for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))]
    digests = [_digest(file, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16] if files else None


@cache
def _digest(file: Path, _changed: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lacking(record: Record, tasks: Sequence[str], schedules: Sequence[str]) -> list[str]:
    """Returns which of the tasks, and `TASK under SCHEDULE`, a record has no answers to."""
    missing, scores = [], record["scores"]
    for task in tasks:
        if task not in scores:
            missing.append(task)
        else:
            missing += [f"{task} under {name}" for name in schedules if name not in scores[task]]
    return missing


def record_of(
    arm: str,
    seed: int,
    recipe: Recipe,
    checkpoint: Checkpoint,
    cells: Mapping[str, Mapping[str, Record]],
    *,
    limit: int | None = None,
) -> Record:
    """Returns the record of a trained run.

    `cells` are, by task and schedule, what `eval.comparison.cells.run_cell` returned for the first `limit` questions of
    each task (None: all).

    Raises:
        CheckpointError: what its training wrote cannot be read.
    """
    phases = [_phase_record(phase, recipe, checkpoint) for phase in recipe.phases]
    return {
        "arm": arm,
        "seed": seed,
        "recipe": fingerprint(recipe),
        "start": start_of(recipe.model),
        "limit": limit,
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "phases": phases,
        "curve": _curve(checkpoint.log, phases),
        "scores": {task: {name: _score(cell) for name, cell in found.items()} for task, found in cells.items()},
    }


def _phase_record(phase: Phase, recipe: Recipe, checkpoint: Checkpoint) -> Record:
    file, decoder = phase.folder / "final/run.json", checkpoint.config.text_config
    with run_file_errors(file):
        written = json.loads(file.read_text(encoding="utf-8"))
        run: Record = {key: written[key] for key in _TRAINING}
    visual = round(run["visual_tokens"] / run["samples"])  # the mean: samples have several images, or none
    text = round(run["tokens"] / run["samples"]) - visual
    # forward, and backward twice as much where the decoder's weights learn
    passes = 3 if phase.train.learning_rate.language_model is not None and phase.train.lora is None else 2
    plans, size = recipe.model.plans, {"visual": visual, "text": text}
    shown = {name: one.stages for name, one in plans.items()}
    weights = {name: one.weight for name, one in plans.items()}
    if phase.learn is not None:  # the config has the plan that was found
        shown = {"search": None, TRAINED: StagePlan.from_dict(checkpoint.config.stages)}
        weights = {"search": phase.learn.steps, TRAINED: run["steps"] - phase.learn.steps}
    forward = {name: float(plan_cost(decoder, plan, **size).flops) for name, plan in shown.items()}
    dense = plan_cost(decoder, None, **size)
    if phase.learn is not None:
        forward["search"] = search_cost(decoder, phase.learn.update, **size).flops
    if phase.train.sparse_attention is not None:
        forward = {name: found + spread_flops(decoder, shown[name], **size) for name, found in forward.items()}
    teachers = {name: one.distill.teacher for name, one in plans.items() if one.distill is not None}
    flops = training_flops(forward, weights, teachers, passes=passes)
    dense_flops = passes * run["samples"] * dense.flops
    return {"phase": phase.name, **run, "flops": run["samples"] * flops, "dense_flops": dense_flops}


def _curve(log: Sequence[Mapping[str, Any]], phases: Sequence[Record]) -> list[list[float]]:
    """Returns [decoder FLOPs so far, loss] of log lines over the whole run, each step at the mean of its phase."""
    points, steps, flops = [], 0, 0.0
    for phase in phases:
        end = steps + phase["steps"]
        for line in log:
            if "loss" in line and steps < line["step"] <= end:
                share = (line["step"] - steps) / phase["steps"]
                points.append([flops + phase["flops"] * share, round(line["loss"], 4)])
        steps, flops = end, flops + phase["flops"]
    every = -(-len(points) // _CURVE) or 1
    return points[::every]


def _score(cell: Record) -> Record:
    return {
        "score": cell["metrics"][cell["benchmark"]["metric"]],
        "metrics": cell["metrics"],
        "right": "".join(str(int(sample["value"])) for sample in cell["samples"]),  # a digit for each question
        "flops": cell["costs"]["flops"],
        "dense_flops": cell["costs"]["dense"]["flops"],
    }


@dataclass(frozen=True)
class Cell:
    """One arm under one schedule on one task, over its seeds."""

    arm: str
    schedule: str
    seeds: list[int]  # with a result, ascending
    scores: list[float]  # one a seed
    right: np.ndarray  # (seeds, questions) 0 or 1
    metrics: dict[str, float]  # mean over seeds of each family's accuracy
    training: tuple[float, float]  # decoder FLOPs of the training, mean over seeds, and as a share of dense
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
        training=(flops, flops / dense),
        prompt=statistics.fmean(one["flops"] / one["dense_flops"] for one in found),
    )


def score_table(cells: Sequence[Cell], reference: str, images: Sequence[str]) -> list[list[str]]:
    """Returns one task's scores over seeds, of families too, and the paired difference to the reference arm.

    That is the arm that the others are compared with, as it was trained; `images` has the image of each question.
    """
    base = next((cell for cell in cells if cell.arm == reference and cell.schedule == TRAINED), None)
    families = [name for name in cells[0].metrics if name != "accuracy"]
    heading = ["arm", "seeds", "accuracy", "one seed", *families, f"to {reference}, points", "over images", "training"]
    lines = [[*heading, "of dense", "prompt of dense"]]
    for cell in cells:
        error, within = error_of(cell.scores), _image_error(cell, images)
        flops, share = cell.training
        lines.append(
            [
                cell.name,
                str(len(cell.seeds)),
                f"{100 * cell.score:.2f}" + (" %" if error is None else f" ± {100 * error:.2f} %"),
                "-" if within is None else f"± {100 * within:.2f}",
                *(f"{100 * cell.metrics[name]:.1f} %" for name in families),
                *_to_reference(cell, base, images),
                f"{flops / 1e12:,.1f} TFLOP",
                f"{100 * share:.1f} %",
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


def write_report(study: Study, plans: Mapping[str, StagePlan | None], text: str, records: Sequence[Record]) -> None:
    """Writes table.md and the pictures of a study's first task beside its results.

    `plans` are the stage plans of the arms that have one and no penalty, `text` is what `tables` returned.
    """
    folder, task = Path(study.results), study.tasks[0]
    (folder / "table.md").write_text(text, encoding="utf-8")
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
    used = [record["versions"] for record in records]
    versions = sorted({f"torch {each['torch']}, transformers {each['transformers']}" for each in used})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{days}; {', '.join(devices)}; {', '.join(precisions)}; {'; '.join(versions)}."


def draw_accuracy(cells: Sequence[Cell], looks: Looks, task: str, file: Path) -> None:
    """Draws accuracy over the FLOPs of the training: of each arm the mean with its error over seeds, each seed pale."""
    dearest = max(cell.training[0] for cell in cells) / 1e12
    label = f"accuracy on {task} (%)"
    with plot(file, (8, 5), xlabel=_COST, ylabel=label, xlim=(0, 1.25 * dearest)) as axes:  # room for the last names
        places = []
        for cell in cells:
            cost, (name, colour) = cell.training[0] / 1e12, looks[cell.arm]
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
