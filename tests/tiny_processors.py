"""Tiny processors of the families, for the tiny models of tiny_vlms.py: a tokenizer of letters, images of a few pixels.

Each processor class is the family's own; tokenizer, sizes and chat templates only imitate the published ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from data.processor import image_only
from tests.tiny_vlms import END, IMAGE, PAD, START, VIDEO

LETTERS = "abcdefghijklmnopqrstuvwxyz \n?.,:0123456789"
BEGIN_TURN, END_TURN = "<|im_start|>", "<|im_end|>"
MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

# Content as a list of parts, in order; the system prompt is an ordinary message.
CHAT = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- 'MARK' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# SmolVLM's style: content is always a list, a space follows the colon only before text, no newline after the role.
SPEAKERS = """\
<|im_start|>{% for message in messages %}{{ message['role'] }}{% if message['content'][0]['type'] == 'image' %}{{ ':' \
}}{% else %}{{ ': ' }}{% endif %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] \
}}{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""

# LLaVA-NeXT's and LLaVA-OneVision's style: all images of a message come before its text.
IMAGES_FIRST = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] }}\
{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + part['text'] }}{% endfor %}\
{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_WRAPPED = {"image_pad": "<|image_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}


def tokenizer(names: dict[int, str], template: str, **named: str) -> Any:
    """Returns a tokenizer of letters with the family's special tokens.

    `names` are its special tokens by id; `named` are those that the processor reads as attributes of the tokenizer.
    """
    special = {0: "<unk>", 1: "<s>", 2: END_TURN, 45: BEGIN_TURN, PAD: "<pad>", **names}
    words = {letter: place for place, letter in enumerate(LETTERS, start=3)}
    vocabulary = {**words, **{name: number for number, name in special.items()}}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = Fuse()
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=END_TURN,
        pad_token="<pad>",
        extra_special_tokens=named,
    )
    result.add_tokens([name for name in special.values() if name not in named.values()], special_tokens=True)
    result.chat_template = template
    return result


def without_videos(kind: str) -> Any:
    """Returns a family's processor class without its video part, which needs torchvision."""
    return image_only(getattr(transformers, kind))


def _clip(side: int, **more: Any) -> Any:
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return transformers.CLIPImageProcessorPil(**size, **MEAN, **more)


def llava(side: int = 8, patch: int = 4) -> Any:
    return transformers.LlavaProcessor(
        _clip(side),
        tokenizer({IMAGE: "<image>"}, CHAT.replace("MARK", "<image>\\n")),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_next() -> Any:
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil(**size, **MEAN, image_grid_pinpoints=[[8, 16], [16, 8]]),
        tokenizer({IMAGE: "<image>"}, IMAGES_FIRST),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_onevision() -> Any:
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 8, "width": 8}, image_grid_pinpoints=[[8, 16], [16, 8]], **MEAN
    )
    return without_videos("LlavaOnevisionProcessor")(
        images,
        tokenizer({IMAGE: "<image>", VIDEO: "<video>"}, IMAGES_FIRST),
        video_processor=None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )


def internvl() -> Any:
    names = {IMAGE: "<IMG_CONTEXT>", START: "<img>", END: "</img>", VIDEO: "<video>"}
    special = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=2, **MEAN
    )
    chat = CHAT.replace("MARK", "<IMG_CONTEXT>\\n")
    return without_videos("InternVLProcessor")(
        images, tokenizer(names, chat, **special), video_processor=None, image_seq_length=4, chat_template=chat
    )


def _qwen(kind: str, temporal: int = 2) -> Any:
    names = {IMAGE: "<|image_pad|>", START: "<|vision_start|>", END: "<|vision_end|>", VIDEO: "<|video_pad|>"}
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=temporal, min_pixels=64, max_pixels=512, **MEAN
    )
    chat = CHAT.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>")
    return without_videos(kind)(images, tokenizer(names, chat), video_processor=None, chat_template=chat)


def glm4v() -> Any:
    names = {IMAGE: "<|image|>", START: "<|begin_of_image|>", END: "<|end_of_image|>", VIDEO: "<|video|>"}
    images = transformers.Glm4vImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}, **MEAN
    )
    chat = CHAT.replace("MARK", "<|begin_of_image|><|image|><|end_of_image|>")
    return without_videos("Glm4vProcessor")(images, tokenizer(names, chat), video_processor=None, chat_template=chat)


def _idefics(kind: str) -> Any:
    names = {IMAGE: "<image>", START: "<fake_token_around_image>", END: "<global-img>", VIDEO: "<video>"}
    names |= {54: "<row_1_col_1>", 55: "<row_1_col_2>", 56: "<row_2_col_1>", 57: "<row_2_col_2>"}
    names |= {58: "<end_of_utterance>"}
    images = getattr(transformers, f"{kind}ImageProcessorPil")(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, **MEAN
    )
    base = without_videos("SmolVLMProcessor") if kind == "SmolVLM" else transformers.Idefics3Processor
    more = {"video_processor": None} if kind == "SmolVLM" else {}
    return base(images, tokenizer(names, SPEAKERS), **more, image_seq_len=4, chat_template=SPEAKERS)


def mistral3() -> Any:
    names = {IMAGE: "[IMG]", START: "[IMG_BREAK]", END: "[IMG_END]"}
    images = transformers.PixtralImageProcessorPil(patch_size={"height": 4, "width": 4}, size={"longest_edge": 24})
    chat = CHAT.replace("MARK", "[IMG]")
    return transformers.PixtralProcessor(
        images, tokenizer(names, chat), patch_size=4, spatial_merge_size=2, chat_template=chat
    )


def molmo2() -> Any:
    names = {IMAGE: "<im_patch>", START: "<low_res_im_start>", END: "<im_end>", VIDEO: "<|video|>", 46: "<im_start>"}
    names |= {47: "<im_col>", 48: "<im_low>", 49: "<|image|>", 54: "<frame_start>", 55: "<frame_end>"}
    images = transformers.Molmo2ImageProcessor(
        size={"height": 8, "width": 8}, patch_size=4, pooling_size=[1, 2], overlap_margins=[0, 0], max_crops=2, **MEAN
    )
    chat = CHAT.replace("MARK", "<|image|>")
    videos = transformers.Molmo2VideoProcessor()  # the class requires one
    return transformers.Molmo2Processor(images, videos, tokenizer(names, chat), chat_template=chat)


def gemma3() -> Any:
    names = {IMAGE: "<image_soft_token>", START: "<start_of_image>", END: "<end_of_image>"}
    special = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    images = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, **MEAN)
    chat = CHAT.replace("MARK", "<start_of_image>")
    return transformers.Gemma3Processor(images, tokenizer(names, chat, **special), chat, image_seq_length=4)


def ovis2() -> Any:
    names = {IMAGE: "<IMG_ATOM>", START: "<IMG_START>", END: "<IMG_END>", 54: "<IMG_GRID>", 55: "<IMG_COL>"}
    names |= {56: "<IMG_ROW>", 57: "<image>"}
    images = transformers.Ovis2ImageProcessorPil(
        size={"height": 8, "width": 8}, crop_to_patches=True, min_patches=1, max_patches=2, **MEAN
    )
    chat = CHAT.replace("MARK", "<image>\\n")
    return transformers.Ovis2Processor(images, tokenizer(names, chat), chat_template=chat, image_seq_length=4)


PROCESSORS = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "qwen2_vl": lambda: _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": lambda: _qwen("Qwen3VLProcessor"),
    "glm4v": glm4v,
    "smolvlm": lambda: _idefics("SmolVLM"),
    "idefics3": lambda: _idefics("Idefics3"),
    "mistral3": mistral3,
    "molmo2": molmo2,
    "gemma3": gemma3,
    "ovis2": ovis2,
    "mobilevlm": lambda: llava(16, 8),
}

_PACKAGES = {"smolvlm": "num2words", "mistral3": "torchvision", "molmo2": "torchvision"}


def require(family: str) -> None:
    """Skips a test if a package that the family's processor needs is not installed."""
    if family in _PACKAGES:
        pytest.importorskip(_PACKAGES[family], reason=f"{family}'s processor needs {_PACKAGES[family]}")
