"""The results of a study: what is kept of each run, in one small file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from eval.arguments import UsageError
from eval.checkpoint import Checkpoint, run_file_errors
from eval.comparison.cells import read_json, write_json
from models.cost import plan_cost, search_cost, spread_flops, training_flops
from models.schedules import TRAINED
from models.stage_plan import StagePlan
from recipes.schema import ModelSection, Phase, Recipe

Record = dict[str, Any]
_KEYS: Final = {"arm", "seed", "recipe", "limit", "date", "device", "versions", "phases", "curve", "scores"}
_CURVE: Final = 100  # points of a learning curve at most
_TRAINING: Final = ("steps", "samples", "tokens", "visual_tokens", "seconds", "precision", "ranks")
_WEIGHTS: Final = ("model*.safetensors", "pytorch_model*.bin")
_PER_RUN: Final = ("name", "output", "seed")  # what differs between the runs of an arm


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
