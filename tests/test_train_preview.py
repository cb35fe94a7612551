import re
import subprocess
import sys
from pathlib import Path

import pytest

from models import StagePlan
from models.cost import plan_cost
from recipes.errors import RecipeError
from recipes.schema import Recipe, load_recipe
from train.estimate import parse_card
from train.preview import preview
from train.samples import read_samples, sample_order
from train.weights import read_config, read_processor

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("untrained")


def check(name, *overrides):
    return "\n".join(preview(load_recipe(f"recipes/{name}.yaml", overrides)))


@pytest.mark.parametrize(
    "name",
    [
        "llava_pretrain",
        "llava_dense",
        "llava_fused",
        "llava_pyramid",
        "llava_vica",
        "llava_fast",
        "llava_elastic",
        "llava_dualspeed",
    ],
)
def test_published_recipes_are_checked_without_weights_or_data(name):
    text = check(name)
    assert "projector 20,979,712" in text  # (1024 + 1) x 4096 + (4096 + 1) x 4096
    assert "steps: 2,181 of 256 samples" in text  # 558,128 rows
    assert "dense 18,432" in text  # 576 visual tokens in 32 layers
    assert "note: model.language_model: lmsys/vicuna-7b-v1.5" in text
    assert "is not here" in text
    if name != "llava_pretrain":
        assert "steps: 5,198 of 128 samples" in text  # 665,298 rows
        assert "language_model 6,738,939,904" in text


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(RecipeError, match="got 128 on 3 ranks"):
        list(preview(load_recipe("recipes/llava_fused.yaml", ["align=null"]), num_ranks=3))


def test_adapters_are_counted_and_lower_what_learns():
    assert "language_model 319,815,680" in check("llava_fused_lora")


@pytest.mark.parametrize(
    ("name", "token_layers"),
    [("llava_fused", 9216), ("llava_pyramid", 2048), ("llava_vica", 4608), ("llava_fast", 912)],
)
def test_the_cost_is_the_plan_s(name, token_layers):
    recipe = load_recipe(f"recipes/{name}.yaml")
    config = read_config(recipe.model)
    cost = plan_cost(config.text_config, recipe.plan, visual=576, text=256)
    assert cost.visual_token_layers == token_layers
    text = check(name)
    assert f"{token_layers:,} visual token-layers" in text
    assert f"{3 * 5198 * 128 * cost.flops:.3g} FLOPs" in text


def test_a_mix_of_plans_costs_its_mean_and_its_teachers():
    text = check("llava_dualspeed")
    config = read_config(load_recipe("recipes/llava_dualspeed.yaml").model).text_config
    tenth = StagePlan(0, 32, keep={0: 0.1}, select="diversity")
    fast, dense = (plan_cost(config, plan, visual=576, text=256).flops for plan in (tenth, None))
    total = 5198 * 128 * (0.9 * 3 * fast + 0.1 * (3 * dense + fast))
    assert "fast, 90% of the steps: 1,824 visual token-layers" in text
    assert f"decoder {total:.3g} FLOPs" in text


def test_steps_and_seconds_that_the_command_sets_are_the_run_s():
    assert "steps: 20 of 128 samples" in check("llava_fused", "train.max_steps=20")
    assert "as many of 128 samples as 60 s allow" in check("llava_fused", "train.max_seconds=60")


def test_it_says_whether_a_run_fits_and_how_long_it_takes():
    recipe = load_recipe("recipes/llava_fused.yaml", ["align=null"])
    text = "\n".join(preview(recipe, card=parse_card("8xH100", count=1), mfu=0.5))
    assert "memory of a GPU, ZeRO-3 on 8, 16 such samples a forward pass, in GiB: weights 1.6, gradients 1.6" in text
    assert "80 GB: fits (" in text
    hours = 1.49e19 / (8 * 989e12 * 0.5) / 3600
    assert f"time: {hours:.1f} hours at 50% of 8 x 989 TFLOP/s (MFU; 1.49e+19 model FLOPs)" in text
    small = "\n".join(preview(recipe, card=parse_card("8x16", count=1)))
    assert "16 GB: does not fit: lower train.per_device_batch" in small
    assert "time: unknown" in small


@pytest.mark.parametrize("tokens", [None, 256])
def test_rows_without_an_image_count_as_what_they_are(tiny_recipe, tokens):
    """The tokens and steps of a run match its data, in which half of the rows have no image."""
    more = {"max_steps": None, "epochs": 2} | ({} if tokens is None else {"tokens_per_step": tokens})
    given = tiny_recipe("rows", **more)
    given["data"]["max_length"] = 128
    recipe = Recipe.model_validate(given)
    (phase,) = recipe.phases
    samples = read_samples(phase, read_processor(recipe.model))
    steps, total = 2 * sample_order(phase, samples, seed=0, ranks=1).steps, 2 * sum(samples.lengths)
    text = "\n".join(preview(recipe))
    assert f"steps: {steps:,} of" in text
    found = int(re.search(r"the run: ([\d,]+) tokens", text)[1].replace(",", ""))
    assert found == pytest.approx(total, rel=0.15 if tokens else 0.02)
    assert f"a sample with an image: {samples.visual_tokens // 12} visual" in text  # of those with an image


def test_adapters_on_the_tower_leave_the_decoder_s_flops_as_they_are(tiny_recipe):
    def flops(**train):
        text = "\n".join(preview(Recipe.model_validate(tiny_recipe("flops", **train))))
        return re.search(r"decoder ([\d.e+]+) FLOPs \(dense", text)[1]

    assert flops(lora={"r": 4, "parts": ["vision_tower"]}) == flops()
    assert float(flops(lora={"r": 4})) < float(flops())


def test_held_out_rows_are_no_steps():
    text = check("llava_fused", "eval={share: 0.01, every: 500}")
    assert "steps: 5,146 of 128 samples" in text  # 665,298 - 6,653 rows
    assert "validation: 0.01 of the rows, held out, every 500 steps and at the end" in text
    assert "steps: 5,198 of 128 samples" in check("llava_fused", "eval={files: [held_out.json]}")


@pytest.mark.slow
@pytest.mark.parametrize("first", [[], ["--local_rank=0"]])
def test_the_command_checks_from_a_shell(first, tmp_path):
    """Started as the DeepSpeed launcher starts it, the script finds the repository's packages."""
    command = [sys.executable, "train/run.py", *first, "recipes/llava_fused.yaml", "train.max_steps=7", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "steps: 7 of 128 samples" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mfu", "0.3", "--check"], "--mfu: got '0.3' without --gpu, expected both or neither"),
        (["--gpu", "24"], "--gpu: got '24' without --check, expected both or neither"),
        (["--check", "--gpu", "24", "--mfu", "half"], "--mfu: got 'half', expected a number above 0, up to 1"),
    ],
)
def test_options_of_a_check_that_say_nothing_are_one_line(options, message):
    command = [sys.executable, "train/run.py", "recipes/llava_fused.yaml", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, f"recipes/llava_fused.yaml: {message}\n")


READY = [
    ("qwen3_vl_4b_fused", "300 visual + 256 text"),
    ("qwen2_5_vl_3b_fused", "391 visual + 256 text"),
    ("internvl3_2b_fused", "1792 visual + 256 text"),
    ("llava_onevision_0.5b_fused", "2929 visual + 256 text"),
    ("smolvlm2_500m_fused", "832 visual + 256 text"),
    ("mobilevlm_v2_3b_fused", "144 visual + 256 text"),
    ("qwen3_siglip2_fused", "729 visual + 256 text"),
    ("llava_1.5_13b_fused", "576 visual + 256 text"),
]


@pytest.mark.parametrize(("name", "said"), READY)
def test_the_recipes_of_todays_models_are_valid_without_a_hub(name, said):
    lines = list(preview(load_recipe(f"recipes/{name}.yaml")))
    assert lines[0] == f"{name}: the recipe is valid"
    assert any(said in line for line in lines)
    assert "projector" in "".join(line for line in lines if "trainable parameters" in line)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llava_1.5_13b_fused", [0, 6, 8, 9, 10, 13, 14, 16]),
        ("mobilevlm_v2_3b_fused", [0, 1, 14, 15, 18, 19, 21, 22, 23]),
    ],
)
def test_vica_s_layers_are_an_override(name, layers):
    override = f"model.stages={{update: kv, layers: {layers}}}"
    assert override.replace("=", "='", 1) + "'" in Path(f"recipes/{name}.yaml").read_text()
    assert load_recipe(f"recipes/{name}.yaml", [override]).plan.layers == tuple(layers)
