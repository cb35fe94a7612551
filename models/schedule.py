"""What a schedule is, and the three that belong to every model: Dense, Fused, and a pruner Within a trained plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .plan import StagePlan, kept_count
from .reader import AttentionRow
from .rewrite import Rewrite


@dataclass
class View:
    """What a schedule may look at before a layer runs. The executor makes one a run and moves it forward.

    Attributes:
        num_layers: the decoder's depth.
        layer: the layer that is about to run.
        visual: (B, S) bool, the visual tokens of the input.
        none: (B, S) bool, all False. Return this very tensor to say "text alone".
        live: (B, S) bool, what the schedule said for the layer before; at first all visual tokens.
        seen_at: the last layer that ran on visual tokens; None before the first one.
        attention: returns (B, S), the attention that the instruction's last token pays each position in layer
            `seen_at`, mean over heads (and over tokens, where several ask), 0 on dead positions.
        ahead: the same for the layer that is about to run, with its own norm and projections on the hidden states
            as they are now. Only after a layer saw visual tokens.
        row: returns the last instruction token's whole row of attention in layer `seen_at`, head by head.
        states: returns (B, S, D), the hidden states that come out of the layer before (the embeddings, before layer
            0), 0 on dead positions. A copy of all of them: for measurements.
        memory: the schedule's own notes about this run.

    `seen_at` and the three that read attention are there with `reads_attention` alone. Each of the three costs O(S),
    never a whole matrix.
    """

    num_layers: int
    layer: int
    visual: Tensor
    none: Tensor
    live: Tensor
    seen_at: int | None
    attention: Callable[[], Tensor]
    ahead: Callable[[], Tensor]
    row: Callable[[], AttentionRow]
    states: Callable[[], Tensor]
    memory: dict[str, Any] = field(default_factory=dict)


class Schedule:
    """Decides, layer by layer, which visual tokens are live. Holds settings only: one object serves any run.

    Attributes:
        update: what a live visual token does in a layer: `full` or `kv` (see StagePlan).
        reads_attention: the schedule reads attention from its view, so the executor keeps what that needs.
        renumbers: each layer counts its live tokens anew for its position ids, where otherwise every token keeps
            its own for good.
        trainable: may be used with gradients.
    """

    update: str = "full"
    reads_attention: bool = False
    renumbers: bool = False
    trainable: ClassVar[bool] = False

    def check(self, num_layers: int) -> None:
        """Raises ValueError when the schedule does not fit a decoder of `num_layers` layers."""

    def live(self, view: View) -> Tensor:
        """Returns (B, S) bool, the visual tokens that are live at `view.layer`: a subset of `view.visual`.

        Returning `view.visual`, `view.none` or `view.live` itself, not a copy, tells that nothing new is to be
        gathered.
        """
        raise NotImplementedError(type(self).__name__)

    def rewrite(self, view: View) -> Rewrite | None:
        """Returns what weights on visual keys count for after the softmax of `view.layer`; None: all as it is.

        Returning the same object for several layers saves making its masks again.
        """
        return None

    def close(self, view: View) -> None:
        """Is told once that the last layer has run; `view.layer` is the decoder's depth. For measurements."""


class Dense(Schedule):
    """Every visual token is live at every layer: LLaVA as it was trained. Source: arXiv 2304.08485."""

    trainable = True

    def live(self, view: View) -> Tensor:
        """Returns all visual tokens."""
        return view.visual


@dataclass(frozen=True)
class Fused(Schedule):
    """A stage plan at work: vision enters, shrinks and leaves at the layers that the model was trained with.

    Source: ours, after the guidelines of VisiPruner (arXiv 2510.17205, section 6); the plan's parts are named in
    StagePlan.
    """

    plan: StagePlan
    trainable = True

    @property
    def update(self) -> str:  # type: ignore[override]
        """The plan's visual update."""
        return self.plan.update

    @property
    def reads_attention(self) -> bool:  # type: ignore[override]
        """Only a plan that keeps some of the tokens has to know which."""
        return bool(self.plan.keep)

    def check(self, num_layers: int) -> None:
        """Raises ValueError when the plan names a layer beyond the decoder."""
        self.plan.check(num_layers)

    def live(self, view: View) -> Tensor:
        """Returns the visual tokens inside the window that the plan keeps."""
        amount = self.plan.keep.get(view.layer)
        if amount is not None:
            kept = view.memory.get("kept", view.visual)
            counts = [kept_count(amount, number) for number in view.visual.sum(dim=1).tolist()]
            view.memory["kept"] = keep_highest(view.attention(), kept, counts)
        if not self.plan.sees(view.layer):
            return view.none
        return view.memory.get("kept", view.visual)


@dataclass(frozen=True)
class Within(Schedule):
    """A pruner on a fused checkpoint: live is what the trained plan lets in and the pruner keeps.

    Layers keep the decoder's own numbers. The pruner is asked only at layers that the plan lets see vision; a cut
    that it wants before any layer saw vision comes right after the first one that did.

    Source: ours.
    """

    plan: StagePlan
    pruner: Schedule

    @property
    def update(self) -> str:  # type: ignore[override]
        """The plan's visual update."""
        return self.plan.update

    @property
    def reads_attention(self) -> bool:  # type: ignore[override]
        """Either may read."""
        return bool(self.plan.keep) or self.pruner.reads_attention

    @property
    def renumbers(self) -> bool:  # type: ignore[override]
        """The pruner's choice."""
        return self.pruner.renumbers

    def check(self, num_layers: int) -> None:
        """Raises ValueError when either names a layer beyond the decoder."""
        self.plan.check(num_layers)
        self.pruner.check(num_layers)

    def live(self, view: View) -> Tensor:
        """Returns the visual tokens that both let live."""
        trained = Fused(self.plan).live(view)
        if trained is view.none:
            return trained
        inner = replace(
            view,
            live=view.memory.get("pruned", view.visual),
            memory=view.memory.setdefault("pruner", {}),
        )
        pruned = view.memory["pruned"] = self.pruner.live(inner)
        if pruned is view.none or trained is view.visual:
            return pruned
        if pruned is view.visual:
            return trained
        known = view.memory.get("both")
        if known is None or known[0] is not trained or known[1] is not pruned:
            known = view.memory["both"] = (trained, pruned, trained & pruned)
        return known[2]

    def rewrite(self, view: View) -> Rewrite | None:
        """Returns what the pruner wants."""
        return self.pruner.rewrite(replace(view, memory=view.memory["pruner"]))


def keep_highest(scores: Tensor, live: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns (B, S) bool: of each sample's live tokens the `counts[b]` with the highest score; ties go to the first.

    Args:
        scores: (B, S), at least 0; higher stays.
        live: (B, S) bool, the tokens to choose from.
        counts: how many stay, a number for each sample.
    """
    order = scores.masked_fill(~live, -1.0).argsort(dim=1, descending=True, stable=True)
    count = torch.tensor(counts, device=live.device)[:, None]
    first = torch.arange(live.shape[1], device=live.device) < count
    return torch.zeros_like(live).scatter(1, order, first) & live
