"""Parses one row of any chat format into a checked Record. A key is used, ignored and counted, or a fault.

Formats: LLaVA and ShareGPT (`conversations` of from/value), OpenAI and Hugging Face (`messages` of role/content, the
content a text or a list of parts), the Cauldron and FineVision (`texts` of user/assistant pairs).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from data.config import shorten
from data.keys import (
    CONVERSATIONS,
    IMAGES,
    PART_IMAGES,
    SYSTEM,
    RowError,
    check_once,
    check_part,
    check_row,
    check_turn,
    check_unnamed_media,
    is_empty,
    is_trained,
    type_name,
    unicode_text,
)

__all__ = ["DataError", "EmbeddedImage", "Fault", "Record", "RowError", "Turn", "parse"]

IMAGE_PLACEHOLDER: Final = "<image>"
_MARK: Final = re.compile(r"(?<!\\)<image>")

_ROLES: Final = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "ai", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TOOL_ROLES: Final = {"tool", "tools", "function", "function_call", "function_response", "tool_call", "tool_calls"} | {
    "tool_response", "observation", "ipython", "environment"
}  # fmt: skip
_NAMED_IN_TEXT: Final = re.compile(r"<(img|video|audio)>\s*[^<>\s]+\.\w{2,5}\s*</\1>", re.IGNORECASE)
_TEXT_PARTS: Final = {"text", "input_text", "output_text"}
_IMAGE_PARTS: Final = {"image", "image_url", "input_image"}


class DataError(ValueError):
    """The data of a recipe cannot be used; the message names file, row and reason."""


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
    r"""One message.

    Attributes:
        role: `user` or `assistant`.
        text: in a user turn, `<image>` is the placeholder of an image and `\<image>` that literal text.
        is_trained: whether the answer is supervised; a row can switch it off.
    """

    role: str
    text: str
    is_trained: bool = True


@dataclass(frozen=True)
class EmbeddedImage:
    """An image stored as bytes in the row; `name` is for messages."""

    name: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        images: paths as written in the row, or embedded images, in the order of their placeholders.
        turns: user and assistant, alternating, a user first.
        system: the system prompt; None means the format's default.
        notes: peculiarities to count, keys of NOTES.
        ignored: unknown keys of the row and of its turns.
    """

    images: tuple[str | EmbeddedImage, ...]
    turns: tuple[Turn, ...]
    system: str | None = None
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


NOTES: Final = {
    "answer_first": "begin with an answer, which is left out, as LLaVA does",
    "question_last": "end with a question that has no answer",
    "empty_answer": "have an empty answer, of which only the end mark is trained",
    "empty_question": "have an empty question",
    "untrained": "have answers that the row excludes from training",
    "image_as_text": f"have {IMAGE_PLACEHOLDER} as text in a question, for no image",
    "media_as_text": "have <video> or <audio> as text in a question, for no file",
    "question_left_out": "have a question, which format plain leaves out",
    "plain_dialogue": "have several turns under format plain, which is for captions",
    "plain_text_only": "have no image under format plain, which is for captions",
    "turned": "have an image that is turned by its EXIF orientation",
    "answer_cut": "have a first answer that is cut at max_length (data.long_answers: cut)",
    "frames": "have an animated or multi-page image, of which the first frame is used",
}


def count_placeholders(text: str) -> int:
    """Returns the number of image placeholders in a user's text."""
    return len(_MARK.findall(text)) if IMAGE_PLACEHOLDER in text else 0


def split_at_placeholders(text: str) -> list[str]:
    r"""Returns the text before, between and after a user's image placeholders, `\<image>` unescaped."""
    return [part.replace("\\" + IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER) for part in _MARK.split(text)]


def parse(row: Any) -> Record:
    """Returns the row's record; the placeholder of a single image moves to the front of its turn, as in LLaVA.

    Args:
        row: as read from a file: text, numbers, lists and dicts; images may be dicts of bytes and path. For a line
            that could not be read, its RowError, which is raised.

    Raises:
        RowError: no conversation, a key whose meaning is not supported, an unknown role, turns out of order, or
            placeholders that do not match the images.
    """
    if isinstance(row, RowError):
        raise row
    try:
        return _record(row)
    except RecursionError:
        raise RowError("nested too deeply, expected text, lists and objects of a conversation") from None


def _record(row: Any) -> Record:
    if not isinstance(row, dict):
        raise RowError(f"got {type_name(row)}, expected an object with conversations or messages")
    ignored = check_row(row)
    key, given = _conversation(row)
    messages = _pairs(given, key) if _has_pairs(given) else _messages(given, key)
    ignored += [f"{key}[]{name}" for name in dict.fromkeys(name for message in messages for name in message.ignored)]
    slots = [part for message in messages for part in message.parts if isinstance(part, _Slot)]
    images = _images(row)
    if slots:
        images = _part_images(slots, images)
    elif not images:
        check_unnamed_media(row)
        for number, turn in enumerate(given):
            check_unnamed_media(turn, f"{key}[{number}]: ")
    system, messages = _system(row, messages)
    notes = []
    marks_are_text = bool(slots) or not images
    turns = [message.turn(marks_are_text=marks_are_text) for message in messages]
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
        notes.append("answer_first")
    _check_order(turns)
    if _has_pairs(given) and images and not any(count_placeholders(turn.text) for turn in turns):
        turns[0] = Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(images) + turns[0].text)
    _check_marks(turns, images)
    if len(images) == 1:
        turns = [_image_first(turn) for turn in turns]
    notes += _notes(turns)
    return Record(tuple(images), tuple(turns), system, tuple(notes), tuple(ignored))


@dataclass(frozen=True)
class _Message:
    """A message as written: its texts and images in order, and its unknown keys."""

    role: str
    parts: tuple[Any, ...]  # str, or _Slot for an image
    is_trained: bool = True
    ignored: Sequence[str] = ()

    def turn(self, *, marks_are_text: bool) -> Turn:
        """Returns the turn; with `marks_are_text` (no images, or images as parts) `<image>` is literal text.

        Texts follow each other as they are, as in the families' templates; a newline parts an image from what is
        beside it, as in LLaVA's rows.
        """
        text, was_image = "", False
        for place, part in enumerate(self.parts):
            is_image = isinstance(part, _Slot)
            text += "\n" if place and (is_image or was_image) else ""
            if is_image:
                text += IMAGE_PLACEHOLDER
            elif marks_are_text and self.role == "user" and IMAGE_PLACEHOLDER in part:
                text += _MARK.sub(lambda _: "\\" + IMAGE_PLACEHOLDER, part)
            else:
                text += part
            was_image = is_image
        return Turn(self.role, text, self.is_trained)


@dataclass(frozen=True)
class _Slot:
    """An image among a message's parts: the image itself, its index in the row's images, or neither."""

    image: str | EmbeddedImage | None
    index: int | None = None


def _conversation(row: dict[str, Any]) -> tuple[str, list[Any]]:
    found = [key for key in CONVERSATIONS if not is_empty(row.get(key))]
    if not found:
        keys = ", ".join(f"'{shorten(str(key), 30)}'" for key in list(row)[:5]) or "none"
        present = [key for key in CONVERSATIONS if key in row]
        if present:
            raise RowError(f"{present[0]}: got no turns, expected a list of messages")
        raise RowError(f"missing key 'conversations' (or 'messages'): got keys {keys}")
    if len(found) > 1 and any(row[key] != row[found[0]] for key in found):
        raise RowError(f"got keys {' and '.join(map(repr, found))}, expected one of them")
    given = row[found[0]]
    if not isinstance(given, list):
        raise RowError(f"{found[0]}: got {type_name(given)}, expected a list of messages")
    return found[0], given


def _has_pairs(given: Sequence[Any]) -> bool:
    first = given[0]
    return isinstance(first, dict) and "user" in first and "assistant" in first


def _pairs(given: Sequence[Any], key: str) -> list[_Message]:
    messages = []
    for number, pair in enumerate(given):
        where = f"{key}[{number}]"
        if not isinstance(pair, dict):
            raise RowError(f"{where}: got {type_name(pair)}, expected an object with user and assistant")
        ignored = [f".{name}" for name in check_turn(pair, where)]
        trained = is_trained(pair, "assistant", where)
        for role in ("user", "assistant"):
            if not isinstance(pair.get(role), str):
                raise RowError(f"{where}.{role}: got {type_name(pair.get(role))}, expected text")
            text = unicode_text(pair[role], f"{where}.{role}")
            messages.append(_Message(role, (text,), trained or role == "user", ignored))
    return messages


def _messages(given: Sequence[Any], key: str) -> list[_Message]:
    return [_message(turn, f"{key}[{number}]") for number, turn in enumerate(given)]


def _message(given: Any, where: str) -> _Message:
    if not isinstance(given, dict):
        raise RowError(f"{where}: got {type_name(given)}, expected an object with from and value, or role and content")
    is_plain = len(given) == 2  # no key beside the two: nothing more to look at
    name = _one_of(given, ("from", "role"), where)
    if not isinstance(name, str):
        raise RowError(f"{where}: role: got {type_name(name)}, expected text")
    if name.strip().lower() in _TOOL_ROLES:
        raise RowError(f"{where}: got role '{shorten(name, 30)}', expected user or assistant: no tools")
    role = _ROLES.get(name.strip().lower())
    if role is None:
        raise RowError(f"{where}: got role '{shorten(name, 30)}', expected human and gpt, or user and assistant")
    parts, ignored = _parts(_one_of(given, ("value", "content"), where), role, where)
    if is_plain:
        return _Message(role, parts, ignored=ignored)
    ignored = [*(f".{name}" for name in check_turn(given, where)), *ignored]
    return _Message(role, parts, is_trained(given, role, where), ignored)


def _one_of(given: dict[str, Any], keys: tuple[str, str], where: str) -> Any:
    """Returns the value of the one of two keys that is present."""
    first, second = keys
    if (first in given) != (second in given):
        return given[first] if first in given else given[second]
    if first not in given:
        names = ", ".join(f"'{shorten(str(key), 30)}'" for key in list(given)[:5]) or "none"
        raise RowError(f"{where}: missing key '{keys[0]}' (or '{keys[1]}'): got keys {names}")
    values = [given[key] for key in keys if given[key] is not None]
    if len(values) > 1 and values[0] != values[1]:
        raise RowError(f"{where}: got keys '{keys[0]}' and '{keys[1]}' with different values, expected one of them")
    return values[0] if values else None


def _parts(content: Any, role: str, where: str) -> tuple[tuple[Any, ...], list[str]]:
    """Returns the texts and images of a turn's content, and the unknown keys of its parts."""
    if isinstance(content, str):
        return (unicode_text(content, where),), []
    if not isinstance(content, list):
        raise RowError(f"{where}: got {type_name(content)} as content, expected text or a list of parts")
    ignored: list[str] = []
    parts = tuple(_part(part, f"{where}[{number}]", ignored) for number, part in enumerate(content))
    if role != "user" and any(isinstance(part, _Slot) for part in parts):
        place = "an answer" if role == "assistant" else "a system prompt"
        raise RowError(f"{where}: got an image in {place}, expected images in questions")
    return parts or ("",), ignored


def _part(part: Any, where: str, ignored: list[str]) -> Any:
    """Returns the text or the image of a part; appends its unknown keys to `ignored`."""
    if isinstance(part, str):
        return unicode_text(part, where)
    if not isinstance(part, dict):
        raise RowError(f"{where}: got {type_name(part)}, expected a part with a type")
    given = part.get("type") or ""
    if not isinstance(given, str):
        raise RowError(f"{where}: got {type_name(given)} as type of a part, expected text or image")
    if given in _TEXT_PARTS | _IMAGE_PARTS | {""}:  # else its type says more than its keys
        ignored += [f"[].{name}" for name in check_part(part, where)]
    image, text = _part_image(part, where), part.get("text")
    kind = given or ("image" if image is not None else "text" if "text" in part else None)
    if kind not in _TEXT_PARTS | _IMAGE_PARTS:
        raise RowError(f"{where}: got a part of type '{shorten(str(kind), 30)}', expected text or image")
    if image is not None and not is_empty(text):
        raise RowError(f"{where}: got one part with a text and an image, expected two")
    if kind in _IMAGE_PARTS:
        return _Slot(image, _index(part.get("index"), where))
    if image is not None or not isinstance(text, str):
        raise RowError(f"{where}.text: got {'an image' if image is not None else type_name(text)}, expected text")
    return unicode_text(text, where)


def _part_image(part: dict[str, Any], where: str) -> str | EmbeddedImage | None:
    """Returns the image that a part names or holds, if any."""
    found = [_address(part[key], key, where) for key in PART_IMAGES if not is_empty(part.get(key))]
    if any(value != found[0] for value in found):
        raise RowError(f"{where}: got two different images in one part, expected one")
    return _image(found[0], where) if found else None


def _address(value: Any, key: str, where: str) -> Any:
    """Returns the image of `{"url": ...}`, and base64 (of `{"type": "base64", "data": ...}` too) as a data address."""
    if isinstance(value, dict):
        check_once(value, f"{where}.{key}: ")
        found = [value[name] for name in ("url", "path") if not is_empty(value.get(name))]
        if len(found) == 2 and found[0] != found[1]:
            raise RowError(f"{where}.{key}: got keys 'url' and 'path' with different values, expected one of them")
        if not is_empty(value.get("url")):
            return value["url"]
    data = value if key == "base64" else value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, str):
        return value
    return data if data.startswith("data:") else f"data:image/*;base64,{data}"


def _index(given: Any, where: str) -> int | None:
    if is_empty(given):
        return None
    if not (given.is_integer() if isinstance(given, float) else type(given) is int):
        raise RowError(f"{where}.index: got {shorten(repr(given), 20)}, expected the number of an image")
    return int(given)


def _images(row: dict[str, Any]) -> list[str | EmbeddedImage]:
    found = {key: row[key] for key in IMAGES if not is_empty(row.get(key))}
    lists = [value if isinstance(value, list) else [value] for value in found.values()]
    if len(lists) > 1 and lists[0] != lists[1]:
        raise RowError("got keys 'image' and 'images' with different values, expected one of them")
    return [_image(image, f"{next(iter(found))}[{n}]") for n, image in enumerate(lists[0])] if lists else []


def _image(given: Any, where: str) -> str | EmbeddedImage:
    """Returns a path, or the image embedded in a row of Parquet or of a datasets folder."""
    if isinstance(given, dict):
        check_once(given, f"{where}: ")
        data, path = given.get("bytes"), given.get("path")
        if isinstance(data, bytes) and data:
            return EmbeddedImage(path if isinstance(path, str) and path else where, data)
        given = path if is_empty(data) else data
    if isinstance(given, bytes) and given:
        return EmbeddedImage(where, given)
    if not isinstance(given, str) or not given:
        raise RowError(f"{where}: got {repr(given) if given == '' else type_name(given)}, expected a path or an image")
    return unicode_text(given.removeprefix("file://"), where)


def _part_images(slots: Sequence[_Slot], listed: list[str | EmbeddedImage]) -> list[str | EmbeddedImage]:
    """Returns the images in the order of the parts, taken from these or from the row's list."""
    empty = [slot for slot in slots if slot.image is None]
    inside = [slot.image for slot in slots if slot.image is not None]
    if not empty and (not listed or listed == inside):
        return inside
    numbers = [slot.index for slot in empty if slot.index is not None]
    if not numbers:  # in the row's order
        numbers = list(range(len(empty)))
    if len(numbers) != len(empty) or set(numbers) != set(range(len(listed))):
        raise RowError(f"got {len(empty)} image parts for {len(listed)} images, expected one for each")
    following = iter(numbers)
    return [listed[next(following)] if slot.image is None else slot.image for slot in slots]


def _system(row: dict[str, Any], messages: list[_Message]) -> tuple[str | None, list[_Message]]:
    """Returns the system prompt, from the row or its first message, and the messages without it."""
    prompts = []
    for key in SYSTEM:
        if not is_empty(row.get(key)):
            if not isinstance(row[key], str):
                raise RowError(f"{key}: got {type_name(row[key])}, expected text")
            prompts.append(unicode_text(row[key], key))
    while messages and messages[0].role == "system":
        prompts.append("".join(messages[0].parts))
        messages = messages[1:]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if len(set(prompts)) > 1:
        raise RowError("got two different system prompts, expected one")
    if any(message.role == "system" for message in messages):
        raise RowError("got a system turn after the first turn, expected it first")
    return (prompts[0] if prompts else None), messages


def _check_order(turns: Sequence[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if len(roles) < 2 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise RowError(f"got turns {', '.join(roles[:6])}, expected user and assistant in turns, at least one answer")
    if not any(turn.role == "assistant" and turn.is_trained for turn in turns):
        raise RowError("no label is left: got training switched off for every answer, expected it on for one")


def _check_marks(turns: Sequence[Turn], images: Sequence[str | EmbeddedImage]) -> None:
    questions = [turn.text for turn in turns if turn.role == "user"]
    marks = sum(map(count_placeholders, questions))
    if marks != len(images):
        first = f" ({shorten(images[0], 40)!r})" if images and isinstance(images[0], str) else ""
        raise RowError(
            f"got {marks} {IMAGE_PLACEHOLDER} in the questions for {len(images)} images{first}, expected one for each "
            rf"(\{IMAGE_PLACEHOLDER} is that text)"
        )
    for text in questions:
        if "</" in text and (found := _NAMED_IN_TEXT.search(text)):
            raise RowError(
                f"got {shorten(found[0], 40)!r} in a question, expected {IMAGE_PLACEHOLDER} there and the file as image"
            )


def _notes(turns: Sequence[Turn]) -> list[str]:
    answers = [turn for turn in turns if turn.role == "assistant"]
    questions = [turn.text for turn in turns if turn.role == "user"]
    notes = []
    if turns[-1].role == "user":
        notes.append("question_last")
    if any(not turn.text.strip() for turn in answers):
        notes.append("empty_answer")
    if not all(text.strip() for text in questions):
        notes.append("empty_question")
    if not all(turn.is_trained for turn in answers):
        notes.append("untrained")
    if any("\\" + IMAGE_PLACEHOLDER in text for text in questions):
        notes.append("image_as_text")
    if any("<video>" in text or "<audio>" in text for text in questions):
        notes.append("media_as_text")
    return notes


def _image_first(turn: Turn) -> Turn:
    """Moves a single image to the front, as LLaVA's preprocess_multimodal does; that loses one of several."""
    if turn.role != "user" or not count_placeholders(turn.text):
        return turn
    return Turn(turn.role, f"{IMAGE_PLACEHOLDER}\n{_MARK.sub('', turn.text).strip()}".strip())


_SPECIFIC: Final = re.compile(r"'[^']*'|\"[^\"]*\"|\[\d+\]|\d[\d,.]*")


def group_faults(faults: Iterable[Fault]) -> list[str]:
    """Returns one line for each kind of fault in each file: the fault, or the count and the first of them."""
    kinds: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], Fault] = {}
    for fault in faults:
        kind = fault.file, _SPECIFIC.sub("*", fault.reason)
        kinds[kind] += 1
        first.setdefault(kind, fault)
    return [
        str(first[kind]) if count == 1 else f"{kind[0]}: {count:,} rows: {first[kind].reason} (row {first[kind].row})"
        for kind, count in kinds.items()
    ]
