"""Prefill and 32 decode steps under each schedule, side by side on one model."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eval import measure
from eval.comparison.speed import decode, prefill, times
from eval.live import live_visual, run_costs
from eval.measure import Shape
from models import StagePlan
from models.live_tokens import NO_VISUAL, Selection
from models.schedules import Dense, Fused, Schedule, View, VisiPruner, published
from models.value_remap import ValueRemap

DECODE_STEPS = 32
KEPT_SHARE = 0.1  # of the visual tokens, that VisiPruner keeps here
SHAPES, QUICK = (Shape(32, 512, 576, 64),), (Shape(8, 256, 144, 32),)
GPU_SHAPES = (Shape(32, 4096, 576, 64),)  # LLaVA-1.5-7B's decoder


@dataclass(frozen=True)
class ReplaySchedule(Schedule):
    """The live tokens of another schedule's run, without its tests: what that schedule costs without choosing.

    Attributes:
        counts: live visual tokens of each layer.
        kept: the visual tokens that were live in the layers that had some but not all.
        masks: the schedule whose value remaps run too, or None.
    """

    counts: tuple[int, ...]
    kept: Selection
    masks: Schedule | None = None

    def new_state(self) -> Any:
        """Returns the state of the other schedule."""
        return None if self.masks is None else self.masks.new_state()

    def live(self, view: View) -> Selection:
        """Returns all, the kept ones or none."""
        if self.counts[view.layer] == 0:
            return NO_VISUAL
        return view.visual if self.counts[view.layer] == self.counts[0] else self.kept

    def value_remap(self, view: View) -> ValueRemap | None:
        """Returns what the other schedule wants."""
        return None if self.masks is None else self.masks.value_remap(view)


@dataclass(frozen=True)
class _Lengths(VisiPruner):
    """VisiPruner up to its first test, which records the lengths that it would compare with `token_threshold`."""

    found: list[Tensor] = field(default_factory=list)

    def live(self, view: View) -> Selection:
        if view.last_visual_layer == self.shallow_end + 1 and not self.found:
            row, visual = view.last_query_attention(), view.visual_mask
            self.found.append(row.spread(row.influence()[1].sqrt(), visual.shape[1], 0.0)[visual])
        return view.live


def schedules(model: Any, batch: dict[str, Tensor]) -> dict[str, Schedule]:
    """Returns the rows of the table by name."""
    depth = model.config.text_config.num_hidden_layers
    pruner = firing_visipruner(model, batch)
    unmasked = dataclasses.replace(pruner, modes=("middle", "deep"))
    rows: dict[str, Schedule] = {"dense": Dense()}
    for name, schedule in (("visipruner", pruner), ("visipruner without shallow masks", unmasked)):
        rows[name] = schedule
        rows[f"{name}, choice given"] = replay(model, batch, schedule)
    rows |= {name: published(name, depth) for name in ("fastv", "pyramiddrop", "vtw", "random")}
    window = depth // 4, 3 * depth // 4  # llava_fused.yaml's
    return rows | {"fused full": Fused(StagePlan(*window)), "fused kv": Fused(StagePlan(*window, "kv"))}


def firing_visipruner(model: Any, batch: dict[str, Tensor]) -> VisiPruner:
    """Returns VisiPruner with thresholds that a random model meets.

    With the published ones the fusion layer is never found, because no token of a random model matters. So that every
    part of the rule runs: the first tested layer fires, a tenth of the tokens stays, and vision leaves a quarter of the
    depth later, about where LLaVA-1.5-7B loses it.
    """
    depth = model.config.text_config.num_hidden_layers
    known: Any = published("visipruner", depth)
    probe = _Lengths(**{part.name: getattr(known, part.name) for part in dataclasses.fields(VisiPruner)})
    live_visual(model, batch, probe)
    threshold = float(probe.found[0].float().quantile(1 - KEPT_SHARE))
    return dataclasses.replace(
        known, layer_threshold=1.0, token_threshold=threshold, exit_threshold=0.0, exit_patience=depth // 4
    )


def replay(model: Any, batch: dict[str, Tensor], schedule: VisiPruner) -> ReplaySchedule:
    """Returns a static schedule with the live tokens that `schedule` has on this batch, and with its masks."""
    live = live_visual(model, batch, schedule)
    counts = tuple(live.sum(dim=(1, 2)).tolist())
    some = next(layer for layer, count in zip(live, counts, strict=True) if 0 < count < counts[0])
    return ReplaySchedule(counts, Selection(some), schedule if "shallow" in schedule.modes else None)


def prepare_model(shape: Shape) -> tuple[Any, dict[str, Tensor]]:
    """Returns the model and the prompt of one sample, bfloat16 on a GPU and float32 on a CPU."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = measure.build(shape).eval().to(measure.device(), dtype)
    batch = measure.make_batch(shape)
    del batch["labels"]
    batch = {name: tensor.to(measure.device()) for name, tensor in batch.items()}
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return model, batch


def prepare_memory(shape: Shape, name: str) -> Callable[[], None]:
    """Returns the prefill and decode steps of one row, for a fresh process."""
    model, batch = prepare_model(shape)
    schedule = schedules(model, batch)[name]
    return lambda: decode(model, batch, prefill(model, batch, schedule), DECODE_STEPS)


def table(shape: Shape, repeats: int) -> str:
    """Returns the markdown table of one shape."""
    model, batch = prepare_model(shape)
    rows = schedules(model, batch)
    seconds = times(model, batch, rows, steps=DECODE_STEPS, repeats=repeats)
    medians = {name: statistics.median(first) for name, (first, _) in seconds.items()}
    decoding = {name: statistics.median(following) for name, (_, following) in seconds.items()}
    costs = {name: run_costs(model, batch, row)[0] for name, row in rows.items()}
    lines = [
        f"### {shape}",
        "",
        "| schedule | prefill (s, median) | quartiles | dense / this | to token-layers | to FLOPs "
        f"| {DECODE_STEPS} steps (s, median) | peak memory | token-layers | KV cache (bf16) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in rows:
        low, _, high = statistics.quantiles(seconds[name][0], n=4)
        share = medians[name] / medians["dense"]
        to_tokens = share / (costs[name].token_layers / costs["dense"].token_layers)
        to_flops = share / (costs[name].flops / costs["dense"].flops)
        memory = measure.added_memory(prepare_memory, shape, name) / 2**20
        lines.append(
            f"| {name} | {medians[name]:.4f} | {low:.4f} - {high:.4f} | {1 / share:.2f} "
            f"| {to_tokens:.2f} | {to_flops:.2f} | {decoding[name]:.4f} | {memory:.0f} MiB "
            f"| {costs[name].token_layers:,} | {costs[name].cache_bytes / 2**20:.1f} MiB |"
        )
    return "\n".join(lines)
