"""Zeroes or moves attention weights after the softmax, without computing them.

A weight set to 0 after the softmax, nothing renormalised, is a weight on a value vector of zeros; a weight given to
another token is a weight on that token's value vector. So the layer's attention runs unchanged on changed values, under
any backend. Where text and visual queries need different values for the same visual keys, these keys are duplicated,
and a mask selects the copy for each query: one more key per visual token, and no matrix of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .live_tokens import LiveTokens


@dataclass(frozen=True, eq=False)
class ValueRemap:
    """Which value vector each visual key contributes after the softmax, in one layer of a prefill.

    Attributes:
        text: (B, S) int64: for text queries, the place whose value vector replaces that of the visual key at each
            place; -1: a zero vector, so the weight is lost. Only visual places are read. None: no replacement.
        visual: the same for visual queries; the same object as `text` when the two do not differ.
        hides: text queries do not see visual keys at all, before the softmax: `text` is not read then, and their
            weights on text add up to 1.
    """

    text: Tensor | None
    visual: Tensor | None
    hides: bool = False


class BoundValueRemap:
    """A ValueRemap, resolved to the columns that a layer's attention adds in this call."""

    def __init__(
        self, remap: ValueRemap, slots: Tensor, visual: Tensor, offset: int, copies: LiveTokens | None
    ) -> None:
        """Resolves the source column of each column's value.

        `slots` (B, C) are those of the columns, -1 on padding; `visual` (B, S) marks the visual tokens; `offset` is the
        slot of the input's first token. `copies` are the visual tokens among the columns, where they run queries too;
        None where only text queries run; none of them where the remap hides vision, so that text has no copy to see.
        """
        self.visual = visual
        # visual columns that are there a second time, for text queries alone
        self.copies = copies if remap.hides or (copies is not None and remap.text is not remap.visual) else None
        places = (slots - offset).clamp(min=0)
        self.is_visual = visual.gather(1, places) & (slots >= 0)  # (B, C)
        numbers = torch.arange(slots.shape[1], device=slots.device).expand(len(slots), -1)
        size = visual.shape[1]
        # column of each place; padding writes to an extra place, where "none" (-1) also finds its -1
        self.column = numbers.new_full((len(slots), size + 1), -1)
        self.column.scatter_(1, places.where(slots >= 0, size), numbers)
        self.column[:, size] = -1
        wanted = remap.text if copies is None else remap.visual
        source = None if wanted is None else self._source_columns(wanted, places)
        self.source = None if source is None else source.where(self.is_visual, numbers)
        if self.copies is not None:
            at = self.copies.places
            self.copied = self.column.gather(1, at)
            self.copied_values = self.copied if remap.text is None else self._source_columns(remap.text, at)

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values (B, G, K + V, d) for the attention; the last C of the K given are this call's."""
        columns = self.is_visual.shape[1]
        before = values.shape[2] - columns
        new_keys, new_values, changed = keys[:, :, before:], values[:, :, before:], values
        if self.source is not None:
            changed = torch.cat([values[:, :, :before], _take(new_values, self.source)], dim=2)
        if self.copies is None:
            return keys, changed
        keys = torch.cat([keys, _take(new_keys, self.copied)], dim=2)
        return keys, torch.cat([changed, _take(new_values, self.copied_values)], dim=2)

    def hidden_from(self, rows: LiveTokens, keys: int) -> Tensor:
        """Returns (B, L, K + V) bool: the copies of the visual keys that each query of `rows` must not see."""
        is_visual_query = self.visual.gather(1, rows.places)[..., None]  # (B, L, 1): a visual query
        is_visual_key = torch.nn.functional.pad(self.is_visual, (keys - self.is_visual.shape[1], 0))
        originals = ~is_visual_query & is_visual_key[:, None]
        return torch.cat([originals, is_visual_query.expand(-1, -1, self.copied.shape[1])], dim=2)

    def _source_columns(self, wanted: Tensor, places: Tensor) -> Tensor:
        """Returns the column of the value vector that replaces that of the key at each of `places`; -1: zero."""
        source = wanted.gather(1, places)
        return self.column.gather(1, source.where(source >= 0, self.visual.shape[1]))


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Returns (B, G, X, d): columns `index` (B, X) of `rows` (B, G, C, d), zeros where it is -1."""
    wide = index.clamp(min=0)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
    return rows.gather(2, wide).masked_fill((index < 0)[:, None, :, None], 0.0)
