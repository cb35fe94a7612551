"""Packed rows: each layer runs on the live tokens of all samples in one row, and computes what padded rows give."""

import itertools

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from models.auto import FusedAutoModel
from models.batch_facts import BatchFacts
from models.schedules import Gated
from tests.conftest import IMAGE, LAYERS, VISUAL
from tests.test_models_batch_facts import PLANS, NoWaiting, step
from tests.test_models_families import answers as family_answers
from tests.test_models_fused import answers
from tests.tiny_vlms import TINY

LAYOUTS = ("ttItttt", "tttttt", "tItItttttt", "tIttt")
CHOOSING = {"enter": 1, "exit": 5, "keep": {2: 3, 4: 0.25}}


def labelled(make_batch, *layouts, side="right"):
    batch = {name: value for name, value in make_batch(*layouts, side=side).items() if value is not None}
    return batch | {"labels": answers(batch, 2)}


def assert_same_step(model, batch, **more):
    assert_same(step(model, batch, packed=True, **more), step(model, batch))


def assert_same(found, expected):
    (loss, gradients), (wanted, theirs) = found, expected
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())  # some are 0 but for rounding
    for name, gradient in gradients.items():
        within = 1e-4 * float(theirs[name].abs().max()) + 1e-6 * largest
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=within, msg=name)


@pytest.fixture(params=list(PLANS))
def plan(request):
    return PLANS[request.param]


@pytest.mark.parametrize(
    ("attention", "side"), [("sdpa", "left"), ("eager", "right"), ("sdpa_packed", "left"), ("sdpa_packed", "right")]
)
@pytest.mark.parametrize("family", ["qwen2", "smollm3"])  # with a sliding window, with layers without rotary
def test_loss_and_gradients_are_those_of_padded_rows(make_model, make_batch, family, plan, attention, side):
    assert_same_step(make_model(family, plan, attention).train(), labelled(make_batch, *LAYOUTS[:3], side=side))


@pytest.mark.parametrize("layouts", [("tttt", "tt"), ("ttIttt",), ("ttIttt", "ttIttt")], ids=["text", "one", "equal"])
def test_batches_without_image_or_padding_are_packed_too(make_model, make_batch, plan, layouts):
    assert_same_step(make_model("llama", plan, "sdpa_packed").train(), labelled(make_batch, *layouts))


def test_every_layer_runs_on_the_live_tokens_alone(make_model, make_batch, plan):
    model, batch, shapes = make_model("llama", plan, "sdpa_packed"), labelled(make_batch, *LAYOUTS), []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    padded = model(**batch)
    shapes.clear()
    packed = model(**batch, packed=True)
    kv = plan is not None and plan.get("update") == "kv"
    text, live = sum(layout.count("t") for layout in LAYOUTS), padded.live
    expected = [text if kv else sum(map(len, layer)) for layer in live]
    assert shapes == [(1, rows) for rows in expected]
    assert min(expected) == text or plan is None
    for theirs, ours in zip(live, packed.live, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True))


def test_no_conversation_sees_another(make_model, make_batch, plan):
    model, batch = make_model("llama", plan, "sdpa_packed"), labelled(make_batch, *LAYOUTS)
    first = model(**batch, packed=True, logits_to_keep=0).logits
    changed = {**batch, "input_ids": batch["input_ids"].clone(), "pixel_values": batch["pixel_values"].clone()}
    changed["input_ids"][2, -1] = 7  # of the third sample alone
    changed["pixel_values"][1:3] += 1.0
    second = model(**changed, packed=True, logits_to_keep=0).logits
    text = (batch["attention_mask"] == 1) & (batch["input_ids"] != IMAGE)
    for sample in (0, 1, 3):
        assert torch.equal(first[sample][text[sample]], second[sample][text[sample]])
    assert not torch.equal(first[2][text[2]], second[2][text[2]])


def test_a_packed_step_with_facts_waits_for_nothing(make_model, make_batch, plan):
    model, batch = make_model("qwen2", plan, "sdpa_packed").train(), labelled(make_batch, *LAYOUTS)
    facts = BatchFacts.of(batch, IMAGE)
    loss, _ = step(model, batch)
    with NoWaiting():
        found, _ = step(model, batch, packed=True, facts=facts)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_packed"])
@pytest.mark.parametrize("plan", [None, {"enter": 1, "exit": 5, "keep": {2: 0.5}}], ids=["dense", "pyramid"])
@pytest.mark.parametrize("name", TINY)
def test_every_family_computes_the_same_packed(name, plan, attention):
    torch.manual_seed(0)
    model = FusedAutoModel.from_config(TINY[name].config(), stages=plan).train()
    model.set_attn_implementation({"text_config": attention})
    batch = TINY[name].batch("ttItttt", "tttttt", "tItItttttt")
    assert_same_step(model, batch | {"labels": family_answers(batch)})


def test_checkpointing_changes_nothing(make_model, make_batch, plan):
    model, batch = make_model("llama", plan, "sdpa_packed").train(), labelled(make_batch, *LAYOUTS)
    expected = step(model, batch, packed=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = step(model, batch, packed=True)
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient)


# -- flash-attention's form ------------------------------------------------------------------------------------------


def flash_reference(module, query, key, value, attention_mask, **options):
    """What flash-attention's variable-length form computes, one sequence after the other."""
    assert attention_mask is None
    borders = [options.pop(name).tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    longest = [options.pop(name) for name in ("max_length_q", "max_length_k")]
    assert [max(end - start for start, end in itertools.pairwise(one)) for one in borders] == longest
    outputs = []
    for first, end, first_key, end_key in zip(borders[0], borders[0][1:], borders[1], borders[1][1:], strict=False):
        parts = query[:, :, first:end], key[:, :, first_key:end_key], value[:, :, first_key:end_key]
        outputs.append(sdpa_attention_forward(module, *parts, None, **options)[0])
    return torch.cat(outputs, dim=1), None


@pytest.fixture
def with_flash(make_model):
    AttentionInterface.register("flash_reference", flash_reference)

    def make(family, plan):
        model = make_model(family, plan).train()
        model.model.language_model.config._attn_implementation = "flash_reference"
        return model

    return make


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", [name for name in PLANS if name != "kv"])
def test_flash_attention_is_given_the_borders_of_the_sequences(with_flash, make_model, make_batch, family, name):
    batch = labelled(make_batch, *LAYOUTS)
    expected = step(make_model(family, PLANS[name]).train(), batch)
    assert_same(step(with_flash(family, PLANS[name]), batch, packed=True, facts=BatchFacts.of(batch, IMAGE)), expected)


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("gemma3", "molmo2-qwen3", "molmo2-olmo")])
def test_every_family_hands_the_borders_on(name, with_flash):
    torch.manual_seed(0)
    model = FusedAutoModel.from_config(TINY[name].config(), stages=CHOOSING).train()
    batch = TINY[name].batch("ttItttt", "tttttt", "tItItttttt")
    batch["labels"] = family_answers(batch)
    text = model.config.get_text_config()
    if getattr(text, "sliding_window", None) is not None:
        text.sliding_window = None
        for layer in model.model.get_decoder().layers:
            layer.self_attn.sliding_window = None
    loss, _ = step(model, batch)
    text._attn_implementation = "flash_reference"
    found, _ = step(model, batch, packed=True)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_refuses_visual_tokens_without_queries(with_flash, make_batch, packed):
    model = with_flash("llama", {"layers": [0, 4], "update": "kv"})
    with pytest.raises(ValueError, match="flash attention, which cannot express visual tokens that only give keys"):
        model(**labelled(make_batch, *LAYOUTS), packed=packed)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_packing_is_for_training(make_model, make_batch):
    model, batch = make_model("llama", CHOOSING), labelled(make_batch, *LAYOUTS)
    with pytest.raises(ValueError, match="packed: got True with a cache"):
        model(**batch, packed=True, use_cache=True)
    with pytest.raises(ValueError, match="packed: got True with Within"):
        model(**batch, packed=True, schedule="visipruner")
    with pytest.raises(ValueError, match="cu_seq_lens_q: got a value, expected None: attention is causal, packed=True"):
        model(**batch, cu_seq_lens_q=torch.tensor([0, VISUAL]))


@pytest.mark.parametrize("update", ["full", "kv"])
@pytest.mark.parametrize("attention", ["sdpa", "sdpa_packed"])
def test_layers_behind_gates_are_packed_too(make_model, make_batch, attention, update):
    gated = Gated(torch.linspace(0.2, 0.8, LAYERS), torch.eye(LAYERS)[0], update)
    model, batch = make_model("llama", None, attention).train(), labelled(make_batch, *LAYOUTS)
    assert_same(step(model, batch, packed=True, schedule=gated), step(model, batch, schedule=gated))
