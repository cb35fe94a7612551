"""Texts and images through every family's own processor, and the settings that a recipe hands to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from data.chat import IGNORE_INDEX, ChatFormat, TokenizerError
from data.config import DataConfig
from data.dataset import Collator, Encoder, pad_and_concat
from data.processor import ProcessorError, VisionProcessor, apply_settings, load_processor, save_processor
from data.rows import Record, RowError, Turn
from tests.tiny_processors import CHAT, MEAN, PROCESSORS, llava, require, tokenizer
from tests.tiny_vlms import IMAGE

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a dog."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]},
]
TURNS = [Turn("user", "<image>\nwhat is it?"), Turn("assistant", "a dog."), Turn("user", "<image>\nand this?")]
SIZES = [(20, 10), (12, 30)]


def picture(width, height):
    random = np.random.default_rng(width)
    return Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(params=sorted(PROCESSORS))
def processor(request, tmp_path):
    """The family's processor, once saved and read again; with the chat template that it brings."""
    require(request.param)
    save_processor(PROCESSORS[request.param](), tmp_path)
    found = load_processor(tmp_path)
    found.chat_template = found.chat_template or found.tokenizer.chat_template
    return found


def config(**more):
    return DataConfig(files=["rows.json"], format="chat_template", image_aspect="processor", **more)


def test_a_sample_is_what_the_family_s_processor_makes_of_it(processor):
    """Ids, types and inputs of two questions with images equal the processor's own, of the whole text at once."""
    images, encoder = [picture(*size) for size in SIZES], Encoder.of(config(), processor)
    chat = encoder.chats[0]
    ids, labels = chat.encode(TURNS)
    sample = encoder.expand(ids, labels, images)
    text = processor.tokenizer.apply_chat_template(
        MESSAGES, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    theirs = processor(images=[images], text=[text], add_special_tokens=False, return_tensors="pt")
    del theirs["attention_mask"]
    for name, value in theirs.items():
        ours = sample.pop(name)
        assert torch.equal(ours, value[0] if ours.shape != value.shape else value), name
    labels = sample.pop("labels")
    answer = processor.tokenizer.decode(labels[labels != IGNORE_INDEX]).strip()
    assert answer.removesuffix("<|im_end|>") == "a dog."
    assert not sample


def test_tokens_are_counted_before_an_image_is_opened(processor):
    vision = VisionProcessor(processor)
    spans = vision.encode([picture(*size) for size in SIZES]).spans
    assert vision.counts(SIZES) == [len(span) for span in spans]
    [alone] = vision.encode([picture(*SIZES[0])]).spans
    assert vision.counts(SIZES[:1]) == [len(alone)]


def test_turns_that_do_not_fit_take_their_images_with_them(processor):
    encoder = Encoder.of(config(max_length=60), processor)
    answered = (*TURNS, Turn("assistant", "a cat, and a very long answer that does not fit into the sample at all."))
    found = encoder.encode(Record(("a.png", "b.png"), answered), SIZES)
    assert found.images == ("a.png",)
    assert found.is_cut
    sample = encoder.expand(found.ids, found.labels, [picture(*SIZES[0])])
    assert len(sample["input_ids"]) == found.length <= 60


@pytest.mark.parametrize(
    ("family", "settings", "tokens"),
    [("qwen3_vl", {"max_pixels": 4096}, 64), ("internvl", {"max_patches": 1}, 6), ("gemma3", {}, 6)],
)
def test_the_recipe_s_settings_reach_the_image_processor(family, settings, tokens, tmp_path):
    processor = apply_settings(PROCESSORS[family](), config(processor=settings))
    assert VisionProcessor(processor).count(64, 64) == tokens
    save_processor(processor, tmp_path)
    assert VisionProcessor(load_processor(tmp_path)).count(64, 64) == tokens


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"processor": {"pixels": 5}},
            "data.processor: got pixels, expected settings of Qwen2VLImage.*max_pixels",
        ),
        ({"chat_template": "nowhere.jinja"}, r"data\.chat_template: nowhere\.jinja: .*No such file"),
    ],
)
def test_a_setting_that_is_unknown_is_one_line(settings, said):
    with pytest.raises(ProcessorError, match=said) as caught:
        apply_settings(PROCESSORS["qwen3_vl"](), config(**settings))
    assert "\n" not in str(caught.value)


def test_a_chat_template_of_the_recipe_takes_the_place_of_the_processor_s(tmp_path):
    (tmp_path / "own.jinja").write_text(CHAT.replace("MARK", "<image>").replace("<|im_start|>", "turn "))
    processor = apply_settings(llava(), config(chat_template=str(tmp_path / "own.jinja")))
    vision = VisionProcessor(processor)
    rendered = ChatFormat("chat_template", vision.tokenizer, vision.text).render(TURNS)
    assert rendered.text == (
        "turn user\n<image>what is it?<|im_end|>\nturn assistant\na dog.<|im_end|>\n"
        "turn user\n<image>and this?<|im_end|>\nturn assistant\n"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blank.jinja", "got an empty file, expected a template"),
        ("x" * 300, "File name too long"),
        ("a\0b", "embedded null byte"),
        ("latin.jinja", "codec can't decode"),
        (".", "Is a directory"),
    ],
)
def test_a_chat_template_that_cannot_be_read_is_one_line(tmp_path, name, said):
    (tmp_path / "blank.jinja").write_text(" \n")
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ProcessorError, match=f"^data.chat_template: .*: .*{said}") as caught:
        apply_settings(llava(), config(chat_template=f"{tmp_path}/{name}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"])
def test_a_template_that_fails_says_so_and_no_more(template):
    processor = llava()
    processor.chat_template = template
    vision = VisionProcessor(processor)
    with pytest.raises(TokenizerError, match=r"tokenizer\.chat_template: fails: "):
        ChatFormat("chat_template", vision.tokenizer, vision.text)


@pytest.mark.parametrize("name", ["vicuna_v1", "plain"])
def test_formats_of_our_own_write_the_family_s_mark(name):
    vision = VisionProcessor(PROCESSORS["qwen3_vl"]())
    text = ChatFormat(name, vision.tokenizer, vision.text).render([Turn("user", "<image>\nhm"), Turn("assistant", "b")])
    assert "<|vision_start|><|image_pad|><|vision_end|>\n" in text.text


def test_what_the_processor_writes_before_a_text_begins_a_sample_once_and_has_no_label():
    vision = VisionProcessor(llava())

    def encoded(begin):
        return ChatFormat("chat_template", vision.tokenizer, replace(vision.text, begin=begin)).encode(TURNS[:2])

    ids, labels = encoded("")
    assert encoded("<s>") == ([vision.tokenizer.bos_token_id, *ids], [IGNORE_INDEX, *labels])
    assert encoded("<|im_start|>") == (ids, labels)


def test_a_siglip_tower_without_a_crop_has_every_patch_as_a_token():
    processor = llava()
    processor.image_processor = transformers.SiglipImageProcessorPil(size={"height": 12, "width": 12}, **MEAN)
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    assert VisionProcessor(processor).counts([(8, 8), (300, 20)]) == [9, 9]


def test_a_processor_that_lacks_something_is_one_line_that_names_it():
    processor = llava()
    processor.patch_size = None
    with pytest.raises(ProcessorError, match="got no patch_size, expected the vision tower's"):
        VisionProcessor(processor)
    processor = llava()
    processor.image_processor.image_mean = None
    with pytest.raises(ProcessorError, match=r"data\.image_aspect: got pad"):
        VisionProcessor(processor, aspect="pad")


def test_an_image_that_the_processor_refuses_is_its_row_s_fault():
    with pytest.raises(RowError, match="1 x 999: the processor rejects it: absolute aspect ratio"):
        VisionProcessor(PROCESSORS["qwen3_vl"]()).encode([Image.new("RGB", (1, 999))])


def test_a_tokenizer_without_a_pad_token_trains():
    letters = tokenizer({IMAGE: "<image>"}, CHAT)
    letters.pad_token = None
    rows = [{name: torch.ones(size, dtype=torch.long) for name in ("input_ids", "labels")} for size in (2, 3)]
    batch = Collator(letters.pad_token_id)(rows)
    assert batch["input_ids"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_inputs_are_joined_by_one_rule():
    found = pad_and_concat([torch.ones(1, 2, 3), torch.full((2, 1, 4), 2.0)])
    assert found.shape == (3, 2, 4)
    assert found[0].tolist() == [[1, 1, 1, 0]] * 2
    assert found[1].tolist() == [[2, 2, 2, 2], [0, 0, 0, 0]]


def test_images_of_one_shape_are_counted_by_one_look():
    """LLaVA crops every image to one shape: rows with thousands of sizes cost no more than one."""
    processor, calls = llava(), []
    vision, plain = VisionProcessor(processor), processor.image_processor.preprocess
    processor.image_processor.preprocess = lambda *given, **more: calls.append(given) or plain(*given, **more)
    assert {vision.count(8 + number, 8) for number in range(20)} == {4}
    assert len({call[0][0][0].size for call in calls}) == 1
    processor.image_processor.do_center_crop = False  # the shorter side alone is known: shapes differ
    assert VisionProcessor(processor).count(32, 8) == 16


@pytest.mark.parametrize(
    ("settings", "aspect", "said"),
    [
        ({"image_mean": 0.5, "image_std": 0.5}, "pad", "image_mean: got 0.5, expected three numbers under"),
        ({"image_std": [0.0, 0.0, 0.0]}, "processor", "data.processor: got pixels that are no numbers, expected"),
    ],
)
def test_settings_that_make_no_pixels_are_refused(settings, aspect, said):
    data = DataConfig(files=["x.json"], format="plain", processor=settings)
    with pytest.raises(ProcessorError, match=said):
        VisionProcessor(apply_settings(llava(), data), aspect=aspect)
