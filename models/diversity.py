"""The order in which the max-min rule chooses tokens: each next one is the farthest from those chosen so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .live_tokens import LiveTokens
from .precision import full_precision


@torch.no_grad()
def diversity_order(features: Tensor, mask: Tensor, choices: int, counts: Sequence[int] | None = None) -> Tensor:
    """Returns (B, S), how early each token is chosen: `choices` for the first, 0 for those that are not.

    The distance of two tokens is 1 - cosine of their features. The first choice is the token that is farthest from its
    nearest other one. Nothing waits for the device but the sizes of `mask`, where `counts` does not give them.

    Args:
        features: (B, S, D).
        mask: (B, S) bool, the tokens among which is chosen.
        choices: how many tokens; a sample with fewer gives all.
        counts: how many tokens of each sample `mask` has.

    Source: DivPrune, arXiv 2503.02175.
    """
    tokens = LiveTokens.of_mask(mask, counts=counts)
    normed = torch.nn.functional.normalize(tokens.take(features).float(), dim=-1)
    with full_precision(normed):
        cosine = normed @ normed.transpose(1, 2)  # (B, L, L)
    distance = 1 - (cosine + cosine.transpose(1, 2)) / 2  # the same both ways, so that ties go to the first
    selves = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    smallest = distance.masked_fill(selves | ~tokens.valid[:, None], torch.inf).amin(dim=2)
    free, order = tokens.valid.clone(), torch.zeros_like(smallest)
    for rank in range(choices, 0, -1):
        chosen = smallest.masked_fill(~free, -torch.inf).argmax(dim=1, keepdim=True)
        row = distance.gather(1, chosen[..., None].expand(-1, -1, distance.shape[2]))[:, 0]
        smallest = torch.minimum(smallest, row) if rank < choices else row
        # a sample without free tokens keeps its ranks
        order.scatter_reduce_(1, chosen, order.new_full(chosen.shape, rank), "amax")
        free.scatter_(1, chosen, False)
    return tokens.put(order[..., None], mask.shape[1])[..., 0]
