"""Gates on what layers see of vision: their limits are the stage plans, and their gradient is right between them."""

import pytest
import torch

from models import FusedAutoModel
from models.schedules import Fused, Gated, window_gates
from models.stage_plan import StagePlan
from tests.conftest import LAYERS
from tests.tiny_vlms import IMAGE, TINY

LAYOUTS = ("tttItttt", "ItIttttt", "ttttt", "tIttt")  # one image, two, none, short


def one_hot(start, count):
    return torch.nn.functional.one_hot(torch.tensor(start), count).float()


def window(enter, leave, update="full"):
    """Returns the gates of one window alone."""
    gates = window_gates(one_hot(enter, LAYERS + 1 - (leave - enter)), LAYERS)
    return Gated(gates, one_hot(enter, LAYERS), update)


def labels_of(batch):
    is_text = (batch["input_ids"] != 50) & (batch["attention_mask"] == 1)
    late = batch["attention_mask"].flip(1).cumsum(1).flip(1) <= 2
    return batch["input_ids"].where(is_text & late, -100)


def gradients(model, batch, schedule):
    model.zero_grad()
    model.schedule = schedule
    loss = model(**batch, labels=labels_of(batch)).loss
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("update", ["full", "kv"])
def test_gates_of_one_window_are_its_stage_plan(make_model, make_batch, family, update, side):
    model, batch = make_model(family).train(), make_batch(*LAYOUTS, side=side)
    for enter, leave in ((0, 2), (2, 4), (3, 6), (0, 6)):
        loss, grads = gradients(model, batch, Fused(StagePlan(enter, leave, update)))
        found, others = gradients(model, batch, window(enter, leave, update))
        torch.testing.assert_close(found, loss)
        for name, grad in grads.items():
            torch.testing.assert_close(others[name], grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("update", ["full", "kv"])
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])  # DeepStack and M-RoPE; images seen from both sides
def test_gates_of_one_window_are_its_stage_plan_in_families_with_more(name, update):
    tiny = TINY[name]
    model = FusedAutoModel.from_config(tiny.config())
    model.load_state_dict(tiny.hugging_face().state_dict())
    batch = tiny.batch("ttItttt", "ttItItt", "tttt")
    text = (batch["attention_mask"] == 1) & (batch["input_ids"] != IMAGE)
    with torch.no_grad():
        for enter, leave in ((0, 4), (2, 6)):
            expected = model.eval()(**batch, schedule=Fused(StagePlan(enter, leave, update)), use_cache=False).logits
            found = model(**batch, schedule=window(enter, leave, update), use_cache=False).logits
            torch.testing.assert_close(found[text], expected[text], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("update", ["full", "kv"])
def test_the_gradient_of_a_gate_is_the_change_of_the_loss(make_model, make_batch, update, checkpointing):
    model, batch = make_model("qwen2").train(), make_batch(*LAYOUTS)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gates = torch.tensor([0.0, 0.2, 0.9, 1.0, 0.5, 0.05], requires_grad=True)
    begins = one_hot(0, LAYERS)

    def loss(values):
        return model(**batch, labels=labels_of(batch), schedule=Gated(values, begins, update)).loss

    loss(gates).backward()
    for layer in range(LAYERS):
        step = torch.zeros_like(gates).index_fill(0, torch.tensor(layer), 1e-3)
        with torch.no_grad():
            change = (loss(gates + step) - loss(gates - step)) / 2e-3
        assert gates.grad[layer].item() == pytest.approx(change.item(), rel=5e-3, abs=1e-3)
    assert gates.grad.abs().min() > 1e-3  # of closed gates too


def test_the_gates_of_several_windows_are_the_share_that_holds_each_layer():
    weights = torch.tensor([0.5, 0.25, 0.0, 0.25])
    assert window_gates(weights, 6).tolist() == [0.5, 0.75, 0.75, 0.5, 0.25, 0.25]
    assert window_gates(torch.ones(1), 6).tolist() == [1.0] * 6


def test_gates_that_do_not_fit_and_a_cache_are_refused(make_model, make_batch):
    model, batch = make_model("llama"), make_batch("tIttt")
    with pytest.raises(ValueError, match="gates: got 5, expected 6"):
        model(**batch, schedule=Gated(torch.ones(5), torch.ones(5)))
    with pytest.raises(ValueError, match="use_cache: got a cache under gates"):
        model(**batch, schedule=window(0, 3))
