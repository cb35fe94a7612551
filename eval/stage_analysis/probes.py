"""What the stage analysis looks at inside a model: knock-outs, logit lens, attention, value norms, VisiPruner's tests.

Letters: B batch, S sequence, D width, N visual tokens of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eval.stage_analysis.samples import Batch
from models.live_tokens import NO_VISUAL, Selection
from models.schedules import Schedule, View, Within, Wrapper, plan_schedule, published
from models.stage_plan import StagePlan
from models.value_remap import ValueRemap

SINKS = 0.1  # share of a sample's visual tokens that count as sinks: those that text attends to most
MEASURES = (
    "lens_probability",
    "lens_rank",
    "lens_entropy",
    "share_text",
    "share_last",
    "change_text",
    "change_last",
    "sink_value",
    "other_value",
)


@dataclass(frozen=True)
class Knockout(Schedule):
    """In `layers` no text token sees a visual token; its weights on text add up to 1.

    Visual tokens still run through these layers, and see each other there. They are dropped once no later layer shows
    them to text, which changes nothing for text. For a prefill: a one-token decode step sees what the caches hold.

    Source: ours, after the knock-outs of VisiPruner (arXiv 2510.17205, section 3), which do not renormalise.
    """

    layers: frozenset[int]

    def new_state(self) -> ValueRemap:
        """Returns the mask, which all masked layers share."""
        return ValueRemap(text=None, visual=None, hides=True)

    def live(self, view: View) -> Selection:
        """Returns all visual tokens; none when only masked layers are left."""
        is_seen_again = any(layer not in self.layers for layer in range(view.layer, view.num_layers))
        return view.visual if is_seen_again else NO_VISUAL

    def value_remap(self, view: View) -> ValueRemap | None:
        """Returns the mask."""
        return view.state if view.layer in self.layers else None


@dataclass(frozen=True)
class RecordingSchedule(Wrapper):
    """Another schedule, with a callback that gets the view before each layer and after the last.

    The callback may ask for the attention of many tokens; the inner schedule still chooses by the last one's alone.
    """

    callback: Callable[[View], None]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.derive(reads_attention=True)

    def live(self, view: View) -> Selection:
        """Calls back, then returns what the inner schedule selects."""
        self.callback(view)
        return self.inner.live(replace(view, attention=lambda: _last_attention(view)))

    def on_end(self, view: View) -> None:
        """Calls back once more: with what the last layer did."""
        self.callback(view)
        self.inner.on_end(view)


def _last_attention(view: View) -> Tensor:
    """Returns (B, S): the attention of the last instruction token in `last_visual_layer`, mean over heads."""
    row = view.last_query_attention()
    return row.spread(row.weights.mean(dim=1), view.visual_mask.shape[1], 0.0)


def knocked_out(plan: StagePlan | None, layers: Sequence[int]) -> Schedule:
    """Returns a checkpoint's schedule with vision masked in `layers`."""
    knockout = Knockout(frozenset(layers))
    return knockout if plan is None else Within(plan, knockout)


def narrowed(plan: StagePlan | None, enter: int, leave: int) -> StagePlan | None:
    """Returns a checkpoint's plan (None: dense) inside layers [enter, leave); None where it shows no vision there.

    Counts of `keep` that attention chooses stay where a layer before them still sees vision; others as of the layer at
    which vision now enters.
    """
    if plan is None:
        return StagePlan(enter, leave)
    if plan.layers is None:
        layers: Sequence[int] = range(max(enter, plan.enter or 0), min(leave, plan.exit or 0))
    else:
        layers = [layer for layer in plan.layers if enter <= layer < leave]
    if not layers:
        return None
    if plan.select == "attention":
        keep = {layer: amount for layer, amount in plan.keep.items() if layer in layers[1:]}
    else:
        moved = {max(layer, layers[0]): amount for layer, amount in plan.keep.items()}
        keep = {layer: amount for layer, amount in moved.items() if layer in layers}
    if not keep:  # there is nothing left to choose
        plan = replace(plan, keep=keep, select="attention", gradient=None)
    if plan.layers is None:
        return replace(plan, enter=layers[0], exit=layers[-1] + 1, keep=keep)
    return replace(plan, layers=layers, keep=keep)


def answered(model: Any, batch: Batch, hidden: Tensor) -> list[bool]:
    """Returns, for each sample, whether every token of its answer is the most likely one after those before it.

    That is: whether greedy decoding would write exactly this answer and end there. `hidden` (R, D) are the last hidden
    states of the batch's tokens that predict an answer.
    """
    wrong = torch.zeros_like(batch.predicts)
    wrong[batch.predicts] = model.lm_head(hidden).argmax(dim=-1) != batch.ids.roll(-1, dims=1)[batch.predicts]
    return (~wrong.any(dim=1)).tolist()


class LayerMeasurements:
    """Collects the measurements of each layer over many batches; NaN in layers that see no vision.

    The lens puts the decoder's last norm and the head on the hidden state of the last instruction token after each
    layer. Attention is the mean over heads, of the last instruction token (`last`) and of all instruction tokens that
    can see vision (`text`). `change` is 1 - cosine of the attention over visual tokens with that of the layer before.
    The value norm is L1, over all key/value heads; sinks are the tenth of a sample's visual tokens that `text`
    attends to most in that layer.

    Source: arXiv 2510.17205 section 3; the change after ILVAS of HiDrop (arXiv 2602.23699), which compares head by
    head the most attended tokens alone.

    Attributes:
        found: (samples, layers) float32 by name of MEASURES.
    """

    def __init__(self, model: Any, plan: StagePlan | None) -> None:
        self.model, self.plan = model, plan
        self.depth: int = model.config.text_config.num_hidden_layers
        self.found: dict[str, Tensor] = {name: torch.empty(0, self.depth) for name in MEASURES}

    def add(self, batch: Batch) -> None:
        """Runs a batch under the checkpoint's schedule and notes what its layers show."""
        size = len(batch.ids)
        noted = {name: torch.full((size, self.depth), torch.nan) for name in MEASURES}
        before: list[Tensor] = []

        def look(view: View) -> None:
            layer = view.layer - 1
            if layer < 0:
                return
            shown = self._lens(view.hidden_states()[batch.ends], batch.first_answers)
            if view.last_visual_layer == layer:
                shown |= self._vision(view, batch, before)
            else:
                before.clear()
            for name, values in shown.items():
                noted[name][:, layer] = values.float().cpu()

        batch.run(self.model, RecordingSchedule(plan_schedule(self.plan), look), batch.reads)
        self.found = {name: torch.cat([self.found[name], noted[name]]) for name in MEASURES}

    def means(self) -> dict[str, list[float | None]]:
        """Returns the mean over samples of each layer by name; None where it sees no vision."""
        return {
            name: [None if math.isnan(mean) else mean for mean in values.mean(dim=0).tolist()]
            for name, values in self.found.items()
        }

    def _lens(self, states: Tensor, answers: Tensor) -> dict[str, Tensor]:
        logits = self.model.lm_head(self.model.model.get_decoder().norm(states)).float()
        logs = logits.log_softmax(dim=-1)
        answer = logits.gather(1, answers[:, None])
        return {
            "lens_probability": logs.gather(1, answers[:, None])[:, 0].exp(),
            "lens_rank": 1 + (logits > answer).sum(dim=1),
            "lens_entropy": -(logs.exp() * logs).sum(dim=1),
        }

    def _vision(self, view: View, batch: Batch, before: list[Tensor]) -> dict[str, Tensor]:
        """Returns what the layer that just ran shows of vision; keeps its attention in `before` for the next one."""
        row, size, visual = view.last_query_attention(), batch.ids.shape[1], batch.visual
        live = row.spread(torch.ones_like(row.places, dtype=torch.float32), size, 0.0).bool() & visual
        text = view.attention() * live
        last = _last_attention(view) * live
        norms = row.spread(row.values.float().abs().sum(dim=(1, 3)), size, 0.0)
        sinks = most_attended(text, live)
        shown = {
            "share_text": text.sum(dim=1),
            "share_last": last.sum(dim=1),
            "sink_value": (norms * sinks).sum(dim=1) / sinks.sum(dim=1),
            "other_value": (norms * (live & ~sinks)).sum(dim=1) / (live & ~sinks).sum(dim=1),
        }
        if before:
            shown["change_text"] = 1 - torch.cosine_similarity(text, before[0], dim=1)
            shown["change_last"] = 1 - torch.cosine_similarity(last, before[1], dim=1)
        before[:] = [text, last]
        return shown


def most_attended(attention: Tensor, live: Tensor) -> Tensor:
    """Returns (B, S) bool: of each sample's `live` visual tokens the SINKS share with the most attention.

    Rounded up, so that there is at least one; ties go to the first.
    """
    order = attention.masked_fill(~live, -1.0).argsort(dim=1, descending=True, stable=True)
    counts = (live.sum(dim=1, keepdim=True) * SINKS).ceil()
    first = torch.arange(live.shape[1], device=live.device) < counts
    return torch.zeros_like(live).scatter(1, order, first) & live


@dataclass(frozen=True)
class Firing:
    """What VisiPruner did with one sample. None: that test did not fire.

    Attributes:
        fusion: the layer after which it dropped visual tokens.
        kept: how many it kept; 0 is possible.
        exit: the first layer that its choice left without vision.
    """

    fusion: int | None
    kept: int | None
    exit: int | None


def firings(model: Any, batch: Batch, plan: StagePlan | None) -> list[Firing]:
    """Returns what VisiPruner does with each sample, inside the checkpoint's plan.

    Settings are the published ones, with `shallow_end` scaled to the depth. A layer whose middle test fires but keeps
    every token looks the same as one whose test does not fire.
    """
    depth = model.config.text_config.num_hidden_layers
    pruner = published("visipruner", depth)
    output = batch.run(model, pruner if plan is None else Within(plan, pruner))
    found = []
    for sample, (text, visual) in enumerate(zip(batch.text_tokens, batch.visual.sum(dim=1).tolist(), strict=True)):
        counts = [len(layer[sample]) - text for layer in output.live]
        planned = [visual] * depth if plan is None else plan.visual_counts(visual, depth)
        found.append(firing_of(counts, planned))
    return found


def firing_of(counts: Sequence[int], planned: Sequence[int]) -> Firing:
    """Returns what happened, from the live visual tokens with the pruner and by the checkpoint's plan."""
    dropped = next((layer for layer, count in enumerate(counts) if count < planned[layer]), None)
    if dropped is None:
        return Firing(None, None, None)
    gone = next((layer for layer, count in enumerate(counts) if count == 0 < planned[layer]), None)
    return Firing(dropped - 1, counts[dropped], gone)
