"""DivPrune: before the decoder, the visual tokens that differ most from each other stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .live_tokens import LiveTokens
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
        tokens = LiveTokens.of_mask(mask_of(view.live))
        features = torch.nn.functional.normalize(tokens.take(view.embeddings).float(), dim=-1)
        cosine = features @ features.transpose(1, 2)  # (B, L, L)
        distance = 1 - (cosine + cosine.transpose(1, 2)) / 2  # the same both ways, so that ties go to the first
        selves = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
        smallest = distance.masked_fill(selves | ~tokens.valid[:, None], torch.inf).amin(dim=2)
        free, score = tokens.valid.clone(), torch.zeros_like(smallest)
        choices = max(self.rounding(number * self.ratio) for number in view.visual_counts)
        for rank in range(choices, 0, -1):
            chosen = smallest.masked_fill(~free, -torch.inf).argmax(dim=1, keepdim=True)
            row = distance.gather(1, chosen[..., None].expand(-1, -1, distance.shape[2]))[:, 0]
            smallest = torch.minimum(smallest, row) if rank < choices else row
            # a sample without free tokens keeps its ranks
            score.scatter_reduce_(1, chosen, score.new_full(chosen.shape, rank), "amax")
            free.scatter_(1, chosen, False)
        return tokens.put(score[..., None], view.visual_mask.shape[1])[..., 0]
