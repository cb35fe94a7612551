"""The laws of the staged decoder for every supported family; docs/families.md is the table of it."""

import functools
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from models import FAMILIES, FusedAutoModel, StagePlan
from models.schedules import (
    VTW,
    CDPruner,
    Dense,
    DivPrune,
    FastV,
    Fused,
    PyramidDrop,
    Random,
    ScheduleError,
    ShortV,
    SparseVLM,
    VisionZip,
    VisiPruner,
    Within,
)
from tests.slow_reference import SlowDecoder
from tests.tiny_vlms import IMAGE, LAYERS, PAD, TINY, VIDEO

PLANS = {
    "window": {"enter": 2, "exit": 5},
    "late": {"enter": 1, "exit": 6},
    "early": {"enter": 0, "exit": 3},
    "pyramid": {"enter": 1, "exit": 5, "keep": {2: 3, 4: 1}},
    "diverse": {"enter": 2, "exit": 5, "keep": {2: 0.5, 4: 1}, "select": "diversity"},
    "kv_window": {"enter": 2, "exit": 5, "update": "kv"},
    "kv_layers": {"layers": [0, 2, 3, 5], "update": "kv"},
    "kv_pyramid": {"layers": [0, 2, 3, 5], "update": "kv", "keep": {3: 2, 5: 1}},
}
SCHEDULES = {
    "dense": Dense(),
    **{name: Fused(StagePlan.from_dict(plan)) for name, plan in PLANS.items()},
    "vtw": VTW(3),
    "fastv": FastV(2, 0.4),
    "pyramiddrop": PyramidDrop((2, 4), (0.5, 0.25)),
    "random": Random(1, 0.5, seed=3),
    "divprune": DivPrune(0.5),
    "sparsevlm": SparseVLM((2, 4), (320, 144)),
    "cdpruner": CDPruner(288),
    "shortv": ShortV((0, 2, 3)),
    "visionzip": VisionZip(288, 144),
    "visipruner": VisiPruner(2, 0.97, 0.25, 0.8),
    "visipruner_half": VisiPruner(3, 0.97, 0.25, 0.8, first_layer="half", visual_self_attention=False),
}
BATCH = ("ttItttt", "ttItItt", "tttt", "tIt")


@functools.cache
def theirs(name, attention="sdpa"):
    return TINY[name].hugging_face(attention)


@functools.cache
def ours(name, attention="sdpa"):
    """Returns the fused model with the weights of Hugging Face's; a test that changes it takes a copy."""
    model = FusedAutoModel.from_config(TINY[name].config(), attn_implementation=attention)
    model.load_state_dict(theirs(name).state_dict(), strict=True)
    model.config.get_text_config().pad_token_id = PAD
    return model.eval()


@pytest.fixture(params=list(TINY))
def name(request):
    return request.param


@pytest.fixture(params=list(SCHEDULES))
def schedule(request, name):
    if request.param == "visionzip" and TINY[name].family != "llava":
        pytest.skip("needs a tower with a class token and one patch a visual token")
    return SCHEDULES[request.param]


def tiny_batch(name, schedule, *layouts, **more):
    """Returns a batch, with the relevance of visual tokens where the schedule wants it."""
    batch = TINY[name].batch(*layouts, **more)
    if isinstance(schedule, CDPruner):
        visual = batch["input_ids"] == IMAGE
        batch["relevance"] = (3.0 * visual.cumsum(dim=1)).sin()
    return batch


def alone(batch, layouts, sample):
    """Returns one sample of a batch, without padding, as its own batch."""
    before, count = sum(layout.count("I") for layout in layouts[:sample]), layouts[sample].count("I")
    valid, shape = batch["attention_mask"][sample] == 1, batch["input_ids"].shape
    single = {key: value[sample][valid][None] for key, value in batch.items() if value.shape == shape}
    return {**single, **images_of(batch, before, count)}


def images_of(batch, first, count):
    """Returns the vision inputs of `count` images of a batch, from the image number `first` on."""
    if count == 0 or "pixel_values" not in batch:
        return {}
    numbers = slice(first, first + count)
    if "image_grid_thw" in batch:
        grid = batch["image_grid_thw"]
        sizes = grid.prod(dim=1).tolist()
        start, end = sum(sizes[:first]), sum(sizes[: first + count])
        return {"pixel_values": batch["pixel_values"][start:end], "image_grid_thw": grid[numbers]}
    if batch["pixel_values"].ndim == 5 and "image_sizes" not in batch:  # Idefics3: one list of images
        return {"pixel_values": batch["pixel_values"][:, numbers]}
    if "image_token_pooling" in batch:
        pooling = batch["image_token_pooling"][2 * first : 2 * (first + count)] - 4 * first
        rest = {key: batch[key][numbers] for key in ("pixel_values", "image_grids", "image_num_crops")}
        return {**rest, "image_token_pooling": pooling}
    return {key: batch[key][numbers] for key in ("pixel_values", "image_sizes") if key in batch}


def text_of(batch):
    return (batch["attention_mask"] == 1) & (batch["input_ids"] != IMAGE)


@torch.no_grad()
def logits(model, batch, **more):
    return model(**batch, **more).logits


def generate(model, batch, **more):
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **more}
    options["bad_words_ids"] = [[token] for token in range(IMAGE, PAD)]  # tokens that mean an image mean none here
    return model.generate(**batch, **options)


# -- dense is Hugging Face -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dense_is_hugging_face_exactly(name, attention):
    tiny = TINY[name]
    for layouts, side in ((BATCH, "left"), (BATCH, "right"), (("ttIItt",), "right"), (("tttt", "tt"), "left")):
        batch = tiny.batch(*layouts, side=side)
        valid = batch["attention_mask"] == 1
        expected = logits(theirs(name, attention), batch)[valid]
        assert torch.equal(logits(ours(name, attention), batch)[valid], expected)
    batch = tiny.batch(*BATCH, side="left")
    assert torch.equal(generate(ours(name, attention), batch), generate(theirs(name, attention), batch))


def test_an_image_changes_what_follows(name):
    """So that no law here holds because the image is ignored."""
    tiny = TINY[name]
    batch = tiny.batch("ttItttt")
    other = {**batch, **tiny.batch("ttItttt", seed=1)}
    other.update({key: value for key, value in batch.items() if not key.startswith("pixel")})
    difference = (logits(ours(name), batch) - logits(ours(name), other)).abs()[0, -1].max()
    assert difference > 1e-2


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_video_beside_an_image_is_hugging_faces(name):
    tiny = TINY[name]
    batch = tiny.batch("ttIttttttttttt")
    video = [VIDEO] * (4 if name == "qwen3_vl" else 8)
    ids = batch["input_ids"]
    ids[0, -10 : -10 + 4] = torch.tensor(video[:4])
    batch["mm_token_type_ids"][0, -10:-6] = 2
    random = torch.Generator().manual_seed(2)
    batch |= {
        "pixel_values_videos": torch.randn(16, 96, generator=random),
        "video_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    assert torch.equal(logits(ours(name), batch), logits(theirs(name), batch))
    output = ours(name)(**batch, schedule=Fused(StagePlan(2, 4)))
    assert torch.equal(output.visual, (ids == IMAGE) | (ids == VIDEO))
    assert [len(live[0]) for live in output.live] == [len(ids[0]) - 8] * 2 + [len(ids[0])] * 2 + [len(ids[0]) - 8] * 2


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tttItttt", "ItIttt", "tttt"])
def test_a_schedule_equals_the_slow_reference(name, schedule, layout):
    batch = tiny_batch(name, schedule, layout)
    expected, places = SlowDecoder(theirs(name, "eager"), batch).run(schedule)
    with torch.no_grad():
        output = ours(name)(**batch, schedule=schedule)
    assert [live[0].tolist() for live in output.live] == places
    text = text_of(batch)[0]
    torch.testing.assert_close(output.logits[0][text], expected[text], rtol=1e-4, atol=2e-4)


def test_a_sample_in_a_padded_batch_is_itself_alone(name, schedule):
    batches = {side: tiny_batch(name, schedule, *BATCH, side=side) for side in ("left", "right")}
    singles = [alone(batches["left"], BATCH, sample) for sample in range(len(BATCH))]
    with torch.no_grad():
        together = {side: ours(name)(**batch, schedule=schedule) for side, batch in batches.items()}
        outputs = [ours(name)(**single, schedule=schedule) for single in singles]
    for side, batch in batches.items():
        for sample, (single, expected) in enumerate(zip(singles, outputs, strict=True)):
            valid = batch["attention_mask"][sample] == 1
            text = text_of(single)[0]
            logits_of_sample = together[side].logits[sample][valid][text]
            torch.testing.assert_close(logits_of_sample, expected.logits[0][text], rtol=1e-4, atol=2e-4)
            padding = int((~valid).sum()) if side == "left" else 0
            slots = [(live[sample] - padding).tolist() for live in together[side].live]
            assert slots == [live[0].tolist() for live in expected.live]


def test_eager_equals_sdpa(name, schedule):
    batch = tiny_batch(name, schedule, *BATCH, side="left")
    text = text_of(batch)
    states = [logits(ours(name, attention), batch, schedule=schedule)[text] for attention in ("sdpa", "eager")]
    torch.testing.assert_close(*states, rtol=1e-4, atol=2e-4)


def test_generation_with_the_cache_equals_generation_without(name, schedule):
    if schedule.reads_attention:
        pytest.skip("without a cache each step chooses anew")
    if isinstance(schedule, VisiPruner):
        pytest.skip("shallow masks are for the prompt")
    batch = tiny_batch(name, schedule, "ttItttt", "tttt", "tItItt", side="left")
    cached = generate(ours(name), batch, schedule=schedule)
    assert torch.equal(cached, generate(ours(name), batch, schedule=schedule, use_cache=False))


def test_one_decode_step_equals_a_longer_prefill(name, schedule):
    """The prompt chooses; an answer's token then sees in each layer what the prompt left there."""
    if "shallow" in getattr(schedule, "modes", ()):
        pytest.skip("shallow masks are for the prompt: decode steps see the image again, by the rule")
    model = ours(name)
    batch = tiny_batch(name, schedule, "ttIttttt")
    size = batch["input_ids"].shape[1]
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]  # so that the token before it is the instruction's last
    prompt = {key: value[:, : size - 1] if value.shape[:2] == (1, size) else value for key, value in batch.items()}
    with torch.no_grad():
        whole = model(**batch, schedule=schedule, labels=labels, logits_to_keep=0).logits[:, -1]
        first = model(**prompt, schedule=schedule, use_cache=True)
        step = model(
            input_ids=batch["input_ids"][:, -1:],
            attention_mask=batch["attention_mask"],
            past_key_values=first.past_key_values,
            schedule=schedule,
            **decode_positions(model, size),
        ).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=2e-4)
    if isinstance(schedule, Fused):
        held = [layer.keys.shape[2] - 1 for layer in first.past_key_values.layers]
        assert held == [len(live[0]) for live in first.live]


def decode_positions(model, size):
    """Returns the position ids of the next token where Hugging Face leaves them to the caller (M-RoPE)."""
    deltas = getattr(model.model, "rope_deltas", None)
    if deltas is None:
        return {}
    return {"position_ids": (size - 1 + deltas)[None].expand(3, -1, -1)}


# -- training --------------------------------------------------------------------------------------------------------


def answers(batch, last=3):
    late = batch["attention_mask"].flip(1).cumsum(1).flip(1) <= last
    return batch["input_ids"].where(late & (batch["attention_mask"] == 1), -100)


def fresh(name):
    model = FusedAutoModel.from_config(TINY[name].config())
    model.load_state_dict(theirs(name).state_dict(), strict=True)
    return model


def test_loss_and_gradients_are_hugging_faces(name):
    batch = TINY[name].batch("ttItttt", "tItIttt", side="right")
    labels, models = answers(batch), []
    for model in (fresh(name).train(), TINY[name].hugging_face().train()):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        models.append((loss, {key: value.grad for key, value in model.named_parameters()}))
    torch.testing.assert_close(models[0][0], models[1][0])
    for key, grad in models[1][1].items():
        if grad is not None:
            torch.testing.assert_close(
                models[0][1][key], grad, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


def image_parameters(model):
    """Returns the parameters between the tower and the decoder."""
    marks = ("multi_modal_projector", "merger", "connector", "modality_projection", "visual_embeddings_table")
    return {key: value for key, value in model.named_parameters() if any(mark in key for mark in marks)}


@pytest.mark.parametrize("plan", ["window", "early", "kv_window", "kv_layers"])
def test_gradients_reach_the_projector_and_no_layer_before_vision_keeps_a_graph(name, plan):
    model = fresh(name).train()
    model.schedule = Fused(StagePlan.from_dict(PLANS[plan]))
    learning = image_parameters(model)
    model.requires_grad_(False)
    for parameter in learning.values():
        parameter.requires_grad_(True)
    first = next(layer for layer in range(LAYERS) if model.schedule.plan.sees(layer))
    outputs = {}
    for number, layer in enumerate(model.model.get_decoder().layers):
        layer.register_forward_hook(lambda *given, number=number: outputs.update({number: given[2].requires_grad}))
    batch = TINY[name].batch("ttItttt", "tttttt")
    model(**batch, labels=answers(batch)).loss.backward()
    assert [outputs[layer] for layer in range(LAYERS)] == [layer >= first for layer in range(LAYERS)]
    for key, parameter in learning.items():
        if "bias" in key and ("k_proj" in key or "k.bias" in key):
            continue  # a bias of keys moves no softmax
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("plan", [None, "window", "kv_layers"])
def test_a_batch_without_image_runs_the_same_modules_and_changes_no_loss(name, plan):
    orders, model = [], fresh(name).train()
    model.schedule = None if plan is None else Fused(StagePlan.from_dict(PLANS[plan]))
    for module_name, module in model.named_modules():  # containers too: ZeRO-3 follows their order on every rank
        module.register_forward_pre_hook(lambda *_, key=module_name: orders[-1].append(key))
    for layout in ("ttItttt", "tttttt"):
        orders.append([])
        batch = TINY[name].batch(layout)
        model.zero_grad()
        loss = model(**batch, labels=answers(batch)).loss
        loss.backward()
    assert list(dict.fromkeys(orders[0])) == list(dict.fromkeys(orders[1]))
    for key, parameter in image_parameters(model).items():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() == 0, key
    torch.testing.assert_close(loss, theirs(name)(**batch, labels=answers(batch)).loss)


def test_checkpointing_changes_no_gradient(name):
    batch = TINY[name].batch("ttItttt", "tttttt")
    for plan in ("window", "kv_layers"):
        grads = []
        for checkpointing in (False, True):
            model = fresh(name).train()
            model.schedule = Fused(StagePlan.from_dict(PLANS[plan]))
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(**batch, labels=answers(batch)).loss.backward()
            grads.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for key, grad in grads[0].items():
            torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_refused_where_vision_only_gives_keys_and_values(name):
    batch, model = TINY[name].batch("ttItttt"), fresh(name).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.schedule = Fused(StagePlan.from_dict(PLANS["kv_layers"]))
    with pytest.raises(ValueError, match=r"got use_reentrant=True, expected False under the .kv. update"):
        model(**batch, labels=answers(batch))
    model.schedule = Fused(StagePlan.from_dict(PLANS["window"]))
    model(**batch, labels=answers(batch)).loss.backward()


def test_a_plan_narrower_than_its_deepstack_features_does_not_train():
    model, batch = fresh("qwen3_vl").train(), TINY["qwen3_vl"].batch("ttItttt")
    model.schedule = Fused(StagePlan(2, 4))
    with pytest.raises(ValueError, match="got 2 layers that see vision, expected at least 3 in training"):
        model(**batch, labels=answers(batch))
    assert model.eval()(**batch, labels=answers(batch)).loss.isfinite()


# -- loading ---------------------------------------------------------------------------------------------------------


def test_an_ordinary_checkpoint_loads_whole_and_keeps_its_names(name, tmp_path):
    batch = TINY[name].batch("ttItttt")
    theirs(name).save_pretrained(tmp_path / "ordinary")
    model, report = FusedAutoModel.from_pretrained(tmp_path / "ordinary", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(model.eval(), batch), logits(theirs(name), batch))
    planned = FusedAutoModel.from_pretrained(tmp_path / "ordinary", stages=PLANS["window"])
    planned.save_pretrained(tmp_path / "fused")
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("ordinary", "fused")]
    assert names[0] == names[1]
    again, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(report.values()), report
    assert type(again) is FAMILIES[TINY[name].family].model_class
    assert again.schedule == Fused(StagePlan(2, 5))
    assert torch.equal(logits(again.eval(), batch), logits(planned.eval(), batch))


# -- the call --------------------------------------------------------------------------------------------------------


def test_no_keyword_vanishes(name):
    batch = TINY[name].batch("ttItttt")
    with pytest.raises(TypeError, match="unexpected keyword argument 'pixel_valeus'"):
        ours(name)(**batch, pixel_valeus=1)
    with pytest.raises(ValueError, match="cu_seq_lens_q: got a value"):
        ours(name)(**batch, cu_seq_lens_q=torch.tensor([0, 1]))


def test_encoded_images_are_taken_as_hugging_face_takes_them(name):
    """`mm_encoder_outputs` in place of pixels."""
    tiny, model = TINY[name], ours(name)
    batch = tiny.batch("ttItttt")
    known = ("pixel_values", "image_sizes", "image_grid_thw", "image_token_pooling", "image_grids")
    with torch.no_grad():
        vision = {key: value for key, value in batch.items() if key in known}
        features = model.model.get_image_features(**vision, return_dict=True)
        rest = {key: value for key, value in batch.items() if key not in known or key == "image_grid_thw"}
        rest.pop("image_num_crops", None)
        for schedule in (Dense(), Fused(StagePlan(2, 4))):
            expected = model(**batch, schedule=schedule).logits
            output = model(**rest, mm_encoder_outputs={"image": features}, schedule=schedule)
            assert torch.equal(output.logits, expected)


def test_merged_embeddings_need_the_mask_of_their_visual_tokens(name):
    tiny, model = TINY[name], ours(name)
    batch = tiny.batch("ttItttt")
    decoder = SlowDecoder(theirs(name, "eager"), batch)
    merged = {"inputs_embeds": decoder.embeds, "position_ids": decoder.positions}
    merged |= {key: value for key, value in batch.items() if key in ("token_type_ids", "mm_token_type_ids")}
    with pytest.raises(ValueError, match="visual: got inputs_embeds without it under Fused"):
        model(**merged, schedule=Fused(StagePlan(2, 4)))
    if not decoder.features:  # DeepStack's features are not in the embeddings
        with torch.no_grad():
            output = model(**merged, schedule=Fused(StagePlan(2, 4)), visual=decoder.visual[None])
        expected = logits(model, batch, schedule=Fused(StagePlan(2, 4)))
        text = text_of(batch)
        torch.testing.assert_close(output.logits[text], expected[text], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_two_threads_do_not_see_each_others_call(name):
    model, results = ours(name), {}
    jobs = {
        "dense": (TINY[name].batch("ttItttt"), None),
        "window": (TINY[name].batch("tItItttt", seed=1), Fused(StagePlan(2, 4))),
        "fastv": (TINY[name].batch("tIttttttt", seed=2), FastV(2, 0.5)),
    }
    expected = {key: generate(model, batch, schedule=schedule) for key, (batch, schedule) in jobs.items()}

    def work(key):
        batch, schedule = jobs[key]
        results[key] = [generate(model, batch, schedule=schedule) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(key,)) for key in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, answers_of_thread in results.items():
        assert all(torch.equal(answer, expected[key]) for answer in answers_of_thread), key


def test_a_schedule_can_be_named_given_for_one_call_and_assigned_again(name):
    model, batch = fresh(name).eval(), TINY[name].batch("ttItttt")
    dense = logits(model, batch)
    assert torch.equal(logits(model, batch, schedule="dense"), dense)
    named = logits(model, batch, schedule={"name": "vtw", "layer": 2})
    assert torch.equal(named, logits(model, batch, schedule=VTW(2)))
    assert torch.equal(logits(model, batch), dense)
    for choice in (None, "visipruner", FastV(1, 0.5), {"name": "random", "ratio": 0.25}):
        model.schedule = choice
        before, known = logits(model, batch), model.schedule
        model.schedule = model.schedule
        assert model.schedule == known
        assert torch.equal(logits(model, batch), before)
    with pytest.raises(ScheduleError, match="got the class FastV, expected an object"):
        model.schedule = FastV
    with pytest.raises(ScheduleError, match="got 'fastw', expected one of trained, dense, visipruner"):
        model.schedule = "fastw"
    with pytest.raises(ScheduleError, match="schedule fastv: got setting 'layers', expected layer, drop"):
        model.schedule = {"name": "fastv", "layers": 3}


def test_generate_hands_over_what_was_live_in_the_prompt(name):
    batch, found = TINY[name].batch("ttItttt", "tttt", side="left"), []
    for schedule in (None, "vtw", Fused(StagePlan(2, 4))):
        generate(ours(name), batch, schedule=schedule, on_prefill=found.append)
        with torch.no_grad():
            expected = ours(name)(**batch, schedule=schedule)
        live = [[row.tolist() for row in layer] for layer in found.pop().live]
        assert live == [[row.tolist() for row in layer] for layer in expected.live]
        assert not found


def test_the_config_may_name_the_schedule_to_start_with(tmp_path):
    config = TINY["llava"].config()
    model = FusedAutoModel.from_config(config, stages=PLANS["late"])
    model.config.schedule = {"name": "fastv", "layer": 2, "drop": 0.25}
    model.save_pretrained(tmp_path)
    loaded = FusedAutoModel.from_pretrained(tmp_path)
    assert loaded.schedule == Within(StagePlan.from_dict(PLANS["late"]), FastV(2, 0.25))
    loaded.schedule = None
    assert loaded.schedule == Fused(StagePlan.from_dict(PLANS["late"]))


@pytest.mark.parametrize("schedule", [FastV(2, 0.5), VisiPruner(1, 0.97, 0.25, 0.8), PyramidDrop((2, 4), (0.5, 0.25))])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_the_prompts_last_token_chooses_also_where_an_assistant_s_candidates_follow_it(name, schedule):
    model, batch = ours(name), TINY[name].batch("ttItttt")
    expected = generate(model, batch, schedule=schedule, max_new_tokens=8)
    # prompt lookup proposes candidates from the prompt, so that the first forward holds more than the prompt
    looked_up = generate(model, batch, schedule=schedule, max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, expected)


def test_other_backends_and_caches_are_refused_by_name(name):
    batch = TINY[name].batch("ttItttt")
    with pytest.raises(ValueError, match="past_key_values: got a StaticCache, expected"):
        generate(ours(name), batch, cache_implementation="static")
    model = fresh(name).eval()
    model.config.get_text_config()._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation: got flex_attention, expected sdpa, eager"):
        logits(model, batch)
