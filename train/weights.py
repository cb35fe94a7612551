"""The form of a checkpoint on the disk: the family's published weight names, and a plain config where it is dense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import LlavaConfig

# Names in memory -> names in llava-hf's checkpoints, which transformers, vLLM and others read.
_NAMES: Final = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.vision_tower\."), "vision_tower."),
    (re.compile(r"^model\.multi_modal_projector\."), "multi_modal_projector."),
)
_WRAPPED_TOWERS: Final = ("clip_vision_model", "siglip_vision_model")  # published with a `vision_model.` in between
_WRAPPER: Final = "vision_tower.vision_model."
_DENSE_CLASS: Final = "LlavaForConditionalGeneration"


def save_model(
    model: Any, folder: Path, *, weights: Mapping[str, Tensor] | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes config.json, generation_config.json and the weights of a LLaVA, whatever trained it.

    A dense model becomes an ordinary LLaVA that transformers loads without this repository; one with a stage plan
    keeps its own model type.

    Args:
        model: a FusedLlavaForConditionalGeneration.
        folder: where to write.
        weights: by their names in the model; None takes the model's.
        max_shard_size: of a safetensors file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(model.state_dict() if weights is None else weights)
    for name, weight in weights.items():  # ZeRO-3 gathers several into one storage, which no file may hold twice
        if weight.untyped_storage().nbytes() != weight.nbytes or not weight.is_contiguous():
            weights[name] = weight.clone(memory_format=torch.contiguous_format)
    if model.config.get_text_config().tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # it is the embedding's
    config = model.config
    if config.stages is None:
        fields = {
            name: value for name, value in config.to_dict().items() if name not in ("stages", "schedule", "model_type")
        }
        config = LlavaConfig(**fields)
    config.architectures = [_DENSE_CLASS if model.config.stages is None else type(model).__name__]
    config.dtype = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_torch_state_dict(
        {_published(name, model.config.vision_config.model_type): weight for name, weight in weights.items()},
        folder,
        max_shard_size=max_shard_size,
    )


def _published(name: str, tower: str) -> str:
    """Returns the name that llava-hf's checkpoints give to a weight."""
    for pattern, replacement in _NAMES:
        name, count = pattern.subn(replacement, name)
        if count:
            break
    if tower in _WRAPPED_TOWERS and name.startswith("vision_tower.") and not name.startswith(_WRAPPER):
        name = _WRAPPER + name.removeprefix("vision_tower.")
    return name
