"""What the command lines of this folder share: the error that is one line, option types, folders for results."""

from __future__ import annotations

import argparse
import ast
import re
import socket
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from models.schedules import SCHEDULES, TRAINED, Choice


class UsageError(ValueError):
    """What the user gave cannot be used; the message is one line: where, what was got, what is expected."""


def command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """Returns the parser of `python -m module`, described by its docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=description, formatter_class=layout)


def positive(text: str) -> int:
    """Returns a whole number above 0, for a command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")
    return int(text)


def make_folder(option: str, folder: Path) -> None:
    """Makes a folder for results, and its parents, and tries to write there; raises UsageError where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option}: got {folder} ({error.strerror}), expected a folder that can be written") from None


def names_of(option: str, text: str) -> list[str]:
    """Returns the names of a comma-separated list, each once; raises UsageError where one is empty."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise UsageError(f"{option}: got '', expected names between commas")
    return names


def schedules_of(option: str, text: str, plans: Collection[str] = ()) -> dict[str, Choice]:
    """Returns the schedules of a comma-separated list by what the list calls them: names, or `fastv(layer=2,drop=0.5)`.

    `plans` are names of the checkpoints' plans, which are known beside those of schedules.

    Raises:
        UsageError: a name is not known, or settings are not `name=value` between commas.
    """
    known = list(dict.fromkeys((TRAINED, *plans, *SCHEDULES)))
    example = "settings as in fastv(layer=2,drop=0.5)"
    if not all(part.strip() for part in text.split(",")):
        raise UsageError(f"{option}: got '', expected {', '.join(known)}")
    try:
        named: list[Any] = ast.parse(f"[{text}]", mode="eval").body.elts  # type: ignore[attr-defined]
    except SyntaxError:
        raise UsageError(f"{option}: got '{text}', expected names, with {example}") from None
    found: dict[str, Choice] = {}
    for node in named:
        label = re.sub(r"\s", "", ast.unparse(node))
        name = getattr(getattr(node, "func", node), "id", label)
        if name not in known:
            raise UsageError(f"{option}: got '{label}', expected {', '.join(known)}")
        found[label] = name
        if isinstance(node, ast.Call):
            try:
                settings: dict[Any, Any] = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
            except ValueError:
                settings = {None: None}
            if node.args or None in settings:
                raise UsageError(f"{option}: got '{label}', expected {example}")
            found[label] = {"name": name, **settings}
    return found


def free_port(host: str, port: int) -> int:
    """Returns the port, or a free one for 0; raises UsageError where it is taken or the address not this machine's."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listening:
            return listening.getsockname()[1]
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise UsageError(
            f"--host {host} --port {port}: {reason}, expected an address of this machine and a free port"
        ) from None
