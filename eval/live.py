"""`python -m eval.live CHECKPOINT --out DIR`: the visual tokens of each layer, drawn from real runs.

Runs every schedule with its published settings, layer numbers scaled to the decoder, over test questions of easy-VQA,
and the checkpoint's own plan where it has one. Draws one picture a schedule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.chat import TokenizerError
from data.easy_vqa import questions
from eval.arguments import UsageError, make_folder
from eval.checkpoint import Checkpoint
from eval.comparison.plots import draw_live_tokens
from eval.measure import positive
from eval.prompts import Asked, Prompter
from models.cost import Cost, live_cost
from models.fused import usable_schedules
from models.schedules import Schedule, published

BATCH = 50


def live_visual(model: Any, inputs: Mapping[str, Tensor], schedule: Schedule) -> Tensor:
    """Returns (layers, B, S) bool: the visual tokens that each layer runs on in a prefill under a schedule.

    Args:
        model: a FusedLlavaForConditionalGeneration.
        inputs: input_ids (B, S), pixel_values where there are images and attention_mask where samples are padded.
        schedule: as in `model.schedule`.
    """
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        return live_mask(model(**inputs, schedule=schedule, use_cache=False, logits_to_keep=1))


def live_mask(output: Any) -> Tensor:
    """Returns (layers, B, S) bool: the visual tokens that each layer ran on in a FusedOutput of a prefill."""
    live = torch.zeros(len(output.live), *output.visual.shape, dtype=torch.bool, device=output.visual.device)
    for layer, samples in zip(live, output.live, strict=True):
        for row, slots in zip(layer, samples, strict=True):
            row[slots] = True
    return live & output.visual


def run_costs(model: Any, inputs: Mapping[str, Tensor], schedule: Schedule) -> list[Cost]:
    """Returns the decoder's cost of each sample's prefill under a schedule; arguments as of `live_visual`.

    The KV cache is counted in bfloat16.
    """
    text = text_tokens(model, inputs)
    counts = live_visual(model, inputs, schedule).sum(dim=2).T
    return [
        costs_of(model, row, text=number, schedule=schedule) for row, number in zip(counts.tolist(), text, strict=True)
    ]


def text_tokens(model: Any, inputs: Mapping[str, Tensor]) -> list[int]:
    """Returns how many text tokens each sample has; inputs as of `live_visual`."""
    ids = inputs["input_ids"]
    is_text = inputs.get("attention_mask", torch.ones_like(ids)).bool() & (ids != model.config.image_token_id)
    return is_text.sum(dim=1).tolist()


def costs_of(model: Any, counts: Sequence[int], *, text: int, schedule: Schedule, value: int = 2) -> Cost:
    """Returns the decoder's cost of one prefill whose layer l ran on `counts[l]` visual and on `text` text tokens.

    Args:
        model: a FusedLlavaForConditionalGeneration.
        counts: live visual tokens of each layer.
        text: text tokens of the sample.
        schedule: what the layers ran under.
        value: bytes of one cached number; 2 for bfloat16.
    """
    kv = [schedule.update_at(layer) == "kv" for layer in range(len(counts))]
    return live_cost(model.config.text_config, counts, text=text, kv=kv, value=value)


def main() -> int:
    """Runs and draws; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.live", description="Draws live visual tokens per layer.")
    parser.add_argument("checkpoint", type=Path, help="run folder, or folder with config.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--limit", type=positive, default=200, help="test questions (default 200)")
    args = parser.parse_args()
    try:
        checkpoint = Checkpoint.find(args.checkpoint)
        make_folder("--out", args.out)
        model, processor = checkpoint.load()
        prompter = checkpoint.prompter(processor)
    except (UsageError, TokenizerError) as error:
        print(error, file=sys.stderr)
        return 2
    depth = model.config.text_config.num_hidden_layers
    chosen: dict[str, Schedule | None] = {name: published(name, depth) for name in usable_schedules(model.config)}
    if model.config.stages is not None:
        chosen["trained"] = None
    parts = list(_batches(prompter, args.limit))
    for name, schedule in tqdm(chosen.items(), unit="schedule"):
        model.schedule = schedule  # a pruner on a fused checkpoint prunes within its plan
        counts = torch.cat([live_visual(model, inputs, model.schedule).sum(dim=2) for inputs in parts], dim=1)
        draw_live_tokens(name, counts.tolist(), args.out / f"live_{name}.png")
    print(f"written: {args.out}/live_*.png")
    return 0


def _batches(prompter: Prompter, limit: int) -> Iterator[dict[str, Tensor]]:
    """Yields the first `limit` test questions in batches."""
    asked = questions("test")[:limit]
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        yield prompter.batch([Asked(question.text, [Image.open(question.image).convert("RGB")]) for question in part])


if __name__ == "__main__":
    sys.exit(main())
