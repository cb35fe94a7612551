"""Runs that differ in their seed alone, and what they say together."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from eval.checkpoint import Checkpoint
from eval.comparison.rows import Record, Row
from eval.paired import Difference, difference, over_seeds, standard_error

_LABELS = ("seed", "name", "output")  # keys of a recipe that say which run it is, not how it was trained
_COSTS = ("visual_token_layers", "token_layers", "flops", "vision_attention", "dense_flops")
_SPEEDS = ("prefill_seconds", "faster_than_dense", "decode_tokens_per_second", "peak_bytes", "cache_bytes")


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


def pooled(label: str, rows: Sequence[Row]) -> Row:
    """Returns one row for the same schedule and task of several seeds: means, and the standard error over seeds.

    Args:
        label: of the runs.
        rows: done ones, at least two.
    """
    scores = [row["score"] for row in rows]
    metrics = {name: statistics.fmean(row["metrics"][name] for row in rows) for name in rows[0]["metrics"]}
    means = {
        name: statistics.fmean(row[name] for row in rows)
        for name in (*_COSTS, *_SPEEDS)
        if all(row.get(name) is not None for row in rows)
    }
    kept = ("schedule", "settings", "task", "status", "within_plan", "metric", "scale", "num_questions")
    return {
        "run": f"{label}, {len(rows)} seeds",
        **{name: rows[0][name] for name in kept},
        "seeds": len(rows),
        "score": statistics.fmean(scores),
        "standard_error": statistics.stdev(scores) / len(scores) ** 0.5,
        "metrics": metrics,
        **means,
    }


def compared(cells: Mapping[int, Record], base: Mapping[int, Record]) -> Difference | None:
    """Returns what cells by seed score more than the reference's, on the questions that all have; None: there are none.

    Over seeds and images, by Student's t, where both have several seeds: paired where they are the same ones. Else
    question by question, by a bootstrap over images, of the mean over seeds.
    """
    new, old = ({seed: _values(cell) for seed, cell in side.items()} for side in (cells, base))
    shared = set.intersection(*(set(values) for values in (*new.values(), *old.values())))
    if not shared:
        return None
    asked = sorted(shared, key=str)
    images = {sample["id"]: sample["image"] for sample in next(iter(cells.values()))["samples"]}
    groups = [images[number] for number in asked]
    first, second = (_means(side, asked) for side in (old, new))
    if len(new) == 1 or len(old) == 1:
        return difference(first, second, groups)
    same = list(new) == list(old)
    scores = [[statistics.fmean(values[number] for number in asked) for values in side.values()] for side in (old, new)]
    changes = [after - before for before, after in zip(first, second, strict=True)]
    error = standard_error(changes, groups) or 0.0
    mean, low, high, p = over_seeds(*scores, paired=same, images=(error, max(2, len(set(groups)))))
    gained = lost = None
    if same:
        each = [new[seed][number] - old[seed][number] for seed in new for number in asked]
        gained, lost = sum(change > 0 for change in each), sum(change < 0 for change in each)
    return Difference(mean, low, high, p, gained, lost)


def _values(cell: Record) -> dict[Any, float]:
    return {sample["id"]: sample["value"] for sample in cell["samples"] if sample["value"] is not None}


def _means(side: Mapping[int, Mapping[Any, float]], asked: Sequence[Any]) -> list[float]:
    return [statistics.fmean(values[number] for values in side.values()) for number in asked]
