"""The learned choice of visual tokens: a small scorer of projected features, given the words of the instruction.

Its weights are the only ones that a stage plan adds to a model. They are part of the decoder, so that they are saved,
loaded and released with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .precision import full_precision
from .stage_plan import SCORER_WIDTH, StagePlan

SCORER = "token_scorer"  # the decoder's attribute, and so a part of the names of its weights


class TokenScorer(nn.Module):
    """Scores visual tokens by the dot product of two projections: of the token's features and of the instruction.

    The instruction is a learned weighted mean of its text embeddings, which can ignore the system prompt. The bias of
    its projection gives the part of the score that does not depend on the instruction.

    Source: ours.

    Args:
        width: D, of the decoder.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.word = nn.Linear(width, 1, bias=False)
        self.instruction = nn.Linear(width, SCORER_WIDTH)
        self.feature = nn.Linear(width, SCORER_WIDTH, bias=False)

    def forward(self, embeddings: Tensor, words: Tensor) -> Tensor:
        """Returns (B, S) float32, the score of each position as a visual token.

        Args:
            embeddings: (B, S, D), the decoder's input.
            words: (B, S) bool, the text tokens of the instruction.
        """
        normed = _normed(embeddings)
        weights = self.word(normed)[..., 0].float().masked_fill(~words, torch.finfo(torch.float32).min).softmax(dim=-1)
        mean = weights.masked_fill(~words, 0.0).to(normed.dtype)[:, None] @ normed  # (B, 1, D)
        query, features = self.instruction(_normed(mean)), self.feature(normed)
        with full_precision(embeddings):
            return (features.float() @ query.float().transpose(1, 2))[..., 0] / math.sqrt(SCORER_WIDTH)


def needs_scorer(config: Any) -> bool:
    """Returns whether any plan of a fused config chooses tokens by a scorer."""
    plans = [config.stages, *(config.plans or {}).values()]
    return any(fields is not None and StagePlan.from_dict(fields).select == "learned" for fields in plans)


def is_scorer(name: str) -> bool:
    """Returns whether a module or weight of a model is the scorer's, by its name."""
    return SCORER in name.split(".")


def zero_scorer_loss(decoder: nn.Module, like: Tensor) -> Tensor:
    """Returns 0 with a zero gradient for every weight of a decoder's scorer; `like` (..., D) gives device and type.

    Added to the loss of a step whose plan does not use the scorer: ZeRO-3 would otherwise reuse the gradient of the
    previous step.
    """
    scorer = getattr(decoder, SCORER, None)
    if scorer is None:
        return like.new_zeros(())
    blank = like.new_zeros(1, 1, like.shape[-1])
    return 0.0 * scorer(blank, torch.ones(1, 1, dtype=torch.bool, device=like.device)).sum()


def _normed(rows: Tensor) -> Tensor:
    """Returns rows (..., D) of root mean square 1; massive activations and the projector's scale then do not matter."""
    return nn.functional.rms_norm(rows, rows.shape[-1:], eps=1e-6)
