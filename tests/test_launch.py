"""launch.sh in a folder of its own, with stand-ins for Python and DeepSpeed that note how they are called."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/usr/bin/env bash
here=$(cd "$(dirname "$0")" && pwd)
[[ "$1" == -c || "$1" == --version ]] && exit 0
echo "python $* RANK=${RANK:-} LOCAL_RANK=${LOCAL_RANK:-} WORLD_SIZE=${WORLD_SIZE:-}" >>"$here/calls"
if [[ "$*" == *"-m venv"* ]]; then
  mkdir -p .venv/bin
  cp "$here/python3" .venv/bin/python
  cp "$here/deepspeed" .venv/bin/deepspeed
fi
[[ "$*" == *endless* ]] || exit 0
trap 'echo saved >>saved; exit 0' TERM
touch ready
while true; do sleep 0.1; done
"""
NO_GPU = "#!/bin/sh\nexit 9\n"
DEEPSPEED = r"""#!/usr/bin/env bash
here=$(cd "$(dirname "$0")" && pwd)
echo "deepspeed $* DS_ACCELERATOR=${DS_ACCELERATOR:-}" >>"$here/calls"
[[ "$*" == *model.stages=null* ]] && [[ -n ${DENSE_EXIT:-} ]] && exit "$DENSE_EXIT"
[[ "$* ${HOW_LONG:-}" == *endless* ]] || exit "${DEEPSPEED_EXIT:-0}"
[[ "$*" == *slow_start* ]] && touch starting && sleep 1
rank='trap "echo saved >>saved; exit 0" TERM; echo >>ready; while true; do sleep 0.1; done'
[[ "$*" == *stubborn* ]] && rank='trap "" TERM; touch ready; while true; do sleep 0.1; done'
# runner -> launcher -> rank, as DeepSpeed has them; only a rank that gets the signal saves
rank=$rank bash -c 'LOCAL_RANK=0 bash -c "$rank"; exit $?'
exit $?
"""


@pytest.fixture
def sandbox(tmp_path):
    for name in ("launch.sh", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name, text in {"python3": PYTHON, "deepspeed": DEEPSPEED, "g++": "#!/bin/sh\n", "nvidia-smi": NO_GPU}.items():
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(0o755)
    return tmp_path


def start(sandbox, *arguments, start_new_session=False, **more):
    environment = {**os.environ, "PATH": f"{sandbox / 'bin'}:/usr/bin:/bin", "PYTHON": "", **more}
    for name in list(environment):  # what this machine or another test has set
        if name.startswith(("SLURM", "DS_ACCELERATOR", "HOSTFILE")) and name not in more:
            del environment[name]
    return subprocess.Popen(
        [str(sandbox / "launch.sh"), *arguments],
        cwd="/",
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=start_new_session,
    )


def launch(sandbox, *arguments, **more):
    process = start(sandbox, *arguments, **more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def calls(sandbox):
    files = [sandbox / "bin/calls", sandbox / ".venv/bin/calls"]
    return [line for file in files if file.is_file() for line in file.read_text().splitlines()]


def test_set_up_makes_the_environment_once(sandbox):
    code, _, err = launch(sandbox, "setup")
    assert (code, err) == (0, "")
    made = calls(sandbox)
    assert "-m venv .venv" in made[0]
    assert "-m pip install" in made[1]
    assert "-r requirements.lock" in made[1]
    assert "--no-deps lmms-eval==" in made[2]
    assert "-m train.extensions" in made[3]
    assert launch(sandbox, "setup")[:2] == (0, "")
    assert calls(sandbox) == made


def test_another_lock_is_installed_again(sandbox):
    launch(sandbox, "setup")
    made = len(calls(sandbox))
    with (sandbox / "requirements.lock").open("a") as lock:
        lock.write("# changed\n")
    launch(sandbox, "setup")
    assert len(calls(sandbox)) == made + 3  # pip twice and warm; the environment stays


@pytest.mark.parametrize(("gone", "words"), [("python3", "no Python >= 3.11 found"), ("g++", "no C++ compiler found")])
def test_what_is_missing_is_named(sandbox, gone, words):
    (sandbox / "bin" / gone).unlink()
    for tool in ("bash", "dirname", "cksum", "tr", "cat", "env"):
        (sandbox / "bin" / tool).symlink_to(shutil.which(tool))
    code, _, err = launch(sandbox, "setup", PATH=str(sandbox / "bin"))
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1


def test_an_unknown_command_is_named(sandbox):
    code, _, err = launch(sandbox, "trian")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "'trian'" in err
    assert "train" in err


def test_train_runs_deepspeed_on_the_cpu_where_there_is_no_gpu(sandbox):
    code, _, _ = launch(sandbox, "train", "recipes/x.yaml", "train.max_steps=2", "model.stages=null")
    assert code == 0
    expected = "--num_accelerators 1 train/run.py recipes/x.yaml train.max_steps=2 model.stages=null"
    assert calls(sandbox)[-1] == f"deepspeed --log_level warning {expected} DS_ACCELERATOR=cpu"


def test_train_takes_every_gpu(sandbox):
    (sandbox / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    assert launch(sandbox, "train", "x")[0] == 0
    assert calls(sandbox)[-1] == "deepspeed --log_level warning train/run.py x DS_ACCELERATOR="


def test_the_exit_code_is_the_run_s(sandbox):
    assert launch(sandbox, "train", "x", DEEPSPEED_EXIT="2")[0] == 2


def test_a_hostfile_is_handed_on(sandbox):
    (sandbox / "hostfile").write_text("a slots=8\nb slots=8\n")
    launch(sandbox, "train", "x")
    assert calls(sandbox)[-1].startswith("deepspeed --log_level warning --hostfile hostfile train/run.py x")
    (sandbox / "hostfile").rename(sandbox / "hosts")
    launch(sandbox, "train", "x", HOSTFILE="hosts")
    assert calls(sandbox)[-1].startswith("deepspeed --log_level warning --hostfile hosts train/run.py x")
    code, _, told = launch(sandbox, "train", "x", HOSTFILE="host")
    assert code == 2
    assert told.strip() == "launch.sh: HOSTFILE: got 'host', expected a file that names machines"


def test_a_slurm_task_is_a_rank(sandbox):
    launch(sandbox, "setup")
    slurm = {"SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7", "MASTER_ADDR": "a"}
    code, _, err = launch(sandbox, "train", "x", "seed=1", **slurm)
    assert code == 0, err
    assert calls(sandbox)[-1] == "python train/run.py x seed=1 RANK=9 LOCAL_RANK=1 WORLD_SIZE=16"


def test_slurm_s_grace_time_reaches_the_rank_and_the_requeued_job_starts_alike(sandbox):
    """SLURM signals its tasks before a preemption, then runs the same script again on the nodes that it has by then."""
    launch(sandbox, "setup")
    slurm = {"SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7", "MASTER_ADDR": "a"}
    process = start(sandbox, "train", "endless", **slurm)
    wait_for(sandbox / "ready")
    process.send_signal(signal.SIGTERM)  # the task is the rank: launch.sh has become it
    assert (process.wait(120), (sandbox / "saved").read_text()) == (0, "saved\n")
    fewer = {**slurm, "SLURM_NTASKS": "8", "SLURM_PROCID": "1", "SLURM_RESTART_COUNT": "1"}
    assert launch(sandbox, "train", "x", **fewer)[0] == 0
    assert calls(sandbox)[-1] == "python train/run.py x RANK=1 LOCAL_RANK=1 WORLD_SIZE=8"


def test_the_quickstart_trains_twice_and_compares(sandbox):
    assert launch(sandbox)[0] == 0
    made = [line for line in calls(sandbox) if "run.py" in line or "eval" in line]
    trained = [line for line in made if "run.py" in line]
    compared = next(line for line in made if "eval.compare" in line)
    assert len(trained) == 2  # at the same time, so in any order
    fused, dense = sorted(trained, key=lambda line: "model.stages=null" in line)
    assert "--master_port 29500 train/run.py recipes/quickstart.yaml DS_ACCELERATOR=cpu" in fused
    assert "--master_port 29600 train/run.py recipes/quickstart.yaml model.stages=null" in dense
    assert made.index(compared) == len(made) - 1
    assert "outputs/quickstart_fused outputs/quickstart_dense" in compared


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_quickstart_saves_both_models_and_compares_nothing(sandbox, sent):
    launch(sandbox, "setup")
    process = start(sandbox, HOW_LONG="endless", start_new_session=True)
    ready = sandbox / "ready"
    wait_for(ready)
    while len(ready.read_text()) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, sent)  # as a terminal does
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert (sandbox / "saved").read_text().splitlines()[:2] == ["saved", "saved"]
    assert not any("eval.compare" in line for line in calls(sandbox))


def test_a_quickstart_whose_dense_model_fails_says_where_to_look(sandbox):
    code, _, err = launch(sandbox, DENSE_EXIT="7")
    assert code == 2
    assert "the dense model was not trained; see the end of outputs/quickstart_dense.txt" in err
    assert not any("eval.compare" in line for line in calls(sandbox))


def test_a_quickstart_whose_fused_model_fails_ends_with_its_exit_code(sandbox):
    assert launch(sandbox, DEEPSPEED_EXIT="3", DENSE_EXIT="0")[0] == 3
    assert not any("eval.compare" in line for line in calls(sandbox))


def start_endless(sandbox, *arguments):
    """Starts a run in a process group of its own, as a terminal does, and returns it when its rank is there."""
    process = start(sandbox, "train", "endless", *arguments, start_new_session=True)
    wait_for(sandbox / "ready")
    return process


def wait_for(file):
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("to_all", [False, True], ids=["to launch.sh", "to the process group, as a terminal does"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_the_ranks_and_their_exit_code_comes_back(sandbox, sent, to_all):
    process = start_endless(sandbox)
    (os.killpg if to_all else os.kill)(process.pid, sent)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert (sandbox / "saved").read_text() == "saved\n"


def test_a_stop_before_the_ranks_are_there_reaches_them_later(sandbox):
    process = start(sandbox, "train", "endless", "slow_start", start_new_session=True)
    wait_for(sandbox / "starting")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err


def test_a_second_ctrl_c_ends_everything_at_once(sandbox):
    process = start_endless(sandbox, "stubborn")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert time.monotonic() - started < 25
    assert "goes on from the last checkpoint" in err
    assert not (sandbox / "saved").exists()


def test_restarts_go_through_the_elastic_agent(sandbox):
    arguments = ["x", "train.max_steps=2", "--restarts", "3", "--nnodes", "1:2", "--rdzv-endpoint", "a:1"]
    assert launch(sandbox, "train", *arguments)[0] == 0
    assert calls(sandbox)[-1].startswith("python -m train.elastic " + " ".join(arguments))


def test_tests_run_without_the_slow_ones_unless_all_are_wanted(sandbox):
    launch(sandbox, "test", "tests/test_x.py")
    launch(sandbox, "test", "--all", "-q")
    quick, all_of_them = calls(sandbox)[-2:]
    workers = "python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "
    assert quick.startswith(f"{workers}-m not slow tests/test_x.py ")
    assert all_of_them.startswith(f"{workers}-q ")


def test_no_registry_is_named():
    text = (ROOT / "launch.sh").read_text() + (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "+cpu" not in text
    assert (ROOT / "requirements.lock").read_text().splitlines()[1] == "torch==2.13.0"
    assert "torchvision" not in (ROOT / "requirements.lock").read_text()  # launch.sh says why
