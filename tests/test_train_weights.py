"""The form of a checkpoint on the disk: published names, and an ordinary LLaVA where the model is dense."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from models import FusedLlavaForConditionalGeneration
from recipes.schema import ModelSection
from train.weights import load_checkpoint, read_config, save_model

# Some of the names in llava-hf/llava-1.5-7b-hf's safetensors files.
PUBLISHED = (
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "language_model.model.norm.weight",
    "multi_modal_projector.linear_1.bias",
    "vision_tower.vision_model.embeddings.class_embedding",
    "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight",
    "vision_tower.vision_model.pre_layrnorm.weight",
)


def type_of(folder):
    config = json.loads((folder / "config.json").read_text())
    return config["model_type"], config["architectures"], config.get("stages")


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_weights_have_the_published_names_and_come_back(make_model, make_batch, tmp_path):
    model = make_model("llama", {"enter": 1, "exit": 4})
    save_model(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert set(PUBLISHED) <= names
    assert len(names) == len(model.state_dict())
    assert all(name.split(".")[0] in ("language_model", "multi_modal_projector", "vision_tower") for name in names)
    assert type_of(tmp_path)[:2] == ("fused_llava", ["FusedLlavaForConditionalGeneration"])
    found = load_checkpoint(tmp_path, dtype=torch.float32)
    assert found.config.stages == model.config.stages
    batch = make_batch("ttIttt")
    assert torch.equal(logits(found, batch), logits(model, batch))


@pytest.mark.parametrize("kind", [LlavaForConditionalGeneration, AutoModelForImageTextToText])
def test_a_dense_checkpoint_is_an_ordinary_llava(make_model, make_batch, tmp_path, kind):
    model = make_model("llama")
    save_model(model, tmp_path)
    assert type_of(tmp_path) == ("llava", ["LlavaForConditionalGeneration"], None)
    found, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert type(found) is LlavaForConditionalGeneration
    assert not any(report.values())
    batch = make_batch("ttIttt", "tItItt")
    text = batch["input_ids"] != model.config.image_token_id
    torch.testing.assert_close(logits(found, batch)[text], logits(model, batch)[text])
    assert torch.equal(logits(load_checkpoint(tmp_path, dtype=torch.float32), batch), logits(model, batch))


def test_tied_embeddings_are_written_once(make_config, make_batch, tmp_path):
    config = make_config("llama")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = FusedLlavaForConditionalGeneration(config)
    save_model(model, tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    batch = make_batch("ttIttt")
    assert torch.equal(logits(load_checkpoint(tmp_path, dtype=torch.float32), batch), logits(model, batch))


def test_weights_that_share_a_storage_are_written_alone(make_model, tmp_path):
    """As ZeRO-3 gathers them: views of one long tensor."""
    model = make_model("llama")
    weights = model.state_dict()
    flat = torch.cat([weight.reshape(-1).float() for weight in weights.values()])
    places = torch.tensor([0, *(weight.numel() for weight in weights.values())]).cumsum(0).tolist()
    views = {
        name: flat[start : start + weight.numel()].view(weight.shape)
        for (name, weight), start in zip(weights.items(), places, strict=False)
    }
    save_model(model, tmp_path / "views", weights=views)
    save_model(model, tmp_path / "own")
    own, found = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "views"))
    assert own.keys() == found.keys()
    assert all(torch.equal(own[name], found[name]) for name in own)


@pytest.mark.parametrize("stages", [None, {"enter": 1, "exit": 4}])
def test_a_base_that_answers_under_a_pruner_is_trained_under_the_recipes_plan(make_model, tmp_path, stages):
    model = make_model("llama")
    model.config.schedule = {"name": "fastv", "layer": 2}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["schedule"]["name"] == "fastv"
    config = read_config(ModelSection(checkpoint=str(tmp_path), stages=stages))
    assert config.schedule is None
    assert (config.stages is None) == (stages is None)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.9, "top_p": 0.6, "do_sample": False},  # vicuna-7b-v1.5
        {"temperature": 0.9, "top_p": 0.6},
        {"top_k": 1, "length_penalty": 2.0, "pad_token_id": -1},
    ],
)
@pytest.mark.parametrize("stages", [None, {"enter": 1, "exit": 4}])
def test_settings_of_generation_without_effect_do_not_stop_a_run(make_model, tmp_path, given, stages):
    make_model("llama", stages).save_pretrained(tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps({"eos_token_id": 2, **given}))
    model = load_checkpoint(tmp_path / "base", dtype=torch.float32)
    save_model(model, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert saved["eos_token_id"] == 2
    assert not given.keys() & saved.keys() - {"do_sample"}


def test_settings_of_generation_with_effect_are_kept(make_model, tmp_path):
    model = make_model("llama")
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9)
    save_model(model, tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.7, 0.9)
