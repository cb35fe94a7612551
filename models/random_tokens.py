"""Random: the control that any rule for choosing tokens has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule_base import ScorePruner, View, is_int, is_number, published_setting


@dataclass(frozen=True)
class Random(ScorePruner):
    """From layer `layer` on, int(N `ratio`) of a sample's N visual tokens stay, drawn at random.

    The draw depends on the seed and on N alone, so a sample keeps the same tokens in any batch.

    Source: ours.
    """

    layer: int = published_setting(2)  # the first layer that runs without the others
    ratio: float = 0.5  # how many stay, 0 ... 1
    seed: int = 0  # of the draw

    reads_attention = False

    def __post_init__(self) -> None:
        self.require("layer", is_int(self.layer, 0), "a layer number (int >= 0)")
        self.require("ratio", is_number(self.ratio, 0.0, 1.0), "a ratio, 0 to 1")
        self.require("seed", is_int(self.seed, 0) and self.seed < 2**63, "an int >= 0 of 63 bits")
        self.derive(cuts=((self.layer, self.ratio),))

    def score(self, view: View) -> Tensor:
        """Returns the rank of each visual token in the sample's draw, the first drawn highest."""
        scores = torch.zeros(view.visual_mask.shape)
        for sample, number in enumerate(view.visual_counts):
            draw = torch.randperm(number, generator=torch.Generator().manual_seed(self.seed))
            scores[sample, draw] = torch.arange(number, 0, -1.0)
        rank = (view.visual_mask.cumsum(dim=1) - 1).clamp(min=0)
        return scores.to(rank.device).gather(1, rank)
