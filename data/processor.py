"""Adapts a family's Hugging Face processor: how images are written in text, their tokens, and the model's inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, LlavaProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from data.chat import TEMPLATE_FAULTS, ImageMarkup
from data.config import DataConfig, expand, shorten
from data.images import prepare_image
from data.rows import IMAGE_PLACEHOLDER, RowError

VIDEOS: Final = "video_processor"  # an attribute of many processors; needs torchvision
_VIDEO_CLASSES: Final = {  # default video processor of processors that take videos
    "LlavaOnevisionProcessor": "LlavaOnevisionVideoProcessor",
    "InternVLProcessor": "InternVLVideoProcessor",
    "Qwen2VLProcessor": "Qwen2VLVideoProcessor",
    "Qwen2_5_VLProcessor": "Qwen2VLVideoProcessor",
    "Qwen3VLProcessor": "Qwen3VLVideoProcessor",
    "Glm4vProcessor": "Glm4vVideoProcessor",
    "SmolVLMProcessor": "SmolVLMVideoProcessor",
}
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
# what transformers raises for a broken processor, tokenizer or config
_READING: Final = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, StrictDataclassError)
TYPE_IDS: Final = ("mm_token_type_ids", "token_type_ids")  # inputs that separate image tokens from text
_PROBE: Final = Image.new("RGB", (64, 64), "gray")
_SIZES: Final = 1 << 16  # image sizes whose token counts are cached
_STAND_IN: Final = "(7f3C Question 9a1E)"


class ProcessorError(ValueError):
    """A processor cannot be read or does not fit the data; the message names the key."""


@dataclass(frozen=True)
class EncodedImages:
    """The images of one sample.

    Attributes:
        spans: for each image, the ids that its token expands to.
        inputs: the model's other inputs, by name (`pixel_values`, `image_grid_thw`, ...).
    """

    spans: list[list[int]]
    inputs: dict[str, Tensor]


class VisionProcessor:
    """Turns images into tokens and inputs as the family's processor does.

    Args:
        processor: a Hugging Face processor with a tokenizer and an image processor.
        aspect: `pad` pads images to a square in the processor's mean colour first (LLaVA-1.5); `processor` does not.

    Attributes:
        tokenizer: the processor's.
        text: how an image is written in text.
        image_token_id: the id of `text.token`.
        visual_ids: special ids that an image token expands to.

    Raises:
        ProcessorError: the processor lacks a part; the message names it.
    """

    def __init__(self, processor: Any, *, aspect: str = "processor") -> None:
        self.processor, self.aspect = processor, aspect
        for part in ("tokenizer", "image_processor", "image_token"):
            if getattr(processor, part, None) is None:
                raise ProcessorError(
                    f"processor_config.json: got a {type(processor).__name__} without {part}, expected one that has it"
                )
        self.tokenizer, token = processor.tokenizer, processor.image_token
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(token)
        if self.image_token_id in (None, self.tokenizer.unk_token_id):
            raise ProcessorError(f"tokenizer: got none with the token {token}, expected it in the vocabulary")
        if isinstance(processor, LlavaProcessor) and not processor.patch_size:
            raise ProcessorError("processor_config.json: got no patch_size, expected the vision tower's")
        mean = getattr(processor.image_processor, "image_mean", None)
        if aspect == "pad" and not mean:
            raise ProcessorError("data.image_aspect: got pad, expected processor, because it has no mean colour")
        if aspect == "pad" and not isinstance(mean, list | tuple):
            raise ProcessorError(f"processor: image_mean: got {mean}, expected three numbers under image_aspect pad")
        self._separator: str = self.tokenizer.eos_token or self.tokenizer.bos_token
        if not self._separator:
            raise ProcessorError("tokenizer: got no eos_token, expected one that ends an answer")
        self._added = set(self.tokenizer.added_tokens_decoder)
        span, self._types = self._probe()
        start, end = self._special_range(span)
        before, after = (self.tokenizer.decode(part) for part in (span[:start], span[end:]))
        self._border = span[:start], span[end:]
        self.visual_ids = set(span[start:end]) & self._added
        self.text = replace(_image_markup(processor, before, after), begin=self._begin())
        self._is_count_independent = [len(one) for one in self._run_processor([_PROBE] * 2)[0]] == [len(span)] * 2
        self.count = lru_cache(_SIZES)(self._count)
        self._joint_counts = lru_cache(_SIZES)(self._counts_together)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles without the cache of token counts; workers rebuild it."""
        return _rebuild, (self.processor, self.aspect)

    def encode(self, images: Sequence[Image.Image]) -> EncodedImages:
        """Returns the images of one sample as tokens and inputs; `data.images.rgb` is applied to each.

        Raises:
            RowError: the aspect ratio of an image is too extreme, or the processor rejects it.
        """
        mean = getattr(self.processor.image_processor, "image_mean", None)
        shown = [prepare_image(image, self.aspect, mean) for image in images]
        try:
            spans, inputs, _ = self._run_processor(shown)
        except (ValueError, TypeError, OSError, RuntimeError) as error:  # what image processors raise of odd shapes
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise RowError(f"image of {sizes}: the processor rejects it: {shorten(str(error), 120)}") from None
        before, after = map(len, self._border)
        for span in spans:
            if (span[:before], span[len(span) - after :]) != self._border:
                raise RowError("image: got other text around its tokens than for other images, expected the same")
        return EncodedImages([span[before : len(span) - after] for span in spans], inputs)

    def counts(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Returns how many tokens each image of one sample expands to, given its width and height.

        LLaVA-OneVision splits an image into tiles only if it is the only one of its sample.
        """
        if self._is_count_independent or len(sizes) < 2:
            return [self.count(*size) for size in sizes]
        return list(self._joint_counts(tuple(sizes)))

    def type_ids(self, ids: Tensor) -> dict[str, Tensor]:
        """Returns the token type ids of ids (S,), which mark image tokens, for families that have them."""
        return {name: torch.isin(ids, torch.tensor(sorted(typed))).long() for name, typed in self._types.items()}

    def settings(self) -> str:
        """Returns the settings that determine the number of tokens of an image, for cache keys."""
        return self.processor.to_json_string() + self.aspect

    def _count(self, width: int, height: int) -> int:
        """Returns how many tokens a single image of this size expands to."""
        if isinstance(self.processor, LlavaProcessor) and _is_one_shape(self.processor.image_processor):
            width, height = _PROBE.size
        return len(self.encode([Image.new("RGB", (width, height))]).spans[0])

    def _counts_together(self, sizes: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
        return tuple(len(span) for span in self.encode([Image.new("RGB", size) for size in sizes]).spans)

    def _probe(self) -> tuple[list[int], dict[str, set[int]]]:
        """Returns the ids of one image, and the ids that each token type input marks as image."""
        try:
            with np.errstate(all="ignore"):  # a division by zero is refused below
                [span], inputs, types = self._run_processor([_PROBE])
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
            kind = type(self.processor).__name__
            raise ProcessorError(f"processor: {kind} cannot encode an image: {shorten(str(error), 160)}") from None
        if not all(one.isfinite().all() for one in inputs.values()):
            raise ProcessorError("data.processor: got pixels that are no numbers, expected finite ones")
        return span, types

    def _begin(self) -> str:
        """Returns the prefix that the processor adds to a text."""
        ids, bare = (
            make(text=["?"], add_special_tokens=False)["input_ids"][0] for make in (self.processor, self.tokenizer)
        )
        return self.tokenizer.decode(ids[: len(ids) - len(bare)])

    def _special_range(self, span: Sequence[int]) -> tuple[int, int]:
        """Returns the range [start, end) of the special tokens in an image's ids."""
        places = [place for place, token in enumerate(span) if token in self._added]
        if not places:
            raise ProcessorError("processor: got no image token for an image, expected at least one")
        return places[0], places[-1] + 1

    def _run_processor(
        self, images: Sequence[Image.Image]
    ) -> tuple[list[list[int]], dict[str, Tensor], dict[str, set[int]]]:
        """Returns the ids of each image, the inputs, and the ids that each token type input marks as image."""
        separator = self._separator
        text = separator + separator.join([self.processor.image_token] * len(images)) + separator
        output = dict(self.processor(images=[list(images)], text=[text], add_special_tokens=False, return_tensors="pt"))
        ids = output.pop("input_ids")[0]
        output.pop("attention_mask", None)
        types = {name: set(ids[output.pop(name)[0] == 1].tolist()) for name in TYPE_IDS if name in output}
        places = (ids == self.tokenizer.convert_tokens_to_ids(separator)).nonzero()[:, 0].tolist()
        if len(places) != len(images) + 1:
            raise ValueError(f"got the tokens of {len(places) - 1} images, expected {len(images)}")
        spans = [ids[start + 1 : end].tolist() for start, end in pairwise(places)]
        return spans, output, types


def _rebuild(processor: Any, aspect: str) -> VisionProcessor:
    return VisionProcessor(processor, aspect=aspect)


def _is_one_shape(images: Any) -> bool:
    """Returns whether an image processor resizes or crops every image to the same shape."""
    fields = images.to_dict()
    crop, size = (fields.get(name) or {} for name in ("crop_size", "size"))
    is_cut = bool(fields.get("do_center_crop") and crop.get("height") and crop.get("width"))
    return is_cut or bool(fields.get("do_resize") and size.get("height") and size.get("width"))


def _image_markup(processor: Any, before: str, after: str) -> ImageMarkup:
    """Returns how an image is written in text, inferred from the chat template's output."""
    token, template = processor.image_token, processor.chat_template or processor.tokenizer.chat_template
    if not isinstance(template, str):
        return ImageMarkup(token, token, before=before, after=after)
    question = {"type": "text", "text": _STAND_IN}
    parts = _apply(processor, template, [{"type": "image"}, question])
    if parts.count(token) != 1 or parts.count(_STAND_IN) != 1:  # takes text alone
        return ImageMarkup(token, token, template, before=before, after=after)
    mark = _difference(parts, _apply(processor, template, [question]))
    is_text = _apply(processor, template, f"{token}\n{_STAND_IN}") == parts
    return ImageMarkup(token, mark if token in mark else token, template, not is_text, before, after)


def _apply(processor: Any, template: str, content: Any) -> str:
    """Returns a chat template's output for one question, "" if it fails."""
    try:
        return processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False
        )
    except TEMPLATE_FAULTS:
        return ""


def _difference(longer: str, shorter: str) -> str:
    """Returns the text that `longer` has and `shorter` lacks, stripped."""
    start = 0
    while start < min(len(longer), len(shorter)) and longer[start] == shorter[start]:
        start += 1
    end = 0
    while end < min(len(longer), len(shorter)) - start and longer[-1 - end] == shorter[-1 - end]:
        end += 1
    return longer[start : len(longer) - end].strip()


def load_processor(source: str | Path, tokenizer: Any = None) -> Any:
    """Returns the processor of a checkpoint or a config folder, with its image processor and its tokenizer.

    Without torchvision, the video part of a processor is left out.

    Args:
        source: folder or hub id.
        tokenizer: replaces the source's tokenizer.

    Raises:
        ProcessorError: a part is missing or cannot be fetched.
    """
    try:
        kind = _kind(source)
        if kind is None:
            return AutoProcessor.from_pretrained(source)
        names = kind.get_attributes()
        if VIDEOS not in names and tokenizer is None:
            return kind.from_pretrained(source)
        if VIDEOS in names and transformers.utils.is_torchvision_available() and tokenizer is None:
            return AutoProcessor.from_pretrained(source)
        return _assembled(kind, source, tokenizer)
    except ImportError as error:
        raise ProcessorError(f"{source}: processor: {shorten(str(error), 200)}") from None
    except _READING as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ProcessorError(f"{source}: cannot be loaded: {kind}{shorten(str(error), 300)}") from error


def model_processor(config: str | None, checkpoint: str | None = None, language_model: str | None = None) -> Any:
    """Returns the processor of a recipe's model.

    It is the checkpoint's, unless the config folder has one. If that folder has no tokenizer, it is the language
    model's or the checkpoint's, with `<image>` and `<pad>` added in llava-hf's order.

    Raises:
        ProcessorError: a part is missing or cannot be fetched.
    """
    source, tokenizer_source = processor_sources(config, checkpoint, language_model)
    if tokenizer_source is None:
        return load_processor(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source)
    except (OSError, ValueError) as error:
        reason = shorten(str(error), 300)
        raise ProcessorError(f"the tokenizer of '{tokenizer_source}' cannot be read: {reason}") from error
    for kind in ({"additional_special_tokens": [IMAGE_PLACEHOLDER]}, {"pad_token": "<pad>"}):  # llava-hf's order
        tokenizer.add_special_tokens(kind)
    return load_processor(source, tokenizer)


def processor_sources(
    config: str | None, checkpoint: str | None = None, language_model: str | None = None
) -> tuple[str, str | None]:
    """Returns the folder or hub id of a recipe's processor, and that of its tokenizer if it differs, else None."""
    folder = Path(config or "")
    if config is None or (checkpoint is not None and not (folder / "processor_config.json").is_file()):
        return str(checkpoint), None
    if any((folder / name).is_file() for name in _TOKENIZERS):
        return config, language_model
    return config, language_model or checkpoint


def save_processor(processor: Any, folder: Path) -> None:
    """Saves a processor; one loaded without its video part still names it, for use with torchvision."""
    processor.save_pretrained(folder)
    kind = type(processor)
    if kind.__module__ != __name__:
        return
    file = folder / "processor_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields[VIDEOS] = getattr(processor, "videos", None) or {"video_processor_type": _VIDEO_CLASSES[kind.__name__]}
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def image_only(kind: Any) -> Any:
    """Returns a processor class without its video part, under the same name."""
    names = [name for name in kind.get_attributes() if name != VIDEOS]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: names), "__module__": __name__})


def _kind(source: str | Path) -> Any:
    """Returns the class of a source's processor; None if only AutoProcessor can tell."""
    name = _fields(source, "processor_config.json").get("processor_class")
    name = name or _fields(source, "preprocessor_config.json").get("processor_class")
    kind = str(_fields(source, "config.json").get("model_type")).removeprefix("fused_")
    name = name or ("LlavaProcessor" if kind == "mobilevlm" else PROCESSOR_MAPPING_NAMES.get(kind))
    return getattr(transformers, name, None) if isinstance(name, str) else None


def _assembled(kind: Any, source: str | Path, tokenizer: Any) -> Any:
    """Returns a processor built from its parts, without the video part."""
    fields = _fields(source, "processor_config.json")
    own = {
        name: value
        for name, value in fields.items()
        if name not in ("processor_class", "auto_map") and not isinstance(value, dict)
    }
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(source),
        "tokenizer": AutoTokenizer.from_pretrained(source) if tokenizer is None else tokenizer,
    }
    if VIDEOS in kind.get_attributes():
        kind, parts[VIDEOS] = image_only(kind), None
    made = kind(**parts, **own)
    if VIDEOS in parts:
        made.videos = fields.get(VIDEOS) or _fields(source, "video_preprocessor_config.json") or None
    if tokenizer is None:
        template = _text(source, "chat_template.jinja") or _fields(source, "chat_template.json").get("chat_template")
    else:
        template = None
    made.chat_template = template or made.tokenizer.chat_template
    return made


def _text(source: str | Path, name: str) -> str | None:
    """Returns the text of a checkpoint's file, None if there is no such file."""
    path = transformers.utils.cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if path is None else Path(path).read_text(encoding="utf-8")


def _fields(source: str | Path, name: str) -> dict[str, Any]:
    text = _text(source, name)
    fields = {} if text is None else json.loads(text)
    if not isinstance(fields, dict):
        raise ProcessorError(f"{source}: {name}: got a {type(fields).__name__}, expected an object")
    return fields


def apply_settings(processor: Any, config: DataConfig) -> Any:
    """Applies the settings of a recipe's data section to a processor; returns it.

    `data.processor` sets fields of its image processor, `data.chat_template` replaces its chat template.

    Raises:
        ProcessorError: a setting is unknown, a value is wrong, or the template cannot be read.
    """
    if config.chat_template is not None:
        try:
            template = Path(expand(config.chat_template)).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # a name that is too long, a NUL, not UTF-8
            reason = shorten(getattr(error, "strerror", None) or str(error))
            raise ProcessorError(f"data.chat_template: {shorten(config.chat_template, 200)}: {reason}") from None
        if not template.strip():
            raise ProcessorError(f"data.chat_template: {config.chat_template}: got an empty file, expected a template")
        processor.chat_template = template
    if not config.processor:
        return processor
    images = processor.image_processor
    fields = {name: value for name, value in images.to_dict().items() if name != "image_processor_type"}
    known = sorted({*images.valid_kwargs.__annotations__, *fields})
    for name in config.processor:
        if name not in known:
            raise ProcessorError(
                f"data.processor: got {name}, expected settings of {type(images).__name__}: {', '.join(known)}"
            )
    try:
        processor.image_processor = type(images)(**{**fields, **config.processor})
    except _READING as error:
        raise ProcessorError(f"data.processor: {shorten(str(error), 200)}") from None
    return processor
