"""PyramidDrop: fewer and fewer visual tokens, in steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .schedule_base import ScorePruner, View, are_ascending, is_number, published_setting


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
        self.require("layers", are_ascending(layers, 1), "layer numbers (int >= 1), ascending")
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
