"""Live tokens: which positions of a padded (B, S) batch a run of layers works on, and moving rows between runs.

Letters: B batch, S sequence, L live (the largest live count in the batch), D width, R rows of visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LiveSet:
    """Positions that a run of layers works on, as rows of (B, L, ...) tensors in ascending order.

    Attributes:
        slots: (B, L) int64, the row's place in the sequence, 0 ... S-1. No place stands twice in a sample.
        valid: (B, L) bool, False on padding rows. Padding rows are computed and never looked at.
        whole: the rows are the sequence itself, so that nothing has to be gathered.
        padded: some row is padding.
    """

    slots: Tensor
    valid: Tensor
    whole: bool
    padded: bool

    @classmethod
    def of_sequence(cls, attention_mask: Tensor, offset: int = 0) -> LiveSet:
        """Returns the set of all S positions; padding, of any side, stays where it is.

        Args:
            attention_mask: (B, S) bool, False on padding.
            offset: the sequence's own place after what a cache already holds.
        """
        size = attention_mask.shape[1]
        slots = torch.arange(offset, offset + size, device=attention_mask.device)
        padded = not bool(attention_mask.all())
        return cls(slots.expand(attention_mask.shape[0], -1), attention_mask, True, padded)

    @classmethod
    def of_mask(cls, mask: Tensor, offset: int = 0, at_least: int = 0) -> LiveSet:
        """Returns the set of the True positions of `mask` (B, S), packed to the left.

        Args:
            mask: (B, S) bool.
            offset: as in `of_sequence`.
            at_least: smallest L, so that a batch without such positions still has a (padding) row.
        """
        counts = mask.sum(dim=1)
        smallest, largest = torch.stack([counts.min(), counts.max()]).tolist()
        size = max(largest, at_least)
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :size]
        valid = torch.arange(size, device=mask.device) < counts[:, None]
        return cls(order + offset, valid, False, smallest < size)

    def take(self, sequence: Tensor, offset: int = 0) -> Tensor:
        """Returns the set's rows (B, L, ...) of a per-position tensor (B, S, ...)."""
        if self.whole:
            return sequence
        rows = sequence.shape[1] * torch.arange(len(self.slots), device=sequence.device)[:, None]
        flat = (rows + self.slots - offset).flatten()
        return sequence.flatten(0, 1).index_select(0, flat).unflatten(0, self.slots.shape)

    def put(self, rows: Tensor, size: int, offset: int = 0) -> Tensor:
        """Returns (B, size, D) with the set's rows (B, L, D) at their places and zeros elsewhere."""
        if self.whole:
            return rows
        starts = size * torch.arange(len(self.slots), device=rows.device)[:, None]
        flat = (starts + self.slots - offset).flatten()
        full = rows.new_zeros(rows.shape[0] * size, *rows.shape[2:])
        return full.index_copy(0, flat, rows.flatten(0, 1)).unflatten(0, (rows.shape[0], size))

    def spread(self, per_row: Tensor, size: int, fill: float, offset: int = 0) -> Tensor:
        """Returns (B, size) with per-row values (B, L) at their places; `fill` elsewhere and on padding."""
        full = per_row.new_full((len(per_row), size), fill)
        return full.scatter(1, self.slots - offset, per_row.masked_fill(~self.valid, fill))


@dataclass(frozen=True, eq=False)
class VisualRows:
    """The projected visual tokens of a batch, kept apart from the sequence until a layer sees them.

    Attributes:
        rows: (R, D), in the order of the visual positions. It may hold rows that no position uses (a training
            batch without an image brings a dummy, so that every rank runs the same modules).
        row_of: (B, S) int64, the row of each visual position; 0 elsewhere.
    """

    rows: Tensor
    row_of: Tensor

    @classmethod
    def of(cls, visual: Tensor, rows: Tensor) -> VisualRows:
        """Returns the rows (R, D) of the True positions of `visual` (B, S)."""
        row_of = (visual.flatten().cumsum(0) - 1).clamp(min=0).view(visual.shape)
        return cls(rows, row_of.masked_fill(~visual, 0))

    def take(self, live: LiveSet, offset: int = 0) -> Tensor:
        """Returns (B, L, D): the projected embedding of each row of a set of visual positions."""
        index = self.row_of.gather(1, live.slots - offset)
        return self.rows.index_select(0, index.flatten()).unflatten(0, index.shape)


def move(
    hidden: Tensor,
    old: LiveSet,
    new: LiveSet,
    visual: VisualRows | None,
    size: int,
    offset: int = 0,
) -> Tensor:
    """Returns the hidden states of `new` from those of `old`; tokens that were not live come from `visual`.

    Every visual row takes part in the graph, also one that no position uses: what is in a batch never decides
    which modules a rank runs backward through.

    Args:
        hidden: (B, L_old, D) rows of `old`.
        old: the set of the layer before.
        new: the set of the layer to come.
        visual: the projected visual tokens, or None where no token enters.
        size: S, the length of the sequence.
        offset: place of the sequence's first position after a cache.

    Returns:
        (B, L_new, D).
    """
    width = old.slots.shape[1]
    places = torch.arange(width, device=hidden.device).expand(len(hidden), -1)
    where = old.spread(places, size, -1, offset).gather(1, new.slots - offset)  # (B, L_new), -1: was dead
    starts = width * torch.arange(len(hidden), device=hidden.device)[:, None]
    rows = hidden.flatten(0, 1)
    entering = where.new_zeros(())  # padding rows may take any
    if visual is not None:
        entering = len(rows) + visual.row_of.gather(1, new.slots - offset)
        rows = torch.cat([rows, visual.rows.to(rows.dtype)])
    index = torch.where(where >= 0, starts + where, entering).clamp(max=len(rows) - 1)
    return rows.index_select(0, index.flatten()).unflatten(0, new.slots.shape)
