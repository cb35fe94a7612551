"""VisiPruner: mask vision in shallow layers, keep the few tokens that matter from the fusion layer on, drop them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .live_tokens import NO_VISUAL, Selection
from .schedule_base import Schedule, ScheduleError, View, is_int, is_number, mask_of, published_setting
from .value_remap import ValueRemap

ALL_STAY, NONE_STAYS = -1.0, float("inf")  # lengths of a contribution that all, and none, are above
MODES = ("shallow", "middle", "deep")
RELEASED = {  # the released code's key: our field
    "mode": "modes",
    "shallow_mid_layer": "shallow_end",
    "layer_threshold": "layer_threshold",
    "tokens_threshold": "token_threshold",
}


@dataclass(frozen=True)
class VisiPruner(Schedule):
    """Prunes by what a visual token adds to the attention output of the last token, in three stages.

    o is that output in a layer (heads concatenated, before the output projection), c_j = w_j v_j what visual token j
    adds to it, s is `shallow_end`.

    - shallow, layers l < s of a prefill: text after the image loses its weights on visual keys, after the softmax,
      nothing renormalised. Layer 0 follows `first_layer`: visual queries lose theirs; under `merge` (released for 7B)
      text after the image gives the weight of all visual keys to the first of them, under `half` (13B) it loses its
      weights on the first half of them. No token is dropped here.
    - middle, layers l > s until it fires once: where cos(o - c_j, o) < `layer_threshold` for any j, only the tokens
      with |c_j| > `token_threshold` stay from layer l + 1 on (it can be none). Layer s is never tested.
    - deep, later layers: one where cos(o - c_j, o) >= `exit_threshold` for every kept j is counted; when the count
      reaches `exit_patience`, all visual tokens are dropped from the next layer on.

    Each sample of a batch has its fusion layer, kept tokens and exit. The tests take one row of attention a layer,
    O(n), under any backend. The masks make no matrix of weights: the layer's attention runs on changed values
    (value_remap.py). Where text and visual queries want different ones (layer 0, and layers 1 ... s - 1 with
    `visual_self_attention`) the visual keys are there twice under an explicit mask, which flash-attention cannot take
    and refuses by name; without visual self-attention layers 1 ... s - 1 need neither. In families whose image blocks
    attend in both directions (Gemma 3, Molmo 2), text inside a block (Molmo 2's marks) loses its weights too.

    Source: arXiv 2510.17205 and github.com/EIT-NLP/VisiPruner at d778622, which takes one sample of one prompt length
    under eager attention. Differences: tests are in float32 whatever the model's type; with several images, "first"
    and "first half" are over all of a sample's visual tokens.
    """

    shallow_end: int = published_setting(6)  # s, in layers
    layer_threshold: float = 0.995  # cosine, 0 ... 1; lower fires later
    token_threshold: float = 0.2  # length of a contribution; higher keeps fewer tokens
    exit_threshold: float = 0.999  # cosine, 0 ... 1
    exit_patience: int = 2  # how many such layers, at least 1
    modes: Sequence[str] = MODES  # the stages that are on; `deep` does nothing without `middle`, which it waits for
    first_layer: str = "merge"  # or "half"
    visual_self_attention: bool = True  # visual queries keep their weights in layers 1 ... s - 1; the paper: False
    consecutive_exit: bool = False  # a layer that fails the exit test sets the count back to 0, as in the paper

    def __post_init__(self) -> None:
        self.require("shallow_end", is_int(self.shallow_end, 0), "a layer number (int >= 0)")
        self.require("layer_threshold", is_number(self.layer_threshold, 0.0, 1.0), "a cosine, 0 to 1")
        self.require("token_threshold", is_number(self.token_threshold, 0.0), "a length, at least 0")
        self.require("exit_threshold", is_number(self.exit_threshold, 0.0, 1.0), "a cosine, 0 to 1")
        self.require("exit_patience", is_int(self.exit_patience, 1), "an int >= 1")
        good = isinstance(self.modes, list | tuple) and bool(self.modes) and all(mode in MODES for mode in self.modes)
        self.require("modes", good, f"a list of {', '.join(MODES)}")
        self.require("first_layer", self.first_layer in ("merge", "half"), "merge or half")
        for name in ("visual_self_attention", "consecutive_exit"):
            self.require(name, isinstance(getattr(self, name), bool), "true or false")
        # only the middle's test, and the deep one after it, read attention
        self.derive(modes=tuple(self.modes), reads_attention="middle" in self.modes)
        self.derive(masks_values="shallow" in self.modes and self.shallow_end > 0)

    @classmethod
    def from_released(cls, settings: Mapping[str, Any]) -> VisiPruner:
        """Returns the schedule of a released VisiPruner JSON, read into a dict with any of the keys of RELEASED.

        Raises:
            ScheduleError: an unknown key, or a value outside its range.
        """
        for key in settings:
            if key not in RELEASED:
                raise ScheduleError(f"VisiPruner settings: got key {key!r}, expected one of {', '.join(RELEASED)}")
        return cls(**{RELEASED[key]: value for key, value in settings.items()})

    def check(self, num_layers: int) -> None:
        """Raises ScheduleError where the shallow part is deeper than the decoder."""
        expected = f"at most {num_layers}, because the decoder has {num_layers} layers"
        self.require("shallow_end", self.shallow_end <= num_layers, expected)

    def new_state(self) -> _State:
        """Returns the state of a new run."""
        return _State()

    def live(self, view: View) -> Selection:
        """Returns all visual tokens, those that matter after the fusion layer, none after the exit."""
        if "middle" not in self.modes or view.live is NO_VISUAL:
            return view.live
        if view.last_visual_layer is None or view.last_visual_layer <= self.shallow_end:
            return view.live
        live, row, samples = mask_of(view.live), view.last_query_attention(), view.state.samples
        cosine, squared = row.influence()
        cosine = row.spread(cosine, live.shape[1], torch.inf).where(live, torch.inf)
        lowest = cosine.amin(dim=1).tolist()  # the one sync of a layer that changes nothing
        samples.extend(_Sample() for _ in lowest[len(samples) :])
        limits = [self._limit(sample, low) for sample, low in zip(samples, lowest, strict=True)]
        if max(limits) < 0:
            return view.live
        lengths = row.spread(squared.sqrt(), live.shape[1], 0.0)
        kept = live & (lengths > torch.tensor(limits, device=lengths.device)[:, None])
        return Selection(kept) if kept.any() else NO_VISUAL

    def value_remap(self, view: View) -> ValueRemap | None:
        """Returns the masks of the shallow layers."""
        if "shallow" not in self.modes or view.layer >= self.shallow_end:
            return None
        state: _State = view.state
        if view.layer > 1 and state.shallow is not None:
            return state.shallow
        visual = view.visual_mask
        nothing = torch.full(visual.shape, -1, device=visual.device)
        if view.layer > 0:
            state.shallow = ValueRemap(text=nothing, visual=None if self.visual_self_attention else nothing)
            return state.shallow
        if self.first_layer == "merge":
            return ValueRemap(text=visual.long().argmax(dim=1, keepdim=True).expand_as(nothing), visual=nothing)
        rank, half = visual.cumsum(dim=1), visual.sum(dim=1, keepdim=True) // 2
        places = torch.arange(nothing.shape[1], device=nothing.device).expand_as(nothing)
        return ValueRemap(text=places.where(rank > half, -1), visual=nothing)

    def _limit(self, sample: _Sample, lowest: float) -> float:
        """Returns the length above which a sample's tokens stay after a layer; updates what is known of the sample."""
        if not sample.fired:
            sample.fired = lowest < self.layer_threshold
            return self.token_threshold if sample.fired else ALL_STAY
        if "deep" not in self.modes:
            return ALL_STAY
        quiet = lowest >= self.exit_threshold
        sample.quiet = sample.quiet + quiet if quiet or not self.consecutive_exit else 0
        return NONE_STAYS if quiet and sample.quiet == self.exit_patience else ALL_STAY


@dataclass
class _State:
    """State of a run: its samples, filled at the first test, and the masks of layers 1 ... s - 1."""

    samples: list[_Sample] = field(default_factory=list)
    shallow: ValueRemap | None = None


@dataclass
class _Sample:
    """State of one sample of a batch: whether the middle has fired, and how many quiet layers followed."""

    fired: bool = False
    quiet: int = 0
