"""One memory-mapped table of all rows of a recipe's sources, parsed and checked once, images included."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import datasets
import pyarrow as pa

from data import built_in
from data.config import DataConfig, Source, expand, shorten
from data.images import ImageOptions, inspect_image
from data.rows import DataError, EmbeddedImage, Fault, Record, RowError, Turn, count_placeholders, parse
from data.sources import NO_ROWS, find_files, open_store, raw_rows, stamp

EMBEDDED: Final = "\0"  # replaces the path of an image whose bytes are read from the source
_ROWS: Final = {
    "source": datasets.Value("int32"),  # number in DataConfig.sources
    "file": datasets.Value("string"),
    "row": datasets.Value("int64"),
    "fault": datasets.Value("string"),  # empty where there is none
    "notes": datasets.List(datasets.Value("string")),
    "ignored": datasets.List(datasets.Value("string")),
    "images": datasets.List(datasets.Value("string")),
    "sizes": datasets.List(datasets.Value("int32")),  # width and height of each image, one after the other
    "system": datasets.Value("large_string"),
    "texts": datasets.List(datasets.Value("large_string")),  # of user and assistant in turns
    "untrained": datasets.List(datasets.Value("int32")),  # numbers of the answers that are not learnt
}
_WRITE_BATCH: Final = 500  # rows that are in memory together
_CHECKED: Final = {
    "fault": datasets.Value("string"),
    "notes": datasets.List(datasets.Value("string")),
    "sizes": datasets.List(datasets.Value("int32")),
}


def check_rows(config: DataConfig, *, recheck: bool = False) -> datasets.Dataset:
    """Returns every row with its check result: columns source, file, row, fault, notes, ignored, images, texts, ...

    Parses once, checks images in parallel, and caches both. Cached image faults are checked again, because the image
    may have been repaired.

    Args:
        config: the recipe's data section.
        recheck: checks all images again and ignores the cache.

    Raises:
        DataError: a source, an image folder or the cache cannot be used.
    """
    check_folders(config)
    with usable_cache():
        rows = _read_rows(config)
        found = _check_images(rows, config, recheck=recheck)
        if not recheck and _is_stale(rows, found, config):
            found = _check_images(rows, config, recheck=True)
    return datasets.concatenate_datasets([rows.remove_columns(list(_CHECKED)), found], axis=1)


def check_folders(config: DataConfig) -> None:
    """Raises DataError if an image folder does not exist."""
    for source in config.sources:
        if source.images is not None and not _is_folder(Path(expand(source.images))):
            start = "" if Path(expand(source.images)).is_absolute() else f" (relative paths start in {Path.cwd()})"
            raise DataError(f"images: got {shorten(repr(source.images), 200)}, expected a folder{start}")


def _is_folder(place: Path) -> bool:
    try:
        return place.is_dir()
    except (OSError, ValueError):  # no permission, a name that is too long, a NUL
        return False


def good_rows(rows: datasets.Dataset) -> list[int]:
    """Returns the numbers of the rows without a fault."""
    return [number for number, reason in enumerate(rows["fault"][:]) if not reason]


def faults_of(rows: datasets.Dataset) -> list[Fault]:
    """Returns the faults among rows."""
    bad = [number for number, reason in enumerate(rows["fault"][:]) if reason]
    chosen = rows.select_columns(["file", "row", "fault"]).select(bad)
    return [Fault(row["file"], row["row"], row["fault"]) for row in chosen]


def rows_of(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a batch of columns."""
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def record_of(row: dict[str, Any]) -> Record:
    """Returns the record of a row of the table, with EMBEDDED for embedded images."""
    untrained = set(row["untrained"])
    turns = [
        Turn(("user", "assistant")[place % 2], text, place not in untrained) for place, text in enumerate(row["texts"])
    ]
    return Record(tuple(row["images"]), tuple(turns), row["system"])


def sizes_of(row: dict[str, Any]) -> list[tuple[int, int]]:
    """Returns width and height of each image of a row of the table."""
    return list(zip(row["sizes"][::2], row["sizes"][1::2], strict=True))


def read_records(path: str) -> Iterator[tuple[str, int, Record | RowError]]:
    """Yields file, number and record, or its RowError, of every row of one source.

    Raises:
        DataError: the source cannot be read.
    """
    for file in find_files(path):
        number = -1
        for number, raw in enumerate(raw_rows(file)):
            try:
                yield file, number, parse(raw)
            except RowError as error:
                yield file, number, error
        if number < 0:
            raise DataError(f"{file}: {NO_ROWS}")


def images_of(row: dict[str, Any]) -> Sequence[str | EmbeddedImage]:
    """Returns the images of a row of the table: paths, or embedded images read from the source."""
    return parse(_stored(row)).images[: len(row["images"])] if EMBEDDED in row["images"] else row["images"]


def folder_of(source: Source, file: str) -> Path | None:
    """Returns the image folder of a file's rows."""
    if built_in.is_built_in(file):
        return built_in.image_folder(file)
    return None if source.images is None else Path(expand(source.images))


def image_options(config: DataConfig) -> ImageOptions:
    """Returns the recipe's options for reading images."""
    return ImageOptions(config.image_aspect, config.exif, config.follow_links, config.decode)


def processes(config: DataConfig, rows: datasets.Dataset) -> int | None:
    """Returns the number of worker processes; None runs in this process."""
    return min(config.workers, len(rows)) or None


def fingerprint(*parts: object) -> str:
    """Returns the cache key of a result that depends on `parts`."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


@cache
def code_stamp(*modules: str) -> str:
    """Returns a digest of modules of this package, which invalidates caches when their code changes."""
    files = [Path(__file__).with_name(f"{name}.py") for name in modules]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def source_stamp(*parts: Any) -> str:
    """Returns a digest of the source of classes and functions, for parts of a module: see `code_stamp`."""
    return hashlib.sha256("".join(map(inspect.getsource, parts)).encode()).hexdigest()


@contextmanager
def usable_cache() -> Iterator[None]:
    """Turns an OSError of the cache folder into a one-line DataError."""
    try:
        yield
    except OSError as error:
        folder = datasets.config.HF_DATASETS_CACHE
        raise DataError(
            f"cache: {folder}: {error.strerror or error}; expected a folder that can be written, "
            "named by HF_DATASETS_CACHE"
        ) from None


def plain_notes(turns: Sequence[Turn], images: int) -> list[str]:
    """Returns the notes, keys of NOTES, on a conversation that is not a caption, for format `plain`."""
    questions = [turn.text for turn in turns if turn.role == "user"]
    notes = ["question_left_out"] if any(count_placeholders(text) == 0 or text.strip() for text in questions) else []
    notes += ["plain_dialogue"] if len(turns) > 2 else []
    return notes + (["plain_text_only"] if not images else [])


def _stored(row: dict[str, Any]) -> Any:
    return open_store(row["file"])[row["row"]].to_pylist()[0]


def _read_rows(config: DataConfig) -> datasets.Dataset:
    """Returns the parsed rows of all sources.

    The table is built once and cached by its sources and their contents; other ranks of a machine wait for it.
    """
    open_store.cache_clear()  # files may have changed since
    sources = [(source.path, source.limit, source.format) for source in config.sources]
    stamps = [
        code_stamp(
            "rows", "keys", "sources", "table", "built_in", "easy_vqa", "scenes", "scene_questions", "scene_images"
        )
    ]
    stamps += [f"{file}:{stamp(file)}" for path, _, _ in sources for file in find_files(path)]
    builder = _RowsBuilder(sources=tuple(sources), stamps=tuple(stamps))
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError | OSError):
            raise error.__cause__ from None
        raise
    return builder.as_dataset(split="train")


@dataclass
class _RowsConfig(datasets.BuilderConfig):
    """What the table depends on; `stamps` invalidate the cache when files or code change."""

    sources: tuple[tuple[str, int | None, str], ...] = ()
    stamps: tuple[str, ...] = ()


class _RowsBuilder(datasets.ArrowBasedBuilder):
    """Writes the table into the cache of `datasets`, unless it is cached already."""

    BUILDER_CONFIG_CLASS = _RowsConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=datasets.Features(_ROWS))

    def _split_generators(self, _: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator("train")]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        schema, rows = self.info.features.arrow_schema, _rows(self.config.sources)
        for number in itertools.count():
            if not (part := list(itertools.islice(rows, _WRITE_BATCH))):
                return
            yield number, pa.Table.from_pylist(part, schema=schema)


def _rows(sources: tuple[tuple[str, int | None, str], ...]) -> Iterator[dict[str, Any]]:
    for number, (path, limit, style) in enumerate(sources):
        for count, (file, row, record) in enumerate(read_records(path)):
            if limit is not None and count >= limit:
                break
            yield row_of(number, file, row, record, style)


def row_of(source: int, file: str, row: int, record: Record | RowError, style: str) -> dict[str, Any]:
    """Returns a row of the table.

    Args:
        source: number in `DataConfig.sources`.
        file: the row's file.
        row: its number in the file.
        record: the parsed row, or its error.
        style: the source's format.
    """
    place = {"source": source, "file": file, "row": row}
    if isinstance(record, RowError):
        nothing: dict[str, Any] = {name: [] for name in ("notes", "ignored", "images", "sizes", "texts", "untrained")}
        return {**place, **nothing, "fault": str(record), "system": None}
    notes = list(record.notes)
    if style == "plain":
        notes += plain_notes(record.turns, len(record.images))
    return {
        **place,
        "fault": "",
        "notes": notes,
        "ignored": list(record.ignored),
        "images": [EMBEDDED if isinstance(image, EmbeddedImage) else image for image in record.images],
        "sizes": [],
        "system": record.system,
        "texts": [turn.text for turn in record.turns],
        "untrained": [place for place, turn in enumerate(record.turns) if not turn.is_trained],
    }


def _check_images(rows: datasets.Dataset, config: DataConfig, *, recheck: bool) -> datasets.Dataset:
    """Returns the columns fault, notes and sizes after the images were checked."""
    columns = ["source", "file", "row", "fault", "notes", "images", "sizes"]
    given = rows.select_columns(columns)
    if not any(given["images"][:]):
        return given.select_columns(list(_CHECKED))
    folders = [Path(expand(source.images)).resolve() if source.images else None for source in config.sources]
    name = fingerprint("check", code_stamp("images", "table"), rows._fingerprint, folders, image_options(config))
    return given.map(
        _inspect,
        fn_kwargs={"config": config},
        num_proc=processes(config, rows),
        desc="checking images",
        new_fingerprint=name,
        features=datasets.Features(_CHECKED),
        remove_columns=[column for column in columns if column not in _CHECKED],
        load_from_cache_file=not recheck,
    )


def _is_stale(rows: datasets.Dataset, found: datasets.Dataset, config: DataConfig) -> bool:
    """Returns whether any cached image fault is out of date, because the image was repaired."""
    given = rows.select_columns(["source", "file", "row", "fault", "notes", "images"])
    for number, reason in enumerate(found["fault"][:]):
        if reason and not (row := given[number])["fault"] and _inspect(row, config)["fault"] != reason:
            return True
    return False


def _inspect(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    if row["fault"] or not row["images"]:
        return {"fault": row["fault"], "notes": row["notes"], "sizes": []}
    folder, options, notes = folder_of(config.sources[row["source"]], row["file"]), image_options(config), set()
    sizes: list[int] = []
    try:
        for image in images_of(row):
            found, size = inspect_image(folder, image, options)
            notes.update(found)
            sizes += size
    except RowError as error:
        return {"fault": str(error), "notes": [], "sizes": []}
    return {"fault": "", "notes": [*row["notes"], *sorted(notes)], "sizes": sizes}
