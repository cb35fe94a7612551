"""Conversations as training samples: checked once as a whole, then read one at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import easy_vqa
from data.chat import ChatFormat, truncate
from data.config import DataConfig
from data.images import check_image, open_image, pixel_values, visual_tokens
from data.records import IMAGE_MARK, DataError, Fault, Record, RowError, parse, read_rows

SHOWN_FAULTS = 5  # faults that an error lists
_CHECK_VERSION = "2"  # part of the cache key of checked rows: raise it when a check changes
_CHECKED = {
    "fault": datasets.Value("string"),
    "images": datasets.List(datasets.Value("string")),
    "turns": datasets.Value("int32"),
    "ids": datasets.List(datasets.Value("int32")),
    "labels": datasets.List(datasets.Value("int32")),
    "length": datasets.Value("int32"),
}


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """LLaVA conversations as token ids, labels and pixel values.

    Building it reads, checks and tokenises every row (JSON, roles, marks, images, length), in parallel and once:
    the result is cached on disk. Training then meets no surprise hours later, and opens images alone.

    Args:
        config: the recipe's data section.
        processor: a LlavaProcessor.

    Attributes:
        lengths: tokens of each sample, visual tokens included.
        has_image: whether each sample has an image.
        skipped: the rows left out, at most `config.max_bad_rows`.

    Raises:
        DataError: more rows have faults than the recipe allows; lists the first of them.
    """

    def __init__(self, config: DataConfig, processor: Any) -> None:
        self.config, self.processor = config, processor
        self.format = ChatFormat(config.format, processor.tokenizer)
        self.image_tokens = visual_tokens(processor)
        rows = check_rows(config, self)
        self.skipped = faults_of(rows)
        if len(self.skipped) > config.max_bad_rows:
            raise DataError(_too_many(self.skipped, config.max_bad_rows))
        if self.skipped:
            rows = rows.select([number for number, reason in enumerate(rows["fault"]) if not reason])
        if len(rows) == 0:
            raise DataError(f"{', '.join(config.files)}: found no rows, accepted: at least one conversation")
        self.rows = rows
        self.lengths: list[int] = list(rows["length"])
        self.has_image: list[bool] = [bool(names) for names in rows["images"]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns input_ids (S,), labels (S,) and, with images, pixel_values (images, 3, height, width).

        Raises:
            DataError: an image changed since it was checked.
        """
        row = self.rows[int(index)]
        ids = torch.tensor(row["ids"], dtype=torch.int64)
        repeats = torch.where(ids == self.format.image_token_id, self.image_tokens, 1)
        sample = {
            "input_ids": ids.repeat_interleave(repeats),
            "labels": torch.tensor(row["labels"], dtype=torch.int64).repeat_interleave(repeats),
        }
        if row["images"]:
            sample["pixel_values"] = torch.cat([self._pixels(row, name) for name in row["images"]])
        return sample

    def _pixels(self, row: dict[str, Any], name: str) -> Tensor:
        try:
            image = open_image(folder_of(row["file"], self.config), name)
        except RowError as error:
            raise DataError(str(Fault(row["file"], row["row"], str(error)))) from error
        return pixel_values(image, self.processor.image_processor, aspect=self.config.image_aspect)

    def encode(self, record: Record) -> tuple[list[int], list[int], int]:
        """Returns ids and labels, one image token an image, and the length with all visual tokens.

        Raises:
            RowError: nothing to learn from fits into the limit, or an image would be cut away from its question.
        """
        turns = truncate(record.turns, lambda some: self._length(self.format.encode(some)[0]), self.config.max_length)
        if sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user") != len(record.images):
            raise RowError(f"an image stands after the {self.config.max_length} tokens that a sample may have")
        ids, labels = self.format.encode(turns)
        return ids, labels, self._length(ids)

    def _length(self, ids: list[int]) -> int:
        return len(ids) + (self.image_tokens - 1) * ids.count(self.format.image_token_id)


def check_rows(config: DataConfig, samples: ConversationDataset | None = None) -> datasets.Dataset:
    """Returns every row with what its check found: columns file, row, text, fault, images, turns, ids, labels, length.

    Args:
        config: the recipe's data section.
        samples: tokenises and cuts the samples; None leaves that out (rows and images are checked all the same).

    Raises:
        DataError: a file cannot be read.
    """
    rows = read_rows(config.files)
    return rows.map(
        _inspect,
        fn_kwargs={"config": config, "samples": samples},
        num_proc=config.workers or None,
        desc="checking rows",
        new_fingerprint=_fingerprint(rows, config, samples),
        features=datasets.Features({**rows.features, **_CHECKED}),
    )


def faults_of(rows: datasets.Dataset) -> list[Fault]:
    """Returns the faults among checked rows."""
    found = [number for number, reason in enumerate(rows["fault"]) if reason]
    return [Fault(row["file"], row["row"], row["fault"]) for row in rows.select(found)]


def folder_of(file: str, config: DataConfig) -> Path | None:
    """Returns the image folder of a file's rows."""
    if easy_vqa.is_built_in(file):
        return easy_vqa.image_folder(easy_vqa.name_of(file))
    return None if config.images is None else Path(config.images)


def _inspect(row: dict[str, Any], config: DataConfig, samples: ConversationDataset | None) -> dict[str, Any]:
    found: dict[str, Any] = {"fault": "", "images": [], "turns": 0, "ids": [], "labels": [], "length": 0}
    try:
        record = parse(row["text"])
        found |= {"images": list(record.images), "turns": len(record.turns)}
        for name in record.images:
            check_image(folder_of(row["file"], config), name)
        if samples is not None:
            found["ids"], found["labels"], found["length"] = samples.encode(record)
    except RowError as error:
        found["fault"] = str(error)
    return found


def _fingerprint(rows: datasets.Dataset, config: DataConfig, samples: ConversationDataset | None) -> str:
    """Returns a name for the checked rows, so that a second run or rank finds them in the cache."""
    parts = [_CHECK_VERSION, rows._fingerprint, config.format, str(config.max_length), str(config.images)]
    if config.images is not None:
        parts.append(str(Path(config.images).resolve()))
    if samples is not None:
        tokenizer = samples.processor.tokenizer
        parts += [str(samples.image_tokens), str(tokenizer.chat_template), tokenizer.backend_tokenizer.to_str()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _too_many(faults: list[Fault], allowed: int) -> str:
    shown = "; ".join(map(str, faults[:SHOWN_FAULTS]))
    more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
    return (
        f"data: found {len(faults)} rows with faults, accepted: up to {allowed} (data.max_bad_rows): {shown}{more}; "
        "`python -m data.check RECIPE` lists them all"
    )
