"""Reads raw rows from JSON, JSONL, Parquet, Arrow, `datasets` folders, the Hugging Face hub and built-in sets."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, TextIO

import datasets
import pyarrow as pa
from datasets.distributed import split_dataset_by_node
from pyarrow import parquet

from data import built_in
from data.config import DataConfig, expand, shorten
from data.keys import DUPLICATE
from data.kinds import HEAD, kind_of
from data.rows import DataError, RowError

HUB: Final = "hf://"
READABLE: Final = (
    "JSON or JSONL (also .gz, .zst), Parquet, a folder of these or of datasets, hf://org/name/subset:split, or "
    "a built-in set (easy_vqa:train, scenes:train)"
)
NO_ROWS: Final = "got no rows, expected at least one conversation"
# What pyarrow raises for text that is not UTF-8, and for times and dates that are out of Python's range.
_NOT_PYTHON: Final = (ArithmeticError, LookupError, ValueError, pa.ArrowException)
_JSON: Final = (".json", ".jsonl", ".ndjson")
_SUFFIXES: Final = (".parquet", ".arrow", *(name + packed for name in _JSON for packed in ("", ".gz", ".zst")))
_TEXT_SUFFIXES: Final = (".csv", ".tsv", ".txt", ".xlsx", ".yaml", ".yml", ".md")
_HIDDEN: Final = (".", "__")
_OTHER_SPLITS: Final = {"test", "val", "valid", "validation", "dev", "eval"}
_HUB_NAME: Final = re.compile(
    r"hf://(?:datasets/)?(?P<name>(?!datasets/)[^/@:]+/[^/@:]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/:]+|[^/:]+))?"
    r"(?:/(?P<subset>[^:]+))?(?::(?P<split>.+))?"
)
_HUB_HINT: Final = "and `hf auth login` for a private or gated set"
CHUNK: Final = 1 << 20  # characters of a JSON array that are read at a time
_MARGIN: Final = 1 << 12  # an error this far before the end of the buffer is not due to the chunk border
_SPACES: Final = set(" \t\r\n")
_HEAD: Final = 1 << 16  # bytes of each part of a file that its stamp covers
_READ: Final = 32  # rows with embedded images that are in memory together


def find_files(path: str) -> list[str]:
    """Resolves a source's path to files, stores and sets, in order, for `raw_rows`.

    Raises:
        DataError: nothing matches the path, or the files belong to several splits.
    """
    if built_in.is_built_in(path):
        return [path]
    if path.startswith(HUB):
        return [HubSet.of(path).path]
    try:
        found = _list_files(path, Path(expand(path)))
    except (OSError, ValueError) as error:  # no permission, a NUL in the name
        if isinstance(error, DataError):
            raise
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise DataError(f"{shorten(path, 400)}: {shorten(reason, 400)}; expected {READABLE}") from None
    for file in found:
        if not file.isascii() and file != file.encode(errors="replace").decode():
            raise DataError(f"{shorten(path, 400)}: {shorten(file, 400)}: the name is not UTF-8, expected UTF-8")
    return found


def _list_files(path: str, place: Path) -> list[str]:
    if place.is_file() or _is_saved(place) or _saved_split(place):
        return [str(place)]
    if place.is_dir():
        found = (file for folder in _folders(place) for file in folder.iterdir())
        files = [file for file in found if file.name.lower().endswith(_SUFFIXES)]
        return _one_split(files, path, place)
    if _has_magic(place) and (files := _glob(place)):
        return _one_split(files, path, Path(*takewhile(lambda part: not _has_magic(part), place.parts)))
    if place.exists():
        raise DataError(f"{path}: is neither a file nor a folder; expected {READABLE}")
    if "://" in path:
        raise DataError(f"{path}: is an address, expected it downloaded, or hf://org/name/subset:split")
    start = "" if place.is_absolute() else f" in {Path.cwd()}, where relative paths start"
    unset = re.findall(r"\$\{?(\w+)", str(place))
    start += f" (the variable {unset[0]} is not set)" if unset else ""
    raise DataError(f"{path}: no such file{start}; expected {READABLE}")


def missing_paths(config: DataConfig) -> list[str]:
    """Returns the sources and image folders of a recipe's data that are not on this machine."""
    missing = []
    for source in config.sources:
        paths = [] if built_in.is_built_in(source.path) else [source.path]
        paths += [source.images] if source.images else []
        missing += [path for path in paths if not _is_here(Path(expand(path)))]
    return missing


def _is_here(place: Path) -> bool:
    try:
        return place.exists() or bool(_saved_split(place) or _glob(place))
    except DataError:  # a link to nothing: reading says so
        return True
    except (OSError, ValueError):  # no permission, a name that is too long, a NUL
        return False


def raw_rows(file: str, *, stream: bool = False) -> Iterator[Any]:
    """Yields the rows of a file as Python objects; a broken line yields its RowError.

    Args:
        file: a result of `find_files`.
        stream: reads Parquet directly, without a copy in the cache of `datasets`.

    Raises:
        DataError: the file cannot be read, or is broken in a way that loses the rows after the fault.
    """
    if built_in.is_built_in(file):
        yield from built_in.conversations(file)
    elif stream and _head_of(file)[:4] == b"PAR1":
        with _data_errors(file), parquet.ParquetFile(file) as opened:
            _check_columns(opened.schema_arrow, file)
            for batch in opened.iter_batches(batch_size=_READ):
                yield from _python_rows(batch)
    elif is_store(file):
        store = open_store(file)
        with _data_errors(file):
            for table in store.iter(batch_size=_READ):
                yield from _python_rows(table)
    else:
        yield from _json_rows(file)


def _python_rows(table: Any) -> Iterator[Any]:
    """Yields the rows of an Arrow table; for one with a value that Python cannot hold, its RowError."""
    try:
        yield from table.to_pylist()
    except _NOT_PYTHON:
        for number in range(table.num_rows):
            try:
                (row,) = table.slice(number, 1).to_pylist()
            except _NOT_PYTHON as error:
                reason = shorten(f"{type(error).__name__}: {error}", 120)
                row = RowError(f"has a value that cannot be read: {reason}; expected text, numbers, lists and objects")
            yield row


def _check_columns(fields: Iterable[pa.Field], file: str) -> None:
    """Raises DataError if two columns of a table, or two fields of a struct inside, have one name."""
    seen = set[str]()
    for field in fields:
        if field.name in seen:
            raise DataError(f"{file}: got column '{shorten(field.name, 30)}' twice, expected it once")
        seen.add(field.name)
        inner = field.type
        while hasattr(inner, "value_field"):  # a list
            inner = inner.value_field.type
        if pa.types.is_struct(inner):
            _check_columns(inner, file)


def has_rows(file: str) -> bool:
    """Returns whether a file has a row; reads no more than the first."""
    if not built_in.is_built_in(file) and _head_of(file)[:4] == b"PAR1":
        with _data_errors(file), parquet.ParquetFile(file) as opened:
            return bool(opened.metadata.num_rows)
    return any(True for _ in raw_rows(file))


def is_store(file: str) -> bool:
    """Returns whether a file is read through `datasets`, which has random access to its rows."""
    if built_in.is_built_in(file):
        return False
    if file.startswith(HUB) or _is_saved(Path(file)) or _saved_split(Path(file)):
        return True
    return _head(file)[:4] in (b"PAR1", b"ARRO", b"\xff\xff\xff\xff")


@lru_cache(maxsize=64)
def open_store(file: str) -> datasets.Dataset:
    """Opens a Parquet or Arrow file, a saved folder or a hub data set, memory-mapped, in the format `arrow`.

    Raises:
        DataError: it cannot be read or fetched.
    """
    with _data_errors(file):
        return _open_dataset(file, Path(file)).with_format("arrow")


def _open_dataset(file: str, place: Path) -> datasets.Dataset:
    if file.startswith(HUB):
        return datasets.load_dataset(**HubSet.of(file).arguments)
    if folder := _saved_split(place):
        return datasets.load_from_disk(str(folder))
    if _is_saved(place):
        return _only_split(datasets.load_from_disk(file), file)
    if _head(file)[:4] == b"PAR1":
        with parquet.ParquetFile(file) as opened:
            _check_columns(opened.schema_arrow, file)
            if opened.metadata.num_rows == 0:  # `datasets` fails on it
                raise DataError(f"{file}: {NO_ROWS}")
        copy = Path(datasets.config.HF_DATASETS_CACHE) / f"parquet_{stamp(file).rpartition(':')[2][:16]}"
        return datasets.load_dataset("parquet", data_files=[file], split="train", cache_dir=str(copy))
    return datasets.Dataset.from_file(file)


def hub_rows(file: str, limit: int | None, shard: int, shards: int) -> Iterator[Any]:
    """Streams the raw rows of one shard of a hub data set; images stay bytes."""
    with _data_errors(file):
        stream = datasets.load_dataset(**HubSet.of(file).arguments, streaming=True).decode(False)
        stream = stream if limit is None else stream.take(limit)
        yield from split_dataset_by_node(stream, rank=shard, world_size=shards)


@contextmanager
def _data_errors(file: str) -> Iterator[None]:
    """Turns errors of `datasets` into a one-line DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except (*_NOT_PYTHON, OSError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = shorten(str(error.__cause__ or error), 200)
        expected = f"hf://org/name/subset:split, {_HUB_HINT}" if file.startswith(HUB) else READABLE
        raise DataError(f"{file}: cannot be read: {reason}; expected {expected}") from None


@dataclass(frozen=True)
class HubSet:
    """A data set of the Hugging Face hub: `hf://org/name@revision/subset:split`.

    Attributes:
        path: the whole name.
        name: organisation and name.
        revision: branch, tag or commit; None is the main branch.
        subset: a configuration of the set, or files of the repository, by a path that may be a glob.
        split: the split, `train` by default.
    """

    path: str
    name: str
    revision: str | None
    subset: str | None
    split: str

    @classmethod
    def of(cls, path: str) -> HubSet:
        """Parses a path.

        Raises:
            DataError: it lacks organisation or name.
        """
        found = _HUB_NAME.fullmatch(path.rstrip("/"))
        if not found:
            raise DataError(f"{path}: expected hf://org/name, hf://org/name/subset or hf://org/name/subset:split")
        return cls(path, found["name"], found["revision"], found["subset"], found["split"] or "train")

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `datasets.load_dataset`.

        Raises:
            DataError: a local folder has the same name, which `datasets` would read instead.
        """
        if Path(self.name).is_dir():
            raise DataError(
                f"{self.path}: the folder {self.name} in {Path.cwd()} has the name of the hub's set; expected the "
                "folder itself as path, or another working directory"
            )
        part = {"data_files" if (self.subset or "").endswith(_SUFFIXES) else "name": self.subset}
        return {"path": self.name, "split": self.split, "revision": self.revision, **part}


def stamp(file: str) -> str:
    """Returns a fingerprint of a file: its size, modification time, and a hash of its head, middle and tail."""
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
    """Returns the folder of `folder:split` if that is a split of a saved DatasetDict."""
    folder, mark, split = str(place).rpartition(":")
    found = Path(folder) / split
    return found if mark and (Path(folder) / "dataset_dict.json").is_file() and _is_saved(found) else None


def _only_split(found: Any, file: str) -> datasets.Dataset:
    if isinstance(found, datasets.Dataset):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    raise DataError(f"{file}: got splits {', '.join(found)}, expected one of them: {file}:{next(iter(found))}")


def _one_split(files: Sequence[Path], path: str, root: Path) -> list[str]:
    """Returns the files that are not hidden, in order.

    Raises:
        DataError: there is none, one is a link to nothing or no file, or their names indicate several splits.
    """
    names = {file: str(file.relative_to(root)) for file in sorted(set(files)) if not file.is_dir()}
    shown = {file: name for file, name in names.items() if not re.search(r"(^|/)(\.|__)", name)}
    if not shown:
        raise DataError(f"{path}: got no files that can be read; expected {READABLE}")
    for file in shown:
        _check_link(file)
        if not file.is_file():
            raise DataError(f"{path}: {file}: got no regular file; expected a file that can be read")
    others = [name for name in shown.values() if _OTHER_SPLITS & set(re.split(r"[^a-z]+", name.lower()))]
    if others and len(others) < len(shown):
        raise DataError(
            f"{path}: got several splits (such as {others[0]}), expected one, by a glob such as {root}/**/*train*"
        )
    return list(map(str, shown))


def _check_link(place: Path) -> None:
    """Raises DataError for a link to nothing: the rows behind it would be lost."""
    if place.is_symlink() and not place.exists():
        raise DataError(f"{place}: got a link to {place.readlink()}, which does not exist; expected a file or a folder")


def _has_magic(path: Path | str) -> bool:
    return bool(set(str(path)) & set("*?["))


def _folders(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields a folder and all below it, also behind links; leaves out hidden ones.

    A link to a folder around it ends there: that folder's files are read anyway. Raises DataError for a link to nothing
    and OSError for a folder that cannot be read, which `Path.rglob` and `glob` leave out.
    """
    place = folder.resolve()
    if place in above:
        return
    yield folder
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(_HIDDEN)]
    for entry in shown:
        if entry.is_dir():
            yield from _folders(folder / entry.name, (*above, place))
        elif entry.is_symlink():
            _check_link(folder / entry.name)


def _glob(pattern: Path) -> list[Path]:
    """Returns what a pattern matches, `**` any number of folders; raises as `_folders`."""
    return list(_matches(Path(pattern.anchor), pattern.parts[bool(pattern.anchor) :]))


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    if not parts:
        yield folder
    elif parts[0] == "**":
        for below in _folders(folder):
            yield from _matches(below, parts[1:])
    elif not _has_magic(parts[0]):
        place = folder / parts[0]
        if place.exists() or place.is_symlink():
            yield from _matches(place, parts[1:])
    elif folder.is_dir():
        for place in folder.iterdir():
            if fnmatchcase(place.name, parts[0]) and not place.name.startswith(_HIDDEN):
                _check_link(place)
                yield from _matches(place, parts[1:])


def _head_of(file: str) -> bytes:
    """Returns a file's first bytes, b"" if it is not a file."""
    return _head(file) if Path(file).is_file() else b""


def _head(file: str) -> bytes:
    try:
        with Path(file).open("rb") as stream:
            return stream.read(HEAD)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; expected a file that can be read") from None


def _json_rows(file: str) -> Iterator[Any]:
    """Yields the rows of a JSON array or of JSONL, without holding the file in memory.

    ijson is not used: it rejects NaN, which pandas writes, replaces lone surrogates by question marks, and fails on the
    whole file for one byte that is not UTF-8.
    """
    try:
        with _unpacked(file) as stream:
            head = stream.peek(HEAD)
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
    """Raises DataError if a file looks like neither JSON nor JSONL."""
    suffix = Path(file).suffix.lower()
    kind = kind_of(head) or (f"a {suffix} file" if suffix in _TEXT_SUFFIXES else "")
    if kind:
        raise DataError(f"{file}: looks like {kind}; expected {READABLE}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; adds DUPLICATE if a key occurs twice with different values."""
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
        reader.consume(reader.peek(), "[")
        while (char := reader.peek()) != "]":
            if number > 0:
                reader.consume(char, ",")
            yield reader.value()
            number += 1
        reader.consume(char, "]")
        reader.end()
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{file}:{number}: broken JSON: {reason}; the rows after it cannot be read") from None


class _Reader:
    """Reads JSON values one by one from a stream of any size."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._text, self._place = stream, "", 0

    def peek(self) -> str:
        """Returns the next character that is not white space, without consuming it; "" at the end of the file."""
        while True:
            while self._text[self._place : self._place + 1] in _SPACES:
                self._place += 1
            if self._place < len(self._text) or not self._more():
                return self._text[self._place : self._place + 1]

    def consume(self, char: str, expected: str) -> None:
        """Consumes the next character, `char`; raises ValueError unless it is `expected`."""
        if char != expected:
            raise ValueError(f"got {char!r}, expected {expected!r}" if char else "the array is not closed")
        self._place += 1

    def end(self) -> None:
        """Raises ValueError unless the file ends here."""
        if char := self.peek():
            raise ValueError(f"got {char!r} after the array's end")

    def value(self) -> Any:
        """Consumes the next value and returns it."""
        if not self.peek():
            raise ValueError("the array is not closed")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if self._is_final(error) or not self._more():
                    raise
                continue
            if end == len(self._text) and self._more():  # a number may continue
                continue
            self._place = end
            return value

    def _is_final(self, error: json.JSONDecodeError) -> bool:
        """Returns whether reading more cannot resolve the error; saves reading a whole file after an early fault."""
        return error.pos + _MARGIN < len(self._text.rstrip()) and "Unterminated string" not in error.msg

    def _more(self) -> bool:
        """Reads the next chunk and drops the consumed text; returns False at the end of the file."""
        chunk = self._stream.read(CHUNK)
        self._text, self._place = self._text[self._place :] + chunk, 0
        return bool(chunk)
