"""Sources become raw rows: JSON and JSONL, Parquet, Arrow and folders of `datasets`, hub names, the built-in set."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TextIO

import datasets
import pyarrow as pa
from datasets.distributed import split_dataset_by_node
from pyarrow import parquet

from data import built_in
from data.config import DataConfig, expand, shorten
from data.rows import DUPLICATE, DataError, RowError

HUB: Final = "hf://"
READABLE: Final = (
    "JSON or JSONL (also .gz, .zst), Parquet, a folder of these or of datasets, hf://org/name/subset:split, or "
    + f"{', '.join(built_in.NAMES[:-1])} or {built_in.NAMES[-1]}"
)
_JSON: Final = (".json", ".jsonl", ".ndjson")
_SUFFIXES: Final = (".parquet", ".arrow", *(name + packed for name in _JSON for packed in ("", ".gz", ".zst")))
_OTHER_SPLITS: Final = ("test", "val", "valid", "validation", "dev", "eval")
_CHUNK: Final = 1 << 20  # characters of a JSON array that are read at a time
_MARGIN: Final = 1 << 12  # an error this far from the end of what was read is the file's, not the cut's
_SPACES: Final = set(" \t\r\n")
_HEAD: Final = 1 << 16  # bytes of each part of a file that its stamp covers
_READ: Final = 32  # rows with images inside that are in memory together
_BINARY: Final = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF": "a PDF",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (git lfs pull fetches it)",
}


def find_files(path: str) -> list[str]:
    """Returns the files, stores and sets that a source's path means, in order; each can be given to `raw_rows`.

    Raises:
        DataError: nothing is there, or a folder mixes splits.
    """
    if built_in.is_built_in(path) or path.startswith(HUB):
        return [path]
    try:
        return _found(path, Path(expand(path)))
    except (OSError, ValueError) as error:  # no permission, a NUL in the name
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}; expected {READABLE}") from None


def _found(path: str, place: Path) -> list[str]:
    if place.is_file() or _is_saved(place) or _saved_split(place):
        return [str(place)]
    if place.is_dir():
        return _files_in(place)
    if any(mark in str(place) for mark in "*?[") and (found := _glob(place)):
        return found
    start = "" if place.is_absolute() else f" in {Path.cwd()}, where relative paths start"
    raise DataError(f"{path}: no such file{start}; expected {READABLE}")


def missing_paths(config: DataConfig) -> list[str]:
    """Returns the sources and image folders of a recipe's data that are not on this machine."""
    missing = []
    for source in config.sources:
        place = Path(expand(source.path))
        is_here = built_in.is_built_in(source.path) or place.exists() or _saved_split(place) or _glob(place)
        missing += [] if is_here else [source.path]
        if source.images and not Path(expand(source.images)).exists():
            missing.append(source.images)
    return missing


def raw_rows(file: str, *, stream: bool = False) -> Iterator[Any]:
    """Yields each row of one of `find_files`' results as Python objects; in place of a broken line, its RowError.

    Args:
        file: one of them.
        stream: Parquet is read as it is, without a copy in the cache of `datasets`.

    Raises:
        DataError: the file cannot be read, or is broken so that the rows after some place are lost.
    """
    if built_in.is_built_in(file):
        yield from built_in.conversations(file)
    elif stream and _head_of(file)[:4] == b"PAR1":
        with _named(file), parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_READ):
                yield from batch.to_pylist()
    elif is_store(file):
        for table in open_store(file).iter(batch_size=_READ):
            yield from table.to_pylist()
    else:
        yield from _json_rows(file)


def is_store(file: str) -> bool:
    """Returns whether a file is read through `datasets`, which gives its rows at random too."""
    if built_in.is_built_in(file):
        return False
    if file.startswith(HUB) or _is_saved(Path(file)) or _saved_split(Path(file)):
        return True
    return _head(file)[:4] in (b"PAR1", b"ARRO", b"\xff\xff\xff\xff")


@lru_cache(maxsize=64)
def open_store(file: str) -> datasets.Dataset:
    """Returns a Parquet or Arrow file, a saved folder or a set of the hub, memory-mapped, in the format `arrow`.

    Raises:
        DataError: it cannot be read or fetched.
    """
    with _named(file):
        return _opened(file, Path(file)).with_format("arrow")


def _opened(file: str, place: Path) -> datasets.Dataset:
    if file.startswith(HUB):
        name, subset, split = split_hub_name(file)
        return datasets.load_dataset(name, subset, split=split)
    if folder := _saved_split(place):
        return datasets.load_from_disk(str(folder))
    if _is_saved(place):
        return _one_split(datasets.load_from_disk(file), file)
    if _head(file)[:4] == b"PAR1":
        copy = Path(datasets.config.HF_DATASETS_CACHE) / f"parquet_{stamp(file).rpartition(':')[2][:16]}"
        return datasets.load_dataset("parquet", data_files=[file], split="train", cache_dir=str(copy))
    return datasets.Dataset.from_file(file)


def hub_rows(file: str, limit: int | None, shard: int, shards: int) -> Iterator[Any]:
    """Yields the raw rows of one shard of a set of the hub as they are fetched; images stay bytes."""
    name, subset, split = split_hub_name(file)
    with _named(file):
        stream = datasets.load_dataset(name, subset, split=split, streaming=True).decode(False)
        stream = stream if limit is None else stream.take(limit)
        yield from split_dataset_by_node(stream, rank=shard, world_size=shards)


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Says in one line, with the file, what `datasets` cannot read or fetch."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = shorten(str(error.__cause__ or error), 200)
        raise DataError(f"{file}: cannot be read: {reason}; expected {READABLE}") from None


def split_hub_name(file: str) -> tuple[str, str | None, str]:
    """Returns name, subset and split of `hf://org/name/subset:split`; the split is `train` where none is named.

    Raises:
        DataError: no organisation and name.
    """
    rest, _, split = file.removeprefix(HUB).removeprefix("datasets/").partition(":")
    parts = rest.strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise DataError(f"{file}: expected hf://org/name, hf://org/name/subset or hf://org/name/subset:split")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None, split or "train"


def stamp(file: str) -> str:
    """Returns what changes when a file does: its size, its time, and what its head, middle and tail hold."""
    if built_in.is_built_in(file):
        return built_in.version(file)
    if file.startswith(HUB) or not Path(file).is_file():
        return str(open_store(file)._fingerprint)
    status = Path(file).stat()
    digest = hashlib.sha256()
    with Path(file).open("rb") as stream:
        for start in (0, max(0, status.st_size - _HEAD) // 2, max(0, status.st_size - _HEAD)):
            stream.seek(start)
            digest.update(stream.read(_HEAD))
    return f"{status.st_size}:{status.st_mtime_ns}:{digest.hexdigest()}"


def _is_saved(place: Path) -> bool:
    return (place / "state.json").is_file() or (place / "dataset_dict.json").is_file()


def _saved_split(place: Path) -> Path | None:
    """Returns the folder of `folder:split` where that names a split of a saved DatasetDict."""
    folder, mark, split = str(place).rpartition(":")
    found = Path(folder) / split
    return found if mark and (Path(folder) / "dataset_dict.json").is_file() and _is_saved(found) else None


def _one_split(found: Any, file: str) -> datasets.Dataset:
    if isinstance(found, datasets.Dataset):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    raise DataError(f"{file}: got splits {', '.join(found)}, expected one of them: {file}:{next(iter(found))}")


def _files_in(folder: Path) -> list[str]:
    files = [file for file in sorted(folder.rglob("*")) if file.name.endswith(_SUFFIXES) and file.is_file()]
    if not files:
        raise DataError(f"{folder}: got a folder without files that can be read; expected {READABLE}")
    others = [file for file in files if file.name.replace("-", ".").replace("_", ".").split(".")[0] in _OTHER_SPLITS]
    if others and len(others) < len(files):
        raise DataError(f"{folder}: got several splits (such as {others[0].name}), expected a glob: {folder}/**/train*")
    return list(map(str, files))


def _glob(pattern: Path) -> list[str]:
    root = Path(pattern.anchor) if pattern.is_absolute() else Path()
    parts = pattern.relative_to(pattern.anchor) if pattern.is_absolute() else pattern
    return [str(file) for file in sorted(root.glob(str(parts))) if file.is_file()]


def _head_of(file: str) -> bytes:
    """Returns a file's first bytes; none for what is no file."""
    return _head(file) if Path(file).is_file() else b""


def _head(file: str) -> bytes:
    try:
        with Path(file).open("rb") as stream:
            return stream.read(1 << 10)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; expected a file that can be read") from None


def _json_rows(file: str) -> Iterator[Any]:
    """Yields the rows of a JSON array or of JSONL, without holding the file in memory.

    Not ijson's work: it refuses NaN, which pandas writes; it turns half a character into a question mark; and one
    byte that is no UTF-8 would lose the file in place of the row.
    """
    try:
        with _unpacked(file) as stream:
            head = stream.peek(1 << 10)
            _check_kind(file, head)
            if head.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="\n")
            if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
                yield from _array(text, file)
            else:
                yield from _lines(text, file)
    except (OSError, EOFError, zlib.error) as error:  # a broken archive too
        raise DataError(f"{file}: {getattr(error, 'strerror', None) or error}; expected a whole file") from None


def _unpacked(file: str) -> io.BufferedReader:
    head = _head(file)
    if head.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.open(file))
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return io.BufferedReader(pa.input_stream(file, compression="zstd"))
    return Path(file).open("rb")


def _check_kind(file: str, head: bytes) -> None:
    """Refuses a file that is neither JSON nor JSONL by what it looks like."""
    start = head.lstrip().lower()
    kinds = [kind for magic, kind in _BINARY.items() if head.startswith(magic)]
    if head[257:262] == b"ustar":
        kinds.append("a tar archive")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        kinds.append("a web page or XML")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        kinds.append("a Python pickle")
    if Path(file).suffix.lower() in (".csv", ".tsv", ".txt", ".xlsx", ".yaml", ".yml", ".md"):
        kinds.append(f"a {Path(file).suffix.lower()} file")
    if b"\0" in head.rstrip(b"\0"):
        kinds.append("binary data")
    if kinds:
        raise DataError(f"{file}: looks like {kinds[0]}; expected {READABLE}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; one that has a key twice with different values is marked."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = [key for key, value in pairs if made[key] != value]
        return {**made, DUPLICATE: twice[0]} if twice else made
    return made


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object)


def _lines(stream: TextIO, file: str) -> Iterator[Any]:
    lines = (line.strip(" \t\r\n") for line in stream)
    for number, line in enumerate(line for line in lines if line):
        try:
            yield _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            if number == 0 and line[0] == "{" and isinstance(error, json.JSONDecodeError) and error.pos >= len(line):
                raise DataError(
                    f"{file}: looks like one JSON object over several lines; expected an array, or a row a line"
                ) from None
            yield RowError(f"broken JSON: {error}; got {shorten(line, 40)!r}")


def _array(stream: TextIO, file: str) -> Iterator[Any]:
    """Yields the elements of a JSON array."""
    reader, number = _Reader(stream), 0
    try:
        reader.skip(reader.mark(), "[")
        while (mark := reader.mark()) != "]":
            if number > 0:
                reader.skip(mark, ",")
            yield reader.value()
            number += 1
        reader.skip(mark, "]")
        reader.end()
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{file}:{number}: broken JSON: {reason}; the rows after it cannot be read") from None


class _Reader:
    """Reads JSON values one after the other, from a stream that may hold gigabytes of them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._text, self._place = stream, "", 0

    def mark(self) -> str:
        """Returns the next character that is no space, without passing it; at the end of the file, none."""
        while True:
            while self._text[self._place : self._place + 1] in _SPACES:
                self._place += 1
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def skip(self, found: str, expected: str) -> None:
        """Passes the next character, which has to be `expected`."""
        if found != expected:
            raise ValueError(f"got {found!r}, expected {expected!r}" if found else "the array is not closed")
        self._place += 1

    def end(self) -> None:
        """Makes sure that nothing follows."""
        if mark := self.mark():
            raise ValueError(f"got {mark!r} after the array's end")

    def value(self) -> Any:
        """Passes the next value and returns it."""
        if not self.mark():
            raise ValueError("the array is not closed")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if self._is_in_the_middle(error) or not self._more():
                    raise
                continue
            if end == len(self._text) and self._more():  # a number may go on
                continue
            self._place = end
            return value

    def _is_in_the_middle(self, error: json.JSONDecodeError) -> bool:
        """Returns whether more text cannot mend it: else a fault near the start would read all that follows."""
        return error.pos + _MARGIN < len(self._text.rstrip()) and "Unterminated string" not in error.msg

    def _more(self) -> bool:
        """Reads on; forgets what was passed. Returns False at the end of the file."""
        chunk = self._stream.read(_CHUNK)
        self._text, self._place = self._text[self._place :] + chunk, 0
        return bool(chunk)
