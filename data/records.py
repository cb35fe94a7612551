"""LLaVA rows: read from JSON or JSONL into a memory-mapped table of raw text, parsed one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from data import easy_vqa

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
_CHUNK = 1 << 20  # characters read at a time from a JSON array


class DataError(ValueError):
    """The data cannot be used as the recipe says; the text names file, row and reason."""


class RowError(ValueError):
    """One row cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used: its file, its number in the file (0 = first), and why."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


@dataclass(frozen=True)
class Turn:
    """One message: role is `user` or `assistant`; each image stands in a user's text as `<image>`."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """One conversation: image paths as written in the file, and turns, a user's first."""

    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def read_rows(files: list[str]) -> datasets.Dataset:
    """Returns the rows of all files as a memory-mapped table with columns file, row and text (raw JSON).

    The table is built once and cached by the files' names, sizes and times.

    Raises:
        DataError: a file is missing, is neither a JSON array nor JSONL, or breaks off in the middle of the array.
    """
    stamps = [f"{file}:{_stamp(file)}" for file in files]
    try:
        return datasets.Dataset.from_generator(
            _rows, gen_kwargs={"files": files, "stamps": stamps}, features=_FEATURES, split="train"
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def parse(text: str) -> Record:
    """Returns the row's record.

    A leading answer without a question is left out and a single image stands first in its turn, as LLaVA does.

    Raises:
        RowError: broken JSON, a missing key, an unknown role, turns out of order, or marks that do not match images.
    """
    try:
        row = json.loads(text)
    except ValueError as error:
        raise RowError(f"broken JSON: {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"found {type(row).__name__}, accepted: an object with conversations")
    images = _images(row.get("image"))
    turns = _turns(row)
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if marks != len(images):
        raise RowError(f"found {marks} {IMAGE_MARK} in the questions for {len(images)} images, accepted: one for each")
    if len(images) == 1:
        turns = [_image_first(turn) for turn in turns]
    return Record(images, tuple(turns))


def starts_with_answer(text: str) -> bool:
    """Returns whether the row's first turn is an answer, which `parse` leaves out."""
    turns = json.loads(text)["conversations"]
    return bool(turns) and turns[0]["from"] == "gpt"


_FEATURES = datasets.Features(
    {"file": datasets.Value("string"), "row": datasets.Value("int64"), "text": datasets.Value("large_string")}
)


def _stamp(file: str) -> str:
    if easy_vqa.is_built_in(file):
        return easy_vqa.VERSION
    try:
        status = Path(file).stat()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}, accepted: a LLaVA JSON or JSONL file") from None
    return f"{status.st_size}:{status.st_mtime_ns}"


def _rows(files: list[str], stamps: list[str]) -> Iterator[dict[str, Any]]:
    """Yields every row; `stamps` only make the cache notice a changed file."""
    for file in files:
        if easy_vqa.is_built_in(file):
            texts: Iterator[str] = map(json.dumps, easy_vqa.conversations(easy_vqa.name_of(file)))
        else:
            texts = _texts(Path(file))
        for number, text in enumerate(texts):
            yield {"file": file, "row": number, "text": text}


def _texts(file: Path) -> Iterator[str]:
    """Yields the raw JSON of each row of an array or of JSONL, without holding the file in memory."""
    with file.open(encoding="utf-8") as stream:
        start = stream.read(1)
        while start.isspace():
            start = stream.read(1)
        if start == "[":
            yield from _array_elements(stream, file)
        elif start:
            yield from (line for line in _joined(start, stream) if line.strip())


def _joined(start: str, lines: Iterator[str]) -> Iterator[str]:
    yield start + next(iter(lines), "")
    yield from lines


def _array_elements(stream: Any, file: Path) -> Iterator[str]:
    """Yields the raw text of each element of a JSON array whose `[` was read."""
    decoder, buffer, number, ended = json.JSONDecoder(), "", 0, False
    while True:
        buffer = buffer.lstrip(", \t\r\n")
        if buffer.startswith("]"):
            return
        try:
            _, end = decoder.raw_decode(buffer)
        except ValueError as error:
            more = stream.read(_CHUNK)
            ended = not more
            if ended:
                reason = str(error) if buffer else "the array is not closed"
                raise DataError(f"{file}:{number}: broken JSON: {reason}; the rows after it cannot be read") from None
            buffer += more
            continue
        yield buffer[:end]
        buffer, number = buffer[end:], number + 1


def _images(image: Any) -> tuple[str, ...]:
    if image is None:
        return ()
    images = [image] if isinstance(image, str) else image
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise RowError(f"image: found {image!r}, accepted: a path or a list of paths")
    return tuple(images)


def _turns(row: dict[str, Any]) -> list[Turn]:
    if "conversations" not in row:
        raise RowError("missing key 'conversations'")
    given = row["conversations"]
    if not isinstance(given, list) or not given:
        raise RowError("conversations: found no turns, accepted: a list of {from, value}")
    turns = []
    for number, turn in enumerate(given):
        for key in ("from", "value"):
            if not isinstance(turn, dict) or not isinstance(turn.get(key), str):
                raise RowError(f"conversations[{number}]: missing key '{key}' (a string)")
        if turn["from"] not in ROLES:
            raise RowError(f"conversations[{number}].from: unknown role {turn['from']!r}, accepted: human, gpt")
        turns.append(Turn(ROLES[turn["from"]], turn["value"]))
    if turns[0].role == "assistant":
        turns = turns[1:]
    expected = ["user", "assistant"] * len(turns)
    if len(turns) < 2 or any(turn.role != role for turn, role in zip(turns, expected, strict=False)):
        raise RowError("conversations: found turns out of order, accepted: human and gpt in turns, at least one answer")
    return turns


def _image_first(turn: Turn) -> Turn:
    if turn.role != "user" or IMAGE_MARK not in turn.text:
        return turn
    return Turn(turn.role, f"{IMAGE_MARK}\n{turn.text.replace(IMAGE_MARK, '').strip()}")
