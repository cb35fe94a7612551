"""Checkpoints that are either whole or not there: a marker is written last, and only marked ones are resumed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from recipes.resolved import changes
from recipes.schema import Recipe, RecipeError

MARKER: Final = "complete.json"
RECIPE: Final = "recipe.yaml"
# What may change between a run and its continuation without changing what it computes.
_HARMLESS: Final = (
    "name",
    "output",
    "data.workers",
    "train.max_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.log_steps",
)


@dataclass(frozen=True)
class Progress:
    """How far a run was at a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    ranks: int = 1


def mark(folder: Path, progress: Progress) -> None:
    """Declares a checkpoint whole, after everything in it is on the disk."""
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        _sync(file)
    partial = folder / f"{MARKER}.partial"
    partial.write_text(json.dumps(asdict(progress)), encoding="utf-8")
    _sync(partial)
    partial.rename(folder / MARKER)
    _sync(folder)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Returns the whole checkpoints of a run folder, oldest first."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{MARKER}")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def read_progress(checkpoint: Path) -> Progress:
    """Returns how far the run was at a whole checkpoint."""
    return Progress(**json.loads((checkpoint / MARKER).read_text(encoding="utf-8")))


def set_aside(folder: Path) -> list[Path]:
    """Renames checkpoints whose writing was cut off to `incomplete-...`; returns where they are now."""
    moved = []
    for path in sorted(folder.glob("checkpoint-*")):
        if path.is_dir() and not (path / MARKER).is_file():
            target = path.with_name(f"incomplete-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def keep_newest(folder: Path, limit: int) -> None:
    """Deletes all whole checkpoints but the newest `limit`; the marker goes first."""
    for path in whole_checkpoints(folder)[:-limit]:
        (path / MARKER).unlink()
        shutil.rmtree(path)


def check_same_run(recipe: Recipe, folder: Path) -> None:
    """Refuses a run folder with checkpoints or a final model of another recipe.

    Raises:
        RecipeError: naming the first key that differs, and both values.
    """
    saved = folder / RECIPE
    if not saved.is_file():
        return
    if not any(whole_checkpoints(part) or (part / "final").is_dir() for part in (folder, folder / "align")):
        return
    for key, before, now in changes(recipe, saved):
        if key.removeprefix("align.") not in _HARMLESS:
            raise RecipeError(
                f"output: {folder} holds a run with {key} {before!r}, found {now!r}; "
                "accepted: the same recipe, another output, or an empty folder"
            )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
