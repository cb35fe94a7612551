"""With the facts of a batch at hand, a step computes the same and never waits for the device."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.auto import FusedAutoModel
from models.batch_facts import BatchFacts
from tests.conftest import IMAGE
from tests.test_models_families import answers as family_answers
from tests.test_models_fused import answers
from tests.tiny_vlms import TINY

PLANS = {
    "dense": None,
    "window": {"enter": 2, "exit": 4},
    "from the start": {"enter": 0, "exit": 3},
    "kv": {"layers": [2, 4], "update": "kv"},
    "by attention": {"enter": 1, "exit": 5, "keep": {2: 3, 4: 0.25}},
    "by diversity": {"enter": 1, "exit": 5, "keep": {1: 0.5, 4: 1}, "select": "diversity"},
    "learned": {"enter": 1, "exit": 5, "keep": {1: 0.5, 4: 1}, "select": "learned"},
    "with gradient": {"enter": 1, "exit": 5, "keep": {2: 3, 4: 0.25}, "gradient": "straight_through"},
}
LAYOUTS = ("ttItttt", "tttttt", "tItItttttt")


class NoReading(TorchFunctionMode):
    """Refuses the ways to read a whole tensor on the host, which a tensor on the CPU gives away without an operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            raise RuntimeError(f"the host waits for {func}")
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Refuses what a GPU has to finish its work for: numbers read on the host, outputs whose size depends on values."""

    def __enter__(self):
        self.reading = NoReading()
        self.reading.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self.reading.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = torch.Tag.data_dependent_output in func.tags
        if torch.Tag.dynamic_output_shape in func.tags:  # indices are fine, masks are not
            indices = args[1] if func is torch.ops.aten.index.Tensor else [None]
            waits |= not all(index is not None and index.dtype == torch.int64 for index in indices)
        if waits:
            raise RuntimeError(f"the host waits for {func}")
        return func(*args, **(kwargs or {}))


def step(model, batch, **more):
    """Returns the loss and all gradients."""
    model.zero_grad()
    loss = model(**batch, **more).loss
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.fixture(params=list(PLANS))
def plan(request):
    return PLANS[request.param]


def test_the_mode_refuses_each_way_to_wait():
    numbers = torch.arange(4.0)
    waiting = [
        lambda: numbers.sum().item(),
        lambda: numbers.tolist(),
        lambda: bool(numbers.any()),
        lambda: numbers.nonzero(),
        lambda: numbers[numbers > 1],
        lambda: torch.where(numbers > 1),
        lambda: numbers.masked_select(numbers > 1),
        lambda: numbers.repeat_interleave(numbers.long()),
        lambda: torch.equal(numbers, numbers),
    ]
    for call in waiting:
        with pytest.raises(RuntimeError, match="the host waits"), NoWaiting():
            call()
    with NoWaiting():
        assert numbers[torch.tensor([1, 2])].shape == (2,)


@pytest.mark.parametrize("layouts", [LAYOUTS, ("tttt", "tt")], ids=["images", "text"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_with_facts_is_the_same_and_waits_for_nothing(make_model, make_batch, plan, layouts, frozen):
    model, batch = make_model("qwen2", plan).train(), make_batch(*layouts)
    batch = {name: value for name, value in batch.items() if value is not None}
    batch["labels"] = answers(batch, 2)
    model.model.language_model.embed_tokens.requires_grad_(not frozen)
    facts = BatchFacts.of(batch, IMAGE)
    items = torch.tensor(7)
    loss, gradients = step(model, batch, num_items_in_batch=items)
    with NoWaiting():
        found, theirs = step(model, batch, num_items_in_batch=items, facts=facts)
    assert torch.equal(found, loss)
    assert theirs.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_step_without_facts_waits(make_model, make_batch, plan):
    model, batch = make_model("qwen2", plan).train(), make_batch(*LAYOUTS)
    with pytest.raises(RuntimeError, match="the host waits"), NoWaiting():
        model(**batch, labels=answers(batch, 2))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("plan", [PLANS["dense"], {"enter": 1, "exit": 5, "keep": {2: 0.5}}])
def test_every_family_computes_the_same_with_facts(name, plan):
    torch.manual_seed(0)
    model = FusedAutoModel.from_config(TINY[name].config(), stages=plan).train()
    batch = TINY[name].batch("ttItttt", "tttttt", "tItItttttt")
    batch["labels"] = family_answers(batch)
    loss, gradients = step(model, batch)
    found, theirs = step(model, batch, facts=BatchFacts.of(batch, IMAGE))
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-6)
    assert theirs.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(theirs[key], gradient, rtol=1e-4, atol=1e-6)


def test_what_is_wrong_with_a_batch_is_said_as_without_facts(make_model, make_batch):
    model, batch = make_model("llama", PLANS["window"]), make_batch("tttttt", "ttIt")
    labels = answers(batch, 1)
    with pytest.raises(ValueError, match="sample 1 of the batch has a label directly after a visual token"):
        model(**batch, labels=labels, facts=BatchFacts.of({**batch, "labels": labels}, IMAGE))
    batch = make_batch("ttItttt")
    batch["labels"] = answers(batch)
    facts = BatchFacts.of(batch, IMAGE)
    batch["pixel_values"] = batch["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="image features and image tokens do not match: got 8 and 4"):
        model(**batch, facts=facts)


def test_other_questions_than_the_labels_may_be_asked_with_facts(make_model, make_batch):
    model, batch = make_model("llama", PLANS["by attention"]), make_batch(*LAYOUTS)
    batch["labels"] = answers(batch, 2)
    asked = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    asked[:, :2] = True
    facts = BatchFacts.of(batch, IMAGE)
    found, expected = (model(**batch, query_mask=asked, **more) for more in ({"facts": facts}, {}))
    assert torch.equal(found.loss, expected.loss)
    assert [list(map(len, layer)) for layer in found.live] == [list(map(len, layer)) for layer in expected.live]
