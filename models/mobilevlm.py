"""MobileVLM v2: LLaVA with a light projector (LDPv2) that leaves a quarter of the visual tokens.

transformers does not have it; these classes are named and saved as in transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration


class MobileVLMConfig(LlavaConfig):
    """Everything LlavaConfig takes, and the sides of the projector's grid of visual tokens (12 x 12 = 144)."""

    model_type = "mobilevlm"

    token_grid: int = 12


class LDPv2Projector(nn.Module):
    """A two-layer MLP, average pooling to a grid of tokens, and a depthwise convolution with a skip connection.

    Source: MobileVLM V2, arXiv 2402.03766, section 3.2.
    """

    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(width, width)
        self.pool = nn.AdaptiveAvgPool2d(config.token_grid)
        self.positions = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, features: Tensor) -> Tensor:
        """Returns (images, token_grid squared, D) from the patches (images, side squared, tower width)."""
        hidden = self.linear_2(self.act(self.linear_1(features)))
        side = int(hidden.shape[1] ** 0.5)
        grid = self.pool(hidden.transpose(1, 2).unflatten(2, (side, side)))
        return (self.positions(grid) + grid).flatten(2).transpose(1, 2)


class MobileVLMForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with LDPv2 as its projector."""

    config_class = MobileVLMConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = LDPv2Projector(config)
        self.post_init()
