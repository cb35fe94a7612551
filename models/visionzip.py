"""VisionZip: the patches that the tower's class token attends to stay, the others are merged into a few."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .image_tokens import ImageTokens
from .live_tokens import NO_VISUAL, Selection
from .precision import full_precision
from .schedule_base import CutState, Schedule, ScheduleError, View, is_int

WHOLE = 576  # patches of the image that the counts are published for


@dataclass(frozen=True)
class VisionZip(Schedule):
    """Before the decoder, two groups of an image's class token and P patches stay; their counts are for 576 patches.

    Each count is scaled and rounded by itself: round(P `dominant` / 576), at least 1, and round(P `contextual` / 576).

    - Dominant: the class token and the patches that it attends to most in the tower layer whose output LLaVA projects,
      summed over heads.
    - Contextual: of the R others every (R // c)-th, c in all. Each other token joins the one whose key (mean over
      heads) is closest by cosine; the contextual token is its own hidden state plus the mean of those that joined.

    Source: arXiv 2412.04467 and github.com/dvlab-research/VisionZip at 3151f6d (defaults for 64 tokens; 128: 108, 20;
    192: 162, 30; `dominant` counts the class token). The paper speaks of averages; the code adds target and mean.
    Differences: a token stands at its patch's place with its position id, and the class token, which LLaVA has no
    place for, at that of the first patch merged away; the code puts it first, contextual ones last, and renumbers
    (`renumber` renumbers, in place). For CLIP towers with one patch a visual token.
    """

    dominant: int = 54  # of 576 patches, the class token counted, at least 1
    contextual: int = 10  # of 576 patches
    renumber: bool = False  # position ids count the live tokens; False: every token keeps its place's id

    reads_tower = True

    def __post_init__(self) -> None:
        self.require("dominant", is_int(self.dominant, 1), "a count of 576 patches (int >= 1)")
        self.require("contextual", is_int(self.contextual, 0), "a count of 576 patches (int >= 0)")
        self.require("renumber", isinstance(self.renumber, bool), "true or false")
        self.derive(renumbers=self.renumber)

    def new_state(self) -> CutState:
        """Returns whether the choice was made."""
        return CutState()

    def live(self, view: View) -> Selection:
        """Returns the places of the dominant and the contextual tokens."""
        if view.state.made or view.live is NO_VISUAL:
            return view.live
        if view.tower is None:
            raise ScheduleError("VisionZip: got embeddings without the tower's states, expected images")
        view.state.made.add(0)
        kept, states = self.zipped(view.tower)
        visual, embeddings = view.visual_mask, view.embeddings
        view.state.merged = embeddings.masked_scatter(visual[..., None], states.to(embeddings.dtype))
        return Selection(torch.zeros_like(visual).masked_scatter(visual, kept))

    def visual_states(self, view: View) -> Tensor | None:
        """Returns the projected tokens, once."""
        merged, view.state.merged = view.state.merged, None
        return merged

    def zipped(self, tower: ImageTokens) -> tuple[Tensor, Tensor]:
        """Returns, at each image's places, which stay (I, V) and the projected tokens there (I, V, D)."""
        images, patches = tower.attention.shape
        free = 0 if tower.has_class_token else 1  # the class token needs a place
        dominant = min(max(1, round(self.dominant * patches / WHOLE)), patches + 1 - free)
        others = patches + 1 - dominant
        contextual = min(round(self.contextual * patches / WHOLE), others - free)
        order = tower.attention.argsort(dim=1, descending=True, stable=True) + 1  # 0 is the class token
        best = order[:, : dominant - 1].sort(dim=1).values
        rest = order[:, dominant - 1 :].sort(dim=1).values  # (I, R)
        step = max(1, others // max(1, contextual))
        is_target = torch.zeros(others, dtype=torch.bool, device=rest.device)
        is_target[: step * contextual : step] = True
        targets, joining = rest[:, is_target], rest[:, ~is_target]
        hidden = tower.hidden
        merged = _rows(hidden, targets)
        if contextual:
            keys = torch.nn.functional.normalize(tower.keys, dim=-1)
            with full_precision(keys):
                nearest = (_rows(keys, joining) @ _rows(keys, targets).transpose(1, 2)).argmax(dim=2)
            member = torch.nn.functional.one_hot(nearest, contextual).to(hidden.dtype)
            joined = member.transpose(1, 2) @ _rows(hidden, joining)
            merged = merged + joined / member.sum(dim=1)[..., None].clamp(min=1)
        tokens = torch.cat([hidden[:, :1], _rows(hidden, best), merged], dim=1)
        first = torch.zeros_like(rest[:, :1]) if tower.has_class_token else joining[:, :1]
        places = torch.cat([first, best, targets], dim=1) - free
        states = tower.project(tokens)
        size = patches + 1 - free
        full = states.new_zeros(images, size, states.shape[-1])
        full = full.scatter(1, places[..., None].expand_as(states), states)
        return torch.zeros(images, size, dtype=torch.bool, device=places.device).scatter(1, places, True), full


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Returns (I, N, W): the rows `index` (I, N) of `tokens` (I, T, W)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
