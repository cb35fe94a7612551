"""One checkpoint with several stage plans: a name chooses one, and it computes what a checkpoint of that plan would."""

import pytest
import torch

from models import FusedAutoModel, StagePlan
from models.schedules import Dense, FastV, Fused, ScheduleError, Within
from tests.tiny_vlms import TINY

PLANS = {
    "fused": {"enter": 1, "exit": 4},
    "fast": {"enter": 1, "exit": 4, "keep": {1: 0.5}, "select": "diversity"},
    "kv": {"layers": [1, 3], "update": "kv"},
    "dense": None,
}
BATCH = ("ttItttt", "ttItItt", "tttt")


@pytest.fixture(params=["llava", "qwen3_vl"])
def family(request):
    return TINY[request.param]


@pytest.fixture
def model(family):
    source = family.hugging_face()
    config = FusedAutoModel.from_config(source.config, stages=PLANS["fused"]).config
    fused = FusedAutoModel.from_config(_with(config, plans=PLANS))
    fused.load_state_dict(source.state_dict())
    return fused.eval()


def _with(config, **fields):
    return type(config)(**{**config.to_dict(), **fields})


def logits(model, batch, **more):
    with torch.no_grad():
        return model(**batch, **more).logits


def test_a_name_is_the_model_of_that_plan(family, model):
    batch = family.batch(*BATCH)
    assert torch.equal(logits(model, batch), logits(model, batch, schedule="fused"))
    for name, fields in PLANS.items():
        single = FusedAutoModel.from_config(_with(model.config, stages=fields, plans=None)).eval()
        single.load_state_dict(model.state_dict())
        assert torch.equal(logits(model, batch, schedule=name), logits(single, batch)), name
        model.schedule = name
        assert torch.equal(logits(model, batch), logits(single, batch)), name
    model.schedule = None
    assert model.schedule == Fused(StagePlan.from_dict(PLANS["fused"]))


def test_plans_are_saved_and_a_config_may_start_with_one(model, tmp_path):
    model.config.schedule = {"name": "fast"}
    model.save_pretrained(tmp_path)
    loaded = FusedAutoModel.from_pretrained(tmp_path)
    assert loaded.schedule == Fused(StagePlan.from_dict(PLANS["fast"]))
    assert isinstance(loaded.resolve("dense"), Dense)
    assert loaded.resolve("trained") == Fused(StagePlan.from_dict(PLANS["fused"]))


def test_a_pruner_prunes_within_the_first_plan(model):
    assert model.resolve(FastV(2, 0.5)) == Within(StagePlan.from_dict(PLANS["fused"]), FastV(2, 0.5))


def test_unknown_names_and_names_that_are_taken(model):
    with pytest.raises(ScheduleError, match="schedule: got 'slow', expected one of trained, fused, fast, kv, dense"):
        model.schedule = "slow"
    for name, fields in (("fastv", None), ("trained", None), ("dense", PLANS["fused"])):
        with pytest.raises(ValueError, match=f"plans: got the name '{name}'"):
            _with(model.config, plans={name: fields})
    with pytest.raises(ValueError, match="beyond the decoder's 6 layers"):
        _with(model.config, plans={"late": {"enter": 3, "exit": 9}})
