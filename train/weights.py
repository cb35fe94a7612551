"""The form of a checkpoint on the disk: the family's published weight names, and a plain config where it is dense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from models.families import family_of

# Names in memory -> names in llava-hf's checkpoints, which transformers, vLLM and others read.
_NAMES: Final = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.vision_tower\."), "vision_tower."),
    (re.compile(r"^model\.multi_modal_projector\."), "multi_modal_projector."),
)
_WRAPPED_TOWERS: Final = ("clip_vision_model", "siglip_vision_model")  # published with a `vision_model.` in between
_WRAPPER: Final = "vision_tower.vision_model."


def save_model(
    model: Any, folder: Path, *, weights: Mapping[str, Tensor] | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes config.json, generation_config.json and the weights of a model, whatever trained it.

    A dense model becomes an ordinary one of its family, which transformers loads without this repository; one with a
    stage plan keeps its own model type.

    Args:
        model: a fused model of any family.
        folder: where to write.
        weights: by their names in the model; None takes the model's.
        max_shard_size: of a safetensors file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(model.state_dict() if weights is None else weights)
    for name, weight in weights.items():  # ZeRO-3 gathers several into one storage, which no file may hold twice
        if weight.untyped_storage().nbytes() != weight.nbytes or not weight.is_contiguous():
            weights[name] = weight.clone(memory_format=torch.contiguous_format)
    if model.config.tie_word_embeddings:  # the flag that transformers ties by, whatever the text config says
        weights.pop("lm_head.weight", None)  # it is the embedding's
    dtype = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    family = family_of(model.config.model_type)
    if family.model_type != "llava":
        model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    config = _saved_config(model)
    config.dtype = dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if family.model_type != "llava":
        return
    save_torch_state_dict(
        {_published(name, model.config.vision_config.model_type): weight for name, weight in weights.items()},
        folder,
        max_shard_size=max_shard_size,
    )


def _saved_config(model: Any) -> Any:
    """Returns the config to save: Hugging Face's of the family for a dense model."""
    config, base = model.config, type(model).__bases__[-1]
    if config.stages is None and not config.plans:
        dropped = ("stages", "plans", "schedule", "model_type", "architectures", "auto_map")
        fields = {name: value for name, value in config.to_dict().items() if name not in dropped}
        config = type(config).__bases__[-1](**fields)
    config.architectures = [base.__name__ if config is not model.config else type(model).__name__]
    return config


def _published(name: str, tower: str) -> str:
    """Returns the name that llava-hf's checkpoints give to a weight."""
    for pattern, replacement in _NAMES:
        name, count = pattern.subn(replacement, name)
        if count:
            break
    if tower in _WRAPPED_TOWERS and name.startswith("vision_tower.") and not name.startswith(_WRAPPER):
        name = _WRAPPER + name.removeprefix("vision_tower.")
    return name
