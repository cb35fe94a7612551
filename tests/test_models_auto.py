"""FusedAutoModel: which class a checkpoint gets, what it keeps, what is refused and how early."""

import json
import re

import pytest
import torch
import transformers
from transformers import LlavaConfig

from models import FAMILIES, FusedAutoModel, StagePlan, UnsupportedModelError
from models.attention import SUPPORTED_DECODERS, UnsupportedDecoderError
from models.schedules import VTW
from tests.tiny_vlms import LAYERS, TINY, text

PLAN = {"enter": 1, "exit": 4}
SOME = ("llava", "qwen3_vl", "idefics3", "molmo2-qwen3")  # the classes of all families are tested in their own file


def same(left, right, batch):
    with torch.no_grad():
        torch.testing.assert_close(left(**batch).logits, right(**batch).logits, rtol=0, atol=0)


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def write_config(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


# -- what loads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_an_ordinary_checkpoint_is_dense_unless_a_plan_is_given_and_keeps_it_when_saved(name, tmp_path):
    tiny = TINY[name]
    source, batch = tiny.hugging_face(), tiny.batch("ttItt")
    source.save_pretrained(tmp_path / "ordinary")
    dense, report = FusedAutoModel.from_pretrained(tmp_path / "ordinary", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(dense) is FAMILIES[tiny.family].model_class
    assert dense.config.stages is None
    same(dense, source, batch)
    dense.save_pretrained(tmp_path / "dense")
    plain, report = type(source).from_pretrained(tmp_path / "dense", output_loading_info=True)  # Hugging Face's
    assert not report["missing_keys"]
    same(plain.eval(), source, batch)
    fused = FusedAutoModel.from_pretrained(tmp_path / "ordinary", stages=PLAN)
    assert [len(tokens[0]) for tokens in fused(**batch).live].count(batch["input_ids"].shape[1]) == 3
    fused.save_pretrained(tmp_path / "fused")
    again = FusedAutoModel.from_pretrained(tmp_path / "fused")
    assert type(again) is type(fused)
    assert again.config.stages["enter"] == 1
    same(again, fused, batch)
    other = FusedAutoModel.from_pretrained(tmp_path / "fused", stages={"enter": 0, "exit": LAYERS})
    assert other.plan.exit == LAYERS
    torch.testing.assert_close(other(**batch).logits, source(**batch).logits, rtol=0, atol=1e-4)


def test_keyword_arguments_are_hugging_faces(tmp_path):
    TINY["llava"].hugging_face().save_pretrained(tmp_path)
    model = FusedAutoModel.from_pretrained(
        str(tmp_path), dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu", schedule="vtw"
    )
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config._attn_implementation == "eager"
    assert type(model.schedule).__name__ == "VTW"


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_config_in_place_of_the_checkpoints_takes_the_plan(is_fused, tmp_path):
    tiny = TINY["llava"]
    tiny.hugging_face().save_pretrained(tmp_path)
    config = FAMILIES["llava"].config_class(**tiny.fields) if is_fused else tiny.config()
    model = FusedAutoModel.from_pretrained(tmp_path, config=config, stages=StagePlan(**PLAN))
    assert model.plan.enter == 1
    assert FusedAutoModel.from_pretrained(tmp_path, config=str(tmp_path), stages=PLAN).plan == model.plan
    assert getattr(config, "stages", None) is None  # the caller's is left alone


@pytest.mark.parametrize("name", SOME)
def test_from_config_takes_hugging_faces_config_or_the_fused_one(name):
    tiny = TINY[name]
    ordinary = tiny.config(dtype="bfloat16", attn_implementation="eager")
    dense = FusedAutoModel.from_config(ordinary)
    assert dense.config.stages is None
    planned = FusedAutoModel.from_config(ordinary, stages=PLAN)
    kept = FusedAutoModel.from_config(planned.config)
    changed = FusedAutoModel.from_config(planned.config, stages={"enter": 0, "exit": 2})
    assert [model.plan and model.plan.exit for model in (dense, planned, kept, changed)] == [None, 4, 4, 2]
    for model in (dense, planned, kept, changed):
        assert type(model) is FAMILIES[tiny.family].model_class
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert model.config.get_text_config()._attn_implementation == "eager"
    given = FusedAutoModel.from_config(ordinary, dtype=torch.float32, attn_implementation="sdpa")
    assert {weight.dtype for weight in given.parameters()} == {torch.float32}
    assert given.config.get_text_config()._attn_implementation == "sdpa"


def test_from_config_keeps_the_schedule_to_start_with():
    config = FAMILIES["llava"].config_class(**TINY["llava"].fields, schedule="fastv")
    assert type(FusedAutoModel.from_config(config).schedule).__name__ == "FastV"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schedule": VTW(3)}, "schedule: got VTW"),
        ({"plans": ["a"]}, "plans: got ['a'], expected"),
        ({"stages": 3}, "stages: got 3, expected the fields of a plan"),
        ({"stages": {"enter": 1, 2: 3}}, "stages.2: unknown key"),
    ],
)
def test_what_a_config_cannot_hold_is_refused(fields, words, tmp_path):
    TINY["llava"].hugging_face().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)):
        FusedAutoModel.from_pretrained(tmp_path, **fields)


# -- what is refused: one line, with the list, before weights are read (no folder here has any) --------------------

OTHERS = {
    "bert": "BertConfig",
    "llama": "LlamaConfig",  # a language model alone
    "clip": "CLIPConfig",
    "mllama": "MllamaConfig",  # cross-attention
    "lfm2_vl": "Lfm2VlConfig",  # a recurrent hybrid
    "qwen3_vl_moe": "Qwen3VLMoeConfig",
    "llava_next_video": "LlavaNextVideoConfig",
    "perception_lm": None,
    "my_own_vlm": None,
    "fused_my_own_vlm": None,
    None: None,
}


@pytest.mark.parametrize("kind", OTHERS, ids=str)
def test_another_kind_is_refused_with_the_list_of_families(kind, tmp_path):
    folder = write_config(tmp_path, {"model_type": kind, "hidden_size": 8})
    with pytest.raises(UnsupportedModelError) as caught:
        FusedAutoModel.from_pretrained(folder, stages=PLAN)
    one_line(caught, str(folder), f"got model_type {kind}, expected one of {', '.join(FAMILIES)}")
    if OTHERS[kind] is not None:
        with pytest.raises(UnsupportedModelError) as caught:
            FusedAutoModel.from_config(getattr(transformers, OTHERS[kind])())
        one_line(caught, f"got model_type {kind}, expected one of {', '.join(FAMILIES)}")


@pytest.mark.parametrize("decoder", ["gpt2", "gemma2", "mixtral", "qwen3_next"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3"])
def test_a_supported_family_around_another_decoder_is_refused_with_the_list_of_decoders(family, decoder, tmp_path):
    fields = {**TINY[family].fields, "text_config": {"model_type": decoder}, "model_type": family}
    with pytest.raises(UnsupportedDecoderError) as caught:
        FusedAutoModel.from_pretrained(write_config(tmp_path, fields))
    one_line(caught, f"text_config.model_type: got {decoder}, expected one of", *SUPPORTED_DECODERS.values())
    with pytest.raises(UnsupportedDecoderError) as caught:
        FusedAutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    one_line(caught, f"text_config.model_type: got {decoder}")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"enter": 2, "exit": 9}, "stages.exit: got 9, beyond the decoder's 6 layers"),
        ({"enter": 3, "exit": 2}, "stages.exit: got 2, expected a layer after enter"),
        ({"enter": 1}, "stages.exit: got None, expected a layer number"),
        ({"begin": 1, "exit": 2}, "stages.begin: unknown key, expected one of enter"),
        ({"layers": [1, 8], "update": "kv"}, "stages.layers: got [1, 8], beyond the decoder's 6 layers"),
        ({}, "stages.enter: got None"),
    ],
)
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_wrong_plan_is_refused_before_weights_are_read(stages, message, is_fused, tmp_path):
    kind = "fused_llava" if is_fused else "llava"
    write_config(tmp_path, {**TINY["llava"].fields, "model_type": kind})
    with pytest.raises(ValueError, match=r"stages\.") as caught:
        FusedAutoModel.from_pretrained(tmp_path, stages=stages)
    one_line(caught, message)
    write_config(tmp_path, {**TINY["llava"].fields, "model_type": "fused_llava", "stages": stages})
    with pytest.raises(ValueError, match=r"stages\.") as caught:  # the checkpoint's own
        FusedAutoModel.from_pretrained(tmp_path)
    one_line(caught, message)


@pytest.mark.parametrize("content", [None, "", "{", "{}", "[1]", '"llava"'])
def test_a_config_json_that_cannot_be_read_is_named_in_one_line(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(OSError, match=r"config\.json") as caught:
        FusedAutoModel.from_pretrained(tmp_path)
    one_line(caught, str(tmp_path))


@pytest.mark.parametrize("source", ["/no/such/folder", "nobody/has-this-model", "not a name"])
def test_a_source_that_does_not_exist_is_named_in_one_line(source):
    with pytest.raises(OSError, match=f"^{source}: config.json cannot be read: ") as caught:
        FusedAutoModel.from_pretrained(source)
    one_line(caught)


def test_an_ordinary_config_with_mm_fields_is_still_ordinary(tmp_path):
    fields = {**TINY["llava"].fields, "text_config": text("llama"), "model_type": "llava"}
    LlavaConfig(**TINY["llava"].fields).save_pretrained(tmp_path)
    write_config(tmp_path, {**fields, "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "left over"})
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):  # it gets as far as the weights
        FusedAutoModel.from_pretrained(tmp_path)
