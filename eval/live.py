"""The visual tokens that each layer really ran on: which they are, their cost, and how they lie in the image.

`python -m eval.live CHECKPOINT --out DIR` draws them, one picture a schedule, over test questions of easy-VQA: every
schedule with its published settings, layer numbers scaled to the decoder, and the checkpoint's plan where it has
one.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from data.chat import TokenizerError
from data.easy_vqa import questions
from eval.arguments import UsageError, command_line, make_folder, positive
from eval.checkpoint import Checkpoint
from eval.comparison.plots import draw_live
from eval.prompts import PromptEncoder, VqaPrompt
from models.cost import Cost, live_cost
from models.schedule_choice import usable_schedules
from models.schedules import SCHEDULES, TRAINED, Dense, Schedule

BATCH = 50
SIDE = 112  # pixels of one picture of an overlay
GAP, LABEL = 6, 16  # pixels between two pictures, and of the line under each
_FADED = 0.8  # share of _SHADE over a patch whose token is not live
_INK, _PAPER, _SHADE, _FRAME = (40, 40, 40), (255, 255, 255), (70, 72, 86), (200, 200, 200)
_COSTS = ("visual_token_layers", "token_layers", "flops", "vision_attention", "cache_bytes")  # of a Cost


@dataclass(frozen=True)
class Loaded:
    """A loaded checkpoint: the model in eval mode, its prompt encoder, and the batch size."""

    checkpoint: Checkpoint
    model: Any
    prompt_encoder: PromptEncoder
    batch: int


def live_visual(model: Any, inputs: Mapping[str, Tensor], schedule: Schedule) -> Tensor:
    """Returns (layers, B, S) bool: the visual tokens that each layer of a fused model runs on in a prefill."""
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


def text_tokens(model: Any, inputs: Mapping[str, Tensor]) -> list[int]:
    """Returns how many text tokens each sample has; inputs as of `live_visual`."""
    ids = inputs["input_ids"]
    is_text = inputs.get("attention_mask", torch.ones_like(ids)).bool() & (ids != model.config.image_token_id)
    return is_text.sum(dim=1).tolist()


def costs_of(model: Any, counts: Sequence[int], *, text: int, schedule: Schedule, value: int = 2) -> Cost:
    """Returns the decoder's cost of one prefill whose layer l ran on `counts[l]` visual and on `text` text tokens.

    `value` are the bytes of one cached number, 2 for bfloat16.
    """
    kv = [schedule.update_at(layer) == "kv" for layer in range(len(counts))]
    return live_cost(model.config.text_config, counts, text=text, kv=kv, value=value)


def prompt_costs(loaded: Loaded, schedule: Schedule, prompts: Sequence[VqaPrompt]) -> dict[str, Any]:
    """Returns the means over prompts of what the cost model says, beside the dense cost of the same prompts.

    `live` are the live visual tokens of each layer: mean, lowest and highest over prompts.
    """
    model, costs, dense, counts = loaded.model, list[Cost](), list[Cost](), list[list[int]]()
    size, depth = model.dtype.itemsize, model.config.text_config.num_hidden_layers
    for start in range(0, len(prompts), loaded.batch):
        inputs = loaded.prompt_encoder.batch(prompts[start : start + loaded.batch], schedule)
        live = live_visual(model, inputs, schedule).sum(dim=2).T.tolist()
        visual = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
        for layers, text, number in zip(live, text_tokens(model, inputs), visual, strict=True):
            costs.append(costs_of(model, layers, text=text, schedule=schedule, value=size))
            dense.append(costs_of(model, [number] * depth, text=text, schedule=Dense(), value=size))
        counts += live
    layers = list(zip(*counts, strict=True))
    return {
        "prompts": len(costs),
        **_means(costs),
        "dense": _means(dense),
        "live": {
            "mean": [statistics.fmean(layer) for layer in layers],
            "low": [min(layer) for layer in layers],
            "high": [max(layer) for layer in layers],
        },
    }


def _means(costs: Sequence[Cost]) -> dict[str, float]:
    return {name: statistics.fmean(getattr(cost, name) for cost in costs) for name in _COSTS}


def draw_overlay(picture: Image.Image, live: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Returns a strip of pictures, from the first layer to the last; layers with the same live tokens share one.

    `picture` is the image as the model saw it; `live` (layers, tokens) bool its live visual tokens in each layer, row
    by row of its `grid`, (rows, columns).
    """
    runs = live_runs(live)
    strip = Image.new("RGB", (len(runs) * (SIDE + GAP) - GAP, SIDE + LABEL), _PAPER)
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(size=11)
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    faded = Image.blend(small, Image.new("RGB", small.size, _SHADE), _FADED)
    for number, (first, last, tokens) in enumerate(runs):
        left = number * (SIDE + GAP)
        mask = Image.fromarray(tokens.reshape(grid).to(torch.uint8).mul(255).numpy())
        strip.paste(Image.composite(small, faded, mask.resize(small.size, Image.Resampling.NEAREST)), (left, 0))
        draw.rectangle((left, 0, left + SIDE - 1, SIDE - 1), outline=_FRAME)
        layers = f"layer {first}" if first == last else f"layers {first}-{last}"
        draw.text((left, SIDE + 2), f"{layers}: {int(tokens.sum())}", fill=_INK, font=font)
    return strip


def live_runs(live: Tensor) -> list[tuple[int, int, Tensor]]:
    """Returns (first layer, last layer, live tokens) of each run of layers with the same live tokens."""
    runs = []
    for _, members in groupby(range(len(live)), key=lambda layer: live[layer].tolist()):
        layers = list(members)
        runs.append((layers[0], layers[-1], live[layers[0]].cpu()))
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and draws; returns the exit code."""
    parser = command_line("eval.live", __doc__)
    parser.add_argument("checkpoint", type=Path, help="run folder, or folder with config.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--limit", type=positive, default=200, help="test questions (default 200)")
    args = parser.parse_args(argv)
    try:
        checkpoint = Checkpoint.find(args.checkpoint)
        make_folder("--out", args.out, [f"live_{name}.png" for name in (TRAINED, *SCHEDULES)])
        model, processor = checkpoint.load()
        draw(Loaded(checkpoint, model, checkpoint.prompt_encoder(processor), BATCH), args.limit, args.out)
    except (UsageError, TokenizerError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"written: {args.out}/live_*.png")
    return 0


def draw(loaded: Loaded, limit: int, out: Path) -> None:
    """Draws the live visual tokens of the first test questions under each schedule to live_NAME.png in a folder."""
    prompts = [VqaPrompt(one.text, [Image.open(one.image).convert("RGB")]) for one in questions("test")[:limit]]
    config = loaded.model.config
    names = usable_schedules(config) + ([] if config.stages is None else [TRAINED])
    for name in tqdm(names, unit="schedule"):  # a pruner on a fused checkpoint prunes within its plan
        live = prompt_costs(loaded, loaded.model.resolve(name), prompts)["live"]
        draw_live({f"{name}: mean and range of {len(prompts)} prompts": live}, out / f"live_{name}.png")


if __name__ == "__main__":
    sys.exit(main())
