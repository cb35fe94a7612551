"""ShortV: in layers that do little for them, visual tokens only give keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .live_tokens import Selection
from .schedule_base import Schedule, View, are_ascending, published_layers


@dataclass(frozen=True)
class ShortV(Schedule):
    """All visual tokens are live everywhere; in `layers` they keep their hidden state and only give keys and values.

    Source: arXiv 2504.00502 and github.com/icip-cas/ShortV at 737c28c (19 of 32 layers for LLaVA-1.5-7B, those with
    the least contribution: KL divergence of the next token when the layer alone is skipped). The layers are given
    here: for another model they are the published ones at the same places of the depth, not calibrated. Differences:
    the released code takes one sample without padding and exactly one image.
    """

    layers: Sequence[int] = published_layers((0, 2, 3, 12, *range(17, 32)))  # where visual tokens run no query, no MLP

    def __post_init__(self) -> None:
        layers = self.layers
        self.require("layers", are_ascending(layers, 0), "layer numbers (int >= 0), ascending")
        self.derive(layers=tuple(layers))

    def check(self, num_layers: int) -> None:
        """Raises ScheduleError where the decoder does not reach the last layer."""
        expected = f"at most {num_layers - 1}, because the decoder has {num_layers} layers"
        self.require("layers", self.layers[-1] < num_layers, expected)

    def live(self, view: View) -> Selection:
        """Returns all visual tokens."""
        return view.visual

    def update_at(self, layer: int) -> str:
        """Returns `kv` in the layers that are skipped."""
        return "kv" if layer in self.layers else "full"
