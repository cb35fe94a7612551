"""What a study keeps of one run: a small file with what the training took, its learning curve and its answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from data import easy_vqa, scenes
from eval.checkpoint import Checkpoint, CheckpointError
from eval.tasks.scenes import SPLITS
from models.cost import plan_cost, search_cost, spread_flops, training_flops
from models.families import family_of
from models.schedules import TRAINED
from models.stage_plan import StagePlan
from recipes.schema import Phase, Recipe

Record = dict[str, Any]
TASKS: Final = ("easy_vqa", *SPLITS)
_CURVE: Final = 100  # points of a learning curve at most
_TRAINING: Final = ("steps", "samples", "tokens", "visual_tokens", "seconds", "precision", "ranks")
_PER_RUN: Final = ("name", "output", "seed")  # what differs between the runs of an arm


def questions_of(task: str) -> Sequence[Any]:
    """Returns the questions of one of TASKS, in the order in which they are asked."""
    return easy_vqa.questions("test") if task == "easy_vqa" else scenes.questions(SPLITS[task])


@dataclass(frozen=True)
class Results:
    """The files of a study's results."""

    folder: Path

    def file(self, arm: str, seed: int) -> Path:
        """Returns where a run's record is kept."""
        return self.folder / f"{arm}-seed{seed}.json"

    def read(self, arm: str, seed: int) -> Record | None:
        """Returns a run's record; None: there is none."""
        file = self.file(arm, seed)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def write(self, record: Record) -> None:
        """Keeps a record; a reader never sees half of one."""
        file = self.file(record["arm"], record["seed"])
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.rename(file)


def fingerprint(recipe: Recipe) -> str:
    """Returns a hash of what a recipe says but for name, folder and seed; keys left at their defaults do not count."""
    said = recipe.model_dump(mode="json", exclude_defaults=True)
    text = json.dumps({key: value for key, value in said.items() if key not in _PER_RUN}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lacking(record: Record, tasks: Sequence[str], schedules: Sequence[str]) -> list[str]:
    """Returns which of the tasks, and `TASK under SCHEDULE`, a record has no answers to."""
    missing = []
    for task in tasks:
        found = record["scores"].get(task)
        absent = [] if found is None else [name for name in schedules if name not in found]
        missing += [task] if found is None else [f"{task} under {name}" for name in absent]
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

    Args:
        arm: its arm.
        seed: its seed.
        recipe: what it was trained with.
        checkpoint: its folder's.
        cells: by task and schedule, what `eval.comparison.cells.run_cell` returned.
        limit: the first so many questions of each task; None: all.

    Raises:
        CheckpointError: what its training wrote cannot be read.
    """
    phases = [_phase_record(phase, recipe, checkpoint) for phase in recipe.phases]
    return {
        "arm": arm,
        "seed": seed,
        "recipe": fingerprint(recipe),
        "limit": limit,
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "phases": phases,
        "curve": _curve(checkpoint.log, phases),
        "scores": {task: {name: _score(cell) for name, cell in found.items()} for task, found in cells.items()},
    }


def _phase_record(phase: Phase, recipe: Recipe, checkpoint: Checkpoint) -> Record:
    run = _training_of(phase)
    fields = json.loads((checkpoint.weights / "config.json").read_text(encoding="utf-8"))
    config = family_of(fields["model_type"], checkpoint.weights).config_class.from_dict(fields)
    visual = round(run["visual_tokens"] / run["samples"])  # the mean: samples have several images, or none
    text = round(run["tokens"] / run["samples"]) - visual
    # forward, and backward twice as much where the decoder's weights learn
    passes = 3 if phase.train.learning_rate.language_model is not None and phase.train.lora is None else 2
    plans, decoder, size = recipe.model.plans, config.text_config, {"visual": visual, "text": text}
    shown = {name: one.stages for name, one in plans.items()}
    weights = {name: one.weight for name, one in plans.items()}
    if phase.learn is not None:  # the config has the plan that was found
        shown = {"search": None, TRAINED: StagePlan.from_dict(config.stages)}
        weights = {"search": phase.learn.steps, TRAINED: run["steps"] - phase.learn.steps}
    forward = {name: float(plan_cost(decoder, plan, **size).flops) for name, plan in shown.items()}
    dense = plan_cost(decoder, None, **size)
    if phase.learn is not None:
        forward["search"] = search_cost(decoder, phase.learn.update, **size).flops
    if phase.train.sparse_attention is not None:
        forward = {name: found + spread_flops(decoder, shown[name], **size) for name, found in forward.items()}
    teachers = {name: one.distill.teacher for name, one in plans.items() if one.distill is not None}
    flops = training_flops(forward, weights, teachers, passes=passes)
    return {
        "phase": phase.name,
        **run,
        "flops": run["samples"] * flops,
        "dense_flops": passes * run["samples"] * dense.flops,
    }


def _training_of(phase: Phase) -> Record:
    """Returns what run.json of a phase says of its training.

    Raises:
        CheckpointError: it is not what a run writes.
    """
    file = phase.folder / "final/run.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        return {key: run[key] for key in _TRAINING}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({type(error).__name__}: {error}), expected what a run writes"
        ) from error


def _curve(log: Sequence[Mapping[str, Any]], phases: Sequence[Record]) -> list[list[float]]:
    """Returns [decoder FLOPs so far, loss] of log lines over the whole run, each step at the mean of its phase."""
    points, steps, flops = [], 0, 0.0
    ends = []
    for phase in phases:
        ends.append((steps, flops, phase["steps"], phase["flops"]))
        steps, flops = steps + phase["steps"], flops + phase["flops"]
    for line in log:
        if "loss" not in line:
            continue
        first, before, length, cost = next(end for end in reversed(ends) if line["step"] > end[0])
        points.append([before + cost * (line["step"] - first) / length, round(line["loss"], 4)])
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
