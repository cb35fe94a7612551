"""Whole runs of train/run.py on tiny models, started as a user does; resumed in this process, where that is enough."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from models import FusedAutoModel, FusedLlavaForConditionalGeneration, StagePlan
from models.schedules import Dense, Fused
from recipes.schema import RecipeError, load_recipe
from tests.starts import environment, free_port, run
from train.trainer import PlanDraw, rate_factor

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


REMOVER = """
import os, pathlib

_rename = pathlib.Path.rename

def rename(self, target):
    if "/gone/" in str(target) and str(target).endswith("complete.json"):  # the first checkpoint is whole
        for image in pathlib.Path(os.environ["REMOVED"]).glob("*.png"):
            image.unlink()
    return _rename(self, target)

pathlib.Path.rename = rename
"""
ONCE = """
import os, pathlib

_sync = os.fsync

def fsync(handle):
    mark = pathlib.Path(os.environ["KILLED"])
    if "/checkpoint-4/" in os.readlink(f"/proc/self/fd/{handle}") and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), 9)
    _sync(handle)

os.fsync = fsync
"""
NO_NEXT = """
import os

def execv(*_):
    raise SystemExit("a phase in a new process")

os.execv = execv
"""
STOPPER = """
import os, pathlib, signal

_write_text = pathlib.Path.write_text

def write_text(self, *arguments, **more):
    if str(self).endswith("align/final.partial/recipe.yaml"):
        os.kill(os.getpid(), signal.SIGTERM)
    return _write_text(self, *arguments, **more)

pathlib.Path.write_text = write_text
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What is trained in this process gives the sums of the started ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


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
        "tracker": "none",
    }
    model = {"config": str(folder / "config"), "stages": {"enter": 1, "exit": 3}}
    text = {"name": "tiny", "output": str(folder / "run"), "model": model, "data": data, "train": train}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


def launch(*arguments, ranks, timeout=400):
    """Runs the command under the DeepSpeed launcher; returns the finished process."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    command += ["--master_port", str(free_port())]  # another run may use the launcher's default
    command += ["train/run.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


def as_dict(recipe, output, **train):
    """Returns a recipe to train in this process."""
    text = yaml.safe_load(recipe.read_text())
    return text | {"output": str(output), "train": text["train"] | train}


def log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output):
    return [(line["step"], line["loss"]) for line in log(output)]


@pytest.fixture(scope="module")
def whole(folder, recipe):
    """The uninterrupted run that others are compared with."""
    output = folder / "whole"
    done = run(recipe, f"output={output}", "train.save_steps=2", "train.tracker=wandb")
    assert done.returncode == 0, done.stderr
    return output


def assert_same_losses(found, expected, tolerance=1e-5):
    assert [step for step, _ in found] == [step for step, _ in expected]
    for (step, loss), (_, other) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other, rel=tolerance), f"step {step}"


def assert_same_weights(found, expected):
    weights, others = (load_file(folder / "final/model.safetensors") for folder in (found, expected))
    assert weights.keys() == others.keys()
    for name, weight in others.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_run_leaves_a_loadable_checkpoint_and_its_figures(whole):
    final = whole / "final"
    model, report = FusedLlavaForConditionalGeneration.from_pretrained(final, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (model.config.stages["enter"], model.config.stages["exit"]) == (1, 3)
    figures = json.loads((final / "run.json").read_text())
    assert (figures["steps"], figures["samples"], figures["ranks"]) == (6, 6 * BATCH, 1)
    assert figures["tokens"] > figures["visual_tokens"] > 0
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


LORA = "train.lora={r: 4, alpha: 8, dropout: 0.0}"


@pytest.fixture(scope="module")
def run_once(folder, recipe, whole):
    """Returns a function that makes a run of one setting, or finds it made; its output and its options."""

    def make(ranks, zero, *, lora=False):
        options = [
            f"train.deepspeed=recipes/deepspeed/zero{zero}.json",
            "train.save_steps=2",
            *([LORA] if lora else []),
        ]
        output = whole if (ranks, zero, lora) == (1, 2, False) else folder / f"{ranks}-ranks-zero{zero}-{lora}"
        if not output.exists():
            start = launch if (ranks, zero) == (2, 2) else run
            done = start(recipe, f"output={output}", *options, ranks=ranks)
            assert done.returncode == 0, done.stdout + done.stderr
        return output, options

    return make


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_give_the_losses_and_weights_of_one(run_once, whole, zero):
    """In some step only one of the ranks has an image: a run that hangs fails by its timeout."""
    output, _ = run_once(2, zero)
    assert_same_losses(losses(output), losses(whole))
    assert_same_weights(output, whole)


@pytest.mark.slow
def test_two_ranks_find_the_window_of_one_and_measure_the_same_attention(folder, recipe):
    options = ["model.stages={learn: {budget: 0.5, steps: 4}}", "train.sparse_attention={weight: 1.0}"]
    outputs = [folder / "searched", folder / "searched-2"]
    for output, zero, ranks in zip(outputs, (2, 3), (1, 2), strict=True):
        zeros = f"train.deepspeed=recipes/deepspeed/zero{zero}.json"
        done = run(recipe, f"output={output}", zeros, *options, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = map(log, outputs)
    for name in ("loss", "attention_spread", "grad_norm"):
        assert [line.get(name) for line in two] == pytest.approx([line.get(name) for line in one], rel=1e-3)
    for layer in range(4):
        gates = [[line[f"gate_{layer}"] for line in lines if "gate_0" in line] for lines in (one, two)]
        assert gates[1] == pytest.approx(gates[0], abs=2e-3)
        assert len(gates[0]) == 4
    plans = [(output / "stages.json").read_text() for output in outputs]
    assert plans[0] == plans[1]
    assert FusedAutoModel.from_pretrained(outputs[1] / "final").plan == StagePlan.from_dict(json.loads(plans[0]))


@pytest.mark.slow
def test_a_run_killed_while_it_saves_resumes_with_the_same_log_lines(folder, recipe, whole):
    output, options = folder / "killed", ["train.save_steps=2", "train.log_steps=3"]
    path = with_site(folder / "killer", KILLER)
    killed = run(recipe, f"output={output}", *options, PYTHONPATH=path)
    assert killed.returncode == -signal.SIGKILL
    assert (output / "checkpoint-4").is_dir()
    resumed = run(recipe, f"output={output}", *options)
    assert resumed.returncode == 0, resumed.stderr
    assert "incomplete-checkpoint-4" in resumed.stdout
    assert "goes on from" in resumed.stdout
    of_all = dict(losses(whole))
    means = [(step, sum(of_all[step - back] for back in range(3)) / 3) for step in (3, 6)]
    assert_same_losses(losses(output), means, tolerance=1e-6)
    assert json.loads((output / "final/run.json").read_text())["samples"] == 6 * BATCH
    assert not list(output.glob("incomplete-*"))


def with_site(folder, text):
    """Returns the PYTHONPATH under which every Python process runs `text` first."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(text)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def one_line(stderr):
    """Returns the one line of an error; the bars of the data's first reading do not count."""
    lines = [line for line in stderr.splitlines() if line.strip() and "examples" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def copy_of(whole, output, *, last):
    """Copies a run as it was when the checkpoint of step `last` was its newest."""
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("final", "run.lock"))
    for path in output.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > last:
            shutil.rmtree(path)
    return output


@pytest.mark.slow
def test_a_run_whose_last_step_is_saved_goes_to_the_final_save(folder, recipe, whole, train_here, capsys):
    output = copy_of(whole, folder / "trained", last=6)
    train_here(as_dict(recipe, output, save_steps=2))
    assert log(output) == log(whole)
    for name, weight in load_file(whole / "final/model.safetensors").items():
        assert torch.equal(load_file(output / "final/model.safetensors")[name], weight)
    assert json.loads((output / "final/run.json").read_text())["steps"] == 6
    train_here(as_dict(recipe, output, save_steps=2, max_steps=7))
    assert "learning rate: cosine over 6 steps" in capsys.readouterr().out
    assert [line["step"] for line in log(output)] == list(range(1, 8))
    assert json.loads((output / "final/run.json").read_text())["steps"] == 7
    train_here(as_dict(recipe, output, save_steps=2, max_steps=3))
    assert "not run again" in capsys.readouterr().out


@pytest.mark.slow
def test_a_flipped_bit_gives_way_to_the_checkpoint_before_and_other_data_is_refused(
    folder, recipe, whole, train_here, capsys
):
    output = copy_of(whole, folder / "flipped", last=6)
    states = next(output.glob("checkpoint-6/global_step6/*optim_states.pt"))
    data = bytearray(states.read_bytes())
    data[len(data) // 2] ^= 1
    states.write_bytes(data)
    rows = json.loads((folder / "rows.json").read_text())
    edited = json.loads((ROOT / "recipes/deepspeed/zero2.json").read_text())
    edited["zero_optimization"]["stage"] = 1
    (folder / "edited.json").write_text(json.dumps(edited))
    for number, (changed, told) in enumerate(
        [
            ({"deepspeed": str(folder / "edited.json")}, "the content of train.deepspeed changed since checkpoint-4"),
            ({"max_steps": 3}, "got 3, but"),
        ]
    ):
        copy = copy_of(output, folder / f"flipped-{number}", last=6)  # this process keeps the lock of what it refused
        with pytest.raises(RecipeError, match=told):
            train_here(as_dict(recipe, copy, save_steps=2, **changed))
    kept = (folder / "rows.json").read_text()
    (folder / "rows.json").write_text(json.dumps(rows[:9]))
    refused = run(recipe, f"output={output}", "train.save_steps=2")
    (folder / "rows.json").write_text(kept)
    assert refused.returncode == 2, refused.stderr
    assert "the data (rows" in one_line(refused.stderr)
    capsys.readouterr()
    train_here(as_dict(recipe, output, save_steps=2))
    assert "goes on from" in capsys.readouterr().out
    assert losses(output) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "zero", "lora"), [(1, 2, 2, False), (2, 1, 2, True), (1, 2, 3, False), (2, 1, 3, False)]
)
def test_a_run_goes_on_with_another_number_of_ranks(folder, recipe, run_once, before, after, zero, lora):
    whole, options = run_once(before, zero, lora=lora)
    output = copy_of(whole, folder / f"{after}-of-{whole.name}", last=4)
    resumed = run(recipe, f"output={output}", *options, ranks=after)
    assert resumed.returncode == 0, resumed.stderr
    assert f"checkpoint-4 is of {before} ranks: converting it for {after}" in resumed.stdout
    assert_same_losses(losses(output), losses(whole))
    assert_same_weights(output, whole)
    assert sorted(path.name for path in output.glob("*checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def wait_for_steps(output):
    deadline = time.monotonic() + 300
    while not (output / "log.jsonl").is_file() or not log(output):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_saves_and_the_same_command_goes_on(folder, recipe, sent, train_here):
    output = folder / f"stopped-by-{sent}"
    command = [sys.executable, "train/run.py", str(recipe), f"output={output}"]
    process = subprocess.Popen(
        [*command, "train.max_steps=100000"], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    wait_for_steps(output)
    process.send_signal(sent)
    told, _ = process.communicate(timeout=180)
    assert process.returncode == 0
    assert "the same command goes on" in told
    if sent == signal.SIGINT:
        return
    step = log(output)[-1]["step"]
    assert (output / f"checkpoint-{step}").is_dir()
    train_here(as_dict(recipe, output, max_steps=step + 2))
    assert [line["step"] for line in log(output)] == list(range(1, step + 3))
    seconds = [line["seconds"] for line in log(output)]
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_each_step_runs_under_the_plan_that_it_draws(folder, recipe, whole, train_here):
    """Three steps of the window, as without plans; then two dense ones, which also learn from the window."""
    text = as_dict(recipe, folder / "plans")
    window, dense = {"name": "fused", "plan": {"enter": 1, "exit": 3}}, {"name": "dense", "plan": None}
    text["model"]["stages"] = [window, {**dense, "distill": {"teacher": "fused"}}]
    output = train_here(text)
    draw = PlanDraw(load_recipe(output / "recipe.yaml").model.plans, seed=0)
    assert [draw.of_step(step).name for step in range(5)] == ["fused", "fused", "fused", "dense", "dense"]
    assert losses(output)[:3] == losses(whole)[:3]
    assert losses(output)[3] != losses(whole)[3]
    model = FusedAutoModel.from_pretrained(output / "final")
    assert (model.resolve("trained"), model.resolve("dense")) == (Fused(StagePlan(1, 3)), Dense())
    text["model"]["stages"], text["output"] = [window, dense], str(folder / "plans_alone")
    alone = train_here(text)
    assert losses(alone)[:4] == losses(output)[:4]  # the loss on the labels of the first dense step
    assert losses(alone)[4] != losses(output)[4]  # after it, the weights differ


@pytest.mark.slow
def test_the_end_of_the_deepspeed_command_stops_its_ranks(folder, recipe):
    """Killed, the command leaves its launcher and the ranks behind: they save and end by themselves."""
    output = folder / "orphans"
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    port = str(free_port())
    command = [*deepspeed, "--master_port", port, "train/run.py", str(recipe), f"output={output}"]
    process = subprocess.Popen(
        [*command, "train.max_steps=100000"], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    wait_for_steps(output)
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "memory that outlives a killed run"
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=180)  # its output ends with the last of its processes
    assert "stopped by the end of the launcher" in told
    (saved,) = output.glob("checkpoint-*/complete.json")
    assert json.loads(saved.read_text())["ranks"] == 2


@pytest.mark.slow
def test_a_fault_of_one_rank_ends_all_with_its_words_and_its_code(folder, recipe):
    """Ranks started as srun starts them, one of them on a machine without the images."""
    port, processes = str(free_port()), []
    for rank in (0, 1):
        given = environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        command = [sys.executable, "train/run.py", str(recipe), f"output={folder / 'one-rank'}"]
        command += ["data.images=/nowhere"] if rank else []
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env={**given, "MASTER_PORT": port}, stderr=subprocess.PIPE, text=True)
        )
    told = [process.communicate(timeout=240)[1].strip() for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    line = one_line("\n".join(told))
    assert line.startswith("rank 1: ")
    assert "/nowhere" in line


@pytest.mark.slow
def test_an_image_that_is_gone_ends_all_ranks_with_one_line(folder, recipe):
    output, gone = folder / "gone", folder / "gone-images"
    gone.mkdir()
    for file in folder.glob("*.png"):
        shutil.copy(file, gone)
    path = with_site(folder / "remover", REMOVER)
    options = [f"output={output}", f"data.images={gone}", "train.save_steps=1"]
    done = run(recipe, *options, ranks=2, PYTHONPATH=path, REMOVED=str(gone))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if ".png" in line]
    assert lines[0].endswith("passed over")
    (last,) = [line for line in done.stderr.splitlines() if "unreadable rows" in line]  # said once, for all ranks
    assert "expected up to 0 (data.max_bad_rows); last good checkpoint" in last
    assert "recvValue" not in done.stderr  # torch's words where rank 0 is gone too early


@pytest.mark.slow
def test_training_starts_again_by_itself_after_a_lost_rank(folder, recipe, whole):
    output = folder / "restarted"
    path = with_site(folder / "once", ONCE)
    options = ["--restarts", "2", "--nproc-per-node", "2", str(recipe), f"output={output}", "train.save_steps=2"]
    more = environment(PYTHONPATH=path, DS_ACCELERATOR="cpu", KILLED=str(folder / "once/killed"))
    done = subprocess.run(
        [sys.executable, "-m", "train.elastic", *options],
        cwd=ROOT,
        env=more,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "once/killed").exists()
    assert f"goes on from {output / 'checkpoint-2'}" in done.stdout
    assert_same_losses(losses(output), losses(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nproc-per-node", "2", "train.lr=1"], "train.lr: unknown key"),
        (["--nproc-per-node", "3"], "train.global_batch: got 4 on 3 ranks"),
        (["--nproc-per-node", "0"], "--nproc-per-node: got '0', expected a number of ranks, 1 or more"),
        (["--restarts", "-1"], "--restarts: got '-1', expected a number, 0 or more"),
        (["--nnodes", "2:1"], "--nnodes: got '2:1', expected a number of machines"),
        (["--rdzv-endpoint", "localhost"], "--rdzv-endpoint: got 'localhost', expected HOST:PORT"),
        (["--rdzv-endpoint", "no.such.host.invalid:29500"], "expected HOST:PORT of a machine that this one can find"),
    ],
)
def test_what_no_restart_would_mend_is_told_at_once(recipe, options, said):
    command = [sys.executable, "-m", "train.elastic", "--restarts", "2", str(recipe), *options]
    refused = subprocess.run(
        command, cwd=ROOT, env=environment(DS_ACCELERATOR="cpu"), capture_output=True, text=True, timeout=180
    )
    assert (refused.returncode, said in refused.stderr.strip().splitlines()[-1]) == (2, True), refused.stderr


@pytest.mark.slow
def test_a_stop_request_while_align_is_saved_keeps_tune_from_starting(folder, recipe):
    text = yaml.safe_load(recipe.read_text())
    text["align"] = {"data": text["data"], "train": dict(text["train"], max_steps=1)}
    (folder / "two.yaml").write_text(yaml.safe_dump(text))
    path = with_site(folder / "stopper", STOPPER)
    done = run(folder / "two.yaml", f"output={folder / 'two'}", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "stopped by SIGTERM" in done.stdout
    assert (folder / "two/align/final/run.json").is_file()
    assert not (folder / "two/log.jsonl").exists()


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
    """Align runs for a second under ZeRO-2, tune trains adapters under ZeRO-3; both resume, final/ is ordinary."""
    text = yaml.safe_load(recipe.read_text())
    align = {"data": text["data"], "train": dict(text["train"], max_steps=None, max_seconds=1.0, log_steps=1)}
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
    assert 1.0 <= timed[-1]["seconds"] < 20.0
    seconds = [0.0, *(line["seconds"] for line in timed[:-1])]  # at the start of each step
    rates = [1e-3 * rate_factor("cosine", one, warmup=load_recipe(both).align.train.warmup_ratio) for one in seconds]
    assert [line["learning_rate"] for line in timed] == pytest.approx(rates, abs=2e-6)
    before = losses(folder / "both")
    shutil.rmtree(folder / "both/final")
    again = run(both, PYTHONPATH=with_site(folder / "no-next", NO_NEXT))  # align is done: tune needs no new process
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
