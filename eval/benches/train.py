"""One training step, forward and backward: Hugging Face's model, dense, fused, and the text alone, side by side."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from eval import measure
from eval.benches.models import Shape, build, make_batch, text_config
from eval.comparison.tables import markdown
from models import StagePlan
from models.cost import plan_cost

TITLE = "Training step, side by side"
NOTE = f"{measure.MEMORY_NOTE} Token-layers are of one sample.\n"
SHAPES = (Shape(16, 512, 576, 64), Shape(16, 512, 576, 256), Shape(32, 256, 576, 64), Shape(32, 256, 576, 256))
QUICK = (Shape(8, 256, 144, 32),)
# Half of LLaVA-1.5-7B: weights of six rows at once. One sample waits for Python on a fast GPU, so there are eight too.
GPU_SHAPES = (Shape(16, 4096, 576, 64), Shape(16, 4096, 576, 64, batch=8), Shape(16, 4096, 576, 256, batch=8))
HIDROP_KEEP = {10: 215, 14: 10, 16: 5, 18: 1}  # HiDrop's 64-token plan (arXiv 2602.23699)
HIDROP_LAYERS = 32  # of the decoder that it is for
HEADING = ["step", "seconds (median)", "quartiles", "dense / this", "this / text-only", "peak memory", "token-layers"]


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


def steps(shape: Shape, family: str) -> measure.Calls:
    """Returns the step of each variant, all on the same weights and the same text."""
    calls = {}
    for row in variants(shape, family):
        model = build(shape, plan=row.plan, hugging_face=row.hugging_face, family=family)
        if family == "llava":
            model.model.vision_tower.requires_grad_(False)  # as LLaVA-1.5 tunes
        model.train()
        batch = make_batch(shape, text_only=row.text_only, family=family)
        moved = {name: tensor.to(measure.device()) for name, tensor in batch.items()}
        calls[row.name] = partial(step, model, moved)
    return calls


def step(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """One forward and backward pass."""
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def table(shape: Shape, repeats: int, family: str = "llava") -> str:
    """Returns the markdown table of one shape."""
    calls = steps(shape, family)
    seconds = measure.time_side_by_side(calls, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    memory = measure.added_memory(calls, steps, shape, family)
    lines = [HEADING]
    for row in variants(shape, family):
        low, median, high = statistics.quantiles(seconds[row.name], n=4)
        visual = 0 if row.text_only else shape.visual
        cost = plan_cost(text_config(shape), row.plan, visual=visual, text=shape.text)
        ratios = medians["dense"] / median, median / medians["text-only limit"]
        cells = [row.name, f"{median:.4f}", f"{low:.4f} - {high:.4f}", *(f"{ratio:.2f}" for ratio in ratios)]
        lines.append([*cells, f"{memory[row.name] / 2**20:.0f} MiB", f"{cost.token_layers:,}"])
    return f"### {shape}\n\n{markdown(lines)}"
