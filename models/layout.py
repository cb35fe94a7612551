"""The live sets of one run and what is made for them: position ids, rotary, masks. Each is made once.

Letters: B batch, S sequence, L live rows, K keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .hf import Rotary, attention_mask, window_of
from .live import LiveSet
from .rewrite import Rewrite, Rewritten

Sets = tuple[LiveSet, ...]  # what a layer runs on: its rows, or (tokens that only lend keys and values, its rows)


class Layout:
    """Where the tokens of one call of run_decoder stand.

    Attributes:
        offset: length of the sequence that the cache held before.
        length: that and S together.
        valid: (B, S) bool, False on padding.
        visual: (B, S) bool, the visual tokens.
        none: (B, S) bool, all False: the choice of no visual token.
        positions: (B, S) int64 position ids.
        everything: the set of all S positions.
    """

    def __init__(
        self, decoder: Any, cache: Any, visual: Tensor, mask: Tensor | None, positions: Tensor | None, renumbers: bool
    ) -> None:
        size = visual.shape[1]
        self.decoder, self.cache, self.renumbers = decoder, cache, renumbers
        self.offset = cache.get_seq_length() if cache is not None else 0
        self.length = self.offset + size
        self.valid = torch.ones_like(visual) if mask is None else mask[:, -size:].bool()
        self.visual = visual & self.valid
        self.none = torch.zeros_like(visual)
        self.positions = _positions(positions, mask, self.valid, cache, self.offset)
        self.everything = LiveSet.of_sequence(self.valid, self.offset)
        self._known: dict[Any, Any] = {id(self.visual): self.everything}

    def set_of(self, live: Tensor) -> LiveSet:
        """Returns the rows of text and `live` visual tokens; made once for each choice of the schedule."""
        if id(live) not in self._known:
            mask = live | (self.valid & ~self.visual)
            self._known[id(live)] = LiveSet.of_mask(mask, self.offset)
            self._keep(live)
        return self._known[id(live)]

    def visual_set(self, live: Tensor) -> LiveSet:
        """Returns the rows of the `live` visual tokens alone."""
        key = (id(live), "visual")
        if key not in self._known:
            self._known[key] = LiveSet.of_mask(live, self.offset, at_least=1)
            self._keep(live)
        return self._known[key]

    def last_text_token(self) -> Tensor:
        """Returns (B, S) bool: each sample's last text token."""
        text = self.valid & ~self.visual
        places = torch.arange(text.shape[1], device=text.device)
        return places == places.where(text, -1).max(dim=1, keepdim=True).values

    def rewritten(self, rule: Rewrite, sets: Sets, live: Tensor) -> Rewritten:
        """Returns the rule, worked out for the columns that the sets add to a layer's keys."""
        key = ("rewritten", id(rule), *map(id, sets))
        if key not in self._known:
            copies = self.visual_set(live) if len(sets) == 1 else None
            if rule.hides:
                copies = self.visual_set(self.none)
            self._known[key] = Rewritten(rule, slots_of(sets), self.visual, self.offset, copies)
            self._keep(rule)
        return self._known[key]

    def mask(self, layer: int, sets: Sets, rewritten: Rewritten | None) -> tuple[Any, Tensor]:
        """Returns a layer's attention mask and the places (B, K, -1 on padding) of its keys, and tells its cache."""
        window = window_of(self.decoder, layer, self.length)
        stored = self.cache.layers[layer] if self.cache is not None else None
        if stored is not None:
            for live in sets:
                stored.extend(live)
            if self.offset > 0:
                return self._mask(sets[-1], stored.slots, stored.padded, window, rewritten), stored.slots
        copied = rewritten is not None and rewritten.copies is not None
        hides = rewritten is not None and rewritten.hides
        key = ("mask", window, copied, hides, *map(id, sets))
        if key not in self._known:
            slots, padded = slots_of(sets), any(live.padded for live in sets)
            self._known[key] = self._mask(sets[-1], slots, padded, window, rewritten), slots
        return self._known[key]

    def positions_at(self, layer: int, sets: Sets) -> Tensor:
        """Returns a layer's position ids (B, S): every token's own, unless the schedule counts live ones anew."""
        if not self.renumbers:
            return self.positions
        key = ("positions", layer if self.offset > 0 else None, *map(id, sets))
        if key not in self._known:
            live = torch.zeros_like(self.positions)
            for one in sets:
                live = live + one.spread(one.valid.long(), live.shape[1], 0, self.offset)
            counted = live.cumsum(dim=1) - 1
            if self.offset > 0:
                counted = counted + (self.cache.layers[layer].slots >= 0).sum(dim=1, keepdim=True)
            self._known[key] = counted.clamp(min=0)
        return self._known[key]

    def of_rows(self, rows: LiveSet, positions: Tensor) -> Tensor:
        """Returns (B, L): the rows' part of position ids (B, S)."""
        return positions if rows.whole else positions.gather(1, rows.slots - self.offset)

    def rotary(self, rows: LiveSet, like: Tensor, positions: Tensor) -> Rotary:
        """Returns cos and sin of the rows, of the kind of `like`."""
        key = ("rotary", id(rows), id(positions))
        if key not in self._known:
            self._known[key] = self.decoder.rotary_emb(like, self.of_rows(rows, positions))
            self._keep(rows)
        return self._known[key]

    def _keep(self, owner: Any) -> None:
        """Keeps what a key was made of: the id of a freed object could come back as another's."""
        self._known["owner", id(owner)] = owner

    def _mask(self, rows: LiveSet, slots: Tensor, padded: bool, window: int | None, rewritten: Rewritten | None) -> Any:
        hidden = None
        if rewritten is not None and rewritten.copies is not None:
            hidden = rewritten.hidden_from(rows, slots.shape[1])
            slots = torch.cat([slots, slots_of((rewritten.copies,))], dim=1)
        return attention_mask(self.decoder, rows, slots, padded=padded, window=window, hidden=hidden)


def slots_of(sets: Sets) -> Tensor:
    """Returns (B, K): the places of the sets' rows, one set after the other; -1 on padding."""
    return torch.cat([live.slots.masked_fill(~live.valid, -1) for live in sets], dim=1)


def _positions(given: Tensor | None, mask: Tensor | None, valid: Tensor, cache: Any, offset: int) -> Tensor:
    """Returns (B, S) position ids; counted over unpadded tokens where none are given."""
    if given is not None:
        return given.expand(len(valid), -1)
    whole = mask is not None and mask.shape[1] == offset + valid.shape[1]
    if mask is not None and whole:
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -valid.shape[1] :]
    counted = (valid.long().cumsum(dim=1) - 1).clamp(min=0)
    return counted if offset == 0 else counted + cache.layers[0].next_position[:, None]
