"""What a finished run left behind, read from its folder alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from models import FusedLlavaForConditionalGeneration


class CheckpointError(ValueError):
    """A folder given for comparison does not hold a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A loadable checkpoint and, where it comes from a run of ours, that run's record.

    Attributes:
        name: the folder's name, as in tables.
        weights: folder with config.json and safetensors.
        run: contents of run.json (seconds, steps, samples, samples_per_second, ...); empty for others.
        log: the lines of log.jsonl, in order; empty for others.
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
                record, log = weights / "run.json", folder / "log.jsonl"
                run = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
                lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
                return cls(folder.name, weights, run, [json.loads(line) for line in lines])
        raise CheckpointError(
            f"{folder}: no checkpoint found, accepted: a run folder with final/, or a folder with config.json"
        )

    def load(self) -> tuple[FusedLlavaForConditionalGeneration, Any]:
        """Returns the model, ready for inference, and its processor."""
        model = FusedLlavaForConditionalGeneration.from_pretrained(self.weights)
        return model.eval(), AutoProcessor.from_pretrained(self.weights)
