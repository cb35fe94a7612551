"""The tables of a comparison, made from its rows: lists of lines of text, the heading first."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.comparison.rows import FLOOR, Row

PUBLISHED = Path(__file__).parent / "published.json"


def published() -> list[list[str]]:
    """Returns published figures, which stand in a report for reference."""
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


def score_table(rows: Sequence[Row]) -> list[list[str]]:
    """Returns one task's scores, without uninformative columns."""
    extra = [name for row in rows for name in row.get("metrics", {}) if name != row["metric"]]
    extra = list(dict.fromkeys(extra))
    metric = next((row["metric"] for row in rows if row.get("metric")), "score")
    lines = [["run", "schedule", metric, *extra, "to dense, points", "p (Holm)", "gained / lost", "settings"]]
    for row in rows:
        metrics = row.get("metrics", {})
        lines.append(
            [
                row["run"],
                shown_schedule(row),
                score_text(row, row["score"], row.get("standard_error")),
                *(score_text(row, metrics.get(name)) if metrics else "-" for name in extra),
                *_difference_texts(row),
                row.get("settings") or "-",
            ]
        )
    return drop_uninformative(lines, keep=("run", "schedule", metric))


def _difference_texts(row: Row) -> tuple[str, str, str]:
    """Returns a row's difference to dense, in points, its p-value, and how many questions it gained and lost."""
    found = row.get("difference")
    if not found:
        return "reference" if row.get("is_reference") else "-", "-", "-"
    mean, low, high = (100 * found[name] for name in ("mean", "low", "high"))
    p = "< 0.001" if found["p_holm"] < 0.001 else f"{found['p_holm']:.3f}"
    is_paired = found["gained"] is not None
    changed = f"{found['gained']:,} / {found['lost']:,}" if is_paired else "-"
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f})", p, changed


def note(rows: Sequence[Row], baseline: str | None) -> str:
    """Returns how one task's scores are to be read."""
    pooled, compared = any("seeds" in row for row in rows), sum("difference" in row for row in rows)
    over = "over seeds in rows of several, else over images" if pooled else "over images"
    if baseline is None:
        return f"± is one standard error, {over}. There is no dense row to compare with."
    students = " (Student's t over seeds and images where both rows have several seeds)" if pooled else ""
    comparisons = "1 comparison" if compared == 1 else f"{compared} comparisons"
    return (
        f"± is one standard error, {over}. Differences are to {baseline} on the same questions, in points, "
        f"with the 95 % interval of a paired bootstrap that resamples whole images{students}. p is two-sided and "
        f"corrected for the {comparisons} of this table by Holm's rule; gained and lost count the questions that a row "
        "answers better, and worse."
    )


def drop_uninformative(lines: Sequence[Sequence[str]], keep: Sequence[str]) -> list[list[str]]:
    """Returns a table without the columns that are empty, or whose numbers agree within 2 %."""
    kept = [column for column in zip(*lines, strict=True) if column[0] in keep or _is_informative(column[1:])]
    return [list(line) for line in zip(*kept, strict=True)]


def _is_informative(column: Sequence[str]) -> bool:
    cells = [cell for cell in column if cell != "-"]
    if len(cells) < 2:
        return bool(cells)
    try:
        numbers = [float(cell.replace(",", "").removesuffix("%").removesuffix("x")) for cell in cells]
    except ValueError:
        return True
    return max(numbers) - min(numbers) > 0.02 * max(map(abs, numbers))


def cost_table(rows: Sequence[Row]) -> list[list[str]]:
    """Returns one task's costs; the floors have none. Columns as in score_table."""
    scale, unit = flops_unit(rows)
    columns: dict[str, tuple[str, float, int, str]] = {  # heading: figure of a row, scale, digits, unit
        "prefill (ms)": ("prefill_seconds", 1e3, 2, ""),
        "faster": ("faster_than_dense", 1, 2, " x"),
        "tokens/s": ("decode_tokens_per_second", 1, 0, ""),
        "peak memory (MiB)": ("peak_bytes", 2**-20, 1, ""),
        "KV cache (KiB)": ("cache_bytes", 2**-10, 1, ""),
        "visual token-layers": ("visual_token_layers", 1, 0, ""),
        f"decoder {unit}": ("flops", scale, 1, ""),
        "of dense": ("share_of_flops", 100, 1, " %"),
    }
    lines = [["run", "schedule", *columns]]
    for row in rows:
        if row["schedule"] != FLOOR and row["status"] == "done":
            figures = {**row, "share_of_flops": row["flops"] / row["dense_flops"]}
            cells = [_number(figures.get(column[0]), *column[1:]) for column in columns.values()]
            lines.append([row["run"], shown_schedule(row), *cells])
    if len(lines) == 1:
        return lines
    return drop_uninformative(lines, keep=("run", "schedule", "visual token-layers", "of dense"))


def flops_unit(rows: Sequence[Row]) -> tuple[float, str]:
    """Returns the unit that suits the rows' FLOPs: what to multiply them with, and its name."""
    largest = max((row["flops"] for row in rows if row.get("flops")), default=0.0)
    for scale, name in ((1e-12, "TFLOPs"), (1e-9, "GFLOPs")):
        if largest * scale >= 1:
            return scale, name
    return 1e-6, "MFLOPs"


def training_table(training: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Returns what each run's training took; empty without any."""
    lines = [
        [run, _number(took["seconds"], 1, 1), f"{took['steps']:,}", _number(took["samples_per_second"], 1, 1)]
        for run, took in training.items()
        if took
    ]
    return [["run", "training seconds", "steps", "samples/s"], *lines] if lines else []


def _number(value: float | None, scale: float, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}{unit}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Returns a table's lines, heading first, as markdown."""
    heading, *rest = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (heading, ["---"] * len(heading), *rest))


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
