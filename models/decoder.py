"""run_decoder: the one piece of code that runs decoder layers over live tokens.

Everything that differs between dense LLaVA, a fused model and a pruner is which visual tokens are live at which
layer. A schedule decides that; this file does it, over an unmodified Hugging Face decoder.

Letters: B batch, S sequence, L live rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .cache import staged_cache
from .hf import KeyValues, lent_keys, run_layer, unwrap
from .layout import Layout, Sets
from .live import LiveSet, VisualRows, move
from .reader import Reader, Trace
from .rewrite import Rewrite, Rewritten
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
        queries: (B, S) bool, the text tokens that stand for the instruction where a schedule reads attention (several:
            the mean). None, or a sample without one: its last text token.

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
    layout = Layout(decoder, cache, visual, attention_mask, position_ids, schedule.renumbers)
    run = _Run(decoder, schedule, cache, layout, queries)
    hidden = run.all_layers(inputs_embeds, visual_embeds)
    hidden = run.rows.put(decoder.norm(hidden), inputs_embeds.shape[1], layout.offset)
    return DecoderOutput(hidden, cache, tuple(run.sets), layout.positions, layout.offset)


class _Run:
    """One call of run_decoder: the live rows of the layer at hand, moved from layer to layer."""

    def __init__(self, decoder: Any, schedule: Schedule, cache: Any, layout: Layout, queries: Tensor | None) -> None:
        self.decoder, self.schedule, self.cache, self.layout = decoder, schedule, cache, layout
        self.reader = Reader(decoder, queries, layout, self._lent)
        self.sets: list[Sets] = []
        self.rows = layout.everything  # the rows that the hidden states at hand hold
        self.source: VisualRows | None = None
        self._embeds: dict[LiveSet, Tensor] = {}

    def all_layers(self, embeds: Tensor, visual_embeds: Tensor | None) -> Tensor:
        """Returns the hidden states after the last layer, at `self.rows`."""
        layout, separate = self.layout, visual_embeds is not None
        # a one-token step is text: no schedule runs, each layer attends to what its cache holds
        blind = layout.offset > 0 and embeds.shape[1] == 1
        if not separate and not blind and not isinstance(self.schedule, Dense):
            visual_embeds = embeds[layout.visual]
            blind = len(visual_embeds) == 0
        if visual_embeds is not None and not blind:
            self.source = VisualRows.of(layout.visual, visual_embeds)
        view, hidden = self._view(), embeds
        for number in range(len(self.decoder.layers)):
            view.layer, view.seen_at = number, self.reader.layer
            view.ahead, view.states = partial(self._ahead, number, hidden), partial(self._states, hidden, self.rows)
            live = layout.visual if blind else self.schedule.live(view)
            if number == 0 and not blind:
                hidden = self._enter_first(hidden, live, separate)
            rule = None if blind or live is layout.none else self.schedule.rewrite(view)
            hidden = self._step(number, hidden, live, rule)
            view.live = live
        if not blind:
            view.layer, view.seen_at = len(self.decoder.layers), self.reader.layer
            view.states = partial(self._states, hidden, self.rows)
            self.schedule.close(view)
        if self.cache is not None:
            self._close_cache()
        return hidden

    def _view(self) -> View:
        return View(
            num_layers=len(self.decoder.layers),
            layer=0,
            visual=self.layout.visual,
            none=self.layout.none,
            live=self.layout.visual,
            seen_at=None,
            attention=self.reader.attention,
            ahead=self.reader.attention,  # each layer gets its own
            row=self.reader.row,
            states=self.reader.attention,  # likewise
        )

    def _states(self, hidden: Tensor, rows: LiveSet) -> Tensor:
        return rows.put(hidden, self.layout.visual.shape[1], self.layout.offset)

    def _ahead(self, number: int, hidden: Tensor) -> Tensor:
        stored = self.cache.layers[number] if self.cache is not None else None
        return self.reader.ahead(number, hidden, self.rows, stored)

    def _enter_first(self, embeds: Tensor, live: Tensor, separate: bool) -> Tensor:
        """Returns the first layer's rows: text alone where it sees no image, else the merged sequence."""
        if live is self.layout.none or self.schedule.update == "kv":
            self.rows = self.layout.set_of(self.layout.none)
            return self.rows.take(embeds, self.layout.offset)
        if separate and self.source is not None:
            embeds = embeds.masked_scatter(self.layout.visual[..., None], self.source.rows.to(embeds.dtype))
        return embeds

    def _step(self, number: int, hidden: Tensor, live: Tensor, rule: Rewrite | None) -> Tensor:
        """Returns the output of one layer, after moving to its live rows."""
        layout, none = self.layout, self.layout.none
        lending = self.schedule.update == "kv" and live is not none and self.source is not None
        lending = lending and len(self.source.rows) > 0  # type: ignore[union-attr]
        rows = layout.set_of(none if lending else live)
        if rows is not self.rows:
            entering = None if rows is layout.set_of(none) else self.source
            hidden = move(hidden, self.rows, rows, entering, layout.visual.shape[1], layout.offset)
        self.rows = rows
        sets = (layout.visual_set(live), rows) if lending else (rows,)
        positions = layout.positions_at(number, sets)
        rewritten = None if rule is None else layout.rewritten(rule, sets, live)
        keys = self._keys(number, self._lent(number, sets[0], positions) if lending else None, rewritten)
        mask, slots = layout.mask(number, sets, rewritten)
        layer, rotary = self.decoder.layers[number], layout.rotary(rows, hidden, positions)
        output = run_layer(layer, hidden, mask, layout.of_rows(rows, positions), keys, rotary)
        if keys is not None and self.schedule.reads_attention and live is not none:
            self.reader.trace = Trace(number, hidden.detach(), sets, keys, slots, positions)
        self.sets.append(sets)
        return output

    def _lent(self, number: int, lent: LiveSet, positions: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Returns the function that makes a layer's keys and values of visual tokens that run no query."""
        # gathered here, not inside it: under checkpointing a layer's inside runs without a graph first
        if lent not in self._embeds:
            self._embeds[lent] = self.source.take(lent, self.layout.offset)  # type: ignore[union-attr]
        rows = self._embeds[lent]
        return partial(lent_keys, self.decoder.layers[number], rows, self.layout.rotary(lent, rows, positions))

    def _keys(self, number: int, lend: Any, rewritten: Rewritten | None) -> KeyValues | None:
        """Returns what stands in the place of the layer's cache, or None where nothing has to."""
        stored = self.cache.layers[number] if self.cache is not None else None
        if stored is None and lend is None and rewritten is None and not self.schedule.reads_attention:
            return None
        return KeyValues(stored, lend, rewritten)

    def _close_cache(self) -> None:
        following = self.layout.positions.max(dim=1).values + 1
        for layer in self.cache.layers:
            layer.seen = self.layout.length
            layer.next_position = following
