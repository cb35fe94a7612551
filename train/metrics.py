"""What a run measures: its time, its samples, tokens and losses, and the rows that it passed over."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.chat import IGNORE_INDEX
from data.config import DataConfig
from data.rows import Fault
from train import distributed
from train.parameters import base_of

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


class Clock:
    """Seconds of training, saved in checkpoints, so that a resumed run goes on where it stopped.

    Loading the model and the data is not counted, nor is validation; the count starts with `start`.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.synced_seconds = before  # seconds as all ranks know them: rank 0's, sent once a step
        self._before = before
        self._started: float | None = None

    def start(self) -> None:
        """Starts counting."""
        self._started = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count what happens inside."""
        began = time.monotonic()
        yield
        if self._started is not None:
            self._started += time.monotonic() - began

    def seconds(self) -> float:
        """Returns the seconds of training so far, of this process and those that it resumes."""
        now = 0.0 if self._started is None else time.monotonic() - self._started
        return self._before + now


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

    def add(self, batch: Mapping[str, Tensor], loss: Tensor, *, items: Tensor | int, spread: Any = None) -> None:
        """Adds one forward pass of this rank to the current step.

        Args:
            batch: of the collator.
            loss: this pass' part of the mean loss of the global batch.
            items: labelled tokens of the global batch.
            spread: what AttentionSpread measured, if any: of each sample, (B,), and which samples have one, (B,).
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
        """Returns the means since the last report, after so many seconds of training, and starts anew.

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


class DataWatch:
    """Removes bookkeeping from each batch, counts unreadable rows and sums the loss of each source.

    Args:
        config: the phase's data section.
        skipped: rows that were left out before the training began; they count against `max_bad_rows` too.
        known_faults: faults of all ranks from before the run was resumed; they count as well.
    """

    def __init__(self, config: DataConfig, skipped: int, known_faults: Sequence[Fault] = ()) -> None:
        self.names, self.known_faults = config.names, list(known_faults)
        self.faults: list[Fault] = []  # of this rank
        self._allowed = config.max_bad_rows - skipped
        self._sources: Tensor | None = None  # (B,) of the present batch, and its labelled tokens a sample
        self._labelled: Tensor | None = None
        self._sums: Tensor | None = None

    def take(self, inputs: dict[str, Any]) -> None:
        """Removes `sources` and `faults` from a batch; prints one line for each new fault, on the rank that read it."""
        for fault in inputs.pop("faults", ()):
            if fault in self.faults or fault in self.known_faults:  # a later epoch
                continue
            self.faults.append(fault)
            print(f"rank {distributed.rank()}: {fault}; passed over", file=sys.stderr, flush=True)
        self._sources = inputs.pop("sources", None)
        self._labelled = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out of the sums what the model computes meanwhile."""
        sources, self._sources = self._sources, None
        try:
            yield
        finally:
            self._sources = sources

    def excess(self, counts: Sequence[float]) -> str:
        """Returns an error if all ranks together skipped more rows than the recipe allows; else an empty string."""
        found, allowed = int(sum(counts)) + len(self.known_faults), max(0, self._allowed)
        if found <= allowed:
            return ""
        faults = self.faults or self.known_faults
        first = f", such as {faults[-1]}" if faults else ", named above"
        return f"data: got {found} unreadable rows{first}; expected up to {allowed} (data.max_bad_rows)"

    def watch_loss(self, model: Any) -> None:
        """Makes a model's loss also add up for each source; the loss itself stays the same sum."""
        if len(self.names) < 2:
            return
        base_of(model).loss_function = self._loss

    def report(self) -> dict[str, float]:
        """Returns `loss_<source>` over all ranks since the last report, of the sources that were seen.

        Every rank must call it.
        """
        if len(self.names) < 2:
            return {}
        sums = torch.zeros(2, len(self.names), dtype=torch.float64) if self._sums is None else self._sums.clone()
        self._sums = None
        if dist.is_initialized():
            sums = sums.to(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu")
            dist.all_reduce(sums)
        losses, labels = sums.tolist()
        return {
            f"loss_{name}": loss / count for name, loss, count in zip(self.names, losses, labels, strict=True) if count
        }

    def all_faults(self) -> list[Fault]:
        """Returns the faults of all ranks; every rank must call it."""
        found: list[Any] = [self.faults]
        if dist.is_initialized():
            found = [None] * distributed.world_size()
            dist.all_gather_object(found, self.faults)
        return list(dict.fromkeys([*self.known_faults, *(fault for faults in found for fault in faults)]))

    def _loss(
        self, logits: Tensor, labels: Tensor, shift_labels: Tensor, num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        """Returns transformers' ForCausalLMLoss of labelled positions, and adds up its parts."""
        losses = nn.functional.cross_entropy(logits.float(), shift_labels, reduction="none", ignore_index=IGNORE_INDEX)
        if self._sources is not None and self._labelled is not None:
            sources = self._sources.to(losses.device)
            rows = sources.repeat_interleave(self._labelled, output_size=len(losses))  # the size: not asked for
            row = torch.zeros(2, len(self.names), dtype=torch.float64, device=losses.device)
            row[0].index_add_(0, rows, losses.detach().double())
            row[1].index_add_(0, rows, torch.ones_like(losses, dtype=torch.float64))
            self._sums = row if self._sums is None else self._sums + row
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
