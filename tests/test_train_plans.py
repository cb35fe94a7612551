"""Training under several stage plans: the draw, what a recipe may say, and a run."""

import json
import math
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from models.schedules import Dense, Fused, StagePlan
from recipes.schema import Distill, NamedPlan, Recipe, RecipeError, load_recipe
from train.checks import check_run
from train.preview import preview
from train.trainer import PlanDraw, divergence, predicting

WINDOW = {"enter": 1, "exit": 3}
PLANS = {
    "fused": NamedPlan(name="fused", weight=3.0, plan=WINDOW),
    "dense": NamedPlan(name="dense", weight=1.0, plan=None),
}


def test_the_draw_depends_on_seed_and_step_alone():
    draw = PlanDraw(PLANS, seed=5)
    names = [draw.of_step(step).name for step in range(4000)]
    assert names == [PlanDraw(PLANS, seed=5).of_step(step).name for step in range(4000)]
    assert names != [PlanDraw(PLANS, seed=6).of_step(step).name for step in range(4000)]
    assert Counter(names)["fused"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert (draw.schedule("fused"), draw.schedule("dense")) == (Fused(StagePlan(1, 3)), Dense())


def test_the_divergence_is_zero_for_the_same_logits_and_that_of_two_distributions():
    logits = torch.randn(3, 5)
    assert divergence(logits, logits + 1.0, Distill(teacher="x")).item() == pytest.approx(0, abs=1e-6)
    student, teacher = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.5]])
    expected = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    found = divergence(student.log(), teacher.log(), Distill(teacher="x", weight=2.0))
    assert found.item() == pytest.approx(2 * expected)


def test_positions_that_predict_a_label():
    labels = torch.tensor([[-100, 4, 5, -100], [-100, -100, -100, 7]])
    assert predicting(labels).tolist() == [[True, True, False, False], [False, False, True, False]]


def test_a_recipe_with_several_plans(tmp_path):
    stages = "model.stages=[{name: fused, weight: 3.0, plan: {enter: 1, exit: 3}}, {name: dense, plan: null}]"
    options = [stages, "align=null", "train.max_seconds=null", "train.max_steps=9", f"output={tmp_path}"]
    recipe = load_recipe("recipes/quickstart.yaml", options)
    assert recipe.model.plan_fields == {"stages": WINDOW, "plans": {"fused": WINDOW, "dense": None}}
    assert recipe.plan == StagePlan(1, 3)
    text = "\n".join(preview(recipe))
    assert "fused, 75% of the steps: 128 visual token-layers (dense 512)" in text
    assert "dense, 25% of the steps: 512 visual token-layers" in text


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("[{name: a, plan: null}]", "stages: got plans named ['a'], expected at least two"),
        ("[{name: a, plan: null}, {name: a, plan: null}]", "expected at least two, with different names"),
        ("[{name: a, plan: null}, {name: b, plan: {enter: 4}}]", "stages.exit: got None"),
        ("[{name: a, plan: null}, {name: b, plan: {enter: 4, exit: 19}}]", "beyond the decoder's 8 layers"),
        ("[{name: a, plan: null}, {name: b, weight: 0.0, plan: null}]", "weight: got 0.0"),
        ("[{name: a, plan: null}, {name: B b, plan: null}]", "name: got 'B b'"),
        ("[{name: a, plan: null}, {name: b}]", "plan: missing key"),
        ("[{name: a, plan: null}, {name: b, plan: null, distill: {teacher: b}}]", "distill.teacher: got 'b', expected"),
        ("[{name: a, plan: null}, {name: b, enter: 2, plan: null}]", "enter: unknown key"),
    ],
)
def test_wrong_plans_are_one_line(stages, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipes/quickstart.yaml", [f"model.stages={stages}"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scorer_learns_with_the_projector_and_a_resumed_run_draws_and_chooses_as_a_whole_one(tiny_recipe, train_here):
    def run(name, stop_in=None):
        lora = {"r": 4, "parts": ["projector", "language_model"]}
        recipe = tiny_recipe(name, max_steps=4, log_steps=1, save_steps=2, lora=lora, warmup_ratio=0.0)
        few = {"enter": 1, "exit": 3, "keep": {1: 0.25, 2: 2}, "select": "learned"}
        recipe["model"]["stages"] = [{"name": "few", "plan": few}, {"name": "all", "plan": WINDOW}]
        return train_here(recipe, stop_in=stop_in)

    start, whole = (load_file(run("whole") / folder / "model.safetensors") for folder in ("init", "final"))
    scorer = [name for name in whole if "token_scorer" in name]
    assert len(scorer) == 4
    assert not any(torch.equal(whole[name], start[name]) for name in scorer)  # in full, beside the projector's adapters
    assert torch.equal(whole["multi_modal_projector.linear_1.bias"], start["multi_modal_projector.linear_1.bias"])
    run("parts", stop_in=2)
    resumed = load_file(run("parts") / "final/model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_a_new_scorer_that_nothing_trains_is_refused(tiny_recipe):
    recipe = tiny_recipe("refused")
    recipe["model"]["stages"] = {"enter": 1, "exit": 3, "keep": {1: 0.25}, "select": "learned"}
    recipe["train"]["learning_rate"]["projector"] = None
    with pytest.raises(RecipeError, match=r"learning_rate.projector: got null with select: learned, expected a number"):
        check_run(Recipe.model_validate(recipe), 1)


def test_a_teachers_pass_is_not_in_the_loss_of_a_source(tiny_recipe, train_here):
    """In one step of all rows, the loss is the mean of the losses of two sources with as many labels."""
    recipe = tiny_recipe("distilled", global_batch=24, per_device_batch=24, max_steps=1, log_steps=1)
    distilled = {"name": "fused", "plan": WINDOW, "distill": {"teacher": "dense"}}
    recipe["model"]["stages"] = [distilled, {"name": "dense", "weight": 1e-9, "plan": None}]
    lines = map(json.loads, (train_here(recipe) / "log.jsonl").read_text().splitlines())
    (line,) = [line for line in lines if "loss_a" in line]
    assert (line["loss_a"] + line["loss_b"]) / 2 == pytest.approx(line["loss"], rel=1e-6)
