"""The run folder: checkpoints that are either whole or not used, and the lock that keeps two runs out of one folder.

A checkpoint is whole once its marker is written, last, with the checksums of all files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from data.rows import Fault
from recipes.resolved import changes
from recipes.schema import Recipe, RecipeError
from train.errors import TrainingError

MARKER: Final = "complete.json"
RECIPE: Final = "recipe.yaml"
FINAL: Final = "final"  # folder with the result of a phase
INITIAL: Final = "init"  # folder with the model that a run starts from: built once, then loaded by every rank
RUN: Final = "run.json"  # its figures
_NAME: Final = re.compile(r"checkpoint-(\d+)")
_LEFT_OVER: Final = re.compile(r"(incomplete|broken|deleted|resharded)-checkpoint-\d+")
_THREADS: Final = 8
_RESHARD_WORKERS: Final = "2"  # processes that read, and that write; each holds one rank's part in memory
_HEARTBEAT_SECONDS: Final = 5.0
_STALE_SECONDS: Final = 30.0  # after which a holder of the lock on another host counts as gone
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
    """The state of a run at a checkpoint, and what it was trained on.

    Attributes:
        step: optimizer steps done.
        seconds: seconds of training.
        samples: samples seen, all ranks.
        tokens: tokens seen, all ranks; visual: visual tokens among these.
        ranks: processes that wrote the checkpoint.
        window: sums of the steps since the last log line, and the seconds at that line.
        fingerprints: digests of the data, the processor, config.json and the DeepSpeed configuration, and the schedule
            of learning rates.
        faults: unreadable rows, of all ranks, which were skipped.
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


def mark_complete(folder: Path, progress: Progress) -> None:
    """Declares a checkpoint whole, after everything in it is on the disk."""
    partial = folder / f"{MARKER}.partial"
    files = files_of(folder, but=(MARKER, partial.name))
    for file in files:
        _sync(file)
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(sha256_of, files))
    listed = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, sums, strict=True)
    }
    partial.write_text(json.dumps({**asdict(progress), "files": listed}, indent=1), encoding="utf-8")
    _sync(partial)
    partial.rename(folder / MARKER)
    _sync(folder)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Returns the marked checkpoints of a run folder, oldest first."""
    return sorted((path for path in _entries(folder, _NAME) if (path / MARKER).is_file()), key=step_of)


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
        step = read_progress(checkpoint).step
        listed = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
        wanted = {checkpoint / name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MARKER} cannot be read ({type(error).__name__})"
    if step != step_of(checkpoint):
        return f"{MARKER} is of step {step}"
    for file, (size, _) in wanted.items():
        if not file.is_file():
            return f"{file.name} is missing"
        if file.stat().st_size != size:
            return f"{file.name} has {file.stat().st_size} bytes, expected {size}"
    with ThreadPoolExecutor(_THREADS) as pool:
        for file, digest in zip(wanted, pool.map(sha256_of, wanted), strict=True):
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
    for path in _entries(folder, _LEFT_OVER):
        if path.name.startswith(("deleted-", "resharded-")):
            shutil.rmtree(path, ignore_errors=True)
    for path in _entries(folder, _NAME):
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
            _rename(path, "deleted")
    for path in _entries(folder, _LEFT_OVER):
        shutil.rmtree(path, ignore_errors=True)


def check_same_run(recipe: Recipe, folder: Path) -> None:
    """Refuses a run folder with checkpoints or models of another recipe, or of another program.

    Raises:
        RecipeError: naming what is there, or the first key that differs, and both values.
    """
    saved, parts = folder / RECIPE, (folder, folder / "align")
    if not saved.is_file():  # a run of ours writes it before anything else
        names = (INITIAL, FINAL, f"{FINAL}.partial")
        found = [path for part in parts for path in (*_entries(part, _NAME), *(part / name for name in names))]
        for path in found:
            if path.exists():
                raise RecipeError(
                    f"output: got {folder} with {path.relative_to(folder)} and no {RECIPE}, which no run here has "
                    "written, expected another output, or an empty folder"
                )
    if not any(whole_checkpoints(part) or (part / FINAL).is_dir() for part in parts):
        return
    for key, before, now in changes(recipe, saved):
        if key.removeprefix("align.") not in _MAY_CHANGE:
            raise RecipeError(
                f"output: {folder} holds a run with {key} {before!r}, got {now!r}; "
                "expected the same recipe, another output, or an empty folder"
            )


def check_sources(recipe: Recipe, folder: Path) -> None:
    """Raises RecipeError if the model starts from something that a run in this folder renames or deletes."""
    phases = folder.resolve(), folder.resolve() / "align"
    for part in ("config", "checkpoint", "language_model", "vision_tower"):
        place = getattr(recipe.model, part)
        paths = () if place is None else (Path(place).resolve(), *Path(place).resolve().parents)
        names = [path.name for path in paths if path.parent in phases]
        if any(name == INITIAL or _NAME.fullmatch(name) or _LEFT_OVER.fullmatch(name) for name in names):
            raise RecipeError(
                f"model.{part}: got {place}, inside output, where the run deletes checkpoints, expected another output"
            )


def check_same_content(checkpoint: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises RecipeError, naming which, for a checkpoint of other data or of another configuration."""
    words = {
        "config": "config.json of the recipe's model",
        "processor": "the tokenizer, chat template or image processor",
        "data": "the data (rows, their length in tokens, or which of them have an image)",
        "deepspeed": "the content of train.deepspeed",
    }
    for name, what in words.items():
        if before.get(name) != now[name]:
            raise RecipeError(
                f"output: {what} changed since {checkpoint.name} was written; expected the same, another output, "
                "or an empty folder"
            )


def resharded(checkpoint: Path) -> Path:
    """Returns the folder beside a checkpoint that `reshard` writes."""
    return checkpoint.with_name(f"resharded-{checkpoint.name}")


def reshard(checkpoint: Path) -> None:
    """Converts a whole checkpoint into one that any number of ranks can load; rank 0 alone calls it.

    That one is deleted with the next checkpoint.

    Raises:
        TrainingError: DeepSpeed could not convert it.
    """
    target, tag = resharded(checkpoint), f"global_step{step_of(checkpoint)}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file() and file.suffix != ".safetensors":  # Trainer's states; the weights are DeepSpeed's
            shutil.copy2(file, target)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(checkpoint / tag), "--output_folder", str(target / tag)]
    command += ["--num_extract_workers", _RESHARD_WORKERS, "--num_merge_workers", _RESHARD_WORKERS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TrainingError(f"{checkpoint} cannot be converted for another number of ranks: {reason}")


def files_of(folder: Path, *, but: Sequence[str]) -> list[Path]:
    """Returns the files of a folder and all below it, those of some names excepted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in but)


def digest_of(content: Any) -> str:
    """Returns the SHA-256 of content that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def sha256_of(file: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _entries(folder: Path, name: re.Pattern[str]) -> list[Path]:
    return sorted(path for path in folder.glob("*") if name.fullmatch(path.name) and path.is_dir())


def _rename(path: Path, word: str) -> None:
    target = path.with_name(f"{word}-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunLock:
    """Holds a run folder from `take` to the end of the process.

    flock excludes other processes on this host, and on other hosts if the file system shares locks; the system releases
    it when the process ends. Where locks are not shared, a heartbeat updates the file's modification time every few
    seconds, so that other hosts see that the run is alive.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "run.lock"
        self._handle: Any = None

    def take(self) -> None:
        """Takes the lock.

        Raises:
            RecipeError: another process holds it; the message names host, process and start.
        """
        try:
            self._handle = self._file.open("a+", encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"output: {self._file}: {error.strerror}, expected a file that can be written") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal() from None
        except OSError:
            pass  # a file system without locks: the file's time is all there is
        if self._is_held_elsewhere():
            raise self._refusal()
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        self._handle.truncate(0)
        self._handle.write(json.dumps(holder))
        self._handle.flush()
        threading.Thread(target=self._heartbeat, daemon=True).start()

    def release(self) -> None:
        """Gives the lock back."""
        self._handle.truncate(0)
        self._handle.close()

    def _holder(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _is_held_elsewhere(self) -> bool:
        """Returns whether a process of another host renews the file; waits for it where its last sign is recent."""
        if self._holder().get("host") in (None, socket.gethostname()):
            return False
        seen = self._file.stat().st_mtime
        while time.time() - seen < _STALE_SECONDS:
            time.sleep(_HEARTBEAT_SECONDS / 5)
            if self._file.stat().st_mtime != seen:
                return True
        return False

    def _refusal(self) -> RecipeError:
        holder = self._holder()
        who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('start')}"
        return RecipeError(
            f"output: {self._file.parent} is in use by {who if holder else 'another process'}; "
            "expected another output, or the end of that run"
        )

    def _heartbeat(self) -> None:
        while not self._handle.closed:
            time.sleep(_HEARTBEAT_SECONDS)
            try:
                os.utime(self._file)
            except OSError:
                return
