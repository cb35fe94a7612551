"""The check of all rows: what each conversation and each of its images is, or what is wrong with it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets

from data import built_in
from data.config import DataConfig
from data.files import code_stamp, read_rows
from data.images import check_image
from data.records import DataError, Fault, RowError, parse

_FOUND = {
    "fault": datasets.Value("string"),  # empty where there is none
    "images": datasets.List(datasets.Value("string")),
    "turns": datasets.Value("int32"),
    "is_cut_in_front": datasets.Value("bool"),
}


def check_rows(config: DataConfig, *, anew: bool = False) -> datasets.Dataset:
    """Returns every row with what its check found: columns file, row, text, fault, images, turns, is_cut_in_front.

    Checks in parallel and caches the result. A fault is never taken from the cache: the image may be there by now.

    Args:
        config: the recipe's data section.
        anew: checks all rows again, whatever the cache holds.

    Raises:
        DataError: a file or the image folder cannot be read.
    """
    if config.images is not None and not Path(config.images).is_dir():
        raise DataError(f"images: found {config.images!r}, accepted: a folder")
    for file in filter(built_in.is_built_in, config.files):
        built_in.image_folder(file)  # drawn here, not by every process that checks
    rows = read_rows(config.files)
    checked = _checked(rows, config, anew=anew)
    if not anew and any(_inspect(row, config)["fault"] != row["fault"] for row in faulty(checked)):
        return _checked(rows, config, anew=True)
    return checked


def faulty(rows: datasets.Dataset) -> datasets.Dataset:
    """Returns those of the checked rows that have a fault."""
    return rows.select([number for number, reason in enumerate(rows["fault"][:]) if reason])


def faults_of(rows: datasets.Dataset) -> list[Fault]:
    """Returns the faults among checked rows."""
    return [Fault(row["file"], row["row"], row["fault"]) for row in faulty(rows)]


def folder_of(file: str, config: DataConfig) -> Path | None:
    """Returns the image folder of a file's rows."""
    if built_in.is_built_in(file):
        return built_in.image_folder(file)
    return None if config.images is None else Path(config.images)


def processes(config: DataConfig, rows: datasets.Dataset) -> int | None:
    """Returns how many processes to share rows among; None is this one alone."""
    return min(config.workers, len(rows)) or None


def fingerprint(*parts: object) -> str:
    """Returns a name for a result that follows from `parts` and this code: the cache finds it by that name."""
    return hashlib.sha256("\0".join([code_stamp(), *map(str, parts)]).encode()).hexdigest()[:32]


def _checked(rows: datasets.Dataset, config: DataConfig, *, anew: bool) -> datasets.Dataset:
    folder = "" if config.images is None else Path(config.images).resolve()
    return rows.map(
        _inspect,
        fn_kwargs={"config": config},
        num_proc=processes(config, rows),
        desc="checking rows",
        new_fingerprint=fingerprint("check", rows._fingerprint, folder),
        features=datasets.Features({**rows.features, **_FOUND}),
        load_from_cache_file=not anew,
    )


def _inspect(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"fault": "", "images": [], "turns": 0, "is_cut_in_front": False}
    try:
        record = parse(row["text"])
        found |= {
            "images": list(record.images),
            "turns": len(record.turns),
            "is_cut_in_front": record.is_cut_in_front,
        }
        for name in record.images:
            check_image(folder_of(row["file"], config), name)
    except RowError as error:
        found["fault"] = str(error)
    return found
