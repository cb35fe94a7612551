import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from data.config import DataConfig
from models.auto import config_fields, config_of
from models.families import family_of
from models.stage_plan import StagePlan
from recipes.resolved import dump_recipe
from recipes.schema import RecipeError, load_recipe

ROOT = Path(__file__).resolve().parents[1]
DOUBLED = "".join(f"c{n}: &c{n} [{f'*c{n - 1}' if n else '*b'}, {f'*c{n - 1}' if n else '*b'}]\n" for n in range(40))
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))


pytestmark = pytest.mark.usefixtures("untrained")


def fault(*overrides, recipe="recipes/quickstart.yaml"):
    """Returns the message of the RecipeError that the overrides lead to: one line that starts with the file."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{recipe}: ")
    return message.removeprefix(f"{recipe}: ")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_its_dump_loads_to_the_same(name, tmp_path):
    recipe = load_recipe(f"recipes/{name}")
    copy = tmp_path / name
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe
    assert recipe.name == Path(name).stem or name == "quickstart.yaml"
    for phase in recipe.phases:
        config = json.loads(Path(phase.train.deepspeed).read_text())
        assert config["zero_optimization"]["stage"] in (2, 3)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("llava_dense", None),
        ("llava_fused", StagePlan(enter=8, exit=24)),
        ("llava_fused_lora", StagePlan(enter=8, exit=24)),
        ("llava_fast", StagePlan(enter=8, exit=24, keep={8: 0.1}, select="diversity")),
        ("llava_pyramid", StagePlan(enter=8, exit=24, keep={10: 215, 14: 10, 16: 5, 18: 1})),
        (
            "llava_hidrop",
            StagePlan(enter=8, exit=24, keep={10: 215, 14: 10, 16: 5, 18: 1}, gradient="straight_through"),
        ),
        ("llava_vica", StagePlan(update="kv", layers=[0, 1, 7, 8, 9, 10, 11, 14])),
    ],
)
def test_the_published_recipes_hold_llava_s_hyperparameters_under_their_plans(name, stages):
    recipe = load_recipe(f"recipes/{name}.yaml")
    assert recipe.plan == stages
    align, tune = recipe.phases
    assert align.train.learning_rate.model_dump() == {
        "projector": 1e-3,
        "vision_tower": None,
        "language_model": None,
    }
    assert (align.train.global_batch, align.data.format) == (256, "plain")
    assert (tune.train.global_batch, tune.data.format) == (128, "vicuna_v1")
    assert tune.train.learning_rate.projector == 2e-5
    assert tune.train.learning_rate.vision_tower is None
    assert tune.train.learning_rate.language_model == (2e-4 if name.endswith("lora") else 2e-5)
    assert (align.data.expected_rows, tune.data.expected_rows) == (558_128, 665_298)
    assert "zero2" in align.train.deepspeed
    assert "zero3" in tune.train.deepspeed


@pytest.mark.parametrize(
    ("name", "billions"),  # as the pages of the checkpoints say; of a new VLM, what its parts add up to
    [
        ("qwen3_vl_4b_fused", "4.44"),
        ("qwen2_5_vl_3b_fused", "3.75"),
        ("internvl3_2b_fused", "2.09"),
        ("llava_onevision_0.5b_fused", "0.894"),
        ("smolvlm2_500m_fused", "0.507"),
        ("mobilevlm_v2_3b_fused", "3.0"),
        ("llava_1.5_13b_fused", "13.35"),
        ("llava_fused", "7.06"),
        ("qwen3_siglip2_fused", "2.14"),
    ],
)
def test_a_recipe_s_config_has_the_published_number_of_parameters(name, billions):
    config = config_of(config_fields(load_recipe(f"recipes/{name}.yaml").model.config, None), name)
    with torch.device("meta"):
        model = family_of(config.model_type).model_class(config)
    digits = len(billions.partition(".")[2])
    assert f"{sum(one.numel() for one in model.parameters()) / 1e9:.{digits}f}" == billions


def test_the_first_phase_writes_below_the_run_folder():
    align, tune = load_recipe("recipes/llava_fused.yaml").phases
    assert (align.name, str(align.folder)) == ("align", "outputs/llava_fused/align")
    assert (tune.name, str(tune.folder)) == ("tune", "outputs/llava_fused")
    assert [phase.name for phase in load_recipe("recipes/llava_pretrain.yaml").phases] == ["train"]


def test_an_align_phase_has_the_tracker_of_the_recipe_unless_it_names_one(tmp_path):
    saved = tmp_path / "recipe.yaml"

    def trackers(*overrides, recipe="recipes/llava_fused.yaml"):
        loaded = load_recipe(recipe, overrides)
        found = [phase.train.tracker for phase in loaded.phases]
        saved.write_text(dump_recipe(loaded))
        assert [phase.train.tracker for phase in load_recipe(saved).phases] == found
        return found

    assert trackers() == ["wandb", "wandb"]
    assert trackers("train.tracker=none") == ["none", "none"]
    assert trackers("train.tracker=tensorboard", recipe=saved) == ["tensorboard", "tensorboard"]
    assert trackers("train.tracker=none", "align.train.tracker=wandb") == ["wandb", "none"]


def test_a_stream_needs_an_end():
    path = "recipes/quickstart.yaml"
    with pytest.raises(
        RecipeError, match=r"got data.streaming, expected train.max_steps or train.max_seconds beside it"
    ):
        load_recipe(path, ["data.streaming=true", "train.max_seconds=null"])
    with pytest.raises(RecipeError, match=r"got eval.share of a stream, expected eval.files"):
        load_recipe(path, ["data.streaming=true"])
    assert load_recipe(path, ["data.streaming=true", "eval.files=[a.json]"]).data.streaming


def test_a_source_may_be_a_mapping_and_a_mistake_in_it_is_named():
    path = "recipes/quickstart.yaml"
    recipe = load_recipe(path, ["data.files=[{path: a.json, weight: 0.5}, {path: b.json, weight: 2, limit: 7}]"])
    assert [(source.path, source.weight, source.limit) for source in recipe.data.sources] == [
        ("a.json", 0.5, None),
        ("b.json", 2, 7),
    ]
    saved = yaml.safe_load(dump_recipe(recipe))
    assert DataConfig.model_validate(saved["data"]) == recipe.data
    with pytest.raises(RecipeError, match=r"quickstart.yaml: data.files.0: wieght: unknown key, expected path, weight"):
        load_recipe(path, ["data.files=[{path: a.json, wieght: 1}]"])


def test_overrides_are_yaml_on_dotted_keys():
    recipe = load_recipe(
        "recipes/quickstart.yaml",
        ["model.stages=null", "train.max_steps=20", "train.learning_rate.vision_tower=null"],
    )
    assert recipe.model.stages is None
    assert recipe.train.max_steps == 20
    assert recipe.train.learning_rate.vision_tower is None
    recipe = load_recipe("recipes/quickstart.yaml", ["model.stages.enter=1", "data.files=[a.json]"])
    assert recipe.plan.enter == 1
    assert recipe.data.files == ["a.json"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=1.0", "train.lr: unknown key; did you mean 'learning_rate'?"),
        ("train.max_step=1", "train.max_step: unknown key; did you mean 'max_steps'?"),
        ("modell.stages=null", "modell: unknown key; did you mean 'model'?"),
        (
            "train.learning_rate.projector=2e-5",
            "train.learning_rate.projector: got '2e-5' (str), expected number > 0 or null; write 2.0e-5",
        ),
        ("train.warmup_ratio=1e3", "train.warmup_ratio: got '1e3' (str), expected number >= 0 and < 1; write 1.0e+3"),
        ("train.weight_decay=2.5E3", "train.weight_decay: got '2.5E3' (str), expected number >= 0; write 2.5e+3"),
        ("train.warmup_ratio='7'", "train.warmup_ratio: got '7' (str), expected number >= 0 and < 1; write 7.0"),
        ("train.global_batch=true", "train.global_batch: got True (bool), expected whole number > 0 and <= 1000000"),
        ("train.global_batch=0", "train.global_batch: got 0 (int), expected whole number > 0 and <= 1000000"),
        ("train.warmup_ratio=1.5", "train.warmup_ratio: got 1.5 (float), expected number >= 0 and < 1"),
        ("train.scheduler=cosin", "train.scheduler: got 'cosin' (str), expected cosine, linear, constant"),
        ("train.deepspeed=null", "train.deepspeed: got None (NoneType), expected text that is not empty"),
        ("model.stages.exit=0", "model: stages.exit: got 0, expected a layer after enter (0)"),
        ("model.stages.exit=9", "model.stages.exit: got 9, beyond the decoder's 8 layers (expected at most 8)"),
        (
            "model.stages.leave=4",
            "model: stages.leave: unknown key, expected one of enter, exit, update, layers, keep, select, gradient",
        ),
        ("model.config=nowhere", "model.config: got 'nowhere', expected a folder with config.json"),
        ("train.max_steps", "got 'train.max_steps', expected dotted.key=value"),
        ("name.first=x", "name.first: name is a value, expected a section with keys"),
        ("train.max_steps=010", "train.max_steps: got 010, which YAML reads as 8, expected a decimal number"),
        ("train.max_steps=1:30", "train.max_steps: got 1:30, which YAML reads as 90, expected a decimal number"),
        ("train.max_seconds=1:30.5", "train.max_seconds: got 1:30.5, expected a decimal number"),
        ("train.max_steps=", "train.max_steps: got nothing, expected a value in YAML (null for none)"),
        ("train.=1", "got 'train.=1', expected dotted.key=value"),
        ("name=''", "name: got '' (str), expected text that is not empty"),
        (
            "data.files=[]",
            "data.files: got [] (list), expected a list of text or mappings of path, weight, limit, images, format, "
            "not empty",
        ),
        (
            "train.lora={layers: [a]}",
            "train.lora.layers: got ['a'] (list), expected all, window or a list of whole numbers",
        ),
        ("train.lora={layers: 3}", "train.lora.layers: got 3 (int), expected all, window or a list of whole numbers"),
        ("train.lora={modules: [1]}", "train.lora.modules.0: got 1 (int), expected a list of text or null, not empty"),
        ("train.layers=[1, x]", "train.layers.1: got 'x' (str), expected a list of whole numbers or null, not empty"),
        ("model.config=''", "model.config: got '' (str), expected text that is not empty or null"),
        ("seed=4294967296", "seed: got 4294967296 (int), expected whole number >= 0 and < 4294967296"),
        ("train.epochs=.inf", "train.epochs: got inf (float), expected number > 0 and <= 1000000"),
        ("train.weight_decay=.nan", "train.weight_decay: got nan (float), expected number >= 0"),
        ("seed={[a]: 1}", "seed: got a sequence as a key, expected a word or a number"),
        ("seed=!!timestamp x", "seed: got '!!timestamp x', expected a value in YAML"),
        (f"output={'x' * 300}", f"output: got '{'x' * 76}..., expected a path that a file system can hold"),
        (f"model.config={'x' * 300}", f"model.config: got '{'x' * 76}..., expected a path that a file system can hold"),
        ('output="a\\0b"', "output: got 'a\\x00b', expected a path that a file system can hold"),
        ("data.files=[", "data.files: got '[', expected a value in YAML"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(override, message):
    assert fault(override) == message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.global_batch=33", "train: got global_batch 33 with per_device_batch"),
        ("model.language_model=x model.checkpoint=y", "one or the other"),
        ("train.learning_rate.language_model=null train.lora={}", "learning_rate.language_model null"),
        ("train.learning_rate={projector: null, vision_tower: null, language_model: null}", "at least one part"),
        ("model.config=null", "neither config nor checkpoint"),
    ],
)
def test_values_that_contradict_each_other_are_refused(override, words):
    parts = re.split(r" (?=[a-z_.]+=)", override)
    assert words in fault(*parts)


@pytest.mark.parametrize(("changed", "kept"), [("train", "align.train"), ("align.train", "train")])
def test_an_override_of_one_phase_leaves_what_an_alias_shares_with_another(tmp_path, changed, kept):
    raw = yaml.safe_load(Path("recipes/quickstart.yaml").read_text())
    path = tmp_path / "shared.yaml"
    path.write_text(yaml.safe_dump({**raw, "align": {"data": raw["data"], "train": raw["train"]}}))
    assert "train: *id" in path.read_text()
    before, after = (
        load_recipe(path, overrides)
        for overrides in ([], [f"{changed}.max_steps=7", f"{changed}.learning_rate.projector=0.5"])
    )
    sections = {"train": lambda recipe: recipe.train, "align.train": lambda recipe: recipe.align.train}
    assert sections[changed](after).max_steps == 7
    assert sections[changed](after).learning_rate.projector == 0.5
    assert sections[kept](after) == sections[kept](before)


def test_a_missing_key_is_named(tmp_path):
    raw = yaml.safe_load(Path("recipes/quickstart.yaml").read_text())
    del raw["train"]["global_batch"]
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert fault(recipe=str(path)) == "train.global_batch: missing key, expected whole number > 0 and <= 1000000"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", "a: got it twice (line 2), expected once"),
        ("a: [1\n", "not YAML"),
        ("[a, b]: 1\n", "line 1: got a sequence as a key, expected a word or a number"),
        ("? {a: 1}\n: 2\n", "line 1: got a mapping as a key"),
        ("a: 1\n<<: {b: 1}\n", "line 2: got << as a key"),
        ("a: !!timestamp x\n", "not YAML"),
        ("a: 2020-99-99\n", "not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("- 1\n", "got list, expected a mapping of keys"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("a: &a [1, 2, 3]\nb: &b [*a, *a]\n" + DOUBLED, "got more than 100,000 values, expected fewer"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, words):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    assert words in fault(recipe=str(path))


def test_a_missing_file_is_refused():
    assert fault(recipe="nowhere.yaml") == "No such file or directory, expected a recipe in YAML"


@pytest.mark.parametrize("name", ["quickstart", "llava_fused"])
def test_the_recipes_for_newcomers_explain_every_key(name):
    explained, lines = set(), Path(f"recipes/{name}.yaml").read_text().splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        key = re.match(r" *(\w+): *\S", line)
        if key is None:
            continue
        if "#" in line or above.lstrip().startswith("#"):
            explained.add(key[1])
        assert key[1] in explained, f"{name}.yaml: {line}"


def test_the_quickstart_s_tokenizer_knows_every_word_of_its_data():
    from easy_vqa import get_answers, get_test_questions, get_train_questions
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("recipes/configs/quickstart")
    texts = {*get_train_questions()[0], *get_test_questions()[0], *get_answers()}
    for text in sorted(texts):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert all(len(tokenizer(answer).input_ids) == 1 for answer in get_answers())
    config = json.loads(Path("recipes/configs/quickstart/config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<image>") == config["image_token_index"]
    assert len(tokenizer) <= config["text_config"]["vocab_size"]
