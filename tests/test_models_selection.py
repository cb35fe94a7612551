"""Choices of visual tokens that learn: hard forward, soft backward; and the scorer that `select: learned` adds."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText

from models import FAMILIES, FusedAutoModel, StagePlan
from models.schedules import FastV, Fused, ScheduleError
from models.soft_choice import soft_top_k, straight_through
from tests.slow_reference import SlowDecoder
from tests.tiny_vlms import IMAGE, TINY

PLANS = {
    "attention": {"enter": 1, "exit": 5, "keep": {2: 0.75, 4: 1}, "gradient": "straight_through"},
    "kv_attention": {"layers": [0, 2, 3, 5], "update": "kv", "keep": {3: 2, 5: 1}, "gradient": "straight_through"},
    "learned": {"enter": 0, "exit": 5, "keep": {0: 0.75, 3: 1}, "select": "learned"},
    "late": {"enter": 2, "exit": 6, "keep": {2: 2}, "select": "learned"},
    "kv_learned": {"layers": [0, 2, 3, 5], "update": "kv", "keep": {0: 3, 3: 1}, "select": "learned"},
}
LEARNED = {name: plan for name, plan in PLANS.items() if plan.get("select") == "learned"}
BATCH = ("ttItttt", "ttItItt", "tttt", "tIt")


@pytest.fixture(params=["llava", "qwen3_vl"])
def family(request):
    return TINY[request.param]


@pytest.fixture(params=list(PLANS))
def plan(request):
    return PLANS[request.param]


def build(family, plan, attention="sdpa"):
    torch.manual_seed(3)
    return FusedAutoModel.from_config(family.config(), stages=plan, attn_implementation=attention).eval()


class Ungated(Fused):
    def token_gates(self, view):
        return None


def answers(batch, last=2):
    late = batch["attention_mask"].flip(1).cumsum(1).flip(1) <= last
    return batch["input_ids"].where(late & (batch["attention_mask"] == 1), -100)


def live_of(output):
    return [[slots.tolist() for slots in layer] for layer in output.live]


def scorer_grads(model):
    return [weight.grad for name, weight in model.named_parameters() if "token_scorer" in name]


# -- the relaxation ---------------------------------------------------------------------------------------------------


def test_the_soft_choice_adds_up_to_the_number_kept_and_moves_only_by_differences():
    scores = torch.randn(4, 9).double()
    mask = torch.rand(4, 9) < 0.8
    counts = [1, 3, 2, 4]
    soft = soft_top_k(scores, mask, counts)
    assert soft[~mask].abs().max() == 0
    torch.testing.assert_close(soft.sum(dim=1), torch.tensor(counts).float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(soft_top_k(scores + 7, mask, counts), soft, rtol=0, atol=1e-4)
    for row, chosen, count in zip(
        (1e3 * scores).masked_fill(~mask, -1e9), soft_top_k(1e3 * scores, mask, counts), counts, strict=True
    ):
        assert set((chosen > 0.5).nonzero().flatten().tolist()) == set(row.topk(count).indices.tolist())


def test_a_choice_without_a_choice_has_no_gradient():
    scores = torch.randn(4, 5, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True] * 5, [False] * 5, [True, True, False, False, False]])
    gate = straight_through(scores, mask, [5, 0, 3, 7])
    assert torch.equal(gate, torch.ones(4, 5))
    assert soft_top_k(scores, mask, [5, 0, 3, 7]).tolist() == [
        [1.0] * 5,
        [0.0] * 5,
        [0.0] * 5,
        [1.0, 1.0, 0.0, 0.0, 0.0],
    ]
    gate.square().sum().backward()
    assert scores.grad.tolist() == [[0.0] * 5] * 4


@pytest.mark.parametrize("counts", [[1, 2], [3, 1]])
def test_the_gate_is_one_with_the_gradient_of_the_soft_choice(counts):
    scores, mask, pulls = torch.randn(2, 6, requires_grad=True), torch.rand(2, 6) < 0.9, torch.randn(2, 6)
    gate = straight_through(scores, mask, counts)
    assert torch.equal(gate, torch.ones(2, 6))
    (gate * pulls).sum().backward()
    step = 0.05
    for place in range(6):
        moved = torch.zeros(2, 6)
        moved[:, place] = step
        up, down = (soft_top_k(scores.detach() + sign * moved, mask, counts) for sign in (1, -1))
        torch.testing.assert_close(
            scores.grad[:, place], ((up - down) * pulls).sum(dim=1) / (2 * step), rtol=0, atol=2e-3
        )


# -- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tttItttt", "ItIttt", "tttt"])
def test_forward_is_the_hard_choice_of_the_slow_reference(family, plan, layout):
    model, batch = build(family, plan, "eager"), family.batch(layout)
    expected, places = SlowDecoder(model, batch).run(model.schedule)
    output = model(**batch)  # with gradients
    assert [live[0].tolist() for live in output.live] == places
    text = batch["input_ids"][0] != IMAGE
    torch.testing.assert_close(output.logits[0][text], expected[text], rtol=1e-4, atol=2e-4)


def test_gradients_change_no_bit_of_the_forward(family, plan):
    model, batch = build(family, plan), family.batch("ttItttt", "tItIttt", "tttt")
    given = {**batch, "labels": answers(batch), "logits_to_keep": 0}
    hard = Fused(StagePlan.from_dict({**plan, "gradient": None}))
    with torch.no_grad():
        expected = model(**given, schedule=hard)
    output = model.train()(**given)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.logits, expected.logits)
    assert live_of(output) == live_of(expected)


@pytest.mark.parametrize("plan", LEARNED.values(), ids=list(LEARNED))
def test_a_sample_in_a_padded_batch_is_itself_alone(family, plan):
    model = build(family, plan)
    for side in ("left", "right"):
        batch = family.batch("ttItttt", "t" * 15, "tttt", side=side)
        valid, shape = batch["attention_mask"][0] == 1, batch["input_ids"].shape
        single = {key: value[0][valid][None] if value.shape == shape else value for key, value in batch.items()}
        with torch.no_grad():
            together, alone = model(**batch), model(**single)
        first = int(valid.nonzero()[0])
        assert [(layer[0] - first).tolist() for layer in together.live] == [layer[0].tolist() for layer in alone.live]
        text = single["input_ids"][0] != IMAGE
        torch.testing.assert_close(together.logits[0][valid][text], alone.logits[0][text], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("plan", LEARNED.values(), ids=list(LEARNED))
def test_training_chooses_what_inference_chooses_and_no_answer_decides(family, plan):
    """Two turns: `tt I tt | aa | tt | aa`; the labelled ones are answers."""
    model, batch = build(family, plan), family.batch("ttIttttttttt")
    size = batch["input_ids"].shape[1]
    turns = torch.full_like(batch["input_ids"], -100)
    for first in (size - 6, size - 2):
        turns[:, first : first + 2] = batch["input_ids"][:, first : first + 2]
    last = answers(batch)
    prompt = {key: value[:, : size - 2] if value.shape == (1, size) else value for key, value in batch.items()}
    with torch.no_grad():
        trained, asked = live_of(model(**batch, labels=last)), live_of(model(**prompt))
        before = model(**batch, labels=turns)
        assert [[one for one in layer[0] if one < size - 2] for layer in trained] == [layer[0] for layer in asked]
        chosen = {"answer": 0, "instruction": 0}
        for place in range(size - 7, size):
            if int(batch["input_ids"][0, place]) == IMAGE:
                continue
            for token in range(3, 30):
                changed = {**batch, "input_ids": batch["input_ids"].clone()}
                changed["input_ids"][0, place] = token
                kind = "answer" if turns[0, place] != -100 else "instruction"
                chosen[kind] += live_of(model(**changed, labels=turns)) != live_of(before)
    assert chosen["answer"] == 0
    assert chosen["instruction"] > 0


@pytest.mark.parametrize("plan", LEARNED.values(), ids=list(LEARNED))
def test_one_decode_step_equals_a_longer_prefill(family, plan):
    model, batch = build(family, plan), family.batch("ttIttttt")
    size = batch["input_ids"].shape[1]
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    prompt = {key: value[:, : size - 1] if value.shape[:2] == (1, size) else value for key, value in batch.items()}
    with torch.no_grad():
        whole = model(**batch, labels=labels, logits_to_keep=0).logits[:, -1]
        first = model(**prompt, use_cache=True)
        deltas = getattr(model.model, "rope_deltas", None)
        positions = {} if deltas is None else {"position_ids": (size - 1 + deltas)[None].expand(3, -1, -1)}
        step = model(
            input_ids=batch["input_ids"][:, -1:],
            attention_mask=batch["attention_mask"],
            past_key_values=first.past_key_values,
            **positions,
        )
    torch.testing.assert_close(step.logits[:, -1], whole, rtol=1e-4, atol=2e-4)


def test_an_assistant_s_candidates_change_no_choice(family):
    model, batch = build(family, PLANS["late"]), family.batch("ttItttt")
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "bad_words_ids": [[one] for one in range(50, 59)],
    }
    expected = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, prompt_lookup_num_tokens=3), expected)


# -- backward ---------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_soft_relaxation(family, plan):
    """Against finite differences of the slow reference, whose kept tokens weigh 1 + p - p at the start."""
    model = build(family, plan, "eager").double()
    batch = {key: one.double() if one.is_floating_point() else one for key, one in family.batch("ttIttttt").items()}
    labels, last = answers(batch), batch["input_ids"].shape[1] - 3
    marks = ("token_scorer",) if plan in LEARNED.values() else ("q_proj", "k_proj")
    learning = {
        name: weight
        for name, weight in model.model.get_decoder().named_parameters()
        if any(mark in name for mark in marks)
    }
    decoder = SlowDecoder(model, batch)
    decoder.run(model.schedule, last=last)
    base = decoder.soft
    assert any(((soft > 0.01) & (soft < 0.99)).any() for soft in base)

    def by_the_gates():  # what they add to the loss
        runs = [decoder.run(model.schedule, last=last, base=one)[0] for one in (base, None)]
        soft, hard = (cross_entropy(logits[last:-1], batch["input_ids"][0, last + 1 :]) for logits in runs)
        return float(soft - hard)

    torch.manual_seed(0)
    direction = {name: torch.randn_like(weight) for name, weight in learning.items()}
    slopes, values, step = [], [], 3e-4
    for schedule in (model.schedule, Ungated(model.schedule.plan)):
        model.zero_grad()
        model(**batch, labels=labels, schedule=schedule).loss.backward()
        slopes.append(
            sum(
                (learning[name].grad * one).sum().item()
                for name, one in direction.items()
                if learning[name].grad is not None
            )
        )
    for move in (step, -2 * step):
        with torch.no_grad():
            for name, weight in learning.items():
                weight.add_(move * direction[name])
        values.append(by_the_gates())
    expected = (values[0] - values[1]) / (2 * step)
    assert abs(expected) > 1e-3
    assert slopes[0] - slopes[1] == pytest.approx(expected, rel=0.02)


def test_checkpointing_changes_no_gradient_and_reentrant_checkpointing_is_refused(family, plan):
    batch, grads = family.batch("ttItttt", "tttttt"), []
    model = build(family, plan).train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch, labels=answers(batch)).loss.backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="got use_reentrant=True, expected False under"):
        model(**batch, labels=answers(batch))


def test_a_batch_without_image_runs_the_same_modules_and_gives_the_scorer_a_gradient_of_zero(family, plan):
    orders, backward, model = [], [], build(family, plan).train()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: orders[-1].append(name))
        module.register_full_backward_pre_hook(lambda *_, name=name: backward[-1].append(name))
    for layout in ("ttItttt", "tttttt"):
        orders.append([])
        backward.append([])
        batch = family.batch(layout)
        model.zero_grad()
        model(**batch, labels=answers(batch)).loss.backward()
        if plan in LEARNED.values() and layout == "ttItttt":
            assert all(grad.abs().max() > 0 for grad in scorer_grads(model))
    assert list(dict.fromkeys(orders[0])) == list(dict.fromkeys(orders[1]))
    decoder_alone = [[name for name in order if "language_model" in name] for order in backward]
    assert decoder_alone[0] == decoder_alone[1]  # ZeRO-3 gathers weights in backward too
    assert all(grad is not None and grad.abs().max() == 0 for grad in scorer_grads(model))


def test_a_step_under_a_plan_without_the_scorer_gives_it_a_gradient_of_zero(family):
    config = build(family, {"enter": 1, "exit": 5}).config
    plans = {"all": {"enter": 1, "exit": 5}, "few": PLANS["learned"], "dense": None}
    fields = {**config.to_dict(), "plans": plans}
    model = FusedAutoModel.from_config(type(config)(**fields)).train()
    batch = family.batch("ttItttt")
    for name, learns in (("few", True), ("all", False), ("dense", False)):
        model.zero_grad()
        model(**batch, labels=answers(batch), schedule=name).loss.backward()
        assert all(grad is not None and (grad.abs().max() > 0) == learns for grad in scorer_grads(model)), name


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def test_the_scorer_is_saved_and_loaded_with_the_model(family, tmp_path):
    model, batch = build(family, PLANS["late"]), family.batch(*BATCH)
    model.save_pretrained(tmp_path)
    assert sum("token_scorer" in name for name in load_file(tmp_path / "model.safetensors")) == 4
    for auto in (FusedAutoModel, AutoModelForImageTextToText):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        assert loaded.schedule == Fused(StagePlan.from_dict(PLANS["late"]))
        with torch.no_grad():
            assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)
    assert all(
        FAMILIES[family.family].part_of(name) == "projector"
        for name, _ in loaded.named_parameters()
        if "token_scorer" in name
    )


def test_an_ordinary_checkpoint_gets_a_random_scorer_and_a_plan_of_attention_none(family, tmp_path):
    family.hugging_face().save_pretrained(tmp_path)
    for plan, added in ((PLANS["late"], 4), (PLANS["attention"], 0)):
        model, report = FusedAutoModel.from_pretrained(tmp_path, stages=plan, output_loading_info=True)
        assert len(report["missing_keys"]) == added
        assert all("token_scorer" in name for name in report["missing_keys"])
        assert model.config.stages["gradient"] == plan.get("gradient")
    scorer = FusedAutoModel.from_pretrained(tmp_path, stages=PLANS["late"]).model.get_decoder().token_scorer
    assert 0.1 < float(scorer.feature.weight.std()) < 0.5  # the config's initializer_range is 0.3
    assert float(scorer.instruction.bias.abs().max()) == 0


def test_a_model_without_a_scorer_refuses_a_plan_that_needs_one(family):
    model = build(family, PLANS["attention"])
    with pytest.raises(ScheduleError, match="got select: learned, expected another: this model has no scorer"):
        model.schedule = Fused(StagePlan.from_dict(PLANS["learned"]))


def test_a_pruner_prunes_what_the_scorer_let_in(family):
    model, batch = build(family, PLANS["late"]), family.batch("ttItttt")
    with torch.no_grad():
        trained = live_of(model(**batch))
        pruned = live_of(model(**batch, schedule=FastV(3, 0.75)))
    assert pruned[2] == trained[2]
    assert all(set(few[0]) <= set(more[0]) for few, more in zip(pruned, trained, strict=True))
    assert len(pruned[4][0]) < len(trained[4][0])
