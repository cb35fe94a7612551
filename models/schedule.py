"""What a schedule is, and the two that need nothing but the layer's number: Dense and Fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .plan import StagePlan, kept_count


@dataclass
class View:
    """What a schedule may look at before a layer runs. The executor makes one a run and moves it forward.

    Attributes:
        num_layers: the decoder's depth.
        layer: the layer that is about to run.
        visual: (B, S) bool, the visual tokens of the input.
        none: (B, S) bool, all False. Return this very tensor to say "text alone".
        live: (B, S) bool, the visual tokens that the layer before ran on.
        attention: returns (B, S), the attention of the last instruction token on each position in the last layer
            that saw visual tokens, mean over heads, 0 on dead positions. Only where `reads_attention` is set.
        memory: the schedule's own notes about this run.
    """

    num_layers: int
    layer: int
    visual: Tensor
    none: Tensor
    live: Tensor
    attention: Callable[[], Tensor]
    memory: dict[str, Any] = field(default_factory=dict)


class Schedule:
    """Decides, layer by layer, which visual tokens are live. Holds settings only: one object serves any run.

    Attributes:
        update: what a live visual token does in a layer: `full` or `kv` (see StagePlan).
        reads_attention: the schedule calls `view.attention()`, so the executor keeps what that needs.
        trainable: may be used with gradients.
    """

    update: str = "full"
    reads_attention: bool = False
    trainable: ClassVar[bool] = False

    def check(self, num_layers: int) -> None:
        """Raises ValueError when the schedule does not fit a decoder of `num_layers` layers."""

    def live(self, view: View) -> Tensor:
        """Returns (B, S) bool, the visual tokens that are live at `view.layer`: a subset of `view.visual`.

        Returning `view.visual`, `view.none` or `view.live` itself, not a copy, tells that nothing new is to be
        gathered.
        """
        raise NotImplementedError(type(self).__name__)


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
            view.memory["kept"] = keep_most_attended(view.attention(), kept, view.visual, amount)
        if not self.plan.sees(view.layer):
            return view.none
        return view.memory.get("kept", view.visual)


def keep_most_attended(scores: Tensor, live: Tensor, visual: Tensor, amount: float) -> Tensor:
    """Returns (B, S) bool: of the live visual tokens the `amount` with the highest score; ties go to the first.

    Args:
        scores: (B, S), higher stays.
        live: (B, S) bool, the tokens to choose from.
        visual: (B, S) bool, the tokens that a share counts.
        amount: a count, or a share of the sample's visual tokens, rounded down.
    """
    if isinstance(amount, int):
        count = torch.full((len(live), 1), amount, device=live.device)
    else:
        totals = visual.sum(dim=1).tolist()
        count = torch.tensor([[kept_count(amount, n)] for n in totals], device=live.device)
    order = scores.masked_fill(~live, -1.0).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(live.shape[1], device=live.device) < count
    return torch.zeros_like(live).scatter(1, order, first) & live
