"""How much each patch of an image has to do with a question, by CLIP, for schedules that read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from eval.arguments import UsageError, misfit
from models.auto import CONFIG_FAULTS

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."  # LLaVA's instruction, no part of the question


class TextTower:
    """CLIP's text tower beside its vision tower; raises UsageError where the folder or hub name is no CLIP."""

    def __init__(self, name: str) -> None:
        try:
            kind = CLIPConfig.get_config_dict(name)[0].get("model_type")  # transformers would build one of any fields
            if kind != "clip":
                raise ValueError(f"model_type {kind}")
            clip, report = CLIPModel.from_pretrained(name, output_loading_info=True)
            if found := misfit(report):
                raise ValueError(found)
            self._clip, self._tokenizer = clip.eval(), AutoTokenizer.from_pretrained(name)
        except (*CONFIG_FAULTS, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"--text-tower: got {name} ({reason}), expected the vision tower's CLIP checkpoint"
            ) from None

    def to(self, device: torch.device) -> TextTower:
        """Moves the towers; returns itself."""
        self._clip.to(device)
        return self

    @torch.inference_mode()
    def relevance(self, question: str, pixels: Tensor) -> Tensor:
        """Returns (I, P) float32, the cosine of each patch of images (I, 3, h, w) and the question.

        A question beyond the tower's length is cut into several, whose cosines are averaged.

        Source: CDPruner, github.com/Theia-4869/CDPruner at 9541616.
        """
        if len(pixels) == 0:
            return torch.zeros(0)
        clip, vision = self._clip, self._clip.vision_model
        states = vision(pixels.to(clip.device, clip.dtype), output_hidden_states=True).hidden_states[-2][:, 1:]
        patches = normalize(clip.visual_projection(vision.post_layernorm(states)).float(), dim=-1)
        ids, mask = self._parts(question)
        text = clip.get_text_features(input_ids=ids.to(clip.device), attention_mask=mask.to(clip.device))
        text = getattr(text, "pooler_output", text)
        return (patches @ normalize(text.float(), dim=-1).T).mean(dim=-1)

    def _parts(self, question: str) -> tuple[Tensor, Tensor]:
        """Returns ids and mask (M, n), n the tower's length: the question, filled up with 0 where it is long."""
        ids = self._tokenizer(question.removesuffix(SHORT_ANSWER), truncation=False)["input_ids"]
        length = self._clip.config.text_config.max_position_embeddings
        size = len(ids) if len(ids) <= length else -(-len(ids) // length) * length
        padded = torch.tensor(ids + [0] * (size - len(ids))).view(-1, min(size, length))
        return padded, (torch.arange(size) < len(ids)).long().view_as(padded)


def placed(rows: Sequence[Tensor], ids: Tensor, image_token: int) -> Tensor:
    """Returns (B, S): the values (I, P) of each sample's images at the places of its visual tokens, 0 elsewhere.

    Raises:
        UsageError: the tower has another number of patches than an image has visual tokens.
    """
    full = torch.zeros(ids.shape)
    for row, is_visual, values in zip(full, ids == image_token, rows, strict=True):
        if int(is_visual.sum()) != values.numel():
            raise UsageError(
                f"--text-tower: got {values.numel()} patches for {int(is_visual.sum())} visual tokens, expected the "
                "vision tower's CLIP checkpoint, one patch a visual token"
            )
        row[is_visual] = values.flatten().float().cpu()
    return full
