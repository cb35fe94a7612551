"""The one file that knows the inside of a Hugging Face decoder: its layers, projections, rotary and masks.

Nothing is hooked or patched. A layer is called as transformers calls it; where vision only lends keys and values,
or a schedule wants to see the keys, an object in the place of the layer's KV cache does it: attention hands its
fresh keys and values to `cache.update` and goes on with what that returns.

Letters: B batch, S sequence, L live rows, K keys, H query heads, G key/value heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .cache import StagedLayer
from .live import LiveSet

SUPPORTED = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "SmolLM3Model")
Rotary = tuple[Tensor, Tensor]  # cos and sin, each (B, L, d)


class UnsupportedDecoderError(ValueError):
    """The language model is not one whose layers this project knows how to run."""


def unwrap(language_model: nn.Module) -> Any:
    """Returns the Hugging Face decoder inside peft's and DeepSpeed's wrappers.

    Raises:
        UnsupportedDecoderError: it is none of `SUPPORTED`.
    """
    decoder: Any = language_model
    while hasattr(decoder, "get_base_model") or not hasattr(decoder, "layers"):
        inner = decoder.get_base_model() if hasattr(decoder, "get_base_model") else getattr(decoder, "module", None)
        if inner is None or inner is decoder:
            break
        decoder = inner
    if not any(kind.__name__ in SUPPORTED for kind in type(decoder).__mro__):
        raise UnsupportedDecoderError(
            f"language model: found {type(decoder).__name__}, accepted: {', '.join(SUPPORTED)}"
        )
    return decoder


def window_of(decoder: Any, layer: int, length: int) -> int | None:
    """Returns a layer's sliding attention window in tokens, or None where it sees all of a sequence of `length`."""
    attention = decoder.layers[layer].self_attn
    if hasattr(attention, "sliding_window"):  # Qwen2, Qwen3, SmolLM3: chosen by layer
        window = attention.sliding_window
    else:  # Mistral: one for all; Llama: none
        window = getattr(decoder.config, "sliding_window", None)
    return window if window is not None and window < length else None


def attention_mask(
    decoder: Any, queries: LiveSet, slots: Tensor, *, padded: bool, window: int | None, hidden: Tensor | None = None
) -> Any:
    """Returns the mask of `queries` (B, L) against keys at `slots` (B, K, -1 on padding), as the back end wants it.

    A query sees the keys at or before its own place in the sequence, so that dead tokens between two live ones
    change nothing; `hidden` (B, L, K) bool takes some of them away again. The mask is left out only where the back
    end's own causal rule says the same.

    Returns:
        None, or bool (B, 1, L, K) under sdpa, additive (B, 1, L, K) under eager and flex, bool (B, K) under flash.

    Raises:
        ValueError: flash-attention is asked for a mask that it cannot express.
    """
    backend, bound = decoder.config._attn_implementation, window is not None
    aligned = slots.shape[1] == queries.slots.shape[1]  # keys are the queries' own rows
    if "flash" in backend:
        if bound and not queries.whole:
            raise ValueError("flash-attention cannot slide its window over live tokens, accepted: sdpa, eager")
        if hidden is not None:
            raise ValueError(
                "flash-attention cannot hide visual keys from text alone, which the schedule asks for (VisiPruner's "
                "shallow mode), accepted: sdpa, eager; model.set_attn_implementation('sdpa') switches"
            )
        return (slots >= 0) if padded else None
    plain = not padded and not bound and hidden is None
    if backend == "sdpa" and plain and (aligned or queries.slots.shape[1] == 1):
        return None
    places = queries.slots.masked_fill(~queries.valid, torch.iinfo(torch.int64).max)  # padding sees all
    seen = (slots >= 0)[:, None, :] & (slots[:, None, :] <= places[:, :, None])
    if window is not None:
        near = queries.slots[:, :, None] - slots[:, None, :] < window
        seen &= near | ~queries.valid[:, :, None]
    if hidden is not None:
        seen &= ~hidden
    if backend == "sdpa":
        return seen[:, None]
    dtype = decoder.dtype
    return torch.zeros((), dtype=dtype, device=seen.device).masked_fill(~seen[:, None], torch.finfo(dtype).min)


@dataclass
class KeyValues:
    """Stands where a layer's attention expects its cache, for one call.

    Attributes:
        stored: the layer's real cache, or None.
        lend: returns keys and values (B, G, L_v, d) of visual tokens, put before the text's own; or None.
        rewrite: returns what the attention uses in place of all keys and values; or None. Nothing of it is stored.
        keys: (B, G, K, d) of all tokens, as stored, after the call.
        values: (B, G, K, d) likewise.
    """

    stored: StagedLayer | None = None
    lend: Callable[[], tuple[Tensor, Tensor]] | None = None
    rewrite: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Returns the keys and values that the attention shall use."""
        if self.lend is not None:
            visual_keys, visual_values = self.lend()
            keys = torch.cat([visual_keys, keys], dim=2)
            values = torch.cat([visual_values, values], dim=2)
        if self.stored is not None:
            keys, values = self.stored.update(keys, values)
        self.keys, self.values = keys.detach(), values.detach()
        return (keys, values) if self.rewrite is None else self.rewrite(keys, values)


def run_layer(
    layer: Any, hidden: Tensor, mask: Any, positions: Tensor, keys: KeyValues | None, rotary: Rotary
) -> Tensor:
    """Returns the layer's output (B, L, D) for its live rows.

    Positional on purpose: under gradient checkpointing transformers blanks a `past_key_values` keyword, and `kv`
    layers lend their visual keys through it.
    """
    return layer(hidden, mask, positions, keys, keys is not None and keys.stored is not None, rotary)


def lent_keys(layer: Any, visual: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Returns keys and values (B, G, L, d) of projected visual tokens (B, L, D): the layer's norm and projections.

    Source: ViCA (arXiv 2602.07574), rotary at the visual tokens' own positions.
    """
    normed = layer.input_layernorm(visual)
    return _rotated_keys(layer.self_attn, normed, rotary), _heads(layer.self_attn, "v", normed)


def projected_keys(layer: Any, hidden: Tensor, rotary: Rotary) -> Tensor:
    """Returns the keys (B, G, L, d) that a layer makes of hidden states (B, L, D)."""
    return _rotated_keys(layer.self_attn, layer.input_layernorm(hidden), rotary)


def query_weights(layer: Any, hidden: Tensor, keys: Tensor, seen: Tensor, rotary: Rotary) -> Tensor:
    """Returns the softmax attention (B, H, Q, K), float32, of a few query rows, apart from the layer's own run.

    Args:
        layer: the layer whose attention it is.
        hidden: (B, Q, D), the layer's input at the query rows.
        keys: (B, G, K, d), the keys that the layer's attention used.
        seen: (B, Q, K) bool, which keys each query sees.
        rotary: cos and sin at the queries' positions.
    """
    attention = layer.self_attn
    queries = _heads(attention, "q", layer.input_layernorm(hidden))
    if getattr(attention, "use_rope", True):
        queries = apply_rotary_pos_emb(queries, queries, *rotary)[0]
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))  # (B, G, H / G, Q, d): the heads that share a key
    scores = (grouped @ keys.float().transpose(2, 3)[:, :, None]).flatten(1, 2) * attention.scaling
    return scores.masked_fill(~seen[:, None], torch.finfo(torch.float32).min).softmax(dim=-1)


def _rotated_keys(attention: Any, normed: Tensor, rotary: Rotary) -> Tensor:
    keys = _heads(attention, "k", normed)
    if getattr(attention, "use_rope", True):  # SmolLM3 has layers without
        keys = apply_rotary_pos_emb(keys, keys, *rotary)[1]
    return keys


def _heads(attention: Any, name: str, normed: Tensor) -> Tensor:
    """Returns (B, heads, L, d): the named projection, with the per-head norm of the families that have one."""
    heads = getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return (heads if norm is None else norm(heads)).transpose(1, 2)
