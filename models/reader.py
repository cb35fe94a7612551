"""What instruction tokens attend to: a row of softmax each, computed apart from the layer's own run, in O(n).

Letters: B batch, S sequence, L live rows, Q instruction tokens, K keys, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hf import KeyValues, projected_keys, query_weights, window_of
from .layout import Layout, Sets, slots_of
from .live import LiveSet


@dataclass(frozen=True, eq=False)
class AttentionRow:
    """One query token's attention in one layer.

    Attributes:
        layer: the layer.
        weights: (B, H, K) float32, after the softmax; 0 on keys that the query does not see.
        values: (B, G, K, d), the value vectors of the keys; G divides H.
        places: (B, K) int64, each key's place in the input, 0 ... S-1; -1 on padding and on keys of an earlier call.
    """

    layer: int
    weights: Tensor
    values: Tensor
    places: Tensor

    def influence(self) -> tuple[Tensor, Tensor]:
        """Returns cos(o - c, o) and |c| squared for every key, each (B, K) float32.

        o is the query's attention output, heads concatenated, c = w v what one key adds to it. Both follow from o . o,
        o . c and c . c, so that no (B, K, D) tensor of contributions is made.

        Source: VisiPruner, arXiv 2510.17205, section 3.6.
        """
        values = self.values.float()
        weights = self.weights.unflatten(1, (values.shape[1], -1))  # (B, G, H / G, K)
        output = weights @ values  # (B, G, H / G, d)
        along = (weights * (output @ values.transpose(2, 3))).sum(dim=(1, 2))  # o . c
        squared = (weights.square().sum(dim=2) * values.square().sum(dim=3)).sum(dim=1)  # c . c
        whole = output.square().sum(dim=(1, 2, 3))[:, None]  # o . o
        rest = (whole - 2 * along + squared).clamp(min=0)  # |o - c| squared
        return (whole - along) / (rest * whole).sqrt().clamp(min=1e-8), squared

    def at_keys(self, per_place: Tensor) -> Tensor:
        """Returns (B, K) bool: a mask of the input's tokens (B, S) at the keys, False on keys without a place."""
        return per_place.gather(1, self.places.clamp(min=0)) & (self.places >= 0)

    def spread(self, per_key: Tensor, size: int, fill: float) -> Tensor:
        """Returns (B, size): a value per key (B, K) at the keys' places, `fill` where no key stands."""
        return _spread(per_key, self.places, size, fill)


@dataclass(frozen=True, eq=False)
class Trace:
    """What is kept of a layer that saw visual tokens, until the next one.

    Attributes:
        layer: its number.
        hidden: (B, L, D), its input.
        sets: the live sets that it ran on; the last one are its rows.
        keys: the keys and values that its attention used.
        slots: (B, K) their places in the whole sequence, -1 on padding.
        positions: (B, S) the position ids that it ran with.
    """

    layer: int
    hidden: Tensor
    sets: Sets
    keys: KeyValues
    slots: Tensor
    positions: Tensor


class Reader:
    """Reads attention for a schedule. The executor makes one a run and tells it of every layer that sees vision."""

    def __init__(
        self,
        decoder: Any,
        queries: Tensor | None,
        layout: Layout,
        lend: Callable[[int, LiveSet, Tensor], Callable[[], tuple[Tensor, Tensor]]],
    ) -> None:
        """Keeps what a run never changes.

        Args:
            decoder: the Hugging Face decoder.
            queries: (B, S) bool, the instruction tokens; None, or a sample without one: its last text token.
            layout: where the run's tokens stand.
            lend: returns a function that makes a layer's keys and values of visual tokens that only lend them.
        """
        self.decoder, self.queries, self.layout, self.lend = decoder, queries, layout, lend
        self.trace: Trace | None = None
        self._asking_set: LiveSet | None = None
        self._sights: dict[Any, tuple[Tensor, Tensor, Any]] = {}

    @property
    def layer(self) -> int | None:
        """The last layer that saw visual tokens, or None."""
        return None if self.trace is None else self.trace.layer

    @torch.no_grad()
    def attention(self) -> Tensor:
        """Returns (B, S): see View.attention."""
        trace = self._traced()
        return self._mean(self._weights(trace.layer, trace, trace.keys.keys), trace.slots)

    @torch.no_grad()
    def ahead(self, layer: int, hidden: Tensor, rows: LiveSet, stored: Any) -> Tensor:
        """Returns (B, S): the attention that `layer` would pay, with its own norm and projections.

        Args:
            layer: the layer that is about to run.
            hidden: (B, L, D), what it would run on.
            rows: the live set of `hidden`.
            stored: the layer's own cache, or None.
        """
        past = self._traced()
        module = self.decoder.layers[layer]
        keys = projected_keys(module, hidden, self.layout.rotary(rows, hidden, past.positions))
        sets = (*past.sets[:-1], rows)
        if len(sets) > 1:
            keys = torch.cat([self.lend(layer, sets[0], past.positions)()[0], keys], dim=2)
        slots = slots_of(sets)
        if stored is not None and stored.slots is not None:
            keys, slots = torch.cat([stored.keys, keys], dim=2), torch.cat([stored.slots, slots], dim=1)
        now = Trace(layer, hidden, sets, past.keys, slots, past.positions)
        return self._mean(self._weights(layer, now, keys), slots)

    @torch.no_grad()
    def row(self) -> AttentionRow:
        """Returns the last instruction token's row: see View.row."""
        trace = self._traced()
        weights, asking = self._weights(trace.layer, trace, trace.keys.keys), self._asking()
        if weights.shape[2] > 1:
            last = (asking.valid.sum(dim=1) - 1).clamp(min=0)[:, None, None, None]
            weights = weights.gather(2, last.expand(-1, weights.shape[1], 1, weights.shape[3]))
        if asking.padded:  # a sample without text pays nothing
            weights = weights.masked_fill(~asking.valid[:, :1, None, None], 0.0)
        return AttentionRow(trace.layer, weights[:, :, 0], trace.keys.values, self._places(trace.slots))

    def _traced(self) -> Trace:
        if self.trace is None:
            raise ValueError("a schedule read attention before any layer saw visual tokens")
        return self.trace

    def _asking(self) -> LiveSet:
        if self._asking_set is None:
            asking = last = self.layout.last_text_token()
            if self.queries is not None:
                asking = self.queries & self.layout.valid & ~self.layout.visual
                asking = asking.where(asking.any(dim=1, keepdim=True), last)
            self._asking_set = LiveSet.of_mask(asking, self.layout.offset, at_least=1)
        return self._asking_set

    def _weights(self, layer: int, trace: Trace, keys: Tensor) -> Tensor:
        """Returns (B, H, Q, K) float32: the softmax of the instruction tokens' rows."""
        hidden, asking = trace.hidden, self._asking()
        index, seen = self._sight(layer, trace.sets[-1], trace.slots)
        queried = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        rotary = self.layout.rotary(asking, hidden, trace.positions)
        return query_weights(self.decoder.layers[layer], queried, keys, seen, rotary)

    def _sight(self, layer: int, rows: LiveSet, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Returns where the instruction tokens stand among the rows (B, Q), and the keys that they see (B, Q, K)."""
        window = window_of(self.decoder, layer, self.layout.length)
        key = (id(rows), id(slots), window)
        if key not in self._sights:
            asking, offset = self._asking(), self.layout.offset
            places = torch.arange(rows.slots.shape[1], device=slots.device).expand(len(slots), -1)
            where = rows.spread(places, self.layout.visual.shape[1], 0, offset)
            seen = (slots >= 0)[:, None] & (slots[:, None] <= asking.slots[..., None])
            if window is not None:
                seen &= asking.slots[..., None] - slots[:, None] < window
            owners = rows, slots  # kept, so that their ids stay theirs
            self._sights[key] = where.gather(1, asking.slots - offset), seen, owners
        index, seen, _ = self._sights[key]
        return index, seen

    def _mean(self, weights: Tensor, slots: Tensor) -> Tensor:
        """Returns (B, S): the mean over heads and instruction tokens, at the keys' places, 0 elsewhere."""
        valid = self._asking().valid
        mean = weights.mean(dim=1).masked_fill(~valid[..., None], 0.0).sum(dim=1)
        mean = mean / valid.sum(dim=1, keepdim=True).clamp(min=1)
        return _spread(mean, self._places(slots), self.layout.visual.shape[1], 0.0)

    def _places(self, slots: Tensor) -> Tensor:
        offset = self.layout.offset
        return torch.where(slots >= offset, slots - offset, -1) if offset > 0 else slots


def _spread(per_key: Tensor, places: Tensor, size: int, fill: float) -> Tensor:
    # keys without a place go to a column of their own, cut off again
    full = per_key.new_full((len(per_key), size + 1), fill)
    return full.scatter(1, places.where(places >= 0, size), per_key)[:, :size]
