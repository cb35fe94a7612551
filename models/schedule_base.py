"""What a schedule is; the ones that belong to every model: Dense, Fused, and a pruner Within a trained plan."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionRow
from .batch_facts import on_device
from .diversity import diversity_order
from .image_tokens import ImageTokens
from .live_tokens import NO_VISUAL, Selection
from .soft_choice import straight_through
from .stage_plan import StagePlan, kept_count
from .value_remap import ValueRemap


@dataclass(frozen=True)
class View:
    """What a schedule may read before a layer runs. The executor makes one for each layer.

    Attributes:
        num_layers: the decoder's depth.
        layer: the layer that is about to run.
        visual: all visual tokens of the input.
        live: what the schedule selected for the layer before; at first all visual tokens.
        last_visual_layer: the last layer that ran on visual tokens; None before the first one.
        state: what `Schedule.new_state` returned for this run.
        input_embeddings: returns (B, S, D), the input of the decoder: text embeddings and projected image features.
        tower: output of the vision tower; only under a schedule with `reads_tower`.
        relevance: (B, S), the relevance of each visual token to the question, passed by the caller; None without one.
        prompt: returns (B, S) bool, the text tokens up to the first instruction token, which excludes all answers.
        attention: returns (B, S), the attention that the instruction tokens pay each position in layer
            `last_visual_layer`, mean over them and over heads, 0 on dead positions. `attention(mask)` is the same for
            the text tokens of a (B, S) bool mask, which has one in every sample.
        next_layer_attention: the same for the layer that is about to run, with its norm and projections on the hidden
            states as they are now. Only after a layer ran on visual tokens.
        last_query_attention: returns the attention row of the last instruction token in layer `last_visual_layer`.
        attention_rows: returns (B, Q, S) with gradient, in training: what each instruction token pays each position in
            layer `last_visual_layer`, mean over heads, 0 on dead positions and for padding queries.
        scores: returns (B, S), the learned scorer's score of each visual token given the instruction: the text of
            `prompt` or, with labels, all unlabelled text. Needs `reads_scores`.
        hidden_states: returns (B, S, D), the output of the previous layer (the embeddings, before layer 0); visual
            tokens that skipped that layer keep their last state.

    `last_visual_layer`, `prompt` and the four attention functions need `reads_attention`. Each of the four costs O(S)
    per query token; `attention_rows` also recomputes the layer's keys.
    """

    num_layers: int
    layer: int
    visual: Selection
    live: Selection
    last_visual_layer: int | None
    state: Any
    input_embeddings: Callable[[], Tensor]
    tower: ImageTokens | None
    relevance: Tensor | None
    prompt: Callable[[], Tensor]
    attention: Callable[..., Tensor]
    next_layer_attention: Callable[[], Tensor]
    last_query_attention: Callable[[], AttentionRow]
    attention_rows: Callable[[], Tensor]
    scores: Callable[[], Tensor]
    hidden_states: Callable[[], Tensor]

    @property
    def embeddings(self) -> Tensor:
        """(B, S, D), as `input_embeddings`."""
        return self.input_embeddings()

    @property
    def visual_mask(self) -> Tensor:
        """(B, S) bool, all visual tokens."""
        return mask_of(self.visual)

    @property
    def visual_counts(self) -> list[int]:
        """How many visual tokens each sample has."""
        counts = self.visual.counts
        return self.visual_mask.sum(dim=1).tolist() if counts is None else list(counts)


def mask_of(selection: Selection) -> Tensor:
    """Returns the (B, S) mask of a selection that is not NO_VISUAL."""
    if selection.mask is None:
        raise ValueError("NO_VISUAL has no mask")
    return selection.mask


class Schedule:
    """Decides, layer by layer, which visual tokens are live. Holds settings only: one object serves any run."""

    update: str = "full"  # what a live visual token does in a layer: `full` or `kv` (see StagePlan)
    reads_attention: bool = False  # the schedule reads attention, so the executor keeps what that needs
    reads_scores: bool = False  # the schedule reads `view.scores`, which a checkpoint with a learned scorer has
    differentiable: bool = False  # attention and scores that the schedule reads carry gradients: see `token_gates`
    reads_tower: bool = False  # the schedule reads what the vision tower made of the images, as `view.tower`
    reads_relevance: bool = False  # the schedule reads `view.relevance`, which the caller has to give
    masks_values: bool = False  # the schedule's value remaps are for the prompt alone
    renumbers: bool = False  # each layer numbers its live tokens anew; otherwise every token keeps its position id
    trainable: bool = False  # may be used with gradients

    def derive(self, **attributes: Any) -> None:
        """Sets attributes that follow from the settings; called by __post_init__ of a frozen dataclass."""
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def require(self, name: str, good: bool, expected: str) -> None:
        """Raises ScheduleError, naming the setting `name` and its value, unless `good`."""
        if not good:
            raise ScheduleError(f"{type(self).__name__}.{name}: got {getattr(self, name)!r}, expected {expected}")

    def check(self, num_layers: int) -> None:
        """Raises ValueError when the schedule does not fit a decoder of `num_layers` layers."""

    def new_state(self) -> Any:
        """Returns what the schedule keeps between the layers of one run, as `view.state`; None: nothing."""
        return None

    @abstractmethod
    def live(self, view: View) -> Selection:
        """Returns the visual tokens that are live at `view.layer`: a subset of `view.visual`.

        Returning `view.visual`, `view.live` or NO_VISUAL saves gathering them anew.
        """

    def value_remap(self, view: View) -> ValueRemap | None:
        """Returns how attention weights on visual keys are moved or zeroed after the softmax; None: not at all.

        Returning the same object for several layers saves making its masks again.
        """
        return None

    def update_at(self, layer: int) -> str:
        """Returns the update of live visual tokens at a layer, `full` or `kv`; override it where layers differ.

        In `kv` layers visual tokens keep their last hidden state.
        """
        return self.update

    def visual_states(self, view: View) -> Tensor | None:
        """Returns (B, S, D), new hidden states of the live visual tokens from `view.layer` on; None: unchanged.

        Called after `live`, at layers with live visual tokens. For schedules that merge tokens.
        """
        return None

    def gate_at(self, layer: int) -> Tensor | None:
        """Returns a layer's gate, a number from 0 (text sees no vision) to 1; None: it has none. See Gated."""
        return None

    def deepstack_ratios(self, layer: int, levels: int) -> Sequence[Tensor] | None:
        """Returns the ratio of each of `levels` DeepStack features that is added after a layer that sees vision.

        None: the whole next one, after each such layer.
        """
        return None

    def token_gates(self, view: View) -> Tensor | None:
        """Returns (B, S), all exactly 1: factors on the value vectors that pass gradients to the scores of the choice.

        Called after `live` of a `differentiable` schedule, where gradients are computed; None: nothing.
        """
        return None

    def on_end(self, view: View) -> None:
        """Called once after the last layer, with `view.layer` the decoder's depth. For measurements."""


@dataclass(frozen=True)
class Dense(Schedule):
    """Every visual token is live at every layer: the model as Hugging Face runs it. Source: arXiv 2304.08485."""

    trainable = True

    def live(self, view: View) -> Selection:
        """Returns all visual tokens."""
        return view.visual


_LEAST_ATTENTION = 1e-20  # what counts as attention 0 in logarithms


@dataclass
class _FusedState:
    kept: Selection | None = None
    scores: Tensor | None = None  # (B, S), by features: the same for all cuts, so that each keeps a part of the last
    gates: Tensor | None = None  # (B, S), the product of those of the cuts


@dataclass(frozen=True)
class Fused(Schedule):
    """Runs a stage plan: vision enters, shrinks and leaves at the layers that the model was trained with.

    Source: ours, after the guidelines of VisiPruner (arXiv 2510.17205, section 6); StagePlan names the parts.
    """

    plan: StagePlan

    trainable = True

    def __post_init__(self) -> None:
        plan = self.plan
        self.derive(update=plan.update, reads_attention=bool(plan.keep) and plan.select == "attention")
        self.derive(reads_scores=plan.select == "learned", differentiable=plan.is_differentiable)

    def check(self, num_layers: int) -> None:
        """Raises ValueError when the plan names a layer beyond the decoder."""
        self.plan.check(num_layers)

    def new_state(self) -> _FusedState:
        """Returns which tokens the plan has kept so far."""
        return _FusedState()

    def live(self, view: View) -> Selection:
        """Returns the visual tokens inside the window that the plan keeps."""
        state: _FusedState = view.state
        amount = self.plan.keep.get(view.layer)
        if amount is not None:
            counts = [kept_count(amount, number) for number in view.visual_counts]
            scores, before = self._scores(view, counts), state.kept or view.visual
            state.kept = keep_highest(scores, before, counts)
            if self.differentiable and torch.is_grad_enabled():
                # the scorer's scores are logits already
                logits = scores.clamp(min=_LEAST_ATTENTION).log() if self.reads_attention else scores
                gates = straight_through(logits, mask_of(before), counts)
                state.gates = gates if state.gates is None else state.gates * gates
        if not self.plan.sees(view.layer):
            return NO_VISUAL
        return state.kept or view.visual

    def token_gates(self, view: View) -> Tensor | None:
        """Returns the gates of the cuts made so far: see `straight_through`."""
        return view.state.gates

    def _scores(self, view: View, counts: Sequence[int]) -> Tensor:
        """Returns (B, S): tokens with higher scores stay."""
        state: _FusedState = view.state
        if self.plan.select == "attention":
            return view.attention()
        if state.scores is None and self.plan.select == "learned":
            state.scores = view.scores()
        elif state.scores is None:
            state.scores = diversity_order(view.embeddings, view.visual_mask, max(counts), view.visual.counts)
        return state.scores


@dataclass(frozen=True)
class Wrapper(Schedule):
    """Runs another schedule unchanged: for subclasses that observe it."""

    inner: Schedule

    def __post_init__(self) -> None:
        inner = self.inner
        self.derive(update=inner.update, renumbers=inner.renumbers, trainable=inner.trainable)
        self.derive(reads_attention=inner.reads_attention, reads_tower=inner.reads_tower)
        self.derive(reads_relevance=inner.reads_relevance, reads_scores=inner.reads_scores)
        self.derive(differentiable=inner.differentiable, masks_values=inner.masks_values)

    def check(self, num_layers: int) -> None:
        """Checks the inner schedule."""
        self.inner.check(num_layers)

    def new_state(self) -> Any:
        """Returns the state of the inner schedule."""
        return self.inner.new_state()

    def live(self, view: View) -> Selection:
        """Returns the inner schedule's selection."""
        return self.inner.live(view)

    def value_remap(self, view: View) -> ValueRemap | None:
        """Delegates to the inner schedule."""
        return self.inner.value_remap(view)

    def update_at(self, layer: int) -> str:
        """Delegates to the inner schedule."""
        return self.inner.update_at(layer)

    def visual_states(self, view: View) -> Tensor | None:
        """Delegates to the inner schedule."""
        return self.inner.visual_states(view)

    def gate_at(self, layer: int) -> Tensor | None:
        """Returns the inner schedule's gate."""
        return self.inner.gate_at(layer)

    def deepstack_ratios(self, layer: int, levels: int) -> Sequence[Tensor] | None:
        """Delegates to the inner schedule."""
        return self.inner.deepstack_ratios(layer, levels)

    def token_gates(self, view: View) -> Tensor | None:
        """Delegates to the inner schedule."""
        return self.inner.token_gates(view)

    def on_end(self, view: View) -> None:
        """Calls the inner schedule."""
        self.inner.on_end(view)


@dataclass
class _WithinState:
    plan: Any
    pruner: Any
    pruned: Selection | None = None
    both: dict[tuple[Selection, Selection], Selection] = field(default_factory=dict)


@dataclass(frozen=True)
class Within(Schedule):
    """A pruner on a fused checkpoint: live is what the trained plan lets in and the pruner keeps.

    Layers keep the decoder's numbers. The pruner is asked only at layers that the plan lets see vision; a cut that it
    wants before any layer ran on visual tokens comes right after the first one that did.

    Source: ours.
    """

    plan: StagePlan
    inner: Schedule

    def __post_init__(self) -> None:
        trained, inner = Fused(self.plan), self.inner
        reads = trained.reads_attention or inner.reads_attention
        self.derive(update=trained.update, reads_attention=reads, reads_tower=inner.reads_tower)
        self.derive(reads_scores=trained.reads_scores, masks_values=inner.masks_values)
        self.derive(reads_relevance=inner.reads_relevance, renumbers=inner.renumbers, trainable=inner.trainable)

    def check(self, num_layers: int) -> None:
        """Raises ValueError if the plan or the pruner uses a layer beyond the decoder."""
        self.plan.check(num_layers)
        self.inner.check(num_layers)

    def new_state(self) -> _WithinState:
        """Returns the states of both."""
        return _WithinState(_FusedState(), self.inner.new_state())

    def live(self, view: View) -> Selection:
        """Returns the visual tokens that both keep live."""
        state: _WithinState = view.state
        trained = Fused(self.plan).live(replace(view, state=state.plan))
        if trained is NO_VISUAL:
            return NO_VISUAL
        live = _both(view, trained, state.pruned or view.visual)
        pruned = self.inner.live(replace(view, live=live, state=state.pruner))
        if pruned is live:
            return live
        state.pruned = pruned
        return _both(view, trained, pruned)

    def value_remap(self, view: View) -> ValueRemap | None:
        """Delegates to the pruner."""
        return self.inner.value_remap(replace(view, state=view.state.pruner))

    def update_at(self, layer: int) -> str:
        """Returns `kv` if the plan or the pruner does."""
        return "kv" if self.update == "kv" else self.inner.update_at(layer)

    def visual_states(self, view: View) -> Tensor | None:
        """Delegates to the pruner."""
        return self.inner.visual_states(replace(view, state=view.state.pruner))

    def on_end(self, view: View) -> None:
        """Calls the pruner."""
        self.inner.on_end(replace(view, state=view.state.pruner))


def _both(view: View, trained: Selection, pruned: Selection) -> Selection:
    """Returns the visual tokens of both selections, the same object for the same two."""
    if pruned is NO_VISUAL or trained is view.visual:
        return pruned
    if pruned is view.visual:
        return trained
    both = view.state.both
    if (trained, pruned) not in both:
        both[trained, pruned] = Selection(mask_of(trained) & mask_of(pruned))
    return both[trained, pruned]


@dataclass
class CutState:
    """What a ScorePruner keeps between the layers of a run.

    Attributes:
        made: the layers of the cuts that were made.
        merged: for schedules that merge tokens, what visual tokens are from this layer on; None: unchanged.
    """

    made: set[int] = field(default_factory=set)
    merged: Tensor | None = None


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

    def new_state(self) -> CutState:
        """Returns the cuts that the run has made."""
        return CutState()

    def due(self, view: View) -> float | None:
        """Returns the ratio of the cut that has to be made now, and notes that it was made; None: there is none."""
        made = view.state.made
        due = [(layer, ratio) for layer, ratio in self.cuts if layer <= view.layer and layer not in made]
        if not due or view.live is NO_VISUAL or (self.reads_attention and view.last_visual_layer is None):
            return None
        made.update(layer for layer, _ in due)
        return due[-1][1]

    def live(self, view: View) -> Selection:
        """Returns all visual tokens before the first cut, fewer after each one."""
        ratio = self.due(view)
        if ratio is None:
            return view.live
        return keep_highest(self.score(view), view.live, [self.rounding(n * ratio) for n in view.visual_counts])


def keep_highest(scores: Tensor, live: Selection, counts: Sequence[int]) -> Selection:
    """Returns, of sample b's live tokens, the `counts[b]` with the highest scores (B, S); ties go to the first."""
    mask = mask_of(live)
    order = scores.detach().masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(mask.shape[1], device=mask.device) < on_device(counts, mask.device)[:, None]
    kept = None if live.counts is None else tuple(map(min, counts, live.counts))
    return Selection(torch.zeros_like(mask).scatter(1, order, first) & mask, kept)


class ScheduleError(ValueError):
    """A schedule's setting is wrong, or does not fit the decoder."""


def at_least_one(tokens: float) -> int:
    """Returns the nearest whole number of tokens, at least 1."""
    return max(1, round(tokens))


def is_int(value: Any, low: int) -> bool:
    """Returns whether a value is a whole number, at least `low`."""
    return type(value) is int and value >= low


def are_ascending(layers: Any, low: int) -> bool:
    """Returns whether a value is a list of layer numbers, at least one, ascending from `low` on."""
    good = isinstance(layers, list | tuple) and bool(layers) and all(is_int(layer, low) for layer in layers)
    return good and list(layers) == sorted(set(layers))


def is_number(value: Any, low: float, high: float = float("inf")) -> bool:
    """Returns whether a value is a number in low ... high."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def published_setting(depth_bound: int | Sequence[int]) -> Any:
    """Returns a field with layers published for a 32-layer decoder, which `published` scales to another depth."""
    return field(default=depth_bound, metadata={"published_depth": 32})


def published_layers(layers: Sequence[int]) -> Any:
    """Returns a field with a set of layers published for a 32-layer decoder; `published` scales each layer's place."""
    return field(default=layers, metadata={"published_depth": 32, "is_set": True})
