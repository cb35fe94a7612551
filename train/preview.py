"""`--check`: what a recipe will train, for how many steps and at what cost, without weights and without data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlavaConfig

from data.processor import ProcessorError, VisionProcessor, with_settings
from data.sources import missing_paths
from data.stream import ConversationStream
from models.cost import Cost, plan_cost
from models.families import family_of
from recipes.schema import Phase, Recipe, RecipeError
from train.adapters import add_adapters
from train.arguments import is_timed
from train.checks import check_run, processor_is_here
from train.groups import freeze, trainable_counts
from train.initial import read_processor
from train.samples import hold_out, read_samples

_TYPICAL: Final = 640, 480  # width and height of a photo, as COCO's are


def preview(recipe: Recipe, num_ranks: int = 1) -> Iterator[str]:
    """Yields the lines of a check; data and weights that are not at hand are notes, not errors.

    Args:
        recipe: the recipe.
        num_ranks: processes that it is to run on.

    Raises:
        RecipeError: the recipe cannot be run, here or anywhere.
    """
    config = check_run(recipe, num_ranks)
    yield f"{recipe.name}: the recipe is valid"
    for part in ("checkpoint", "language_model", "vision_tower"):
        place = getattr(recipe.model, part)
        if place is not None and not Path(place).exists():
            yield f"note: model.{part}: {place} is no folder here; the run fetches it from the hub"
    for phase in recipe.phases:
        yield from _preview_phase(recipe, phase, config)


def _preview_phase(recipe: Recipe, phase: Phase, config: Any) -> Iterator[str]:
    yield f"{phase.name}:"
    counts = [f"{group} {count:,}" for group, count in _meta_counts(phase, config).items() if count]
    yield f"  trainable parameters: {', '.join(counts)}"
    rows, visual, text, note = _measure(recipe, phase, config)
    if note:
        yield f"  note: {note}"
    steps = _steps(phase, rows)
    if is_timed(phase.train):
        yield f"  steps: as many of {phase.train.global_batch} samples as {phase.train.max_seconds:g} s allow"
    elif steps is None:
        yield "  steps: unknown without the data; expected_rows would tell"
    else:
        yield f"  steps: {steps:,} of {phase.train.global_batch} samples"
    if phase.eval is not None:
        what = "held-out files" if phase.eval.files is not None else f"{phase.eval.share:.3g} of the rows, held out"
        yield f"  validation: {what}, every {phase.eval.every:,} steps and at the end"
    if text is None or visual is None:
        return
    costs = {
        name: plan_cost(config.text_config, plan.stages, visual=visual, text=text) for name, plan in phase.plans.items()
    }
    dense = plan_cost(config.text_config, None, visual=visual, text=text)
    yield f"  a sample: {visual} visual + {text} text tokens"
    for name, plan in phase.plans.items():
        of_steps = f", {plan.weight / _weights(phase):.0%} of the steps" if len(costs) > 1 else ""
        yield (
            f"  {name}{of_steps}: {costs[name].visual_token_layers:,} visual token-layers (dense "
            f"{dense.visual_token_layers:,}); decoder forward {costs[name].flops:.3g} FLOPs "
            f"({costs[name].flops / dense.flops:.0%} of dense)"
        )
    if steps is not None:
        samples, passes = steps * phase.train.global_batch, 3 if _trains_weights(phase) else 2
        flops = samples * _flops(phase, costs, passes)
        yield (
            f"  the run: {samples * (visual + text):,} tokens, {samples * text:,} of them text; decoder {flops:.3g} "
            f"FLOPs (dense {passes * samples * dense.flops:.3g}, {passes * samples * dense.flops / flops:.2f} times as "
            "many)"
        )


def _weights(phase: Phase) -> float:
    return sum(plan.weight for plan in phase.plans.values())


def _flops(phase: Phase, costs: Mapping[str, Cost], passes: int) -> float:
    """Returns the decoder's FLOPs of a mean sample: each plan's share of `passes`, and its teacher's forward pass."""
    total = 0.0
    for name, plan in phase.plans.items():
        teacher = 0 if plan.distill is None else costs[plan.distill.teacher].flops
        total += plan.weight / _weights(phase) * (passes * costs[name].flops + teacher)
    return total


def _trains_weights(phase: Phase) -> bool:
    """Returns whether backward also makes gradients of the decoder's weights: two passes' worth, else one."""
    return phase.train.learning_rate.language_model is not None and phase.train.lora is None


def _meta_counts(phase: Phase, config: Any) -> dict[str, int]:
    """Returns {group: parameters that learn}, from shapes alone."""
    with torch.device("meta"):
        model: Any = family_of(config.model_type).model_class(config)
        if phase.train.lora is not None:
            model = add_adapters(model, phase.train.lora)
    freeze(model, phase.train.learning_rate, adapters=phase.train.lora is not None)
    return trainable_counts(model)


def _measure(recipe: Recipe, phase: Phase, config: Any) -> tuple[int | None, int | None, int | None, str]:
    """Returns rows, visual tokens of a sample with images, text tokens of a mean sample, and a note on their source."""
    rows = phase.data.expected_rows
    if rows is not None and phase.eval is not None and phase.eval.files is None:
        rows -= round(rows * (phase.eval.share or 0.0))
    expected = rows, _typical_visual(recipe, phase, config), phase.data.expected_text_tokens
    missing = missing_paths(phase.data)
    if missing:
        return *expected, f"data: {missing[0]} is not here; rows and text tokens are the recipe's"
    if not processor_is_here(recipe.model):
        brings = recipe.model.language_model or recipe.model.config or recipe.model.checkpoint or ""
        return *expected, f"data: not read, its tokenizer ({brings}) is not here"
    dataset, _ = hold_out(phase, read_samples(phase, read_processor(recipe.model)), seed=recipe.seed)
    if isinstance(dataset, ConversationStream):
        return *expected, "data: streamed, so not read; rows and text tokens are the recipe's"
    with_image = sum(dataset.has_image)
    text = (sum(dataset.lengths) - dataset.visual_tokens) / len(dataset)
    return len(dataset), round(dataset.visual_tokens / max(1, with_image)), round(text), ""


def _typical_visual(recipe: Recipe, phase: Phase, config: Any) -> int | None:
    """Returns the tokens of one image: a LLaVA's, else of _TYPICAL pixels, without a processor what the recipe says."""
    if isinstance(config, LlavaConfig):
        return config.image_seq_length
    if not processor_is_here(recipe.model):
        return phase.data.expected_visual_tokens
    try:
        processor = with_settings(read_processor(recipe.model), phase.data)
        return VisionProcessor(processor, aspect=phase.data.image_aspect).count(*_TYPICAL)
    except ProcessorError as error:
        raise RecipeError(f"{phase.name}: {error}") from error


def _steps(phase: Phase, rows: int | None) -> int | None:
    if phase.train.max_steps is not None:
        return phase.train.max_steps
    if rows is None or is_timed(phase.train):
        return None
    return math.ceil(phase.train.epochs * math.ceil(rows / phase.train.global_batch))
