"""The rows of a comparison, made from its cells alone: scores with their errors, differences and costs; as text."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data import easy_vqa as easy_vqa_data
from data import scenes as scenes_data
from data.scene_questions import FAMILIES
from eval.paired import standard_error
from eval.tasks import easy_vqa, scenes
from eval.tasks.easy_vqa import mean as mean_of
from models.schedules import Fused, Schedule, Within

Record = dict[str, Any]
Row = dict[str, Any]
FLOOR = "-"  # the schedule of a row that no model stands behind
PUBLISHED = Path(__file__).parent / "published.json"
_CLOSE = 1e-6
_USUAL = {"update": "full", "select": "attention"}  # of a stage plan


def cell_row(
    run: str, label: str, task: str, cell: Record, schedule: Schedule, speed: Mapping[str, float] | None
) -> Row:
    """Returns the row of one cell; of a failed one its error.

    Args:
        run: the checkpoint's name.
        label: the schedule's, as it was asked for.
        task: lmms-eval's name.
        cell: the cell's record.
        schedule: what the label means on this checkpoint.
        speed: what `eval.comparison.speed` measured; None where that is not done.
    """
    row: Row = {"run": run, "schedule": label, "settings": settings_text(schedule), "task": task}
    row["status"] = cell["status"]
    if cell["status"] != "done":
        return {**row, "error": cell["error"], "score": None}
    benchmark, costs, metrics = cell["benchmark"], cell["costs"], cell["metrics"]
    counted = [sample for sample in cell["samples"] if sample["value"] is not None]
    return {
        **row,
        "within_plan": isinstance(schedule, Within),
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


def published() -> list[list[str]]:
    """Returns heading and rows of published figures, which stand in a report for reference."""
    record = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    lines = [["model", "method", *record["columns"], "source"]]
    for row in record["rows"]:
        scores = ["-" if score is None else f"{score:,.1f}" for score in row["scores"]]
        lines.append([row["model"], row["method"], *scores, row["source"]])
    return lines


def settings_text(schedule: Schedule) -> str:
    """Returns the settings of a schedule in words: `layer 2, drop 0.5`; of switches only those that are on.

    Of a plan `update` and `select` are left out where they are what they usually are.
    """
    told = schedule.plan if isinstance(schedule, Fused) else getattr(schedule, "inner", schedule)
    parts = []
    for one in dataclasses.fields(told):  # type: ignore[arg-type]  # every schedule is a dataclass
        value = getattr(told, one.name)
        if value is None or value is False or value == {} or _USUAL.get(one.name) == value:
            continue
        parts.append(f"{one.name} {_value_text(value)}" if value is not True else one.name)
    return ", ".join(parts)


def _value_text(value: Any) -> str:
    """Returns a setting's value; layers that follow each other as `17-31`."""
    if isinstance(value, Mapping):
        return " ".join(f"{amount:g} from {layer}" for layer, amount in value.items())
    if not isinstance(value, tuple):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if not all(type(item) is int for item in value) or sorted(value) != list(value):
        return "/".join(_value_text(item) for item in value)
    runs: list[list[int]] = []
    for item in value:
        if runs and item == runs[-1][-1] + 1:
            runs[-1].append(item)
        else:
            runs.append([item])
    return "/".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else "/".join(map(str, run)) for run in runs)


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
    """Returns the p-value of a difference, corrected for the number of rows compared."""
    found = row.get("difference")
    if not found:
        return "-"
    return "< 0.001" if found["p_holm"] < 0.001 else f"{found['p_holm']:.3f}"


def score_table(rows: Sequence[Row]) -> list[list[str]]:
    """Returns heading and rows of one task's scores; a column that tells rows apart in nothing is left out."""
    extra = [name for row in rows for name in row.get("metrics", {}) if name != row["metric"]]
    extra = list(dict.fromkeys(extra))
    metric = next((row["metric"] for row in rows if row.get("metric")), "score")
    lines = [["run", "schedule", metric, *extra, "to dense, points", "p (Holm)", "gained / lost", "settings"]]
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
                f"{found['gained']:,} / {found['lost']:,}" if found and found["gained"] is not None else "-",
                row.get("settings") or "-",
            ]
        )
    return informing(lines, keep=("run", "schedule", metric))


def note(rows: Sequence[Row], baseline: str | None) -> str:
    """Returns how one task's scores are to be read."""
    pooled, compared = any("seeds" in row for row in rows), sum("difference" in row for row in rows)
    over = "over seeds in rows of several, else over images" if pooled else "over images"
    said = [f"Behind ± stands one standard error, {over}."]
    if baseline is None:
        return f"{said[0]} There is no dense row to compare with."
    students = " (Student's t over seeds and images where both rows have several seeds)" if pooled else ""
    said.append(
        f"Differences are to {baseline} on the same questions, in points, with the 95 % interval of a paired bootstrap "
        f"that resamples whole images{students}."
    )
    told = "1 comparison" if compared == 1 else f"{compared} comparisons"
    said.append(
        f"p is two-sided and corrected for the {told} of this table by Holm's rule; gained and lost count the "
        "questions that a row answers better, and worse."
    )
    return " ".join(said)


def informing(lines: Sequence[Sequence[str]], keep: Sequence[str]) -> list[list[str]]:
    """Returns a table without the columns in which no row says anything, or all say the same within 2 %."""
    heading, *rest = lines
    kept = [number for number, name in enumerate(heading) if name in keep or _tells(column_of(rest, number))]
    return [[line[number] for number in kept] for line in lines]


def column_of(lines: Sequence[Sequence[str]], number: int) -> list[str]:
    """Returns a column's cells, without those that say nothing."""
    return [line[number] for line in lines if line[number] != "-"]


def _tells(cells: Sequence[str]) -> bool:
    if len(cells) < 2:
        return bool(cells)
    try:
        numbers = [float(cell.replace(",", "").removesuffix("%").removesuffix("x")) for cell in cells]
    except ValueError:
        return True
    return max(numbers) - min(numbers) > 0.02 * max(map(abs, numbers))


def cost_table(rows: Sequence[Row]) -> list[list[str]]:
    """Returns heading and rows of one task's costs; the floors have none. Columns as in score_table."""
    scale, unit = flops_unit(rows)
    columns = {
        "prefill (ms)": lambda row: _number(row.get("prefill_seconds"), 1e3, 2),
        "faster": lambda row: _number(row.get("faster_than_dense"), 1, 2, " x"),
        "tokens/s": lambda row: _number(row.get("decode_tokens_per_second"), 1, 0),
        "peak memory (MiB)": lambda row: _number(row.get("peak_bytes"), 2**-20, 1),
        "KV cache (KiB)": lambda row: _number(row.get("cache_bytes"), 2**-10, 1),
        "visual token-layers": lambda row: _number(row["visual_token_layers"], 1, 0),
        f"decoder {unit}": lambda row: _number(row["flops"], scale, 1),
        "of dense": lambda row: _number(row["flops"] / row["dense_flops"], 100, 1, " %"),
    }
    shown = [row for row in rows if row["schedule"] != FLOOR and row["status"] == "done"]
    lines = [["run", "schedule", *columns]]
    lines += [[row["run"], shown_schedule(row), *(cell(row) for cell in columns.values())] for row in shown]
    return informing(lines, keep=("run", "schedule", "visual token-layers", "of dense")) if shown else lines


def flops_unit(rows: Sequence[Row]) -> tuple[float, str]:
    """Returns the unit that suits the rows' FLOPs: what to multiply them with, and its name."""
    largest = max((row["flops"] for row in rows if row.get("flops")), default=0.0)
    for scale, name in ((1e-12, "TFLOPs"), (1e-9, "GFLOPs")):
        if largest * scale >= 1:
            return scale, name
    return 1e-6, "MFLOPs"


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


def _number(value: float | None, scale: float, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}{unit}"


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
