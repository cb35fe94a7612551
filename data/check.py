"""`python -m data.check RECIPE [key=value ...]`: reads every row and opens every image, and lists each fault.

Exit code 0: no fault. 2: faults, or something in the recipe's data sections or their files cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import yaml
from pydantic import ValidationError

from data.config import DataConfig
from data.faults import check_rows, faults_of
from data.records import DataError


def main(given: Sequence[str] | None = None) -> int:
    """Checks the data sections of a recipe and prints what it found; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.check", description="Lists every fault of a recipe's data.")
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.images=/data/llava")
    arguments = parser.parse_args(given)
    try:
        sections = read_sections(arguments.recipe, arguments.overrides)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    results = [_is_clean(name, config) for name, config in sections.items()]
    return 0 if all(results) else 2


def read_sections(recipe: Path, overrides: Sequence[str] = ()) -> dict[str, DataConfig]:
    """Returns a recipe's data sections by key: `align.data` where there is one, and `data`.

    Reads these sections alone, because data/ knows nothing of the rest of a recipe.

    Args:
        recipe: YAML file.
        overrides: `data.key=value` or `align.data.key=value`, the value in YAML.

    Raises:
        DataError: the file is no recipe, or a data section or an override is wrong.
    """
    try:
        raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{recipe}: {error.strerror}, accepted: a recipe in YAML") from None
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{recipe}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("data"), dict):
        raise DataError(f"{recipe}: data: not found, accepted: a recipe with a data section")
    align = raw.get("align")
    sections = {"align.data": align.get("data")} if isinstance(align, dict) else {}
    sections["data"] = raw["data"]
    for override in overrides:
        _apply(override, sections)
    return {name: _section(recipe, name, fields) for name, fields in sections.items()}


def _apply(override: str, sections: Mapping[str, Any]) -> None:
    path, mark, text = override.partition("=")
    name, _, key = path.rpartition(".")
    if not mark or not isinstance(sections.get(name), dict):
        accepted = " or ".join(f"{section}.key=value" for section in sections)
        raise DataError(f"override {override!r}: accepted: {accepted}, because only these sections are read")
    try:
        sections[name][key] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise DataError(f"override {override!r}: found {text!r}, accepted: a value in YAML") from None


def _section(recipe: Path, name: str, fields: Any) -> DataConfig:
    try:
        return DataConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (name, *first["loc"])))
        raise DataError(f"{recipe}: {key}: {first['msg']}, found {first['input']!r}") from None


def _is_clean(name: str, config: DataConfig) -> bool:
    """Checks one section and prints its faults and a summary of each file."""
    try:
        rows = check_rows(config, anew=True)
    except DataError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return False
    faults = faults_of(rows)
    for fault in faults:
        print(fault)
    files = rows["file"][:]
    for file in dict.fromkeys(files):
        print(f"{name}: {file}: {_summary(rows.select([place for place, each in enumerate(files) if each == file]))}")
    return not faults


def _summary(rows: datasets.Dataset) -> str:
    images = [len(names) for names in rows["images"][:]]
    with_image = sum(map(bool, images))
    words = [
        f"{len(rows):,} rows",
        f"{with_image:,} with an image ({sum(images):,} images)",
        f"{len(rows) - with_image:,} text only",
        f"{sum(rows['turns'][:]):,} turns",
        f"{len(faults_of(rows)):,} faults",
    ]
    if cut := sum(rows["is_cut_in_front"][:]):
        words.append(f"{cut:,} begin with an answer, which is left out, as LLaVA does")
    return ", ".join(words)


if __name__ == "__main__":
    sys.exit(main())
