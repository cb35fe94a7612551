"""SparseVLM v1.5: the tokens that the question's most visual words attend to stay, some of the others are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .live_tokens import LiveTokens, Selection
from .precision import full_precision
from .schedule_base import (
    ScorePruner,
    View,
    are_ascending,
    at_least_one,
    is_int,
    keep_highest,
    mask_of,
    published_setting,
)

WHOLE = 576  # visual tokens of the image that `tokens` is published for
RECYCLED = 0.3  # of the tokens that go, the ratio that is merged
PER_CLUSTER = 10  # recycled tokens that become one


@dataclass(frozen=True)
class SparseVLM(ScorePruner):
    """At each of `layers` all but the best visual tokens go, and the better ones of those are merged into a few.

    - Raters, chosen once: text tokens behind the image whose mean attention of the visual tokens is above average
      (softmax over the text of projected feature times text embedding, neither scaled nor normalised).
    - Score of a token: the attention that the raters pay it in the layer before, mean over them and over heads.
    - Of N visual tokens the round(N `tokens` / 576) best stay, at most all but one. Of n that go, the
      int(0.3 n) + 1 best, m, form int(m / 10) + 1 clusters by density peaks; each becomes its mean.

    Source: arXiv 2410.04417 and github.com/Gumpest/SparseVLMs, tag v1.5, at b9619e6 (defaults for 64 tokens; 128:
    303, 110, 36; 192: 300, 200, 110; its layers 2, 6, 15 are those before). The paper's counts follow the rank of the
    attention and it adds up clusters; the v1.5 code has this table and means. Differences: a merged token stands at its
    cluster's centre and keeps that id; the code puts it behind the others and renumbers (`renumber`: in place). No
    noise on densities. With several images, raters stand behind the last one.
    """

    layers: Sequence[int] = published_setting((3, 7, 16))  # the first that run without the others, from 1 on
    tokens: Sequence[int] = (66, 30, 17)  # how many stay from there on, of 576, not growing
    renumber: bool = False  # position ids count the live tokens of each layer; False: every token keeps its id

    def __post_init__(self) -> None:
        layers, tokens = self.layers, self.tokens
        self.require("layers", are_ascending(layers, 1), "layer numbers (int >= 1), ascending")
        good = isinstance(tokens, list | tuple) and len(tokens) == len(layers) and all(is_int(one, 1) for one in tokens)
        good = good and list(tokens) == sorted(tokens, reverse=True)
        self.require("tokens", good, "a count (int >= 1) of 576 tokens for each of layers, not growing")
        self.require("renumber", isinstance(self.renumber, bool), "true or false")
        cuts = tuple((layer, count / WHOLE) for layer, count in zip(layers, tokens, strict=True))
        self.derive(layers=tuple(layers), tokens=tuple(tokens), cuts=cuts, renumbers=self.renumber)

    def score(self, view: View) -> Tensor:
        """Returns the attention of the raters in the layer before."""
        return view.attention(raters(view))

    def live(self, view: View) -> Selection:
        """Returns the tokens that stay and the centres of the clusters, whose states become the merged tokens'."""
        ratio = self.due(view)
        if ratio is None:
            return view.live
        score, live = self.score(view), mask_of(view.live)
        held = live.sum(dim=1).tolist()
        wanted = [at_least_one(number * ratio) for number in view.visual_counts]
        counts = [max(0, min(count, number - 1)) for count, number in zip(wanted, held, strict=True)]
        kept = mask_of(keep_highest(score, view.live, counts))
        gone = [number - count for number, count in zip(held, counts, strict=True)]
        recycled = [int(RECYCLED * number) + 1 if number else 0 for number in gone]
        chosen = LiveTokens.of_mask(mask_of(keep_highest(score, Selection(live & ~kept), recycled)))
        states = view.hidden_states()
        clusters = torch.tensor([number // PER_CLUSTER + 1 for number in recycled], device=live.device)
        centre, merged = merge(chosen.take(states).float(), chosen.valid, clusters)
        is_centre = chosen.put(centre[..., None], live.shape[1])[..., 0] & live & ~kept
        merged = chosen.put(merged.to(states.dtype), live.shape[1])
        view.state.merged = torch.where(is_centre[..., None], merged, states)
        return Selection(kept | is_centre)

    def visual_states(self, view: View) -> Tensor | None:
        """Returns the merged tokens' states, once."""
        merged, view.state.merged = view.state.merged, None
        return merged


def raters(view: View) -> Tensor:
    """Returns (B, S) bool: the text tokens that rate; the whole prompt where no text stands behind the image."""
    visual, prompt = view.visual_mask, view.prompt()
    behind = prompt & (visual.flip(1).cumsum(dim=1).flip(1) == 0)
    text = behind.where(behind.any(dim=1, keepdim=True), prompt)
    embeddings = view.embeddings.float()
    with full_precision(embeddings):
        likeness = embeddings @ embeddings.transpose(1, 2)  # (B, visual, text)
    rated = likeness.masked_fill(~text[:, None], torch.finfo(torch.float32).min).softmax(dim=-1)
    mean = (rated * visual[..., None]).sum(dim=1) / visual.sum(dim=1, keepdim=True).clamp(min=1)
    above = text & (mean * text.sum(dim=1, keepdim=True) > 1)
    return above.where(above.any(dim=1, keepdim=True), text)


def merge(tokens: Tensor, valid: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which of `valid` tokens (B, M) are centres of `clusters` (B,), and there the cluster's mean (B, M, D).

    Clusters by the density peaks of k nearest neighbours; k is the number of clusters.
    """
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[-1] ** 0.5
    distance = distance.masked_fill(~(valid[:, None] & valid[:, :, None]), torch.inf)
    near = distance.sort(dim=2).values.square().cumsum(dim=2)
    at = (clusters - 1)[:, None, None].expand(-1, near.shape[1], 1)
    density = (-near.gather(2, at)[..., 0] / clusters[:, None]).exp().masked_fill(~valid, 0.0)
    denser = (density[:, None] > density[:, :, None]) & valid[:, None]
    farthest = distance.masked_fill(distance.isinf(), 0.0).amax(dim=(1, 2))[:, None]
    to_denser = distance.masked_fill(~denser, torch.inf).amin(dim=2)
    peak = torch.where(to_denser.isinf(), farthest, to_denser) * density
    order = peak.masked_fill(~valid, -1.0).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(order.shape[1], device=order.device) < clusters[:, None]
    centre = torch.zeros_like(valid).scatter(1, order, first) & valid
    nearest = distance.masked_fill(~centre[:, None], torch.inf).argmin(dim=2)  # (B, M)
    nearest = nearest.where(~centre, torch.arange(order.shape[1], device=order.device))  # a centre joins itself
    member = torch.nn.functional.one_hot(nearest, order.shape[1]).to(tokens.dtype) * valid[..., None]
    with full_precision(tokens):
        return centre, member.transpose(1, 2) @ tokens / member.sum(dim=1)[..., None].clamp(min=1)
