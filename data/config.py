"""The data section of a recipe."""

from __future__ import annotations

import itertools
import os
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Format = Literal["vicuna_v1", "chat_template", "plain"]
_MOST_WEIGHT = 1e9  # more than any mixture needs, and small enough for the sum of all
_FIGURES = ["image", "text"]  # loss_image and loss_text are a log's figures of the modalities
_SECTION = ConfigDict(extra="forbid", strict=True, frozen=True)


class Source(BaseModel):
    """One entry of `data.files`.

    Attributes:
        path: file, folder, glob, `hf://org/name/subset:split` or a built-in set; `~` and variables are expanded, and
            a relative path starts from the working directory.
        weight: share of an epoch's samples, relative to the other sources' weights; either all sources have one or none
            does. Without weights an epoch has every row once.
        limit: reads only this many rows, from the first on.
        images: folder that the image paths of this source start from; without it, `data.images`.
        format: format of this source; without it, `data.format`.
    """

    model_config = _SECTION

    path: str = Field(min_length=1)
    weight: float | None = Field(default=None, gt=0, le=_MOST_WEIGHT)
    limit: int | None = Field(default=None, gt=0)
    images: str | None = Field(default=None, min_length=1)
    format: Format | None = None


def _read_source(entry: Any) -> Any:
    if isinstance(entry, str) and entry:
        return entry
    if isinstance(entry, dict):
        try:
            return Source.model_validate(entry)
        except ValidationError as error:
            raise ValueError(": ".join(first_fault(error, Source))) from None
    known = ", ".join(Source.model_fields)
    raise ValueError(f"got {shorten(repr(entry))}, expected a path or a mapping of {known}")


def first_fault(error: ValidationError, schema: type[BaseModel]) -> tuple[str, str]:
    """Returns the dotted key of the first fault that pydantic found, and `got X, expected Y`."""
    fault = error.errors()[0]
    where, found = ".".join(map(str, fault["loc"])), shorten(repr(fault["input"]))
    if fault["type"] == "extra_forbidden":
        return where, f"unknown key, expected {', '.join(schema.model_fields)}"
    if fault["type"] == "missing":
        return where, "missing key"
    if fault["type"] == "value_error":
        return where, str(fault["ctx"]["error"])
    expected = re.sub(r"^.*? should (be |have )?| after validation.*| or instance of .*", "", fault["msg"])
    return where, f"got {found}, expected {expected}"


Files = list[Annotated[str | Source, BeforeValidator(_read_source)]]


class DataConfig(BaseModel):
    """The data of a training.

    Attributes:
        files: sources of conversations: each a path (see `Source`) or a mapping of path, weight, limit, images, format.
        images: folder that the rows' image paths start from; a built-in set ignores it.
        format: how turns become text: `vicuna_v1` (LLaVA-1.5), `chat_template` (the tokenizer's) or `plain`
            (image and caption, for alignment). If sources use several, this one formats the prompts of evaluation.
        max_length: maximum tokens of a sample, visual tokens included; a longer one is cut after an answer.
        long_answers: a first answer that ends after `max_length` is a fault (`refuse`), or is cut (`cut`, as in LLaVA).
        image_aspect: `pad` to a square first, as LLaVA-1.5 does, or the image `processor`'s default.
        processor: settings of the family's image processor, such as {max_pixels: 1003520}.
        chat_template: file with a chat template in place of the processor's.
        exif: `apply` turns photos upright, as viewers and servers do; `ignore` leaves them as stored, as LLaVA does.
        follow_links: links inside the image folder may lead out of it.
        decode: decodes every image in the check, which also finds damage in the middle of a file.
        streaming: reads rows while training, without a first pass over them and without a copy on the disk.
        max_bad_rows: how many faulty rows may be skipped; they are counted and listed. 0 allows none.
        group_by_length: forms batches of samples of similar length, all with images or all without.
        workers: processes of each rank that check rows and load images.
        expected_rows: published number of rows, for estimates without the files.
        expected_text_tokens: published mean number of text tokens of a sample.
        expected_visual_tokens: published mean number of visual tokens of an image; LLaVA's follows from its config.
    """

    model_config = _SECTION

    files: Files = Field(min_length=1)
    images: str | None = Field(default=None, min_length=1)
    format: Format
    max_length: int = Field(default=2048, gt=0)
    long_answers: Literal["refuse", "cut"] = "refuse"
    image_aspect: Literal["pad", "processor"] = "pad"
    processor: dict[str, Any] = Field(default_factory=dict)
    chat_template: str | None = Field(default=None, min_length=1)
    exif: Literal["apply", "ignore"] = "apply"
    follow_links: bool = False
    decode: bool = False
    streaming: bool = False
    max_bad_rows: int = Field(default=0, ge=0)
    group_by_length: bool = True
    workers: int = Field(default=4, ge=0)
    expected_rows: int | None = Field(default=None, gt=0)
    expected_text_tokens: int | None = Field(default=None, gt=0)
    expected_visual_tokens: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("files: got a weight for some sources, expected one for all of them or for none")
        if len(self._prompt_formats) > 1 and self.format not in self._prompt_formats:
            found = " and ".join(sorted(self._prompt_formats))
            raise ValueError(
                f"format: got {self.format}, but the sources have {found}, expected the one of them that formats the "
                "prompts of evaluation"
            )
        return self

    @property
    def sources(self) -> list[Source]:
        """The entries of `files`, with the section's defaults filled in."""
        entries = [Source(path=entry) if isinstance(entry, str) else entry for entry in self.files]
        return [
            source.model_copy(update={"images": source.images or self.images, "format": source.format or self.format})
            for source in entries
        ]

    @property
    def prompt_format(self) -> Format:
        """The format of prompts for the trained model: `format`, or the sources' own if none of them uses `format`.

        It is `plain` if all sources are captions.
        """
        return self.format if self.format in self._prompt_formats else min(self._prompt_formats, default="plain")

    @property
    def _prompt_formats(self) -> set[Format]:
        return {source.format or self.format for source in self.sources} - {"plain"}

    @property
    def names(self) -> list[str]:
        """A short name of each source, for logs: `loss_<name>`; `image` and `text` mean modalities there."""
        names: list[str] = []
        for source in self.sources:
            plain = [part for part in source.path.rstrip("/").split("/") if not set(part) & set("*?[")]
            name = plain[-1].partition(".")[0] if plain else source.path
            others = (f"{name}_{number}" for number in itertools.count(1))
            names.append(next(one for one in itertools.chain([name], others) if one not in [*_FIGURES, *names]))
        return names


def expand(path: str) -> str:
    """Returns a path with `~` and environment variables replaced."""
    return os.path.expanduser(os.path.expandvars(path))


def shorten(text: str, limit: int = 80) -> str:
    """Returns one line of at most `limit` characters, for messages, so that no payload is printed whole."""
    line = " ".join(text[: 4 * limit].split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= limit and len(text) <= 4 * limit else f"{line[: limit - 3]}..."
