"""One cell of a comparison: a checkpoint under a schedule on a task, worked out once and kept as a file.

A comparison's folder holds `cells/CHECKPOINT/SCHEDULE/TASK.json` and `cells/CHECKPOINT/speed.json`. A cell whose file
says `done`, for the same weights, schedule with its settings, and code, is not run again. All of a folder's cells have
the same settings; rows that differ in more than checkpoint and schedule are refused.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isclose
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from eval.arguments import UsageError
from eval.checkpoint import Checkpoint
from eval.live import Loaded, live_runs, live_visual, prompt_costs
from eval.lmms import HARNESS, FusedLlava, Harness, Outcome
from eval.measure import default_batch, speeds
from eval.prompts import VqaPrompt
from eval.tasks.benchmarks import BENCHMARKS, Benchmark, value_of
from models.schedules import Dense, Schedule

PRECISIONS: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FILE: Final = "settings.json"
# what a cell depends on: the models, how images and prompts are encoded, the tasks, how answers and costs are counted
_DECIDING = (
    "models/*.py",
    *(f"data/{name}.py" for name in ("chat", "dataset", "easy_vqa", "images", "processor", "rows")),
    *(f"data/{name}.py" for name in ("scene_images", "scene_questions", "scenes")),
    *(f"eval/{name}.py" for name in ("live", "lmms", "prompts", "text_tower")),
    *(f"eval/tasks/{name}.py" for name in ("benchmarks", "built_in")),
)
_ROOT: Final = Path(__file__).parents[2]
COSTED = 100  # questions over which the cost of a schedule is averaged, because a pruner's depends on the question
SHOWN = 6  # questions on the report's sample pages
Record = dict[str, Any]


def write_json(file: Path, record: Record, **layout: Any) -> None:
    """Writes a record so that a reader never sees half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, **layout) + "\n", encoding="utf-8")
    partial.rename(file)


def read_json(file: Path) -> Record | None:
    """Returns a record as `write_json` wrote it; None where there is none, or the file was cut or overwritten."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


@dataclass(frozen=True)
class Store:
    """The files of one checkpoint in a comparison."""

    folder: Path  # of the comparison
    name: str  # of the checkpoint in it
    weights: str  # fingerprint of the weights
    code: str  # digest of the code that decides answers
    schedules: Mapping[str, str]  # the schedule behind each label, as text with all its settings

    def read(self, *parts: str) -> Record | None:
        """Returns the record of a cell (schedule, task) or of `speed`; None without one.

        One that was made with other weights, code or settings than these does not count, nor one that cannot be read.
        """
        record = read_json(self._file(*parts))
        if record is None:
            return None
        before, now = record.get("decided_by"), self._decided_by(*parts)
        timed = before.get("schedule") if isinstance(before, dict) and parts == ("speed",) else None
        if isinstance(timed, dict):  # more schedules may have been timed
            now["schedule"] = {**timed, **now["schedule"]}
        return record if before == now and "status" in record else None

    def is_outdated(self, *parts: str) -> bool:
        """Returns whether there is a record that something else decided, or that cannot be read."""
        return self._file(*parts).is_file() and self.read(*parts) is None

    def write(self, record: Record, *parts: str) -> None:
        """Keeps a record."""
        write_json(self._file(*parts), {**record, "decided_by": self._decided_by(*parts)})

    def _decided_by(self, *parts: str) -> dict[str, Any]:
        schedules = self.schedules if parts == ("speed",) else self.schedules[parts[0]]
        return {"weights": self.weights, "code": self.code, "schedule": schedules}

    def _file(self, *parts: str) -> Path:
        return self.folder.joinpath("cells", self.name, *parts).with_suffix(".json")


def run_cell(
    loaded: Loaded, schedule: Schedule, task: str, *, harness: Harness, limit: int | None, pictures: Path
) -> Record | None:
    """Returns a cell's record: metrics of lmms-eval, the score of each question, costs, and live tokens to draw.

    None on ranks other than the first, whose answers the first one gathers. `limit` asks only the task's first so many
    questions; the images of the sample pages go to the folder `pictures`.
    """
    loaded.model.schedule = schedule
    outcome = harness.run(FusedLlava(loaded.model, loaded.prompt_encoder, loaded.batch), task, limit)
    if outcome is None:
        return None
    benchmark = benchmark_of(task, outcome)
    definition = ("generation_kwargs", "lmms_eval_specific_kwargs", "metadata")
    return {
        "status": "done",
        "stages": loaded.checkpoint.stages,
        "training": loaded.checkpoint.run,
        "benchmark": {key: value for key, value in asdict(benchmark).items() if key != "folder"},
        "prompt": {key: outcome.prompt.get(key) for key in definition},
        "metrics": outcome.metrics,
        "samples": [_sample(sample, benchmark) for sample in outcome.samples],
        "costs": prompt_costs(loaded, schedule, list(harness.questions(task, limit, COSTED).values())),
        "shown": shown(loaded, schedule, harness.questions(task, limit, SHOWN), pictures),
    }


def benchmark_of(task: str, outcome: Outcome) -> Benchmark:
    """Returns how a task is read: as known, or by the first metric that it reports, which may be a mean or per cent."""
    if task in BENCHMARKS:
        return BENCHMARKS[task]
    metric, score = next(iter(outcome.metrics.items()))
    values = [value_of(sample, metric) for sample in outcome.samples]
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    scales = [scale for scale in (1.0, 100.0) if isclose(scale * mean, score, rel_tol=1e-3)]
    return Benchmark(task, metric, scale=scales[0] if scales else None)


def _sample(sample: Mapping[str, Any], benchmark: Benchmark) -> Record:
    doc, number, target = sample["doc"], sample["doc_id"], sample["target"]
    return {
        "id": number,
        "image": number if benchmark.image is None else doc.get(benchmark.image, number),
        "answer": str(sample["filtered_resps"][0]),
        "target": target if isinstance(target, str) else json.dumps(target, default=str),
        "value": value_of(sample, benchmark.metric),
    }


def shown(loaded: Loaded, schedule: Schedule, prompts: Mapping[int, VqaPrompt], pictures: Path) -> list[Record]:
    """Returns the live tokens of each question's first image, where they lie in one grid, and keeps that image."""
    records, prompt_encoder = [], loaded.prompt_encoder
    pictures.mkdir(parents=True, exist_ok=True)
    for number, question in prompts.items():
        record: Record = {"id": number, "question": question.text, "picture": None, "grid": None, "runs": []}
        records.append(record)
        if not question.images:
            continue
        image, inputs = question.images[0], prompt_encoder.batch([question], schedule)
        record["picture"], record["grid"] = f"{number}.png", prompt_encoder.grid(image, inputs)
        prompt_encoder.picture(image, inputs).save(pictures / record["picture"])
        if record["grid"] is not None:
            live = live_visual(loaded.model, inputs, schedule)[:, 0]
            visual = inputs["input_ids"][0].to(live.device) == loaded.model.config.image_token_id
            record["runs"] = [
                {"first": first, "last": last, "tokens": tokens.nonzero()[:, 0].tolist()}
                for first, last, tokens in live_runs(prompt_encoder.patches(live, visual, record["grid"], image))
            ]
    return records


def run_speed(loaded: Loaded, schedules: Mapping[str, Schedule], prompts: Sequence[VqaPrompt]) -> Record:
    """Returns what prefill and decoding take under each schedule, side by side on one batch of prompts.

    `dense` is always measured too, as the reference of `faster_than_dense`. Times exclude a text tower.
    """
    chosen = {"dense": Dense(), **schedules}
    reader = max(chosen.values(), key=lambda schedule: schedule.reads_relevance)
    batch = loaded.prompt_encoder.batch(prompts, reader)
    inputs = {name: tensor.to(loaded.model.device) for name, tensor in batch.items()}
    measured = speeds(loaded.model, loaded.checkpoint.weights, inputs, chosen)
    for figures in measured.values():
        figures["faster_than_dense"] = measured["dense"]["prefill_seconds"] / figures["prefill_seconds"]
    return {"status": "done", "prompts": len(prompts), "by_schedule": measured}


class ComparisonError(UsageError):
    """Rows that would not be comparable, or a folder that cannot take them; the text says what differs."""


def settings_of(checkpoints: Sequence[Checkpoint], args: argparse.Namespace) -> dict[str, Any]:
    """Returns what all rows have in common, by the command line; batch and precision that are None are by the machine.

    Raises:
        ComparisonError: two checkpoints differ in prompt format or image padding.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for flag, attribute in (("--chat-format", "chat_format"), ("--image-aspect", "aspect")):
            ours, theirs = getattr(first, attribute), getattr(other, attribute)
            if ours != theirs:
                raise ComparisonError(
                    f"{flag}: got {ours} ({first.name}) and {theirs} ({other.name}), expected rows that differ in "
                    f"checkpoint and schedule alone; {flag} {ours} would ask both so"
                )
    gpu = torch.cuda.is_available()
    return {
        "harness": HARNESS,
        "limit": args.limit,
        "batch": args.batch or default_batch(),
        "precision": args.precision or ("bf16" if gpu else "fp32"),
        "chat_format": first.chat_format,
        "image_aspect": first.aspect,
        "attention": args.attn_implementation,
        **({} if args.text_tower is None else {"text_tower": args.text_tower}),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, threads: {torch.get_num_threads()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def code(root: Path = _ROOT) -> str:
    """Returns a checksum of the code in `root` that decides a cell's answers; comments and layout do not count."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in _DECIDING for file in root.glob(pattern)):
        digest.update(file.name.encode() + meaning(file.read_text(encoding="utf-8")).encode())
    for file in sorted((root / "eval/tasks").glob("*.yaml")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def meaning(source: str) -> str:
    """Returns Python source as its syntax tree, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def check_settings(settings: dict[str, Any], out: Path) -> None:
    """Notes the settings of a new folder; raises ComparisonError where an old one's cells were made with others."""
    file = out / FILE
    if file.is_file():
        before = read_json(file)
        if before is None:
            raise ComparisonError(
                f"--out: {file}: got no settings of a comparison, expected the file that it wrote, or another folder"
            )
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise ComparisonError(
                    f"--out: {out} holds cells made with {key} {before.get(key)}, got {settings.get(key)}, "
                    "expected the same, or another folder"
                )
    write_json(file, settings, indent=1)


def named(checkpoints: Sequence[Checkpoint]) -> dict[str, Checkpoint]:
    """Returns the checkpoints by names that differ: the folder's, with as many parents as that takes.

    Raises:
        ComparisonError: one is given twice.
    """
    paths = [found.weights.resolve() for found in checkpoints]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise ComparisonError(f"CHECKPOINT: got {checkpoints[number].name} twice, expected each once")
    names = [found.name for found in checkpoints]
    folders = [path.parent if path.name == "final" else path for path in paths]
    for depth in range(2, max(len(folder.parts) for folder in folders) + 1):
        longer = ["_".join(folder.parts[-depth:]) for folder in folders]
        pairs = zip(names, longer, strict=True)
        names = [more if names.count(name) > 1 else name for name, more in pairs]
    return {name.replace("/", "_"): found for name, found in zip(names, checkpoints, strict=True)}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns what changes when a checkpoint's files do: where they are, how long, how old."""
    files = sorted(file for file in checkpoint.weights.iterdir() if file.suffix in (".safetensors", ".json", ".jinja"))
    parts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.is_file()]
    return "; ".join([str(checkpoint.weights.resolve()), *parts])
