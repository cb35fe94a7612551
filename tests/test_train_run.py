"""Whole runs of train/run.py on tiny models: each test starts the command as a user does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from models import FusedLlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
ROWS, BATCH = 12, 4
KILLER = """
import os

_sync = os.fsync

def _fsync(handle):
    if "/checkpoint-4/" in os.readlink(f"/proc/self/fd/{handle}"):
        os.kill(os.getpid(), 9)
    _sync(handle)

os.fsync = _fsync
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A 4-layer LLaVA of width 32, and 12 rows of which 3 have an image: some pair of samples has just one."""
    folder = tmp_path_factory.mktemp("tiny")
    source = ROOT / "recipes/configs/quickstart"
    (folder / "config").mkdir()
    for file in source.iterdir():
        (folder / "config" / file.name).write_text(file.read_text())
    config = json.loads((source / "config.json").read_text())
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config["text_config"] |= {**narrow, "num_hidden_layers": 4, "num_key_value_heads": 2}
    config["vision_config"] |= {**narrow, "num_hidden_layers": 2, "projection_dim": 32}
    (folder / "config/config.json").write_text(json.dumps(config))
    rows = []
    for number in range(ROWS):
        question = "what color is the shape?" if number % 2 else "does the image contain a circle?"
        answer = ["red", "yes", "blue", "no"][number % 4]
        row = {"id": str(number)}
        if number in (2, 5, 6):
            Image.new("RGB", (64, 64), (20 * number, 200, 90)).save(folder / f"{number}.png")
            row["image"] = f"{number}.png"
            question = f"<image>\n{question}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append(row | {"conversations": turns * (1 + number % 3 // 2)})
        if number % 3 == 2:  # a second turn has no second image mark
            rows[-1]["conversations"] = [*turns, {"from": "human", "value": "is there a triangle?"}, turns[1]]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    data = {"files": [str(folder / "rows.json")], "images": str(folder), "format": "chat_template"}
    data |= {"max_length": 256, "image_aspect": "processor", "group_by_length": False, "workers": 0}
    train = {
        "deepspeed": "recipes/deepspeed/zero2.json",
        "learning_rate": {"projector": 2e-3, "vision_tower": 1e-3, "language_model": 1e-3},
        "global_batch": BATCH,
        "per_device_batch": 1,
        "max_steps": 6,
        "precision": "fp32",
        "gradient_checkpointing": False,
    }
    model = {"config": str(folder / "config"), "stages": {"enter": 1, "exit": 3}}
    text = {"name": "tiny", "output": str(folder / "run"), "model": model, "data": data, "train": train}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **more}


def run(*arguments, ranks=None, timeout=150, **more):
    """Runs the command with one process, or under the DeepSpeed launcher; returns the finished process."""
    command = [sys.executable]
    if ranks is not None:
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
        command += ["--master_port", str(free_port())]  # another run may have the launcher's own
    command += ["train/run.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output):
    return [(line["step"], line["loss"]) for line in log(output)]


@pytest.fixture(scope="module")
def whole(folder, recipe):
    """The uninterrupted run that others are compared with."""
    output = folder / "whole"
    done = run(recipe, f"output={output}", "train.save_steps=2")
    assert done.returncode == 0, done.stderr
    return output


def assert_same_losses(found, expected, tolerance=1e-5):
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (step, loss), (_, other) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other, rel=tolerance), f"step {step}"


@pytest.mark.slow
def test_a_run_leaves_a_loadable_checkpoint_and_its_figures(whole):
    final = whole / "final"
    model, report = FusedLlavaForConditionalGeneration.from_pretrained(final, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (model.config.stages["enter"], model.config.stages["exit"]) == (1, 3)
    figures = json.loads((final / "run.json").read_text())
    assert (figures["steps"], figures["samples"], figures["ranks"]) == (6, 6 * BATCH, 1)
    assert figures["tokens"] > figures["samples"]
    assert yaml.safe_load((final / "recipe.yaml").read_text())["train"]["save_steps"] == 2
    last = log(whole)[-1]
    assert last["learning_rate_projector"] == pytest.approx(2 * last["learning_rate_language_model"])
    assert last["loss_image"] > 0
    assert last["loss_text"] > 0
    start = FusedLlavaForConditionalGeneration.from_pretrained(whole / "init")
    assert not torch.equal(start.lm_head.weight, model.lm_head.weight)


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept(whole):
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_give_the_losses_of_one(folder, recipe, whole, zero):
    """In some step only one of the ranks has an image: a run that hangs fails by its timeout."""
    output = folder / f"zero{zero}"
    options = [f"output={output}", f"train.deepspeed=recipes/deepspeed/zero{zero}.json"]
    done = run(recipe, *options, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_losses(losses(output), losses(whole))
    final = FusedLlavaForConditionalGeneration.from_pretrained(output / "final")
    other = FusedLlavaForConditionalGeneration.from_pretrained(whole / "final")
    for name, weight in other.state_dict().items():
        torch.testing.assert_close(final.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_killed_while_it_saves_resumes_with_the_same_losses(folder, recipe, whole):
    output, options = folder / "killed", ["train.save_steps=2"]
    (folder / "killer").mkdir()
    (folder / "killer/sitecustomize.py").write_text(KILLER)
    path = os.pathsep.join(filter(None, [str(folder / "killer"), os.environ.get("PYTHONPATH")]))
    killed = run(recipe, f"output={output}", *options, PYTHONPATH=path)
    assert killed.returncode == -signal.SIGKILL
    assert (output / "checkpoint-4").is_dir()
    resumed = run(recipe, f"output={output}", *options)
    assert resumed.returncode == 0, resumed.stderr
    assert "incomplete-checkpoint-4" in resumed.stdout
    assert "checkpoint-2" in resumed.stdout
    assert_same_losses(losses(output), losses(whole), tolerance=1e-6)
    assert json.loads((output / "final/run.json").read_text())["samples"] == 6 * BATCH


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(folder, recipe):
    output = folder / "stopped"
    command = [sys.executable, "train/run.py", str(recipe), f"output={output}"]
    process = subprocess.Popen(
        [*command, "train.max_steps=100000"], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (output / "log.jsonl").is_file() or not log(output):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "the same command goes on" in told
    step = log(output)[-1]["step"]
    assert (output / f"checkpoint-{step}").is_dir()
    resumed = run(recipe, f"output={output}", f"train.max_steps={step + 2}")
    assert resumed.returncode == 0, resumed.stderr
    assert [line["step"] for line in log(output)] == list(range(1, step + 3))
    seconds = [line["seconds"] for line in log(output)]
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_the_run(folder, recipe):
    options = ["train.learning_rate.language_model=1.0e+30", "train.scheduler=constant", "train.warmup_ratio=0.0"]
    done = run(recipe, f"output={folder / 'nan'}", *options)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "step 2" in done.stderr
    assert "no checkpoint was written before" in done.stderr


@pytest.mark.slow
def test_align_then_lora_in_one_command(folder, recipe):
    """Align runs for two seconds under ZeRO-2, tune trains adapters under ZeRO-3; both resume, final/ is ordinary."""
    text = yaml.safe_load(recipe.read_text())
    align = {"data": text["data"], "train": dict(text["train"], max_steps=None, max_seconds=2.0, log_steps=1)}
    align["train"]["learning_rate"] = {"projector": 1e-3, "vision_tower": None, "language_model": None}
    text["align"], text["output"] = align, str(folder / "both")
    text["train"] |= {"max_steps": 3, "save_steps": 2, "lora": {"r": 4, "alpha": 8.0}, "gradient_checkpointing": True}
    text["train"]["deepspeed"] = "recipes/deepspeed/zero3.json"
    both = folder / "both.yaml"
    both.write_text(yaml.safe_dump(text))
    done = run(both)
    assert done.returncode == 0, done.stdout + done.stderr
    aligned = FusedLlavaForConditionalGeneration.from_pretrained(folder / "both/align/final").state_dict()
    first = FusedLlavaForConditionalGeneration.from_pretrained(folder / "both/init").state_dict()
    moved = {name for name, weight in aligned.items() if not torch.equal(weight, first[name])}
    assert moved == {name for name in first if "multi_modal_projector" in name}
    final = FusedLlavaForConditionalGeneration.from_pretrained(folder / "both/final").state_dict()
    name = "model.language_model.layers.2.self_attn.q_proj.weight"
    assert not torch.equal(final[name], aligned[name])
    assert torch.equal(final["lm_head.weight"], aligned["lm_head.weight"])
    timed = log(folder / "both/align")
    assert 2.0 <= timed[-1]["seconds"] < 20.0
    assert timed[-1]["learning_rate"] < 0.2 * max(line["learning_rate"] for line in timed)
    before = losses(folder / "both")
    shutil.rmtree(folder / "both/final")
    again = run(both)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("not run again") == 1
    assert "goes on from" in again.stdout
    assert_same_losses(losses(folder / "both"), before)


@pytest.mark.slow
def test_what_the_user_got_wrong_is_one_line_and_exit_2(folder, recipe, whole):
    done = run(recipe, f"output={whole}", "train.save_steps=2", "seed=5")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("another output, or an empty folder")
    assert "seed 0, got 5" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    wrong = run(recipe, "train.lr=1.0")
    assert (wrong.returncode, len(wrong.stderr.strip().splitlines())) == (2, 1)
    missing = run(recipe, f"data.files=[{folder / 'nowhere.json'}]", f"output={folder / 'none'}")
    assert (missing.returncode, len(missing.stderr.strip().splitlines())) == (2, 1)
