"""Questions as inputs of generate(), asked in the format that a checkpoint was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.chat import ChatFormat
from data.images import pixel_values, visual_tokens
from data.rows import IMAGE_MARK, Turn
from eval.text_tower import TextTower, placed


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        text: what a user would type; an image mark in it is left out.
        images: RGB images that it is about, in order; they stand before the text. None for a question without one.
    """

    text: str
    images: Sequence[Image.Image] = ()


class Prompter:
    """Makes batches of questions for one checkpoint.

    Args:
        processor: the checkpoint's LlavaProcessor.
        chat_format: `vicuna_v1` or `chat_template`, as in a recipe's data.format.
        aspect: `pad` or `processor`, as in a recipe's data.image_aspect.

    Attributes:
        visual_tokens: of one image.
        text_tower: what says how relevant visual tokens are, which batches then carry; None: nothing.

    Raises:
        TokenizerError: the tokenizer does not go with the format.
    """

    text_tower: TextTower | None = None

    def __init__(self, processor: Any, *, chat_format: str, aspect: str) -> None:
        self.processor, self.aspect = processor, aspect
        self.tokenizer = processor.tokenizer
        self._chat = ChatFormat(chat_format, processor.tokenizer)
        self.visual_tokens = visual_tokens(processor)

    def batch(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """Returns input_ids and attention_mask (B, S), padded on the left, and pixel_values (images, 3, h, w).

        Without any image there is no pixel_values. With a text tower there is relevance (B, S).
        """
        inputs = pad_left([self._ids(question) for question in asked], self._pad)
        pixels = [self.pixels(image) for question in asked for image in question.images]
        if not pixels:
            return inputs
        inputs["pixel_values"] = torch.cat(pixels)
        if self.text_tower is not None:
            shown = inputs["pixel_values"].split([len(question.images) for question in asked])
            rows = [
                self.text_tower.relevance(question.text.replace(IMAGE_MARK, "").strip(), images)
                for question, images in zip(asked, shown, strict=True)
            ]
            inputs["relevance"] = placed(rows, inputs["input_ids"], self._chat.image_token_id)
        return inputs

    def pixels(self, image: Image.Image) -> Tensor:
        """Returns (1, 3, h, w): an image as the tower gets it."""
        return pixel_values(image, self.processor.image_processor, aspect=self.aspect)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of one image, in which its visual tokens lie."""
        crop = self.processor.image_processor.crop_size
        return crop["height"] // self.processor.patch_size, crop["width"] // self.processor.patch_size

    def patches(self, live: Tensor, ids: Tensor) -> Tensor:
        """Returns (layers, rows * columns): which patches of a sample's first image are live.

        Args:
            live: (layers, S) bool, the live visual tokens of the sample in each layer.
            ids: (S,), its input_ids.
        """
        visual = (ids == self._chat.image_token_id).to(live.device)
        rows, columns = self.grid
        first = self.visual_tokens - rows * columns  # a class token, where the tower's is kept, stands in front
        return live[:, visual][:, first : self.visual_tokens].cpu()

    def picture(self, pixels: Tensor) -> Image.Image:
        """Returns pixel values (3, h, w) as the image that they show: what the model sees, cut as it is cut."""
        processor = self.processor.image_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        shown = (pixels.float().cpu() * std + mean).clamp(0, 1)
        return Image.fromarray((shown * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())

    def decode(self, new_tokens: Tensor) -> list[str]:
        """Returns the text of generated tokens (B, T), without special tokens and white space around it."""
        return [text.strip() for text in self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _ids(self, question: Asked) -> list[int]:
        """Returns the ids of one question, each image token repeated for its visual tokens."""
        marks = f"{IMAGE_MARK}\n" * len(question.images)
        ids = self._chat.prompt([Turn("user", marks + question.text.replace(IMAGE_MARK, ""))])
        counts = [self.visual_tokens if token == self._chat.image_token_id else 1 for token in ids]
        return [token for token, count in zip(ids, counts, strict=True) for _ in range(count)]


def pad_left(prompts: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    """Returns input_ids and attention_mask (B, S), padded on the left, where generation does not look."""
    size = max(map(len, prompts))
    ids = torch.tensor([[pad] * (size - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (size - len(ids)) + [1] * len(ids) for ids in prompts])
    return {"input_ids": ids, "attention_mask": mask}
