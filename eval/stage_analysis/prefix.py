"""A batch run once up to the end of its images, so that each knock-out runs the text behind them alone.

Masked vision changes text behind an image and nothing before it: visual tokens and the text before them see the same
in every knock-out. So their keys and values are made once, and a knock-out hides a layer's visual keys by going on
from a cache that does not have them. Letters: B batch, S sequence, P prefix, T text behind the images.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from eval.stage_analysis.probes import knocked_out
from eval.stage_analysis.samples import Batch
from models.attention import unwrap, uses_mrope
from models.cache import StagedLayer
from models.decoder import run_decoder
from models.schedules import Schedule, plan_schedule
from models.stage_plan import StagePlan

# a mark behind the image is a part of it: Molmo2's image tokens see theirs, Ovis2 replaces its embedding
MARK_IS_IMAGE = ("molmo2", "ovis2")


class Prefix:
    """One batch up to the last visual token of each sample, with vision and without.

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
