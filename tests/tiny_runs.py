"""Writes tiny checkpoints, recipes and LLaVA rows (with two images, one and none) of each family, for training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.processor import save_processor
from tests.tiny_processors import PROCESSORS
from tests.tiny_vlms import TINY

STAGES = {"enter": 1, "exit": 5}
TINY_OF = {tiny.family: name for name, tiny in reversed(TINY.items())}
ROWS = [
    ("<image>\nwhat is it?\n<image>", ["a.png", "b.png"], "a dog, a cat."),
    ("<image>\nand this?", ["b.png"], "a cat."),
    ("what is two and two?", [], "it is 4."),
]


def write_rows(folder: Path, chosen: Sequence[tuple[str, list[str], str]] = ROWS) -> None:
    """Writes the rows and their images, of two shapes."""
    random = np.random.default_rng(0)
    for name, (width, height) in {"a.png": (20, 10), "b.png": (12, 30)}.items():
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
    rows = [
        {
            **({"image": images} if images else {}),
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        }
        for question, images, answer in chosen
    ]
    (folder / "rows.json").write_text(json.dumps(rows))


def write_checkpoint(folder: Path, family: str) -> None:
    """Writes a tiny random checkpoint of Hugging Face's class, with its processor."""
    TINY[TINY_OF[family]].hugging_face().save_pretrained(folder)
    save_processor(PROCESSORS[family](), folder)


def write_recipe(folder: Path, **overrides: Any) -> Path:
    """Writes a recipe that trains the checkpoint of a folder on its rows; returns the file."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "output": str(folder / "run"),
        "model": {"checkpoint": str(folder / "checkpoint"), "stages": STAGES},
        "data": {
            "files": [str(folder / "rows.json")],
            "images": str(folder),
            "format": "chat_template",
            "image_aspect": "processor",
            "group_by_length": False,
            "workers": 0,
        },
        "train": {
            "deepspeed": "recipes/deepspeed/zero2.json",
            "learning_rate": {"projector": 1e-2, "vision_tower": None, "language_model": 1e-2},
            "global_batch": 3,
            "per_device_batch": 3,
            "max_steps": 3,
            "precision": "fp32",
            "gradient_checkpointing": False,
        },
    }
    for key, value in overrides.items():
        section, name = key.split("__")
        fields[section][name] = value
    (folder / "recipe.yaml").write_text(json.dumps(fields))
    return folder / "recipe.yaml"
