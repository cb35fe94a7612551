"""Counts and positions of a training batch, read on the CPU so that forward and loss need no device synchronisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # as torch.nn.functional.cross_entropy


@dataclass(frozen=True, eq=False)
class BatchFacts:
    """Token counts and label positions of a padded batch (B, S), read while it is on the CPU.

    Attributes:
        lengths: tokens of each sample, without padding.
        visual: visual tokens among them.
        queries: instruction tokens of each sample, at least 1: see `instruction_ends`; None: others.
        labelled: (N,) int64, the flat places (sample * S + place) whose next token is labelled, ascending.
        after_visual: number of the first sample with a label directly after a visual token; None: there is none.
    """

    lengths: tuple[int, ...]
    visual: tuple[int, ...]
    queries: tuple[int, ...] | None
    labelled: Tensor
    after_visual: int | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any], image_token: int) -> BatchFacts:
        """Returns the facts of a collated batch on the CPU.

        Args:
            batch: input_ids, attention_mask and labels (B, S); pixel_values where it has images.
            image_token: id of the visual tokens.
        """
        valid, labels = batch["attention_mask"].bool(), batch["labels"]
        visual = (batch["input_ids"] == image_token) & valid
        if "pixel_values" not in batch:
            visual = torch.zeros_like(visual)
        labelled = next_labels(labels) != IGNORE_INDEX
        queries = (instruction_ends(labels) & valid & ~visual).sum(dim=1).clamp(min=1)
        wrong = (labelled & visual).any(dim=1).nonzero().flatten().tolist()
        return cls(
            lengths=tuple(valid.sum(dim=1).tolist()),
            visual=tuple(visual.sum(dim=1).tolist()),
            queries=tuple(queries.tolist()),
            labelled=labelled.flatten().nonzero().flatten(),
            after_visual=wrong[0] if wrong else None,
        )

    def pin_memory(self) -> BatchFacts:
        """Returns the facts with pinned tensors, as a DataLoader asks for."""
        return replace(self, labelled=self.labelled.pin_memory())


def next_labels(labels: Tensor) -> Tensor:
    """Returns (B, S), the label that each position predicts: the next token's, IGNORE_INDEX at the last one."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def instruction_ends(labels: Tensor) -> Tensor:
    """Returns (B, S) bool: the tokens directly before a supervised span."""
    return (next_labels(labels) != IGNORE_INDEX) & (labels == IGNORE_INDEX)


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Returns integers as an int64 tensor on the device, without synchronising."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
