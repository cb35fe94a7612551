"""`python -m data.check RECIPE`: reads every row and opens every image of a recipe, and lists each fault.

Exit code 0: no fault. 2: faults, or the recipe cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data.config import DataConfig
from data.dataset import check_rows, faults_of
from data.records import DataError, starts_with_answer


def main(given: Sequence[str] | None = None) -> int:
    """Checks the data sections of a recipe and prints what it found; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.check", description=__doc__)
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: the recipe's)")
    arguments = parser.parse_args(given)
    try:
        sections = read_sections(arguments.recipe)
        counts = [_check(name, config, arguments.workers) for name, config in sections.items()]
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    return 2 if sum(counts) else 0


def read_sections(recipe: Path) -> dict[str, DataConfig]:
    """Returns a recipe's data sections by key: `align.data` where there is one, and `data`.

    Reads these sections alone, because data/ knows nothing of the rest of a recipe.

    Raises:
        DataError: the file is no recipe, or a data section is wrong.
    """
    try:
        raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{recipe}: {' '.join(str(error).split())}, accepted: a recipe in YAML") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("data"), dict):
        raise DataError(f"{recipe}: data: not found, accepted: a recipe with a data section")
    align = raw.get("align")
    sections = {"align.data": align.get("data")} if isinstance(align, dict) else {}
    return {name: _section(recipe, name, fields) for name, fields in {**sections, "data": raw["data"]}.items()}


def _section(recipe: Path, name: str, fields: Any) -> DataConfig:
    try:
        return DataConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (name, *first["loc"])))
        raise DataError(f"{recipe}: {key}: {first['msg']}, found {first['input']!r}") from None


def _check(name: str, config: DataConfig, workers: int | None) -> int:
    """Checks one section, prints its faults and a summary; returns how many faults there are."""
    if workers is not None:
        config = config.model_copy(update={"workers": workers})
    rows = check_rows(config)
    faults = faults_of(rows)
    for fault in faults:
        print(fault)
    images, with_image = sum(map(len, rows["images"])), sum(map(bool, rows["images"]))
    good = (text for text, fault in zip(rows["text"], rows["fault"], strict=True) if not fault)
    answers_first = sum(map(starts_with_answer, good))
    print(
        f"{name}: {len(rows):,} rows, {with_image:,} with an image ({images:,} images), "
        f"{len(rows) - with_image:,} text only, {sum(rows['turns']):,} turns, {len(faults):,} faults"
    )
    if answers_first:
        print(f"{name}: {answers_first:,} rows begin with an answer, which is left out, as LLaVA does")
    return len(faults)


if __name__ == "__main__":
    sys.exit(main())
