"""A stage plan that training finds: the search itself, what a recipe may say, and runs."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models import FusedAutoModel, StagePlan
from models.schedules import Fused
from recipes.errors import RecipeError
from recipes.schema import Learn, Recipe, load_recipe
from tests.conftest import LAYERS
from train.parameters import layer_of
from train.preview import preview
from train.weights import build_initial
from train.window_search import WindowSearch, check_search, draw_gates

ON_STEPS = ["align=null", "train.max_seconds=null", "train.max_steps=90"]
TIMES = {"seconds", "tokens_per_second", "model_flops_per_second", "mfu", "eval_runtime", "eval_samples_per_second"}
TIMES |= {"eval_steps_per_second"}
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220), "black": (10, 10, 10)}


def searched(gradient_at, *, learn=None, state=None, first=0, last=None):
    """Runs a search, whose gates have the gradient that `gradient_at(gates)` returns."""
    learn = learn or Learn(budget=0.34, steps=20)
    search = WindowSearch(learn, LAYERS, state)
    for step in range(first, learn.steps if last is None else last):
        gates = search.schedule(step, torch.device("cpu")).gates
        assert search.schedule(step, torch.device("cpu")).gates is gates  # accumulation adds up in it
        (gates * gradient_at(gates.detach())).sum().backward()
        search.end_step(step + 1)
    return search


def next_of(rows):
    """Returns a gradient that is the next of some rows at each call."""
    left = iter(rows)
    return lambda gates: next(left)


def test_gates_start_open_and_end_as_the_window_with_the_lowest_loss():
    slope = torch.tensor([0.0, 0.1, 0.0, -1.0, -0.8, 0.3])
    search = searched(lambda gates: slope)
    assert search.plan == StagePlan(3, 5)
    assert search.gates(0).tolist() == [1.0] * LAYERS
    assert search.gates(20).tolist() == pytest.approx([0, 0, 0, 1, 1, 0], abs=0.1)
    assert search.gates(20).sum().item() == pytest.approx(2)
    assert search.summary().startswith("found the window [3, 5) ")


def test_a_window_whose_gain_shows_late_wins_over_an_early_one():
    def slope(gates):  # layers 0 and 1 hold the same: either is enough, and only their lack shows
        lack = (1 - gates[0] - gates[4]).clamp(min=-0.2)
        return torch.tensor([-lack, 0.02, 0.02, 0.02, -2 * lack - 0.05, -0.1])

    assert searched(slope, learn=Learn(budget=0.34, steps=60)).plan == StagePlan(4, 6)


def test_chance_alone_leaves_all_windows_likely_and_scale_does_not_count():
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(200, LAYERS, generator=random)
    learn = Learn(budget=0.34, steps=200)
    search = searched(next_of(noise), learn=learn)
    assert search.weights.max() < 0.9
    torch.testing.assert_close(searched(next_of(1000 * noise), learn=learn).weights, search.weights)


def test_one_odd_batch_near_the_end_does_not_decide():
    slopes = torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.0, 0.0]).repeat(20, 1)
    slopes[18] = torch.tensor([0.0, 0.0, 0.0, 0.0, -100.0, -100.0])
    assert searched(next_of(slopes)).plan == StagePlan(0, 2)


def test_a_search_goes_on_from_its_state_exactly():
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(20, LAYERS, generator=random)
    whole = searched(next_of(noise))
    part = searched(next_of(noise), last=7)
    assert part.plan is None
    state = json.loads(json.dumps(part.state()))
    rest = searched(next_of(noise[7:]), state=state, first=7)
    assert rest.state() == whole.state()
    assert WindowSearch(Learn(budget=0.34, steps=20), LAYERS, rest.state()).plan == whole.plan


@pytest.mark.parametrize("window", [(0, 2), (1, 3), (2, 4), (4, 6)])
def test_a_frozen_model_whose_answers_come_from_a_window_gives_that_window(make_model, make_batch, window):
    model = make_model("llama").train().requires_grad_(False)
    batch = make_batch(*["ttItttt"] * 24)
    expected = Fused(StagePlan(*window))
    logits = model(**batch, schedule=expected, logits_to_keep=1).logits[:, -1]
    answers = torch.cat([batch["input_ids"], logits.argmax(dim=-1)[:, None]], dim=1)
    given = {"input_ids": answers, "attention_mask": torch.ones_like(answers), "pixel_values": batch["pixel_values"]}
    labels = torch.full_like(answers, -100)
    labels[:, -1] = answers[:, -1]
    search = WindowSearch(Learn(budget=0.34, steps=25), LAYERS)
    for step in range(25):
        model(**given, labels=labels, schedule=search.schedule(step, model.device)).loss.backward()
        search.end_step(step + 1)
    assert search.plan == StagePlan(*window)


@pytest.mark.parametrize(
    ("stages", "more", "words"),
    [
        ("{learn: {steps: 5}}", [], "model.stages.learn.budget: missing key, expected number > 0 and < 1"),
        ("{learn: {budget: 1.5, steps: 5}}", [], "model.stages.learn.budget: got 1.5"),
        ("{learn: {budget: 0.4, steps: 0}}", [], "model.stages.learn.steps: got 0"),
        (
            "{learn: {budget: 0.4, steps: 5, step: 5}}",
            [],
            "model.stages.learn.step: unknown key; did you mean 'steps'?",
        ),
        ("{learn: {budget: 0.4, steps: 5, update: half}}", [], "model.stages.learn.update: got 'half'"),
        ("{learn: 5}", [], "model.stages.learn: got 5 (int), expected a mapping of budget, steps, update"),
        ("{learn: {budget: 0.4, steps: 5}, enter: 2}", [], "model.stages.enter: unknown key; expected learn"),
        ("{learn: {budget: 0.4, steps: 5}}", ["train.max_seconds=9"], "train.max_seconds: got 9"),
        ("{learn: {budget: 0.4, steps: 5}}", ["train.precision=fp16"], "train.precision: got fp16"),
        ("{learn: {budget: 0.4, steps: 5}}", ["train.lora={layers: window}"], "got lora.layers window"),
    ],
)
def test_a_wrong_search_is_one_line(stages, more, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipes/quickstart.yaml", [*ON_STEPS, f"model.stages={stages}", *more])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_search_has_a_layer_at_least_and_ends_before_the_run():
    with pytest.raises(RecipeError, match=r"learn\.budget: got 0\.1, expected at least 0\.125, one of the decoder's 8"):
        check_search(Learn(budget=0.1, steps=5), num_layers=8, steps=None)
    with pytest.raises(RecipeError, match=r"learn\.steps: got 5, expected fewer than the run's 5"):
        check_search(Learn(budget=0.5, steps=5), num_layers=8, steps=5)
    assert [Learn(budget=share, steps=1).width(8) for share in (0.125, 0.374, 0.375, 0.9)] == [1, 2, 3, 7]
    recipe = load_recipe("recipes/quickstart.yaml", [*ON_STEPS, "model.stages={learn: {budget: 0.1, steps: 5}}"])
    with pytest.raises(RecipeError, match=r"learn\.budget: got 0\.1"):
        list(preview(recipe))


def test_a_check_counts_the_search_and_the_window(tmp_path):
    stages = "model.stages={learn: {budget: 0.4, steps: 30}}"
    recipe = load_recipe("recipes/quickstart.yaml", [*ON_STEPS, stages, f"output={tmp_path}"])
    assert recipe.model.plan_fields == {"stages": None, "plans": None}
    text = "\n".join(preview(recipe))
    assert "stages: the first 30 steps find the window, 3 of 8 layers" in text
    assert "search, 33% of the steps: 512 visual token-layers (dense 512)" in text
    assert "trained, 67% of the steps: 192 visual token-layers (dense 512)" in text


def test_the_gates_are_drawn(tmp_path):
    lines = [{"step": step, "gate_0": 1.0, "gate_1": 1 - step / 9} for step in (3, 6, 9)] + [{"step": 12, "loss": 1.0}]
    draw_gates(lines, tmp_path / "gates.png")
    assert Image.open(tmp_path / "gates.png").size[0] > 100


# -- runs -------------------------------------------------------------------------------------------------------------


def sighted(recipe, folder, layers):
    """Makes a recipe's data questions about colours, and its model one that can look in some layers alone.

    In the other layers attention writes nothing, and only those layers learn: elsewhere no text sees anything.
    """
    rows = []
    for number in range(32):
        colour = list(COLOURS)[number % 4]
        shade = tuple(min(255, part + 3 * (number // 4)) for part in COLOURS[colour])
        Image.new("RGB", (64, 64), shade).save(folder / f"{number}.png")
        asked = {"from": "human", "value": "<image>\nwhat color is the shape?"}
        rows.append({"image": f"{number}.png", "conversations": [asked, {"from": "gpt", "value": colour}]})
    (folder / "rows.json").write_text(json.dumps(rows))
    recipe["data"] |= {"files": [str(folder / "rows.json")], "images": str(folder)}
    build_initial(Recipe.model_validate(recipe), folder / "blind")
    file = folder / "blind/model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.startswith("language_model") and "o_proj" in name and layer_of(name) not in range(*layers):
            weight.zero_()
    save_file(weights, file, metadata={"format": "pt"})
    recipe["model"] = {"checkpoint": str(folder / "blind"), "stages": recipe["model"]["stages"]}
    recipe["train"]["layers"] = list(layers)
    return recipe


@pytest.mark.parametrize("layers", [(0, 2), (2, 4)])
def test_training_finds_the_layers_that_can_see(tiny_recipe, train_here, tmp_path, layers):
    rates = {"projector": 3e-3, "vision_tower": 3e-3, "language_model": 3e-3}
    recipe = tiny_recipe(
        tmp_path / "run",
        learning_rate=rates,
        global_batch=16,
        per_device_batch=16,
        max_steps=32,
        log_steps=3,
        scheduler="constant",
    )
    recipe["model"]["stages"] = {"learn": {"budget": 0.5, "steps": 30}}
    output = train_here(sighted(recipe, tmp_path, layers))
    plan = {"enter": layers[0], "exit": layers[1]}
    assert json.loads((output / "stages.json").read_text()).items() >= plan.items()
    assert FusedAutoModel.from_pretrained(output / "final").plan == StagePlan(*layers)
    lines = log(output)
    assert [line["step"] for line in lines if "gate_0" in line] == list(range(3, 31, 3))
    assert lines[-2].items() >= plan.items()
    assert lines[-2]["window_weight"] > 0.5
    assert "window_weight" not in lines[-1]
    assert (output / "gates.png").is_file()


def test_a_run_stopped_in_the_search_and_after_it_goes_on_as_if_it_was_not(tiny_recipe, train_here, capsys):
    def recipe(output):
        made = tiny_recipe(output, max_steps=8, log_steps=2)
        made["data"]["files"] = made["data"]["files"][:1]
        made["model"]["stages"] = {"learn": {"budget": 0.5, "steps": 5, "update": "kv"}}
        made["eval"] = {"share": 0.2, "every": 4}
        return made

    whole = train_here(recipe("learned"))
    told = capsys.readouterr().out
    assert "step 5: found the window [" in told
    part = train_here(recipe("stopped"), stop_in=3)
    assert json.loads((part / "checkpoint-3/config.json").read_text()).get("stages") is None
    assert not (part / "stages.json").exists()
    train_here(recipe("stopped"), stop_in=3)  # 3 more
    assert json.loads((part / "checkpoint-6/config.json").read_text())["stages"]["update"] == "kv"
    train_here(recipe("stopped"))
    for one, other in zip(log(whole), log(part), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - TIMES:
            assert other[name] == pytest.approx(one[name], rel=1e-6), (one["step"], name)
    assert [line["step"] for line in log(whole) if "loss" in line] == [2, 4, 5, 6, 8]
    assert (part / "stages.json").read_text() == (whole / "stages.json").read_text()
    weights, others = (load_file(folder / "final/model.safetensors") for folder in (whole, part))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, msg=name)


def test_adapters_too_are_merged_into_a_checkpoint_with_the_plan(tiny_recipe, train_here):
    recipe = tiny_recipe("adapted", max_steps=3, lora={"r": 4, "alpha": 8.0})
    recipe["model"]["stages"] = {"learn": {"budget": 0.5, "steps": 2}}
    output = train_here(recipe)
    plan = StagePlan.from_dict(json.loads((output / "stages.json").read_text()))
    assert FusedAutoModel.from_pretrained(output / "final").plan == plan


def log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
