"""Checks that pretrained parts are not quantized, and compute as model.config describes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, PreTrainedConfig

from recipes.schema import ModelSection, RecipeError

# Fields in which a part may differ from model.config: no weight and no output depends on them.
_WITHOUT_EFFECT: Final = {
    "vocab_size",  # rows are added for <image> and <pad>
    "tie_word_embeddings",  # the part's is taken
    "initializer_range",
    "initializer_factor",
    "max_position_embeddings",  # of a vision tower the weights' shapes are compared
    "max_window_layers",  # layer_types follow from it
    "pretraining_tp",
    "projection_dim",
    "use_cache",
    "vision_use_head",
}


def check_parts(model: ModelSection, config: Any, *, local: bool) -> None:
    """Checks the config.json of every checkpoint that the recipe names; loading it reports one that cannot be read.

    Args:
        model: the recipe's section.
        config: the fused config of the recipe's model.
        local: check local folders only; otherwise also checkpoints on the hub.

    Raises:
        RecipeError: weights are quantized, which cannot be trained, or a part does not compute as `config` says.
    """
    for part, source in _sources(model, local=local):
        try:
            fields, _ = PreTrainedConfig.get_config_dict(source)
        except OSError:
            continue
        _check_quantization(f"model.{part}: '{source}'", fields)
        if part in ("language_model", "vision_tower"):
            _check_fields(part, source, config)


def _sources(model: ModelSection, *, local: bool) -> Iterator[tuple[str, str]]:
    for part in ("config", "checkpoint", "language_model", "vision_tower"):
        source = getattr(model, part)
        if source is not None and (not local or Path(source).exists()):
            yield part, source


def _check_quantization(where: str, fields: dict[str, Any]) -> None:
    for one in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        found = one.get("quantization_config")
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise RecipeError(
                f"{where}: config.json: quantization_config: got {method}, expected weights that are not quantized; "
                "train.lora.bits quantizes them as it loads them"
            )


def _check_fields(part: str, source: str, config: Any) -> None:
    """Compares a part's config with its section of the fused config, which is the one that is saved."""
    section = "text_config" if part == "language_model" else "vision_config"
    try:
        whole = AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        return
    theirs, ours = getattr(whole, section, whole).to_dict(), getattr(config, section).to_dict()
    common = {name for name in theirs.keys() & ours.keys() if not name.endswith("_token_id")}
    for name in ("model_type", *sorted(common - PreTrainedConfig().to_dict().keys() - _WITHOUT_EFFECT)):
        if not _is_same(theirs[name], ours[name]):
            raise RecipeError(
                f"model.{part}: '{source}': config.json: {name}: got {theirs[name]}, expected {ours[name]}, as "
                f"{section} of model.config says"
            )


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
