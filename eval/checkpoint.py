"""What a finished run left behind, read from its folder alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from eval.measure import device
from models import FusedLlavaForConditionalGeneration


class CheckpointError(ValueError):
    """A folder given for comparison does not hold a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A loadable checkpoint and, where it comes from a run of ours, that run's record.

    Attributes:
        name: the folder's name, as in tables.
        weights: folder with config.json and safetensors.
        run: seconds, steps, samples and samples_per_second of the training, all phases together; empty for others.
        log: the lines of log.jsonl of all phases, `seconds` and `step` counted through; empty for others.
    """

    name: str
    weights: Path
    run: dict[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def find(cls, folder: Path) -> Checkpoint:
        """Returns the checkpoint in a run folder (its `final/`) or in a folder that holds the weights itself.

        Raises:
            CheckpointError: there is none; says where it looked.
        """
        for weights in (folder / "final", folder):
            if (weights / "config.json").is_file():
                return cls(folder.name, weights, *_history([folder / "align", folder]))
        raise CheckpointError(
            f"{folder}: no checkpoint found, accepted: a run folder with final/, or a folder with config.json"
        )

    def load(self) -> tuple[FusedLlavaForConditionalGeneration, Any]:
        """Returns the model, ready for inference, on the GPU where there is one, and its processor.

        Raises:
            CheckpointError: weights or processor cannot be read.
        """
        try:
            model = FusedLlavaForConditionalGeneration.from_pretrained(self.weights)
            processor = AutoProcessor.from_pretrained(self.weights)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.weights}: cannot be loaded: {' '.join(str(error).split())}") from error
        return model.eval().to(device()), processor


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
