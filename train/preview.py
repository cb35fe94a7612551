"""`--check`: what a recipe will train, for how many steps and at what cost, without weights and without data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.sources import missing_paths
from data.stream import ConversationStream
from models import FusedLlavaConfig, FusedLlavaForConditionalGeneration
from models.cost import plan_cost
from recipes.schema import Phase, Recipe
from train.adapters import add_adapters
from train.arguments import is_timed
from train.checks import check_run
from train.groups import freeze, trainable_counts
from train.initial import read_processor
from train.samples import hold_out, read_samples


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


def _preview_phase(recipe: Recipe, phase: Phase, config: FusedLlavaConfig) -> Iterator[str]:
    yield f"{phase.name}:"
    counts = [f"{group} {count:,}" for group, count in _meta_counts(phase, config).items() if count]
    yield f"  trainable parameters: {', '.join(counts)}"
    rows, text, note = _measure(recipe, phase, config)
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
    if text is None:
        return
    visual = config.image_seq_length
    cost = plan_cost(config.text_config, recipe.plan, visual=visual, text=text)
    dense = plan_cost(config.text_config, None, visual=visual, text=text)
    share = cost.flops / dense.flops
    yield (
        f"  a sample: {visual} visual + {text} text tokens; {cost.visual_token_layers:,} visual token-layers "
        f"(dense {dense.visual_token_layers:,}); decoder forward {cost.flops:.3g} FLOPs ({share:.0%} of dense)"
    )
    if steps is not None:
        samples = steps * phase.train.global_batch
        passes = 3 if _trains_weights(phase) else 2
        yield (
            f"  the run: {samples * (visual + text):,} tokens, {samples * text:,} of them text; decoder "
            f"{passes * samples * cost.flops:.3g} FLOPs (dense {passes * samples * dense.flops:.3g})"
        )


def _trains_weights(phase: Phase) -> bool:
    """Returns whether backward also makes gradients of the decoder's weights: two passes' worth, else one."""
    return phase.train.learning_rate.language_model is not None and phase.train.lora is None


def _meta_counts(phase: Phase, config: FusedLlavaConfig) -> dict[str, int]:
    """Returns {group: parameters that learn}, from shapes alone."""
    with torch.device("meta"):
        model: Any = FusedLlavaForConditionalGeneration(config)
        if phase.train.lora is not None:
            model = add_adapters(model, phase.train.lora)
    freeze(model, phase.train)
    return trainable_counts(model)


def _measure(recipe: Recipe, phase: Phase, config: FusedLlavaConfig) -> tuple[int | None, int | None, str]:
    """Returns rows, text tokens of a mean sample, and a note on where they come from when it is not the data."""
    rows = phase.data.expected_rows
    if rows is not None and phase.eval is not None and phase.eval.files is None:
        rows -= round(rows * (phase.eval.share or 0.0))
    expected = rows, phase.data.expected_text_tokens
    missing = missing_paths(phase.data)
    if missing:
        return *expected, f"data: {missing[0]} is not here; rows and text tokens are the recipe's"
    brings = recipe.model.language_model or recipe.model.config or recipe.model.checkpoint or ""
    if not Path(brings).exists():
        return *expected, f"data: not read, its tokenizer ({brings}) is not here"
    dataset, _ = hold_out(phase, read_samples(phase, read_processor(recipe.model)), seed=recipe.seed)
    if isinstance(dataset, ConversationStream):
        return *expected, "data: streamed, so not read; rows and text tokens are the recipe's"
    with_image = sum(dataset.has_image)
    text = (sum(dataset.lengths) - with_image * config.image_seq_length) / len(dataset)
    return len(dataset), round(text), ""


def _steps(phase: Phase, rows: int | None) -> int | None:
    if phase.train.max_steps is not None:
        return phase.train.max_steps
    if rows is None or is_timed(phase.train):
        return None
    return math.ceil(phase.train.epochs * math.ceil(rows / phase.train.global_batch))
