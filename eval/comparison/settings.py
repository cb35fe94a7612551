"""What the rows of a comparison have in common; rows that differ in more than checkpoint and schedule are refused."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from eval.arguments import UsageError
from eval.checkpoint import Checkpoint
from eval.lmms import HARNESS
from eval.measure import default_batch

PRECISIONS: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FILE: Final = "settings.json"


class ComparisonError(UsageError):
    """Rows that would not be comparable, or a folder that cannot take them; the text says what differs."""


def settings_of(checkpoints: Sequence[Checkpoint], args: argparse.Namespace) -> dict[str, Any]:
    """Returns what all rows have in common, by the command line; batch and precision that are None are by the machine.

    Raises:
        ComparisonError: two checkpoints are asked, or shown images, in different ways.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for flag, attribute in (("--chat-format", "chat_format"), ("--image-aspect", "aspect")):
            ours, theirs = getattr(first, attribute), getattr(other, attribute)
            if ours != theirs:
                raise ComparisonError(
                    f"{flag}: got {ours} ({first.name}) and {theirs} ({other.name}), expected rows that differ in "
                    f"checkpoint and schedule alone; {flag} {ours} would ask both so"
                )
    gpu = torch.cuda.is_available()
    return {
        "harness": HARNESS,
        "limit": args.limit,
        "batch": args.batch or default_batch(),
        "precision": args.precision or ("bf16" if gpu else "fp32"),
        "chat_format": first.chat_format,
        "image_aspect": first.aspect,
        "attention": args.attn_implementation,
        **({} if args.text_tower is None else {"text_tower": args.text_tower}),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, threads: {torch.get_num_threads()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# what decides an answer: the models, how images are shown and questions asked, the tasks
_DECIDING = (
    "models/*.py",
    *(f"data/{name}.py" for name in ("chat", "dataset", "images", "processor", "rows")),
    *(f"eval/{name}.py" for name in ("lmms", "prompts", "text_tower")),
)
_ROOT: Final = Path(__file__).parents[2]


def code(root: Path = _ROOT) -> str:
    """Returns a checksum of the code in `root` that decides a cell's answers; comments and layout do not count."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in _DECIDING for file in root.glob(pattern)):
        digest.update(file.name.encode() + meaning(file.read_text(encoding="utf-8")).encode())
    for file in sorted((root / "eval/tasks").glob("*.yaml")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def meaning(source: str) -> str:
    """Returns Python source as its syntax tree, without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def check_settings(settings: dict[str, Any], out: Path) -> None:
    """Notes the settings of a new folder; raises ComparisonError where an old one's cells were made with others."""
    file = out / FILE
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise ComparisonError(
                    f"--out: {out} holds cells made with {key} {before.get(key)}, got {settings.get(key)}, "
                    "expected the same, or another folder"
                )
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def named(checkpoints: Sequence[Checkpoint]) -> dict[str, Checkpoint]:
    """Returns the checkpoints by names that differ: the folder's, with as many parents as that takes.

    Raises:
        ComparisonError: one is given twice.
    """
    paths = [found.weights.resolve() for found in checkpoints]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise ComparisonError(f"CHECKPOINT: got {checkpoints[number].name} twice, expected each once")
    names = [found.name for found in checkpoints]
    folders = [path.parent if path.name == "final" else path for path in paths]
    for depth in range(2, max(len(folder.parts) for folder in folders) + 1):
        longer = ["_".join(folder.parts[-depth:]) for folder in folders]
        pairs = zip(names, longer, strict=True)
        names = [more if names.count(name) > 1 else name for name, more in pairs]
    return {name.replace("/", "_"): found for name, found in zip(names, checkpoints, strict=True)}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns what changes when a checkpoint's files do: where they are, how long, how old."""
    files = sorted(file for file in checkpoint.weights.iterdir() if file.suffix in (".safetensors", ".json", ".jinja"))
    parts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.is_file()]
    return "; ".join([str(checkpoint.weights.resolve()), *parts])
