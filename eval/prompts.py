"""Questions as inputs of generate(), asked in the format that a checkpoint was trained with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from data.chat import ChatFormat
from data.dataset import pad_and_concat
from data.processor import EncodedImages, VisionProcessor
from data.rows import IMAGE_PLACEHOLDER, Turn
from eval.arguments import UsageError
from eval.text_tower import TextTower, placed
from models.schedules import Schedule

_MARKS: Final = 2  # kinds of tokens around the visual tokens of an image that lie in one square


@dataclass(frozen=True)
class VqaPrompt:
    """One question: what a user would type, without image marks, after the RGB images that it is about, if any."""

    text: str
    images: Sequence[Image.Image] = ()


class LengthError(UsageError):
    """A prompt does not fit into the decoder's positions; one line."""


class PromptEncoder:
    """Makes batches of questions for the checkpoint that `processor` belongs to.

    `chat_format` and `aspect` are as in a recipe's data.format and data.image_aspect, `positions` as many as the
    decoder has (None: no limit). `text_tower` says how relevant visual tokens are, to schedules that read it.

    Raises:
        TokenizerError: the tokenizer does not go with the format.
        ProcessorError: the processor cannot take images.
    """

    text_tower: TextTower | None = None

    def __init__(self, processor: Any, *, chat_format: str, aspect: str, positions: int | None = None) -> None:
        self.processor, self.tokenizer, self.positions = processor, processor.tokenizer, positions
        self.vision = VisionProcessor(processor, aspect=aspect)
        self.chat = ChatFormat(chat_format, processor.tokenizer, self.vision.text)

    def batch(
        self, prompts: Sequence[VqaPrompt], schedule: Schedule | None = None, *, new_tokens: int = 0
    ) -> dict[str, Tensor]:
        """Returns what generate() takes: input_ids and attention_mask (B, S), padded on the left, and inputs of images.

        Without any image there are none of the latter. With a text tower there is relevance (B, S), unless `schedule`
        does not read it.

        Raises:
            LengthError: a prompt, with `new_tokens` behind it, needs more positions than the decoder has.
        """
        encoded = [self.vision.encode(prompt.images) if prompt.images else None for prompt in prompts]
        ids = [self.expand(self._ids(prompt), one) for prompt, one in zip(prompts, encoded, strict=True)]
        self.check_length(max(map(len, ids)), new_tokens)
        inputs = {**self.padded(ids), **image_inputs(encoded)}
        is_read = schedule is None or schedule.reads_relevance
        if self.text_tower is not None and is_read and "pixel_values" in inputs:
            shown = inputs["pixel_values"].split([len(prompt.images) for prompt in prompts])
            rows = [
                self.text_tower.relevance(prompt.text.replace(IMAGE_PLACEHOLDER, "").strip(), images)
                for prompt, images in zip(prompts, shown, strict=True)
            ]
            inputs["relevance"] = placed(rows, inputs["input_ids"], self.vision.image_token_id)
        return inputs

    def check_length(self, prompt: int, new: int = 0) -> None:
        """Raises LengthError where the tokens of a prompt and its answer are more than the decoder's positions."""
        if self.positions is not None and prompt + new > self.positions:
            answer = f" and up to {new:,} of its answer" if new else ""
            raise LengthError(
                f"prompt: got {prompt:,} tokens{answer}, expected at most {self.positions:,}, the decoder's positions"
            )

    def expand(self, ids: Sequence[int], images: EncodedImages | None) -> list[int]:
        """Returns ids with each image token replaced by what the processor writes for its image."""
        spans = iter(images.spans if images is not None else ())
        return [new for one in ids for new in (next(spans) if one == self.vision.image_token_id else [one])]

    def padded(self, prompts: Sequence[list[int]]) -> dict[str, Tensor]:
        """Returns prompts padded on the left, where generation does not look, and the family's inputs of types."""
        pad = self.tokenizer.pad_token_id
        inputs = pad_left(prompts, self.tokenizer.eos_token_id if pad is None else pad)
        types = self.vision.type_ids(inputs["input_ids"])
        return {**inputs, **{name: value * inputs["attention_mask"] for name, value in types.items()}}

    def grid(self, image: Image.Image, inputs: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """Returns rows and columns of the visual tokens of a question's first image, given the `batch` of the question.

        None where they lie in no one grid: in tiles, or with an overview beside them.
        """
        images = self.processor.image_processor
        if "image_grid_thw" in inputs:
            _, rows, columns = inputs["image_grid_thw"][0].tolist()
            return rows // images.merge_size, columns // images.merge_size
        if isinstance(self.processor, LlavaProcessor):
            patch = self.processor.patch_size
            height, width = inputs["pixel_values"].shape[-2:]
            return height // patch, width // patch
        [span] = self.vision.encode([image]).spans
        count = span.count(max(set(span), key=span.count))
        rows = math.isqrt(count)
        is_square = len(set(span)) <= _MARKS + 1 and rows * rows == count
        return (rows, rows) if is_square and len(inputs["pixel_values"]) == 1 else None

    def patches(self, live: Tensor, visual: Tensor, grid: tuple[int, int], image: Image.Image) -> Tensor:
        """Returns (layers, rows * columns): which visual tokens of a sample's first image are live.

        `live` (layers, S) are the live visual tokens of the sample in each layer, `visual` (S,) its visual tokens.
        """
        size, extra = grid[0] * grid[1], 0
        if isinstance(self.processor, LlavaProcessor):  # a class token, where the tower's is kept, stands in front
            extra = self.vision.count(*image.size) - size
        return live[:, visual][:, extra : extra + size].cpu()

    def picture(self, image: Image.Image, inputs: Mapping[str, Tensor]) -> Image.Image:
        """Returns a question's first image as the model sees it: cut where LLaVA's processor cuts it."""
        if not isinstance(self.processor, LlavaProcessor):
            return image
        images = self.processor.image_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
        shown = (inputs["pixel_values"][0].float().cpu() * std + mean).clamp(0, 1)
        return Image.fromarray((shown * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())

    def decode(self, new_tokens: Tensor) -> list[str]:
        """Returns the text of generated tokens (B, T), without special tokens and white space around it."""
        return [text.strip() for text in self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]

    def _ids(self, prompt: VqaPrompt) -> list[int]:
        """Returns the ids of one question, with one image token an image."""
        marks = f"{IMAGE_PLACEHOLDER}\n" * len(prompt.images)
        return self.chat.prompt([Turn("user", marks + prompt.text.replace(IMAGE_PLACEHOLDER, ""))])


def is_same_answer(told: str, truth: str) -> bool:
    """Returns whether an answer is the known one, but for case and a full stop at its end."""
    return told.strip().lower().rstrip(".") == truth.strip().lower().rstrip(".")


def image_inputs(encoded: Sequence[EncodedImages | None]) -> dict[str, Tensor]:
    """Returns the inputs of the images of a batch, joined as in training."""
    given = [one.inputs for one in encoded if one is not None]
    return {name: pad_and_concat([inputs[name] for inputs in given]) for name in (given[0] if given else ())}


def pad_left(prompts: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    """Returns input_ids and attention_mask (B, S), padded on the left, where generation does not look."""
    size = max(map(len, prompts))
    ids = torch.tensor([[pad] * (size - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (size - len(ids)) + [1] * len(ids) for ids in prompts])
    return {"input_ids": ids, "attention_mask": mask}
