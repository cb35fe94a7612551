"""The batches of a training: padded by the data's collator, with what the model has to know before they are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.dataset import Collator
from models.batch_facts import BatchFacts


class TrainCollator:
    """Pads samples as Collator does, and adds `facts`: see BatchFacts.

    Args:
        pad_token_id: the tokenizer's, or None.
        image_token: id of the visual tokens.
        packed: the model packs each batch, and computes nothing on its padding.
    """

    def __init__(self, pad_token_id: int | None, image_token: int, *, packed: bool = False) -> None:
        self._collate, self._image_token = Collator(pad_token_id), image_token
        self._more = {"packed": True} if packed else {}

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the batch."""
        batch = self._collate(samples)
        return {**batch, **self._more, "facts": BatchFacts.of(batch, self._image_token)}
