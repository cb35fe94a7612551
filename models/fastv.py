"""FastV: after a few layers, the least attended visual tokens go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .schedule_base import ScorePruner, View, is_int, is_number, published_setting


@dataclass(frozen=True)
class FastV(ScorePruner):
    """From layer `layer` on, of a sample's N visual tokens the round(N (1 - `drop`)) most attended ones stay.

    The score of a token is the attention that the last token of the prompt pays it in layer `layer` - 1, mean over
    heads.

    Source: arXiv 2403.06764 (K=2, R=0.5 for LLaVA-1.5). The official code takes one sample, a fixed image span, and
    runs layer K - 1 under eager attention; here the row is computed apart. Kept tokens keep their position ids, as
    there.
    """

    layer: int = published_setting(2)  # K, at least 1
    drop: float = 0.5  # R, the ratio that goes, 0 ... 1

    def __post_init__(self) -> None:
        self.require("layer", is_int(self.layer, 1), "a layer number (int >= 1)")
        self.require("drop", is_number(self.drop, 0.0, 1.0), "a ratio, 0 to 1")
        self.derive(cuts=((self.layer, 1 - self.drop),), rounding=round)

    def score(self, view: View) -> Tensor:
        """Returns the attention of the layer before."""
        return view.attention()
