"""Trainable parameters: freezing by part and layer, optimizer groups, and LoRA adapters and their merge."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from models.families import PARTS, family_of
from models.schedules import TRAINED, Fused
from models.token_scorer import is_scorer
from recipes.schema import LearningRates, Lora, RecipeError, TrainSection
from train.errors import TrainingError
from train.weights import load_checkpoint

_LAYER: Final = re.compile(r"\.(?:layers|layer|blocks|block|h)\.(\d+)(?:\.|$)")
_TOLERANCE: Final = 1e-3  # of a merge in float32, relative to the largest logit


def base_of(model: Any) -> Any:
    """Returns the model inside adapters, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def part_of(model: Any, name: str) -> str:
    """Returns the part of a parameter: projector, vision_tower or language_model (with its head)."""
    return family_of(model.config.model_type).part_of(name)


def layer_of(name: str) -> int | None:
    """Returns the number of the layer that a parameter or module is in, or None outside of all layers."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def tower_depth(model: Any) -> int:
    """Returns the number of layers of the vision tower up to the last one that is read; LLaVA leaves out one."""
    numbers = [layer_of(name) for name, _ in model.named_parameters() if part_of(model, name) == "vision_tower"]
    depth = 1 + max((number for number in numbers if number is not None), default=-1)
    read = getattr(base_of(model).config, "vision_feature_layer", None)
    if read is None:
        return depth
    # hidden states are counted with the input of the first layer
    return max(one if one >= 0 else depth + 1 + one for one in (read if isinstance(read, list | tuple) else [read]))


def freeze(model: nn.Module, train: TrainSection) -> None:
    """Sets requires_grad: a parameter trains if its part has a learning rate and its layer is selected by the recipe.

    In a part with adapters only the adapters train. The scorer of visual tokens trains with the projector and never has
    adapters.
    """
    adapted = train.lora.parts if train.lora is not None else ()
    depth = tower_depth(model)
    chosen = {
        "language_model": None if train.layers is None else range(*train.layers),
        "vision_tower": None if train.tower_layers is None else range(depth - train.tower_layers, depth),
    }
    for name, parameter in model.named_parameters():
        group = part_of(model, name)
        layers = chosen.get(group)
        learns = getattr(train.learning_rate, group) is not None and (layers is None or layer_of(name) in layers)
        parameter.requires_grad_(learns and (group not in adapted or "lora_" in name or is_scorer(name)))


def trainable_counts(model: nn.Module) -> dict[str, int]:
    """Returns {group: number of parameters that learn}; under ZeRO-3 of the whole parameter, not of this share."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[part_of(model, name)] += getattr(parameter, "ds_numel", parameter.numel())
    return counts


def parameter_groups(
    model: nn.Module, rates: LearningRates, *, decayed: Iterable[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Returns optimizer groups of what learns: of each part, the `decayed` parameters, by name, and the others."""
    decayed = set(decayed)
    members: dict[tuple[str, bool], list[Any]] = {kind: [] for kind in product(PARTS, (True, False))}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[part_of(model, name), name in decayed].append(parameter)
    return [
        {"params": some, "lr": getattr(rates, part), "weight_decay": weight_decay if is_in else 0.0, "name": part}
        for (part, is_in), some in members.items()
        if some
    ]


def muon_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Returns the weights that learn by Muon: matrices, but neither embeddings nor the head."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
        and len(getattr(weight, "ds_shape", weight.shape)) == 2  # ZeRO-3 keeps a flat piece
        and id(weight) not in tables
        and "lm_head" not in name
    ]


def muon_groups(model: nn.Module, groups: Iterable[Mapping[str, Any]], **adam: Any) -> list[dict[str, Any]]:
    """Returns the groups for DeepSpeed's MuonWithAuxAdam: Muon for matrices, Adam for what else learns.

    Embeddings and the head are Adam's too. A matrix's rate is scaled so that its update has the size of AdamW's at
    the recipe's rate: DeepSpeed's update of an m x n matrix has a root mean square of sqrt(max(1, m / n) / max(m, n)),
    AdamW's about 0.2. Source: Moonlight (arXiv 2502.16982), section 2.2.
    """
    matrices = {id(weight) for weight in muon_matrices(model)}
    split: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for weight in group["params"]:
            shape = tuple(getattr(weight, "ds_shape", weight.shape))  # ZeRO-3 keeps a flat piece
            weight.use_muon = id(weight) in matrices
            rows, columns = shape if weight.use_muon else (1, 1)
            scale = 0.2 * math.sqrt(max(rows, columns) / max(1.0, rows / columns)) if weight.use_muon else 1.0
            options = {"lr": group["lr"] * scale, "use_muon": weight.use_muon, **({} if weight.use_muon else adam)}
            key = number, weight.use_muon, scale
            split.setdefault(key, {**group, **options, "params": []})["params"].append(weight)
    return list(split.values())


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
        linears = sorted({name.rpartition(".")[2] for name in linear if part_of(model, name) == part})
        if not linears:
            raise RecipeError(f"train.lora.parts: got {part}, which has no Linear layer in this model, expected others")
        if not any(part_of(model, name) == part for name in chosen):
            raise RecipeError(f"train.lora.modules: got none of {part}, expected one of {', '.join(linears)}")
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

    `weights` are what was learned, by their names in the adapted model.

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
