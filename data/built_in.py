"""The built-in data sets, which a recipe names in place of a file: easy-VQA and scenes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from data import easy_vqa, scenes

_SETS: Final = (easy_vqa, scenes)
NAMES: Final = (*(f"easy_vqa:{name}" for name in easy_vqa.NAMES), *(f"scenes:{name}" for name in scenes.FILES))


def is_built_in(file: str) -> bool:
    """Returns whether a recipe's file name refers to a built-in set."""
    return any(one.is_built_in(file) for one in _SETS)


def version(file: str) -> str:
    """Returns the version of a built-in set, which is part of every cache key."""
    return str(_set(file).VERSION)


def conversations(file: str) -> Iterator[dict[str, Any]]:
    """Yields the LLaVA rows of a built-in set."""
    module = _set(file)
    yield from module.conversations(module.name_of(file))


def image_folder(file: str) -> Path:
    """Returns the folder that the image paths of a built-in set are relative to.

    Raises:
        DataError: the folder cannot be created.
    """
    module = _set(file)
    return Path(module.image_folder(module.name_of(file)))


def _set(file: str) -> ModuleType:
    return next(one for one in _SETS if one.is_built_in(file))
