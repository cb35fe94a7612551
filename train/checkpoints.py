"""Checkpoints that are either whole or not used: a marker with the checksums of all files is written last."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from data.rows import Fault
from recipes.resolved import changes
from recipes.schema import Recipe, RecipeError

MARKER: Final = "complete.json"
RECIPE: Final = "recipe.yaml"
_NAME: Final = re.compile(r"checkpoint-(\d+)")
_LEFT_OVER: Final = re.compile(r"(incomplete|broken|deleted|resharded)-checkpoint-\d+")
_THREADS: Final = 8
# What may change between a run and its continuation. The last three change losses by rounding alone; what a change of
# max_steps does to the learning rate is said when it happens. The DeepSpeed file's content is compared, not its path.
_MAY_CHANGE: Final = (
    "name",
    "output",
    "data.workers",
    "data.max_bad_rows",
    "data.expected_rows",
    "data.expected_text_tokens",
    "data.expected_visual_tokens",
    "train.deepspeed",
    "train.max_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.log_steps",
    "train.tracker",
    "train.profile",
    "train.profile.steps",
    "train.per_device_batch",
    "train.gradient_checkpointing",
    "eval.every",
    "eval.patience",
)


@dataclass(frozen=True)
class Progress:
    """How far a run was at a checkpoint, and what it was a run of.

    Attributes:
        step: optimizer steps done.
        seconds: seconds of training.
        samples: samples seen, all ranks.
        tokens: tokens seen, all ranks; visual: visual tokens among these.
        ranks: processes that wrote the checkpoint.
        window: sums of the steps since the last log line, and the seconds at that line.
        fingerprints: digests of the data, the DeepSpeed configuration and the schedule of learning rates.
        faults: rows that all ranks passed over.
        search: the state of the search for the stage plan; empty without one.
    """

    step: int = 0
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    visual: int = 0
    ranks: int = 1
    window: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    faults: Sequence[Fault] = ()
    search: Mapping[str, Any] = field(default_factory=dict)


def mark(folder: Path, progress: Progress) -> None:
    """Declares a checkpoint whole, after everything in it is on the disk."""
    files = _files(folder)
    for file in files:
        _sync(file)
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(_checksum, files))
    listed = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, sums, strict=True)
    }
    partial = folder / f"{MARKER}.partial"
    partial.write_text(json.dumps({**asdict(progress), "files": listed}, indent=1), encoding="utf-8")
    _sync(partial)
    partial.rename(folder / MARKER)
    _sync(folder)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Returns the marked checkpoints of a run folder, oldest first."""
    return sorted((path for path in _checkpoints(folder) if (path / MARKER).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the step that a checkpoint's name tells."""
    return int(checkpoint.name.rpartition("-")[2])


def read_progress(checkpoint: Path) -> Progress:
    """Returns how far the run was at a marked checkpoint.

    Raises:
        ValueError: the marker is not one.
    """
    found = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    known = {entry.name for entry in fields(Progress)}
    if not isinstance(found, dict) or not known <= found.keys():
        raise ValueError(f"{checkpoint / MARKER}: got other keys, expected {', '.join(sorted(known))}")
    faults = tuple(Fault(**one) for one in found["faults"])
    return Progress(**{**{name: found[name] for name in known}, "faults": faults})


def find_fault(checkpoint: Path) -> str | None:
    """Returns what is wrong with a marked checkpoint: a file that is missing, or is not what was written; or None."""
    try:
        progress = read_progress(checkpoint)
        listed = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
        wanted = {checkpoint / name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MARKER} cannot be read ({type(error).__name__})"
    if progress.step != step_of(checkpoint):
        return f"{MARKER} is of step {progress.step}"
    for file, (size, _) in wanted.items():
        if not file.is_file():
            return f"{file.name} is missing"
        if file.stat().st_size != size:
            return f"{file.name} has {file.stat().st_size} bytes, expected {size}"
    with ThreadPoolExecutor(_THREADS) as pool:
        for file, digest in zip(wanted, pool.map(_checksum, wanted), strict=True):
            if digest != wanted[file][1]:
                return f"{file.name} is not what was written (its checksum differs)"
    return None


def set_aside(folder: Path) -> list[str]:
    """Renames checkpoints that cannot be resumed, and deletes what an earlier run meant to delete.

    A checkpoint whose writing was cut off becomes `incomplete-checkpoint-N`. From the newest on, marked checkpoints
    with a fault become `broken-checkpoint-N`, down to the first without.

    Returns:
        One line for each that was renamed.
    """
    notes = []
    for path in _entries(folder):
        if path.name.startswith(("deleted-checkpoint-", "resharded-checkpoint-")):
            shutil.rmtree(path, ignore_errors=True)
    for path in _checkpoints(folder):
        if not (path / MARKER).is_file():
            _rename(path, "incomplete")
            notes.append(f"incomplete-{path.name}: its writing was cut off; not resumed")
    for path in reversed(whole_checkpoints(folder)):
        fault = find_fault(path)
        if fault is None:
            break
        _rename(path, "broken")
        notes.append(f"broken-{path.name}: {fault}; not resumed")
    return notes


def keep_newest(folder: Path, limit: int, *, best: int | None = None) -> None:
    """Deletes all whole checkpoints but the newest `limit` and that of step `best`, and all that cannot be resumed."""
    for path in whole_checkpoints(folder)[:-limit]:
        if step_of(path) != best:
            shutil.rmtree(_rename(path, "deleted"))
    for path in _entries(folder):
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def check_same_run(recipe: Recipe, folder: Path) -> None:
    """Refuses a run folder with checkpoints or a final model of another recipe.

    Raises:
        RecipeError: naming the first key that differs, and both values.
    """
    saved = folder / RECIPE
    parts = (folder, folder / "align")
    if not any(whole_checkpoints(part) or (part / "final").is_dir() for part in parts):
        return
    if not saved.is_file():
        raise RecipeError(f"output: {folder} holds a run without {RECIPE}, expected another output, or an empty folder")
    for key, before, now in changes(recipe, saved):
        if key.removeprefix("align.") not in _MAY_CHANGE:
            raise RecipeError(
                f"output: {folder} holds a run with {key} {before!r}, got {now!r}; "
                "expected the same recipe, another output, or an empty folder"
            )


def check_same_content(checkpoint: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuses a checkpoint of other data or another DeepSpeed configuration.

    Raises:
        RecipeError: naming which.
    """
    words = {
        "data": "the data (rows, their length in tokens, or which of them have an image)",
        "deepspeed": "the content of train.deepspeed",
    }
    for name, what in words.items():
        if before.get(name) != now[name]:
            raise RecipeError(
                f"output: {what} changed since {checkpoint.name} was written; expected the same, another output, "
                "or an empty folder"
            )


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if _NAME.fullmatch(path.name) and path.is_dir()]


def _entries(folder: Path) -> Sequence[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _rename(path: Path, word: str) -> Path:
    target = path.with_name(f"{word}-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    return path.rename(target)


def _files(folder: Path) -> list[Path]:
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names if name not in (MARKER, f"{MARKER}.partial"))


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
