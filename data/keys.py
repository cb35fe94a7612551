"""The keys of rows, turns and parts: which are used, which are refused, and which are ignored and counted."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any, Final

from data.config import shorten

DUPLICATE: Final = "\0duplicate key"  # set by the JSON reader where an object has a key twice, with different values
CONVERSATIONS: Final = ("conversations", "conversation", "messages", "texts")
SYSTEM: Final = ("system", "system_prompt", "system_message")
IMAGES: Final = ("image", "images")
PART_IMAGES: Final = ("image", "image_url", "url", "path", "base64", "source")
_TURN_SWITCHES: Final = frozenset(
    {"weight", "loss", "loss_weight", "loss_mask", "loss_scale", "output_with_loss"}
    | {"train", "trainable", "training", "train_on", "train_on_turn", "trainable_turn"}
)
_ROW_SWITCHES: Final = _TURN_SWITCHES | {"sample_weight"}
# Keys that other tools support and this one does not.
_MEDIA: Final = frozenset({"video", "videos", "video_path", "video_url", "audio", "audios", "audio_path", "audio_url"})
_OTHER_IMAGES: Final = frozenset(
    {"image_url", "image_urls", "image_path", "image_paths", "image_file", "image_files", "image_base64"}
    | {"image_bytes", "img", "imgs", "img_path", "picture", "pictures", "photo", "photos"}
)
_TOOLS: Final = frozenset({"tools", "functions", "tool_calls", "function_call", "tool_call_id"})
_CHOICES: Final = frozenset({"chosen", "rejected", "rejected_response"})
_VERDICTS: Final = ("label", "kto_tag")  # of preference tuning, where they are true or false
_REFUSED: Final = _MEDIA | _OTHER_IMAGES | _TOOLS | _CHOICES | {"mask", "masked", "labels", "no_loss"}
_ROW_REFUSED: Final = _REFUSED | {"history"}
_TURN_REFUSED: Final = _REFUSED | {"image", "images", "refusal", "train_detail", *SYSTEM} | {
    "reasoning", "reasoning_content", "reasoning_details", "thinking", "thought"
}  # fmt: skip
_INSTEAD: Final = dict.fromkeys(_OTHER_IMAGES, "image or images") | dict.fromkeys(SYSTEM, "it in the row")
_ROW_KEYS: Final = _ROW_REFUSED | _ROW_SWITCHES | {*CONVERSATIONS, *SYSTEM, *IMAGES}
_TURN_KEYS: Final = _TURN_REFUSED | _TURN_SWITCHES | {"from", "value", "role", "content", "user", "assistant"}
_PART_REFUSED: Final = _TURN_REFUSED - {*PART_IMAGES}
_PART_KEYS: Final = _PART_REFUSED | _TURN_SWITCHES | {"type", "text", "index", *PART_IMAGES}
_NEVER_MEDIA: Final = frozenset({"id", "source", "url", "license", "dataset", "origin"}) | {
    *CONVERSATIONS, *SYSTEM, "value", "content", "user", "assistant", "text", "type", DUPLICATE
}  # fmt: skip
_MEDIA_SUFFIXES: Final = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl"),
    *(".svg", ".pdf", ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".mpg", ".mpeg", ".webm"),
    *(".wav", ".mp3", ".flac", ".ogg", ".opus", ".aac", ".m4a"),
)
_MEDIA_TEXTS: Final = ("data:image/", "data:video/", "data:audio/", "iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # base64
_MEDIA_BYTES: Final = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")
_MEDIA_FIELDS: Final = frozenset({"bytes", "path", "url"})


class RowError(ValueError):
    """One row cannot be used; the message is the reason."""


def type_name(value: Any) -> str:
    """Returns the type of a JSON value in words, for messages."""
    words = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null", bytes: "bytes"}
    return words.get(type(value), "a number")


def is_empty(value: Any, depth: int = 0) -> bool:
    """Returns whether a value means "none": null, NaN, "", [], or a list or object of these."""
    if depth > 3:
        return False
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, dict):
        return all(is_empty(each, depth + 1) for each in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(each, depth + 1) for each in value)
    return value in ("", b"")


def check_row(row: dict[str, Any]) -> list[str]:
    """Returns the unknown keys of a row.

    Raises:
        RowError: a key occurs twice, has a meaning that is not supported, or misspells a known key.
    """
    ignored = _check_keys(row, _ROW_KEYS, _ROW_REFUSED, "")
    _check_switches(row, _ROW_SWITCHES, "", "rows have no weight, sources have one (data.files)")
    for key in _VERDICTS:
        if isinstance(row.get(key), bool):
            raise RowError(f"got key '{key}' with true or false, a preference, expected rows without it")
    return ignored


def check_turn(turn: dict[str, Any], where: str) -> list[str]:
    """Returns the unknown keys of a turn; raises RowError as `check_row`."""
    return _check_keys(turn, _TURN_KEYS, _TURN_REFUSED, f"{where}: ")


def check_part(part: dict[str, Any], where: str) -> list[str]:
    """Returns the unknown keys of a part of a turn's content; raises RowError as `check_row`."""
    ignored = _check_keys(part, _PART_KEYS, _PART_REFUSED, f"{where}: ")
    _check_switches(part, _TURN_SWITCHES, f"{where}: ", "a part has no weight, its turn has one")
    if all(is_empty(part.get(key)) for key in PART_IMAGES):
        check_unnamed_media(part, f"{where}: ")
    return ignored


def check_once(given: dict[str, Any], where: str) -> None:
    """Raises RowError if a key of an object occurs twice with different values."""
    if DUPLICATE in given:
        raise RowError(
            f"{where}got key '{shorten(str(given[DUPLICATE]), 30)}' twice with different values, expected it once"
        )


def _check_keys(given: dict[str, Any], known: frozenset[str], refused: frozenset[str], where: str) -> list[str]:
    check_once(given, where)
    ignored = []
    for key, value in given.items():
        if key in known and key not in refused:
            continue
        if is_empty(value):
            continue
        if key in refused and value != 0:
            expected = _INSTEAD.get(key, "rows without it")
            raise RowError(f"{where}got key '{key}', which is not supported, expected {expected}")
        if key not in refused:
            if meant := _known_key(key, known):
                raise RowError(f"{where}got key '{shorten(key, 30)}', expected '{meant}'")
            ignored.append(shorten(key, 40))
    return ignored


@lru_cache(1024)
def _known_key(key: str, known: frozenset[str]) -> str | None:
    """Returns the known key that `key` misspells: `Videos` for `videos`, `system-prompt` for `system_prompt`."""
    plain = re.sub(r"[-_ ]", "", key).lower()
    return next((name for name in sorted(known) if name.replace("_", "") == plain), None)


def _check_switches(given: dict[str, Any], switches: frozenset[str], where: str, reason: str) -> None:
    for key in switches & given.keys():
        if not is_empty(given[key]) and given[key] != 1:
            raise RowError(f"{where}got key '{key}' with {shorten(repr(given[key]), 20)}, expected 1 or none: {reason}")


def check_unnamed_media(given: dict[str, Any], where: str = "") -> None:
    """Rejects a row, turn or part without images that has an image, video or sound under an unknown key."""
    for key, value in given.items():
        if key not in _NEVER_MEDIA and _is_media(value):
            name = shorten(key, 30)
            raise RowError(f"{where}got key '{name}', which names or holds a file, expected it as image or images")


def _is_media(value: Any) -> bool:
    while isinstance(value, list | tuple):
        value = next((each for each in value if not is_empty(each)), None)
    if isinstance(value, str):
        text = value.strip()
        name = re.split("[?#]", text, maxsplit=1)[0] if text.startswith(("http://", "https://")) else text
        return name[-5:].lower().endswith(_MEDIA_SUFFIXES) or text.startswith(_MEDIA_TEXTS)
    if isinstance(value, bytes):
        return value.startswith(_MEDIA_BYTES)
    if not isinstance(value, dict) or is_empty(value):
        return False
    return value.keys() - {DUPLICATE} <= _MEDIA_FIELDS or any(
        _is_media(each) for key, each in value.items() if key not in _NEVER_MEDIA
    )


def is_trained(given: dict[str, Any], role: str, where: str) -> bool:
    """Returns whether an answer is trained, by the turn's switches (`loss`, `weight`, `train`, ...)."""
    trained = True
    for key in _TURN_SWITCHES & given.keys():
        value = given[key]
        if is_empty(value):
            continue
        if value not in (0, 1):
            raise RowError(f"{where}.{key}: got {shorten(repr(value), 20)}, expected 0 or 1, or true or false")
        if value == 1 and role != "assistant" and key != "weight":
            raise RowError(f"{where}.{key}: got {value} for a {role} turn, but only answers are trained")
        trained = trained and bool(value)
    return trained if role == "assistant" else True


def unicode_text(text: str, where: str) -> str:
    """Returns `text`; rejects lone surrogates, which JSON can express and neither tokenizers nor file systems take."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = text[error.start]
        if "\udc80" <= found <= "\udcff":  # surrogateescape: a byte that is not UTF-8
            raise RowError(f"{where}: not UTF-8 at character {error.start}, expected Unicode text") from None
        raise RowError(f"{where}: got {found!r}, half a character, expected Unicode text") from None
    return text
