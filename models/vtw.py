"""VTW: all visual tokens leave at one layer."""

from __future__ import annotations

from dataclasses import dataclass

from .live_tokens import NO_VISUAL, Selection
from .schedule_base import Schedule, View, is_int, published_setting


@dataclass(frozen=True)
class VTW(Schedule):
    """Visual token withdrawal: all visual tokens are live before layer `layer`, none from it on.

    Inside a plan that lets vision in at `layer` or later, the first layer that sees it still does.

    Source: arXiv 2405.05803 (K=16 of 32 for LLaVA-1.5-7B). The paper chooses K on a small calibration set, as the
    first layer after which dropping vision hardly changes the output (KL divergence); here K is given.
    """

    layer: int = published_setting(16)  # K, at least 1; the decoder's depth means "never"

    def __post_init__(self) -> None:
        self.require("layer", is_int(self.layer, 1), "a layer number (int >= 1)")

    def check(self, num_layers: int) -> None:
        """Raises ScheduleError where the layer is beyond the decoder."""
        expected = f"at most {num_layers}, because the decoder has {num_layers} layers"
        self.require("layer", self.layer <= num_layers, expected)

    def new_state(self) -> _State:
        """Returns the state of a new run."""
        return _State()

    def live(self, view: View) -> Selection:
        """Returns all visual tokens, then none."""
        if view.layer >= self.layer and view.state.has_seen:
            return NO_VISUAL
        view.state.has_seen = True
        return view.visual


@dataclass
class _State:
    """State of a run: whether a layer ran on visual tokens."""

    has_seen: bool = False
