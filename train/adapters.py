"""Low-rank adapters, and the merge that makes its result an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from models.schedules import TRAINED, Fused
from models.token_scorer import is_scorer
from recipes.schema import Lora, RecipeError
from train.errors import TrainingError
from train.groups import base_of, layer_of, part_of
from train.initial import load_checkpoint

_TOLERANCE: Final = 1e-3  # float32, relative to the largest logit


def add_adapters(model: Any, lora: Lora) -> PeftModel:
    """Returns the model with the adapters of a recipe; errors as adapted_layers."""
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_dora=lora.dora,
            use_rslora=lora.rslora,
            target_modules=list(adapted_layers(model, lora)),
        ),
    )


def adapted_layers(model: Any, lora: Lora) -> dict[str, nn.Linear]:
    """Returns the Linear layers that get adapters, by name.

    Raises:
        RecipeError: `modules` or `layers` names one that the model does not have, or a part gets no adapter: without
            one it would not learn.
    """
    numbers = _numbers(model, lora)
    linear: dict[str, nn.Linear] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and part_of(model, name) in lora.parts
        and module is not model.lm_head
        and not is_scorer(name)
    }
    known = sorted({name.rpartition(".")[2] for name in linear})
    for name in lora.modules or ():
        if name not in known:
            raise RecipeError(f"train.lora.modules: got '{name}', expected {', '.join(known)}")
    chosen = {
        name: module
        for name, module in linear.items()
        if (lora.modules is None or name.rpartition(".")[2] in lora.modules)
        and (part_of(model, name) != "language_model" or layer_of(name) in numbers)
    }
    for part in lora.parts:
        own = sorted({name.rpartition(".")[2] for name in linear if part_of(model, name) == part})
        if not own:
            raise RecipeError(f"train.lora.parts: got {part}, which has no Linear layer in this model, expected others")
        if not any(part_of(model, name) == part for name in chosen):
            raise RecipeError(f"train.lora.modules: got none of {part}, expected one of {', '.join(own)}")
    return chosen


def _numbers(model: Any, lora: Lora) -> Container[int | None]:
    """Returns the layers of the language model that get adapters."""
    depth = model.config.text_config.num_hidden_layers
    if lora.layers == "all":
        return range(depth)
    if lora.layers == "window":
        return _window(model, depth)
    for number in lora.layers:
        if not 0 <= number < depth:
            raise RecipeError(f"train.lora.layers: got {number}, expected numbers from 0 to {depth - 1}")
    return lora.layers


def _window(model: Any, depth: int) -> list[int]:
    """Returns the layers that see vision under any of the model's plans."""
    names = model.config.plans or (TRAINED,)
    plans = [schedule.plan for schedule in map(model.resolve, names) if isinstance(schedule, Fused)]
    if not plans:
        where = "model.stages null" if model.config.plans is None else "no plan in model.stages but dense ones"
        raise RecipeError(f"train.lora.layers: got window with {where}, expected all or numbers of layers")
    return [layer for layer in range(depth) if any(plan.sees(layer) for plan in plans)]


def merged(weights: Mapping[str, Tensor], lora: Lora, *, initial: Path, dtype: torch.dtype) -> Any:
    """Returns the full model: the initial checkpoint with what was learned, adapters merged in float32.

    Args:
        weights: learned weights by their names in the adapted model.
        lora: the adapters' shape.
        initial: checkpoint that the training started from.
        dtype: of the returned weights.

    Raises:
        TrainingError: a weight has no place, or the merged model's logits are not the adapted model's.
    """
    base = load_checkpoint(initial, dtype=torch.float32)
    adapted = add_adapters(base, lora).eval()
    report = adapted.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    if report.unexpected_keys:
        raise TrainingError(f"merge: {report.unexpected_keys[0]} has no place in the model")
    tokens = torch.arange(3, 19)[None] % base.config.text_config.vocab_size  # text alone: no image token
    tokens[tokens == base.config.image_token_id] = 0
    with torch.no_grad():
        before = _outputs(adapted, tokens)
        model = adapted.merge_and_unload(safe_merge=True)
        after = _outputs(model, tokens)
    for what, expected in before.items():
        error = float((expected - after[what]).abs().max() / expected.abs().max())
        if not error <= _TOLERANCE:
            raise TrainingError(f"merge: {what} differ by {error:.1e}, expected at most {_TOLERANCE:.0e}")
    return model.to(dtype)


def _outputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Returns the logits of a text and the features of an image."""
    inner = base_of(model)
    image = type(inner).family_blank(inner.config)
    torch.manual_seed(0)
    image = {name: torch.rand_like(one) if one.is_floating_point() else one for name, one in image.items()}
    features = inner.model.get_image_features(**image, return_dict=True).pooler_output
    return {"logits": model(input_ids=tokens).logits, "image features": torch.cat(list(features))}
