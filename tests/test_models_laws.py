"""The laws of the staged decoder, each for every schedule and decoder family."""

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from models import run_decoder
from models.schedules import VTW, Dense, FastV, Fused, PyramidDrop, SparseVLM, VisiPruner, Within
from models.stage_plan import StagePlan
from tests.conftest import merged_inputs

PLANS = {
    "window": {"enter": 2, "exit": 4},
    "late_injection": {"enter": 1, "exit": 6},
    "early_exit": {"enter": 0, "exit": 3},
    "pyramid": {"enter": 1, "exit": 5, "keep": {2: 3, 4: 1}},
    "shares": {"enter": 1, "exit": 6, "keep": {2: 0.5, 3: 0.25}},
    "kv_window": {"enter": 2, "exit": 4, "update": "kv"},
    "kv_layers": {"layers": [0, 2, 3, 5], "update": "kv"},
    "kv_pyramid": {"layers": [0, 2, 3, 5], "update": "kv", "keep": {3: 2, 5: 1}},
}
STATIC = {
    "dense": Dense(),
    **{name: Fused(StagePlan.from_dict(plan)) for name, plan in PLANS.items()},
    "vtw": VTW(3),
}
# those that choose by what they read have slow references of their own in test_models_schedules_*.py
CHOOSING = {
    "fastv": FastV(2, 0.4),
    "pyramiddrop": PyramidDrop((2, 4), (0.5, 0.25), renumber=True),
    "visipruner": VisiPruner(1, 0.95, 0.3, 0.8, modes=("middle", "deep")),
    "visipruner_masks": VisiPruner(3, 0.95, 0.3, 0.8, first_layer="half"),
    "sparsevlm": SparseVLM((2, 4), (320, 144), renumber=True),
    "within_kv": Within(StagePlan.from_dict(PLANS["kv_layers"]), FastV(2, 0.4)),
}
SCHEDULES = STATIC | CHOOSING
LAYOUTS = ("tttItttt", "ItIttttt", "ttttt", "tIt")  # one image, two, none, short


@pytest.fixture(params=sorted(SCHEDULES))
def schedule(request):
    return SCHEDULES[request.param]


@pytest.fixture
def model(make_model, family, schedule):
    model = make_model(family)
    model.schedule = schedule
    return model


def forward(model, batch, **more):
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if value is not None}, **more)


def text_of(batch):
    return (batch["attention_mask"] == 1) & (batch["input_ids"] != 50)


def generate(model, batch, **more):
    given = {key: value for key, value in batch.items() if value is not None}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 59, "eos_token_id": None, **more}
    options["bad_words_ids"] = [[50]]  # a random model may utter the image token, which has no image then
    return model.generate(**given, **options)[:, batch["input_ids"].shape[1] :]


# -- the slow reference: full length, one sample, explicit 4-D masks, nothing gathered ---------------------------


def slow_reference(model, batch, schedule):
    """Returns the logits (1, S, vocab) of one unpadded sample, computed on every position at every layer."""
    decoder = model.model.language_model
    embeds, visual = merged_inputs(model, batch)
    text, live, keys_seen = ~visual, visual.clone(), []
    positions = torch.arange(embeds.shape[1])[None]
    rotary = decoder.rotary_emb(embeds, positions)
    scores = None
    hidden = embeds
    for number, layer in enumerate(decoder.layers):
        live, sees = reference_live(schedule, number, visual, live, scores)
        keys = text | live if sees else text
        mask = reference_mask(decoder, number, keys)
        output = layer(hidden, mask, positions, None, False, rotary)
        if sees:
            scores = reference_attention(decoder, layer, hidden, mask, positions, rotary)
        runs = text if schedule.update == "kv" else keys
        hidden = torch.where(runs[0][:, None], output, hidden)
        keys_seen.append(keys)
    return model.lm_head(decoder.norm(hidden)), keys_seen


def reference_live(schedule, number, visual, live, scores):
    if isinstance(schedule, Dense):
        return visual, True
    if isinstance(schedule, VTW):
        return visual, number < schedule.layer
    amount = schedule.plan.keep.get(number)
    if amount is not None:
        total = int(visual.sum())
        count = min(amount, total) if isinstance(amount, int) else int(total * amount)
        ranked = sorted(live[0].nonzero().flatten().tolist(), key=lambda place: -float(scores[place]))
        live = torch.zeros_like(visual)
        live[0, ranked[:count]] = True
    return live, schedule.plan.sees(number)


def reference_mask(decoder, number, keys):
    size = keys.shape[1]
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None]
    allowed = (columns <= rows) & keys
    layer_types = getattr(decoder.config, "layer_types", None)
    window = getattr(decoder.config, "sliding_window", None)
    if window is not None and (layer_types is None or layer_types[number] == "sliding_attention"):
        allowed &= rows - columns < window
    return torch.zeros(1, 1, size, size).masked_fill(~allowed, torch.finfo(torch.float32).min)


def reference_attention(decoder, layer, hidden, mask, positions, rotary):
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"
    _, weights = layer.self_attn(layer.input_layernorm(hidden), rotary, mask)
    decoder.config._attn_implementation = before
    return weights[0, :, -1].mean(dim=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", sorted(STATIC))
def test_staged_equals_the_slow_reference(make_model, family, make_batch, name, layout):
    schedule, model, batch = STATIC[name], make_model(family), make_batch(layout)
    model.schedule = schedule
    with torch.no_grad():
        expected, keys = slow_reference(model, batch, schedule)
        embeds, visual = merged_inputs(model, batch)
        output = run_decoder(model.model.language_model, embeds, visual, schedule=schedule)
    text = text_of(batch)
    torch.testing.assert_close(forward(model, batch).logits[text], expected[text], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.lm_head(output.last_hidden_state)[text], expected[text], rtol=1e-4, atol=1e-4)
    assert [live[0].tolist() for live in output.live] == [seen[0].nonzero().flatten().tolist() for seen in keys]


# -- dense is Hugging Face ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dense_is_hugging_face_exactly(make_model, make_batch, family, attention):
    model = make_model(family, attention=attention)
    fields = {key: value for key, value in model.config.to_dict().items() if key not in ("stages", "model_type")}
    theirs = LlavaForConditionalGeneration(LlavaConfig(**fields, attn_implementation=attention)).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    for side in ("right", "left"):
        batch = make_batch(*LAYOUTS, side=side)
        valid = batch["attention_mask"] == 1
        assert torch.equal(forward(model, batch).logits[valid], forward(theirs, batch).logits[valid])
    assert torch.equal(generate(model, batch), generate(theirs, batch))


def test_greedy_generation_without_padding_is_hugging_faces(make_model, make_batch, family):
    model = make_model(family)
    fields = {key: value for key, value in model.config.to_dict().items() if key not in ("stages", "model_type")}
    theirs = LlavaForConditionalGeneration(LlavaConfig(**fields)).eval()
    theirs.load_state_dict(model.state_dict())
    for layout in LAYOUTS:
        batch = make_batch(layout)
        assert torch.equal(generate(model, batch), generate(theirs, batch))


# -- causality ----------------------------------------------------------------------------------------------------


def test_late_text_sees_early_text(make_model, make_batch, family):
    model = make_model(family)
    model.model.language_model.config.sliding_window = None
    for layer in model.model.language_model.layers:
        if hasattr(layer.self_attn, "sliding_window"):
            layer.self_attn.sliding_window = None
    for schedule in SCHEDULES.values():
        model.schedule = schedule
        batch = make_batch("tttItttt")
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, 0] = (changed["input_ids"][0, 0] - 3 + 7) % 40 + 3
        difference = (forward(model, batch).logits - forward(model, changed).logits).abs()[0, -1].max()
        assert difference > 1e-4, schedule


def test_changing_a_token_changes_nothing_before_it(model, make_batch, schedule):
    batch = make_batch("ttItttttt")
    size = batch["input_ids"].shape[1]
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, size - 3 :] = batch["input_ids"][:, size - 3 :]
    # where the instruction's last token chooses what stays, the law holds for the answer behind it
    for place in range(size - 3 if schedule.reads_attention else 7, size):
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, place] = 3 if changed["input_ids"][0, place] != 3 else 4
        before = forward(model, batch, labels=labels, logits_to_keep=0).logits[:, :place]
        after = forward(model, changed, labels=labels, logits_to_keep=0).logits[:, :place]
        text = text_of(batch)[:, :place]
        torch.testing.assert_close(before[text], after[text], rtol=0, atol=1e-5)


# -- batches, cache, back ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_sample_alone_equals_itself_in_a_batch(model, make_batch, side):
    together = make_batch(*LAYOUTS, side=side)
    logits = forward(model, together).logits
    images = 0
    for number, layout in enumerate(LAYOUTS):
        count = layout.count("I")
        valid = together["attention_mask"][number] == 1
        pixels = together["pixel_values"][images : images + count] if count else None
        ids = together["input_ids"][number][valid][None]
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        text = text_of(alone)
        torch.testing.assert_close(
            logits[number][valid][text[0]], forward(model, alone).logits[text], rtol=1e-4, atol=2e-4
        )
        images += count


@pytest.mark.parametrize("side", ["right", "left"])
def test_which_tokens_are_live_does_not_depend_on_padding(model, schedule, make_batch, side):
    together = make_batch(*LAYOUTS, side=side)
    with torch.no_grad():
        embeds, visual = merged_inputs(model, together)
        output = run_decoder(
            model.model.language_model, embeds, visual, attention_mask=together["attention_mask"], schedule=schedule
        )
        for number in range(len(LAYOUTS)):
            valid = together["attention_mask"][number] == 1
            alone = run_decoder(
                model.model.language_model,
                embeds[number][valid][None],
                visual[number][valid][None],
                schedule=schedule,
            )
            padding = int((~valid).sum()) if side == "left" else 0
            slots = [(live[number] - padding).tolist() for live in output.live]
            assert slots == [live[0].tolist() for live in alone.live]


def test_generation_with_the_cache_equals_generation_without(model, make_batch):
    batch = make_batch(*LAYOUTS, side="left")
    if model.schedule.reads_attention:
        pytest.skip("without a cache each step chooses anew; test_one_decode_step_equals_a_longer_prefill")
    assert torch.equal(generate(model, batch), generate(model, batch, use_cache=False))


def test_one_decode_step_equals_a_longer_prefill(model, schedule, make_batch):
    if "shallow" in getattr(schedule, "modes", ()):
        pytest.skip("shallow masks are for the prompt: decode steps see the image again, by the rule")
    batch = make_batch("ttIttt", "ttttt", "tItIttt", side="left")
    with torch.no_grad():
        embeds, visual = merged_inputs(model, batch)
        mask, decoder = batch["attention_mask"], model.model.language_model
        size = embeds.shape[1] - 2
        queries = torch.zeros_like(visual)
        queries[:, size - 1] = True  # the prompt's last token decides, with the answer behind it too
        whole = run_decoder(decoder, embeds, visual, attention_mask=mask, schedule=schedule, query_mask=queries)
        part = run_decoder(
            decoder,
            embeds[:, :size],
            visual[:, :size],
            attention_mask=mask[:, :size],
            schedule=schedule,
            use_cache=True,
        )
        for place in (size, size + 1):
            step = run_decoder(
                decoder,
                embeds[:, place : place + 1],
                visual[:, place : place + 1],
                attention_mask=mask[:, : place + 1],
                schedule=schedule,
                past_key_values=part.past_key_values,
                use_cache=True,
            )
            torch.testing.assert_close(
                step.last_hidden_state[:, 0], whole.last_hidden_state[:, place], rtol=1e-4, atol=1e-4
            )
            assert [live[0].tolist() for live in step.live] == [[place]] * 6


def test_a_layers_cache_holds_what_was_live_there(model, schedule, make_batch):
    batch = make_batch("tttItttt")
    with torch.no_grad():
        embeds, visual = merged_inputs(model, batch)
        output = run_decoder(model.model.language_model, embeds, visual, schedule=schedule, use_cache=True)
    held = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    assert held == [len(live[0]) for live in output.live]
    if isinstance(schedule, Fused):
        visible = schedule.plan.visual_counts(int(visual.sum()), 6)
        assert held == [count + int((~visual).sum()) for count in visible]


def test_eager_equals_sdpa(make_model, make_batch, family, schedule):
    batch = make_batch(*LAYOUTS, side="left")
    logits = []
    for attention in ("eager", "sdpa"):
        model = make_model(family, attention=attention)
        model.schedule = schedule
        logits.append(forward(model, batch).logits[text_of(batch)])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_beams_and_samples_run_on_the_cache(model, make_batch):
    batch = make_batch("tttItt", "ttttt", side="left")
    beams = generate(model, batch, num_beams=3)
    assert beams.shape == (2, 6)
    alone = {key: value[:1] for key, value in batch.items()}
    assert torch.equal(generate(model, alone, num_beams=3)[0], beams[0])


# -- gradients, weights -------------------------------------------------------------------------------------------


def test_gradients_reach_the_projector(model, schedule, make_batch):
    if not schedule.trainable:
        pytest.skip("a pruner does not train")
    batch = make_batch("ttIttt", "ttt")
    model.train()
    model(**batch, labels=batch["input_ids"].where(torch.arange(9) > 6, -100)).loss.backward()
    for parameter in model.model.multi_modal_projector.parameters():
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("layouts", [("ttIttt", "ttt"), ("ttttt", "ttt")])
def test_gradient_checkpointing_changes_nothing(make_model, make_batch, family, schedule, layouts):
    if not schedule.trainable:
        pytest.skip("a pruner does not train")
    batch = make_batch(*layouts)
    grads = []
    for checkpointing in (False, True):
        model = make_model(family).train()
        model.schedule = schedule
        if checkpointing:
            model.gradient_checkpointing_enable()
        labels = batch["input_ids"].where((batch["input_ids"] != 50) & (batch["attention_mask"] == 1), -100)
        labels[:, :-2] = -100
        model(**batch, labels=labels, use_cache=True).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)
