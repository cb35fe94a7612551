"""What `--check` and every run refuse before a weight is loaded: each fault one line that names its place."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.schema import RecipeError, load_recipe
from train.arguments import deepspeed_fingerprint
from train.checks import check_output, check_run
from train.distributed import setup_env
from train.preview import preview

ROOT = Path(__file__).resolve().parents[1]
ZERO2, ZERO3 = (json.loads((ROOT / f"recipes/deepspeed/zero{stage}.json").read_text()) for stage in (2, 3))


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def refused(*overrides, ranks=1):
    with pytest.raises(RecipeError) as caught:
        check_run(load_recipe("recipes/quickstart.yaml", ["align=null", "train.precision=fp32", *overrides]), ranks)
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(config, path, value):
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
    if value is None:
        section.pop(last, None)
    else:
        section[last] = value
    return config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([1], "got list, expected an object"),
        (3, "got int, expected an object"),
        (None, "got NoneType, expected an object"),
        ({}, "zero_optimization: got NoneType"),
        (changed(ZERO2, "zero_optimization", "x"), "zero_optimization: got str"),
        (changed(ZERO2, "zero_optimization.stage", 7), "zero_optimization.stage: got 7, expected 1, 2 or 3"),
        (changed(ZERO2, "zero_optimization.stage", "two"), "zero_optimization.stage: got 'two'"),
        (changed(ZERO2, "zero_optimization.stage", True), "zero_optimization.stage: got True"),
        (changed(ZERO2, "zero_optimization.stagee", 2), "stagee: got 2: Extra inputs"),
        (changed(ZERO2, "zero_optimization.reduce_bucket_size", "big"), "reduce_bucket_size: got 'big'"),
        (changed(ZERO2, "zero_optimization.reduce_bucket_size", -1), "reduce_bucket_size: got -1"),
        (changed(ZERO2, "zero_optimization.offload_optimizer", {"device": "moon"}), "offload_optimizer.device"),
        (changed(ZERO2, "zero_optimization.offload_optimizer", {"device": "nvme"}), "nvme_path: got nothing"),
        (
            changed(ZERO3, "zero_optimization.stage3_gather_16bit_weights_on_model_save", False),
            "got False, expected true",
        ),
        (
            changed(ZERO3, "zero_optimization.stage3_gather_16bit_weights_on_model_save", None),
            "got None, expected true",
        ),
        (changed(ZERO2, "bf16.enabled", True), 'bf16.enabled: got True, expected "auto" or false'),
        (changed(ZERO2, "bf16.enabled", "yes"), "bf16.enabled: got 'yes'"),
        (changed(ZERO2, "bf16", 3), "bf16.enabled: got 3"),
        (changed(ZERO2, "fp16.enabled", True), "fp16.enabled: got True"),
        (changed(ZERO2, "train_batch_size", 7), 'train_batch_size: got 7, expected "auto" or 32'),
        (changed(ZERO2, "train_micro_batch_size_per_gpu", 7), "train_micro_batch_size_per_gpu: got 7"),
        (changed(ZERO2, "gradient_accumulation_steps", 3), "gradient_accumulation_steps: got 3"),
        (changed(ZERO2, "gradient_clipping", 0.5), 'gradient_clipping: got 0.5, expected "auto" or 1.0'),
        (changed(ZERO2, "gradient_clipping", "x"), "gradient_clipping: got 'x'"),
        (changed(ZERO2, "optimizer", {"type": "Adam"}), "optimizer: got a value, expected none"),
        (changed(ZERO2, "scheduler", {"type": "WarmupLR"}), "scheduler: got a value"),
        (changed(ZERO2, "amp", {"enabled": True}), "amp: got a value"),
        (changed(ZERO2, "tensor_parallel", {"autotp_size": 2}), "tensor_parallel: got a value"),
        (changed(ZERO2, "torch_autocast", {"enabled": True, "dtype": "bf16"}), "torch_autocast: got a value"),
        (changed(ZERO2, "elasticity", {"enabled": True}), "elasticity: got a value"),
        (changed(ZERO2, "gradient_predivide_factor", 2.0), "gradient_predivide_factor: got a value"),
        (changed(ZERO2, "tensorboard", {"enabled": True}), "tensorboard: got a value, expected none: train.tracker"),
        (changed(ZERO2, "zero_optimization.zenflow", {"topk_ratio": 0.1}), "zero_optimization.zenflow: got a value"),
        (changed(ZERO2, "checkpoint", {"load_universal": True}), "checkpoint.load_universal: got a value"),
        (
            changed(ZERO2, "checkpoint.writer", {"type": "FAST"}),
            "checkpoint.writer: got a value, expected none: a check",
        ),
        (
            changed(ZERO2, "zero_optimization.load_from_fp32_weights", False),
            "load_from_fp32_weights: got a value, expected none: a run that goes on needs the float32 weights",
        ),
        (
            changed(ZERO2, "zero_optimization.offload_param", {"device": "cpu"}),
            "zero_optimization.offload_param: got one under stage 2, expected stage 3 or none",
        ),
        (changed(ZERO2, "checkpoint", [1]), "checkpoint: got list, expected an object"),
        (changed(ZERO2, "checkpoint", {"tag_validation": "x"}), "DeepSpeed refuses"),
        (changed(ZERO2, "gradient_cliping", 0.5), "gradient_cliping: unknown key; did you mean 'gradient_clipping'?"),
        (changed(ZERO2, "communication_data_type", "int7"), "int7"),
        (changed(ZERO2, "wall_clock_breakdown", "x"), "DeepSpeed refuses"),
    ],
)
def test_a_deepspeed_configuration_that_could_not_train_is_refused(tmp_path, config, words):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(config))
    message = refused(f"train.deepspeed={file}")
    assert message.startswith(f"train.deepspeed: {file}")
    assert words in message


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": NaN}', '{"bf16": {"enabled": "auto", "enabled": true}}', "[" * 5000, "\x00"]
)
def test_a_deepspeed_file_that_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "zero.json").write_text(text)
    assert "expected a JSON file" in refused(f"train.deepspeed={tmp_path / 'zero.json'}")
    assert "expected a JSON file" in refused(f"train.deepspeed={tmp_path}")


@pytest.mark.parametrize(
    "config",
    [
        ZERO2,
        ZERO3,
        changed(ZERO2, "train_micro_batch_size_per_gpu", 32),
        changed(ZERO2, "train_micro_batch_size_per_gpu", None),
        changed(ZERO2, "zero_optimization.offload_optimizer", {"device": "none"}),
        changed(ZERO2, "zero_optimization.stage", 1),
        changed(ZERO2, "bf16", None),
        changed(ZERO2, "wall_clock_breakdown", True),
    ],
)
def test_a_deepspeed_configuration_that_trains_is_taken(tmp_path, config):
    (tmp_path / "zero.json").write_text(json.dumps(config))
    options = ["align=null", "train.precision=fp32", f"train.deepspeed={tmp_path / 'zero.json'}"]
    options.append(f"output={tmp_path / 'run'}")
    check_run(load_recipe("recipes/quickstart.yaml", options), 1)


def test_a_deepspeed_configuration_is_known_by_its_content():
    assert deepspeed_fingerprint(ZERO2) == deepspeed_fingerprint(dict(reversed(ZERO2.items())))
    assert deepspeed_fingerprint(ZERO2) != deepspeed_fingerprint(changed(ZERO2, "zero_optimization.stage", 1))


@pytest.mark.parametrize(
    "name", ["/", ".", "models", "train/x", "tests", "~/runs", " ", "a[b]", "a*", "README.md", "README.md/x"]
)
def test_an_output_that_is_no_folder_of_its_own_is_refused(name):
    assert refused(f"output={json.dumps(name)}").startswith(f"output: got '{name}'")


@pytest.mark.parametrize("folder", ["/proc/runs/x", "/sys/x"])
def test_an_output_that_cannot_be_made_is_refused(folder):
    with pytest.raises(RecipeError, match=r"expected a folder that can be written"):
        check_output(Path(folder))


def write_config(folder, **changes):
    source = ROOT / "recipes/configs/quickstart"
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = config
        for parent in parents:
            section = section[parent]
        section[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    return f"model.config={folder}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config__num_attention_heads": 3}, "multiple of the number of attention heads"),
        ({"text_config__num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor"),
        ({"vision_config__num_attention_heads": 3}, "multiple of the number of attention heads"),
        ({"text_config": {"model_type": "gpt2"}}, "text_config.model_type: got gpt2"),
        ({"text_config": {"model_type": "gpt_neox", "num_hidden_layers": 8}}, "text_config.model_type: got gpt_neox"),
        ({"text_config": {"model_type": "nope"}}, "nope"),
        ({"text_config": [1]}, "text_config"),
        ({"text_config__hidden_size": "x"}, "hidden_size"),
        ({"text_config__hidden_size": -4}, "no model that can be built"),
        ({"text_config__hidden_act": "x"}, "no model that can be built"),
        ({"text_config__vocab_size": 10}, "vocab_size: got 10, expected at least"),
        ({"vision_config__patch_size": 7}, "image_seq_length: got 64, expected 81"),
        ({"vision_config__patch_size": 128}, "no model that can be built"),
        ({"vision_config__image_size": 32}, "image_seq_length: got 64, expected 16"),
        ({"vision_feature_layer": 77}, "no model that can be built"),
        ({"vision_feature_select_strategy": "x"}, "vision_feature_select_strategy"),
        ({"image_seq_length": 5}, "image_seq_length: got 5, expected 64"),
        ({"image_token_index": 3}, "image_token_index: got 3"),
        (
            {"vision_config__patch_size": 16, "image_seq_length": 16},
            "processor: got 64 tokens for an image, expected 16",
        ),
    ],
)
def test_a_config_that_describes_no_model_is_refused(tmp_path, changes, words):
    message = refused(write_config(tmp_path, **changes))
    assert message.startswith("model.config: ")
    assert words in message


@pytest.mark.parametrize("part", ["config", "checkpoint", "language_model", "vision_tower"])
@pytest.mark.parametrize("inner", [None, "text_config"])
def test_quantized_weights_cannot_be_trained(tmp_path, part, inner):
    write_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config if inner is None else config[inner])["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    others = ["model.config=null"] if part == "checkpoint" else []
    message = refused(f"model.{part}={tmp_path}", *others)
    assert message.startswith(f"model.{part}: '{tmp_path}': config.json: quantization_config: got awq, expected ")


def test_a_run_folder_is_no_checkpoint_and_its_final_is_named(tmp_path):
    base = ["model.config=null", f"model.checkpoint={tmp_path}"]
    assert "got no config.json or nothing in it" in refused(*base)
    (tmp_path / "final").mkdir()
    write_config(tmp_path / "final")
    assert refused(*base).endswith(f"; the model of this run is '{tmp_path}/final'")


@pytest.mark.parametrize("text", ["[1]", "null", "[" * 5000])
def test_a_config_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RecipeError, match=re.escape("model.config: ")):
        check_run(load_recipe("recipes/quickstart.yaml", ["align=null", f"model.config={tmp_path}"]), 1)


def test_sizes_that_cannot_be_meant_are_refused():
    assert "r: got 100, expected at most 64" in refused("train.lora={r: 100}")
    assert "model.stages.keep.2: got 100, expected at most 64" in refused("model.stages.keep={2: 100}")
    assert "workers: got 100000, expected at most" in refused("data.workers=100000")
    assert "got 32 on 3 ranks" in refused(ranks=3)


def test_a_plan_of_several_is_named():
    stages = "model.stages=[{name: one, plan: null}, {name: two, plan: {enter: 2, exit: 8, keep: {3: 100}}}]"
    assert refused(stages) == "model.stages: plan 'two': keep.3: got 100, expected at most 64, an image's tokens"


@pytest.mark.parametrize("name", ["fastv", "visipruner", "trained", "dense"])
def test_a_plan_named_like_a_schedule_is_refused(name):
    message = refused(f"model.stages=[{{name: one, plan: null}}, {{name: {name}, plan: {{enter: 2, exit: 4}}}}]")
    expected = "expected a name that is no schedule's; dense is for plan: null"
    assert message == f"model.stages: got a plan named '{name}', {expected}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.layers=[0, 99]", "train.layers: got 99, expected at most 8, the decoder's layers"),
        ("train.tower_layers=99", "train.tower_layers: got 99, expected at most 1, the tower's layers"),
        ("train.global_batch=48", "train.global_batch: got 48 on 2 ranks"),
        ("train.deepspeed=nowhere", "train.deepspeed: got 'nowhere'"),
        ("data.workers=100000", "data.workers: got 100000"),
    ],
)
def test_a_fault_is_at_the_key_of_its_phase(override, words):
    rates = "train.learning_rate={projector: 1.0e-3, vision_tower: 1.0e-3, language_model: 1.0e-3}"
    base = ["train.precision=fp32", "align.train.precision=fp32", "train.per_device_batch=16", rates]
    for prefix in ("", "align."):
        given = [*base, *([f"align.{one}" for one in base[2:]] if prefix else []), f"{prefix}{override}"]
        with pytest.raises(RecipeError) as caught:
            check_run(load_recipe("recipes/quickstart.yaml", given), 2)
        assert str(caught.value).startswith(f"{prefix}{words}")


def test_a_trace_that_begins_after_the_last_step_is_refused():
    found = refused("train.profile={steps: [5, 9]}", "train.max_seconds=null", "train.max_steps=4")
    assert found == "train.profile.steps: got [5, 9], expected to begin within the run's 4 steps"


def test_a_mode_that_weights_and_biases_does_not_know_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "bogus")
    assert refused() == "environment: WANDB_MODE: got 'bogus', expected online, offline or disabled"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "0"}, "got RANK without LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "got WORLD_SIZE without RANK"),
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RANK: got 'x', expected a whole number"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK: got 2, expected a number below WORLD_SIZE (2)"),
        (
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"},
            "MASTER_PORT: got 99999, expected at most 65535",
        ),
    ],
)
def test_a_launcher_s_variables_are_all_there_and_numbers(monkeypatch, given, words):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # what it would set stays with this test
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", **given}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=re.escape(words)):
        setup_env()


def test_a_rank_without_a_launcher_says_what_is_missing():
    """Rank 0 speaks for all; here there may be none."""
    known = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    command = [sys.executable, "train/run.py", "recipes/quickstart.yaml"]
    done = subprocess.run(command, env=known | {"RANK": "1"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("environment: got RANK without LOCAL_RANK, expected all of")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("do_center_crop: false", "data.processor: got 64 x 96 pixels of an oblong image, expected 64 x 64"),
        ("rescale_factor: .nan", "data.processor: got pixels that are no numbers"),
        ("image_std: [0.0, 0.0, 0.0]", "data.processor: got pixels that are no numbers"),
    ],
)
def test_pixels_that_the_tower_cannot_take_are_refused(settings, words):
    assert words in refused(f"data.processor={{{settings}}}")


def test_a_check_refuses_what_a_run_refuses(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    for override in ("train.lora={r: 1000}", "output=models", f"data.files=[{tmp_path / 'rows.json'}]"):
        with pytest.raises(RecipeError):
            list(preview(load_recipe("recipes/quickstart.yaml", ["align=null", override])))
