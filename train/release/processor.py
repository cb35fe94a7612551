"""The processor of a release: its chat template and image processor match those used in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from transformers import LlavaImageProcessorPil

from data.chat import VICUNA_SYSTEM, ChatFormat, ImageMarkup
from data.config import DataConfig
from data.processor import ProcessorError, VisionProcessor, load_processor
from data.processor import save_processor as save_parts
from data.rows import IMAGE_PLACEHOLDER, Turn
from train.errors import InputError, ReleaseError

_BEGIN: Final = "{{- bos_token -}}"

# What a release is tried with: an image, an answer, and a question without an image.
CONVERSATION: Final = (
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "A field of colours."}]},
    {"role": "user", "content": [{"type": "text", "text": "Which of them is the brightest?"}]},
)
_TURNS: Final = (
    Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat is in this picture?"),
    Turn("assistant", "A field of colours."),
    Turn("user", "Which of them is the brightest?"),
)


def read_processor(final: Path) -> Any:
    """Returns the processor that a run saved.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return load_processor(final)
    except ProcessorError as error:
        raise InputError(f"{error}; expected the processor that a run writes") from None


def released_processor(final: Path, data: DataConfig) -> Any:
    """Returns the processor of a run's checkpoint with a chat template and an image processor that fit its training.

    The chat template renders what `data.prompt_format` trained with, from texts or from parts. Under
    `data.image_aspect: pad` the image processor is LLaVA's, which pads to a square by itself. Prompts are padded on the
    left, for generation.

    Raises:
        ReleaseError: no template makes the tokens that the model was trained with.
        TokenizerError: the tokenizer does not go with the format.
    """
    processor = read_processor(final)
    if not take_parts(processor, data):
        raise ReleaseError(
            f"{final}: no chat template makes the tokens that data.format {data.prompt_format} was trained with; the "
            "tokenizer writes special tokens that the format does not have, or the other way round"
        )
    processor.tokenizer.padding_side = "left"
    if data.image_aspect == "pad":
        fields = processor.image_processor.to_dict()
        fields.pop("image_processor_type", None)
        processor.image_processor = LlavaImageProcessorPil(**{**fields, "do_pad": True})
    return processor


def save_processor(processor: Any, data: DataConfig, folder: Path) -> None:
    """Writes the processor of a checkpoint; its chat template asks as training did, from texts or from parts.

    Where no template makes the tokens of the training, it keeps its template.
    """
    take_parts(processor, data)
    save_parts(processor, folder)


def save_released(processor: Any, folder: Path) -> None:
    """Writes the processor of a release, in the words that transformers 4 knows too."""
    save_parts(processor, folder)
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    fields.setdefault("model_input_names", list(processor.tokenizer.model_input_names))
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def take_parts(processor: Any, data: DataConfig) -> bool:
    """Gives a processor the chat template that renders what `data.prompt_format` trains with, from texts or from parts.

    Returns:
        Whether one makes the very tokens; otherwise the processor keeps its template.

    Raises:
        TokenizerError: the tokenizer does not go with the format.
    """
    before = processor.chat_template, processor.tokenizer.chat_template
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    text, wanted = VisionProcessor(processor).text, trained_ids(processor, data)
    if data.prompt_format == "chat_template" and text.has_parts and released_ids(processor) == wanted:
        return True  # the family's, which takes parts
    for template in _templates(data.prompt_format, processor.tokenizer, text):
        processor.chat_template = processor.tokenizer.chat_template = template
        if released_ids(processor) == wanted:
            return True
    processor.chat_template, processor.tokenizer.chat_template = before
    return False


def trained_ids(processor: Any, data: DataConfig) -> list[int]:
    """Returns the ids of CONVERSATION as training makes them, with one image token for its image."""
    vision = VisionProcessor(processor)
    return ChatFormat(data.prompt_format, processor.tokenizer, vision.text).prompt(_TURNS)


def released_ids(processor: Any) -> list[int]:
    """Returns the ids of CONVERSATION as the processor's chat template and its tokenizer make them."""
    text = processor.tokenizer.apply_chat_template(
        list(CONVERSATION), chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    begin = processor.tokenizer.bos_token
    # as the processor's apply_chat_template does with an image at hand
    has_begin = begin is not None and text.startswith(begin)
    written = VisionProcessor(processor).text
    text = text if text.startswith(written.begin) else written.begin + text
    return processor.tokenizer(written.wrap_tokens(text), add_special_tokens=not has_begin)["input_ids"]


def _templates(chat_format: str, tokenizer: Any, image: ImageMarkup) -> list[str]:
    """Returns the templates that may fit, the best first.

    Messages whose content is a list of parts (pipelines, servers) first become messages whose content is text, as
    training had them: a mark and a newline for each image, then the text. Whatever follows need not know of parts.

    Without a written beginning the processor adds what training added. With one the tokenizer alone does so too: the
    better one for vicuna_v1, but a tokenizer that puts a space before the first word may not do so behind it.
    """
    if chat_format == "chat_template":
        parts = _read("parts", image.token)
        return [parts + str(image.template or tokenizer.get_chat_template()).removeprefix(parts)]
    parts = _read("parts", image.mark)
    if chat_format == "plain":
        return [parts + _read("plain", image.mark)]
    vicuna = _read("vicuna", image.mark)
    return [_BEGIN + parts + vicuna, parts + vicuna]


def _read(name: str, mark: str) -> str:
    """Returns a template of this folder; vicuna's system message, LLaVA's, is one that messages may replace."""
    text = Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    return text.replace("IMAGE", mark).replace("SYSTEM", repr(VICUNA_SYSTEM))
