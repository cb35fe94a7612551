"""The tokens that each layer runs on: rows of a padded (B, S) batch, gathered once and moved from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .batch_facts import BatchFacts
from .cache import StagedLayer


@dataclass(frozen=True, eq=False)
class LiveTokens:
    """Tokens of a batch, as rows of (B, L, ...) tensors in ascending order.

    A slot is a token's place in the whole sequence, dead tokens and padding included. Slots decide masks and caches;
    position ids decide rotary embeddings alone. Packed, all samples stand one after the other in a single row, and the
    slot of a token is sample * S + place.
    """

    slots: Tensor  # (B, L) int64, none twice in a sample
    valid: Tensor  # (B, L) bool, False on padding rows, which are computed but ignored
    whole: bool  # the rows are the input itself, so nothing has to be gathered
    padded: bool  # some row is padding
    offset: int = 0  # slot of the input's first token: the length of the sequence that a cache holds already
    lengths: tuple[int, ...] = ()  # packed: tokens of each sample
    stride: int = 0  # packed: S

    @classmethod
    def of_mask(cls, mask: Tensor, offset: int = 0, counts: Sequence[int] | None = None) -> LiveTokens:
        """Returns the True positions of `mask` (B, S), packed to the left; a batch without any has a padding row.

        `counts`: how many each sample has; None asks the device.
        """
        found = mask.sum(dim=1)
        counts = found.tolist() if counts is None else counts
        size = max(1, *counts)
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :size]
        valid = torch.arange(size, device=mask.device) < found[:, None]
        return cls(order + offset, valid, False, min(counts) < size, offset)

    @classmethod
    def packed(cls, mask: Tensor, counts: Sequence[int] | None = None) -> LiveTokens:
        """Returns the True positions of `mask` (B, S) in one row, which has one row of padding where there are none."""
        counts = mask.sum(dim=1).tolist() if counts is None else counts
        found = cls.of_mask(mask.flatten()[None], counts=[sum(counts)])
        return replace(found, lengths=tuple(counts), stride=mask.shape[1])

    @property
    def places(self) -> Tensor:
        """(B, L) int64: where each row stands in the input, 0 ... S-1."""
        return self.slots - self.offset

    def columns(self, size: int) -> Tensor:
        """Returns (B, size) int64: the row of each place of the input, -1 where none stands."""
        rows = torch.arange(self.slots.shape[1], device=self.slots.device).expand_as(self.slots)
        none = self.slots.new_full((len(self.slots), size), -1)
        return none.scatter(1, self.places, rows.masked_fill(~self.valid, -1))

    def positions_from(self, positions: Tensor) -> Tensor:
        """Returns the position ids (B, L) or (3, B, L) of the rows, from those (B, S) or (3, B, S) of the input."""
        return positions if self.whole else positions.gather(-1, self.places.expand(*positions.shape[:-1], -1))

    def take(self, full: Tensor) -> Tensor:
        """Returns (B, L, ...), the rows' part of what stands at every place of the input, (B, S, ...)."""
        index = self.places.view(*self.places.shape, *[1] * (full.ndim - 2))
        return full.gather(1, index.expand(-1, -1, *full.shape[2:]))

    def put(self, rows: Tensor, size: int) -> Tensor:
        """Returns (B, size, D) with the rows (B, L, D) at their places and zeros elsewhere."""
        if self.whole:
            return rows
        starts = size * torch.arange(len(self.slots), device=rows.device)[:, None]
        full = rows.new_zeros(rows.shape[0] * size, *rows.shape[2:])
        full = full.index_copy(0, (starts + self.places).flatten(), rows.flatten(0, 1))
        return full.unflatten(0, (rows.shape[0], size))


@dataclass(frozen=True, eq=False)
class VisualRows:
    """The projected visual tokens of a batch, kept apart until a layer runs on them.

    Some rows may belong to no position: a training batch without an image encodes a blank one, so that every rank
    runs the same modules.
    """

    rows: Tensor  # (R, D), in the order of the visual positions
    row_of: Tensor  # (B, S) int64, the row of each visual position; any row elsewhere
    is_visual: Tensor  # (B, S) bool, the positions that have a row

    @classmethod
    def of(cls, visual: Tensor, rows: Tensor) -> VisualRows:
        """Returns the rows (R, D) of the True positions of `visual` (B, S)."""
        return cls(rows, (visual.flatten().cumsum(0) - 1).clamp(min=0).view(visual.shape), visual)

    def take(self, live: LiveTokens) -> Tensor:
        """Returns (B, L, D): the row of each visual token among `live`; any row for another token."""
        index = self.row_of.gather(1, live.places)
        return self.rows.index_select(0, index.flatten()).unflatten(0, index.shape)

    def updated(self, hidden: Tensor, live: LiveTokens) -> VisualRows:
        """Returns the rows with the hidden states (B, L, D) of the visual tokens among `live` in place of theirs."""
        size = self.is_visual.shape[1]
        full = live.put(hidden.masked_fill(~live.valid[..., None], 0.0), size)
        known = (live.columns(size) >= 0) & self.is_visual
        index = self.row_of.where(known, len(self.rows)).flatten()  # others write to an extra row, cut off again
        rows = torch.cat([self.rows, self.rows[:1]]).index_copy(0, index, full.flatten(0, 1).to(self.rows.dtype))
        return VisualRows(rows[:-1], self.row_of, self.is_visual)

    def added_to(self, hidden: Tensor, live: LiveTokens) -> Tensor:
        """Returns hidden states (B, L, D) with its row added to each visual token. `rows` is not empty."""
        is_text = ~self.is_visual.gather(1, live.places)[..., None]
        return hidden + self.take(live).to(hidden.dtype).masked_fill(is_text, 0.0)

    def merged_into(self, hidden: Tensor, live: LiveTokens) -> Tensor:
        """Returns hidden states (B, L, D) with its row in place of each visual token. `rows` is not empty."""
        is_visual = self.is_visual.gather(1, live.places)[..., None]
        return torch.where(is_visual, self.take(live).to(hidden.dtype), hidden)


def rows_at(full: Tensor, mask: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Returns (R, D): what stands in `full` (B, S, D) at the True positions of `mask` (B, S), in order.

    `counts`: how many each sample has; None asks the device.
    """
    if counts is None:
        return full[mask]
    places = torch.nonzero_static(mask.flatten(), size=sum(counts)).flatten()
    return full.flatten(0, 1).index_select(0, places)


def move(hidden: Tensor, old: LiveTokens, new: LiveTokens, entering: VisualRows | None, size: int) -> Tensor:
    """Returns the hidden states (B, L_new, D) of `new` from those (B, L_old, D) of `old`.

    Tokens that were dead come from `entering`, which is None where no token enters. Every visual row takes part in the
    graph, also one that no position uses: what a batch holds never decides which modules a rank runs backward through.
    `size` is S.
    """
    where = old.columns(size).gather(1, new.places)  # (B, L_new), -1: was dead
    starts = old.slots.shape[1] * torch.arange(len(hidden), device=hidden.device)[:, None]
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

    Return the same object for several layers if the choice does not change: nothing is then gathered again.
    """

    mask: Tensor | None  # (B, S) bool, a subset of the visual tokens; None: none of them, without asking the device
    counts: tuple[int, ...] | None = None  # how many of each sample, where that is known without asking the device


NO_VISUAL = Selection(None)


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """What one layer runs on."""

    rows: LiveTokens  # the tokens that run through the layer
    kv_only: LiveTokens | None = None  # visual tokens that only give keys and values (`kv` update): the first keys

    @property
    def parts(self) -> tuple[LiveTokens, ...]:
        """The tokens whose keys and values the layer makes, in the order of its keys."""
        return (self.rows,) if self.kv_only is None else (self.kv_only, self.rows)

    @cached_property
    def key_slots(self) -> Tensor:
        """(B, K) int64: slots of the keys that the layer makes, -1 on padding."""
        return torch.cat([part.slots.masked_fill(~part.valid, -1) for part in self.parts], dim=1)

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Packed: keys of each sample."""
        return tuple(map(sum, zip(*(part.lengths for part in self.parts), strict=True)))

    @cached_property
    def padded(self) -> bool:
        """Some key is padding."""
        return any(part.padded for part in self.parts)

    @cached_property
    def live(self) -> list[Tensor]:
        """One int64 tensor a sample: slots of the tokens that the layer runs on, ascending; packed: their places."""
        found = [slots[slots >= 0].sort().values for slots in self.key_slots]
        if not self.rows.stride:
            return found
        samples = found[0] // self.rows.stride
        return [found[0][samples == number] % self.rows.stride for number in range(len(self.rows.lengths))]


class SequenceState:
    """Positions of the tokens in one call of run_decoder, and the tokens of each selection, gathered once.

    Packed, the batch counts as a single sample of B * S places, which B and S below stand for; selections stay (B, S).

    Attributes:
        offset: length of the sequence that the cache held before; `size` is S, `length` both together.
        visual: (B, S) bool, the visual tokens; `text` the others. Neither has padding.
        all_visual: the selection of all visual tokens.
        positions: (B, S) int64 position ids, or (3, B, S) under M-RoPE.
        samples: samples of the input; `stride`: places of each, packed or not.
        is_packed: every layer runs on one row.
        blocks: (B, offset + S) int64, the image block of each slot, whose tokens see each other in both directions;
            -1: none. None where the model has no such blocks.
        facts: counts of the batch that need no device synchronisation; None: read from the device.
    """

    def __init__(
        self,
        visual: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Any,
        blocks: Tensor | None,
        facts: BatchFacts | None = None,
        is_packed: bool = False,
    ) -> None:
        size = visual.shape[1]
        self.offset: int = cache.get_seq_length() if cache is not None else 0
        self.length, self.size = self.offset + size, size
        valid = torch.ones_like(visual) if mask is None else mask[:, -size:].bool()
        self.visual, self.text = visual & valid, valid & ~visual
        self.facts = facts
        self.all_visual = Selection(self.visual, None if facts is None else facts.visual)
        self.positions = _positions(positions, mask, valid, cache, self.offset)
        self.blocks = blocks
        if blocks is not None:  # of this call's tokens, or of the sequence from its start
            missing = self.length - blocks.shape[1]
            sides = (missing, 0) if blocks.shape[1] == size else (0, missing)
            self.blocks = torch.nn.functional.pad(blocks, sides, value=-1)
        self.is_packed, self.samples, self.stride = is_packed, len(visual), self.length
        if is_packed:
            everything = LiveTokens.packed(valid, None if facts is None else facts.lengths)
            self.visual, self.text = self.flat(self.visual), self.flat(self.text)
            self.positions = self.flat(self.positions, first=self.positions.ndim - 2)
            self.blocks = None if self.blocks is None else self.flat(self.blocks)
            self.size = self.length = self.samples * size
        else:
            slots = torch.arange(self.offset, self.length, device=visual.device).expand(len(visual), -1)
            padded = mask is not None and not bool(valid.all()) if facts is None else min(facts.lengths) < size
            everything = LiveTokens(slots, valid, True, padded, self.offset)
        self._rows: dict[tuple[Selection, bool], LiveTokens] = {(self.all_visual, True): everything}
        self._tokens: dict[tuple[Selection, bool], LayerTokens] = {}

    def flat(self, full: Tensor, first: int = 0) -> Tensor:
        """Returns (1, B * S, ...) of (B, S, ...) where rows are packed; `first` is the axis of the samples."""
        return full.flatten(first, first + 1).unsqueeze(first) if self.is_packed else full

    def by_sample(self, full: Tensor) -> Tensor:
        """Returns (B, S, ...) of (1, B * S, ...), where rows are packed."""
        return full.unflatten(1, (self.samples, self.stride)).squeeze(0) if self.is_packed else full

    def tokens_of(self, selection: Selection, kv_only: bool) -> LayerTokens:
        """Returns what a layer runs on: text and the selected visual tokens, which run or only give keys and values."""
        key = selection, kv_only
        if key not in self._tokens:
            visual = self.rows_of(selection, text=False) if kv_only else None
            self._tokens[key] = LayerTokens(self.rows_of(NO_VISUAL if kv_only else selection), visual)
        return self._tokens[key]

    def rows_of(self, selection: Selection, *, text: bool = True) -> LiveTokens:
        """Returns the selected visual tokens, with the text or alone."""
        key = selection, text
        if key not in self._rows:
            counts, others = self._counts(selection, text=text), self.by_sample(self.text)
            mask = torch.zeros_like(others) if selection.mask is None else selection.mask
            mask = mask | others if text else mask
            made = LiveTokens.packed(mask, counts) if self.is_packed else LiveTokens.of_mask(mask, self.offset, counts)
            self._rows[key] = made
        return self._rows[key]

    def _counts(self, selection: Selection, *, text: bool) -> list[int] | None:
        """Returns how many tokens of each sample a selection has, with the text or alone; None: not known."""
        if self.facts is None or (selection.mask is not None and selection.counts is None):
            return None
        chosen = selection.counts or (0,) * self.samples
        others = [length - visual for length, visual in zip(self.facts.lengths, self.facts.visual, strict=True)]
        return [one + other * text for one, other in zip(chosen, others, strict=True)]

    def renumbered(self, tokens: LayerTokens, stored: StagedLayer | None) -> Tensor:
        """Returns (B, S) position ids that count the live tokens of a layer, after those that its cache holds."""
        live = torch.stack([part.columns(self.size) >= 0 for part in tokens.parts]).any(dim=0)
        counted = live.long().cumsum(dim=1) - 1
        if stored is not None and stored.slots is not None:
            counted = counted + (stored.slots >= 0).sum(dim=1, keepdim=True)
        return counted.clamp(min=0)


def _positions(given: Tensor | None, mask: Tensor | None, valid: Tensor, cache: Any, offset: int) -> Tensor:
    """Returns (B, S) or (3, B, S) position ids; counted over unpadded tokens where none are given."""
    if given is not None and given.ndim == 3:
        return given[-3:].expand(-1, len(valid), -1)  # of four, the first counts text alone, for packed rows
    if given is not None:
        return given.expand(len(valid), -1)
    size = valid.shape[1]
    if mask is not None and mask.shape[1] == offset + size:
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -size:]
    counted = (valid.long().cumsum(dim=1) - 1).clamp(min=0)
    return counted if offset == 0 else counted + cache.layers[0].next_position[:, None]
