"""The benchmark measures what it says: the same weights and text in every row. Nothing here is timed."""

import pytest
import torch

from eval.bench import Shape, build, make_batch, step, train_table, train_variants

SHAPE = Shape(4, 64, 16, 24)


def test_every_row_has_the_same_weights_and_answer():
    variants = train_variants(SHAPE)
    states = [build(SHAPE, row).state_dict() for row in variants]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    for row in variants:
        batch = make_batch(SHAPE, row)
        assert int((batch["labels"] != -100).sum()) == SHAPE.text // 2
        assert ("pixel_values" in batch) != row.text_only


def test_hugging_face_and_dense_compute_the_same_loss():
    theirs, ours = train_variants(SHAPE)[:2]
    batch = make_batch(SHAPE, ours)
    assert build(SHAPE, theirs)(**batch).loss.item() == pytest.approx(build(SHAPE, ours)(**batch).loss.item(), rel=1e-6)


def test_a_step_leaves_no_gradients():
    row = train_variants(SHAPE)[2]
    model = build(SHAPE, row)
    step(model, make_batch(SHAPE, row))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_table_has_a_row_for_each_variant():
    table = train_table(SHAPE, repeats=2)
    assert [row.name for row in train_variants(SHAPE)] == [
        line.split("|")[1].strip() for line in table.splitlines()[4:]
    ]
    dense = next(line for line in table.splitlines() if line.startswith("| dense"))
    assert "| 1.00 |" in dense
    assert dense.endswith(f"| {4 * (16 + 24)} |")


def test_the_pyramid_stands_where_its_layers_do():
    names = [row.name for row in train_variants(Shape(32, 64, 576, 8))]
    assert "pyramid (HiDrop 64)" in names
