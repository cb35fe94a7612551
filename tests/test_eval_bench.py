"""The benchmarks measure what they say: the same weights and text in every row. Nothing here is timed."""

import dataclasses

import pytest
import torch

from eval import measure
from eval.benches import models, packing, prefill, train
from eval.benches.models import Shape
from eval.live import live_visual
from models import StagePlan
from models.attention import SDPA_PACKED

SHAPE = Shape(4, 64, 16, 24)
DEEP = Shape(8, 64, 64, 24)


def build(variant, shape=SHAPE, family="llava"):
    return models.build(shape, plan=variant.plan, hugging_face=variant.hugging_face, family=family)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_training_row_has_the_same_weights_and_answer(family):
    variants = train.variants(SHAPE, family)
    states = [build(row, family=family).state_dict() for row in variants]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    for row in variants:
        batch = models.make_batch(SHAPE, text_only=row.text_only, family=family)
        assert int((batch["labels"] != -100).sum()) == SHAPE.text // 2
        assert ("pixel_values" in batch) != row.text_only


@pytest.mark.parametrize("family", models.FAMILIES)
def test_hugging_face_and_dense_compute_the_same_loss(family):
    theirs, ours = (build(row, family=family) for row in train.variants(SHAPE, family)[:2])
    batch = models.make_batch(SHAPE, family=family)
    assert theirs(**batch).loss.item() == pytest.approx(ours(**batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_batch_has_its_sample_as_often_as_the_shape_says(family):
    several = dataclasses.replace(SHAPE, batch=3)
    one, three = (models.make_batch(shape, family=family) for shape in (SHAPE, several))
    assert len(three["input_ids"]) == 3
    model = build(train.variants(SHAPE, family)[1], family=family)
    assert model(**three).loss.item() == pytest.approx(model(**one).loss.item(), rel=1e-5)
    assert str(several) == "4 layers x 64, 3 samples of 16 visual + 24 text tokens"


def test_a_step_leaves_no_gradients():
    model = build(train.variants(SHAPE)[2])
    train.step(model, models.make_batch(SHAPE))
    assert all(parameter.grad is None for parameter in model.parameters())


def cells(table):
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table[4:]}


def test_the_training_table_has_a_row_for_each_variant(monkeypatch):
    # a fresh process takes half a minute
    monkeypatch.setattr(measure, "added_memory", lambda calls, *_: dict.fromkeys(calls, 2**20))
    rows = cells(train.table(SHAPE, repeats=2).splitlines())
    assert list(rows) == [row.name for row in train.variants(SHAPE)]
    assert rows["dense"][2] == "1.00"
    assert rows["dense"][-1] == f"{4 * (16 + 24)}"


def test_each_way_to_batch_takes_every_row_of_the_published_mix_once():
    rows = packing.draw_rows(SHAPE)
    assert sum(row.visual == 0 for row in rows) / len(rows) == pytest.approx(40_688 / 665_298, abs=0.02)
    assert {row.visual for row in rows} == {0, SHAPE.visual}
    for passes in packing.ways(rows).values():
        assert sorted(number for one in passes for number in one) == list(range(len(rows)))


def test_packed_rows_give_the_loss_of_padded_ones():
    rows = packing.draw_rows(SHAPE, 6)
    model, batch = models.build(SHAPE, plan=StagePlan(1, 2)), packing.make_batch(rows)
    model.set_attn_implementation({"text_config": SDPA_PACKED})
    assert model(**batch, packed=True).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_the_packing_table_compares_with_rows_grouped_by_length(monkeypatch):
    monkeypatch.setattr(packing, "TIMED", 1)
    found = cells(packing.table(SHAPE, repeats=2).splitlines())
    ways = ("padded", "grouped by length", "packed")
    assert list(found) == [f"{plan}, {way}" for plan in ("dense", "fused full") for way in ways]
    assert found["dense, grouped by length"][2] == found["fused full, grouped by length"][2] == "1.00"
    assert found["dense, packed"][3] == "0%"
    largest = [int(found[f"dense, {way}"][-1].replace(",", "")) for way in ways]
    assert largest[2] < min(largest[:2])


def test_memory_is_measured_in_a_fresh_process():
    added = measure.added_memory(_allocator(72), _allocator, 72)["ones"]
    assert added >= 64 * 2**20  # a process's own count of its pages is a little behind


def _allocator(mebibytes):
    return {"ones": lambda: torch.ones(mebibytes, 2**18, device=measure.device())}


def test_the_pyramid_stands_where_its_layers_do():
    names = [row.name for row in train.variants(Shape(32, 64, 576, 8))]
    assert "pyramid (HiDrop 64)" in names


@pytest.fixture(scope="module")
def prompt():
    return prefill.prepare_model(DEEP)


def test_visipruner_fires_keeps_a_tenth_and_lets_go(prompt):
    pruner = prefill.firing_visipruner(*prompt)
    counts = live_visual(*prompt, pruner).sum(dim=(1, 2)).tolist()
    first = pruner.shallow_end + 2
    assert counts[:first] == [64] * first
    assert 0 < counts[first] <= 0.2 * 64
    assert counts[-1] == 0


@pytest.mark.parametrize("modes", [("shallow", "middle", "deep"), ("middle", "deep")])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_given_choice_computes_what_visipruner_computes(prompt, modes, rows):
    model, batch = prompt[0], {name: torch.cat([tensor] * rows) for name, tensor in prompt[1].items()}
    fired = prefill.firing_visipruner(model, batch)
    pruner = dataclasses.replace(fired, modes=modes)
    twin = prefill.replay(model, batch, pruner)
    assert torch.equal(live_visual(model, batch, twin), live_visual(model, batch, pruner))
    ours, theirs = (measure.prefill(model, batch, schedule) for schedule in (twin, pruner))
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys)


def test_the_prefill_table_has_a_row_for_each_schedule(monkeypatch):
    monkeypatch.setattr(measure, "added_memory", lambda calls, *_: dict.fromkeys(calls, 2**20))
    monkeypatch.setattr(prefill, "DECODE_STEPS", 2)
    rows = cells(prefill.table(DEEP, repeats=2).splitlines())
    assert list(rows) == list(prefill.schedules(*prefill.prepare_model(DEEP)))
    assert rows["dense"][2:5] == ["1.00", "1.00", "1.00"]
    assert rows["fused full"][-2] == f"{4 * 64 + 8 * 24}"
    assert rows["vtw"][-2] == f"{4 * 64 + 8 * 24}"
