"""`--check`: what a recipe will train, for how many steps and at what cost, without weights and without data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Generator
from transformers import LlavaConfig

from data.processor import ProcessorError, VisionProcessor, apply_settings
from data.sources import missing_paths
from data.stream import ConversationStream
from models.cost import plan_cost
from recipes.schema import Phase, Recipe, RecipeError, TrainSection
from train.arguments import is_timed, passes_per_step, read_deepspeed, split_batch, total_steps
from train.checks import check_run, processor_is_here
from train.estimate import Batch, Card, Estimate
from train.samples import hold_out, read_samples, sample_order
from train.weights import read_processor
from train.window_search import check_search

_KEPT_BACK: Final = 0.08  # share of a card's memory
_TYPICAL: Final = 640, 480  # width and height of a photo, as COCO's are


def preview(recipe: Recipe, num_ranks: int = 1, *, card: Card | None = None, mfu: float = 0.4) -> Iterator[str]:
    """Yields the lines of a check; data and weights that are not at hand are notes, not errors.

    Args:
        recipe: the recipe.
        num_ranks: processes that it is to run on, where `card` does not say.
        card: the GPUs that it is to run on; None says neither whether it fits nor how long it takes.
        mfu: share of the cards' peak that the run is assumed to reach.

    Raises:
        RecipeError: the recipe cannot be run, here or anywhere.
    """
    num_ranks = num_ranks if card is None else card.count
    config = check_run(recipe, num_ranks)
    yield f"{recipe.name}: the recipe is valid"
    for part in ("checkpoint", "language_model", "vision_tower"):
        place = getattr(recipe.model, part)
        if place is not None and not Path(place).exists():
            yield f"note: model.{part}: {place} is not a local folder; the run needs it, as a folder or from the hub"
    for phase in recipe.phases:
        data = _measure(recipe, phase, config, num_ranks)
        steps, batch = _steps(phase.train, data.steps), data.batch
        if phase.learn is not None:
            check_search(phase.learn, num_layers=config.text_config.num_hidden_layers, steps=steps)
        estimate = Estimate(config, phase.train, phase.plans, phase.learn, steps)
        yield f"{phase.name}:"
        yield from _size(phase, estimate, steps, data.note)
        if batch is not None:
            samples = None if steps is None else round(steps * data.step_samples)
            yield from _costs(phase, estimate, batch, steps)
            yield from _whole_run(estimate, data.mean or batch, samples)
            yield from _memory(phase, estimate, batch, num_ranks=num_ranks, card=card)
            yield from _hours(estimate, data.mean or batch, samples=samples, card=card, mfu=mfu)


@dataclass(frozen=True)
class _Data:
    """What is known of a phase's data; None where it is not.

    Attributes:
        batch: the mean sample with an image.
        step_samples: samples of an optimizer step, on average.
        steps: optimizer steps of an epoch.
        mean: the mean sample, those without an image included.
        note: for people.
    """

    batch: Batch | None
    step_samples: float
    steps: int | None
    mean: Batch | None = None
    note: str = ""


def _size(phase: Phase, estimate: Estimate, steps: int | None, note: str) -> Iterator[str]:
    counts = [f"{group} {count:,}" for group, count in estimate.counts.items() if count]
    yield f"  trainable parameters: {', '.join(counts)}"
    if note:
        yield f"  note: {note}"
    tokens = phase.train.tokens_per_step
    size = f"{phase.train.global_batch} samples" if tokens is None else f"{tokens:,} tokens"
    if is_timed(phase.train):
        yield f"  steps: as many of {size} as {phase.train.max_seconds:g} s allow"
    elif steps is None:
        yield "  steps: unknown without the data; set data.expected_rows"
    else:
        yield f"  steps: {steps:,} of {size}"
    if phase.eval is not None:
        what = "held-out files" if phase.eval.files is not None else f"{phase.eval.share:.3g} of the rows, held out"
        yield f"  validation: {what}, every {phase.eval.every:,} steps and at the end"


def _costs(phase: Phase, estimate: Estimate, batch: Batch, steps: int | None) -> Iterator[str]:
    text_config, visual, text = estimate.config.text_config, batch.visual, batch.text
    costs = estimate.costs(visual=visual, text=text)
    dense = plan_cost(text_config, None, visual=visual, text=text)
    if phase.learn is not None:
        depth = text_config.num_hidden_layers
        width = phase.learn.width(depth)
        yield f"  stages: the first {phase.learn.steps:,} steps find the window, {width} of {depth} layers"
    yield f"  a sample with an image: {visual} visual + {text} text tokens"
    for name, cost in costs.items():
        is_known = len(costs) > 1 and (phase.learn is None or steps is not None)
        of_steps = f", {estimate.ratios[name]:.0%} of the steps" if is_known else ""
        yield (
            f"  {name}{of_steps}: {cost.visual_token_layers:,} visual token-layers (dense "
            f"{dense.visual_token_layers:,}); decoder forward {cost.flops:.3g} FLOPs "
            f"({cost.flops / dense.flops:.0%} of dense)"
        )


def _whole_run(estimate: Estimate, mean: Batch, samples: int | None) -> Iterator[str]:
    """Yields the tokens and the decoder's FLOPs of so many samples."""
    if samples is None:
        return
    visual, text = mean.visual, mean.text
    dense = plan_cost(estimate.config.text_config, None, visual=visual, text=text)
    flops = samples * estimate.decoder_flops(estimate.costs(visual=visual, text=text))
    without = samples * estimate.passes * dense.flops
    yield (
        f"  the run: {samples * (visual + text):,} tokens, {samples * text:,} of them text; decoder {flops:.3g} "
        f"FLOPs (dense {without:.3g}, {without / flops:.2f} times as many)"
    )


def _memory(phase: Phase, estimate: Estimate, batch: Batch, *, num_ranks: int, card: Card | None) -> Iterator[str]:
    """Yields the memory of one GPU, of a batch of mean samples and of the longest ones, and whether it fits."""
    train, deepspeed, visual, text = phase.train, read_deepspeed(phase.train), batch.visual, batch.text
    stage = deepspeed["zero_optimization"]["stage"]
    samples = most_samples = split_batch(train, num_ranks)[0]
    if train.tokens_per_step is not None:
        tokens = train.tokens_per_step / passes_per_step(train, num_ranks)
        samples, most_samples = (max(1, round(tokens / size)) for size in (visual + text, phase.data.max_length))
    mean = Batch(samples, visual, text)
    longest = Batch(most_samples, visual, max(text, phase.data.max_length - visual))
    states = {one: estimate.states(deepspeed, stage=one, ranks=num_ranks) for one in (1, 2, 3)}
    with_it, without = (estimate.activations(mean, checkpointing=one) for one in (True, False))
    peak, most = (estimate.activations(one, checkpointing=train.gradient_checkpointing) for one in (mean, longest))
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in vars(states[stage]).items())
    yield f"  memory of a GPU, ZeRO-{stage} on {num_ranks}, {samples} such samples a forward pass, in GiB: {parts}"
    yield (
        f"    activations {_gib(with_it)} with checkpointing, {_gib(without)} without; "
        f"{'with' if train.gradient_checkpointing else 'without'}, for samples of {phase.data.max_length:,} tokens "
        f"{_gib(most)}"
    )
    stages = ", ".join(f"ZeRO-{one} {_gib(memory.total + peak)}" for one, memory in states.items())
    whole, highest = states[stage].total + peak, states[stage].total + most
    yield f"    in all {_gib(whole)}, at most {_gib(highest)}; by stage: {stages}"
    if card is not None:
        room = card.gigabytes * 2**30 * (1 - _KEPT_BACK)
        sizes = (highest, "fits"), (whole, "fits, but not the longest samples")
        words = next((words for size, words in sizes if size <= room), "does not fit: lower train.per_device_batch")
        yield f"    {card.gigabytes:g} GB: {words} ({_KEPT_BACK:.0%} are kept for CUDA and fragmentation)"


def _hours(estimate: Estimate, mean: Batch, *, samples: int | None, card: Card | None, mfu: float) -> Iterator[str]:
    """Yields how long so many samples take at a share of the cards' peak."""
    if card is None or samples is None:
        return
    if card.peak is None:
        yield "  time: unknown; give --gpu the name of a card, such as A100"
        return
    flops = samples * estimate.step_flops(mean)
    hours = flops / (card.count * card.peak * mfu) / 3600
    at = f"{mfu:.0%} of {card.count} x {card.peak / 1e12:g} TFLOP/s"
    yield f"  time: {hours:.1f} hours at {at} (MFU; {flops:.3g} model FLOPs)"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _measure(recipe: Recipe, phase: Phase, config: Any, num_ranks: int) -> _Data:
    """Returns what the data holds; where it is not here, what the recipe says of it."""
    rows = phase.data.expected_rows
    if rows is not None and phase.eval is not None and phase.eval.files is None:
        rows -= round(rows * (phase.eval.share or 0.0))
    visual, text = _typical_visual(recipe, phase, config), phase.data.expected_text_tokens
    batch = None if visual is None or text is None else Batch(1, visual, text)
    step_samples = _step_samples(phase.train, batch)
    steps = None if rows is None or step_samples is None else math.ceil(rows / step_samples)
    expected = partial(_Data, batch, step_samples or 0.0, steps)
    missing = missing_paths(phase.data)
    if missing:
        return expected(note=f"data: {missing[0]} is not here; rows and text tokens are the recipe's")
    if not processor_is_here(recipe.model):
        brings = recipe.model.language_model or recipe.model.config or recipe.model.checkpoint or ""
        return expected(note=f"data: not read, its tokenizer ({brings}) is not here")
    dataset, _ = hold_out(phase, read_samples(phase, read_processor(recipe.model)), seed=recipe.seed)
    order = sample_order(phase, dataset, seed=recipe.seed, ranks=num_ranks)
    if isinstance(dataset, ConversationStream) or order is None:
        return expected(note="data: streamed, so not read; rows and text tokens are the recipe's")
    drawn = dataset.epoch(Generator().manual_seed(recipe.seed))  # by the weights of its sources
    counts = dataset.rows["visual"][:]
    visual, images = sum(counts[row] for row in drawn), sum(dataset.has_image[row] for row in drawn)
    text = round((sum(dataset.lengths[row] for row in drawn) - visual) / len(drawn))
    with_image, mean = (Batch(1, round(visual / number), text) for number in (max(1, images), len(drawn)))
    by_tokens = phase.train.tokens_per_step is not None
    step_samples = len(drawn) / order.steps if by_tokens else phase.train.global_batch
    return _Data(with_image, step_samples, order.steps, mean)


def _step_samples(train: TrainSection, sample: Batch | None) -> float | None:
    """Returns the samples of an optimizer step, where each has so many tokens; None where that is not known."""
    if train.tokens_per_step is None:
        return train.global_batch
    return None if sample is None else train.tokens_per_step / (sample.visual + sample.text)


def _typical_visual(recipe: Recipe, phase: Phase, config: Any) -> int | None:
    """Returns the tokens of one image: a LLaVA's, else of _TYPICAL pixels, without a processor what the recipe says."""
    if isinstance(config, LlavaConfig):
        return config.image_seq_length
    if not processor_is_here(recipe.model):
        return phase.data.expected_visual_tokens
    try:
        processor = apply_settings(read_processor(recipe.model), phase.data)
        return VisionProcessor(processor, aspect=phase.data.image_aspect).count(*_TYPICAL)
    except ProcessorError as error:
        raise RecipeError(f"{phase.name}: {error}") from error


def _steps(train: TrainSection, steps_an_epoch: int | None) -> int | None:
    """Returns the optimizer steps of a phase; None where they are not known."""
    if train.max_steps is None and steps_an_epoch is None:
        return None
    return total_steps(train, steps_an_epoch or 0)
