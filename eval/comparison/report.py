"""report.html: one file that opens offline, made from a comparison's rows and cells."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from eval.checkpoint import Checkpoint
from eval.comparison import rows as tables
from eval.comparison.plots import Point, draw_learning_curves, draw_live_grid, draw_scores
from eval.overlay import draw_overlay

TEMPLATE = "report.html.jinja"
Cells = Mapping[tuple[str, str, str], tables.Record]


def write_report(
    out: Path,
    rows: Sequence[tables.Row],
    cells: Cells,
    failures: Sequence[str],
    baselines: Mapping[str, str],
    settings: Mapping[str, Any],
    checkpoints: Mapping[str, Checkpoint],
) -> None:
    """Writes report.html and the plots in it, which also stand beside it as PNG.

    Args:
        out: the comparison's folder.
        rows: all rows, with their differences.
        cells: the records of the rows that have one, by (run, schedule, task).
        failures: what failed and why, a line each.
        baselines: what each task's rows are compared with, in words.
        settings: what all rows have in common.
        checkpoints: by the names of their rows, for their training.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    curves = out / "learning_curves.png"
    has_curves = any(checkpoint.log for checkpoint in checkpoints.values())
    if has_curves:
        draw_learning_curves(checkpoints, curves)
    html = environment.get_template(TEMPLATE).render(
        tasks=[_task(task, rows, cells, baselines.get(task), out) for task in tasks],
        failures=failures,
        settings=settings,
        training=tables.training_table({name: checkpoint.run for name, checkpoint in checkpoints.items()}),
        curves=embedded(curves) if has_curves else None,
        published=tables.published(),
    )
    (out / "report.html").write_text(html, encoding="utf-8")


def _task(task: str, rows: Sequence[tables.Row], cells: Cells, baseline: str | None, out: Path) -> dict[str, Any]:
    """Returns what the template shows of one task."""
    every = [row for row in rows if row["task"] == task]
    members = [row for row in every if "pooled_in" not in row]
    done = _representatives(members, every, cells)
    plots = []
    scale_flops, unit = tables.flops_unit(members)
    for name, title, label, key, scale in (
        ("flops", "Score against the decoder's FLOPs", f"decoder {unit} of one prompt", "flops", scale_flops),
        ("time", "Score against measured time", "prefill, milliseconds a prompt", "prefill_seconds", 1e3),
    ):
        if file := _score_plot(members, out / f"{task}_score_{name}.png", label, key, scale):
            plots.append({"title": title, "image": embedded(file), "name": name})
    if done:
        file = out / f"{task}_live_tokens.png"
        draw_live_grid({title: cell["costs"]["live"] for title, (_, cell) in done.items()}, file)
        plots.append({"title": "Live visual tokens by layer", "image": embedded(file), "name": "live"})
    return {
        "name": task,
        "note": tables.note(members, baseline),
        "scores": tables.score_table(members),
        "costs": tables.cost_table(members),
        "plots": plots,
        "samples": _samples(done, out, task),
    }


def _representatives(
    members: Sequence[tables.Row], every: Sequence[tables.Row], cells: Cells
) -> dict[str, tuple[str, tables.Record]]:
    """Returns, by the title of each row with a finished cell, run and cell; of several seeds the first one's."""
    found = {}
    for row in members:
        alike = [one for one in every if one.get("pooled_in") == row["run"] and one["schedule"] == row["schedule"]]
        run = alike[0]["run"] if alike else row["run"]
        cell = cells.get((run, row["schedule"], row["task"]))
        if cell is not None and cell["status"] == "done":
            found[f"{row['run']}, {tables.shown_schedule(row)}"] = run, cell
    return found


def _score_plot(members: Sequence[tables.Row], file: Path, label: str, key: str, scale: float) -> Path | None:
    """Draws scores against one cost; returns the file, or None where no row has both."""
    shares = any(row.get("scale") == 1 for row in members)
    percent = 100 if shares else 1
    points = [
        Point(
            row["run"],
            row["schedule"],
            row[key] * scale,
            row["score"] * percent,
            None if row["standard_error"] is None else row["standard_error"] * percent,
        )
        for row in members
        if row["status"] == "done" and row.get(key)
    ]
    if not points:
        return None
    floors = {row["run"]: row["score"] * percent for row in members if row["schedule"] == tables.FLOOR}
    metric = next(row["metric"] for row in members if row["status"] == "done")
    draw_scores(points, file, cost=label, score=f"{metric}{', %' if shares else ''}", floors=floors)
    return file


def _samples(done: Mapping[str, tuple[str, tables.Record]], out: Path, task: str) -> list[dict[str, Any]]:
    """Returns the sample pages: each question with every row's answer and live tokens."""
    if not done:
        return []
    first_run, first = next(iter(done.values()))
    pages = []
    for place, shown in enumerate(first["shown"]):
        entries = []
        for title, (run, cell) in done.items():
            sample = next(sample for sample in cell["samples"] if sample["id"] == shown["id"])
            strip = _strip(cell["shown"][place], out / "cells" / run / f"{task}_pictures")
            entries.append({"row": title, "answer": sample["answer"], "value": sample["value"], "strip": strip})
        picture = shown["picture"] and out / "cells" / first_run / f"{task}_pictures" / shown["picture"]
        target = next(sample["target"] for sample in first["samples"] if sample["id"] == shown["id"])
        pages.append(
            {
                "question": shown["question"],
                "target": target,
                "picture": embedded(picture) if picture else None,
                "entries": entries,
            }
        )
    return pages


def _strip(shown: Mapping[str, Any], pictures: Path) -> str | None:
    """Returns the live tokens of one sample page as an embedded picture; None without a grid of visual tokens."""
    if not shown["picture"] or shown["grid"] is None:
        return None
    rows, columns = shown["grid"]
    live = torch.zeros(shown["runs"][-1]["last"] + 1, rows * columns, dtype=torch.bool)
    for run in shown["runs"]:
        live[run["first"] : run["last"] + 1, run["tokens"]] = True
    with Image.open(pictures / shown["picture"]) as picture:
        strip = draw_overlay(picture, live, (rows, columns))
    stream = io.BytesIO()
    strip.quantize(128).save(stream, format="PNG", optimize=True)
    return _data_uri(stream.getvalue())


def embedded(file: Path) -> str:
    """Returns a PNG file as a URI that holds it."""
    return _data_uri(file.read_bytes())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
