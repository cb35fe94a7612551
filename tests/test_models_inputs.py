"""Inputs at the edge of what a fused model takes: merged embeddings in training, prompts that end with an image, ..."""

import pytest
import torch

from models import FusedAutoModel, StagePlan
from models.batch_facts import BatchFacts
from models.schedules import VTW, Dense, FastV, Fused, PyramidDrop, ShortV, SparseVLM, VisiPruner
from tests.conftest import IMAGE, merged_inputs

WINDOW = {"enter": 2, "exit": 4}
KV = {"enter": 2, "exit": 4, "update": "kv"}


def answers(batch):
    """Labels on the last two tokens of every sample, of batches padded on the left."""
    return batch["input_ids"].where(torch.arange(batch["input_ids"].shape[1]) >= batch["input_ids"].shape[1] - 2, -100)


@pytest.mark.parametrize("stages", [None, WINDOW, {"enter": 0, "exit": 6}, KV])
def test_merged_embeddings_train_on_their_own_images(make_model, make_batch, stages):
    model, batch = make_model("llama", stages), make_batch("ttIttt", "tIttIttt", side="left")
    labels = answers(batch)
    embeds, visual = merged_inputs(model, batch)
    merged = {"inputs_embeds": embeds, "visual": visual, "attention_mask": batch["attention_mask"], "labels": labels}
    expected = model(**batch, labels=labels).loss
    torch.testing.assert_close(model.train()(**merged).loss, expected)


def test_a_rollout_in_training_mode_encodes_its_images_once(make_model, make_batch):
    model, batch = make_model("llama", WINDOW).train(), make_batch("ttIttt")
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(calls) == 1


@pytest.mark.parametrize("schedule", [Fused(StagePlan(2, 4)), Fused(StagePlan(2, 6, update="kv")), VTW(3)])
def test_a_prompt_that_ends_with_a_dropped_image_is_refused(make_model, make_batch, schedule):
    model = make_model("llama")
    good, ends = make_batch("ttIttt", "tIt", side="left"), make_batch("ttIttt", "ttI", side="left")
    model.generate(**good, schedule=schedule, max_new_tokens=2)
    with pytest.raises(ValueError, match="input_ids: sample 1 of the prompt ends with a visual token that "):
        model.generate(**ends, schedule=schedule, max_new_tokens=2)


@pytest.mark.parametrize("schedule", [Dense(), Fused(StagePlan(2, 6))])
def test_a_prompt_may_end_with_an_image_that_stays_live(make_model, make_batch, schedule):
    model, batch = make_model("llama"), make_batch("ttI")
    first = model.generate(**batch, schedule=schedule, max_new_tokens=1, do_sample=False)[:, -1]
    assert torch.equal(first, model(**batch, schedule=schedule).logits[:, -1].argmax(dim=-1))


def test_samples_that_share_a_row_by_their_position_ids_are_refused(make_model, make_batch):
    model, batch = make_model("llama"), make_batch("ttIttt")
    size = batch["input_ids"].shape[1]
    inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
    ascending = torch.arange(size)[None]
    torch.testing.assert_close(model(**inputs, position_ids=ascending).logits, model(**batch).logits)
    anew = torch.cat([torch.arange(size - 3), torch.arange(3)])[None]
    with pytest.raises(ValueError, match="position_ids: got a row that begins anew without an attention_mask"):
        model(**inputs, position_ids=anew)


def test_shortv_keeps_image_features_that_were_not_merged(make_model, make_batch):
    model, batch = make_model("llama"), make_batch("ttItttt", "tIttt", side="left")
    labels = answers(batch)
    facts = BatchFacts.of({**batch, "labels": labels}, IMAGE)
    schedule = ShortV(layers=(0, 2, 3))
    expected = model(**batch, labels=labels, schedule=schedule).loss
    torch.testing.assert_close(model(**batch, labels=labels, schedule=schedule, facts=facts).loss, expected)


@pytest.mark.parametrize(
    "schedule",
    [
        FastV(layer=2),
        PyramidDrop(layers=(2, 4), ratios=(0.5, 0.2)),
        VisiPruner(shallow_end=2),
        SparseVLM(layers=(2,), tokens=(200,)),
        Fused(StagePlan(1, 5, keep={3: 0.5})),
        Fused(StagePlan(1, 5, keep={1: 0.5}, select="diversity")),
    ],
)
def test_tokens_are_chosen_under_autocast_too(make_model, make_batch, schedule):
    model, batch = make_model("llama"), make_batch("ttIttt", "tttIttt", side="left")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch, schedule=schedule)
        model.generate(**batch, schedule=schedule, max_new_tokens=2)
    expected = model(**batch, schedule=schedule)
    assert [list(map(len, layer)) for layer in output.live] == [list(map(len, layer)) for layer in expected.live]


@pytest.mark.parametrize("stages", [None, WINDOW])
def test_the_plan_is_the_configs(make_model, make_batch, stages):
    model, other, batch = (
        make_model("llama", stages),
        make_model("llama", {"enter": 1, "exit": 3}),
        make_batch("ttIttt"),
    )
    model.config.stages = other.config.stages
    assert model.plan == StagePlan(1, 3)
    assert torch.equal(model(**batch).logits, other(**batch).logits)
    model.schedule = "fastv"
    model.config.stages = None
    assert torch.equal(model(**batch).logits, make_model("llama")(**batch, schedule="fastv").logits)


def test_a_config_and_a_schedule_load_together(make_model, tmp_path):
    model = make_model("llama", WINDOW)
    model.save_pretrained(tmp_path)
    loaded = FusedAutoModel.from_pretrained(tmp_path, config=model.config, schedule="vtw")
    assert loaded.schedule == model.resolve("vtw")
    assert loaded.plan == StagePlan(2, 4)


def test_a_ratio_is_of_decimal_numbers():
    assert StagePlan(0, 2, keep={0: 0.29}, select="diversity").visual_counts(100, 3) == [29, 29, 0]
