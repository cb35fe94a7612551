"""The samples of a phase, the order in which it sees them, and the batches that they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from data.chat import TokenizerError
from data.dataset import Collator, ConversationDataset, LengthModalitySampler
from data.processor import ProcessorError, apply_settings
from data.rows import DataError
from data.sources import find_files
from data.stream import ConversationStream
from data.token_batches import TokenBatches
from models.batch_facts import BatchFacts
from recipes.schema import Phase, RecipeError
from train import distributed
from train.arguments import passes_per_step, split_batch
from train.checkpoints import digest_of
from train.validation import Validation

Samples = ConversationDataset | ConversationStream


def read_samples(phase: Phase, processor: Any, *, seed: int = 0) -> Samples:
    """Returns the phase's samples, every row of them checked, or this rank's endless stream of them.

    Raises:
        RecipeError: a file is missing or wrong, or more rows have faults than the recipe allows.
    """
    try:
        processor = apply_settings(processor, phase.data)
        if not phase.data.streaming:
            return ConversationDataset(phase.data, processor)
        rank, ranks = distributed.rank(), distributed.world_size()
        batch, _ = split_batch(phase.train, ranks)
        return ConversationStream(phase.data, processor, seed=seed, batch=batch, rank=rank, ranks=ranks)
    except (DataError, TokenizerError, ProcessorError) as error:
        raise RecipeError(f"{phase.name}: {error}") from error


def hold_out(phase: Phase, samples: Samples, *, seed: int) -> tuple[Samples, Validation | None]:
    """Returns the samples to train on, and the phase's validation, or None where it has none.

    Raises:
        RecipeError: the held-out files are wrong, or no sample is left on one side.
    """
    section = phase.eval
    if section is None:
        return samples, None
    try:
        if section.files is not None:
            config = phase.data.model_copy(update={"files": section.files, "streaming": False})
            held_out = ConversationDataset(config, samples.processor)
            if section.share is not None:
                _, held_out = held_out.split(section.share, seed=seed)
        elif isinstance(samples, ConversationDataset) and section.share is not None:
            samples, held_out = samples.split(section.share, seed=seed)
        return samples, Validation(section, held_out)
    except (DataError, TokenizerError) as error:
        raise RecipeError(f"{phase.name}: eval: {error}") from error


def sample_notes(phase: Phase, samples: Samples) -> Iterator[str]:
    """Yields what is worth saying about the samples: skipped rows, another number than the recipe expects."""
    if isinstance(samples, ConversationStream):
        yield f"{phase.name}: rows are read while training; faults are counted as they come"
        return
    expected, found = phase.data.expected_rows, len(samples) + len(samples.skipped)
    if expected is not None and expected != found:
        yield f"{phase.name}: got {found:,} rows, the recipe expects {expected:,}"
    if len(samples.source_rows) > 1:
        counts = zip(phase.data.names, samples.source_rows, strict=True)
        yield f"{phase.name}: rows of each source: {', '.join(f'{name} {count:,}' for name, count in counts)}"
    if samples.skipped:
        yield f"{phase.name}: {len(samples.skipped)} rows skipped; final/run.json lists them"


def data_fingerprint(phase: Phase, samples: Samples, validation: Validation | None) -> str:
    """Returns a digest of the phase's data: its sources, the content of their files, each sample's length and modality.

    Held-out samples count too. Images are not read: one that was replaced by another of the same place is not noticed.
    Of a stream, whose files may be anywhere, the names are all that counts.
    """
    digest = hashlib.sha256()
    configs = [phase.data]
    if validation is not None and validation.section.files is not None:
        configs.append(validation.samples.config)
    for config in configs:
        for source in config.sources:
            digest.update(repr((source.weight, source.limit, source.format)).encode())
            for name in [source.path] if config.streaming else find_files(source.path):
                if Path(name).is_file() and not config.streaming:
                    with Path(name).open("rb") as stream:
                        digest.update(hashlib.file_digest(stream, "sha256").digest())
                else:
                    digest.update(name.encode())
    for part in (samples, validation and validation.samples):
        if isinstance(part, ConversationDataset):
            digest.update(repr((list(part.lengths), list(map(bool, part.has_image)))).encode())
    return digest.hexdigest()


def processor_fingerprint(processor: Any) -> str:
    """Returns a digest of what turns rows into tokens and pixels: tokenizer, chat template and image processor."""
    tokenizer, images = processor.tokenizer, processor.image_processor.to_dict()
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {
        # how the last call padded and cut is a state of the tokenizer, not a setting
        "tokenizer": {name: value for name, value in text.items() if name not in ("truncation", "padding")},
        "special": tokenizer.special_tokens_map,
        "template": processor.chat_template or tokenizer.chat_template,
        "images": {name: value for name, value in images.items() if value is not None},
    }
    return digest_of(parts)


class ShuffledSampler(Sampler[int]):
    """A new random order of the samples of each epoch, from the seed alone."""

    def __init__(self, size: int, *, seed: int, data: ConversationDataset | None = None) -> None:
        self._size, self._seed, self._epoch, self._data = size, seed, 0, data

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        chosen = range(self._size) if self._data is None else self._data.epoch(generator)
        return iter([chosen[place] for place in torch.randperm(len(chosen), generator=generator)])


class WholeBatches(Sampler[int]):
    """An order whose last global batch is filled up with samples from the beginning of the same epoch.

    Ranks take their forward passes from it in turns, so every optimizer step has the same samples, and each forward
    pass the same ones, whatever the number of ranks; a short last batch would be shared out differently.
    """

    def __init__(self, order: ShuffledSampler | LengthModalitySampler, *, global_batch: int) -> None:
        if len(order) == 0:
            raise ValueError("order: got no sample, expected at least one")
        self._order, self._global_batch = order, global_batch
        self.steps = -(-len(order) // global_batch)
        self.set_epoch = order.set_epoch

    def __len__(self) -> int:
        return self.steps * self._global_batch

    def __iter__(self) -> Iterator[int]:
        samples = list(self._order)
        return iter([samples[index % len(samples)] for index in range(len(self))])


def sample_order(phase: Phase, samples: Samples, *, seed: int, ranks: int) -> WholeBatches | TokenBatches | None:
    """Returns the order of the samples: by modality and length where the recipe says so, else shuffled.

    With `train.tokens_per_step` it gives the samples of each forward pass. None for a stream, which has an order.
    """
    if isinstance(samples, ConversationStream):
        return None
    shuffled = ShuffledSampler(len(samples), seed=seed, data=samples)
    batch, tokens = phase.train.global_batch, phase.train.tokens_per_step
    if tokens is not None:
        passes = passes_per_step(phase.train, ranks)
        return TokenBatches(shuffled, samples.lengths, tokens_per_step=tokens, passes=passes)
    if not phase.data.group_by_length:
        return WholeBatches(shuffled, global_batch=batch)
    order = LengthModalitySampler(samples.lengths, samples.has_image, batch_size=batch, seed=seed, data=samples)
    return WholeBatches(order, global_batch=batch)


def collate(
    samples: Sequence[Mapping[str, Any]], *, collator: Collator, image_token: int, packed: bool
) -> dict[str, Any]:
    """Returns samples as the collator pads them, with the `facts` that the model has to know before they are sent.

    `packed`: the model packs the batch, and computes nothing on its padding.
    """
    batch = collator(samples)
    facts = BatchFacts.of(batch, image_token)
    return {**batch, **({"packed": True} if packed else {}), "facts": facts}
