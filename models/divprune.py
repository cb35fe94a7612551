"""DivPrune: before the decoder, the visual tokens that differ most from each other stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .diversity import diversity_order
from .schedule_base import ScorePruner, View, at_least_one, is_number, mask_of


@dataclass(frozen=True)
class DivPrune(ScorePruner):
    """From layer 0 on, of a sample's N visual tokens round(N `ratio`) stay: those that are far from each other.

    The distance of two tokens is 1 - cosine of their projected features. The first choice is the token that is
    farthest from its nearest other one; each next choice is the farthest from those chosen so far (max-min).

    Source: arXiv 2503.02175 and github.com/vbdi/divprune at 799e2d9 (ratio 0.098 for LLaVA-1.5: 56 of 576 tokens).
    Differences: the released code takes one sample and a fixed image span, computes in the model's type (float32 here)
    and renumbers positions (`renumber`); here at least one token stays, and with several images the choice is over all
    of a sample's visual tokens.
    """

    ratio: float = 0.098  # how many stay, 0 ... 1
    renumber: bool = False  # position ids count the live tokens; False: every token keeps its id

    reads_attention = False

    def __post_init__(self) -> None:
        self.require("ratio", is_number(self.ratio, 0.0, 1.0), "a ratio, 0 to 1")
        self.require("renumber", isinstance(self.renumber, bool), "true or false")
        self.derive(cuts=((0, self.ratio),), rounding=at_least_one, renumbers=self.renumber)

    def score(self, view: View) -> Tensor:
        """Returns how early each token is chosen, the first highest, 0 for those that are not."""
        choices = max(self.rounding(number * self.ratio) for number in view.visual_counts)
        return diversity_order(view.embeddings, mask_of(view.live), choices)
