"""The rows of a comparison, made from its cells alone: scores with their errors, differences and costs; as text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data import easy_vqa as easy_vqa_data
from data import scenes as scenes_data
from data.scene_questions import FAMILIES
from eval import easy_vqa, scenes
from eval.easy_vqa import mean as mean_of
from eval.paired import difference, standard_error

Record = dict[str, Any]
Row = dict[str, Any]
FLOOR = "-"  # the schedule of a row that no model stands behind
PUBLISHED = Path(__file__).parent / "published.json"
COSTS = (
    "run",
    "schedule",
    "prefill (ms)",
    "faster",
    "tokens/s",
    "peak memory (MiB)",
    "KV cache (KiB)",
    "visual token-layers",
    "vision attention",
    "decoder MFLOPs",
    "of dense",
)
_CLOSE = 1e-6


def cell_row(run: str, schedule: str, task: str, cell: Record, speed: Mapping[str, float] | None) -> Row:
    """Returns the row of one cell; of a failed one its error.

    Args:
        run: the checkpoint's name.
        schedule: its name.
        task: lmms-eval's name.
        cell: the cell's record.
        speed: what `eval.speed` measured; None where that is not done.
    """
    row: Row = {"run": run, "schedule": schedule, "task": task, "status": cell["status"]}
    if cell["status"] != "done":
        return {**row, "error": cell["error"], "score": None}
    benchmark, costs, metrics = cell["benchmark"], cell["costs"], cell["metrics"]
    counted = [sample for sample in cell["samples"] if sample["value"] is not None]
    return {
        **row,
        "within_plan": cell["stages"] is not None and schedule not in ("trained", "dense"),
        "metric": benchmark["metric"],
        "scale": benchmark["scale"],
        "score": metrics[benchmark["metric"]],
        "standard_error": score_error(metrics[benchmark["metric"]], benchmark["scale"], counted),
        "num_questions": len(cell["samples"]),
        "metrics": metrics,
        **{name: costs[name] for name in ("visual_token_layers", "token_layers", "flops", "vision_attention")},
        "dense_flops": costs["dense"]["flops"],
        "dense_visual_token_layers": costs["dense"]["visual_token_layers"],
        **(speed or {}),
    }


def score_error(score: float, scale: float | None, counted: Sequence[Record]) -> float | None:
    """Returns the standard error of a score that is `scale` times the mean of its questions' values.

    None for a score of another kind, of which the questions tell no error so simply.
    """
    if scale is None or not counted:
        return None
    values = [sample["value"] for sample in counted]
    if abs(score - scale * sum(values) / len(values)) > _CLOSE * scale:
        return None
    error = standard_error(values, [sample["image"] for sample in counted])
    return None if error is None else scale * error


def floor_rows(task: str, limit: int | None) -> list[Row]:
    """Returns the rows of what can be had without an image; of the built-in sets alone."""
    asked, floors, kinds = _floors(task, limit)
    rows = []
    for name, said in floors.items():
        right = [float(answer == question.answer) for answer, question in zip(said, asked, strict=True)]
        metrics = {"accuracy": mean_of(right)}
        for kind, metric in kinds.items():
            members = [hit for hit, question in zip(right, asked, strict=True) if question.kind == kind]
            if members:
                metrics[metric] = mean_of(members)
        row = {"run": name, "schedule": FLOOR, "task": task, "status": "done", "scale": 1.0, "metric": "accuracy"}
        error = standard_error(right, [question.image.name for question in asked])
        rows.append(
            {
                **row,
                "score": metrics["accuracy"],
                "standard_error": error,
                "num_questions": len(asked),
                "metrics": metrics,
            }
        )
    return rows


def _floors(task: str, limit: int | None) -> tuple[Sequence[Any], dict[str, list[str]], Mapping[str, str]]:
    """Returns a built-in task's questions, the answers of each floor, and the metric of each kind of question."""
    if task in scenes.SPLITS:
        kinds = {family: family for family in FAMILIES}
        return scenes_data.questions(scenes.SPLITS[task])[:limit], scenes.floors(task, limit), kinds
    if task.startswith("easy_vqa"):
        return easy_vqa_data.questions("test")[:limit], easy_vqa.floors(limit), easy_vqa.KINDS
    return [], {}, {}


def baseline_of(rows: Sequence[Row], stages: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns (run, schedule) of the dense row: of the first dense checkpoint, else the first under `dense`.

    Args:
        rows: all rows.
        stages: each run's stage plan, None for a dense checkpoint.
    """
    done = [row for row in rows if row["status"] == "done" and row["schedule"] == "dense"]
    dense = [row for row in done if stages.get(row["run"]) is None] or done
    return (dense[0]["run"], dense[0]["schedule"]) if dense else None


def compared(cell: Record, base: Record) -> Row:
    """Returns what a cell's questions score more than the dense cell's, as a row's `difference`.

    In the unit of a question's value: 0 to 1, so 0.01 is a point.
    """
    known = {sample["id"]: sample["value"] for sample in base["samples"] if sample["value"] is not None}
    both = [sample for sample in cell["samples"] if sample["value"] is not None and sample["id"] in known]
    if not both:
        return {}
    found = difference(
        [known[sample["id"]] for sample in both],
        [sample["value"] for sample in both],
        [sample["image"] for sample in both],
    )
    return {"difference": vars(found)}


def published() -> list[list[str]]:
    """Returns heading and rows of published figures, which stand in a report for reference."""
    record = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    lines = [["model", "method", *record["columns"], "source"]]
    for row in record["rows"]:
        scores = ["-" if score is None else f"{score:,.1f}" for score in row["scores"]]
        lines.append([row["model"], row["method"], *scores, row["source"]])
    return lines


def shown_schedule(row: Row) -> str:
    """Returns a row's schedule as tables show it."""
    return f"{row['schedule']} within the plan" if row.get("within_plan") else row["schedule"]


def score_text(row: Row, value: float | None, error: float | None = None) -> str:
    """Returns a score with its standard error, in per cent where it is a share."""
    if value is None:
        return "failed" if row["status"] == "failed" else "-"
    scale, unit, digits = (100, " %", 2) if row["scale"] == 1 else (1, "", 1)
    shown = f"{value * scale:.{digits}f}"
    return f"{shown}{unit}" if error is None else f"{shown} ± {error * scale:.{digits}f}{unit}"


def difference_text(row: Row) -> str:
    """Returns a difference in points of a question's value, with its 95 % interval."""
    found = row.get("difference")
    if not found:
        return "reference" if row.get("is_reference") else "-"
    mean, low, high = (100 * found[name] for name in ("mean", "low", "high"))
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def p_text(row: Row) -> str:
    """Returns the p-value of a difference."""
    found = row.get("difference")
    if not found:
        return "-"
    return "< 0.001" if found["p"] < 0.001 else f"{found['p']:.3f}"  # what the bootstrap resolves


def score_table(rows: Sequence[Row]) -> list[list[str]]:
    """Returns heading and rows of one task's scores."""
    extra = [name for row in rows for name in row.get("metrics", {}) if name != row["metric"]]
    extra = list(dict.fromkeys(extra))
    metric = next((row["metric"] for row in rows if row.get("metric")), "score")
    lines = [["run", "schedule", metric, *extra, "to dense, points", "p", "gained / lost"]]
    for row in rows:
        found, metrics = row.get("difference"), row.get("metrics", {})
        lines.append(
            [
                row["run"],
                shown_schedule(row),
                score_text(row, row["score"], row.get("standard_error")),
                *(score_text(row, metrics.get(name)) if metrics else "-" for name in extra),
                difference_text(row),
                p_text(row),
                f"{found['gained']} / {found['lost']}" if found else "-",
            ]
        )
    return lines


def cost_table(rows: Sequence[Row]) -> list[list[str]]:
    """Returns heading and rows of one task's costs; the floors have none."""
    lines = [list(COSTS)]
    for row in rows:
        if row["schedule"] == FLOOR or row["status"] != "done":
            continue
        lines.append(
            [
                row["run"],
                shown_schedule(row),
                _number(row.get("prefill_seconds"), 1e3, 2),
                f"{_number(row.get('faster_than_dense'), 1, 2)} x",
                _number(row.get("decode_tokens_per_second"), 1, 0),
                _number(row.get("peak_bytes"), 2**-20, 1),
                _number(row.get("cache_bytes"), 2**-10, 1),
                _number(row["visual_token_layers"], 1, 0),
                f"{100 * row['vision_attention']:.1f} %",
                _number(row["flops"], 1e-6, 1),
                f"{100 * row['flops'] / row['dense_flops']:.1f} %",
            ]
        )
    return lines


def training_table(training: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Returns heading and rows of what each run's training took; empty without any."""
    lines = [["run", "training seconds", "steps", "samples/s"]]
    for run, record in training.items():
        if record:
            figures = (
                _number(record["seconds"], 1, 1),
                f"{record['steps']:,}",
                _number(record["samples_per_second"], 1, 1),
            )
            lines.append([run, *figures])
    return lines if len(lines) > 1 else []


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Returns a table's lines, heading first, as markdown."""
    heading, *rest = lines
    rows = ["| " + " | ".join(line) + " |" for line in (heading, ["---"] * len(heading), *rest)]
    return "\n".join(rows) + "\n"


def csv_text(rows: Sequence[Row]) -> str:
    """Returns all rows as CSV, nested figures as columns of their own (`difference.p`, `metrics.shape`)."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Row, prefix: str = "") -> Row:
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat.update(_flat(dict(value), f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
