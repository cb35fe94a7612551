"""One cell of a comparison: a checkpoint under a schedule on a task, worked out once and kept as a file.

A comparison's folder holds `cells/CHECKPOINT/SCHEDULE/TASK.json` and `cells/CHECKPOINT/speed.json`. A cell whose file
says `done`, for the same weights, schedule with its settings, and code, is not run again; all of a folder's cells have
the same settings.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.checkpoint import Checkpoint
from eval.comparison.speed import speeds
from eval.live import costs_of, live_visual, text_tokens
from eval.lmms import FusedLlava, Harness, Outcome
from eval.overlay import live_runs
from eval.prompts import Asked, Prompter
from eval.tasks.benchmarks import BENCHMARKS, Benchmark, value_of
from eval.text_tower import TextTower
from models.cost import Cost
from models.schedules import Dense, Schedule

COSTED = 100  # questions over which the cost of a schedule is averaged, because a pruner's depends on the question
SHOWN = 6  # questions on the report's sample pages
Record = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
        checkpoint: where it comes from.
        model: on its device, ready for inference.
        prompter: asks it.
        batch: questions of one forward pass.
        text_tower: reads the question for schedules that want it.
    """

    checkpoint: Checkpoint
    model: Any
    prompter: Prompter
    batch: int
    text_tower: TextTower | None = None

    def batch_of(self, asked: Sequence[Asked], schedule: Schedule) -> dict[str, Any]:
        """Returns the inputs of questions, with what the schedule reads."""
        return self.prompter_of(schedule).batch(asked)

    def prompter_of(self, schedule: Schedule) -> Prompter:
        """Returns what asks under a schedule."""
        if schedule.reads_relevance and self.text_tower is not None:
            prompter = copy.copy(self.prompter)
            prompter.text_tower = self.text_tower
            return prompter
        return self.prompter


@dataclass(frozen=True)
class Store:
    """The files of one comparison.

    Attributes:
        folder: of the comparison.
        name: of the checkpoint in it.
        weights: what says that the weights are still the same.
        code: what says that the code is.
        schedules: the schedule behind each label, as text with all its settings.
    """

    folder: Path
    name: str
    weights: str
    code: str
    schedules: Mapping[str, str]

    def read(self, *parts: str) -> Record | None:
        """Returns the record of a cell (schedule, task) or of `speed`; None without one.

        One that was made with other weights, code or settings than these does not count.
        """
        file = self._file(*parts)
        if not file.is_file():
            return None
        record = json.loads(file.read_text(encoding="utf-8"))
        before, now = record.get("decided_by"), self._decided_by(*parts)
        if before is not None and parts == ("speed",):  # more schedules may have been timed
            now["schedule"] = {**before["schedule"], **now["schedule"]}
        return record if before == now else None

    def is_outdated(self, *parts: str) -> bool:
        """Returns whether there is a record that something else decided."""
        return self._file(*parts).is_file() and self.read(*parts) is None

    def write(self, record: Record, *parts: str) -> None:
        """Keeps a record; a reader never sees half of one."""
        file = self._file(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({**record, "decided_by": self._decided_by(*parts)}), encoding="utf-8")
        partial.rename(file)

    def _decided_by(self, *parts: str) -> dict[str, Any]:
        schedules = self.schedules if parts == ("speed",) else self.schedules[parts[0]]
        return {"weights": self.weights, "code": self.code, "schedule": schedules}

    def _file(self, *parts: str) -> Path:
        return self.folder.joinpath("cells", self.name, *parts).with_suffix(".json")


def run_cell(
    loaded: Loaded, schedule: Schedule, task: str, *, harness: Harness, limit: int | None, pictures: Path
) -> Record | None:
    """Returns a cell's record: what lmms-eval says, each question's value, costs, and live tokens to be drawn.

    None on ranks other than the first, whose answers the first one gathers.

    Args:
        loaded: the checkpoint.
        schedule: what it runs under.
        task: lmms-eval's name.
        harness: lmms-eval.
        limit: only the task's first so many questions; None is all.
        pictures: folder for the images of the sample pages.
    """
    loaded.model.schedule = schedule
    outcome = harness.run(FusedLlava(loaded.model, loaded.prompter_of(schedule), loaded.batch), task, limit)
    if outcome is None:
        return None
    benchmark = benchmark_of(task, outcome)
    return {
        "status": "done",
        "stages": loaded.checkpoint.stages,
        "training": loaded.checkpoint.run,
        "benchmark": asdict(benchmark),
        "prompt": {
            key: outcome.prompt.get(key) for key in ("generation_kwargs", "lmms_eval_specific_kwargs", "metadata")
        },
        "metrics": outcome.metrics,
        "samples": [_sample(sample, benchmark) for sample in outcome.samples],
        "costs": prompt_costs(loaded, schedule, list(harness.questions(task, limit, COSTED).values())),
        "shown": shown(loaded, schedule, harness.questions(task, limit, SHOWN), pictures),
    }


def benchmark_of(task: str, outcome: Outcome) -> Benchmark:
    """Returns how a task is read: as known, or by the first metric that it reports, taken as a mean."""
    if task in BENCHMARKS:
        return BENCHMARKS[task]
    metric, score = next(iter(outcome.metrics.items()))
    return Benchmark(task, metric, scale=1.0 if score <= 1 else 100.0)


def _sample(sample: Mapping[str, Any], benchmark: Benchmark) -> Record:
    doc, number = sample["doc"], sample["doc_id"]
    image = number if benchmark.image is None else doc.get(benchmark.image, number)
    return {
        "id": number,
        "image": image,
        "answer": str(sample["filtered_resps"][0]),
        "target": sample["target"] if isinstance(sample["target"], str) else json.dumps(sample["target"], default=str),
        "value": value_of(sample, benchmark.metric),
    }


def prompt_costs(loaded: Loaded, schedule: Schedule, asked: Sequence[Asked]) -> Record:
    """Returns the means over prompts of what the cost model says, beside the dense cost of the same prompts."""
    counts, text, visual = [], [], []
    for start in range(0, len(asked), loaded.batch):
        inputs = loaded.batch_of(asked[start : start + loaded.batch], schedule)
        counts += live_visual(loaded.model, inputs, schedule).sum(dim=2).T.tolist()
        text += text_tokens(loaded.model, inputs)
        visual += (inputs["input_ids"] == loaded.model.config.image_token_id).sum(dim=1).tolist()
    size, depth = loaded.model.dtype.itemsize, loaded.model.config.text_config.num_hidden_layers
    costs = [
        costs_of(loaded.model, layers, text=words, schedule=schedule, value=size)
        for layers, words in zip(counts, text, strict=True)
    ]
    dense = [
        costs_of(loaded.model, [number] * depth, text=words, schedule=Dense(), value=size)
        for number, words in zip(visual, text, strict=True)
    ]
    layers = list(zip(*counts, strict=True))
    return {
        "prompts": len(costs),
        **_means(costs),
        "dense": _means(dense),
        "live": {
            "mean": [statistics.fmean(layer) for layer in layers],
            "low": [min(layer) for layer in layers],
            "high": [max(layer) for layer in layers],
        },
    }


def _means(costs: Sequence[Cost]) -> dict[str, float]:
    names = ("visual_token_layers", "token_layers", "flops", "vision_attention", "cache_bytes")
    return {name: statistics.fmean(getattr(cost, name) for cost in costs) for name in names}


def shown(loaded: Loaded, schedule: Schedule, asked: Mapping[int, Asked], pictures: Path) -> list[Record]:
    """Returns the live tokens of each question's first image, where they lie in one grid, and keeps that image."""
    records = []
    pictures.mkdir(parents=True, exist_ok=True)
    for number, question in asked.items():
        inputs = loaded.batch_of([question], schedule)
        grid = loaded.prompter.grid(question.images[0], inputs) if question.images else None
        record = {"id": number, "question": question.text, "picture": None, "grid": grid, "runs": []}
        if question.images:
            file = pictures / f"{number}.png"
            loaded.prompter.picture(question.images[0], inputs).save(file)
            record["picture"] = file.name
        if grid is not None:
            live = live_visual(loaded.model, inputs, schedule)[:, 0]
            visual = inputs["input_ids"][0].to(live.device) == loaded.model.config.image_token_id
            patches = loaded.prompter.patches(live, visual, grid, question.images[0])
            record["runs"] = [
                {"first": first, "last": last, "tokens": tokens.nonzero()[:, 0].tolist()}
                for first, last, tokens in live_runs(patches)
            ]
        records.append(record)
    return records


def run_speed(loaded: Loaded, schedules: Mapping[str, Schedule], asked: Sequence[Asked]) -> Record:
    """Returns what prefill and decoding take under each schedule, side by side on one batch of prompts.

    `dense` is always among them: the others' times are told as a ratio to it. What a text tower takes is not in them.
    """
    chosen = {"dense": Dense(), **schedules}
    reader = max(chosen.values(), key=lambda schedule: schedule.reads_relevance)
    inputs = {name: tensor.to(loaded.model.device) for name, tensor in loaded.batch_of(asked, reader).items()}
    measured = speeds(loaded.model, loaded.checkpoint.weights, inputs, chosen)
    for figures in measured.values():
        figures["faster_than_dense"] = measured["dense"]["prefill_seconds"] / figures["prefill_seconds"]
    return {"status": "done", "prompts": len(asked), "by_schedule": measured}
