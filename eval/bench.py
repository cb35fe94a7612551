"""Benchmarks: `python -m eval.bench train [--quick]`. Every figure is a ratio measured side by side in one run."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from models import FusedLlavaConfig, FusedLlavaForConditionalGeneration, StagePlan
from models.cost import plan_cost

HIDROP_KEEP = {10: 215, 14: 10, 16: 5, 18: 1}  # HiDrop's 64-token plan (arXiv 2602.23699), for 32 layers
IMAGE_TOKEN, VOCABULARY = 8000, 8192


@dataclass(frozen=True)
class Shape:
    """The size of one benchmark: layers x width, visual and text tokens of each sample."""

    layers: int
    width: int
    visual: int
    text: int

    def __str__(self) -> str:
        return f"{self.layers} layers x {self.width}, {self.visual} visual + {self.text} text tokens"


@dataclass(frozen=True)
class Variant:
    """One row: whose model, under which plan, and whether the batch has an image at all."""

    name: str
    hugging_face: bool = False
    plan: StagePlan | None = None
    text_only: bool = False


def train_variants(shape: Shape) -> list[Variant]:
    """Returns the rows of the training benchmark: fusion over a quarter of the layers, from a quarter on."""
    enter, leave = shape.layers // 4, shape.layers // 2
    rows = [
        Variant("Hugging Face LLaVA", hugging_face=True),
        Variant("dense"),
        Variant("fused full", plan=StagePlan(enter, leave)),
        Variant("fused kv", plan=StagePlan(enter, leave, "kv")),
        Variant("text-only limit", text_only=True),
    ]
    if shape.layers == 32:
        rows.insert(4, Variant("pyramid (HiDrop 64)", plan=StagePlan(8, 24, keep=HIDROP_KEEP)))
    return rows


def build(shape: Shape, variant: Variant) -> PreTrainedModel:
    """Returns the variant's model with the same random weights as every other variant's."""
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=int(shape.width * 2.6875),  # 11008 / 4096, as in LLaVA-1.5-7B
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 64,
    )
    side = int(shape.visual**0.5)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=side * 2,
        patch_size=2,
    )
    common = {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(0)
    if variant.hugging_face:
        model: PreTrainedModel = LlavaForConditionalGeneration(LlavaConfig(**common))
    else:
        stages = None if variant.plan is None else variant.plan.to_dict()
        model = FusedLlavaForConditionalGeneration(FusedLlavaConfig(**common, stages=stages))
    model.model.vision_tower.requires_grad_(False)  # as LLaVA-1.5 tunes
    return model.train()


def make_batch(shape: Shape, variant: Variant) -> dict[str, Tensor]:
    """Returns one sample: a few tokens, the image, a question, and an answer of half the text."""
    random = torch.Generator().manual_seed(1)
    words = torch.randint(0, IMAGE_TOKEN, (1, shape.text), generator=random)
    labels = words.where(torch.arange(shape.text) >= shape.text // 2, -100)
    if variant.text_only:
        return {"input_ids": words, "labels": labels}
    image = torch.full((1, shape.visual), IMAGE_TOKEN)
    side = int(shape.visual**0.5) * 2
    return {
        "input_ids": torch.cat([words[:, :8], image, words[:, 8:]], dim=1),
        "labels": torch.cat([labels[:, :8], torch.full_like(image, -100), labels[:, 8:]], dim=1),
        "pixel_values": torch.randn(1, 3, side, side, generator=random),
    }


def step(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """One forward and backward pass."""
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def time_side_by_side(calls: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Returns seconds of each call, `repeats` times each in turns, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(repeats + 1), desc="rounds", leave=False):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(shape: Shape, variant: Variant) -> int:
    """Returns the bytes that one step adds to a fresh process at its peak."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_step_peak, (shape, variant))


def _step_peak(shape: Shape, variant: Variant) -> int:
    model, batch = build(shape, variant), make_batch(shape, variant)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts anew from here
    before = _status("VmRSS")
    step(model, batch)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def train_table(shape: Shape, repeats: int) -> str:
    """Returns the markdown table of one shape."""
    variants = train_variants(shape)
    parts = {row.name: (build(shape, row), make_batch(shape, row)) for row in variants}
    calls = {name: partial(step, *pair) for name, pair in parts.items()}
    seconds = time_side_by_side(calls, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    lines = [
        f"### {shape}",
        "",
        "| step | seconds (median) | quartiles | dense / this | this / text-only | peak memory | token-layers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in variants:
        low, _, high = statistics.quantiles(seconds[row.name], n=4)
        cost = plan_cost(
            parts[row.name][0].config.text_config,
            row.plan,
            visual=0 if row.text_only else shape.visual,
            text=shape.text,
        )
        memory = peak_memory(shape, row) / 2**20
        lines.append(
            f"| {row.name} | {medians[row.name]:.4f} | {low:.4f} - {high:.4f} "
            f"| {medians['dense'] / medians[row.name]:.2f} | {medians[row.name] / medians['text-only limit']:.2f} "
            f"| {memory:.0f} MiB | {cost.token_layers:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the tables, and writes them where asked."""
    parser = argparse.ArgumentParser(prog="python -m eval.bench", description=__doc__)
    parser.add_argument("what", choices=["train"], help="train: one training step, forward and backward")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: a minute")
    parser.add_argument("--repeats", type=int, default=None, help="timed rounds (default 9, quick 5)")
    parser.add_argument("--out", type=Path, default=None, help="also write the tables to this file")
    args = parser.parse_args()
    shapes = [Shape(16, 512, 576, 64), Shape(16, 512, 576, 256), Shape(32, 256, 576, 64), Shape(32, 256, 576, 256)]
    if args.quick:
        shapes = [Shape(8, 256, 144, 32)]
    repeats = args.repeats or (5 if args.quick else 9)
    command = "python -m eval.bench train" + (" --quick" if args.quick else "")
    header = (
        f"# Training step, side by side\n\n`{command}`: float32, batch 1, sdpa, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, torch {torch.__version__}; medians of {repeats} rounds in turns after a warm-up."
    )
    tables = [train_table(shape, repeats) for shape in shapes]
    report = "\n\n".join([header, *tables]) + "\n"
    print(report)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
