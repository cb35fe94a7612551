"""Knock-outs over ranges of layers, every measurement over one list of samples, and the window that they leave.

Scores are percentages of samples answered exactly; losses are points against the checkpoint as it is, on the same
samples. A range of layers costs at most the tolerance where its loss and one standard error together do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from eval.significance import RESAMPLES, Numbers, standard_error
from eval.stage_analysis.probes import Firing, LayerMeasurements, answered, firings, knocked_out, narrowed
from eval.stage_analysis.samples import Batch, ProbeBatcher, Sample
from models.attention import unwrap, uses_mrope
from models.cache import StagedLayer
from models.decoder import run_decoder
from models.schedules import Schedule, plan_schedule
from models.stage_plan import StagePlan

# a mark behind the image is a part of it: Molmo2's image tokens see theirs, Ovis2 replaces its embedding
MARK_IS_IMAGE = ("molmo2", "ovis2")


class Prefix:
    """One batch up to the last visual token of each sample, with vision and without, for many knock-outs.

    Masked vision changes text behind an image and nothing before it: visual tokens and the text before them see the
    same in every knock-out. So their keys and values are made once, and a knock-out hides a layer's visual keys by
    going on from a cache that does not have them. Letters: B batch, S sequence, P prefix, T text behind the images.

    Args:
        model: a fused model.
        batch: of samples that `can_share` accepts.
        plan: the checkpoint's; None is dense.
    """

    def __init__(self, model: Any, batch: Batch, plan: StagePlan | None) -> None:
        size = batch.ids.shape[1]
        places = torch.arange(size, device=batch.ids.device)
        ends = (places * batch.visual).amax(dim=1, keepdim=True) + 1  # (B, 1): where the text behind begins
        begins = (places + size * (batch.mask == 0)).amin(dim=1, keepdim=True)
        longest = int((ends - begins).max())
        before = torch.arange(longest, device=ends.device) + ends - longest  # (B, P), images end in one column
        behind = torch.arange(int((size - ends).max()), device=ends.device) + ends  # (B, T)
        seen = ((before >= 0) & batch.mask.gather(1, before.clamp(min=0)).bool()).long()
        inputs = {
            name: value.gather(1, before.clamp(min=0)) if getattr(value, "shape", None) == batch.ids.shape else value
            for name, value in batch.inputs.items()
        } | {"attention_mask": seen}

        def cached(schedule: Schedule) -> list[StagedLayer]:
            output = model(**inputs, schedule=schedule, use_cache=True, logits_to_keep=1)
            return output.past_key_values.layers

        # what each layer's cache holds after the prefix, with vision and without
        self._all = cached(plan_schedule(plan))
        self._text = cached(knocked_out(plan, range(len(self._all))))
        # the text behind the images, the same in every knock-out
        behind, is_inside = behind.clamp(max=size - 1), behind < size
        valid = is_inside & batch.mask.gather(1, behind).bool()
        following = cast("Tensor", self._all[0].next_position)[:, None]
        positions = following + (valid.long().cumsum(dim=1) - 1).clamp(min=0)
        self._decoder = unwrap(model.model.get_decoder())
        self._embeds = model.get_input_embeddings()(batch.ids.gather(1, behind))
        self._mask = torch.cat([seen, valid.long()], dim=1)
        self._positions = positions.expand(3, -1, -1) if uses_mrope(self._decoder) else positions
        self._predicts = batch.predicts.gather(1, behind) & valid

    @staticmethod
    def can_share(model: Any, batch: Batch, plan: StagePlan | None) -> bool:
        """Returns whether knock-outs of a batch can share its prefix.

        They cannot where text stands between visual tokens and sees those before it, where a mark behind the image
        belongs to it, or where the plan chooses tokens by the text behind them.
        """
        if model.config.model_type.endswith(MARK_IS_IMAGE) or (plan is not None and plan.keep):
            return False
        behind = batch.visual.cumsum(dim=1) > 0
        before = batch.visual.flip(1).cumsum(dim=1).flip(1) > 0
        between = behind & before & ~batch.visual & batch.mask.bool()
        return not bool(between.any())

    def predicting(self, layers: Collection[int]) -> Tensor:
        """Returns (R, D): the last hidden states of the tokens that predict an answer, vision masked in `layers`."""
        cache = DynamicCache()
        cache.layers = [
            _copied((self._text if number in layers else self._all)[number]) for number in range(len(self._all))
        ]
        output = run_decoder(
            self._decoder,
            self._embeds,
            torch.zeros_like(self._predicts),
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=cache,
        )
        return output.last_hidden_state[self._predicts]


def _copied(layer: StagedLayer) -> StagedLayer:
    """Returns a layer with the same keys and values, to which more can be appended without changing the first."""
    copy = StagedLayer()
    copy.__dict__.update(layer.__dict__)
    return copy


Trial = tuple[Any, ...]  # ("masked", layers ...) or ("removed", enter, exit)
MASKED, REMOVED = "masked", "removed"


@dataclass(frozen=True)
class Result:
    """One trial's score, in per cent, and what it loses against the checkpoint as it is, in points.

    Attributes:
        score: of the trial.
        error: its standard error.
        loss: score of the checkpoint as it is, less this one.
        loss_error: standard error of the loss, sample by sample; at least one sample's worth, so that few samples
            without a change do not pass for certainty.
    """

    score: float
    error: float
    loss: float
    loss_error: float

    def costs_at_most(self, tolerance: float) -> bool:
        """Returns whether loss and one standard error together are within `tolerance` points."""
        return self.loss + self.loss_error <= tolerance


class Trials:
    """The correct answers of each trial. Ranges of layers that mask the same layers share one trial.

    Args:
        plan: the checkpoint's; None is dense.
        depth: the decoder's layers.
    """

    def __init__(self, plan: StagePlan | None, depth: int) -> None:
        self.plan, self.depth = plan, depth
        self.seeing = [layer for layer in range(depth) if plan is None or plan.sees(layer)]
        self.right: dict[Trial, list[bool]] = {}
        self.groups: list[str] = []

    def masked(self, layers: Iterable[int]) -> Trial:
        """Returns the trial in which text sees no vision in `layers`."""
        return (MASKED, *(layer for layer in self.seeing if layer in set(layers)))

    def masked_outside(self, enter: int, leave: int) -> Trial:
        """Returns the trial in which text sees vision in [enter, leave) alone."""
        return self.masked([*range(enter), *range(leave, self.depth)])

    def removed_outside(self, enter: int, leave: int) -> Trial:
        """Returns the trial in which visual tokens live in [enter, leave) alone."""
        inside = [layer for layer in self.seeing if enter <= layer < leave]
        if not inside:
            return self.nothing
        return self.whole if inside == self.seeing else (REMOVED, inside[0], inside[-1] + 1)

    @property
    def whole(self) -> Trial:
        """The checkpoint as it is."""
        return (MASKED,)

    @property
    def nothing(self) -> Trial:
        """Vision masked everywhere."""
        return (MASKED, *self.seeing)

    def windows(self, width: int) -> list[tuple[int, Trial]]:
        """Returns (l, vision masked in [l, l + width)) for every l."""
        return [(start, self.masked(range(start, start + width))) for start in range(self.depth - width + 1)]

    def sweep(self, width: int) -> list[Trial]:
        """Returns every trial of the knock-outs once: before, from and within layers, and removed before layers."""
        trials = [self.whole, self.nothing]
        for layer in range(self.depth + 1):
            trials += [self.masked_outside(layer, self.depth), self.masked_outside(0, layer)]
            trials.append(self.removed_outside(layer, self.depth))
        return list(dict.fromkeys(trials + [trial for _, trial in self.windows(width)]))

    def schedule(self, trial: Trial) -> Schedule:
        """Returns the schedule that a trial runs under."""
        if trial == self.whole:
            return plan_schedule(self.plan)
        if trial[0] == MASKED:
            return knocked_out(self.plan, self._layers(trial))
        plan = narrowed(self.plan, *trial[1:])
        return plan_schedule(plan)

    def _layers(self, trial: Trial) -> Sequence[int]:
        """Returns the layers in which a trial masks vision; all of them where none sees any."""
        return range(self.depth) if trial == self.nothing else trial[1:]

    def run(self, model: Any, batch: Batch, trials: Sequence[Trial], on_trial: Callable[[], object]) -> None:
        """Notes what each trial answers right in one more batch; calls `on_trial` after each."""
        masked = [trial for trial in trials if trial[0] == MASKED]
        is_shared = len(masked) > 2 and Prefix.can_share(model, batch, self.plan)  # a prefix costs about two trials
        prefix = Prefix(model, batch, self.plan) if is_shared else None
        for trial in trials:
            if prefix is not None and trial[0] == MASKED:
                hidden = prefix.predicting(self._layers(trial))
            else:
                hidden = batch.predicting(model, self.schedule(trial))
            self.right.setdefault(trial, []).extend(answered(model, batch, hidden))
            on_trial()

    def lost(self, trial: Trial) -> Numbers:
        """Returns (samples,), the points that each sample loses in a trial that was run over all of them."""
        whole, right = (np.asarray(self.right[one], dtype=np.float64) for one in (self.whole, trial))
        return 100.0 * (whole - right)

    def result(self, trial: Trial, places: Sequence[int] | None = None) -> Result:
        """Returns the score of a trial that was run over all samples; with `places`, over these of them."""
        places = range(len(self.groups)) if places is None else places
        right = 100.0 * np.asarray(self.right[trial], dtype=np.float64)[places]
        lost, groups = self.lost(trial)[places], [self.groups[place] for place in places]
        least = 100.0 / len(right)
        score_error = standard_error(right.tolist(), groups) or 0.0
        loss_error = standard_error(lost.tolist(), groups) or 0.0
        return Result(float(right.mean()), score_error, float(lost.mean()), max(loss_error, least))


@dataclass(frozen=True)
class Proposal:
    """The window of layers in which a model needs vision.

    Attributes:
        enter: first layer.
        exit: first layer after it.
        first: the window that masking each side alone allows, before both were masked together.
        crossed: `first` is empty: either side alone can do without the middle.
    """

    enter: int
    exit: int
    first: tuple[int, int]
    crossed: bool

    @property
    def is_widened(self) -> bool:
        """Whether both sides masked together lost more than the tolerance."""
        return not self.crossed and (self.enter, self.exit) != self.first


def needs_vision(trials: Trials, tolerance: float) -> bool:
    """Returns whether the score falls without vision by more than the tolerance, and than twice its error."""
    without = trials.result(trials.nothing)
    return without.loss > max(tolerance, 2 * without.loss_error)


def propose(trials: Trials, tolerance: float, measure: Callable[[Sequence[Trial]], None]) -> Proposal:
    """Returns the window of layers outside which masking vision costs at most the tolerance.

    enter is the largest l such that masking [0, l) does, exit the smallest l such that masking [l, L) does. Where
    both masked together cost more, the window grows by one layer at the side where that loses less, until they do
    not. Where the two cross, the narrowest window that holds and begins at enter, or ends at exit.

    Args:
        trials: after the sweep.
        tolerance: points of score.
        measure: runs further trials over all samples.
    """

    def holds(enter: int, leave: int) -> bool:
        return result_of(enter, leave).costs_at_most(tolerance)

    def result_of(enter: int, leave: int) -> Result:
        trial = trials.masked_outside(enter, leave)
        if trial not in trials.right:
            measure([trial])
        return trials.result(trial)

    depth = trials.depth
    enter = max((layer for layer in range(1, depth + 1) if holds(layer, depth)), default=0)
    leave = min((layer for layer in range(depth) if holds(0, layer)), default=depth)
    first = (enter, leave)
    if enter >= leave:
        late = (enter, next((end for end in range(enter + 1, depth) if holds(enter, end)), depth))
        early = (next((start for start in range(leave - 1, 0, -1) if holds(start, leave)), 0), leave)
        enter, leave = min(late, early, key=lambda window: (window[1] - window[0], result_of(*window).loss))
        return Proposal(enter, leave, first, crossed=True)
    while not holds(enter, leave) and (enter, leave) != (0, depth):
        wider = [(max(enter - 1, 0), leave), (enter, min(leave + 1, depth))]
        same = trials.masked_outside(enter, leave)  # a layer that the checkpoint's plan shows no vision adds nothing
        wider = [window for window in wider if trials.masked_outside(*window) != same]
        enter, leave = min(wider, key=lambda window: result_of(*window).loss)
    return Proposal(enter, leave, first, crossed=False)


@dataclass(frozen=True)
class Intervals:
    """Where resampling whole images puts each side of the window, by itself: the middle 95 % of the draws."""

    enter: tuple[int, int]
    exit: tuple[int, int]


def side_intervals(trials: Trials, tolerance: float) -> Intervals:
    """Returns the 95 % intervals of enter and exit, each by the rule of `propose` for its side alone.

    The bootstrap draws images with replacement and decides anew, with loss and standard error of the draw, what may go.
    """
    depth = trials.depth
    before = [trials.masked_outside(layer, depth) for layer in range(1, depth + 1)]
    after = [trials.masked_outside(0, layer) for layer in range(depth)]
    names: dict[str, int] = {}
    cluster = [names.setdefault(group, len(names)) for group in trials.groups]
    lost = np.stack([trials.lost(trial) for trial in before + after], axis=1)
    sums, sizes = np.zeros((len(names), lost.shape[1])), np.zeros(len(names))
    np.add.at(sums, cluster, lost)
    np.add.at(sizes, cluster, 1.0)
    drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    number = (drawn @ sizes)[:, None]
    mean = drawn @ sums / number
    spread = drawn @ sums**2 - 2 * mean * (drawn @ (sums * sizes[:, None])) + mean**2 * (drawn @ sizes**2)[:, None]
    error = np.sqrt(len(names) / (len(names) - 1) * spread.clip(min=0)) / number
    may_go = mean + np.maximum(error, 100.0 / number) <= tolerance
    enter = (may_go[:, :depth] * np.arange(1, depth + 1)).max(axis=1)
    leave = np.where(may_go[:, depth:], np.arange(depth), depth).min(axis=1)
    ends = [np.quantile(side, [0.025, 0.975], method="inverted_cdf").astype(int).tolist() for side in (enter, leave)]
    return Intervals(*(tuple(pair) for pair in ends))


@dataclass
class Analysis:
    """One checkpoint's analysis over one list of samples.

    Attributes:
        model: a FusedLlavaForConditionalGeneration; its schedule is left alone.
        batcher: makes its batches.
        samples: at least two, about different images.
        batch: samples of one forward pass.
        plan: the checkpoint's; None is dense.
        window: layers of the sliding window.
    """

    model: Any
    batcher: ProbeBatcher
    samples: Sequence[Sample]
    batch: int
    plan: StagePlan | None
    window: int
    trials: Trials = field(init=False)
    measurements: LayerMeasurements = field(init=False)
    firings: list[Firing] = field(init=False, default_factory=list)
    text_tokens: list[int] = field(init=False, default_factory=list)
    visual_tokens: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.trials = Trials(self.plan, self.model.config.text_config.num_hidden_layers)
        self.trials.groups = [sample.group for sample in self.samples]
        self.measurements = LayerMeasurements(self.model, self.plan)

    @torch.no_grad()
    def run(self) -> None:
        """Runs the knock-outs and every other measurement over all samples."""
        sweep = self.trials.sweep(self.window)
        total = math.ceil(len(self.samples) / self.batch) * (len(sweep) + 2)
        with tqdm(total=total, unit="pass", desc="layers") as bar:
            for _, batch in self.batcher.batches(self.samples, self.batch):
                self.trials.run(self.model, batch, sweep, bar.update)
                self.measurements.add(batch)
                self.firings += firings(self.model, batch, self.plan)
                self.text_tokens += batch.text_tokens
                self.visual_tokens += batch.visual.sum(dim=1).tolist()
                bar.update(2)

    @torch.no_grad()
    def measure(self, further: Sequence[Trial]) -> None:
        """Runs further trials over all samples."""
        missing = [trial for trial in further if trial not in self.trials.right]
        if not missing:
            return
        total = math.ceil(len(self.samples) / self.batch) * len(missing)
        with tqdm(total=total, unit="pass", desc="window", leave=False) as bar:
            for _, batch in self.batcher.batches(self.samples, self.batch):
                self.trials.run(self.model, batch, missing, bar.update)
