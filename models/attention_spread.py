"""Measures how many visual tokens the instruction spreads its attention over, with gradient, in training."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .live_tokens import Selection
from .schedule_base import View, Wrapper, mask_of

_TINY = 1e-12  # below it a share of attention counts as none


@dataclass(frozen=True, eq=False)
class AttentionSpread(Wrapper):
    """Runs another schedule, and measures how widely instruction tokens spread their attention over visual tokens.

    The measure is the entropy of their attention on live visual tokens, the mean over heads, divided by the logarithm
    of the number of these tokens: 1 for equal attention on all of them, 0 for one alone. How much attention goes to
    vision does not count. A penalty on it makes the layers inside the window read few tokens, so that a cut to these
    loses less.

    Source: ours, after guideline (b) of VisiPruner (arXiv 2510.17205, section 6), which names no formula. Entropy needs
    no number of tokens to keep, as a mass of the top k would, and moves all tokens, not those at rank k alone.

    Attributes:
        inner: the schedule.
        layers: filled by a run, one a layer with vision: the measure (B,), and how many instruction tokens of each
            sample see vision there (B,).
    """

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.derive(reads_attention=True)

    def live(self, view: View) -> Selection:
        """Measures the previous layer, then returns the inner schedule's selection."""
        self._measure(view)
        return self.inner.live(view)

    def on_end(self, view: View) -> None:
        """Measures the last layer."""
        self._measure(view)
        self.inner.on_end(view)

    def mean(self) -> tuple[Tensor, Tensor]:
        """Returns (B,) float32, the mean over layers, 0 for a sample without vision; and (B,) bool, which have some."""
        values, asking = (torch.stack(column) for column in zip(*self.layers, strict=True))
        return values.mean(dim=0), asking.any(dim=0)

    def _measure(self, view: View) -> None:
        if view.last_visual_layer is not None and view.last_visual_layer == view.layer - 1:
            self.layers.append(spread(view.attention_rows(), mask_of(view.live)))


def spread(attention: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the measure of each sample (B,), and how many of its instruction tokens pay attention to vision (B,).

    `attention` (B, Q, S) is of each instruction token, 0 for padding; `live` (B, S) bool are the visual tokens.
    """
    paid = attention * live[:, None]
    whole = paid.sum(dim=-1, keepdim=True)
    ratio = paid / whole.clamp(min=_TINY)
    entropy = -(ratio * ratio.clamp(min=_TINY).log()).sum(dim=-1) / live.sum(dim=1, keepdim=True).clamp(min=2).log()
    asking = whole[..., 0] > 0
    counts = asking.sum(dim=1)
    return (entropy * asking).sum(dim=1) / counts.clamp(min=1), counts
