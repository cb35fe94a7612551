"""Outputs of a CLIP tower for each image, for schedules that choose tokens by its attention. Source: ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .precision import full_precision


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The tokens of I images in the tower layer whose output LLaVA projects: a class token and P patches each.

    Attributes:
        hidden: (I, 1 + P, W), the layer's output.
        attention: (I, P) float32, what the class token pays each patch in that layer, summed over heads.
        keys: (I, 1 + P, d) float32, the layer's keys, mean over heads.
        project: returns (I, N, D), the projector's output for tokens (I, N, W).
        has_class_token: each image's class token has a place in the input, before its patches.
    """

    hidden: Tensor
    attention: Tensor
    keys: Tensor
    project: Callable[[Tensor], Tensor]
    has_class_token: bool

    def of(self, images: list[int]) -> ImageTokens:
        """Returns the tokens of some images, by number, also several times."""
        return replace(self, hidden=self.hidden[images], attention=self.attention[images], keys=self.keys[images])


def missing_tower(config: Any) -> str | None:
    """Returns the reason why a VLM's tower cannot provide ImageTokens; None if it can."""
    kind, tower = getattr(config, "base_model_type", config.model_type), config.vision_config.model_type
    if kind != "llava" or tower != "clip_vision_model":
        return f"a {kind} with a {tower} tower"
    depth, number = config.vision_config.num_hidden_layers, config.vision_feature_layer
    if not isinstance(number, int) or number in (0, -depth - 1):
        return f"vision_feature_layer {number}"
    return None


def states_around(config: Any) -> list[int]:
    """Returns which hidden states of the tower `image_tokens` reads: before and after the layer that LLaVA projects."""
    return [config.vision_feature_layer - 1, config.vision_feature_layer]


def image_tokens(model: Any, hidden_states: Any) -> ImageTokens:
    """Returns the image tokens of a LlavaModel with a CLIP tower.

    Args:
        model: the LlavaModel.
        hidden_states: of its tower, before the first layer and after each one; those of `states_around` suffice.
    """
    layers, (before, after) = model.vision_tower.encoder.layers, states_around(model.config)
    layer = layers[after if after < 0 else before]
    normed = layer.layer_norm1(hidden_states[before])
    attention = layer.self_attn
    # the class token's row alone, apart from the layer's run
    query = attention.q_proj(normed[:, :1]).unflatten(-1, (-1, attention.head_dim)).float()
    keys = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim)).float()
    with full_precision(keys):
        weights = (torch.einsum("iqhd,ikhd->ihk", query, keys) * attention.scale).softmax(dim=-1)
    return ImageTokens(
        hidden=hidden_states[after],
        attention=weights.sum(dim=1)[:, 1:],
        keys=keys.mean(dim=2),
        project=model.multi_modal_projector,
        has_class_token=model.config.vision_feature_select_strategy == "full",
    )
