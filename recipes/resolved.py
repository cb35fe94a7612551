"""Writes the resolved recipe that is saved with every result, and compares it with another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data.config import DataConfig
from data.strict_yaml import YamlError, read_file
from recipes.schema import Recipe, RecipeError


def dump_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML; loading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, width=100)


def saved_data(saved: Path) -> DataConfig:
    """Returns the data section of a saved recipe, even if other files that it names are gone.

    That of the align phase, if the run.json beside it is of that phase.

    Raises:
        RecipeError: the file has no valid data section.
    """
    try:
        raw = read_file(saved)
        return DataConfig.model_validate((raw["align"] if _is_align(saved.with_name("run.json")) else raw)["data"])
    except (YamlError, KeyError, TypeError, ValidationError) as error:
        raise RecipeError(f"{saved}: data: cannot be read, expected the recipe.yaml that a run writes") from error


def _is_align(run: Path) -> bool:
    """Returns whether a run.json is of an align phase; where it cannot be read, False."""
    try:
        return json.loads(run.read_text(encoding="utf-8"))["phase"] == "align"
    except (OSError, ValueError, LookupError, TypeError):
        return False


def saved_recipe(saved: Path) -> dict[str, Any]:
    """Returns a saved recipe as {dotted key: value}.

    Raises:
        RecipeError: the file cannot be read.
    """
    return _flat(_read(saved))


def changes(recipe: Recipe, saved: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, value in the saved recipe, value in this one) for each key that differs.

    Raises:
        RecipeError: the saved recipe cannot be read.
    """
    raw = _read(saved)
    with suppress(ValidationError):  # keys added since the recipe was saved get their default
        raw = Recipe.model_validate(raw).model_dump()
    before = _flat(raw)
    now = _flat(recipe.model_dump())
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


def _read(saved: Path) -> Any:
    try:
        return read_file(saved)
    except YamlError as error:
        raise RecipeError(f"{saved}: cannot be read, expected the recipe.yaml that a run writes") from error


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {dotted key: value} of nested mappings."""
    if not isinstance(section, dict):
        return {prefix: section}
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
