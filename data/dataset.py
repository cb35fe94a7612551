"""Conversations as training samples: checked and tokenised once as a whole, then read one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.chat import IGNORE_INDEX, ChatFormat
from data.config import DataConfig
from data.faults import check_rows, faults_of, fingerprint, folder_of, processes
from data.images import open_image, pixel_values, visual_tokens
from data.records import DataError, Fault, Record, RowError, parse

SHOWN_FAULTS = 5  # faults that an error lists
_TOKENS = {
    "file": datasets.Value("string"),
    "row": datasets.Value("int64"),
    "fault": datasets.Value("string"),
    "images": datasets.List(datasets.Value("string")),
    "ids": datasets.List(datasets.Value("int32")),
    "labels": datasets.List(datasets.Value("int32")),
    "length": datasets.Value("int32"),
    "is_cut": datasets.Value("bool"),
}


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """LLaVA conversations as token ids, labels and pixel values.

    Building it reads, checks and tokenises every row (JSON, roles, marks, images, length), in parallel and once:
    both results are cached on disk. Training then meets no surprise hours later, and opens images alone.

    Args:
        config: the recipe's data section.
        processor: a LlavaProcessor.

    Attributes:
        lengths: tokens of each sample, visual tokens included.
        has_image: whether each sample has an image.
        num_cut: samples that lost turns at their end to `config.max_length`.
        skipped: the rows left out, at most `config.max_bad_rows`.

    Raises:
        DataError: more rows have faults than the recipe allows, and the first of them; or no row is left.
        TokenizerError: the tokenizer cannot label conversations.
    """

    def __init__(self, config: DataConfig, processor: Any) -> None:
        self.config, self.processor = config, processor
        self.encoder = Encoder(
            ChatFormat(config.format, processor.tokenizer), visual_tokens(processor), config.max_length
        )
        rows, unusable = _without_faults(check_rows(config), config)
        rows, self.skipped = _without_faults(_tokenised(rows, self.encoder, config), config, unusable)
        self.rows = rows
        self.lengths: list[int] = rows["length"][:]
        self.has_image: list[bool] = [bool(names) for names in rows["images"][:]]
        self.num_cut: int = sum(rows["is_cut"][:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns input_ids (S,), labels (S,) and, with images, pixel_values (images, 3, height, width).

        Raises:
            DataError: an image has changed since it was checked, or is broken inside.
        """
        row = self.rows[int(index)]
        ids = torch.tensor(row["ids"], dtype=torch.int64)
        repeats = torch.where(ids == self.encoder.chat.image_token_id, self.encoder.image_tokens, 1)
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


@dataclass(frozen=True)
class Sample:
    """A record as tokens.

    Attributes:
        images: its image paths.
        ids: token ids, one image token an image.
        labels: ids where supervised, IGNORE_INDEX elsewhere.
        length: tokens when each image token has become its visual tokens.
        is_cut: turns at its end were cut off.
    """

    images: tuple[str, ...]
    ids: list[int]
    labels: list[int]
    length: int
    is_cut: bool


@dataclass(frozen=True)
class Encoder:
    """Turns records into token ids and labels that fit into a sample.

    Attributes:
        chat: the format.
        image_tokens: visual tokens of one image.
        max_length: tokens that a sample may have, visual tokens included.
    """

    chat: ChatFormat
    image_tokens: int
    max_length: int

    def encode(self, record: Record) -> Sample:
        """Returns the record's sample; one too long ends after the last answer that fits, its later images go too.

        Raises:
            RowError: no label is left.
        """
        ids, labels = self.chat.encode(record.turns)
        marks = ids.count(self.chat.image_token_id)
        if marks != len(record.images):
            raise RowError(f"found {marks} image tokens for {len(record.images)} images: the tokenizer misses a mark")
        lengths = list(accumulate(self.image_tokens if token == self.chat.image_token_id else 1 for token in ids))
        kept = self._kept(labels, lengths)
        images = record.images[: ids[:kept].count(self.chat.image_token_id)]
        return Sample(images, ids[:kept], labels[:kept], lengths[kept - 1], is_cut=kept < len(ids))

    def _kept(self, labels: Sequence[int], lengths: Sequence[int]) -> int:
        """Returns how many ids to keep: all, or up to the end of an answer."""
        following = [*labels[1:], IGNORE_INDEX]
        ends = [
            place + 1
            for place, (label, after) in enumerate(zip(labels, following, strict=True))
            if label != IGNORE_INDEX and after == IGNORE_INDEX
        ]
        if not ends:
            raise RowError("no label is left: the tokenizer makes no token of the answers")
        if lengths[-1] <= self.max_length:
            return len(labels)
        fitting = [end for end in ends if lengths[end - 1] <= self.max_length]
        if not fitting:
            first = lengths[ends[0] - 1]
            raise RowError(
                f"no label is left: the first answer ends after {first} tokens, accepted: up to {self.max_length}"
            )
        return fitting[-1]


def _tokenised(rows: datasets.Dataset, encoder: Encoder, config: DataConfig) -> datasets.Dataset:
    tokenizer = encoder.chat.tokenizer
    return rows.map(
        _tokenise,
        fn_kwargs={"encoder": encoder},
        num_proc=processes(config, rows),
        desc="tokenising rows",
        new_fingerprint=fingerprint(
            "tokens",
            rows._fingerprint,  # of the rows without a fault
            config.format,
            encoder.max_length,
            encoder.image_tokens,
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
            tokenizer.backend_tokenizer.to_str(),
        ),
        features=datasets.Features(_TOKENS),
        remove_columns=[name for name in rows.column_names if name not in _TOKENS],
    )


def _tokenise(row: dict[str, Any], encoder: Encoder) -> dict[str, Any]:
    try:
        return {"fault": "", **vars(encoder.encode(parse(row["text"])))}
    except RowError as error:
        return {"fault": str(error), **vars(Sample((), [], [], 0, is_cut=False))}


def _without_faults(
    rows: datasets.Dataset, config: DataConfig, before: Sequence[Fault] = ()
) -> tuple[datasets.Dataset, list[Fault]]:
    """Returns the rows without a fault, and the faults of these rows and `before`, unless they are too many."""
    faults = [*before, *faults_of(rows)]
    if len(faults) > config.max_bad_rows:
        shown = "; ".join(map(str, faults[:SHOWN_FAULTS]))
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise DataError(
            f"data: found {len(faults)} rows with faults, accepted: up to {config.max_bad_rows} (data.max_bad_rows): "
            f"{shown}{more}; `python -m data.check RECIPE` lists all that are wrong with rows and images"
        )
    good = rows.select([number for number, reason in enumerate(rows["fault"][:]) if not reason])
    if len(good) == 0:
        raise DataError(f"{', '.join(config.files)}: found no rows without a fault, accepted: at least one")
    return good, faults
