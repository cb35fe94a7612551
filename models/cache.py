"""The KV cache of a staged decoder: each layer holds exactly the tokens that were live there, and their slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast


class StagedLayer(DynamicLayer):
    """One layer's keys and values, with the slot of each column.

    `get_seq_length` returns the length of the whole sequence seen, not the number of columns held: generate() asks
    for it, and layer 0 of a fused model holds no image.
    """

    keys: Any  # (B, heads, C, d), as the values; transformers leaves their types open
    values: Any
    slots: Tensor | None = None  # (B, C) int64, place in the whole sequence of each of the C columns; -1 on padding
    seen = 0  # length of the sequence so far, dead tokens and padding included
    next_position: Tensor | None = None  # (B,) int64, the position id that follows the last token
    padded = False  # some column is padding

    def extend(self, slots: Tensor, padded: bool) -> tuple[Tensor, bool]:
        """Records the slots of the columns that the layer is about to append, and whether any is padding.

        Returns:
            `slots` (B, C) and `padded` of all columns that it then holds.
        """
        self.slots = slots if self.slots is None else torch.cat([self.slots, slots], dim=1)
        self.padded = self.padded or padded
        return self.slots, self.padded

    def get_seq_length(self) -> int:
        """Returns the length of the sequence seen so far."""
        return self.seen

    def reset(self) -> None:
        """Clears the layer."""
        super().reset()
        self.slots, self.seen, self.next_position, self.padded = None, 0, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens of the sequence, those of them that the layer holds."""
        if tokens_to_remove >= 0 or self.slots is None or self.next_position is None:
            super().crop(tokens_to_remove)
            return
        self.seen += tokens_to_remove
        self.next_position = self.next_position + tokens_to_remove
        stays = self.slots < self.seen  # padding too
        columns = stays.any(dim=0).nonzero()[:, 0]
        self.slots = self.slots.where(stays, -1)[:, columns]
        self.padded = self.padded or not bool(stays[:, columns].all())
        self.keys, self.values = (states.index_select(2, columns) for states in (self.keys, self.values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the samples, as beam search asks for."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sample `repeats` times."""
        if self.slots is not None:
            samples = torch.arange(len(self.slots), device=self.slots.device)
            self.batch_select_indices(samples.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the samples `indices`, in that order."""
        super().batch_select_indices(indices)
        if self.slots is not None and self.next_position is not None:
            self.slots, self.next_position = self.slots[indices], self.next_position[indices]


# transformers 5.24 renamed the argument and the output field
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def staged_cache(cache: Any, num_layers: int) -> DynamicCache:
    """Returns `cache`, or a new one, made ready in place to hold a different number of tokens in each layer.

    Raises:
        ValueError: it is filled, and by another model or another number of layers.
    """
    require_own_cache(cache)
    cache = DynamicCache() if cache is None else cache
    if cache.get_seq_length() == 0:
        cache.layers = [StagedLayer() for _ in range(num_layers)]
    if len(cache.layers) != num_layers:
        raise ValueError(f"past_key_values: got a cache of {len(cache.layers)} layers, expected {num_layers} layers")
    return cache


def require_own_cache(cache: Any) -> None:
    """Raises ValueError unless `cache` is None, an empty DynamicCache, or one that `staged_cache` returned."""
    expected = "expected None, an empty DynamicCache, or the cache that this model returned"
    if cache is None:
        return
    if getattr(cache, "offloading", False):
        raise ValueError(f"past_key_values: got an offloaded cache, {expected}")
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"past_key_values: got a {type(cache).__name__}, {expected}")  # noqa: TRY004  # one kind
    if cache.get_seq_length() > 0 and not all(isinstance(layer, StagedLayer) for layer in cache.layers):
        raise ValueError(f"past_key_values: got a {type(cache).__name__} filled by another model, {expected}")
