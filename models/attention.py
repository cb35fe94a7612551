"""What the executor uses of a Hugging Face decoder: its layers, projections, rotary embeddings and masks.

Nothing is hooked or patched: a layer is called as transformers calls it. Where visual tokens only provide keys and
values, or a schedule reads the keys, a CacheShim takes the place of the layer's KV cache: attention passes its new keys
and values to `cache.update` and uses what that returns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as remembered
from functools import cached_property
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .batch_facts import on_device
from .cache import CACHE, StagedLayer
from .live_tokens import LayerTokens, LiveTokens, SequenceState
from .precision import full_precision

SUPPORTED_DECODERS = {  # class name: model_type of its config
    "LlamaModel": "llama",
    "MistralModel": "mistral",
    "Qwen2Model": "qwen2",
    "Qwen3Model": "qwen3",
    "SmolLM3Model": "smollm3",
    "Qwen2VLTextModel": "qwen2_vl_text",
    "Qwen2_5_VLTextModel": "qwen2_5_vl_text",
    "Qwen3VLTextModel": "qwen3_vl_text",
    "Glm4vTextModel": "glm4v_text",
    "Gemma3TextModel": "gemma3_text",
    "Molmo2TextModel": "molmo2_text",
}
SDPA_PACKED = "sdpa_packed"  # an attn_implementation: see sdpa_packed
Rotary = tuple[Tensor, Tensor]  # cos and sin, each (B, L, d)
VisualKV = Callable[[], tuple[Tensor, Tensor]]  # makes keys and values (B, G, L, d) of visual tokens


class UnsupportedDecoderError(ValueError):
    """The language model is of a kind that run_decoder cannot run."""


def unwrap(language_model: nn.Module) -> Any:
    """Returns the Hugging Face decoder inside the wrappers of peft and DeepSpeed.

    Raises:
        UnsupportedDecoderError: it is none of SUPPORTED_DECODERS.
    """
    decoder: Any = language_model
    while hasattr(decoder, "get_base_model") or not hasattr(decoder, "layers"):
        inner = decoder.get_base_model() if hasattr(decoder, "get_base_model") else getattr(decoder, "module", None)
        if inner is None or inner is decoder:
            break
        decoder = inner
    if not any(kind.__name__ in SUPPORTED_DECODERS for kind in type(decoder).__mro__):
        raise UnsupportedDecoderError(
            f"language model: got {type(decoder).__name__}, expected one of {', '.join(SUPPORTED_DECODERS)}"
        )
    return decoder


def uses_mrope(decoder: Any) -> bool:
    """Returns whether a token has three position ids: time, height and width (M-RoPE)."""
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    return "mrope_section" in rope or hasattr(decoder.rotary_emb, "mrope_section")


def rotary_kind(decoder: Any, layer: int) -> str | None:
    """Returns which of the decoder's rotary embeddings a layer takes; None where there is one for all."""
    if hasattr(decoder, "rope_types"):  # Molmo2: "scaled" or "unscaled"
        return decoder.rope_types[layer]
    if "layer_type" in _arguments(type(decoder.rotary_emb).forward):  # Gemma3: by the layer's kind of attention
        return decoder.config.layer_types[layer]
    return None


def rotary(decoder: Any, kind: str | None, like: Tensor, positions: Tensor) -> Rotary:
    """Returns cos and sin (B, L, d) at position ids (B, L) or (3, B, L), in the type of `like`."""
    if kind is None:
        return decoder.rotary_emb(like, positions)
    if hasattr(decoder, "rope_types"):
        module = decoder.rotary_emb if kind == "scaled" else decoder.rotary_emb_unscaled
        return module(like, positions)
    return decoder.rotary_emb(like, positions, kind)


def window_of(decoder: Any, layer: int, length: int) -> int | None:
    """Returns a layer's sliding attention window in tokens, or None where it sees all of a sequence of `length`."""
    attention = decoder.layers[layer].self_attn
    if hasattr(attention, "sliding_window"):  # Qwen2, Qwen3, SmolLM3, Gemma3: chosen by layer
        window = attention.sliding_window
    else:  # Mistral: one for all; others: none
        window = getattr(decoder.config, "sliding_window", None)
    return window if window is not None and window < length else None


# -- masks ---------------------------------------------------------------------------------------------------------


def visible(queries: LiveTokens, slots: Tensor, window: int | None, blocks: Tensor | None) -> Tensor:
    """Returns (B, L, K) bool: which keys, at `slots` (B, K, -1 on padding), each query (B, L) sees.

    A query sees the keys at or before its slot, and those of its image block, as far back as the sliding window
    reaches (in tokens), in packed rows of its sample alone. Dead tokens between two live ones change nothing. Padding
    rows see every key that is not padding. `blocks` is as in SequenceState.
    """
    places = queries.slots.masked_fill(~queries.valid, torch.iinfo(torch.int64).max)
    seen = slots[:, None, :] <= places[:, :, None]
    if blocks is not None:
        of_queries, of_keys = blocks.gather(1, queries.slots), blocks.gather(1, slots.clamp(min=0))
        seen |= (of_queries[:, :, None] == of_keys[:, None, :]) & (of_queries >= 0)[:, :, None]
    if window is not None:
        near = queries.slots[:, :, None] - slots[:, None, :] < window
        seen &= near | ~queries.valid[:, :, None]
    if queries.stride:
        seen &= (queries.slots // queries.stride)[:, :, None] == (slots // queries.stride)[:, None, :]
    return seen & (slots >= 0)[:, None, :]


def attention_mask(
    decoder: Any,
    queries: LiveTokens,
    slots: Tensor,
    *,
    padded: bool,
    window: int | None,
    blocks: Tensor | None,
    hidden: Tensor | None = None,
    key_lengths: Sequence[int] = (),
) -> Any:
    """Returns the attention mask of `queries` (B, L) over keys at `slots` (B, K, -1 on padding), in the backend's form.

    Bool (B, 1, L, K) under sdpa, additive (B, 1, L, K) under eager, bool (B, K) under flash; for packed rows Sequences
    under sdpa_packed and flash. Returns None when the backend's causal mask is already correct. `padded`: some key is
    padding. `hidden` (B, L, K) bool: further keys that a query must not see. `key_lengths`: keys of each packed sample.
    `window` and `blocks` are as in `visible`.

    Raises:
        ValueError: the backend cannot express the mask.
    """
    backend, switch = decoder.config._attn_implementation, "model.set_attn_implementation('sdpa') switches"
    if "flash" in backend:
        for refused, what in (
            (hidden is not None, "keys hidden from text alone, as VisiPruner's shallow mode asks for"),
            (blocks is not None, "image blocks that attend in both directions"),
            (window is not None and not queries.whole, "a sliding window over live tokens"),
            (
                slots.shape[1] > queries.slots.shape[1] > 1 and queries.offset == 0,
                "visual tokens that only give keys and values (update `kv`)",
            ),
        ):
            if refused:
                found = f"flash attention, which cannot express {what}"
                raise ValueError(f"attn_implementation: got {found}; expected sdpa or eager; {switch}")
        if queries.stride:
            return Sequences.of(queries, slots, key_lengths, None, None).for_flash(slots.device)
        return (slots >= 0) if padded else None
    if backend not in ("sdpa", "eager", SDPA_PACKED):
        raise ValueError(f"attn_implementation: got {backend}, expected sdpa, eager or flash_attention_2; {switch}")
    if backend == SDPA_PACKED and sum(queries.lengths) == queries.slots.shape[1]:
        return Sequences.of(queries, slots, key_lengths, window, blocks)
    plain = not padded and window is None and blocks is None and hidden is None and len(queries.lengths) < 2
    aligned = slots.shape[1] == queries.slots.shape[1]  # the keys are the rows themselves
    if backend != "eager" and plain and (aligned or queries.slots.shape[1] == 1):
        return None
    seen = visible(queries, slots, window, blocks)
    if hidden is not None:
        seen &= ~hidden
    if backend != "eager":
        return seen[:, None]
    dtype = decoder.dtype
    return torch.zeros((), dtype=dtype, device=seen.device).masked_fill(~seen[:, None], torch.finfo(dtype).min)


# -- packed rows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sequences:
    """Lengths and masks of the sequences in packed rows, passed in place of a mask to a backend that splits them.

    Attributes:
        queries: number of query rows of each sequence.
        keys: number of keys of each sequence.
        masks: bool (1, 1, queries, keys) of each sequence; None where the causal mask is correct.
        order: (K,) int64, the index that sorts the keys by sequence; None where they are sorted already.
        options: keyword arguments for flash-attention.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    masks: tuple[Tensor | None, ...]
    order: Tensor | None
    options: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls, queries: LiveTokens, slots: Tensor, keys: Sequence[int], window: int | None, blocks: Tensor | None
    ) -> Sequences:
        """Returns the sequences of packed rows; the keys stand at `slots` (1, K), `keys[i]` of them for sample i."""
        order = None
        if slots.shape[1] > queries.slots.shape[1]:  # visual keys stand first; padding has no place at all
            order = slots[0].argsort()[slots.shape[1] - sum(keys) :]
            slots = slots.index_select(1, order)
        masks: list[Tensor | None] = []
        for asking, seen in zip(
            queries.slots.split(queries.lengths, dim=1), slots.split(tuple(keys), dim=1), strict=True
        ):
            one = LiveTokens(asking, torch.ones_like(asking, dtype=torch.bool), False, False)
            is_plain = asking.shape == seen.shape and window is None and blocks is None
            masks.append(None if is_plain else visible(one, seen, window, blocks)[:, None])
        return cls(queries.lengths, tuple(keys), tuple(masks), order)

    def for_flash(self, device: torch.device) -> Sequences:
        """Returns the same with the borders as flash-attention's variable-length form takes them."""
        options: dict[str, Any] = {}
        for name, lengths in (("q", self.queries), ("k", self.keys)):
            borders = on_device([0, *accumulate(lengths)], device)
            options |= {f"cu_seq_lens_{name}": borders.int(), f"max_length_{name}": max(lengths)}
        return replace(self, options=options)

    def ordered(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values (1, G, K, d) sequence by sequence."""
        if self.order is None:
            return keys, values
        return keys.index_select(2, self.order), values.index_select(2, self.order)


def sdpa_packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention of packed rows, one sequence after the other: `attn_implementation="sdpa_packed"`.

    Arguments and result are those of transformers' sdpa_attention_forward, which it calls for rows that are not packed.
    It computes no attention between samples, so packing saves time without flash-attention.
    """
    if not isinstance(attention_mask, Sequences):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    borders = attention_mask
    parts = zip(
        query.split(borders.queries, dim=2),
        key.split(borders.keys, dim=2),
        value.split(borders.keys, dim=2),
        borders.masks,
        strict=True,
    )
    outputs = [
        sdpa_attention_forward(module, asking, keys, values, mask, **options)[0]
        for asking, keys, values, mask in parts
        if asking.shape[2] > 0
    ]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(SDPA_PACKED, sdpa_packed)
AttentionMaskInterface.register(SDPA_PACKED, sdpa_mask)


# -- one layer -----------------------------------------------------------------------------------------------------


@dataclass
class CacheShim:
    """Takes the place of a layer's cache during one call of its attention."""

    stored: StagedLayer | None  # the layer's real cache
    visual_kv: VisualKV | None  # of `kv` visual tokens, put before those of the rows
    value_remap: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None  # what the attention uses in their place
    gates: Tensor | None = None  # (B, C), factors of the values of this call's keys
    _used: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def pop_used(self) -> tuple[Tensor, Tensor]:
        """Returns keys and values (B, G, K, d) of all tokens, unchanged, after the call. It keeps none of them."""
        if self._used is None:
            raise ValueError("the layer's attention did not run")
        used, self._used = self._used, None
        return used

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Returns the keys and values that the attention uses."""
        if self.visual_kv is not None:
            visual_keys, visual_values = self.visual_kv()
            keys = torch.cat([visual_keys, keys], dim=2)
            values = torch.cat([visual_values, values], dim=2)
        if self.gates is not None:
            values = values * self.gates[:, None, :, None].to(values.dtype)
        if self.stored is not None:
            keys, values = self.stored.update(keys, values)
        self._used = keys, values
        return (keys, values) if self.value_remap is None else self.value_remap(keys, values)


def run_layer(
    layer: Any, hidden: Tensor, mask: Any, positions: Tensor | None, shim: CacheShim | None, at: Rotary
) -> Tensor:
    """Returns the layer's output (B, L, D) for its rows.

    All arguments are positional, in the order of the layer's signature: under gradient checkpointing transformers
    blanks the keyword of the cache, which brings the keys and values of `kv` visual tokens.
    """
    given = {
        "hidden_states": hidden,
        "attention_mask": mask,
        "position_ids": positions,
        CACHE: shim,
        "use_cache": shim is not None and shim.stored is not None,
        "position_embeddings": at,
    }
    options: Mapping[str, Any] = {}
    if isinstance(mask, Sequences) and mask.options is not None:
        given["attention_mask"], options = None, mask.options
    return layer(*[given[name] for name in _arguments(type(layer).forward) if name in given], **options)


def project_visual_kv(layer: Any, visual: Tensor, at: Rotary) -> tuple[Tensor, Tensor]:
    """Returns keys and values (B, G, L, d) of projected visual tokens (B, L, D): the layer's norm and projections.

    Source: ViCA (arXiv 2602.07574), rotary at the positions of the visual tokens.
    """
    normed = _attention_input(layer, visual)
    return _rotated(layer.self_attn, "k", normed, at), _heads(layer.self_attn, "v", normed)


@remembered
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of the arguments of a module's forward, in order."""
    return tuple(signature(forward).parameters)[1:]


def _attention_input(layer: Any, hidden: Tensor) -> Tensor:
    """Returns the input of a layer's projections: hidden states, normed unless the layer norms its output instead."""
    return hidden if getattr(layer, "norm_after", False) else layer.input_layernorm(hidden)


def _rotated(attention: Any, name: str, normed: Tensor, at: Rotary) -> Tensor:
    """Returns (B, heads, L, d): queries ("q") or keys ("k") with the family's rotary embedding."""
    heads = _heads(attention, name, normed)
    if not getattr(attention, "use_rope", True):  # SmolLM3 has layers without
        return heads
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return apply(heads, heads, *at)[0]


def _heads(attention: Any, name: str, normed: Tensor) -> Tensor:
    """Returns (B, heads, L, d): the named projection, with the norm of the families that have one."""
    projected = getattr(attention, f"{name}_proj")(normed)
    norm = getattr(attention, f"{name}_norm", None)
    if norm is not None and getattr(attention, "qk_norm_type", None) == "olmo":  # Molmo2: over all heads together
        projected, norm = norm(projected), None
    heads = projected.unflatten(-1, (-1, attention.head_dim))
    return (heads if norm is None else norm(heads)).transpose(1, 2)


# -- what instruction tokens attend to -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AttentionRow:
    """The attention of one query token in one layer."""

    layer: int
    weights: Tensor  # (B, H, K) float32, after the softmax; 0 on keys that the query does not see
    values: Tensor  # (B, G, K, d), the value vectors of the keys; G divides H
    places: Tensor  # (B, K) int64, each key's place in the input, 0 ... S-1; -1 on padding, on keys of an earlier call

    def influence(self) -> tuple[Tensor, Tensor]:
        """Returns cos(o - c, o) and |c| squared for every key, each (B, K) float32.

        o is the attention output of the query, heads concatenated, c = w v what one key adds to it. Both follow from
        o . o, o . c and c . c, so that no (B, K, D) tensor of contributions is made.

        Source: VisiPruner, arXiv 2510.17205, section 3.6.
        """
        values = self.values.float()
        weights = self.weights.unflatten(1, (values.shape[1], -1))  # (B, G, H / G, K)
        with full_precision(values):
            output = weights @ values  # (B, G, H / G, d)
            along = (weights * (output @ values.transpose(2, 3))).sum(dim=(1, 2))  # o . c
        squared = (weights.square().sum(dim=2) * values.square().sum(dim=3)).sum(dim=1)  # c . c
        whole = output.square().sum(dim=(1, 2, 3))[:, None]  # o . o
        rest = (whole - 2 * along + squared).clamp(min=0)  # |o - c| squared
        return (whole - along) / (rest * whole).sqrt().clamp(min=1e-8), squared

    def spread(self, per_key: Tensor, size: int, fill: float) -> Tensor:
        """Returns (B, size): a value per key (B, K) at the places of the keys, `fill` where no key stands.

        Or (B, Q, size) of (B, Q, K).
        """
        # keys without a place go to an extra column, cut off again
        full = per_key.new_full((*per_key.shape[:-1], size + 1), fill)
        index = self.places.where(self.places >= 0, size)
        index = index if per_key.ndim == 2 else index[:, None].expand_as(per_key)
        return full.scatter(-1, index, per_key)[..., :size]


@dataclass(frozen=True, eq=False)
class ProbedLayer:
    """The inputs and keys of a layer whose attention a schedule may read."""

    layer: int
    hidden: Tensor  # (B, L, D), its input, with its graph
    tokens: LayerTokens
    keys: Tensor  # (B, G, K, d) of all tokens, those of its cache first
    values: Tensor  # likewise
    slots: Tensor  # (B, K) of the keys, -1 on padding
    positions: Tensor  # (B, S) or (3, B, S) position ids
    visual_kv: VisualKV | None  # of its `kv` visual tokens


class AttentionProbe:
    """Recomputes the attention rows of instruction tokens after a layer has run; each row costs O(S).

    `query_mask` and `answers` are as in run_decoder. `counts` is the number of tokens that `query_mask` marks in each
    sample; None reads it from the device. The executor sets `probed` after each layer that ran on visual tokens. With
    `differentiable`, `probed` keeps its graph and attention carries gradients.
    """

    def __init__(
        self,
        decoder: Any,
        query_mask: Tensor | None,
        state: SequenceState,
        *,
        counts: Sequence[int] | None = None,
        answers: Tensor | None = None,
        differentiable: bool = False,
    ) -> None:
        self.decoder, self.query_mask, self.answers, self.state = decoder, query_mask, answers, state
        self._counts, self.differentiable = counts, differentiable
        self.probed: ProbedLayer | None = None
        self._seen: dict[tuple[LiveTokens, Tensor, int | None], tuple[Tensor, Tensor]] = {}

    @property
    def last(self) -> ProbedLayer:
        """The last layer that ran on visual tokens; ValueError before the first one."""
        if self.probed is None:
            raise ValueError("a schedule read attention before any layer ran on visual tokens")
        return self.probed

    @cached_property
    def resolved_query_mask(self) -> Tensor:
        """(B, S) bool, the instruction tokens."""
        text, places = self._text()
        last = places == places.where(text, -1).amax(dim=1, keepdim=True)
        if self.query_mask is None:
            return last
        mask = self.query_mask & text
        return mask.where(mask.any(dim=1, keepdim=True), last)

    @cached_property
    def queries(self) -> LiveTokens:
        """The instruction tokens."""
        if self.state.is_packed:
            return LiveTokens.packed(self.resolved_query_mask, self._counts)
        return LiveTokens.of_mask(self.resolved_query_mask, self.state.offset, self._counts)

    def prompt(self) -> Tensor:
        """Returns (B, S) bool: see View.prompt."""
        text, places = self._text()
        first = places.where(self.resolved_query_mask, text.shape[1]).amin(dim=1, keepdim=True)
        return text & (places <= first)

    def instruction(self) -> Tensor:
        """Returns (B, S) bool, the text that a learned scorer reads: see run_decoder's `answers`."""
        if self.answers is None:
            return self.prompt()
        text, places = self._text()
        last = places.where(self.resolved_query_mask, -1).amax(dim=1, keepdim=True)
        return text & ~self.answers & (places <= last)

    def attention(self, mask: Tensor | None = None) -> Tensor:
        """Returns (B, S): see View.attention."""
        with torch.set_grad_enabled(self.differentiable):
            if mask is None:
                return self._mean(self.last)
            return AttentionProbe(self.decoder, mask, self.state)._mean(self.last)

    @torch.no_grad()
    def next_layer_attention(
        self, layer: int, hidden: Tensor, rows: LiveTokens, stored: StagedLayer | None, visual_kv: VisualKV | None
    ) -> Tensor:
        """Returns (B, S): the attention that `layer` would pay if it ran now on `hidden` (B, L, D), at `rows`.

        `stored` is its cache; `visual_kv` is of the `kv` visual tokens of the probed layer.
        """
        past, module = self.last, self.decoder.layers[layer]
        at = self._rotary_at(layer, rows, hidden, past.positions)
        keys = _rotated(module.self_attn, "k", _attention_input(module, hidden), at)
        tokens = LayerTokens(rows, past.tokens.kv_only)
        if visual_kv is not None:
            keys = torch.cat([visual_kv()[0], keys], dim=2)
        slots = tokens.key_slots
        if stored is not None and stored.slots is not None:
            keys, slots = torch.cat([stored.keys, keys], dim=2), torch.cat([stored.slots, slots], dim=1)
        return self._mean(replace(past, layer=layer, hidden=hidden, tokens=tokens, keys=keys, slots=slots))

    @torch.no_grad()
    def last_query_attention(self) -> AttentionRow:
        """Returns the row of the last instruction token: see View.last_query_attention."""
        weights, queries = self._weights(self.last), self.queries
        if weights.shape[2] > 1:
            last = (queries.valid.sum(dim=1) - 1).clamp(min=0)[:, None, None, None]
            weights = weights.gather(2, last.expand(-1, weights.shape[1], 1, weights.shape[3]))
        if queries.padded:  # a sample without text has no attention
            weights = weights.masked_fill(~queries.valid[:, :1, None, None], 0.0)
        return self._row(self.last, weights[:, :, 0])

    def attention_rows(self) -> Tensor:
        """Returns (B, Q, S), with gradient: see View.attention_rows.

        Makes the keys anew, because those of the layer's run are kept without their graph unless a schedule asks.
        """
        past, layer = self.last, self.decoder.layers[self.last.layer]
        at = self._rotary_at(past.layer, past.tokens.rows, past.hidden, past.positions)
        keys = _rotated(layer.self_attn, "k", _attention_input(layer, past.hidden), at)
        if past.visual_kv is not None:
            keys = torch.cat([past.visual_kv()[0], keys], dim=2)
        if keys.shape[2] != past.slots.shape[1]:
            raise ValueError("attention_rows: got a filled cache, expected none: they are for training")
        weights = self._weights(replace(past, keys=keys))
        mean = weights.mean(dim=1).masked_fill(~self.queries.valid[..., None], 0.0)
        return self._row(past, weights[:, :, 0]).spread(mean, self.state.size, 0.0)

    def _text(self) -> tuple[Tensor, Tensor]:
        """Returns the text (B, S) bool, and the places of the input (S,)."""
        text = self.state.by_sample(self.state.text)
        return text, torch.arange(text.shape[1], device=text.device)

    def _weights(self, probed: ProbedLayer) -> Tensor:
        """Returns (B, H, Q, K) float32: the softmax of the instruction tokens' rows."""
        hidden, layer = probed.hidden, self.decoder.layers[probed.layer]
        rows, seen = self._rows_and_keys(probed)
        asking = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
        at = self._rotary_at(probed.layer, self.queries, hidden, probed.positions)
        queries = _rotated(layer.self_attn, "q", _attention_input(layer, asking), at)
        keys = probed.keys.float()
        grouped = queries.float().unflatten(1, (keys.shape[1], -1))  # (B, G, H / G, Q, d): heads that share a key
        with full_precision(keys):
            scores = (grouped @ keys.transpose(2, 3)[:, :, None]).flatten(1, 2) * layer.self_attn.scaling
        return scores.masked_fill(~seen[:, None], torch.finfo(torch.float32).min).softmax(dim=-1)

    def _rows_and_keys(self, probed: ProbedLayer) -> tuple[Tensor, Tensor]:
        """Returns the rows of the instruction tokens (B, Q), and which keys they see (B, Q, K)."""
        window = window_of(self.decoder, probed.layer, self.state.stride)
        key = probed.tokens.rows, probed.slots, window
        if key not in self._seen:
            queries = self.queries
            rows = probed.tokens.rows.columns(self.state.size).gather(1, queries.places).clamp(min=0)
            # padding queries see the keys up to their slot, so that every row has a key
            asking = replace(queries, valid=torch.ones_like(queries.valid), padded=False)
            self._seen[key] = rows, visible(asking, probed.slots, window, self.state.blocks)
        return self._seen[key]

    def _rotary_at(self, layer: int, tokens: LiveTokens, like: Tensor, positions: Tensor) -> Rotary:
        return rotary(self.decoder, rotary_kind(self.decoder, layer), like, tokens.positions_from(positions))

    def _mean(self, probed: ProbedLayer) -> Tensor:
        """Returns (B, S): the mean over heads and instruction tokens, at the places of the keys, 0 elsewhere."""
        weights, valid = self._weights(probed), self.queries.valid
        paid = weights.mean(dim=1).masked_fill(~valid[..., None], 0.0).sum(dim=1)
        paid = self.state.by_sample(self._row(probed, weights[:, :, 0]).spread(paid, self.state.size, 0.0))
        return paid / self.resolved_query_mask.sum(dim=1, keepdim=True).clamp(min=1)

    def _row(self, probed: ProbedLayer, weights: Tensor) -> AttentionRow:
        slots, offset = probed.slots, self.state.offset
        places = torch.where(slots >= offset, slots - offset, -1) if offset > 0 else slots
        return AttentionRow(probed.layer, weights, probed.values, places)
