"""Builds the initial checkpoint of a run, and loads and saves checkpoints."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from data.processor import ProcessorError, VisionProcessor, model_processor, save_processor
from models import FusedAutoModel, FusedLlavaForConditionalGeneration, UnsupportedModelError
from models.auto import CONFIG_FAULTS, config_fields, config_of
from models.families import Family, family_of, is_original
from models.token_scorer import SCORER, is_scorer, needs_scorer
from recipes.schema import ModelSection, Recipe, RecipeError
from train.arguments import resolve_dtype
from train.checkpoints import FINAL, digest_of
from train.errors import one_line
from train.pretrained_parts import check_parts

# Names in memory -> names in llava-hf's checkpoints, which transformers, vLLM and others read.
_NAMES: Final = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.vision_tower\."), "vision_tower."),
    (re.compile(r"^model\.multi_modal_projector\."), "multi_modal_projector."),
)
# Generation settings that have no effect without sampling, or with one beam.
_SAMPLING: Final = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")
_BEAMS: Final = ("early_stopping", "length_penalty")
_WRAPPED_TOWERS: Final = ("clip_vision_model", "siglip_vision_model")  # published with a `vision_model.` in between
_WRAPPER: Final = "vision_tower.vision_model."


def read_config(model: ModelSection) -> Any:
    """Returns the fused config of the recipe's model, with the recipe's stage plan.

    Ignores the checkpoint's own schedule, such as a pruner that a release starts with.

    Raises:
        RecipeError: config.json does not describe a model of a supported family that the plan fits.
    """
    key = "model.config" if model.checkpoint is None else "model.checkpoint"
    source = model.checkpoint or model.config or ""
    try:
        return config_of(config_fields(model.config, model.checkpoint), source, **model.plan_fields, schedule=None)
    except CONFIG_FAULTS as error:
        is_run = (Path(source) / FINAL / "config.json").is_file()
        more = f"; the model of this run is '{source}/{FINAL}'" if is_run else ""
        found = f"config.json describes no model to train: {one_line(error)}{more}"
        raise RecipeError(f"{key}: '{source}': {found}") from error


def config_fingerprint(model: ModelSection) -> str:
    """Returns a digest of the config.json that the recipe's model is built from."""
    fields = config_fields(model.config, model.checkpoint)
    kept = {name: value for name, value in fields.items() if not name.startswith(("_", "transformers_version"))}
    return digest_of(kept)


def read_processor(model: ModelSection) -> Any:
    """Returns the processor of the recipe's model.

    The image processor is the config folder's; the tokenizer too or, where the recipe names a `language_model`, that
    one's with `<image>` and `<pad>` added, as llava-hf has them.

    Raises:
        RecipeError: a part is missing or cannot be fetched.
    """
    try:
        return model_processor(model.config, model.checkpoint, model.language_model)
    except ProcessorError as error:
        raise RecipeError(f"model: {error}") from error


def build_initial(recipe: Recipe, folder: Path) -> None:
    """Writes the checkpoint that the recipe starts from; a folder that is there already is kept.

    It is random, or assembled from pretrained parts, or a copy of `model.checkpoint` under the recipe's stage plan. The
    folder appears in one move, so it is whole whenever it exists.

    Raises:
        RecipeError: a part cannot be fetched, or its weights do not fit the config.
    """
    if folder.is_dir():
        return
    dtype = resolve_dtype(recipe.phases[0].train)
    processor, config = read_processor(recipe.model), read_config(recipe.model)
    check_tokens(config, processor)
    check_parts(recipe.model, config, local=False)
    set_seed(recipe.seed)
    if recipe.model.checkpoint is not None:
        model = load_checkpoint(recipe.model.checkpoint, config=config, dtype=dtype, may_add_scorer=True)
    elif recipe.model.language_model is None and recipe.model.vision_tower is None:
        model = family_of(config.model_type).model_class(config).to(dtype)
    else:
        model = _assemble(config, recipe.model, dtype)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(model, partial)
    save_processor(processor, partial)
    partial.rename(folder)


def load_checkpoint(
    source: str | Path,
    *,
    config: Any = None,
    dtype: torch.dtype,
    bits: int | None = None,
    may_add_scorer: bool = False,
) -> Any:
    """Loads a checkpoint of any family, all of it; under ZeRO-3 each rank keeps its share.

    Args:
        source: folder or hub id.
        config: in place of the checkpoint's. Where it has no plan that reads the checkpoint's scorer of visual
            tokens, that is left out.
        dtype: of the weights.
        bits: 4 or 8 keeps the language model's weights in so many, by bitsandbytes; None in `dtype`.
        may_add_scorer: a scorer that the config asks for and the checkpoint lacks is made, with random weights.

    Raises:
        RecipeError: the checkpoint cannot be read, or names of weights are missing, unexpected or of another shape.
    """
    try:
        if is_original(PreTrainedConfig.get_config_dict(source)[0]):
            planned = {} if config is None else {"stages": config.stages, "plans": config.plans}
            return FusedAutoModel.from_pretrained(source, **planned, dtype=dtype)
        config = config or checkpoint_config(source)
        model, report = family_of(config.model_type).model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below, together with the other faults
            **({} if bits is None else _quantized(bits, dtype, family_of(config.model_type))),
        )
    except (OSError, SafetensorError, UnsupportedModelError) as error:
        raise RecipeError(f"model: checkpoint '{source}' cannot be read: {one_line(error)}") from error
    if not needs_scorer(config):
        report["unexpected_keys"] = [name for name in report["unexpected_keys"] if not is_scorer(name)]
    if may_add_scorer:
        report["missing_keys"] = [name for name in report["missing_keys"] if not is_scorer(name)]
    text = config.get_text_config()
    if "lm_head.weight" in report["missing_keys"] and getattr(text, "tie_word_embeddings", False):
        raise RecipeError(
            f"model: checkpoint '{source}': config.json: tie_word_embeddings: got false, but text_config's is true and "
            "there is no lm_head.weight; expected true in both"
        )
    check_loading_report(source, report)
    return model


def _quantized(bits: int, dtype: torch.dtype, family: Family) -> dict[str, Any]:
    """Returns what from_pretrained takes for QLoRA (arXiv 2305.14314): NF4 with double quantization, or 8 bits."""
    others = "|".join(map(re.escape, (*family.tower, *family.projector)))
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # so that ZeRO-3 can split it like any weight
        llm_int8_skip_modules=[rf"model\.({others})(\.|$)", rf".*\.{SCORER}", "lm_head"],  # what stays whole
    )
    if is_deepspeed_zero3_enabled():  # which places weights itself
        return {"quantization_config": config}
    place = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return {"quantization_config": config, "device_map": {"": place}}


def checkpoint_config(source: str | Path) -> Any:
    """Returns the config of a checkpoint, fused or ordinary."""
    fields, _ = PreTrainedConfig.get_config_dict(source)
    return config_of(fields, source)


def check_loading_report(source: str | Path, report: Mapping[str, Any]) -> None:
    """Raises RecipeError when a loading report of transformers names any weight that did not fit."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        faults = sorted(str(fault) for fault in report.get(kind, ()))
        if faults:
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            raise RecipeError(
                f"model: checkpoint '{source}': {kind.replace('_', ' ')}: {faults[0]}{more}; "
                "expected a checkpoint whose weights are those of its config"
            )


def check_tokens(config: Any, processor: Any) -> None:
    """Raises RecipeError when the tokenizer's image token or its size is not the config's."""
    try:
        vision = VisionProcessor(processor)
    except ProcessorError as error:
        raise RecipeError(f"model.config: {error}") from error
    tokenizer, found = processor.tokenizer, sorted(vision.visual_ids)
    if config.image_token_id not in found:
        key = config.attribute_map.get("image_token_id", "image_token_id")  # LLaVA's is image_token_index
        raise RecipeError(
            f"model.config: {key}: got {config.image_token_id}, expected one of {found}, the processor's tokens "
            f"{tokenizer.convert_ids_to_tokens(found)} of an image"
        )
    rows = config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise RecipeError(
            f"model.config: text_config.vocab_size: got {rows}, expected at least {len(tokenizer)}, the tokenizer's"
        )


def _assemble(config: Any, parts: ModelSection, dtype: torch.dtype) -> Any:
    """Returns a LLaVA of pretrained parts; a part that the recipe does not name, and the projector, are random."""
    decoder: Any = _decoder(config, parts.language_model, dtype)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = decoder.config.tie_word_embeddings
    with torch.device("meta"):
        model = FusedLlavaForConditionalGeneration(config)
    projector = model.model.multi_modal_projector.to_empty(device="cpu").to(dtype)
    projector.apply(model._init_weights)
    if needs_scorer(config):
        scorer = model.model.language_model.get_submodule(SCORER).to_empty(device="cpu").to(dtype)
        decoder.model.add_module(SCORER, scorer.apply(model._init_weights))
    model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
    model.model.vision_tower = _tower(model.model.vision_tower, config, parts.vision_tower, dtype)
    return model


def _decoder(config: Any, source: str | None, dtype: torch.dtype) -> nn.Module:
    if source is None:
        return AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
    decoder = _pretrained("language_model", AutoModelForCausalLM, source, dtype=dtype)
    # New rows (<image>, <pad>, and padding to a round number) are drawn around the mean of the old ones.
    decoder.resize_token_embeddings(config.text_config.vocab_size)
    return decoder


def _tower(shape: PreTrainedModel, config: Any, source: str | None, dtype: torch.dtype) -> nn.Module:
    if source is None:
        return AutoModel.from_config(config.vision_config, dtype=dtype)
    # SigLIP's pooling head, which no projector reads, is left out where the config says so
    head = {} if getattr(config.vision_config, "vision_use_head", True) else {"vision_use_head": False}
    return _pretrained("vision_tower", type(shape), source, dtype=dtype, **head)


def _pretrained(part: str, kind: Any, source: str, **options: Any) -> Any:
    """Loads a part with all its weights; others in the checkpoint, such as CLIP's text tower, are ignored."""
    try:
        model, report = kind.from_pretrained(source, **options, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RecipeError(f"model.{part}: '{source}' cannot be read: {one_line(error)}") from error
    check_loading_report(source, {**report, "unexpected_keys": ()})
    return model


def save_model(
    model: Any, folder: Path, *, weights: Mapping[str, Tensor] | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes config.json, generation_config.json and the weights of a model, whatever trained it.

    A dense model becomes an ordinary one of its family, which transformers loads without this repository; one with a
    stage plan keeps its model type.

    `weights` are by their names in the model; None takes the model's.

    Raises:
        RecipeError: transformers does not save the model's generation config.
    """
    if model.can_generate():
        _make_saveable(model.generation_config)
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(model.state_dict() if weights is None else weights)
    for name, weight in weights.items():  # ZeRO-3 gathers several into one storage, which no file may hold twice
        if weight.untyped_storage().nbytes() != weight.nbytes or not weight.is_contiguous():
            weights[name] = weight.clone(memory_format=torch.contiguous_format)
    if model.config.tie_word_embeddings:  # the flag that transformers ties by, whatever the text config says
        weights.pop("lm_head.weight", None)  # it is the embedding's
    dtype = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    if family_of(model.config.model_type).model_type == "llava":
        tower = model.config.vision_config.model_type
        weights = {_published(name, tower): weight for name, weight in weights.items()}
        save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
    else:
        model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _make_saveable(config: GenerationConfig) -> None:
    """Unsets settings without effect that transformers loads but refuses to save, as Vicuna has them."""
    try:
        config.validate(strict=True)
    except ValueError:
        without_effect = [*(() if config.do_sample else _SAMPLING), *(() if (config.num_beams or 1) > 1 else _BEAMS)]
        if config.pad_token_id is not None and config.pad_token_id < 0:
            without_effect.append("pad_token_id")
        for name in without_effect:
            setattr(config, name, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise RecipeError(f"model: generation_config.json: got what cannot be saved: {one_line(error)}") from error


def _published(name: str, tower: str) -> str:
    """Returns the name that llava-hf's checkpoints give to a weight."""
    for pattern, replacement in _NAMES:
        name, count = pattern.subn(replacement, name)
        if count:
            break
    if tower in _WRAPPED_TOWERS and name.startswith("vision_tower.") and not name.startswith(_WRAPPER):
        name = _WRAPPER + name.removeprefix("vision_tower.")
    return name
