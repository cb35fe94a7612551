"""FastV: after a few layers, the least attended visual tokens go."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.schedule import Schedule, View, keep_highest
from models.schedules.settings import is_int, is_number, require, require_depth


@dataclass(frozen=True)
class FastV(Schedule):
    """From layer `layer` on, of a sample's N visual tokens the round(N (1 - `drop`)) most attended ones stay.

    A token's score is the attention that the prompt's last token pays it in layer `layer` - 1, mean over heads.

    Attributes:
        layer: K, at least 1.
        drop: R, the share that goes, 0 ... 1.

    Source: arXiv 2403.06764 (K=2, R=0.5 for LLaVA-1.5). The official code takes one sample, a fixed image span, and
    runs layer K - 1 under eager attention; here the row is computed apart. Kept tokens keep their position ids, as
    there.
    """

    layer: int = 2
    drop: float = 0.5
    reads_attention = True

    def __post_init__(self) -> None:
        require(is_int(self.layer, 1), "FastV.layer", self.layer, "a layer number (int >= 1)")
        require(is_number(self.drop, 0.0, 1.0), "FastV.drop", self.drop, "a share, 0 to 1")

    def check(self, num_layers: int) -> None:
        """Raises ScheduleError where the decoder does not reach the layer."""
        require_depth("FastV.layer", self.layer, num_layers - 1, num_layers)

    def live(self, view: View) -> Tensor:
        """Returns all visual tokens before the layer, the most attended ones from it on."""
        if view.layer < self.layer or view.seen_at is None or "cut" in view.memory:
            return view.live
        view.memory["cut"] = True
        counts = [round(number * (1 - self.drop)) for number in view.visual.sum(dim=1).tolist()]
        return keep_highest(view.attention(), view.live, counts)
