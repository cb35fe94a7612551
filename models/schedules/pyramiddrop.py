"""PyramidDrop: fewer and fewer visual tokens, in steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.schedule import Schedule, View, keep_highest
from models.schedules.settings import is_int, is_number, require, require_depth


@dataclass(frozen=True)
class PyramidDrop(Schedule):
    """Before each of `layers`, of a sample's N visual tokens the int(N share) most attended ones stay.

    A token's score is the attention that the prompt's last token would pay it in the layer that is about to run:
    that layer's own norm, q and k on the hidden states as they are, softmax over all live keys, mean over heads.

    Attributes:
        layers: where tokens go, ascending, from 1 on.
        shares: how many of the sample's visual tokens stay from there on, 0 ... 1, not growing.
        renumber: count the live tokens' position ids anew in every layer, 0 ... n - 1, as the official code does
            after each drop. False: every token keeps its position id.

    Source: arXiv 2410.17247 (the defaults are LLaVA-1.5-7B's). Differences: the official code renumbers; where it
    does, `renumber` also goes on counting so in decode steps, layer by layer, so that a decode step equals a longer
    prefill. This class is the inference path alone.
    """

    layers: Sequence[int] = (8, 16, 24)
    shares: Sequence[float] = (0.5, 0.25, 0.125)
    renumber: bool = False
    reads_attention = True

    def __post_init__(self) -> None:
        layers, shares = self.layers, self.shares
        good = isinstance(layers, list | tuple) and bool(layers) and all(is_int(layer, 1) for layer in layers)
        good = good and all(one < other for one, other in itertools.pairwise(layers))
        require(good, "PyramidDrop.layers", layers, "layer numbers (int >= 1), ascending")
        good = isinstance(shares, list | tuple) and len(shares) == len(layers)
        good = good and all(is_number(share, 0.0, 1.0) for share in shares)
        good = good and all(one >= other for one, other in itertools.pairwise(shares))
        require(good, "PyramidDrop.shares", shares, "a share, 0 to 1, for each of layers, not growing")
        object.__setattr__(self, "layers", tuple(layers))
        object.__setattr__(self, "shares", tuple(shares))

    @property
    def renumbers(self) -> bool:  # type: ignore[override]
        """The setting."""
        return self.renumber

    def check(self, num_layers: int) -> None:
        """Raises ScheduleError where the decoder does not reach the last layer."""
        require_depth("PyramidDrop.layers", self.layers[-1], num_layers - 1, num_layers)

    def live(self, view: View) -> Tensor:
        """Returns all visual tokens before the first layer, fewer from each one on."""
        due = sum(layer <= view.layer for layer in self.layers)
        if due == view.memory.get("done", 0) or view.seen_at is None:
            return view.live
        view.memory["done"] = due
        counts = [int(number * self.shares[due - 1]) for number in view.visual.sum(dim=1).tolist()]
        return keep_highest(view.ahead(), view.live, counts)
