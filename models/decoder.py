"""run_decoder: the one loop that runs decoder layers over live tokens.

A dense model, a fused one and a pruner differ only in which visual tokens are live at which layer. A schedule chooses
them; this file runs the layers of an unmodified Hugging Face decoder on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache as remembered
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import (
    AttentionProbe,
    CacheShim,
    ProbedLayer,
    Rotary,
    Sequences,
    VisualKV,
    attention_mask,
    project_visual_kv,
    rotary,
    rotary_kind,
    run_layer,
    unwrap,
    uses_mrope,
    window_of,
)
from .batch_facts import BatchFacts
from .cache import StagedLayer, staged_cache
from .image_tokens import ImageTokens
from .live_tokens import NO_VISUAL, LayerTokens, LiveTokens, Selection, SequenceState, VisualRows, move, rows_at
from .schedule_base import Dense, Schedule, View
from .token_scorer import SCORER
from .value_remap import BoundValueRemap, ValueRemap


@dataclass(frozen=True, eq=False)
class DecoderOutput:
    """What run_decoder returns."""

    last_hidden_state: Tensor  # (B, S, D), normed; zero or meaningless where the last layer ran on no token
    past_key_values: Any  # the cache, where one was asked for
    layers: tuple[LayerTokens, ...]  # what each layer ran on

    @property
    def live(self) -> list[list[Tensor]]:
        """One entry a layer, each one int64 tensor a sample: the slots of the tokens that the layer ran on.

        A slot is a place in the whole sequence, padding included: the position id, for an unpadded sample of a model
        with one position id a token.
        """
        return [tokens.live for tokens in self.layers]


def run_decoder(  # noqa: PLR0913  # relied on from outside
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
    query_mask: Tensor | None = None,
    answers: Tensor | None = None,
    blocks: Tensor | None = None,
    deepstack: Sequence[Tensor] = (),
    tower: ImageTokens | None = None,
    relevance: Tensor | None = None,
    facts: BatchFacts | None = None,
    packed: bool = False,
) -> DecoderOutput:
    """Runs the layers of a decoder over the tokens that the schedule says are live.

    Args:
        language_model: one of SUPPORTED_DECODERS (e.g. `LlamaModel`), also wrapped.
        inputs_embeds: (B, S, D), the visual tokens merged in.
        visual: (B, S) bool, the visual tokens.
        attention_mask: (B, S), 0 on padding of any side; with a filled cache also the whole (B, seen + S). None: no
            padding.
        position_ids: (B, S) or (1, S); (3, B, S) or (4, B, S) under M-RoPE. None: counted over the unpadded tokens,
            going on from the cache.
        schedule: None is dense.
        past_key_values: None, an empty DynamicCache, or the cache of an earlier call. In decode steps each layer
            attends to what its cache holds.
        use_cache: fill and return a cache. Ignored under gradient checkpointing, as in transformers.
        visual_embeds: (R, D), the visual tokens in order, when `inputs_embeds` lacks them or their gradient. Layers
            before the first one that sees vision then stay out of their graph. Rows beyond the number of visual tokens
            only take part in the graph.
        query_mask: (B, S) bool, the text tokens that represent the instruction when a schedule reads attention (their
            mean). None, or a sample without any: its last text token.
        answers: (B, S) bool, the tokens to predict, hidden from a learned scorer. It reads the other text up to the
            last token of `query_mask`; without `answers`, the text up to the first one.
        blocks: (B, S) or (B, seen + S) int64, image blocks whose tokens attend in both directions, -1: none.
        deepstack: features (R, D), added one by one to the visual tokens after the first layers that see vision.
        tower: output of the vision tower, for a schedule with `reads_tower`.
        relevance: (B, S), the relevance of each visual token to the question, for CDPruner.
        facts: counts of a training batch without a cache, which avoid device synchronisations. None: read from the
            device.
        packed: each layer runs on one row, the live tokens of all samples without padding; no sample sees another.
            Without a cache, under a schedule that trains. The output is the same.

    Raises:
        UnsupportedDecoderError: another kind of decoder.
        ValueError: the schedule does not fit the decoder; a cache of another model; packed rows with a cache or a
            schedule that does not train.
    """
    decoder = unwrap(language_model)
    schedule = schedule or Dense()
    schedule.check(len(decoder.layers))
    if schedule.renumbers and uses_mrope(decoder):
        raise ValueError(
            f"schedule: got {schedule}, which renumbers positions, expected renumber=False: {type(decoder).__name__} "
            "has three position ids a token"
        )
    checkpointing = decoder.training and getattr(decoder.layers[0], "gradient_checkpointing", False)
    options = getattr(getattr(decoder.layers[0], "_gradient_checkpointing_func", None), "keywords", {})
    if checkpointing and options.get("use_reentrant") and (schedule.update == "kv" or schedule.differentiable):
        under = "the `kv` update" if schedule.update == "kv" else "a choice of tokens with gradients"
        raise ValueError(f"gradient checkpointing: got use_reentrant=True, expected False under {under}")
    if packed and (use_cache or past_key_values is not None or not schedule.trainable):
        what = "a cache" if schedule.trainable else type(schedule).__name__
        raise ValueError(
            f"packed: got True with {what}, expected a forward without a cache under a schedule that trains"
        )
    cached = (use_cache or past_key_values is not None) and not checkpointing
    if cached and schedule.gate_at(0) is not None:
        raise ValueError("use_cache: got a cache under gates, expected none: they are for training")
    cache = staged_cache(past_key_values, len(decoder.layers)) if cached else None
    known = facts if cache is None else None  # of this batch alone, not of what a cache holds
    state = SequenceState(visual, attention_mask, position_ids, cache, blocks, known, packed)
    probe = AttentionProbe(
        decoder,
        query_mask,
        state,
        counts=None if known is None else known.queries,
        answers=answers,
        differentiable=schedule.differentiable and torch.is_grad_enabled(),
    )
    run = _Run(decoder, schedule, cache, state, probe, tower, relevance)
    if state.offset > 0 and state.stride == state.offset + 1:  # a decode step
        hidden = run.run_text_only(inputs_embeds)
    else:
        hidden = run.run_schedule(inputs_embeds, visual, visual_embeds, deepstack)
    if cache is not None:
        following = state.positions.amax(dim=-1) + 1
        for layer in cache.layers:
            layer.seen = state.length
            layer.next_position = following if following.ndim == 1 else following.amax(dim=0)
    hidden = run.rows.put(decoder.norm(hidden), state.size)
    return DecoderOutput(state.by_sample(hidden), cache, tuple(run.layers))


class _Run:
    """One call of run_decoder: hidden states, moved from layer to layer.

    What layers are called with is made once for each set of tokens.
    """

    def __init__(
        self,
        decoder: Any,
        schedule: Schedule,
        cache: Any,
        state: SequenceState,
        probe: AttentionProbe,
        tower: ImageTokens | None,
        relevance: Tensor | None,
    ) -> None:
        self.decoder, self.schedule, self.state = decoder, schedule, state
        self.tower, self.relevance = tower, relevance
        self.depth = len(decoder.layers)
        self.stored: list[StagedLayer | None] = [None] * self.depth if cache is None else cache.layers
        self.probe = probe
        self.mrope = uses_mrope(decoder)
        self.layers: list[LayerTokens] = []
        self.rows = state.rows_of(state.all_visual)  # the tokens that the current hidden states belong to
        self.visual_rows: VisualRows | None = None
        self.gates: Tensor | None = None  # (B, S), of the values of this layer's keys: see Schedule.token_gates
        self._masks: dict[tuple[Any, ...], Any] = {}
        self._rotary: dict[tuple[LiveTokens, str | None], Rotary] = {}
        self._remaps: dict[tuple[ValueRemap, LayerTokens], BoundValueRemap] = {}
        self._taken: dict[tuple[VisualRows, LiveTokens], Tensor] = {}

    def run_text_only(self, embeds: Tensor) -> Tensor:
        """Returns the hidden states after the last layer without asking the schedule.

        For a batch without visual tokens, and for a decode step, in which each layer attends to what its cache holds.
        """
        tokens = self.state.tokens_of(self.state.all_visual, kv_only=False)
        hidden = self._gathered(embeds, tokens.rows)
        for number in range(self.depth):
            hidden = self._layer(number, hidden, tokens, remap=None, is_probed=False)
            self.layers.append(tokens)
        return hidden

    def run_schedule(
        self, embeds: Tensor, visual: Tensor, visual_embeds: Tensor | None, deepstack: Sequence[Tensor]
    ) -> Tensor:
        """Returns the hidden states after the last layer, at `self.rows`."""
        schedule, state, has_unmerged_features = self.schedule, self.state, visual_embeds is not None
        if visual_embeds is None and (deepstack or not isinstance(schedule, Dense)):
            visual_embeds = rows_at(embeds, visual, state.all_visual.counts)
        if visual_embeds is not None and len(visual_embeds) > 0:
            self.visual_rows = VisualRows.of(state.flat(visual), visual_embeds)
        elif not isinstance(schedule, Dense):
            return self.run_text_only(embeds)
        hidden = self._gathered(embeds, self.rows)
        merged = self._merged(hidden, has_unmerged_features)
        view_at = partial(self._view, partial(self._embeddings, merged, self.rows), schedule.new_state())
        live, due = state.all_visual, list(deepstack)
        for number in range(self.depth):
            view = view_at(number, live, hidden)
            live = schedule.live(view)
            sees_vision = live is not NO_VISUAL
            self.gates = schedule.token_gates(view) if sees_vision and self.probe.differentiable else None
            kv_only = sees_vision and schedule.update_at(number) == "kv"
            if number > 0 and kv_only and schedule.update == "full":  # before that the rows are the features
                self._store_visual_states(hidden)
            if number == 0 and sees_vision and not kv_only:
                hidden = merged()
            tokens = state.tokens_of(live, kv_only)
            if tokens.rows is not self.rows:
                entering = self.visual_rows if sees_vision and not kv_only else None
                hidden = move(hidden, self.rows, tokens.rows, entering, state.size)
            states = schedule.visual_states(view) if sees_vision else None
            if states is not None:
                hidden = self._replace(hidden, tokens.rows, states)
            remap = schedule.value_remap(view) if sees_vision else None
            bound = None if remap is None else self._bound(remap, tokens, live)
            hidden = self._gated_layer(number, hidden, tokens, bound, sees_vision and schedule.reads_attention)
            for features in self._due(number, deepstack, due) if due and sees_vision else ():
                hidden = self._add_deepstack(hidden, features, kv_only)
        schedule.on_end(view_at(self.depth, live, hidden))
        return hidden

    def _gathered(self, embeds: Tensor, rows: LiveTokens) -> Tensor:
        """Returns the embeddings (B, S, D) of `rows`, (B, L, D)."""
        return embeds if rows.whole else rows.take(self.state.flat(embeds))

    def _merged(self, hidden: Tensor, has_unmerged_features: bool) -> Callable[[], Tensor]:
        """Returns a function that returns the embeddings (B, L, D) of the rows, the visual rows in their places."""
        visual, rows = self.visual_rows if has_unmerged_features else None, self.rows
        return remembered(lambda: hidden if visual is None else visual.merged_into(hidden, rows))

    def _embeddings(self, merged: Callable[[], Tensor], rows: LiveTokens) -> Tensor:
        """Returns (B, S, D): see View.input_embeddings."""
        return self.state.by_sample(rows.put(merged(), self.state.size))

    def _gated_layer(
        self, number: int, hidden: Tensor, tokens: LayerTokens, remap: BoundValueRemap | None, is_probed: bool
    ) -> Tensor:
        """Returns the output of one layer for hidden states (B, L, D) of its rows, through its gate where it has one.

        Behind a closed gate text runs through the layer alone, and visual tokens stay as they are.
        """
        gate, rows, size = self.schedule.gate_at(number), tokens.rows, self.state.size
        self.layers.append(tokens)
        if gate is None:
            return self._layer(number, hidden, tokens, remap, is_probed)
        text = self.state.tokens_of(NO_VISUAL, kv_only=False)
        closed = self._layer(number, move(hidden, rows, text.rows, None, size), text, remap=None, is_probed=False)
        closed = move(closed, text.rows, rows, None, size)
        closed = torch.where(rows.take(self.state.visual)[..., None], hidden, closed)
        return torch.lerp(closed, self._layer(number, hidden, tokens, remap, is_probed), gate.to(hidden.dtype))

    def _due(self, number: int, deepstack: Sequence[Tensor], due: list[Tensor]) -> list[Tensor]:
        """Returns the DeepStack features that are added after a layer that saw vision; `due` are those still left."""
        ratios = self.schedule.deepstack_ratios(number, len(deepstack))
        if ratios is None:
            return [due.pop(0)]
        return [features * ratio.to(features.dtype) for features, ratio in zip(deepstack, ratios, strict=True)]

    def _store_visual_states(self, hidden: Tensor) -> None:
        """Keeps the hidden states of the visual tokens that layers ran on, while layers run none of their queries."""
        if self.visual_rows is not None and self.rows is not self.state.rows_of(NO_VISUAL):
            self.visual_rows = self.visual_rows.updated(hidden, self.rows)

    def _replace(self, hidden: Tensor, rows: LiveTokens, states: Tensor) -> Tensor:
        """Returns hidden states of `rows` (B, L, D) with those of visual tokens taken from `states` (B, S, D)."""
        if self.visual_rows is None:
            return hidden
        everything = self.state.rows_of(self.state.all_visual)
        self.visual_rows = self.visual_rows.updated(self._gathered(states, everything), everything)
        states = rows.take(self.state.flat(states))
        return torch.where(rows.take(self.state.visual)[..., None], states.to(hidden.dtype), hidden)

    def _view(self, embeds: Callable[[], Tensor], memory: Any, number: int, live: Selection, hidden: Tensor) -> View:
        probed = self.probe.probed
        return View(
            num_layers=self.depth,
            layer=number,
            visual=self.state.all_visual,
            live=live,
            last_visual_layer=None if probed is None else probed.layer,
            state=memory,
            input_embeddings=embeds,
            tower=self.tower,
            relevance=self.relevance,
            prompt=self.probe.prompt,
            attention=self.probe.attention,
            next_layer_attention=partial(self._next_layer_attention, number, hidden),
            last_query_attention=self.probe.last_query_attention,
            attention_rows=self.probe.attention_rows,
            scores=partial(self._scores, embeds),
            hidden_states=partial(self._states, hidden),
        )

    def _scores(self, embeds: Callable[[], Tensor]) -> Tensor:
        """Returns (B, S): see View.scores. What the scorer reads learns nothing from it."""
        scorer = getattr(self.decoder, SCORER, None)
        if scorer is None:
            raise ValueError(f"schedule: got a plan with select: learned, expected a model with a {SCORER}")
        return scorer(embeds().detach(), self.probe.instruction())

    def _states(self, hidden: Tensor) -> Tensor:
        """Returns (B, S, D): see View.hidden_states."""
        full, state = self.rows.put(hidden, self.state.size), self.state
        if self.visual_rows is None:
            return state.by_sample(full)
        aside = state.visual & (self.rows.columns(state.size) < 0)  # what no layer ran on, or kept from the `kv` update
        everything = state.rows_of(state.all_visual)
        kept = everything.put(self.visual_rows.take(everything), state.size)
        return state.by_sample(torch.where(aside[..., None], kept.to(full.dtype), full))

    def _layer(
        self, number: int, hidden: Tensor, tokens: LayerTokens, remap: BoundValueRemap | None, is_probed: bool
    ) -> Tensor:
        """Returns the output of one layer for hidden states (B, L, D) of its rows."""
        self.rows, stored = tokens.rows, self.stored[number]
        positions = self.state.renumbered(tokens, stored) if self.schedule.renumbers else self.state.positions
        visual_kv = self._visual_kv(number, tokens, positions)
        slots, padded = tokens.key_slots, tokens.padded
        if stored is not None:
            slots, padded = stored.extend(slots, padded)
        mask = self._mask(number, tokens, slots, padded, remap)
        change = mask.ordered if isinstance(mask, Sequences) and mask.order is not None else remap
        shim = None
        gates = self.gates
        if gates is not None:
            gates = self.state.flat(gates).gather(1, (tokens.key_slots - self.state.offset).clamp(min=0))
        if any(one is not None for one in (stored, visual_kv, change, gates)) or is_probed:
            shim = CacheShim(stored, visual_kv, change, gates)
        at = self._rotary_at(number, tokens.rows, hidden, positions)
        ids = None if self.mrope else tokens.rows.positions_from(positions)
        output = run_layer(self.decoder.layers[number], hidden, mask, ids, shim, at)
        if shim is not None:
            keys, values = shim.pop_used()
            if is_probed:
                keys, values = keys if self.probe.differentiable else keys.detach(), values.detach()
                self.probe.probed = ProbedLayer(number, hidden, tokens, keys, values, slots, positions, visual_kv)
        return output

    def _visual_kv(self, number: int, tokens: LayerTokens, positions: Tensor) -> VisualKV | None:
        """Returns the function that makes a layer's keys and values of visual tokens that run no query, or None."""
        if tokens.kv_only is None or self.visual_rows is None:
            return None
        # gathered here, not inside it: under checkpointing the inside of a layer first runs without a graph
        key = self.visual_rows, tokens.kv_only
        if key not in self._taken:
            self._taken[key] = self.visual_rows.take(tokens.kv_only)
        rows = self._taken[key]
        at = self._rotary_at(number, tokens.kv_only, rows, positions)
        return partial(project_visual_kv, self.decoder.layers[number], rows, at)

    def _next_layer_attention(self, number: int, hidden: Tensor) -> Tensor:
        past = self.probe.last
        visual_kv = self._visual_kv(number, past.tokens, past.positions)
        return self.probe.next_layer_attention(number, hidden, self.rows, self.stored[number], visual_kv)

    def _add_deepstack(self, hidden: Tensor, features: Tensor, kv_only: bool) -> Tensor:
        """Returns hidden states with DeepStack features (R, D) added to their visual tokens.

        Under the `kv` update, whose visual tokens have no hidden states, the features join what later layers project.
        """
        if self.visual_rows is None:
            return hidden
        features = features.to(self.visual_rows.rows.dtype)
        if not kv_only:
            return replace(self.visual_rows, rows=features).added_to(hidden, self.rows)
        self.visual_rows = replace(self.visual_rows, rows=self.visual_rows.rows + features)
        return hidden

    def _rotary_at(self, number: int, tokens: LiveTokens, like: Tensor, positions: Tensor) -> Rotary:
        key = tokens, rotary_kind(self.decoder, number)
        if self.schedule.renumbers or key not in self._rotary:  # renumbered positions differ from layer to layer
            self._rotary[key] = rotary(self.decoder, key[1], like, tokens.positions_from(positions))
        return self._rotary[key]

    def _bound(self, remap: ValueRemap, tokens: LayerTokens, live: Selection) -> BoundValueRemap:
        if (remap, tokens) not in self._remaps:
            state, copies = self.state, None
            if remap.hides or tokens.kv_only is None:
                copies = state.rows_of(NO_VISUAL if remap.hides else live, text=False)
            self._remaps[remap, tokens] = BoundValueRemap(remap, tokens.key_slots, state.visual, state.offset, copies)
        return self._remaps[remap, tokens]

    def _mask(
        self, number: int, tokens: LayerTokens, slots: Tensor, padded: bool, remap: BoundValueRemap | None
    ) -> Any:
        state, window = self.state, window_of(self.decoder, number, self.state.stride)
        copies = None if remap is None else remap.copies
        key = tokens, window, copies
        if state.offset > 0 or key not in self._masks:  # the slots of filled caches differ from layer to layer
            hidden = None
            if remap is not None and copies is not None:
                hidden = remap.hidden_from(tokens.rows, slots.shape[1])
                slots = torch.cat([slots, LayerTokens(copies).key_slots], dim=1)
            self._masks[key] = attention_mask(
                self.decoder,
                tokens.rows,
                slots,
                padded=padded,
                window=window,
                blocks=state.blocks,
                hidden=hidden,
                key_lengths=tokens.key_lengths,
            )
        return self._masks[key]
