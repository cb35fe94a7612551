"""A choice of tokens that passes gradients to the scores it was made by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch_facts import on_device

_HALVINGS = 24  # of the interval that holds a threshold: to 1e-6 of the spread of the scores


def straight_through(scores: Tensor, mask: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns (B, S) float32, exactly 1 everywhere, with the gradient of `soft_top_k`: see there.

    Multiplying the value vectors of the kept tokens by it leaves the forward pass unchanged. In the backward pass a
    score rises when its token lowers the loss more than the tokens around the threshold do.
    """
    soft = soft_top_k(scores, mask, counts)
    return 1.0 + (soft - soft.detach())


def soft_top_k(scores: Tensor, mask: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns (B, S) float32, how far each token is chosen: sigmoid(score - t), 0 outside of the mask.

    The threshold t of a sample is where its tokens add up to its count; the gradient goes through it too. So a score
    that rises lowers the others' tokens, and adding a number to all scores changes nothing. A sample that keeps all of
    its tokens, or none, has no gradient. Nothing waits for the device.

    Args:
        scores: (B, S), logits or logarithms of attention weights.
        mask: (B, S) bool, the tokens among which is chosen.
        counts: how many each sample keeps.

    Source: ours; the sigmoid around a threshold is that of HiDrop's paper (arXiv 2602.23699), whose released code
    passes no gradient.
    """
    scores = scores.float()
    total = mask.sum(dim=1, keepdim=True)
    count = on_device(counts, mask.device)[:, None].minimum(total)
    is_cut = (count > 0) & (count < total)
    with torch.no_grad():
        threshold = _threshold(scores, mask, count, is_cut)
        near = torch.sigmoid(scores - threshold)
        slope = (near * (1 - near)).masked_fill(~mask, 0.0)
        share = slope / slope.sum(dim=1, keepdim=True).clamp(min=1e-20)  # how far t follows each score
    threshold = threshold + (share * (scores - scores.detach())).sum(dim=1, keepdim=True)
    return torch.where(mask & is_cut, torch.sigmoid(scores - threshold), (mask & (count > 0)).float())


def _threshold(scores: Tensor, mask: Tensor, count: Tensor, is_cut: Tensor) -> Tensor:
    """Returns (B, 1), t with sum sigmoid(score - t) = count over the mask; 0 where `is_cut` is False."""
    shift = torch.logit(count / mask.sum(dim=1, keepdim=True).clamp(min=1))  # t, were every score 0
    low = (scores.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True) - shift).where(is_cut, 0.0)
    high = (scores.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True) - shift).where(is_cut, 0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        is_low = torch.sigmoid(scores - middle).masked_fill(~mask, 0.0).sum(dim=1, keepdim=True) > count
        low, high = middle.where(is_low, low), high.where(is_low, middle)
    return (low + high) / 2
