"""Prefill and 32 decode steps under each schedule, side by side on one model."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from eval import measure
from eval.benches.models import Shape, build, make_batch
from eval.comparison.tables import markdown
from eval.live import costs_of, live_visual
from models import StagePlan
from models.live_tokens import NO_VISUAL, Selection
from models.schedules import Dense, Fused, Schedule, View, VisiPruner, published
from models.value_remap import ValueRemap

DECODE_STEPS = 32
KEPT_SHARE = 0.1  # of the visual tokens, that VisiPruner keeps here
SHAPES, QUICK = (Shape(32, 512, 576, 64),), (Shape(8, 256, 144, 32),)
GPU_SHAPES = (Shape(32, 4096, 576, 64), Shape(32, 4096, 576, 64, batch=16))  # LLaVA-1.5-7B's decoder
TITLE = "Prefill and decode steps, side by side"
NOTE = f"""{measure.MEMORY_NOTE}

Columns: "to token-layers" is the time as a multiple of what the live token-layers predict from the dense row (1 = as
predicted, below 1 = faster), "to FLOPs" the same with the cost model's decoder FLOPs. VisiPruner's thresholds are set
so that a random model fires (first tested layer, a tenth of the visual tokens kept, gone a quarter of the depth
later); "choice given" runs on the same live tokens without choosing them, so the difference is the price of the tests.
The other pruners have their published settings, layer numbers scaled to the depth. Token-layers and KV cache are of one
sample.
"""
HEADING = ["schedule", "prefill (s, median)", "quartiles", "dense / this", "to token-layers", "to FLOPs"]
HEADING += [f"{DECODE_STEPS} steps (s, median)", "peak memory", "token-layers", "KV cache (bf16)"]


@dataclass(frozen=True)
class ReplaySchedule(Schedule):
    """The live tokens of another schedule's run, without its tests: what that schedule costs without choosing."""

    counts: tuple[int, ...]  # live visual tokens of each layer
    kept: Selection  # the visual tokens that were live in the layers that had some but not all
    masks: Schedule | None = None  # the schedule whose value remaps run too

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
    """Returns the model and the prompt of one sample."""
    model = build(shape).eval()
    batch = {name: tensor.to(measure.device()) for name, tensor in make_batch(shape).items() if name != "labels"}
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    return model, batch


def prefills(shape: Shape) -> measure.Calls:
    """Returns prefill and decode steps of each row, all on one fresh model."""
    model, batch = prepare_model(shape)
    return measure.runs(model, batch, schedules(model, batch), DECODE_STEPS)


def table(shape: Shape, repeats: int) -> str:
    """Returns the markdown table of one shape."""
    model, batch = prepare_model(shape)
    rows = schedules(model, batch)
    seconds = measure.times(model, batch, rows, steps=DECODE_STEPS, repeats=repeats)
    memory = measure.added_memory(measure.runs(model, batch, rows, DECODE_STEPS), prefills, shape)
    lines, dense = [HEADING], None
    for name, schedule in rows.items():
        prefill, decoding = zip(*seconds[name], strict=True)
        low, median, high = statistics.quantiles(prefill, n=4)
        counts = live_visual(model, batch, schedule)[:, 0].sum(dim=1).tolist()
        cost = costs_of(model, counts, text=shape.text, schedule=schedule)
        dense = dense or (median, cost)  # the first row
        share, tokens = median / dense[0], cost.token_layers / dense[1].token_layers
        ratios = 1 / share, share / tokens, share / (cost.flops / dense[1].flops)
        cells = [name, f"{median:.4f}", f"{low:.4f} - {high:.4f}", *(f"{ratio:.2f}" for ratio in ratios)]
        cells += [f"{statistics.median(decoding):.4f}", f"{memory[name] / 2**20:.0f} MiB", f"{cost.token_layers:,}"]
        lines.append([*cells, f"{cost.cache_bytes / 2**20:.1f} MiB"])
    return f"### {shape}\n\n{markdown(lines)}"
