"""`python -m data.check RECIPE [key=value ...]`: reads every row, opens every image, and lists the faults.

Exit code 0: no fault. 2: faults, or a data section of the recipe or one of its files cannot be read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import datasets
from pydantic import ValidationError

from data.chat import TokenizerError
from data.config import DataConfig, expand, first_fault, shorten
from data.dataset import Encoder
from data.processor import ProcessorError, apply_settings, model_processor
from data.rows import NOTES, DataError, Fault, RowError, group_faults
from data.stream import checked_rows
from data.strict_yaml import YamlError, override, read_file
from data.table import check_rows, record_of, rows_of, sizes_of

_BATCH: Final = 500  # rows whose texts are in memory together
_SHOWN_KEYS: Final = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the data sections of a recipe and prints a report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.check", description="Lists the faults of a recipe's data.")
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.images=/data/llava")
    parser.add_argument("--all", action="store_true", help="print one line per fault instead of grouping similar ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every fault")
    parser.add_argument("--decode", action="store_true", help="decode every image, as data.decode: true does")
    arguments = parser.parse_intermixed_args(argv)
    try:
        raw = _read_recipe(arguments.recipe, arguments.overrides)
        sections = read_sections(arguments.recipe, raw)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    reports, failed = {}, False
    for name, config in sections.items():
        section = config.model_copy(update={"decode": True}) if arguments.decode else config
        try:
            reports[name] = report(section, raw.get("model"))
        except DataError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
    if arguments.json:
        _print(json.dumps(reports))
    else:
        for name, found in reports.items():
            _print("\n".join(_lines(name, found, each=arguments.all)))
    return 2 if failed or any(found["faults"] for found in reports.values()) else 0


def _print(text: str) -> None:
    """Prints; a pipe that is closed early (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(config: DataConfig, model: Any = None) -> dict[str, Any]:
    """Returns the counts and faults of a data section.

    Args:
        config: the section.
        model: the recipe's model section; its processor is needed to find answers that are too long.

    Returns:
        sources: for each, path, counts, notes and ignored keys; faults: of every row; note: any check that was skipped.

    Raises:
        DataError: a source, an image folder or the cache cannot be used.
    """
    try:
        processor = _processor(model, config)
    except TokenizerError as error:
        processor, note = None, f"answers longer than data.max_length were not checked: {error}"
    else:
        note = ""
    try:
        encoder = None if processor is None else Encoder.of(config, processor)
    except TokenizerError as error:
        raise DataError(str(error)) from None
    rows = checked_rows(config) if config.streaming else _iter_rows(check_rows(config, recheck=True))
    summaries = [_Summary(source.path) for source in config.sources]
    faults = list(_faults(rows, encoder, summaries))
    return {
        "sources": [summary.figures() for summary in summaries],
        "faults": [asdict(fault) for fault in faults],
        "note": note,
    }


class _Summary:
    """Counts the rows, images and turns of one source."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.counts = Counter[str]()
        self.notes = Counter[str]()
        self.ignored = Counter[str]()

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts a row without a fault."""
        images = len(row["images"])
        self.counts.update(with_image=bool(images), images=images, text_only=not images, turns=len(row["texts"]))
        self.notes.update(row["notes"])
        self.ignored.update(row["ignored"])

    def figures(self) -> dict[str, Any]:
        """Returns path, counts, notes and ignored keys."""
        names = ("rows", "with_image", "images", "text_only", "turns", "faults")
        counts = {name: self.counts[name] for name in names}
        return {"path": self.path, **counts, "notes": dict(self.notes), "ignored": dict(self.ignored.most_common())}


def _iter_rows(rows: datasets.Dataset) -> Iterator[dict[str, Any]]:
    for batch in rows.iter(batch_size=_BATCH):
        yield from rows_of(batch)


def _faults(rows: Iterable[dict[str, Any]], encoder: Encoder | None, summaries: Sequence[_Summary]) -> Iterator[Fault]:
    """Yields every fault, and updates the summaries."""
    for row in rows:
        summary = summaries[row["source"]]
        summary.counts["rows"] += 1
        reason = row["fault"]
        if not reason and encoder is not None:
            try:
                summary.notes["answer_cut"] += _is_answer_cut(row, encoder)
            except RowError as error:
                reason = str(error)
        if reason:
            summary.counts["faults"] += 1
            yield Fault(row["file"], row["row"], reason)
        else:
            summary.add(row)


def _is_answer_cut(row: dict[str, Any], encoder: Encoder) -> bool:
    """Returns whether the first answer is cut at max_length; tokenises only rows that may be too long.

    Raises:
        RowError: the format cannot write the row, or its first answer is too long.
    """
    record = record_of(row)
    rendered = encoder.chats[row["source"]].render(record.turns, record.system)
    if not encoder.may_be_long(rendered, sizes_of(row)):
        return False
    return encoder.encode(record, sizes_of(row), row["source"]).is_answer_cut


def _lines(name: str, found: dict[str, Any], *, each: bool) -> Iterator[str]:
    """Yields the faults of a section and a summary of each of its sources."""
    faults = [Fault(**fault) for fault in found["faults"]]
    lines = list(map(str, faults)) if each else group_faults(faults)
    yield from lines
    if len(lines) < len(faults):
        yield f"{name}: {len(faults):,} faults in {len(lines)} lines; --all lists each, --json is for programs"
    if found["note"]:
        yield f"{name}: note: {found['note']}"
    for source in found["sources"]:
        counts = {key: f"{value:,}" for key, value in source.items() if isinstance(value, int)}
        yield (
            f"{name}: {source['path']}: {counts['rows']} rows, {counts['with_image']} with an image "
            f"({counts['images']} images), {counts['text_only']} text only, {counts['turns']} turns, "
            f"{counts['faults']} faults"
        )
        yield from (f"  rows that {NOTES[note]}: {count:,}" for note, count in source["notes"].items() if count)
        if source["ignored"]:
            shown = [f"{shorten(key, 30) or repr(key)} ({count:,})" for key, count in source["ignored"].items()]
            more = f" and {len(shown) - _SHOWN_KEYS} more" if len(shown) > _SHOWN_KEYS else ""
            yield f"  ignored keys: {', '.join(shown[:_SHOWN_KEYS])}{more}"


def _processor(model: Any, config: DataConfig) -> Any:
    """Returns the processor of a recipe's model section.

    Raises:
        TokenizerError: there is none, or it cannot be loaded.
        DataError: it does not take the section's settings.
    """
    from transformers import logging  # slow to import

    if not isinstance(model, dict) or not (model.get("config") or model.get("checkpoint")):
        raise TokenizerError("the recipe names no model")
    logging.set_verbosity_error()
    try:
        sources = (model.get(name) for name in ("config", "checkpoint", "language_model"))
        processor = model_processor(*(expand(str(source)) if source else None for source in sources))
    except ProcessorError as error:
        raise TokenizerError(shorten(str(error), 160)) from None
    try:
        return apply_settings(processor, config)
    except ProcessorError as error:
        raise DataError(str(error)) from None


def _read_recipe(recipe: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a recipe with its overrides, which may set keys of the sections that are read."""
    try:
        raw = read_file(recipe)
        if not isinstance(raw.get("data"), dict):
            raise DataError(f"{recipe}: data: got none, expected a recipe with a data section")
        align = raw.get("align")
        sections = {"align.data": align.get("data") if isinstance(align, dict) else None, "data": raw["data"]}
        sections["model"] = raw.get("model")
        known = [f"{name}." for name, section in sections.items() if isinstance(section, dict)]
        for given in overrides:
            if "=" not in given or not given.startswith(tuple(known)):
                expected = " or ".join(f"{name}key=value" for name in known)
                found = shorten(repr(given))
                raise DataError(f"override {found}: expected {expected}, because only these sections are read")
            override(raw, given, recipe)
    except YamlError as error:
        raise DataError(str(error)) from None
    return raw


def read_sections(recipe: Path, raw: dict[str, Any]) -> dict[str, DataConfig]:
    """Returns a recipe's data sections by key: `align.data` where there is one, `data`, and held-out files (`eval`).

    Reads only these sections, because data/ does not import the recipe schema.

    Args:
        recipe: for messages.
        raw: the parsed YAML.

    Raises:
        DataError: a data section is wrong.
    """
    align = raw.get("align")
    sections: dict[str, Any] = {"align.data": align.get("data")} if isinstance(align, dict) else {}
    sections["data"] = raw["data"]
    for prefix, part in (("align.", align), ("", raw)):
        held_out = part.get("eval") if isinstance(part, dict) else None
        if isinstance(held_out, dict) and held_out.get("files"):
            if not isinstance(sections.get(f"{prefix}data"), dict):
                raise DataError(f"{recipe}: {prefix}data: got none beside {prefix}eval, expected a mapping of keys")
            sections[f"{prefix}eval"] = {**sections[f"{prefix}data"], "files": held_out["files"], "streaming": False}
    return {name: _section(recipe, name, fields) for name, fields in sections.items()}


def _section(recipe: Path, name: str, fields: Any) -> DataConfig:
    try:
        return DataConfig.model_validate(fields)
    except ValidationError as error:
        where, reason = first_fault(error, DataConfig)
        raise DataError(f"{recipe}: {'.'.join(filter(None, (name, where)))}: {reason}") from None


if __name__ == "__main__":
    sys.exit(main())
