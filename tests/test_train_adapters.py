import pytest
import torch
from torch import nn

from recipes.schema import LearningRates, Lora
from train.adapters import add_adapters, merged
from train.errors import TrainingError
from train.groups import freeze, trainable_counts

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
    freeze(adapted, LearningRates(projector=1e-3, vision_tower=None, language_model=1e-3), adapters=True)
    learning = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or "multi_modal_projector" in name for name in learning)
    counts = trainable_counts(adapted)
    assert counts["vision_tower"] == 0
    projector = adapted.base_model.model.model.multi_modal_projector
    assert counts["projector"] == sum(weight.numel() for weight in projector.parameters())


def test_the_merged_model_gives_the_adapted_model_s_logits(make_model, tmp_path):
    model = make_model("llama", {"enter": 1, "exit": 4})
    model.save_pretrained(tmp_path)
    adapted = add_adapters(model, LORA).eval()
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.2)
    learned = {name: weight.detach() for name, weight in adapted.named_parameters() if "lora_" in name}
    tokens = torch.arange(3, 13)[None]
    whole = merged(learned, LORA, initial=tmp_path, dtype=torch.float32)
    assert not any("lora" in name for name in whole.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            whole(input_ids=tokens).logits, adapted(input_ids=tokens).logits, rtol=1e-3, atol=1e-4
        )
    with pytest.raises(TrainingError, match=r"odd.lora_A.weight has no place"):
        merged({"odd.lora_A.weight": torch.zeros(2)}, LORA, initial=tmp_path, dtype=torch.float32)
