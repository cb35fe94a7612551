"""What --check says of memory and FLOPs, against what tiny models take."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig

from models import FusedLlavaConfig, FusedLlavaForConditionalGeneration
from recipes.errors import RecipeError
from recipes.schema import LearningRates, Lora, load_recipe
from train.adapters import add_adapters
from train.cards import Card, parse_card
from train.estimate import Batch, Estimate
from train.groups import freeze

SAMPLES, TEXT, VISUAL, WIDTH = 4, 64, 144, 128
WINDOW, KV = {"enter": 2, "exit": 4}, {"layers": [0, 3], "update": "kv"}
ADAPTERS = Lora(r=8, alpha=16.0, dropout=0.05)


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def small(stages):
    text = {"hidden_size": WIDTH, "intermediate_size": 344, "num_hidden_layers": 6, "num_attention_heads": 4}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return FusedLlavaConfig(
        text_config=LlamaConfig(vocab_size=1000, **text),
        vision_config=CLIPVisionConfig(image_size=96, patch_size=8, **vision),
        image_token_index=999,
        image_seq_length=VISUAL,
        stages=stages,
    )


def trained(*, learns=True, **more):
    rates = LearningRates(projector=1e-3, vision_tower=None, language_model=1e-3 if learns else None)
    given = {"precision": "fp32", "learning_rate": rates, **more}
    return load_recipe("recipes/quickstart.yaml").train.model_copy(update=given)


def inputs(config):
    ids = torch.randint(0, 990, (SAMPLES, TEXT + VISUAL))
    ids[:, 1 : VISUAL + 1] = config.image_token_id
    labels = ids.clone()
    labels[:, : VISUAL + 2] = -100
    pixels = torch.randn(SAMPLES, 3, 96, 96)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def peak(run):
    """Returns the most bytes that a function has at one time, of those that it allocates."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("stages", "learns", "lora"),
    [(None, True, None), (WINDOW, True, None), (WINDOW, True, ADAPTERS), (WINDOW, False, None), (KV, True, None)],
)
def test_activations_are_within_15_per_cent_of_the_measured_peak(stages, learns, lora, checkpointing):
    config, train = small(stages), trained(learns=learns, lora=lora)
    torch.manual_seed(0)
    model = FusedLlavaForConditionalGeneration(config)
    model = model if lora is None else add_adapters(model, lora)
    freeze(model, train)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    given = inputs(config)

    def two_passes():  # in the second, gradients of the first are there, as under accumulation
        for _ in range(2):
            model.train()(**given).loss.backward()

    estimate = Estimate(config, train)
    expected = estimate.activations(Batch(SAMPLES, VISUAL, TEXT), checkpointing=checkpointing) + 4 * estimate.trained
    assert expected == pytest.approx(peak(two_passes), rel=0.15)


@pytest.mark.parametrize(("learns", "lora", "passes"), [(True, None, 3), (False, None, 2), (True, ADAPTERS, 2)])
def test_model_flops_are_those_that_torch_counts(learns, lora, passes):
    config, train = small(WINDOW), trained(learns=learns, lora=lora)
    model, given = FusedLlavaForConditionalGeneration(config), inputs(config)
    labels = int((given["labels"] != -100).sum())
    model.set_attn_implementation("eager")  # whose products torch counts
    with torch.no_grad(), FlopCounterMode(display=False) as image:
        model.model.get_image_features(pixel_values=given["pixel_values"])
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        model(**given)
    forward, tower = whole.get_total_flops() - image.get_total_flops(), image.get_total_flops()
    found = Estimate(config, train).step_flops(Batch(SAMPLES, VISUAL, TEXT), labels=labels)
    assert found == pytest.approx(passes * forward + tower, rel=0.02)
    sums = {"samples": SAMPLES, "tokens": SAMPLES * (TEXT + VISUAL), "visual": SAMPLES * VISUAL}
    sums |= {"image_labels": labels, "text_labels": 0}
    assert Estimate(config, train).window_flops(sums) == found


def states(train, *, stage=2, ranks=4, **zero):
    return Estimate(small(WINDOW), train).states({"zero_optimization": zero}, stage=stage, ranks=ranks)


def test_weights_gradients_and_optimizer_follow_zeros_rules():
    bucket = {"reduce_bucket_size": 1000}
    whole = Estimate(small(WINDOW), trained())
    half = trained(precision="bf16")
    one, two, three = (states(half, stage=stage, **bucket) for stage in (1, 2, 3))
    assert (one.weights, one.gradients) == (2 * whole.weights, 2 * whole.trained)
    assert one.optimizer == 12 * whole.trained / 4  # a float32 copy and Adam's two moments
    assert (two.weights, two.gradients, two.optimizer) == (one.weights, one.gradients / 4, one.optimizer)
    assert (three.weights, three.gradients) == (one.weights / 4, two.gradients)
    assert (two.buffers, three.buffers) == (4000, 4000 + 2 * whole.weights)
    assert states(half, stage=3, stage3_max_live_parameters=10, **bucket).buffers == 4000 + 20
    assert two.total == two.weights + two.gradients + two.optimizer + two.buffers
    moved = states(half, stage=3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}, **bucket)
    assert (moved.weights, moved.optimizer) == (0, 0)
    assert states(half.model_copy(update={"optimizer": "adamw_8bit"})).optimizer == 6 * whole.trained / 4
    assert states(half.model_copy(update={"optimizer": "sgd"})).optimizer == 4 * whole.trained / 4
    lora = trained(precision="bf16", lora=ADAPTERS)
    assert states(lora).gradients < 0.2 * two.gradients
    quantized = trained(precision="bf16", lora=ADAPTERS.model_copy(update={"bits": 4}))
    decoder = 6 * (4 * WIDTH * WIDTH + 3 * WIDTH * 344)  # Linear weights
    assert states(lora).weights - states(quantized).weights == 1.5 * decoder


def test_cards_by_name_number_and_memory():
    assert parse_card("8xH100", count=1) == Card(8, 80, 989e12)
    assert parse_card("rtx 4090", count=2) == Card(2, 24, 165e12)
    assert parse_card("24", count=4) == Card(4, 24, None)
    for wrong in ("0xH100", "H99", "8x", "0", ""):
        with pytest.raises(RecipeError, match=f"--gpu: got '{wrong}', expected GB such as 24, or one of B200"):
            parse_card(wrong, count=1)
