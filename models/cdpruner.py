"""CDPruner: before the decoder, a set of visual tokens stays that is diverse given the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .live_tokens import LiveTokens
from .precision import full_precision
from .schedule_base import ScheduleError, ScorePruner, View, at_least_one, is_int, mask_of

WHOLE = 576  # visual tokens of the image that `tokens` is published for
FLOOR = 1e-6  # added to the least relevance


@dataclass(frozen=True)
class CDPruner(ScorePruner):
    """From layer 0 on, of a sample's N visual tokens round(N `tokens` / 576) stay: the likeliest set of a DPP.

    The kernel of the determinantal point process is r_i r_j cos(f_i, f_j), f the projected features and r the
    relevance to the question; the set is found greedily (incremental Cholesky).

    The question is read by CLIP's text tower, which VLM checkpoints do not contain: `forward(..., relevance=...)` takes
    the cosine of each patch and the question in CLIP's joint space, which `eval.compare --text-tower` computes.

    Source: arXiv 2506.10967 and github.com/Theia-4869/CDPruner at 9541616. The paper takes r from the cosine, the code
    from its negative (patches less like the question weigh more), and so does this class; r is scaled to 0 ... 1.
    Differences: the released code takes one sample and renumbers (`renumber`); with several images choice and scaling
    are over all of a sample's visual tokens. At least one token stays.
    """

    tokens: int = 64  # how many of 576 stay
    renumber: bool = False  # position ids count the live tokens; False: every token keeps its id

    reads_attention = False
    reads_relevance = True

    def __post_init__(self) -> None:
        self.require("tokens", is_int(self.tokens, 1) and self.tokens <= WHOLE, "a count of 576 tokens (1 to 576)")
        self.require("renumber", isinstance(self.renumber, bool), "true or false")
        self.derive(cuts=((0, self.tokens / WHOLE),), rounding=at_least_one, renumbers=self.renumber)

    def score(self, view: View) -> Tensor:
        """Returns how early each token is chosen, the first highest, 0 for those that are not."""
        if view.relevance is None:
            raise ScheduleError(
                "CDPruner: got a checkpoint without a text tower, expected the relevance of its visual tokens: "
                "eval.compare --text-tower CLIP, or forward(..., relevance=...)"
            )
        tokens = LiveTokens.of_mask(mask_of(view.live))
        features = torch.nn.functional.normalize(tokens.take(view.embeddings).float(), dim=-1)
        weight = scaled(-tokens.take(view.relevance).float(), tokens.valid)
        with full_precision(features):
            kernel = weight[:, :, None] * (features @ features.transpose(1, 2)) * weight[:, None]
        choices = max(at_least_one(number * self.cuts[0][1]) for number in view.visual_counts)
        return tokens.put(greedy_map(kernel, tokens.valid, choices)[..., None], view.visual_mask.shape[1])[..., 0]


def scaled(values: Tensor, valid: Tensor) -> Tensor:
    """Returns `values` (B, L) between 0 and 1 over the `valid` ones of a row; all 1 where they are equal."""
    low = values.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    spread = values.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True) - low
    return torch.where(spread > 0, (values - low + FLOOR) / spread, 1.0)


def greedy_map(kernel: Tensor, valid: Tensor, choices: int) -> Tensor:
    """Returns (B, L), how early each item of a DPP with `kernel` (B, L, L) is chosen, the first highest, 0: not at all.

    Source: Chen et al., arXiv 1709.05135, algorithm 1.
    """
    gain = kernel.diagonal(dim1=1, dim2=2).clone()  # what each item would multiply the determinant by
    free, score = valid.clone(), torch.zeros_like(gain)
    known = kernel.new_zeros(len(kernel), choices, kernel.shape[2])
    for number in range(choices):
        chosen = gain.masked_fill(~free, -torch.inf).argmax(dim=1, keepdim=True)
        row = kernel.gather(1, chosen[..., None].expand(-1, -1, kernel.shape[2]))[:, 0]
        before = known[:, :number]
        seen = before.gather(2, chosen[:, None].expand(-1, number, -1))[..., 0]  # (B, number)
        root = gain.gather(1, chosen).clamp(min=torch.finfo(gain.dtype).tiny).sqrt()
        known[:, number] = (row - (seen[..., None] * before).sum(dim=1)) / root
        gain = gain - known[:, number].square()
        rank = score.new_full(chosen.shape, choices - number)
        score.scatter_reduce_(1, chosen, rank, "amax")  # a sample without free items keeps its ranks
        free.scatter_(1, chosen, False)
    return score
