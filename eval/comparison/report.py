"""report.html: one file that opens offline, made from a comparison's rows and cells."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from eval.comparison import tables
from eval.comparison.plots import Point, draw_learning_curves, draw_live, draw_scores
from eval.comparison.tables import FLOOR, Record, Row
from eval.live import draw_overlay

if TYPE_CHECKING:
    from eval.compare import Comparison

TEMPLATE = "report.html.jinja"
Done = Mapping[str, tuple[Record, Path]]  # by the title of a row: its cell, and the folder of the cell's pictures


def write_report(
    comparison: Comparison, rows: Sequence[Row], baselines: Mapping[str, str], failures: Sequence[str]
) -> None:
    """Writes report.html and the plots in it, which also stand beside it as PNG.

    `rows` are all rows with their differences, `baselines` what each task's rows are compared with, in words.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    curves = comparison.out / "learning_curves.png"
    has_curves = any(checkpoint.log for checkpoint in comparison.checkpoints.values())
    if has_curves:
        draw_learning_curves(comparison.checkpoints, curves)
    html = environment.get_template(TEMPLATE).render(
        tasks=[_task(comparison, task, rows, baselines.get(task)) for task in comparison.tasks],
        failures=failures,
        settings=comparison.settings,
        training=tables.training_table({name: found.run for name, found in comparison.checkpoints.items()}),
        curves=embedded(curves.read_bytes()) if has_curves else None,
        published=tables.published(),
    )
    (comparison.out / "report.html").write_text(html, encoding="utf-8")


def plots_of(task: str) -> tuple[str, str, str]:
    """Returns the names of a task's plots: score against FLOPs and time, live tokens."""
    return f"{task}_score_flops.png", f"{task}_score_time.png", f"{task}_live_tokens.png"


def _task(comparison: Comparison, task: str, rows: Sequence[Row], baseline: str | None) -> dict[str, Any]:
    """Returns what the template shows of one task."""
    members = [row for row in rows if row["task"] == task and "pooled_in" not in row]
    done = _done(comparison, members, rows)
    plots = []
    scale, unit = tables.flops_unit(members)
    by_flops, by_time, live = (comparison.out / name for name in plots_of(task))
    for name, title, target, label, key, factor in (
        ("flops", "Score against the decoder's FLOPs", by_flops, f"decoder {unit} of one prompt", "flops", scale),
        ("time", "Score against measured time", by_time, "prefill, milliseconds a prompt", "prefill_seconds", 1e3),
    ):
        if file := _score_plot(members, target, label, key, factor):
            plots.append({"title": title, "image": embedded(file.read_bytes()), "name": name})
    if done:
        draw_live({title: cell["costs"]["live"] for title, (cell, _) in done.items()}, live)
        plots.append({"title": "Live visual tokens by layer", "image": embedded(live.read_bytes()), "name": "live"})
    return {
        "name": task,
        "note": tables.note(members, baseline),
        "scores": tables.score_table(members),
        "costs": tables.cost_table(members),
        "plots": plots,
        "samples": _samples(done),
    }


def _done(comparison: Comparison, members: Sequence[Row], rows: Sequence[Row]) -> Done:
    """Returns the finished cell of each row by the row's title; of several seeds the first one's."""
    first: dict[Any, str] = {}
    for row in rows:
        if "pooled_in" in row:
            first.setdefault((row["pooled_in"], row["schedule"], row["task"]), row["run"])
    found = {}
    for row in members:
        run = first.get((row["run"], row["schedule"], row["task"])) or row["run"]
        if row["schedule"] != FLOOR and row["status"] == "done":
            cell = comparison.cell(run, row["schedule"], row["task"])
            found[f"{row['run']}, {tables.shown_schedule(row)}"] = cell, comparison.pictures(run, row["task"])
    return found


def _score_plot(members: Sequence[Row], file: Path, label: str, key: str, scale: float) -> Path | None:
    """Draws scores against one cost; returns the file, or None where no row has both."""
    is_share = any(row.get("scale") == 1 for row in members)
    percent = 100 if is_share else 1
    points = [
        Point(row["run"], row["schedule"], row[key] * scale, row["score"] * percent,
              None if row["standard_error"] is None else row["standard_error"] * percent)
        for row in members
        if row["status"] == "done" and row.get(key)
    ]  # fmt: skip
    if not points:
        return None
    floors = {row["run"]: row["score"] * percent for row in members if row["schedule"] == FLOOR}
    metric = next(row["metric"] for row in members if row["status"] == "done")
    draw_scores(points, file, cost=label, score=f"{metric}{', %' if is_share else ''}", floors=floors)
    return file


def _samples(done: Done) -> list[dict[str, Any]]:
    """Returns the sample pages: each question with every row's answer and live tokens."""
    pages = []
    answers = {title: {sample["id"]: sample for sample in cell["samples"]} for title, (cell, _) in done.items()}
    first, pictures = next(iter(done.values()), ({"shown": []}, Path()))
    for place, shown in enumerate(first["shown"]):
        number = shown["id"]
        entries = [
            {
                "row": title,
                "answer": answers[title][number]["answer"],
                "value": answers[title][number]["value"],
                "strip": _strip(cell["shown"][place], folder),
            }
            for title, (cell, folder) in done.items()
        ]
        page = {"question": shown["question"], "target": answers[next(iter(done))][number]["target"]}
        picture = _picture(pictures, shown)
        pages.append({**page, "picture": picture and embedded(_png(picture)), "entries": entries})
    return pages


def _strip(shown: Mapping[str, Any], pictures: Path) -> str | None:
    """Returns the live tokens of one sample page as an embedded picture; None without a grid of visual tokens."""
    picture = _picture(pictures, shown)
    if picture is None or shown["grid"] is None:
        return None
    rows, columns = shown["grid"]
    live = torch.zeros(shown["runs"][-1]["last"] + 1, rows * columns, dtype=torch.bool)
    for run in shown["runs"]:
        live[run["first"] : run["last"] + 1, run["tokens"]] = True
    return embedded(_png(draw_overlay(picture, live, (rows, columns)).quantize(128)))


def _picture(pictures: Path, shown: Mapping[str, Any]) -> Image.Image | None:
    """Returns the image of one sample page; None where there is none, or it is no longer there."""
    if not shown["picture"]:
        return None
    try:
        with Image.open(pictures / shown["picture"]) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError):  # SyntaxError: of a damaged PNG
        return None


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def embedded(png: bytes) -> str:
    """Returns the content of a PNG file as a URI that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
