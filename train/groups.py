"""The three parts of the model that a recipe gives learning rates to: what is frozen, what learns how fast."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from models.families import PARTS, family_of
from recipes.schema import LearningRates


def part_of(model: Any, name: str) -> str:
    """Returns the part of a parameter: projector, vision_tower or language_model (with its head)."""
    return family_of(model.config.model_type).part_of(name)


def freeze(model: nn.Module, rates: LearningRates, *, adapters: bool) -> None:
    """Lets exactly the parameters learn whose group has a rate; with adapters, of the language model only those."""
    for name, parameter in model.named_parameters():
        group = part_of(model, name)
        learns = getattr(rates, group) is not None
        if adapters and group == "language_model":
            learns = learns and "lora_" in name
        parameter.requires_grad_(learns)


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
    decayed, groups = set(decayed), []
    for group in trainable_counts(model):
        for decay in (True, False):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and part_of(model, name) == group and (name in decayed) == decay
            ]
            if parameters:
                decay_rate = weight_decay if decay else 0.0
                groups.append(
                    {
                        "params": parameters,
                        "lr": getattr(rates, group),
                        "weight_decay": decay_rate,
                        "name": group,
                    }
                )
    return groups
