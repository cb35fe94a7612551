from pathlib import Path

import pytest
import torch
from torch import nn

from models import FusedAutoModel, FusedLlavaForConditionalGeneration
from recipes.schema import LearningRates, Lora, RecipeError, load_recipe
from tests.tiny_vlms import TINY
from train.errors import TrainingError
from train.parameters import adapted_layers, add_adapters, freeze, layer_of, merged, trainable_counts
from train.weights import load_checkpoint

LORA = Lora(r=2, alpha=4.0, dropout=0.0)


@pytest.fixture
def adapted(make_model):
    return add_adapters(make_model("llama", {"enter": 1, "exit": 4}), LORA)


def test_adapters_sit_on_every_linear_layer_of_the_decoder_alone(adapted, make_model):
    decoder = make_model("llama").model.language_model
    linear = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    adapters = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(linear) > 0
    assert all("language_model.layers" in name for name in adapters)


def test_only_adapters_of_the_decoder_learn_and_the_whole_projector(adapted):
    rates = LearningRates(projector=1e-3, vision_tower=None, language_model=1e-3)
    quickstart = Path(__file__).resolve().parents[1] / "recipes/quickstart.yaml"
    freeze(adapted, load_recipe(quickstart).train.model_copy(update={"learning_rate": rates, "lora": LORA}))
    learning = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or "multi_modal_projector" in name for name in learning)
    counts = trainable_counts(adapted)
    assert counts["vision_tower"] == 0
    projector = adapted.base_model.model.model.multi_modal_projector
    assert counts["projector"] == sum(weight.numel() for weight in projector.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": ["w_proj"]}, r"lora.modules: got 'w_proj', expected down_proj, gate_proj, k_proj, .*, v_proj"),
        ({"layers": [0, 6]}, "lora.layers: got 6, expected numbers from 0 to 5"),
        ({"layers": "window"}, r"got window with model.stages null"),
        (
            {"parts": ["projector", "language_model"], "modules": ["q_proj"]},
            r"lora.modules: got none of projector, expected one of linear_1, linear_2",
        ),
    ],
)
def test_adapters_that_have_no_place_are_refused(make_model, options, message):
    with pytest.raises(RecipeError, match=message):
        add_adapters(make_model("llama"), LORA.model_copy(update=options))


def test_a_part_without_a_linear_layer_has_no_adapters_and_would_not_learn():
    """Gemma 3's projector is one matrix of its own."""
    model = FusedAutoModel.from_config(TINY["gemma3"].config())
    with pytest.raises(RecipeError, match=r"lora.parts: got projector, which has no Linear layer in this model"):
        add_adapters(model, LORA.model_copy(update={"parts": ["language_model", "projector"]}))


def test_adapters_sit_where_the_recipe_says(make_model):
    parts = ["language_model", "vision_tower", "projector"]
    given = Lora(r=2, alpha=4.0, parts=parts, modules=["q_proj", "v_proj", "linear_1"], layers="window")
    model = add_adapters(make_model("llama", {"enter": 1, "exit": 4}), given)
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    layers = [f"language_model.layers.{layer}.self_attn" for layer in (1, 2, 3)]
    layers += [f"vision_tower.encoder.layers.{layer}.self_attn" for layer in (0, 1)]
    wanted = {f"{layer}.{name}" for layer in layers for name in ("q_proj", "v_proj")}
    assert {name.partition(".model.model.")[2] for name in adapted} == wanted | {"multi_modal_projector.linear_1"}
    kv = make_model("llama", {"layers": [0, 5], "update": "kv"})
    some = add_adapters(kv, Lora(r=2, alpha=4.0, layers="window"))
    assert {layer_of(name) for name, _ in some.named_parameters() if "lora_A" in name} == {0, 5}


def test_the_window_of_several_plans_is_every_layer_that_one_of_them_sees(make_config):
    lora = Lora(r=2, alpha=4.0, layers="window")
    config = make_config("llama")
    config.plans = {"none": None, "early": {"enter": 0, "exit": 2}, "late": {"layers": [1, 5], "update": "kv"}}
    layers = {layer_of(name) for name in adapted_layers(FusedLlavaForConditionalGeneration(config), lora)}
    assert layers == {0, 1, 5}
    config.plans = {"one": None, "other": None}
    with pytest.raises(RecipeError, match=r"got window with no plan in model.stages but dense ones, expected all"):
        adapted_layers(FusedLlavaForConditionalGeneration(config), lora)


VARIANTS = [{}, {"dora": True}, {"rslora": True, "parts": ["language_model", "vision_tower", "projector"]}]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_model_gives_the_adapted_model_s_logits(make_model, make_batch, tmp_path, variant):
    lora = LORA.model_copy(update=variant)
    model = make_model("llama", {"enter": 1, "exit": 4})
    model.save_pretrained(tmp_path)
    adapted = add_adapters(model, lora).eval()
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.2)
    learned = {name: weight.detach() for name, weight in adapted.named_parameters() if "lora_" in name}
    batch = make_batch("ttIttt")
    whole = merged(learned, lora, initial=tmp_path, dtype=torch.float32)
    assert not any("lora" in name for name in whole.state_dict())
    with torch.no_grad():
        found, expected = (one(**batch).logits for one in (whole, adapted))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(found, make_model("llama", {"enter": 1, "exit": 4})(**batch).logits, atol=1e-2)
    with pytest.raises(TrainingError, match=r"odd.lora_A.weight has no place"):
        merged({"odd.lora_A.weight": torch.zeros(2)}, lora, initial=tmp_path, dtype=torch.float32)


def test_qlora_keeps_the_decoder_alone_in_four_bits_and_merges_into_the_whole_weights(quickstart_run):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which is no dependency")
    initial = quickstart_run / "final"
    model = load_checkpoint(initial, dtype=torch.bfloat16, bits=4)
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert quantized == {name for name in linear if name.startswith("model.language_model.layers")} < linear
    adapted = add_adapters(model, LORA)
    ids = torch.arange(3, 13)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()
    learned = {name: weight.detach() for name, weight in adapted.named_parameters() if "lora_" in name}
    assert all(weight.grad is not None for name, weight in adapted.named_parameters() if "lora_" in name)
    whole = merged(learned, LORA, initial=initial, dtype=torch.bfloat16)
    assert not any(type(module).__name__ == "Linear4bit" for module in whole.modules())


def test_qlora_finds_a_decoder_of_another_name(tmp_path):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which is no dependency")
    FusedAutoModel.from_config(TINY["idefics3"].config()).save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path, dtype=torch.bfloat16, bits=4)
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert quantized == {name for name in linear if name.startswith("model.text_model.layers")} < linear
