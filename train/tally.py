"""Sums of a run: samples, tokens, and the loss of batches with and without images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from data.chat import IGNORE_INDEX


class Tally:
    """Adds up what one rank saw since the last report, and reports for all ranks together."""

    def __init__(self, *, samples: int = 0, tokens: int = 0) -> None:
        self.samples, self.tokens = samples, tokens  # of the whole run, all ranks
        self._sums: Tensor | None = None

    def add(self, batch: Mapping[str, Tensor], loss: Tensor, *, items: Tensor | int) -> None:
        """Adds one forward pass.

        Args:
            batch: input_ids (B, S), attention_mask (B, S), labels (B, S), pixel_values where it has images.
            loss: this pass' part of the mean loss of the global batch.
            items: labelled tokens of the global batch.
        """
        labelled = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        summed = loss.detach().float() * items
        zero = torch.zeros_like(summed)
        of_kind = [summed, labelled, zero, zero] if "pixel_values" in batch else [zero, zero, summed, labelled]
        tokens = batch["attention_mask"].sum()
        row = torch.stack([value.double() for value in (zero + len(batch["labels"]), tokens, *of_kind)])
        self._sums = row if self._sums is None else self._sums + row

    def totals(self) -> tuple[int, int]:
        """Returns samples and tokens of the whole run, all ranks; every rank must call it."""
        sums = self._shared_sums()
        return self.samples + int(sums[0]), self.tokens + int(sums[1])

    def report(self) -> dict[str, float]:
        """Returns the sums over all ranks since the last report and starts anew; every rank must call it.

        Returns:
            samples and tokens of the whole run; new_tokens since the last report; loss_image and loss_text, each
            the mean over labelled tokens, where there were any.
        """
        samples, tokens, image, image_labels, text, text_labels = self._shared_sums()
        self._sums = None
        self.samples += int(samples)
        self.tokens += int(tokens)
        report: dict[str, float] = {"samples": self.samples, "tokens": self.tokens, "new_tokens": int(tokens)}
        if image_labels:
            report["loss_image"] = image / image_labels
        if text_labels:
            report["loss_text"] = text / text_labels
        return report

    def _shared_sums(self) -> list[float]:
        if self._sums is None:
            return [0.0] * 6
        sums = self._sums.clone()
        if distributed.is_initialized():
            distributed.all_reduce(sums)
        return sums.tolist()
