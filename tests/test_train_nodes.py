"""Two machines, as network namespaces of this one: one of them is lost, the other goes on alone."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NODES = {"runs-a": "10.177.1.1", "runs-b": "10.177.1.2"}
STEPS = 40


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes():
    """Two network namespaces with a cable between them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs ip and the rights to make network namespaces")
    try:
        for name in NODES:
            ip("netns", "add", name)
        ip("link", "add", "cable-a", "netns", "runs-a", "type", "veth", "peer", "name", "cable-b", "netns", "runs-b")
        for (name, address), cable in zip(NODES.items(), ("cable-a", "cable-b"), strict=True):
            for words in (["addr", "add", f"{address}/24", "dev", cable], ["link", "set", cable, "up"]):
                ip("-n", name, *words)
            ip("-n", name, "link", "set", "lo", "up")
        yield NODES
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def write_recipe(folder):
    raw = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text())
    turns = [{"from": "human", "value": "what color?"}, {"from": "gpt", "value": "red"}]
    (folder / "rows.json").write_text(json.dumps([{"conversations": turns}] * 8))
    raw |= {"align": None, "eval": None, "output": str(folder / "run")}
    raw["data"] |= {"files": [str(folder / "rows.json")]}
    raw["train"] |= {"max_steps": STEPS, "max_seconds": None, "save_steps": 2, "log_steps": 1, "precision": "fp32"}
    raw["train"] |= {"global_batch": 2, "per_device_batch": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


def start(name, address, cable, recipe):
    command = ["ip", "netns", "exec", name, sys.executable, "-m", "train.elastic", "--restarts", "2"]
    command += ["--nproc-per-node", "1", "--nnodes", "1:2", "--rdzv-endpoint", f"{NODES['runs-a']}:29400"]
    command += ["--local-addr", address, str(recipe)]
    more = {"GLOO_SOCKET_IFNAME": cable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    out = (recipe.parent / f"{name}.txt").open("w")
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **more}, stdout=out, stderr=out, start_new_session=True
    )


def steps(folder):
    log = folder / "run/log.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.is_file() else []


@pytest.mark.slow
def test_the_machine_that_is_left_goes_on_alone(nodes, tmp_path):
    recipe = write_recipe(tmp_path)
    first, second = (
        start(name, address, cable, recipe)
        for (name, address), cable in zip(nodes.items(), ("cable-a", "cable-b"), strict=True)
    )
    try:
        deadline = time.monotonic() + 180
        while len(steps(tmp_path)) < 4:
            assert time.monotonic() < deadline, (tmp_path / "runs-a.txt").read_text()
            assert first.poll() is None, (tmp_path / "runs-a.txt").read_text()
            time.sleep(0.05)
        os.killpg(second.pid, signal.SIGKILL)
        for child in subprocess.run(
            ["ip", "netns", "pids", "runs-b"], capture_output=True, text=True, check=True
        ).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(480)  # beside other work
        assert first.poll() == 0, (tmp_path / "runs-a.txt").read_text()
    finally:
        for process in (first, second):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    told = (tmp_path / "runs-a.txt").read_text()
    assert "is of 2 ranks: converting it for 1" in told
    assert steps(tmp_path) == list(range(1, STEPS + 1))
    assert json.loads((tmp_path / "run/final/run.json").read_text())["ranks"] == 1
