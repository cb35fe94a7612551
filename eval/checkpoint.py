"""Finds and loads a checkpoint to evaluate: a run folder, a folder with weights, or a model of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from data.processor import ProcessorError, load_processor
from eval.arguments import UsageError, exists, misfit
from eval.measure import device
from eval.prompts import PromptEncoder
from models import FusedAutoModel, UnsupportedModelError
from models.auto import CONFIG_FAULTS
from models.families import Family, family_of, is_original
from models.schedule_choice import resolve_config
from models.schedules import Choice, Schedule
from recipes.resolved import saved_data, saved_recipe
from recipes.schema import RecipeError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "recipe.yaml"]
FORMATS = ("vicuna_v1", "chat_template")
ASPECTS = ("pad", "processor")
# what transformers raises of a config, a tokenizer or weights that are wrong; ImportError: of a missing quantiser
_LOADING = (*CONFIG_FAULTS, ImportError, SafetensorError)


class CheckpointError(UsageError):
    """What was named as a checkpoint is none, or cannot be loaded."""


@dataclass(frozen=True)
class Checkpoint:
    """A loadable checkpoint and, where it comes from a run of ours, that run's record, all phases together.

    `run` is the training's seconds, steps, samples and samples_per_second; `log` the lines of log.jsonl, `seconds` and
    `step` counted through. Both are empty for others.
    """

    name: str  # the run folder's, or the hub's, as in tables
    weights: Path  # folder with config.json and safetensors
    chat_format: str  # of FORMATS: how it was trained to be asked
    aspect: str  # of ASPECTS: how it was trained to see images
    run: dict[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def find(cls, given: str | Path, chat_format: str | None = None, aspect: str | None = None) -> Checkpoint:
        """Returns the checkpoint of a run folder (its `final/`), of a folder with the weights, or of the hub.

        `chat_format` and `aspect` default to those of its recipe.yaml; without one, to its chat template and its
        processor. The files of a hub name (`llava-hf/llava-1.5-7b-hf`) are downloaded.

        Raises:
            CheckpointError: no checkpoint was found, or its data.format has no questions.
        """
        folder = Path(given)
        if not exists(folder) and _HUB_NAME.fullmatch(str(given)):
            _check_kind(_fetched(str(given), ["config.json"]))  # before all weights of another kind are fetched
            return cls._described(str(given), _fetched(str(given), _HUB_FILES), [], chat_format, aspect)
        for weights in (folder / "final", folder) if exists(folder) else ():
            if (weights / "config.json").is_file() and any(weights.glob("*.safetensors")):
                is_final = weights.resolve().name == "final"
                name = weights.resolve().parent.name if is_final else folder.resolve().name
                run = weights.parent if is_final else folder
                return cls._described(name, weights, [run / "align", run], chat_format, aspect)
        found = "a LoRA adapter" if exists(folder / "adapter_config.json") else "no checkpoint"
        raise CheckpointError(
            f"{given}: got {found}, expected a run folder with final/, a folder with config.json and safetensors, or "
            "a hub name"
        )

    @classmethod
    def _described(
        cls, name: str, weights: Path, phases: list[Path], chat_format: str | None, aspect: str | None
    ) -> Checkpoint:
        _check_kind(weights)
        recipe, trained = weights / "recipe.yaml", ("chat_template", "processor")
        if recipe.is_file():
            try:
                data = saved_data(recipe)
            except RecipeError as error:
                raise CheckpointError(str(error)) from error
            trained = data.prompt_format, data.image_aspect
        chat_format = chat_format or trained[0]
        if chat_format not in FORMATS:
            raise CheckpointError(
                f"{weights}: got data.format {chat_format}, which has no questions, expected {' or '.join(FORMATS)}"
            )
        return cls(name, weights, chat_format, aspect or trained[1], *_history(phases))

    @property
    def stages(self) -> dict[str, Any] | None:
        """The stage plan's fields; None for a dense checkpoint."""
        return _config(self.weights).get("stages")

    @property
    def family(self) -> str:
        """The family's model_type, as in `FAMILIES`."""
        return _family(self.weights).model_type

    @property
    def config(self) -> Any:
        """The fused config; raises CheckpointError where the fields of config.json do not fit."""
        try:
            return _family(self.weights).config_class.from_pretrained(self.weights)
        except _LOADING as error:
            raise _not_loaded(self.weights, error) from error

    @property
    def num_layers(self) -> int:
        """The decoder's depth; errors as `config`."""
        return self.config.text_config.num_hidden_layers

    def schedule(self, choice: Choice) -> Schedule:
        """Returns the schedule that a choice means on this checkpoint; errors as `config` and resolve_schedule."""
        return resolve_config(self.config, choice)

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The recipe that it was trained with; None where it brings none."""
        file = self.weights / "recipe.yaml"
        return saved_recipe(file) if file.is_file() else None

    def load(
        self, dtype: torch.dtype | None = None, attention: str | None = None, device_map: str | None = None
    ) -> tuple[Any, Any]:
        """Returns the model, ready for inference, on the GPU where there is one, and its processor.

        `dtype` None is what the weights are saved in; `attention` is Hugging Face's attn_implementation; `device_map`,
        Hugging Face's too, spreads the weights over several GPUs.

        Raises:
            CheckpointError: weights or processor cannot be read, or the weights are not those of the config.
        """
        processor = self.processor()
        options = {"attn_implementation": attention, "device_map": device_map}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        try:
            model, report = FusedAutoModel.from_pretrained(
                self.weights, dtype=dtype or "auto", output_loading_info=True, **given
            )
        except _LOADING as error:
            raise _not_loaded(self.weights, error) from error
        if found := misfit(report):
            raise CheckpointError(f"{self.weights}: got {found}; expected the weights of its config")
        return model.eval() if device_map else model.eval().to(device()), processor

    def processor(self) -> Any:
        """Returns tokenizer, chat template and image processor; raises CheckpointError where they cannot be read."""
        try:
            return load_processor(self.weights)
        except ProcessorError as error:
            raise CheckpointError(str(error)) from error

    def prompt_encoder(self, processor: Any) -> PromptEncoder:
        """Returns the encoder that formats prompts as in the checkpoint's training.

        Raises:
            TokenizerError: the tokenizer does not go with the format.
            CheckpointError: the processor does not know how many visual tokens an image has, or the config has another
                image token than the processor.
        """
        config = self.config
        positions = getattr(config.text_config, "max_position_embeddings", None)
        try:
            encoder = PromptEncoder(processor, chat_format=self.chat_format, aspect=self.aspect, positions=positions)
        except ProcessorError as error:
            raise CheckpointError(f"{self.weights}: {error}") from error
        if config.image_token_id not in encoder.vision.visual_ids:
            key = config.attribute_map.get("image_token_id", "image_token_id")  # LLaVA's is image_token_index
            raise CheckpointError(
                f"{self.weights}: config.json: {key}: got {config.image_token_id}, expected one of "
                f"{sorted(encoder.vision.visual_ids)}, the processor's tokens of an image"
            )
        return encoder


def plans_of(given: str | Path) -> list[str]:
    """Returns the names of the plans of a checkpoint on this machine, where it was trained for several."""
    for weights in (Path(given) / "final", Path(given)) if exists(given) else ():
        if (weights / "config.json").is_file():
            return list(_config(weights).get("plans") or {})
    return []


def _config(weights: Path) -> dict[str, Any]:
    """Returns the fields of config.json; raises CheckpointError where it cannot be read."""
    file = weights / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: got a {type(fields).__name__}, expected an object of a model's fields")
    return fields


def _family(weights: Path) -> Family:
    return family_of(_config(weights).get("model_type"), weights)


def _not_loaded(weights: Path, error: Exception) -> CheckpointError:
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return CheckpointError(f"{weights}: cannot be loaded: {kind}{' '.join(str(error).split())}")


def _check_kind(weights: Path) -> None:
    """Raises CheckpointError unless config.json is of a family that runs staged; nothing is built before this."""
    fields = _config(weights)
    if is_original(fields):
        raise CheckpointError(
            f"{weights}: got a checkpoint in the original LLaVA format, expected Hugging Face's, such as "
            "llava-hf/llava-1.5-7b-hf, or what FusedAutoModel.from_pretrained and save_pretrained make of it"
        )
    try:
        family = _family(weights)
    except UnsupportedModelError as error:
        raise CheckpointError(str(error)) from None
    for part in ("text_config", "vision_config") if family.model_type == "llava" else ():
        if not isinstance(fields.get(part), dict):  # the defaults are a model of 7 billion weights
            raise CheckpointError(f"{weights}: config.json: got no {part}, expected the fields of one")


def _fetched(name: str, files: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # no such name, no access, no network
        raise CheckpointError(f"{name}: no such folder, nor on the hub: {' '.join(str(error).split())}") from error


@contextmanager
def run_file_errors(file: Path) -> Iterator[None]:
    """Turns what reading a file of a run raises into a CheckpointError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({type(error).__name__}: {error}), expected what a run writes"
        ) from error


def _history(phases: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns what the phases of a run took together, and their log lines one after the other.

    Raises:
        CheckpointError: run.json or log.jsonl is not what a run writes.
    """
    total = {"seconds": 0.0, "steps": 0, "samples": 0}
    lines: list[dict[str, Any]] = []
    for folder in phases:
        record, log = folder / "final" / "run.json", folder / "log.jsonl"
        if not record.is_file():
            continue
        with run_file_errors(log):
            for text in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
                line = json.loads(text)
                counted = {"seconds": line["seconds"] + total["seconds"], "step": line["step"] + total["steps"]}
                lines.append({**line, **counted})
        with run_file_errors(record):
            run = json.loads(record.read_text(encoding="utf-8"))
            total = {key: value + run[key] for key, value in total.items()}
    if not total["steps"]:
        return {}, []
    return {**total, "samples_per_second": total["samples"] / total["seconds"]}, lines
