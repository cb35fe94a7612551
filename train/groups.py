"""The three parts of the model that a recipe gives learning rates to: what is frozen, what learns how fast."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from torch import nn

from models.families import PARTS, family_of
from models.token_scorer import is_scorer
from recipes.schema import LearningRates, TrainSection

_LAYER: Final = re.compile(r"\.(?:layers|layer|blocks|block|h)\.(\d+)(?:\.|$)")


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
    """Returns the number of layers of the vision tower."""
    numbers = [layer_of(name) for name, _ in model.named_parameters() if part_of(model, name) == "vision_tower"]
    return 1 + max((number for number in numbers if number is not None), default=-1)


def freeze(model: nn.Module, train: TrainSection) -> None:
    """Lets exactly the parameters learn whose group has a rate and, where the recipe names some, whose layer it names.

    Of a part with adapters only those learn; a scorer of visual tokens, which learns with the projector, has none.
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
    """Returns optimizer groups: for each group of the model, parameters with and without weight decay.

    Args:
        model: after `freeze`.
        rates: peak learning rates.
        decayed: names of the parameters that weight decay applies to.
        weight_decay: their decay.
    """
    decayed, groups = set(decayed), trainable_counts(model)
    members: dict[str, tuple[list[Any], list[Any]]] = {group: ([], []) for group in groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[part_of(model, name)][name not in decayed].append(parameter)
    return [
        {"params": parameters, "lr": getattr(rates, group), "weight_decay": decay, "name": group}
        for group, both in members.items()
        for parameters, decay in zip(both, (weight_decay, 0.0), strict=True)
        if parameters
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
            own = {"lr": group["lr"] * scale, "use_muon": weight.use_muon, **({} if weight.use_muon else adam)}
            key = number, weight.use_muon, scale
            split.setdefault(key, {**group, **own, "params": []})["params"].append(weight)
    return list(split.values())
