"""The recipes on scenes: every key explained, dense and fused alike but for the plan, one token an answer."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data import scenes
from data.scene_questions import caption
from recipes.schema import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PLANS = {"scenes": ("fused",), "smollm2": ("fused", "kv", "pyramid", "fast")}  # beside dense
NAMES = [f"{kind}_{way}" for kind, plans in PLANS.items() for way in ("dense", *plans)]


pytestmark = pytest.mark.usefixtures("untrained")


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_explained(name):
    text, _, _ = Path(f"recipes/{name}.yaml").read_text().partition("\nalign:")  # whose keys are those above
    lines = text.splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        key = re.match(r" *(\w+): *\S", line)
        assert key is None or "#" in line or above.lstrip().startswith("#"), line


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind, plans in PLANS.items() for way in plans])
def test_a_recipe_differs_from_its_dense_twin_in_the_plan_alone(kind, way):
    dense, fused = (load_recipe(f"recipes/{kind}_{one}.yaml") for one in ("dense", way))
    assert dense.plan is None
    assert fused.plan is not None
    same = {"name": "", "output": "", "model": fused.model.model_copy(update={"stages": None})}
    assert dense.model_copy(update=same) == fused.model_copy(update=same)
    assert dense.model.model_copy(update={"stages": fused.model.stages}) == fused.model
    assert fused.train.max_steps is not None
    assert fused.train.max_seconds is None  # equal steps: a busy machine changes nothing
    assert all(scenes.is_built_in(file) for file in fused.data.files)


def test_the_model_is_the_quickstart_s_with_larger_images():
    shapes = [json.loads(Path(f"recipes/configs/{name}/config.json").read_text()) for name in ("quickstart", "scenes")]
    assert (shapes[1]["image_seq_length"], shapes[1]["vision_config"]["image_size"]) == (144, 96)
    for shape in shapes:
        del shape["image_seq_length"], shape["vision_config"]["image_size"], shape["text_config"]["vocab_size"]
    assert shapes[0] == shapes[1]


def test_the_tokenizer_spells_every_question_and_gives_an_answer_one_token():
    tokenizer = AutoTokenizer.from_pretrained("recipes/configs/scenes")
    config = json.loads(Path("recipes/configs/scenes/config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<image>") == config["image_token_index"]
    assert len(tokenizer) <= config["text_config"]["vocab_size"]
    for name in scenes.NAMES:
        for _, _, asked in scenes.generate_rows(name, 150):
            for one in asked:
                assert tokenizer.decode(tokenizer(one.text).input_ids) == one.text
                assert len(tokenizer(one.answer).input_ids) == 1, one.answer
                assert len(tokenizer(one.text).input_ids) <= 12, one.text
    for _, scene, _ in scenes.generate_rows("train", 20):
        assert tokenizer.decode(tokenizer(caption(scene)).input_ids) == caption(scene)
