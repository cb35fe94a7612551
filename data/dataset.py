"""Training samples: checks and tokenises all conversations once, reads them one at a time, and makes batches."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import datasets
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from data.chat import IGNORE_INDEX, ChatFormat, Rendered, TokenizerError, freeze_templates
from data.config import DataConfig
from data.image_groups import connected_rows
from data.images import open_image
from data.processor import TYPE_IDS, EncodedImages, ProcessorError, VisionProcessor
from data.rows import DataError, EmbeddedImage, Fault, Record, RowError, group_faults
from data.table import (
    check_rows,
    code_stamp,
    faults_of,
    fingerprint,
    folder_of,
    good_rows,
    image_options,
    images_of,
    processes,
    record_of,
    rows_of,
    sizes_of,
    source_stamp,
    usable_cache,
)

_TRAINER_KEYS: Final = ("source", "faults")  # keys of a sample that are not inputs of the model
_POOLING: Final = "image_token_pooling"
SHOWN_FAULTS: Final = 5  # faults that an error lists
_POOL: Final = 50  # batches sorted by length together: enough for similar lengths, few enough for a random mix
_EXTRA_TOKENS: Final = 16  # a beginning, and spaces that tokenizers write by themselves
_TOKENS: Final = {
    "source": datasets.Value("int32"),
    "file": datasets.Value("string"),
    "row": datasets.Value("int64"),
    "fault": datasets.Value("string"),
    "images": datasets.List(datasets.Value("string")),
    "ids": datasets.List(datasets.Value("int32")),
    "labels": datasets.List(datasets.Value("int32")),
    "length": datasets.Value("int32"),
    "visual": datasets.Value("int32"),
    "is_cut": datasets.Value("bool"),
    "is_answer_cut": datasets.Value("bool"),
}


class ConversationDataset(Dataset[dict[str, Any]]):
    """Conversations as token ids, labels and pixel values.

    The constructor reads, checks and tokenises every row (format, roles, placeholders, images, length) in parallel, and
    caches the result on disk. Training then only opens images, so a faulty row is reported before the first step.

    Args:
        config: the recipe's data section.
        processor: the family's; the current date in its chat template is replaced by a fixed one.

    Attributes:
        lengths: tokens of each sample, visual tokens included.
        visual_tokens: of all samples, markers around images included.
        has_image: whether each sample has an image.
        source: number of each sample's source in `config.sources`.
        source_rows: samples of each source.
        num_cut: samples that lost turns at their end, or the end of their answer, to `config.max_length`.
        skipped: the faulty rows that were left out, at most `config.max_bad_rows`.
        encoder: turns records into samples.

    Raises:
        DataError: more rows have faults than the recipe allows (the message lists the first), or no row is left.
        TokenizerError: the tokenizer cannot label conversations.
    """

    def __init__(self, config: DataConfig, processor: Any) -> None:
        self.config, self.processor = config, processor
        self.encoder = Encoder.of(config, processor)
        rows, unusable = _without_faults(check_rows(config), config)
        rows, self.skipped = _without_faults(_tokenise_rows(rows, self.encoder, config), config, unusable)
        self._set_rows(rows)
        self._check_weights()

    def _set_rows(self, rows: datasets.Dataset) -> None:
        self.rows = rows
        self.lengths: list[int] = rows["length"][:]
        self.visual_tokens: int = sum(rows["visual"][:])
        self.has_image: list[bool] = [bool(names) for names in rows["images"][:]]
        self.source: list[int] = rows["source"][:]
        self.source_rows = [self.source.count(number) for number in range(len(self.config.sources))]
        self.num_cut: int = sum(rows["is_cut"][:]) + sum(rows["is_answer_cut"][:])

    def _check_weights(self) -> None:
        """Raises DataError if a source with a weight has no row, or a share of less than one sample of an epoch."""
        weights = [source.weight or 0.0 for source in self.config.sources]
        for source, weight, rows in zip(self.config.sources, weights, self.source_rows, strict=True):
            if weight and not rows:
                raise DataError(
                    f"{source.path}: got weight {weight:g} and no row without a fault, expected one or more"
                )
            if weight and weight * len(self) < sum(weights) * (1 - 1e-9):
                raise DataError(
                    f"{source.path}: got weight {weight:g} of {sum(weights):g}, less than one of the {len(self):,} "
                    "samples of an epoch, expected a greater weight, or no such source"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns input_ids (S,), labels (S,), source and the image processor's outputs, if the row has images.

        If an image has changed since the check, or is damaged inside, returns the sample of a later row, with the
        skipped rows as `faults`; the trainer decides whether that is allowed.

        Raises:
            DataError: no row has images that can be opened.
        """
        faults: list[Fault] = []
        for place in range(len(self)):
            row = self.rows[(int(index) + place) % len(self)]
            try:
                sample = self._sample(row)
            except RowError as error:
                faults.append(Fault(row["file"], row["row"], str(error)))
                continue
            return {**sample, "faults": faults} if faults else sample
        raise DataError(f"{faults[0]}; and no other row can be opened")

    def split(self, ratio: float, *, seed: int) -> tuple[ConversationDataset, ConversationDataset]:
        """Splits off about `ratio` of the samples at random; returns the rest and these, without a common image.

        Rows that share an image, directly or through other rows, stay together. A source with a weight keeps a row.

        Raises:
            DataError: one of them would be empty.
        """
        members = connected_rows(self.rows, self.config)
        wanted, taken = max(1, round(ratio * len(self))), set[int]()
        left, is_weighted = Counter(self.source), self.config.sources[0].weight is not None
        for place in torch.randperm(len(members), generator=Generator().manual_seed(seed)).tolist():
            if len(taken) >= wanted:
                break
            moved = Counter(self.source[row] for row in members[place])
            if is_weighted and any(count == left[number] for number, count in moved.items()):
                continue
            taken.update(members[place])
            left -= moved
        parts = [[n for n in range(len(self)) if (n in taken) == is_taken] for is_taken in (False, True)]
        if not all(parts):
            raise DataError(
                f"got {len(members)} groups of samples without a common image to hold {ratio:g} of the samples out, "
                "expected more"
            )
        rest, held_out = copy.copy(self), copy.copy(self)
        rest._set_rows(self.rows.select(parts[0]))
        rest._check_weights()
        held_out._set_rows(self.rows.select(parts[1]))
        return rest, held_out

    def epoch(self, generator: Generator) -> list[int]:
        """Returns the sample indices of one epoch: each once, or drawn from the sources by their weights."""
        return draw_epoch(self.source, [source.weight for source in self.config.sources], generator)

    def _sample(self, row: dict[str, Any]) -> dict[str, Any]:
        folder = folder_of(self.config.sources[row["source"]], row["file"])
        images = open_images(images_of(row), folder, self.config)
        sample = self.encoder.expand(row["ids"], row["labels"], images)
        if (found := len(sample["input_ids"])) != row["length"]:
            raise RowError(f"got {found} tokens, expected {row['length']}: an image has changed since it was checked")
        return {**sample, "source": row["source"]}


def open_images(images: Sequence[str | EmbeddedImage], folder: Any, config: DataConfig) -> list[Image.Image]:
    """Returns the images of one row, in RGB.

    Raises:
        RowError: an image cannot be opened.
    """
    return [open_image(folder, image, image_options(config)) for image in images]


@dataclass(frozen=True)
class Sample:
    """A record as tokens.

    Attributes:
        images: its image paths.
        ids: token ids, one image token an image.
        labels: ids where supervised, IGNORE_INDEX elsewhere.
        length: number of tokens after image tokens are expanded.
        visual: how many of these belong to images.
        is_cut: turns at its end were dropped.
        is_answer_cut: its first answer is cut at `max_length`.
    """

    images: tuple[str | EmbeddedImage, ...]
    ids: list[int]
    labels: list[int]
    length: int
    visual: int = 0
    is_cut: bool = False
    is_answer_cut: bool = False


@dataclass(frozen=True)
class Encoder:
    """Turns records into token ids and labels of at most `max_length` tokens.

    Attributes:
        chats: the format of each source.
        vision: turns images into tokens and inputs.
        max_length: maximum tokens of a sample, visual tokens included.
        cuts_answers: cuts a first answer that is too long at `max_length`; otherwise it is a fault.
    """

    chats: tuple[ChatFormat, ...]
    vision: VisionProcessor
    max_length: int
    cuts_answers: bool = False

    @classmethod
    def of(cls, config: DataConfig, processor: Any) -> Encoder:
        """Returns the encoder of a recipe's data section; raises TokenizerError if the processor cannot be used."""
        freeze_templates(processor)
        try:
            vision = VisionProcessor(processor, aspect=config.image_aspect)
        except ProcessorError as error:
            raise TokenizerError(str(error)) from None
        formats = {
            name: ChatFormat(name, vision.tokenizer, vision.text)
            for name in dict.fromkeys(source.format or config.format for source in config.sources)
        }
        chats = tuple(formats[source.format or config.format] for source in config.sources)
        return cls(chats, vision, config.max_length, config.long_answers == "cut")

    @property
    def stop_ids(self) -> list[int]:
        """The tokens at which generation has to stop: those that end an answer in training."""
        return list(dict.fromkeys(token for chat in self.chats for token in chat.stop_ids))

    def encode(self, record: Record, sizes: Sequence[tuple[int, int]], source: int = 0) -> Sample:
        """Returns the record's sample, cut after the last answer that fits, without later images.

        Args:
            record: the record.
            sizes: width and height of each of its images, as `data.images.inspect_image` has them.
            source: number of its source.

        Raises:
            RowError: no label is left, or the processor rejects an image of this size.
        """
        chat = self.chats[source]
        ids, labels = chat.encode(record.turns, record.system)
        marks = ids.count(chat.image_token_id)
        if marks != len(record.images):
            raise RowError(
                f"got {marks} image tokens after tokenisation, expected {len(record.images)}, one for each image"
            )
        return self._truncate(ids, labels, record.images, sizes, chat.image_token_id)

    def _truncate(
        self,
        ids: list[int],
        labels: list[int],
        images: tuple[str | EmbeddedImage, ...],
        sizes: Sequence[tuple[int, int]],
        image_token: int,
    ) -> Sample:
        """Returns the part of a tokenised record that fits into `max_length`, with its images."""
        stays, kept = len(images) + 1, len(ids)
        while stays != (stays := ids[:kept].count(image_token)):  # fewer images may take more tokens each
            counts = [*self.vision.counts(sizes[:stays]), *[self.max_length + 1] * (len(sizes) - stays)]
            lengths: Sequence[int] = range(1, len(ids) + 1)
            if counts:
                places = iter(counts)
                lengths = list(accumulate(next(places) if token == image_token else 1 for token in ids))
            kept, is_answer_cut = self._kept_length(labels, lengths)
        is_cut = kept < len(ids) and not is_answer_cut
        visual = sum(counts[:stays])
        return Sample(images[:stays], ids[:kept], labels[:kept], lengths[kept - 1], visual, is_cut, is_answer_cut)

    def expand(self, ids: Sequence[int], labels: Sequence[int], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Returns input_ids (S,), labels (S,) and the model's other inputs.

        Each image token is expanded to the processor's tokens for its image, which carry no label.
        """
        encoded = self.vision.encode(images) if images else EncodedImages([], {})
        spans, tokens, targets = iter(encoded.spans), list[int](), list[int]()
        for token, label in zip(ids, labels, strict=True):
            span = next(spans) if token == self.vision.image_token_id else [token]
            tokens += span
            targets += [label] if token != self.vision.image_token_id else [IGNORE_INDEX] * len(span)
        input_ids = torch.tensor(tokens, dtype=torch.int64)
        return {
            "input_ids": input_ids,
            "labels": torch.tensor(targets, dtype=torch.int64),
            **self.vision.type_ids(input_ids),
            **encoded.inputs,
        }

    def may_be_long(self, rendered: Rendered, sizes: Sequence[tuple[int, int]]) -> bool:
        """Returns False only if the first answer certainly fits into `max_length`; a bound, without tokenising.

        A token covers at least one byte; normalisation may turn a byte that is not ASCII into three.
        """
        text = rendered.text[: rendered.answers[0][1]]
        most = len(text) if text.isascii() else 3 * len(text.encode())
        return most + _EXTRA_TOKENS + sum(self.vision.counts(sizes)) > self.max_length

    def _kept_length(self, labels: Sequence[int], lengths: Sequence[int]) -> tuple[int, bool]:
        """Returns how many ids to keep: all, or up to the end of an answer; and whether that answer itself is cut."""
        if labels.count(IGNORE_INDEX) == len(labels):
            raise RowError("no label is left: got no token for the answers, expected at least one")
        if lengths[-1] <= self.max_length:
            return len(labels), False
        following = [*labels[1:], IGNORE_INDEX]
        ends = [
            place + 1
            for place, (label, after) in enumerate(zip(labels, following, strict=True))
            if label != IGNORE_INDEX and after == IGNORE_INDEX
        ]
        fitting = [end for end in ends if lengths[end - 1] <= self.max_length]
        if fitting:
            return fitting[-1], False
        kept = sum(length <= self.max_length for length in lengths)
        if self.cuts_answers and any(label != IGNORE_INDEX for label in labels[:kept]):
            return kept, True
        hint = "" if self.cuts_answers else " (data.long_answers: cut ends it there)"
        raise RowError(
            f"no label is left: the first answer ends after {lengths[ends[0] - 1]} tokens, expected up to "
            f"{self.max_length}{hint}"
        )


class Collator:
    """Pads to the batch's longest sample, on the right.

    Image inputs of all families are joined by one rule: concatenated along the first axis, with every other axis padded
    to the batch's largest. A sample without an image adds nothing.

    Patch indices (Molmo2's `image_token_pooling`) are shifted to count over the batch.

    Args:
        pad_token_id: the tokenizer's, or None; padding is masked, so its id does not matter.
    """

    def __init__(self, pad_token_id: int | None) -> None:
        self.pad_token_id = pad_token_id or 0

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns input_ids, attention_mask, labels (B, S), token type ids (B, S), and the inputs of all images.

        A batch without images has no image inputs: the model then encodes a blank image. If samples have them, the
        trainer also gets `sources` (B,), the number of each sample's source, and `faults`, the skipped rows.
        """
        values = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, **dict.fromkeys(TYPE_IDS, 0)}
        texts = {name: value for name, value in values.items() if name in samples[0]}
        batch: dict[str, Any] = {
            name: pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)
            for name, value in texts.items()
        }
        ones = [torch.ones_like(sample["input_ids"]) for sample in samples]
        batch["attention_mask"] = pad_sequence(ones, batch_first=True)
        names = dict.fromkeys(name for sample in samples for name in sample)
        for name in (name for name in names if name not in values and name not in _TRAINER_KEYS):
            batch[name] = pad_and_concat([sample[name] for sample in samples if name in sample])
        if _POOLING in batch:
            batch[_POOLING] = _shift_pooling([sample for sample in samples if _POOLING in sample])
        if all("source" in sample for sample in samples):
            batch["sources"] = torch.tensor([sample["source"] for sample in samples])
        faults = [fault for sample in samples for fault in sample.get("faults", ())]
        if faults:
            batch["faults"] = faults
        return batch


def pad_and_concat(tensors: Sequence[Tensor]) -> Tensor:
    """Returns tensors concatenated along their first axis, every other axis padded with 0 to the largest."""
    sizes = [max(axis) for axis in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - axis for size, axis in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(pad(tensor, [side for axis in reversed(missing) for side in (0, axis)]))
    return torch.cat(padded)


def _shift_pooling(samples: Sequence[Mapping[str, Any]]) -> Tensor:
    """Returns Molmo2's `image_token_pooling` of a batch: the patches of each token, numbered over the batch."""
    before = accumulate((sample["pixel_values"].shape[:2].numel() for sample in samples), initial=0)
    numbers = [sample[_POOLING] for sample in samples]
    return pad_and_concat(
        [torch.where(one >= 0, one + shift, one) for one, shift in zip(numbers, before, strict=False)]
    )


def draw_epoch(source: Sequence[int], weights: Sequence[float | None], generator: Generator) -> list[int]:
    """Returns the sample indices of one epoch, which has as many samples as the set.

    Args:
        source: number of each sample's source.
        weights: each source's share of the epoch, relative to the others; its rows are repeated or left out to reach
            it, different ones in each epoch. None everywhere: each sample is drawn once.
        generator: source of randomness.
    """
    if not weights or weights[0] is None:
        return list(range(len(source)))
    members: dict[int, list[int]] = {}
    for index, number in enumerate(source):
        members.setdefault(number, []).append(index)
    total = sum(weights[number] or 0.0 for number in members)
    bounds = list(accumulate((weights[number] or 0.0) / total * len(source) for number in members))
    drawn: list[int] = []
    for rows, bound in zip(members.values(), bounds, strict=True):
        count = round(bound) - len(drawn)
        while count > 0:
            part = torch.randperm(len(rows), generator=generator)[:count].tolist()
            drawn += [rows[place] for place in part]
            count -= len(part)
    return drawn


class LengthModalitySampler(Sampler[int]):
    """Yields the samples of an epoch so that each run of `batch_size` is of one modality and of similar length.

    The order depends only on the seed and the epoch: it is the same on every rank, and a resumed run skips to its
    position. Left-over samples of both modalities come at the end.

    Args:
        lengths: tokens of each sample.
        has_image: whether each sample has an image.
        batch_size: samples of one optimizer step over all ranks.
        seed: seed of the order.
        data: its `epoch` chooses the samples; None takes each once.

    Source: LLaVA's group_by_modality_length; there the left-overs of both modalities share a batch too.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        has_image: Sequence[bool],
        *,
        batch_size: int,
        seed: int,
        data: ConversationDataset | None = None,
    ) -> None:
        self.lengths, self.has_image, self.data = lengths, has_image, data
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yields the indices of this epoch."""
        random = Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        chosen = range(len(self)) if self.data is None else self.data.epoch(random)
        whole: list[list[int]] = []
        rest: list[int] = []
        for modality in (True, False):
            members = [index for index in chosen if bool(self.has_image[index]) is modality]
            batches = self._batches([members[place] for place in torch.randperm(len(members), generator=random)])
            whole += [batch for batch in batches if len(batch) == self.batch_size]
            rest += [index for batch in batches if len(batch) < self.batch_size for index in batch]
        for place in torch.randperm(len(whole), generator=random).tolist():
            yield from whole[place]
        yield from rest

    def _batches(self, members: list[int]) -> list[list[int]]:
        pool = self.batch_size * _POOL
        ordered: list[int] = []
        for start in range(0, len(members), pool):
            ordered += sorted(members[start : start + pool], key=lambda index: -self.lengths[index])
        return [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]


def _tokenise_rows(rows: datasets.Dataset, encoder: Encoder, config: DataConfig) -> datasets.Dataset:
    tokenizer, sizes = encoder.chats[0].tokenizer, rows["sizes"][:]
    with usable_cache():
        return rows.map(
            _tokenise,
            batched=True,
            fn_kwargs={"encoder": encoder},
            num_proc=processes(config, rows),
            desc="tokenising rows",
            new_fingerprint=fingerprint(
                "tokens",
                code_stamp("rows", "keys", "chat"),
                source_stamp(Encoder, Sample, _tokenise, _tokens_of),
                rows._fingerprint,  # of the rows without a fault
                [source.format for source in config.sources],
                encoder.max_length,
                *((encoder.vision.settings(), sizes) if any(map(len, sizes)) else ()),
                encoder.vision.text,
                encoder.cuts_answers,
                tokenizer.chat_template,
                tokenizer.special_tokens_map,
                tokenizer.backend_tokenizer.to_str(),
            ),
            features=datasets.Features(_TOKENS),
            remove_columns=[name for name in rows.column_names if name not in _TOKENS],
        )


def _tokenise(batch: dict[str, list[Any]], encoder: Encoder) -> dict[str, list[Any]]:
    samples = [_tokens_of(row, encoder) for row in rows_of(batch)]
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def _tokens_of(row: dict[str, Any], encoder: Encoder) -> dict[str, Any]:
    try:
        return {"fault": "", **vars(encoder.encode(record_of(row), sizes_of(row), row["source"]))}
    except RowError as error:
        return {"fault": str(error), **vars(Sample((), [], [], 0))}


def _without_faults(
    rows: datasets.Dataset, config: DataConfig, before: Sequence[Fault] = ()
) -> tuple[datasets.Dataset, list[Fault]]:
    """Returns the rows without a fault, and `before` with the faults of the others; DataError if they are too many."""
    faults = [*before, *faults_of(rows)]
    if len(faults) > config.max_bad_rows:
        lines = group_faults(faults)
        more = f"; and {len(lines) - SHOWN_FAULTS} more kinds" if len(lines) > SHOWN_FAULTS else ""
        raise DataError(
            f"data: got {len(faults)} rows with faults, expected up to {config.max_bad_rows} (data.max_bad_rows): "
            f"{'; '.join(lines[:SHOWN_FAULTS])}{more}; `python -m data.check RECIPE --all` lists each"
        )
    good = rows.select(good_rows(rows))
    if len(good) == 0:
        raise DataError(f"{', '.join(source.path for source in config.sources)}: got no rows without a fault")
    return good, faults
