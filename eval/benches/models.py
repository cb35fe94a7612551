"""What the benchmarks run: random VLMs with decoders of LLaVA-1.5-7B's proportions, and samples for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
    Qwen3VLConfig,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

from eval import measure
from models import FusedAutoModel, StagePlan

IMAGE_TOKEN, VOCABULARY = 8000, 8192
FAMILIES = ("llava", "qwen3_vl", "internvl")
WIDE = 1024  # decoders from this width on have heads of 128


@dataclass(frozen=True)
class Shape:
    """The size of one benchmark: layers x width, visual and text tokens of a sample, and how often the batch has it.

    `visual` is a square number.
    """

    layers: int
    width: int
    visual: int
    text: int
    batch: int = 1

    def __str__(self) -> str:
        rows = f"{self.batch} samples of " if self.batch > 1 else ""
        return f"{self.layers} layers x {self.width}, {rows}{self.visual} visual + {self.text} text tokens"


def text_config(shape: Shape) -> LlamaConfig:
    """Returns a decoder config of LLaVA-1.5-7B's proportions; head width 128 as there, 64 below a width of 1024."""
    heads = max(1, shape.width // (128 if shape.width >= WIDE else 64))
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=int(shape.width * 2.6875),  # 11008 / 4096
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )


def family_config(family: str, shape: Shape) -> Any:
    """Returns the config of Hugging Face's model around the shape's decoder, with a tiny vision tower."""
    decoder, side = text_config(shape).to_dict(), int(shape.visual**0.5)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    if family == "llava":
        vision = CLIPVisionConfig(**tower, image_size=side * 2, patch_size=2)
        fields = {"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1}
        return LlavaConfig(text_config=decoder, vision_config=vision, **fields)
    if family == "internvl":
        vision = {**tower, "image_size": [side * 4, side * 4], "patch_size": [2, 2]}
        return InternVLConfig(text_config=decoder, vision_config=vision, image_token_id=IMAGE_TOKEN)
    half = text_config(shape).head_dim // 2
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [half - 2 * (half // 3), *[half // 3] * 2]}
    known = Qwen3VLTextConfig().to_dict().keys() - {"rope_parameters", "model_type"}
    decoder = {name: value for name, value in decoder.items() if name in known} | {"rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 1, "patch_size": 2}
    vision |= {"out_hidden_size": shape.width, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    ids = {"image_token_id": IMAGE_TOKEN, "video_token_id": IMAGE_TOKEN + 1, "vision_start_token_id": IMAGE_TOKEN + 2}
    return Qwen3VLConfig(text_config=decoder, vision_config=vision, **ids)


def build(
    shape: Shape, *, plan: StagePlan | None = None, hugging_face: bool = False, family: str = "llava"
) -> PreTrainedModel:
    """Returns a VLM on the GPU where there is one, whose random weights depend on shape and family alone."""
    config, given = family_config(family, shape), {"dtype": measure.dtype(), "attn_implementation": "sdpa"}
    torch.manual_seed(0)
    with measure.device():  # the billions of weights of a GPU's shapes would take minutes on a CPU
        if hugging_face:
            return AutoModelForImageTextToText.from_config(config, **given)
        return FusedAutoModel.from_config(config, stages=None if plan is None else plan.to_dict(), **given)


def make_sample(visual: int, text: int, random: Generator, family: str = "llava") -> dict[str, Tensor]:
    """Returns a sample without a batch dimension: a few words, the image (0 visual tokens: none), more words.

    The last half of the text is the answer.
    """
    words = torch.randint(0, IMAGE_TOKEN, (text,), generator=random)
    labels = words.where(torch.arange(text) >= text // 2, -100)
    before, image, side = min(8, text // 4), torch.full((visual,), IMAGE_TOKEN), int(visual**0.5) * 2
    ids = torch.cat([words[:before], image, words[before:]])
    sample = {
        "input_ids": ids,
        "labels": torch.cat([labels[:before], torch.full_like(image, -100), labels[before:]]),
    }
    if visual and family == "qwen3_vl":
        sample["pixel_values"] = torch.randn(side * side, 3 * 2 * 2 * 2, generator=random)
        sample |= {"image_grid_thw": torch.tensor([[1, side, side]]), "mm_token_type_ids": (ids == IMAGE_TOKEN).int()}
    elif visual:
        pixels = side * 2 if family == "internvl" else side
        sample["pixel_values"] = torch.randn(1, 3, pixels, pixels, generator=random)
    return sample


def make_batch(shape: Shape, *, text_only: bool = False, family: str = "llava") -> dict[str, Tensor]:
    """Returns the shape's sample, or its text alone, as often as the batch has it."""
    sample = make_sample(0 if text_only else shape.visual, shape.text, Generator().manual_seed(1), family)
    per_token = ("input_ids", "labels", "mm_token_type_ids")
    batch = {name: tensor[None] if name in per_token else tensor for name, tensor in sample.items()}
    return {name: torch.cat([tensor] * shape.batch) for name, tensor in batch.items()}
