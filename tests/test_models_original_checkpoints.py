"""Checkpoints in LLaVA's and MobileVLM's own format: what they compute, how they are saved, what is refused."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from models import FusedAutoModel, FusedLlavaConfig, FusedLlavaForConditionalGeneration, UnsupportedModelError
from models.schedules import Dense, Fused, StagePlan
from tests.tiny_vlms import CLIP, SIGLIP, TEXT, TINY, VOCABULARY, Tiny, square, without_markers
from train.weights import load_checkpoint

IMAGE, PAD = VOCABULARY, VOCABULARY + 1  # as llava-hf: the next two ids
ORIGINAL = {
    "model.language_model.": "model.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
}
MOBILE = {
    **ORIGINAL,
    "model.multi_modal_projector.linear_1.": "model.mm_projector.mlp.mlp.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.mlp.mlp.2.",
    "model.multi_modal_projector.positions.": "model.mm_projector.peg.peg.0.",
}
FIELDS = {
    **{name: value for name, value in TEXT.items() if name != "initializer_range"},
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "mm_hidden_size": 16,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
}
ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[8, 16]]}
MOBILE_FIELDS = {"model_type": "mobilevlm", "mm_projector_type": "ldpnetv2", "vision_tower_type": "clip"}


def original(model, names=ORIGINAL):
    """Returns a model's weights under their original names."""
    renamed = {}
    for name, weight in model.state_dict().items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        renamed[names.get(prefix, "") + name.removeprefix(prefix)] = weight.clone()
    return renamed


def without_tower(weights):
    return {name: weight for name, weight in weights.items() if "vision_tower" not in name}


def write_config(folder, **fields):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**FIELDS, **fields}))
    return folder


def write_weights(folder, weights, form="safetensors"):
    """Writes one file or two shards, of either kind."""
    kind = form.removeprefix("sharded ")
    stem, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    shards = {f"{stem}.{kind}": sorted(weights)}
    if kind != form:
        shards = {f"{stem}-0000{number + 1}-of-00002.{kind}": sorted(weights)[number::2] for number in range(2)}
        index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    for file, names in shards.items():
        save({name: weights[name] for name in names}, folder / file)


def hugging_face(name="llava", **fields):
    """Returns Hugging Face's model of the tiny weights, with the vocabulary that llava-hf gives it."""
    model = TINY[name].hugging_face()
    fields = {"vision_feature_layer": -2, **fields, "image_token_index": IMAGE, "pad_token_id": PAD}
    for field, value in fields.items():
        setattr(model.config, field, value)
    model.resize_token_embeddings(VOCABULARY + 2, pad_to_multiple_of=64)
    return model


def inputs(name="llava", *layouts):
    """Returns a batch with the ids that the grown vocabulary gives to image and padding."""
    batch = TINY[name].batch(*(layouts or ("ttItt", "Ittt", "tt")))
    ids = batch["input_ids"]
    return {**batch, "input_ids": torch.where(ids == 50, IMAGE, torch.where(ids == 59, PAD, ids))}


def logits(model, batch):
    """Returns the logits over the old vocabulary, padding left out."""
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()][:, :VOCABULARY]


def equal(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def complete(report):
    return not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with the tower alone; a hub name stands for one."""
    folder = tmp_path_factory.mktemp("towers") / "clip"
    TINY["llava"].hugging_face().model.vision_tower.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(clip, tmp_path_factory):
    """A checkpoint whose tower is the other folder's."""
    folder = write_config(tmp_path_factory.mktemp("llava") / "original", mm_vision_tower=str(clip))
    write_weights(folder, without_tower(original(TINY["llava"].hugging_face())))
    return folder


def test_a_run_from_it_keeps_all_plans_of_the_recipe(checkpoint):
    few = {"enter": 1, "exit": 3, "keep": {1: 0.5}, "select": "learned"}
    plans = {"fused": {"enter": 1, "exit": 2}, "dense": None, "few": few}
    fields = TINY["llava"].hugging_face().config.to_dict()
    fields.pop("model_type")
    config = FusedLlavaConfig(**fields, stages=plans["fused"], plans=plans)
    model = load_checkpoint(checkpoint, config=config, dtype=torch.float32)
    assert model.config.plans.keys() == plans.keys()
    assert (model.resolve("fused"), model.resolve("dense")) == (Fused(StagePlan(1, 2)), Dense())
    with torch.no_grad():  # under a scorer, which is new
        assert model(**inputs(), schedule="few").logits.isfinite().all()


@pytest.mark.parametrize("has_tower", [True, False], ids=["tower inside", "tower apart"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_logits_are_those_of_the_same_weights_in_hugging_face(form, has_tower, clip, tmp_path, caplog):
    weights = original(TINY["llava"].hugging_face())
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # buffers that older code saved
    weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    tower = clip
    if has_tower:  # then the folder of `mm_vision_tower` needs no weights
        tower = tmp_path / "tower"
        tower.mkdir()
        shutil.copy(clip / "config.json", tower)
    folder = write_config(tmp_path / "original", mm_vision_tower=str(tower))
    write_weights(folder, weights if has_tower else without_tower(weights), form)
    model, report = FusedAutoModel.from_pretrained(folder, output_loading_info=True)
    assert complete(report)
    assert "LOAD REPORT" not in caplog.text  # nor does transformers warn
    assert type(model) is FusedLlavaForConditionalGeneration
    assert type(model.model.vision_tower) is CLIPVisionModel
    assert not any(module.training for module in model.modules())
    equal(logits(model, inputs()), logits(hugging_face(), inputs()))


def test_config_and_names_are_those_of_llava_hf(checkpoint, tmp_path):
    model = FusedAutoModel.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "fused")
    hugging_face().save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "fused/config.json").read_text("utf-8"))
    expected = {
        "model_type": "llava",
        "image_token_index": IMAGE,
        "pad_token_id": PAD,
        "image_seq_length": 4,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    assert {name: config[name] for name in expected} == expected
    assert config["text_config"]["model_type"] == "llama"
    assert config["text_config"]["vocab_size"] == 64
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert not [name for name in [*config, *config["text_config"]] if name.startswith("mm_")]
    names = []
    for folder in ("fused", "hf"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]


def test_new_rows_are_around_the_mean_of_the_old_and_the_same_each_time(checkpoint):
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(FusedAutoModel.from_pretrained(checkpoint))
        assert torch.initial_seed() == seed
    for weight, again in zip(*([m.get_input_embeddings().weight, m.lm_head.weight] for m in models), strict=True):
        equal(weight, again)
        mean = weight[:VOCABULARY].mean(dim=0)
        torch.testing.assert_close(weight[VOCABULARY:], mean.expand(4, -1), rtol=0, atol=1e-3)


def test_both_new_tokens_get_a_row_where_the_old_vocabulary_ends_one_before_a_multiple_of_64(clip, tmp_path):
    folder = write_config(tmp_path, mm_vision_tower=str(clip), vocab_size=63)
    weights = without_tower(original(TINY["llava"].hugging_face()))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:3]])
    write_weights(folder, weights)
    model = FusedAutoModel.from_pretrained(folder)
    assert (model.config.image_token_id, model.config.pad_token_id) == (63, 64)
    assert len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == 128


def test_a_subfolder_is_the_checkpoints_not_the_towers(checkpoint):
    model = FusedAutoModel.from_pretrained(checkpoint.parent, subfolder=checkpoint.name)
    equal(logits(model, inputs()), logits(hugging_face(), inputs()))


def test_a_plan_holds_and_the_model_saved_under_it_loads_as_a_fused_one(checkpoint, tmp_path):
    model = FusedAutoModel.from_pretrained(checkpoint, stages={"enter": 2, "exit": 4})
    staged = logits(model, inputs())
    assert not torch.allclose(staged, logits(hugging_face(), inputs()))
    model.save_pretrained(tmp_path)
    for load in (FusedAutoModel.from_pretrained, AutoModelForImageTextToText.from_pretrained):
        again, report = load(tmp_path, output_loading_info=True)
        assert complete(report)
        assert again.config.stages["enter"] == 2
        equal(logits(again, inputs()), staged)


def test_keyword_arguments_of_from_pretrained_work(checkpoint):
    model = FusedAutoModel.from_pretrained(
        checkpoint, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu", schedule="fastv"
    )
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert type(model.schedule).__name__ == "FastV"
    model.set_attn_implementation("sdpa")
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_dtype_is_the_configs_unless_another_is_given(clip, tmp_path):
    folder = write_config(tmp_path, mm_vision_tower=str(clip), torch_dtype="float16")
    write_weights(folder, without_tower(original(TINY["llava"].hugging_face())))
    for given, expected in (({}, torch.float16), ({"dtype": "float32"}, torch.float32)):
        model = FusedAutoModel.from_pretrained(folder, **given)
        assert {weight.dtype for weight in model.parameters()} == {expected}


@pytest.mark.parametrize("kind", ["llava_llama", "llava_mistral"])
def test_the_text_model_follows_the_model_type(kind, clip, tmp_path):
    rope = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    folder = write_config(tmp_path, mm_vision_tower=str(clip), model_type=kind, sliding_window=None, **rope)
    write_weights(folder, without_tower(original(TINY["llava"].hugging_face())))
    text = FusedAutoModel.from_pretrained(folder).config.text_config
    assert text.model_type == kind.removeprefix("llava_")
    assert [text.rope_parameters[name] for name in ("rope_theta", "rope_type", "factor")] == [5e5, "linear", 2.0]


@pytest.mark.parametrize("has_head", [True, False])
def test_embeddings_are_tied_where_the_file_has_no_head_whatever_the_flag_says(has_head, clip, tmp_path):
    folder = write_config(tmp_path, mm_vision_tower=str(clip), tie_word_embeddings=has_head)
    weights = without_tower(original(TINY["llava"].hugging_face()))
    head = weights["lm_head.weight"] if has_head else weights["model.embed_tokens.weight"]
    write_weights(folder, {name: weight for name, weight in weights.items() if has_head or "lm_head" not in name})
    model = FusedAutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "fused")
    for loaded in (model, FusedAutoModel.from_pretrained(tmp_path / "fused")):
        equal(loaded.lm_head.weight[:VOCABULARY].detach(), head)
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is not has_head


def test_every_patch_with_the_class_token(clip, tmp_path):
    folder = write_config(tmp_path, mm_vision_tower=str(clip), mm_vision_select_feature="cls_patch")
    write_weights(folder, without_tower(original(TINY["llava"].hugging_face())))
    model = FusedAutoModel.from_pretrained(folder)
    assert model.config.image_seq_length == 5
    pixels = inputs()["pixel_values"]
    found = model.model.get_image_features(pixels).pooler_output
    full = hugging_face(vision_feature_select_strategy="full")
    equal(torch.cat(list(found)), torch.cat(list(full.model.get_image_features(pixels).pooler_output)))


def test_tiles_of_llava_1_6_are_llava_next(clip, tmp_path):
    source = TINY["llava_next"].hugging_face()
    text = {"model_type": "llava_mistral", "head_dim": 8, "sliding_window": 11}
    tiles = {**ANYRES, "image_grid_pinpoints": source.config.image_grid_pinpoints}
    folder = write_config(tmp_path, mm_vision_tower=str(clip), **text, **tiles)
    write_weights(folder, original(source))
    model, report = FusedAutoModel.from_pretrained(folder, output_loading_info=True)
    assert complete(report)
    assert model.config.model_type == "fused_llava_next"
    batch = inputs("llava_next")
    equal(logits(model, batch), logits(hugging_face("llava_next"), batch))


# -- SigLIP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["inside", "inside, whole", "apart"])
def test_a_siglip_tower_gives_every_patch_before_its_last_layer(place, tmp_path, caplog):
    torch.manual_seed(0)
    config = SiglipVisionConfig(**{**SIGLIP, "num_hidden_layers": 3, "vision_use_head": True})
    tower = SiglipVisionModel(config).eval()
    tower.save_pretrained(tmp_path / "siglip")
    folder = write_config(tmp_path / "original", mm_vision_tower=str(tmp_path / "siglip"))
    weights = without_tower(original(TINY["llava"].hugging_face()))
    if place != "apart":  # LLaVA's code deletes the last layer and the head; some forks keep them
        kept = {
            n: w
            for n, w in tower.state_dict().items()
            if "whole" in place or not n.startswith(("encoder.layers.2", "head"))
        }
        weights |= {f"model.vision_tower.vision_tower.vision_model.{name}": weight for name, weight in kept.items()}
    write_weights(folder, weights)
    model, report = FusedAutoModel.from_pretrained(folder, output_loading_info=True)
    assert complete(report)
    assert "LOAD REPORT" not in caplog.text
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = tower.embeddings(pixels)
        for layer in tower.encoder.layers[:2]:
            hidden = layer(hidden, attention_mask=None)
        expected = model.model.multi_modal_projector(hidden)
        found = model.model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(torch.cat(list(found)), expected.flatten(0, 1), rtol=0, atol=1e-6)


# -- MobileVLM v2 --------------------------------------------------------------------------------------------------


class PaperProjector(nn.Module):
    """LDPv2 as the paper draws it, with the names of its sources' weights."""

    def __init__(self, inner, width):
        super().__init__()
        self.mlp, self.peg = nn.Module(), nn.Module()
        self.mlp.mlp = nn.Sequential(nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width))
        self.peg.peg = nn.Sequential(nn.Conv2d(width, width, 3, stride=1, padding=1, groups=width, bias=True))

    def forward(self, patches):
        tokens = self.mlp.mlp(patches)
        grid = tokens.permute(0, 2, 1).reshape(len(tokens), -1, 24, 24)
        pooled = nn.functional.adaptive_avg_pool2d(grid, (12, 12))
        return (self.peg.peg(pooled) + pooled).flatten(2).transpose(1, 2)


def test_mobilevlm_v2_computes_the_papers_projector_on_the_mapped_weights(tmp_path):
    vision = {**CLIP, "image_size": 48, "patch_size": 2}  # 24 x 24 patches, 144 tokens
    fields = {**TINY["mobilevlm"].fields, "vision_config": vision, "token_grid": 12}
    source = Tiny("mobilevlm", fields, without_markers(144), square(48, 48)).hugging_face()
    source.model.vision_tower.save_pretrained(tmp_path / "clip")
    folder = write_config(tmp_path / "original", mm_vision_tower=str(tmp_path / "clip"), **MOBILE_FIELDS)
    weights = original(source, MOBILE)
    write_weights(folder, weights, "bin")
    model, report = FusedAutoModel.from_pretrained(folder, output_loading_info=True, stages={"enter": 2, "exit": 4})
    assert complete(report)
    assert type(model).__name__ == "FusedMobileVLMForConditionalGeneration"
    assert model.config.image_seq_length == 144
    paper, start = PaperProjector(16, 32), "model.mm_projector."
    paper.load_state_dict({n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)})
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patches = source.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        found = torch.stack(list(model.model.get_image_features(pixels).pooler_output))
        torch.testing.assert_close(found, paper(patches), rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "fused")
    saved = load_file(tmp_path / "fused/model.safetensors")
    equal(saved["model.multi_modal_projector.positions.weight"], weights["model.mm_projector.peg.peg.0.weight"])
    assert complete(FusedAutoModel.from_pretrained(tmp_path / "fused", output_loading_info=True)[1])


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "llava_mpt"},
            "model_type: got llava_mpt, expected llava or llava_llama or llava_mistral or mob",
        ),
        ({"model_type": "llava_qwen"}, "model_type: got llava_qwen, expected llava"),
        ({"mm_projector_type": "linear"}, "mm_projector_type: got linear, expected mlp2x_gelu"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type: got mlp3x_gelu, expected mlp2x_gelu"),
        ({"mm_projector_type": None}, "mm_projector_type: got None, expected mlp2x_gelu"),
        ({**MOBILE_FIELDS, "mm_projector_type": "ldpnet"}, "mm_projector_type: got ldpnet, expected ldpnetv2"),
        ({**MOBILE_FIELDS, **ANYRES}, "image_aspect_ratio: got anyres, expected square or pad"),
        ({**MOBILE_FIELDS, "mm_vision_select_feature": "cls_patch"}, "got cls_patch, expected patch"),
        ({"mm_vision_select_feature": "slicefour_patch"}, "got slicefour_patch, expected patch or cls_patch"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end: got True, expected False"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type: got qformer, expected"),
        ({"s2": True}, "s2: got True, expected False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: got {'bits': 4}, expected"),
        ({"image_aspect_ratio": "anyres_max_9"}, "got anyres_max_9, expected square or pad or anyres"),
        ({**ANYRES, "mm_patch_merge_type": "flat"}, "mm_patch_merge_type: got flat, expected spatial_unpad"),
        ({**ANYRES, "image_grid_pinpoints": None}, "image_grid_pinpoints: got None, expected a value of type list"),
        ({"mm_vision_tower": None}, "mm_vision_tower: got None, expected a value of type str"),
        ({"mm_vision_select_layer": [-2, -5]}, "mm_vision_select_layer: got [-2, -5], expected a value of type int"),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else "",
)
def test_what_config_json_names_and_cannot_be_loaded_is_one_line_before_anything_is_read(fields, message, tmp_path):
    folder = write_config(tmp_path, **{"mm_vision_tower": "nobody/has-this-tower", **fields})
    with pytest.raises(UnsupportedModelError) as caught:
        FusedAutoModel.from_pretrained(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tower", "fields", "message"),
    [
        ({"model_type": "dinov2"}, {}, "of type dinov2, expected clip or siglip"),
        ({}, {}, "of type None, expected clip or siglip"),
        (SIGLIP, MOBILE_FIELDS, "of type siglip_vision_model, expected clip"),
        (SIGLIP, ANYRES, "of type siglip_vision_model, expected clip"),
        (SIGLIP, {"mm_vision_select_layer": -1}, "mm_vision_select_layer: got -1, expected -2 with a siglip tower"),
        (CLIP, {"mm_hidden_size": 48}, "mm_hidden_size: got 48, expected 16, the width of"),
    ],
)
def test_a_tower_of_another_kind_is_refused_by_its_config(tower, fields, message, tmp_path):
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower/config.json").write_text(json.dumps(tower))
    folder = write_config(tmp_path / "original", mm_vision_tower=str(tmp_path / "tower"), **fields)
    with pytest.raises(UnsupportedModelError) as caught:
        FusedAutoModel.from_pretrained(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/a/path/of/another/machine", "nobody/has-this-tower"])
def test_a_tower_that_cannot_be_reached_is_named_in_one_line(name, tmp_path):
    folder = write_config(tmp_path, mm_vision_tower=name)
    with pytest.raises(OSError, match=f"config.json: mm_vision_tower: config of {name} cannot be read") as caught:
        FusedAutoModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_plan_beyond_the_decoder_is_refused_before_weights_are_read(clip, tmp_path):
    folder = write_config(tmp_path, mm_vision_tower=str(clip))
    with pytest.raises(ValueError, match=r"stages.exit: got 9, beyond the decoder's 6 layers"):
        FusedAutoModel.from_pretrained(folder, stages={"enter": 2, "exit": 9})


def test_weights_that_are_not_a_whole_model_are_refused(clip, tmp_path):
    folder = write_config(tmp_path, mm_vision_tower=str(clip))
    torch.save({}, folder / "mm_projector.bin")  # what LLaVA's pre-training leaves
    with pytest.raises(UnsupportedModelError, match=r"got no weights of a whole model, expected model.safetensors or"):
        FusedAutoModel.from_pretrained(folder)
    weights = without_tower(original(TINY["llava"].hugging_face()))
    write_weights(folder, {**weights, "model.vision_resampler.query": torch.ones(2)})
    with pytest.raises(UnsupportedModelError, match=r"got a weight model.vision_resampler.query, expected those of"):
        FusedAutoModel.from_pretrained(folder)
    write_weights(folder, {name: weight for name, weight in weights.items() if "mm_projector.2" not in name})
    with pytest.raises(ValueError, match=r"no weights for model.multi_modal_projector.linear_2.bias .2 missing"):
        FusedAutoModel.from_pretrained(folder)


def test_the_class_itself_and_a_config_beside_the_checkpoint_say_what_to_do(checkpoint):
    with pytest.raises(UnsupportedModelError, match=r"original format.*FusedAutoModel.from_pretrained loads both"):
        FusedLlavaForConditionalGeneration.from_pretrained(checkpoint)
    config = FusedAutoModel.from_pretrained(checkpoint).config
    with pytest.raises(ValueError, match="config: got one, expected None"):
        FusedAutoModel.from_pretrained(checkpoint, config=config)
