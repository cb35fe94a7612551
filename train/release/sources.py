"""Where the parts of a released model come from, and what is known of their licences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data import easy_vqa, scenes
from data.sources import HUB, HubSet
from recipes.schema import Recipe

_LLAMA2: Final = "Llama 2 Community License"
_MODELS: Final = (  # pattern of a hub id, what is known
    (r"lmsys/vicuna-.*v1\.5.*", f"{_LLAMA2}: Vicuna v1.5 is a fine-tuned Llama 2"),
    (r"meta-llama/llama-2-.*", _LLAMA2),
    (r"(llava-hf/llava-1\.5|liuhaotian/llava-v1\.5)-.*", f"{_LLAMA2}: LLaVA-1.5 is a fine-tuned Vicuna v1.5"),
    (r"openai/clip-.*", "CLIP's repository, github.com/openai/CLIP, is under the MIT licence; read its model card too"),
)
_DATA: Final = {  # file name: dataset of the hub, what is known
    "llava_v1_5_mix665k.json": (
        "liuhaotian/LLaVA-Instruct-150K",
        "written in part by GPT-4: OpenAI's terms of use, beside the licence on the dataset's card; images under the "
        "terms of COCO, GQA, OCR-VQA, TextVQA and Visual Genome",
    ),
    "blip_laion_cc_sbu_558k.json": (
        "liuhaotian/LLaVA-Pretrain",
        "captions by BLIP on images of LAION, CC-3M and SBU: the terms of each, beside the dataset's card",
    ),
}
_EASY_VQA: Final = "the easy-vqa package, github.com/vzhou842/easy-VQA: MIT licence"
_SCENES: Final = "made by this project's generator: the terms of its code"
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """One part of a model.

    Attributes:
        part: what it is, for people.
        name: hub id, or the last part of a local path: a card names no folder of the machine that trained.
        hub: hub id, or None.
        licence: what is known of its licence.
    """

    part: str
    name: str
    hub: str | None
    licence: str


def model_sources(recipe: Recipe) -> list[Source]:
    """Returns the pretrained models that a run started from; none where all weights started at random."""
    parts = {"checkpoint": "whole model", "language_model": "language model", "vision_tower": "vision tower"}
    given = {words: getattr(recipe.model, key) for key, words in parts.items()}
    return [_model_source(words, place) for words, place in given.items() if place is not None]


def data_sources(recipe: Recipe) -> list[Source]:
    """Returns the data of all phases of a run, each once, the earliest phase first."""
    files = dict.fromkeys(source.path for phase in recipe.phases for source in phase.data.sources)
    return [_data_source(file) for file in files]


def licences(recipe: Recipe, *, code: bool) -> str:
    """Returns LICENSES.md: a note on the licence of each part; `code`: the release holds this project's code."""
    return "\n".join(_licence_lines(recipe, code)) + "\n"


def _licence_lines(recipe: Recipe, code: bool) -> Iterator[str]:
    yield "# Licences of the parts"
    yield ""
    yield "What is known of each part. These notes are no legal advice: read the licences themselves."
    yield ""
    yield "| part | source | licence |"
    yield "| --- | --- | --- |"
    for source in [*model_sources(recipe), *data_sources(recipe)]:
        yield f"| {source.part} | {source.name} | {source.licence} |"
    if not model_sources(recipe):
        yield "| weights | random at the start | no other model's licence reaches them |"
    if not code:
        return
    yield (
        "| code (`*.py`) | the Fused LLaVA project | no licence is named in this folder: ask the project's owner |"
        if licence_file() is None
        else "| code (`*.py`) | the Fused LLaVA project | see LICENSE |"
    )


def licence_file() -> Path | None:
    """Returns the project's own licence, where it has one."""
    file = Path(__file__).resolve().parents[1] / "LICENSE"
    return file if file.is_file() else None


def _model_source(part: str, place: str) -> Source:
    if Path(place).exists() or not _HUB_ID.fullmatch(place):
        name = Path(place).name
        return Source(part, f"a local folder, {name}", None, f"check the licence of {name}")
    known = [words for pattern, words in _MODELS if re.fullmatch(pattern, place, re.IGNORECASE)]
    return Source(part, place, place, known[0] if known else f"check the licence of {place}")


def _data_source(file: str) -> Source:
    if scenes.is_built_in(file):
        return Source("data", f"drawn scenes and questions about them: `{file}`", None, _SCENES)
    if easy_vqa.is_built_in(file):
        return Source("data", f"easy-VQA, questions about coloured shapes: `{file}`", None, _EASY_VQA)
    if file.startswith(HUB):
        name = HubSet.of(file).name
        return Source("data", name, name, f"check the licence of {name}, and of its images")
    name = Path(file).name
    hub, words = _DATA.get(name, (None, f"check the licence of {name}, and of its images"))
    return Source("data", f"{name} ({hub})" if hub else name, hub, words)
