"""What --check says of memory and FLOPs, against what tiny models take."""

import gc
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig

from models import FusedAutoModel, FusedLlavaConfig, FusedLlavaForConditionalGeneration, StagePlan
from models.cost import plan_cost, search_cost, spread_flops
from models.schedules import AttentionSpread, Dense, Fused, Gated
from recipes.errors import RecipeError
from recipes.schema import (
    Distill,
    Learn,
    LearningRates,
    Lora,
    NamedPlan,
    Optimizer,
    Recipe,
    SparseAttention,
    load_recipe,
)
from train.arguments import read_deepspeed
from train.estimate import Batch, Card, Estimate, parse_card, peak_here
from train.parameters import add_adapters, freeze

SAMPLES, TEXT, VISUAL, WIDTH = 4, 64, 144, 128
WINDOW, KV = {"enter": 2, "exit": 4}, {"layers": [0, 3], "update": "kv"}
ADAPTERS = Lora(r=8, alpha=16.0, dropout=0.05)


pytestmark = pytest.mark.usefixtures("untrained")


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


def estimate_of(config, train):
    return Estimate(config, train, {"trained": NamedPlan(name="trained", plan=config.stages)})


def inputs(config):
    ids = torch.randint(0, 990, (SAMPLES, TEXT + VISUAL))
    ids[:, 1 : VISUAL + 1] = config.image_token_id
    labels = ids.clone()
    labels[:, : VISUAL + 2] = -100
    pixels = torch.randn(SAMPLES, 3, 96, 96)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def peak(run):
    """Returns the most bytes that a function has at one time, of those that it allocates."""
    gc.collect()  # what an earlier test left would be freed in the middle, and counted against this function
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

    estimate = estimate_of(config, train)
    expected = estimate.activations(Batch(SAMPLES, VISUAL, TEXT), checkpointing=checkpointing) + 4 * estimate.trained
    assert expected == pytest.approx(peak(two_passes), rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("what", ["search", "kv_search", "spread"])
def test_activations_of_a_search_and_of_a_measure_too(what, checkpointing):
    learn = None if what == "spread" else Learn(budget=0.34, steps=1, update="kv" if what == "kv_search" else "full")
    config = small(WINDOW if learn is None else None)
    train = trained(sparse_attention=SparseAttention(weight=1.0) if learn is None else None)
    torch.manual_seed(0)
    model, given = FusedLlavaForConditionalGeneration(config), inputs(config)
    freeze(model, train)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def two_passes():
        for _ in range(2):
            measure = AttentionSpread(model.schedule)
            gates = (
                None if learn is None else Gated(torch.full((6,), 0.5).requires_grad_(), torch.ones(6), learn.update)
            )
            loss = model.train()(**given, schedule=gates or measure).loss
            (loss if gates else loss + measure.mean()[0].sum()).backward()

    estimate = Estimate(config, train, {"trained": NamedPlan(name="trained", plan=config.stages)}, learn, 2)
    expected = estimate.activations(Batch(SAMPLES, VISUAL, TEXT), checkpointing=checkpointing) + 4 * estimate.trained
    assert peak(two_passes) == pytest.approx(expected, rel=0.15)


def test_the_flops_of_a_search_and_of_a_measure_are_those_that_torch_counts():
    config, size = small(WINDOW), {"visual": VISUAL, "text": TEXT}
    model, given = FusedLlavaForConditionalGeneration(config), inputs(config)
    model.set_attn_implementation("eager")

    def count(schedule):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**given, schedule=schedule)
        return counter.get_total_flops() / SAMPLES

    plan = StagePlan.from_dict(WINDOW)
    more = count(AttentionSpread(Fused(plan))) - count(Fused(plan))
    assert spread_flops(config.text_config, plan, **size) == pytest.approx(more, rel=0.1)
    for update in ("full", "kv"):
        found = count(Gated(torch.ones(6), torch.ones(6), update)) - count(Dense())
        dense = plan_cost(config.text_config, None, **size).flops
        assert search_cost(config.text_config, update, **size).flops - dense == pytest.approx(found, rel=0.02)


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
    found = estimate_of(config, train).step_flops(Batch(SAMPLES, VISUAL, TEXT), labels=labels)
    assert found == pytest.approx(passes * forward + tower, rel=0.02)
    sums = {"samples": SAMPLES, "tokens": SAMPLES * (TEXT + VISUAL), "visual": SAMPLES * VISUAL}
    sums |= {"image_labels": labels, "text_labels": 0}
    assert estimate_of(config, train).window_flops(sums) == found
    one = NamedPlan(name="one", plan=WINDOW, distill=Distill(teacher="two"))
    taught = Estimate(config, train, {"one": one, "two": NamedPlan(name="two", weight=1e-9, plan=WINDOW)})
    teacher = taught.step_flops(Batch(SAMPLES, VISUAL, TEXT), labels=labels) - found
    assert teacher == pytest.approx(forward + tower, rel=0.02)


def states(train, *, stage=2, ranks=4, **zero):
    return estimate_of(small(WINDOW), train).states({"zero_optimization": zero}, stage=stage, ranks=ranks)


def optimizer_bytes(name):
    """Returns the bytes of a weight that learns, its float32 copy included."""
    found = estimate_of(small(WINDOW), trained(precision="bf16", optimizer=name))
    return found.states({}, stage=1, ranks=1).optimizer / found.trained


def test_weights_gradients_and_optimizer_follow_zeros_rules():
    bucket = {"reduce_bucket_size": 1000}
    whole = estimate_of(small(WINDOW), trained())
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
    sizes = {"adamw_8bit": 2, "sgd": 0, "lion_8bit": 1, "ademamix": 12, "ademamix_8bit": 3}
    assert {name: optimizer_bytes(name) for name in sizes} == {name: 4 + size for name, size in sizes.items()}
    assert all(optimizer_bytes(name) >= 4 for name in get_args(Optimizer))  # each is known
    lora = trained(precision="bf16", lora=ADAPTERS)
    assert states(lora).gradients < 0.2 * two.gradients
    quantized = trained(precision="bf16", lora=ADAPTERS.model_copy(update={"bits": 4}))
    decoder = 6 * (4 * WIDTH * WIDTH + 3 * WIDTH * 344)  # Linear weights
    assert states(lora).weights - states(quantized).weights == 1.5 * decoder


def test_muon_keeps_a_momentum_for_matrices_and_adams_moments_for_the_rest():
    found = estimate_of(small(WINDOW), trained(precision="bf16", optimizer="muon"))
    matrices = 6 * (4 * WIDTH * WIDTH + 3 * WIDTH * 344) + 64 * WIDTH + WIDTH * WIDTH  # of the decoder, the projector
    expected = 4 * found.trained + 4 * matrices + 8 * (found.trained - matrices)
    assert found.states({}, stage=1, ranks=1).optimizer == expected


def test_weights_and_optimizer_take_what_check_says(train_here, tiny_recipe):
    recipe = tiny_recipe("sizes", max_steps=1, precision="bf16", tracker="none")
    recipe["train"]["learning_rate"] |= {"vision_tower": None}
    output = train_here(recipe)
    phase = Recipe.model_validate(recipe).phases[0]
    config = FusedAutoModel.from_pretrained(output / "final").config
    expected = Estimate(config, phase.train, phase.plans).states(read_deepspeed(phase.train), stage=2, ranks=1)
    (file,) = (output / "checkpoint-1").rglob("*optim_states.pt")
    saved = torch.load(file, weights_only=False)["optimizer_state_dict"]
    copies, states = saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]
    kept = [*copies, *(one for state in states["state"].values() for one in state.values() if one.ndim)]
    assert sum(one.nbytes for one in kept) == pytest.approx(expected.optimizer, rel=0.15)
    weights = load_file(output / "checkpoint-1/model.safetensors").values()
    assert sum(one.nbytes for one in weights) == pytest.approx(expected.weights, rel=0.15)
    learns = sum(one.numel() for one in copies)
    assert learns * 2 == pytest.approx(expected.gradients, rel=0.15)


def test_cards_by_name_number_and_memory():
    assert parse_card("8xH100", count=1) == Card(8, 80, 989e12)
    assert parse_card("rtx 4090", count=2) == Card(2, 24, 165e12)
    assert parse_card("24", count=4) == Card(4, 24, None)
    for wrong in ("0xH100", "H99", "8x", "0", ""):
        with pytest.raises(RecipeError, match=f"--gpu: got '{wrong}', expected GB such as 24, or one of B200"):
            parse_card(wrong, count=1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA T400", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_device_s_peak_is_that_of_the_card_of_its_whole_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_here() == peak
