"""The measure of how widely the instruction spreads its attention over vision, beside whole matrices of weights."""

import math
from functools import partial

import pytest
import torch

from models.attention_spread import spread
from models.schedules import AttentionSpread, Dense, Fused, Gated
from models.stage_plan import StagePlan
from tests.conftest import LAYERS

PLANS = {
    "dense": None,
    "window": StagePlan(1, 4),
    "pyramid": StagePlan(1, 5, keep={3: 2}),
    "kv": StagePlan(1, 4, update="kv"),
}


def test_equal_attention_is_one_and_a_single_token_zero():
    live = torch.tensor([[False, True, True, True, True, False]] * 3)
    attention = torch.tensor([
        [[0.2, 0.1, 0.1, 0.1, 0.1, 0.4], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]],
        [[0.5, 0.25, 0.25, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]],  # the second sees no vision
        [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]],
    ])  # fmt: skip
    values, counts = spread(attention, live)
    assert values.tolist() == pytest.approx([0.5, math.log(2) / math.log(4), 0.0], abs=1e-6)
    assert counts.tolist() == [2, 1, 0]
    alone, _ = spread(attention[:1, :, 1:2], live[:1, 1:2])
    assert alone.tolist() == [0.0]


def with_weights(model, batch):
    """Returns, of one sample in Hugging Face's eager attention, the mean spread over layers and asking tokens."""
    ids, labels = batch["input_ids"], batch["labels"]
    visual = ids[0] == 50
    asking = ((labels[0].roll(-1) != -100) & (labels[0] == -100)).nonzero().flatten()
    found = []
    decoder = model.model.language_model
    weights = {}
    for number, layer in enumerate(decoder.layers):
        keep = partial(lambda number, module, given, output: weights.update({number: output[1]}), number)
        layer.self_attn.register_forward_hook(keep)
    model(**batch)
    for number in range(LAYERS):
        for query in asking.tolist():
            row = weights[number][0].mean(dim=0)[query][visual]
            share = row / row.sum()
            found.append(-(share * share.log()).sum() / math.log(int(visual.sum())))
    return torch.stack(found).mean()


def labelled(batch, count=2):
    labels = torch.full_like(batch["input_ids"], -100)
    ends = batch["attention_mask"].flip(1).cumsum(1).flip(1)
    late = (ends <= count) & (batch["attention_mask"] == 1)
    labels[late] = batch["input_ids"][late]
    return {**batch, "labels": labels}


def test_the_measure_and_its_gradient_are_those_of_the_whole_matrices(make_model, make_batch, family):
    """In the dense model; the law below carries it to every other schedule."""
    model = make_model(family, attention="eager").double()
    batch = labelled(make_batch("ttIttttt"))
    batch["pixel_values"] = batch["pixel_values"].double()
    measure = AttentionSpread(Dense())
    model(**batch, schedule=measure)
    (found,), (asks,) = measure.mean()
    expected = with_weights(model, batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert asks
    names, weights = zip(*model.model.language_model.named_parameters(), strict=True)
    ours = torch.autograd.grad(found, weights, allow_unused=True)
    theirs = torch.autograd.grad(expected, weights, allow_unused=True)
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", sorted(PLANS))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_measuring_changes_nothing_and_lowering_it_lowers_it(make_model, make_batch, name, checkpointing):
    model, batch = make_model("qwen2").train(), labelled(make_batch("ttIttttt", "tItIttt", "tttttt"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    schedule = Dense() if PLANS[name] is None else Fused(PLANS[name])
    expected = model(**batch, schedule=schedule).loss
    measure = AttentionSpread(schedule)
    loss = model(**batch, schedule=measure).loss
    assert torch.equal(loss, expected)
    values, asks = measure.mean()
    assert asks.tolist() == [True, True, False]
    assert values[2] == 0
    assert len(measure.layers) == sum(PLANS[name] is None or PLANS[name].sees(layer) for layer in range(LAYERS))
    weights = list(model.model.language_model.parameters())
    grads = torch.autograd.grad(values.sum(), weights, allow_unused=True)
    with torch.no_grad():
        for weight, grad in zip(weights, grads, strict=True):
            if grad is not None:
                weight -= 0.01 * grad
        after = AttentionSpread(schedule)
        model(**batch, schedule=after)
    assert after.mean()[0].sum() < values.sum()


def test_the_measure_does_not_depend_on_padding_or_the_rest_of_the_batch(make_model, make_batch):
    model = make_model("llama")
    for side in ("left", "right"):
        together = labelled(make_batch("ttIttttt", "ttIttt", side=side))
        measure = AttentionSpread(Fused(StagePlan(1, 4)))
        with torch.no_grad():
            model(**together, schedule=measure)
            values, _ = measure.mean()
            for number in range(2):
                valid = together["attention_mask"][number] == 1
                alone = {key: together[key][number][valid][None] for key in ("input_ids", "attention_mask", "labels")}
                one = AttentionSpread(Fused(StagePlan(1, 4)))
                model(**alone, pixel_values=together["pixel_values"][number : number + 1], schedule=one)
                torch.testing.assert_close(one.mean()[0][0], values[number], rtol=1e-4, atol=1e-5)


def test_gates_can_be_measured_too(make_model, make_batch):
    model, batch = make_model("llama").train(), labelled(make_batch("ttIttttt"))
    gates = Gated(torch.ones(LAYERS), torch.eye(LAYERS)[0])
    measures = AttentionSpread(Dense()), AttentionSpread(gates)
    for measure in measures:
        model(**batch, schedule=measure)
    torch.testing.assert_close(measures[1].mean()[0], measures[0].mean()[0])
