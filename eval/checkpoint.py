"""A checkpoint to evaluate: what a run left behind, read from its folder alone, or any LLaVA of the hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoProcessor

from eval.measure import device
from eval.prompts import Prompter
from models import FusedLlavaForConditionalGeneration
from models.schedules import published
from recipes.resolved import saved_data
from recipes.schema import RecipeError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "recipe.yaml"]
TRAINED = "trained"  # as a schedule's name: the checkpoint's own plan; dense where it has none
FORMATS = ("vicuna_v1", "chat_template")
ASPECTS = ("pad", "processor")


class CheckpointError(ValueError):
    """A folder given for comparison does not hold a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A loadable checkpoint and, where it comes from a run of ours, that run's record.

    Attributes:
        name: the run folder's name, or the hub's name, as in tables.
        weights: folder with config.json and safetensors.
        chat_format: how it was trained to be asked: `vicuna_v1` or `chat_template`.
        aspect: how it was trained to see images: `pad` or `processor`.
        run: seconds, steps, samples and samples_per_second of the training, all phases together; empty for others.
        log: the lines of log.jsonl of all phases, `seconds` and `step` counted through; empty for others.
    """

    name: str
    weights: Path
    chat_format: str
    aspect: str
    run: dict[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def find(cls, given: str | Path, chat_format: str | None = None, aspect: str | None = None) -> Checkpoint:
        """Returns the checkpoint of a run folder (its `final/`), of a folder with the weights, or of the hub.

        Args:
            given: a folder, or a hub name (`llava-hf/llava-1.5-7b-hf`), whose files are then fetched.
            chat_format: None is what its recipe.yaml says; without one, its chat template where it has one.
            aspect: None is what its recipe.yaml says; without one, the processor's own.

        Raises:
            CheckpointError: there is none, says where it looked; or its recipe asks no questions.
        """
        folder = Path(given)
        if not folder.exists() and _HUB_NAME.fullmatch(str(given)):
            return cls._described(str(given), _fetched(str(given)), [], chat_format, aspect)
        for weights in (folder / "final", folder):
            if (weights / "config.json").is_file() and any(weights.glob("*.safetensors")):
                is_final = weights.resolve().name == "final"
                name = weights.resolve().parent.name if is_final else folder.resolve().name
                run = weights.parent if is_final else folder
                return cls._described(name, weights, [run / "align", run], chat_format, aspect)
        raise CheckpointError(
            f"{given}: no checkpoint found, accepted: a run folder with final/, a folder with config.json and "
            "safetensors, or a hub name"
        )

    @classmethod
    def _described(
        cls, name: str, weights: Path, phases: list[Path], chat_format: str | None, aspect: str | None
    ) -> Checkpoint:
        trained = _trained_with(weights)
        chat_format = chat_format or trained[0]
        if chat_format not in FORMATS:
            raise CheckpointError(
                f"{weights}: was trained with data.format {chat_format}, which asks no questions, accepted: "
                f"{' or '.join(FORMATS)}"
            )
        return cls(name, weights, chat_format, aspect or trained[1], *_history(phases))

    @property
    def stages(self) -> dict[str, Any] | None:
        """The stage plan's fields; None for a dense checkpoint."""
        return json.loads((self.weights / "config.json").read_text(encoding="utf-8")).get("stages")

    def load(self, dtype: torch.dtype | None = None) -> tuple[FusedLlavaForConditionalGeneration, Any]:
        """Returns the model, ready for inference, on the GPU where there is one, and its processor.

        Args:
            dtype: of the weights; None is what they are saved in.

        Raises:
            CheckpointError: weights or processor cannot be read.
        """
        processor = self.processor()
        try:
            model = FusedLlavaForConditionalGeneration.from_pretrained(self.weights, dtype=dtype or "auto")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{self.weights}: cannot be loaded: {' '.join(str(error).split())}") from error
        return model.eval().to(device()), processor

    def processor(self) -> Any:
        """Returns the processor: tokenizer, chat template and image processor.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            return AutoProcessor.from_pretrained(self.weights)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.weights}: cannot be loaded: {' '.join(str(error).split())}") from error

    def prompter(self, processor: Any) -> Prompter:
        """Returns what asks this checkpoint as it was trained to be asked.

        Raises:
            TokenizerError: the tokenizer does not go with the format.
        """
        return Prompter(processor, chat_format=self.chat_format, aspect=self.aspect)


def set_schedule(model: Any, name: str) -> None:
    """Puts a schedule on a model: `trained`, or a name of SCHEDULES with its published settings, scaled in depth."""
    depth = model.config.text_config.num_hidden_layers
    model.schedule = None if name == TRAINED else published(name, depth)


def _fetched(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # no such name, no access, no network
        raise CheckpointError(f"{name}: no such folder, nor on the hub: {' '.join(str(error).split())}") from error


def _trained_with(weights: Path) -> tuple[str, str]:
    """Returns the format and the image aspect that a checkpoint goes with."""
    file = weights / "recipe.yaml"
    if not file.is_file():
        return "chat_template", "processor"
    try:
        data = saved_data(file)
    except RecipeError as error:
        raise CheckpointError(str(error)) from error
    return data.format, data.image_aspect


def _history(phases: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns what the phases of a run took together, and their log lines one after the other."""
    total = {"seconds": 0.0, "steps": 0, "samples": 0}
    lines: list[dict[str, Any]] = []
    for folder in phases:
        record, log = folder / "final" / "run.json", folder / "log.jsonl"
        if not record.is_file():
            continue
        if log.is_file():
            for text in log.read_text(encoding="utf-8").splitlines():
                line = json.loads(text)
                counted = {"seconds": line["seconds"] + total["seconds"], "step": line["step"] + total["steps"]}
                lines.append({**line, **counted})
        run = json.loads(record.read_text(encoding="utf-8"))
        total = {key: value + run[key] for key, value in total.items()}
    if not total["steps"]:
        return {}, []
    return {**total, "samples_per_second": total["samples"] / total["seconds"]}, lines
