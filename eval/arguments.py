"""What the command lines of this folder share: the error that is one line, and folders for results."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path


class UsageError(ValueError):
    """What the user gave cannot be used; the message is one line: where, what was got, what is expected."""


def make_folder(option: str, folder: Path) -> None:
    """Makes a folder for results, and its parents, and tries to write there.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option}: got {folder} ({error.strerror}), expected a folder that can be written") from None


def names_of(option: str, text: str, known: Collection[str] | None = None) -> list[str]:
    """Returns the names of a comma-separated list, each once, without the spaces around them.

    Raises:
        UsageError: a name is empty, or not among `known`.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if not name or (known is not None and name not in known):
            expected = "names between commas" if known is None else ", ".join(known)
            raise UsageError(f"{option}: got '{name}', expected {expected}")
    return names
