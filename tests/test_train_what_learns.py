"""What a recipe lets learn, and by which optimizer, in whole runs."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.schema import Recipe, RecipeError
from train.checks import check_run

pytestmark = pytest.mark.usefixtures("untrained")


@pytest.fixture
def _eager():
    with torch._dynamo.config.patch(disable=True):  # compiling takes longer than the run
        yield


def moved(output):
    """Returns the names of the weights that a run changed."""
    before, after = (load_file(output / folder / "model.safetensors") for folder in ("init", "final"))
    assert before.keys() == after.keys()
    return {name for name, weight in after.items() if not torch.equal(weight, before[name])}


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("_eager")
def test_muon_and_noise_in_named_layers(train_here, tiny_recipe):
    rates = {"projector": None, "vision_tower": None, "language_model": 1e-2}
    given = {"learning_rate": rates, "layers": [1, 3], "warmup_ratio": 0.0}
    muon = train_here(tiny_recipe("muon", optimizer="muon", max_grad_norm=None, max_steps=8, **given))
    assert {name.partition(".layers.")[2][:1] for name in moved(muon)} == {"1", "2"}
    assert {name.rpartition(".layers.")[2][2:] for name in moved(muon)} >= {
        "self_attn.q_proj.weight",  # Muon's
        "input_layernorm.weight",  # Adam's
    }
    assert sum(losses(muon)[-3:]) < 0.9 * sum(losses(muon)[:3])
    noisy = train_here(tiny_recipe("noisy", neftune=50.0, max_steps=1, **given))
    assert abs(losses(noisy)[0] - losses(muon)[0]) > 1e-3
    start, end = (load_file(muon / folder / "model.safetensors") for folder in ("init", "final"))
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    size = (end[name] - start[name]).square().mean().sqrt()
    assert 0.2 * 1e-2 < size < 8 * 0.2 * 1e-2 * 1.1  # 8 updates, each of 0.2 times the rate or less


def test_adapters_on_every_part_and_its_last_tower_layer(train_here, tiny_recipe):
    lora = {"r": 4, "alpha": 8.0, "parts": ["language_model", "projector"], "layers": "window", "dora": True}
    output = train_here(
        tiny_recipe("parts", lora=lora, tower_layers=2, optimizer="sgd", max_steps=2, max_grad_norm=9.0)
    )
    names = moved(output)
    assert {name.partition("model.layers.")[2][:1] for name in names if name.startswith("language")} == {"1", "2"}
    assert "multi_modal_projector.linear_1.weight" in names
    assert "multi_modal_projector.linear_1.bias" not in names  # the projector's adapters learn, not its weights
    assert any("vision_tower" in name and "layers.0." in name for name in names)
    assert not any("embeddings" in name for name in names if "vision_tower" in name)


def test_what_the_recipe_decides_may_be_left_out_of_the_deepspeed_file(train_here, tiny_recipe, tmp_path):
    """Clipping and accumulation are the recipe's then too."""
    config = json.loads(Path("recipes/deepspeed/zero2.json").read_text())
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config.pop(key, None)
    del config["gradient_clipping"]
    (tmp_path / "short.json").write_text(json.dumps(config))
    given = {"optimizer": "sgd", "max_grad_norm": 0.001, "per_device_batch": 1, "max_steps": 3}
    given["learning_rate"] = {"projector": 1.0, "vision_tower": None, "language_model": 1.0}
    whole = train_here(tiny_recipe("whole", **given))
    short = train_here(tiny_recipe("short", deepspeed=str(tmp_path / "short.json"), **given))
    assert losses(short) == losses(whole)
    assert moved(short)


def test_a_tracker_by_name(train_here, tiny_recipe):
    event_file_loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_file_loader", reason="TensorBoard is no dependency"
    )
    output = train_here(tiny_recipe("board", tracker="tensorboard", max_steps=2) | {"eval": {"share": 0.1}})
    (file,) = (output / "tensorboard").glob("events*")
    names = {v.tag for event in event_file_loader.EventFileLoader(str(file)).Load() for v in event.summary.value}
    assert {"train/loss", "train/tokens_per_second", "eval/loss"} <= names


@pytest.mark.parametrize(("tracker", "others"), [("tensorboard", "wandb or none"), ("wandb", "tensorboard or none")])
def test_a_tracker_that_is_not_installed_is_refused(tracker, others, tiny_recipe, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tracker else found(name))
    recipe, align = tiny_recipe("refused"), tiny_recipe("refused")
    for key, changed in (("align.train.tracker", align), ("train.tracker", recipe)):
        recipe["train"]["tracker"] = "none"
        changed["train"]["tracker"] = tracker
        whole = recipe | {"align": {"data": align["data"], "train": align["train"]}}
        with pytest.raises(RecipeError, match=rf"^{key}: got {tracker}, which is not installed; expected {others}"):
            check_run(Recipe.model_validate(whole), 1)
        align["train"].pop("tracker", None)  # from here on, align has the recipe's


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"layers": [1, 5]}, "train.layers: got 5, expected at most 4"),
        ({"tower_layers": 3}, "train.tower_layers: got 3, expected at most 2"),
        ({"optimizer": "adamw_8bit"}, "train.optimizer: got adamw_8bit, expected adamw_torch_fused here"),
        ({"lora": {"r": 4, "alpha": 8.0, "bits": 4}}, "train.lora.bits: got 4, expected null here: it needs an NVIDIA"),
        ({"lora": {"r": 33, "alpha": 8.0}}, "train.lora.r: got 33, expected at most 32"),
        (
            {"optimizer": "muon", "max_grad_norm": None, "deepspeed": "recipes/deepspeed/zero3.json"},
            "reduce_scatter: got true, expected false",
        ),
        ({"optimizer": "sgd", "deepspeed": "recipes/deepspeed/zero3_offload.json"}, "offload_optimizer: got one with"),
        (
            {"optimizer": "muon", "max_grad_norm": None, "deepspeed": "params.json"},
            "offload_param: got one with train.op",
        ),
        ({"precision": "fp16"}, "train.precision: got fp16, expected"),
    ],
)
def test_what_cannot_learn_here_is_refused(tiny_recipe, monkeypatch, tmp_path, train, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if train.get("deepspeed") == "params.json":  # which makes the optimizer DeepSpeed's, as that of the states does
        config = json.loads(Path("recipes/deepspeed/zero3_offload.json").read_text())
        del config["zero_optimization"]["offload_optimizer"]
        config["zero_optimization"]["reduce_scatter"] = False
        (tmp_path / "params.json").write_text(json.dumps(config))
        train = {**train, "deepspeed": str(tmp_path / "params.json")}
    with pytest.raises(RecipeError, match=message):
        check_run(Recipe.model_validate(tiny_recipe("refused", **train)), 1)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"layers": [3, 3]}, "expected .first, end. with 0 <= first < end"),
        ({"layers": [0, 2], "lora": {"r": 4}}, "got layers with adapters there: lora.layers, expected layers null"),
        ({"lora": {"bits": 4, "parts": ["projector"]}}, "bits: got 4 without adapters on the language model"),
        ({"lora": {"layers": []}}, "layers: got an empty list"),
        (
            {"lora": {"layers": "window", "parts": ["vision_tower"]}},
            "layers: got window without adapters on the langua",
        ),
        ({"optimizer": "adafactor"}, "optimizer"),
        ({"profile": {"steps": [3, 2]}}, r"steps: got \[3, 2\], expected \[first, last\] with 1 <= first"),
        ({"optimizer": "muon"}, "got max_grad_norm 1 with muon, expected null"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(tiny_recipe, train, message):
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(tiny_recipe("refused", **train))


def test_a_part_without_a_rate_has_neither_adapters_nor_layers(tiny_recipe):
    for key, value in (("lora", {"r": 4, "parts": ["vision_tower"]}), ("tower_layers", 1)):
        recipe = tiny_recipe("refused", **{key: value})
        recipe["train"]["learning_rate"]["vision_tower"] = None
        with pytest.raises(ValueError, match=r"learning_rate.vision_tower null, expected"):
            Recipe.model_validate(recipe)
