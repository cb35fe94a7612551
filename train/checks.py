"""What is checked before any weight is loaded, by `--check` and by every run."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import LlavaConfig

from data.processor import ProcessorError, VisionProcessor, apply_settings, processor_sources
from models import run_decoder
from models.auto import CONFIG_FAULTS, config_fields, config_of
from models.families import family_of
from models.schedules import SCHEDULES, TRAINED, plan_schedule
from models.stage_plan import StagePlan
from models.token_scorer import needs_scorer
from recipes.schema import ModelSection, Phase, Recipe, RecipeError, TrainSection
from train.arguments import check_deepspeed, passes_per_step
from train.checkpoints import check_same_run, check_sources
from train.errors import one_line
from train.parameters import adapted_layers, tower_depth
from train.pretrained_parts import check_parts
from train.weights import check_tokens, read_config, read_processor
from train.window_search import check_search

_WORKERS_A_CORE = 16
_SIDE = 112  # pixels
_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")  # of Weights & Biases
_BITSANDBYTES = ("adamw_8bit", "ademamix", "lion", "paged")  # Trainer has these from there


def check_run(recipe: Recipe, num_ranks: int) -> Any:
    """Checks a recipe for a number of ranks before any weights or data are loaded; returns the model's config.

    Raises:
        RecipeError: the recipe cannot be run here.
    """
    check_output(Path(recipe.output))
    for phase in reversed(recipe.phases):  # the last one first: an align phase may have its tracker from there
        with _keys_of(phase):
            _check_tracker(phase.train.tracker)
    for phase in recipe.phases:
        with _keys_of(phase):
            check_deepspeed(phase.train, num_ranks)
            limit = _WORKERS_A_CORE * (os.cpu_count() or 1)
            if phase.data.workers > limit:
                raise RecipeError(f"data.workers: got {phase.data.workers}, expected at most {limit} on this machine")
            _check_packing(phase, num_ranks)
            _check_libraries(phase.train)
            check_profile(phase.train, phase.train.max_steps)
    for name, plan in recipe.model.plans.items() if isinstance(recipe.model.stages, list) else ():
        if name == TRAINED or (name in SCHEDULES and not (name == "dense" and plan.plan is None)):
            expected = "expected a name that is no schedule's; dense is for plan: null"
            raise RecipeError(f"model.stages: got a plan named '{name}', {expected}")
    config = read_config(recipe.model)
    check_parts(recipe.model, config, local=True)
    if recipe.model.learn is not None:
        depth = config.text_config.num_hidden_layers
        check_search(recipe.model.learn, num_layers=depth, steps=recipe.train.max_steps)
    _check_model(recipe, config)
    check_sources(recipe, Path(recipe.output))
    check_same_run(recipe, Path(recipe.output))
    return config


def check_output(folder: Path) -> None:
    """Refuses a run folder that cannot be made or written to, and names that DeepSpeed would misread."""
    name = str(folder)
    if any(mark in name for mark in "*?[]") or not name.strip() or name != name.strip() or name.startswith("~"):
        raise RecipeError(f"output: got '{name}', expected a path without * ? [ ], outer spaces and a leading ~")
    repository = Path(__file__).resolve().parents[1]
    place = folder.resolve()
    taken = [repository / name for name in ("data", "docs", "eval", "models", "recipes", "tests", "train", ".git")]
    if place in (Path("/"), Path.home(), repository) or any(place.is_relative_to(path) for path in taken):
        raise RecipeError(f"output: got '{name}', expected a folder of its own, such as outputs/NAME")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"output: got '{name}', which is a file, expected a folder")
    above = place
    while not above.exists():
        above = above.parent
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise RecipeError(
            f"output: got '{name}', expected a folder that can be written ({above}: {error.strerror})"
        ) from error


@contextmanager
def _keys_of(phase: Phase) -> Iterator[None]:
    """Names the keys of the earlier phase as the recipe does, `align.train.lora.r` for `train.lora.r`."""
    try:
        yield
    except RecipeError as error:
        if phase.name == "align" and str(error).startswith(("train.", "data.")):
            raise RecipeError(f"align.{error}") from error
        raise


def _check_tracker(tracker: str) -> None:
    """Refuses a tracker that is not installed, and a WANDB_MODE that Weights & Biases does not know."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        others = " or ".join(name for name in ("wandb", "tensorboard", "none") if name != tracker)
        raise RecipeError(
            f"train.tracker: got {tracker}, which is not installed; expected {others}, or pip install {tracker}"
        )
    mode = os.environ.get("WANDB_MODE")
    if mode is not None and mode not in _MODES:
        raise RecipeError(f"environment: WANDB_MODE: got '{mode}', expected online, offline or disabled")


def _check_packing(phase: Phase, num_ranks: int) -> None:
    """Refuses a token budget that a forward pass of the longest sample exceeds, or that the data has no use for."""
    tokens, data = phase.train.tokens_per_step, phase.data
    if tokens is None:
        return
    for key, is_on in (("group_by_length", data.group_by_length), ("streaming", data.streaming)):
        if is_on:
            raise RecipeError(f"data.{key}: got true with train.tokens_per_step {tokens}, expected false")
    passes = passes_per_step(phase.train, num_ranks)
    if tokens < passes * data.max_length:
        raise RecipeError(
            f"train.tokens_per_step: got {tokens}, expected at least {passes * data.max_length}: {passes} forward "
            f"passes (global_batch / per_device_batch) of data.max_length {data.max_length}"
        )


def check_profile(train: TrainSection, steps: int | None) -> None:
    """Refuses a trace that begins after the last of the run's steps; None: their number is not known."""
    if train.profile is not None and steps is not None and train.profile.steps[0] > steps:
        raise RecipeError(
            f"train.profile.steps: got {train.profile.steps}, expected to begin within the run's {steps} steps"
        )


def _check_libraries(train: TrainSection) -> None:
    """Refuses what bitsandbytes does where there is no GPU, or no bitsandbytes."""
    bits = train.lora.bits if train.lora is not None else None
    key, found, instead = "optimizer", str(train.optimizer), "adamw_torch_fused"
    if bits is not None:
        key, found, instead = "lora.bits", str(bits), "null"
    elif not train.optimizer.startswith(_BITSANDBYTES):
        return
    if not torch.cuda.is_available():
        raise RecipeError(f"train.{key}: got {found}, expected {instead} here: it needs an NVIDIA GPU")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"train.{key}: got {found} without bitsandbytes, expected {instead}, or pip install bitsandbytes"
        )


def _check_model(recipe: Recipe, config: Any) -> None:
    """Builds the model without weights and, of a LLaVA, passes an image through its tower: shapes have to fit."""
    key = "model.config" if recipe.model.config is not None else "model.checkpoint"
    visual = None
    try:
        with torch.device("meta"):
            model: Any = family_of(config.model_type).model_class(config)
            if isinstance(config, LlavaConfig):  # the others look at values, which there are none of without weights
                size = config.vision_config.image_size
                pixels = torch.zeros(1, config.vision_config.num_channels, size, size)
                features = model.model.get_image_features(pixel_values=pixels, return_dict=True)
                visual = sum(len(image) for image in features.pooler_output)
    except CONFIG_FAULTS as error:
        raise RecipeError(f"{key}: config.json describes no model that can be built: {one_line(error)}") from error
    _check_decoder(key, model.model.get_decoder(), config)
    _check_deepstack(recipe, model)
    _check_scorer(recipe, config)
    if visual is not None:
        _check_visual_tokens(key, recipe, config, visual)
    if processor_is_here(recipe.model):
        _check_processor(key, recipe, config, visual)
    for phase in recipe.phases:
        with _keys_of(phase):
            _check_trained(phase.train, model)


def _check_trained(train: TrainSection, model: Any) -> None:
    """Refuses adapters and layers that the model does not have."""
    text = model.config.text_config
    for key, last, depth, what in (
        ("layers", None if train.layers is None else train.layers[1], text.num_hidden_layers, "the decoder's layers"),
        ("tower_layers", train.tower_layers, tower_depth(model), "the tower's layers up to the last that is read"),
    ):
        if last is not None and last > depth:
            raise RecipeError(f"train.{key}: got {last}, expected at most {depth}, {what}")
    if train.lora is None:
        return
    layers = adapted_layers(model, train.lora).values()
    narrowest = min((min(layer.in_features, layer.out_features) for layer in layers), default=0)
    if train.lora.r > narrowest:
        raise RecipeError(
            f"train.lora.r: got {train.lora.r}, expected at most {narrowest}, their narrowest layer's width"
        )


def _check_decoder(key: str, decoder: nn.Module, config: Any) -> None:
    text = config.text_config
    heads, shared = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    if shared is not None and heads % shared:
        raise RecipeError(
            f"{key}: text_config.num_key_value_heads: got {shared}, expected a divisor of num_attention_heads ({heads})"
        )
    tokens = torch.zeros(1, 2, text.hidden_size, device="meta")
    try:
        run_decoder(decoder, tokens, torch.zeros(1, 2, dtype=torch.bool))
    except ValueError as error:  # a decoder of another kind
        raise RecipeError(f"{key}: {one_line(error)}") from error
    except RuntimeError:
        pass  # a known kind, which goes no further without weights


def _check_visual_tokens(key: str, recipe: Recipe, config: Any, visual: int) -> None:
    """Compares the tower's tokens of an image with the config's and the plan's."""
    if config.image_seq_length != visual:
        raise RecipeError(
            f"{key}: image_seq_length: got {config.image_seq_length}, expected {visual}, the tokens that the vision "
            "tower makes of an image"
        )
    for name, named in recipe.model.plans.items():
        where = f"model.stages: plan '{name}': " if isinstance(recipe.model.stages, list) else "model.stages."
        for layer, kept in (named.stages.keep if named.stages else {}).items():
            if isinstance(kept, int) and kept > visual:
                raise RecipeError(f"{where}keep.{layer}: got {kept}, expected at most {visual}, an image's tokens")


def _check_processor(key: str, recipe: Recipe, config: Any, visual: int | None) -> None:
    """Compares the processor with the config and with a LLaVA's tokens of an image."""
    processor = read_processor(recipe.model)
    check_tokens(config, processor)
    for phase in recipe.phases:
        try:
            vision = VisionProcessor(apply_settings(copy(processor), phase.data), aspect=phase.data.image_aspect)
        except ProcessorError as error:
            raise RecipeError(f"{phase.name}: {error}") from error
        _check_pixels(phase, vision, None if visual is None else config.vision_config.image_size)
    if visual is None:
        return
    size = config.vision_config.image_size
    found = vision.count(size, size)
    if found != visual:
        raise RecipeError(f"{key}: processor: got {found} tokens for an image, expected {visual}, the vision tower's")


def _check_pixels(phase: Phase, vision: VisionProcessor, size: int | None) -> None:
    """Refuses settings that make of an oblong image pixels of another size than a tower's."""
    pixels = vision.encode([Image.new("RGB", (3 * _SIDE, 2 * _SIDE), "white")]).inputs["pixel_values"]
    if size is not None and tuple(pixels.shape[-2:]) != (size, size):
        found = " x ".join(map(str, pixels.shape[-2:]))
        raise RecipeError(
            f"{phase.name}: data.processor: got {found} pixels of an oblong image, expected {size} x {size}, the "
            "vision tower's"
        )


def processor_is_here(model: ModelSection) -> bool:
    """Returns whether the processor of a recipe's model can be read without a hub."""
    source, brings = processor_sources(model.config, model.checkpoint, model.language_model)
    return Path(source).exists() and Path(brings or source).exists()


def _check_deepstack(recipe: Recipe, model: Any) -> None:
    """Refuses a plan that leaves no layer to read the last DeepStack feature, as the first step of training would."""
    schedules = [model.resolve(name) for name in recipe.model.plans]
    if recipe.model.learn is not None:
        width = recipe.model.learn.width(model.config.text_config.num_hidden_layers)
        schedules.append(plan_schedule(StagePlan(0, width)))
    for schedule in schedules:
        try:
            model.check_training(schedule)
        except ValueError as error:
            raise RecipeError(f"model.{error}") from error


def _check_scorer(recipe: Recipe, config: Any) -> None:
    """Refuses a new scorer of visual tokens that no phase trains."""
    model = recipe.model
    if not needs_scorer(config) or any(phase.train.learning_rate.projector for phase in recipe.phases):
        return
    source = model.checkpoint or model.config or ""
    if model.checkpoint is None or not needs_scorer(config_of(config_fields(model.config, model.checkpoint), source)):
        raise RecipeError(
            "train.learning_rate.projector: got null with select: learned, expected a number > 0: the scorer is new "
            "and learns with the projector"
        )
