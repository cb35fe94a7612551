"""What a training learns of its data as it goes: rows that were passed over, and the loss of each source."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from data.chat import IGNORE_INDEX
from data.config import DataConfig
from data.rows import Fault
from train import distributed as peers
from train.parameters import base_of


class DataWatch:
    """Takes out of each batch what is not the model's.

    Args:
        config: the phase's data section.
        skipped: rows that were left out before the training began; they count against `max_bad_rows` too.
        met: faults that all ranks met before this run was stopped; so do they.
    """

    def __init__(self, config: DataConfig, skipped: int, met: Sequence[Fault] = ()) -> None:
        self.names, self.met = config.names, list(met)
        self.faults: list[Fault] = []  # of this rank
        self._allowed = config.max_bad_rows - skipped
        self._sources: Tensor | None = None  # (B,) of the present batch, and its labelled tokens a sample
        self._labelled: Tensor | None = None
        self._sums: Tensor | None = None

    def take(self, inputs: dict[str, Any]) -> None:
        """Removes `sources` and `faults` from a batch; says each fault in one line, on the rank that met it."""
        for fault in inputs.pop("faults", ()):
            if fault in self.faults or fault in self.met:  # a later epoch
                continue
            self.faults.append(fault)
            print(f"rank {peers.rank()}: {fault}; passed over", file=sys.stderr, flush=True)
        self._sources = inputs.pop("sources", None)
        self._labelled = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1)

    def leave(self) -> None:
        """Leaves out of the sums what the model computes until the next `take`."""
        self._sources = self._labelled = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out of the sums what the model computes meanwhile."""
        sources, self._sources = self._sources, None
        try:
            yield
        finally:
            self._sources = sources

    def excess(self, counts: Sequence[float]) -> str:
        """Returns what to say when all ranks together passed over more rows than the recipe allows; else nothing."""
        found, allowed = int(sum(counts)) + len(self.met), max(0, self._allowed)
        if found <= allowed:
            return ""
        faults = self.faults or self.met
        first = f", such as {faults[-1]}" if faults else ", named above"
        return f"data: {found} rows could not be read{first}; expected up to {allowed} (data.max_bad_rows)"

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
        if distributed.is_initialized():
            sums = sums.to(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu")
            distributed.all_reduce(sums)
        losses, labels = sums.tolist()
        return {
            f"loss_{name}": loss / count for name, loss, count in zip(self.names, losses, labels, strict=True) if count
        }

    def all_faults(self) -> list[Fault]:
        """Returns the faults of all ranks; every rank must call it."""
        found: list[Any] = [self.faults]
        if distributed.is_initialized():
            found = [None] * peers.count()
            distributed.all_gather_object(found, self.faults)
        return list(dict.fromkeys([*self.met, *(fault for faults in found for fault in faults)]))

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
