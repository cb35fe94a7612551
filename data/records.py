"""One row of a data file: raw JSON text -> checked Record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's word -> ours
_SHOWN = 40  # characters of a broken row that its fault shows


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
    """One conversation.

    Attributes:
        images: image paths as written in the file, in the order of their marks.
        turns: user and assistant in turns, a user first.
        is_cut_in_front: the row began with an answer to no question, which `turns` leaves out, as LLaVA does.
    """

    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    is_cut_in_front: bool = False


def parse(text: str) -> Record:
    """Returns the row's record; with a single image its mark stands first in its turn, as in LLaVA.

    Raises:
        RowError: broken JSON, a missing key, an unknown role, turns out of order, or marks that do not match images.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"broken JSON: {error}, found {text[:_SHOWN]!r}") from None
    if not isinstance(row, dict):
        raise RowError(f"found {type(row).__name__}, accepted: an object with conversations")
    images = _images(row.get("image"))
    turns = _turns(row)
    is_cut_in_front = turns[0].role == "assistant"
    if is_cut_in_front:
        turns = turns[1:]
    _check_order(turns)
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if marks != len(images):
        raise RowError(f"found {marks} {IMAGE_MARK} in the questions for {len(images)} images, accepted: one for each")
    if len(images) == 1:
        turns = [_image_first(turn) for turn in turns]
    return Record(images, tuple(turns), is_cut_in_front)


def _images(image: Any) -> tuple[str, ...]:
    if image is None:
        return ()
    images = [image] if isinstance(image, str) else image
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise RowError(f"image: found {image!r}, accepted: a path or a list of paths")
    return tuple(_unicode(name, "image") for name in images)


def _turns(row: dict[str, Any]) -> list[Turn]:
    if "conversations" not in row:
        raise RowError("missing key 'conversations'")
    given = row["conversations"]
    if not isinstance(given, list) or not given:
        raise RowError("conversations: found no turns, accepted: a list of {from, value}")
    return [_turn(turn, f"conversations[{number}]") for number, turn in enumerate(given)]


def _turn(given: Any, where: str) -> Turn:
    if not isinstance(given, dict):
        raise RowError(f"{where}: found {type(given).__name__}, accepted: an object with from and value")
    for key in ("from", "value"):
        if key not in given:
            raise RowError(f"{where}: missing key '{key}'")
        if not isinstance(given[key], str):
            raise RowError(f"{where}.{key}: found {type(given[key]).__name__}, accepted: text")
    if given["from"] not in ROLES:
        raise RowError(f"{where}.from: unknown role {given['from']!r}, accepted: {', '.join(ROLES)}")
    return Turn(ROLES[given["from"]], _unicode(given["value"], f"{where}.value"))


def _check_order(turns: list[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if len(roles) < 2 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise RowError("conversations: found turns out of order, accepted: human and gpt in turns, at least one answer")


def _unicode(text: str, where: str) -> str:
    """Returns `text`; JSON can spell half of a character, which no tokenizer and no file system takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{where}: found {text[error.start]!r}, half a character, accepted: Unicode text") from None
    return text


def _image_first(turn: Turn) -> Turn:
    """Source: LLaVA's preprocess_multimodal. With several images it would lose marks, so they stay in place there."""
    if turn.role != "user" or IMAGE_MARK not in turn.text:
        return turn
    return Turn(turn.role, f"{IMAGE_MARK}\n{turn.text.replace(IMAGE_MARK, '').strip()}".strip())
