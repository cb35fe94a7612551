"""VisiPruner: the released code's recorded answers, a slow reference for every rule, exits, settings, back ends."""

import importlib.util
from pathlib import Path

import pytest
import torch

from models import run_decoder
from models.attention import AttentionRow
from models.live_tokens import NO_VISUAL, Selection
from models.schedule_base import View
from models.schedules import VisiPruner
from tests.conftest import merged_inputs
from tests.slow_reference import mask_shallow

ORACLES = Path(__file__).resolve().parents[2] / "shared" / "oracles"
RULES = {
    "released": {},
    "half": {"first_layer": "half"},
    "paper": {"visual_self_attention": False, "consecutive_exit": True},
    "paper_half": {"visual_self_attention": False, "first_layer": "half"},
    "masks_alone": {"modes": ["shallow"]},
    "probes_alone": {"modes": ["middle", "deep"]},
    "no_exit": {"modes": ["shallow", "middle"]},
    "nothing_fires": {"modes": ["deep"]},
    "early": {"shallow_end": 0},
}
THRESHOLDS = {"shallow_end": 2, "layer_threshold": 0.97, "token_threshold": 0.25, "exit_threshold": 0.8}


# -- the released code's answers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case():
    if not (ORACLES / "visipruner_released.json").is_file():
        pytest.skip("the released code's recorded answers are not here")
    spec = importlib.util.spec_from_file_location("visipruner_case", ORACLES / "visipruner_case.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("number", range(15))
def test_the_released_codes_answers(case, number, attention):
    record = case.records()[number]
    model, embeds, visual, steps = case.build(record)
    model.set_attn_implementation(attention)
    released = {"shallow_mid_layer": 6, "layer_threshold": 0.995}
    schedule = VisiPruner.from_released(
        {**released, "mode": record["mode"], "tokens_threshold": record["tokens_threshold"]}
    )
    with torch.no_grad():
        output = run_decoder(model.model, embeds, visual, schedule=schedule, use_cache=True)
        everything = list(range(visual.shape[1]))
        expected = [everything if places == "all" else places for places in record["positions"]]
        assert [live[0].tolist() for live in output.live] == expected
        answers = [model.lm_head(output.last_hidden_state)[0, -1]]
        for embed in steps:
            step = run_decoder(
                model.model,
                embed,
                visual[:, :1],
                schedule=schedule,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            answers.append(model.lm_head(step.last_hidden_state)[0, -1])
    torch.testing.assert_close(
        torch.stack(answers), torch.tensor([record["logits"], *record["decode"]]), rtol=0, atol=1e-3
    )


# -- the slow reference: whole matrices of weights, zeroed after the softmax; every contribution made ------------------


def slow_reference(model, embeds, visual, rule):
    """Returns (logits (1, S, vocab) of one sample, live places of every layer)."""
    decoder, size = model.model.language_model, visual.shape[1]
    alive, state, places = torch.ones(size, dtype=torch.bool), {"fired": False, "quiet": 0}, []
    hidden, positions = embeds, torch.arange(size)[None]
    rotary = decoder.rotary_emb(hidden, positions)
    for number, layer in enumerate(decoder.layers):
        places.append(alive.nonzero().flatten().tolist())
        weights, values = weights_and_values(decoder, layer, number, hidden, alive, rotary)
        if "shallow" in rule.modes and number < rule.shallow_end:
            mask_shallow(weights, visual[0], number, rule)
        output = (weights @ values).transpose(0, 1).flatten(1)
        attended = hidden + layer.self_attn.o_proj(output)
        hidden = attended + layer.mlp(layer.post_attention_layernorm(attended))
        if "middle" in rule.modes and number > rule.shallow_end:
            alive = alive & probe(weights[:, -1], values, output[-1], visual[0] & alive, state, rule)
    return model.lm_head(decoder.norm(hidden)), places


def weights_and_values(decoder, layer, number, hidden, alive, rotary):
    size = hidden.shape[1]
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None]
    allowed = (columns <= rows) & (alive[None] | (rows == columns))
    window = getattr(layer.self_attn, "sliding_window", getattr(decoder.config, "sliding_window", None))
    if window is not None:
        allowed &= rows - columns < window
    mask = torch.zeros(1, 1, size, size).masked_fill(~allowed, torch.finfo(torch.float32).min)
    normed = layer.input_layernorm(hidden)
    _, weights = layer.self_attn(normed, rotary, mask)
    values = layer.self_attn.v_proj(normed)[0].unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(0, 1)
    return weights[0].clone(), values.repeat_interleave(weights.shape[1] // len(values), dim=0)


def probe(row, values, output, kept, state, rule):
    """Returns (S,) bool: what stays alive after a layer, from the last token's weights (H, S)."""
    stays = torch.ones_like(kept)
    added = (row[..., None] * values).transpose(0, 1).flatten(1)[kept]
    cosines = torch.cosine_similarity(output[None] - added, output[None], dim=-1)
    if not state["fired"]:
        if (cosines < rule.layer_threshold).any():
            state["fired"] = True
            stays[kept] = added.norm(dim=-1) > rule.token_threshold
    elif "deep" in rule.modes:
        quiet = bool((cosines >= rule.exit_threshold).all())
        state["quiet"] = state["quiet"] + 1 if quiet else 0 if rule.consecutive_exit else state["quiet"]
        if state["quiet"] >= rule.exit_patience:
            stays[kept] = False
    return stays


@pytest.mark.parametrize("layout", ["tttItttt", "ItIttttt", "tttt"])
@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_equals_the_slow_reference(make_model, make_batch, family, name, layout):
    rule = VisiPruner(**{**THRESHOLDS, **RULES[name]})
    slow, model = make_model(family, attention="eager"), make_model(family)
    with torch.no_grad():
        embeds, visual = merged_inputs(model, make_batch(layout))
        expected, places = slow_reference(slow, embeds, visual, rule)
        output = run_decoder(model.model.language_model, embeds, visual, schedule=rule, use_cache=True)
    assert [live[0].tolist() for live in output.live] == places
    text = ~visual
    logits = model.lm_head(output.last_hidden_state)
    torch.testing.assert_close(logits[text], expected[text], rtol=1e-4, atol=1e-4)


def test_the_cache_holds_the_keys_and_values_that_were_there_before_the_masks(make_model, make_batch):
    model = make_model()
    with torch.no_grad():
        embeds, visual = merged_inputs(model, make_batch("tttItttt"))
        caches = [
            run_decoder(model.model.language_model, embeds, visual, schedule=schedule, use_cache=True).past_key_values
            for schedule in (None, VisiPruner(2, modes=["shallow"]))
        ]
    for name in ("keys", "values"):
        plain, masked = (getattr(cache.layers[0], name) for cache in caches)
        torch.testing.assert_close(plain, masked)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", sorted(RULES))
def test_a_batch_of_unlike_samples_is_its_samples(make_model, make_batch, name, side):
    model, rule = make_model(), VisiPruner(**{**THRESHOLDS, **RULES[name]})
    layouts = ("tttItttt", "ItIttttt", "ttttt", "tIt", "IItt")
    batch = make_batch(*layouts, side=side)
    with torch.no_grad():
        embeds, visual = merged_inputs(model, batch)
        decoder, mask = model.model.language_model, batch["attention_mask"]
        together = run_decoder(decoder, embeds, visual, attention_mask=mask, schedule=rule)
        for sample in range(len(layouts)):
            own = mask[sample] == 1
            alone = run_decoder(decoder, embeds[sample][own][None], visual[sample][own][None], schedule=rule)
            offset = 0 if side == "right" else len(own) - int(own.sum())
            slots = [(live[sample] - offset).tolist() for live in together.live]
            assert slots == [live[0].tolist() for live in alone.live]
            text = ~visual[sample][own]
            torch.testing.assert_close(
                together.last_hidden_state[sample][own][text], alone.last_hidden_state[0][text], rtol=1e-4, atol=1e-4
            )


# -- exits, from rows made by hand -------------------------------------------------------------------------------------


def live_counts(rule, loud_layers, num_layers=9):
    """Returns the live visual tokens of each layer of two samples, told by hand in which layers vision is loud."""
    visual = Selection(torch.tensor([[False, True, True, False]] * 2))
    state, live, counts = rule.new_state(), visual, []
    for layer in range(num_layers):
        before = layer - 1
        view = View(
            num_layers,
            layer,
            visual,
            live,
            before if before >= 0 else None,
            state,
            input_embeddings=None,
            tower=None,
            relevance=None,
            prompt=None,
            attention=None,
            next_layer_attention=None,
            last_query_attention=lambda layer=before: row_of([layer in loud for loud in loud_layers], layer),
            attention_rows=None,
            scores=None,
            hidden_states=None,
        )
        live = rule.live(view)
        counts.append([0, 0] if live is NO_VISUAL else live.mask.sum(dim=1).tolist())
    return [list(count) for count in zip(*counts, strict=True)]


def row_of(loud, layer):
    weights = torch.stack([torch.tensor([[0.5, 0.3, 0.1, 0.1] if yes else [0.5, 0.0, 0.0, 0.5]]) for yes in loud])
    values = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).expand(2, 1, 4, 2)
    return AttentionRow(layer, weights, values, torch.arange(4).expand(2, -1))


def test_quiet_layers_add_up_as_released_or_must_follow_each_other_as_in_the_paper():
    loud = [{2, 4}, {2, 4, 6}]  # loud at 2: fires; then quiet at 3, 5, 6, 7 and at 3, 5, 7
    assert live_counts(VisiPruner(1), loud) == [[2, 2, 2, 1, 1, 1, 0, 0, 0], [2, 2, 2, 1, 1, 1, 0, 0, 0]]
    paper = VisiPruner(1, consecutive_exit=True)
    assert live_counts(paper, loud) == [[2, 2, 2, 1, 1, 1, 1, 0, 0], [2, 2, 2, 1, 1, 1, 1, 1, 1]]
    assert live_counts(VisiPruner(1, exit_patience=3), loud)[0] == [2, 2, 2, 1, 1, 1, 1, 0, 0]


def test_layers_up_to_the_border_are_not_tested_and_the_middle_fires_once():
    assert live_counts(VisiPruner(2, modes=["middle"]), [{2}, {2, 4}])[0] == [2] * 9
    assert live_counts(VisiPruner(2, modes=["middle"]), [{2}, {2, 4}])[1] == [2] * 5 + [1] * 4
    assert live_counts(VisiPruner(2, token_threshold=0.3001), [{3}, {4}]) == [[2] * 4 + [0] * 5, [2] * 5 + [0] * 4]


# -- settings and back ends --------------------------------------------------------------------------------------------


def test_released_settings_are_read():
    released = {"mode": ["middle"], "shallow_mid_layer": 4, "layer_threshold": 0.9, "tokens_threshold": 0.1}
    assert VisiPruner.from_released(released) == VisiPruner(4, 0.9, 0.1, modes=("middle",))
    assert VisiPruner.from_released({}) == VisiPruner(6, 0.995, 0.2, 0.999, 2, ("shallow", "middle", "deep"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shallow_end": -1}, r"VisiPruner.shallow_end: got -1, expected a layer number \(int >= 0\)"),
        ({"shallow_end": 2.0}, r"VisiPruner.shallow_end: got 2.0"),
        ({"layer_threshold": 1.5}, "VisiPruner.layer_threshold: got 1.5, expected a cosine, 0 to 1"),
        ({"layer_threshold": "0.9"}, "VisiPruner.layer_threshold: got '0.9'"),
        ({"exit_threshold": -0.1}, "VisiPruner.exit_threshold: got -0.1, expected a cosine, 0 to 1"),
        ({"token_threshold": -1}, "VisiPruner.token_threshold: got -1, expected a length, at least 0"),
        ({"token_threshold": float("nan")}, "VisiPruner.token_threshold: got nan"),
        ({"exit_patience": 0}, "VisiPruner.exit_patience: got 0, expected an int >= 1"),
        ({"modes": ["shallow", "late"]}, "VisiPruner.modes: got .*'late'.*expected a list of shallow, middle, deep"),
        ({"modes": []}, r"VisiPruner.modes: got \[\]"),
        ({"modes": "middle"}, "VisiPruner.modes: got 'middle'"),
        ({"modes": 3}, "VisiPruner.modes: got 3"),
        ({"modes": None}, "VisiPruner.modes: got None"),
        ({"visual_self_attention": "no"}, "VisiPruner.visual_self_attention: got 'no', expected true or false"),
        ({"consecutive_exit": 1}, "VisiPruner.consecutive_exit: got 1, expected true or false"),
        ({"first_layer": "7b"}, "VisiPruner.first_layer: got '7b', expected merge or half"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        VisiPruner(**settings)


def test_an_unknown_released_key_is_named():
    with pytest.raises(ValueError, match=r"got key .token_threshold., expected one of mode, shallow_mid_layer"):
        VisiPruner.from_released({"token_threshold": 0.2})


def test_a_border_beyond_the_decoder_is_refused(make_model):
    with pytest.raises(ValueError, match=r"VisiPruner.shallow_end: got 7, expected at most 6, .* has 6 layers"):
        make_model().schedule = VisiPruner(7)
    make_model().schedule = VisiPruner(6)


def test_flash_attention_is_refused_where_masks_need_it_to_hide_keys(make_model, make_batch):
    model = make_model()
    with torch.no_grad():
        embeds, visual = merged_inputs(model, make_batch("tttItttt"))
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"VisiPruner's shallow mode.*expected sdpa or eager"):
        run_decoder(model.model.language_model, embeds, visual, schedule=VisiPruner(2))
