"""run_decoder: the one piece of code that runs decoder layers over live tokens.

Everything that differs between dense LLaVA, a fused model and a pruner is which visual tokens are live at which
layer. A schedule decides that; this file does it, over an unmodified Hugging Face decoder.

Letters: B batch, S sequence, L live rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .cache import staged_cache
from .hf import KeyValues, attention_mask, lent_keys, query_weights, run_layer, unwrap, window_of
from .live import LiveSet, VisualRows, move
from .schedule import Dense, Schedule, View


@dataclass(frozen=True, eq=False)
class DecoderOutput:
    """What run_decoder returns.

    Attributes:
        last_hidden_state: (B, S, D), normed. Valid at text positions; at a position that was not live in the last
            layer it is zero or means nothing.
        past_key_values: the cache, when one was asked for.
        sets: one entry a layer, each the live sets that the layer ran on (`kv` layers: visual and text apart).
        positions: (B, S) int64 position ids.
        offset: length of the sequence that the cache held before.
    """

    last_hidden_state: Tensor
    past_key_values: Any
    sets: tuple[tuple[LiveSet, ...], ...]
    positions: Tensor
    offset: int

    @property
    def live(self) -> list[list[Tensor]]:
        """One entry a layer, each one int64 tensor a sample: position ids of the tokens that the layer ran on."""
        known: dict[tuple[int, ...], list[Tensor]] = {}
        for sets in self.sets:
            key = tuple(map(id, sets))
            if key not in known:
                rows = [self._of_sample(sets, sample) for sample in range(len(self.positions))]
                known[key] = rows
        return [known[tuple(map(id, sets))] for sets in self.sets]

    def _of_sample(self, sets: tuple[LiveSet, ...], sample: int) -> Tensor:
        slots = torch.cat([live.slots[sample][live.valid[sample]] for live in sets])
        return self.positions[sample][slots.sort().values - self.offset]


def run_decoder(  # noqa: PLR0913  # a contract with the outside
    language_model: nn.Module,
    inputs_embeds: Tensor,
    visual: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    schedule: Schedule | None = None,
    past_key_values: Any = None,
    use_cache: bool = False,
    visual_embeds: Tensor | None = None,
    queries: Tensor | None = None,
) -> DecoderOutput:
    """Runs a decoder's layers over the tokens that the schedule says are live.

    Args:
        language_model: a Llama, Mistral, Qwen2, Qwen3 or SmolLM3 model (e.g. `LlamaModel`), also wrapped.
        inputs_embeds: (B, S, D).
        visual: (B, S) bool, the visual tokens.
        attention_mask: (B, S), 0 on padding of any side; with a filled cache also the whole (B, seen + S). None: no
            padding.
        position_ids: (B, S) or (1, S). None: counted over the unpadded tokens, going on from the cache.
        schedule: None is dense.
        past_key_values: None, an empty DynamicCache, or the cache of an earlier call. In decode steps each layer
            attends to whatever its cache holds.
        use_cache: fill and return a cache. Ignored under gradient checkpointing, as transformers does.
        visual_embeds: (R, D), the visual tokens in order, where `inputs_embeds` does not hold them yet. Layers
            before the first one that sees vision then stay out of its graph.
        queries: (B, S) bool, the tokens that stand for the instruction where a schedule reads attention (several:
            the mean). None: the last unpadded token.

    Returns:
        DecoderOutput.

    Raises:
        UnsupportedDecoderError: another kind of decoder.
        ValueError: the schedule does not fit the decoder; a cache of another model.
    """
    decoder = unwrap(language_model)
    schedule = schedule or Dense()
    schedule.check(len(decoder.layers))
    checkpointing = decoder.training and getattr(decoder.layers[0], "gradient_checkpointing", False)
    cached = (use_cache or past_key_values is not None) and not checkpointing
    cache = staged_cache(past_key_values, len(decoder.layers)) if cached else None
    run = _Run(decoder, schedule, cache, visual, attention_mask, position_ids, queries)
    hidden = run.all_layers(inputs_embeds, visual_embeds)
    hidden = run.rows.put(decoder.norm(hidden), inputs_embeds.shape[1], run.offset)
    return DecoderOutput(hidden, cache, tuple(run.sets), run.positions, run.offset)


class _Run:
    """One call of run_decoder: the live rows of the layer at hand, and the masks and rotary made for them."""

    def __init__(
        self,
        decoder: Any,
        schedule: Schedule,
        cache: Any,
        visual: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        queries: Tensor | None,
    ) -> None:
        size = visual.shape[1]
        self.decoder, self.schedule, self.cache = decoder, schedule, cache
        self.offset = cache.get_seq_length() if cache is not None else 0
        self.length = self.offset + size
        self.valid = torch.ones_like(visual) if mask is None else mask[:, -size:].bool()
        self.visual = visual & self.valid
        self.positions = _positions(positions, mask, self.valid, cache, self.offset)
        self.queries = self._last_token() if queries is None else queries & self.valid
        self.none = torch.zeros_like(visual)
        self.everything = LiveSet.of_sequence(self.valid, self.offset)
        self.known: dict[Any, Any] = {id(self.visual): self.everything}
        self.sets: list[tuple[LiveSet, ...]] = []
        self.rows = self.everything  # the rows that `hidden` holds
        self.trace: tuple[int, Tensor, LiveSet, KeyValues, LiveSet | None] | None = None

    def all_layers(self, embeds: Tensor, visual_embeds: Tensor | None) -> Tensor:
        """Returns the hidden states after the last layer, at `self.rows`."""
        decode = self.offset > 0 and embeds.shape[1] == 1  # a one-token step is text: no schedule runs
        separate = visual_embeds is not None
        if not separate and not decode and not isinstance(self.schedule, Dense):
            visual_embeds = embeds[self.visual]
        view = View(len(self.decoder.layers), 0, self.visual, self.none, self.visual, self._attention)
        hidden, source = embeds, None
        if visual_embeds is not None:
            source = VisualRows.of(self.visual, visual_embeds)
        for number in range(len(self.decoder.layers)):
            view.layer = number
            live = self.visual if decode else self.schedule.live(view)
            if number == 0 and not decode:
                hidden = self._enter_first(hidden, live, source if separate else None)
            hidden = self._step(number, hidden, live, source)
            view.live = live
        if self.cache is not None:
            self._close_cache()
        return hidden

    def _enter_first(self, embeds: Tensor, live: Tensor, source: VisualRows | None) -> Tensor:
        """Returns the first layer's rows: text alone where it sees no image, else the merged sequence."""
        if live is self.none or self.schedule.update == "kv":
            self.rows = self._set_of(self.none)
            return self.rows.take(embeds, self.offset)
        if source is not None:
            embeds = embeds.masked_scatter(self.visual[..., None], source.rows.to(embeds.dtype))
        return embeds

    def _step(self, number: int, hidden: Tensor, live: Tensor, source: VisualRows | None) -> Tensor:
        """Returns the output of one layer, after moving to its live rows."""
        lending = self.schedule.update == "kv" and live is not self.none and source is not None
        lending = lending and len(source.rows) > 0  # type: ignore[union-attr]
        rows = self._set_of(self.none if lending else live)
        if rows is not self.rows:
            entering = None if rows is self._set_of(self.none) else source
            hidden = move(hidden, self.rows, rows, entering, self.visual.shape[1], self.offset)
        self.rows = rows
        lent = self._lent_set(live) if lending else None
        keys = self._keys(number, lent, source)
        sets = (rows,) if lent is None else (lent, rows)
        mask = self._mask(number, sets)
        layer = self.decoder.layers[number]
        output = run_layer(layer, hidden, mask, self._positions_of(rows), keys, self._rotary(rows, hidden))
        if keys is not None and self.schedule.reads_attention and live is not self.none:
            self.trace = (number, hidden.detach(), rows, keys, lent)
        self.sets.append(sets)
        return output

    def _set_of(self, live: Tensor) -> LiveSet:
        """Returns the rows of text and `live` visual tokens; made once for each choice of the schedule."""
        if id(live) not in self.known:
            mask = live | (self.valid & ~self.visual)
            # `live` is kept beside its set: a freed tensor's id could come back as another's
            self.known[id(live)] = LiveSet.of_mask(mask, self.offset)
            self.known[id(live), "owner"] = live
        return self.known[id(live)]

    def _lent_set(self, live: Tensor) -> LiveSet:
        key = (id(live), "lent")
        if key not in self.known:
            self.known[key] = LiveSet.of_mask(live, self.offset, at_least=1)
            self.known[id(live), "owner"] = live
        return self.known[key]

    def _keys(self, number: int, lent: LiveSet | None, source: VisualRows | None) -> KeyValues | None:
        """Returns what stands in the place of the layer's cache, or None where nothing has to."""
        stored = self.cache.layers[number] if self.cache is not None else None
        lend = None
        if lent is not None and source is not None:
            key = ("embeds", id(lent))
            if key not in self.known:
                self.known[key] = source.take(lent, self.offset)
            rows = self.known[key]
            lend = partial(lent_keys, self.decoder.layers[number], rows, self._rotary(lent, rows))
        if stored is None and lend is None and not self.schedule.reads_attention:
            return None
        return KeyValues(stored, lend)

    def _mask(self, number: int, sets: tuple[LiveSet, ...]) -> Any:
        """Returns the layer's attention mask; made once for each live set and window where no cache is filled."""
        rows, window = sets[-1], window_of(self.decoder, number, self.length)
        if self.cache is not None:
            stored = self.cache.layers[number]
            for live in sets:
                stored.extend(live)
            return attention_mask(self.decoder, rows, stored.slots, stored.padded, window)
        key = ("mask", window, *map(id, sets))
        if key not in self.known:
            slots = torch.cat([live.slots.masked_fill(~live.valid, -1) for live in sets], dim=1)
            padded = any(live.padded for live in sets)
            self.known[key] = attention_mask(self.decoder, rows, slots, padded, window)
        return self.known[key]

    def _positions_of(self, rows: LiveSet) -> Tensor:
        return self.positions if rows.whole else self.positions.gather(1, rows.slots - self.offset)

    def _rotary(self, rows: LiveSet, like: Tensor) -> tuple[Tensor, Tensor]:
        key = ("rotary", id(rows))
        if key not in self.known:
            self.known[key] = self.decoder.rotary_emb(like, self._positions_of(rows))
        return self.known[key]

    def _close_cache(self) -> None:
        following = self.positions.max(dim=1).values + 1
        for layer in self.cache.layers:
            layer.seen = self.length
            layer.next_position = following

    def _last_token(self) -> Tensor:
        """Returns (B, S) bool: each sample's last unpadded token."""
        size = self.valid.shape[1]
        places = torch.arange(size, device=self.valid.device)
        last = places.where(self.valid, -1).max(dim=1, keepdim=True).values
        return places == last

    @torch.no_grad()
    def _attention(self) -> Tensor:
        """See View.attention: one row of softmax a query token, never the whole matrix."""
        if self.trace is None:
            raise ValueError("a schedule read attention before any layer saw visual tokens")
        number, hidden, rows, keys, lent = self.trace
        size = self.valid.shape[1]
        asking = LiveSet.of_mask(self.queries, self.offset)
        places = torch.arange(rows.slots.shape[1], device=hidden.device).expand(len(hidden), -1)
        index = rows.spread(places, size, 0, self.offset).gather(1, asking.slots - self.offset)
        queried = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        slots = self._key_slots(number, rows, lent)
        seen = (slots >= 0)[:, None] & (slots[:, None] <= asking.slots[..., None])
        window = window_of(self.decoder, number, self.length)
        if window is not None:
            seen &= asking.slots[..., None] - slots[:, None] < window
        rotary = self.decoder.rotary_emb(hidden, self._positions_of(asking))
        weights = query_weights(self.decoder.layers[number], queried, keys.keys, seen, rotary).mean(dim=1)  # (B, Q, K)
        weights = weights.masked_fill(~asking.valid[..., None], 0.0).sum(dim=1)
        weights = weights / asking.valid.sum(dim=1, keepdim=True).clamp(min=1)
        current = slots - self.offset
        kept = (slots >= 0) & (current >= 0)
        # padding columns add their zeros to place 0
        return weights.new_zeros(len(slots), size).scatter_add(
            1, current.where(kept, 0), weights.masked_fill(~kept, 0.0)
        )

    def _key_slots(self, number: int, rows: LiveSet, lent: LiveSet | None) -> Tensor:
        if self.cache is not None:
            return self.cache.layers[number].slots
        sets = (rows,) if lent is None else (lent, rows)
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
