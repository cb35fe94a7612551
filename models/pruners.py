"""Pruners whose layers and counts are given: VTW, and by score FastV, PyramidDrop and Random."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .live_tokens import NO_VISUAL, Selection
from .schedule_base import Schedule, ScheduleError, View, is_int, is_number, keep_highest, published_setting


class ScorePruner(Schedule):
    """A pruner that keeps, from certain layers on, the visual tokens with the highest scores."""

    reads_attention = True
    cuts: Sequence[tuple[int, float]]  # (layer, ratio of a sample's visual tokens that stay from it on), ascending
    rounding: Callable[[float], int] = int  # makes a whole number of tokens of that

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Returns (B, S), at least 0: tokens with higher scores stay."""

    def check(self, num_layers: int) -> None:
        """Raises ScheduleError where the decoder does not reach the last cut."""
        name = "layer" if hasattr(self, "layer") else "layers"
        last, expected = self.cuts[-1][0], f"at most {num_layers - 1}, because the decoder has {num_layers} layers"
        if last >= num_layers:
            raise ScheduleError(f"{type(self).__name__}.{name}: got {last}, expected {expected}")

    def new_state(self) -> set[int]:
        """Returns the layers of the cuts that the run has made."""
        return set()

    def live(self, view: View) -> Selection:
        """Returns all visual tokens before the first cut, fewer after each one."""
        due = [(layer, ratio) for layer, ratio in self.cuts if layer <= view.layer and layer not in view.state]
        if not due or (self.reads_attention and view.last_visual_layer is None):
            return view.live
        view.state.update(layer for layer, _ in due)
        ratio = due[-1][1]
        return keep_highest(self.score(view), view.live, [self.rounding(n * ratio) for n in view.visual_counts])


@dataclass(frozen=True)
class FastV(ScorePruner):
    """From layer `layer` on, of a sample's N visual tokens the round(N (1 - `drop`)) most attended ones stay.

    The score of a token is the attention that the last token of the prompt pays it in layer `layer` - 1, mean over
    heads.

    Source: arXiv 2403.06764 (K=2, R=0.5 for LLaVA-1.5). The official code takes one sample, a fixed image span, and
    runs layer K - 1 under eager attention; here the row is computed apart. Kept tokens keep their position ids, as
    there.
    """

    layer: int = published_setting(2)  # K, at least 1
    drop: float = 0.5  # R, the ratio that goes, 0 ... 1

    def __post_init__(self) -> None:
        self.require("layer", is_int(self.layer, 1), "a layer number (int >= 1)")
        self.require("drop", is_number(self.drop, 0.0, 1.0), "a ratio, 0 to 1")
        self.derive(cuts=((self.layer, 1 - self.drop),), rounding=round)

    def score(self, view: View) -> Tensor:
        """Returns the attention of the layer before."""
        return view.attention()


@dataclass(frozen=True)
class PyramidDrop(ScorePruner):
    """Before each of `layers`, of a sample's N visual tokens the int(N ratio) most attended ones stay.

    The score of a token is the attention that the last token of the prompt would pay it in the layer that is about to
    run: its norm, q and k on the hidden states as they are, softmax over all live keys, mean over heads.

    Source: arXiv 2410.17247 (the defaults are LLaVA-1.5-7B's). Differences: the official code renumbers after each
    drop; with `renumber`, decode steps go on counting that way, layer by layer, so that a decode step equals a longer
    prefill. This class is the inference path alone.
    """

    layers: Sequence[int] = published_setting((8, 16, 24))  # where tokens go, ascending, from 1 on
    ratios: Sequence[float] = (0.5, 0.25, 0.125)  # how many stay from there on, 0 ... 1, not growing
    renumber: bool = False  # position ids count the live tokens of each layer; False: every token keeps its id

    def __post_init__(self) -> None:
        layers, ratios = self.layers, self.ratios
        good = isinstance(layers, list | tuple) and bool(layers) and all(is_int(layer, 1) for layer in layers)
        good = good and list(layers) == sorted(set(layers))
        self.require("layers", good, "layer numbers (int >= 1), ascending")
        good = isinstance(ratios, list | tuple) and len(ratios) == len(layers)
        good = good and all(is_number(ratio, 0.0, 1.0) for ratio in ratios)
        good = good and list(ratios) == sorted(ratios, reverse=True)
        self.require("ratios", good, "a ratio, 0 to 1, for each of layers, not growing")
        self.require("renumber", isinstance(self.renumber, bool), "true or false")
        cuts = tuple(zip(layers, ratios, strict=True))
        self.derive(layers=tuple(layers), ratios=tuple(ratios), cuts=cuts, renumbers=self.renumber)

    def score(self, view: View) -> Tensor:
        """Returns the attention that the layer about to run would pay."""
        return view.next_layer_attention()


@dataclass(frozen=True)
class Random(ScorePruner):
    """From layer `layer` on, int(N `ratio`) of a sample's N visual tokens stay, drawn at random.

    The control that any rule for choosing tokens has to beat. The draw depends on the seed and on N alone, so a sample
    keeps the same tokens in any batch.

    Source: ours.
    """

    layer: int = published_setting(2)  # the first layer that runs without the others
    ratio: float = 0.5  # how many stay, 0 ... 1
    seed: int = 0  # of the draw

    reads_attention = False

    def __post_init__(self) -> None:
        self.require("layer", is_int(self.layer, 0), "a layer number (int >= 0)")
        self.require("ratio", is_number(self.ratio, 0.0, 1.0), "a ratio, 0 to 1")
        self.require("seed", is_int(self.seed, 0), "an int >= 0")
        self.derive(cuts=((self.layer, self.ratio),))

    def score(self, view: View) -> Tensor:
        """Returns the rank of each visual token in the sample's draw, the first drawn highest."""
        scores = torch.zeros(view.visual_mask.shape)
        for sample, number in enumerate(view.visual_counts):
            draw = torch.randperm(number, generator=torch.Generator().manual_seed(self.seed))
            scores[sample, draw] = torch.arange(number, 0, -1.0)
        rank = (view.visual_mask.cumsum(dim=1) - 1).clamp(min=0)
        return scores.to(rank.device).gather(1, rank)


@dataclass(frozen=True)
class VTW(Schedule):
    """Visual token withdrawal: all visual tokens are live before layer `layer`, none from it on.

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

    def live(self, view: View) -> Selection:
        """Returns all visual tokens, then none."""
        return view.visual if view.layer < self.layer else NO_VISUAL
