"""Random: the control that any rule for choosing tokens has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.schedule import Schedule, View
from models.schedules.settings import is_int, is_number, require, require_depth


@dataclass(frozen=True)
class Random(Schedule):
    """From layer `layer` on, int(N `share`) of a sample's N visual tokens stay, drawn at random.

    The draw depends on the seed and on N alone, so that a sample keeps the same tokens in any batch.

    Attributes:
        layer: the first layer that runs without the others.
        share: how many stay, 0 ... 1.
        seed: of the draw.

    Source: ours.
    """

    layer: int = 2
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        require(is_int(self.layer, 0), "Random.layer", self.layer, "a layer number (int >= 0)")
        require(is_number(self.share, 0.0, 1.0), "Random.share", self.share, "a share, 0 to 1")
        require(is_int(self.seed, 0), "Random.seed", self.seed, "an int >= 0")

    def check(self, num_layers: int) -> None:
        """Raises ScheduleError where the decoder does not reach the layer."""
        require_depth("Random.layer", self.layer, num_layers - 1, num_layers)

    def live(self, view: View) -> Tensor:
        """Returns all visual tokens before the layer, a random part from it on."""
        if view.layer < self.layer or "cut" in view.memory:
            return view.live
        view.memory["cut"] = True
        kept = torch.zeros(view.visual.shape, dtype=torch.bool)
        for sample, number in enumerate(view.visual.sum(dim=1).tolist()):
            draw = torch.randperm(number, generator=torch.Generator().manual_seed(self.seed))
            kept[sample, draw[: int(number * self.share)]] = True
        rank = (view.visual.cumsum(dim=1) - 1).clamp(min=0)
        return view.visual & kept.to(view.visual.device).gather(1, rank)
