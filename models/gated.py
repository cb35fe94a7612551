"""Gates on what each layer sees of vision: a soft window of layers, for a training that finds its window."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from .live_tokens import Selection
from .schedule_base import Schedule, View


@dataclass(frozen=True, eq=False)
class Gated(Schedule):
    """Every layer sees vision through a gate, a number from 0 (closed) to 1 (open).

    An open gate is the layer as the dense model runs it. Under a closed one text runs through the layer without any
    visual token, and visual tokens keep the hidden state that they had. So gates that are 1 in [enter, exit) and 0
    elsewhere compute what the stage plan of this window does, late injection included. In between, the layer's output
    is interpolated linearly between the two: a gate's gradient is then, to first order, what vision in that layer adds
    to the loss, and it does not vanish at a closed gate. (The logarithm of a gate, added to the attention scores of
    visual keys, has the same limit for text, but needs a mask with gradient, which flash attention does not take, and
    lets visual tokens change in layers that the plan will exclude.)

    For training and prefill without a cache. It costs a dense pass and one of text alone.

    Source: ours.

    Attributes:
        gates: (L,), one a layer.
        begins: (L,), how much of the window begins at each layer, 1 in all: there DeepStack features are added.
        update: as in StagePlan.
    """

    gates: Tensor
    begins: Tensor
    update: str = "full"

    trainable = True

    def check(self, num_layers: int) -> None:
        """Raises ValueError when there is not one gate a layer."""
        if len(self.gates) != num_layers or len(self.begins) != num_layers:
            raise ValueError(f"gates: got {len(self.gates)}, expected {num_layers}, one a layer")

    def live(self, view: View) -> Selection:
        """Returns all visual tokens."""
        return view.visual

    def gate_at(self, layer: int) -> Tensor:
        """Returns the layer's gate."""
        return self.gates[layer]

    def deepstack_ratios(self, layer: int, levels: int) -> list[Tensor]:
        """Returns how much of each DeepStack feature is added after a layer: level n comes n layers after the first."""
        return [self.begins[layer - level] if level <= layer else self.begins[0] * 0 for level in range(levels)]


def window_gates(weights: Tensor, num_layers: int) -> Tensor:
    """Returns (L,), the gates of a distribution over windows of one width: the share of windows that hold each layer.

    `weights` (L - width + 1,) are of the windows that begin at layer 0, 1, ...; their sum is 1, the gates' is the
    width.
    """
    width = num_layers - len(weights) + 1
    return pad(weights, (width - 1, width - 1)).unfold(0, width, 1).sum(dim=1)
