# ruff: noqa: T201
"""Kills runs at random moments until they are done, and compares them with runs that nobody killed.

    python tests/kill_matrix.py --kills 100 [--seed 0]

Each chain of starts is one setting: 1 or 2 ranks, ZeRO-2 or ZeRO-3, full or LoRA, an align phase before the tune phase.
A start is killed (SIGKILL; all processes, or one rank alone) soon after something new appears in its folder, or at any
moment; five kills go from the beginning of a chain to its end. After every kill the checkpoints that were whole must
still be there, and the next start must go on from the newest. In the end losses, gradient norms and weights must be
those of the run that was not killed, bit for bit. Exit code 0: all of them are.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from starts import free_port  # this file is run as a script: its folder is on the path

ROOT = Path(__file__).resolve().parents[1]
KILLS = 5  # of one chain
TRIGGERS = (  # in the order in which they appear
    "init.partial",
    "init",
    "align/log.jsonl",
    "align/checkpoint-2",
    "align/checkpoint-2/complete.json",
    "align/final.partial",
    "align/final",
    "checkpoint-2",
    "checkpoint-2/complete.json",
    "checkpoint-4",
    "checkpoint-4/complete.json",
    "checkpoint-6",
    "checkpoint-6/complete.json",
    "final.partial",
)


@dataclass(frozen=True)
class Setting:
    """How a chain of runs is started."""

    ranks: int
    zero: int
    lora: bool

    @property
    def name(self):
        return f"{self.ranks}-rank-zero{self.zero}{'-lora' if self.lora else ''}"


SETTINGS = [Setting(ranks, zero, lora) for zero in (2, 3) for ranks in (1, 2) for lora in (False, True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of the settings to go through")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    settings = chance.sample(SETTINGS, options.settings)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        recipe = write_recipe(folder)
        seconds = {}
        for setting in settings:
            began = time.monotonic()
            whole = start(recipe, setting, folder / f"{setting.name}-whole")
            assert whole.wait() == 0, output_of(whole)
            seconds[setting] = time.monotonic() - began
        kills, chain = 0, 0
        while kills < options.kills:
            setting = settings[chain % len(settings)]
            output = folder / f"{setting.name}-{chain}"
            at_most = min(KILLS, options.kills - kills)
            killed = run_chain(recipe, setting, output, chance, at_most=at_most, seconds=seconds[setting])
            compare(output, folder / f"{setting.name}-whole")
            kills, chain = kills + killed, chain + 1
            shutil.rmtree(output)
            print(f"{setting.name}: killed {killed} times, equal to the last bit; {kills} kills so far", flush=True)
    print(f"{kills} kills in {chain} chains: nothing saved was lost, every result is equal to the last bit")


def run_chain(recipe, setting, output, chance, *, at_most, seconds):
    """Starts a run again and again, kills it `at_most` times, and lets the last one finish; returns the kills.

    `seconds` is how long the run takes that nobody kills.
    """
    killed = 0
    while True:
        before = newest_checkpoints(output)
        unfinished = [phase for phase in (output, output / "align") if not (phase / "final").is_dir()]
        process = start(recipe, setting, output)
        trigger = choose_trigger(output, chance, kills=at_most - killed) if killed < at_most else None
        if trigger is not None and kill_somewhere(process, setting, output, chance, trigger, seconds):
            killed += 1
            now = newest_checkpoints(output)
            for phase, path in before.items():
                assert step_of(now[phase]) >= step_of(path), f"{path} is lost"
            continue
        code = process.wait()
        assert code == 0, f"{output}: exit code {code}\n{output_of(process)}"
        for phase, path in before.items():
            if phase in unfinished:
                assert f"goes on from {path}\n" in output_of(process), f"{path} was not used\n{output_of(process)}"
        return killed


def start(recipe, setting, output):
    """Starts a run in a session of its own; what it prints goes to a file beside its folder."""
    command = [sys.executable]
    if setting.ranks > 1:
        command = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "error"]
        command += ["--num_accelerators", str(setting.ranks), "--master_port", str(free_port())]
    command += ["train/run.py", str(recipe), f"output={output}"]
    command += [f"train.deepspeed=recipes/deepspeed/zero{setting.zero}.json"]
    command += ["train.lora={r: 4, alpha: 8, dropout: 0.1}"] if setting.lora else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = output.with_suffix(".txt").open("w")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    process.told = output.with_suffix(".txt")
    return process


def output_of(process):
    return process.told.read_text()


def choose_trigger(output, chance, *, kills):
    """Returns what to wait for, "" for any moment: something still to come that leaves moments for the other kills."""
    seen = max((number for number, name in enumerate(TRIGGERS) if (output / name).exists()), default=-1)
    ahead = TRIGGERS[seen + 1 :]
    return chance.choice(["", *ahead[: max(1, len(ahead) // kills)]])


def kill_somewhere(process, setting, output, chance, trigger, seconds):
    """Kills a run soon after `trigger` appears, or at any moment; returns False where it was done before."""
    if trigger:
        while process.poll() is None and not (output / trigger).exists():
            time.sleep(0.002)
        pause = chance.uniform(0, 0.1)
    else:
        pause = chance.uniform(0, seconds / 2)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(pause)
    if process.poll() is not None:
        return False
    ranks = [rank for rank in session(process.pid) if is_rank(rank)]
    if setting.ranks > 1 and ranks and chance.random() < 0.5:
        kill(chance.choice(ranks))  # the launcher ends the others
        process.wait(120)
    for member in session(process.pid):
        kill(member)
    process.wait()
    return True


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def session(leader):
    """Returns the processes of a session."""
    members = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            members.append(int(status.parts[2]))
    return members


def is_rank(process):
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"train/run.py" in words and not any(b"deepspeed" in word and b"=" not in word for word in words)


def newest_checkpoints(output):
    """Returns {folder of a phase: its newest whole checkpoint}."""
    found = {}
    for path in sorted((path.parent for path in output.glob("**/checkpoint-*/complete.json")), key=step_of):
        if path.name.startswith("checkpoint-"):
            found[path.parent] = path
    return found


def step_of(path):
    return int(re.search(r"\d+$", path.name)[0])


def compare(found, expected):
    """Raises AssertionError unless two runs have the same log lines and the same weights."""
    for phase in (".", "align"):
        lines = [read_log(folder / phase / "log.jsonl") for folder in (found, expected)]
        assert lines[0] == lines[1], f"{found}/{phase}: {lines}"
        weights = [load_file(folder / phase / "final/model.safetensors") for folder in (found, expected)]
        assert weights[0].keys() == weights[1].keys()
        for name, weight in weights[0].items():
            assert torch.equal(weight, weights[1][name]), f"{found}/{phase}: {name}"


def read_log(file):
    kept = ("step", "loss", "grad_norm", "learning_rate", "samples", "tokens", "loss_image", "loss_text")
    return [{key: line.get(key) for key in kept} for line in map(json.loads, file.read_text().splitlines())]


def write_recipe(folder):
    """Writes a 4-layer model, 12 rows of which 3 have an image, and a recipe of two phases."""
    source = ROOT / "recipes/configs/quickstart"
    shutil.copytree(source, folder / "config")
    config = json.loads((source / "config.json").read_text())
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config["text_config"] |= {**narrow, "num_hidden_layers": 4, "num_key_value_heads": 2}
    config["vision_config"] |= {**narrow, "num_hidden_layers": 2, "projection_dim": 32}
    (folder / "config/config.json").write_text(json.dumps(config))
    rows = []
    for number in range(12):
        row = {"conversations": [{"from": "human", "value": "what color is the shape?"}]}
        row["conversations"].append({"from": "gpt", "value": ["red", "blue", "gray"][number % 3]})
        if number in (2, 5, 6):
            Image.new("RGB", (64, 64), (20 * number, 200, 90)).save(folder / f"{number}.png")
            row["image"] = f"{number}.png"
            row["conversations"][0]["value"] = "<image>\nwhat color is the shape?"
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    data = {"files": [str(folder / "rows.json")], "images": str(folder), "format": "chat_template"}
    data |= {"max_length": 256, "image_aspect": "processor", "group_by_length": False, "workers": 0}
    rates = {"projector": 2e-3, "vision_tower": None, "language_model": 1e-3}
    train = {"deepspeed": "recipes/deepspeed/zero2.json", "learning_rate": rates, "global_batch": 4}
    train |= {"per_device_batch": 1, "max_steps": 6, "save_steps": 2, "log_steps": 3, "precision": "fp32"}
    train |= {"gradient_checkpointing": False, "tracker": "none"}
    align = {"data": data, "train": {**train, "max_steps": 3}}
    model = {"config": str(folder / "config"), "stages": {"enter": 1, "exit": 3}}
    recipe = {"name": "kills", "output": "x", "model": model, "data": data, "train": train, "align": align}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


if __name__ == "__main__":
    sys.exit(main())
