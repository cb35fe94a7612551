"""Sums of a run: samples, tokens, and the losses since the last log line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from data.chat import IGNORE_INDEX

_SUMS: Final = (
    "samples",
    "tokens",
    "loss",
    "image_loss",
    "image_labels",
    "text_loss",
    "text_labels",
    "visual",
    "spread",
    "spread_samples",
)


class TrainMetrics:
    """Adds up what the run saw, step by step; every rank holds the same sums.

    Args:
        image_token: the visual tokens' id.
        flops: model FLOPs of training on these sums of samples, visual tokens, tokens and labels; None does not say.
        peak: FLOP/s of all GPUs at most; None where it is not known.

    Attributes:
        samples, tokens, visual: samples, tokens, and visual tokens among these, of the whole run, all ranks.
    """

    def __init__(
        self,
        *,
        samples: int = 0,
        tokens: int = 0,
        visual: int = 0,
        window: Mapping[str, Any] | None = None,
        image_token: int | None = None,
        flops: Callable[[Mapping[str, float]], float] | None = None,
        peak: float | None = None,
    ) -> None:
        self.samples, self.tokens, self.visual = samples, tokens, visual
        self._image_token, self._flops, self._peak = image_token, flops, peak
        window = window or {}
        self._rows: list[list[float]] = list(window.get("rows", ()))  # a step each, since the last log
        self._logged_seconds = float(window.get("seconds", 0.0))
        self._step: Tensor | None = None

    def add(
        self,
        batch: Mapping[str, Tensor],
        loss: Tensor,
        *,
        items: Tensor | int,
        spread: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Adds one forward pass of this rank to the current step.

        Args:
            batch: input_ids (B, S), attention_mask (B, S), labels (B, S), pixel_values where it has images.
            loss: this pass' part of the mean loss of the global batch.
            items: labelled tokens of the global batch.
            spread: of attention over vision, (B,), and which samples have one, (B,); see AttentionSpread.
        """
        labelled = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        part = loss.detach().float()
        summed = part * items
        zero = torch.zeros_like(summed)
        of_kind = [summed, labelled, zero, zero] if "pixel_values" in batch else [zero, zero, summed, labelled]
        samples, tokens = zero + len(batch["labels"]), batch["attention_mask"].sum()
        visual = zero if self._image_token is None else (batch["input_ids"] == self._image_token).sum()
        spreads = [zero, zero] if spread is None else [value.detach().sum() for value in spread]
        row = torch.stack([value.double() for value in (samples, tokens, part, *of_kind, visual, *spreads)])
        self._step = row if self._step is None else self._step + row

    def take_step(self) -> Tensor:
        """Returns this rank's sums of the current step, float64 (10,), and starts the next step."""
        sums, self._step = self._step, None
        return torch.zeros(len(_SUMS), dtype=torch.float64) if sums is None else sums

    def end_step(self, sums: list[float]) -> dict[str, float]:
        """Takes the sums of one step over all ranks; returns them by name."""
        self._rows.append(sums)
        named = dict(zip(_SUMS, sums, strict=True))
        self.samples += int(named["samples"])
        self.tokens += int(named["tokens"])
        self.visual += int(named["visual"])
        return named

    def report(self, seconds: float) -> dict[str, float]:
        """Returns the means since the last report and starts anew.

        Args:
            seconds: seconds of training so far.

        Returns:
            loss, the mean of the steps' losses; loss_image and loss_text, each the mean over labelled tokens, where
            there were any; attention_spread, the mean over samples, where it was measured; tokens_per_second;
            model_flops_per_second and mfu, where they are known; samples and tokens of the whole run.
        """
        columns = zip(*self._rows, strict=True) if self._rows else [[]] * len(_SUMS)
        sums = {name: math.fsum(column) for name, column in zip(_SUMS, columns, strict=True)}
        passed = max(seconds - self._logged_seconds, 1e-9)
        report: dict[str, float] = {"loss": sums["loss"] / max(len(self._rows), 1)}
        for kind in ("image", "text"):
            if sums[f"{kind}_labels"]:
                report[f"loss_{kind}"] = sums[f"{kind}_loss"] / sums[f"{kind}_labels"]
        if sums["spread_samples"]:
            report["attention_spread"] = sums["spread"] / sums["spread_samples"]
        report["tokens_per_second"] = round(sums["tokens"] / passed, 1)
        if self._flops is not None and sums["samples"]:
            report["model_flops_per_second"] = rate = self._flops(sums) / passed
            report |= {} if self._peak is None else {"mfu": rate / self._peak}
        self._rows, self._logged_seconds = [], seconds
        return report | {"samples": self.samples, "tokens": self.tokens}

    def window(self) -> dict[str, Any]:
        """Returns the steps since the last report, for a checkpoint: a resumed run reports what this one would."""
        return {"rows": self._rows, "seconds": self._logged_seconds}
