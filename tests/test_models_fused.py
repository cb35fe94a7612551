"""FusedLlavaForConditionalGeneration beside Hugging Face's LLaVA: loss, loading, saving, switching, freezing."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from models import FusedLlavaForConditionalGeneration, StagePlan, run_decoder
from models.attention import UnsupportedDecoderError, unwrap
from models.schedules import VTW, Dense, Fused, Within

WINDOW = {"enter": 2, "exit": 4}
KV = {"layers": [2, 4], "update": "kv"}
PYRAMID = {"enter": 1, "exit": 5, "keep": {2: 3, 4: 1}}


def hugging_face(model):
    fields = {key: value for key, value in model.config.to_dict().items() if key not in ("stages", "model_type")}
    theirs = LlavaForConditionalGeneration(LlavaConfig(**fields)).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs


def answers(batch, last=3):
    """Labels on the last tokens of every sample."""
    mask = batch["attention_mask"]
    late = mask.flip(1).cumsum(1).flip(1) <= last
    return batch["input_ids"].where(late & (mask == 1), -100)


# -- loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, torch.tensor(17)])
def test_the_loss_and_its_gradients_are_hugging_faces(make_model, make_batch, items):
    model, batch = make_model("qwen2"), make_batch("ttItttt", "tttttt")
    theirs, labels = hugging_face(model), answers(batch)
    ours = model(**batch, labels=labels, num_items_in_batch=items)
    reference = theirs(**batch, labels=labels, num_items_in_batch=items)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, reference.loss)
    ours.loss.backward()
    reference.loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if expected[name].grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stages", [None, WINDOW, KV, PYRAMID])
def test_two_accumulated_halves_equal_one_batch(make_model, make_batch, stages):
    model, batch = make_model("llama", stages), make_batch("ttItttt", "ttItttt")
    labels = answers(batch, 3)
    labels[0] = answers(batch, 1)[0]
    items = (labels[:, 1:] != -100).sum()
    whole = model(**batch, labels=labels, num_items_in_batch=items).loss
    halves = [
        model(
            input_ids=batch["input_ids"][half],
            attention_mask=batch["attention_mask"][half],
            pixel_values=batch["pixel_values"][half],
            labels=labels[half],
            num_items_in_batch=items,
        ).loss
        for half in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(sum(halves), whole, rtol=1e-5, atol=1e-6)


def test_the_head_sees_labelled_positions_alone(make_model, make_batch):
    model, batch = make_model("llama", WINDOW), make_batch("ttItttt", "tttttt")
    labels, seen = answers(batch), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    model(**batch, labels=labels)
    assert seen == [int((labels[:, 1:] != -100).sum())]


def test_a_batch_without_labels_has_loss_zero_and_a_graph(make_model, make_batch):
    model, batch = make_model("llama", WINDOW).train(), make_batch("ttIttt")
    loss = model(**batch, labels=torch.full_like(batch["input_ids"], -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert model.lm_head.weight.grad is not None


def test_a_label_right_after_the_image_is_refused_when_staged(make_model, make_batch):
    batch = make_batch("ttIt")
    labels = answers(batch, 1)
    with pytest.raises(ValueError, match="directly after a visual token"):
        make_model("llama", WINDOW)(**batch, labels=labels)
    assert make_model("llama")(**batch, labels=labels).loss.isfinite()


# -- inputs -------------------------------------------------------------------------------------------------------


def test_a_wrong_number_of_image_tokens_is_refused(make_model, make_batch):
    batch = make_batch("ttItt")
    with pytest.raises(ValueError, match="do not match"):
        make_model("llama", WINDOW)(**{**batch, "input_ids": batch["input_ids"][:, 3:], "attention_mask": None})


def test_logits_to_keep(make_model, make_batch):
    model, batch = make_model("llama", WINDOW), make_batch("ttItttt")
    whole = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([0, 8])).logits, whole[:, [0, 8]])
    assert model(**batch, labels=answers(batch), logits_to_keep=1).logits.shape[1] == 1


def test_hidden_states_are_refused_by_name(make_model, make_batch):
    with pytest.raises(ValueError, match="output_hidden_states"):
        make_model()(**make_batch("ttItt"), output_hidden_states=True)


def test_a_foreign_filled_cache_is_refused(make_model, make_batch):
    model, batch = make_model("llama"), make_batch("ttItt")
    cache = hugging_face(model)(**batch, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values"):
        model(**batch, past_key_values=cache)
    cache = model(**batch, use_cache=True).past_key_values
    cache.layers.pop()
    with pytest.raises(ValueError, match="past_key_values: got a cache of 5 layers, expected 6 layers"):
        model(**batch, past_key_values=cache)


@pytest.mark.parametrize("stages", [None, WINDOW, KV])
def test_a_cache_that_is_cropped_past_an_image_is_that_of_the_text_before(make_model, make_batch, stages):
    model, two, more = make_model("llama", stages), make_batch("ttItttItt", "tttIttttt"), torch.tensor([[5, 6], [7, 8]])
    size = 8  # the second image of the first sample begins behind it, in the second sample there is text alone
    first = {"input_ids": two["input_ids"][:, :size], "attention_mask": two["attention_mask"][:, :size]}
    first["pixel_values"] = two["pixel_values"][[0, 2]]
    mask = torch.cat([first["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1)
    with torch.no_grad():
        cache = model(**two, use_cache=True).past_key_values
        cache.crop(size - two["input_ids"].shape[1])
        found = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
        whole = torch.cat([first["input_ids"], more], dim=1)
        expected = model(input_ids=whole, attention_mask=mask, pixel_values=first["pixel_values"]).logits[:, -2:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("attention_mask", lambda mask: torch.nn.functional.pad(mask, (0, 2), value=1)),
        ("attention_mask", lambda mask: mask[:1]),
        ("visual", lambda mask: mask[:, 1:]),
        ("visual", lambda mask: mask[0]),
        ("visual", lambda mask: mask.tolist()),
        ("query_mask", lambda mask: mask[:, 1:]),
        ("relevance", lambda mask: mask[:, 1:]),
    ],
)
def test_a_mask_of_another_shape_is_refused_by_name(make_model, make_batch, name, change):
    model, batch = make_model("llama", WINDOW), make_batch("ttItt", "tttttt", side="left")
    with pytest.raises(ValueError, match=f"{name}: got .*, expected a tensor \\(2, "):
        model(**{**batch, name: change(batch["attention_mask"])})


@pytest.mark.parametrize(
    ("schedule", "options", "words"),
    [
        ("fastv", {"prefill_chunk_size": 3}, "prefill_chunk_size: got 3 under FastV"),
        ("trained", {"prefill_chunk_size": 3}, "prefill_chunk_size: got 3 under Fused"),
        ("visipruner", {"use_cache": False}, "use_cache: got False under VisiPruner"),
        ("trained", {"cache_implementation": "offloaded"}, "past_key_values: got an offloaded cache"),
    ],
)
def test_settings_of_generation_that_a_schedule_cannot_follow_are_refused(
    make_model, make_batch, schedule, options, words
):
    with pytest.raises(ValueError, match=words):
        make_model("llama", WINDOW).generate(**make_batch("ttItt"), schedule=schedule, max_new_tokens=2, **options)


# -- schedules ----------------------------------------------------------------------------------------------------


def test_switching_the_schedule_leaves_no_trace(make_model, make_batch):
    model, batch = make_model("llama", WINDOW), make_batch("ttItttt")
    trained = model(**batch).logits
    model.schedule = Dense()
    assert not torch.equal(model(**batch).logits[:, -1], trained[:, -1])
    model.schedule = None
    assert torch.equal(model(**batch).logits, trained)
    assert isinstance(model.schedule, Fused)


def test_a_schedule_beyond_the_decoder_is_refused_when_assigned(make_model):
    with pytest.raises(ValueError, match=r"stages.exit: got 9, beyond the decoder's 6 layers"):
        make_model().schedule = Fused(StagePlan(2, 9))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"enter": 4, "exit": 2}, "stages.exit: got 2"),
        ({"enter": 1, "exit": 40}, "beyond the decoder's 6 layers"),
        ({"enter": 1, "exit": 4, "upadte": "kv"}, "stages.upadte: unknown key"),
    ],
)
def test_a_wrong_plan_in_the_config_is_refused(make_config, stages, message):
    with pytest.raises(ValueError, match=message):
        make_config("llama", stages)


def test_a_pruner_may_not_train(make_model, make_batch):
    class Pruner(Dense):
        trainable = False

    model, batch = make_model().train(), make_batch("ttItt")
    model.schedule = Pruner()
    with pytest.raises(ValueError, match="Pruner"):
        model(**batch, labels=answers(batch))


# -- saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [None, WINDOW, KV, PYRAMID])
def test_save_and_load_round_trip(make_model, make_batch, tmp_path, stages):
    model, batch = make_model("qwen3", stages), make_batch("ttItttt")
    model.save_pretrained(tmp_path)
    loaded = FusedLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.stages == model.config.stages
    assert json.loads((tmp_path / "config.json").read_text()).get("stages") == model.config.stages
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    expected = LlavaForConditionalGeneration if stages is None else FusedLlavaForConditionalGeneration
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is expected
    assert type(AutoConfig.from_pretrained(tmp_path)) is expected.config_class


def test_an_ordinary_llava_checkpoint_loads_dense(make_model, make_batch, tmp_path):
    model, batch = make_model("llama"), make_batch("ttItttt")
    theirs = hugging_face(model)
    theirs.save_pretrained(tmp_path)
    loaded, report = FusedLlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.config.stages is None
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(loaded(**batch).logits, theirs(**batch).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(tmp_path / "again/model.safetensors").keys()


def test_a_plan_can_be_given_while_loading(make_model, tmp_path):
    hugging_face(make_model("llama")).save_pretrained(tmp_path)
    loaded = FusedLlavaForConditionalGeneration.from_pretrained(tmp_path, stages=WINDOW)
    assert loaded.schedule == Fused(StagePlan(**WINDOW))


# -- decoders -----------------------------------------------------------------------------------------------------


def test_another_decoder_is_refused_by_name(make_batch):
    decoder = GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10))
    with pytest.raises(UnsupportedDecoderError, match=r"got GPT2Model, expected one of LlamaModel.*SmolLM3Model"):
        run_decoder(decoder, torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.bool))


def test_wrapped_decoders_work(make_model):
    decoder = make_model().model.language_model
    inner = get_peft_model(decoder, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert unwrap(inner) is decoder
    assert unwrap(torch.nn.parallel.DataParallel(decoder)) is decoder


# -- what training must not do ------------------------------------------------------------------------------------


def frozen_but_projector(model):
    model.train().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


@pytest.mark.parametrize(("stages", "first"), [(WINDOW, 2), (KV, 2), (PYRAMID, 1)])
def test_align_keeps_nothing_of_the_layers_before_vision(make_model, make_batch, stages, first):
    model = frozen_but_projector(make_model("llama", stages))
    batch, kept, seen = make_batch("ttttItttt"), {}, []
    for number, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: seen.append(number))

    def pack(tensor):
        kept[seen[-1] if seen else -1] = kept.get(seen[-1] if seen else -1, 0) + tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, labels=answers(batch)).loss
    assert [kept.get(layer, 0) for layer in range(first - 1)] == [0] * (first - 1)
    assert kept[first] > 0
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0


def modules_run(model, batch):
    """Returns the modules in the order they ran, forward and backward, and the projector's gradient."""
    order = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: order.append(("forward", name)))
    for number, layer in enumerate(model.model.language_model.layers):
        layer.register_full_backward_hook(lambda *_, number=number: order.append(("backward", number)))
    model(**batch, labels=answers(batch)).loss.backward()
    return order, model.model.multi_modal_projector.linear_1.weight.grad


@pytest.mark.parametrize("stages", [None, WINDOW, KV, PYRAMID])
def test_a_batch_without_image_runs_the_same_modules_forward_and_backward(make_model, make_batch, stages):
    with_image, grad = modules_run(frozen_but_projector(make_model("llama", stages)), make_batch("ttItttt"))
    assert grad.abs().max() > 0
    text_alone, grad = modules_run(frozen_but_projector(make_model("llama", stages)), make_batch("tttttt"))
    assert with_image == text_alone
    assert torch.equal(grad, torch.zeros(32, 16))


def test_what_began_as_llava_is_saved_as_fused(make_model, tmp_path):
    hugging_face(make_model("llama")).save_pretrained(tmp_path / "llava")
    FusedLlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", stages=WINDOW).save_pretrained(
        tmp_path / "fused"
    )
    saved = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert saved["model_type"] == "fused_llava"
    assert saved["architectures"] == ["FusedLlavaForConditionalGeneration"]
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "fused").schedule == Fused(StagePlan(**WINDOW))


def test_a_pruner_on_a_trained_plan_stays_inside_its_window(make_model, make_batch):
    model, batch = make_model("llama", WINDOW), make_batch("ttItttt")
    model.schedule = VTW(layer=3)
    assert model.schedule == Within(StagePlan(**WINDOW), VTW(layer=3))
    cache = model(**batch, use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [6, 6, 10, 6, 6, 6]
