"""One checkpoint's stage analysis: every measurement over the same samples, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from eval.stage_analysis.probes import Firing, LayerMeasurements, firings
from eval.stage_analysis.samples import ProbeBatcher, Sample
from eval.stage_analysis.search import Trial, Trials
from models.stage_plan import StagePlan


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
