"""The rows of a comparison, made from its cells alone, and the tables of them.

A row has a score with its error, costs, and the difference to dense. Runs that differ in their seed alone have a row
together; the rows of each say `pooled_in`. A table is a list of lines of text, the heading first.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.checkpoint import Checkpoint
from eval.significance import Difference, difference, holm, least_p, over_seeds, standard_error
from eval.tasks.built_in import SETS, floors, metric_of, questions_of
from models.schedules import Fused, Schedule, Within

if TYPE_CHECKING:
    from eval.compare import Comparison

Record = dict[str, Any]
Row = dict[str, Any]
Members = Mapping[tuple[str, str], Sequence[Row]]  # of a row by (run, schedule): its seeds' rows, else itself
PUBLISHED = Path(__file__).parent / "published.json"
FLOOR = "-"  # the schedule of a baseline row without a model, such as `words only`
_CLOSE = 1e-6
_USUAL = {"update": "full", "select": "attention"}  # of a stage plan
_LABELS = ("seed", "name", "output")  # keys of a recipe that say which run it is, not how it was trained
_COSTS = ("visual_token_layers", "token_layers", "flops", "vision_attention")
_SPEEDS = ("prefill_seconds", "faster_than_dense", "decode_tokens_per_second", "peak_bytes", "cache_bytes")


def rows_of(comparison: Comparison) -> tuple[list[Row], dict[str, str]]:
    """Returns all rows, and for each task the dense row that the others are compared with, in words."""
    found: list[Row] = []
    baselines = {}
    groups = groups_of(comparison.checkpoints)
    for task in comparison.tasks:
        rows = [
            cell_row(name, label, task, comparison.cell(name, label, task), schedule, comparison.speed(name))
            for name, chosen in comparison.schedules.items()
            for label, schedule in chosen.items()
        ]
        members = {(row["run"], row["schedule"]): [row] for row in rows}
        for label, runs in groups.items():
            members |= _pool(label, runs, rows)
        shown = [row for row in rows if "pooled_in" not in row]
        base = _baseline(comparison, shown, members)
        if base is not None:
            baselines[task] = f"{base['run']} {base['schedule']}"
            _compare(comparison, shown, members, base)
        found += floor_rows(task, comparison.settings["limit"]) + rows
    return found, baselines


def _baseline(comparison: Comparison, rows: Sequence[Row], members: Members) -> Row | None:
    """Returns the dense row: of the first dense checkpoint, else the first under `dense`."""
    done = [row for row in rows if row["status"] == "done" and row["schedule"] == "dense"]
    first = [members[row["run"], row["schedule"]][0]["run"] for row in done]
    dense = [row for row, run in zip(done, first, strict=True) if comparison.checkpoints[run].stages is None]
    return next(iter(dense or done), None)


def _compare(comparison: Comparison, rows: Sequence[Row], members: Members, base: Row) -> None:
    """Adds to each row its difference from the dense row, with the p-value as it is and corrected for all rows."""

    def by_seed(row: Row) -> dict[int, Record]:
        alike = members[row["run"], row["schedule"]]
        return {one.get("seed", 0): comparison.cell(one["run"], one["schedule"], row["task"]) for one in alike}

    known, differences = by_seed(base), []
    for row in rows:
        row["is_reference"] = row is base
        if row["status"] == "done" and row is not base:
            differs = compared(by_seed(row), known)
            if differs is not None:
                row["difference"] = vars(differs)
                differences.append(row["difference"])
    for differs_by, corrected in zip(differences, holm([one["p"] for one in differences]), strict=True):
        differs_by["p_holm"] = corrected


def cell_row(run: str, label: str, task: str, cell: Record, schedule: Schedule, speed: Record | None) -> Row:
    """Returns the row of one cell; of a failed one its error.

    `label` is the schedule as the command line names it, `speed` the record of what was timed on the checkpoint.
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
        **{name: costs[name] for name in _COSTS},
        "dense_flops": costs["dense"]["flops"],
        "dense_visual_token_layers": costs["dense"]["visual_token_layers"],
        **(speed or {}).get("by_schedule", {}).get(label, {}),
    }


def score_error(score: float, scale: float | None, counted: Sequence[Record]) -> float | None:
    """Returns the standard error of a score that is `scale` times the mean of its questions' values.

    None for a score that is not the mean of its questions' values.
    """
    if scale is None or not counted:
        return None
    values = [sample["value"] for sample in counted]
    if abs(score - scale * statistics.fmean(values)) > _CLOSE * scale:
        return None
    error = standard_error(values, [sample["image"] for sample in counted])
    return None if error is None else scale * error


def floor_rows(task: str, limit: int | None) -> list[Row]:
    """Returns the rows of what can be had without an image; of the built-in sets alone."""
    rows: list[Row] = []
    questions = questions_of(task, limit) if task in SETS else []
    for name, answers in (floors(task, limit) if task in SETS else {}).items():
        right = [float(answer == question.answer) for answer, question in zip(answers, questions, strict=True)]
        metrics = {"accuracy": statistics.fmean(right)}
        for kind in SETS[task][2]:
            members = [hit for hit, question in zip(right, questions, strict=True) if question.kind == kind]
            if members:
                metrics[metric_of(kind)] = statistics.fmean(members)
        row = {"run": name, "schedule": FLOOR, "task": task, "status": "done", "scale": 1.0, "metric": "accuracy"}
        row |= {"score": metrics["accuracy"], "standard_error": standard_error(right, [one.image for one in questions])}
        rows.append({**row, "num_questions": len(questions), "metrics": metrics})
    return rows


def settings_text(schedule: Schedule) -> str:
    """Returns the settings of a schedule in words: `layer 2, drop 0.5`; of switches only those that are on.

    Of a plan `update` and `select` are left out where they are what they usually are.
    """
    source = schedule.plan if isinstance(schedule, Fused) else getattr(schedule, "inner", schedule)
    parts = []
    for one in dataclasses.fields(source):  # type: ignore[arg-type]  # every schedule is a dataclass
        value = getattr(source, one.name)
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
    following = groupby(enumerate(value), lambda pair: pair[1] - pair[0])  # the difference is one for each run
    runs = [[item for _, item in run] for _, run in following]
    return "/".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else "/".join(map(str, run)) for run in runs)


def groups_of(checkpoints: Mapping[str, Checkpoint]) -> dict[str, dict[int, str]]:
    """Returns, by a name for all of them, the runs {seed: name} of each recipe that was trained with several seeds."""
    found: dict[str, dict[int, str]] = {}
    for name, checkpoint in checkpoints.items():
        recipe = checkpoint.recipe
        if recipe is None or "seed" not in recipe:
            continue
        rest = {key: value for key, value in recipe.items() if key not in _LABELS}
        found.setdefault(json.dumps(rest, sort_keys=True, default=str), {}).setdefault(recipe["seed"], name)
    groups: dict[str, dict[int, str]] = {}
    for runs in found.values():
        if len(runs) > 1:
            runs = dict(sorted(runs.items()))
            label = common_name(list(runs.values()))
            groups[label if label not in groups else "+".join(runs.values())] = runs
    return groups


def common_name(names: Sequence[str]) -> str:
    """Returns what names of runs have in common, without a word for the seed: `dense` for dense_seed0, dense_seed1."""
    before, behind = _common_start(names), _common_start([name[::-1] for name in names])[::-1]
    parts = (re.sub(r"[\W_]*(seed|s)?[\W_]*$", "", before), re.sub(r"^[\W_\d]*", "", behind))
    return max(parts, key=len) or names[0]


def _common_start(names: Sequence[str]) -> str:
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike)


def _pool(label: str, runs: Mapping[int, str], rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Adds rows of several seeds together before those of each; returns their members by (run, schedule)."""
    found: dict[tuple[str, str], list[Row]] = {}
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        done = {row["run"]: row for row in rows if row["schedule"] == schedule and row["status"] == "done"}
        members = [{**done[run], "seed": seed} for seed, run in runs.items() if run in done]
        if len(members) < 2:
            continue
        together = _pooled(label, members)
        for row in members:
            done[row["run"]]["pooled_in"] = together["run"]
        rows.insert(rows.index(done[members[0]["run"]]), together)
        found[together["run"], schedule] = members
    return found


def _pooled(label: str, rows: Sequence[Row]) -> Row:
    """Returns one row of the same schedule and task of several seeds: means, and the standard error over seeds."""
    scores = [row["score"] for row in rows]
    figures = (*_COSTS, "dense_flops", *_SPEEDS)
    known = [name for name in figures if all(row.get(name) is not None for row in rows)]
    kept = ("schedule", "settings", "task", "status", "within_plan", "metric", "scale", "num_questions")
    return {
        "run": f"{label}, {len(rows)} seeds",
        **{name: rows[0][name] for name in kept},
        "seeds": len(rows),
        "score": statistics.fmean(scores),
        "standard_error": standard_error(scores, range(len(scores))),
        "metrics": {name: statistics.fmean(row["metrics"][name] for row in rows) for name in rows[0]["metrics"]},
        **{name: statistics.fmean(row[name] for row in rows) for name in known},
    }


def compared(cells: Mapping[int, Record], base: Mapping[int, Record]) -> Difference | None:
    """Returns what cells by seed score more than the reference's, on the questions that all have.

    None where these are about fewer than two images.

    Over seeds and images, by Student's t, where both have several seeds: paired where they are the same ones. Else
    question by question, by a bootstrap over images, of the mean over seeds.
    """
    old, new = ([_values(cell) for cell in side.values()] for side in (base, cells))
    shared = set.intersection(*(set(values) for values in (*new, *old)))
    ids = sorted(shared, key=str)
    images = {sample["id"]: sample["image"] for sample in next(iter(cells.values()))["samples"]}
    groups = [images[number] for number in ids]
    if len(set(groups)) < 2:
        return None
    first, second = ([statistics.fmean(seed[number] for seed in side) for number in ids] for side in (old, new))
    if len(new) == 1 or len(old) == 1:
        return difference(first, second, groups)
    same = list(cells) == list(base)
    scores = [[statistics.fmean(seed[number] for number in ids) for seed in side] for side in (old, new)]
    moved = [after - before for before, after in zip(first, second, strict=True)]
    error = standard_error(moved, groups) or 0.0
    mean, low, high, p = over_seeds(*scores, paired=same, images=(error, len(set(groups))))
    if low == high:  # all images and all seeds moved alike, of which Student's t makes a certainty
        p = max(p, least_p(moved, groups))
    if not same:
        return Difference(mean, low, high, p, None, None)
    changes = [after[number] - before[number] for before, after in zip(old, new, strict=True) for number in ids]
    return Difference(
        mean, low, high, p, gained=sum(change > 0 for change in changes), lost=sum(change < 0 for change in changes)
    )


def _values(cell: Record) -> dict[Any, float]:
    return {sample["id"]: sample["value"] for sample in cell["samples"] if sample["value"] is not None}


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
    """Returns a table's lines, heading first, as markdown; `|` and new lines within a cell do not end it."""
    heading, *rest = ([" ".join(cell.splitlines()).replace("|", r"\|") for cell in line] for line in lines)
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
