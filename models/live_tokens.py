"""Which tokens each layer runs on: rows of a padded (B, S) batch, gathered once and moved from layer to layer.

Letters: B batch, S sequence, L live (the largest live count in the batch), D width, R rows of visual tokens, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .cache import StagedLayer


@dataclass(frozen=True, eq=False)
class LiveTokens:
    """Tokens of a batch, as rows of (B, L, ...) tensors in ascending order.

    A slot is a token's place in the whole sequence, dead tokens and padding included. Slots decide masks and caches;
    position ids decide rotary embeddings alone.

    Attributes:
        slots: (B, L) int64. No slot appears twice in a sample.
        valid: (B, L) bool, False on padding rows, which are computed but ignored.
        whole: the rows are the input itself, so nothing has to be gathered.
        padded: some row is padding.
        offset: slot of the input's first token: the length of the sequence that a cache holds already.
    """

    slots: Tensor
    valid: Tensor
    whole: bool
    padded: bool
    offset: int = 0

    @classmethod
    def of_sequence(cls, attention_mask: Tensor, offset: int = 0) -> LiveTokens:
        """Returns all S tokens of the input; padding, on any side, stays where it is.

        Args:
            attention_mask: (B, S) bool, False on padding.
            offset: slot of the first token.
        """
        size = attention_mask.shape[1]
        slots = torch.arange(offset, offset + size, device=attention_mask.device)
        padded = not bool(attention_mask.all())
        return cls(slots.expand(attention_mask.shape[0], -1), attention_mask, True, padded, offset)

    @classmethod
    def of_mask(cls, mask: Tensor, offset: int = 0, at_least: int = 0) -> LiveTokens:
        """Returns the True positions of `mask` (B, S), packed to the left.

        Args:
            mask: (B, S) bool.
            offset: slot of the first position.
            at_least: smallest L, so that a batch without such positions still has a (padding) row.
        """
        counts = mask.sum(dim=1)
        smallest, largest = torch.stack([counts.min(), counts.max()]).tolist()
        size = max(largest, at_least)
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :size]
        valid = torch.arange(size, device=mask.device) < counts[:, None]
        return cls(order + offset, valid, False, smallest < size, offset)

    @property
    def places(self) -> Tensor:
        """(B, L) int64: where each row stands in the input, 0 ... S-1."""
        return self.slots - self.offset

    def take(self, sequence: Tensor) -> Tensor:
        """Returns the rows (B, L, ...) of a per-token tensor (B, S, ...)."""
        if self.whole:
            return sequence
        starts = sequence.shape[1] * torch.arange(len(self.slots), device=sequence.device)[:, None]
        flat = (starts + self.places).flatten()
        return sequence.flatten(0, 1).index_select(0, flat).unflatten(0, self.slots.shape)

    def put(self, rows: Tensor, size: int) -> Tensor:
        """Returns (B, size, D) with the rows (B, L, D) at their places and zeros elsewhere."""
        if self.whole:
            return rows
        starts = size * torch.arange(len(self.slots), device=rows.device)[:, None]
        flat = (starts + self.places).flatten()
        full = rows.new_zeros(rows.shape[0] * size, *rows.shape[2:])
        return full.index_copy(0, flat, rows.flatten(0, 1)).unflatten(0, (rows.shape[0], size))

    def spread(self, per_row: Tensor, size: int, fill: float) -> Tensor:
        """Returns (B, size) with per-row values (B, L) at their places; `fill` elsewhere and on padding."""
        full = per_row.new_full((len(per_row), size), fill)
        return full.scatter(1, self.places, per_row.masked_fill(~self.valid, fill))


@dataclass(frozen=True, eq=False)
class VisualRows:
    """The projected visual tokens of a batch, kept apart until a layer runs on them.

    Attributes:
        rows: (R, D), in the order of the visual positions. It may hold rows that no position uses: a training batch
            without an image brings a blank one, so that every rank runs the same modules.
        row_of: (B, S) int64, the row of each visual position; 0 elsewhere.
        is_visual: (B, S) bool, the positions that have a row.
    """

    rows: Tensor
    row_of: Tensor
    is_visual: Tensor

    @classmethod
    def of(cls, visual: Tensor, rows: Tensor) -> VisualRows:
        """Returns the rows (R, D) of the True positions of `visual` (B, S)."""
        row_of = (visual.flatten().cumsum(0) - 1).clamp(min=0).view(visual.shape)
        return cls(rows, row_of.masked_fill(~visual, 0), visual)

    def with_rows(self, rows: Tensor) -> VisualRows:
        """Returns other rows (R, D) at the same positions."""
        return VisualRows(rows, self.row_of, self.is_visual)

    def take(self, live: LiveTokens) -> Tensor:
        """Returns (B, L, D): the row of each of some visual tokens."""
        index = self.row_of.gather(1, live.places)
        return self.rows.index_select(0, index.flatten()).unflatten(0, index.shape)

    def added_to(self, hidden: Tensor, live: LiveTokens) -> Tensor:
        """Returns hidden states (B, L, D) with its row added to each visual token. `rows` is not empty."""
        marks = live.take(self.is_visual)[..., None]
        return hidden + self.take(live).to(hidden.dtype).masked_fill(~marks, 0.0)


def move(hidden: Tensor, old: LiveTokens, new: LiveTokens, entering: VisualRows | None, size: int) -> Tensor:
    """Returns the hidden states of `new` from those of `old`; tokens that were dead come from `entering`.

    Every visual row takes part in the graph, also one that no position uses: what a batch holds never decides which
    modules a rank runs backward through.

    Args:
        hidden: (B, L_old, D) rows of `old`.
        old: the tokens of the layer before.
        new: the tokens of the next layer.
        entering: the projected visual tokens, or None where no token enters.
        size: S, the length of the input.

    Returns:
        (B, L_new, D).
    """
    width = old.slots.shape[1]
    columns = torch.arange(width, device=hidden.device).expand(len(hidden), -1)
    where = old.spread(columns, size, -1).gather(1, new.places)  # (B, L_new), -1: was dead
    starts = width * torch.arange(len(hidden), device=hidden.device)[:, None]
    rows = hidden.flatten(0, 1)
    source = where.new_zeros(())  # padding rows may take any
    if entering is not None:
        source = len(rows) + entering.row_of.gather(1, new.places)
        rows = torch.cat([rows, entering.rows.to(rows.dtype)])
    index = torch.where(where >= 0, starts + where, source).clamp(max=len(rows) - 1)
    return rows.index_select(0, index.flatten()).unflatten(0, new.slots.shape)


@dataclass(frozen=True, eq=False)
class Selection:
    """A schedule's choice of visual tokens.

    Returning the same object for several layers says that nothing changed, so nothing is gathered anew.

    Attributes:
        mask: (B, S) bool, a subset of the visual tokens; None stands for none of them, without asking the device.
    """

    mask: Tensor | None


NO_VISUAL = Selection(None)


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """What one layer runs on.

    Attributes:
        rows: the tokens that run through the layer.
        kv_only: visual tokens that only give keys and values (`kv` update), or None. Their keys stand first.
    """

    rows: LiveTokens
    kv_only: LiveTokens | None = None

    @property
    def parts(self) -> tuple[LiveTokens, ...]:
        """The groups of tokens whose keys and values the layer makes, in the order of its keys."""
        return (self.rows,) if self.kv_only is None else (self.kv_only, self.rows)

    @cached_property
    def key_slots(self) -> Tensor:
        """(B, K) int64: slots of the keys that the layer makes, -1 on padding."""
        return key_slots(*self.parts)

    @cached_property
    def padded(self) -> bool:
        """Some key is padding."""
        return any(part.padded for part in self.parts)

    @cached_property
    def live(self) -> list[Tensor]:
        """One int64 tensor a sample: the slots of the tokens that the layer runs on, ascending."""
        return [
            torch.cat([part.slots[sample][part.valid[sample]] for part in self.parts]).sort().values
            for sample in range(len(self.rows.slots))
        ]


def key_slots(*parts: LiveTokens) -> Tensor:
    """Returns (B, K): the slots of several groups of tokens, one group after the other; -1 on padding."""
    return torch.cat([part.slots.masked_fill(~part.valid, -1) for part in parts], dim=1)


class SequenceState:
    """Where the tokens of one call of run_decoder stand, and the tokens of each selection, gathered once.

    Attributes:
        offset: length of the sequence that the cache held before.
        length: that and S together.
        size: S.
        valid: (B, S) bool, False on padding.
        visual: (B, S) bool, the visual tokens.
        all_visual: the selection of all visual tokens.
        everything: all S tokens of the input.
        positions: (B, S) int64 position ids, or (3, B, S) under M-RoPE.
        blocks: (B, offset + S) int64, the image block of each slot, whose tokens see each other in both directions;
            -1: none. None where the model has no such blocks.
    """

    def __init__(
        self, visual: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any, blocks: Tensor | None
    ) -> None:
        size = visual.shape[1]
        self.offset: int = cache.get_seq_length() if cache is not None else 0
        self.length, self.size = self.offset + size, size
        self.valid = torch.ones_like(visual) if mask is None else mask[:, -size:].bool()
        self.visual = visual & self.valid
        self.all_visual = Selection(self.visual)
        self.everything = LiveTokens.of_sequence(self.valid, self.offset)
        self.positions = _positions(positions, mask, self.valid, cache, self.offset)
        self.blocks = None if blocks is None else _whole_blocks(blocks, size, self.length)
        self._rows = {self.all_visual: self.everything}
        self._visual_rows: dict[Selection, LiveTokens] = {}
        self._tokens: dict[tuple[Selection, bool], LayerTokens] = {}

    def tokens_of(self, selection: Selection, kv_only: bool) -> LayerTokens:
        """Returns what a layer runs on: text and the selected visual tokens, which run or only give keys and values."""
        if (selection, kv_only) not in self._tokens:
            if kv_only:
                tokens = LayerTokens(self.rows_of(NO_VISUAL), self.visual_rows_of(selection))
            else:
                tokens = LayerTokens(self.rows_of(selection))
            self._tokens[selection, kv_only] = tokens
        return self._tokens[selection, kv_only]

    def rows_of(self, selection: Selection) -> LiveTokens:
        """Returns text and the selected visual tokens."""
        if selection not in self._rows:
            text = self.valid & ~self.visual
            mask = text if selection.mask is None else selection.mask | text
            self._rows[selection] = LiveTokens.of_mask(mask, self.offset)
        return self._rows[selection]

    def visual_rows_of(self, selection: Selection) -> LiveTokens:
        """Returns the selected visual tokens alone."""
        if selection not in self._visual_rows:
            mask = torch.zeros_like(self.visual) if selection.mask is None else selection.mask
            self._visual_rows[selection] = LiveTokens.of_mask(mask, self.offset, at_least=1)
        return self._visual_rows[selection]

    def last_text_token(self) -> Tensor:
        """Returns (B, S) bool: each sample's last text token."""
        text = self.valid & ~self.visual
        places = torch.arange(text.shape[1], device=text.device)
        return places == places.where(text, -1).max(dim=1, keepdim=True).values

    def renumbered(self, tokens: LayerTokens, stored: StagedLayer | None) -> Tensor:
        """Returns (B, S) position ids that count the live tokens of a layer, after those that its cache holds."""
        live = torch.zeros_like(self.positions)
        for part in tokens.parts:
            live = live + part.spread(part.valid.long(), self.size, 0)
        counted = live.cumsum(dim=1) - 1
        if stored is not None and stored.slots is not None:
            counted = counted + (stored.slots >= 0).sum(dim=1, keepdim=True)
        return counted.clamp(min=0)


def _positions(given: Tensor | None, mask: Tensor | None, valid: Tensor, cache: Any, offset: int) -> Tensor:
    """Returns (B, S) or (3, B, S) position ids; counted over unpadded tokens where none are given."""
    if given is not None and given.ndim == 3:
        return given[-3:].expand(-1, len(valid), -1)  # of four, the first counts text alone, for packed rows
    if given is not None:
        return given.expand(len(valid), -1)
    whole = mask is not None and mask.shape[1] == offset + valid.shape[1]
    if mask is not None and whole:
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -valid.shape[1] :]
    counted = (valid.long().cumsum(dim=1) - 1).clamp(min=0)
    return counted if offset == 0 else counted + cache.layers[0].next_position[:, None]


def _whole_blocks(blocks: Tensor, size: int, length: int) -> Tensor:
    """Returns (B, length) block ids from those of this call's tokens, or of the sequence from its start."""
    missing = length - blocks.shape[1]
    of_this_call = blocks.shape[1] == size
    return torch.nn.functional.pad(blocks, (missing, 0) if of_this_call else (0, missing), value=-1)
