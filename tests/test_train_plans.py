"""Training under several stage plans: the draw, what a recipe may say, and a run."""

from collections import Counter

import pytest

from models.schedules import Dense, Fused, StagePlan
from recipes.schema import NamedPlan, RecipeError, load_recipe
from train.plans import PlanDraw
from train.preview import preview

WINDOW = {"enter": 1, "exit": 3}
PLANS = {
    "fused": NamedPlan(name="fused", weight=3.0, plan=WINDOW),
    "dense": NamedPlan(name="dense", weight=1.0, plan=None),
}


def test_the_draw_depends_on_seed_and_step_alone():
    draw = PlanDraw(PLANS, seed=5)
    names = [draw.name_of(step) for step in range(4000)]
    assert names == [PlanDraw(PLANS, seed=5).name_of(step) for step in range(4000)]
    assert names != [PlanDraw(PLANS, seed=6).name_of(step) for step in range(4000)]
    assert Counter(names)["fused"] / 4000 == pytest.approx(0.75, abs=0.03)
    schedules = {"fused": Fused(StagePlan(1, 3)), "dense": Dense()}
    assert all(draw.schedule_of(step) == schedules[draw.name_of(step)] for step in range(20))


def test_a_recipe_with_several_plans():
    stages = "model.stages=[{name: fused, weight: 3.0, plan: {enter: 1, exit: 3}}, {name: dense, plan: null}]"
    recipe = load_recipe(
        "recipes/quickstart.yaml", [stages, "align=null", "train.max_seconds=null", "train.max_steps=9"]
    )
    assert recipe.model.plan_fields == {"stages": WINDOW, "plans": {"fused": WINDOW, "dense": None}}
    assert recipe.plan == StagePlan(1, 3)
    text = "\n".join(preview(recipe))
    assert "fused, 75% of the steps: 128 visual token-layers (dense 512)" in text
    assert "dense, 25% of the steps: 512 visual token-layers" in text


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("[{name: a, plan: null}]", "stages: got plans named ['a'], expected at least two"),
        ("[{name: a, plan: null}, {name: a, plan: null}]", "expected at least two, each with its own name"),
        ("[{name: a, plan: null}, {name: b, plan: {enter: 4}}]", "stages.exit: got None"),
        ("[{name: a, plan: null}, {name: b, plan: {enter: 4, exit: 19}}]", "beyond the decoder's 8 layers"),
        ("[{name: a, plan: null}, {name: b, weight: 0.0, plan: null}]", "weight: got 0.0"),
        ("[{name: a, plan: null}, {name: B b, plan: null}]", "name: got 'B b'"),
        ("[{name: a, plan: null}, {name: b}]", "plan: missing key"),
        ("[{name: a, plan: null}, {name: b, enter: 2, plan: null}]", "enter: unknown key"),
    ],
)
def test_wrong_plans_are_one_line(stages, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipes/quickstart.yaml", [f"model.stages={stages}"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
