"""The stage plan: which decoder layers see the image, and how. Free of torch, so that recipes can read it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCORER_WIDTH = 64  # of the projections of a learned scorer


@dataclass(frozen=True)
class StagePlan:
    """The static, trained choice of the decoder layers that see visual tokens. Saved in the model's config.

    Layers are numbered from 0. Visual tokens are live in [enter, exit): the layers before are shallow, the ones
    after are deep, and both run on text alone.

    Attributes:
        enter: first decoder layer at which visual tokens are live.
        exit: first decoder layer at which they no longer are; the decoder's depth means "never leaves".
        update: `full`, a live visual token runs through the whole layer; or `kv`, it only gives keys and values to the
            text: no query, no MLP, and its hidden state stays as projected.
        layers: the layers that see visual tokens, in place of enter and exit; `kv` only.
        keep: {layer: how many visual tokens stay from that layer on}, a count (int >= 1) or a ratio of the
            sample's visual tokens (0 < float < 1). With `select: diversity` or `learned` the first layer may be named
            too: that many enter.
        select: which ones stay. `attention`: those to which the last instruction token pays the highest attention in
            the layer before (of those that see vision). `diversity`: those whose projected features differ most from
            each other (DivPrune's max-min rule); the choice does not depend on the question. `learned`: those that a
            small scorer of projected features, given the instruction, scores highest; it adds its weights to the model.
        gradient: `straight_through`: training passes gradients to the attention by which tokens are chosen; None: it
            does not. A learned scorer always gets them. The choice itself, and so the forward pass, is the same.

    Raises:
        ValueError: naming the field, its value and what is expected.

    Source: window and pyramid as in HiDrop (arXiv 2602.23699), `kv` and layer lists as in ViCA (arXiv 2602.07574),
    diversity as in DivPrune (arXiv 2503.02175); its place at `enter`, the scorer and the gradient are ours.
    """

    enter: int | None = None
    exit: int | None = None
    update: str = "full"
    layers: Sequence[int] | None = None
    keep: Mapping[int, int | float] = field(default_factory=dict)
    select: str = "attention"
    gradient: str | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("update", ("full", "kv")),
            ("select", ("attention", "diversity", "learned")),
            ("gradient", ("straight_through", None)),
        ):
            if getattr(self, name) not in known:
                expected = " or ".join("null" if one is None else one for one in known)
                raise ValueError(f"stages.{name}: got {getattr(self, name)!r}, expected {expected}")
        if self.layers is None:
            self._check_window()
        else:
            self._check_layers()
        object.__setattr__(self, "keep", _checked_keep(self.keep))
        first = self.layers[0] if self.layers is not None else self.enter
        for layer in self.keep:
            if not self.sees(layer):
                raise ValueError(f"stages.keep: got layer {layer}, expected layers that see vision")
            if layer == first and self.select == "attention":
                raise ValueError(
                    f"stages.keep: got layer {layer}, the first that sees vision, expected later ones, because the "
                    "choice needs the attention of a layer before; select: diversity or learned needs none"
                )
        self._check_choice()

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> StagePlan:
        """Returns the plan that `to_dict` or a recipe's `stages` section describes; unknown keys are an error."""
        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(fields, Mapping):
            raise ValueError(f"stages: got {fields!r}, expected the fields of a plan: {', '.join(known)}")  # noqa: TRY004
        unknown = sorted(set(fields) - set(known), key=str)
        if unknown:
            raise ValueError(f"stages.{unknown[0]}: unknown key, expected one of {', '.join(known)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON-ready values (keys of `keep` become strings, as JSON requires)."""
        layers = None if self.layers is None else list(self.layers)
        return {**vars(self), "layers": layers, "keep": {str(layer): amount for layer, amount in self.keep.items()}}

    def check(self, num_layers: int) -> None:
        """Raises ValueError when the plan names a layer that a decoder of `num_layers` layers does not have."""
        if self.layers is not None and self.layers[-1] >= num_layers:
            found, most = f"layers: got {list(self.layers)}", "layers below"
        elif self.exit is not None and self.exit > num_layers:
            found, most = f"exit: got {self.exit}", "at most"
        else:
            return
        raise ValueError(f"stages.{found}, beyond the decoder's {num_layers} layers (expected {most} {num_layers})")

    def sees(self, layer: int) -> bool:
        """Returns whether visual tokens are live at `layer`."""
        if self.layers is not None:
            return layer in self.layers
        return self.enter <= layer < self.exit  # type: ignore[operator]  # __post_init__ made both ints

    @property
    def is_differentiable(self) -> bool:
        """Whether training passes gradients to the scores by which tokens are chosen."""
        return self.select == "learned" or self.gradient is not None

    def visual_counts(self, visual: int, num_layers: int) -> list[int]:
        """Returns how many of `visual` visual tokens are live at each of `num_layers` layers."""
        counts, kept = [], visual
        for layer in range(num_layers):
            if layer in self.keep:
                kept = min(kept, kept_count(self.keep[layer], visual))
            counts.append(kept if self.sees(layer) else 0)
        return counts

    def _check_window(self) -> None:
        for name in ("enter", "exit"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"stages.{name}: got {value!r}, expected a layer number (int >= 0)")
        if self.enter >= self.exit:  # type: ignore[operator]  # both are ints now
            raise ValueError(f"stages.exit: got {self.exit}, expected a layer after enter ({self.enter})")

    def _check_choice(self) -> None:
        if self.gradient is not None and self.select == "diversity":
            raise ValueError(
                f"stages.gradient: got {self.gradient!r} with select: diversity, which has nothing to learn; expected "
                "null, or select: attention or learned"
            )
        if (self.select != "attention" or self.gradient is not None) and not self.keep:
            found = f"gradient: {self.gradient}" if self.gradient is not None else f"select: {self.select}"
            raise ValueError(f"stages.keep: got none with {found}, expected how many tokens stay from which layer on")

    def _check_layers(self) -> None:
        if self.update != "kv":
            raise ValueError(
                "stages.layers: got a list with update 'full', expected update 'kv' with a list; "
                "'full' takes enter and exit"
            )
        if self.enter is not None or self.exit is not None:
            raise ValueError("stages.layers: got it beside enter or exit, expected one or the other")
        layers = tuple(self.layers or ()) if isinstance(self.layers, list | tuple) else ()
        good = all(type(layer) is int and layer >= 0 for layer in layers)
        if not layers or not good or list(layers) != sorted(set(layers)):
            raise ValueError(f"stages.layers: got {self.layers!r}, expected layer numbers, ascending, at least one")
        object.__setattr__(self, "layers", layers)


def kept_count(amount: float, visual: int) -> int:
    """Returns how many of `visual` tokens a count or a ratio stands for; a ratio keeps at least one."""
    # 100 * 0.29 is 28.999999999999996
    return min(visual, amount if isinstance(amount, int) else max(1, int(visual * amount + 1e-9)))


def _checked_keep(keep: Mapping[Any, Any]) -> dict[int, int | float]:
    expected = "expected {layer: count >= 1 or ratio between 0 and 1}"
    if not isinstance(keep, Mapping):
        raise ValueError(f"stages.keep: got {keep!r}, {expected}")  # noqa: TRY004  # one kind for users
    amounts: dict[int, int | float] = {}
    for key, amount in keep.items():
        layer = int(key) if isinstance(key, str) and key.isdecimal() else key  # JSON's keys are strings
        is_count = type(amount) is int and amount >= 1
        is_ratio = type(amount) is float and 0.0 < amount < 1.0
        if type(layer) is not int or not (is_count or is_ratio):
            raise ValueError(f"stages.keep: got {key!r}: {amount!r}, {expected}")
        if layer in amounts:
            raise ValueError(f"stages.keep: got layer {layer} twice, expected each once")
        amounts[layer] = amount
    amounts = dict(sorted(amounts.items()))
    for kind in (int, float):
        same_kind = [amount for amount in amounts.values() if type(amount) is kind]
        if any(later > earlier for earlier, later in itertools.pairwise(same_kind)):
            raise ValueError(f"stages.keep: got growing amounts {amounts}, {expected}, shrinking")
    return amounts
