"""One training step, forward and backward: Hugging Face's model, dense, fused, and the text alone, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval import measure
from eval.measure import Shape
from models import StagePlan
from models.cost import plan_cost

SHAPES = (Shape(16, 512, 576, 64), Shape(16, 512, 576, 256), Shape(32, 256, 576, 64), Shape(32, 256, 576, 256))
QUICK = (Shape(8, 256, 144, 32),)
GPU_SHAPES = (Shape(16, 4096, 576, 64), Shape(16, 4096, 576, 256))  # half of LLaVA-1.5-7B: weights of six rows at once
HIDROP_KEEP = {10: 215, 14: 10, 16: 5, 18: 1}  # HiDrop's 64-token plan (arXiv 2602.23699)
HIDROP_LAYERS = 32  # of the decoder that it is for


@dataclass(frozen=True)
class Variant:
    """One row: whose model, under which plan, and whether the batch has an image at all."""

    name: str
    hugging_face: bool = False
    plan: StagePlan | None = None
    text_only: bool = False


def variants(shape: Shape, family: str = "llava") -> list[Variant]:
    """Returns the rows: fusion over a quarter of the layers, from a quarter on."""
    enter, leave = shape.layers // 4, shape.layers // 2
    rows = [
        Variant(f"Hugging Face ({family})", hugging_face=True),
        Variant("dense"),
        Variant("fused full", plan=StagePlan(enter, leave)),
        Variant("fused kv", plan=StagePlan(enter, leave, "kv")),
        Variant("text-only limit", text_only=True),
    ]
    if shape.layers == HIDROP_LAYERS:
        rows.insert(4, Variant("pyramid (HiDrop 64)", plan=StagePlan(8, 24, keep=HIDROP_KEEP)))
    return rows


def prepare(shape: Shape, variant: Variant, family: str = "llava") -> Callable[[], None]:
    """Returns the variant's step, on the same weights and the same text as every other's."""
    model = measure.build(shape, plan=variant.plan, hugging_face=variant.hugging_face, family=family)
    if family == "llava":
        model.model.vision_tower.requires_grad_(False)  # as LLaVA-1.5 tunes
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model.train().to(measure.device(), dtype)
    batch = measure.make_batch(shape, text_only=variant.text_only, family=family)
    moved = {name: tensor.to(measure.device()) for name, tensor in batch.items()}
    return lambda: step(model, moved)


def step(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """One forward and backward pass."""
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def table(shape: Shape, repeats: int, family: str = "llava") -> str:
    """Returns the markdown table of one shape."""
    rows = variants(shape, family)
    seconds = measure.time_side_by_side({row.name: prepare(shape, row, family) for row in rows}, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    config = measure.text_config(shape)
    lines = [
        f"### {shape}",
        "",
        "| step | seconds (median) | quartiles | dense / this | this / text-only | peak memory | token-layers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, _, high = statistics.quantiles(seconds[row.name], n=4)
        cost = plan_cost(config, row.plan, visual=0 if row.text_only else shape.visual, text=shape.text)
        memory = measure.added_memory(prepare, shape, row, family) / 2**20
        lines.append(
            f"| {row.name} | {medians[row.name]:.4f} | {low:.4f} - {high:.4f} "
            f"| {medians['dense'] / medians[row.name]:.2f} | {medians[row.name] / medians['text-only limit']:.2f} "
            f"| {memory:.0f} MiB | {cost.token_layers:,} |"
        )
    return "\n".join(lines)
