"""What the command lines of this folder share: the error that is one line, and folders for results."""

from __future__ import annotations

import ast
import re
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from models.schedules import SCHEDULES, TRAINED, Choice


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


def names_of(option: str, text: str) -> list[str]:
    """Returns the names of a comma-separated list, each once, without the spaces around them.

    Raises:
        UsageError: a name is empty.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise UsageError(f"{option}: got '', expected names between commas")
    return names


def schedules_of(option: str, text: str, plans: Collection[str] = ()) -> dict[str, Choice]:
    """Returns the schedules of a comma-separated list by what the list calls them: names, or `fastv(layer=2,drop=0.5)`.

    Args:
        option: of the command line.
        text: the list.
        plans: names of the checkpoints' plans, which are known beside those of schedules.

    Raises:
        UsageError: a name is not known, or settings are not `name=value` between commas.
    """
    known = list(dict.fromkeys((TRAINED, *plans, *SCHEDULES)))
    expected = ", ".join(known)
    if not all(part.strip() for part in text.split(",")):
        raise UsageError(f"{option}: got '', expected {expected}")
    try:
        named: list[Any] = ast.parse(f"[{text}]", mode="eval").body.elts  # type: ignore[attr-defined]
    except SyntaxError:
        raise UsageError(
            f"{option}: got '{text}', expected names, with settings as in fastv(layer=2,drop=0.5)"
        ) from None
    found: dict[str, Choice] = {}
    for node in named:
        label = re.sub(r"\s", "", ast.unparse(node))
        name = getattr(getattr(node, "func", node), "id", label)
        if name not in known:
            raise UsageError(f"{option}: got '{label}', expected {expected}")
        if isinstance(node, ast.Name):
            found[label] = name
            continue
        try:
            settings = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
        except ValueError:
            settings = {None: None}
        if node.args or None in settings:
            raise UsageError(f"{option}: got '{label}', expected settings as in fastv(layer=2,drop=0.5)")
        found[label] = {"name": name, **settings}
    return found
