"""The samples of a phase, and the order in which it sees them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import LlavaProcessor

from data.chat import TokenizerError
from data.dataset import ConversationDataset
from data.records import DataError
from data.sampler import LengthModalitySampler
from recipes.schema import Phase, RecipeError
from train.order import EpochSampler, ShuffledSampler, WholeBatches


def read_samples(phase: Phase, processor: LlavaProcessor) -> ConversationDataset:
    """Returns the phase's samples, every row of them checked.

    Raises:
        RecipeError: a file is missing or wrong, or more rows have faults than the recipe allows.
    """
    try:
        return ConversationDataset(phase.data, processor)
    except (DataError, TokenizerError) as error:
        raise RecipeError(f"{phase.name}: {error}") from error


def sample_notes(phase: Phase, samples: ConversationDataset) -> list[str]:
    """Returns what is worth saying about the samples: skipped rows, another number than the recipe expects."""
    notes, expected = [], phase.data.expected_rows
    found = len(samples) + len(samples.skipped)
    if expected is not None and expected != found:
        notes.append(f"{phase.name}: got {found:,} rows, the recipe expects {expected:,}")
    if samples.skipped:
        notes.append(f"{phase.name}: {len(samples.skipped)} rows skipped; final/run.json lists them")
    return notes


def data_fingerprint(phase: Phase, samples: ConversationDataset) -> str:
    """Returns a digest of the phase's data: the content of its files, and each sample's length and modality.

    Images are not read: one that was replaced by another of the same place is not noticed.
    """
    digest = hashlib.sha256()
    for name in phase.data.files:
        file = Path(name)
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            digest.update(name.encode())
    digest.update(repr((list(samples.lengths), list(map(bool, samples.has_image)))).encode())
    return digest.hexdigest()


def sample_order(phase: Phase, samples: ConversationDataset, *, seed: int) -> WholeBatches:
    """Returns the order of the samples: by modality and length where the recipe says so, else shuffled."""
    batch = phase.train.global_batch
    order: EpochSampler = ShuffledSampler(len(samples), seed=seed)
    if phase.data.group_by_length:
        order = LengthModalitySampler(samples.lengths, samples.has_image, batch_size=batch, seed=seed)
    return WholeBatches(order, global_batch=batch)
