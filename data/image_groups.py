"""Groups rows that share an image, directly or through other rows, so that a split keeps them together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets

from data.config import DataConfig
from data.rows import EmbeddedImage
from data.table import EMBEDDED, code_stamp, fingerprint, folder_of, images_of, processes, usable_cache


def connected_rows(rows: datasets.Dataset, config: DataConfig) -> list[list[int]]:
    """Returns the row numbers in groups: rows with a common image form one, and each row without images another.

    Two images are the same if they are the same file, whatever source it belongs to, or have the same embedded bytes.

    Args:
        rows: a table with the columns source, file, row and images.
        config: the data section of these rows.

    Raises:
        DataError: the cache cannot be used.
    """
    parents = list(range(len(rows)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    first: dict[Hashable, int] = {}  # row by image
    for number, keys in enumerate(_keys(rows, config)):
        for key in keys:
            one, other = sorted((root(number), root(first.setdefault(key, number))))
            parents[other] = one
    groups: dict[int, list[int]] = {}
    for number in range(len(rows)):
        groups.setdefault(root(number), []).append(number)
    return list(groups.values())


def _keys(rows: datasets.Dataset, config: DataConfig) -> list[Sequence[Hashable]]:
    """Returns what identifies each row's images: their files, or digests of embedded ones."""
    keys: list[Sequence[Hashable]] = [()] * len(rows)
    embedded = []
    columns = (rows[name][:] for name in ("source", "file", "images"))
    for number, (source, file, images) in enumerate(zip(*columns, strict=True)):
        if EMBEDDED in images:
            embedded.append(number)
        else:
            folder = folder_of(config.sources[source], file)
            keys[number] = [_place(folder, name) for name in images]
    if embedded:
        chosen = rows.select_columns(["source", "file", "row", "images"]).select(embedded)
        for number, digests in zip(embedded, _digests(chosen, config), strict=True):
            keys[number] = digests
    return keys


@lru_cache(1 << 16)
def _place(folder: Path | None, name: str) -> str:
    return name if folder is None else os.path.realpath(folder / name)


def _digests(rows: datasets.Dataset, config: DataConfig) -> list[list[str]]:
    """Returns the keys of rows with embedded images, whose bytes are read once and then cached as digests."""
    with usable_cache():
        return rows.map(
            _digest,
            fn_kwargs={"config": config},
            num_proc=processes(config, rows),
            desc="comparing images",
            new_fingerprint=fingerprint(
                "digests", code_stamp("image_groups", "rows", "keys", "table"), rows._fingerprint
            ),
            features=datasets.Features({"keys": datasets.List(datasets.Value("string"))}),
            remove_columns=rows.column_names,
        )["keys"][:]


def _digest(row: dict[str, Any], config: DataConfig) -> dict[str, list[str]]:
    folder = folder_of(config.sources[row["source"]], row["file"])
    return {
        "keys": [
            hashlib.sha256(image.data).hexdigest() if isinstance(image, EmbeddedImage) else _place(folder, image)
            for image in images_of(row)
        ]
    }
