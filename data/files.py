"""Data files: JSON arrays, JSONL and the built-in sets become one memory-mapped table of raw rows."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import datasets

from data import built_in
from data.records import DataError

_FEATURES = datasets.Features(
    {"file": datasets.Value("string"), "row": datasets.Value("int64"), "text": datasets.Value("large_string")}
)
_CHUNK = 1 << 20  # characters of a JSON array that are read at a time
_MARGIN = 1 << 12  # an error this far from the end of what was read is the file's, not the cut's
_SPACES = set(" \t\r\n")


def read_rows(files: list[str]) -> datasets.Dataset:
    """Returns the rows of all files as a memory-mapped table with columns file, row and text (raw JSON).

    The table is built once and cached by the files' names, sizes and times; ranks of one machine wait for another.
    Rows are raw text because a table has one type a column, and LLaVA's `image` has three: text, list, absent.

    Raises:
        DataError: a file cannot be read or holds no row, or a JSON array is broken, which loses the rows after it.
    """
    stamps = (code_stamp(), *(f"{file}:{_stamp(file)}" for file in files))
    try:
        return datasets.Dataset.from_generator(
            _rows, gen_kwargs={"files": tuple(files), "stamps": stamps}, features=_FEATURES, split="train"
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


@cache
def code_stamp() -> str:
    """Returns a digest of this package's code: what other code has cached is not taken for ours."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()


def _stamp(file: str) -> str:
    if built_in.is_built_in(file):
        return built_in.version(file)
    try:
        status = Path(file).stat()
    except OSError as error:
        accepted = f"a LLaVA JSON or JSONL file, or {' or '.join(built_in.NAMES)}"
        raise DataError(f"{file}: {error.strerror}, accepted: {accepted}") from None
    return f"{status.st_size}:{status.st_mtime_ns}"


def _rows(files: tuple[str, ...], stamps: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yields every row; `stamps` only make the cache notice changed files and code."""
    for file in files:
        number = -1
        for number, text in enumerate(_texts(file)):
            yield {"file": file, "row": number, "text": text}
        if number < 0:
            raise DataError(f"{file}: found no rows, accepted: at least one conversation")


def _texts(file: str) -> Iterator[str]:
    """Yields the raw JSON of each row, without holding the file in memory."""
    if built_in.is_built_in(file):
        yield from map(json.dumps, built_in.conversations(file))
        return
    try:
        with Path(file).open("rb") as stream:
            start = len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0
            stream.seek(start)
            first = stream.read(1)
            while first.isspace():
                first = stream.read(1)
            if first == b"[":
                rows = _array(io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape"), file)
            else:
                stream.seek(start)
                rows = (line.decode("utf-8", "surrogateescape").strip() for line in stream if line.strip())
            yield from map(_readable, rows)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}, accepted: a file that can be read") from None


def _readable(text: str) -> str:
    """Returns the row; in place of one that was not UTF-8, words that are no JSON, so that the fault is the row's."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not UTF-8 at character {error.start}"
    return text


def _array(stream: TextIO, file: str) -> Iterator[str]:
    """Yields the raw text of each element of a JSON array whose `[` was read."""
    reader, number = _Reader(stream), 0
    try:
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
        self._decoder = json.JSONDecoder()

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
            raise ValueError(f"found {found!r}, accepted: {expected!r}" if found else "the array is not closed")
        self._place += 1

    def end(self) -> None:
        """Makes sure that nothing follows."""
        if mark := self.mark():
            raise ValueError(f"found {mark!r} after the array's end")

    def value(self) -> str:
        """Passes the next value and returns its text."""
        if not self.mark():
            raise ValueError("the array is not closed")
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if self._is_in_the_middle(error) or not self._more():
                    raise
                continue
            if end == len(self._text) and self._more():  # a number may go on
                continue
            text = self._text[self._place : end]
            self._place = end
            return text

    def _is_in_the_middle(self, error: json.JSONDecodeError) -> bool:
        """Returns whether more text cannot mend it: else a fault near the start would read all that follows."""
        return error.pos + _MARGIN < len(self._text.rstrip()) and "Unterminated string" not in error.msg

    def _more(self) -> bool:
        """Reads on; forgets what was passed. Returns False at the end of the file."""
        chunk = self._stream.read(_CHUNK)
        self._text, self._place = self._text[self._place :] + chunk, 0
        return bool(chunk)
