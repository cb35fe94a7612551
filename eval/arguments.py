"""What the command lines of this folder share: the error that is one line, option types, folders for results."""

from __future__ import annotations

import argparse
import ast
import re
import socket
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from models.schedules import SCHEDULES, TRAINED, Choice

_LAYER = re.compile(r"\b(layers?|blocks)\.\d+\.")  # in names of weights
_DIGITS = 10  # of 2**31
# what Python raises for text that is no expression, or one nested too deep or with an unhashable key
_PARSING = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)


class UsageError(ValueError):
    """What the user gave cannot be used; the message is one line: where, what was got, what is expected."""


def command_line(module: str, description: str | None) -> argparse.ArgumentParser:
    """Returns the parser of `python -m module`, described by its docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=description, formatter_class=layout)


def positive(text: str) -> int:
    """Returns a whole number above 0 and below 2**31, for a command line."""
    if not text.isdecimal() or len(text) > _DIGITS or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected a whole number above 0 and below 2**31")
    return int(text)


def misfit(report: Mapping[str, Any]) -> str | None:
    """Returns which weights of a checkpoint do not fit its config, by transformers' loading report; None: all do.

    Missing ones would be random. Layers that the config does not have would be left out; other weights that a model
    has no use for do no harm.
    """
    if missing := sorted(report["missing_keys"]):
        return f"no values for {len(missing)} weights, such as {missing[0]}"
    if beyond := sorted(name for name in report["unexpected_keys"] if _LAYER.search(name)):
        return f"{len(beyond)} weights of layers that its config does not have, such as {beyond[0]}"
    return None


def exists(path: str | Path) -> bool:
    """Returns whether there is a file or a folder of that name; of one that cannot be a name, False."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, no access, a NUL in it
        return False


def make_folder(option: str, folder: Path, files: Iterable[str] = ()) -> None:
    """Makes a folder for results, and its parents, and tries to write there.

    Raises UsageError where it cannot, or where a folder has the name of one of the `files` that will be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: got {folder} ({_reason(error)}), expected a folder that can be written") from None
    for name in files:
        if (folder / name).is_dir():
            raise UsageError(
                f"{option}: got a folder named {folder / name}, expected none: a file of that name is made"
            )


def check_file(option: str, file: Path, *, is_new: bool = False) -> None:
    """Tries to write a file, and leaves it as it is; raises UsageError where it cannot, or where a new one is there."""
    try:
        was_there = file.exists()
        with file.open("x" if is_new else "a"):
            pass
        if not was_there:
            file.unlink()
    except FileExistsError:
        raise UsageError(f"{option}: got {file}, expected a file that does not exist yet") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: got {file} ({_reason(error)}), expected a file that can be written") from None


def _reason(error: OSError | ValueError) -> str:
    """Returns why a path cannot be used; ValueError is of a NUL in it."""
    return str(getattr(error, "strerror", error))


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
        parsed = ast.parse(f"[{text}]", mode="eval").body
    except _PARSING:
        parsed = None
    if not isinstance(parsed, ast.List):  # `a]+[b` is none
        raise UsageError(f"{option}: got '{_short(text)}', expected names, with {example}")
    found: dict[str, Choice] = {}
    for node in parsed.elts:
        label = re.sub(r"\s", "", ast.unparse(node))
        name = getattr(getattr(node, "func", node), "id", label)
        if name not in known:
            raise UsageError(f"{option}: got '{_short(label)}', expected {', '.join(known)}")
        found[label] = name
        if isinstance(node, ast.Call):
            settings = _settings(node)
            if settings is None:
                raise UsageError(f"{option}: got '{_short(label)}', expected {example}, each once")
            found[label] = {"name": name, **settings}
    return found


def _settings(call: ast.Call) -> dict[str, Any] | None:
    """Returns the settings of a schedule; None where they are anything but `name=value`, each once."""
    names = [word.arg for word in call.keywords if word.arg is not None]
    if call.args or len(set(names)) < len(call.keywords) or "name" in names:
        return None
    try:
        return {name: ast.literal_eval(word.value) for name, word in zip(names, call.keywords, strict=True)}
    except _PARSING:
        return None


def _short(text: str) -> str:
    """Returns a text as a line quotes it."""
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:80]}..."


def free_port(host: str, port: int) -> int:
    """Returns the port, or a free one for 0; raises UsageError where it is taken or the address not this machine's."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listening:
            return listening.getsockname()[1]
    except (OSError, ValueError, TypeError) as error:  # the last two: of what is no name of a host
        reason = str(getattr(error, "strerror", "no name of a host")).partition(" (")[0]
        raise UsageError(
            f"--host {host} --port {port}: {reason}, expected an address of this machine and a free port"
        ) from None
