"""FastV, PyramidDrop, Random and Within against slow references; settings, names, and pruners at work in a model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from models import StagePlan, run_decoder
from models.schedules import (
    SCHEDULES,
    VTW,
    CDPruner,
    Dense,
    DivPrune,
    FastV,
    Fused,
    PyramidDrop,
    Random,
    ShortV,
    SparseVLM,
    VisionZip,
    VisiPruner,
    Within,
    published,
    resolve_schedule,
)
from tests.conftest import merged_inputs

PRUNERS = {
    "visipruner": VisiPruner(2, 0.95, 0.3, 0.8),
    "fastv": FastV(2, 0.4),
    "pyramiddrop": PyramidDrop((2, 4), (0.5, 0.25)),
    "pyramiddrop_renumbered": PyramidDrop((2, 4), (0.5, 0.25), renumber=True),
    "vtw": VTW(3),
    "random": Random(1, 0.5, seed=3),
    "divprune": DivPrune(0.5),
    "sparsevlm": SparseVLM((2, 4), (320, 144)),
    "shortv": ShortV((0, 2, 3)),
}


@pytest.fixture(params=sorted(PRUNERS))
def pruner(request):
    return PRUNERS[request.param]


def forward(model, batch, **more):
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if value is not None}, **more).logits


# -- the slow reference: the live tokens of one sample, gathered by hand, eager layers, whole attention matrices -------


def slow_run(model, embeds, visual, choose, renumber=False):
    """Returns (logits of the last token, live places of every layer).

    `choose(number, kept, before, ahead)` returns the visual places that stay; before() and ahead() are the last
    token's mean attention, by place, in the layer before and in this one.
    """
    decoder = model.model.language_model
    text = (~visual[0]).nonzero().flatten().tolist()
    kept, hidden, live, seen = visual[0].nonzero().flatten().tolist(), embeds, list(range(visual.shape[1])), None
    places = []
    for number, layer in enumerate(decoder.layers):
        ahead = attention_by_place(decoder, layer, number, hidden, live, live if not renumber else None)
        kept = choose(number, kept, seen, ahead)
        now = sorted(text + kept)
        hidden = hidden[:, [live.index(place) for place in now]]
        live = now
        seen = attention_by_place(decoder, layer, number, hidden, live, live if not renumber else None)
        positions, mask, rotary = surroundings(decoder, number, hidden, live, live if not renumber else None)
        hidden = layer(hidden, mask, positions, None, False, rotary)
        places.append(live)
    return model.lm_head(decoder.norm(hidden))[0, -1], places


def surroundings(decoder, number, hidden, live, positions):
    positions = torch.tensor([list(range(len(live))) if positions is None else positions])
    at = torch.tensor(live)
    allowed = at[None] <= at[:, None]
    window = getattr(
        decoder.layers[number].self_attn, "sliding_window", getattr(decoder.config, "sliding_window", None)
    )
    if window is not None:
        allowed &= at[:, None] - at[None] < window
    mask = torch.zeros(1, 1, len(live), len(live)).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return positions, mask, decoder.rotary_emb(hidden, positions)


def attention_by_place(decoder, layer, number, hidden, live, positions):
    _, mask, rotary = surroundings(decoder, number, hidden, live, positions)
    _, weights = layer.self_attn(layer.input_layernorm(hidden), rotary, mask)
    return dict(zip(live, weights[0, :, -1].mean(dim=0).tolist(), strict=True))


def highest(kept, scores, count):
    return sorted(sorted(kept, key=lambda place: -scores[place])[:count])


def chooser(schedule, total):
    def choose(number, kept, before, ahead):
        if isinstance(schedule, FastV) and number == schedule.layer:
            return highest(kept, before, round(total * (1 - schedule.drop)))
        if isinstance(schedule, PyramidDrop) and number in schedule.layers:
            return highest(kept, ahead, int(total * schedule.ratios[schedule.layers.index(number)]))
        return kept

    return choose


@pytest.mark.parametrize("layout", ["tttItttt", "ItIttttt"])
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "pyramiddrop_renumbered"])
def test_what_stays_and_what_comes_out_equal_the_slow_reference(make_model, make_batch, family, name, layout):
    schedule, model = PRUNERS[name], make_model(family, attention="eager")
    with torch.no_grad():
        embeds, visual = merged_inputs(model, make_batch(layout))
        expected, places = slow_run(
            model, embeds, visual, chooser(schedule, int(visual.sum())), renumber=schedule.renumbers
        )
        for use_cache in (False, True):
            output = run_decoder(model.model.language_model, embeds, visual, schedule=schedule, use_cache=use_cache)
            assert [live[0].tolist() for live in output.live] == places
            logits = model.lm_head(output.last_hidden_state)[0, -1]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_random_keeps_the_same_tokens_of_a_sample_in_any_batch(make_model, make_batch):
    model, schedule = make_model(), Random(1, 0.5, seed=3)
    kept = []
    for layouts in (["tItt"], ["IItttt", "tItt", "tt"]):
        batch = make_batch(*layouts, side="left")
        with torch.no_grad():
            embeds, visual = merged_inputs(model, batch)
            output = run_decoder(
                model.model.language_model, embeds, visual, attention_mask=batch["attention_mask"], schedule=schedule
            )
        sample = layouts.index("tItt")
        padding = int((batch["attention_mask"][sample] == 0).sum())
        kept.append([(live[sample] - padding).tolist() for live in output.live])
    assert kept[0] == kept[1]
    assert [len(live) for live in kept[0]] == [7] + [5] * 5
    with torch.no_grad():
        embeds, visual = merged_inputs(model, make_batch("IItttt"))
        drawn = {
            tuple(
                run_decoder(model.model.language_model, embeds, visual, schedule=Random(1, 0.5, seed))
                .live[1][0]
                .tolist()
            )
            for seed in range(4)
        }
    assert len(drawn) > 1


# -- inside a trained plan ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "pruner", "counts"),
    [
        ({"enter": 1, "exit": 5}, FastV(3, 0.5), [0, 4, 4, 2, 2, 0]),
        ({"enter": 2, "exit": 5}, FastV(1, 0.5), [0, 0, 4, 2, 2, 0]),  # a cut before vision came: right after it did
        ({"enter": 1, "exit": 6}, PyramidDrop((1, 3), (0.5, 0.25)), [0, 4, 2, 1, 1, 1]),
        ({"enter": 1, "exit": 5}, VTW(3), [0, 4, 4, 0, 0, 0]),
        ({"enter": 3, "exit": 5}, VTW(3), [0, 0, 0, 4, 0, 0]),
        ({"enter": 3, "exit": 5}, VTW(1), [0, 0, 0, 4, 0, 0]),
        ({"enter": 1, "exit": 5}, Dense(), [0, 4, 4, 4, 4, 0]),
        ({"enter": 1, "exit": 5, "keep": {2: 2}}, FastV(3, 0.75), [0, 4, 2, 1, 1, 0]),
        ({"layers": [0, 2, 3, 5], "update": "kv"}, PyramidDrop((1, 3), (0.5, 0.25)), [4, 0, 2, 1, 0, 1]),
        ({"layers": [0, 2, 3, 5], "update": "kv"}, VisiPruner(0, 1.0, 1e6, modes=["middle"]), [4, 0, 4, 0, 0, 0]),
    ],
)
def test_a_pruner_prunes_inside_the_trained_window(make_model, make_batch, plan, pruner, counts):
    model, plan = make_model(), StagePlan.from_dict(plan)
    with torch.no_grad():
        embeds, visual = merged_inputs(model, make_batch("tttItttt"))
        output = run_decoder(model.model.language_model, embeds, visual, schedule=Within(plan, pruner))
    assert [len(live[0]) - 7 for live in output.live] == counts


def test_a_pruner_that_keeps_all_leaves_the_plan_as_it_is(make_model, make_batch, family):
    model = make_model(family)
    batch = make_batch("tttItttt", "ttItI", "ttt", side="left")
    for plan in (StagePlan(1, 5, keep={3: 2}), StagePlan(layers=[0, 2, 5], update="kv")):
        model.schedule = Fused(plan)
        expected = forward(model, batch)
        for pruner in (VisiPruner(0, 0.0, modes=["middle", "deep"]), FastV(1, 0.0), Random(0, 1.0)):
            model.schedule = Within(plan, pruner)
            valid = (batch["attention_mask"] == 1) & (batch["input_ids"] != 50)
            torch.testing.assert_close(forward(model, batch)[valid], expected[valid], rtol=1e-5, atol=1e-5)


# -- at work -----------------------------------------------------------------------------------------------------------


def test_switching_back_leaves_no_trace(make_model, make_batch, pruner):
    model = make_model()
    batch = make_batch("tttItttt", "ttttt", side="left")
    before, state = forward(model, batch), {name: value.clone() for name, value in model.state_dict().items()}
    model.schedule = pruner
    assert not torch.equal(forward(model, batch), before)
    model.schedule = None
    assert torch.equal(forward(model, batch), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_generation_samples_and_follows_the_prompts_choice(make_model, make_batch, pruner):
    model = make_model()
    model.schedule = pruner
    batch = make_batch("tttItttt", "ttttt", "tItIt", side="left")
    options = {"max_new_tokens": 5, "pad_token_id": 59, "eos_token_id": None, "bad_words_ids": [[50]]}
    for how in ({"do_sample": True, "temperature": 1.5}, {"do_sample": False, "num_beams": 2}):
        answers = []
        for _ in range(2):
            torch.manual_seed(0)
            answers.append(model.generate(**batch, **options, **how))
        assert torch.equal(*answers)
        assert answers[0].shape == (3, batch["input_ids"].shape[1] + 5)


def test_a_second_chunk_of_the_prompt_is_pruned_like_the_whole(make_model, make_batch, family, pruner):
    model = make_model(family)
    decoder = model.model.language_model
    with torch.no_grad():
        embeds, visual = merged_inputs(model, make_batch("tttItItt", "tttIItt", side="left", seed=1))
        whole = run_decoder(decoder, embeds, visual, schedule=pruner)
        first = run_decoder(decoder, embeds[:, :3], visual[:, :3], schedule=pruner, use_cache=True)
        rest = run_decoder(
            decoder,
            embeds[:, 3:],
            visual[:, 3:],
            schedule=pruner,
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    assert [[row.tolist() for row in live] for live in whole.live] == [
        [early.tolist() + late.tolist() for early, late in zip(*pair, strict=True)]
        for pair in zip(first.live, rest.live, strict=True)
    ]
    text = ~visual[:, 3:]
    torch.testing.assert_close(rest.last_hidden_state[text], whole.last_hidden_state[:, 3:][text], rtol=1e-4, atol=1e-4)


def test_a_prompt_that_ends_with_its_image_is_read_from_its_last_text(make_model, make_batch, pruner):
    model = make_model()
    model.schedule = pruner
    batch = make_batch("tttI", "tItttt", side="left")
    assert forward(model, batch)[batch["input_ids"] != 50].isfinite().all()


def test_an_adapted_decoder_is_pruned_by_its_adapted_projections(make_model, make_batch, pruner):
    torch.manual_seed(0)
    model = make_model()
    adapted = get_peft_model(
        model.model.language_model,
        LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False),
    ).eval()
    with torch.no_grad():
        embeds, visual = merged_inputs(model, make_batch("tttItttt", "tIttttt", side="right"))
        mask = torch.ones_like(visual)
        wrapped = run_decoder(adapted, embeds, visual, attention_mask=mask, schedule=pruner)
        merged = run_decoder(adapted.merge_and_unload(), embeds, visual, attention_mask=mask, schedule=pruner)
    assert [[row.tolist() for row in live] for live in wrapped.live] == [
        [row.tolist() for row in live] for live in merged.live
    ]
    text = ~visual
    torch.testing.assert_close(wrapped.last_hidden_state[text], merged.last_hidden_state[text], rtol=1e-3, atol=1e-3)


def test_a_pruner_does_not_train(make_model, make_batch, pruner):
    model = make_model().train()
    model.schedule = pruner
    batch = make_batch("tttItttt")
    with pytest.raises(ValueError, match=f"got {type(pruner).__name__}, expected .* in training"):
        model(**batch, labels=batch["input_ids"].where(torch.arange(11) > 8, -100))


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FastV(0), r"FastV.layer: got 0, expected a layer number \(int >= 1\)"),
        (lambda: FastV(2, 1.5), r"FastV.drop: got 1.5, expected a ratio, 0 to 1"),
        (lambda: FastV(True), r"FastV.layer: got True"),
        (lambda: VTW(-1), r"VTW.layer: got -1"),
        (lambda: Random(2, float("nan")), r"Random.ratio: got nan"),
        (lambda: Random(seed=-1), r"Random.seed: got -1"),
        (lambda: PyramidDrop((2, 2), (0.5, 0.25)), r"PyramidDrop.layers: got \(2, 2\), expected .*ascending"),
        (lambda: PyramidDrop(8, 0.5), "PyramidDrop.layers: got 8"),
        (lambda: PyramidDrop((), ()), r"PyramidDrop.layers: got \(\)"),
        (lambda: PyramidDrop((2, 4), (0.5,)), r"PyramidDrop.ratios: got \(0.5,\), expected .*each of layers"),
        (lambda: PyramidDrop((2, 4), (0.25, 0.5)), r"PyramidDrop.ratios: .*not growing"),
        (lambda: DivPrune(1.5), "DivPrune.ratio: got 1.5, expected a ratio, 0 to 1"),
        (lambda: SparseVLM((3, 3, 9)), r"SparseVLM.layers: got \(3, 3, 9\), expected .*ascending"),
        (lambda: SparseVLM(tokens=(66, 30)), "SparseVLM.tokens: got .*expected a count .* for each of layers"),
        (lambda: VisionZip(0), r"VisionZip.dominant: got 0, expected a count of 576 patches \(int >= 1\)"),
        (lambda: VisionZip(54, -1), "VisionZip.contextual: got -1"),
        (lambda: CDPruner(577), r"CDPruner.tokens: got 577, expected a count of 576 tokens \(1 to 576\)"),
        (lambda: ShortV((2, 1)), r"ShortV.layers: got \(2, 1\), expected .*ascending"),
        (lambda: PyramidDrop(renumber="no"), "PyramidDrop.renumber: got 'no', expected true or false"),
        (lambda: Random(seed=2**63), "Random.seed: got 9223372036854775808, expected an int >= 0 of 63 bits"),
        (lambda: published("fastv", 6, num_layers=3), "schedule fastv: got setting 'num_layers', expected layer, drop"),
        (lambda: resolve_schedule({1: 2}, None, 6), "schedule: got None, expected one of trained"),
        (lambda: resolve_schedule({"name": "fastv", 1: 2}, None, 6), "schedule fastv: got setting '1', expected"),
        (lambda: published(["vtw"], 6), r"schedule: got \['vtw'\], expected one of trained, dense"),
    ],
)
def test_a_wrong_setting_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (FastV(6), "FastV.layer: got 6, expected at most 5, because the decoder has 6 layers"),
        (PyramidDrop(), "PyramidDrop.layers: got 24, expected at most 5"),
        (VTW(7), "VTW.layer: got 7, expected at most 6"),
        (ShortV((2, 6)), r"ShortV.layers: got \(2, 6\), expected at most 5"),
        (SparseVLM(), "SparseVLM.layers: got 16, expected at most 5"),
        (Random(9), "Random.layer: got 9"),
        (Within(StagePlan(1, 3), VTW(7)), "VTW.layer: got 7"),
        (Within(StagePlan(1, 9), VTW(3)), "stages.exit: got 9"),
    ],
)
def test_a_layer_beyond_the_decoder_is_refused(make_model, schedule, message):
    with pytest.raises(ValueError, match=message):
        make_model().schedule = schedule


def test_every_published_schedule_fits_other_depths():
    assert published("visipruner", 32) == VisiPruner()
    assert published("pyramiddrop", 32) == PyramidDrop()
    assert published("pyramiddrop", 8).layers == (2, 4, 6)
    assert published("vtw", 40).layer == 20
    assert published("shortv", 32) == ShortV()
    assert published("shortv", 8).layers == (0, 4, 5, 6, 7)
    assert published("sparsevlm", 8).layers == (1, 2, 4)
    assert published("sparsevlm", 6).layers == (1, 2, 3)
    for name in SCHEDULES:
        for depth in (6, 8, 24, 28, 40):
            published(name, depth).check(depth)
