"""The samples of a phase, and the order in which it sees them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from data.chat import TokenizerError
from data.dataset import ConversationDataset, LengthModalitySampler
from data.processor import ProcessorError, with_settings
from data.rows import DataError
from data.sources import find_files
from data.stream import ConversationStream
from data.token_batches import TokenBatches
from recipes.schema import Phase, RecipeError
from train import distributed
from train.arguments import passes_per_step, split_batch
from train.order import EpochSampler, ShuffledSampler, WholeBatches
from train.validation import Validation

Samples = ConversationDataset | ConversationStream


def read_samples(phase: Phase, processor: Any, *, seed: int = 0) -> Samples:
    """Returns the phase's samples, every row of them checked, or this rank's endless stream of them.

    Raises:
        RecipeError: a file is missing or wrong, or more rows have faults than the recipe allows.
    """
    try:
        processor = with_settings(processor, phase.data)
        if phase.data.streaming:
            ranks = distributed.count()
            batch, _ = split_batch(phase.train, ranks)
            return ConversationStream(
                phase.data, processor, seed=seed, batch=batch, rank=distributed.rank(), ranks=ranks
            )
        return ConversationDataset(phase.data, processor)
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


def sample_notes(phase: Phase, samples: Samples) -> list[str]:
    """Returns what is worth saying about the samples: skipped rows, another number than the recipe expects."""
    if isinstance(samples, ConversationStream):
        return [f"{phase.name}: rows are read while training; faults are counted as they come"]
    notes, expected = [], phase.data.expected_rows
    found = len(samples) + len(samples.skipped)
    if expected is not None and expected != found:
        notes.append(f"{phase.name}: got {found:,} rows, the recipe expects {expected:,}")
    if len(samples.source_rows) > 1:
        counts = zip(phase.data.names, samples.source_rows, strict=True)
        notes.append(f"{phase.name}: rows of each source: {', '.join(f'{name} {count:,}' for name, count in counts)}")
    if samples.skipped:
        notes.append(f"{phase.name}: {len(samples.skipped)} rows skipped; final/run.json lists them")
    return notes


def data_fingerprint(phase: Phase, samples: Samples, validation: Validation | None) -> str:
    """Returns a digest of the phase's data: its sources, the content of their files, each sample's length and modality.

    Of held-out samples the last two count.

    Images are not read: one that was replaced by another of the same place is not noticed. Of a stream, whose files
    may be anywhere, the names are all that counts.
    """
    digest = hashlib.sha256()
    for source in phase.data.sources:
        digest.update(repr((source.weight, source.limit, source.format)).encode())
        for name in [source.path] if phase.data.streaming else find_files(source.path):
            if Path(name).is_file() and not phase.data.streaming:
                with Path(name).open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                digest.update(name.encode())
    for part in (samples, validation and validation.samples):
        if isinstance(part, ConversationDataset):
            digest.update(repr((list(part.lengths), list(map(bool, part.has_image)))).encode())
    return digest.hexdigest()


def sample_order(phase: Phase, samples: Samples, *, seed: int) -> WholeBatches | TokenBatches | None:
    """Returns the order of the samples: by modality and length where the recipe says so, else shuffled.

    With `train.tokens_per_step` it gives the samples of each forward pass.

    None for a stream, which has an order already.
    """
    if isinstance(samples, ConversationStream):
        return None
    batch = phase.train.global_batch
    order: EpochSampler = ShuffledSampler(len(samples), seed=seed, data=samples)
    if phase.train.tokens_per_step is not None:
        passes = passes_per_step(phase.train, distributed.count())
        return TokenBatches(order, samples.lengths, tokens_per_step=phase.train.tokens_per_step, passes=passes)
    if phase.data.group_by_length:
        order = LengthModalitySampler(samples.lengths, samples.has_image, batch_size=batch, seed=seed, data=samples)
    return WholeBatches(order, global_batch=batch)
