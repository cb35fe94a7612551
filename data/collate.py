"""Samples of different lengths and modalities as one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.chat import IGNORE_INDEX


class Collator:
    """Pads to the batch's longest sample, on the right.

    Args:
        pad_token_id: the tokenizer's; padding is masked, its id is never looked at.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns input_ids, attention_mask, labels (B, S) and pixel_values (images, 3, height, width).

        `pixel_values` is absent from a batch without an image: the model passes a dummy then.
        """
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=IGNORE_INDEX),
        }
        images = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
        if images:
            batch["pixel_values"] = torch.cat(images)
        return batch
