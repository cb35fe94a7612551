"""Tiny random models and inputs of every supported family; nothing is downloaded.

A layout is a string: `t` is a text token, `I` an image. Images differ in size if the family allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CLIPVisionConfig, SiglipVisionConfig

from models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration

LAYERS, WIDTH, VOCABULARY = 6, 32, 60
IMAGE, START, END, PAD, VIDEO = 50, 51, 52, 59, 53
SPREAD = 0.3  # of the random weights: large, so that a wrong mask or position shows

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": SPREAD,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [2, 1, 1]}  # of a head of 8
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = CLIPVisionConfig(**SMALL, image_size=8, patch_size=4).to_dict()
SIGLIP = SiglipVisionConfig(**SMALL, image_size=8, patch_size=4, vision_use_head=False).to_dict()


def text(kind: str, **more: Any) -> dict[str, Any]:
    """Returns the fields of a text config; heads of 8."""
    return {**TEXT, "model_type": kind, **more}


def qwen_vision(**more: Any) -> dict[str, Any]:
    """Returns the fields of a Qwen-like tower: patches of 4, two by two a token."""
    fields = {"depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
    return {**fields, "out_hidden_size": WIDTH, "spatial_merge_size": 2, "temporal_patch_size": 2, **more}


def grids(random: torch.Generator, sides: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Returns the pixels of Qwen-like images, whose height and width are given in patches."""
    patches = sum(height * width for height, width in sides)
    grid = torch.tensor([[1, height, width] for height, width in sides])
    return {"pixel_values": torch.randn(patches, 96, generator=random), "image_grid_thw": grid}


@dataclass(frozen=True)
class Tiny:
    """One tiny model.

    Attributes:
        family: its model_type.
        fields: of its config.
        tokens: returns the ids of an image, given its number in the batch.
        pixels: returns the vision inputs of a number of images.
        types: name of the token type input, and whether it marks the start and end tokens as image.
    """

    family: str
    fields: dict[str, Any]
    tokens: Callable[[int], list[int]]
    pixels: Callable[[torch.Generator, int], dict[str, torch.Tensor]]
    types: tuple[str, bool] | None = None

    @property
    def classes(self) -> tuple[type, type]:
        """Hugging Face's config and model class (ours for MobileVLM, which transformers does not have)."""
        if self.family == "mobilevlm":
            return MobileVLMConfig, MobileVLMForConditionalGeneration
        prefix = transformers.CONFIG_MAPPING[self.family].__name__.removesuffix("Config")
        return transformers.CONFIG_MAPPING[self.family], getattr(transformers, f"{prefix}ForConditionalGeneration")

    def config(self, **more: Any) -> Any:
        """Returns Hugging Face's config."""
        return self.classes[0](**self.fields, **more)

    def hugging_face(self, attention: str = "sdpa") -> Any:
        """Returns Hugging Face's model."""
        torch.manual_seed(0)
        model = self.classes[1]._from_config(self.config(), attn_implementation=attention)
        for parameter in model.parameters():  # also those that are zero at first (newlines, positions)
            torch.nn.init.normal_(parameter, std=SPREAD if parameter.ndim > 1 else 0.1)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.data += 1.0  # norms
        model.config.get_text_config().pad_token_id = PAD
        return model.eval()

    def batch(self, *layouts: str, side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
        """Returns the inputs of forward for a padded batch."""
        random = torch.Generator().manual_seed(seed)
        rows, images = [], 0
        for layout in layouts:
            row: list[int] = []
            for mark in layout:
                row += self.tokens(images) if mark == "I" else [int(torch.randint(3, IMAGE, (1,), generator=random))]
                images += mark == "I"
            rows.append(row)
        size = max(map(len, rows))
        ids, mask = torch.full((len(rows), size), PAD), torch.zeros(len(rows), size, dtype=torch.long)
        for number, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(size - len(row), size)
            ids[number, place], mask[number, place] = torch.tensor(row), 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.types is not None:
            name, marks = self.types
            is_image = (ids == IMAGE) | (marks & ((ids == START) | (ids == END)))
            batch[name] = is_image.long()
        return {**batch, **(self.pixels(random, images) if images else {})}


def with_markers(count: int) -> Callable[[int], list[int]]:
    """Returns a function from an image's number to `count` image tokens between a start and an end token."""
    return lambda number: [START, *[IMAGE] * count, END]


def without_markers(count: int) -> Callable[[int], list[int]]:
    """Returns a function from an image's number to `count` image tokens."""
    return lambda number: [IMAGE] * count


def qwen_tokens(number: int) -> list[int]:
    """Returns the tokens of an image: 4 or 2 of them in turn, between a start and an end token."""
    return [START, *[IMAGE] * (4 if number % 2 == 0 else 2), END]


def square(*sides: int) -> Callable[[torch.Generator, int], dict[str, torch.Tensor]]:
    """Returns a function that makes images (N, 3, h, w)."""
    return lambda random, count: {"pixel_values": torch.randn(count, 3, *sides, generator=random)}


def _qwen_pixels(random: torch.Generator, count: int) -> dict[str, torch.Tensor]:
    return grids(random, [(4, 4) if number % 2 == 0 else (2, 4) for number in range(count)])


def _tiles(random: torch.Generator, count: int) -> dict[str, torch.Tensor]:
    sizes = torch.tensor([[8, 16]] * count)  # a base view and two tiles
    return {"pixel_values": torch.randn(count, 3, 3, 8, 8, generator=random), "image_sizes": sizes}


def _listed(random: torch.Generator, count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, count, 3, 16, 16, generator=random)}


def _pixtral(random: torch.Generator, count: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(count, 3, 16, 16, generator=random),
        "image_sizes": torch.tensor([[16, 16]] * count),
    }


def _molmo2(random: torch.Generator, count: int) -> dict[str, torch.Tensor]:
    pooling = torch.tensor([[0, 1], [2, 3]])
    return {
        "pixel_values": torch.randn(count, 4, 48, generator=random),
        "image_token_pooling": torch.cat([pooling + 4 * number for number in range(count)]),
        "image_grids": torch.tensor([[1, 2, 0, 0]] * count),
        "image_num_crops": torch.ones(count, dtype=torch.long),
    }


_LLAVA = {"vision_config": CLIP, "image_token_index": IMAGE, "image_seq_length": 4, "vision_feature_layer": -1}
_NEXT = {"vision_config": CLIP, "image_token_index": IMAGE, "image_grid_pinpoints": [[8, 16], [16, 8]]}
_IDEFICS = {"vision_config": {**SMALL, "image_size": 16, "patch_size": 4, "initializer_range": SPREAD}}
_GLM_VISION = qwen_vision(out_hidden_size=WIDTH, image_size=16)
_INTERN_VISION = {**SMALL, "image_size": [16, 16], "patch_size": [4, 4]}
_MOLMO_ADAPTER = {
    "vision_feature_layer": [-1, -2],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "text_hidden_size": WIDTH,
}
_MOLMO_VISION = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "image_size": [8, 8], "patch_size": 4}
_MOLMO_IDS = {
    "image_start_token_id": START,
    "low_res_image_start_token_id": START,
    "image_end_token_id": END,
    "image_patch_id": IMAGE,
    "frame_start_token_id": 54,
    "frame_end_token_id": 55,
}


def _molmo_text(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    fields = {"head_dim": 8, "additional_vocab_size": 4, "rope_parameters": rope, "rope_scaling_layers": [1, 3]}
    return text("molmo2_text", **fields, **more)


_IDS = {"image_token_id": IMAGE}
_QWEN_IDS = {**_IDS, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_GLM_IDS = {**_IDS, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END}
_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_QWEN2 = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}

TINY = {
    "llava": Tiny("llava", {**_LLAVA, "text_config": text("llama")}, without_markers(4), square(8, 8)),
    "llava-qwen3": Tiny(
        "llava", {**_LLAVA, "text_config": text("qwen3", head_dim=8)}, without_markers(4), square(8, 8)
    ),
    "llava_next": Tiny(
        "llava_next",
        {**_NEXT, "text_config": text("mistral", head_dim=8, sliding_window=11), "vision_feature_layer": -1},
        without_markers(14),
        _tiles,
    ),
    "llava_onevision": Tiny(
        "llava_onevision",
        {**_NEXT, "vision_config": SIGLIP, "video_token_index": VIDEO, "text_config": text("qwen2")},
        without_markers(14),
        _tiles,
    ),
    **{
        name: Tiny(
            "internvl",
            {**_IDS, "vision_config": _INTERN_VISION, "text_config": config, "image_seq_length": 4},
            with_markers(4),
            square(16, 16),
        )
        for name, config in {
            "internvl-qwen2": text("qwen2", **_QWEN2),
            "internvl-qwen3": text("qwen3", head_dim=8),
            "internvl-llama": text("llama"),
        }.items()
    },
    "qwen2_vl": Tiny(
        "qwen2_vl",
        {
            **_QWEN_IDS,
            "text_config": text("qwen2_vl_text", rope_parameters=MROPE, **_QWEN2),
            "vision_config": {**qwen_vision(embed_dim=16, hidden_size=WIDTH, mlp_ratio=2)},
        },
        qwen_tokens,
        _qwen_pixels,
        ("mm_token_type_ids", False),
    ),
    "qwen2_5_vl": Tiny(
        "qwen2_5_vl",
        {
            **_QWEN_IDS,
            "text_config": text("qwen2_5_vl_text", rope_parameters=MROPE),
            "vision_config": qwen_vision(window_size=16, fullatt_block_indexes=[1]),
        },
        qwen_tokens,
        _qwen_pixels,
        ("mm_token_type_ids", False),
    ),
    "qwen3_vl": Tiny(
        "qwen3_vl",
        {
            **_QWEN_IDS,
            "text_config": text("qwen3_vl_text", head_dim=8, rope_parameters=MROPE),
            "vision_config": qwen_vision(deepstack_visual_indexes=[0, 1], num_position_embeddings=16),
        },
        qwen_tokens,
        _qwen_pixels,
        ("mm_token_type_ids", False),
    ),
    "glm4v": Tiny(
        "glm4v",
        {
            **_GLM_IDS,
            "text_config": text("glm4v_text", rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
            "vision_config": _GLM_VISION,
        },
        qwen_tokens,
        _qwen_pixels,
        ("mm_token_type_ids", False),
    ),
    "smolvlm": Tiny("smolvlm", {**_IDS, **_IDEFICS, "text_config": text("llama")}, with_markers(4), _listed),
    "idefics3": Tiny("idefics3", {**_IDS, **_IDEFICS, "text_config": text("llama")}, with_markers(4), _listed),
    "mistral3": Tiny(
        "mistral3",
        {
            "image_token_index": IMAGE,
            "text_config": text("mistral", head_dim=8),
            "vision_config": {**SMALL, "model_type": "pixtral", "image_size": 32, "patch_size": 4},
        },
        with_markers(4),
        _pixtral,
    ),
    "gemma3": Tiny(
        "gemma3",
        {
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
            "mm_tokens_per_image": 4,
            "text_config": text(
                "gemma3_text", head_dim=8, query_pre_attn_scalar=8, sliding_window=9, layer_types=_SLIDING
            ),
            "vision_config": {**SIGLIP, "image_size": 16},
        },
        with_markers(4),
        square(16, 16),
        ("token_type_ids", False),
    ),
    "ovis2": Tiny(
        "ovis2",
        {
            **_IDS,
            "visual_indicator_token_ids": [START, END, 54, 55, 56],
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "text_config": text("qwen2"),
            "vision_config": {**SMALL, "image_size": 8, "patch_size": 4, "vocab_size": 20},
        },
        with_markers(4),
        square(8, 8),
    ),
    **{
        name: Tiny(
            "molmo2",
            {**_MOLMO_IDS, "vision_config": _MOLMO_VISION, "adapter_config": _MOLMO_ADAPTER, "text_config": config},
            with_markers(2),
            _molmo2,
            ("mm_token_type_ids", True),
        )
        for name, config in {
            "molmo2-qwen3": _molmo_text(),
            "molmo2-olmo": _molmo_text(qk_norm_type="olmo", norm_after=True),
        }.items()
    },
    "mobilevlm": Tiny(
        "mobilevlm",
        {**_LLAVA, "vision_config": {**CLIP, "image_size": 16}, "text_config": text("llama"), "token_grid": 2},
        without_markers(4),
        square(16, 16),
    ),
}
