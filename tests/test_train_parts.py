"""The small parts of train/: order of the samples, clock, groups, tally, checkpoints, arguments."""

import json

import pytest
import torch

from recipes.resolved import dump_recipe
from recipes.schema import LearningRates, RecipeError, load_recipe
from train.arguments import share_out
from train.checkpoints import (
    MARKER,
    Progress,
    check_same_run,
    keep_newest,
    mark,
    read_progress,
    set_aside,
    whole_checkpoints,
)
from train.clock import Clock, rate_factor
from train.groups import freeze, group_of, parameter_groups, trainable_counts
from train.order import ShuffledSampler, WholeBatches
from train.precision import resolve_precision
from train.tally import Tally


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def test_an_epoch_holds_every_sample_and_a_whole_last_batch():
    order = WholeBatches(ShuffledSampler(10, seed=3), global_batch=4)
    samples = list(order)
    assert (len(samples), len(order), order.steps) == (12, 12, 3)
    assert set(samples) == set(range(10))
    assert samples[10:] == samples[:2]
    assert list(order) == samples


def test_epochs_and_seeds_have_orders_of_their_own():
    order = WholeBatches(ShuffledSampler(50, seed=3), global_batch=5)
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first
    assert list(WholeBatches(ShuffledSampler(50, seed=4), global_batch=5)) != first


def test_a_batch_larger_than_the_data_goes_round():
    assert (
        list(WholeBatches(ShuffledSampler(3, seed=0), global_batch=8))
        == list(ShuffledSampler(3, seed=0)) * 2 + list(ShuffledSampler(3, seed=0))[:2]
    )
    with pytest.raises(ValueError, match="found no sample"):
        WholeBatches(ShuffledSampler(0, seed=0), global_batch=2)


def test_the_clock_goes_on_from_the_seconds_of_a_checkpoint():
    clock = Clock(before=100.0)
    assert clock.seconds() == 100.0
    clock.start()
    assert 100.0 <= clock.seconds() < 101.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_rates_over_time_are_transformers_rates_over_steps(kind):
    from transformers import get_scheduler

    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=100)
    for step in range(100):
        assert rate_factor(kind, step / 100, warmup=0.1) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        scheduler.step()
    assert rate_factor(kind, 1.5, warmup=0.1) == (1.0 if kind == "constant" else 0.0)


def test_a_group_without_a_rate_is_frozen_and_the_others_have_their_own(make_model):
    model = make_model("llama")
    rates = LearningRates(projector=1e-3, vision_tower=None, language_model=2e-5)
    freeze(model, rates, adapters=False)
    assert not any(weight.requires_grad for weight in model.model.vision_tower.parameters())
    assert group_of("lm_head.weight") == "language_model"
    decayed = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    groups = parameter_groups(model, rates, decayed=decayed, weight_decay=0.1)
    assert {(group["name"], group["lr"], group["weight_decay"]) for group in groups} == {
        ("projector", 1e-3, 0.1),
        ("projector", 1e-3, 0.0),
        ("language_model", 2e-5, 0.1),
        ("language_model", 2e-5, 0.0),
    }
    learning = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert sum(weight.numel() for group in groups for weight in group["params"]) == learning
    assert sum(trainable_counts(model).values()) == learning


def test_the_tally_tells_images_and_text_apart():
    tally = Tally(samples=10, tokens=100)
    labels = torch.tensor([[-100, 5, 5, -100]])
    batch = {"labels": labels, "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    tally.add({**batch, "pixel_values": torch.zeros(1)}, torch.tensor(1.0), items=4)
    tally.add(batch, torch.tensor(0.5), items=4)
    assert tally.totals() == (12, 108)
    assert tally.report() == {"samples": 12, "tokens": 108, "new_tokens": 8, "loss_image": 2.0, "loss_text": 1.0}
    assert tally.report()["new_tokens"] == 0
    assert tally.totals() == (12, 108)


@pytest.fixture
def run_folder(tmp_path):
    for step in (2, 10, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("w")
        mark(folder, Progress(step=step, seconds=1.5, samples=8, tokens=80, ranks=2))
    return tmp_path


def test_a_checkpoint_counts_when_it_is_marked(run_folder):
    (run_folder / "checkpoint-12").mkdir()
    (run_folder / "checkpoint-12/weights").write_text("w")
    assert [path.name for path in whole_checkpoints(run_folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    assert read_progress(run_folder / "checkpoint-10") == Progress(10, 1.5, 8, 80, 2)
    assert [path.name for path in set_aside(run_folder)] == ["incomplete-checkpoint-12"]
    assert set_aside(run_folder) == []
    keep_newest(run_folder, 1)
    assert sorted(path.name for path in run_folder.iterdir()) == ["checkpoint-10", "incomplete-checkpoint-12"]


def test_a_run_folder_belongs_to_one_recipe(run_folder):
    quickstart = "recipes/quickstart.yaml"
    (run_folder / "recipe.yaml").write_text(dump_recipe(load_recipe(quickstart)))
    check_same_run(load_recipe(quickstart, ["train.max_steps=7", "data.workers=2", "name=other"]), run_folder)
    changed = load_recipe(quickstart, ["train.learning_rate.projector=0.5"])
    with pytest.raises(RecipeError, match=r"train.learning_rate.projector 0\.\d+, found 0.5"):
        check_same_run(changed, run_folder)
    with pytest.raises(RecipeError, match=r"model\.stages"):
        check_same_run(load_recipe(quickstart, ["model.stages=null"]), run_folder)
    for path in whole_checkpoints(run_folder):
        (path / MARKER).unlink()
    check_same_run(changed, run_folder)


def test_a_marker_is_json_that_tells_how_far_the_run_was(run_folder):
    found = json.loads((run_folder / "checkpoint-2" / MARKER).read_text())
    assert found == {"step": 2, "seconds": 1.5, "samples": 8, "tokens": 80, "ranks": 2}


def test_accumulation_follows_from_the_global_batch():
    train = load_recipe("recipes/llava_fused.yaml").train
    assert [share_out(train, ranks) for ranks in (1, 4, 8, 16)] == [(16, 8), (16, 2), (16, 1), (8, 1)]
    with pytest.raises(RecipeError, match="found 128 on 3 ranks of 16 samples, accepted: a multiple of 48"):
        share_out(train, 3)


@pytest.mark.parametrize(
    ("abilities", "expected"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "fp32")]
)
def test_auto_is_bf16_where_the_cpu_multiplies_it(monkeypatch, abilities, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    train = load_recipe("recipes/quickstart.yaml").train
    assert train.precision == "auto"
    assert resolve_precision(train) == expected
    assert resolve_precision(train.model_copy(update={"precision": "fp32"})) == "fp32"
