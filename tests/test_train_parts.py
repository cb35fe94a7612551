"""The small parts of train/: order of the samples, clock, groups, metrics, health, checkpoints, locks."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from models import FusedLlavaForConditionalGeneration
from recipes.resolved import dump_recipe
from recipes.schema import LearningRates, RecipeError, load_recipe
from train.arguments import resolve_precision, split_batch
from train.callbacks import Health, format_duration, start_tracking, stop_tracking
from train.checkpoints import (
    MARKER,
    Progress,
    RunLock,
    check_same_content,
    check_same_run,
    check_sources,
    find_fault,
    keep_newest,
    mark_complete,
    read_progress,
    set_aside,
    whole_checkpoints,
)
from train.extensions import build_lock
from train.metrics import Clock, TrainMetrics
from train.parameters import freeze, muon_groups, parameter_groups, part_of, trainable_counts
from train.samples import ShuffledSampler, WholeBatches, processor_fingerprint
from train.trainer import rate_factor
from train.weights import read_processor


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
    with pytest.raises(ValueError, match="got no sample"):
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


def trained(**more):
    return load_recipe("recipes/quickstart.yaml").train.model_copy(update=more)


def test_only_the_named_layers_learn(make_model):
    model = make_model("llama")
    freeze(model, trained(layers=[2, 4], tower_layers=1))
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".layers.")[1][0] for name in learning if "language_model" in name} == {"2", "3"}
    assert {name.split(".layers.")[1][0] for name in learning if "vision_tower" in name} == {"1"}  # the last of 2
    assert "model.multi_modal_projector.linear_1.weight" in learning
    assert not any("embed" in name or "lm_head" in name or name.endswith("norm.weight") for name in learning - {
        name for name in learning if ".layers." in name
    })  # fmt: skip
    every = {name for name, _ in model.named_parameters() if ".layers.2." in name or ".layers.3." in name}
    assert {name for name in every if "language_model" in name} <= learning


@pytest.mark.parametrize(("read", "learns"), [(-1, "1"), (-2, "0"), ([-2, -1], "1"), (1, "0")])
def test_the_last_tower_layer_is_the_last_that_is_read(make_config, read, learns):
    config = make_config("llama", None, "sdpa")
    config.vision_feature_layer = read
    model = FusedLlavaForConditionalGeneration(config)
    freeze(model, trained(tower_layers=1))
    names = [name for name, weight in model.named_parameters() if weight.requires_grad and "vision_tower" in name]
    assert {name.split(".layers.")[1][0] for name in names} == {learns}


def test_muon_takes_matrices_and_its_updates_have_the_size_of_adamws(make_model):
    model = make_model("llama")
    rates = LearningRates(projector=1e-3, vision_tower=None, language_model=2e-3)
    freeze(model, trained(learning_rate=rates))
    groups = muon_groups(
        model, parameter_groups(model, rates, decayed=[], weight_decay=0.0), betas=(0.9, 0.95), eps=1e-8
    )
    by_muon = {id(weight) for group in groups if group["use_muon"] for weight in group["params"]}
    names = {name for name, weight in model.named_parameters() if id(weight) in by_muon}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in names
    assert "model.multi_modal_projector.linear_1.weight" in names
    assert not any("embed_tokens" in name or "lm_head" in name or "norm" in name or "bias" in name for name in names)
    assert sum(len(group["params"]) for group in groups) == sum(w.requires_grad for w in model.parameters())
    assert all("betas" in group for group in groups if not group["use_muon"])
    for group in groups:
        rows, columns = group["params"][0].shape if group["use_muon"] else (1, 1)
        if group["use_muon"]:
            direction, _ = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns)))
            update = (
                group["lr"] * direction * max(1, rows / columns) ** 0.5
            )  # what DeepSpeed's Muon makes of a gradient
            assert update.square().mean().sqrt() == pytest.approx(0.2 * getattr(rates, group["name"]), rel=0.01)


def test_a_group_without_a_rate_is_frozen_and_the_others_have_their_own(make_model):
    model = make_model("llama")
    rates = LearningRates(projector=1e-3, vision_tower=None, language_model=2e-5)
    freeze(model, trained(learning_rate=rates))
    assert not any(weight.requires_grad for weight in model.model.vision_tower.parameters())
    assert part_of(model, "lm_head.weight") == "language_model"
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


def step(metrics, loss, **more):
    labels = torch.tensor([[-100, 5, 5, -100]])
    batch = {"labels": labels, "attention_mask": torch.ones(1, 4, dtype=torch.long), **more}
    metrics.add(batch, torch.tensor(loss), items=4)


def test_metrics_tell_images_and_text_apart():
    metrics = TrainMetrics(samples=10, tokens=100)
    step(metrics, 1.0, pixel_values=torch.zeros(1))
    step(metrics, 0.5)
    assert metrics.end_step(metrics.take_step().tolist())["loss"] == 1.5
    expected = {
        "loss": 1.5,
        "samples": 12,
        "tokens": 108,
        "tokens_per_second": 2.0,
        "loss_image": 2.0,
        "loss_text": 1.0,
    }
    assert metrics.report(seconds=4.0) == expected
    assert (metrics.samples, metrics.tokens) == (12, 108)


def test_metrics_tell_the_models_flops_and_their_share_of_the_peak():
    seen = {}
    metrics = TrainMetrics(image_token=7, flops=lambda sums: seen.update(sums) or 600.0, peak=1000.0)
    step(metrics, 1.0, input_ids=torch.tensor([[7, 7, 5, 5]]), pixel_values=torch.zeros(1))
    metrics.end_step(metrics.take_step().tolist())
    report = metrics.report(seconds=2.0)
    assert (report["model_flops_per_second"], report["mfu"]) == (300.0, 0.3)
    assert (seen["samples"], seen["visual"], seen["tokens"], seen["image_labels"]) == (1, 2, 4, 2)
    assert metrics.visual == 2
    resumed = TrainMetrics(image_token=7, visual=metrics.visual)
    step(resumed, 1.0, input_ids=torch.tensor([[7, 7, 7, 5]]), pixel_values=torch.zeros(1))
    resumed.end_step(resumed.take_step().tolist())
    assert resumed.visual == 5  # of the whole run, not of a window


def test_metrics_of_a_resumed_run_report_what_the_uninterrupted_one_reports():
    whole, first = TrainMetrics(), TrainMetrics()
    for loss in (0.1, 0.7, 0.3):
        for metrics in (whole, first):
            step(metrics, loss)
            metrics.end_step(metrics.take_step().tolist())
    window = json.loads(json.dumps(first.window()))
    second = TrainMetrics(samples=first.samples, tokens=first.tokens, window=window)
    for metrics in (whole, second):
        step(metrics, 0.9)
        metrics.end_step(metrics.take_step().tolist())
    assert second.report(8.0) == whole.report(8.0)


def health(**more):
    return Health(**{"vocabulary": 100, "warmup_steps": 5, "total_steps": None, "needs_images": False, **more})


def faults(health, steps, **values):
    values = {"norm": 1.0, "loss": 1.0, "had_images": False, **values}
    return [health.fault(step=step, **values) for step in range(steps)]


def test_a_live_model_has_no_fault():
    alive = health()
    assert not any(faults(alive, 5, norm=0.0))
    assert not any(faults(alive, 1))  # a gradient again: the count starts anew
    assert not any(faults(alive, 9, norm=0.0))
    assert not any(faults(health(), 300, loss=4.6))  # ln 100 = 4.605
    mixed = health(needs_images=True)  # the projector alone learns
    for _ in range(3):
        assert not any(faults(mixed, 199, norm=0.0))  # from text
        assert not any(faults(mixed, 1, had_images=True))
    assert not any(faults(health(), 250))  # text alone, and the language model learns


def test_a_dead_model_is_told_by_its_gradient_or_its_loss():
    assert "exactly 0" in faults(health(), 10, norm=0.0)[-1]
    assert "exactly 0" in faults(health(needs_images=True), 10, norm=0.0, had_images=True)[-1]
    assert "no image in 200 consecutive steps" in faults(health(needs_images=True), 200, norm=0.0)[-1]
    assert "no image in 30 consecutive steps" in faults(health(needs_images=True, total_steps=30), 30, norm=0.0)[-1]
    assert "above 4.61" in faults(health(), 206, loss=4.7)[-1]
    assert not any(faults(health(), 205, loss=4.7))
    assert "nan or infinite" in faults(health(), 1, norm=float("nan"))[0]


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "00:00:00"), (3661, "01:01:01"), (30 * 3600, "30:00:00")])
def test_the_time_left_goes_on_after_a_day(seconds, words):
    assert format_duration(seconds) == words


def write_checkpoint(folder, step, **more):
    path = folder / f"checkpoint-{step}"
    (path / "part").mkdir(parents=True)
    (path / "weights").write_bytes(b"w" * 100)
    (path / "part/rng_state.pth").write_text("r")
    mark_complete(path, Progress(step=step, seconds=1.5, samples=8, tokens=80, visual=40, ranks=2, **more))
    return path


@pytest.fixture(params=["run", "run [b] *"])
def run_folder(tmp_path, request):
    for number in (2, 10, 4):
        write_checkpoint(tmp_path / request.param, number)
    return tmp_path / request.param


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_counts_when_it_is_marked(run_folder):
    (run_folder / "checkpoint-12").mkdir()
    (run_folder / "checkpoint-12/weights").write_text("w")
    shutil.copytree(run_folder / "checkpoint-2", run_folder / "checkpoint-best")
    assert [path.name for path in whole_checkpoints(run_folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    assert read_progress(run_folder / "checkpoint-10") == Progress(10, 1.5, 8, 80, 40, 2)
    assert set_aside(run_folder) == ["incomplete-checkpoint-12: its writing was cut off; not resumed"]
    assert set_aside(run_folder) == []
    keep_newest(run_folder, 1)
    assert names(run_folder) == ["checkpoint-10", "checkpoint-best"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: flip(path / "weights"), "weights is not what was written"),
        (lambda path: (path / "weights").write_bytes(b"w" * 99), "weights has 99 bytes, expected 100"),
        (lambda path: (path / "part/rng_state.pth").unlink(), "rng_state.pth is missing"),
        (lambda path: (path / MARKER).write_text(""), "complete.json cannot be read"),
        (lambda path: (path / MARKER).write_text("[]"), "complete.json cannot be read"),
        (lambda path: (path / MARKER).write_text('{"step": 10}'), "complete.json cannot be read"),
        (lambda path: shutil.copy(path.with_name("checkpoint-4") / MARKER, path), "complete.json is of step 4"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run_folder, damage, words):
    assert find_fault(run_folder / "checkpoint-10") is None
    damage(run_folder / "checkpoint-10")
    assert words in find_fault(run_folder / "checkpoint-10")
    (note,) = set_aside(run_folder)
    assert note.startswith("broken-checkpoint-10: ")
    assert words in note
    assert whole_checkpoints(run_folder)[-1].name == "checkpoint-4"
    keep_newest(run_folder, 2)  # the next checkpoint makes room
    assert names(run_folder) == ["checkpoint-2", "checkpoint-4"]


def test_a_deletion_that_was_cut_off_is_finished(run_folder):
    (run_folder / "checkpoint-2").rename(run_folder / "deleted-checkpoint-2")
    assert set_aside(run_folder) == []
    assert names(run_folder) == ["checkpoint-10", "checkpoint-4"]


def test_a_run_folder_belongs_to_one_recipe(run_folder):
    quickstart = "recipes/quickstart.yaml"
    (run_folder / "recipe.yaml").write_text(dump_recipe(load_recipe(quickstart)))
    check_same_run(
        load_recipe(quickstart, ["train.max_steps=7", "data.expected_visual_tokens=9", "name=other"]), run_folder
    )
    changed = load_recipe(quickstart, ["train.learning_rate.projector=0.5"])
    with pytest.raises(RecipeError, match=r"train.learning_rate.projector 0\.\d+, got 0.5"):
        check_same_run(changed, run_folder)
    with pytest.raises(RecipeError, match=r"model\.stages"):
        check_same_run(load_recipe(quickstart, ["model.stages=null"]), run_folder)
    (run_folder / "recipe.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match=r"recipe.yaml: cannot be read"):
        check_same_run(changed, run_folder)
    for path in whole_checkpoints(run_folder):
        (path / MARKER).unlink()
    check_same_run(changed, run_folder)


@pytest.mark.parametrize("name", ["checkpoint-500", "init", "align/checkpoint-7", "align/final"])
def test_a_folder_that_another_program_wrote_is_no_run_folder(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    recipe = load_recipe("recipes/quickstart.yaml")
    with pytest.raises(
        RecipeError, match=rf"output: got .* with {name} and no recipe.yaml, which no run here has writ"
    ):
        check_same_run(recipe, tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    check_same_run(recipe, tmp_path)


@pytest.mark.parametrize("name", ["checkpoint-500", "init", "incomplete-checkpoint-3/x", "align/checkpoint-5"])
def test_a_run_does_not_start_from_what_it_deletes(tmp_path, name):
    start = [f"model.checkpoint={tmp_path / name}", "model.config=null"]
    with pytest.raises(
        RecipeError, match=rf"model.checkpoint: got .*{name}, inside output, where the run deletes check"
    ):
        check_sources(load_recipe("recipes/quickstart.yaml", start), tmp_path)
    check_sources(load_recipe("recipes/quickstart.yaml", start), tmp_path / "other")


def test_a_checkpoint_belongs_to_its_data_and_its_deepspeed_configuration(tmp_path):
    before = {"data": "a", "processor": "p", "config": "m", "deepspeed": "b", "schedule": "c"}
    path = write_checkpoint(tmp_path, 2, fingerprints=before)
    assert read_progress(path).fingerprints == before
    check_same_content(path, before, {**before, "schedule": "d"})
    for name, words in (
        ("data", "the data .*"),
        ("processor", "the tokenizer, chat template or image processor"),
        ("config", "config.json of the recipe's model"),
        ("deepspeed", "the content of train.deepspeed"),
    ):
        with pytest.raises(RecipeError, match=rf"{words} changed since checkpoint-2"):
            check_same_content(path, before, {**before, name: "x"})


def test_a_processor_is_known_by_what_it_makes_of_rows():
    processor = read_processor(load_recipe("recipes/quickstart.yaml").model)
    known = processor_fingerprint(processor)
    processor.tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=2)
    assert processor_fingerprint(processor) == known  # that call is over
    changed = {
        "template": lambda one: setattr(one, "chat_template", "{{ messages }}"),
        "pixels": lambda one: setattr(one.image_processor, "image_mean", [0.1, 0.2, 0.3]),
        "tokens": lambda one: one.tokenizer.add_tokens(["<new>"]),
    }
    for change in changed.values():
        other = read_processor(load_recipe("recipes/quickstart.yaml").model)
        change(other)
        assert processor_fingerprint(other) != known


def test_a_marker_tells_how_far_the_run_was_and_the_checksum_of_every_file(run_folder):
    found = json.loads((run_folder / "checkpoint-2" / MARKER).read_text())
    assert (found["step"], found["seconds"], found["samples"], found["ranks"]) == (2, 1.5, 8, 2)
    assert set(found["files"]) == {"weights", "part/rng_state.pth"}
    assert found["files"]["weights"]["bytes"] == 100


def test_accumulation_follows_from_the_global_batch():
    train = load_recipe("recipes/llava_fused.yaml").train
    assert [split_batch(train, ranks) for ranks in (1, 4, 8, 16)] == [(16, 8), (16, 2), (16, 1), (8, 1)]
    with pytest.raises(RecipeError, match="got 128 on 3 ranks of 16 samples, expected a multiple of 48"):
        split_batch(train, 3)


HOLDER = """
import sys, time
from pathlib import Path
from train.checkpoints import RunLock
RunLock(Path(sys.argv[1])).take()
print("taken", flush=True)
time.sleep(60)
"""


def test_one_run_at_a_time_holds_a_folder(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(RecipeError, match=rf"in use by process {holder.pid} on {socket.gethostname()} since 20"):
            RunLock(tmp_path).take()
    finally:
        holder.kill()
        holder.wait()
    lock = RunLock(tmp_path)
    lock.take()  # its process is gone
    lock.release()
    (tmp_path / "run.lock").unlink()
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(RecipeError, match=r"run\.lock: Is a directory, expected a file that can be written"):
        RunLock(tmp_path).take()


def test_a_holder_on_another_host_counts_while_it_renews_the_lock(tmp_path):
    file = tmp_path / "run.lock"
    file.write_text(json.dumps({"host": "elsewhere", "pid": 7, "start": "2026-01-01"}))
    os.utime(file, (time.time() - 3600,) * 2)
    lock = RunLock(tmp_path)
    lock.take()  # silent for an hour
    lock.release()
    file.write_text(json.dumps({"host": "elsewhere", "pid": 7, "start": "2026-01-01"}))
    renewed = threading.Timer(1.5, os.utime, [file])
    renewed.start()
    with pytest.raises(RecipeError, match="in use by process 7 on elsewhere since 2026-01-01"):
        RunLock(tmp_path).take()
    renewed.join()


BUILD = "from train.extensions import build_lock\nwith build_lock('made'): print('built', flush=True)"


def test_a_lock_that_a_killed_build_left_is_removed_and_a_held_one_waited_for(tmp_path):
    left = tmp_path / "made/lock"
    left.parent.mkdir()
    left.touch()
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    run = {"env": environment, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([sys.executable, "-c", BUILD], **run)
    assert done.stdout == f"removed {left}, which a killed build left behind\nbuilt\n", done.stderr
    with left.open("w"):  # this process builds
        held = subprocess.Popen([sys.executable, "-c", BUILD], env=environment, stdout=subprocess.PIPE, text=True)
        assert held.stdout.readline() == f"waiting for process {os.getpid()}, which compiles in {left.parent}\n"
    left.unlink()
    assert held.communicate(timeout=120)[0] == "built\n"


def test_a_folder_for_builds_that_cannot_be_made_is_named(monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/none")
    with pytest.raises(RecipeError, match=r"TORCH_EXTENSIONS_DIR: /proc/none: .*, expected a folder"), build_lock("x"):
        pass


@pytest.mark.parametrize(
    ("abilities", "expected"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "fp32")]
)
def test_auto_is_bf16_where_the_cpu_multiplies_it(monkeypatch, abilities, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    train = load_recipe("recipes/quickstart.yaml", ["train.precision=auto"]).train
    assert resolve_precision(train) == expected
    assert resolve_precision(train.model_copy(update={"precision": "fp32"})) == "fp32"


@pytest.mark.slow
def test_a_server_that_does_not_answer_costs_seconds(monkeypatch, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_DIR", "")
        monkeypatch.setenv("RANK", "0")
        monkeypatch.delenv("WANDB_MODE", raising=False)
        import wandb  # noqa: F401  # not part of the wait

        started = time.monotonic()
        start_tracking("wandb", "x", tmp_path)
        passed = time.monotonic() - started
        stop_tracking("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")  # what it set
    assert "cannot be reached" in capsys.readouterr().out
    assert passed < 30  # 99 s before; wandb's own start takes some of it
