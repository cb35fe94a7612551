"""What a recipe says about its data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DataConfig(BaseModel):
    """The data of a training.

    Attributes:
        files: LLaVA JSON or JSONL files; or a built-in set: `easy_vqa:train`, `open`, `short` or `test`, or
            `scenes:train`, `test` or `compositional`; `scenes` is its training set.
        images: folder that the rows' image paths start from; a built-in set brings its own.
        format: how turns become text: `vicuna_v1` (LLaVA-1.5), `chat_template` (the tokenizer's own) or `plain`
            (image and caption, for alignment).
        max_length: tokens of a sample, visual tokens included; a longer one is cut at a turn border.
        image_aspect: `pad` to a square first, as LLaVA-1.5 does, or the image `processor`'s default.
        max_bad_rows: rows with a fault that may be skipped, counted and listed; 0 fails at the first.
        group_by_length: batches of samples of like length, with images or without.
        workers: processes that check rows and then open images, for each rank.
        expected_rows: published number of rows, for estimates where the files are not at hand.
        expected_text_tokens: text tokens of a mean sample, likewise.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    files: list[str] = Field(min_length=1)
    images: str | None = None
    format: Literal["vicuna_v1", "chat_template", "plain"]
    max_length: int = Field(default=2048, gt=0)
    image_aspect: Literal["pad", "processor"] = "pad"
    max_bad_rows: int = Field(default=0, ge=0)
    group_by_length: bool = True
    workers: int = Field(default=4, ge=0)
    expected_rows: int | None = Field(default=None, gt=0)
    expected_text_tokens: int | None = Field(default=None, gt=0)
